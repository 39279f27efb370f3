// Causal attention over the paged cache.
//
// Keys are taken in blocks of 64 at absolute positions (0-63, 64-127, ...), in order, with an online softmax
// (arXiv:1805.02867) per query row. A row takes exactly the blocks in which it sees a key, and each block whole, with
// weight 0 for the keys that it does not see. So its sums do not depend on the rows beside it, on how its prompt was
// cut into chunks, or on what lies behind it in the cache (which must be finite).
//
// The rows of a tile are (key/value head, query, head of the group) of one sequence. Scores are a product with the
// block's keys packed as a panel, outputs a product of the softmax weights (rounded to T) with its values packed.
#pragma once

#include "engine.h"
#include "norms.h"
#include "transpose.h"

namespace moe {

constexpr int64_t kKeys = kPanel;      // keys of a block
constexpr int64_t kAttentionRows = 128;  // of a tile, unless one query has more heads in a group

struct AttentionShape {
  int64_t heads;
  int64_t kv_heads;
  int64_t head_size;
  int64_t page_size;
  int64_t window;  // 0: none
  float scale;
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

// 64 keys of a sequence, at the task's first key/value head, from their pages. Places behind the context repeat its
// last key: they get weight 0.
template <class T>
struct KeyBlock {
  const T* keys[kKeys];
  const T* values[kKeys];

  KeyBlock(const AttentionShape& shape, const StepLayout& step, const AttentionTask& task, int64_t first_key,
           const T* key_cache, const T* value_cache) {
    const int64_t count = std::min(kKeys, step.context_len[task.sequence] - first_key);
    const int64_t* page = step.page_table + task.sequence * step.max_pages + first_key / shape.page_size;
    const int64_t key_size = shape.kv_heads * shape.head_size, group = task.first_group * shape.head_size;
    int64_t in_page = first_key % shape.page_size;
    for (int64_t i = 0; i < count; page++, in_page = 0) {
      int64_t offset = (*page * shape.page_size + in_page) * key_size + group;
      const int64_t end = std::min(count, i + shape.page_size - in_page);
      for (; i < end; i++, offset += key_size) {
        keys[i] = key_cache + offset;
        values[i] = value_cache + offset;
      }
    }
    std::fill(keys + count, keys + kKeys, keys[count - 1]);
    std::fill(values + count, values + kKeys, values[count - 1]);
  }

  // Asks for one of `parts` parts of the block: its rows are too far apart for the processor to guess, and too many to
  // ask for at once.
  void prefetch(int64_t part, int64_t parts, int64_t size) const {
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
    for (int64_t i = kKeys * part / parts; i < kKeys * (part + 1) / parts; i++) {
      for (int64_t byte = 0; byte < bytes; byte += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(keys[i]) + byte, _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(values[i]) + byte, _MM_HINT_T1);
      }
    }
  }

  // One head's keys as the outputs of a panel, head dimensions as its inputs: a step is a word of each key.
  void pack_keys(int64_t group, int64_t head_size, T* packed) const {
    uint32_t* out = reinterpret_cast<uint32_t*>(packed);
    const int64_t words = head_size / kStepInputs<T>;
    int64_t word = 0;
    for (; word + kLanes <= words; word += kLanes) {
      for (int64_t i = 0; i < kKeys; i += kLanes) {
        transpose_words(reinterpret_cast<const char* const*>(keys + i), group * head_size * sizeof(T) + word * 4,
                        out + word * kPanel + i, kPanel);
      }
    }
    for (; word < num_steps<T>(head_size); word++) {
      const int64_t bytes = std::min<int64_t>(4, (head_size - word * kStepInputs<T>) * sizeof(T));
      for (int64_t i = 0; i < kKeys; i++) {
        uint32_t value = 0;
        std::memcpy(&value, keys[i] + group * head_size + word * kStepInputs<T>, bytes);
        out[word * kPanel + i] = value;
      }
    }
  }

