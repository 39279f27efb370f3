// The C interface. Python holds the structs; pointers in them must outlive the calls. All sizes are in elements.
// `element` is the type of activations, which decides how weights are stored: see Element.
#include "layers.h"
#include "packing.h"
#include "quantized_packing.h"

namespace moe {
namespace {

// Serves one call at a time. Never destroyed, so that no thread is joined when the process ends.
Engine& engine = *new Engine;

// A call that runs jobs.
struct Call {
  const std::lock_guard<std::mutex> lock{engine.pool.busy};
  const FlushToZero flush;
};

template <class Body>
auto dispatch(Element element, const Body& body) {
  const Call call;
  return element == kBf16 ? body(bf16{}) : body(0.0f);
}

}  // namespace
}  // namespace moe

using namespace moe;

#pragma GCC visibility push(default)
extern "C" {

// Whether this process may use the instructions that the library is compiled for. Linux gives the memory for AMX's
// registers to a process that asks for it.
int moe_may_run() {
#if defined(__AMX_BF16__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return 1;
#endif
}

void moe_set_threads(int threads) {
  const Call call;
  if (threads == engine.pool.size()) return;
  engine.pool.resize(threads);
  engine.scratch = std::vector<Scratch>(threads);
}

int moe_num_threads() { return engine.pool.size(); }

int64_t moe_packed_bytes(Element element, int64_t outputs, int64_t inputs) {
  return ceil_div(outputs, kPanel) * (element == kBf16 ? panel_bytes(bf16{}, inputs) : panel_bytes(0.0f, inputs));
}

// Packs `rows` rows into the panels from `first_panel` on; the last of them may be partly filled. `escapes` has, and
// owns, a list for each bf16 panel, or null.
void moe_pack(Element element, const void* source, int64_t stride, int64_t first_panel, int64_t rows, int64_t inputs,
              void* packed, Escape** escapes) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    engine.pool.run(ceil_div(rows, kPanel), [&](int64_t task, int) {
      const int64_t row = task * kPanel, panel = first_panel + task;
      pack_panel(static_cast<const T*>(source) + row * stride, stride, std::min<int64_t>(kPanel, rows - row), inputs,
                 static_cast<char*>(packed) + panel * panel_bytes(T{}, inputs), escapes + panel);
    });
  });
}

void moe_unpack(Element element, const void* packed, const Escape* const* escapes, int64_t first_row, int64_t rows,
                int64_t inputs, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    unpack_rows(packed, escapes, first_row, rows, inputs, static_cast<T*>(out));
  });
}

int64_t moe_quantized_bytes(const QuantFormat* format, int64_t outputs, int64_t inputs) {
  return ceil_div(outputs, kPanel) * PanelShape(*format, inputs).bytes;
}

// As moe_pack, for a quantised matrix.
void moe_pack_quantized(const QuantFormat* format, const QuantSource* source, int64_t first_panel, int64_t rows,
                        int64_t inputs, void* packed) {
  const Call call;
  const int64_t panel_bytes = PanelShape(*format, inputs).bytes;
  engine.pool.run(ceil_div(rows, kPanel), [&](int64_t task, int) {
    const int64_t row = task * kPanel;
    pack_quantized_panel(*format, *source, row, std::min<int64_t>(kPanel, rows - row), inputs,
                         static_cast<uint8_t*>(packed) + (first_panel + task) * panel_bytes);
  });
}

// The values of rows of a quantised matrix, in the type of activations.
void moe_unpack_quantized(Element element, const QuantFormat* format, const void* packed, int64_t first_row, int64_t rows,
                          int64_t inputs, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    unpack_quantized_rows(*format, static_cast<const uint8_t*>(packed), first_row, rows, inputs, static_cast<T*>(out));
  });
}

// Copies the escapes of `panels` panels, with each list's end mark, to `out` unless null; returns their number.
int64_t moe_list_escapes(const Escape* const* escapes, int64_t panels, Escape* out) {
  int64_t count = 0;
  for (int64_t panel = 0; panel < panels; panel++) {
    if (escapes[panel] == nullptr) continue;
    for (const Escape* escape = escapes[panel];; escape++) {
      if (out) out[count] = *escape;
      count++;
      if (escape->step == kNoStep) break;
    }
  }
  return count;
}

void moe_free_escapes(Escape** escapes, int64_t panels) { std::for_each_n(escapes, panels, std::free); }

// out[i] = row rows[i] of a packed weight: an embedding that shares its weight with the head. Returns `count`. If an
// index is out of range, returns the position of the first such index and writes nothing.
int64_t moe_take_rows(Element element, const Weight* weight, const int64_t* rows, int64_t count, void* out) {
  const auto is_row = [&](int64_t row) { return row >= 0 && row < weight->outputs; };
  const int64_t valid = std::find_if_not(rows, rows + count, is_row) - rows;
  if (valid < count) return valid;
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    for_rows(engine.pool, count, [&](int64_t i) {
      unpack_rows(weight->data, weight->escapes, rows[i], 1, weight->inputs, static_cast<T*>(out) + i * weight->inputs);
    });
  });
  return count;
}

