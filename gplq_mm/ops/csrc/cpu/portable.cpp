// The compiler's own vectors and plain loops, for machines without the other instruction sets.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernel_set_impl.h"

namespace gplq_mm {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

struct Portable {
  static constexpr int64_t kWidth = 4;
  static constexpr int kVectors = 2;
  using Real = Float4;
  using Ints = Int4;
  using Bad = Int4;

  static Real set(float x) { return Real{x, x, x, x}; }
  static Ints set_int(int32_t x) { return Ints{x, x, x, x}; }
  static Ints mask(int64_t count) {
    return Ints{0, 1, 2, 3} < set_int(static_cast<int32_t>(count));
  }

  static Real load(const float* x) { return load_part(x, kWidth); }
  static Real load_part(const float* x, int64_t count) {
    Real value = set(0.0f);
    __builtin_memcpy(&value, x, static_cast<size_t>(4 * count));
    return value;
  }
  static void store(float* x, Real value) { store_part(x, value, kWidth); }
  static void store_part(float* x, Real value, int64_t count) {
    __builtin_memcpy(x, &value, static_cast<size_t>(4 * count));
  }
  template <class T>
  static Ints load_bytes(const T* bytes) {
    Ints value;
    __builtin_memcpy(&value, bytes, sizeof(value));
    return value;
  }

  static Real add(Real a, Real b) { return a + b; }
  static Real sub(Real a, Real b) { return a - b; }
  static Real mul(Real a, Real b) { return a * b; }
  static Real fused(Real a, Real b, Real c) { return fma(a, b, c); }
  static Real fma(Real a, Real b, Real c) {
    Real value;
    for (int i = 0; i < kWidth; ++i) value[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return value;
  }
  // Both give b where one of them is NaN.
  static Real max(Real a, Real b) { return a > b ? a : b; }
  static Real min(Real a, Real b) { return a < b ? a : b; }
  // Each of four vectors to one number.
  static void largest(const Real (&rows)[kQueries], float* out) {
    for (int r = 0; r < kQueries; ++r) {
      const float a = rows[r][0] > rows[r][1] ? rows[r][0] : rows[r][1];
      const float b = rows[r][2] > rows[r][3] ? rows[r][2] : rows[r][3];
      out[r] = a > b ? a : b;
    }
  }
  static void sums(const Real (&rows)[kQueries], float* out) {
    for (int r = 0; r < kQueries; ++r) out[r] = (rows[r][0] + rows[r][2]) + (rows[r][1] + rows[r][3]);
  }

  // The same of 16 numbers in four vectors.
  static void totals(const Real (&parts)[4][kQueries], float* out) {
    float quarter[4][kQueries];
    for (int i = 0; i < 4; ++i) sums(parts[i], quarter[i]);
    for (int r = 0; r < kQueries; ++r) {
      out[r] = (quarter[0][r] + quarter[2][r]) + (quarter[1][r] + quarter[3][r]);
    }
  }

  // x <= 0, -inf or NaN. What is below the smallest normal number becomes that.
  static Real exp2(Real x) {
    x = max(set(kSmallestExponent), x);
    // The nearest integer, or the one below where that is above x.
    Real whole = (x + kAttentionRounder) - kAttentionRounder;
    whole = whole > x ? whole - 1.0f : whole;
    const Real fraction = exp2_fraction<Portable>(x - whole);
    return real_bits(bits(fraction) + (bits(whole + kAttentionRounder) << 23));
  }

  static Real to_real(Ints x) { return __builtin_convertvector(x, Real); }
  // |x| < 2^22.
  static Ints to_int(Real x) { return bits(x + kAttentionRounder) - kAttentionRounderBits; }
  static Ints bits(Real x) {
    Ints value;
    __builtin_memcpy(&value, &x, sizeof(value));
    return value;
  }
  static Real real_bits(Ints x) {
    Real value;
    __builtin_memcpy(&value, &x, sizeof(value));
    return value;
  }
  static Ints sub_int(Ints a, Ints b) { return a - b; }
  static Ints first(Ints x, int64_t count) { return x & mask(count); }

  static Bad no_nan() { return set_int(0); }
  static void note_nan(Bad& bad, Real x) { bad |= x != x; }
  static bool any_nan(Bad bad) { return (bad[0] | bad[1] | bad[2] | bad[3]) != 0; }

  // The low byte of each lane.
  static void store_bytes(uint8_t* to, Ints x) {
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<uint8_t>(x[i]);
  }
  // The low bytes of four, lane by lane.
  static void store_quads(int8_t* to, Ints a, Ints b, Ints c, Ints d) {
    const Ints value = (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24);
    __builtin_memcpy(to, &value, sizeof(value));
  }
  // 4 x 4 double words.
  static void transpose(const uint8_t* from, int8_t* to, int64_t stride) {
    for (int64_t token = 0; token < kWidth; ++token) {
      for (int64_t step = 0; step < 4; ++step) {
        __builtin_memcpy(to + step * stride + token * kStep, from + token * kChunk + step * kStep,
                         kStep);
      }
    }
  }

  // Four products of an unsigned and a signed byte in each lane.
  static Ints dot(Ints sum, Ints u, Ints s) {
    sum += (u & 0xFF) * ((s << 24) >> 24);
    sum += ((u >> 8) & 0xFF) * ((s << 16) >> 24);
    sum += ((u >> 16) & 0xFF) * ((s << 8) >> 24);
    return sum + ((u >> 24) & 0xFF) * (s >> 24);
  }
  static Ints sum_of_codes(Ints sum, const int8_t* codes) {
    return dot(sum, set_int(0x01010101), load_bytes(codes));
  }
  static Ints sum_of_codes(Ints sum, const uint8_t* codes, const uint8_t* ones) {
    return dot(sum, load_bytes(codes), load_bytes(ones));
  }

  template <int n, class Sink>
  static void query_tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t step_bytes,
                   int64_t steps, int64_t /*largest_pair*/, const Sink& sink, int64_t column) {
    for (int r = 0; r < kQueries; ++r) {
      Ints sum[n];
      for (int t = 0; t < n; ++t) sum[t] = set_int(0);
      for (int64_t step = 0; step < steps; ++step) {
        int32_t four;
        __builtin_memcpy(&four, codes + r * stride + step * kStep, sizeof(four));
        for (int t = 0; t < n; ++t) {
          sum[t] = dot(sum[t], set_int(four), load_bytes(panel + step * step_bytes + 16 * t));
        }
      }
      sink.template row<n>(r, column, sum);
    }
  }

