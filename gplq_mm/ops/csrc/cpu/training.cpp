// The ops of training on the CPU. What they compute stands in gplq_mm/ops/training_reference.py.
#include "kernel_set.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "learned_grid.h"
#include "parallel.h"

namespace gplq_mm {

namespace {

using at::Tensor;

Tensor real_of(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

std::tuple<Tensor, Tensor> fake_quant(const Tensor& x, const Tensor& scale,
                                      const OptionalTensor& offset, const Tensor& table,
                                      at::IntArrayRef grid) {
  check_float(x);
  const GridOf scales(x.sizes(), scale, offset, table, grid, true);
  Tensor x_hat = at::empty(x.sizes(), at::kFloat);
  Tensor state = empty_state(x.sizes(), grid);
  if (x.numel() == 0) return {x_hat, state};
  const int64_t columns = scales.columns();
  const Tensor real = real_of(x);
  const float* from = real.const_data_ptr<float>();
  auto* to = x_hat.mutable_data_ptr<float>();
  with_state(state, [&](const auto& kernel, auto* codes) {
    for_rows(x.numel() / columns, columns, [&](int64_t first, int64_t count) {
      const int64_t at = first * columns;
      kernel.encode(from + at, columns, first, count, columns, *scales, to + at, codes + at);
    });
  });
  return {x_hat, state};
}

Tensor fake_quant_values(const Tensor& state, const Tensor& scale, const OptionalTensor& offset,
                         const Tensor& table, at::IntArrayRef grid) {
  Tensor x_hat = at::empty(state.sizes(), at::kFloat);
  const GridOf scales(state.sizes(), scale, offset, table, grid, true);
  check_state(state, grid);
  if (state.numel() == 0) return x_hat;
  const int64_t columns = scales.columns();
  auto* to = x_hat.mutable_data_ptr<float>();
  with_state(state, [&](const auto& kernel, const auto* codes) {
    for_rows(state.numel() / columns, columns, [&](int64_t first, int64_t count) {
      kernel.decode(codes + first * columns, first, count, columns, *scales, to + first * columns);
    });
  });
  return x_hat;
}

// Runs work(first, count, sums) over chunks of rows and adds their column sums.
template <typename Work>
std::tuple<Tensor, Tensor> sum_columns(int64_t rows, int64_t columns, const Tensor& scale,
                                       const Work& work) {
  constexpr int64_t kChunk = 1 << 15;
  const int64_t chunk = std::max<int64_t>(16, kChunk / columns);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  std::vector<float> parts[2];
  for (auto& part : parts) part.resize(static_cast<size_t>(chunks * columns));
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk, count = std::min(chunk, rows - first);
      work(first, count, GridGradient{parts[0].data() + i * columns, parts[1].data() + i * columns});
    }
  });
  return {total_of(parts[0], chunks, columns, scale), total_of(parts[1], chunks, columns, scale)};
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward(const Tensor& grad, const Tensor& state,
                                                       const Tensor& scale,
                                                       const OptionalTensor& offset,
                                                       const Tensor& table, at::IntArrayRef grid) {
  check_float(grad);
  const GridOf scales(grad.sizes(), scale, offset, table, grid, true);
  check_state(state, grid);
  TORCH_CHECK_VALUE(grad.sizes() == state.sizes(), "grad has shape ", grad.sizes(), ", state ",
                    state.sizes(), ".");
  Tensor grad_x = at::empty(grad.sizes(), at::kFloat);
  if (grad.numel() == 0) {
    return {grad_x, at::zeros(scale.sizes(), at::kFloat), at::zeros(scale.sizes(), at::kFloat)};
  }
  const Tensor real = real_of(grad);
  const float* from = real.const_data_ptr<float>();
  auto* to = grad_x.mutable_data_ptr<float>();
  const int64_t columns = scales.columns(), rows = grad.numel() / columns;
  std::tuple<Tensor, Tensor> sums;
  with_state(state, [&](const auto& kernel, const auto* codes) {
    if (scales.per_column()) {
      sums = sum_columns(rows, columns, scale,
                         [&](int64_t first, int64_t count, const GridGradient& parts) {
                           const int64_t at = first * columns;
                           kernel.backward(from + at, codes + at, first, count, columns, *scales,
                                           to + at, parts);
                         });
      return;
    }
    std::vector<float> parts[2];
    for (auto& part : parts) part.resize(static_cast<size_t>(rows));
    for_rows(rows, columns, [&](int64_t first, int64_t count) {
      const int64_t at = first * columns;
      kernel.backward(from + at, codes + at, first, count, columns, *scales, to + at,
                      {parts[0].data() + first, parts[1].data() + first});
    });
    sums = sum_rows(parts, rows, *scales, scale);
  });
  return {grad_x, std::get<0>(sums), std::get<1>(sums)};
}

void check_gelu(const GridOf& scales, const Tensor& table) {
  TORCH_CHECK_VALUE(scales.per_column(), "scale must have one number, or one a column.");
  TORCH_CHECK_VALUE(table.dim() == 1, "the output of a GELU has one table.");
}

Tensor gelu_fake_quant(const Tensor& x, const Tensor& scale, const OptionalTensor& offset,
                       const Tensor& table, at::IntArrayRef grid) {
  check_float(x);
  const GridOf scales(x.sizes(), scale, offset, table, grid, true);
  check_gelu(scales, table);
  Tensor x_hat = at::empty(x.sizes(), at::kFloat);
  if (x.numel() == 0) return x_hat;
  const Tensor real = real_of(x);
  const float* from = real.const_data_ptr<float>();
  auto* to = x_hat.mutable_data_ptr<float>();
  const int64_t columns = scales.columns();
  const TrainingKernels& kernel = *kernel_set().training;
  for_rows(x.numel() / columns, columns, [&](int64_t first, int64_t count) {
    const int64_t at = first * columns;
    kernel.gelu_encode(from + at, count, columns, *scales, to + at);
  });
  return x_hat;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gelu_fake_quant_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const OptionalTensor& offset,
    const Tensor& table, at::IntArrayRef grid) {
  check_float(x);
  const GridOf scales(x.sizes(), scale, offset, table, grid, true);
  check_gelu(scales, table);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "grad has shape ", grad.sizes(), ", the input ",
                    x.sizes(), ".");
  Tensor grad_x = at::empty(x.sizes(), at::kFloat), x_hat = at::empty(x.sizes(), at::kFloat);
  if (x.numel() == 0) {
    const Tensor zeros = at::zeros(scale.sizes(), at::kFloat);
    return {grad_x, x_hat, zeros, zeros.clone()};
  }
  const Tensor real = real_of(x), grads = real_of(grad);
  const float* from = real.const_data_ptr<float>();
  const float* above = grads.const_data_ptr<float>();
  auto* to = grad_x.mutable_data_ptr<float>();
  auto* values = x_hat.mutable_data_ptr<float>();
  const int64_t columns = scales.columns();
  const TrainingKernels& kernel = *kernel_set().training;
  const auto [scale_sum, offset_sum] =
      sum_columns(x.numel() / columns, columns, scale,
                  [&](int64_t first, int64_t count, const GridGradient& parts) {
                    const int64_t at = first * columns;
                    kernel.gelu_backward(above + at, from + at, count, columns, *scales, to + at,
                                         values + at, parts);
                  });
  return {grad_x, x_hat, scale_sum, offset_sum};
}

}  // namespace
}  // namespace gplq_mm

TORCH_LIBRARY_IMPL(gplq_mm, CPU, m) {
  m.impl("fake_quant", gplq_mm::fake_quant);
  m.impl("fake_quant_values", gplq_mm::fake_quant_values);
  m.impl("fake_quant_backward", gplq_mm::fake_quant_backward);
  m.impl("gelu_fake_quant", gplq_mm::gelu_fake_quant);
  m.impl("gelu_fake_quant_backward", gplq_mm::gelu_fake_quant_backward);
}
