// Everything that is the same source on every instruction set: quantization, LayerNorm, what
// follows a product, and the loop over the tiles of a product.
//
// Each kernels_<isa>.cpp sets its target, includes this file and gives `kernel_table` the vectors
// and the product of its instruction set. All names are local to
// the translation unit: nothing compiled for a higher instruction set may be linked into code
// that runs on a lower one.
#pragma once

#include "kernels.h"

namespace gplq_mm {
namespace {

// `Machine` has the vectors of an instruction set:
//   Real                     kWidth floats
//   set, load, add, sub, mul
//   fma(a, b, c)             a * b + c rounded once
//   multiply_add(a, b, c)    the same, rounded once or twice, whichever is cheap
//   min, max                 give the second operand where one is NaN
//   abs, round               the latter half to even
//   positive(Real)           a bit for every lane above 0
//   Wide                     sums in float64, zero if value-initialized
//   accumulate(Wide&, Real), accumulate_square(Wide&, Real), total(Wide)
//   difference(const int32_t* a, const int32_t* b)   a - b, wrapping, as floats
//   narrow<count>(const Real* steps, Limits, uint8_t* codes)   codes of 1 or 4 vectors of steps
// and the product:
//   constexpr int kRows: rows of a tile, at most 6
//   template <int rows> static void tile(const uint8_t* codes, int64_t stride,
//       const int8_t* panel, int64_t steps, int32_t max_code, int32_t* sums)
//     writes the sums (rows, 64) of `steps` * 4 columns
//   static void unpack(const PackedPanel& packed, int8_t* panel)

struct Limits {
  explicit Limits(const ActGrid& grid)
      : low(static_cast<float>(grid.code_min)),
        high(static_cast<float>(grid.code_max)),
        code_min(grid.code_min) {}
  float low, high;
  int32_t code_min;
};

// Vectors that are worked on together: enough independent operations to fill the pipelines.
constexpr int kBlock = 4;

// x * factor + term, rounded once (fused) or twice.
template <typename Machine, bool fused>
inline typename Machine::Real affine(typename Machine::Real x, typename Machine::Real factor,
                                     typename Machine::Real term) {
  return fused ? Machine::fma(x, factor, term) : Machine::add(Machine::mul(x, factor), term);
}

template <bool fused>
inline float affine_one(float x, float factor, float term) {
  return fused ? __builtin_fmaf(x, factor, term) : x * factor + term;
}

// Code of a value in steps. Clamping to integers before rounding equals clamping after it. The
// comparisons are ordered so that NaN becomes the lowest code.
inline uint8_t code_of(float steps, const Limits& limits) {
  // 1.5 * 2^23: adding it rounds |steps| < 2^22 to an integer, half to even, in the low bits.
  constexpr float kRounder = 12582912.0f;
  constexpr int32_t kRounderBits = 0x4B400000;
  steps = steps > limits.low ? steps : limits.low;
  steps = steps < limits.high ? steps : limits.high;
  const int32_t code = __builtin_bit_cast(int32_t, steps + kRounder) - kRounderBits;
  return static_cast<uint8_t>(code - limits.code_min);
}

// Turns source(k) into codes for k in 0..columns: `vector` gives kWidth values, `scalar` one.
template <typename Machine, bool fused, typename Vector, typename Scalar>
inline void write_codes(int64_t columns, const ActGrid& grid, uint8_t* codes, const Vector& vector,
                        const Scalar& scalar) {
  const Limits limits(grid);
  const float* inverse = grid.inverse;
  const float* shift = grid.shift;
  constexpr int64_t kWidth = Machine::kWidth;
  int64_t k = 0;
  for (; k + kBlock * kWidth <= columns; k += kBlock * kWidth) {
    typename Machine::Real steps[kBlock];
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) {
      const int64_t at = k + i * kWidth;
      steps[i] = affine<Machine, fused>(vector(at), Machine::load(inverse + at),
                                        Machine::load(shift + at));
    }
    Machine::template narrow<kBlock>(steps, limits, codes + k);
  }
  for (; k + kWidth <= columns; k += kWidth) {
    const typename Machine::Real steps = affine<Machine, fused>(
        vector(k), Machine::load(inverse + k), Machine::load(shift + k));
    Machine::template narrow<1>(&steps, limits, codes + k);
  }
  for (; k < columns; ++k) {
    codes[k] = code_of(affine_one<fused>(scalar(k), inverse[k], shift[k]), limits);
  }
}

template <typename Machine, bool fused>
void quantize_rows(const float* x, int64_t rows, int64_t columns, const ActGrid& grid,
                   uint8_t* codes, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row, x += columns, codes += stride) {
    write_codes<Machine, fused>(
        columns, grid, codes, [x](int64_t k) { return Machine::load(x + k); },
        [x](int64_t k) { return x[k]; });
    for (int64_t k = columns; k < stride; ++k) codes[k] = 0;
  }
}

