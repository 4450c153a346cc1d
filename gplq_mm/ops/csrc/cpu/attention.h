// Attention on codes: what the CPU kernels of every instruction set offer. Plain C++, no ATen.
//
// The four operands are codes on a grid per head, x_hat = scale * code + offset. Either product
// is one of u8 by s8 codes; what the offsets contribute are sums over a row or a column of codes.
// A kernel subtracts a base from the codes, so that those of q and of the probabilities start at 0
// and those of k and v fit a signed byte; the base is part of the offset in the constants below.
//
// Where an operand's codes are positions in a table of levels, they start at 0 as they are, and the
// table holds levels minus the base.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gplq_mm {

// How the float values of one operand become codes: clamp(round(x * inverse + shift), low, high)
// - base, half to even. NaN becomes the lowest code; the kernels then repeat the NaN in the
// output.
struct OperandGrid {
  float inverse, shift, low, high;
  int32_t base;
  const uint8_t* table;  // (kPositions,) or null
};

// All that depends on the head. Scores are in units of the exponent: of exp2 where nothing is
// added to them, else of exp.
struct HeadConstants {
  OperandGrid query, key, value, probs;
  // score = dot * dot_factor + sum(k codes) * key_factor + sum(q codes) * query_factor
  // + score_offset. The last two are the same along a row and softmax does not see them, but a
  // bias or mask of -1e9 makes rounding see them; they are left out where there is neither.
  float dot_factor, key_factor, query_factor, score_offset;
  // out = dot * out_factor + sum(p codes) * probs_factor + sum(v codes) * value_factor
  // + out_offset
  float out_factor, probs_factor, value_factor, out_offset;
};

struct AttentionProblem {
  const float* qkv;      // (windows, tokens, 3, heads, head_dim), or with rows (R, 3, ...)
  float* out;            // (windows, tokens, heads, head_dim), or with rows (out_rows, ...)
  const int32_t* rows;   // (windows, tokens) or null
  int64_t out_rows;      // rows of `out`; only read where `rows` is given
  const float* bias;     // (heads, tokens, tokens) or null
  const float* mask;     // (mask_windows, tokens, tokens) or null
  int64_t mask_windows;
  int64_t windows, tokens, heads, head_dim;
  int64_t parts;         // tasks that the queries of one window and head are cut into
  const HeadConstants* constants;  // (heads,)
  bool row_relative;     // quantize exp(score - row maximum), else the probability
  bool fused;            // whether x * inverse + shift is rounded once or twice
  // Largest magnitudes of the codes minus their base: of q and probs, then of k and v.
  int32_t max_query, max_key, max_probs, max_value;
};

struct AttentionKernel {
  // Bytes of scratch memory that `run` needs, to be aligned to 64.
  int64_t (*scratch)(const AttentionProblem& problem);
  // Tasks begin..end of windows * heads * parts, the parts of a head side by side.
  void (*run)(const AttentionProblem& problem, int64_t begin, int64_t end, void* scratch);
  // Rows of queries that are computed together: the unit of a part.
  int64_t row_block;
};

}  // namespace gplq_mm
