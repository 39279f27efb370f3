// Causal attention over the paged cache.
//
// Each query row reads keys in blocks of 64 at absolute positions (0-63, 64-127, ...), in order, with an online softmax
// (arXiv:1805.02867). Blocks form spans of 512 keys. Each span is summed from zero, then appended to the sums of the
// spans before it (arXiv:2402.14083 sums parts of the keys like that). A row reads exactly the blocks in which it sees
// a key. It reads each block whole, with weight 0 for the keys that it does not see. So its sums do not depend on the
// other rows, on how its prompt was cut into chunks, on which threads ran its spans, or on the keys that it does not see
// (which must be finite).
//
// The rows of a tile are (key/value head, query, head of the group) of one sequence. With many rows, a block's keys are
// packed as a panel and multiplied with the queries; its values are packed and multiplied with the softmax weights
// (rounded to T). With few rows, keys and values stay in registers instead. Keys after the last visible one are then
// skipped: they would add zeros. Rows of 8 bits are first read into rows of T.
#pragma once

#include "key_block.h"

namespace moe {

constexpr int64_t kSpan = 8 * kKeys;  // keys that are summed from zero
constexpr float kLog2E = 1.44269504f;

// Softmax sums of rows over some keys: the maximum score, the sum of powers, and the values weighted by the powers, in
// panels.
struct RowSums {
  int64_t rows, panels;
  float *values, *maximum, *total;

  RowSums(float* memory, int64_t num_rows, int64_t num_panels)
      : rows(num_rows), panels(num_panels), values(memory), maximum(values + rows * panels * kPanel),
        total(maximum + rows) {}

  static int64_t size(int64_t rows, int64_t panels) { return rows * (panels * kPanel + 2); }

  float* value(int64_t row, int64_t panel) const { return values + (panel * rows + row) * kPanel; }

  void clear() const {
    std::fill_n(values, rows * panels * kPanel, 0.0f);
    std::fill_n(maximum, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(total, rows, 0.0f);
  }

  // Adds the sums of `next`, the following span. Powers are of 2.
  void append(const RowSums& next) const {
    for (int64_t row = 0; row < rows; row++) {
      if (next.total[row] == 0.0f) continue;  // the row sees no key there
      const float most = std::max(maximum[row], next.maximum[row]);
      const Vec own = exp2(set1(maximum[row] - most)), other = exp2(set1(next.maximum[row] - most));
      for (int64_t panel = 0; panel < panels; panel++) {
        float *to = value(row, panel), *from = next.value(row, panel);
        for (int j = 0; j < kPanel; j += kLanes) store(to + j, load(to + j) * own + load(from + j) * other);
      }
      total[row] = total[row] * first_lane(own) + next.total[row] * first_lane(other);
      maximum[row] = most;
    }
  }

  template <class T>
  void write(int64_t row, int64_t value_size, const float* sink, T* out) const {
    Vec sum = set1(total[row]);
    if (sink) {  // in units of the largest score
      const float logit = std::min(*sink * kLog2E - maximum[row], 126.0f);
      sum = sum + set1(std::exp2(logit));
    }
    for_lanes(value_size, [&](int64_t i, int n) {
      store_first(out + i, load(value(row, i / kPanel) + i % kPanel) / sum, n);
    });
  }
};

// Scores of kRows queries with kLanes keys, `words` words of each. A query's scores start kPanel floats after the
// previous query's.
template <int kRows, class T>
void score_keys(const T* const* queries, const T* const* keys, int64_t offset, int64_t words, Ahead& ahead,
                float* scores) {
  WordSums<T> sums[kRows];
  for (int64_t word = 0; word < words; word += kLanes) {
    IntVec columns[kLanes];
    transpose_words(reinterpret_cast<const char* const*>(keys), offset * sizeof(T) + word * 4, columns);
    ahead.ask();
    for (int j = 0; j < kLanes; j++) {
      for (int r = 0; r < kRows; r++) {
        sums[r].add(columns[j], broadcast_word(queries[r] + (word + j) * kStepInputs<T>));
      }
    }
    if ((word + kLanes) % kTileSteps == 0) {
      for (int r = 0; r < kRows; r++) sums[r].end_tile();
    }
  }
  for (int r = 0; r < kRows; r++) store(scores + r * kPanel, sums[r].total);
}

inline void load_step(const float* const* values, int64_t offset, IntVec (&columns)[kTileVecs]) {
  for (int j = 0; j < kTileVecs; j++) columns[j] = load_bits(values[0] + offset + j * kLanes);
}

inline void load_step(const bf16* const* values, int64_t offset, IntVec (&columns)[kTileVecs]) {
  for (int j = 0; j < kTileVecs; j += 2) {
    IntVec pairs[2];
    interleave(values[0] + offset + j * kLanes, values[1] + offset + j * kLanes, pairs);
    columns[j] = pairs[0];
    columns[j + 1] = pairs[1];
  }
}

// Adds kTileOutputs dimensions of the values of `steps` keys or pairs of keys, weighted for kRows rows.
template <int kRows, class T>
void weigh_values(const T* const* weights, const T* const* values, int64_t offset, int64_t steps, Ahead& ahead,
                  float* out) {
  WordSums<T> sums[kRows][kTileVecs];
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kTileVecs; j++) sums[r][j].total = load(out + r * kPanel + j * kLanes);
  }
  for (int64_t step = 0; step < steps; step++) {
    IntVec columns[kTileVecs];
    load_step(values + step * kStepInputs<T>, offset, columns);
    ahead.ask();
    for (int r = 0; r < kRows; r++) {
      const IntVec weight = broadcast_word(weights[r] + step * kStepInputs<T>);
      for (int j = 0; j < kTileVecs; j++) sums[r][j].add(columns[j], weight);
    }
    if ((step + 1) % kTileSteps != 0 && step + 1 < steps) continue;
    for (int r = 0; r < kRows; r++) {
      for (int j = 0; j < kTileVecs; j++) sums[r][j].end_tile();
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kTileVecs; j++) store(out + r * kPanel + j * kLanes, sums[r][j].total);
  }
}

