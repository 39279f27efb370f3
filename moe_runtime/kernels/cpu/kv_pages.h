// Rows of the KV cache: where they are, how they are written, and how rows of 8 bits are read.
//
// A row is one head's key or value of a token, in T, or as codes of 8 bits with a float32 scale. It is quantised by
// itself when it is written, so what is read does not depend on batches or chunks. kernels/kv_rows.py is the slow twin.
#pragma once

#include "engine.h"

namespace moe {

// How the cache holds a number: in T, as int8, as E4M3.
enum RowCode : int64_t { kRowPlain = 0, kRowInt8 = 1, kRowFp8 = 2 };

// The rows of all tokens, in pages. The heads of a token are side by side, and so are their scales.
struct CachedRows {
  char* data;
  float* scales;         // of rows of 8 bits; else null
  int64_t page_stride;   // bytes between the first tokens of two pages
  int64_t token_stride;  // bytes between two tokens of a page
  int64_t page_scales;   // scales between the first tokens of two pages
  int64_t token_scales;  // scales between two tokens of a page

  char* row(int64_t page, int64_t in_page) const { return data + page * page_stride + in_page * token_stride; }
  float* scale(int64_t page, int64_t in_page) const { return scales + page * page_scales + in_page * token_scales; }
};

// Keys and values of a layer.
struct KVPages {
  CachedRows keys, values;
  int64_t page_size;  // tokens
  int64_t code;       // RowCode
  int64_t item_size;  // bytes of a number
  int64_t key_split;  // a key's first numbers, which have a scale of their own (latent attention); 0: it has one scale
};

template <class Code>
constexpr float kLargest = 127.0f;
template <>
constexpr float kLargest<e4m3> = 448.0f;

template <class Code>
Code nearest(float x);

template <>
inline int8_t nearest<int8_t>(float x) {
  return static_cast<int8_t>(std::nearbyint(x));
}

// Ties to even; |x| is at most 448.
template <>
inline e4m3 nearest<e4m3>(float x) {
  const float size = std::fabs(x);
  const float step = size + 0x1p14f;  // a float32 of that size has steps of 2^-9, as small codes have
  uint32_t bits, small, sign;
  std::memcpy(&bits, &size, 4);
  std::memcpy(&small, &step, 4);
  std::memcpy(&sign, &x, 4);
  const uint32_t code = size < 0x1p-6f ? small & 0xf : ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
  return e4m3{static_cast<uint8_t>(code | (sign >> 24 & 0x80))};
}

// Codes of a row, symmetric; returns the scale, which is NaN for a row that is not finite.
template <class T, class Code>
float quantize_row(const T* x, int64_t size, Code* codes) {
  Vec most = zero(), zeros = zero();  // a product of zero and what is not finite is NaN
  for_lanes(size, [&](int64_t i, int n) {
    const Vec value = load_first(x + i, n);
    most = max(most, max(value, zero() - value));
    zeros = fma(value, zero(), zeros);
  });
  const float scale = max(most) / kLargest<Code> + sum(zeros);
  const float inverse = scale > 0.0f ? std::min(1.0f / scale, std::numeric_limits<float>::max()) : 0.0f;
  const Vec factor = set1(inverse), largest = set1(kLargest<Code>);
  for_lanes(size, [&](int64_t i, int n) {
    float values[kLanes];
    Code lanes[kLanes];
    store(values, min(max(load_first(x + i, n) * factor, zero() - largest), largest));
    for (int j = 0; j < kLanes; j++) lanes[j] = nearest<Code>(values[j]);
    std::memcpy(codes + i, lanes, n);
  });
  return scale;
}

template <class T, class Code>
void widen_row(const Code* codes, float scale, int64_t size, T* out) {
  const Vec factor = set1(scale);
  for_lanes(size, [&](int64_t i, int n) { store_first(out + i, load_first(codes + i, n) * factor, n); });
}

// Calls `body(first, count)` for the parts of a row that have a scale each.
template <class Body>
void for_parts(int64_t size, int64_t split, const Body& body) {
  if (split) body(0, split);
  body(split, size - split);
}

// Writes the rows of `heads` heads of a token, side by side in `x`, to a cache position.
template <class T>
void write_rows(const KVPages& pages, const CachedRows& rows, int64_t position, const T* x, int64_t heads, int64_t size,
                int64_t split) {
  const int64_t page = position / pages.page_size, in_page = position % pages.page_size;
  char* to = rows.row(page, in_page);
  if (pages.code == kRowPlain) {
    std::memcpy(to, x, heads * size * sizeof(T));
    return;
  }
  float* scale = rows.scale(page, in_page);
  for (int64_t head = 0; head < heads; head++, x += size, to += size) {
    for_parts(size, split, [&](int64_t first, int64_t count) {
      *scale++ = pages.code == kRowInt8 ? quantize_row(x + first, count, reinterpret_cast<int8_t*>(to) + first)
                                     : quantize_row(x + first, count, reinterpret_cast<e4m3*>(to) + first);
    });
  }
}

// Reads a row of 8 bits.
template <class T, class Code>
void read_row(const Code* row, const float* scale, int64_t size, int64_t split, T* out) {
  for_parts(size, split, [&](int64_t first, int64_t count) { widen_row(row + first, *scale++, count, out + first); });
}

}  // namespace moe
