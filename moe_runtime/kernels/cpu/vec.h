// Vectors of float32 on the instruction set that this file is compiled for, and the two element types.
#pragma once

// gcc's headers leave operands undefined on purpose, and gcc warns about it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace moe {

struct bf16 {
  uint16_t bits;
};

// OCP's 8-bit floating point number: 4 bits of exponent, 3 of mantissa (arXiv:2209.05433).
struct e4m3 {
  uint8_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bf16{static_cast<uint16_t>(bits >> 16 | 0x40)};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// The value that storing as T leaves.
template <class T>
float rounded(float x) {
  return to_float(from_float<T>(x));
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;
using IntVec = __m512i;

inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand if either is NaN.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round_to_int(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline IntVec bits_of(Vec v) { return _mm512_castps_si512(v); }
inline Vec vec_of(IntVec v) { return _mm512_castsi512_ps(v); }
inline IntVec load_bits(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bits(void* p, IntVec v) { _mm512_storeu_si512(p, v); }
inline IntVec set1_bits(int32_t x) { return _mm512_set1_epi32(x); }
inline Vec even_bf16(IntVec pairs) { return vec_of(_mm512_slli_epi32(pairs, 16)); }
inline Vec odd_bf16(IntVec pairs) { return vec_of(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))); }
inline Vec times_power_of_two(Vec v, Vec exponent) { return _mm512_scalef_ps(v, exponent); }

inline Vec load(const bf16* p) {
  return vec_of(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

inline Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// As float16 with the exponent's bias of E4M3, 8 less than its own.
inline Vec load(const e4m3* p) {
  const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return _mm512_cvtph_ps(halves) * set1(256.0f);
}

// bf16 bits in the low halves.
inline IntVec rounded_bits(Vec v) {
#if defined(__AVX512BF16__)
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v));
#else
  const IntVec bits = bits_of(v);
  const IntVec odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set1_bits(1));
  const IntVec rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, set1_bits(0x7fff))), 16);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), set1_bits(0x7fc0));
#endif
}

inline void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m256i bits = _mm512_cvtepi32_epi16(rounded_bits(v));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

// `a` in the lanes below `count`, `b` in the rest.
inline Vec select_first(int count, Vec a, Vec b) {
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
  return _mm512_mask_blend_ps(mask, b, a);
}

inline uint32_t equal_lanes(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

inline __m256 low_half(Vec v) { return _mm512_castps512_ps256(v); }
inline __m256 high_half(Vec v) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)); }

#else  // AVX2 and FMA

constexpr int kLanes = 8;
using Vec = __m256;
using IntVec = __m256i;

inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round_to_int(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline IntVec bits_of(Vec v) { return _mm256_castps_si256(v); }
inline Vec vec_of(IntVec v) { return _mm256_castsi256_ps(v); }
inline IntVec load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bits(void* p, IntVec v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline IntVec set1_bits(int32_t x) { return _mm256_set1_epi32(x); }
inline Vec even_bf16(IntVec pairs) { return vec_of(_mm256_slli_epi32(pairs, 16)); }
inline Vec odd_bf16(IntVec pairs) { return vec_of(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))); }
// For `v` near 1; 0 where the exponent is -126 or less.
inline Vec times_power_of_two(Vec v, Vec exponent) {
  v = vec_of(_mm256_add_epi32(bits_of(v), _mm256_slli_epi32(_mm256_cvtps_epi32(exponent), 23)));
  return _mm256_and_ps(v, _mm256_cmp_ps(exponent, set1(-126.0f), _CMP_NLE_UQ));
}