// `out` is float32 if `out_float32`, else of the element type.
void moe_linear(Element element, int out_float32, const Weight* weight, const void* bias, const void* x, int64_t rows,
                void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    const T *input = static_cast<const T*>(x), *added = static_cast<const T*>(bias);
    if (out_float32) {
      linear(engine, *weight, added, input, rows, weight->inputs, static_cast<float*>(out));
    } else {
      linear(engine, *weight, added, input, rows, weight->inputs, static_cast<T*>(out));
    }
  });
}

void moe_rms_norm(Element element, const void* x, const void* weight, int64_t rows, int64_t size, float eps, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    for_rows(engine.pool, rows, [&](int64_t i) {
      rms_norm_row(static_cast<const T*>(x) + i * size, static_cast<const T*>(weight), size, eps,
                   static_cast<T*>(out) + i * size);
    });
  });
}

void moe_add_rms_norm(Element element, const void* x, const void* residual, const void* weight, int64_t rows, int64_t size,
                      float eps, float multiplier, void* total, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    for_rows(engine.pool, rows, [&](int64_t i) {
      add_rms_norm_row(static_cast<const T*>(x) + i * size, static_cast<const T*>(residual) + i * size,
                       static_cast<const T*>(weight), size, eps, multiplier, static_cast<T*>(total) + i * size,
                       static_cast<T*>(out) + i * size);
    });
  });
}

void moe_silu_mul(Element element, const void* gate_up, int64_t rows, int64_t size, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    for_rows(engine.pool, rows, [&](int64_t i) {
      const T* gate = static_cast<const T*>(gate_up) + i * 2 * size;
      silu_mul_row(gate, gate + size, size, static_cast<T*>(out) + i * size);
    });
  });
}

void moe_paged_attention(Element element, const AttentionShape* shape, const KVPages* pages, const StepLayout* step,
                         const void* queries, int64_t stride, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    paged_attention(engine, *shape, *pages, *step, static_cast<const T*>(queries), stride, static_cast<T*>(out));
  });
}

void moe_attention_block(Element element, const Attention* block, const StepLayout* step, const StepHeads* heads,
                         const void* x, const KVPages* pages, void* residual, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    attention_block(engine, *block, *step, *heads, static_cast<const T*>(x), *pages, static_cast<T*>(residual),
                    static_cast<T*>(out));
  });
}

void moe_latent_block(Element element, const LatentAttention* block, const StepLayout* step, const StepHeads* heads,
                      const void* x, const KVPages* pages, void* residual, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    latent_block(engine, *block, *step, *heads, static_cast<const T*>(x), *pages, static_cast<T*>(residual),
                 static_cast<T*>(out));
  });
}

void moe_topk_gate(const GateConfig* config, const float* logits, int64_t rows, float* weights, int64_t* experts) {
  const Call call;
  gate_rows(engine, *config, Policies{}, logits, rows, weights, experts);
}

// best[i] = position of the first largest value of row i, or -1 if a value of the row is NaN or infinite. Tasks share
// the blocks of a row.
void moe_argmax(const float* x, int64_t rows, int64_t size, int64_t* best) {
  constexpr int64_t kBlock = 8192;
  const Call call;
  const int64_t blocks = ceil_div(size, kBlock);
  float* largest = engine.logits.get<float>(rows * blocks);
  engine.pool.run(rows * blocks, [&](int64_t task, int) {
    const int64_t first = task % blocks * kBlock, count = std::min(kBlock, size - first);
    const float* values = x + task / blocks * size + first;
    Vec most = set1(kTaken), zeros = zero();  // a product of zero and what is not finite is NaN
    for_lanes(count, [&](int64_t i, int n) {
      const Vec value = load_first(values + i, n);
      most = max(most, select_first(n, value, set1(kTaken)));
      zeros = fma(value, zero(), zeros);
    });
    largest[task] = max(most) + sum(zeros);
  });
  for (int64_t row = 0; row < rows; row++) {
    const float* maxima = largest + row * blocks;
    if (std::any_of(maxima, maxima + blocks, [](float value) { return std::isnan(value); })) {
      best[row] = -1;
      continue;
    }
    const int64_t block = std::max_element(maxima, maxima + blocks) - maxima;
    const float *values = x + row * size, *end = values + std::min(size, (block + 1) * kBlock);
    best[row] = std::find(values + block * kBlock, end, maxima[block]) - values;
  }
}

int64_t moe_group_by_slot(const int64_t* slot, int64_t size, int64_t slots, int64_t* order, int64_t* counts) {
  return group_by_slot(slot, size, slots, order, counts);
}

