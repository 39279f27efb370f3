// The parts of a sparse block: gate, grouping by slot, SwiGLU experts over groups of rows, weighted sum per token.
#pragma once

#include "engine.h"
#include "gate.h"

namespace moe {

// Packed SwiGLU experts, one after another. For each expert, w13 holds the panels of the gate projection, then those of
// the up projection, each [intermediate, hidden]. w2 holds the panels of the down projection [hidden, intermediate]. The
// outputs of both are those of one expert. Unless `row_gate` [hidden] is null, a row's output is multiplied by the
// sigmoid of its product with x's row. Biases are null, or those of each expert: `b13` of the gate and of the up
// projection, each padded with zeros to whole panels, `b2` [hidden].
struct Experts {
  Weight w13;
  Weight w2;
  int64_t slots;
  int64_t hidden;
  int64_t intermediate;
  const void* row_gate;
  const void* b13;
  const void* b2;
  SwiGLU swiglu;
};

// Adds a bias to the first `width` sums of each row.
template <class T>
void add_bias(const T* bias, int64_t rows, int64_t width, float* sums) {
  for (int64_t i = 0; i < rows; i++) {
    for_lanes(width, [&](int64_t j, int n) {
      store_first(sums + i * kPanel + j, load_first(sums + i * kPanel + j, n) + load_first(bias + j, n), n);
    });
  }
}

// One task per slot, panel and chunk of the slot's rows; the chunks of a panel follow each other.
inline void list_tasks(std::vector<PanelTask>& tasks, const int64_t* counts, int64_t slots, int64_t panels) {
  tasks.clear();
  int64_t start = 0;
  for (int64_t slot = 0; slot < slots; slot++) {
    const int64_t chunks = ceil_div(counts[slot], kChunkRows);
    for (int64_t panel = 0; panel < panels; panel++) {
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t first = counts[slot] * chunk / chunks, end = counts[slot] * (chunk + 1) / chunks;
        tasks.push_back({slot, panel, start + first, end - first});
      }
    }
    start += counts[slot];
  }
}

// factors[row] = sigmoid(x[row] @ gate)
template <class T>
void row_factors(Engine& engine, const T* x, int64_t rows, int64_t size, const T* gate, float* factors) {
  for_rows(engine.pool, rows, [&](int64_t row) {
    Vec total = zero();
    for_lanes(size, [&](int64_t i, int n) {
      total = fma(load_first(x + row * size + i, n), load_first(gate + i, n), total);
    });
    factors[row] = first_lane(sigmoid(set1(sum(total))));
  });
}

