// The packed layer as the kernels see it, and the checks of what the ops are given (the same as
// in gplq_mm/ops/checks.py, with the same words).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <initializer_list>

#include "kernels.h"

namespace gplq_mm {

using Types = std::initializer_list<c10::ScalarType>;

// The order of the tensors of a layer.
struct Field {
  enum : int64_t { inverse, shift, weight, multiplier, position, row_scale, bias, correction, table };
};
constexpr int64_t kFields = 9;

// Whether torch.addcmul rounds a * b + c once on this machine.
bool torch_fuses();

// A checked packed layer on the CPU. Owns what its pointers point to.
class Layer {
 public:
  Layer(at::TensorList tensors, at::IntArrayRef grid);

  int64_t columns() const { return columns_; }
  int64_t rows() const { return rows_; }
  int64_t panels() const { return (rows_ + kPanel - 1) / kPanel; }
  const ActGrid& grid() const { return grid_; }
  // Largest number that is multiplied: a table's levels ascend.
  int32_t max_code() const {
    return grid_.table == nullptr ? grid_.code_max - grid_.code_min : grid_.table[kPositions - 1];
  }
  PackedPanel panel(int64_t index) const;
  // Bytes of a panel's codes.
  int64_t panel_bytes() const { return columns_ * (packed_ ? kPackedColumn : kPanel); }
  // Epilogue of a panel without what depends on the op.
  Epilogue epilogue(int64_t index, Output kind) const;

 private:
  std::array<at::Tensor, kFields> tensors_;
  at::Tensor group_;  // int32 (K,): group of the stored column that a natural column meets
  int64_t columns_, rows_, groups_;
  bool packed_;
  ActGrid grid_;
};

// Dtype, device and shape of a tensor.
void check_tensor(const char* name, const at::Tensor& tensor, Types types, at::IntArrayRef shape);
// That grid begins with code_min, code_max, which fit a byte.
void check_codes(at::IntArrayRef grid);
// Dtype and shape of a table of levels, which may be empty (0,), and what it holds beside a range
// of codes.
void check_table(const char* name, const at::Tensor& table, at::IntArrayRef shape,
                 at::IntArrayRef grid);
// That an op's input is of a dtype that is computed in float32.
void check_float(const at::Tensor& x);
ActGrid check_quantize(const at::Tensor& x, const at::Tensor& inverse, const at::Tensor& shift,
                       at::IntArrayRef grid, const at::Tensor& table);
void check_input(const at::Tensor& x, int64_t columns);
void check_norm(const at::Tensor& weight, const at::Tensor& bias, int64_t columns);
void check_residual(const at::Tensor& x, const at::Tensor& residual, int64_t rows);
void check_gamma(const std::optional<at::Tensor>& gamma, int64_t rows);
void check_mlp(const Layer& first, const Layer& second, int64_t columns);
void check_conv(const at::Tensor& x, int64_t columns, at::IntArrayRef geometry);

}  // namespace gplq_mm
