#include "checks.h"

#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

namespace gplq_mm {
namespace {

constexpr std::array<const char*, kFields> kNames = {
    "inverse", "shift", "weight", "multiplier", "position", "row_scale", "bias", "correction",
    "table"};
constexpr Types kFloats = {c10::ScalarType::Float, c10::ScalarType::Half,
                           c10::ScalarType::BFloat16};
constexpr Types kFloat32 = {c10::ScalarType::Float};
constexpr Types kByte = {c10::ScalarType::Byte};
constexpr int64_t kMaxCodes = 256;
constexpr int64_t kCodeLimit = 1 << 15;

// Python's name of a dtype.
std::string name_of(c10::ScalarType type) {
  static const std::pair<c10::ScalarType, const char*> names[] = {
      {c10::ScalarType::Float, "float32"},    {c10::ScalarType::Double, "float64"},
      {c10::ScalarType::Half, "float16"},     {c10::ScalarType::BFloat16, "bfloat16"},
      {c10::ScalarType::Byte, "uint8"},       {c10::ScalarType::Char, "int8"},
      {c10::ScalarType::Short, "int16"},      {c10::ScalarType::Int, "int32"},
      {c10::ScalarType::Long, "int64"},       {c10::ScalarType::Bool, "bool"},
      {c10::ScalarType::ComplexFloat, "complex64"},
  };
  for (const auto& [known, name] : names) {
    if (known == type) return name;
  }
  return c10::toString(type);
}

std::string names_of(Types types, const char* between) {
  std::string names;
  for (const auto type : types) names += (names.empty() ? "" : between) + name_of(type);
  return names;
}

bool is_float(const at::Tensor& tensor) {
  return std::find(kFloats.begin(), kFloats.end(), tensor.scalar_type()) != kFloats.end();
}

template <typename Value>
void check_range(const char* name, const at::Tensor& tensor, int64_t low, int64_t high) {
  const Value* values = tensor.const_data_ptr<Value>();
  Value least = values[0], most = values[0];
  for (int64_t i = 1, count = tensor.numel(); i < count; ++i) {
    least = std::min(least, values[i]);
    most = std::max(most, values[i]);
  }
  TORCH_CHECK_VALUE(low <= least && most <= high, name, " must lie in ", low, "..", high, ", got ",
                    static_cast<int64_t>(least), "..", static_cast<int64_t>(most), ".");
}

// `shape` for a table of levels, (0,) where there is none.
at::IntArrayRef table_shape(const at::Tensor& table, at::IntArrayRef shape) {
  static constexpr std::array<int64_t, 1> kNone = {0};
  return table.dim() == 1 && table.numel() == 0 ? at::IntArrayRef(kNone) : shape;
}

// What a table of levels holds, of the right dtype and shape, beside a range of codes.
void check_levels(const char* name, const at::Tensor& table, at::IntArrayRef grid) {
  if (table.numel() == 0) return;
  TORCH_CHECK_VALUE(grid[0] == 0 && grid[1] == kPositions - 1, "codes must be positions 0..",
                    kPositions - 1, " where ", name, " has levels, got ", grid[0], "..", grid[1],
                    ".");
  const at::Tensor own = table.contiguous();
  check_range<uint8_t>(name, own, 0, kPositions - 1);
  const auto* levels = own.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < own.numel(); i += kPositions) {
    TORCH_CHECK_VALUE(std::is_sorted(levels + i, levels + i + kPositions), name,
                      " must hold levels that ascend.");
  }
}

// Of contiguous tensors that live longer.
ActGrid act_grid(const at::Tensor& inverse, const at::Tensor& shift, at::IntArrayRef grid,
                 const at::Tensor& table) {
  return {inverse.const_data_ptr<float>(),
          shift.const_data_ptr<float>(),
          static_cast<int32_t>(grid[0]),
          static_cast<int32_t>(grid[1]),
          torch_fuses(),
          table.numel() == 0 ? nullptr : table.const_data_ptr<uint8_t>()};
}

}  // namespace

void check_tensor(const char* name, const at::Tensor& tensor, Types types,
                  at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(std::find(types.begin(), types.end(), tensor.scalar_type()) != types.end(),
                    name, " must be ", names_of(types, " or "), ", got ",
                    name_of(tensor.scalar_type()), ".");
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on cpu, got ",
                    tensor.device().str(), ".");
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ",
                    tensor.sizes(), ".");
}

void check_codes(at::IntArrayRef grid) {
  const int64_t low = grid[0], high = grid[1];
  // Compared one by one: a difference of arbitrary integers could overflow.
  TORCH_CHECK_VALUE(-kCodeLimit <= low && low <= high && high < kCodeLimit &&
                        high - low < kMaxCodes,
                    "codes must fit a byte: at most ", kMaxCodes, " of them within ", -kCodeLimit,
                    "..", kCodeLimit - 1, ", got ", low, "..", high, ".");
}

