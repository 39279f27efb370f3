// Panels of quantised weights: weight = (code - zero) * scale [kernels/quantized.py].
//
// A panel [gemm.h] is stored group of inputs after group of inputs, after the outputs' factors if there are any:
//
//     factor[64] float32                  only with E4M3 scales, which are multiplied by it
//     per group: scale[64]; zero[64] int8 only with zeros; steps
//     step: code[64] 4 bytes              of four inputs (8 bits) or eight (4 bits) of each output
//
// A byte has an input's code of 8 bits, or those of input i (low half) and i + 4 (high half). Outputs and inputs that
// do not exist have codes, zeros and scales of 0; the inputs' rows are padded with zeros.
//
// Products use the weights' values: where there are products of bf16 pairs, rounded to bf16, so a quantised matrix gives
// the bits of the bf16 matrix that it stands for; else, and for float32 inputs, in float32.
#pragma once

#include "int_vec.h"
#include "tiles.h"

namespace moe {

// As in types/weight_format.py.
enum Code : int32_t { kInt4 = 2, kFp4 = 3, kInt8 = 4, kFp8 = 5 };
enum ScaleType : int32_t { kScaleFloat32 = 0, kScaleFloat16 = 1, kScaleBf16 = 2, kScaleE8M0 = 3, kScaleE4M3 = 4 };

// `group` 0: all inputs are one group. Zeros only with integers. `int8_rows`: products take rows in int8 [int8_rows.h];
// not with FP8.
struct QuantFormat {
  int32_t code, scale, has_zero, int8_rows;
  int64_t group;
};

constexpr int64_t kCodesBytes = 256;  // of a step
constexpr int kMostStepInputs = 8;    // of a step

constexpr int64_t step_inputs(int32_t code) { return code == kInt4 || code == kFp4 ? 8 : 4; }

inline int64_t scale_bytes(int32_t scale) {
  return scale == kScaleFloat32 ? 4 : scale == kScaleFloat16 || scale == kScaleBf16 ? 2 : 1;
}

// Where things are in a panel of a weight.
struct PanelShape {
  int64_t group, inputs_of_step, factor_bytes, head_bytes, group_bytes, bytes;

  PanelShape(const QuantFormat& format, int64_t inputs)
      : group(format.group ? std::min(format.group, inputs) : inputs),
        inputs_of_step(step_inputs(format.code)),
        factor_bytes(format.scale == kScaleE4M3 ? kPanel * sizeof(float) : 0),
        head_bytes(kPanel * (scale_bytes(format.scale) + (format.has_zero ? 1 : 0))),
        group_bytes(head_bytes + ceil_div(group, inputs_of_step) * kCodesBytes) {
    const int64_t rest = inputs % group;
    bytes = factor_bytes + inputs / group * group_bytes;
    if (rest) bytes += head_bytes + ceil_div(rest, inputs_of_step) * kCodesBytes;
  }

  int64_t head_at(int64_t index) const { return factor_bytes + index * group_bytes; }
};

// --- one vector of outputs ---

// E4M3 in the highest byte of each lane. It has no infinities; NaN is not expected.
inline Vec from_e4m3(IntVec top) {
#if defined(__AVX512F__)
  const IntVec size = _mm512_srli_epi32(_mm512_and_si512(top, set1_bits(0x7f000000)), 4);
  const Vec normal = vec_of(_mm512_add_epi32(size, set1_bits(120 << 23)));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(size, set1_bits(1 << 23));
  // Read as a normal number, m / 8 * 2^-6 is (1 + m / 8) * 2^-7.
  const Vec value = _mm512_mask_fmadd_ps(normal, is_small, set1(2.0f), set1(-0x1p-6f));
  return vec_of(_mm512_or_si512(bits_of(value), _mm512_and_si512(top, set1_bits(INT32_MIN))));
#else
  const IntVec size = _mm256_srli_epi32(_mm256_and_si256(top, set1_bits(0x7f000000)), 4);
  const Vec normal = vec_of(_mm256_add_epi32(size, set1_bits(120 << 23)));
  const Vec is_small = vec_of(_mm256_cmpgt_epi32(set1_bits(1 << 23), size));
  const Vec value = _mm256_blendv_ps(normal, fma(normal, set1(2.0f), set1(-0x1p-6f)), is_small);
  return vec_of(_mm256_or_si256(bits_of(value), _mm256_and_si256(top, set1_bits(INT32_MIN))));
#endif
}

// Byte `i` of each lane as its highest, above zeros, as a number.
inline Vec top_byte(IntVec v, int i) {
  const __m128i places = _mm_add_epi8(_mm_set_epi8(12, -128, -128, -128, 8, -128, -128, -128, 4, -128, -128, -128, 0, -128, -128, -128),
                                      _mm_set1_epi32(i << 24));
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(places)));
#else
  return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(places)));