  // The same of values, with head dimensions as outputs, in panels of 64, and keys as inputs.
  void pack_values(int64_t group, int64_t head_size, T* packed) const {
    for (int64_t first = 0; first < head_size; first += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, head_size - first), offset = group * head_size + first;
      for (int64_t key = 0; key < kKeys; key += kStepInputs<T>, packed += kStepElements<T>) {
        // A step of float32 is one key, and has no odd one.
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
    for (int i = 0; i < kPanel; i += 2 * kLanes) interleave(even + i, odd + i, out + 2 * i);
  }
};

// Online softmax of one tile's rows: running maximum and sum, and the weighted sum of values.
template <class T>
class AttentionTile {
 public:
  AttentionTile(const AttentionShape& shape, const StepLayout& step, const AttentionTask& task, Scratch& scratch)
      : shape_(shape), step_(step), task_(task), group_heads_(shape.heads / shape.kv_heads) {
    group_rows_ = task.num_queries * group_heads_;
    rows_ = task.num_groups * group_rows_;
    panels_ = ceil_div(shape.head_size, kPanel);
    query_stride_ = num_steps<T>(shape.head_size) * kStepInputs<T>;
    const int64_t first = step.query_start[task.sequence], end = step.query_start[task.sequence + 1];
    first_row_ = first + task.first_query;
    first_position_ = step.context_len[task.sequence] - (end - first) + task.first_query;

    float* floats = scratch.sums.get<float>(rows_ * (kPanel + panels_ * kPanel + 2));
    scores_ = floats;
    sums_ = scores_ + rows_ * kPanel;
    maximum_ = sums_ + rows_ * panels_ * kPanel;
    total_ = maximum_ + rows_;
    T* elements = scratch.rows.get<T>(rows_ * (query_stride_ + kKeys));
    queries_ = elements;
    weights_ = queries_ + rows_ * query_stride_;
    pointers_ = scratch.weights.get<const T*>(2 * rows_);
    packed_keys_ = scratch.keys.get<T>(panel_elements<T>(shape.head_size));
    packed_values_ = scratch.values.get<T>(panels_ * panel_elements<T>(kKeys));
  }

  void run(const T* queries, int64_t stride, const T* key_cache, const T* value_cache, T* out) {
    begin(queries, stride);
    const int64_t last = first_position_ + task_.num_queries - 1;
    int64_t key = first_seen(first_position_) / kKeys * kKeys;
    KeyBlock<T> block(shape_, step_, task_, key, key_cache, value_cache);
    while (key + kKeys <= last) {
      const KeyBlock<T> next(shape_, step_, task_, key + kKeys, key_cache, value_cache);
      take_block(block, key, &next);
      block = next;
      key += kKeys;
    }
    take_block(block, key, nullptr);
    finish(out);
  }

 private:
  int64_t first_seen(int64_t position) const {
    return shape_.window ? std::max<int64_t>(0, position - shape_.window + 1) : 0;
  }

  int64_t query(int64_t row) const { return row % group_rows_ / group_heads_; }
  int64_t token(int64_t row) const { return first_row_ + query(row); }
  int64_t head(int64_t row) const {
    return (task_.first_group + row / group_rows_) * group_heads_ + row % group_heads_;
  }

  void begin(const T* queries, int64_t stride) {
    std::fill_n(sums_, rows_ * panels_ * kPanel, 0.0f);
    std::fill_n(maximum_, rows_, -std::numeric_limits<float>::infinity());
    std::fill_n(total_, rows_, 0.0f);
    for (int64_t row = 0; row < rows_; row++) {
      T* query = queries_ + row * query_stride_;
      query[query_stride_ - 1] = T{};
      std::memcpy(query, queries + token(row) * stride + head(row) * shape_.head_size, shape_.head_size * sizeof(T));
      pointers_[row] = query;
      pointers_[rows_ + row] = weights_ + row * kKeys;
    }
  }