void check_table(const char* name, const at::Tensor& table, at::IntArrayRef shape,
                 at::IntArrayRef grid) {
  check_tensor(name, table, kByte, table_shape(table, shape));
  check_levels(name, table, grid);
}

void check_float(const at::Tensor& x) {
  TORCH_CHECK_VALUE(is_float(x), "the input must be one of ", names_of(kFloats, ", "), ", got ",
                    name_of(x.scalar_type()), ".");
}

bool torch_fuses() {
  // (1 + 2^-12)^2 - 1 is 2^-11 + 2^-24; a product that is rounded by itself loses the 2^-24.
  static const bool fuses = [] {
    const at::Tensor factor = at::full({64}, 1.0 + 1.0 / 4096, at::kFloat);
    const at::Tensor sum = at::addcmul(at::full({64}, -1.0, at::kFloat), factor, factor);
    return sum.const_data_ptr<float>()[0] != 1.0f / 2048;
  }();
  return fuses;
}

Layer::Layer(at::TensorList tensors, at::IntArrayRef grid) {
  TORCH_CHECK_VALUE(tensors.size() == kFields, "layer must be the ", kFields,
                    " tensors inverse, shift, weight, multiplier, position, row_scale, bias, "
                    "correction, table; got ",
                    tensors.size(), ".");
  TORCH_CHECK_VALUE(grid.size() == 3, "grid must be [code_min, code_max, group_size], got ",
                    grid.size(), " integers.");
  check_codes(grid);
  const int64_t group_size = grid[2];
  TORCH_CHECK_VALUE(group_size >= 1, "group_size must be at least 1, got ", group_size, ".");
  columns_ = tensors[Field::inverse].numel();
  rows_ = tensors[Field::row_scale].numel();
  TORCH_CHECK_VALUE(columns_ > 0 && rows_ > 0, "a layer needs columns and rows, got ", columns_,
                    " columns and ", rows_, " rows.");
  groups_ = columns_ / group_size + (columns_ % group_size != 0);
  packed_ = tensors[Field::weight].scalar_type() == c10::ScalarType::Byte;
  const int64_t width = packed_ ? kPackedColumn : kPanel;
  const std::array<int64_t, 1> by_column = {columns_}, by_row = {rows_}, by_code = {kPositions};
  const std::array<int64_t, 3> weight_shape = {panels(), columns_, width};
  const std::array<int64_t, 3> multiplier_shape = {panels(), groups_, kPanel};
  const std::array<at::IntArrayRef, kFields> shapes = {
      by_column, by_column, weight_shape, multiplier_shape, by_column,
      by_row,    by_row,    by_row,       table_shape(tensors[Field::table], by_code)};
  const Types weights = {c10::ScalarType::Byte, c10::ScalarType::Char};
  const Types integer = {c10::ScalarType::Int};
  const std::array<Types, kFields> types = {kFloat32, kFloat32, weights, kByte, integer,
                                            kFloat32, kFloat32, integer, kByte};
  for (int64_t i = 0; i < kFields; ++i) check_tensor(kNames[i], tensors[i], types[i], shapes[i]);
  check_levels("table", tensors[Field::table], grid);
  const int64_t widest = grid[1] - grid[0];
  // A product is at most 128 * 255 < 2^15, so the bound cannot overflow before it is crossed.
  TORCH_CHECK_VALUE(columns_ < (int64_t{1} << 31) && widest * 128 * columns_ < (int64_t{1} << 31),
                    "sums over ", columns_, " columns of codes up to ", widest,
                    " can exceed int32.");
  for (int64_t i = 0; i < kFields; ++i) tensors_[i] = tensors[i].contiguous();
  check_range<int32_t>("position", tensors_[Field::position], 0, columns_ - 1);
  check_range<uint8_t>("multiplier", tensors_[Field::multiplier], 1,
                       packed_ ? kMaxPackedMultiplier : kMaxMultiplier);

  group_ = at::empty({columns_}, at::kInt);
  const auto* stored = tensors_[Field::position].const_data_ptr<int32_t>();
  auto* group = group_.mutable_data_ptr<int32_t>();
  // A group may be larger than any int32 where it is the whole row.
  const auto divisor = static_cast<uint32_t>(std::min(group_size, columns_));
  for (int64_t k = 0; k < columns_; ++k) {
    group[k] = static_cast<int32_t>(static_cast<uint32_t>(stored[k]) / divisor);
  }
  grid_ = act_grid(tensors_[Field::inverse], tensors_[Field::shift], grid, tensors_[Field::table]);
}

PackedPanel Layer::panel(int64_t index) const {
  return {static_cast<const char*>(tensors_[Field::weight].const_data_ptr()) +
              index * panel_bytes(),
          tensors_[Field::multiplier].const_data_ptr<uint8_t>() + index * groups_ * kPanel,
          tensors_[Field::position].const_data_ptr<int32_t>(),
          group_.const_data_ptr<int32_t>(),
          columns_,
          packed_};
}

