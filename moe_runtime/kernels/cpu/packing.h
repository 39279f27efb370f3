// Row-major weights to panels [gemm.h] and back.
#pragma once

#include "gemm.h"

namespace moe {

constexpr int64_t kPackedSteps = 64;  // packed at a time: a few cache lines of each row

// Calls `body(first, count)` for all steps of a panel, at most `kPackedSteps` at a time.
template <class Body>
void for_steps(int64_t steps, const Body& body) {
  for (int64_t first = 0; first < steps; first += kPackedSteps) body(first, std::min(kPackedSteps, steps - first));
}

// Steps of a panel from at most 64 rows; zeros where there is no row or input.
template <class T>
void interleave(const T* source, int64_t stride, int64_t rows, int64_t inputs, int64_t first, int64_t count, T* steps) {
  const int64_t k0 = first * kStepInputs<T>, k1 = std::min(inputs, (first + count) * kStepInputs<T>);
  if (rows < kPanel || k1 - k0 < count * kStepInputs<T>) std::memset(steps, 0, count * kStepElements<T> * sizeof(T));
  for (int64_t row = 0; row < rows; row++) {
    const T* in = source + row * stride;
    T* out = steps + row * kStepInputs<T>;
    int64_t k = k0;
    for (; k + kStepInputs<T> <= k1; k += kStepInputs<T>, out += kStepElements<T>) std::memcpy(out, in + k, 4);
    if (k < k1) *out = in[k];
  }
}

// The inverse, for one row of the panel.
template <class T>
void take_row(const T* steps, int64_t row, int64_t inputs, int64_t first, int64_t count, T* out) {
  const int64_t k0 = first * kStepInputs<T>, k1 = std::min(inputs, (first + count) * kStepInputs<T>);
  const T* in = steps + row * kStepInputs<T>;
  for (int64_t k = k0; k < k1; k++) out[k] = in[(k - k0) / kStepInputs<T> * kStepElements<T> + k % kStepInputs<T>];
}

inline int64_t panel_bytes(float, int64_t inputs) { return panel_elements<float>(inputs) * sizeof(float); }
inline int64_t panel_bytes(bf16, int64_t inputs) { return coded_panel_bytes(num_steps<bf16>(inputs)); }

// Packs one panel from at most 64 rows.
inline void pack_panel(const float* source, int64_t stride, int64_t rows, int64_t inputs, void* packed, Escape**) {
  float* out = static_cast<float*>(packed);
  for_steps(num_steps<float>(inputs), [&](int64_t first, int64_t count) {
    interleave(source, stride, rows, inputs, first, count, out + first * kStepElements<float>);
  });
}

// `*escapes` is the list of the weight that was here before, or null; the old list is freed.
inline void pack_panel(const bf16* source, int64_t stride, int64_t rows, int64_t inputs, void* packed,
                       Escape** escapes) {
  int64_t uses[2][256] = {};  // neighbours use separate counters: increments of one counter would wait for each other
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t k = 0; k < inputs; k++) uses[k & 1][source[row * stride + k].bits >> 8]++;
  }
  for (int byte = 0; byte < 256; byte++) uses[0][byte] += uses[1][byte];
  const int64_t steps = num_steps<bf16>(inputs);
  uses[0][0] += steps * kStepWords - rows * inputs;
  PanelCoder coder(uses[0], static_cast<uint8_t*>(packed));
  alignas(64) bf16 words[kPackedSteps * kStepWords];
  for_steps(steps, [&](int64_t first, int64_t count) {
    interleave(source, stride, rows, inputs, first, count, words);
    for (int64_t step = 0; step < count; step++) coder.add(words + step * kStepWords);
  });
  std::free(*escapes);
  *escapes = coder.escapes();
}

// Rows of one panel, row-major.
inline void unpack_panel(const float* panel, int64_t first_row, int64_t rows, int64_t inputs, float* out) {
  for (int64_t i = 0; i < rows; i++) take_row(panel, first_row + i, inputs, 0, inputs, out + i * inputs);
}

inline void unpack_panel(const CodedPanel& panel, int64_t first_row, int64_t rows, int64_t inputs, bf16* out) {
  alignas(64) bf16 words[kPackedSteps * kStepWords];
  const Escape* escape = first_escape(panel);
  for_steps(num_steps<bf16>(inputs), [&](int64_t first, int64_t count) {
    decode_steps(panel, first, count, escape, words);
    for (int64_t i = 0; i < rows; i++) take_row(words, first_row + i, inputs, first, count, out + i * inputs);
  });
}

// Rows [first_row, first_row + rows) of a packed weight, row-major.
template <class T>
void unpack_rows(const void* packed, const Escape* const* escapes, int64_t first_row, int64_t rows, int64_t inputs,
                 T* out) {
  for (int64_t row = first_row; row < first_row + rows;) {
    const int64_t panel = row / kPanel, end = std::min(first_row + rows, (panel + 1) * kPanel);
    unpack_panel(panel_of(T{}, packed, escapes, panel, inputs), row % kPanel, end - row, inputs,
                 out + (row - first_row) * inputs);
    row = end;
  }
}

}  // namespace moe
