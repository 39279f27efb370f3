// Products of a panel of quantised weights with rows in int8 [int8_rows.h].
//
// A panel is multiplied run by run: neighbouring blocks of together at most 128 inputs, whose codes fit the L1 cache. If
// rows need several tiles, the codes of 4 bits are decoded into bytes once for all of them.
#pragma once

#include "int8_rows.h"

namespace moe {

constexpr int64_t kRunInputs = kMostBlockInputs;
constexpr int64_t kMostRunBlocks = kRunInputs / kMostStepInputs;
constexpr int64_t kAheadBytes = 8192;  // from the codes that are read to those that are prefetched

// One block of a panel: the head of its group, its codes, and how many steps.
struct Block {
  const uint8_t *head, *codes;
  int64_t number, steps;
};

// The blocks of a run, and what their sums are multiplied with and lessened by.
struct Run {
  int count = 0;
  Block blocks[kMostRunBlocks];
  alignas(64) float scales[kMostRunBlocks][kPanel];
  alignas(64) int32_t zeros[kMostRunBlocks][kPanel];  // only of weights with zeros
};

// Fills a run with the blocks from `first` on. `base` stands for 0 among the integers that are multiplied.
template <int kCode, bool kHasZero>
void start_run(const QuantFormat& format, const PanelShape& shape, const Int8Rows& rows, const uint8_t* panel,
               int64_t inputs, int64_t first, int32_t base, Run& run) {
  const auto* factor = reinterpret_cast<const float*>(panel);
  run.count = static_cast<int>(std::min(kRunInputs / rows.block, rows.blocks - first));
  for (int b = 0; b < run.count; b++) {
    const int64_t number = first + b, input = number * rows.block, group = input / shape.group;
    const uint8_t* head = panel + shape.head_at(group);
    const uint8_t* codes = head + shape.head_bytes + (input - group * shape.group) / shape.inputs_of_step * kCodesBytes;
    run.blocks[b] = {head, codes, number, ceil_div(std::min(rows.block, inputs - input), shape.inputs_of_step)};
    for (int64_t line = 0; line < shape.head_bytes; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(head + line) + kAheadBytes, _MM_HINT_T0);
    }
    for (int output = 0; output < kPanel; output += kLanes) {
      const Vec scale = load_scales(format.scale, head, factor, output);
      store(run.scales[b] + output, kCode == kFp4 ? scale * set1(0.5f) : scale);
      if constexpr (kHasZero) {
        store_bits(run.zeros[b] + output, add_int32(int_of(load_zeros(format, head, output)), set1_bits(base)));
      }
    }
  }
}

// `out` + the scaled products of a row's block with one vector of outputs.
template <bool kHasZero, bool kHasBase>
inline Vec add_scaled(const Run& run, int b, int output, IntVec products, const Int8Rows& rows, int64_t row, Vec out) {
  const int64_t place = row * rows.blocks + run.blocks[b].number;
  if constexpr (kHasZero) {
    products = sub_int32(products, mul_int32(load_bits(run.zeros[b] + output), set1_bits(rows.sums[place])));
  } else if constexpr (kHasBase) {
    products = sub_int32(products, set1_bits(rows.sums[place]));
  }
  return fma(float_of(products) * load(run.scales[b] + output), set1(rows.scales[place]), out);
}

// --- vectors ---