  static float total(const Real (&sums)[kSums / kWidth]) {
    float quarter[4];
    for (int i = 0; i < 4; ++i) {
      const Real all = (sums[i] + sums[8 + i]) + (sums[4 + i] + sums[12 + i]);
      quarter[i] = (all[0] + all[2]) + (all[1] + all[3]);
    }
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  }
  static Real difference(const int32_t* a, const int32_t* b) {
    return to_real(Ints(Words(load_bytes(a)) - Words(load_bytes(b))));
  }
  template <int count>
  static void narrow(const Real* steps, const Limits& limits, uint8_t* codes) {
    for (int64_t i = 0; i < count * kWidth; ++i) {
      codes[i] = code_of(steps[i / kWidth][i % kWidth], limits);
    }
  }

  struct Table {
    static constexpr int64_t kBytes = 1;
    explicit Table(const uint8_t* table) : levels(table) {}
    void look_up(uint8_t* bytes) const { *bytes = levels[*bytes]; }
    Ints lanes(Ints position) const {
      Ints found;
      for (int i = 0; i < kWidth; ++i) found[i] = levels[position[i] & (kPositions - 1)];
      return found;
    }
    const uint8_t* levels;
  };

  static constexpr int kRows = 4;

  template <int rows>
  static void tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t steps,
                   int32_t /*max_code*/, int32_t* __restrict sums) {
    std::memset(sums, 0, sizeof(int32_t) * rows * kPanel);
    for (int64_t s = 0; s < steps; ++s) {
      const int8_t* __restrict column = panel + s * kStep * kPanel;
      for (int row = 0; row < rows && row < kRows; ++row) {
        const uint8_t* four = codes + row * stride + s * kStep;
        for (int64_t j = 0; j < kPanel; ++j) {
          const int8_t* weight = column + j * kStep;
          sums[row * kPanel + j] += four[0] * weight[0] + four[1] * weight[1] +
                                    four[2] * weight[2] + four[3] * weight[3];
        }
      }
    }
  }

  static void unpack(const PackedPanel& packed, int8_t* panel) {
    for (int64_t k = 0; k < round_up(packed.columns, kStep); ++k) {
      int8_t* out = panel + k / kStep * kStep * kPanel + k % kStep;
      const bool exists = k < packed.columns;
      const int64_t stored = exists ? packed.position[k] : 0;
      const uint8_t* multiplier = packed.multiplier + (exists ? packed.group[k] : 0) * kPanel;
      for (int64_t row = 0; row < kPanel; ++row) {
        const int64_t position = panel_position(row);
        int code = 0;
        if (exists && packed.packed) {
          const uint8_t byte = static_cast<const uint8_t*>(
              packed.weight)[stored * kPackedColumn + position % kPackedColumn];
          code = (position < kPackedColumn ? byte & 15 : byte >> 4) - kCodeBias;
        } else if (exists) {
          code = static_cast<const int8_t*>(packed.weight)[stored * kPanel + position];
        }
        out[row * kStep] = static_cast<int8_t>(code * multiplier[position]);
      }
    }
  }
};

}  // namespace

const KernelSet* portable_set() { return kernel_set<Portable>(); }

}  // namespace gplq_mm