inline Vec load(const bf16* p) {
  return vec_of(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}

inline Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// As float16 with the exponent's bias of E4M3, 8 less than its own.
inline Vec load(const e4m3* p) {
  const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i halves = _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
  return _mm256_cvtph_ps(halves) * set1(256.0f);
}

// bf16 bits in the low halves.
inline IntVec rounded_bits(Vec v) {
  const IntVec bits = bits_of(v);
  const IntVec odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set1_bits(1));
  const IntVec rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, set1_bits(0x7fff))), 16);
  return _mm256_blendv_epi8(rounded, set1_bits(0x7fc0), bits_of(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}

inline void store(bf16* p, Vec v) {
  const IntVec rounded = rounded_bits(v);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}

inline Vec select_first(int count, Vec a, Vec b) {
  const IntVec lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_blendv_ps(b, a, vec_of(_mm256_cmpgt_epi32(set1_bits(count), lane)));
}

inline uint32_t equal_lanes(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }

#endif

// The value that storing as T leaves, in every lane.
template <class T>
Vec rounded(Vec v);

template <>
inline Vec rounded<float>(Vec v) {
  return v;
}

template <>
inline Vec rounded<bf16>(Vec v) {
  return even_bf16(rounded_bits(v));
}

// Stores the first `count` lanes.
template <class T>
void store_first(T* p, Vec v, int count) {
  if (count >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, sizeof(T) * count);
}

inline float first_lane(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  return lanes[0];
}

// The first `count` lanes from memory, zeros in the rest.
template <class T>
Vec load_first(const T* p, int count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(T) * count);
  return load(lanes);
}

// Calls `body(first, count)` for every group of lanes of `size` elements; only the last has fewer than kLanes.
template <class Body>
void for_lanes(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, static_cast<int>(size - i));
}

inline float sum4(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

inline float max4(__m128 v) {
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

inline float sum8(__m256 v) { return sum4(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }
inline float max8(__m256 v) { return max4(_mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }

#if defined(__AVX512F__)
inline float sum(Vec v) { return sum8(_mm256_add_ps(low_half(v), high_half(v))); }
inline float max(Vec v) { return max8(_mm256_max_ps(low_half(v), high_half(v))); }
#else
inline float sum(Vec v) { return sum8(v); }
inline float max(Vec v) { return max8(v); }
#endif

// e^x within 2 units in the last place; 0 for every x < -110; at most e^88.37; NaN stays NaN.
// x = n ln 2 + f with |f| <= ln 2 / 2, and a polynomial for e^f (fitted to a relative error of 3e-9).
inline Vec exp(Vec x) {
  x = min(set1(88.37f), max(set1(-110.0f), x));
  const Vec n = round_to_int(x * set1(1.44269504f));
  Vec f = fma(n, set1(-0.693145752f), x);
  f = fma(n, set1(-1.42860677e-6f), f);
  Vec p = set1(0x1.6a2352p-10f);
  p = fma(p, f, set1(0x1.123a6cp-7f));
  p = fma(p, f, set1(0x1.5558f4p-5f));
  p = fma(p, f, set1(0x1.555490p-3f));
  p = fma(p, f, set1(0x1.fffffcp-2f));
  p = fma(p, f, set1(1.0f));
  p = fma(p, f, set1(1.0f));
  return times_power_of_two(p, n);
}

// 2^x for x <= 0 within 3 units in the last place; exactly 0 for every x < -160; NaN stays NaN.
// The polynomial for 2^f, |f| <= 1/2, is fitted to a relative error of 1e-7.
inline Vec exp2(Vec x) {
  x = max(set1(-160.0f), x);
  const Vec n = round_to_int(x), f = x - n;
  Vec p = set1(0x1.5bb92ap-10f);
  p = fma(p, f, set1(0x1.3ceb6cp-7f));
  p = fma(p, f, set1(0x1.c6b75ap-5f));
  p = fma(p, f, set1(0x1.ebf9bap-3f));
  p = fma(p, f, set1(0x1.62e42ap-1f));
  p = fma(p, f, set1(1.0f));
  return times_power_of_two(p, n);
}

// While it lives, its thread takes and gives zero for numbers below the normal ones, as AMX always does; in libraries
// without AMX it does nothing. All threads compute under it, so results do not depend on where they were computed.
class FlushToZero {
#if defined(__AMX_BF16__)
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kResults | kInputs); }
  ~FlushToZero() { _mm_setcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;

 private:
  static constexpr unsigned kResults = 0x8000, kInputs = 0x40;
  const unsigned before_;
#else
 public:
  FlushToZero() {}  // not trivial, so that a variable counts as used
#endif
};

}  // namespace moe
