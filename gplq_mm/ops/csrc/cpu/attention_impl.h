// Attention on codes, the same source on every instruction set.
//
// It is made of the vectors of a machine, and its product of a tile of queries. All names are local
// to the translation unit, as in kernels_impl.h.
//
// A task is one head of one window, or a part of its queries:
//   key panel    int8 (head_dim / 4, tokens, 4): codes, four channels of a token side by side;
//   value panel  int8 (tokens / 4, head_dim, 4): codes, four tokens of a channel side by side;
// both padded with zeros. Then blocks of a few queries: their codes, their scores, softmax, the
// codes of the probabilities, the mixed values. A block's scores stay in the nearest cache. Where
// there is a table, codes are first all written as positions, then looked up where they lie; what
// pads them then holds a level, and is cleared wherever it would be read.
#pragma once

#include "attention.h"
#include "kernels_impl.h"

namespace gplq_mm {
namespace {

// 1.5 * 2^23: adding it rounds |value| < 2^22 to an integer, half to even, in the low bits.
constexpr float kAttentionRounder = 12582912.0f;
[[maybe_unused]] constexpr int32_t kAttentionRounderBits = 0x4B400000;
// Below it 2^x is not a normal number.
[[maybe_unused]] constexpr float kSmallestExponent = -126.0f;
constexpr float kLog2E = 1.44269504088896340736f;
// Queries that are computed together.
constexpr int kQueries = 4;
// Bytes of one token that are transposed at a time: four steps.
constexpr int64_t kChunk = 16;
constexpr int64_t kAlignment = 64;
// A softmax's sum runs in as many columns of its own, whatever the vectors' width: so it is the
// same on every machine, and that of gplq_mm/quant/arithmetic.py.
constexpr int64_t kSoftmaxSums = 16;
constexpr int64_t kLine = 16;  // floats

// 2^f = 1 + f (c1 + f (c2 + ...)) for f in [0, 1], relative error below 1.5e-7 with all rounding;
// a minimax fit that is exact at 0, so that the largest score of a row has numerator 1.
constexpr float kExp2[5] = {0.69315131f, 0.24016445f, 0.055799925f, 0.0090170139f, 0.0018671374f};

template <class M>
inline typename M::Real exp2_fraction(typename M::Real f) {
  auto p = M::set(kExp2[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) p = M::fma(p, f, M::set(kExp2[i]));
  return M::fma(p, f, M::set(1.0f));
}

// A head's channels of a token are few and far from those of the next token, so the machine does
// not see them coming.
inline void fetch(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(x + i);
}

inline bool has_nan(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] != x[i]) return true;
  }
  return false;
}

// Sizes and places of the scratch memory.
template <class M>
struct Scratch {
  int64_t columns, channels;              // tokens and head_dim in whole vectors
  int64_t key_steps, value_steps;         // head_dim and tokens in steps of four
  int64_t query_stride, codes_stride;     // bytes of a row of codes, whole vectors
  int64_t chunks;                         // of a token
  int8_t *key, *value;
  float *key_term, *value_term, *scores;
  uint8_t *query, *codes, *ones, *all_ones, *staging;
  int64_t bytes;

  Scratch(const AttentionProblem& p, void* memory) {
    constexpr int64_t width = M::kWidth, rows = kQueries;
    columns = round_up(p.tokens, width);
    channels = round_up(p.head_dim, width);
    key_steps = (p.head_dim + kStep - 1) / kStep;
    value_steps = (p.tokens + kStep - 1) / kStep;
    query_stride = round_up(p.head_dim, width * kStep);
    codes_stride = round_up(p.tokens, width * kStep);
    chunks = (p.head_dim + kChunk - 1) / kChunk;
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    auto next = begin;
    auto take = [&next](int64_t size) {
      auto* place = reinterpret_cast<uint8_t*>(next);
      next += static_cast<uintptr_t>(round_up(size, kAlignment));
      return place;
    };
    auto reals = [&take](int64_t count) { return reinterpret_cast<float*>(take(4 * count)); };
    key = reinterpret_cast<int8_t*>(take(chunks * kChunk * columns));
    value = reinterpret_cast<int8_t*>(take(value_steps * channels * kStep));
    key_term = reals(columns);
    value_term = reals(channels);
    scores = reals(rows * columns);
    query = take(rows * query_stride);
    codes = take(rows * codes_stride);
    ones = take(codes_stride);
    all_ones = take(query_stride);
    staging = take(chunks * M::kWidth * kChunk);
    bytes = static_cast<int64_t>(next - begin);
  }
};