// One task: its rows over its keys.
template <class T>
class AttentionTile {
 public:
  AttentionTile(const AttentionShape& shape, const KVPages& pages, const StepLayout& step, const AttentionTask& task,
                Scratch& scratch)
      : shape_(shape), pages_(pages), step_(step), task_(task), group_heads_(shape.heads / shape.kv_heads),
        group_rows_(task.num_queries * group_heads_), rows_(task.num_groups * group_rows_),
        panels_(ceil_div(shape.value_size, kPanel)), query_stride_(num_steps<T>(shape.head_size) * kStepInputs<T>),
        first_row_(step.query_start[task.sequence] + task.first_query), first_position_(position_of(step, task)),
        scores_(scratch.sums.get<float>(rows_ * kPanel + 2 * RowSums::size(rows_, panels_))),
        span_(scores_ + rows_ * kPanel, rows_, panels_),
        all_(scores_ + rows_ * kPanel + RowSums::size(rows_, panels_), rows_, panels_) {
    queries_ = scratch.rows.get<T>(rows_ * (query_stride_ + kKeys));
    weights_ = queries_ + rows_ * query_stride_;
    pointers_ = scratch.weights.get<const T*>(2 * rows_);
    const int64_t steps = ceil_div(num_steps<T>(shape.head_size), kTileSteps) * kTileSteps;
    packed_keys_ = scratch.keys.get<T>(steps * kStepElements<T>);
    std::fill(packed_keys_ + panel_elements<T>(shape.head_size), packed_keys_ + steps * kStepElements<T>, T{});
    packed_values_ = scratch.values.get<T>(panels_ * panel_elements<T>(kKeys));
    if (pages.code != kRowPlain) rows_of_t_ = scratch.widened.get<T>(kKeys * (shape.head_size + shape.value_size));
  }