template <typename Machine>
void quantize(const float* x, int64_t rows, int64_t columns, const ActGrid& grid, uint8_t* codes,
              int64_t stride) {
  const auto rows_of = grid.fused ? quantize_rows<Machine, true> : quantize_rows<Machine, false>;
  rows_of(x, rows, columns, grid, codes, stride);
}

// Mean of x, or of (x - center)^2, summed in float64: rounded to float32 it is the same in any
// order.
template <typename Machine, bool squared>
inline float mean_of(const float* x, int64_t columns, float center) {
  using Real = typename Machine::Real;
  constexpr int64_t kWidth = Machine::kWidth;
  const Real centers = Machine::set(center);
  typename Machine::Wide sums[kBlock] = {};
  const auto add = [&](typename Machine::Wide& sum, int64_t k) {
    const Real value = Machine::load(x + k);
    if (squared) {
      Machine::accumulate_square(sum, Machine::sub(value, centers));
    } else {
      Machine::accumulate(sum, value);
    }
  };
  int64_t k = 0;
  for (; k + kBlock * kWidth <= columns; k += kBlock * kWidth) {
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) add(sums[i], k + i * kWidth);
  }
  for (; k + kWidth <= columns; k += kWidth) add(sums[0], k);
  double total = 0;
  for (const auto& sum : sums) total += Machine::total(sum);
  for (; k < columns; ++k) {
    const double part = squared ? x[k] - center : x[k];
    total += squared ? part * part : part;
  }
  return static_cast<float>(total / static_cast<double>(columns));
}

template <typename Machine, bool fused>
void norm_quantize_rows(const float* x, int64_t rows, int64_t columns, const float* weight,
                        const float* bias, float eps, const ActGrid& grid, uint8_t* codes,
                        int64_t stride) {
  for (int64_t row = 0; row < rows; ++row, x += columns, codes += stride) {
    const float mean = mean_of<Machine, false>(x, columns, 0.0f);
    const float factor = 1.0f / __builtin_sqrtf(mean_of<Machine, true>(x, columns, mean) + eps);
    const auto means = Machine::set(mean), factors = Machine::set(factor);
    // The order of operations is that of gplq_mm/quant/arithmetic.py.
    write_codes<Machine, fused>(
        columns, grid, codes,
        [&](int64_t k) {
          const auto normed = Machine::mul(Machine::sub(Machine::load(x + k), means), factors);
          return affine<Machine, fused>(normed, Machine::load(weight + k),
                                        Machine::load(bias + k));
        },
        [&](int64_t k) { return affine_one<fused>((x[k] - mean) * factor, weight[k], bias[k]); });
    for (int64_t k = columns; k < stride; ++k) codes[k] = 0;
  }
}

template <typename Machine>
void norm_quantize(const float* x, int64_t rows, int64_t columns, const float* weight,
                   const float* bias, float eps, const ActGrid& grid, uint8_t* codes,
                   int64_t stride) {
  const auto rows_of =
      grid.fused ? norm_quantize_rows<Machine, true> : norm_quantize_rows<Machine, false>;
  rows_of(x, rows, columns, weight, bias, eps, grid, codes, stride);
}

// About x * Phi(x), Phi the normal distribution function, as nn.GELU has it. Phi(x) - 1/2 is x times a
// polynomial of degree 14 in x^2 (mapped to -1..1; fitted by weighted least squares so that the
// error of x * Phi(x) is level), and beyond 5.2 it is +-1/2. Error at most 1.5e-7 * max(1, |x|).
template <typename Machine>
inline void gelu(typename Machine::Real (&x)[kBlock]) {
  constexpr float kEnd = 5.2f;
  constexpr float kPolynomial[] = {
      1.359499842e-01f, -6.774380058e-02f, 5.002609640e-02f, -3.992566466e-02f,
      3.196270391e-02f, -2.476078086e-02f, 1.813056692e-02f, -1.236457378e-02f,
      8.023252711e-03f, -5.044835620e-03f, 2.637060126e-03f, -9.999474278e-04f,
      6.242647069e-04f, -5.545432796e-04f, 1.940482471e-04f,
  };
  constexpr int kDegree = sizeof(kPolynomial) / sizeof(float) - 1;
  typename Machine::Real z[kBlock], t[kBlock], value[kBlock];
#pragma GCC unroll 4
  for (int i = 0; i < kBlock; ++i) {
    z[i] = Machine::min(Machine::max(x[i], Machine::set(-kEnd)), Machine::set(kEnd));
    t[i] = Machine::multiply_add(Machine::mul(z[i], z[i]), Machine::set(2.0f / (kEnd * kEnd)),
                                 Machine::set(-1.0f));
    value[i] = Machine::set(kPolynomial[kDegree]);
  }
#pragma GCC unroll 16
  for (int degree = kDegree - 1; degree >= 0; --degree) {
    const typename Machine::Real coefficient = Machine::set(kPolynomial[degree]);
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) {
      value[i] = Machine::multiply_add(value[i], t[i], coefficient);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBlock; ++i) {
    x[i] = Machine::mul(x[i], Machine::multiply_add(z[i], value[i], Machine::set(0.5f)));
  }
}

