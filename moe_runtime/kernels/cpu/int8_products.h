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

// What `passes` tiles prefetch while they multiply with a block. Each asks for its part in the order of memory; tiles
// read their vectors in another order, in which memory answers more slowly.
inline Prefetch ahead_of(const uint8_t* codes, int64_t passes) {
  return {reinterpret_cast<const char*>(codes) + kAheadBytes, ceil_div(kLanes * 4, passes)};
}

inline void ask(Prefetch& ahead) {
  _mm_prefetch(ahead.next, _MM_HINT_T0);
  asm volatile("");  // keeps its place: a whole step's lines at once stall
  ahead.next += ahead.step_bytes;
}

// One block of a panel: its codes, and how many steps.
struct Block {
  const uint8_t* codes;
  int64_t number, steps;
};

// The blocks of a run, and what their sums are multiplied with and lessened by.
struct Run {
  int count = 0;
  Block blocks[kMostRunBlocks];
  alignas(64) float scales[kMostRunBlocks][kPanel];
  alignas(64) int32_t zeros[kMostRunBlocks][kPanel];  // only of weights with zeros
  alignas(64) float offsets[kMostRunBlocks][kPanel];  // only of weights with offsets
};

// Fills a run with the blocks from `first` on. `base` stands for 0 among the integers that are multiplied.
template <int kCode, Term kTerm>
void start_run(const QuantFormat& format, const PanelShape& shape, const Int8Rows& rows, const uint8_t* panel,
               int64_t inputs, int64_t first, int32_t base, Run& run) {
  run.count = static_cast<int>(std::min(kRunInputs / rows.block, rows.blocks - first));
  for (int b = 0; b < run.count; b++) {
    const int64_t number = first + b, input = number * rows.block, group = input / shape.group;
    const auto of_group = GroupHead::at(shape, panel, group);
    const uint8_t* head = of_group.head;
    const uint8_t* codes = head + shape.head_bytes + (input - group * shape.group) / shape.inputs_of_step * kCodesBytes;
    run.blocks[b] = {codes, number, ceil_div(std::min(rows.block, inputs - input), shape.inputs_of_step)};
    for (int64_t line = 0; line < shape.head_bytes; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(head + line) + kAheadBytes, _MM_HINT_T0);
    }
    for (int output = 0; output < kPanel; output += kLanes) {
      const Vec scale = load_scales(format, of_group, output);
      store(run.scales[b] + output, kCode == kFp4 ? scale * set1(0.5f) : scale);
      if constexpr (kTerm == kZeros) {
        store_bits(run.zeros[b] + output, add_int32(int_of(load_zeros(format, of_group, output)), set1_bits(base)));
      }
      if constexpr (kTerm == kOffsets) store(run.offsets[b] + output, load_offsets(format, of_group, output));
    }
  }
}

// Some rows' inputs, scales and sums in a run.
template <int kRows>
struct RunRows {
  alignas(64) int8_t inputs[kRows][kRunInputs];
  float scales[kMostRunBlocks][kRows];
  int32_t sums[kMostRunBlocks][kRows];

  RunRows(const Run& run, const Int8Rows& rows, const int64_t* numbers) {
    const int64_t first = run.blocks->number;
    for (int r = 0; r < kRows; r++) {
      // Maybe more than there are; the memory behind the rows is readable [engine.h].
      std::memcpy(inputs[r], rows.codes + numbers[r] * rows.stride + first * rows.block, kRunInputs);
      const int64_t place = numbers[r] * rows.blocks + first;
      for (int b = 0; b < run.count; b++) {
        scales[b][r] = rows.scales[place + b];
        sums[b][r] = rows.sums[place + b];
      }
    }
  }
};

