// Matrix products with packed weights.
//
// Packed form of a weight [N, K]: panels of 64 outputs. A panel is a sequence of steps. A step has the 64 outputs'
// values of one input (float32) or of two neighbouring inputs (bf16): 256 bytes either way:
//
//     packed[panel][step][output][input within the step]
//
// Values beyond N or K are zero. bf16 panels are stored as codes [coded.h], except those that attention packs as it
// runs. A step multiplies 64 weights (or pairs) with one input (or pair) that is broadcast. So an output's sum always
// runs over the inputs in the same order, in one float32 lane, for any number of rows: a row's result does not depend
// on the rows around it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "coded.h"

namespace moe {

constexpr int kPanel = 64;

template <class T>
constexpr int kStepInputs = sizeof(float) / sizeof(T);

template <class T>
constexpr int kStepElements = kPanel * kStepInputs<T>;

// A tile's rows, and its vectors of outputs. Accumulators, weights and one broadcast input must fit the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;
#else
constexpr int kTileRows = 4;
constexpr int kTileVecs = 2;
#endif
constexpr int kTileOutputs = kTileVecs * kLanes;
// Vectors of outputs for a number of rows: with few of them there are registers for more, and more sums that don't wait
// for each other.
constexpr int tile_vecs(int64_t rows) { return rows > 2 ? kTileVecs : 4; }
constexpr int64_t kTileSteps = 16;  // steps of one product of tiles on AMX [tiles.h]
#if defined(__AMX_BF16__)
constexpr int kFewRows = 3;  // rows that stay in vector registers: a product of tiles is worth more of them
#else
constexpr int kFewRows = kTileRows;
#endif

// Rows that one task multiplies with a panel.
constexpr int kChunkRows = 96;
// If rows need several tiles, the tiles process a panel in blocks of at most this many steps. One or two passes wait for
// memory, and are faster with a block that fits the L1 cache; more passes are bound by computation.
constexpr int64_t kMaxBlockSteps = 256;
constexpr int64_t block_steps_of(int64_t passes) { return passes <= 2 ? 32 : kMaxBlockSteps; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
int64_t num_steps(int64_t inputs) {
  return ceil_div(inputs, kStepInputs<T>);
}

template <class T>
int64_t panel_elements(int64_t inputs) {
  return num_steps<T>(inputs) * kStepElements<T>;
}

// One float32 or a pair of bf16 in every lane.
inline IntVec broadcast_word(const void* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return set1_bits(word);
}

// The uncoded steps of a panel, from output `column` on, for the outputs of one tile.
template <class T>
class PlainSteps {
 public:
  explicit PlainSteps(const T* w, int column = 0) : next_(w + column * kStepInputs<T>) {}

  // A step's weights, read from memory at each use, because registers are few.
  struct Step {
    const T* w;
    IntVec operator[](int j) const { return load_bits(w + j * kLanes * kStepInputs<T>); }
  };

  static int64_t plain_steps(int64_t count) { return count; }

  Step next() {
    const T* w = next_;
    next_ += kStepElements<T>;
    return {w};
  }

  Step next_escaped() { return next(); }

 private:
  const T* next_;
};

// The same for pairs of inputs of which each has 64 float32.
class WidePairs {
 public:
  explicit WidePairs(const float* w, int column = 0) : next_(w + column) {}

  struct Step {
    const float* w;
    Vec even(int j) const { return load(w + j * kLanes); }
    Vec odd(int j) const { return load(w + kPanel + j * kLanes); }
  };

  static int64_t plain_steps(int64_t count) { return count; }

  Step next() {
    const float* w = next_;
    next_ += 2 * kPanel;
    return {w};
  }

  Step next_escaped() { return next(); }

 private:
  const float* next_;
};

// Adds the products of a row's input each with the outputs' weights, `weight(j)` in order.
template <int kRows, int kVecs, class WeightAt>
inline void add_products(Vec (&sums)[kRows][kVecs], const Vec (&inputs)[kRows], const WeightAt& weight) {
  for (int j = 0; j < kVecs; j++) {
    const Vec w = weight(j);
    for (int r = 0; r < kRows; r++) sums[r][j] = fma(inputs[r], w, sums[r][j]);
  }
}

// Adds the products of one step to kRows x kVecs accumulators. `words[j]` are the step's weights.
template <int kRows, int kVecs, class Step>
inline void add_step(Vec (&sums)[kRows][kVecs], const float* const (&x)[kRows], const Step& words, int64_t step) {
  Vec inputs[kRows];
  for (int r = 0; r < kRows; r++) inputs[r] = set1(x[r][step]);
  add_products(sums, inputs, [&](int j) { return vec_of(words[j]); });
}

template <int kRows, int kVecs, class Step>
inline void add_step(Vec (&sums)[kRows][kVecs], const bf16* const (&x)[kRows], const Step& words, int64_t step) {
#if defined(__AVX512BF16__)
  __m512bh weights[kVecs];
  for (int j = 0; j < kVecs; j++) weights[j] = (__m512bh)words[j];
  for (int r = 0; r < kRows; r++) {
    const __m512bh input = (__m512bh)broadcast_word(x[r] + 2 * step);
    for (int j = 0; j < kVecs; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], weights[j], input);
  }
#else
  Vec inputs[kRows];
  for (int r = 0; r < kRows; r++) inputs[r] = even_bf16(broadcast_word(x[r] + 2 * step));
  add_products(sums, inputs, [&](int j) { return even_bf16(words[j]); });
  for (int r = 0; r < kRows; r++) inputs[r] = odd_bf16(broadcast_word(x[r] + 2 * step));
  add_products(sums, inputs, [&](int j) { return odd_bf16(words[j]); });
#endif
}

template <int kRows, int kVecs>
inline void add_step(Vec (&sums)[kRows][kVecs], const bf16* const (&x)[kRows], const WidePairs::Step& pair, int64_t step) {
  Vec inputs[kRows];
  for (int r = 0; r < kRows; r++) inputs[r] = even_bf16(broadcast_word(x[r] + 2 * step));
  add_products(sums, inputs, [&](int j) { return pair.even(j); });
  for (int r = 0; r < kRows; r++) inputs[r] = odd_bf16(broadcast_word(x[r] + 2 * step));
  add_products(sums, inputs, [&](int j) { return pair.odd(j); });
}

// A sum for each output's lane of the products of weight words and input words, in the order of `add_step`; on AMX in
// that of tile products, which end after every 16 words.
template <class T>
struct WordSums {
  Vec total = zero();