// The epilogue's per-column numbers, padded to a whole panel.
struct Columns {
  alignas(64) int32_t correction[kPanel];
  alignas(64) float row_scale[kPanel];
  alignas(64) float bias[kPanel];
  alignas(64) float gamma[kPanel];
  alignas(64) float inverse[kPanel];
  alignas(64) float shift[kPanel];
  // |steps| may be off by |x| * slope + margin where GELU is not computed exactly.
  alignas(64) float slope[kPanel];
  alignas(64) float margin[kPanel];

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
      // Twice the error of gelu(), and of a few roundings of steps between the limits.
      constexpr float kGeluError = 5e-7f, kStepError = 2.5e-7f;
      const auto low = static_cast<float>(epilogue.next.code_min);
      const auto high = static_cast<float>(epilogue.next.code_max);
      const float limit = __builtin_fabsf(low) + __builtin_fabsf(high);
      for (int64_t j = 0; j < epilogue.columns; ++j) {
        slope[j] = kGeluError * inverse[j];
        margin[j] = slope[j] + kStepError * (__builtin_fabsf(shift[j]) + limit);
      }
    }
  }
};

template <typename Machine, bool fused>
inline typename Machine::Real real_of(const int32_t* sums, const Columns& columns, int64_t j) {
  return affine<Machine, fused>(Machine::difference(sums + j, columns.correction + j),
                                Machine::load(columns.row_scale + j),
                                Machine::load(columns.bias + j));
}

inline void finish_accumulator(const int32_t* __restrict sums, const Columns& columns,
                               int32_t* __restrict out) {
  // Unsigned: wraps as the int32 tensors of the reference do.
  for (int64_t j = 0; j < kPanel; ++j) {
    out[j] = static_cast<int32_t>(static_cast<uint32_t>(sums[j]) -
                                  static_cast<uint32_t>(columns.correction[j]));
  }
}

template <typename Machine, bool fused>
inline void finish_real(const int32_t* sums, const Columns& columns, float* out) {
#pragma GCC unroll 4
  for (int64_t j = 0; j < kPanel; j += Machine::kWidth) {
    Machine::store(out + j, real_of<Machine, fused>(sums, columns, j));
  }
}

template <typename Machine, bool fused, bool scaled>
inline void finish_residual(const int32_t* sums, const Columns& columns, const float* residual,
                            float* out) {
#pragma GCC unroll 4
  for (int64_t j = 0; j < kPanel; j += Machine::kWidth) {
    auto real = real_of<Machine, fused>(sums, columns, j);
    if (scaled) real = Machine::mul(real, Machine::load(columns.gamma + j));
    Machine::store(out + j, Machine::add(Machine::load(residual + j), real));
  }
}

// Code of gelu(x) with GELU in float64, rounded once.
template <bool fused>
inline uint8_t exact_gelu_code(float x, float inverse, float shift, const Limits& limits) {
  constexpr double kSqrtHalf = 0.70710678118654752440;
  const double wide = x;
  const auto value = static_cast<float>(0.5 * wide * (1.0 + std::erf(wide * kSqrtHalf)));
  return code_of(affine_one<fused>(value, inverse, shift), limits);
}