#endif
}

// Scales of the outputs from `output` on; `factor` is null unless they are E4M3.
inline Vec load_scales(int32_t type, const uint8_t* scales, const float* factor, int output) {
  const uint8_t* at = scales + output * scale_bytes(type);
  switch (type) {
    case kScaleFloat32: return load(reinterpret_cast<const float*>(at));
    case kScaleBf16: return load(reinterpret_cast<const bf16*>(at));
    case kScaleE8M0: return vec_of(shift_left(widen_bytes(at), 23));
    case kScaleE4M3: return load(reinterpret_cast<const e4m3*>(at)) * load(factor + output);
    default:
#if defined(__AVX512F__)
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#else
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#endif
  }
}

// Zeros of the outputs from `output` on.
inline Vec load_zeros(const QuantFormat& format, const uint8_t* head, int output) {
  return load(reinterpret_cast<const int8_t*>(head + kPanel * scale_bytes(format.scale) + output));
}

// Values of integers are read this many times as large, which the scale makes up for: a number in the highest bits of a
// lane needs no shift.
#if defined(__AVX512F__)
template <int kCode>
constexpr float kUnit = kCode == kInt8 ? 0x1p24f : 1.0f;
#else
template <int kCode>
constexpr float kUnit = kCode == kInt8 ? 0x1p24f : kCode == kInt4 ? 0x1p28f : 1.0f;
#endif

// What the codes of input `i` of a step stand for, before zero and scale, times `kUnit`.
template <int kCode>
inline Vec code_value(IntVec codes, int i) {
  if constexpr (kCode == kInt8) return top_byte(codes, i);
  if constexpr (kCode == kFp8) return from_e4m3(shift_left(codes, 24 - 8 * i));
  const int bit = i < 4 ? 8 * i : 8 * (i - 4) + 4;
#if defined(__AVX512F__)
  // A permutation looks at the lowest four bits of its index.
  const Vec table = kCode == kInt4 ? _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
                                   : _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
  return _mm512_permutexvar_ps(shift_right(codes, bit), table);
#else
  if constexpr (kCode == kInt4) {  // 0 to 15 as two's complement of 4 bits: the highest bit is turned
    const IntVec turned = _mm256_xor_si256(codes, set1_bits(static_cast<int32_t>(0x88888888)));
    const IntVec high = i < 4 ? shift_left(turned, 4) : turned;
    return top_byte(_mm256_and_si256(high, set1_bits(static_cast<int32_t>(0xf0f0f0f0))), i % 4);
  }
  const IntVec top = shift_left(codes, 28 - bit);
  const Vec sizes = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6), shift_right(codes, bit));
  return vec_of(_mm256_or_si256(bits_of(sizes), _mm256_and_si256(top, set1_bits(INT32_MIN))));
#endif
}

// --- decoding into memory ---

// Inputs that are decoded at a time: 16 KB of words, for the L1 cache.
template <class Word>
constexpr int64_t kDecodedInputs = 256 / sizeof(Word);

// Values of one input as float32, `out` is [inputs][64]; or of pairs of inputs as bf16 words, as panels have them.
inline void put_pair(float* out, int64_t pair, int output, Vec even, Vec odd) {
  store(out + 2 * pair * kPanel + output, even);
  store(out + (2 * pair + 1) * kPanel + output, odd);
}

#if defined(__AVX512BF16__)
inline void put_pair(bf16* out, int64_t pair, int output, Vec even, Vec odd) {
  alignas(64) static constexpr uint16_t kTurn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const IntVec halves = (IntVec)_mm512_cvtne2ps_pbh(odd, even);
  store_bits(out + pair * kStepWords + 2 * output, _mm512_permutexvar_epi16(load_bits(kTurn), halves));
}
#endif