  void add(IntVec weights, IntVec input) {
    if constexpr (std::is_same_v<T, float>) {
      total = fma(vec_of(input), vec_of(weights), total);
    } else {
#if defined(__AVX512BF16__)
      total = _mm512_dpbf16_ps(total, (__m512bh)weights, (__m512bh)input);
#else
      total = fma(odd_bf16(input), odd_bf16(weights), fma(even_bf16(input), even_bf16(weights), total));
#endif
    }
  }

  void end_tile() {}
};

#if defined(__AMX_BF16__)
template <>
struct WordSums<bf16> {
  Vec total = zero(), even = zero(), odd = zero();

  void add(IntVec weights, IntVec input) {
    even = fma(even_bf16(input), even_bf16(weights), even);
    odd = fma(odd_bf16(input), odd_bf16(weights), odd);
  }

  void end_tile() {
    total = total + (even + odd);
    even = odd = zero();
  }
};
#endif

// Memory to prefetch while a tile is computed: `step_bytes`, at most 128, per step, starting at `next`.
struct Prefetch {
  const char* next;
  int64_t step_bytes;
};

// `out[r][0 .. tile_vecs(kRows) * kLanes)` = (or +=, with `resume`) the products of kRows rows with `steps` steps of a
// panel.
template <int kRows, bool kAhead, class T, class Steps>
void multiply_tile(const T* const* rows, int64_t first_input, Steps& panel, int64_t steps, Prefetch ahead, float* out,
                   bool resume) {
  Steps weights = panel;  // a copy, so that it stays in registers
  const T* x[kRows];
  for (int r = 0; r < kRows; r++) x[r] = rows[r] + first_input;
  constexpr int kVecs = tile_vecs(kRows);
  Vec sums[kRows][kVecs];
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kVecs; j++) sums[r][j] = resume ? load(out + r * kPanel + j * kLanes) : zero();
  }
  const auto add = [&](const auto& words, int64_t step) {
    if constexpr (kAhead) {
      _mm_prefetch(ahead.next, _MM_HINT_T1);
      _mm_prefetch(ahead.next + 64, _MM_HINT_T1);
      ahead.next += ahead.step_bytes;
    }
    add_step(sums, x, words, step);
  };
  // The inner loop has no branch for rare cases, which would force the sums into memory.
  for (int64_t step = 0; step < steps; step++) {
    for (const int64_t end = step + weights.plain_steps(steps - step); step < end; step++) add(weights.next(), step);
    if (step < steps) add(weights.next_escaped(), step);
  }
  panel = weights;
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kVecs; j++) store(out + r * kPanel + j * kLanes, sums[r][j]);
  }
}

