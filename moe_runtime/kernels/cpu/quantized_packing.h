// Quantised matrices [kernels/quantized.py] to panels [quantized.h], and their values back.
#pragma once

#include "quantized.h"

namespace moe {

// A quantised matrix, row-major; rows of codes, scales and so on follow each other. See kernels/quantized.py.
struct QuantSource {
  const uint8_t *codes, *scales, *zeros, *factors, *offsets, *offset_factors;
};

// The four bytes of a step for one output, from its codes in order.
inline uint32_t step_codes(int32_t code, uint32_t in_order) {
  if (step_inputs(code) == 4) return in_order;
  return _pdep_u32(in_order & 0xffff, 0x0f0f0f0f) | _pdep_u32(in_order >> 16, 0xf0f0f0f0);
}

// Packs at most 64 rows, from `first_row` on.
inline void pack_quantized_panel(const QuantFormat& format, const QuantSource& source, int64_t first_row, int64_t rows,
                                 int64_t inputs, uint8_t* panel) {
  const PanelShape shape(format, inputs);
  const int64_t groups = ceil_div(inputs, shape.group), size = scale_bytes(format.scale);
  const int64_t supers = ceil_div(inputs, shape.super_group), factor_size = scale_bytes(factor_type(format.scale));
  const bool has_offset = format.term == kOffsets;
  const int64_t row_bytes = step_inputs(format.code) == 8 ? ceil_div(inputs, 2) : inputs;
  const uint8_t zero_of_zero = format.code == kInt4 ? 8 : 0;
  std::memset(panel, 0, shape.bytes);
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = first_row + i;
    for (int64_t index = 0; factor_size && index < supers; index++) {
      const int64_t from = (row * supers + index) * factor_size;
      uint8_t* to = panel + index * shape.super_bytes + i * factor_size;
      std::memcpy(to, source.factors + from, factor_size);
      if (has_offset) std::memcpy(to + kPanel * factor_size, source.offset_factors + from, factor_size);
    }
    const uint8_t *codes = source.codes + row * row_bytes, *codes_end = codes + row_bytes;
    for (int64_t group = 0; group < groups; group++) {
      uint8_t* head = panel + shape.head_at(group);
      std::memcpy(head + i * size, source.scales + (row * groups + group) * size, size);
      if (format.term == kZeros) head[kPanel * size + i] = source.zeros[row * groups + group] - zero_of_zero;
      if (has_offset) std::memcpy(head + kPanel * size + i * size, source.offsets + (row * groups + group) * size, size);
      const int64_t count = std::min(shape.group, inputs - group * shape.group);
      uint8_t* to = head + shape.head_bytes + 4 * i;
      for (int64_t done = 0; done < count; done += shape.inputs_of_step, to += kCodesBytes, codes += 4) {
        uint32_t in_order = 0;
        std::memcpy(&in_order, codes, std::min<int64_t>(4, codes_end - codes));
        in_order = step_codes(format.code, in_order);
        std::memcpy(to, &in_order, 4);
      }
    }
  }
}

// Values of rows of a packed matrix, row-major; bf16 values are rounded once.
template <class T>
void unpack_quantized_rows(const QuantFormat& format, const uint8_t* packed, int64_t first_row, int64_t rows,
                           int64_t inputs, T* out) {
  const PanelShape shape(format, inputs);
  alignas(64) float words[kDecodedInputs<float> * kPanel];
  for (int64_t first = 0; first < inputs; first += kDecodedInputs<float>) {
    const int64_t count = std::min(kDecodedInputs<float>, inputs - first);
    int64_t decoded = -1;
    for (int64_t row = first_row; row < first_row + rows; row++) {
      if (const int64_t panel = row / kPanel; panel != decoded) {
        const int64_t end = first + ceil_div(count, shape.inputs_of_step) * shape.inputs_of_step;
        decode_inputs(format, shape, packed + panel * shape.bytes, first, end, words);
        decoded = panel;
      }
      T* to = out + (row - first_row) * inputs + first;
      for (int64_t k = 0; k < count; k++) to[k] = from_float<T>(words[k * kPanel + row % kPanel]);
    }
  }
}

}  // namespace moe
