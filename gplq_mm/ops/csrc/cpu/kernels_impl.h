// Everything that is the same source on every instruction set: quantization, LayerNorm, what
// follows a product, and the loop over the tiles of a product.
//
// Each file of an instruction set sets its target, includes kernel_set_impl.h and gives it the vectors
// and the products. All names are local to the translation unit: nothing compiled for a higher
// instruction set may be linked into code that runs on a lower one.
#pragma once

#include "kernels.h"

namespace gplq_mm {
namespace {

// `Machine` has the vectors of an instruction set:
//   Real                     kWidth floats
//   set, load, add, sub, mul
//   fma(a, b, c)             a * b + c rounded once
//   min, max                 give the second operand where one is NaN
//   total(const Real (&)[kSums / kWidth])   sum of kSums numbers in the order of `arithmetic.py`
//   difference(const int32_t* a, const int32_t* b)   a - b, wrapping, as floats
//   narrow<count>(const Real* steps, Limits, uint8_t* codes)   codes of 1 or 4 vectors of steps
//   Table                    a table of levels in registers: look_up(uint8_t* bytes) puts levels
//                            in place of kBytes positions, lanes(Ints) gives those of a position
//                            in each lane; of one that is no position, any
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

// Sums of a row run in as many columns of their own, whatever the vectors' width: so they are the
// same on every machine.
constexpr int64_t kSums = 64;

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

// Levels in place of positions.
template <typename Machine>
inline void look_up(const uint8_t* table, int64_t count, uint8_t* codes) {
  const typename Machine::Table levels(table);
  constexpr int64_t kBytes = Machine::Table::kBytes;
  int64_t k = 0;
  for (; k + kBytes <= count; k += kBytes) levels.look_up(codes + k);
  for (; k < count; ++k) codes[k] = table[codes[k]];
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
  // A pass of its own, over bytes that are in the nearest cache.
  if (grid.table != nullptr) look_up<Machine>(grid.table, columns, codes);
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

// Mean of x, or of (x - center)^2.
template <typename Machine, bool squared>
inline float mean_of(const float* x, int64_t columns, float center) {
  using Real = typename Machine::Real;
  constexpr int64_t kWidth = Machine::kWidth, kVectorsOfSums = kSums / kWidth;
  const Real centers = Machine::set(center);
  Real sums[kVectorsOfSums];
  for (Real& sum : sums) sum = Machine::set(0.0f);
  const auto add = [&](Real& sum, const float* from) {
    const Real value = Machine::load(from);
    if (squared) {
      const Real distance = Machine::sub(value, centers);
      sum = Machine::fma(distance, distance, sum);
    } else {
      sum = Machine::add(sum, value);
    }
  };
  int64_t k = 0;
  for (; k + kSums <= columns; k += kSums) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVectorsOfSums; ++i) add(sums[i], x + k + i * kWidth);
  }
  if (k < columns) {
    // Beyond the last column stands what adds nothing.
    alignas(64) float rest[kSums];
    for (int64_t i = 0; i < kSums; ++i) rest[i] = k + i < columns ? x[k + i] : center;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVectorsOfSums; ++i) add(sums[i], rest + i * kWidth);
  }
  return Machine::total(sums) * static_cast<float>(1.0 / static_cast<double>(columns));
}

// (x - mean) / sqrt(variance + eps) * weight + bias of one row: a vector from a column on, or one
// number. The order of operations is that of gplq_mm/quant/arithmetic.py.
template <typename Machine, bool fused>
class NormedRow {
 public:
  NormedRow(const float* x, int64_t columns, const float* weight, const float* bias, float eps)
      : x_(x), weight_(weight), bias_(bias), mean_(mean_of<Machine, false>(x, columns, 0.0f)) {
    factor_ = 1.0f / __builtin_sqrtf(mean_of<Machine, true>(x, columns, mean_) + eps);
    means_ = Machine::set(mean_);
    factors_ = Machine::set(factor_);
  }

  typename Machine::Real vector(int64_t k) const {
    const auto normed = Machine::mul(Machine::sub(Machine::load(x_ + k), means_), factors_);
    return affine<Machine, fused>(normed, Machine::load(weight_ + k), Machine::load(bias_ + k));
  }
  float scalar(int64_t k) const {
    return affine_one<fused>((x_[k] - mean_) * factor_, weight_[k], bias_[k]);
  }

 private:
  const float *x_, *weight_, *bias_;
  float mean_, factor_;
  typename Machine::Real means_, factors_;
};

