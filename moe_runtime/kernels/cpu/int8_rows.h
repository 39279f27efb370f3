// Products of quantised weights with rows in int8: the option `activation_quantization`.
//
// A row's inputs are cut into blocks that divide the weight's groups, of at most 128 inputs. A block is held as
// round(x / s), s = max |x| / 127. The products of a block are sums of integers, which are exact in any order:
//
//     out = sum over blocks, in order, of (float(sum of (code - zero) * input) * scale) * s
//
// so results have the same bits for any number of rows, and on every instruction set.
#pragma once

#include "quantized.h"

namespace moe {

constexpr int64_t kMostBlockInputs = 128;

// Rows in int8: `codes` [rows][stride], and for each row and block its scale and the sum of its codes.
struct Int8Rows {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  int64_t stride, block, blocks;
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
    rows.sums[row * rows.blocks + block] = static_cast<int32_t>(sum(total));
  }
}

// Adds products of four unsigned and four signed bytes to each lane.
#if defined(__AVX512VNNI__)
#define MOE_BYTE_PRODUCTS
inline IntVec add_byte_products(IntVec sum, IntVec a, IntVec b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
#define MOE_BYTE_PRODUCTS
inline IntVec add_byte_products(IntVec sum, IntVec a, IntVec b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#endif

// One vector of outputs in one step: codes as unsigned bytes, and products with a row's inputs, which they add to 32-bit
// sums. `kZero` is what stands for 0 among the bytes; FP4 is held as twice its value.
template <int kCode>
struct StepCodes {
  static constexpr int32_t kZero = kCode == kInt4 ? 8 : 12;
  IntVec low, high;

  explicit StepCodes(IntVec codes) {
    low = and_bits(codes, set1_bits(0x0f0f0f0f));
    high = and_bits(shift_right(codes, 4), set1_bits(0x0f0f0f0f));
    if constexpr (kCode == kFp4) {
      const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
      low = lookup(table, low);
      high = lookup(table, high);
    }
  }

  IntVec add(IntVec sum, const int8_t* inputs) const {
    const IntVec first = broadcast_word(inputs), second = broadcast_word(inputs + 4);
#if defined(MOE_BYTE_PRODUCTS)
    return add_byte_products(add_byte_products(sum, low, first), high, second);
#else
    // At most four products of 24 * 127, which 16 bits hold.
    return add_int32(sum, add_pairs(add_int16(pairs_of_products(low, first), pairs_of_products(high, second))));
#endif
  }
};

template <>
struct StepCodes<kInt8> {
#if defined(MOE_BYTE_PRODUCTS)
  static constexpr int32_t kZero = 128;
  IntVec codes;

  explicit StepCodes(IntVec given) : codes(xor_bits(given, set1_bits(static_cast<int32_t>(0x80808080)))) {}

  IntVec add(IntVec sum, const int8_t* inputs) const { return add_byte_products(sum, codes, broadcast_word(inputs)); }
#else
  static constexpr int32_t kZero = 0;
  IntVec sizes, codes;

  explicit StepCodes(IntVec given) : sizes(size_of(given)), codes(given) {}

  // Two products of 128 * 127 fit into 16 bits.
  IntVec add(IntVec sum, const int8_t* inputs) const {
    return add_int32(sum, add_pairs(pairs_of_products(sizes, with_sign(broadcast_word(inputs), codes))));
  }
#endif
};

// The scales of a block's outputs, and its zeros, for one vector of outputs.
template <int kCode, bool kHasZero>
struct BlockScales {
  Vec scale;
  IntVec zeros;

  // `base`: what stands for 0 among the integers that were multiplied.
  BlockScales(const QuantFormat& format, const uint8_t* head, const float* factor, int output, int32_t base) {
    scale = load_scales(format.scale, head, factor, output) * set1(kCode == kFp4 ? 0.5f : 1.0f);
    zeros = set1_bits(base);
    if constexpr (kHasZero) {
      zeros = add_int32(zeros, int_of(load_zeros(format, head, output)));
    }
  }

  // Adds the products of a row's block, of which `sum` is the sum of codes, to its outputs.
  void add(IntVec products, const Int8Rows& rows, int64_t place, int32_t base, float* out) const {
    if constexpr (kHasZero) {
      products = sub_int32(products, mul_int32(zeros, set1_bits(rows.sums[place])));
    } else if (base != 0) {
      products = sub_int32(products, set1_bits(base * rows.sums[place]));
    }
    store(out, fma(float_of(products) * scale, set1(rows.scales[place]), load(out)));
  }
};

// One block of a panel: the head of its group, its codes, and how many steps.
struct Block {
  const QuantFormat& format;
  const float* factor;
  const uint8_t *head, *codes;
  int64_t number, steps;
};

// Adds the products of some rows with a block to `out[r][0 .. 64)`.
template <int kRows, int kCode, bool kHasZero>
void add_block(const Block& block, const Int8Rows& rows, const int64_t* numbers, float* out) {
  constexpr int64_t kInputs = step_inputs(kCode);
  constexpr int32_t kZero = StepCodes<kCode>::kZero;
  const int8_t* x[kRows];
  for (int r = 0; r < kRows; r++) x[r] = rows.codes + numbers[r] * rows.stride + block.number * rows.block;
  for (int column = 0; column < kPanel; column += kTileOutputs) {
    IntVec sums[kRows][kTileVecs];
    for (int r = 0; r < kRows; r++) {
      for (int j = 0; j < kTileVecs; j++) sums[r][j] = set1_bits(0);
    }
    const uint8_t* from = block.codes + column * 4;
    for (int64_t step = 0; step < block.steps; step++, from += kCodesBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(from) + kMostBlockInputs / kInputs * kCodesBytes, _MM_HINT_T0);
      for (int j = 0; j < kTileVecs; j++) {
        const StepCodes<kCode> step_codes(load_bits(from + j * kLanes * 4));
        for (int r = 0; r < kRows; r++) sums[r][j] = step_codes.add(sums[r][j], x[r] + step * kInputs);
      }
    }
    for (int j = 0; j < kTileVecs; j++) {
      const int output = column + j * kLanes;
      const BlockScales<kCode, kHasZero> scales(block.format, block.head, block.factor, output, kZero);
      for (int r = 0; r < kRows; r++) {
        scales.add(sums[r][j], rows, numbers[r] * rows.blocks + block.number, kZero, out + r * kPanel + output);
      }
    }
  }
}

#if defined(__AMX_INT8__)
// Signed bytes of a block's codes, as tiles read them: rows of four inputs of 64 outputs.
template <int kCode>
void decode_bytes(const Block& block, uint8_t* bytes) {
  if constexpr (kCode == kInt8) {
    std::memcpy(bytes, block.codes, block.steps * kCodesBytes);
    return;
  }
  const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  for (int64_t step = 0; step < block.steps; step++, bytes += 2 * kCodesBytes) {
    for (int64_t byte = 0; byte < kCodesBytes; byte += 64) {
      const IntVec codes = load_bits(block.codes + step * kCodesBytes + byte);
      IntVec low = and_bits(codes, set1_bits(0x0f0f0f0f)), high = and_bits(shift_right(codes, 4), set1_bits(0x0f0f0f0f));
      if constexpr (kCode == kFp4) {
        low = lookup(table, low);
        high = lookup(table, high);
      } else {
        low = _mm512_sub_epi8(low, set1_bits(0x08080808));
        high = _mm512_sub_epi8(high, set1_bits(0x08080808));
      }
      store_bits(bytes + byte, low);
      store_bits(bytes + kCodesBytes + byte, high);
    }
  }
}

constexpr int64_t kTileInputs = 64;  // of a product of tiles of bytes

// The same as add_block for any number of rows, by products of tiles. The caller holds TileRegisters.
template <int kCode, bool kHasZero>
void add_block_tiles(const Block& block, const Int8Rows& rows, const int64_t* numbers, int64_t count, float* out) {
  alignas(64) uint8_t bytes[kMostBlockInputs * kPanel];
  alignas(64) int8_t inputs[kUnitRows * kMostBlockInputs];
  alignas(64) int32_t sums[kUnitRows * kPanel];
  decode_bytes<kCode>(block, bytes);
  const int64_t used = std::min(rows.block, rows.stride - block.number * rows.block);
  const int64_t tiles = ceil_div(used, kTileInputs);
  std::memset(inputs, 0, sizeof(inputs));  // what lies beyond a block is multiplied with 0
  const auto scales_at = [&](int j) {
    return BlockScales<kCode, kHasZero>(block.format, block.head, block.factor, j * kLanes, 0);
  };
  const BlockScales<kCode, kHasZero> scales[kTileVecs] = {scales_at(0), scales_at(1), scales_at(2), scales_at(3)};
  for (int64_t first = 0; first < count; first += kUnitRows) {
    const int64_t together = std::min(kUnitRows, count - first);
    for (int64_t i = 0; i < together; i++) {
      const int8_t* x = rows.codes + numbers[first + i] * rows.stride + block.number * rows.block;
      std::memcpy(inputs + i * kMostBlockInputs, x, used);
    }
    zero_sums();
    for (int64_t tile = 0; tile < tiles; tile++) {
      const uint8_t* weights = bytes + tile * kTileInputs / 4 * kCodesBytes;
      _tile_loadd(4, inputs + tile * kTileInputs, kMostBlockInputs);
      _tile_loadd(5, weights, kCodesBytes);
      _tile_dpbssd(0, 4, 5);
      _tile_loadd(6, weights + 64, kCodesBytes);
      _tile_dpbssd(1, 4, 6);
      _tile_loadd(7, weights + 128, kCodesBytes);
      _tile_dpbssd(2, 4, 7);
      _tile_loadd(5, weights + 192, kCodesBytes);
      _tile_dpbssd(3, 4, 5);
    }
    store_sums(sums);
    for (int64_t i = 0; i < together; i++) {
      const int64_t place = numbers[first + i] * rows.blocks + block.number;
      for (int j = 0; j < kTileVecs; j++) {
        scales[j].add(load_bits(sums + i * kPanel + j * kLanes), rows, place, 0, out + (first + i) * kPanel + j * kLanes);
      }
    }
  }
}
#endif

// `out[i][0 .. 64)` = the products of the rows with these numbers with a panel of `inputs` inputs.
template <int kCode, bool kHasZero>
void multiply_int8(const QuantFormat& format, const PanelShape& shape, const Int8Rows& rows, const int64_t* numbers,
                   int64_t count, const uint8_t* panel, int64_t inputs, float* out) {
  const auto* factor = reinterpret_cast<const float*>(panel);
  std::fill_n(out, count * kPanel, 0.0f);
#if defined(__AMX_INT8__)
  const TileRegisters registers;
#endif
  for (int64_t number = 0; number < rows.blocks; number++) {
    const int64_t first = number * rows.block, group = first / shape.group;
    const int64_t steps = ceil_div(std::min(rows.block, inputs - first), shape.inputs_of_step);
    const uint8_t* head = panel + shape.head_at(group);
    const uint8_t* codes = head + shape.head_bytes + (first - group * shape.group) / shape.inputs_of_step * kCodesBytes;
    const Block block{format, factor, head, codes, number, steps};
#if defined(__AMX_INT8__)
    if (count > kTileRows) {
      add_block_tiles<kCode, kHasZero>(block, rows, numbers, count, out);
      continue;
    }
#endif
    for_tiles(count, [&](int64_t row, int tile_rows) {
      with_rows(tile_rows, [&](auto constant) {
        add_block<decltype(constant)::value, kCode, kHasZero>(block, rows, numbers + row, out + row * kPanel);
      });
    });
  }
}

inline void multiply_int8(const QuantFormat& format, const PanelShape& shape, const Int8Rows& rows,
                          const int64_t* numbers, int64_t count, const uint8_t* panel, int64_t inputs, float* out) {
  const auto multiply = format.code == kFp4 ? multiply_int8<kFp4, false>
                        : format.code == kInt4
                            ? (format.has_zero ? multiply_int8<kInt4, true> : multiply_int8<kInt4, false>)
                            : (format.has_zero ? multiply_int8<kInt8, true> : multiply_int8<kInt8, false>);
  multiply(format, shape, rows, numbers, count, panel, inputs, out);
}

}  // namespace moe