Epilogue Layer::epilogue(int64_t index, Output kind) const {
  Epilogue epilogue = {};
  const int64_t first = index * kPanel;
  epilogue.kind = kind;
  epilogue.fused = grid_.fused;
  epilogue.columns = std::min(kPanel, rows_ - first);
  epilogue.correction = tensors_[Field::correction].const_data_ptr<int32_t>() + first;
  epilogue.row_scale = tensors_[Field::row_scale].const_data_ptr<float>() + first;
  epilogue.bias = tensors_[Field::bias].const_data_ptr<float>() + first;
  return epilogue;
}

ActGrid check_quantize(const at::Tensor& x, const at::Tensor& inverse, const at::Tensor& shift,
                       at::IntArrayRef grid, const at::Tensor& table) {
  TORCH_CHECK_VALUE(grid.size() >= 2, "grid must be [code_min, code_max, ...], got ", grid.size(),
                    " integers.");
  check_codes(grid);
  TORCH_CHECK_VALUE(x.dim() > 0, "the input must have at least one axis.");
  const std::array<int64_t, 1> shape = {x.size(-1)};
  check_tensor("inverse", inverse, kFloat32, shape);
  check_tensor("shift", shift, kFloat32, shape);
  check_table("table", table, {kPositions}, grid);
  check_input(x, x.size(-1));
  return act_grid(inverse, shift, grid, table);
}

void check_input(const at::Tensor& x, int64_t columns) {
  check_float(x);
  TORCH_CHECK_VALUE(x.dim() > 0, "the input must have at least one axis.");
  TORCH_CHECK_VALUE(x.size(-1) == columns, "the input has ", x.size(-1),
                    " columns, the layer takes ", columns, ".");
}

void check_norm(const at::Tensor& weight, const at::Tensor& bias, int64_t columns) {
  const std::array<int64_t, 1> shape = {columns};
  check_tensor("norm_weight", weight, kFloats, shape);
  check_tensor("norm_bias", bias, kFloats, shape);
}

void check_residual(const at::Tensor& x, const at::Tensor& residual, int64_t rows) {
  auto shape = x.sizes().vec();
  shape.back() = rows;
  check_tensor("residual", residual, kFloats, shape);
}

void check_gamma(const std::optional<at::Tensor>& gamma, int64_t rows) {
  const std::array<int64_t, 1> shape = {rows};
  if (gamma.has_value()) check_tensor("gamma", *gamma, kFloats, shape);
}

void check_mlp(const Layer& first, const Layer& second, int64_t columns) {
  TORCH_CHECK_VALUE(first.rows() == second.columns(), "the first layer gives ", first.rows(),
                    " columns, the second takes ", second.columns(), ".");
  TORCH_CHECK_VALUE(second.rows() == columns, "the second layer gives ", second.rows(),
                    " columns, the input has ", columns, ".");
}

void check_conv(const at::Tensor& x, int64_t columns, at::IntArrayRef geometry) {
  TORCH_CHECK_VALUE(geometry.size() == 8,
                    "geometry must be kernel, stride, padding, dilation (height, width each), got ",
                    geometry.size(), " integers.");
  const auto kernel = geometry.slice(0, 2), stride = geometry.slice(2, 2);
  const auto padding = geometry.slice(4, 2), dilation = geometry.slice(6, 2);
  const auto positive = [](at::IntArrayRef pair) { return pair[0] >= 1 && pair[1] >= 1; };
  TORCH_CHECK_VALUE(positive(kernel) && positive(stride) && positive(dilation) &&
                        padding[0] >= 0 && padding[1] >= 0,
                    "kernel, stride and dilation must be at least 1 and padding at least 0, got ",
                    geometry, ".");
  check_float(x);
  TORCH_CHECK_VALUE(x.dim() == 4, "the input must be (N, C, H, W), got shape ", x.sizes(), ".");
  const int64_t taken = x.size(1) * kernel[0] * kernel[1];
  TORCH_CHECK_VALUE(taken == columns, x.size(1), " channels under a kernel of ", kernel[0], " x ",
                    kernel[1], " are ", taken, " columns, the layer takes ", columns, ".");
  const int64_t span_h = dilation[0] * (kernel[0] - 1) + 1;
  const int64_t span_w = dilation[1] * (kernel[1] - 1) + 1;
  const int64_t height = x.size(2) + 2 * padding[0], width = x.size(3) + 2 * padding[1];
  TORCH_CHECK_VALUE(height >= span_h && width >= span_w, "the kernel spans ", span_h, " x ",
                    span_w, ", the padded input is ", height, " x ", width, ".");
}

}  // namespace gplq_mm
