// Softmax of a row on a learned grid, forward and backward.
#pragma once

#include "training_lanes.h"

namespace gplq_mm {
namespace {

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

template <typename Machine, bool fused, bool tabled>
float softmax_row(const SoftmaxRow& row, const LearnedGrid& grid, int64_t number,
                  bool row_relative, float* __restrict space) {
  const int64_t channel = grid.channel(number);
  const Range range(grid);
  const float total = softmax_numerators(row, space);
  float* __restrict out = row.scores;
  const float factor = row_relative ? 1.0f : 1.0f / total;
  const float inverse = grid.inverse[channel], shift = grid.shift[channel];
  const float scale = grid.scale[channel], offset = grid.offset[channel];
  const auto code_at = [=](int64_t k) {
    return range.code(affine_one<fused>(space[k] * factor, inverse, shift));
  };
  write_integers<Machine, tabled>(grid.table_of(number), row.columns, out, code_at);
#pragma GCC ivdep
  for (int64_t k = 0; k < row.columns; ++k) {
    out[k] = affine_one<fused>(tabled ? out[k] : code_at(k), scale, offset);
  }
  return total;
}

template <typename Machine>
float softmax(const SoftmaxRow& row, const LearnedGrid& grid, int64_t number, bool row_relative,
              float* space) {
  float total = 0.0f;
  with_flags(
      [&](auto fused, auto tabled) {
        total = softmax_row<Machine, decltype(fused)::value, decltype(tabled)::value>(
            row, grid, number, row_relative, space);
      },
      grid.fused, grid.tabled());
  return total;
}

// A few numbers of a row: probabilities (or numerators) p to the quantized ones, and the gradient
// to what passes through the quantizer; sums in lanes. `dots` sums grad times what the row's
// denominator divides: the quantized numerators, or the probabilities with their gradient. `out`
// holds the integers where there is a table.
template <bool fused, bool tabled, bool row_relative>
inline void softmax_backward_lanes(float* __restrict grad, const float* __restrict p,
                                   int64_t count, const Range& range, const float (&grid)[4],
                                   float* __restrict out, float* __restrict scale_sums,
                                   float* __restrict offset_sums, float* __restrict dots) {
  const float inverse = grid[0], shift = grid[1], scale = grid[2], offset = grid[3];
  for (int64_t i = 0; i < count; ++i) {
    const float steps = affine_one<fused>(p[i], inverse, shift);
    const float integer = tabled ? out[i] : range.code(steps);
    const float p_hat = affine_one<fused>(integer, scale, offset);
    const float above = grad[i];
    const Share share = share_of(above, !range.holds(steps), integer, integer - steps);
    out[i] = p_hat;
    grad[i] = share.x;
    scale_sums[i] += share.scale;
    offset_sums[i] += share.offset;
    dots[i] += row_relative ? above * p_hat : share.x * p[i];
  }
}

template <typename Machine, bool fused, bool tabled, bool row_relative>
void softmax_backward_row(const SoftmaxRow& row, const LearnedGrid& grid, int64_t number,
                          float* __restrict grad, float* __restrict space, GridGradient sums) {
  const Range range(grid);
  const int64_t channel = grid.channel(number);
  const int64_t columns = row.columns;
  const float total = softmax_numerators(row, space);
  float* __restrict out = row.scores;
  if (!row_relative) {
    const float factor = 1.0f / total;
    for (int64_t k = 0; k < columns; ++k) space[k] *= factor;
  }
  const float numbers[4] = {grid.inverse[channel], grid.shift[channel], grid.scale[channel],
                            grid.offset[channel]};
  write_integers<Machine, tabled>(grid.table_of(number), columns, out, [&](int64_t k) {
    return range.code(affine_one<fused>(space[k], numbers[0], numbers[1]));
  });
  alignas(64) float scale_lanes[kLanes] = {}, offset_lanes[kLanes] = {}, dots[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    softmax_backward_lanes<fused, tabled, row_relative>(grad + k, space + k, kLanes, range,
                                                        numbers, out + k, scale_lanes,
                                                        offset_lanes, dots);
  }
  softmax_backward_lanes<fused, tabled, row_relative>(grad + k, space + k, columns - k, range,
                                                      numbers, out + k, scale_lanes, offset_lanes,
                                                      dots);
  const float taken = row_relative ? sum_of(dots) / total : sum_of(dots);
  for (k = 0; k < columns; ++k) grad[k] = space[k] * (grad[k] - taken);
  *sums.scale = sum_of(scale_lanes);
  *sums.offset = sum_of(offset_lanes);
}

template <typename Machine>
void softmax_backward(const SoftmaxRow& row, const LearnedGrid& grid, int64_t number,
                      bool row_relative, float* grad, float* space, GridGradient sums) {
  with_flags(
      [&](auto fused, auto tabled, auto relative) {
        softmax_backward_row<Machine, decltype(fused)::value, decltype(tabled)::value,
                             decltype(relative)::value>(row, grid, number, grad, space, sums);
      },
      grid.fused, grid.tabled(), row_relative);
}

}  // namespace
}  // namespace gplq_mm
