// Attention with AVX-512 and VNNI.
#include <cstdint>

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define GPLQ_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,prefer-vector-width=512"
#include "target_begin.h"

#include "attention_impl.h"

namespace gplq_mm {
namespace {

struct Avx512 {
  static constexpr int64_t kWidth = 16;
  // 24 sums, 6 vectors of the panel and a row's step: 31 registers of 32.
  static constexpr int kVectors = 6;
  using Real = __m512;
  using Ints = __m512i;
  using Bad = __mmask16;

  static __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

  static Real set(float x) { return _mm512_set1_ps(x); }
  static Ints set_int(int32_t x) { return _mm512_set1_epi32(x); }
  static Real load(const float* x) { return _mm512_loadu_ps(x); }
  static Real load_part(const float* x, int64_t count) {
    return _mm512_maskz_loadu_ps(mask(count), x);
  }
  static void store(float* x, Real value) { _mm512_storeu_ps(x, value); }
  static void store_part(float* x, Real value, int64_t count) {
    _mm512_mask_storeu_ps(x, mask(count), value);
  }

  static Real add(Real a, Real b) { return _mm512_add_ps(a, b); }
  static Real sub(Real a, Real b) { return _mm512_sub_ps(a, b); }
  static Real mul(Real a, Real b) { return _mm512_mul_ps(a, b); }
  static Real fma(Real a, Real b, Real c) { return _mm512_fmadd_ps(a, b, c); }
  static Real fused(Real a, Real b, Real c) { return fma(a, b, c); }
  // Both give b where one of them is NaN.
  static Real max(Real a, Real b) { return _mm512_max_ps(a, b); }
  static Real min(Real a, Real b) { return _mm512_min_ps(a, b); }
  static __m128 max(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
  static __m128 add(__m128 a, __m128 b) { return _mm_add_ps(a, b); }

  // Each of four vectors to one number.
  template <class Both>
  static void reduce(const Real (&rows)[kRows], float* out, const Both& both) {
    const Real ab = both(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
    const Real cd = both(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
    const __m512d ab_pd = _mm512_castps_pd(ab), cd_pd = _mm512_castps_pd(cd);
    // Every 128 bits: a, b, c, d.
    Real all = both(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_pd, cd_pd)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab_pd, cd_pd)));
    all = both(all, _mm512_shuffle_f32x4(all, all, 0x4E));
    _mm_storeu_ps(out, both(_mm512_castps512_ps128(all), _mm512_extractf32x4_ps(all, 1)));
  }
  static void largest(const Real (&rows)[kRows], float* out) {
    reduce(rows, out, [](auto a, auto b) { return max(a, b); });
  }
  static void sums(const Real (&rows)[kRows], float* out) {
    reduce(rows, out, [](auto a, auto b) { return add(a, b); });
  }

  static void totals(const Real (&sums_of)[1][kRows], float* out) { sums(sums_of[0], out); }

  // x <= 0, -inf or NaN. What is below the smallest normal number becomes that.
  static Real exp2(Real x) {
    // Results below the normal numbers would each take a hundred cycles.
    x = max(set(kSmallestExponent), x);
    const Real whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    // * 2^floor(x); NaN stays.
    return _mm512_scalef_ps(exp2_fraction<Avx512>(sub(x, whole)), x);
  }

  static Real to_real(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Ints to_int(Real x) { return _mm512_cvtps_epi32(x); }
  static Ints bits(Real x) { return _mm512_castps_si512(x); }
  static Ints sub_int(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Ints first(Ints x, int64_t count) { return _mm512_maskz_mov_epi32(mask(count), x); }

  static Bad no_nan() { return 0; }
  static void note_nan(Bad& bad, Real x) {
    bad = _kor_mask16(bad, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q));
  }
  static bool any_nan(Bad bad) { return bad != 0; }

  // The low byte of each lane.
  static void store_bytes(uint8_t* to, Ints x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
  }
  // The low bytes of four, lane by lane.
  static void store_quads(int8_t* to, Ints a, Ints b, Ints c, Ints d) {
    // (x & mask) | y
    constexpr int kSelect = 0xEA;
    const Ints ab = _mm512_ternarylogic_epi32(a, set_int(0xFF), _mm512_slli_epi32(b, 8), kSelect);
    const Ints cd = _mm512_ternarylogic_epi32(c, set_int(0xFF), _mm512_slli_epi32(d, 8), kSelect);
    _mm512_store_si512(
        to, _mm512_ternarylogic_epi32(ab, set_int(0xFFFF), _mm512_slli_epi32(cd, 16), kSelect));
  }

  // 4 x 4 double words within each lane of 16 bytes.
  static void transpose(const uint8_t* from, int8_t* to, int64_t stride) {
    const Ints a = _mm512_load_si512(from), b = _mm512_load_si512(from + 64);
    const Ints c = _mm512_load_si512(from + 128), d = _mm512_load_si512(from + 192);
    const Ints ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
    const Ints cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
    _mm512_store_si512(to, _mm512_unpacklo_epi64(ab0, cd0));
    _mm512_store_si512(to + stride, _mm512_unpackhi_epi64(ab0, cd0));
    _mm512_store_si512(to + 2 * stride, _mm512_unpacklo_epi64(ab1, cd1));
    _mm512_store_si512(to + 3 * stride, _mm512_unpackhi_epi64(ab1, cd1));
  }

  static Ints sum_of_codes(Ints sum, const int8_t* codes) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_load_si512(codes));
  }
  static Ints sum_of_codes(Ints sum, const uint8_t* codes, const uint8_t* ones) {
    return _mm512_dpbusd_epi32(sum, _mm512_load_si512(codes), _mm512_load_si512(ones));
  }

  // Does nothing. The compiler would keep what follows a loop in registers of its own, and move
  // sums from one to the other in every step of the loop.
  static void keep(Ints& x) { asm("" : "+v"(x)); }

  // A function of its own, so that all registers are for the sums.
  template <int n, class Sink>
  __attribute__((noinline)) static void tile(const uint8_t* codes, int64_t stride,
                                             const int8_t* panel, int64_t step_bytes,
                                             int64_t steps, int64_t /*largest_pair*/,
                                             const Sink& sink, int64_t column) {
    Ints sum[kRows][n];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
      for (int t = 0; t < n; ++t) sum[r][t] = _mm512_setzero_si512();
    }
    for (int64_t step = 0; step < steps; ++step) {
      Ints weight[n];
#pragma GCC unroll 6
      for (int t = 0; t < n; ++t) weight[t] = _mm512_load_si512(panel + 64 * t);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, codes + r * stride, sizeof(four));
        const Ints row = _mm512_set1_epi32(four);
#pragma GCC unroll 6
        for (int t = 0; t < n; ++t) {
          sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], row, weight[t]);
        }
      }
      panel += step_bytes;
      codes += kStep;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
      for (int t = 0; t < n; ++t) keep(sum[r][t]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sink.template row<n>(r, column, sum[r]);
  }
};

}  // namespace

const AttentionKernel* avx512_vnni_attention() { return attention_kernel<Avx512>(); }

}  // namespace gplq_mm

#include "target_end.h"
#else
namespace gplq_mm {
const AttentionKernel* avx512_vnni_attention() { return nullptr; }
}  // namespace gplq_mm
#endif
