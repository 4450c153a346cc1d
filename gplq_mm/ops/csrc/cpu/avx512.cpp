// AVX-512 with VNNI: 64 products of u8 and s8 an instruction.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define GPLQ_TARGET \
  "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,prfchw,prefer-vector-width=512"
#include "target_begin.h"

#include "kernel_set_impl.h"

namespace gplq_mm {
namespace {

// A whole step: 4 columns of 64 rows, one vector per 16 rows.
constexpr int kPanelVectors = 4;
// Steps whose codes fill a cache line.
constexpr int64_t kStepsOfLine = 64 / kStep;

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
  static void reduce(const Real (&rows)[kQueries], float* out, const Both& both) {
    const Real ab = both(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
    const Real cd = both(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
    const __m512d ab_pd = _mm512_castps_pd(ab), cd_pd = _mm512_castps_pd(cd);
    // Every 128 bits: a, b, c, d.
    Real all = both(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_pd, cd_pd)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab_pd, cd_pd)));
    all = both(all, _mm512_shuffle_f32x4(all, all, 0x4E));
    _mm_storeu_ps(out, both(_mm512_castps512_ps128(all), _mm512_extractf32x4_ps(all, 1)));
  }
  static void largest(const Real (&rows)[kQueries], float* out) {
    reduce(rows, out, [](auto a, auto b) { return max(a, b); });
  }
  static void sums(const Real (&rows)[kQueries], float* out) {
    reduce(rows, out, [](auto a, auto b) { return add(a, b); });
  }

  static void totals(const Real (&sums_of)[1][kQueries], float* out) { sums(sums_of[0], out); }

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
  __attribute__((noinline)) static void query_tile(const uint8_t* codes, int64_t stride,
                                             const int8_t* panel, int64_t step_bytes,
                                             int64_t steps, int64_t /*largest_pair*/,
                                             const Sink& sink, int64_t column) {
    Ints sum[kQueries][n];
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 6
      for (int t = 0; t < n; ++t) sum[r][t] = _mm512_setzero_si512();
    }
    for (int64_t step = 0; step < steps; ++step) {
      Ints weight[n];
#pragma GCC unroll 6
      for (int t = 0; t < n; ++t) weight[t] = _mm512_load_si512(panel + 64 * t);
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) {
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
    for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 6
      for (int t = 0; t < n; ++t) keep(sum[r][t]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) sink.template row<n>(r, column, sum[r]);
  }

  static float total(const Real (&sums)[kSums / kWidth]) {
    Real all = add(add(sums[0], sums[2]), add(sums[1], sums[3]));
    all = add(all, _mm512_permute_ps(all, 0x4E));
    all = add(all, _mm512_permute_ps(all, 0xB1));
    all = add(all, _mm512_shuffle_f32x4(all, all, 0x4E));
    return _mm512_cvtss_f32(add(all, _mm512_shuffle_f32x4(all, all, 0xB1)));
  }
  static Real difference(const int32_t* a, const int32_t* b) {
    return _mm512_cvtepi32_ps(
        _mm512_sub_epi32(_mm512_load_si512(a), _mm512_load_si512(b)));
  }

  // Packing saturates, so only the upper end needs a comparison; NaN and what is below int32
  // becomes the lowest integer.
  static __m512i integers(Real steps, Real high) { return _mm512_cvtps_epi32(min(high, steps)); }