void moe_grouped_mlp(Element element, const Experts* experts, const void* x, int64_t num_rows, const int64_t* row,
                     const int64_t* counts, void* y) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    grouped_mlp(engine, *experts, static_cast<const T*>(x), num_rows, row, counts, static_cast<T*>(y));
  });
}

// `order` is as group_by_slot returns it: row i of `y` is that of (token, k) number order[i]. Null: already in order.
void moe_combine(Element element, const void* y, int64_t num_rows, const int64_t* order, const float* weights,
                 int64_t tokens, int64_t top_k, int64_t hidden, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    int64_t* place = engine.groups.get<int64_t>(tokens * top_k);
    std::fill_n(place, tokens * top_k, -1);
    for (int64_t i = 0; i < num_rows; i++) place[order ? order[i] : i] = i;
    combine(engine, static_cast<const T*>(y), place, weights, tokens, top_k, hidden, static_cast<const T*>(nullptr),
            static_cast<T*>(out));
  });
}

void moe_choose_experts(Element element, const Gate* gate, const Policies* policies, const void* x, int64_t tokens,
                        int64_t num_decode, float* logits, float* weights, int64_t* experts) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    choose_experts(engine, *gate, *policies, static_cast<const T*>(x), tokens, num_decode, logits, weights,
                   experts);
  });
}

int64_t moe_sparse_block(Element element, const Sparse* block, const Policies* policies, const SpreadStep* spread,
                         const void* x, int64_t tokens, int64_t num_decode, void* residual, void* out) {
  return dispatch(element, [&](auto type) {
    using T = decltype(type);
    return sparse_block(engine, *block, *policies, spread, static_cast<const T*>(x), tokens, num_decode,
                        static_cast<T*>(residual), static_cast<T*>(out));
  });
}

void moe_dense_block(Element element, const Dense* block, const void* x, int64_t tokens, void* residual, void* out) {
  dispatch(element, [&](auto type) {
    using T = decltype(type);
    dense_block(engine, *block, static_cast<const T*>(x), tokens, static_cast<T*>(residual), static_cast<T*>(out));
  });
}

// Starts all layers. A pool worker may run them while the caller continues; `moe_layers_end` must follow.
void moe_layers_begin(LayersCall* call) {
  call->errand.run = [](Errand* errand) {
    LayersCall& call = *reinterpret_cast<LayersCall*>(errand);
    call.late = static_cast<Element>(call.element) ? run_layers<bf16>(engine, call) : run_layers<float>(engine, call);
  };
  engine.pool.post(call->errand);
}

// Helps until all layers have run. Returns -1, or the rank that did not arrive in time.
int64_t moe_layers_end(LayersCall* call) {
  engine.pool.finish(call->errand);
  return call->late;
}

int64_t moe_exchange_segment_bytes(const ExchangeShape* shape) { return Exchange::segment_bytes(*shape); }

// The segments, one per rank, must start as zeros and outlive the exchange.
Exchange* moe_exchange_open(const ExchangeShape* shape, char* const* segments) {
  return new Exchange(*shape, segments);
}

void moe_exchange_close(Exchange* exchange) { delete exchange; }

int64_t moe_exchange_dispatch(Exchange* exchange, const char* x, const int64_t* slot, int64_t tokens,
                              int64_t most_tokens, int64_t own, int64_t timeout_ns, char* received, int64_t* row,
                              int64_t* counts, int64_t* largest) {
  const Call call;
  return exchange->dispatch(engine, x, slot, tokens, most_tokens, own, timeout_ns, received, row, counts, largest);
}

int64_t moe_exchange_bring_back(Exchange* exchange, const char* y, int64_t timeout_ns, char* out) {
  const Call call;
  return exchange->bring_back(engine, y, timeout_ns, out);
}

int64_t moe_exchange_combine(Element element, Exchange* exchange, const void* y, const float* weights, int64_t timeout_ns,
                             void* out) {
  return dispatch(element, [&](auto type) {
    using T = decltype(type);
    return exchange->combine(engine, static_cast<const T*>(y), weights, static_cast<const T*>(nullptr), timeout_ns,
                             static_cast<T*>(out));
  });
}

// Reads `bytes` (whole MiB) once with all threads: the lower bound on the time of streaming weights.
uint64_t moe_read(const void* data, int64_t bytes) {
  const Call call;
  constexpr int64_t kBlock = 1 << 20;
  std::atomic<uint64_t> total{0};
  engine.pool.run(bytes / kBlock, [&](int64_t task, int) {
    const char* block = static_cast<const char*>(data) + task * kBlock;
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < kBlock; i += 256) {
      for (int j = 0; j < 256; j += 64) {
        sums[j / 64] = max(sums[j / 64], load(reinterpret_cast<const float*>(block + i + j)));
      }
    }
    total += static_cast<uint64_t>(max(max(max(sums[0], sums[1]), max(sums[2], sums[3]))));
  });
  return total;
}

}  // extern "C"
#pragma GCC visibility pop