// Calls `body` with a number of rows, at most kTileRows, as a constant.
template <class Body>
void with_rows(int64_t rows, const Body& body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
#if defined(__AVX512F__)
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
#endif
  }
}

template <bool kAhead, class T, class Steps>
void multiply_tile(int rows, const T* const* x, int64_t first_input, Steps& panel, int64_t steps, Prefetch ahead,
                   float* out, bool resume) {
  with_rows(rows, [&](auto constant) {
    multiply_tile<decltype(constant)::value, kAhead>(x, first_input, panel, steps, ahead, out, resume);
  });
}

// How many tiles pass over a panel.
inline int64_t passes_of(int64_t rows) {
  return ceil_div(rows, kTileRows) * (kPanel / (tile_vecs(std::max<int64_t>(rows, 1)) * kLanes));
}

// Calls `body` with the first row and the number of rows of each tile.
template <class Body>
void for_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t tile = 0, row = 0; tile < tiles; tile++) {
    const int tile_rows = static_cast<int>(ceil_div(rows - row, tiles - tile));  // 7 rows: 4 and 3, not 6 and 1
    body(row, tile_rows);
    row += tile_rows;
  }
}

// `out[r][0 .. 64)` = (or +=, with `resume`) the products of any number of rows with a block of a panel, tile by tile.
template <bool kAhead, class Steps, class T, class Word>
void multiply_block(const T* const* x, int64_t rows, int64_t first_input, const Word* block, int64_t steps,
                    Prefetch ahead, float* out, bool resume) {
  for_tiles(rows, [&](int64_t row, int tile_rows) {
    for (int column = 0; column < kPanel; column += tile_vecs(tile_rows) * kLanes) {
      Steps weights(block, column);
      multiply_tile<kAhead>(tile_rows, x + row, first_input, weights, steps, ahead, out + row * kPanel + column, resume);
      ahead.next += steps * ahead.step_bytes;
    }
  });
}

// `out[r][0 .. 64)` = (or +=, with `resume`) the products of any number of rows with `steps` steps of a panel.
//
// A single tile reads the panel as a stream, which the hardware prefetcher follows. Several tiles take it block by
// block, and prefetch the next block (or the next panel's first), so that memory is read while they compute. A panel
// that was just packed is in the caches: `kStreamed` is false.
template <bool kStreamed = true, class T>
void multiply_panel(const T* const* x, int64_t rows, const T* panel, int64_t steps, float* out, bool resume = false) {
  constexpr int64_t kStepBytes = kPanel * 4;
  const int64_t passes = passes_of(rows), block_size = passes == 1 ? steps : block_steps_of(passes);
  for (int64_t block = 0; block < steps; block += block_size) {
    const int64_t block_steps = std::min(block_size, steps - block);
    const T* w = panel + block * kStepElements<T>;
    const Prefetch ahead{reinterpret_cast<const char*>(w) + block_size * kStepBytes, kStepBytes / passes};
    using Steps = PlainSteps<T>;
    const auto multiply = kStreamed && passes > 1 ? multiply_block<true, Steps, T, T> : multiply_block<false, Steps, T, T>;
    multiply(x, rows, block * kStepInputs<T>, w, block_steps, ahead, out, resume || block > 0);
  }
}

