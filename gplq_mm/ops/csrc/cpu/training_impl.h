// The kernels of training as loops that compilers vectorize; the including file sets the target.
// All names are local to the translation unit, see kernels_impl.h.
#pragma once

#include "kernels_impl.h"
#include "training.h"

namespace gplq_mm {
namespace {

// Lanes that sums and maxima of a row run in; loops over them become vectors.
constexpr int64_t kLanes = 16;
// A value this far outside of the grid still counts as inside, see gplq_mm/quant/functional.py.
constexpr float kTolerance = 1e-4f;

// a * b + c where its rounding does not decide a code.
inline float madd(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

struct Range {
  explicit Range(const LearnedGrid& grid)
      : low(static_cast<float>(grid.code_min)), high(static_cast<float>(grid.code_max)) {}

  // Nearest code of a value in steps, half to even. NaN stays.
  float code(float steps) const {
    // 1.5 * 2^23: a sum with |steps| < 2^22 has no fraction left.
    constexpr float kRounder = 12582912.0f;
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    return (steps + kRounder) - kRounder;
  }
  bool holds(float steps) const { return steps >= low - kTolerance && steps <= high + kTolerance; }

  float low, high;
};

struct Levels {
  explicit Levels(const LearnedGrid& grid)
      : bits(grid.level_bits),
        mask((1 << grid.level_bits) - 1),
        middle(1 << (grid.level_bits - 1)),
        last(grid.code_max - grid.code_min),
        count(static_cast<float>(mask)),
        width(1.0f / static_cast<float>(mask)) {}

  // Level of a value whose code is `code`.
  int32_t level(float steps, float code, const Range& range) const {
    constexpr float kRounder = 12582912.0f;
    // What lies outside is moved to the half of the levels that no inner value of its code has.
    float place = (code - steps) * count;
    place = steps < range.low - kTolerance ? count : place;
    place = steps > range.high + kTolerance ? -count : place;
    place = (place + kRounder) - kRounder;
    const float end = static_cast<float>(middle - 1);
    // Ordered so that NaN becomes a level, too.
    place = place > -end ? place : -end;
    place = place < end ? place : end;
    return static_cast<int32_t>(place) + middle;
  }
  // code - steps in the middle of a level.
  float residual(int32_t level) const { return static_cast<float>(level - middle) * width; }
  bool outside(int32_t code, int32_t level) const {
    // Without branches or short circuits, which would keep the loop scalar.
    return ((code == 0) & (level > middle)) | ((code == last) & (level < middle));
  }

  int bits;
  int32_t mask, middle, last;
  float count, width;
};

template <typename State, bool fused, bool per_column>
void encode_row(const float* __restrict x, int64_t columns, const LearnedGrid& grid,
                int64_t channel, float* __restrict x_hat, State* __restrict state) {
  const Range range(grid);
  const Levels levels(grid);
  const float* __restrict scale = grid.scale + channel;
  const float* __restrict offset = grid.offset + channel;
  const float* __restrict inverse = grid.inverse + channel;
  const float* __restrict shift = grid.shift + channel;
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t at = per_column ? k : 0;
    const float steps = affine_one<fused>(x[k], inverse[at], shift[at]);
    const float code = range.code(steps);
    x_hat[k] = affine_one<fused>(code, scale[at], offset[at]);
    const auto index = static_cast<int32_t>(code - range.low);
    state[k] = static_cast<State>(index << levels.bits | levels.level(steps, code, range));
  }
}

template <typename State>
void encode(const float* x, int64_t stride, int64_t first, int64_t rows, int64_t columns,
            const LearnedGrid& grid, float* x_hat, State* state) {
  const auto row_of = grid.per_column
                          ? (grid.fused ? encode_row<State, true, true>
                                        : encode_row<State, false, true>)
                          : (grid.fused ? encode_row<State, true, false>
                                        : encode_row<State, false, false>);
  for (int64_t row = first; row < first + rows; ++row) {
    row_of(x, columns, grid, grid.per_column ? 0 : grid.channel(row), x_hat, state);
    x += stride;
    x_hat += columns;
    state += columns;
  }
}

template <typename State, bool fused, bool per_column>
void decode_row(const State* __restrict state, int64_t columns, const LearnedGrid& grid,
                int64_t channel, float* __restrict x_hat) {
  const float* __restrict scale = grid.scale + channel;
  const float* __restrict offset = grid.offset + channel;
  const int bits = grid.level_bits;
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t at = per_column ? k : 0;
    const int32_t code = (static_cast<int32_t>(state[k]) >> bits) + grid.code_min;
    x_hat[k] = affine_one<fused>(static_cast<float>(code), scale[at], offset[at]);
  }
}

template <typename State>
void decode(const State* state, int64_t first, int64_t rows, int64_t columns,
            const LearnedGrid& grid, float* x_hat) {
  const auto row_of = grid.per_column
                          ? (grid.fused ? decode_row<State, true, true>
                                        : decode_row<State, false, true>)
                          : (grid.fused ? decode_row<State, true, false>
                                        : decode_row<State, false, false>);
  for (int64_t row = first; row < first + rows; ++row) {
    row_of(state, columns, grid, grid.per_column ? 0 : grid.channel(row), x_hat);
    x_hat += columns;
    state += columns;
  }
}

// What one value adds to the gradients.
struct Share {
  float x, scale, offset;
};

inline Share share_of(float grad, bool outside, float code, float residual) {
  return {outside ? 0.0f : grad, grad * (outside ? code : residual), outside ? grad : 0.0f};
}

template <typename State>
inline Share state_share(float grad, State state, const Range& range, const Levels& levels) {
  const int32_t code = static_cast<int32_t>(state) >> levels.bits;
  const int32_t level = static_cast<int32_t>(state) & levels.mask;
  return share_of(grad, levels.outside(code, level), static_cast<float>(code) + range.low,
                  levels.residual(level));
}

template <typename State>
inline void backward_columns(const float* __restrict grad, const State* __restrict state, int64_t columns,
                      const LearnedGrid& grid, float* __restrict grad_x,
                      float* __restrict scale_sums, float* __restrict offset_sums) {
  const Range range(grid);
  const Levels levels(grid);
  for (int64_t k = 0; k < columns; ++k) {
    const Share share = state_share(grad[k], state[k], range, levels);
    grad_x[k] = share.x;
    scale_sums[k] += share.scale;
    offset_sums[k] += share.offset;
  }
}

// Sum or maximum over lanes.
template <typename Combine>
inline float lanes_to_one(const float (&lanes)[kLanes], const Combine& combine) {
  float rest[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) rest[i] = lanes[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) rest[i] = combine(rest[i], rest[i + width]);
  }
  return rest[0];
}

