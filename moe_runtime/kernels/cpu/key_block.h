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

  // Those of a page from token `in_page` on become first .. end; `skip` bytes and `skip_scales` are before the head.
  void take_page(const CachedRows& rows, int64_t page, int64_t in_page, int64_t first, int64_t end, int64_t skip,
                 int64_t skip_scales) {
    const char* row = rows.row(page, in_page) + skip;
    for (int64_t i = first; i < end; i++, row += rows.token_stride) data[i] = row;
    if (rows.scales == nullptr) return;
    const float* scale = rows.scale(page, in_page) + skip_scales;
    for (int64_t i = first; i < end; i++, scale += rows.token_scales) {
      scales[i] = scale;
      _mm_prefetch(reinterpret_cast<const char*>(scale), _MM_HINT_T0);
    }
  }

  // Those outside begin .. end become the first and the last one within.
  void repeat(int64_t begin, int64_t end, bool has_scales) {
    std::fill(data, data + begin, data[begin]);
    std::fill(data + end, data + kKeys, data[end - 1]);
    if (!has_scales) return;
    std::fill(scales, scales + begin, scales[begin]);
    std::fill(scales + end, scales + kKeys, scales[end - 1]);
  }
};

// 64 keys of a sequence, at the task's first key/value head, from their pages. Positions before the window of the task's
// first query, whose pages may belong to another sequence, repeat the first key that it sees, with weight 0; positions
// after the end of the context repeat its last key.
struct KeyBlock {
  BlockRows keys, values;

  KeyBlock() = default;

  KeyBlock(const AttentionShape& shape, const KVPages& pages, const StepLayout& step, const AttentionTask& task,
           int64_t first_key) {
    const int64_t count = std::min(kKeys, step.context_len[task.sequence] - first_key);
    const int64_t behind = std::max<int64_t>(0, first_seen(shape, position_of(step, task)) - first_key);
    const int64_t begin = first_key + behind, head = shape.shared ? 0 : task.first_group;
    const int64_t* page = step.page_table + task.sequence * step.max_pages + begin / pages.page_size;
    int64_t in_page = begin % pages.page_size;
    for (int64_t i = behind; i < count; page++, in_page = 0) {
      const int64_t first = i, end = std::min(count, i + pages.page_size - in_page);
      keys.take_page(pages.keys, *page, in_page, first, end, head * shape.head_size * pages.item_size, head);
      values.take_page(pages.values, *page, in_page, first, end, head * shape.value_size * pages.item_size, head);
      i = end;
    }
    keys.repeat(behind, count, pages.code != kRowPlain);
    values.repeat(behind, count, pages.code != kRowPlain);
  }
};

// The keys and values of one head of a block, as the products read them.
template <class T>
struct HeadBlock {
  const T* keys[kKeys];
  const T* values[kKeys];

  // Head `group` from the task's first one on. `memory` has room for the rows of all keys, if they have 8 bits.
  void take(const KeyBlock& block, const AttentionShape& shape, const KVPages& pages, int64_t group, T* memory) {
    const int64_t head = shape.shared ? 0 : group;
    take_rows(block.keys, pages, head, shape.head_size, pages.key_split, memory, keys);
    if (shape.shared) {
      std::copy(keys, keys + kKeys, values);
    } else {
      take_rows(block.values, pages, head, shape.value_size, 0, memory + kKeys * shape.head_size, values);
    }
  }

  // Packs the keys as a panel: keys are its outputs, head dimensions its inputs. A step is a word of each key.
  void pack_keys(int64_t head_size, T* packed) const {
    uint32_t* out = reinterpret_cast<uint32_t*>(packed);
    const int64_t words = head_size / kStepInputs<T>;
    int64_t word = 0;
    for (; word + kLanes <= words; word += kLanes) {
      for (int64_t i = 0; i < kKeys; i += kLanes) {
        IntVec columns[kLanes];
        transpose_words(reinterpret_cast<const char* const*>(keys + i), word * 4, columns);
        for (int j = 0; j < kLanes; j++) store_bits(out + (word + j) * kPanel + i, columns[j]);
      }
    }
    for (; word < num_steps<T>(head_size); word++) {
      const int64_t bytes = std::min<int64_t>(4, (head_size - word * kStepInputs<T>) * sizeof(T));
      for (int64_t i = 0; i < kKeys; i++) {
        uint32_t value = 0;
        std::memcpy(&value, keys[i] + word * kStepInputs<T>, bytes);
        out[word * kPanel + i] = value;
      }
    }
  }

  // Packs the values in panels of 64 outputs: head dimensions are outputs, keys are inputs.
  void pack_values(int64_t value_size, T* packed) const {
    for (int64_t first = 0; first < value_size; first += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, value_size - first);
      for (int64_t key = 0; key < kKeys; key += kStepInputs<T>, packed += kStepElements<T>) {
        // A float32 step has one key, so it has no odd key.
        const T *even = values[key] + first, *odd = values[key + kStepInputs<T> - 1] + first;
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
  static void take_rows(const BlockRows& rows, const KVPages& pages, int64_t head, int64_t size, int64_t split,
                        T* memory, const T** out) {
    const int64_t skip = head * size * pages.item_size;
    for (int64_t i = 0; i < kKeys; i++) {
      if (pages.code == kRowPlain) {
        out[i] = reinterpret_cast<const T*>(rows.data[i] + skip);
      } else if (i > 0 && rows.data[i] == rows.data[i - 1]) {
        out[i] = out[i - 1];
      } else {
        read_row(pages.code, rows.data[i] + skip, rows.scales[i] + head, size, split, memory + i * size);
        out[i] = memory + i * size;
      }
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
