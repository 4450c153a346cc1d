// The ops on the CPU. What they compute stands in gplq_mm/ops/reference.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

#include "checks.h"
#include "kernels.h"
#include "parallel.h"
#include "product.h"

namespace gplq_mm {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor real_tensor(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

using InputCodes = Codes<Use::codes>;
using HiddenCodes = Codes<Use::hidden_codes>;

// Codes of x (..., columns).
InputCodes codes_of(const Tensor& x, const Layer& layer) {
  const int64_t columns = layer.columns();
  InputCodes codes(x.numel() / columns, columns);
  const Tensor real = real_tensor(x);
  const float* from = real.const_data_ptr<float>();
  const Kernels& kernel = *kernel_set().kernels;
  for_rows(codes.rows(), columns, [&](int64_t first, int64_t count) {
    kernel.quantize(from + first * columns, count, columns, layer.grid(), codes.row(first),
                    codes.stride());
  });
  return codes;
}

// Codes of layer_norm(x).
InputCodes norm_codes_of(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                         const Layer& layer) {
  const int64_t columns = layer.columns();
  InputCodes codes(x.numel() / columns, columns);
  const Tensor real = real_tensor(x), scales = real_tensor(weight), shifts = real_tensor(bias);
  const float* from = real.const_data_ptr<float>();
  const float* scale = scales.const_data_ptr<float>();
  const float* shift = shifts.const_data_ptr<float>();
  const Kernels& kernel = *kernel_set().kernels;
  for_rows(codes.rows(), columns, [&](int64_t first, int64_t count) {
    kernel.norm_quantize(from + first * columns, count, columns, scale, shift,
                         static_cast<float>(eps), layer.grid(), codes.row(first), codes.stride());
  });
  return codes;
}

// Codes times the layer, int32 (accumulator) or float32 of the given shape.
Tensor product(const InputCodes& codes, const Layer& layer, at::IntArrayRef shape, Output kind) {
  const bool sums = kind == Output::accumulator;
  Tensor out = at::empty(shape, sums ? at::kInt : at::kFloat);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  multiply(codes, layer, [&](int64_t panel) {
    Epilogue epilogue = layer.epilogue(panel, kind);
    epilogue.out = data + panel * kPanel * 4;
    epilogue.out_stride = layer.rows();
    return epilogue;
  });
  return out;
}

// residual + gamma * layer(codes), float32 of the residual's shape.
template <Use use>
Tensor product_add(const Codes<use>& codes, const Layer& layer, const Tensor& residual,
                   const OptionalTensor& gamma) {
  Tensor out = at::empty(residual.sizes(), at::kFloat);
  const Tensor real = real_tensor(residual);
  const Tensor gammas = gamma.has_value() ? real_tensor(*gamma) : Tensor();
  const float* added = real.const_data_ptr<float>();
  const float* scale = gammas.defined() ? gammas.const_data_ptr<float>() : nullptr;
  float* data = out.mutable_data_ptr<float>();
  multiply(codes, layer, [&](int64_t panel) {
    Epilogue epilogue = layer.epilogue(panel, Output::residual);
    epilogue.gamma = scale == nullptr ? nullptr : scale + panel * kPanel;
    epilogue.residual = added + panel * kPanel;
    epilogue.residual_stride = layer.rows();
    epilogue.out = data + panel * kPanel;
    epilogue.out_stride = layer.rows();
    return epilogue;
  });
  return out;
}

// Codes of gelu(layer(codes)) on the grid of the next layer.
HiddenCodes product_gelu_codes(const InputCodes& codes, const Layer& layer, const ActGrid& next) {
  HiddenCodes hidden(codes.rows(), layer.rows());
  const auto padding = static_cast<size_t>(hidden.stride() - layer.rows());
  for (int64_t row = 0; row < hidden.rows(); ++row) {
    std::memset(hidden.row(row) + layer.rows(), 0, padding);
  }
  multiply(codes, layer, [&](int64_t panel) {
    Epilogue epilogue = layer.epilogue(panel, Output::gelu_codes);
    epilogue.next = next;
    epilogue.next.inverse += panel * kPanel;
    epilogue.next.shift += panel * kPanel;
    epilogue.out = hidden.row(0) + panel * kPanel;
    epilogue.out_stride = hidden.stride();
    return epilogue;
  });
  return hidden;
}

std::vector<int64_t> output_shape(const Tensor& x, int64_t rows) {
  auto shape = x.sizes().vec();
  shape.back() = rows;
  return shape;
}

Tensor quantize_codes(const Tensor& x, const Tensor& inverse, const Tensor& shift,
                      at::IntArrayRef grid, const Tensor& table) {
  const Tensor inverses = inverse.contiguous(), shifts = shift.contiguous();
  const Tensor levels = table.contiguous();
  const ActGrid act = check_quantize(x, inverses, shifts, grid, levels);
  Tensor codes = at::empty(x.sizes(), at::kByte);
  if (x.numel() == 0) return codes;
  const Tensor real = real_tensor(x);
  const int64_t columns = x.size(-1);
  const float* from = real.const_data_ptr<float>();
  auto* to = codes.mutable_data_ptr<uint8_t>();
  const Kernels& kernel = *kernel_set().kernels;
  for_rows(x.numel() / columns, columns, [&](int64_t first, int64_t count) {
    kernel.quantize(from + first * columns, count, columns, act, to + first * columns, columns);
  });
  return codes;
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  check_float(x);
  TORCH_CHECK_VALUE(x.dim() > 0, "the input must have at least one axis.");
  const int64_t columns = x.size(-1);
  check_norm(weight, bias, columns);
  Tensor out = at::empty(x.sizes(), at::kFloat);
  if (x.numel() == 0) return out.to(x.scalar_type());
  const Tensor real = real_tensor(x), scales = real_tensor(weight), shifts = real_tensor(bias);
  const float* from = real.const_data_ptr<float>();
  const float* scale = scales.const_data_ptr<float>();
  const float* shift = shifts.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<float>();
  const Kernels& kernel = *kernel_set().kernels;
  const bool fused = torch_fuses();
  for_rows(x.numel() / columns, columns, [&](int64_t first, int64_t count) {
    kernel.layer_norm(from + first * columns, count, columns, scale, shift,
                      static_cast<float>(eps), fused, to + first * columns);
  });
  return out.to(x.scalar_type());
}

Tensor gelu(const Tensor& x) {
  check_float(x);
  Tensor out = at::empty(x.sizes(), at::kFloat);
  if (x.numel() == 0) return out.to(x.scalar_type());
  const Tensor real = real_tensor(x);
  const float* from = real.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<float>();
  const Kernels& kernel = *kernel_set().kernels;
  for_rows(x.numel(), 1, [&](int64_t first, int64_t count) {
    kernel.gelu(from + first, count, to + first);
  });
  return out.to(x.scalar_type());
}

Tensor int4_accumulate(const Tensor& x, at::TensorList tensors, at::IntArrayRef grid) {
  const Layer layer(tensors, grid);
  check_input(x, layer.columns());
  const InputCodes codes = codes_of(x, layer);
  return product(codes, layer, output_shape(x, layer.rows()), Output::accumulator);
}

Tensor int4_linear(const Tensor& x, at::TensorList tensors, at::IntArrayRef grid) {
  const Layer layer(tensors, grid);
  check_input(x, layer.columns());
  const InputCodes codes = codes_of(x, layer);
  return product(codes, layer, output_shape(x, layer.rows()), Output::real).to(x.scalar_type());
}

Tensor int4_linear_add(const Tensor& x, at::TensorList tensors, at::IntArrayRef grid,
                       const Tensor& residual, const OptionalTensor& gamma) {
  const Layer layer(tensors, grid);
  check_input(x, layer.columns());
  check_residual(x, residual, layer.rows());
  check_gamma(gamma, layer.rows());
  const InputCodes codes = codes_of(x, layer);
  return product_add(codes, layer, residual, gamma).to(residual.scalar_type());
}

Tensor int4_norm_linear(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                        double eps, at::TensorList tensors, at::IntArrayRef grid) {
  const Layer layer(tensors, grid);
  check_input(x, layer.columns());
  check_norm(norm_weight, norm_bias, layer.columns());
  const InputCodes codes = norm_codes_of(x, norm_weight, norm_bias, eps, layer);
  return product(codes, layer, output_shape(x, layer.rows()), Output::real).to(x.scalar_type());
}

Tensor int4_mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                at::TensorList tensors1, at::IntArrayRef grid1, at::TensorList tensors2,
                at::IntArrayRef grid2, const OptionalTensor& gamma) {
  const Layer first(tensors1, grid1), second(tensors2, grid2);
  check_input(x, first.columns());
  check_norm(norm_weight, norm_bias, first.columns());
  check_mlp(first, second, first.columns());
  check_gamma(gamma, second.rows());
  const Tensor real = real_tensor(x);
  const InputCodes codes = norm_codes_of(real, norm_weight, norm_bias, eps, first);
  const HiddenCodes hidden = product_gelu_codes(codes, first, second.grid());
  return product_add(hidden, second, real, gamma).to(x.scalar_type());
}

struct Geometry {
  int64_t channels, height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// The window of one output pixel as a row (channel, kernel row, kernel column); zeros outside.
void gather_window(const float* image, const Geometry& g, int64_t y, int64_t x, float* row) {
  const int64_t top = y * g.stride_h - g.padding_h, left = x * g.stride_w - g.padding_w;
  const bool whole = g.dilation_w == 1 && left >= 0 && left + g.kernel_w <= g.width;
  for (int64_t channel = 0; channel < g.channels; ++channel) {
    for (int64_t i = 0; i < g.kernel_h; ++i, row += g.kernel_w) {
      const int64_t in_y = top + i * g.dilation_h;
      const bool inside = in_y >= 0 && in_y < g.height;
      if (!inside) {
        std::fill_n(row, g.kernel_w, 0.0f);
        continue;
      }
      const float* line = image + (channel * g.height + in_y) * g.width;
      if (whole) {
        std::copy_n(line + left, g.kernel_w, row);
        continue;
      }
      for (int64_t j = 0; j < g.kernel_w; ++j) {
        const int64_t in_x = left + j * g.dilation_w;
        row[j] = in_x >= 0 && in_x < g.width ? line[in_x] : 0.0f;
      }
    }
  }
}

Tensor int4_conv2d(const Tensor& x, at::TensorList tensors, at::IntArrayRef grid,
                   at::IntArrayRef geometry) {
  const Layer layer(tensors, grid);
  const int64_t columns = layer.columns();
  check_conv(x, columns, geometry);
  Geometry g = {x.size(1),   x.size(2),   x.size(3),   0,           0,
                geometry[0], geometry[1], geometry[2], geometry[3], geometry[4],
                geometry[5], geometry[6], geometry[7]};
  const auto count = [](int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                        int64_t dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  g.out_height = count(g.height, g.kernel_h, g.stride_h, g.padding_h, g.dilation_h);
  g.out_width = count(g.width, g.kernel_w, g.stride_w, g.padding_w, g.dilation_w);

  const Tensor real = real_tensor(x);
  const int64_t pixels = g.out_height * g.out_width, rows = x.size(0) * pixels;
  const int64_t image = g.channels * g.height * g.width;
  InputCodes codes(rows, columns);
  const float* from = real.const_data_ptr<float>();
  const Kernels& kernel = *kernel_set().kernels;
  // The padding is quantized with the rest: it gets the code of a real zero.
  for_rows(rows, columns, [&](int64_t first, int64_t rows_here) {
    auto* window = thread_buffer<Use::window, float>(columns);
    for (int64_t row = first; row < first + rows_here; ++row) {
      const int64_t pixel = row % pixels;
      gather_window(from + row / pixels * image, g, pixel / g.out_width, pixel % g.out_width,
                    window);
      kernel.quantize(window, 1, columns, layer.grid(), codes.row(row), codes.stride());
    }
  });
  // Channels last: the rows of the product as they are.
  return product(codes, layer, {x.size(0), g.out_height, g.out_width, layer.rows()}, Output::real)
      .permute({0, 3, 1, 2})
      .to(x.scalar_type());
}

}  // namespace
}  // namespace gplq_mm

TORCH_LIBRARY_IMPL(gplq_mm, CPU, m) {
  m.impl("quantize_codes", gplq_mm::quantize_codes);
  m.impl("layer_norm", gplq_mm::layer_norm);
  m.impl("gelu", gplq_mm::gelu);
  m.impl("int4_accumulate", gplq_mm::int4_accumulate);
  m.impl("int4_linear", gplq_mm::int4_linear);
  m.impl("int4_linear_add", gplq_mm::int4_linear_add);
  m.impl("int4_norm_linear", gplq_mm::int4_norm_linear);
  m.impl("int4_mlp", gplq_mm::int4_mlp);
  m.impl("int4_conv2d", gplq_mm::int4_conv2d);
}
