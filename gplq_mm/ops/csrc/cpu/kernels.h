// What the CPU kernels of every instruction set offer: plain C++, no ATen.
//
// The operands of a product:
//   codes  uint8 (rows, stride): activation codes from 0, in natural column order. A row is
//          readable up to K rounded up to 4.
//   panel  int8 (K / 4 rounded up, 64, 4): multiplier * weight code of 64 output rows, four
//          natural columns of a row side by side; columns beyond K are zero.
#pragma once

#include <cstdint>

#include "../int4_layout.h"

namespace gplq_mm {

// Ascending: a machine that supports one supports all before it, but for avx_vnni, which some
// AVX-512 machines lack.
enum class Isa { portable, avx2, avx_vnni, avx512_vnni };
constexpr int kIsaCount = 4;

// Columns are read in steps of four bytes.
constexpr int64_t kStep = 4;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Entries of a table of levels: codes are positions 0..63 then, and what is multiplied is the level
// 0..63 that the table holds there.
constexpr int64_t kPositions = 64;

// How real values become codes: clamp(round(x * inverse + shift), code_min, code_max) - code_min,
// half to even. NaN becomes code 0.
struct ActGrid {
  const float* inverse;  // (K,)
  const float* shift;    // (K,)
  int32_t code_min;
  int32_t code_max;
  bool fused;            // see Epilogue
  const uint8_t* table;  // (kPositions,), or null where codes are the integers themselves
};

// One panel of a packed weight, columns in stored order.
struct PackedPanel {
  const void* weight;         // uint8 (K, 32) if packed, else int8 (K, 64)
  const uint8_t* multiplier;  // (G, 64)
  const int32_t* position;    // (K,): stored column that natural column k meets
  const int32_t* group;       // (K,): its group
  int64_t columns;            // K
  bool packed;
};

enum class Output {
  accumulator,  // int32: sum - correction
  real,         // float: (sum - correction) * row_scale + bias
  residual,     // float: residual + gamma * real (gamma may be null)
  gelu_codes,   // uint8: codes of gelu(real) on the next layer's grid
};

// What happens to the 64 sums of a row. Pointers are those of the panel's first output row.
struct Epilogue {
  Output kind;
  // Whether a * b + c is rounded once (fused) or twice: as torch.addcmul does on this machine,
  // so that codes are those of the simulation to the last tie.
  bool fused;
  int64_t columns;  // output rows that exist in this panel, 1..64
  const int32_t* correction;
  const float* row_scale;
  const float* bias;
  const float* gamma;
  const float* residual;  // (rows, residual_stride)
  int64_t residual_stride;
  ActGrid next;
  void* out;  // (rows, out_stride)
  int64_t out_stride;
};

// Rows of codes times one panel.
struct Product {
  const uint8_t* codes;  // (rows, stride)
  int64_t stride, rows, columns;
  const int8_t* panel;
  int32_t max_code;  // largest code that may occur
  // What is read next, if anything: fetched into the cache meanwhile.
  const void* upcoming;
  int64_t upcoming_bytes;
};

struct Kernels {
  // x (rows, columns) to codes or levels (rows, stride); bytes from `columns` to `stride` become 0.
  void (*quantize)(const float* x, int64_t rows, int64_t columns, const ActGrid& grid,
                   uint8_t* codes, int64_t stride);
  // The same of layer_norm(x) * weight + bias.
  void (*norm_quantize)(const float* x, int64_t rows, int64_t columns, const float* weight,
                        const float* bias, float eps, const ActGrid& grid, uint8_t* codes,
                        int64_t stride);
  // layer_norm(x) * weight + bias, (rows, columns), and gelu(x), as arithmetic.py defines them.
  // fused: as in Epilogue.
  void (*layer_norm)(const float* x, int64_t rows, int64_t columns, const float* weight,
                     const float* bias, float eps, bool fused, float* out);
  void (*gelu)(const float* x, int64_t count, float* out);
  // Panel of stored columns to the operand described above.
  void (*unpack)(const PackedPanel& packed, int8_t* panel);
  void (*multiply)(const Product& product, const Epilogue& epilogue);
};

}  // namespace gplq_mm