template <class M>
class Attention {
  using Real = typename M::Real;
  using Ints = typename M::Ints;
  static constexpr int64_t kWidth = M::kWidth;

 public:
  Attention(const AttentionProblem& problem, void* memory)
      : p_(problem), s_(problem, memory), added_(problem.bias != nullptr || problem.mask != nullptr) {
    // What lies beyond the tokens or channels is multiplied by zero or never read as a number,
    // but it must be the same in every run.
    __builtin_memset(s_.query, 0, kQueries * s_.query_stride);
    __builtin_memset(s_.codes, 0, kQueries * s_.codes_stride);
    __builtin_memset(s_.ones, 0, s_.codes_stride);
    __builtin_memset(s_.ones, 1, p_.tokens);
    __builtin_memset(s_.all_ones, 0, s_.query_stride);
    __builtin_memset(s_.all_ones, 1, p_.head_dim);
  }

  void run(int64_t begin, int64_t end) {
    int64_t prepared = -1;
    const int64_t blocks = (p_.tokens + kQueries - 1) / kQueries;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / p_.parts, part = task % p_.parts;
      if (pair != prepared) {
        prepared = pair;
        window_ = pair / p_.heads;
        head_ = pair % p_.heads;
        c_ = &p_.constants[head_];
        prepare_key();
        prepare_value();
      }
      const int64_t last = blocks * (part + 1) / p_.parts;
      const bool next = part + 1 == p_.parts && task + 1 < end;
      for (int64_t block = blocks * part / p_.parts; block < last; ++block) {
        if (next) fetch_next(block * kQueries);
        added_ ? row_block<true>(block * kQueries) : row_block<false>(block * kQueries);
      }
    }
  }

 private:
  // The head's floats of a token; operand 0 is q, 1 k, 2 v.
  const float* source(int operand, int64_t token) const {
    return source(operand, token, window_, head_);
  }
  const float* source(int operand, int64_t token, int64_t window, int64_t head) const {
    const int64_t index = window * p_.tokens + token;
    const int64_t row = p_.rows == nullptr ? index : p_.rows[index];
    return p_.qkv + ((row * 3 + operand) * p_.heads + head) * p_.head_dim;
  }

  // k and v of the next head, while this one's products keep the memory idle.
  void fetch_next(int64_t first) const {
    const bool same = head_ + 1 < p_.heads;
    const int64_t window = same ? window_ : window_ + 1, head = same ? head_ + 1 : 0;
    for (int64_t t = first; t < p_.tokens && t < first + kQueries; ++t) {
      fetch(source(1, t, window, head), p_.head_dim);
      fetch(source(2, t, window, head), p_.head_dim);
    }
  }

  struct Grid {
    Grid(const OperandGrid& g, bool fused)
        : inverse(M::set(g.inverse)),
          shift(M::set(g.shift)),
          low(M::set(g.low)),
          high(M::set(g.high)),
          rounder(M::set(kAttentionRounder - static_cast<float>(g.base))),
          base(M::set_int(g.base)),
          usual(fused && g.base % 2 == 0),
          fuses(fused) {}
    Real inverse, shift, low, high, rounder;
    Ints base;
    bool usual, fuses;
  };

  // A code in the low byte of each lane. Clamping to integers before rounding equals clamping
  // after it. NaN becomes `low`.
  template <bool usual>
  static Ints code(Real x, const Grid& g) {
    if (usual) {
      const Real steps = M::fused(x, g.inverse, g.shift);
      // An even base leaves halves as they are, between an even and an odd integer.
      return M::bits(M::add(M::min(M::max(steps, g.low), g.high), g.rounder));
    }
    const Real steps =
        g.fuses ? M::fused(x, g.inverse, g.shift) : M::add(M::mul(x, g.inverse), g.shift);
    return M::sub_int(M::to_int(M::min(M::max(steps, g.low), g.high)), g.base);
  }
  static Ints code(Real x, const Grid& g) { return g.usual ? code<true>(x, g) : code<false>(x, g); }

  static Real load(const float* x, int64_t count) {
    return count >= kWidth ? M::load(x) : M::load_part(x, count);
  }

  // Codes of one token, a chunk every `stride` bytes; zeros up to the end of the last chunk.
  void token_codes(const float* x, const Grid& grid, uint8_t* to, int64_t stride,
                   typename M::Bad& bad) const {
    grid.usual ? token_codes<true>(x, grid, to, stride, bad)
               : token_codes<false>(x, grid, to, stride, bad);
  }

  template <bool usual>
  void token_codes(const float* x, const Grid& grid, uint8_t* to, int64_t stride,
                   typename M::Bad& bad) const {
    const float* const end = x + p_.head_dim;
    for (; end - x >= kChunk; x += kChunk, to += stride) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kChunk; i += kWidth) {
        const Real real = M::load(x + i);
        M::note_nan(bad, real);
        M::store_bytes(to + i, code<usual>(real, grid));
      }
    }
    if (x == end) return;
    for (int64_t i = 0; i < kChunk; i += kWidth) {
      const int64_t left = end - x - i < 0 ? 0 : end - x - i < kWidth ? end - x - i : kWidth;
      const Real real = M::load_part(x + (left > 0 ? i : 0), left);
      M::note_nan(bad, real);
      M::store_bytes(to + i, M::first(code<usual>(real, grid), left));
    }
  }

  void prepare_key() {
    const Grid grid(c_->key, p_.fused);
    typename M::Bad bad = M::no_nan();
    // In lanes of 16 bytes, a vector holds tokens i, i + 4, i + 8, ...: transposing the four
    // double words of each lane over four vectors brings tokens into order.
    constexpr int64_t kLanes = kWidth / 4;
    for (int64_t from = 0; from < p_.tokens; from += kWidth) {
      for (int64_t t = 0; t < kWidth; ++t) {
        uint8_t* to = s_.staging + ((t % 4) * kLanes + t / 4) * kChunk;
        if (from + t < p_.tokens) {
          token_codes(source(1, from + t), grid, to, kWidth * kChunk, bad);
        } else {
          for (int64_t chunk = 0; chunk < s_.chunks; ++chunk) {
            __builtin_memset(to + chunk * kWidth * kChunk, 0, kChunk);
          }
        }
      }
      for (int64_t chunk = 0; chunk < s_.chunks; ++chunk) {
        M::transpose(s_.staging + chunk * kWidth * kChunk,
                     s_.key + (chunk * 4 * s_.columns + from) * kStep, s_.columns * kStep);
      }
    }
    if (c_->key.table != nullptr) {
      look_up_panel(c_->key.table, s_.key, s_.columns, p_.head_dim);
    }
    const Real factor = M::set(c_->key_factor);
    for (int64_t from = 0; from < s_.columns; from += kWidth) {
      Real term = M::set(0.0f);
      if (c_->key_factor != 0.0f) {
        term = M::mul(M::to_real(column_sums(s_.key + from * kStep, s_.columns, s_.key_steps)),
                      factor);
      }
      M::store(s_.key_term + from, term);
    }
    // Softmax gives these columns nothing.
    for (int64_t t = p_.tokens; t < s_.columns; ++t) s_.key_term[t] = -__builtin_inff();
    if (M::any_nan(bad)) {
      for (int64_t t = 0; t < p_.tokens; ++t) {
        if (has_nan(source(1, t), p_.head_dim)) s_.key_term[t] = __builtin_nanf("");
      }
    }
  }

  void prepare_value() {
    const Grid grid(c_->value, p_.fused);
    typename M::Bad bad = M::no_nan();
    for (int64_t step = 0; step < s_.value_steps; ++step) {
      const int64_t exist = p_.tokens - step * kStep;
      const float* from[kStep];
      for (int64_t i = 0; i < kStep; ++i) {
        from[i] = source(2, step * kStep + (i < exist ? i : 0));
      }
      int8_t* to = s_.value + step * s_.channels * kStep;
      for (int64_t c = 0; c < s_.channels; c += kWidth) {
        Ints codes[kStep];
#pragma GCC unroll 4
        for (int i = 0; i < kStep; ++i) {
          const Real real = load(from[i] + c, p_.head_dim - c);
          M::note_nan(bad, real);
          codes[i] = i < exist ? code(real, grid) : M::set_int(0);
        }
        M::store_quads(to + c * kStep, codes[0], codes[1], codes[2], codes[3]);
      }
    }
    if (c_->value.table != nullptr) {
      look_up_panel(c_->value.table, s_.value, s_.channels, p_.tokens);
    }
    for (int64_t c = 0; c < s_.channels; c += kWidth) {
      Real term = M::set(c_->out_offset);
      if (c_->value_factor != 0.0f) {
        const Ints sums = column_sums(s_.value + c * kStep, s_.channels, s_.value_steps);
        term = M::fma(M::to_real(sums), M::set(c_->value_factor), term);
      }
      M::store(s_.value_term + c, term);
    }
    if (M::any_nan(bad)) {
      for (int64_t t = 0; t < p_.tokens; ++t) {
        const float* x = source(2, t);
        for (int64_t c = 0; c < p_.head_dim; ++c) {
          if (x[c] != x[c]) s_.value_term[c] = x[c];
        }
      }
    }
  }

  // Levels in place of positions in a panel of `length` channels or tokens; what stands beyond
  // the last one in its step stays zero.
  static void look_up_panel(const uint8_t* table, int8_t* panel, int64_t columns, int64_t length) {
    auto* bytes = reinterpret_cast<uint8_t*>(panel);
    const int64_t steps = (length + kStep - 1) / kStep, row = columns * kStep;
    look_up<M>(table, steps * row, bytes);
    if (length % kStep == 0) return;
    const uint32_t present = (uint32_t{1} << (8 * (length % kStep))) - 1;
    uint8_t* const last = bytes + (steps - 1) * row;
    for (int64_t i = 0; i < row; i += kStep) {
      uint32_t four;
      __builtin_memcpy(&four, last + i, sizeof(four));
      four &= present;
      __builtin_memcpy(last + i, &four, sizeof(four));
    }
  }

  // Sums over the steps of one vector of columns of a panel.
  static Ints column_sums(const int8_t* panel, int64_t columns, int64_t steps) {
    Ints sum = M::set_int(0);
    for (int64_t step = 0; step < steps; ++step) {
      sum = M::sum_of_codes(sum, panel + step * columns * kStep);
    }
    return sum;
  }

  // Sums of four rows of codes, each times 0 or 1. They are below 2^24 and exact.
  static void row_sums(const uint8_t* codes, int64_t stride, const uint8_t* ones, float* sums) {
    Real rows[kQueries];
    for (int64_t r = 0; r < kQueries; ++r) {
      Ints sum = M::set_int(0);
      for (int64_t i = 0; i < stride; i += kWidth * kStep) {
        sum = M::sum_of_codes(sum, codes + r * stride + i, ones + i);
      }
      rows[r] = M::to_real(sum);
    }
    M::sums(rows, sums);
  }

  template <bool added>
  void row_block(int64_t first) {
    const int64_t rows = p_.tokens - first < kQueries ? p_.tokens - first : kQueries;
    prepare_query<added>(first, rows);
    for (int64_t t = first + kQueries; t < p_.tokens && t < first + 2 * kQueries; ++t) {
      fetch(source(0, t), p_.head_dim);
    }
    scores<added>(first);
    const OperandGrid& g = c_->probs;
    const bool plain = g.shift == 0.0f && g.low <= 0.0f && g.base % 2 == 0;
    if (p_.row_relative) {
      plain ? softmax<added, true, true>() : softmax<added, true, false>();
    } else {
      plain ? softmax<added, false, true>() : softmax<added, false, false>();
    }
    if (g.table != nullptr) look_up<M>(g.table, kQueries * s_.codes_stride, s_.codes);
    if (nan_queries_) {
      for (int64_t r = 0; r < rows; ++r) {
        if (has_nan(source(0, first + r), p_.head_dim)) row_factor_[r] = __builtin_nanf("");
      }
    }
    mix(first, rows);
  }

  template <bool added>
  void prepare_query(int64_t first, int64_t rows) {
    const Grid grid(c_->query, p_.fused);
    typename M::Bad bad = M::no_nan();
    for (int64_t r = 0; r < rows; ++r) {
      token_codes(source(0, first + r), grid, s_.query + r * s_.query_stride, kChunk, bad);
    }
    nan_queries_ = M::any_nan(bad);
    const uint8_t* table = c_->query.table;
    if (table != nullptr) look_up<M>(table, kQueries * s_.query_stride, s_.query);
    if (!added) return;
    float sums[kQueries] = {};
    if (c_->query_factor != 0.0f) row_sums(s_.query, s_.query_stride, s_.all_ones, sums);
    for (int64_t r = 0; r < kQueries; ++r) {
      query_term_[r] = sums[r] * c_->query_factor + c_->score_offset;
    }
  }

  // The tiles of a row of `vectors` vectors, as equal as they can be.
  template <class Tile>
  static void tiles(int64_t vectors, const Tile& tile) {
    const int64_t count = (vectors + M::kVectors - 1) / M::kVectors;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = vectors * i / count, end = vectors * (i + 1) / count;
      switch (end - begin) {
        case 1: tile.template operator()<1>(begin * kWidth); break;
        case 2: tile.template operator()<2>(begin * kWidth); break;
        case 3: tile.template operator()<3>(begin * kWidth); break;
        case 4: tile.template operator()<(M::kVectors < 4 ? 1 : 4)>(begin * kWidth); break;
        case 5: tile.template operator()<(M::kVectors < 5 ? 1 : 5)>(begin * kWidth); break;
        default: tile.template operator()<(M::kVectors < 6 ? 1 : 6)>(begin * kWidth); break;
      }
    }
  }

  // What becomes of the sums of a tile: `row` gets those of query r, in vectors from a column on.
  template <bool added>
  struct ScoreTile {
    Attention& a;
    const float *bias[kQueries], *mask[kQueries];

    template <int n>
    void operator()(int64_t column) const {
      const auto& s = a.s_;
      M::template query_tile<n>(s.query, s.query_stride, s.key + column * kStep, s.columns * kStep,
                          s.key_steps, int64_t{2} * a.p_.max_query * a.p_.max_key, *this, column);
    }

    template <int n>
    void row(int r, int64_t column, const Ints (&sum)[n]) const {
      const auto& s = a.s_;
      const auto& p = a.p_;
      const Real factor = M::set(a.c_->dot_factor);
      const float* term = s.key_term + column;
      float* scores = s.scores + r * s.columns + column;
      Real best = a.best_[r];
#pragma GCC unroll 6
      for (int t = 0; t < n; ++t) {
        const int64_t at = t * kWidth;
        Real score = M::fma(M::to_real(sum[t]), factor, M::load(term + at));
        if (added) {
          const int64_t left = p.tokens - column - at;
          score = M::add(score, M::set(a.query_term_[r]));
          if (p.bias != nullptr) score = M::add(score, load(bias[r] + column + at, left));
          if (p.mask != nullptr) score = M::add(score, load(mask[r] + column + at, left));
        }
        // A NaN is not kept here but by the sum of the row.
        best = M::max(score, best);
        M::store(scores + at, score);
      }
      a.best_[r] = best;
    }
  };

  template <bool added>
  void scores(int64_t first) {
    ScoreTile<added> tile = {*this, {}, {}};
    for (int r = 0; r < kQueries; ++r) {
      best_[r] = M::set(-__builtin_inff());
      if (!added) continue;
      // Rows beyond the last are computed and not used.
      const int64_t row = first + r < p_.tokens ? first + r : p_.tokens - 1;
      if (p_.bias != nullptr) {
        tile.bias[r] = p_.bias + (head_ * p_.tokens + row) * p_.tokens;
      }
      if (p_.mask != nullptr) {
        tile.mask[r] = p_.mask + (window_ % p_.mask_windows * p_.tokens + row) * p_.tokens;
      }
    }
    tiles(s_.columns / kWidth, tile);
  }

  // plain: no shift, and 0 is a code, so nothing is to be added or clamped below.
  template <bool added, bool relative, bool plain>
  void softmax() {
    const Grid grid(c_->probs, p_.fused);
    auto to_codes = [&](Real value) {
      return plain ? M::bits(M::add(M::min(M::mul(value, grid.inverse), grid.high), grid.rounder))
                   : code(value, grid);
    };
    constexpr int64_t parts = kSoftmaxSums / kWidth;
    float top[kQueries], totals[kQueries];
    Real sums[parts][kQueries];
    M::largest(best_, top);
    for (int64_t r = 0; r < kQueries; ++r) {
      const Real subtract = M::set(top[r]);
      float* scores = s_.scores + r * s_.columns;
      uint8_t* codes = s_.codes + r * s_.codes_stride;
      Real sum[parts];
      for (Real& part : sum) part = M::set(0.0f);
      for (int64_t from = 0; from < s_.columns; from += kSoftmaxSums) {
#pragma GCC unroll 4
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t i = from + part * kWidth;
          if (part > 0 && i >= s_.columns) break;
          Real exponent = M::sub(M::load(scores + i), subtract);
          if (added) exponent = M::mul(exponent, M::set(kLog2E));
          const Real numerator = M::exp2(exponent);
          sum[part] = M::add(sum[part], numerator);
          if (relative) {
            M::store_bytes(codes + i, to_codes(numerator));
          } else {
            M::store(scores + i, numerator);
          }
        }
      }
      for (int64_t part = 0; part < parts; ++part) sums[part][r] = sum[part];
    }
    M::totals(sums, totals);
    for (int64_t r = 0; r < kQueries; ++r) row_factor_[r] = 1.0f / totals[r];
    if (relative) return;
    for (int64_t r = 0; r < kQueries; ++r) {
      const Real factor = M::set(row_factor_[r]);
      const float* scores = s_.scores + r * s_.columns;
      uint8_t* codes = s_.codes + r * s_.codes_stride;
      for (int64_t i = 0; i < s_.columns; i += kWidth) {
        M::store_bytes(codes + i, to_codes(M::mul(M::load(scores + i), factor)));
      }
      // The codes hold the factor already; a NaN stays.
      if (row_factor_[r] == row_factor_[r]) row_factor_[r] = 1.0f;
    }
  }

  struct MixTile {
    Attention& a;
    float* out[kQueries];
    float row_term[kQueries];

    template <int n>
    void operator()(int64_t channel) const {
      const auto& s = a.s_;
      M::template query_tile<n>(s.codes, s.codes_stride, s.value + channel * kStep, s.channels * kStep,
                          s.value_steps, int64_t{2} * a.p_.max_probs * a.p_.max_value, *this,
                          channel);
    }

    template <int n>
    void row(int r, int64_t channel, const Ints (&sum)[n]) const {
      if (out[r] == nullptr) return;
      const Real factor = M::set(a.c_->out_factor);
      const Real offset = M::set(row_term[r]), row_factor = M::set(a.row_factor_[r]);
      const float* term = a.s_.value_term + channel;
#pragma GCC unroll 6
      for (int t = 0; t < n; ++t) {
        const int64_t at = t * kWidth, left = a.p_.head_dim - channel - at;
        const Real total = M::add(M::load(term + at), offset);
        const Real value = M::mul(M::fma(M::to_real(sum[t]), factor, total), row_factor);
        float* to = out[r] + channel + at;
        left >= kWidth ? M::store(to, value) : M::store_part(to, value, left);
      }
    }
  };

  void mix(int64_t first, int64_t rows) {
    MixTile tile = {*this, {}, {}};
    if (c_->probs_factor != 0.0f) {
      row_sums(s_.codes, s_.codes_stride, s_.ones, tile.row_term);
    }
    for (int64_t r = 0; r < rows; ++r) {
      tile.row_term[r] *= c_->probs_factor;
      const int64_t index = window_ * p_.tokens + first + r;
      const int64_t row = p_.rows == nullptr ? index : p_.rows[index];
      if (p_.rows != nullptr && row >= p_.out_rows) continue;
      tile.out[r] = p_.out + (row * p_.heads + head_) * p_.head_dim;
    }
    tiles(s_.channels / kWidth, tile);
  }

  const AttentionProblem& p_;
  const Scratch<M> s_;
  const bool added_;
  bool nan_queries_ = false;
  int64_t window_ = 0, head_ = 0;
  const HeadConstants* c_ = nullptr;
  Real best_[kQueries];
  float query_term_[kQueries], row_factor_[kQueries];
};

template <class M>
int64_t scratch_bytes(const AttentionProblem& problem) {
  return Scratch<M>(problem, nullptr).bytes;
}

template <class M>
void run_attention(const AttentionProblem& problem, int64_t begin, int64_t end, void* scratch) {
  Attention<M>(problem, scratch).run(begin, end);
}

template <class M>
const AttentionKernel* attention_kernel() {
  static constexpr AttentionKernel kernel = {&scratch_bytes<M>, &run_attention<M>, kQueries};
  return &kernel;
}

}  // namespace
}  // namespace gplq_mm
