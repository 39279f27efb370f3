// Panels of quantised weights: weight = (code - zero) * scale + offset [kernels/quantized.py].
//
// A panel [gemm.h] is stored group of inputs after group of inputs, after the factors of scales if there are any:
//
//     per super-group: factor[64]         of scales, then of offsets; see `factor_type`
//     per group: scale[64]; zero[64] int8 or offset[64] of the scales' type, if there are any; steps
//     step: code[64] 4 bytes              of four inputs (8 bits) or eight (4 bits) of each output
//
// A byte has an input's code of 8 bits, or those of input i (low half) and i + 4 (high half). Outputs and inputs that
// do not exist have codes, zeros, scales and offsets of 0; the inputs' rows are padded with zeros.
//
// Products use the weights' values: where there are products of bf16 pairs, rounded to bf16, so a quantised matrix gives
// the bits of the bf16 matrix that it stands for; else, and for float32 inputs, in float32.
#pragma once

#include "int_vec.h"
#include "tiles.h"

namespace moe {

// As in types/weight_format.py.
enum Code : int32_t { kInt4 = 2, kFp4 = 3, kInt8 = 4, kFp8 = 5, kUint4 = 6 };
enum ScaleType : int32_t {
  kScaleNone = -1,
  kScaleFloat32 = 0,
  kScaleFloat16 = 1,
  kScaleBf16 = 2,
  kScaleE8M0 = 3,
  kScaleE4M3 = 4,
  kScaleInt8 = 5
};

// What groups have beside their scales: zeros only with INT4 and INT8, offsets with UINT4 and, if they have any, INT8.
enum Term : int32_t { kNoTerm = 0, kZeros = 1, kOffsets = 2 };

// `group` 0: all inputs are one group. `int8_rows`: products take rows in int8 [int8_rows.h]; not with FP8.
struct QuantFormat {
  int32_t code, scale, term, int8_rows;
  int64_t group;
};

constexpr int64_t kCodesBytes = 256;  // of a step
constexpr int kMostStepInputs = 8;    // of a step
constexpr int64_t kSuperGroup = 256;  // inputs that share the factor of INT8 scales

constexpr int64_t step_inputs(int32_t code) { return code == kInt8 || code == kFp8 ? 4 : 8; }

inline int64_t scale_bytes(int32_t scale) {
  switch (scale) {
    case kScaleNone: return 0;
    case kScaleFloat32: return 4;
    case kScaleFloat16:
    case kScaleBf16: return 2;
    default: return 1;
  }
}

// The type of the factors that scales of a type are multiplied by.
constexpr int32_t factor_type(int32_t scale) {
  return scale == kScaleE4M3 ? kScaleFloat32 : scale == kScaleInt8 ? kScaleFloat16 : kScaleNone;
}

// Where things are in a panel of a weight. A super-group of E4M3 scales has all inputs.
struct PanelShape {
  int64_t group, inputs_of_step, super_group, super_bytes, factor_bytes, head_bytes, group_bytes, bytes;

  PanelShape(const QuantFormat& format, int64_t inputs)
      : group(format.group ? std::min(format.group, inputs) : inputs),
        inputs_of_step(step_inputs(format.code)),
        super_group(format.scale == kScaleInt8 ? kSuperGroup : inputs),
        super_bytes(kPanel * scale_bytes(factor_type(format.scale)) * (format.term == kOffsets ? 2 : 1)),
        factor_bytes(ceil_div(inputs, super_group) * super_bytes),
        head_bytes(kPanel * (scale_bytes(format.scale) * (format.term == kOffsets ? 2 : 1) + (format.term == kZeros))),
        group_bytes(head_bytes + ceil_div(group, inputs_of_step) * kCodesBytes) {
    const int64_t rest = inputs % group;
    bytes = factor_bytes + inputs / group * group_bytes;
    if (rest) bytes += head_bytes + ceil_div(rest, inputs_of_step) * kCodesBytes;
  }

  int64_t head_at(int64_t index) const { return factor_bytes + index * group_bytes; }
  int64_t factors_at(int64_t index) const { return index * group / super_group * super_bytes; }
};

// What stands for the weights of a group, beside their codes.
struct GroupHead {
  const uint8_t *head, *factors;

