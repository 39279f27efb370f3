// Operations between the QKV projection and attention: norms per head, rotary embedding, and writing keys and values
// into the cache.
#pragma once

#include "engine.h"
#include "norms.h"

namespace moe {

// Weights of the norms.
struct HeadOps {
  const void* query_norm;  // [head_size], or null: no norms
  const void* key_norm;
  float eps;
};

// The inputs that are the same for all layers of a step.
struct StepHeads {
  int64_t rotated;      // rotary dimensions, even
  const float* cos;     // [rows, rotated]
  const float* sin;
  const int64_t* rope_row;    // row of cos and sin for each token; null: token i uses row i
  const int64_t* cache_position;  // page * page_size + offset of each token
  int64_t page_size;
};

// Changes the queries in `qkv` in place.
template <class T>
void finish_heads(Engine& engine, const AttentionShape& shape, const HeadOps& ops, const StepHeads& step,
                  int64_t tokens, T* qkv, T* key_cache, T* value_cache) {
  const int64_t d = shape.head_size, row_size = (shape.heads + 2 * shape.kv_heads) * d;
  constexpr int64_t kTokens = 16;  // per task: fewer tokens are not worth waking another thread
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
      const int64_t place = step.cache_position[token] * shape.kv_heads * d, bytes = shape.kv_heads * d * sizeof(T);
      std::memcpy(key_cache + place, heads + shape.heads * d, bytes);
      std::memcpy(value_cache + place, heads + (shape.heads + shape.kv_heads) * d, bytes);
    }
  });
}

}  // namespace moe