// `out` + the scaled products of a row's block with one vector of outputs. `sum` is that of the row's codes.
template <Term kTerm, int32_t kBase>
inline Vec add_scaled(const Run& run, int b, int output, IntVec products, float scale, int32_t sum, Vec out) {
  if constexpr (kTerm == kZeros) {
    products = sub_int32(products, mul_int32(load_bits(run.zeros[b] + output), set1_bits(sum)));
  } else if constexpr (kBase != 0) {
    products = sub_int32(products, set1_bits(kTerm == kOffsets ? kBase * sum : sum));
  }
  Vec scaled = float_of(products) * load(run.scales[b] + output);
  if constexpr (kTerm == kOffsets) scaled = scaled + load(run.offsets[b] + output) * set1(static_cast<float>(sum));
  return fma(scaled, set1(scale), out);
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
  static constexpr int kShortSteps = kByteProducts ? 0 : kCode == kFp4 ? 2 : 4;
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

  // A row's inputs, the same in all lanes.
  struct Words {
    IntVec low, high;
    explicit Words(const int8_t* inputs) : low(broadcast_word(inputs)), high(broadcast_word(inputs + 4)) {}
  };

  IntVec add(IntVec sum, const Words& words) const {
    if constexpr (kByteProducts) return add_byte_products(add_byte_products(sum, low, words.low), high, words.high);
    return add_int16(add_int16(sum, pairs_of_products(low, words.low)), pairs_of_products(high, words.high));
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

  struct Words {
    IntVec words;
    explicit Words(const int8_t* inputs) : words(broadcast_word(inputs)) {}
  };

  IntVec add(IntVec sum, const Words& row) const {
    if constexpr (kByteProducts) return add_byte_products(sum, sizes, row.words);
    // Two products of 128 * 127 fit into 16 bits.
    return add_int32(sum, add_pairs(pairs_of_products(sizes, with_sign(row.words, codes))));
  }
};

// Vectors of sums that compilers keep in registers; with 24, GCC 12 stores and loads most of them in every step.
constexpr int kRunSums = kLanes == 16 ? 12 : 8;

// Vectors of outputs for a number of rows: as many as there are registers for. Products of INT8 from pairs need
// registers for themselves.
template <int kCode>
constexpr int run_vecs(int rows) {
  int vecs = kPanel / kLanes;
  while (vecs * rows > kRunSums) vecs /= 2;
  return kCode == kInt8 && !kByteProducts && rows > 2 ? vecs / 2 : vecs;
}

// Where a run's bytes come from: its codes in the panel, or decoded bytes.
template <int kCode>
struct CodedRun {
  static constexpr bool kIsDecoded = false;

  static StepBytes<kCode> at(const Block& block, int64_t step, int output) {
    return StepBytes<kCode>::of_codes(block.codes + step * kCodesBytes + output * 4);
  }
};

template <int kCode>
struct DecodedRun {
  static constexpr bool kIsDecoded = true;

  static StepBytes<kCode> at(const Block& block, int64_t step, int output) {
    return StepBytes<kCode>::of_decoded(block.codes + step * 2 * kCodesBytes + output * 4);
  }
};

// Adds the products of some rows with `steps` steps of a block. `output` is the first of the vectors' outputs.
template <int kCode, class Source, int kRows, int kVecs>
inline void add_steps(const Block& block, int64_t first, int64_t end, int output, const int8_t (*x)[kRunInputs],
                      Prefetch& ahead, IntVec (&sums)[kRows][kVecs]) {
  using Bytes = StepBytes<kCode>;
  Prefetch asked = ahead;  // a copy, so that it stays in registers
  for (int64_t step = first; step < end; step++) {
    const auto bytes_at = [&](int j) { return Source::at(block, step, output + j * kLanes); };
    const auto words_of = [&](int r) { return typename Bytes::Words(x[r] + step * step_inputs(kCode)); };
    if constexpr (Source::kIsDecoded) {
      Bytes bytes[kVecs];
      for (int j = 0; j < kVecs; j++) {
        ask(asked);
        bytes[j] = bytes_at(j);
      }
      for (int r = 0; r < kRows; r++) {
        const auto words = words_of(r);
        for (int j = 0; j < kVecs; j++) sums[r][j] = bytes[j].add(sums[r][j], words);
      }
    } else {
      for (int j = 0; j < kVecs; j++) {
        const Bytes bytes = bytes_at(j);
        for (int r = 0; r < kRows; r++) sums[r][j] = bytes.add(sums[r][j], words_of(r));
        ask(asked);
      }
    }
  }
  ahead = asked;
}

// Sums of 32 bits of the products of some rows with a block.
template <int kCode, class Source, int kRows, int kVecs>
inline void block_products(const Block& block, int output, const int8_t (*x)[kRunInputs], Prefetch& ahead,
                           IntVec (&sums)[kRows][kVecs]) {
  constexpr int kShortSteps = StepBytes<kCode>::kShortSteps;
  for (auto& row : sums) std::fill_n(row, kVecs, set1_bits(0));
  if constexpr (kShortSteps == 0) {
    add_steps<kCode, Source>(block, 0, block.steps, output, x, ahead, sums);
  } else {
    for (int64_t step = 0; step < block.steps; step += kShortSteps) {
      IntVec shorts[kRows][kVecs];
      for (auto& row : shorts) std::fill_n(row, kVecs, set1_bits(0));
      const int64_t end = std::min<int64_t>(step + kShortSteps, block.steps);
      add_steps<kCode, Source>(block, step, end, output, x, ahead, shorts);
      for (int r = 0; r < kRows; r++) {
        for (int j = 0; j < kVecs; j++) sums[r][j] = add_int32(sums[r][j], add_pairs(shorts[r][j]));
      }
    }
  }
}

// Adds the products of some rows with a run to `out[r][0 .. 64)`.
template <int kRows, int kCode, Term kTerm, class Source>
void add_run(const Run& run, const Int8Rows& rows, const int64_t* numbers, Prefetch& ahead, float* out) {
  constexpr int kVecs = run_vecs<kCode>(kRows);
  const RunRows<kRows> tile(run, rows, numbers);
  for (int column = 0; column < kPanel; column += kVecs * kLanes) {
    for (int b = 0; b < run.count; b++) {
      const auto* x = reinterpret_cast<const int8_t(*)[kRunInputs]>(tile.inputs[0] + b * rows.block);
      IntVec sums[kRows][kVecs];
      block_products<kCode, Source>(run.blocks[b], column, x, ahead, sums);
      for (int j = 0; j < kVecs; j++) {
        const int output = column + j * kLanes;
        for (int r = 0; r < kRows; r++) {
          float* to = out + r * kPanel + output;
          store(to, add_scaled<kTerm, zero_byte(kCode)>(run, b, output, sums[r][j], tile.scales[b][r],
                                                        tile.sums[b][r], load(to)));
        }
      }
    }
  }
}

template <int kCode, Term kTerm, class Source>
void add_run(const Run& run, const Int8Rows& rows, const int64_t* numbers, int64_t count, Prefetch ahead, float* out) {
  for_tiles(count, [&](int64_t row, int tile_rows) {
    with_rows(tile_rows, [&](auto constant) {
      add_run<decltype(constant)::value, kCode, kTerm, Source>(run, rows, numbers + row, ahead, out + row * kPanel);
    });
  });
}

// Decodes a block's codes of 4 bits into bytes, less `kLess`, and returns their end. Two steps of four inputs stand for
// one of the block.
template <int kCode, int kLess>
uint8_t* decode_bytes(const Block& block, Prefetch& ahead, uint8_t* to) {
  const IntVec less = set1_bits(kLess * 0x01010101);
  for (int64_t step = 0; step < block.steps; step++, to += 2 * kCodesBytes) {
    for (int output = 0; output < kPanel; output += kLanes) {
      const auto found = CodedRun<kCode>::at(block, step, output);
      ask(ahead);
      store_bits(to + output * 4, kLess ? sub_int8(found.low, less) : found.low);
      store_bits(to + kCodesBytes + output * 4, kLess ? sub_int8(found.high, less) : found.high);
    }
  }
  return to;
}

// Adds the products of any number of rows with a run. The bytes of several tiles are decoded once.
template <int kCode, Term kTerm>
void add_run_vectors(Run& run, const Int8Rows& rows, const int64_t* numbers, int64_t count, float* out) {
  const int64_t tiles = ceil_div(count, kTileRows);
  const bool decodes = StepBytes<kCode>::kDecodes && tiles > 1;
  Prefetch ahead = ahead_of(run.blocks->codes, tiles + decodes);
  if constexpr (StepBytes<kCode>::kDecodes) {
    if (decodes) {
      alignas(64) uint8_t bytes[kRunInputs * kPanel];
      uint8_t* to = bytes;
      for (int b = 0; b < run.count; b++) {
        uint8_t* decoded = to;
        to = decode_bytes<kCode, 0>(run.blocks[b], ahead, to);
        run.blocks[b].codes = decoded;
      }
      return add_run<kCode, kTerm, DecodedRun<kCode>>(run, rows, numbers, count, ahead, out);
    }
  }
  add_run<kCode, kTerm, CodedRun<kCode>>(run, rows, numbers, count, ahead, out);
}

// --- tiles ---

#if defined(__AMX_INT8__)
constexpr int64_t kTileInputs = 64;  // of a product of tiles of bytes

// The same for one block, by products of tiles. The caller holds TileRegisters.
template <int kCode, Term kTerm>
void add_block_tiles(const Run& run, int b, const Int8Rows& rows, const int64_t* numbers, int64_t count, float* out) {
  const Block& block = run.blocks[b];
  alignas(64) uint8_t bytes[kMostBlockInputs * kPanel];
  alignas(64) int8_t inputs[kUnitRows * kMostBlockInputs];
  alignas(64) int32_t sums[kUnitRows * kPanel];
  Prefetch ahead = ahead_of(block.codes, 1);
  if constexpr (kCode == kInt8) {  // signed bytes
    for (int64_t byte = 0; byte < block.steps * kCodesBytes; byte += 64) {
      ask(ahead);
      store_bits(bytes + byte, load_bits(block.codes + byte));
    }
  } else {
    decode_bytes<kCode, zero_byte(kCode)>(block, ahead, bytes);
  }
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
        const int64_t place = numbers[first + i] * rows.blocks + block.number;
        store(to, add_scaled<kTerm, 0>(run, b, output, products, rows.scales[place], rows.sums[place], load(to)));
      }
    }
  }
}
#endif

