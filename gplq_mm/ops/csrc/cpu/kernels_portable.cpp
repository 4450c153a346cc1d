// Plain loops, for machines without the other instruction sets.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels_impl.h"

namespace gplq_mm {
namespace {

struct Portable {
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
