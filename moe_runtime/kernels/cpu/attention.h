// Attention as tasks for the pool; attention_tile.h has the work of one task.
#pragma once

#include "attention_tile.h"

namespace moe {

constexpr int64_t kAttentionRows = 128;  // most rows of a task, unless one query has more heads in a group

// Lists the tasks of a step; returns the number of parts. Each span of a decoding sequence is its own task. If there
// are enough spans, one task reads all heads, which are side by side in memory.
inline int64_t list_tasks(std::vector<AttentionTask>& tasks, const AttentionShape& shape, const StepLayout& step,
                          int threads) {
  const int64_t tile_queries = std::max<int64_t>(1, kAttentionRows / (shape.heads / shape.kv_heads));
  int64_t spans = 0, parts = 0;
  for (int64_t sequence = 0; sequence < step.sequences; sequence++) {
    spans += ceil_div(step.context_len[sequence], kSpan);
  }
  const int64_t decode_groups = spans >= 4 * threads ? shape.kv_heads : 1;
  tasks.clear();
  for (int64_t sequence = 0; sequence < step.sequences; sequence++) {
    const int64_t num_queries = step.query_start[sequence + 1] - step.query_start[sequence];
    const int64_t groups = num_queries == 1 ? decode_groups : 1, end = step.context_len[sequence];
    for (int64_t group = 0; group < shape.kv_heads; group += groups) {
      AttentionTask task{sequence, group, groups, 0, 1, 0, end, -1};
      if (num_queries == 1) {
        const int64_t first = shape.window ? std::max<int64_t>(0, end - shape.window) / kSpan * kSpan : 0;
        for (int64_t key = first; key < end; key += kSpan) {
          task.first_key = key;
          task.end_key = std::min(end, key + kSpan);
          task.part = end - first > kSpan ? parts++ : -1;
          tasks.push_back(task);
        }
      } else {
        for (task.first_query = 0; task.first_query < num_queries; task.first_query += tile_queries) {
          task.num_queries = std::min(num_queries - task.first_query, tile_queries);
          tasks.push_back(task);
        }
      }
    }
  }
  return parts;
}

// out[tokens, heads, value_size]; a token's queries are `stride` elements after the previous token's.
template <class T>
void paged_attention(Engine& engine, const AttentionShape& shape, const KVPages& pages, const StepLayout& step,
                     const T* queries, int64_t stride, T* out) {
  std::vector<AttentionTask>& tasks = engine.attention_tasks;
  const int64_t parts = list_tasks(tasks, shape, step, engine.pool.size());
  const int64_t count = static_cast<int64_t>(tasks.size()), panels = ceil_div(shape.value_size, kPanel);
  const int64_t group_heads = shape.heads / shape.kv_heads;
  const int64_t part_size = RowSums::size(shape.heads, panels);
  float* memory = engine.parts.get<float>(parts * part_size);
  engine.pool.run(count, [&](int64_t index, int thread) {
    const AttentionTask& task = tasks[index];
    const AttentionTask* then = task.num_queries == 1 && index + 1 < count ? &tasks[index + 1] : nullptr;
    float* part = task.part < 0 ? nullptr : memory + task.part * part_size;
    AttentionTile<T> tile(shape, pages, step, task, engine.scratch[thread]);
    tile.run(queries, stride, then, part, out);
  });
  if (parts == 0) return;
  // Whether two tasks are parts of the same rows.
  const auto same_rows = [&](const AttentionTask& a, const AttentionTask& b) {
    return a.sequence == b.sequence && a.first_group == b.first_group && a.part >= 0;
  };
  engine.pool.run(count, [&](int64_t index, int) {
    const AttentionTask& task = tasks[index];
    if (task.part < 0 || (index > 0 && same_rows(tasks[index - 1], task))) return;  // not the first of its parts
    RowSums all(memory + task.part * part_size, task.num_groups * group_heads, panels);
    for (int64_t next = index + 1; next < count && same_rows(tasks[next], task); next++) {
      all.append(RowSums(memory + tasks[next].part * part_size, all.rows, panels));
    }
    const int64_t first_head = task.first_group * group_heads;
    T* rows = out + (step.query_start[task.sequence] * shape.heads + first_head) * shape.value_size;
    for (int64_t row = 0; row < all.rows; row++) {
      all.write(row, shape.value_size, shape.sink(first_head + row), rows + row * shape.value_size);
    }
  });
}

}  // namespace moe
