// Vectors of integers on the instruction set that this file is compiled for: lanes of 32 bits, and the bytes in them.
#pragma once

#include "vec.h"

namespace moe {

#if defined(__AVX512F__)

inline IntVec widen_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline IntVec shift_left(IntVec v, int bits) { return _mm512_slli_epi32(v, bits); }
inline IntVec shift_right(IntVec v, int bits) { return _mm512_srli_epi32(v, bits); }
inline IntVec and_bits(IntVec a, IntVec b) { return _mm512_and_si512(a, b); }
inline IntVec xor_bits(IntVec a, IntVec b) { return _mm512_xor_si512(a, b); }
inline IntVec add_int32(IntVec a, IntVec b) { return _mm512_add_epi32(a, b); }
inline IntVec sub_int32(IntVec a, IntVec b) { return _mm512_sub_epi32(a, b); }
inline IntVec mul_int32(IntVec a, IntVec b) { return _mm512_mullo_epi32(a, b); }
inline Vec float_of(IntVec v) { return _mm512_cvtepi32_ps(v); }
inline IntVec int_of(Vec v) { return _mm512_cvtps_epi32(v); }
inline IntVec lookup(__m128i table, IntVec index) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), index); }
inline IntVec pairs_of_products(IntVec a, IntVec b) { return _mm512_maddubs_epi16(a, b); }
inline IntVec sub_int8(IntVec a, IntVec b) { return _mm512_sub_epi8(a, b); }
inline IntVec add_int16(IntVec a, IntVec b) { return _mm512_add_epi16(a, b); }
inline IntVec add_pairs(IntVec v) { return _mm512_madd_epi16(v, _mm512_set1_epi16(1)); }
inline IntVec size_of(IntVec v) { return _mm512_abs_epi8(v); }
inline IntVec with_sign(IntVec v, IntVec sign) {
  return _mm512_mask_sub_epi8(v, _mm512_movepi8_mask(sign), _mm512_setzero_si512(), v);
}

#else  // AVX2

inline IntVec widen_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline IntVec shift_left(IntVec v, int bits) { return _mm256_slli_epi32(v, bits); }
inline IntVec shift_right(IntVec v, int bits) { return _mm256_srli_epi32(v, bits); }
inline IntVec and_bits(IntVec a, IntVec b) { return _mm256_and_si256(a, b); }
inline IntVec xor_bits(IntVec a, IntVec b) { return _mm256_xor_si256(a, b); }
inline IntVec add_int32(IntVec a, IntVec b) { return _mm256_add_epi32(a, b); }
inline IntVec sub_int32(IntVec a, IntVec b) { return _mm256_sub_epi32(a, b); }
inline IntVec mul_int32(IntVec a, IntVec b) { return _mm256_mullo_epi32(a, b); }
inline Vec float_of(IntVec v) { return _mm256_cvtepi32_ps(v); }
inline IntVec int_of(Vec v) { return _mm256_cvtps_epi32(v); }
inline IntVec lookup(__m128i table, IntVec index) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index); }
inline IntVec pairs_of_products(IntVec a, IntVec b) { return _mm256_maddubs_epi16(a, b); }
inline IntVec sub_int8(IntVec a, IntVec b) { return _mm256_sub_epi8(a, b); }
inline IntVec add_int16(IntVec a, IntVec b) { return _mm256_add_epi16(a, b); }
inline IntVec add_pairs(IntVec v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
inline IntVec size_of(IntVec v) { return _mm256_abs_epi8(v); }
inline IntVec with_sign(IntVec v, IntVec sign) { return _mm256_sign_epi8(v, sign); }

#endif

}  // namespace moe
