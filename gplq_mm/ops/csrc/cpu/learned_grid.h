// Scale, offset, table and range of codes of a learned quantizer as the kernels of training take
// them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernel_set.h"

namespace gplq_mm {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kMaxLevelBits = 14;

inline bool is_narrow(at::IntArrayRef grid) { return (grid[1] - grid[0] + 1) << grid[2] <= 256; }

// A scale with at most one axis longer than 1, and how it lies on the rows of a tensor.
class GridOf {
 public:
  // sizes: those of what is quantized, cut into rows of `columns` values. `merged` rows are as long
  // as one scale and one table last; others end with the last axis.
  GridOf(at::IntArrayRef sizes, const at::Tensor& scale, const OptionalTensor& offset,
         const at::Tensor& table, at::IntArrayRef grid, bool merged) {
    const auto dim = static_cast<int64_t>(sizes.size());
    const auto size = [&](int64_t from_end) {
      return sizes[static_cast<size_t>(dim - from_end)];
    };
    TORCH_CHECK_VALUE(dim > 0, "the input must have at least one axis.");
    TORCH_CHECK_VALUE(grid.size() == 3, "grid must be [code_min, code_max, level_bits], got ",
                      grid.size(), " integers.");
    check_codes(grid);
    TORCH_CHECK_VALUE(1 <= grid[2] && grid[2] <= kMaxLevelBits &&
                          (grid[1] - grid[0] + 1) << grid[2] <= 65536,
                      "code and level must fit two bytes, got ", grid[1] - grid[0] + 1,
                      " codes and ", grid[2], " bits of level.");
    check_tensor("scale", scale, {at::kFloat}, scale.sizes());
    if (offset.has_value()) check_tensor("offset", *offset, {at::kFloat}, scale.sizes());
    axis_ = 0;
    for (int64_t i = 1; i <= scale.dim(); ++i) {
      if (scale.size(-i) == 1) continue;
      TORCH_CHECK_VALUE(axis_ == 0 && i <= dim && scale.size(-i) == size(i),
                        "scale of shape ", scale.sizes(),
                        " must have at most one axis longer than 1, as long as that of the input ",
                        sizes, ".");
      axis_ = i;
    }
    // Tables of heads lie along the third axis from the end.
    constexpr int64_t kHeads = 3;
    const bool has_heads = table.dim() > 1 && dim >= kHeads;
    check_table("table", table,
                has_heads ? std::vector<int64_t>{size(kHeads), kPositions}
                          : std::vector<int64_t>{kPositions},
                grid);
    per_column_ = axis_ <= 1;
    channels_ = scale.numel();
    columns_ = size(1);
    int64_t inner = 1, table_inner = 1;
    for (int64_t i = 2; i < std::max(axis_, has_heads ? kHeads : 0); ++i) {
      const bool one_scale = i < axis_, one_table = !has_heads || i < kHeads;
      if (merged && one_scale && one_table) {
        columns_ *= size(i);
        continue;
      }
      if (one_scale) inner *= size(i);
      if (one_table) table_inner *= size(i);
    }
    fill(scale, offset);
    table_ = table.contiguous();
    grid_ = {numbers_[0].data(),
             numbers_[1].data(),
             numbers_[2].data(),
             numbers_[3].data(),
             table_.numel() == 0 ? nullptr : table_.const_data_ptr<uint8_t>(),
             per_column_,
             channels_,
             inner,
             has_heads ? table.size(0) : 1,
             table_inner,
             static_cast<int32_t>(grid[0]),
             static_cast<int32_t>(grid[1]),
             static_cast<int>(grid[2]),
             torch_fuses()};
  }
  GridOf(const GridOf&) = delete;
  GridOf& operator=(const GridOf&) = delete;

  const LearnedGrid& operator*() const { return grid_; }
  int64_t columns() const { return columns_; }
  bool per_column() const { return per_column_; }
  int64_t channels() const { return channels_; }

