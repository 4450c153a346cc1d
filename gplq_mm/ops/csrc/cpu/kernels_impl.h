// Everything that is the same source on every instruction set: quantization, LayerNorm, what
// follows a product, and the loop over the tiles of a product.
//
// Each kernels_<isa>.cpp sets its target, defines `struct Machine` (see the end) and includes
// this file, so the loops below are vectorized once per instruction set. All names are local to
// the translation unit: nothing compiled for a higher instruction set may be linked into code
// that runs on a lower one.
#pragma once

#include "kernels.h"

namespace gplq_mm {
namespace {

// 1.5 * 2^23: adding it rounds |value| < 2^22 to an integer, half to even, in the low bits.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = 0x4B400000;

struct Limits {
  explicit Limits(const ActGrid& grid)
      : low(static_cast<float>(grid.code_min)),
        high(static_cast<float>(grid.code_max)),
        base(kRounderBits + grid.code_min) {}
  float low, high;
  int32_t base;
};

// x * factor + term, rounded once (fused) or twice.
template <bool fused>
inline float affine(float x, float factor, float term) {
  return fused ? __builtin_fmaf(x, factor, term) : x * factor + term;
}

// Code of a value in steps. Clamping to integers before rounding equals clamping after it. The
// comparisons are ordered so that NaN becomes the lowest code.
inline uint8_t code_of(float steps, const Limits& limits) {
  steps = steps > limits.low ? steps : limits.low;
  steps = steps < limits.high ? steps : limits.high;
  return static_cast<uint8_t>(__builtin_bit_cast(int32_t, steps + kRounder) - limits.base);
}

template <bool fused>
void quantize_rows(const float* x, int64_t rows, int64_t columns, const ActGrid& grid,
                   uint8_t* codes, int64_t stride) {
  const Limits limits(grid);
  const float* __restrict inverse = grid.inverse;
  const float* __restrict shift = grid.shift;
  for (int64_t row = 0; row < rows; ++row) {
    const float* __restrict from = x + row * columns;
    uint8_t* __restrict to = codes + row * stride;
    for (int64_t k = 0; k < columns; ++k) {
      to[k] = code_of(affine<fused>(from[k], inverse[k], shift[k]), limits);
    }
    for (int64_t k = columns; k < stride; ++k) to[k] = 0;
  }
}

void quantize(const float* x, int64_t rows, int64_t columns, const ActGrid& grid, uint8_t* codes,
              int64_t stride) {
  const auto rows_of = grid.fused ? quantize_rows<true> : quantize_rows<false>;
  rows_of(x, rows, columns, grid, codes, stride);
}

// Sixteen partial sums: near the accuracy of pairwise summation for the rows of a LayerNorm.
typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

inline float sum_of(const Lanes& lanes) {
  double total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
  return static_cast<float>(total);
}

// Mean of x - center, or of its square.
template <bool squared>
inline float mean_of(const float* x, int64_t columns, float center) {
  Lanes sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= columns; k += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      Lanes part;
      std::memcpy(&part, x + k + i * kLanes, sizeof(part));
      part = part - center;
      sums[i] += squared ? part * part : part;
    }
  }
  double total = sum_of(sums[0]) + static_cast<double>(sum_of(sums[1])) + sum_of(sums[2]) +
                 static_cast<double>(sum_of(sums[3]));
  for (; k < columns; ++k) {
    const double part = static_cast<double>(x[k]) - center;
    total += squared ? part * part : part;
  }
  return static_cast<float>(total / static_cast<double>(columns));
}

template <bool fused>
void norm_quantize_rows(const float* x, int64_t rows, int64_t columns,
                        const float* __restrict weight, const float* __restrict bias, float eps,
                        const ActGrid& grid, uint8_t* codes, int64_t stride) {
  const Limits limits(grid);
  const float* __restrict inverse = grid.inverse;
  const float* __restrict shift = grid.shift;
  for (int64_t row = 0; row < rows; ++row) {
    const float* __restrict from = x + row * columns;
    uint8_t* __restrict to = codes + row * stride;
    const float mean = mean_of<false>(from, columns, 0.0f);
    const float inverse_deviation = 1.0f / __builtin_sqrtf(mean_of<true>(from, columns, mean) + eps);
    for (int64_t k = 0; k < columns; ++k) {
      const float normed = affine<fused>((from[k] - mean) * inverse_deviation, weight[k], bias[k]);
      to[k] = code_of(affine<fused>(normed, inverse[k], shift[k]), limits);
    }
    for (int64_t k = columns; k < stride; ++k) to[k] = 0;
  }
}