  // The first key of a task's first block.
  static int64_t first_key(const AttentionShape& shape, const StepLayout& step, const AttentionTask& task) {
    const int64_t seen = first_seen(shape, position_of(step, task));
    return std::max(task.first_key, seen / kKeys * kKeys);
  }

  // `then` is the task that this thread will probably run next, or null. If the task has only a part of its rows' keys,
  // their sums go to `part`, else the result goes to `out`.
  void run(const T* queries, int64_t stride, const AttentionTask* then, float* part, T* out) {
    const TileRegisters registers;
    load_queries(queries, stride);
    const RowSums all = task_.part < 0 ? all_ : RowSums(part, rows_, panels_);
    int64_t key = first_key(shape_, step_, task_);
    const int64_t end = std::min(task_.end_key, first_position_ + task_.num_queries);
    KeyBlock blocks[2];
    int current = 0;
    blocks[current].take(shape_, pages_, step_, task_, key);
    for (bool first = true; key < end; first = false) {
      sums_ = first ? all : span_;
      sums_.clear();
      for (const int64_t span_end = std::min(end, (key / kSpan + 1) * kSpan); key < span_end; key += kKeys) {
        const AttentionTask* next_task = key + kKeys < end ? &task_ : then;
        if (next_task) {
          const int64_t next_key = next_task == &task_ ? key + kKeys : first_key(shape_, step_, *then);
          blocks[1 - current].take(shape_, pages_, step_, *next_task, next_key);
        }
        const KeyBlock* next = next_task ? &blocks[1 - current] : nullptr;
        take_block(blocks[current], key, next, next_task ? next_task->num_groups : 0);
        current = 1 - current;
      }
      if (!first) all.append(sums_);
    }
    if (task_.part >= 0) return;
    for (int64_t row = 0; row < rows_; row++) {
      T* to = out + (token(row) * shape_.heads + head(row)) * shape_.value_size;
      all.write(row, shape_.value_size, shape_.sink(head(row)), to);
    }
  }

 private:
  int64_t query(int64_t row) const { return row % group_rows_ / group_heads_; }
  int64_t token(int64_t row) const { return first_row_ + query(row); }
  int64_t head(int64_t row) const {
    return (task_.first_group + row / group_rows_) * group_heads_ + row % group_heads_;
  }

  void load_queries(const T* queries, int64_t stride) {
    for (int64_t row = 0; row < rows_; row++) {
      T* query = queries_ + row * query_stride_;
      query[query_stride_ - 1] = T{};
      std::memcpy(query, queries + token(row) * stride + head(row) * shape_.head_size, shape_.head_size * sizeof(T));
      pointers_[row] = query;
      pointers_[rows_ + row] = weights_ + row * kKeys;
    }
  }

