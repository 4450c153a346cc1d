// Attention with AVX-VNNI: the dot product instruction on vectors of 32 bytes.
#include <cstdint>

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define GPLQ_TARGET "avx2,fma,avxvnni"
#include "target_begin.h"

#include "attention_256.h"

namespace gplq_mm {
namespace {

struct AvxVnni : Vectors256 {
  static Ints sum_of_codes(Ints sum, const int8_t* codes) {
    return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), load_bytes(codes));
  }
  static Ints sum_of_codes(Ints sum, const uint8_t* codes, const uint8_t* ones) {
    return _mm256_dpbusd_avx_epi32(sum, load_bytes(codes), load_bytes(ones));
  }

  // A function of its own, so that all registers are for the sums.
  template <int n, class Sink>
  __attribute__((noinline)) static void tile(const uint8_t* codes, int64_t stride,
                                             const int8_t* panel, int64_t step_bytes,
                                             int64_t steps, int64_t /*largest_pair*/,
                                             const Sink& sink, int64_t column) {
    Ints sum[kRows][n];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) sum[r][t] = _mm256_setzero_si256();
    }
    for (int64_t step = 0; step < steps; ++step) {
      Ints weight[n];
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) weight[t] = load_bytes(panel + 32 * t);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Ints row = step_of(codes + r * stride);
#pragma GCC unroll 3
        for (int t = 0; t < n; ++t) {
          sum[r][t] = _mm256_dpbusd_avx_epi32(sum[r][t], row, weight[t]);
        }
      }
      panel += step_bytes;
      codes += kStep;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) keep(sum[r][t]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sink.template row<n>(r, column, sum[r]);
  }
};

}  // namespace

const AttentionKernel* avx_vnni_attention() { return attention_kernel<AvxVnni>(); }

}  // namespace gplq_mm

#include "target_end.h"
#else
namespace gplq_mm {
const AttentionKernel* avx_vnni_attention() { return nullptr; }
}  // namespace gplq_mm
#endif