// Adds products of four unsigned and four signed bytes to each lane.
#if defined(__AVX512VNNI__)
inline IntVec add_byte_products(IntVec sum, IntVec a, IntVec b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
inline IntVec add_byte_products(IntVec sum, IntVec a, IntVec b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#else
inline IntVec add_byte_products(IntVec sum, IntVec, IntVec) { return sum; }  // not called
#endif

// One vector of outputs in one step, as bytes that are multiplied with a row's inputs.
template <int kCode>
struct StepBytes {
  // Steps of which 16 bits hold the sum of products: of 4 * 15 * 127, or 4 * 24 * 127 in FP4. 0: sums have 32 bits.
  static constexpr int kShortSteps = kByteProducts ? 0 : kCode == kInt4 ? 4 : 2;
  static constexpr bool kDecodes = true;
  IntVec low, high;

  static StepBytes of_codes(const uint8_t* codes) {
    const IntVec found = load_bits(codes), mask = set1_bits(0x0f0f0f0f);
    StepBytes bytes{and_bits(found, mask), and_bits(shift_right(found, 4), mask)};
    if constexpr (kCode == kFp4) {
      const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
      bytes = {lookup(table, bytes.low), lookup(table, bytes.high)};
    }
    return bytes;
  }

  static StepBytes of_decoded(const uint8_t* bytes) { return {load_bits(bytes), load_bits(bytes + kCodesBytes)}; }

  IntVec add(IntVec sum, const int8_t* inputs) const {
    const IntVec first = broadcast_word(inputs), second = broadcast_word(inputs + 4);
    if constexpr (kByteProducts) return add_byte_products(add_byte_products(sum, low, first), high, second);
    return add_int16(add_int16(sum, pairs_of_products(low, first)), pairs_of_products(high, second));
  }
};

template <>
struct StepBytes<kInt8> {
  static constexpr int kShortSteps = 0;
  static constexpr bool kDecodes = false;
  IntVec sizes, codes;

  static StepBytes of_codes(const uint8_t* from) {
    const IntVec codes = load_bits(from);
    if constexpr (kByteProducts) return {xor_bits(codes, set1_bits(static_cast<int32_t>(0x80808080))), codes};
    return {size_of(codes), codes};
  }

  IntVec add(IntVec sum, const int8_t* inputs) const {
    const IntVec words = broadcast_word(inputs);
    if constexpr (kByteProducts) return add_byte_products(sum, sizes, words);
    // Two products of 128 * 127 fit into 16 bits.
    return add_int32(sum, add_pairs(pairs_of_products(sizes, with_sign(words, codes))));
  }
};

// Vectors of outputs for a number of rows: as many as there are registers for their sums.
template <int kCode>
constexpr int run_vecs(int rows) {
  const int registers = kTileRows * kTileVecs / (StepBytes<kCode>::kShortSteps ? 2 : 1);
  int vecs = kPanel / kLanes;
  while (vecs > 1 && vecs * rows > registers) vecs /= 2;
  return vecs;
}

// Where a run's bytes come from: its codes in the panel, or decoded bytes.
template <int kCode>
struct CodedRun {
  static StepBytes<kCode> at(const Block& block, int64_t step, int output) {
    const uint8_t* from = block.codes + step * kCodesBytes + output * 4;
    _mm_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes, _MM_HINT_T0);
    return StepBytes<kCode>::of_codes(from);
  }
};

template <int kCode>
struct DecodedRun {
  const uint8_t* bytes;
  int64_t first_block, block_bytes;

  StepBytes<kCode> at(const Block& block, int64_t step, int output) const {
    return StepBytes<kCode>::of_decoded(bytes + (block.number - first_block) * block_bytes + step * 2 * kCodesBytes +
                                        output * 4);
  }
};

// Adds the products of some rows with a block's steps to `sums`; `output` is the first of the vectors' outputs.
template <int kCode, int kRows, int kVecs, class Source>
inline void add_steps(const Source& source, const Block& block, int output, const int8_t* const (&x)[kRows],
                      IntVec (&sums)[kRows][kVecs]) {
  using Bytes = StepBytes<kCode>;
  constexpr int64_t kInputs = step_inputs(kCode);
  const auto add = [&](int64_t step, IntVec(&to)[kRows][kVecs]) {
    for (int j = 0; j < kVecs; j++) {
      const Bytes bytes = source.at(block, step, output + j * kLanes);
      for (int r = 0; r < kRows; r++) to[r][j] = bytes.add(to[r][j], x[r] + step * kInputs);
    }
  };
  if constexpr (Bytes::kShortSteps == 0) {
    for (int64_t step = 0; step < block.steps; step++) add(step, sums);
  } else {
    for (int64_t step = 0; step < block.steps;) {
      IntVec shorts[kRows][kVecs];
      for (auto& row : shorts) std::fill_n(row, kVecs, set1_bits(0));
      for (const int64_t end = std::min<int64_t>(step + Bytes::kShortSteps, block.steps); step < end; step++) {
        add(step, shorts);
      }
      for (int r = 0; r < kRows; r++) {
        for (int j = 0; j < kVecs; j++) sums[r][j] = add_int32(sums[r][j], add_pairs(shorts[r][j]));
      }
    }
  }
}

// Adds the products of some rows with a run to `out[r][0 .. 64)`.
template <int kRows, int kCode, bool kHasZero, class Source>
void add_run(const Run& run, const Source& source, const Int8Rows& rows, const int64_t* numbers, float* out) {
  constexpr int kVecs = run_vecs<kCode>(kRows);
  for (int column = 0; column < kPanel; column += kVecs * kLanes) {
    Vec totals[kRows][kVecs];
    for (int r = 0; r < kRows; r++) {
      for (int j = 0; j < kVecs; j++) totals[r][j] = load(out + r * kPanel + column + j * kLanes);
    }
    for (int b = 0; b < run.count; b++) {
      const Block& block = run.blocks[b];
      const int8_t* x[kRows];
      for (int r = 0; r < kRows; r++) x[r] = rows.codes + numbers[r] * rows.stride + block.number * rows.block;
      IntVec sums[kRows][kVecs];
      for (auto& row : sums) std::fill_n(row, kVecs, set1_bits(0));
      add_steps<kCode>(source, block, column, x, sums);
      for (int j = 0; j < kVecs; j++) {
        for (int r = 0; r < kRows; r++) {
          totals[r][j] = add_scaled<kHasZero, zero_byte(kCode) != 0>(run, b, column + j * kLanes, sums[r][j], rows,
                                                                     numbers[r], totals[r][j]);
        }
      }
    }
    for (int r = 0; r < kRows; r++) {
      for (int j = 0; j < kVecs; j++) store(out + r * kPanel + column + j * kLanes, totals[r][j]);
    }
  }
}

template <int kCode, bool kHasZero, class Source>
void add_run(const Run& run, const Source& source, const Int8Rows& rows, const int64_t* numbers, int64_t count,
             float* out) {
  for_tiles(count, [&](int64_t row, int tile_rows) {
    with_rows(tile_rows, [&](auto constant) {
      add_run<decltype(constant)::value, kCode, kHasZero>(run, source, rows, numbers + row, out + row * kPanel);
    });
  });
}

// Adds the products of any number of rows with a run. The bytes of several tiles are decoded once.
template <int kCode, bool kHasZero>
void add_run_vectors(const Run& run, const Int8Rows& rows, const int64_t* numbers, int64_t count, float* out) {
  if constexpr (StepBytes<kCode>::kDecodes) {
    if (count > kTileRows) {
      alignas(64) uint8_t bytes[kRunInputs * kPanel];
      const DecodedRun<kCode> decoded{bytes, run.blocks->number, rows.block * kPanel};
      for (int b = 0; b < run.count; b++) {
        uint8_t* to = bytes + b * decoded.block_bytes;
        for (int64_t step = 0; step < run.blocks[b].steps; step++, to += 2 * kCodesBytes) {
          for (int output = 0; output < kPanel; output += kLanes) {
            const auto found = CodedRun<kCode>::at(run.blocks[b], step, output);
            store_bits(to + output * 4, found.low);
            store_bits(to + kCodesBytes + output * 4, found.high);
          }
        }
      }
      return add_run<kCode, kHasZero>(run, decoded, rows, numbers, count, out);
    }
  }
  add_run<kCode, kHasZero>(run, CodedRun<kCode>{}, rows, numbers, count, out);
}

// --- tiles ---

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

// The same for one block, by products of tiles. The caller holds TileRegisters.
template <int kCode, bool kHasZero>
void add_block_tiles(const Run& run, int b, const Int8Rows& rows, const int64_t* numbers, int64_t count, float* out) {
  const Block& block = run.blocks[b];
  alignas(64) uint8_t bytes[kMostBlockInputs * kPanel];
  alignas(64) int8_t inputs[kUnitRows * kMostBlockInputs];
  alignas(64) int32_t sums[kUnitRows * kPanel];
  decode_bytes<kCode>(block, bytes);
  const int64_t used = std::min(rows.block, rows.stride - block.number * rows.block);
  const int64_t tiles = ceil_div(used, kTileInputs);
  std::memset(inputs, 0, sizeof(inputs));  // what lies beyond a block is multiplied with 0
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
      for (int output = 0; output < kPanel; output += kLanes) {
        float* to = out + (first + i) * kPanel + output;
        const IntVec products = load_bits(sums + i * kPanel + output);
        store(to, add_scaled<kHasZero, false>(run, b, output, products, rows, numbers[first + i], load(to)));
      }
    }
  }
}
#endif

// `out[i][0 .. 64)` = the products of the rows with these numbers with a panel of `inputs` inputs.
template <int kCode, bool kHasZero>
void multiply_int8(const QuantFormat& format, const PanelShape& shape, const Int8Rows& rows, const int64_t* numbers,
                   int64_t count, const uint8_t* panel, int64_t inputs, float* out) {
  std::fill_n(out, count * kPanel, 0.0f);
#if defined(__AMX_INT8__)
  const TileRegisters registers;
  const bool in_tiles = count > kTileRows;
#else
  constexpr bool in_tiles = false;
#endif
  Run run;
  for (int64_t first = 0; first < rows.blocks; first += run.count) {
    start_run<kCode, kHasZero>(format, shape, rows, panel, inputs, first, in_tiles ? 0 : zero_byte(kCode), run);
#if defined(__AMX_INT8__)
    if (in_tiles) {
      for (int b = 0; b < run.count; b++) add_block_tiles<kCode, kHasZero>(run, b, rows, numbers, count, out);
      continue;
    }
#endif
    add_run_vectors<kCode, kHasZero>(run, rows, numbers, count, out);
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
