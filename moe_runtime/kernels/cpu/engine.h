// Shared by the operations: the thread pool, memory that is kept between calls, and the linear map.
#pragma once

#include <sys/mman.h>

#include <cstdlib>

#include "int8_products.h"
#include "pool.h"

namespace moe {

// Requests huge pages within [data, data + bytes), which must not have been written yet. Streaming reads then miss the
// TLB less, and are up to twice as fast.
inline void use_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Memory that only grows.
class Buffer {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = ceil_div(count * sizeof(T) + kSlack, kSlack) * kSlack;
    if (bytes > bytes_) {
      data_.reset();
      data_.reset(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) std::abort();
      use_huge_pages(data_.get(), bytes);
      bytes_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  static constexpr size_t kSlack = 4096;
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<void, Free> data_;
  size_t bytes_ = 0;
};

// Scratch of one thread within a task.
struct Scratch {
  Buffer sums, rows, keys, values, weights, widened;
};

// Rows of one slot that one task multiplies with a panel.
struct PanelTask {
  int64_t slot, panel, first_row, rows;
};

// Queries of one sequence, some of its key/value heads, and some of its keys, starting at a span.
struct AttentionTask {
  int64_t sequence, first_group, num_groups, first_query, num_queries, first_key, end_key;
  int64_t part;  // index among the parts to merge afterwards; -1: the task has all keys
};

// Copies of rows, as a product takes them.
struct RowBuffers {
  Buffer padded, codes, scales, sums;
};

struct Engine {
  Pool pool;
  std::vector<Scratch> scratch = std::vector<Scratch>(1);
  std::vector<PanelTask> panel_tasks;
  std::vector<AttentionTask> attention_tasks;
  RowBuffers rows, hidden_rows;
  Buffer widened, logits, qkv, attended, hidden, gate_weights, slots, turns, expert_rows, shared_rows, groups,
      parts, row_factors, projected, queries;
};

// Splits rows into tasks of several rows, for operations with little work per row.
template <class Body>
void for_rows(Pool& pool, int64_t rows, const Body& body) {
  constexpr int64_t kRows = 16;
  pool.run(ceil_div(rows, kRows), [&](int64_t task, int) {
    for (int64_t i = task * kRows; i < std::min(rows, (task + 1) * kRows); i++) body(i);
  });
}

// The type of activations. Weights that are not quantised are float32 too, or coded bf16.
enum Element : int { kFloat32 = 0, kBf16 = 1 };

// A packed weight; plain data, filled by the caller. `escapes` has a list for each bf16 panel. `format` is null unless
// the weight is quantised.
struct Weight {
  const void* data;
  const Escape* const* escapes;
  int64_t outputs;
  int64_t inputs;
  const QuantFormat* format;
};

// `out[r][0 .. 64)` = the products of rows of `row_inputs` inputs with a panel of a weight.
template <class T>
void multiply(const T* const* x, int64_t rows, const Weight& weight, int64_t panel, float* out) {
  if (weight.format) {
    const PanelShape shape(*weight.format, weight.inputs);
    const auto* data = static_cast<const uint8_t*>(weight.data) + panel * shape.bytes;
    return multiply_quantized(x, rows, *weight.format, shape, data, weight.inputs, out);
  }
  multiply_panel(x, rows, panel_of(T{}, weight.data, weight.escapes, panel, weight.inputs), num_steps<T>(weight.inputs),
                 out);
}

// The length of the rows that `multiply` takes: whole steps, with zeros after the inputs.
template <class T>
int64_t row_inputs(const Weight& weight) {
  const int64_t step = weight.format ? step_inputs(weight.format->code) : kStepInputs<T>;
  return ceil_div(weight.inputs, step) * step;
}

// Rows as the products with a weight take them: `x`, `stride` elements apart, in whole steps with zeros after the
// inputs; or in int8, and `x` is null.
template <class T>
struct InputRows {
  const T* x;
  int64_t stride;
  Int8Rows int8;
};

template <class T>
InputRows<T> int8_rows(Pool& pool, RowBuffers& buffers, const Weight& weight, const T* x, int64_t rows, int64_t stride) {
  const int64_t block = block_inputs(*weight.format), blocks = ceil_div(weight.inputs, block);
  const Int8Rows found{buffers.codes.get<int8_t>(rows * row_inputs<T>(weight)), buffers.scales.get<float>(rows * blocks),
                       buffers.sums.get<int32_t>(rows * blocks), row_inputs<T>(weight), block, blocks,
                       weight.format->term ? 1 : zero_byte(weight.format->code)};
  for_rows(pool, rows, [&](int64_t row) { quantize_row(found, row, x + row * stride, weight.inputs); });
  return {nullptr, 0, found};
}

template <class T>
InputRows<T> input_rows(Pool& pool, RowBuffers& buffers, const Weight& weight, const T* x, int64_t rows, int64_t stride) {
  if (weight.format && weight.format->int8_rows) return int8_rows(pool, buffers, weight, x, rows, stride);
  const int64_t padded = row_inputs<T>(weight);
  if (padded == weight.inputs) return {x, stride, {}};
  T* copy = buffers.padded.get<T>(rows * padded);
  for (int64_t i = 0; i < rows; i++) {
    std::memcpy(copy + i * padded, x + i * stride, weight.inputs * sizeof(T));
    std::memset(copy + i * padded + weight.inputs, 0, (padded - weight.inputs) * sizeof(T));
  }
  return {copy, padded, {}};
}

// `out[i][0 .. 64)` = the products of the rows with these numbers with a panel of a weight.
template <class T>
void multiply(const InputRows<T>& rows, const int64_t* numbers, int64_t count, const Weight& weight, int64_t panel,
              float* out) {
  if (rows.x == nullptr) {
    const PanelShape shape(*weight.format, weight.inputs);
    const auto* data = static_cast<const uint8_t*>(weight.data) + panel * shape.bytes;
    return multiply_int8(*weight.format, shape, rows.int8, numbers, count, data, weight.inputs, out);
  }
  const T* pointers[kChunkRows];
  for (int64_t i = 0; i < count; i++) pointers[i] = rows.x + numbers[i] * rows.stride;
  multiply(pointers, count, weight, panel, out);
}

// out[rows, outputs] = x[rows, inputs] @ weight.T + bias; sums in float32, rounded once to Out.
template <class T, class Out>
void linear(Engine& engine, const Weight& weight, const T* bias, const T* x, int64_t rows, int64_t stride, Out* out) {
  const InputRows<T> input = input_rows(engine.pool, engine.rows, weight, x, rows, stride);
  const int64_t chunks = ceil_div(rows, kChunkRows), chunk_rows = rows ? ceil_div(rows, chunks) : 0;
  const int64_t panels = ceil_div(weight.outputs, kPanel);
  engine.pool.run(panels * chunks, [&](int64_t task, int thread) {
    const int64_t panel = task / chunks, first = task % chunks * chunk_rows;
    const int64_t count = std::min(chunk_rows, rows - first);
    if (count <= 0) return;
    int64_t numbers[kChunkRows];
    std::iota(numbers, numbers + count, first);
    float* sums = engine.scratch[thread].sums.get<float>(kChunkRows * kPanel);
    multiply(input, numbers, count, weight, panel, sums);
    const int64_t column = panel * kPanel, width = std::min<int64_t>(kPanel, weight.outputs - column);
    for (int64_t i = 0; i < count; i++) {
      for_lanes(width, [&](int64_t j, int n) {
        Vec value = load(sums + i * kPanel + j);
        if (bias) value = value + load_first(bias + column + j, n);
        store_first(out + (first + i) * weight.outputs + column + j, value, n);
      });
    }
  });
}

}  // namespace moe