  static GroupHead at(const PanelShape& shape, const uint8_t* panel, int64_t index) {
    return {panel + shape.head_at(index), panel + shape.factors_at(index)};
  }
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

inline Vec load_float16(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}

// Scales of the outputs from `output` on, or offsets, times their factors if their type has any.
inline Vec load_scales(int32_t type, const uint8_t* scales, const uint8_t* factors, int output) {
  const uint8_t* at = scales + output * scale_bytes(type);
  switch (type) {
    case kScaleFloat32: return load(reinterpret_cast<const float*>(at));
    case kScaleBf16: return load(reinterpret_cast<const bf16*>(at));
    case kScaleE8M0: return vec_of(shift_left(widen_bytes(at), 23));
    case kScaleE4M3: return load(reinterpret_cast<const e4m3*>(at)) * load(reinterpret_cast<const float*>(factors) + output);
    case kScaleInt8: return load(reinterpret_cast<const int8_t*>(at)) * load_float16(factors + 2 * output);
    default: return load_float16(at);
  }
}

inline Vec load_scales(const QuantFormat& format, const GroupHead& group, int output) {
  return load_scales(format.scale, group.head, group.factors, output);
}

// Zeros of the outputs from `output` on.
inline Vec load_zeros(const QuantFormat& format, const GroupHead& group, int output) {
  return load(reinterpret_cast<const int8_t*>(group.head + kPanel * scale_bytes(format.scale) + output));
}

// Offsets of the outputs from `output` on.
inline Vec load_offsets(const QuantFormat& format, const GroupHead& group, int output) {
  return load_scales(format.scale, group.head + kPanel * scale_bytes(format.scale),
                     group.factors + kPanel * scale_bytes(factor_type(format.scale)), output);
}

// Values of integers are read this many times as large, which the scale makes up for: a number in the highest bits of a
// lane needs no shift.
#if defined(__AVX512F__)
template <int kCode>
constexpr float kUnit = kCode == kInt8 ? 0x1p24f : 1.0f;
#else
template <int kCode>
constexpr float kUnit = kCode == kInt8 || kCode == kUint4 ? 0x1p24f : kCode == kInt4 ? 0x1p28f : 1.0f;
#endif

// What the codes of input `i` of a step stand for, before zero, scale and offset, times `kUnit`.
template <int kCode>
inline Vec code_value(IntVec codes, int i) {
  if constexpr (kCode == kInt8) return top_byte(codes, i);
  if constexpr (kCode == kFp8) return from_e4m3(shift_left(codes, 24 - 8 * i));
  const int bit = i < 4 ? 8 * i : 8 * (i - 4) + 4;
#if defined(__AVX512F__)
  // A permutation looks at the lowest four bits of its index.
  const Vec table = kCode == kInt4    ? _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
                    : kCode == kUint4 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                                      : _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
  return _mm512_permutexvar_ps(shift_right(codes, bit), table);
#else
  if constexpr (kCode == kInt4) {  // 0 to 15 as two's complement of 4 bits: the highest bit is turned
    const IntVec turned = _mm256_xor_si256(codes, set1_bits(static_cast<int32_t>(0x88888888)));
    const IntVec high = i < 4 ? shift_left(turned, 4) : turned;
    return top_byte(_mm256_and_si256(high, set1_bits(static_cast<int32_t>(0xf0f0f0f0))), i % 4);
  }
  if constexpr (kCode == kUint4) {
    return top_byte(and_bits(i < 4 ? codes : shift_right(codes, 4), set1_bits(0x0f0f0f0f)), i % 4);
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
template <int kCode, Term kTerm, class Word>
void decode_group(const QuantFormat& format, const GroupHead& group, const uint8_t* codes, int64_t steps, Word* out) {
  constexpr int kInputs = step_inputs(kCode);
  for (int column = 0; column < kPanel; column += kTileOutputs) {
    Vec scales[kTileVecs], terms[kTileVecs];
    for (int j = 0; j < kTileVecs; j++) {
      const int output = column + j * kLanes;
      scales[j] = load_scales(format, group, output) * set1(1.0f / kUnit<kCode>);
      if constexpr (kTerm == kZeros) terms[j] = load_zeros(format, group, output) * set1(kUnit<kCode>);
      if constexpr (kTerm == kOffsets) terms[j] = load_offsets(format, group, output);
    }
    for (int64_t step = 0; step < steps; step++) {
      const uint8_t* from = codes + step * kCodesBytes + column * 4;
      // The same lines of the block that is decoded next.
      _mm_prefetch(reinterpret_cast<const char*>(from) + kDecodedInputs<Word> / kInputs * kCodesBytes, _MM_HINT_T0);
      for (int j = 0; j < kTileVecs; j++) {
        const IntVec code = load_bits(from + j * kLanes * 4);
        const auto value = [&](int i) {
          Vec found = code_value<kCode>(code, i);
          if constexpr (kTerm == kZeros) found = found - terms[j];
          found = found * scales[j];
          if constexpr (kTerm == kOffsets) found = found + terms[j];
          return found;
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
using DecodeGroup = void (*)(const QuantFormat&, const GroupHead&, const uint8_t*, int64_t, Word*);

template <class Word>
DecodeGroup<Word> decoder_of(const QuantFormat& format) {
  switch (format.code) {
    case kInt4: return format.term ? decode_group<kInt4, kZeros, Word> : decode_group<kInt4, kNoTerm, Word>;
    case kUint4: return decode_group<kUint4, kOffsets, Word>;
    case kInt8:
      return format.term == kOffsets ? decode_group<kInt8, kOffsets, Word>
             : format.term           ? decode_group<kInt8, kZeros, Word>
                                     : decode_group<kInt8, kNoTerm, Word>;
    case kFp4: return decode_group<kFp4, kNoTerm, Word>;
    default: return decode_group<kFp8, kNoTerm, Word>;
  }
}

// Decodes the inputs [first, end) of a panel, both at a step's start, or `end` at the last step's end.
template <class Word>
void decode_inputs(const QuantFormat& format, const PanelShape& shape, const uint8_t* panel, int64_t first, int64_t end,
                   Word* out) {
  const auto decode = decoder_of<Word>(format);
  constexpr int64_t kWords = kPanel;  // of an input, in either layout
  for (int64_t input = first; input < end;) {
    const int64_t group = input / shape.group, start = group * shape.group;
    const int64_t last = std::min(end, start + ceil_div(shape.group, shape.inputs_of_step) * shape.inputs_of_step);
    const auto head = GroupHead::at(shape, panel, group);
    const uint8_t* codes = head.head + shape.head_bytes + (input - start) / shape.inputs_of_step * kCodesBytes;
    decode(format, head, codes, (last - input) / shape.inputs_of_step, out + (input - first) * kWords);
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
