// Products with coded weights on AMX, the processor's unit for products of tiles.
//
// A tile register has 16 rows of 64 bytes. A tile product adds, to 16 rows of 16 float32 sums, the products of 32 inputs:
// those with even index and those with odd index are each summed in order from zero, then added to each other and to the
// sum. So a sum runs over the inputs in one order, for any number of rows.
//
// The words of a panel [gemm.h] are the second factor as they lie: a step is a row of four tiles side by side.
#pragma once

#include "gemm.h"

#if defined(__AMX_BF16__)

namespace moe {

constexpr int64_t kUnitRows = 16;   // rows of a tile
constexpr int64_t kUnitSteps = 64;  // steps that are decoded at a time, into the L1 cache
constexpr int64_t kStepBytes = kStepWords * sizeof(bf16);

// The shapes of the tile registers, as the processor reads them: 16 full rows.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers for as long as it lives: 0 to 3 hold sums, 4 rows, 5 to 7 weights.
class TileRegisters {
 public:
  TileRegisters() {
    static constexpr TileShapes kShapes{};
    _tile_loadconfig(&kShapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// Up to 16 rows as a tile reads them, from `first_input` on: in place if they are 16 at equal distances, else a copy.
// Missing rows, and inputs from `inputs` to the end of a tile, are zero.
class TileRows {
 public:
  TileRows(const bf16* const* rows, int64_t count, int64_t first_input, int64_t inputs) {
    distance_ = count == kUnitRows ? rows[1] - rows[0] : 0;
    bool in_place = distance_ > 0 && inputs % (2 * kTileSteps) == 0;
    for (int64_t i = 2; in_place && i < count; i++) in_place = rows[i] - rows[i - 1] == distance_;
    first_ = rows[0] + first_input;
    if (in_place) return;
    distance_ = 2 * kUnitSteps;
    first_ = copy_;
    const int64_t whole = ceil_div(inputs, 2 * kTileSteps) * 2 * kTileSteps;
    for (int64_t i = 0; i < kUnitRows; i++) {
      bf16* to = copy_ + i * distance_;
      const int64_t used = i < count ? inputs : 0;
      if (used) std::memcpy(to, rows[i] + first_input, used * sizeof(bf16));
      std::memset(to + used, 0, (whole - used) * sizeof(bf16));
    }
  }

  const bf16* at(int64_t step) const { return first_ + 2 * step; }
  int64_t row_bytes() const { return distance_ * sizeof(bf16); }

 private:
  const bf16* first_;
  int64_t distance_;
  alignas(64) bf16 copy_[kUnitRows * 2 * kUnitSteps];
};

// The tile registers' sums of 64 outputs, of 4 bytes each: from 0, to memory.
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_sums(void* sums) {
  constexpr int64_t kOutBytes = kPanel * sizeof(float);
  char* to = static_cast<char*>(sums);
  _tile_stored(0, to, kOutBytes);
  _tile_stored(1, to + 64, kOutBytes);
  _tile_stored(2, to + 128, kOutBytes);
  _tile_stored(3, to + 192, kOutBytes);
}

// `out[r][0 .. 64)` = (or +=, with `resume`) the products of at most 16 rows with `steps` steps of words, of which those
// up to the next multiple of 16 are zero or meet inputs that are. Meanwhile `ahead` is prefetched.
inline void multiply_tile(const TileRows& rows, int64_t count, const bf16* words, int64_t steps, Prefetch ahead,
                          float* out, bool resume) {
  constexpr int64_t kOutBytes = kPanel * sizeof(float);
  alignas(64) float part[kUnitRows * kPanel];
  float* sums = count == kUnitRows ? out : part;
  if (resume) {
    if (sums == part) std::copy_n(out, count * kPanel, part);
    _tile_loadd(0, sums, kOutBytes);
    _tile_loadd(1, sums + 16, kOutBytes);
    _tile_loadd(2, sums + 32, kOutBytes);
    _tile_loadd(3, sums + 48, kOutBytes);
  } else {
    zero_sums();
  }
  for (int64_t step = 0; step < steps; step += kTileSteps, words += kTileSteps * kStepWords) {
    _tile_loadd(4, rows.at(step), rows.row_bytes());
    _tile_loadd(5, words, kStepBytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, words + 32, kStepBytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, words + 64, kStepBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, words + 96, kStepBytes);
    _tile_dpbf16ps(3, 4, 5);
    for (int64_t byte = 0; byte < ahead.step_bytes; byte += 64) _mm_prefetch(ahead.next + byte, _MM_HINT_T1);
    ahead.next += ahead.step_bytes;
  }
  store_sums(sums);
  if (sums == part) std::copy_n(part, count * kPanel, out);
}

// The same for any number of rows, from `first_input` on.
inline void multiply_tiles(const bf16* const* x, int64_t rows, int64_t first_input, int64_t inputs, const bf16* words,
                           Prefetch ahead, float* out, bool resume) {
  const int64_t steps = ceil_div(inputs, 2), ahead_bytes = ceil_div(steps, kTileSteps) * ahead.step_bytes;
  for (int64_t row = 0; row < rows; row += kUnitRows, ahead.next += ahead_bytes) {
    const int64_t count = std::min(kUnitRows, rows - row);
    const TileRows tile(x + row, count, first_input, inputs);
    multiply_tile(tile, count, words, steps, ahead, out + row * kPanel, resume);
  }
}

// `out[r][0 .. 64)` = (or +=, with `resume`) the products of any number of rows with a panel that was just packed, whose
// steps are a multiple of 16. The caller holds TileRegisters.
inline void multiply_packed(const bf16* const* x, int64_t rows, const bf16* words, int64_t inputs, float* out,
                            bool resume = false) {
  constexpr int64_t kInputs = 2 * kUnitSteps;
  for (int64_t first = 0; first < inputs; first += kInputs, words += kUnitSteps * kStepWords) {
    multiply_tiles(x, rows, first, std::min(kInputs, inputs - first), words, {}, out, resume || first > 0);
  }
}

// The products of a few rows in vector registers, with the bits of tile products: for 16 steps at a time, there are two
// sums from zero, of the even and of the odd inputs.
template <int kRows, class Steps>
void multiply_few(const bf16* const* rows, int64_t first_input, Steps weights, int64_t steps, float* out, bool resume) {
  const bf16* x[kRows];
  for (int r = 0; r < kRows; r++) x[r] = rows[r] + first_input;
  if (!resume) std::fill_n(out, kRows * kPanel, 0.0f);
  for (int64_t step = 0; step < steps;) {
    Vec even[kRows][kTileVecs], odd[kRows][kTileVecs];
    for (int r = 0; r < kRows; r++) {
      for (int j = 0; j < kTileVecs; j++) even[r][j] = odd[r][j] = zero();
    }
    const auto add = [&](const auto& words) {
      for (int r = 0; r < kRows; r++) {
        const IntVec inputs = broadcast_word(x[r] + 2 * step);
        const Vec even_input = even_bf16(inputs), odd_input = odd_bf16(inputs);
        for (int j = 0; j < kTileVecs; j++) {
          even[r][j] = fma(even_input, even_bf16(words[j]), even[r][j]);
          odd[r][j] = fma(odd_input, odd_bf16(words[j]), odd[r][j]);
        }
      }
    };
    for (const int64_t end = std::min(steps, step + kTileSteps); step < end;) {
      for (const int64_t plain = step + weights.plain_steps(end - step); step < plain; step++) add(weights.next());
      if (step == end) break;
      add(weights.next_escaped());
      step++;
    }
    for (int r = 0; r < kRows; r++) {
      for (int j = 0; j < kTileVecs; j++) {
        float* sums = out + r * kPanel + j * kLanes;
        store(sums, load(sums) + (even[r][j] + odd[r][j]));
      }
    }
  }
}

template <class Steps>
void multiply_few(const bf16* const* x, int64_t rows, int64_t first_input, const Steps& weights, int64_t steps,
                  float* out, bool resume) {
  const auto multiply = rows == 1   ? multiply_few<1, Steps>
                        : rows == 2 ? multiply_few<2, Steps>
                                    : multiply_few<3, Steps>;
  multiply(x, first_input, weights, steps, out, resume);
}

// `out[r][0 .. 64)` = the products of rows with a coded panel.
inline void multiply_panel(const bf16* const* x, int64_t rows, const CodedPanel& panel, int64_t steps, float* out) {
  if (rows <= kFewRows) return multiply_few(x, rows, 0, CodedSteps<false>(panel), steps, out, false);
  const TileRegisters registers;
  const Escape* escape = first_escape(panel);
  alignas(64) bf16 words[kUnitSteps * kStepWords];
  for (int64_t block = 0; block < steps; block += kUnitSteps) {
    const int64_t together = std::min(kUnitSteps, steps - block), end = ceil_div(together, kTileSteps) * kTileSteps;
    decode_steps(panel, block, together, escape, words);
    std::memset(words + together * kStepWords, 0, (end - together) * kStepBytes);
    const auto* behind = reinterpret_cast<const char*>(panel.data + coded_panel_bytes(block + kUnitSteps));
    const Prefetch ahead{behind, ceil_div(kTileSteps * kCodedStepBytes, ceil_div(rows, kUnitRows))};
    multiply_tiles(x, rows, 2 * block, 2 * together, words, ahead, out, block > 0);
  }
}

}  // namespace moe

#else

namespace moe {

struct TileRegisters {
  TileRegisters() {}  // not trivial, so that a variable counts as used
};

}  // namespace moe

#endif

namespace moe {

// The same for a panel that was just packed, on whatever this library is compiled for.
template <class T>
void multiply_packed(const T* const* x, int64_t rows, const T* panel, int64_t inputs, float* out, bool resume = false) {
  multiply_panel<false>(x, rows, panel, num_steps<T>(inputs), out, resume);
}

}  // namespace moe