inline float sum_of(const float (&lanes)[kLanes]) {
  return lanes_to_one(lanes, [](float a, float b) { return a + b; });
}

template <typename State>
void backward_row(const float* grad, const State* state, int64_t columns, const LearnedGrid& grid,
                  float* grad_x, float* scale_sum, float* offset_sum) {
  alignas(64) float scale_lanes[kLanes] = {}, offset_lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    backward_columns(grad + k, state + k, kLanes, grid, grad_x + k, scale_lanes, offset_lanes);
  }
  backward_columns(grad + k, state + k, columns - k, grid, grad_x + k, scale_lanes, offset_lanes);
  *scale_sum = sum_of(scale_lanes);
  *offset_sum = sum_of(offset_lanes);
}

template <typename State>
void backward(const float* grad, const State* state, int64_t first, int64_t rows, int64_t columns,
              const LearnedGrid& grid, float* grad_x, GridGradient sums) {
  for (int64_t row = first; row < first + rows; ++row) {
    if (grid.per_column) {
      backward_columns(grad, state, columns, grid, grad_x, sums.scale, sums.offset);
    } else {
      backward_row(grad, state, columns, grid, grad_x, sums.scale++, sums.offset++);
    }
    grad += columns;
    state += columns;
    grad_x += columns;
  }
}

// exp(x) of x <= 0, relative error below 2e-6 down to the smallest normal number; NaN stays.
inline float exp_of(float x) {
  constexpr float kLog2E = 1.44269504f;
  float y = x * kLog2E;
  y = y < -126.0f ? -126.0f : y;
  const float whole = __builtin_floorf(y);
  const float part = y - whole;
  // The polynomial of gplq_mm/quant/arithmetic.py.
  float value = madd(part, 0.0018671374f, 0.0090170139f);
  value = madd(part, value, 0.055799925f);
  value = madd(part, value, 0.24016445f);
  value = madd(part, value, 0.69315131f);
  value = madd(part, value, 1.0f);
  const int32_t power = (static_cast<int32_t>(whole) + 127) << 23;
  return value * __builtin_bit_cast(float, power);
}

