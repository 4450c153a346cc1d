// The int4 layout, twin of gplq_mm/quant/packing.py; nothing else in C++ may know it.
//
// Weights come in panels of 64 output rows. Within a panel the codes of one stored column stand
// side by side, so a column is one vector:
//   packed   uint8 (P, K, 32): byte b holds position b in its low nibble and position b + 32 in
//            its high one, each plus 8;
//   unpacked int8  (P, K, 64): byte b holds position b.
// The multipliers of a group are uint8 (P, G, 64), byte b for position b.
// Position 16 L + 4 t + i holds row 16 t + 4 L + i (L, t, i in 0..3).
#pragma once

#include <cstdint>

namespace gplq_mm {

// Output rows of a panel.
constexpr int64_t kPanel = 64;
// Bytes of a stored column of packed codes.
constexpr int64_t kPackedColumn = kPanel / 2;
// Codes -8..7 are stored as 0..15.
constexpr int kCodeBias = 8;
// Largest multiplier of packed codes: -8 * 15 is still an int8.
constexpr int kMaxPackedMultiplier = 15;
// Largest multiplier at all.
constexpr int kMaxMultiplier = 127;

// Position within a panel of a row 0..63; its own inverse.
constexpr int64_t panel_position(int64_t row) {
  return 16 * ((row / 4) % 4) + 4 * (row / 16) + row % 4;
}

}  // namespace gplq_mm