template <typename Machine, bool fused>
void norm_quantize_rows(const float* x, int64_t rows, int64_t columns, const float* weight,
                        const float* bias, float eps, const ActGrid& grid, uint8_t* codes,
                        int64_t stride) {
  for (int64_t row = 0; row < rows; ++row, x += columns, codes += stride) {
    const NormedRow<Machine, fused> normed(x, columns, weight, bias, eps);
    write_codes<Machine, fused>(
        columns, grid, codes, [&](int64_t k) { return normed.vector(k); },
        [&](int64_t k) { return normed.scalar(k); });
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

template <typename Machine, bool fused>
void layer_norm_rows(const float* x, int64_t rows, int64_t columns, const float* weight,
                     const float* bias, float eps, float* out) {
  constexpr int64_t kWidth = Machine::kWidth;
  for (int64_t row = 0; row < rows; ++row, x += columns, out += columns) {
    const NormedRow<Machine, fused> normed(x, columns, weight, bias, eps);
    int64_t k = 0;
    for (; k + kWidth <= columns; k += kWidth) Machine::store(out + k, normed.vector(k));
    for (; k < columns; ++k) out[k] = normed.scalar(k);
  }
}

template <typename Machine>
void layer_norm(const float* x, int64_t rows, int64_t columns, const float* weight,
                const float* bias, float eps, bool fused, float* out) {
  const auto rows_of = fused ? layer_norm_rows<Machine, true> : layer_norm_rows<Machine, false>;
  rows_of(x, rows, columns, weight, bias, eps, out);
}

// x * Phi(x), Phi the normal distribution function, as `arithmetic.gelu` defines it. NaN stays.
template <typename Machine>
inline void gelu(typename Machine::Real (&x)[kBlock]) {
  constexpr float kEnd = 5.2f, kFactor = 0.07396451f;
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
    x[i] = Machine::max(Machine::set(-kEnd), x[i]);
    z[i] = Machine::min(Machine::set(kEnd), x[i]);
    t[i] = Machine::fma(Machine::mul(z[i], z[i]), Machine::set(kFactor), Machine::set(-1.0f));
    value[i] = Machine::set(kPolynomial[kDegree]);
  }
#pragma GCC unroll 16
  for (int degree = kDegree - 1; degree >= 0; --degree) {
    const typename Machine::Real coefficient = Machine::set(kPolynomial[degree]);
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) value[i] = Machine::fma(value[i], t[i], coefficient);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBlock; ++i) {
    x[i] = Machine::mul(x[i], Machine::fma(z[i], value[i], Machine::set(0.5f)));
  }
}

template <typename Machine>
void gelu_all(const float* x, int64_t count, float* out) {
  constexpr int64_t kWidth = Machine::kWidth, kTogether = kBlock * kWidth;
  const auto block = [](const float* from, float* to) {
    typename Machine::Real value[kBlock];
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) value[i] = Machine::load(from + i * kWidth);
    gelu<Machine>(value);
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) Machine::store(to + i * kWidth, value[i]);
  };
  int64_t i = 0;
  for (; i + kTogether <= count; i += kTogether) block(x + i, out + i);
  if (i == count) return;
  alignas(64) float rest[kTogether] = {};
  std::memcpy(rest, x + i, static_cast<size_t>(count - i) * 4);
  block(rest, rest);
  std::memcpy(out + i, rest, static_cast<size_t>(count - i) * 4);
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

template <typename Machine, bool fused>
inline void finish_gelu(const int32_t* sums, const Columns& columns, const Limits& limits,
                        uint8_t* out) {
  constexpr int64_t kWidth = Machine::kWidth;
  for (int64_t j = 0; j < kPanel; j += kBlock * kWidth) {
    typename Machine::Real value[kBlock];
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) {
      value[i] = real_of<Machine, fused>(sums, columns, j + i * kWidth);
    }
    gelu<Machine>(value);
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) {
      const int64_t at = j + i * kWidth;
      value[i] = affine<Machine, fused>(value[i], Machine::load(columns.inverse + at),
                                        Machine::load(columns.shift + at));
    }
    Machine::template narrow<kBlock>(value, limits, out + j);
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
        if (epilogue.next.table != nullptr) {
          look_up<Machine>(epilogue.next.table, kPanel, reinterpret_cast<uint8_t*>(target));
        }
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
  static const Kernels table = {quantize<Machine>, norm_quantize<Machine>, layer_norm<Machine>,
                                gelu_all<Machine>, Machine::unpack,        multiply<Machine>};
  return &table;
}

}  // namespace
}  // namespace gplq_mm