  void take_block(const KeyBlock<T>& block, int64_t first_key, const KeyBlock<T>* next) {
    // The queries that see a key of this block: from its first key on, and with a window up to where that has passed.
    const int64_t first_query = std::max<int64_t>(0, first_key - first_position_);
    int64_t end_query = task_.num_queries;
    if (shape_.window) end_query = std::min(end_query, first_key + kKeys - 1 + shape_.window - first_position_);
    const int64_t count = (end_query - first_query) * group_heads_;

    int64_t part = 0;
    const auto prefetch = [&] {
      if (next) next->prefetch(part++, 4 * task_.num_groups, task_.num_groups * shape_.head_size);
    };
    for (int64_t group = 0; group < task_.num_groups; group++) {
      const int64_t first = group * group_rows_ + first_query * group_heads_;
      prefetch();
      block.pack_keys(group, shape_.head_size, packed_keys_);
      prefetch();
      multiply_panel<false>(pointers_ + first, count, packed_keys_, num_steps<T>(shape_.head_size),
                            scores_ + first * kPanel);
      prefetch();
      for (int64_t row = first; row < first + count; row++) soften(row, first_key);
      prefetch();
      block.pack_values(group, shape_.head_size, packed_values_);
      for (int64_t panel = 0; panel < panels_; panel++) {
        multiply_panel<false>(pointers_ + rows_ + first, count, packed_values_ + panel * panel_elements<T>(kKeys),
                              num_steps<T>(kKeys), sums_ + (panel * rows_ + first) * kPanel, /*resume=*/true);
      }
    }
  }

  // Turns a row of scores into softmax weights and moves what is summed so far to the new maximum. Powers are of 2.
  void soften(int64_t row, int64_t first_key) {
    constexpr int kVecs = kKeys / kLanes;
    const int64_t position = first_position_ + query(row);
    const int end = static_cast<int>(std::min(kKeys, position - first_key + 1));
    const int begin = static_cast<int>(std::max<int64_t>(0, first_seen(position) - first_key));
    const Vec nothing = set1(-std::numeric_limits<float>::infinity()), scale = set1(shape_.scale * 1.44269504f);
    Vec scores[kVecs], most = nothing;
    for (int j = 0; j < kVecs; j++) {
      scores[j] = load(scores_ + row * kPanel + j * kLanes) * scale;
      if (end < kKeys) scores[j] = select_first(end - j * kLanes, scores[j], nothing);
      if (begin > 0) scores[j] = select_first(begin - j * kLanes, nothing, scores[j]);
      most = max(most, scores[j]);
    }
    const float maximum = std::max(maximum_[row], max(most));
    Vec total = zero();
    for (int j = 0; j < kVecs; j++) {
      const Vec weight = exp2(scores[j] - set1(maximum));
      store(weights_ + row * kKeys + j * kLanes, weight);
      total = total + weight;
    }
    if (maximum != maximum_[row]) {  // otherwise the factor is 1
      const Vec factor = exp2(set1(maximum_[row] - maximum));
      total_[row] *= first_lane(factor);
      for (int64_t panel = 0; panel < panels_; panel++) {
        float* sums = sums_ + (panel * rows_ + row) * kPanel;
        for (int j = 0; j < kPanel; j += kLanes) store(sums + j, load(sums + j) * factor);
      }
      maximum_[row] = maximum;
    }
    total_[row] += sum(total);
  }

  void finish(T* out) {
    for (int64_t row = 0; row < rows_; row++) {
      T* to = out + (token(row) * shape_.heads + head(row)) * shape_.head_size;
      const Vec total = set1(total_[row]);
      for_lanes(shape_.head_size, [&](int64_t i, int n) {
        const float* sums = sums_ + (i / kPanel * rows_ + row) * kPanel + i % kPanel;
        store_first(to + i, load(sums) / total, n);
      });
    }
  }

