// Attention with AVX2. It multiplies u8 by s8 into sums of two, which saturate at 16 bits: where
// no sum of two can get there, as many sums as fit are added before they are widened; else both
// operands are widened first. Either way the result is exact.
#include <cstdint>

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define GPLQ_TARGET "avx2,fma"
#include "target_begin.h"

#include "attention_256.h"

namespace gplq_mm {
namespace {

constexpr int64_t kLargestShort = 32767;

struct Avx2 : Vectors256 {
  static Ints widen(Ints pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

  static Ints sum_of_codes(Ints sum, const int8_t* codes) {
    const Ints pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_bytes(codes));
    return _mm256_add_epi32(sum, widen(pairs));
  }
  static Ints sum_of_codes(Ints sum, const uint8_t* codes, const uint8_t* ones) {
    const Ints pairs = _mm256_maddubs_epi16(load_bytes(codes), load_bytes(ones));
    return _mm256_add_epi32(sum, widen(pairs));
  }

  // Functions of their own, so that all registers are for the sums.
  template <int n>
  __attribute__((noinline)) static void narrow_steps(const uint8_t* codes, int64_t stride,
                                                     const int8_t* panel, int64_t step_bytes,
                                                     int64_t steps, Ints (&sums)[kRows][n]) {
    Ints total[kRows][n];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) total[r][t] = _mm256_setzero_si256();
    }
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Ints row = step_of(codes + r * stride);
#pragma GCC unroll 3
        for (int t = 0; t < n; ++t) {
          total[r][t] =
              _mm256_add_epi16(total[r][t], _mm256_maddubs_epi16(row, load_bytes(panel + 32 * t)));
        }
      }
      panel += step_bytes;
      codes += kStep;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) {
        sums[r][t] = _mm256_add_epi32(sums[r][t], widen(total[r][t]));
      }
    }
  }

  template <int n>
  __attribute__((noinline)) static void wide_steps(const uint8_t* codes, int64_t stride,
                                                   const int8_t* panel, int64_t step_bytes,
                                                   int64_t steps, Ints (&sums)[kRows][n]) {
    Ints total[kRows][n];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) total[r][t] = _mm256_setzero_si256();
    }
    const Ints low = _mm256_set1_epi16(0x00FF);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) {
        const Ints column = load_bytes(panel + 32 * t);
        const Ints even = _mm256_srai_epi16(_mm256_slli_epi16(column, 8), 8);
        const Ints odd = _mm256_srai_epi16(column, 8);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Ints row = step_of(codes + r * stride);
          const Ints pairs = _mm256_add_epi32(
              _mm256_madd_epi16(_mm256_and_si256(row, low), even),
              _mm256_madd_epi16(_mm256_srli_epi16(row, 8), odd));
          total[r][t] = _mm256_add_epi32(total[r][t], pairs);
        }
      }
      panel += step_bytes;
      codes += kStep;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) sums[r][t] = total[r][t];
    }
  }

  // largest_pair: magnitude that the sum of two products may have.
  template <int n, class Sink>
  static void tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t step_bytes,
                   int64_t steps, int64_t largest_pair, const Sink& sink, int64_t column) {
    Ints sums[kRows][n];
    const int64_t fit = largest_pair > 0 ? kLargestShort / largest_pair : steps;
    if (fit == 0) {
      wide_steps<n>(codes, stride, panel, step_bytes, steps, sums);
    } else {
      for (auto& row : sums) {
        for (auto& sum : row) sum = _mm256_setzero_si256();
      }
      for (int64_t done = 0; done < steps; done += fit) {
        const int64_t now = steps - done < fit ? steps - done : fit;
        narrow_steps<n>(codes + done * kStep, stride, panel + done * step_bytes, step_bytes, now,
                        sums);
      }
    }
    for (int r = 0; r < kRows; ++r) sink.template row<n>(r, column, sums[r]);
  }
};

}  // namespace

const AttentionKernel* avx2_attention() { return attention_kernel<Avx2>(); }

}  // namespace gplq_mm

#include "target_end.h"
#else
namespace gplq_mm {
const AttentionKernel* avx2_attention() { return nullptr; }
}  // namespace gplq_mm
#endif
