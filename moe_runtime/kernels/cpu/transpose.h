// Data movement for attention: transposing square blocks of 32-bit words, and interleaving rows of bf16.
#pragma once

#include "vec.h"

namespace moe {

#if defined(__AVX512F__)

// Lane r of out[i] = word i of rows[r] + offset, for 16 words of 16 rows.
inline void transpose_words(const char* const* rows, int64_t offset, IntVec (&out)[kLanes]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + offset);
  // Within each 128-bit lane: 4 x 4 words of four neighbouring rows.
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 q + c] holds words c, c + 4, c + 8, c + 12 of rows 4 q .. 4 q + 3, one word per lane: transpose the lanes.
  for (int c = 0; c < 4; c++) {
    const __m512i even01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    out[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    out[c + 4] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    out[c + 8] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    out[c + 12] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
}

// The pairs (even[i], odd[i]) of 32 values of each.
inline void interleave(const bf16* even, const bf16* odd, IntVec (&out)[2]) {
  static constexpr auto kOrder = [] {
    struct alignas(64) Order {
      uint16_t from[64];
    } order{};
    for (int i = 0; i < 64; i++) order.from[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    return order;
  }();
  const __m512i a = load_bits(even), b = load_bits(odd);
  out[0] = _mm512_permutex2var_epi16(a, load_bits(kOrder.from), b);
  out[1] = _mm512_permutex2var_epi16(a, load_bits(kOrder.from + 32), b);
}

#else

// The same for 8 words of 8 rows.
inline void transpose_words(const char* const* rows, int64_t offset, IntVec (&out)[kLanes]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = load_bits(rows[i] + offset);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int c = 0; c < 4; c++) {
    out[c] = _mm256_permute2x128_si256(a[c], a[4 + c], 0x20);
    out[c + 4] = _mm256_permute2x128_si256(a[c], a[4 + c], 0x31);
  }
}

// The same for 16 values of each.
inline void interleave(const bf16* even, const bf16* odd, IntVec (&out)[2]) {
  const __m256i a = load_bits(even), b = load_bits(odd);
  const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
  out[0] = _mm256_permute2x128_si256(low, high, 0x20);
  out[1] = _mm256_permute2x128_si256(low, high, 0x31);
}

#endif

}  // namespace moe
