// Matrix products with packed weights.
//
// Packed form of a weight [N, K]: panels of 64 outputs; within a panel one step after the other, a step being the 64
// outputs' values of one input (float32) or of two neighbouring inputs (bf16), 256 bytes either way:
//
//     packed[panel][step][output][input within the step]
//
// What lies beyond N or K is zero. A step multiplies 64 weights (or pairs) with one input (or pair) that is broadcast,
// so an output's sum runs over the inputs in one order, in one float32 lane, whatever the number of rows: a row's
// result does not depend on the rows around it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace moe {

constexpr int kPanel = 64;

template <class T>
constexpr int kStepInputs = sizeof(float) / sizeof(T);

template <class T>
constexpr int kStepElements = kPanel * kStepInputs<T>;

// Rows and vectors of outputs in registers at once: accumulators, weights and one broadcast input must fit.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;
#else
constexpr int kTileRows = 4;
constexpr int kTileVecs = 2;
#endif
constexpr int kTileOutputs = kTileVecs * kLanes;

// Rows that pass over a panel in one task.
constexpr int kChunkRows = 96;
// Where rows need several tiles, they pass over so many steps of a panel at a time: two passes wait for memory, and do
// better with what the first level of the caches holds; more wait for their products.
constexpr int64_t block_steps_of(int64_t passes) { return passes == 2 ? 64 : 256; }

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

// Adds the products of one step to kRows x kTileVecs accumulators. `w` is the step of this tile's outputs.
template <int kRows>
inline void add_step(Vec (&sums)[kRows][kTileVecs], const float* const (&x)[kRows], const float* w, int64_t step) {
  Vec weights[kTileVecs];
  for (int j = 0; j < kTileVecs; j++) weights[j] = load(w + j * kLanes);
  for (int r = 0; r < kRows; r++) {
    const Vec input = set1(x[r][step]);
    for (int j = 0; j < kTileVecs; j++) sums[r][j] = fma(input, weights[j], sums[r][j]);
  }
}

template <int kRows>
inline void add_step(Vec (&sums)[kRows][kTileVecs], const bf16* const (&x)[kRows], const bf16* w, int64_t step) {
#if defined(__AVX512BF16__)
  __m512bh weights[kTileVecs];
  for (int j = 0; j < kTileVecs; j++) weights[j] = (__m512bh)load_bits(w + j * 2 * kLanes);
  for (int r = 0; r < kRows; r++) {
    const __m512bh input = (__m512bh)broadcast_word(x[r] + 2 * step);
    for (int j = 0; j < kTileVecs; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], weights[j], input);
  }
#else
  const auto add_half = [&](auto half) {
    Vec weights[kTileVecs];
    for (int j = 0; j < kTileVecs; j++) weights[j] = half(load_bits(w + j * 2 * kLanes));
    for (int r = 0; r < kRows; r++) {
      const Vec input = half(broadcast_word(x[r] + 2 * step));
      for (int j = 0; j < kTileVecs; j++) sums[r][j] = fma(input, weights[j], sums[r][j]);
    }
  };
  add_half([](IntVec pairs) { return even_bf16(pairs); });
  add_half([](IntVec pairs) { return odd_bf16(pairs); });
#endif
}

// One lane of each output: the products of a word of weights with a word of inputs, in the order of `add_step`.
inline Vec add_word(float, Vec sum, IntVec weights, IntVec input) { return fma(vec_of(input), vec_of(weights), sum); }

inline Vec add_word(bf16, Vec sum, IntVec weights, IntVec input) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)input);
#else
  return fma(odd_bf16(input), odd_bf16(weights), fma(even_bf16(input), even_bf16(weights), sum));
#endif
}

// What to ask for while a tile is computed: `step_bytes` from `next` on with every step.
struct Prefetch {
  const char* next;
  int64_t step_bytes;
};