// Phi(x), the normal distribution function, by the polynomial of gplq_mm/quant/arithmetic.py.
inline float phi_of(float x) {
  constexpr float kEnd = 5.2f, kFactor = 0.07396451f;
  float z = x < -kEnd ? -kEnd : x;
  z = z > kEnd ? kEnd : z;
  const float t = madd(z * z, kFactor, -1.0f);
  float value = madd(t, 1.940482471e-04f, -5.545432796e-04f);
  value = madd(t, value, 6.242647069e-04f);
  value = madd(t, value, -9.999474278e-04f);
  value = madd(t, value, 2.637060126e-03f);
  value = madd(t, value, -5.044835620e-03f);
  value = madd(t, value, 8.023252711e-03f);
  value = madd(t, value, -1.236457378e-02f);
  value = madd(t, value, 1.813056692e-02f);
  value = madd(t, value, -2.476078086e-02f);
  value = madd(t, value, 3.196270391e-02f);
  value = madd(t, value, -3.992566466e-02f);
  value = madd(t, value, 5.002609640e-02f);
  value = madd(t, value, -6.774380058e-02f);
  value = madd(t, value, 1.359499842e-01f);
  return madd(z, value, 0.5f);
}

template <bool fused>
void gelu_encode_row(const float* __restrict x, int64_t columns, const LearnedGrid& grid,
                     float* __restrict x_hat) {
  const Range range(grid);
  const float* __restrict scale = grid.scale;
  const float* __restrict offset = grid.offset;
  const float* __restrict inverse = grid.inverse;
  const float* __restrict shift = grid.shift;
  for (int64_t k = 0; k < columns; ++k) {
    const float steps = affine_one<fused>(x[k] * phi_of(x[k]), inverse[k], shift[k]);
    x_hat[k] = affine_one<fused>(range.code(steps), scale[k], offset[k]);
  }
}

inline void gelu_encode(const float* x, int64_t rows, int64_t columns, const LearnedGrid& grid,
                        float* x_hat) {
  const auto row_of = grid.fused ? gelu_encode_row<true> : gelu_encode_row<false>;
  for (int64_t row = 0; row < rows; ++row) {
    row_of(x + row * columns, columns, grid, x_hat + row * columns);
  }
}

template <bool fused>
void gelu_backward_row(const float* __restrict grad, const float* __restrict x, int64_t columns,
                       const LearnedGrid& grid, float* __restrict grad_x,
                       float* __restrict x_hat, float* __restrict scale_sums,
                       float* __restrict offset_sums) {
  const Range range(grid);
  const float* __restrict scale = grid.scale;
  const float* __restrict offset = grid.offset;
  const float* __restrict inverse = grid.inverse;
  const float* __restrict shift = grid.shift;
  for (int64_t k = 0; k < columns; ++k) {
    constexpr float kDensity = 0.398942280f;  // 1 / sqrt(2 pi)
    const float phi = phi_of(x[k]);
    const float slope = madd(x[k], kDensity * exp_of(-0.5f * x[k] * x[k]), phi);
    const float steps = affine_one<fused>(x[k] * phi, inverse[k], shift[k]);
    const float code = range.code(steps);
    const Share share = share_of(grad[k], !range.holds(steps), code, code - steps);
    grad_x[k] = share.x * slope;
    x_hat[k] = affine_one<fused>(code, scale[k], offset[k]);
    scale_sums[k] += share.scale;
    offset_sums[k] += share.offset;
  }
}

inline void gelu_backward(const float* grad, const float* x, int64_t rows, int64_t columns,
                          const LearnedGrid& grid, float* grad_x, float* x_hat,
                          GridGradient sums) {
  const auto row_of = grid.fused ? gelu_backward_row<true> : gelu_backward_row<false>;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * columns;
    row_of(grad + at, x + at, columns, grid, grad_x + at, x_hat + at, sums.scale, sums.offset);
  }
}

// exp(score - maximum) of a row to `numerators` (columns rounded up to 16, zeros or tiny beyond);
// gives their sum.
inline float softmax_numerators(const SoftmaxRow& row, float* __restrict numerators) {
  const float* __restrict scores = row.scores;
  const int64_t columns = row.columns, padded = round_up(columns, kLanes);
  for (int64_t k = 0; k < columns; ++k) numerators[k] = scores[k] * row.factor;
  if (row.bias != nullptr) {
    const float* __restrict bias = row.bias;
    for (int64_t k = 0; k < columns; ++k) numerators[k] += bias[k];
  }
  if (row.mask != nullptr) {
    const float* __restrict mask = row.mask;
    for (int64_t k = 0; k < columns; ++k) numerators[k] += mask[k];
  }
  for (int64_t k = columns; k < padded; ++k) numerators[k] = -__builtin_inff();
  alignas(64) float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = numerators[i];
  for (int64_t k = kLanes; k < padded; k += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] = lanes[i] > numerators[k + i] ? lanes[i] : numerators[k + i];
    }
  }
  const float most = lanes_to_one(lanes, [](float a, float b) { return a > b ? a : b; });
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = 0.0f;
  for (int64_t k = 0; k < padded; k += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const float value = exp_of(numerators[k + i] - most);
      numerators[k + i] = value;
      lanes[i] += value;
    }
  }
  return sum_of(lanes);
}