// y[R, hidden], rows grouped by slot: w2 @ round(swiglu(gate @ x, up @ x)), rounded once. Row i of the grouped order
// is x[row[i]], or x[i] where `row` is null.
template <class T>
void grouped_mlp(Engine& engine, const Experts& experts, const T* x, int64_t num_rows, const int64_t* row,
                 const int64_t* counts, T* y) {
  int64_t total = 0;
  for (int64_t slot = 0; slot < experts.slots; slot++) total += counts[slot];
  const int64_t up_panels = ceil_div(experts.intermediate, kPanel), down_panels = ceil_div(experts.hidden, kPanel);
  const int64_t hidden_stride = row_inputs<T>(experts.w2);
  T* hidden = engine.hidden.get<T>(total * hidden_stride);
  float* factors = nullptr;
  if (experts.row_gate) {
    factors = engine.row_factors.get<float>(num_rows);
    row_factors(engine, x, num_rows, experts.hidden, static_cast<const T*>(experts.row_gate), factors);
  }

  const InputRows<T> input = input_rows(engine.pool, engine.rows, experts.w13, x, num_rows, experts.hidden);
  list_tasks(engine.panel_tasks, counts, experts.slots, up_panels);
  engine.pool.run(engine.panel_tasks.size(), [&](int64_t index, int thread) {
    const PanelTask& task = engine.panel_tasks[index];
    int64_t numbers[kChunkRows];
    for (int64_t i = 0; i < task.rows; i++) numbers[i] = row ? row[task.first_row + i] : task.first_row + i;
    float* gate = engine.scratch[thread].sums.get<float>(2 * kChunkRows * kPanel);
    float* up = gate + kChunkRows * kPanel;
    const int64_t first = task.slot * 2 * up_panels + task.panel;
    multiply(input, numbers, task.rows, experts.w13, first, gate);
    multiply(input, numbers, task.rows, experts.w13, first + up_panels, up);
    if (experts.b13) {
      const T* bias = static_cast<const T*>(experts.b13) + first * kPanel;
      add_bias(bias, task.rows, kPanel, gate);
      add_bias(bias + up_panels * kPanel, task.rows, kPanel, up);
    }
    // Values past the intermediate size are zero, so they can fill the last step.
    const int64_t column = task.panel * kPanel, width = std::min<int64_t>(kPanel, hidden_stride - column);
    for (int64_t i = 0; i < task.rows; i++) {
      const float *g = gate + i * kPanel, *u = up + i * kPanel;
      T* out = hidden + (task.first_row + i) * hidden_stride + column;
      if (std::isinf(experts.swiglu.limit)) {
        silu_mul_row(g, u, width, out);
      } else {
        swiglu_row(experts.swiglu, g, u, width, out);
      }
    }
  });

  InputRows<T> products{hidden, hidden_stride, {}};
  if (experts.w2.format && experts.w2.format->int8_rows) {
    products = int8_rows(engine.pool, engine.hidden_rows, experts.w2, hidden, total, hidden_stride);
  }
  list_tasks(engine.panel_tasks, counts, experts.slots, down_panels);
  engine.pool.run(engine.panel_tasks.size(), [&](int64_t index, int thread) {
    const PanelTask& task = engine.panel_tasks[index];
    int64_t numbers[kChunkRows];
    std::iota(numbers, numbers + task.rows, task.first_row);
    float* sums = engine.scratch[thread].sums.get<float>(2 * kChunkRows * kPanel);
    const int64_t panel = task.slot * down_panels + task.panel;
    multiply(products, numbers, task.rows, experts.w2, panel, sums);
    const int64_t column = task.panel * kPanel, width = std::min<int64_t>(kPanel, experts.hidden - column);
    if (experts.b2) {
      add_bias(static_cast<const T*>(experts.b2) + task.slot * experts.hidden + column, task.rows, width, sums);
    }
    for (int64_t i = 0; i < task.rows; i++) {
      const int64_t place = task.first_row + i;
      const Vec factor = set1(factors ? factors[row ? row[place] : place] : 1.0f);
      T* out = y + place * experts.hidden + column;
      for_lanes(width, [&](int64_t j, int n) { store_first(out + j, load(sums + i * kPanel + j) * factor, n); });
    }
  });
}

// out[t] = round(sum over k, in order, of weights[t, k] * y[place[t, k]]) (+ extra[t], rounded again). A place of -1
// adds nothing.
template <class T>
void combine(Engine& engine, const T* y, const int64_t* place, const float* weights, int64_t tokens, int64_t top_k,
             int64_t hidden, const T* extra, T* out) {
  constexpr int64_t kTokens = 8;
  engine.pool.run(ceil_div(tokens, kTokens), [&](int64_t task, int) {
    for (int64_t token = task * kTokens; token < std::min(tokens, (task + 1) * kTokens); token++) {
      for_lanes(hidden, [&](int64_t i, int n) {
        Vec sum = zero();
        for (int64_t k = token * top_k; k < (token + 1) * top_k; k++) {
          if (place[k] >= 0) sum = sum + load_first(y + place[k] * hidden + i, n) * set1(weights[k]);
        }
        if (extra) sum = rounded<T>(sum) + load_first(extra + token * hidden + i, n);
        store_first(out + token * hidden + i, sum, n);
      });
    }
  });
}

// Stable grouping: `order` gets the positions of the entries that are not -1, slot after slot; returns their number.
inline int64_t group_by_slot(const int64_t* slot, int64_t size, int64_t slots, int64_t* order, int64_t* counts) {
  std::fill_n(counts, slots, 0);
  for (int64_t i = 0; i < size; i++) {
    if (slot[i] >= 0) counts[slot[i]]++;
  }
  int64_t total = 0;
  for (int64_t s = 0; s < slots; s++) {  // turn counts into start positions
    const int64_t count = counts[s];
    counts[s] = total;
    total += count;
  }
  for (int64_t i = 0; i < size; i++) {
    if (slot[i] >= 0) order[counts[slot[i]]++] = i;
  }
  for (int64_t s = slots - 1; s > 0; s--) counts[s] -= counts[s - 1];
  return total;
}

struct Gate {
  GateConfig config;
  Weight weight;  // [experts, hidden]
  const void* bias;  // [experts], of the weight's type; or null
  int32_t weight_is_float32;
  int64_t* counts;      // [2, experts] of this layer, prefill then decode; calls add to it
  int64_t phase_stride;  // elements between the phases
};