  const AttentionShape& shape_;
  const StepLayout& step_;
  const AttentionTask& task_;
  const int64_t group_heads_;
  int64_t group_rows_, rows_, panels_, query_stride_, first_row_, first_position_;
  float *scores_, *sums_, *maximum_, *total_;
  T *queries_, *weights_, *packed_keys_, *packed_values_;
  const T** pointers_;
};

// out[tokens, heads, head_size]; a token's queries are `stride` elements after the previous token's.
template <class T>
void paged_attention(Engine& engine, const AttentionShape& shape, const StepLayout& step, const T* queries,
                     int64_t stride, const T* key_cache, const T* value_cache, T* out) {
  const int64_t tile_queries = std::max<int64_t>(1, kAttentionRows / (shape.heads / shape.kv_heads));
  // The heads of a key lie side by side: where there are sequences enough, a task reads them all.
  const int64_t decode_groups = step.sequences >= 4 * engine.pool.size() ? shape.kv_heads : 1;
  std::vector<AttentionTask>& tasks = engine.attention_tasks;
  tasks.clear();
  for (int64_t sequence = 0; sequence < step.sequences; sequence++) {
    const int64_t num_queries = step.query_start[sequence + 1] - step.query_start[sequence];
    const int64_t groups = num_queries == 1 ? decode_groups : 1;
    for (int64_t group = 0; group < shape.kv_heads; group += groups) {
      for (int64_t first = 0; first < num_queries; first += tile_queries) {
        tasks.push_back({sequence, group, groups, first, std::min(num_queries - first, tile_queries)});
      }
    }
  }
  engine.pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, int thread) {
    AttentionTile<T> tile(shape, step, tasks[task], engine.scratch[thread]);
    tile.run(queries, stride, key_cache, value_cache, out);
  });
}

// What follows the projection to queries, keys and values: norms per head, rotary embedding, keys and values into the
// cache. Changes the queries in `qkv` in place.
struct HeadOps {
  const void* query_norm;  // [head_size], or null: no norms
  const void* key_norm;
  float eps;
};

// The same of all layers in a step.
struct StepHeads {
  int64_t rotated;      // rotary dimensions, even
  const float* cos;     // [rows, rotated]
  const float* sin;
  const int64_t* rope_row;    // row of cos and sin of each token; null: its own
  const int64_t* cache_slot;  // page * page_size + offset of each token
  int64_t page_size;
};

template <class T>
void finish_heads(Engine& engine, const AttentionShape& shape, const HeadOps& ops, const StepHeads& step, int64_t tokens,
                  T* qkv, T* key_cache, T* value_cache) {
  const int64_t d = shape.head_size, row_size = (shape.heads + 2 * shape.kv_heads) * d;
  constexpr int64_t kTokens = 16;  // of a task: few tokens are not worth waking another thread
  engine.pool.run(ceil_div(tokens, kTokens), [&](int64_t task, int) {
    for (int64_t token = task * kTokens; token < std::min(tokens, (task + 1) * kTokens); token++) {
      const int64_t angle = (step.rope_row ? step.rope_row[token] : token) * step.rotated;
      T* heads = qkv + token * row_size;
      for (int64_t head = 0; head < shape.heads + shape.kv_heads; head++) {
        T* values = heads + head * d;
        const void* norm = head < shape.heads ? ops.query_norm : ops.key_norm;
        if (norm) rms_norm_row(values, static_cast<const T*>(norm), d, ops.eps, values);
        if (step.rotated) rotate_head(values, step.cos + angle, step.sin + angle, step.rotated);
      }
      const int64_t place = step.cache_slot[token] * shape.kv_heads * d, bytes = shape.kv_heads * d * sizeof(T);
      std::memcpy(key_cache + place, heads + shape.heads * d, bytes);
      std::memcpy(value_cache + place, heads + (shape.heads + shape.kv_heads) * d, bytes);
    }
  });
}

}  // namespace moe