void norm_quantize(const float* x, int64_t rows, int64_t columns, const float* weight,
                   const float* bias, float eps, const ActGrid& grid, uint8_t* codes,
                   int64_t stride) {
  const auto rows_of = grid.fused ? norm_quantize_rows<true> : norm_quantize_rows<false>;
  rows_of(x, rows, columns, weight, bias, eps, grid, codes, stride);
}

// a * b + c where the machine has it in one instruction, for values that need no fixed rounding.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// x * Phi(x), Phi the normal distribution function, as nn.GELU has it. Phi(x) - 1/2 is x times a
// polynomial of degree 14 in x^2 (mapped to -1..1; fitted by weighted least squares so that the
// error of x * Phi(x) is level), and beyond 5.2 it is +-1/2. Error at most 1.5e-7 * max(1, |x|).
inline float gelu(float x) {
  constexpr float kEnd = 5.2f;
  constexpr float kPolynomial[] = {
      1.359499842e-01f, -6.774380058e-02f, 5.002609640e-02f, -3.992566466e-02f,
      3.196270391e-02f, -2.476078086e-02f, 1.813056692e-02f, -1.236457378e-02f,
      8.023252711e-03f, -5.044835620e-03f, 2.637060126e-03f, -9.999474278e-04f,
      6.242647069e-04f, -5.545432796e-04f, 1.940482471e-04f,
  };
  constexpr int kDegree = sizeof(kPolynomial) / sizeof(float) - 1;
  float z = x > -kEnd ? x : -kEnd;
  z = z < kEnd ? z : kEnd;
  const float t = multiply_add(z * z, 2.0f / (kEnd * kEnd), -1.0f);
  float value = kPolynomial[kDegree];
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) value = multiply_add(value, t, kPolynomial[i]);
  return x * multiply_add(z, value, 0.5f);
}

// The epilogue's per-column numbers, padded to a whole panel.
struct Columns {
  alignas(64) int32_t correction[kPanel];
  alignas(64) float row_scale[kPanel];
  alignas(64) float bias[kPanel];
  alignas(64) float gamma[kPanel];
  alignas(64) float inverse[kPanel];
  alignas(64) float shift[kPanel];

  explicit Columns(const Epilogue& epilogue) {
    std::memset(this, 0, sizeof(*this));
    const auto count = static_cast<size_t>(epilogue.columns) * 4;
    std::memcpy(correction, epilogue.correction, count);
    if (epilogue.kind == Output::accumulator) return;
    std::memcpy(row_scale, epilogue.row_scale, count);
    std::memcpy(bias, epilogue.bias, count);
    if (epilogue.gamma != nullptr) std::memcpy(gamma, epilogue.gamma, count);
    if (epilogue.kind == Output::gelu_codes) {
      std::memcpy(inverse, epilogue.next.inverse, count);
      std::memcpy(shift, epilogue.next.shift, count);
    }
  }
};

template <bool fused>
inline float real_of(int32_t sum, const Columns& columns, int64_t j) {
  // Unsigned: wraps as the int32 tensors of the reference do.
  const auto difference = static_cast<int32_t>(static_cast<uint32_t>(sum) -
                                               static_cast<uint32_t>(columns.correction[j]));
  return affine<fused>(static_cast<float>(difference), columns.row_scale[j], columns.bias[j]);
}

inline void finish_accumulator(const int32_t* __restrict sums, const Columns& columns,
                               int32_t* __restrict out) {
  for (int64_t j = 0; j < kPanel; ++j) {
    out[j] = static_cast<int32_t>(static_cast<uint32_t>(sums[j]) -
                                  static_cast<uint32_t>(columns.correction[j]));
  }
}

template <bool fused>
inline void finish_real(const int32_t* __restrict sums, const Columns& columns,
                        float* __restrict out) {
  for (int64_t j = 0; j < kPanel; ++j) out[j] = real_of<fused>(sums[j], columns, j);
}

template <bool fused, bool scaled>
inline void finish_residual(const int32_t* __restrict sums, const Columns& columns,
                            const float* __restrict residual, float* __restrict out) {
  for (int64_t j = 0; j < kPanel; ++j) {
    const float real = real_of<fused>(sums[j], columns, j);
    out[j] = residual[j] + (scaled ? real * columns.gamma[j] : real);
  }
}

