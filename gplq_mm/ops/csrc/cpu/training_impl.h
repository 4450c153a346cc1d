// The kernels of training.
#pragma once

#include "training_softmax.h"

namespace gplq_mm {
namespace {

// In all of them the integers of a table pass through the output, which is then overwritten.
template <typename Machine, typename State, bool fused, bool per_column, bool tabled>
void encode_row(const float* __restrict x, int64_t columns, const LearnedGrid& grid, int64_t row,
                float* __restrict x_hat, State* __restrict state) {
  const int64_t channel = grid.channel(row);
  const Range range(grid);
  const Levels levels(grid);
  const float* __restrict scale = grid.scale + channel;
  const float* __restrict offset = grid.offset + channel;
  const float* __restrict inverse = grid.inverse + channel;
  const float* __restrict shift = grid.shift + channel;
  const auto steps_at = [=](int64_t k) {
    return affine_one<fused>(x[k], inverse[per_column ? k : 0], shift[per_column ? k : 0]);
  };
  write_integers<Machine, tabled>(grid.table_of(row), columns, x_hat,
                                  [=](int64_t k) { return range.code(steps_at(k)); });
#pragma GCC ivdep
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t at = per_column ? k : 0;
    const float steps = steps_at(k);
    const float code = range.code(steps);
    x_hat[k] = affine_one<fused>(tabled ? x_hat[k] : code, scale[at], offset[at]);
    const auto index = static_cast<int32_t>(code - range.low);
    state[k] = static_cast<State>(index << levels.bits | levels.level(steps, code, range));
  }
}

template <typename Machine, typename State>
void encode(const float* x, int64_t stride, int64_t first, int64_t rows, int64_t columns,
            const LearnedGrid& grid, float* x_hat, State* state) {
  const auto of_rows = [&](auto fused, auto per_column, auto tabled) {
    for (int64_t i = 0; i < rows; ++i) {
      encode_row<Machine, State, decltype(fused)::value, decltype(per_column)::value,
                 decltype(tabled)::value>(x + i * stride, columns, grid, first + i,
                                          x_hat + i * columns, state + i * columns);
    }
  };
  with_flags(of_rows, grid.fused, grid.per_column, grid.tabled());
}

template <typename Machine, typename State, bool fused, bool per_column, bool tabled>
void decode_row(const State* __restrict state, int64_t columns, const LearnedGrid& grid,
                int64_t row, float* __restrict x_hat) {
  const int64_t channel = grid.channel(row);
  const float* __restrict scale = grid.scale + channel;
  const float* __restrict offset = grid.offset + channel;
  const int bits = grid.level_bits;
  const auto code_at = [=](int64_t k) {
    return static_cast<float>((static_cast<int32_t>(state[k]) >> bits) + grid.code_min);
  };
  write_integers<Machine, tabled>(grid.table_of(row), columns, x_hat, code_at);
#pragma GCC ivdep
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t at = per_column ? k : 0;
    x_hat[k] = affine_one<fused>(tabled ? x_hat[k] : code_at(k), scale[at], offset[at]);
  }
}

template <typename Machine, typename State>
void decode(const State* state, int64_t first, int64_t rows, int64_t columns,
            const LearnedGrid& grid, float* x_hat) {
  const auto of_rows = [&](auto fused, auto per_column, auto tabled) {
    for (int64_t i = 0; i < rows; ++i) {
      decode_row<Machine, State, decltype(fused)::value, decltype(per_column)::value,
                 decltype(tabled)::value>(state + i * columns, columns, grid, first + i,
                                          x_hat + i * columns);
    }
  };
  with_flags(of_rows, grid.fused, grid.per_column, grid.tabled());
}

// grad_x holds the integers where there is a table.
template <typename State, bool tabled>
inline void backward_columns(const float* __restrict grad, const State* __restrict state,
                             int64_t columns, const LearnedGrid& grid, float* __restrict grad_x,
                             float* __restrict scale_sums, float* __restrict offset_sums) {
  const Range range(grid);
  const Levels levels(grid);
#pragma GCC ivdep
  for (int64_t k = 0; k < columns; ++k) {
    const int32_t index = static_cast<int32_t>(state[k]) >> levels.bits;
    const int32_t level = static_cast<int32_t>(state[k]) & levels.mask;
    const float code = static_cast<float>(index) + range.low, residual = levels.residual(level);
    const float integer = tabled ? grad_x[k] : code;
    const Share share = share_of(grad[k], levels.outside(index, level), integer,
                                 tabled ? residual + (integer - code) : residual);
    grad_x[k] = share.x;
    scale_sums[k] += share.scale;
    offset_sums[k] += share.offset;
  }
}

template <typename State, bool tabled>
void backward_row(const float* grad, const State* state, int64_t columns, const LearnedGrid& grid,
                  float* grad_x, float* scale_sum, float* offset_sum) {
  alignas(64) float scale_lanes[kLanes] = {}, offset_lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    backward_columns<State, tabled>(grad + k, state + k, kLanes, grid, grad_x + k, scale_lanes,
                                    offset_lanes);
  }
  backward_columns<State, tabled>(grad + k, state + k, columns - k, grid, grad_x + k, scale_lanes,
                                  offset_lanes);
  *scale_sum = sum_of(scale_lanes);
  *offset_sum = sum_of(offset_lanes);
}

