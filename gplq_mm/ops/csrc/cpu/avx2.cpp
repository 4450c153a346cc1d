// AVX2: vpmaddubsw with sums of two products, exact in 16 bits for codes of seven bits. Attention
// adds as many sums as fit before it widens them, or widens both operands first where no sum of two
// is sure to fit; either way the result is exact.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define GPLQ_TARGET "avx2,fma"
#include "target_begin.h"

#include "vectors_256.h"

namespace gplq_mm {
namespace {

// How many sums of two products of codes and int8 may be added in 16 bits: twice 2 * 63 * 128 and
// once 2 * 127 * 128 are below 2^15.
constexpr int32_t kTwice = 63, kOnce = 127;
// The half of a byte that takes part. A product of wider codes is one of their low halves plus
// 16 times one of their high halves.
enum class Half { whole, low, high };
// In attention: magnitude of a sum of two products that fits 16 bits.
constexpr int64_t kLargestShort = 32767;

struct Avx2 : Vectors256 {
  static constexpr int kRows = 6;

  template <Half half>
  static __m256i broadcast(const uint8_t* codes) {
    const __m256i four = _mm256_set1_epi32(load_step(codes));
    const __m256i mask = _mm256_set1_epi8(15);
    if (half == Half::low) return _mm256_and_si256(four, mask);
    if (half == Half::high) return _mm256_and_si256(_mm256_srli_epi16(four, 4), mask);
    return four;
  }

  // Adds the products of one or two steps of a row and 16 rows of weights, which stay in memory:
  // the registers are for the sums.
  template <Half half, int together>
  static void add_steps(const uint8_t* codes, const int8_t* weights, __m256i (&sum)[2]) {
    const __m256i factor = _mm256_set1_epi16(half == Half::high ? 16 : 1);
    const __m256i first = broadcast<half>(codes);
    const __m256i second = together > 1 ? broadcast<half>(codes + kStep) : first;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m256i pairs = _mm256_maddubs_epi16(first, load_bytes(weights + 32 * i));
      if (together > 1) {
        const __m256i others = load_bytes(weights + kStep * kPanel + 32 * i);
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(second, others));
      }
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, factor));
    }
  }

  template <int rows, Half half, int together>
  static void add_quarter(const uint8_t* codes, int64_t stride, const int8_t* weights,
                          int64_t steps, __m256i (&sum)[rows][2]) {
    int64_t s = 0;
    for (; s + together <= steps; s += together) {
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) {
        add_steps<half, together>(codes + row * stride + s * kStep, weights + s * kStep * kPanel,
                                  sum[row]);
      }
    }
    if (s == steps) return;
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) {
      add_steps<half, 1>(codes + row * stride + s * kStep, weights + s * kStep * kPanel, sum[row]);
    }
  }

  template <int rows>
  static void tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t steps,
                   int32_t max_code, int32_t* sums) {
    for (int64_t i = 0; i < kPanel; i += kQuarter) {
      const int8_t* weights = panel + i * kStep;
      __m256i sum[rows][2];
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) sum[row][0] = sum[row][1] = _mm256_setzero_si256();
      if (max_code <= kTwice) {
        add_quarter<rows, Half::whole, 2>(codes, stride, weights, steps, sum);
      } else if (max_code <= kOnce) {
        add_quarter<rows, Half::whole, 1>(codes, stride, weights, steps, sum);
      } else {
        add_quarter<rows, Half::low, 2>(codes, stride, weights, steps, sum);
        add_quarter<rows, Half::high, 2>(codes, stride, weights, steps, sum);
      }
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) {
        auto* to = reinterpret_cast<__m256i*>(sums + row * kPanel + i);
        _mm256_store_si256(to, sum[row][0]);
        _mm256_store_si256(to + 1, sum[row][1]);
      }
    }
  }

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
                                                     int64_t steps, Ints (&sums)[kQueries][n]) {
    Ints total[kQueries][n];
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) total[r][t] = _mm256_setzero_si256();
    }
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) {
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
    for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) {
        sums[r][t] = _mm256_add_epi32(sums[r][t], widen(total[r][t]));
      }
    }
  }

  template <int n>
  __attribute__((noinline)) static void wide_steps(const uint8_t* codes, int64_t stride,
                                                   const int8_t* panel, int64_t step_bytes,
                                                   int64_t steps, Ints (&sums)[kQueries][n]) {
    Ints total[kQueries][n];
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) {
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
        for (int r = 0; r < kQueries; ++r) {
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
    for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 3
      for (int t = 0; t < n; ++t) sums[r][t] = total[r][t];
    }
  }

  // largest_pair: magnitude that the sum of two products may have.
  template <int n, class Sink>
  static void query_tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t step_bytes,
                   int64_t steps, int64_t largest_pair, const Sink& sink, int64_t column) {
    Ints sums[kQueries][n];
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
    for (int r = 0; r < kQueries; ++r) sink.template row<n>(r, column, sums[r]);
  }
};

}  // namespace

const KernelSet* avx2_set() { return kernel_set<Avx2>(); }

}  // namespace gplq_mm

#include "target_end.h"
#else
namespace gplq_mm {
const KernelSet* avx2_set() { return nullptr; }
}  // namespace gplq_mm
#endif
