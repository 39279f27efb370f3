// Products of quantised weights with rows in int8: the option `activation_quantization`.
//
// A row's inputs are cut into blocks that divide the weight's groups, of at most 128 inputs. A block is held as
// round(x / s), s = max |x| / 127. The products of a block are sums of integers, which are exact in any order:
//
//     out = sum over blocks, in order, of (float(sum of (code - zero) * input) * scale) * s
//
// With offsets, float(sum of inputs) * offset is added to what is multiplied with s. Each product and sum is rounded to
// float32, except that the last one is fused: out = fma(.., s, out). So results have the same bits for any number of
// rows, and on every instruction set.
#pragma once

#include "quantized.h"

namespace moe {

constexpr int64_t kMostBlockInputs = 128;

// Products of four unsigned with four signed bytes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kByteProducts = true;
#else
constexpr bool kByteProducts = false;
#endif

// What stands for 0 among a weight's bytes when vectors multiply them; FP4 is multiplied as twice its value.
constexpr int32_t zero_byte(int32_t code) {
  return code == kInt4 ? 8 : code == kFp4 ? 12 : code == kInt8 && kByteProducts ? 128 : 0;
}

// Rows in int8: `codes` [rows][stride], and for each row and block its scale and the sum of its codes, times
// `sum_factor`: 1 if the weight has zeros or offsets, else `zero_byte`.
struct Int8Rows {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  int64_t stride, block, blocks;
  int32_t sum_factor;
};

// Stores integers from -127 to 127.
inline void store_int8(int8_t* p, Vec v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
#else
  const IntVec integers = _mm256_cvtps_epi32(v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
#endif
}

// The largest block that divides a group; the only group of a row may have any size.
inline int64_t block_inputs(const QuantFormat& format) {
  int64_t block = format.group ? std::min(format.group, kMostBlockInputs) : kMostBlockInputs;
  while (format.group % block != 0) block -= kMostStepInputs;
  return block;
}

template <class T>
void quantize_row(const Int8Rows& rows, int64_t row, const T* x, int64_t inputs) {
  int8_t* codes = rows.codes + row * rows.stride;
  std::memset(codes, 0, rows.stride);
  for (int64_t block = 0; block < rows.blocks; block++) {
    const int64_t first = block * rows.block, count = std::min(rows.block, inputs - first);
    Vec largest = zero();
    for_lanes(count, [&](int64_t i, int n) {
      const Vec v = load_first(x + first + i, n);
      largest = max(largest, max(v, zero() - v));
    });
    const float scale = max(largest) / 127.0f;
    const Vec inverse = set1(scale >= 0x1p-126f ? 1.0f / scale : 0.0f);  // a smaller one has no finite inverse
    Vec total = zero();  // of integers that float32 holds exactly
    for_lanes(count, [&](int64_t i, int n) {
      const Vec rounded = round_to_int(load_first(x + first + i, n) * inverse);
      total = total + rounded;
      int8_t lanes[kLanes];
      store_int8(lanes, rounded);
      std::memcpy(codes + first + i, lanes, n);
    });
    rows.scales[row * rows.blocks + block] = scale;
    rows.sums[row * rows.blocks + block] = static_cast<int32_t>(sum(total)) * rows.sum_factor;
  }
}

}  // namespace moe
