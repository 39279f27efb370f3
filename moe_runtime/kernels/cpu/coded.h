// Packed bf16 weights in 12 bits each, without loss: a quarter less memory traffic.
//
// A weight's high byte (its sign and the upper bits of its exponent) takes few values: 16 values cover nearly all
// weights of a panel. A panel [gemm.h] is stored as a table of these values, repeated four times, then its steps. A
// step takes 192 bytes for 128 weights (256 bytes):
//
//     table[4][16]
//     per step: indices[64], each two 4-bit indices into the table; low[128], the weights' low bytes
//
// A weight whose high byte is not in the table is an escape: it is in a separate list of the panel, and decoding
// inserts it. About one in ten thousand trained weights is an escape. Weights with more escapes are stored without loss
// too, but decode more slowly.
//
// The byte order suits the byte-interleaving instructions, which work within 128-bit lanes. With
// b = 64 h + 16 lane + i, low[b] belongs to the word 64 h + 32 (i / 8) + 8 lane + i % 8 of the step. Its index is the
// low (h = 0) or high (h = 1) half of indices[b % 64].
#pragma once

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "vec.h"

namespace moe {

constexpr int kStepWords = 128;  // weights of a step
constexpr int kTableBytes = 64;
constexpr int kIndexBytes = 64;
constexpr int kCodedStepBytes = kIndexBytes + kStepWords;
constexpr int kTableSize = 16;
constexpr uint32_t kNoStep = ~0u;

// Word `word` of step `step` has the high byte `high`. A list ends with kNoStep; null is an empty list.
struct Escape {
  uint32_t step;
  uint16_t word;
  uint16_t high;
};

struct CodedPanel {
  const uint8_t* data;
  const Escape* escapes;
};

inline int64_t coded_panel_bytes(int64_t steps) { return kTableBytes + steps * kCodedStepBytes; }

inline const Escape* first_escape(const CodedPanel& panel) {
  static constexpr Escape kNone{kNoStep, 0, 0};
  return panel.escapes ? panel.escapes : &kNone;
}

// Inserts the escapes of `step` into its words; returns the first escape of a later step.
inline const Escape* put_escapes(const Escape* escape, uint32_t step, uint16_t* words) {
  for (; escape->step == step; escape++) {
    words[escape->word] = static_cast<uint16_t>(escape->high << 8 | (words[escape->word] & 0xff));
  }
  return escape;
}

#if defined(__AVX512F__)

// The words of a step, without its escapes.
inline void decode_step(const uint8_t* codes, IntVec table, IntVec (&words)[4]) {
  const IntVec half = _mm512_set1_epi8(15), indices = load_bits(codes);
  const IntVec high0 = _mm512_shuffle_epi8(table, _mm512_and_si512(indices, half));
  const IntVec high1 = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(indices, 4), half));
  const IntVec low0 = load_bits(codes + kIndexBytes), low1 = load_bits(codes + kIndexBytes + 64);
  words[0] = _mm512_unpacklo_epi8(low0, high0);
  words[1] = _mm512_unpackhi_epi8(low0, high0);
  words[2] = _mm512_unpacklo_epi8(low1, high1);
  words[3] = _mm512_unpackhi_epi8(low1, high1);
}

inline void store_step(void* out, const IntVec (&words)[4]) {
  for (int j = 0; j < 4; j++) store_bits(static_cast<char*>(out) + 64 * j, words[j]);
}

inline void decode_step(const uint8_t* codes, const uint8_t* table, bf16* out) {
  IntVec words[4];
  decode_step(codes, load_bits(table), words);
  store_step(out, words);
}

// The words of a step, in registers.
struct CodedStep {
  IntVec words[4];
  IntVec operator[](int j) const { return words[j]; }
};

// Decodes a panel from its first step on, step by step, into registers; with `kKeep`, also into memory.
template <bool kKeep>
class CodedSteps {
 public:
  explicit CodedSteps(const CodedPanel& panel)
      : codes_(panel.data + kTableBytes), table_(load_bits(panel.data)), escape_(first_escape(panel)) {}

  // Stores the words of the next steps at `kept`.
  void keep_at(bf16* kept) { kept_ = kept; }

  // How many of the next `count` steps come before the first step with an escape.
  int64_t plain_steps(int64_t count) const { return std::min<int64_t>(count, escape_->step - step_); }

  CodedStep next() {
    CodedStep step;
    decode_step(codes_, table_, step.words);
    return pass(step);
  }

  // A step with escapes.
  CodedStep next_escaped() {
    alignas(64) bf16 words[kStepWords];
    CodedStep step;
    decode_step(codes_, table_, step.words);
    store_step(words, step.words);
    escape_ = put_escapes(escape_, step_, reinterpret_cast<uint16_t*>(words));
    for (int j = 0; j < 4; j++) step.words[j] = load_bits(words + j * 32);
    return pass(step);
  }