  template <int count>
  static void narrow(const Real* steps, const Limits& limits, uint8_t* codes) {
    const Real high = set(limits.high);
    const __m512i base = _mm512_set1_epi16(static_cast<int16_t>(limits.code_min));
    const __m512i zero = _mm512_setzero_si512();
    __m512i low = _mm512_packs_epi32(integers(steps[0], high),
                                     count > 1 ? integers(steps[1 % count], high) : zero);
    __m512i upper = count > 2 ? _mm512_packs_epi32(integers(steps[2 % count], high),
                                                   integers(steps[3 % count], high))
                              : zero;
    low = _mm512_subs_epi16(low, base);
    if (count > 2) upper = _mm512_subs_epi16(upper, base);
    // Lane L of the packed bytes holds four codes of each vector, those from 4 L.
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes =
        _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, upper));
    if (count == 1) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_castsi512_si128(bytes));
    } else {
      _mm512_storeu_si512(codes, bytes);
    }
  }

  // As in vectors_256.h. The one instruction for it, vpermb, is absent from the first machines
  // with VNNI.
  struct Table {
    static constexpr int64_t kBytes = 64;
    explicit Table(const uint8_t* table) {
      for (int i = 0; i < 4; ++i) {
        part[i] = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i)));
      }
    }
    // Byte by byte.
    Ints of(Ints position) const {
      const __mmask64 bit4 = _mm512_test_epi8_mask(position, _mm512_set1_epi8(16));
      const __mmask64 bit5 = _mm512_test_epi8_mask(position, _mm512_set1_epi8(32));
      Ints lower = _mm512_shuffle_epi8(part[0], position);
      lower = _mm512_mask_shuffle_epi8(lower, bit4, part[1], position);
      Ints upper = _mm512_shuffle_epi8(part[2], position);
      upper = _mm512_mask_shuffle_epi8(upper, bit4, part[3], position);
      return _mm512_mask_mov_epi8(lower, bit5, upper);
    }
    void look_up(uint8_t* bytes) const {
      _mm512_storeu_si512(bytes, of(_mm512_loadu_si512(bytes)));
    }
    Ints lanes(Ints position) const { return _mm512_and_si512(of(position), set_int(0xFF)); }
    Ints part[4];
  };

  static constexpr int kRows = 6;

  template <int rows>
  static void prefetch_rows(const uint8_t* codes, int64_t stride) {
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + row * stride), _MM_HINT_T0);
    }
  }

  template <int rows>
  static void tile(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t steps,
                   int32_t /*max_code*/, int32_t* sums) {
    __m512i sum[rows][kPanelVectors];
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
      for (int t = 0; t < kPanelVectors; ++t) sum[row][t] = _mm512_setzero_si512();
    }
    // Two bases, so that every row is addressed as base + {0, 1, 2} * stride without more
    // registers than there are.
    const uint8_t* upper = codes + 3 * stride;
    for (int64_t s = 0; s < steps; ++s) {
      if (s % kStepsOfLine == 0) prefetch_rows<rows>(codes + kRows * stride, stride);
      __m512i weight[kPanelVectors];
#pragma GCC unroll 4
      for (int t = 0; t < kPanelVectors; ++t) weight[t] = _mm512_load_si512(panel + 64 * t);
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) {
        const uint8_t* from = row < 3 ? codes + row * stride : upper + (row - 3) * stride;
        const __m512i four = _mm512_set1_epi32(load_step(from));
#pragma GCC unroll 4
        for (int t = 0; t < kPanelVectors; ++t) {
          sum[row][t] = _mm512_dpbusd_epi32(sum[row][t], four, weight[t]);
        }
      }
      panel += kStep * kPanel;
      codes += kStep;
      upper += kStep;
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
      for (int t = 0; t < kPanelVectors; ++t) {
        _mm512_store_si512(sums + row * kPanel + 16 * t, sum[row][t]);
      }
    }
  }

  // One stored column times its multipliers, bytes in panel order.
  template <bool packed>
  static __m512i column(const PackedPanel& panel, int64_t k) {
    const int64_t stored = panel.position[k];
    const __m512i multiplier =
        _mm512_loadu_si512(panel.multiplier + static_cast<int64_t>(panel.group[k]) * kPanel);
    __m512i code;
    if (packed) {
      const auto* bytes = static_cast<const uint8_t*>(panel.weight) + stored * kPackedColumn;
      const __m512i both = _mm512_broadcast_i64x4(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
      const __m512i shift = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
      code = _mm512_and_si512(_mm512_srlv_epi64(both, shift), _mm512_set1_epi8(15));
      code = _mm512_sub_epi8(code, _mm512_set1_epi8(kCodeBias));
    } else {
      code = _mm512_loadu_si512(static_cast<const int8_t*>(panel.weight) + stored * kPanel);
    }
    // There is no product of bytes. That of 16-bit lanes has the product of the low bytes in its
    // low byte; and a lane with a zero low byte, times the high byte, has the other in its high
    // one.
    const __m512i low = _mm512_mullo_epi16(code, multiplier);
    const __m512i high = _mm512_mullo_epi16(
        _mm512_andnot_si512(_mm512_set1_epi16(0x00FF), code), _mm512_srli_epi16(multiplier, 8));
    // (low & 0x00FF) | high
    return _mm512_ternarylogic_epi32(low, _mm512_set1_epi16(0x00FF), high, 0xEA);
  }

  static void interleave(__m512i c0, __m512i c1, __m512i c2, __m512i c3, int8_t* out) {
    const __m512i low01 = _mm512_unpacklo_epi8(c0, c1), high01 = _mm512_unpackhi_epi8(c0, c1);
    const __m512i low23 = _mm512_unpacklo_epi8(c2, c3), high23 = _mm512_unpackhi_epi8(c2, c3);
    _mm512_store_si512(out, _mm512_unpacklo_epi16(low01, low23));
    _mm512_store_si512(out + 64, _mm512_unpackhi_epi16(low01, low23));
    _mm512_store_si512(out + 128, _mm512_unpacklo_epi16(high01, high23));
    _mm512_store_si512(out + 192, _mm512_unpackhi_epi16(high01, high23));
  }

  template <bool packed>
  static void unpack_columns(const PackedPanel& panel, int8_t* out) {
    int64_t k = 0;
    for (; k + kStep <= panel.columns; k += kStep, out += kStep * kPanel) {
      interleave(column<packed>(panel, k), column<packed>(panel, k + 1),
                 column<packed>(panel, k + 2), column<packed>(panel, k + 3), out);
    }
    if (k < panel.columns) {
      __m512i rest[kStep];
      for (int64_t i = 0; i < kStep; ++i) {
        rest[i] = k + i < panel.columns ? column<packed>(panel, k + i) : _mm512_setzero_si512();
      }
      interleave(rest[0], rest[1], rest[2], rest[3], out);
    }
  }

  static void unpack(const PackedPanel& packed, int8_t* panel) {
    packed.packed ? unpack_columns<true>(packed, panel) : unpack_columns<false>(packed, panel);
  }
};

}  // namespace

const KernelSet* avx512_vnni_set() { return kernel_set<Avx512>(); }

}  // namespace gplq_mm

#include "target_end.h"
#else
namespace gplq_mm {
const KernelSet* avx512_vnni_set() { return nullptr; }
}  // namespace gplq_mm
#endif
