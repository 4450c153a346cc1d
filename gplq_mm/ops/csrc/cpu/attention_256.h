// What attention on AVX2 and on AVX-VNNI share: vectors of eight floats.
#pragma once

#include "attention_impl.h"

namespace gplq_mm {
namespace {

struct Vectors256 {
  static constexpr int64_t kWidth = 8;
  // 12 sums, 3 vectors of the panel and a row's step: 16 registers.
  static constexpr int kVectors = 3;
  using Real = __m256;
  using Ints = __m256i;
  using Bad = __m256;

  // Ones in the first `count` lanes, at most 8.
  static Ints mask(int64_t count) {
    const Ints lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), lane);
  }

  static Real set(float x) { return _mm256_set1_ps(x); }
  static Ints set_int(int32_t x) { return _mm256_set1_epi32(x); }
  static Real load(const float* x) { return _mm256_loadu_ps(x); }
  static Real load_part(const float* x, int64_t count) {
    return _mm256_maskload_ps(x, mask(count));
  }
  static void store(float* x, Real value) { _mm256_storeu_ps(x, value); }
  static void store_part(float* x, Real value, int64_t count) {
    _mm256_maskstore_ps(x, mask(count), value);
  }
  static Ints load_bytes(const void* bytes) {
    return _mm256_load_si256(static_cast<const __m256i*>(bytes));
  }

  static Real add(Real a, Real b) { return _mm256_add_ps(a, b); }
  static Real sub(Real a, Real b) { return _mm256_sub_ps(a, b); }
  static Real mul(Real a, Real b) { return _mm256_mul_ps(a, b); }
  static Real fma(Real a, Real b, Real c) { return _mm256_fmadd_ps(a, b, c); }
  static Real fused(Real a, Real b, Real c) { return fma(a, b, c); }
  // Both give b where one of them is NaN.
  static Real max(Real a, Real b) { return _mm256_max_ps(a, b); }
  static Real min(Real a, Real b) { return _mm256_min_ps(a, b); }

  static __m128 max(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
  static __m128 add(__m128 a, __m128 b) { return _mm_add_ps(a, b); }

  // Each half of four vectors to one number.
  template <class Both>
  static Real reduce_halves(const Real (&rows)[kRows], const Both& both) {
    const Real ab = both(_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[0], rows[1]));
    const Real cd = both(_mm256_unpacklo_ps(rows[2], rows[3]), _mm256_unpackhi_ps(rows[2], rows[3]));
    const __m256d ab_pd = _mm256_castps_pd(ab), cd_pd = _mm256_castps_pd(cd);
    // Both 128 bits: a, b, c, d.
    return both(_mm256_castpd_ps(_mm256_unpacklo_pd(ab_pd, cd_pd)),
                _mm256_castpd_ps(_mm256_unpackhi_pd(ab_pd, cd_pd)));
  }
  template <class Both>
  static void reduce(Real all, float* out, const Both& both) {
    _mm_storeu_ps(out, both(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  // Each of four vectors to one number.
  static void largest(const Real (&rows)[kRows], float* out) {
    const auto both = [](auto a, auto b) { return max(a, b); };
    reduce(reduce_halves(rows, both), out, both);
  }
  static void sums(const Real (&rows)[kRows], float* out) {
    const auto both = [](auto a, auto b) { return add(a, b); };
    reduce(reduce_halves(rows, both), out, both);
  }
  // The same of 16 numbers in two vectors.
  static void totals(const Real (&parts)[2][kRows], float* out) {
    const auto both = [](auto a, auto b) { return add(a, b); };
    reduce(add(reduce_halves(parts[0], both), reduce_halves(parts[1], both)), out, both);
  }

  // x <= 0, -inf or NaN. What is below the smallest normal number becomes that.
  static Real exp2(Real x) {
    x = max(set(kSmallestExponent), x);
    const Real whole = _mm256_floor_ps(x);
    const Real fraction = exp2_fraction<Vectors256>(sub(x, whole));
    const Ints exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(fraction), exponent));
  }

  static Real to_real(Ints x) { return _mm256_cvtepi32_ps(x); }
  static Ints to_int(Real x) { return _mm256_cvtps_epi32(x); }
  static Ints bits(Real x) { return _mm256_castps_si256(x); }
  static Ints sub_int(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Ints first(Ints x, int64_t count) { return _mm256_and_si256(x, mask(count)); }

  static Bad no_nan() { return _mm256_setzero_ps(); }
  static void note_nan(Bad& bad, Real x) {
    bad = _mm256_or_ps(bad, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  static bool any_nan(Bad bad) { return _mm256_movemask_ps(bad) != 0; }

  // The low byte of each lane.
  static void store_bytes(uint8_t* to, Ints x) {
    const Ints pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                       0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const Ints bytes = _mm256_shuffle_epi8(x, pick);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes),
                                            _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), both);
  }
  // The low bytes of four, lane by lane.
  static void store_quads(int8_t* to, Ints a, Ints b, Ints c, Ints d) {
    const Ints low = set_int(0xFF);
    const Ints ab = _mm256_or_si256(_mm256_and_si256(a, low),
                                    _mm256_slli_epi32(_mm256_and_si256(b, low), 8));
    const Ints cd = _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(c, low), 16),
                                    _mm256_slli_epi32(d, 24));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(ab, cd));
  }

  // 4 x 4 double words within each lane of 16 bytes.
  static void transpose(const uint8_t* from, int8_t* to, int64_t stride) {
    const Ints a = load_bytes(from), b = load_bytes(from + 32);
    const Ints c = load_bytes(from + 64), d = load_bytes(from + 96);
    const Ints ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
    const Ints cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
    auto row = [&](int64_t i) { return reinterpret_cast<__m256i*>(to + i * stride); };
    _mm256_store_si256(row(0), _mm256_unpacklo_epi64(ab0, cd0));
    _mm256_store_si256(row(1), _mm256_unpackhi_epi64(ab0, cd0));
    _mm256_store_si256(row(2), _mm256_unpacklo_epi64(ab1, cd1));
    _mm256_store_si256(row(3), _mm256_unpackhi_epi64(ab1, cd1));
  }

  // As in attention_avx512.cpp.
  static void keep(Ints& x) { asm("" : "+x"(x)); }

  static Ints step_of(const uint8_t* codes) {
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof(four));
    return _mm256_set1_epi32(four);
  }
};

}  // namespace
}  // namespace gplq_mm
