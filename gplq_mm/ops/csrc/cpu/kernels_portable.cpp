// Plain loops, for machines without the other instruction sets.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels_impl.h"

namespace gplq_mm {
namespace {

struct Portable {
  static constexpr int64_t kWidth = 16;
  struct Real {
    float lane[kWidth];
  };

  template <typename Function>
  static Real each(const Function& function) {
    Real result;
    for (int64_t i = 0; i < kWidth; ++i) result.lane[i] = function(i);
    return result;
  }

  static Real set(float x) {
    return each([x](int64_t) { return x; });
  }
  static Real load(const float* x) {
    return each([x](int64_t i) { return x[i]; });
  }
  static void store(float* x, const Real& value) { std::memcpy(x, value.lane, sizeof(value)); }
  static Real add(const Real& a, const Real& b) {
    return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
  }
  static Real sub(const Real& a, const Real& b) {
    return each([&](int64_t i) { return a.lane[i] - b.lane[i]; });
  }
  static Real mul(const Real& a, const Real& b) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
  }
  static Real fma(const Real& a, const Real& b, const Real& c) {
    return each([&](int64_t i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static Real multiply_add(const Real& a, const Real& b, const Real& c) {
    return add(mul(a, b), c);
  }
  static Real min(const Real& a, const Real& b) {
    return each([&](int64_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Real max(const Real& a, const Real& b) {
    return each([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static float sum(Real x) {
    for (int64_t half = kWidth / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
    }
    return x.lane[0];
  }
  static Real difference(const int32_t* a, const int32_t* b) {
    return each([&](int64_t i) {
      return static_cast<float>(
          static_cast<int32_t>(static_cast<uint32_t>(a[i]) - static_cast<uint32_t>(b[i])));
    });
  }
  template <int count>
  static void narrow(const Real* steps, const Limits& limits, uint8_t* codes) {
    for (int64_t i = 0; i < count * kWidth; ++i) {
      codes[i] = code_of(steps[i / kWidth].lane[i % kWidth], limits);
    }
  }

  static constexpr int kRows = 4;

  // Eight columns of the output. The compiler makes the best of what the machine has.
  typedef int16_t Sums __attribute__((vector_size(16)));
  typedef int32_t WideSums __attribute__((vector_size(32)));
  static constexpr int64_t kColumns = 8, kPair = 2;
  // Products of 4-bit codes and int8 that may be summed in 16 bits: 16 * 15 * 128 < 2^15.
  static constexpr int64_t kWiden = 16;

  // Codes of more than four bits are taken in two halves, each shifted by its place.
  template <int rows, int shift>
  static void half_tile(const uint8_t* codes, int64_t stride, const int16_t* panel,
                        int64_t columns, int32_t* sums) {
    for (int64_t first = 0; first < columns; first += kWiden) {
      const int64_t end = first + kWiden < columns ? first + kWiden : columns;
      for (int64_t j = 0; j < kPanel; j += kPair * kColumns) {
        Sums part[rows][kPair] = {};
        for (int64_t k = first; k < end; ++k) {
          Sums weight[kPair];
          std::memcpy(weight, panel + k * kPanel + j, sizeof(weight));
#pragma GCC unroll 4
          for (int row = 0; row < rows; ++row) {
            const auto code = static_cast<int16_t>((codes[row * stride + k] >> shift) & 15);
            part[row][0] += weight[0] * code;
            part[row][1] += weight[1] * code;
          }
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
          int32_t* to = sums + row * kPanel + j;
          add<shift>(part[row][0], to);
          add<shift>(part[row][1], to + kColumns);
        }
      }
    }
  }

  template <int shift>
  static void add(const Sums& part, int32_t* sums) {
    WideSums wide;
    std::memcpy(&wide, sums, sizeof(wide));
    wide += __builtin_convertvector(part, WideSums) * (1 << shift);
    std::memcpy(sums, &wide, sizeof(wide));
  }

  template <int rows>
  static void tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t steps,
                   int32_t max_code, int32_t* sums) {
    std::memset(sums, 0, sizeof(int32_t) * rows * kPanel);
    const auto* weights = reinterpret_cast<const int16_t*>(panel);
    half_tile<rows, 0>(codes, stride, weights, steps * kStep, sums);
    if (max_code > 15) half_tile<rows, 4>(codes, stride, weights, steps * kStep, sums);
  }

  // Here a panel is int16 (K, 64): column after column, rows in order, ready to be multiplied.
  static constexpr int64_t kPanelColumnBytes = 2 * kPanel;

  static void unpack(const PackedPanel& packed, int8_t* bytes_of_panel) {
    auto* panel = reinterpret_cast<int16_t*>(bytes_of_panel);
    for (int64_t k = 0; k < packed.columns; ++k, panel += kPanel) {
      const int64_t stored = packed.position[k];
      const uint8_t* multiplier = packed.multiplier + packed.group[k] * kPanel;
      const auto* bytes = static_cast<const uint8_t*>(packed.weight);
      for (int64_t row = 0; row < kPanel; ++row) {
        const int64_t position = panel_position(row);
        int code;
        if (packed.packed) {
          const uint8_t byte = bytes[stored * kPackedColumn + position % kPackedColumn];
          code = (position < kPackedColumn ? byte & 15 : byte >> 4) - kCodeBias;
        } else {
          code = static_cast<int8_t>(bytes[stored * kPanel + position]);
        }
        panel[row] = static_cast<int8_t>(code * multiplier[position]);
      }
    }
    const int64_t missing = round_up(packed.columns, kStep) - packed.columns;
    std::memset(panel, 0, static_cast<size_t>(missing * kPanelColumnBytes));
  }
};

}  // namespace

const Kernels* portable_kernels() { return kernel_table<Portable>(); }

}  // namespace gplq_mm
