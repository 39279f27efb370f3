// Inputs of attention: the shapes of a step, and the keys and values of 64 positions of a sequence.
#pragma once

#include "kv_pages.h"
#include "transpose.h"

namespace moe {

constexpr int64_t kKeys = kPanel;  // keys of a block

struct AttentionShape {
  int64_t heads;
  int64_t kv_heads;
  int64_t head_size;   // of queries and keys
  int64_t value_size;  // of values
  int64_t shared;      // all key/value heads are the same one, and a value is the front of its key
  int64_t window;      // 0: none
  const float* sinks;  // a logit of each head that takes its share of the weights and adds nothing; or null
  float scale;

  const float* sink(int64_t head) const { return sinks ? sinks + head : nullptr; }
};

// A step's sequences; all arrays are int64.
struct StepLayout {
  int64_t sequences;
  int64_t tokens;
  int64_t max_pages;
  const int64_t* query_start;  // [sequences + 1]
  const int64_t* context_len;  // [sequences], this step's keys included
  const int64_t* page_table;   // [sequences, max_pages]
};

// The position of a task's first query.
inline int64_t position_of(const StepLayout& step, const AttentionTask& task) {
  const int64_t queries = step.query_start[task.sequence + 1] - step.query_start[task.sequence];
  return step.context_len[task.sequence] - queries + task.first_query;
}

// The first key that a query sees.
inline int64_t first_seen(const AttentionShape& shape, int64_t position) {
  return shape.window ? std::max<int64_t>(0, position - shape.window + 1) : 0;
}

// Where the keys or the values of 64 tokens are, at a task's first key/value head.
struct BlockRows {
  const char* data[kKeys];
  const float* scales[kKeys];  // of rows of 8 bits
};

// 64 keys of a sequence, at the task's first key/value head, from their pages. Positions before the window of the
// task's first query, whose pages may belong to another sequence, repeat the first key that it sees, with weight 0;
// positions after the end of the context repeat its last key.
struct KeyBlock {
  BlockRows keys, values;

  void take(const AttentionShape& shape, const KVPages& pages, const StepLayout& step, const AttentionTask& task,
            int64_t first_key) {
    const int64_t count = std::min(kKeys, step.context_len[task.sequence] - first_key);
    const int64_t behind = std::max<int64_t>(0, first_seen(shape, position_of(step, task)) - first_key);
    const int64_t begin = first_key + behind, head = shape.shared ? 0 : task.first_group;
    const int64_t key_skip = head * shape.head_size * pages.item_size;
    const int64_t value_skip = head * shape.value_size * pages.item_size;
    const int64_t* page = step.page_table + task.sequence * step.max_pages + begin / pages.page_size;
    int64_t in_page = begin % pages.page_size;
    for (int64_t i = behind; i < count; page++, in_page = 0) {
      const char* key = pages.keys.row(*page, in_page) + key_skip;
      const char* value = pages.values.row(*page, in_page) + value_skip;
      const int64_t first = i, end = std::min(count, i + pages.page_size - in_page);
      for (; i < end; i++, key += pages.keys.token_stride, value += pages.values.token_stride) {
        keys.data[i] = key;
        values.data[i] = value;
      }
      if (pages.code == kRowPlain) continue;
      take_scales(pages.keys.scale(*page, in_page) + head, pages.keys.token_scales, first, end, keys.scales);
      take_scales(pages.values.scale(*page, in_page) + head, pages.values.token_scales, first, end, values.scales);
    }
    repeat(keys.data, behind, count);
    repeat(values.data, behind, count);
    if (pages.code == kRowPlain) return;
    repeat(keys.scales, behind, count);
    repeat(values.scales, behind, count);
  }

 private:
  static void take_scales(const float* scale, int64_t stride, int64_t first, int64_t end, const float** out) {
    for (int64_t i = first; i < end; i++, scale += stride) {
      out[i] = scale;
      _mm_prefetch(reinterpret_cast<const char*>(scale), _MM_HINT_T0);
    }
  }

  template <class Pointer>
  static void repeat(Pointer* rows, int64_t begin, int64_t end) {
    std::fill(rows, rows + begin, rows[begin]);
    std::fill(rows + end, rows + kKeys, rows[end - 1]);
  }
};

// The keys and values of one head of a block, as the products read them: rows of T, some elements into each.
template <class T>
class HeadBlock {
 public:
  const T* const* keys;
  const T* const* values;
  int64_t key_offset = 0, value_offset = 0;

  // Head `group` from the task's first one on. `memory` has room for the rows of all keys, if they have 8 bits.
  void take(const KeyBlock& block, const AttentionShape& shape, const KVPages& pages, int64_t group, T* memory) {
    const int64_t head = shape.shared ? 0 : group;
    keys = reinterpret_cast<const T* const*>(block.keys.data);
    values = reinterpret_cast<const T* const*>(block.values.data);
    if (pages.code == kRowPlain) {
      key_offset = head * shape.head_size;
      value_offset = head * shape.value_size;
      return;
    }
    read_rows(block.keys, pages.code, head, shape.head_size, pages.key_split, memory, own_keys_);
    keys = values = own_keys_;
    if (shape.shared) return;
    read_rows(block.values, pages.code, head, shape.value_size, 0, memory + kKeys * shape.head_size, own_values_);
    values = own_values_;
  }

