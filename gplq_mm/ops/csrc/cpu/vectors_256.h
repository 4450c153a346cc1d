// What AVX2 and AVX-VNNI share: vectors of 32 bytes, two for 16 output rows.
#pragma once

#include "kernel_set_impl.h"

namespace gplq_mm {
namespace {

// Output rows in the registers at a time.
constexpr int64_t kQuarter = 16;

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
    return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
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
  static Real reduce_halves(const Real (&rows)[kQueries], const Both& both) {
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
  static void largest(const Real (&rows)[kQueries], float* out) {
    const auto both = [](auto a, auto b) { return max(a, b); };
    reduce(reduce_halves(rows, both), out, both);
  }
  static void sums(const Real (&rows)[kQueries], float* out) {
    const auto both = [](auto a, auto b) { return add(a, b); };
    reduce(reduce_halves(rows, both), out, both);
  }
  // The same of 16 numbers in two vectors.
  static void totals(const Real (&parts)[2][kQueries], float* out) {
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

  // As in avx512.cpp.
  static void keep(Ints& x) { asm("" : "+x"(x)); }

  static Ints step_of(const uint8_t* codes) {
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof(four));
    return _mm256_set1_epi32(four);
  }

  static float total(const Real (&sums)[kSums / kWidth]) {
    // Eight numbers of each half of 16.
    Real low = add(add(sums[0], sums[4]), add(sums[2], sums[6]));
    Real high = add(add(sums[1], sums[5]), add(sums[3], sums[7]));
    low = add(low, _mm256_permute_ps(low, 0x4E));
    high = add(high, _mm256_permute_ps(high, 0x4E));
    low = add(low, _mm256_permute_ps(low, 0xB1));
    high = add(high, _mm256_permute_ps(high, 0xB1));
    const Real all = add(low, high);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  static Real difference(const int32_t* a, const int32_t* b) {
    return _mm256_cvtepi32_ps(
        _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(a)),
                         _mm256_load_si256(reinterpret_cast<const __m256i*>(b))));
  }

  // As in avx512.cpp: packing saturates.
  static __m256i integers(Real steps, Real high) { return _mm256_cvtps_epi32(min(high, steps)); }

  template <int count>
  static void narrow(const Real* steps, const Limits& limits, uint8_t* codes) {
    const Real high = set(limits.high);
    const __m256i base = _mm256_set1_epi16(static_cast<int16_t>(limits.code_min));
    const __m256i zero = _mm256_setzero_si256();
    __m256i low = _mm256_packs_epi32(integers(steps[0], high),
                                     count > 1 ? integers(steps[1 % count], high) : zero);
    __m256i upper = count > 2 ? _mm256_packs_epi32(integers(steps[2 % count], high),
                                                   integers(steps[3 % count], high))
                              : zero;
    low = _mm256_subs_epi16(low, base);
    if (count > 2) upper = _mm256_subs_epi16(upper, base);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes =
        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, upper), order);
    if (count == 1) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm256_castsi256_si128(bytes));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
    }
  }

  struct Table {
    static constexpr int64_t kBytes = 32;
    explicit Table(const uint8_t* table) {
      for (int i = 0; i < 4; ++i) {
        part[i] = _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i)));
      }
    }
    // Byte by byte. A shuffle takes the low four bits of a position; its bits 4 and 5 choose among
    // four.
    Ints of(Ints position) const {
      const Ints bit4 = _mm256_slli_epi16(position, 3), bit5 = _mm256_slli_epi16(position, 2);
      const auto quarter = [&](int i) { return _mm256_shuffle_epi8(part[i], position); };
      const Ints lower = _mm256_blendv_epi8(quarter(0), quarter(1), bit4);
      const Ints upper = _mm256_blendv_epi8(quarter(2), quarter(3), bit4);
      return _mm256_blendv_epi8(lower, upper, bit5);
    }
    void look_up(uint8_t* bytes) const {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), of(load_bytes(bytes)));
    }
    Ints lanes(Ints position) const { return _mm256_and_si256(of(position), set_int(0xFF)); }
    Ints part[4];
  };

  struct Column {
    __m256i half[2];
  };

  static __m256i product(__m256i code, __m256i multiplier) {
    // As in avx512.cpp: products of bytes from those of 16-bit lanes.
    const __m256i mask = _mm256_set1_epi16(0x00FF);
    const __m256i low = _mm256_and_si256(_mm256_mullo_epi16(code, multiplier), mask);
    const __m256i high = _mm256_mullo_epi16(_mm256_andnot_si256(mask, code),
                                            _mm256_srli_epi16(multiplier, 8));
    return _mm256_or_si256(low, high);
  }

  // One stored column times its multipliers, bytes in panel order; zero beyond the last.
  template <bool packed>
  static Column column(const PackedPanel& panel, int64_t k) {
    Column result = {{_mm256_setzero_si256(), _mm256_setzero_si256()}};
    if (k >= panel.columns) return result;
    const int64_t stored = panel.position[k];
    const uint8_t* multiplier = panel.multiplier + static_cast<int64_t>(panel.group[k]) * kPanel;
    __m256i code[2];
    if (packed) {
      const __m256i both =
          load_bytes(static_cast<const uint8_t*>(panel.weight) + stored * kPackedColumn);
      const __m256i mask = _mm256_set1_epi8(15), bias = _mm256_set1_epi8(kCodeBias);
      code[0] = _mm256_sub_epi8(_mm256_and_si256(both, mask), bias);
      code[1] = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), bias);
    } else {
      const auto* bytes = static_cast<const int8_t*>(panel.weight) + stored * kPanel;
      code[0] = load_bytes(bytes);
      code[1] = load_bytes(bytes + 32);
    }
    for (int i = 0; i < 2; ++i) result.half[i] = product(code[i], load_bytes(multiplier + 32 * i));
    return result;
  }

  template <bool packed>
  static void columns(const PackedPanel& panel, int8_t* out) {
    for (int64_t k = 0; k < panel.columns; k += kStep, out += kStep * kPanel) {
      const Column c0 = column<packed>(panel, k), c1 = column<packed>(panel, k + 1);
      const Column c2 = column<packed>(panel, k + 2), c3 = column<packed>(panel, k + 3);
      for (int i = 0; i < 2; ++i) {
        const __m256i low01 = _mm256_unpacklo_epi8(c0.half[i], c1.half[i]);
        const __m256i high01 = _mm256_unpackhi_epi8(c0.half[i], c1.half[i]);
        const __m256i low23 = _mm256_unpacklo_epi8(c2.half[i], c3.half[i]);
        const __m256i high23 = _mm256_unpackhi_epi8(c2.half[i], c3.half[i]);
        auto* to = reinterpret_cast<__m256i*>(out + 32 * i);
        _mm256_store_si256(to, _mm256_unpacklo_epi16(low01, low23));
        _mm256_store_si256(to + 2, _mm256_unpackhi_epi16(low01, low23));
        _mm256_store_si256(to + 4, _mm256_unpacklo_epi16(high01, high23));
        _mm256_store_si256(to + 6, _mm256_unpackhi_epi16(high01, high23));
      }
    }
  }

  static void unpack(const PackedPanel& packed, int8_t* panel) {
    packed.packed ? columns<true>(packed, panel) : columns<false>(packed, panel);
  }
};

}  // namespace
}  // namespace gplq_mm