template <bool fused>
float softmax_fused(const SoftmaxRow& row, const LearnedGrid& grid, int64_t channel,
                    bool row_relative, float* __restrict space) {
  const Range range(grid);
  const float total = softmax_numerators(row, space);
  float* __restrict out = row.scores;
  const float factor = row_relative ? 1.0f : 1.0f / total;
  const float inverse = grid.inverse[channel], shift = grid.shift[channel];
  const float scale = grid.scale[channel], offset = grid.offset[channel];
  for (int64_t k = 0; k < row.columns; ++k) {
    const float steps = affine_one<fused>(space[k] * factor, inverse, shift);
    out[k] = affine_one<fused>(range.code(steps), scale, offset);
  }
  return total;
}

inline float softmax(const SoftmaxRow& row, const LearnedGrid& grid, int64_t channel,
                     bool row_relative, float* space) {
  return (grid.fused ? softmax_fused<true> : softmax_fused<false>)(row, grid, channel,
                                                                   row_relative, space);
}

// A few numbers of a row: probabilities (or numerators) p to the quantized ones, and the gradient
// to what passes through the quantizer; sums in lanes. `dots` sums grad times what the row's
// denominator divides: the quantized numerators, or the probabilities with their gradient.
template <bool fused, bool row_relative>
inline void softmax_backward_lanes(float* __restrict grad, const float* __restrict p,
                                   int64_t count, const Range& range, const float (&grid)[4],
                                   float* __restrict out, float* __restrict scale_sums,
                                   float* __restrict offset_sums, float* __restrict dots) {
  const float inverse = grid[0], shift = grid[1], scale = grid[2], offset = grid[3];
  for (int64_t i = 0; i < count; ++i) {
    const float steps = affine_one<fused>(p[i], inverse, shift);
    const float code = range.code(steps);
    const float p_hat = affine_one<fused>(code, scale, offset);
    const float above = grad[i];
    const Share share = share_of(above, !range.holds(steps), code, code - steps);
    out[i] = p_hat;
    grad[i] = share.x;
    scale_sums[i] += share.scale;
    offset_sums[i] += share.offset;
    dots[i] += row_relative ? above * p_hat : share.x * p[i];
  }
}

template <bool fused, bool row_relative>
void softmax_backward_row(const SoftmaxRow& row, const LearnedGrid& grid, int64_t channel,
                          float* __restrict grad, float* __restrict space, GridGradient sums) {
  const Range range(grid);
  const int64_t columns = row.columns;
  const float total = softmax_numerators(row, space);
  float* __restrict out = row.scores;
  if (!row_relative) {
    const float factor = 1.0f / total;
    for (int64_t k = 0; k < columns; ++k) space[k] *= factor;
  }
  const float numbers[4] = {grid.inverse[channel], grid.shift[channel], grid.scale[channel],
                            grid.offset[channel]};
  alignas(64) float scale_lanes[kLanes] = {}, offset_lanes[kLanes] = {}, dots[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    softmax_backward_lanes<fused, row_relative>(grad + k, space + k, kLanes, range, numbers,
                                                out + k, scale_lanes, offset_lanes, dots);
  }
  softmax_backward_lanes<fused, row_relative>(grad + k, space + k, columns - k, range, numbers,
                                              out + k, scale_lanes, offset_lanes, dots);
  const float taken = row_relative ? sum_of(dots) / total : sum_of(dots);
  for (k = 0; k < columns; ++k) grad[k] = space[k] * (grad[k] - taken);
  *sums.scale = sum_of(scale_lanes);
  *sums.offset = sum_of(offset_lanes);
}

inline void softmax_backward(const SoftmaxRow& row, const LearnedGrid& grid, int64_t channel,
                             bool row_relative, float* grad, float* space, GridGradient sums) {
  const auto of_row =
      grid.fused
          ? (row_relative ? softmax_backward_row<true, true> : softmax_backward_row<true, false>)
          : (row_relative ? softmax_backward_row<false, true> : softmax_backward_row<false, false>);
  of_row(row, grid, channel, grad, space, sums);
}

inline const TrainingKernels* training_table() {
  static const TrainingKernels table = {
      {encode<uint8_t>, decode<uint8_t>, backward<uint8_t>},
      {encode<uint16_t>, decode<uint16_t>, backward<uint16_t>},
      gelu_encode,
      gelu_backward,
      softmax,
      softmax_backward};
  return &table;
}

}  // namespace
}  // namespace gplq_mm