#if !defined(__AMX_BF16__)  // tiles.h has the products with a coded panel on AMX
#if defined(__AVX512BF16__)
// The same for a coded panel: each tile decodes the words that it multiplies, in registers.
inline void multiply_codes(const bf16* const* x, int64_t rows, const CodedPanel& panel, int64_t steps, float* out) {
  using Steps = CodedSteps<false>;
  const int64_t passes = passes_of(rows), block_size = passes == 1 ? steps : kMaxBlockSteps;
  const auto multiply = passes == 1 ? multiply_tile<false, bf16, Steps> : multiply_tile<true, bf16, Steps>;
  Steps weights(panel);
  for (int64_t block = 0; block < steps; block += block_size) {
    const int64_t block_steps = std::min(block_size, steps - block), first_input = block * kStepInputs<bf16>;
    const auto* behind = reinterpret_cast<const char*>(panel.data + coded_panel_bytes(block + block_size));
    Prefetch ahead{behind, kCodedStepBytes / passes};
    const Steps first = weights;
    for_tiles(rows, [&](int64_t row, int tile_rows) {
      weights = first;
      multiply(tile_rows, x + row, first_input, weights, block_steps, ahead, out + row * kPanel, block > 0);
      ahead.next += block_steps * ahead.step_bytes;
    });
  }
}
#endif

// The same for a coded panel. With bf16 product instructions, one or two tiles each decode the weights; with more
// tiles, the first stores a block's decoded words for the others. Without them, blocks are decoded before the product,
// because widened weights need the registers.
inline void multiply_panel(const bf16* const* x, int64_t rows, const CodedPanel& panel, int64_t steps, float* out) {
  const int64_t passes = passes_of(rows), block_size = block_steps_of(passes);
#if defined(__AVX512BF16__)
  if (passes <= 2) return multiply_codes(x, rows, panel, steps, out);
  CodedSteps<true> weights(panel);
  const int first_rows = static_cast<int>(ceil_div(rows, passes));
#else
  const Escape* escape = first_escape(panel);
  constexpr int first_rows = 0;
#endif
  alignas(64) bf16 words[kMaxBlockSteps * kStepWords];
  for (int64_t block = 0; block < steps; block += block_size) {
    const int64_t block_steps = std::min(block_size, steps - block), first_input = block * kStepInputs<bf16>;
    const auto* behind = reinterpret_cast<const char*>(panel.data + coded_panel_bytes(block + block_size));
    Prefetch ahead{behind, kCodedStepBytes / passes};
#if defined(__AVX512BF16__)
    weights.keep_at(words);
    multiply_tile<true>(first_rows, x, first_input, weights, block_steps, ahead, out, block > 0);
    ahead.next += block_steps * ahead.step_bytes;
#else
    decode_steps(panel, block, block_steps, escape, words);
#endif
    multiply_block<true, PlainSteps<bf16>>(x + first_rows, rows - first_rows, first_input, words, block_steps,
                                           ahead, out + first_rows * kPanel, block > 0);
  }
}
#endif

// A panel of a packed weight: float32 as it is, bf16 as codes.
inline const float* panel_of(float, const void* packed, const Escape* const*, int64_t panel, int64_t inputs) {
  return static_cast<const float*>(packed) + panel * panel_elements<float>(inputs);
}

inline CodedPanel panel_of(bf16, const void* packed, const Escape* const* escapes, int64_t panel, int64_t inputs) {
  const auto* data = static_cast<const uint8_t*>(packed) + panel * coded_panel_bytes(num_steps<bf16>(inputs));
  return {data, escapes[panel]};
}

}  // namespace moe