// Multiplies with the gate's weight (`logits[tokens, experts]`), then applies the gate. Logits of a bf16 gate are
// rounded to bf16, as torch rounds that product.
template <class T>
void choose_experts(Engine& engine, const Gate& gate, const Policies& policies, const T* x, int64_t tokens,
           int64_t num_decode, float* logits, float* weights, int64_t* experts) {
  const int64_t hidden = gate.weight.inputs, num_experts = gate.config.experts;
  if (gate.weight_is_float32 && sizeof(T) != sizeof(float)) {
    float* wide = engine.widened.get<float>(tokens * hidden);
    for_lanes(tokens * hidden, [&](int64_t i, int n) { store_first(wide + i, load_first(x + i, n), n); });
    linear<float>(engine, gate.weight, static_cast<const float*>(gate.bias), wide, tokens, hidden, logits);
  } else {
    linear<T>(engine, gate.weight, static_cast<const T*>(gate.bias), x, tokens, hidden, logits);
    if (sizeof(T) != sizeof(float)) {
      for_lanes(tokens * num_experts,
                [&](int64_t i, int n) { store_first(logits + i, rounded<T>(load_first(logits + i, n)), n); });
    }
  }
  const int64_t size = tokens * gate.config.top_k;
  gate_rows(engine, gate.config, policies, logits, tokens, weights, experts);
  if (policies.chosen) std::copy_n(experts, size, policies.chosen);
  if (gate.counts) {
    for (int64_t i = 0; i < size; i++) {
      if (experts[i] < 0) continue;
      const int64_t phase = i < num_decode * gate.config.top_k ? 1 : 0;
      gate.counts[phase * gate.phase_stride + experts[i]]++;
    }
  }
}

// The slots of each expert, `slot[experts, length]`: the i-th row of an expert goes to entry i % length of its list.
// The length is a power of two.
struct Replicas {
  const int64_t* slot;
  int64_t length;
};

// Replaces each of `size` experts by a slot; -1 stays -1.
inline void take_slots(Engine& engine, const Replicas& replicas, int64_t experts, int64_t size, int64_t* chosen) {
  int64_t* turns = engine.turns.get<int64_t>(experts);
  std::fill_n(turns, experts, 0);
  for (int64_t i = 0; i < size; i++) {
    const int64_t expert = chosen[i];
    if (expert >= 0) chosen[i] = replicas.slot[expert * replicas.length + (turns[expert]++ & (replicas.length - 1))];
  }
}

// The output rows of the shared experts; null if there are none.
template <class T>
const T* shared_rows(Engine& engine, const Experts* shared, const T* x, int64_t tokens) {
  if (shared == nullptr) return nullptr;
  T* rows = engine.shared_rows.get<T>(tokens * shared->hidden);
  grouped_mlp(engine, *shared, x, tokens, nullptr, &tokens, rows);
  return rows;
}

// Average rows of an expert per pass. More rows would not use its weights better, and would take more memory.
constexpr int64_t kExpertRows = MOE_EXPERT_ROWS;

// The weighted sum of each token's experts `slot[tokens, top_k]`, all on this rank, plus the shared experts unless
// `shared` is null.
template <class T>
void local_experts(Engine& engine, const Experts& experts, const Experts* shared, const int64_t* slot,
                   const float* weights, const T* x, int64_t tokens, int64_t top_k, T* out) {
  const int64_t all = tokens * top_k, parts = ceil_div(all, kExpertRows * experts.slots);
  int64_t* counts = engine.groups.get<int64_t>(experts.slots + 3 * all);
  int64_t *order = counts + experts.slots, *row = order + all, *place = row + all;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = tokens * part / parts, count = tokens * (part + 1) / parts - first, size = count * top_k;
    const T* rows = x + first * experts.hidden;
    const int64_t kept = group_by_slot(slot + first * top_k, size, experts.slots, order, counts);
    if (kept < size) std::fill_n(place, size, -1);
    for (int64_t i = 0; i < kept; i++) {
      row[i] = order[i] / top_k;
      place[order[i]] = i;
    }
    T* y = engine.expert_rows.get<T>(size * experts.hidden);
    grouped_mlp(engine, experts, rows, count, row, counts, y);
    const T* extra = shared_rows(engine, shared, rows, count);
    combine(engine, y, place, weights + first * top_k, count, top_k, experts.hidden, extra,
            out + first * experts.hidden);
  }
}

}  // namespace moe