template <bool fused>
inline void finish_gelu(const int32_t* __restrict sums, const Columns& columns,
                        const Limits& limits, uint8_t* __restrict out) {
  for (int64_t j = 0; j < kPanel; ++j) {
    const float value = gelu(real_of<fused>(sums[j], columns, j));
    out[j] = code_of(affine<fused>(value, columns.inverse[j], columns.shift[j]), limits);
  }
}

// The sums of some rows to where they go. A panel that lacks rows is finished in a buffer.
template <bool fused>
void finish(const int32_t* sums, int64_t first, int64_t rows, const Columns& columns,
            const Epilogue& epilogue) {
  const Limits limits(epilogue.next);
  const bool whole = epilogue.columns == kPanel;
  const auto count = static_cast<size_t>(epilogue.columns);
  const size_t size = epilogue.kind == Output::gelu_codes ? 1 : 4;
  alignas(64) char spare[kPanel * 4];
  alignas(64) float spare_residual[kPanel] = {};
  for (int64_t i = 0; i < rows; ++i, sums += kPanel) {
    const int64_t row = first + i;
    char* out = static_cast<char*>(epilogue.out) +
                static_cast<size_t>(row) * static_cast<size_t>(epilogue.out_stride) * size;
    char* target = whole ? out : spare;
    switch (epilogue.kind) {
      case Output::accumulator:
        finish_accumulator(sums, columns, reinterpret_cast<int32_t*>(target));
        break;
      case Output::real:
        finish_real<fused>(sums, columns, reinterpret_cast<float*>(target));
        break;
      case Output::residual: {
        const float* residual = epilogue.residual + row * epilogue.residual_stride;
        if (!whole) {
          std::memcpy(spare_residual, residual, count * 4);
          residual = spare_residual;
        }
        if (epilogue.gamma != nullptr) {
          finish_residual<fused, true>(sums, columns, residual, reinterpret_cast<float*>(target));
        } else {
          finish_residual<fused, false>(sums, columns, residual, reinterpret_cast<float*>(target));
        }
        break;
      }
      case Output::gelu_codes:
        finish_gelu<fused>(sums, columns, limits, reinterpret_cast<uint8_t*>(target));
        break;
    }
    if (!whole) std::memcpy(out, spare, count * size);
  }
}

inline int32_t load_step(const uint8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, sizeof(four));
  return four;
}

// `Machine` has:
//   constexpr int kRows: rows of a tile, 1..6.
//   template <int rows> static void tile(const uint8_t* codes, int64_t stride,
//       const int8_t* panel, int64_t steps, int32_t max_code, int32_t* sums);
//     writes the sums (rows, 64) of `steps` * 4 columns.
//   static void unpack(const PackedPanel& packed, int8_t* panel);
template <typename Machine>
void multiply(const uint8_t* codes, int64_t stride, int64_t rows, const int8_t* panel,
              int64_t columns, int32_t max_code, const Epilogue& epilogue) {
  const Columns padded(epilogue);
  const int64_t steps = (columns + kStep - 1) / kStep;
  alignas(64) int32_t sums[Machine::kRows * kPanel];
  for (int64_t row = 0; row < rows; row += Machine::kRows) {
    const int64_t count = rows - row < Machine::kRows ? rows - row : Machine::kRows;
    const uint8_t* from = codes + row * stride;
    switch (count) {
      case 1:
        Machine::template tile<1>(from, stride, panel, steps, max_code, sums);
        break;
      case 2:
        Machine::template tile<2>(from, stride, panel, steps, max_code, sums);
        break;
      case 3:
        Machine::template tile<3>(from, stride, panel, steps, max_code, sums);
        break;
      case 4:
        Machine::template tile<4>(from, stride, panel, steps, max_code, sums);
        break;
      case 5:
        Machine::template tile<5>(from, stride, panel, steps, max_code, sums);
        break;
      default:
        Machine::template tile<6>(from, stride, panel, steps, max_code, sums);
        break;
    }
    if (epilogue.fused) {
      finish<true>(sums, row, count, padded, epilogue);
    } else {
      finish<false>(sums, row, count, padded, epilogue);
    }
  }
}

template <typename Machine>
const Kernels* kernel_table() {
  static const Kernels table = {quantize, norm_quantize, Machine::unpack, multiply<Machine>};
  return &table;
}

}  // namespace
}  // namespace gplq_mm