// Decodes `steps` steps of one group.
template <int kCode, bool kHasZero, class Word>
void decode_group(const QuantFormat& format, const uint8_t* head, const float* factor, const uint8_t* codes,
                  int64_t steps, Word* out) {
  constexpr int kInputs = step_inputs(kCode);
  for (int column = 0; column < kPanel; column += kTileOutputs) {
    Vec scales[kTileVecs], zeros[kTileVecs];
    for (int j = 0; j < kTileVecs; j++) {
      const int output = column + j * kLanes;
      scales[j] = load_scales(format.scale, head, factor, output) * set1(1.0f / kUnit<kCode>);
      if constexpr (kHasZero) {
        zeros[j] = load_zeros(format, head, output) * set1(kUnit<kCode>);
      }
    }
    for (int64_t step = 0; step < steps; step++) {
      const uint8_t* from = codes + step * kCodesBytes + column * 4;
      // The same lines of the block that is decoded next.
      _mm_prefetch(reinterpret_cast<const char*>(from) + kDecodedInputs<Word> / kInputs * kCodesBytes, _MM_HINT_T0);
      for (int j = 0; j < kTileVecs; j++) {
        const IntVec code = load_bits(from + j * kLanes * 4);
        const auto value = [&](int i) {
          Vec found = code_value<kCode>(code, i);
          if constexpr (kHasZero) found = found - zeros[j];
          return found * scales[j];
        };
#pragma GCC unroll 4
        for (int i = 0; i < kInputs; i += 2) {
          put_pair(out, (step * kInputs + i) / 2, column + j * kLanes, value(i), value(i + 1));
        }
      }
    }
  }
}

template <class Word>
using DecodeGroup = void (*)(const QuantFormat&, const uint8_t*, const float*, const uint8_t*, int64_t, Word*);

template <class Word>
DecodeGroup<Word> decoder_of(const QuantFormat& format) {
  switch (format.code) {
    case kInt4: return format.has_zero ? decode_group<kInt4, true, Word> : decode_group<kInt4, false, Word>;
    case kInt8: return format.has_zero ? decode_group<kInt8, true, Word> : decode_group<kInt8, false, Word>;
    case kFp4: return decode_group<kFp4, false, Word>;
    default: return decode_group<kFp8, false, Word>;
  }
}

// Decodes the inputs [first, end) of a panel, both at a step's start, or `end` at the last step's end.
template <class Word>
void decode_inputs(const QuantFormat& format, const PanelShape& shape, const uint8_t* panel, int64_t first, int64_t end,
                   Word* out) {
  const auto decode = decoder_of<Word>(format);
  const auto* factor = reinterpret_cast<const float*>(panel);
  constexpr int64_t kWords = kPanel;  // of an input, in either layout
  for (int64_t input = first; input < end;) {
    const int64_t group = input / shape.group, start = group * shape.group;
    const int64_t last = std::min(end, start + ceil_div(shape.group, shape.inputs_of_step) * shape.inputs_of_step);
    const uint8_t* head = panel + shape.head_at(group);
    const uint8_t* codes = head + shape.head_bytes + (input - start) / shape.inputs_of_step * kCodesBytes;
    decode(format, head, factor, codes, (last - input) / shape.inputs_of_step, out + (input - first) * kWords);
    input = last;
  }
}

// --- products ---

#if defined(__AVX512BF16__)
template <class T>
using DecodedWord = T;
#else
template <class T>
using DecodedWord = float;
#endif

// `out[r][0 .. 64)` = (or +=, with `resume`) the products of rows with decoded inputs, from `first` on.
template <class T>
void multiply_decoded(const T* const* x, int64_t rows, int64_t first, int64_t count, DecodedWord<T>* words, float* out,
                      bool resume) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (rows <= kFewRows) return multiply_few(x, rows, first, PlainSteps<bf16>(words), count / 2, out, resume);
    const int64_t steps = count / 2, whole = ceil_div(steps, kTileSteps) * kTileSteps;
    std::memset(words + steps * kStepWords, 0, (whole - steps) * kStepBytes);
    const TileRegisters registers;
    return multiply_tiles(x, rows, first, count, words, {}, out, resume);
  }
#endif
  constexpr bool kWide = !std::is_same_v<T, DecodedWord<T>>;
  using Steps = std::conditional_t<kWide, WidePairs, PlainSteps<T>>;
  multiply_block<false, Steps>(x, rows, first, words, count / kStepInputs<T>, {}, out, resume);
}

// `out[r][0 .. 64)` = the products of rows, padded with zeros to whole steps, with a panel of `inputs` inputs.
template <class T>
void multiply_quantized(const T* const* x, int64_t rows, const QuantFormat& format, const PanelShape& shape,
                        const uint8_t* panel, int64_t inputs, float* out) {
  const int64_t padded = ceil_div(inputs, shape.inputs_of_step) * shape.inputs_of_step;
  using Word = DecodedWord<T>;
  alignas(64) Word words[kDecodedInputs<Word> * kPanel];
  for (int64_t first = 0; first < padded; first += kDecodedInputs<Word>) {
    const int64_t end = std::min(padded, first + kDecodedInputs<Word>);
    decode_inputs(format, shape, panel, first, end, words);
    multiply_decoded(x, rows, first, end - first, words, out, first > 0);
  }
}

}  // namespace moe
