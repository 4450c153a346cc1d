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
  static Real min(const Real& a, const Real& b) {
    return each([&](int64_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Real max(const Real& a, const Real& b) {
    return each([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }

  static float total(const Real (&sums)[kSums / kWidth]) {
    const Real all = add(add(sums[0], sums[2]), add(sums[1], sums[3]));
    float quarter[4];
    for (int64_t i = 0; i < 4; ++i) {
      const float* lane = all.lane + 4 * i;
      quarter[i] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
    }
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
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

  template <int rows>
  static void tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t steps,
                   int32_t /*max_code*/, int32_t* __restrict sums) {
    std::memset(sums, 0, sizeof(int32_t) * rows * kPanel);
    for (int64_t s = 0; s < steps; ++s) {
      const int8_t* __restrict column = panel + s * kStep * kPanel;
      for (int row = 0; row < rows && row < kRows; ++row) {
        const uint8_t* four = codes + row * stride + s * kStep;
        for (int64_t j = 0; j < kPanel; ++j) {
          const int8_t* weight = column + j * kStep;
          sums[row * kPanel + j] += four[0] * weight[0] + four[1] * weight[1] +
                                    four[2] * weight[2] + four[3] * weight[3];
        }
      }
    }
  }

  static void unpack(const PackedPanel& packed, int8_t* panel) {
    for (int64_t k = 0; k < round_up(packed.columns, kStep); ++k) {
      int8_t* out = panel + k / kStep * kStep * kPanel + k % kStep;
      const bool exists = k < packed.columns;
      const int64_t stored = exists ? packed.position[k] : 0;
      const uint8_t* multiplier = packed.multiplier + (exists ? packed.group[k] : 0) * kPanel;
      for (int64_t row = 0; row < kPanel; ++row) {
        const int64_t position = panel_position(row);
        int code = 0;
        if (exists && packed.packed) {
          const uint8_t byte = static_cast<const uint8_t*>(
              packed.weight)[stored * kPackedColumn + position % kPackedColumn];
          code = (position < kPackedColumn ? byte & 15 : byte >> 4) - kCodeBias;
        } else if (exists) {
          code = static_cast<const int8_t*>(packed.weight)[stored * kPanel + position];
        }
        out[row * kStep] = static_cast<int8_t>(code * multiplier[position]);
      }
    }
  }
};

}  // namespace

const Kernels* portable_kernels() { return kernel_table<Portable>(); }

}  // namespace gplq_mm
