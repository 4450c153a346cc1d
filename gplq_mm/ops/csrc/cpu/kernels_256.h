// What AVX2 and AVX-VNNI share: vectors of 32 bytes, two for 16 output rows.
#pragma once

namespace gplq_mm {
namespace {

// Output rows in the registers at a time.
constexpr int64_t kQuarter = 16;

struct Unpack256 {
  struct Column {
    __m256i half[2];
  };

  static __m256i multiply(__m256i code, __m256i multiplier) {
    // As in kernels_avx512.cpp: products of bytes from those of 16-bit lanes.
    const __m256i mask = _mm256_set1_epi16(0x00FF);
    const __m256i low = _mm256_and_si256(_mm256_mullo_epi16(code, multiplier), mask);
    const __m256i high = _mm256_mullo_epi16(_mm256_andnot_si256(mask, code),
                                            _mm256_srli_epi16(multiplier, 8));
    return _mm256_or_si256(low, high);
  }

  static __m256i load(const void* bytes) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
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
          load(static_cast<const uint8_t*>(panel.weight) + stored * kPackedColumn);
      const __m256i mask = _mm256_set1_epi8(15), bias = _mm256_set1_epi8(kCodeBias);
      code[0] = _mm256_sub_epi8(_mm256_and_si256(both, mask), bias);
      code[1] = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), bias);
    } else {
      const auto* bytes = static_cast<const int8_t*>(panel.weight) + stored * kPanel;
      code[0] = load(bytes);
      code[1] = load(bytes + 32);
    }
    for (int i = 0; i < 2; ++i) result.half[i] = multiply(code[i], load(multiplier + 32 * i));
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
