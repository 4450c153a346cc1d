// What the CPU kernels of training offer: fake quantization that keeps a code and a rounding
// residual for backward in one or two bytes. Plain C++, no ATen.
//
// A state is (code - code_min) << level_bits | level. The level is the rounding residual in steps of
// 1 / (2^level_bits - 1), counted from the middle of the levels: at the lowest code those above the
// middle, and at the highest code those below, say that the value lay outside of the grid.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gplq_mm {

// How real values become codes, and back. A scale belongs to a column (per_column) or to a row:
// row r has number (r / inner) % channels. A code stands for itself, or for the integer that a
// table has for it: row r has table (r / table_inner) % tables.
struct LearnedGrid {
  const float* scale;
  const float* offset;   // zeros where the grid is symmetric
  const float* inverse;  // 1 / scale
  const float* shift;    // -offset / scale
  const uint8_t* table;  // (tables, kPositions), or null
  bool per_column;
  int64_t channels, inner, tables, table_inner;
  int32_t code_min, code_max;
  int level_bits;
  bool fused;  // whether a * b + c is rounded once, as torch does on this machine

  // The first number of a row.
  int64_t channel(int64_t row) const { return per_column ? 0 : row / inner % channels; }
  bool tabled() const { return table != nullptr; }
  const uint8_t* table_of(int64_t row) const {
    return tabled() ? table + row / table_inner % tables * kPositions : nullptr;
  }
};

// Gradients of scale and offset: per column sums over all rows of a call, per row the row's own.
struct GridGradient {
  float* scale;
  float* offset;
};

// Row of a softmax: scores (columns,) times factor plus bias plus mask, either may be null. The
// quantized numbers take the place of the scores.
struct SoftmaxRow {
  float* scores;
  const float* bias;
  const float* mask;
  float factor;
  int64_t columns;
};

// State is uint8_t where code and level fit a byte, else uint16_t.
template <typename State>
struct StateKernels {
  // `rows` rows from row `first` on, x being the first of them.
  void (*encode)(const float* x, int64_t stride, int64_t first, int64_t rows, int64_t columns,
                 const LearnedGrid& grid, float* x_hat, State* state);
  void (*decode)(const State* state, int64_t first, int64_t rows, int64_t columns,
                 const LearnedGrid& grid, float* x_hat);
  void (*backward)(const float* grad, const State* state, int64_t first, int64_t rows,
                   int64_t columns, const LearnedGrid& grid, float* grad_x, GridGradient sums);
};

struct TrainingKernels {
  StateKernels<uint8_t> narrow;
  StateKernels<uint16_t> wide;
  // The same of gelu(x); backward computes the quantized values again, and gives them. Scales are
  // per column, and there is one table at most.
  void (*gelu_encode)(const float* x, int64_t rows, int64_t columns, const LearnedGrid& grid,
                      float* x_hat);
  void (*gelu_backward)(const float* grad, const float* x, int64_t rows, int64_t columns,
                        const LearnedGrid& grid, float* grad_x, float* x_hat, GridGradient sums);
  // Softmax of a row, quantized as that row of the grid: the numerators exp(score - maximum) with
  // row_relative, else the probabilities. Gives the denominator.
  // `space` holds as many numbers as columns rounded up to 16.
  float (*softmax)(const SoftmaxRow& row, const LearnedGrid& grid, int64_t number,
                   bool row_relative, float* space);
  // grad (columns,) of the quantized numbers becomes that of factor * scores + bias + mask; that of
  // row_relative numerators is divided by the denominator already. Writes the quantized numbers
  // again, and the sums of this row.
  void (*softmax_backward)(const SoftmaxRow& row, const LearnedGrid& grid, int64_t number,
                           bool row_relative, float* grad, float* space, GridGradient sums);
};

}  // namespace gplq_mm
