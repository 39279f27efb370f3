// Operations between the QKV projection and attention: norms per head, rotary embedding, and writing keys and values
// into the cache.
#pragma once

#include "kv_pages.h"
#include "norms.h"

namespace moe {

// Which norm queries and keys have: of each head, of all heads of a token together, of each head after the rotation.
enum HeadNorm : int32_t { kNoNorm = 0, kHead = 1, kToken = 2, kRotatedHead = 3 };

// Weights of the norms: [head_size], or of all heads for kToken.
struct HeadOps {
  const void* query_norm;
  const void* key_norm;
  float eps;
  int32_t norm;
};

// The inputs that are the same for all layers of a step.
struct StepHeads {
  int64_t rotated;      // rotary dimensions, even
  const float* cos;     // [rows, rotated]
  const float* sin;
  const int64_t* rope_row;    // row of cos and sin for each token; null: token i uses row i
  const int64_t* cache_position;  // page * page_size + offset of each token
  const float* query_scale;  // factor on each token's queries, or null; latent attention only
};

// Changes the queries in `qkv` in place.
template <class T>
void finish_heads(Engine& engine, const AttentionShape& shape, const HeadOps& ops, const StepHeads& step,
                  int64_t tokens, T* qkv, const KVPages& pages) {
  const int64_t d = shape.head_size, row_size = (shape.heads + 2 * shape.kv_heads) * d;
  constexpr int64_t kTokens = 16;  // per task: fewer tokens are not worth waking another thread
  engine.pool.run(ceil_div(tokens, kTokens), [&](int64_t task, int) {
    for (int64_t token = task * kTokens; token < std::min(tokens, (task + 1) * kTokens); token++) {
      const int64_t angle = (step.rope_row ? step.rope_row[token] : token) * step.rotated;
      T *heads = qkv + token * row_size, *keys = heads + shape.heads * d;
      const T *query_norm = static_cast<const T*>(ops.query_norm), *key_norm = static_cast<const T*>(ops.key_norm);
      if (ops.norm == kToken) {
        rms_norm_row(heads, query_norm, shape.heads * d, ops.eps, heads);
        rms_norm_row(keys, key_norm, shape.kv_heads * d, ops.eps, keys);
      }
      for (int64_t head = 0; head < shape.heads + shape.kv_heads; head++) {
        T* values = heads + head * d;
        const T* norm = head < shape.heads ? query_norm : key_norm;
        if (ops.norm == kHead) rms_norm_row(values, norm, d, ops.eps, values);
        if (step.rotated) rotate_head(values, step.cos + angle, step.sin + angle, step.rotated);
        if (ops.norm == kRotatedHead) rms_norm_row(values, norm, d, ops.eps, values);
      }
      const int64_t position = step.cache_position[token];
      write_rows(pages, pages.keys, position, keys, shape.kv_heads, d, 0);
      write_rows(pages, pages.values, position, keys + shape.kv_heads * d, shape.kv_heads, d, 0);
    }
  });
}

}  // namespace moe