  void take_block(const KeyBlock& block, int64_t first_key, const KeyBlock* next, int64_t next_groups) {
    // The queries that see a key of this block: from its first key on. With a window, up to the last whose window
    // reaches the block.
    const int64_t first_query = std::max<int64_t>(0, first_key - first_position_);
    int64_t end_query = task_.num_queries;
    if (shape_.window) end_query = std::min(end_query, first_key + kKeys - 1 + shape_.window - first_position_);
    const int64_t count = (end_query - first_query) * group_heads_;
    const int64_t words = num_steps<T>(shape_.head_size);
    const bool few =
        count <= kFewRows && shape_.head_size % kTileOutputs == 0 && shape_.value_size % kTileOutputs == 0;
    const int64_t seen = std::min(kKeys, first_position_ + end_query - first_key);
    const int64_t lanes = ceil_div(seen, kLanes), steps = ceil_div(seen, kStepInputs<T>);
    const int64_t calls = few ? lanes * (words / kLanes) + steps * (shape_.value_size / kTileOutputs) : 4;
    const int64_t next_rows = shape_.shared ? 1 : next_groups;  // side by side
    Ahead ahead(next, next_rows * shape_.head_size * pages_.item_size, task_.num_groups * calls);

    for (int64_t group = 0; group < task_.num_groups; group++) {
      const int64_t first = group * group_rows_ + first_query * group_heads_;
      if (group == 0 || !shape_.shared) head_.take(block, shape_, pages_, group, rows_of_t_);
      const T *const *queries = pointers_ + first, *const *weights = queries + rows_;
      float* scores = scores_ + first * kPanel;
      if (few) {
        with_rows(count, [&](auto rows) {
          for (int64_t i = 0; i < lanes * kLanes; i += kLanes) {
            score_keys<decltype(rows)::value>(queries, head_.keys + i, head_.key_offset, words, ahead, scores + i);
          }
        });
      } else {
        ahead.ask();
        head_.pack_keys(shape_.head_size, packed_keys_);
        ahead.ask();
        multiply_packed(queries, count, packed_keys_, words * kStepInputs<T>, scores);
      }
      for (int64_t row = first; row < first + count; row++) soften(row, first_key);
      if (few) {
        with_rows(count, [&](auto rows) {
          for (int64_t i = 0; i < shape_.value_size; i += kTileOutputs) {
            weigh_values<decltype(rows)::value>(weights, head_.values, head_.value_offset + i, steps, ahead,
                                                sums_.value(first, i / kPanel) + i % kPanel);
          }
        });
      } else {
        ahead.ask();
        head_.pack_values(shape_.value_size, packed_values_);
        ahead.ask();
        for (int64_t panel = 0; panel < panels_; panel++) {
          multiply_packed(weights, count, packed_values_ + panel * panel_elements<T>(kKeys), kKeys,
                          sums_.value(first, panel), /*resume=*/true);
        }
      }
    }
  }

  // Turns a row of scores into softmax weights and rescales the sums so far to the new maximum. Powers are of 2.
  void soften(int64_t row, int64_t first_key) {
    constexpr int kVecs = kKeys / kLanes;
    const int64_t position = first_position_ + query(row);
    const int end = static_cast<int>(std::min(kKeys, position - first_key + 1));
    const int begin = static_cast<int>(std::max<int64_t>(0, first_seen(shape_, position) - first_key));
    const Vec nothing = set1(-std::numeric_limits<float>::infinity()), scale = set1(shape_.scale * kLog2E);
    Vec scores[kVecs], most = nothing;
    for (int j = 0; j < kVecs; j++) {
      scores[j] = load(scores_ + row * kPanel + j * kLanes) * scale;
      if (end < kKeys) scores[j] = select_first(end - j * kLanes, scores[j], nothing);
      if (begin > 0) scores[j] = select_first(begin - j * kLanes, nothing, scores[j]);
      most = max(most, scores[j]);
    }
    const float maximum = std::max(sums_.maximum[row], max(most));
    Vec total = zero();
    for (int j = 0; j < kVecs; j++) {
      const Vec weight = exp2(scores[j] - set1(maximum));
      store(weights_ + row * kKeys + j * kLanes, weight);
      total = total + weight;
    }
    if (maximum != sums_.maximum[row]) {  // otherwise the factor is 1
      const Vec factor = exp2(set1(sums_.maximum[row] - maximum));
      sums_.total[row] *= first_lane(factor);
      for (int64_t panel = 0; panel < panels_; panel++) {
        float* sums = sums_.value(row, panel);
        for (int j = 0; j < kPanel; j += kLanes) store(sums + j, load(sums + j) * factor);
      }
      sums_.maximum[row] = maximum;
    }
    sums_.total[row] += sum(total);
  }

  const AttentionShape& shape_;
  const KVPages& pages_;
  const StepLayout& step_;
  const AttentionTask& task_;
  const int64_t group_heads_, group_rows_, rows_, panels_, query_stride_, first_row_, first_position_;
  float* scores_;
  RowSums span_, all_;
  RowSums sums_ = all_;  // of the current span
  T *queries_, *weights_, *packed_keys_, *packed_values_, *rows_of_t_ = nullptr;  // the last: of rows of 8 bits
  HeadBlock<T> head_;  // whose keys and values are multiplied
  const T** pointers_;
};

}  // namespace moe