template <typename Machine, typename State>
void backward(const float* grad, const State* state, int64_t first, int64_t rows, int64_t columns,
              const LearnedGrid& grid, float* grad_x, GridGradient sums) {
  const auto of_rows = [&](auto with_table) {
    constexpr bool tabled = decltype(with_table)::value;
    for (int64_t row = first; row < first + rows; ++row) {
      write_integers<Machine, tabled>(grid.table_of(row), columns, grad_x, [&](int64_t k) {
        return static_cast<float>(static_cast<int32_t>(state[k]) >> grid.level_bits);
      });
      if (grid.per_column) {
        backward_columns<State, tabled>(grad, state, columns, grid, grad_x, sums.scale,
                                        sums.offset);
      } else {
        backward_row<State, tabled>(grad, state, columns, grid, grad_x, sums.scale++,
                                    sums.offset++);
      }
      grad += columns;
      state += columns;
      grad_x += columns;
    }
  };
  with_flags(of_rows, grid.tabled());
}

template <typename Machine, bool fused, bool tabled>
void gelu_encode_row(const float* __restrict x, int64_t columns, const LearnedGrid& grid,
                     float* __restrict x_hat) {
  const Range range(grid);
  const float* __restrict scale = grid.scale;
  const float* __restrict offset = grid.offset;
  const float* __restrict inverse = grid.inverse;
  const float* __restrict shift = grid.shift;
  const auto code_at = [=](int64_t k) {
    return range.code(affine_one<fused>(x[k] * phi_of(x[k]), inverse[k], shift[k]));
  };
  write_integers<Machine, tabled>(grid.table, columns, x_hat, code_at);
#pragma GCC ivdep
  for (int64_t k = 0; k < columns; ++k) {
    x_hat[k] = affine_one<fused>(tabled ? x_hat[k] : code_at(k), scale[k], offset[k]);
  }
}

template <typename Machine>
void gelu_encode(const float* x, int64_t rows, int64_t columns, const LearnedGrid& grid,
                 float* x_hat) {
  const auto of_rows = [&](auto fused, auto tabled) {
    for (int64_t at = 0; at < rows * columns; at += columns) {
      gelu_encode_row<Machine, decltype(fused)::value, decltype(tabled)::value>(x + at, columns,
                                                                                grid, x_hat + at);
    }
  };
  with_flags(of_rows, grid.fused, grid.tabled());
}

template <typename Machine, bool fused, bool tabled>
void gelu_backward_row(const float* __restrict grad, const float* __restrict x, int64_t columns,
                       const LearnedGrid& grid, float* __restrict grad_x,
                       float* __restrict x_hat, float* __restrict scale_sums,
                       float* __restrict offset_sums) {
  const Range range(grid);
  const float* __restrict scale = grid.scale;
  const float* __restrict offset = grid.offset;
  const float* __restrict inverse = grid.inverse;
  const float* __restrict shift = grid.shift;
  // A part of the columns at a time: what is costly to compute again is kept in the cache.
  constexpr int64_t kPart = 64;
  alignas(64) float steps[kPart], slopes[kPart];
  const auto code_at = [&](int64_t i) { return range.code(steps[i]); };
  for (int64_t first = 0; first < columns; first += kPart) {
    const int64_t count = columns - first < kPart ? columns - first : kPart;
    for (int64_t i = 0; i < count; ++i) {
      constexpr float kDensity = 0.398942280f;  // 1 / sqrt(2 pi)
      const int64_t k = first + i;
      const float phi = phi_of(x[k]);
      slopes[i] = madd(x[k], kDensity * exp_of(-0.5f * x[k] * x[k]), phi);
      steps[i] = affine_one<fused>(x[k] * phi, inverse[k], shift[k]);
    }
    write_integers<Machine, tabled>(grid.table, count, x_hat + first, code_at);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = first + i;
      const float integer = tabled ? x_hat[k] : code_at(i);
      const Share share = share_of(grad[k], !range.holds(steps[i]), integer, integer - steps[i]);
      grad_x[k] = share.x * slopes[i];
      x_hat[k] = affine_one<fused>(integer, scale[k], offset[k]);
      scale_sums[k] += share.scale;
      offset_sums[k] += share.offset;
    }
  }
}

template <typename Machine>
void gelu_backward(const float* grad, const float* x, int64_t rows, int64_t columns,
                   const LearnedGrid& grid, float* grad_x, float* x_hat, GridGradient sums) {
  const auto of_rows = [&](auto fused, auto tabled) {
    for (int64_t at = 0; at < rows * columns; at += columns) {
      gelu_backward_row<Machine, decltype(fused)::value, decltype(tabled)::value>(
          grad + at, x + at, columns, grid, grad_x + at, x_hat + at, sums.scale, sums.offset);
    }
  };
  with_flags(of_rows, grid.fused, grid.tabled());
}

template <typename Machine, typename State>
StateKernels<State> state_kernels() {
  return {encode<Machine, State>, decode<Machine, State>, backward<Machine, State>};
}

template <typename Machine>
const TrainingKernels* training_kernels() {
  static const TrainingKernels table = {state_kernels<Machine, uint8_t>(),
                                        state_kernels<Machine, uint16_t>(),
                                        gelu_encode<Machine>,
                                        gelu_backward<Machine>,
                                        softmax<Machine>,
                                        softmax_backward<Machine>};
  return &table;
}

}  // namespace
}  // namespace gplq_mm
