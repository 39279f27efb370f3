// The blocks of a decoder's layers, each with the norm that follows it, and all layers one after another.
#pragma once

#include "attention.h"
#include "exchange.h"
#include "heads.h"
#include "latent.h"
#include "moe.h"
#include "next_norm.h"

namespace moe {

struct Attention {
  NextNorm next;
  AttentionShape shape;
  HeadOps heads;
  Weight qkv;
  const void* qkv_bias;
  Weight output;
  const void* output_bias;
};

// QKV projection, head ops, attention, output projection. `x` and `out` may be the same, as in the blocks below.
template <class T>
void attention_block(Engine& engine, const Attention& block, const StepLayout& step, const StepHeads& heads,
                     const T* x, const KVPages& pages, T* residual, T* out) {
  const int64_t tokens = step.tokens, inner = block.output.inputs;
  T* qkv = engine.qkv.get<T>(tokens * block.qkv.outputs);
  T* attended = engine.attended.get<T>(tokens * inner);
  linear(engine, block.qkv, static_cast<const T*>(block.qkv_bias), x, tokens, block.qkv.inputs, qkv);
  finish_heads(engine, block.shape, block.heads, heads, tokens, qkv, pages);
  paged_attention(engine, block.shape, pages, step, qkv, block.qkv.outputs, attended);
  linear(engine, block.output, static_cast<const T*>(block.output_bias), attended, tokens, inner, out);
  normalize(engine, block.next, tokens, block.output.outputs, residual, out);
}

struct Dense {
  NextNorm next;
  const Experts* mlp;  // one slot
};

// All rows through one SwiGLU.
template <class T>
void dense_block(Engine& engine, const Dense& block, const T* x, int64_t tokens, T* residual, T* out) {
  grouped_mlp(engine, *block.mlp, x, tokens, nullptr, &tokens, out);
  normalize(engine, block.next, tokens, block.mlp->hidden, residual, out);
}

struct Sparse {
  NextNorm next;
  const Gate* gate;
  const Experts* experts;
  const Experts* shared;  // or null
  Exchange* exchange;     // with the other ranks that have experts; null: this rank has all experts
  Replicas replicas;
};

// A step's parameters for all sparse blocks, if experts are on several ranks.
struct SpreadStep {
  int64_t most_tokens;  // of any rank
  int64_t part_tokens;  // of each rank, in one pass through a block
  int64_t part_rows;    // most tokens of all ranks together in one pass
  int64_t timeout_ns;   // of a wait for the peers
  void* arrived;        // room for part_rows rows
  void* computed;       // room for part_rows * top_k rows
};

// Sends rows to the experts' ranks and combines the results. Returns -1, or the rank that did not arrive in time.
template <class T>
int64_t spread_experts(Engine& engine, const Sparse& block, const SpreadStep& step, const int64_t* slot,
                       const float* weights, const T* x, int64_t tokens, T* out) {
  const int64_t top_k = block.gate->config.top_k, hidden = block.experts->hidden, slots = block.exchange->slots();
  T *arrived = static_cast<T*>(step.arrived), *computed = static_cast<T*>(step.computed);
  int64_t* counts = engine.groups.get<int64_t>(slots + step.part_rows * top_k);
  int64_t *row = counts + slots, largest;
  for (int64_t first = 0; first < step.most_tokens; first += step.part_tokens) {
    const int64_t count = std::clamp<int64_t>(tokens - first, 0, step.part_tokens);
    const int64_t most = std::min(step.part_tokens, step.most_tokens - first);
    const T* rows = x + first * hidden;
    const int64_t total =
        block.exchange->dispatch(engine, reinterpret_cast<const char*>(rows), slot + first * top_k, count, most, 0,
                                 step.timeout_ns, reinterpret_cast<char*>(arrived), row, counts, &largest);
    if (total < 0) return -1 - total;
    grouped_mlp(engine, *block.experts, arrived, step.part_rows, row, counts, computed);
    const T* extra = shared_rows(engine, block.shared, rows, count);
    const int64_t late = block.exchange->combine(engine, computed, weights + first * top_k, extra, step.timeout_ns,
                                                 out + first * hidden);
    if (late >= 0) return late;
  }
  return -1;
}

// Gate, experts, weighted sum, shared experts. An exchange needs `spread`. Returns -1, or the rank that did not arrive
// in time.
template <class T>
int64_t sparse_block(Engine& engine, const Sparse& block, const Policies& policies, const SpreadStep* spread,
                     const T* x, int64_t tokens, int64_t num_decode, T* residual, T* out) {
  const int64_t size = tokens * block.gate->config.top_k;
  float* weights = engine.gate_weights.get<float>(size);
  int64_t* slot = engine.slots.get<int64_t>(size);
  float* logits = engine.logits.get<float>(tokens * block.gate->config.experts);
  choose_experts(engine, *block.gate, policies, x, tokens, num_decode, logits, weights, slot);
  take_slots(engine, block.replicas, block.gate->config.experts, size, slot);
  if (block.exchange) {
    const int64_t late = spread_experts(engine, block, *spread, slot, weights, x, tokens, out);
    if (late >= 0) return late;
  } else {
    local_experts(engine, *block.experts, block.shared, slot, weights, x, tokens, block.gate->config.top_k, out);
  }
  normalize(engine, block.next, tokens, block.experts->hidden, residual, out);
  return -1;
}

// One of `attention` and `latent` is null, and one of `sparse` and `dense`. A norm follows each block.
struct Layer {
  const Attention* attention;
  const LatentAttention* latent;
  const Sparse* sparse;
  const Dense* dense;
  const KVPages* pages;
  int64_t group;  // which step of the call it takes
};

// A step's sequences with the pages of one group of layers.
struct GroupStep {
  const StepLayout* layout;
  const StepHeads* heads;
};

// All layers of a decoder. `x` holds the normed rows before and after, `residual` the residual rows.
struct LayersCall {
  Errand errand;
  int64_t element;
  const Layer* layers;
  int64_t count;
  const Policies* policies;    // one for each sparse layer, in order, or null
  const SpreadStep* spread;  // needed if there is an exchange
  const GroupStep* steps;  // of each group
  int64_t num_decode;
  void* residual;
  void* x;
  int64_t late;  // result: -1, or the rank that did not arrive in time
};

// Returns -1, or the rank that did not arrive in time.
template <class T>
int64_t run_layers(Engine& engine, const LayersCall& call) {
  const Policies* policies = call.policies;
  T *residual = static_cast<T*>(call.residual), *x = static_cast<T*>(call.x);
  const int64_t tokens = call.steps->layout->tokens;
  for (const Layer* layer = call.layers; layer < call.layers + call.count; layer++) {
    const GroupStep step = call.steps[layer->group];
    if (layer->latent) {
      latent_block(engine, *layer->latent, *step.layout, *step.heads, x, *layer->pages, residual, x);
    } else {
      attention_block(engine, *layer->attention, *step.layout, *step.heads, x, *layer->pages, residual, x);
    }
    if (layer->dense) {
      dense_block(engine, *layer->dense, x, tokens, residual, x);
      continue;
    }
    const Policies asked = policies ? *policies++ : Policies{};
    const int64_t late =
        sparse_block(engine, *layer->sparse, asked, call.spread, x, tokens, call.num_decode, residual, x);
    if (late >= 0) return late;
  }
  return -1;
}

}  // namespace moe