  // Packs the keys as a panel: keys are its outputs, head dimensions its inputs. A step is a word of each key.
  void pack_keys(int64_t head_size, T* packed) const {
    uint32_t* out = reinterpret_cast<uint32_t*>(packed);
    const int64_t words = head_size / kStepInputs<T>;
    int64_t word = 0;
    for (; word + kLanes <= words; word += kLanes) {
      for (int64_t i = 0; i < kKeys; i += kLanes) {
        IntVec columns[kLanes];
        const auto* rows = reinterpret_cast<const char* const*>(keys + i);
        transpose_words(rows, key_offset * sizeof(T) + word * 4, columns);
        for (int j = 0; j < kLanes; j++) store_bits(out + (word + j) * kPanel + i, columns[j]);
      }
    }
    for (; word < num_steps<T>(head_size); word++) {
      const int64_t bytes = std::min<int64_t>(4, (head_size - word * kStepInputs<T>) * sizeof(T));
      for (int64_t i = 0; i < kKeys; i++) {
        uint32_t value = 0;
        std::memcpy(&value, keys[i] + key_offset + word * kStepInputs<T>, bytes);
        out[word * kPanel + i] = value;
      }
    }
  }

  // Packs the values in panels of 64 outputs: head dimensions are outputs, keys are inputs.
  void pack_values(int64_t value_size, T* packed) const {
    for (int64_t first = 0; first < value_size; first += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, value_size - first), offset = value_offset + first;
      for (int64_t key = 0; key < kKeys; key += kStepInputs<T>, packed += kStepElements<T>) {
        // A float32 step has one key, so it has no odd key.
        const T *even = values[key] + offset, *odd = values[key + kStepInputs<T> - 1] + offset;
        if (width == kPanel) {
          pack_step(even, odd, packed);
        } else {
          T padded[2][kPanel] = {};
          std::copy_n(even, width, padded[0]);
          std::copy_n(odd, width, padded[1]);
          pack_step(padded[0], padded[1], packed);
        }
      }
    }
  }

 private:
  static void read_rows(const BlockRows& rows, int64_t code, int64_t head, int64_t size, int64_t split, T* memory,
                        const T** out) {
    const auto read = code == kRowInt8 ? read_codes<int8_t> : read_codes<e4m3>;
    read(rows, head, size, split, memory, out);
  }

  template <class Code>
  static void read_codes(const BlockRows& rows, int64_t head, int64_t size, int64_t split, T* memory, const T** out) {
    for (int64_t i = 0; i < kKeys; i++, memory += size) {
      const bool repeats = i > 0 && rows.data[i] == rows.data[i - 1];
      out[i] = repeats ? out[i - 1] : memory;
      if (repeats) continue;
      read_row(reinterpret_cast<const Code*>(rows.data[i]) + head * size, rows.scales[i] + head, size, split, memory);
    }
  }

  static void pack_step(const float* values, const float*, float* out) { std::copy_n(values, kPanel, out); }

  static void pack_step(const bf16* even, const bf16* odd, bf16* out) {
    for (int i = 0; i < kPanel; i += 2 * kLanes) {
      IntVec pairs[2];
      interleave(even + i, odd + i, pairs);
      store_bits(out + 2 * i, pairs[0]);
      store_bits(out + 2 * i + 2 * kLanes, pairs[1]);
    }
  }

  const T* own_keys_[kKeys];  // rows of T that rows of 8 bits are read into
  const T* own_values_[kKeys];
};

// Prefetches the rows of a key block a few cache lines at a time. They are too far apart for the hardware prefetcher,
// and too many for one call.
class Ahead {
 public:
  // Prefetches nothing if `block` is null. After `calls` calls all lines have been requested.
  Ahead(const KeyBlock* block, int64_t row_bytes, int64_t calls)
      : block_(block), lines_(ceil_div(row_bytes, kLine)), count_(ceil_div(2 * kKeys * lines_, calls)) {}

  void ask() {
    if (block_ == nullptr) return;
    for (int64_t i = 0; i < count_ && row_ < 2 * kKeys; i++) {
      const char* row = row_ < kKeys ? block_->keys.data[row_] : block_->values.data[row_ - kKeys];
      _mm_prefetch(row + line_ * kLine, _MM_HINT_T1);
      if (++line_ == lines_) line_ = 0, row_++;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const KeyBlock* block_;
  const int64_t lines_, count_;
  int64_t row_ = 0, line_ = 0;
};

}  // namespace moe