 private:
  void fill(const at::Tensor& scale, const OptionalTensor& offset) {
    const at::Tensor scales = scale.contiguous();
    const at::Tensor offsets = offset.has_value() ? offset->contiguous() : at::Tensor();
    const float* from = scales.const_data_ptr<float>();
    const float* zero_at = offsets.defined() ? offsets.const_data_ptr<float>() : nullptr;
    // One scale for everything becomes one a column.
    const auto count = static_cast<size_t>(per_column_ ? columns_ : channels_);
    for (auto& numbers : numbers_) numbers.resize(count);
    for (size_t i = 0; i < count; ++i) {
      const size_t at = channels_ == 1 ? 0 : i;
      const float real = from[at], zero = zero_at == nullptr ? 0.0f : zero_at[at];
      // The operations of gplq_mm/quant/functional.py.
      const float inverse = 1.0f / real;
      numbers_[0][i] = real;
      numbers_[1][i] = zero;
      numbers_[2][i] = inverse;
      numbers_[3][i] = zero * -inverse;
    }
  }

  std::vector<float> numbers_[4];
  at::Tensor table_;
  int64_t axis_, channels_, columns_;
  bool per_column_;
  LearnedGrid grid_;
};

inline at::Tensor empty_state(at::IntArrayRef shape, at::IntArrayRef grid) {
  return at::empty(shape, is_narrow(grid) ? at::kByte : at::kShort);
}

// Calls function with the kernels and the data of a state, of one or two bytes.
template <typename Function>
void with_state(const at::Tensor& state, const Function& function) {
  const TrainingKernels& kernel = *kernel_set().training;
  if (state.scalar_type() == at::kByte) {
    function(kernel.narrow, static_cast<uint8_t*>(state.data_ptr()));
  } else {
    function(kernel.wide, static_cast<uint16_t*>(state.data_ptr()));
  }
}

inline void check_state(const at::Tensor& state, at::IntArrayRef grid) {
  check_tensor("state", state, {is_narrow(grid) ? at::kByte : at::kShort}, state.sizes());
  TORCH_CHECK_VALUE(state.is_contiguous(), "state must be contiguous.");
}

// Sums of the parts of a gradient in the shape of the scale. The parts are cut the same way
// whatever the number of threads, and added in order.
inline at::Tensor total_of(const std::vector<float>& parts, int64_t count, int64_t stride,
                const at::Tensor& scale) {
  const int64_t channels = scale.numel();
  std::vector<double> sums(static_cast<size_t>(channels));
  for (int64_t part = 0; part < count; ++part) {
    const float* from = parts.data() + part * stride;
    for (int64_t i = 0; i < stride; ++i) {
      sums[static_cast<size_t>(i % channels)] += static_cast<double>(from[i]);
    }
  }
  at::Tensor total = at::empty(scale.sizes(), at::kFloat);
  auto* to = total.mutable_data_ptr<float>();
  for (int64_t i = 0; i < channels; ++i) to[i] = static_cast<float>(sums[static_cast<size_t>(i)]);
  return total;
}

// The sums of rows by channel.
inline std::tuple<at::Tensor, at::Tensor> sum_rows(const std::vector<float> (&parts)[2],
                                                   int64_t rows, const LearnedGrid& grid,
                                                   const at::Tensor& scale) {
  std::vector<double> sums[2];
  at::Tensor totals[2];
  for (int which = 0; which < 2; ++which) {
    sums[which].resize(static_cast<size_t>(grid.channels));
    for (int64_t row = 0; row < rows; ++row) {
      sums[which][static_cast<size_t>(grid.channel(row))] +=
          static_cast<double>(parts[which][static_cast<size_t>(row)]);
    }
    totals[which] = at::empty(scale.sizes(), at::kFloat);
    auto* to = totals[which].mutable_data_ptr<float>();
    for (size_t i = 0; i < sums[which].size(); ++i) to[i] = static_cast<float>(sums[which][i]);
  }
  return {totals[0], totals[1]};
}

}  // namespace gplq_mm