 private:
  CodedStep pass(const CodedStep& step) {
    if constexpr (kKeep) {
      store_step(kept_, step.words);
      kept_ += kStepWords;
    }
    codes_ += kCodedStepBytes;
    step_++;
    return step;
  }

  const uint8_t* codes_;
  IntVec table_;
  const Escape* escape_;
  bf16* kept_ = nullptr;
  uint32_t step_ = 0;
};

#else  // AVX2

inline void decode_step(const uint8_t* codes, const uint8_t* table, bf16* out) {
  const IntVec half = _mm256_set1_epi8(15), high_bytes = load_bits(table);
  for (int part = 0; part < 2; part++) {  // two of the four lanes
    IntVec indices = load_bits(codes + 32 * part);
    for (int h = 0; h < 2; h++, indices = _mm256_srli_epi16(indices, 4)) {
      const IntVec high = _mm256_shuffle_epi8(high_bytes, _mm256_and_si256(indices, half));
      const IntVec low = load_bits(codes + kIndexBytes + 64 * h + 32 * part);
      store_bits(out + 64 * h + 16 * part, _mm256_unpacklo_epi8(low, high));
      store_bits(out + 64 * h + 32 + 16 * part, _mm256_unpackhi_epi8(low, high));
    }
  }
}

#endif

// The words of `count` steps from `first` on. `escape` is the first escape at or after step `first`; it is advanced.
inline void decode_steps(const CodedPanel& panel, int64_t first, int64_t count, const Escape*& escape, bf16* out) {
  for (int64_t step = first; step < first + count; step++, out += kStepWords) {
    decode_step(panel.data + coded_panel_bytes(step), panel.data, out);
    escape = put_escapes(escape, static_cast<uint32_t>(step), reinterpret_cast<uint16_t*>(out));
  }
}

// Codes a panel, step by step.
class PanelCoder {
 public:
  // `uses[b]` is how often the high byte b occurs.
  PanelCoder(const int64_t (&uses)[256], uint8_t* data) : data_(data) {
    uint8_t bytes[256];
    std::iota(bytes, bytes + 256, 0);
    std::partial_sort(bytes, bytes + kTableSize, bytes + 256, [&](uint8_t a, uint8_t b) {
      return uses[a] != uses[b] ? uses[a] > uses[b] : a < b;  // one order, so that equal weights have equal codes
    });
    for (int i = 0; i < kTableBytes; i++) data[i] = bytes[i % kTableSize];
  }

  void add(const bf16* words) {
    alignas(64) uint8_t low[kStepWords], high[kStepWords], place[kStepWords];
    split_bytes(words, low, high);
    std::fill_n(place, kStepWords, kTableSize);
    for (int entry = 0; entry < kTableSize; entry++) {
      const uint8_t byte = data_[entry];
      for (int b = 0; b < kStepWords; b++) place[b] = high[b] == byte ? entry : place[b];
    }
    if (std::count(place, place + kStepWords, kTableSize)) {
      for (int b = 0; b < kStepWords; b++) {
        if (place[b] < kTableSize) continue;
        const int word = b / 64 * 64 + b % 16 / 8 * 32 + b % 64 / 16 * 8 + b % 8;
        escapes_.push_back({step_, static_cast<uint16_t>(word), high[b]});
        place[b] = 0;
      }
    }
    uint8_t* codes = data_ + coded_panel_bytes(step_++);
    for (int b = 0; b < kIndexBytes; b++) codes[b] = static_cast<uint8_t>(place[b] | place[64 + b] << 4);
    std::memcpy(codes + kIndexBytes, low, kStepWords);
  }

  // The list of escapes, which the caller must free(); null if there are none.
  Escape* escapes() {
    if (escapes_.empty()) return nullptr;
    escapes_.push_back({kNoStep, 0, 0});
    Escape* list = static_cast<Escape*>(std::malloc(escapes_.size() * sizeof(Escape)));
    if (list == nullptr) std::abort();
    std::copy(escapes_.begin(), escapes_.end(), list);
    return list;
  }

 private:
  static void split_bytes(const bf16* words, uint8_t* low, uint8_t* high) {
    const __m128i byte = _mm_set1_epi16(255);
    for (int b = 0; b < kStepWords; b += 16) {
      const bf16* from = words + b / 64 * 64 + b % 64 / 2;
      const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 32));
      const __m128i low_bytes = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
      const __m128i high_bytes = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
      _mm_store_si128(reinterpret_cast<__m128i*>(low + b), low_bytes);
      _mm_store_si128(reinterpret_cast<__m128i*>(high + b), high_bytes);
    }
  }

  uint8_t* data_;
  uint32_t step_ = 0;
  std::vector<Escape> escapes_;
};

}  // namespace moe