// Codes of gelu(x). The vectors compute it nearly; the few values so close to the border of two
// codes that this could decide are computed again, exactly.
template <typename Machine, bool fused>
inline void finish_gelu(const int32_t* sums, const Columns& columns, const Limits& limits,
                        uint8_t* out) {
  using Real = typename Machine::Real;
  constexpr int64_t kWidth = Machine::kWidth;
  const Real low = Machine::set(limits.low), high = Machine::set(limits.high);
  for (int64_t j = 0; j < kPanel; j += kBlock * kWidth) {
    Real x[kBlock], value[kBlock];
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) {
      x[i] = value[i] = real_of<Machine, fused>(sums, columns, j + i * kWidth);
    }
    gelu<Machine>(value);
    uint32_t close[kBlock], any = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) {
      const int64_t at = j + i * kWidth;
      value[i] = affine<Machine, fused>(value[i], Machine::load(columns.inverse + at),
                                        Machine::load(columns.shift + at));
      const Real inside = Machine::min(Machine::max(value[i], low), high);
      const Real distance = Machine::abs(Machine::sub(inside, Machine::round(inside)));
      const Real error = Machine::multiply_add(
          Machine::abs(x[i]), Machine::load(columns.slope + at), Machine::load(columns.margin + at));
      close[i] = Machine::positive(
          Machine::sub(Machine::add(distance, error), Machine::set(0.5f)));
      any |= close[i];
    }
    Machine::template narrow<kBlock>(value, limits, out + j);
    if (__builtin_expect(any != 0, 0)) {
      alignas(64) float real[kWidth];
      for (int i = 0; i < kBlock; ++i) {
        Machine::store(real, x[i]);
        for (uint32_t rest = close[i]; rest != 0; rest &= rest - 1) {
          const int lane = __builtin_ctz(rest);
          const int64_t at = j + i * kWidth + lane;
          out[at] = exact_gelu_code<fused>(real[lane], columns.inverse[at], columns.shift[at],
                                           limits);
        }
      }
    }
  }
}

// The sums of some rows to where they go. A panel that lacks rows is finished in a buffer.
template <typename Machine, bool fused>
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
        finish_real<Machine, fused>(sums, columns, reinterpret_cast<float*>(target));
        break;
      case Output::residual: {
        const float* residual = epilogue.residual + row * epilogue.residual_stride;
        if (!whole) {
          std::memcpy(spare_residual, residual, count * 4);
          residual = spare_residual;
        }
        if (epilogue.gamma != nullptr) {
          finish_residual<Machine, fused, true>(sums, columns, residual, reinterpret_cast<float*>(target));
        } else {
          finish_residual<Machine, fused, false>(sums, columns, residual, reinterpret_cast<float*>(target));
        }
        break;
      }
      case Output::gelu_codes:
        finish_gelu<Machine, fused>(sums, columns, limits, reinterpret_cast<uint8_t*>(target));
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

// Fetches the lines that some rows will be written to: they are far apart, one row of output
// from the next. Codes and small outputs stay in the cache anyway.
inline void prefetch_output(const Product& product, const Epilogue& epilogue, int64_t row,
                            int64_t count) {
  constexpr int64_t kLarge = 1 << 18;
  if (epilogue.kind == Output::gelu_codes || product.rows * epilogue.out_stride < kLarge) return;
  constexpr int64_t kLine = 64 / sizeof(float);
  const float* out = static_cast<const float*>(epilogue.out) + row * epilogue.out_stride;
  for (int64_t i = 0; i < count; ++i, out += epilogue.out_stride) {
    for (int64_t at = 0; at < epilogue.columns; at += kLine) __builtin_prefetch(out + at, 1);
  }
}

template <typename Machine>
void multiply(const Product& product, const Epilogue& epilogue) {
  constexpr int64_t kRows = Machine::kRows, kLine = 64;
  const Columns padded(epilogue);
  const int64_t steps = (product.columns + kStep - 1) / kStep, stride = product.stride;
  const int64_t tiles = (product.rows + kRows - 1) / kRows;
  const int64_t lines = (product.upcoming_bytes + kLine - 1) / kLine;
  const auto finish_rows = epilogue.fused ? finish<Machine, true> : finish<Machine, false>;
  alignas(64) int32_t sums[kRows * kPanel];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = tile * kRows;
    const int64_t count = product.rows - row < kRows ? product.rows - row : kRows;
    const uint8_t* codes = product.codes + row * stride;
    for (int64_t line = tile * lines / tiles; line < (tile + 1) * lines / tiles; ++line) {
      __builtin_prefetch(static_cast<const char*>(product.upcoming) + line * kLine, 0, 2);
    }
    prefetch_output(product, epilogue, row, count);
    switch (count) {
      case 1:
        Machine::template tile<1>(codes, stride, product.panel, steps, product.max_code, sums);
        break;
      case 2:
        Machine::template tile<2>(codes, stride, product.panel, steps, product.max_code, sums);
        break;
      case 3:
        Machine::template tile<3>(codes, stride, product.panel, steps, product.max_code, sums);
        break;
      case 4:
        Machine::template tile<4>(codes, stride, product.panel, steps, product.max_code, sums);
        break;
      case 5:
        Machine::template tile<5>(codes, stride, product.panel, steps, product.max_code, sums);
        break;
      default:
        Machine::template tile<6>(codes, stride, product.panel, steps, product.max_code, sums);
        break;
    }
    finish_rows(sums, row, count, padded, epilogue);
  }
}

template <typename Machine>
const Kernels* kernel_table() {
  static const Kernels table = {quantize<Machine>, norm_quantize<Machine>, Machine::unpack,
                                multiply<Machine>};
  return &table;
}

}  // namespace
}  // namespace gplq_mm
