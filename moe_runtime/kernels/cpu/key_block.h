// Inputs of attention: the shapes of a step, and the keys and values of 64 positions of a sequence.
#pragma once

#include "engine.h"
#include "transpose.h"

namespace moe {

constexpr int64_t kKeys = kPanel;  // keys of a block

struct AttentionShape {
  int64_t heads;
  int64_t kv_heads;
  int64_t head_size;     // of queries and keys
  int64_t value_size;    // of values
  int64_t key_stride;    // elements between the keys of two tokens
  int64_t value_stride;  // elements between the values of two tokens
  int64_t shared;        // all key/value heads are the same one
  int64_t page_size;
  int64_t window;  // 0: none
  const float* sinks;  // a logit of each head that takes its share of the weights and adds nothing; or null
  float scale;

  const float* sink(int64_t head) const { return sinks ? sinks + head : nullptr; }
  int64_t key_offset(int64_t group) const { return shared ? 0 : group * head_size; }
  int64_t value_offset(int64_t group) const { return shared ? 0 : group * value_size; }
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

// 64 keys of a sequence, at the task's first key/value head, from their pages. Positions before the window of the task's
// first query, whose pages may belong to another sequence, repeat the first key that it sees, with weight 0; positions
// after the end of the context repeat its last key.
template <class T>
struct KeyBlock {
  const T* keys[kKeys];
  const T* values[kKeys];

  KeyBlock() = default;

  KeyBlock(const AttentionShape& shape, const StepLayout& step, const AttentionTask& task, int64_t first_key,
           const T* key_cache, const T* value_cache) {
    const int64_t count = std::min(kKeys, step.context_len[task.sequence] - first_key);
    const int64_t behind = std::max<int64_t>(0, first_seen(shape, position_of(step, task)) - first_key);
    const int64_t begin = first_key + behind;
    const int64_t* page = step.page_table + task.sequence * step.max_pages + begin / shape.page_size;
    const T* first = key_cache + shape.key_offset(task.first_group);
    const T* first_value = value_cache + shape.value_offset(task.first_group);
    int64_t in_page = begin % shape.page_size;
    for (int64_t i = behind; i < count; page++, in_page = 0) {
      int64_t place = *page * shape.page_size + in_page;
      const int64_t end = std::min(count, i + shape.page_size - in_page);
      for (; i < end; i++, place++) {
        keys[i] = first + place * shape.key_stride;
        values[i] = first_value + place * shape.value_stride;
      }
    }
    std::fill(keys, keys + behind, keys[behind]);
    std::fill(values, values + behind, values[behind]);
    std::fill(keys + count, keys + kKeys, keys[count - 1]);
    std::fill(values + count, values + kKeys, values[count - 1]);
  }

  // Packs one head's keys, `offset` elements into a token's, as a panel: keys are its outputs, head dimensions its
  // inputs. A step is a word of each key.
  void pack_keys(int64_t offset, int64_t head_size, T* packed) const {
    uint32_t* out = reinterpret_cast<uint32_t*>(packed);
    const int64_t words = head_size / kStepInputs<T>;
    int64_t word = 0;
    for (; word + kLanes <= words; word += kLanes) {
      for (int64_t i = 0; i < kKeys; i += kLanes) {
        IntVec columns[kLanes];
        transpose_words(reinterpret_cast<const char* const*>(keys + i), offset * sizeof(T) + word * 4, columns);
        for (int j = 0; j < kLanes; j++) store_bits(out + (word + j) * kPanel + i, columns[j]);
      }
    }
    for (; word < num_steps<T>(head_size); word++) {
      const int64_t bytes = std::min<int64_t>(4, (head_size - word * kStepInputs<T>) * sizeof(T));
      for (int64_t i = 0; i < kKeys; i++) {
        uint32_t value = 0;
        std::memcpy(&value, keys[i] + offset + word * kStepInputs<T>, bytes);
        out[word * kPanel + i] = value;
      }
    }
  }

  // Packs one head's values, `head_offset` elements into a token's, in panels of 64 outputs: head dimensions are outputs,
  // keys are inputs.
  void pack_values(int64_t head_offset, int64_t value_size, T* packed) const {
    for (int64_t first = 0; first < value_size; first += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, value_size - first), offset = head_offset + first;
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
template <class T>
class Ahead {
 public:
  // Prefetches nothing if `block` is null. After `calls` calls all lines have been requested.
  Ahead(const KeyBlock<T>* block, int64_t row_elements, int64_t calls)
      : block_(block), lines_(ceil_div(row_elements * sizeof(T), kLine)), count_(ceil_div(2 * kKeys * lines_, calls)) {}

  void ask() {
    if (block_ == nullptr) return;
    for (int64_t i = 0; i < count_ && row_ < 2 * kKeys; i++) {
      const T* row = row_ < kKeys ? block_->keys[row_] : block_->values[row_ - kKeys];
      _mm_prefetch(reinterpret_cast<const char*>(row) + line_ * kLine, _MM_HINT_T1);
      if (++line_ == lines_) line_ = 0, row_++;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const KeyBlock<T>* block_;
  const int64_t lines_, count_;
  int64_t row_ = 0, line_ = 0;
};

}  // namespace moe