// `out[i][0 .. 64)` = the products of the rows with these numbers with a panel of `inputs` inputs.
template <int kCode, Term kTerm>
void multiply_int8(const QuantFormat& format, const PanelShape& shape, const Int8Rows& rows, const int64_t* numbers,
                   int64_t count, const uint8_t* panel, int64_t inputs, float* out) {
  std::fill_n(out, count * kPanel, 0.0f);
#if defined(__AMX_INT8__)
  const TileRegisters registers;
  const bool in_tiles = count > 2 * kTileRows;  // fewer are multiplied faster by vectors, which wait less for memory
#else
  constexpr bool in_tiles = false;
#endif
  Run run;
  for (int64_t first = 0; first < rows.blocks; first += run.count) {
    start_run<kCode, kTerm>(format, shape, rows, panel, inputs, first, in_tiles ? 0 : zero_byte(kCode), run);
#if defined(__AMX_INT8__)
    if (in_tiles) {
      for (int b = 0; b < run.count; b++) add_block_tiles<kCode, kTerm>(run, b, rows, numbers, count, out);
      continue;
    }
#endif
    add_run_vectors<kCode, kTerm>(run, rows, numbers, count, out);
  }
}

inline void multiply_int8(const QuantFormat& format, const PanelShape& shape, const Int8Rows& rows,
                          const int64_t* numbers, int64_t count, const uint8_t* panel, int64_t inputs, float* out) {
  const auto multiply = format.code == kFp4     ? multiply_int8<kFp4, kNoTerm>
                        : format.code == kUint4 ? multiply_int8<kUint4, kOffsets>
                        : format.code == kInt4
                            ? (format.term ? multiply_int8<kInt4, kZeros> : multiply_int8<kInt4, kNoTerm>)
                        : format.term == kOffsets ? multiply_int8<kInt8, kOffsets>
                        : format.term             ? multiply_int8<kInt8, kZeros>
                                                  : multiply_int8<kInt8, kNoTerm>;
  multiply(format, shape, rows, numbers, count, panel, inputs, out);
}

}  // namespace moe
