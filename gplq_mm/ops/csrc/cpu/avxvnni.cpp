// AVX-VNNI: the dot product instruction on vectors of 32 bytes.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define GPLQ_TARGET "avx2,fma,avxvnni"
#include "target_begin.h"

#include "vectors_256.h"

namespace gplq_mm {
namespace {

struct AvxVnni : Vectors256 {
  static constexpr int kRows = 6;

  template <int rows>
  static void tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t steps,
                   int32_t /*max_code*/, int32_t* sums) {
    for (int64_t quarter = 0; quarter < kPanel / kQuarter; ++quarter) {
      const int8_t* weights = panel + quarter * kQuarter * kStep;
      __m256i sum[rows][2];
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) sum[row][0] = sum[row][1] = _mm256_setzero_si256();
      for (int64_t s = 0; s < steps; ++s) {
        const auto* from = reinterpret_cast<const __m256i*>(weights + s * kStep * kPanel);
        const __m256i low = _mm256_load_si256(from), high = _mm256_load_si256(from + 1);
#pragma GCC unroll 6
        for (int row = 0; row < rows; ++row) {
          const __m256i four = _mm256_set1_epi32(load_step(codes + row * stride + s * kStep));
          sum[row][0] = _mm256_dpbusd_avx_epi32(sum[row][0], four, low);
          sum[row][1] = _mm256_dpbusd_avx_epi32(sum[row][1], four, high);
        }
      }
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) {
        auto* to = reinterpret_cast<__m256i*>(sums + row * kPanel + quarter * kQuarter);
        _mm256_store_si256(to, sum[row][0]);
        _mm256_store_si256(to + 1, sum[row][1]);
      }
    }
  }

  static Ints sum_of_codes(Ints sum, const int8_t* codes) {
    return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), load_bytes(codes));
  }
  static Ints sum_of_codes(Ints sum, const uint8_t* codes, const uint8_t* ones) {
    return _mm256_dpbusd_avx_epi32(sum, load_bytes(codes), load_bytes(ones));
  }

  // A function of its own, so that all registers are for the sums.
  template <int n, class Sink>
  __attribute__((noinline)) static void query_tile(const uint8_t* codes, int64_t stride,
                                             const int8_t* panel, int64_t step_bytes,
                                             int64_t steps, int64_t /*largest_pair*/,
                                             const Sink& sink, int64_t column) {
    Ints sum[kQueries][n];
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) sum[r][t] = _mm256_setzero_si256();
    }
    for (int64_t step = 0; step < steps; ++step) {
      Ints weight[n];
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) weight[t] = load_bytes(panel + 32 * t);
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) {
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
    for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) keep(sum[r][t]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) sink.template row<n>(r, column, sum[r]);
  }
};

}  // namespace

const KernelSet* avx_vnni_set() { return kernel_set<AvxVnni>(); }

}  // namespace gplq_mm

#include "target_end.h"
#else
namespace gplq_mm {
const KernelSet* avx_vnni_set() { return nullptr; }
}  // namespace gplq_mm
#endif