// `out[r][0 .. kTileOutputs)` = (or +=, with `resume`) the products of kRows rows with `steps` steps of a panel.
template <int kRows, bool kAhead, class T>
void multiply_tile(const T* const* rows, int64_t first_input, const T* w, int64_t steps, Prefetch ahead, float* out,
                   bool resume) {
  const T* x[kRows];
  for (int r = 0; r < kRows; r++) x[r] = rows[r] + first_input;
  Vec sums[kRows][kTileVecs];
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kTileVecs; j++) sums[r][j] = resume ? load(out + r * kPanel + j * kLanes) : zero();
  }
  for (int64_t step = 0; step < steps; step++, w += kStepElements<T>) {
    if constexpr (kAhead) {
      for (int byte = 0; byte < 256; byte += 64) _mm_prefetch(ahead.next + byte, _MM_HINT_T1);
      ahead.next += ahead.step_bytes;
    }
    add_step<kRows>(sums, x, w, step);
  }
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kTileVecs; j++) store(out + r * kPanel + j * kLanes, sums[r][j]);
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

template <bool kAhead, class T>
void multiply_tile(int rows, const T* const* x, int64_t first_input, const T* w, int64_t steps, Prefetch ahead,
                   float* out, bool resume) {
  with_rows(rows, [&](auto constant) {
    multiply_tile<decltype(constant)::value, kAhead>(x, first_input, w, steps, ahead, out, resume);
  });
}

// `out[r][0 .. 64)` = (or +=, with `resume`) the products of any number of rows with `steps` steps of a panel.
//
// A single tile reads the panel as a stream, which the processor foresees. Several pass over it block by block, and
// together ask for the block behind it (or the next panel's first), so that memory is read while they compute. A panel
// that was just packed is in the caches: `kStreamed` false.
template <bool kStreamed = true, class T>
void multiply_panel(const T* const* x, int64_t rows, const T* panel, int64_t steps, float* out, bool resume = false) {
  constexpr int64_t kStepBytes = kPanel * 4;
  const int64_t tiles = ceil_div(rows, kTileRows), passes = tiles * (kPanel / kTileOutputs);
  const int64_t block_size = passes == 1 ? steps : block_steps_of(passes);
  for (int64_t block = 0; block < steps; block += block_size) {
    const int64_t block_steps = std::min(block_size, steps - block);
    const T* w = panel + block * kStepElements<T>;
    Prefetch ahead{reinterpret_cast<const char*>(w) + block_size * kStepBytes, kStepBytes / passes};
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int tile_rows = static_cast<int>(ceil_div(rows - row, tiles - tile));  // 7 rows: 4 and 3, not 6 and 1
      for (int column = 0; column < kPanel; column += kTileOutputs) {
        const auto multiply = kStreamed && passes > 1 ? multiply_tile<true, T> : multiply_tile<false, T>;
        multiply(tile_rows, x + row, block * kStepInputs<T>, w + column * kStepInputs<T>, block_steps, ahead,
                 out + row * kPanel + column, resume || block > 0);
        ahead.next += block_steps * ahead.step_bytes;
      }
      row += tile_rows;
    }
  }
}

// Writes rows [first_row, first_row + rows) of a packed weight, from row-major `source`. The packed form must have been
// zero: what lies beyond K is left so.
template <class T>
void pack_rows(const T* source, int64_t stride, int64_t first_row, int64_t rows, int64_t inputs, T* packed) {
  const int64_t per_panel = panel_elements<T>(inputs);
  constexpr int64_t kBlock = 64;  // inputs at a time: a few cache lines of each row
  for (int64_t k0 = 0; k0 < inputs; k0 += kBlock) {
    const int64_t k1 = std::min(inputs, k0 + kBlock);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t row = first_row + i;
      T* out = packed + row / kPanel * per_panel + row % kPanel * kStepInputs<T>;
      const T* in = source + i * stride;
      int64_t k = k0;
      if constexpr (kStepInputs<T> == 2) {
        for (; k + 1 < k1; k += 2) std::memcpy(out + k / 2 * kStepElements<T>, in + k, 4);
      }
      for (; k < k1; k++) out[k / kStepInputs<T> * kStepElements<T> + k % kStepInputs<T>] = in[k];
    }
  }
}

// The inverse of pack_rows.
template <class T>
void unpack_rows(const T* packed, int64_t first_row, int64_t rows, int64_t inputs, T* out) {
  const int64_t per_panel = panel_elements<T>(inputs);
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = first_row + i;
    const T* in = packed + row / kPanel * per_panel + row % kPanel * kStepInputs<T>;
    for (int64_t k = 0; k < inputs; k++) {
      out[i * inputs + k] = in[k / kStepInputs<T> * kStepElements<T> + k % kStepInputs<T>];
    }
  }
}

}  // namespace moe
