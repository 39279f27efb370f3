// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). The cache holds a latent row and a rotated key
// of each token, which all heads share. A head's key matrix is applied to its query and its value matrix to the sum of
// latents, so one head of keys and values serves all queries, in prompts and in decode steps alike.
#pragma once

#include "attention.h"
#include "heads.h"
#include "next_norm.h"

namespace moe {

struct LatentSizes {
  int64_t query_rank;  // of the compressed queries; 0: the first projection gives the queries
  int64_t latent;
  int64_t nope;
  int64_t rope;
};

// out[row, head, ..] = x[row, head, ..] @ weight[head].T, rounded once. `weight` has the panels of each head's weight
// [outputs, inputs], one head after another, not quantised. Strides are elements between rows and between heads.
template <class T>
void head_products(Engine& engine, const Weight& weight, int64_t heads, const T* x, int64_t rows,
                   int64_t row_stride, int64_t head_stride, T* out, int64_t out_stride, int64_t out_head_stride) {
  const int64_t chunks = ceil_div(rows, kChunkRows), chunk_rows = rows ? ceil_div(rows, chunks) : 0;
  const int64_t panels = ceil_div(weight.outputs, kPanel), padded = num_steps<T>(weight.inputs) * kStepInputs<T>;
  engine.pool.run(heads * panels * chunks, [&](int64_t task, int thread) {
    const int64_t head = task / (panels * chunks), panel = task / chunks % panels, first = task % chunks * chunk_rows;
    const int64_t count = std::min(chunk_rows, rows - first);
    if (count <= 0) return;
    Scratch& scratch = engine.scratch[thread];
    const T* pointers[kChunkRows];
    T* copies = padded == weight.inputs ? nullptr : scratch.rows.get<T>(kChunkRows * padded);
    for (int64_t i = 0; i < count; i++) {
      pointers[i] = x + (first + i) * row_stride + head * head_stride;
      if (copies) {  // what follows an odd number of inputs belongs to somebody else
        T* copy = copies + i * padded;
        copy[padded - 1] = T{};
        std::memcpy(copy, pointers[i], weight.inputs * sizeof(T));
        pointers[i] = copy;
      }
    }
    float* sums = scratch.sums.get<float>(kChunkRows * kPanel);
    multiply(pointers, count, weight, head * panels + panel, sums);
    const int64_t column = panel * kPanel, width = std::min<int64_t>(kPanel, weight.outputs - column);
    for (int64_t i = 0; i < count; i++) {
      T* to = out + (first + i) * out_stride + head * out_head_stride + column;
      for_lanes(width, [&](int64_t j, int n) { store_first(to + j, load(sums + i * kPanel + j), n); });
    }
  });
}

struct LatentAttention {
  NextNorm next;
  AttentionShape shape;
  LatentSizes sizes;
  Weight down;  // to the compressed queries or the queries, the latent and the shared key
  const void* down_bias;
  const void* query_norm;  // [query_rank]
  const void* latent_norm;
  float eps;
  Weight up;  // from the compressed queries to the queries; no data without them
  Weight key;    // of each head, [latent, nope]
  Weight value;  // of each head, [head value size, latent]
  Weight output;
  const void* output_bias;
};

// Norms of the compressed queries and of the latent; the latent and the rotated key go into the cache.
template <class T>
void finish_down(Engine& engine, const LatentAttention& block, const StepHeads& step, int64_t tokens, T* down,
                 const KVPages& pages) {
  const LatentSizes& sizes = block.sizes;
  const int64_t row_size = block.down.outputs, key_size = sizes.latent + sizes.rope;
  for_rows(engine.pool, tokens, [&](int64_t token) {
    T *row = down + token * row_size, *latent = row + row_size - key_size;
    if (sizes.query_rank) {
      rms_norm_row(row, static_cast<const T*>(block.query_norm), sizes.query_rank, block.eps, row);
    }
    rms_norm_row(latent, static_cast<const T*>(block.latent_norm), sizes.latent, block.eps, latent);
    const int64_t angle = (step.rope_row ? step.rope_row[token] : token) * step.rotated;
    rotate_head(latent + sizes.latent, step.cos + angle, step.sin + angle, step.rotated);
    write_rows(pages, pages.keys, step.cache_position[token], latent, 1, key_size, pages.key_split);
  });
}

// Puts the rotated part of each head's query behind its product with the key matrix, and scales both.
template <class T>
void finish_queries(Engine& engine, const LatentAttention& block, const StepHeads& step, int64_t tokens,
                    const T* projected, int64_t stride, T* queries) {
  const LatentSizes& sizes = block.sizes;
  const int64_t heads = block.shape.heads, key_size = sizes.latent + sizes.rope, size = sizes.nope + sizes.rope;
  for_rows(engine.pool, tokens, [&](int64_t token) {
    const int64_t angle = (step.rope_row ? step.rope_row[token] : token) * step.rotated;
    for (int64_t head = 0; head < heads; head++) {
      T *query = queries + (token * heads + head) * key_size, *rotated = query + sizes.latent;
      std::memcpy(rotated, projected + token * stride + head * size + sizes.nope, sizes.rope * sizeof(T));
      rotate_head(rotated, step.cos + angle, step.sin + angle, step.rotated);
      if (step.query_scale == nullptr) continue;
      const Vec factor = set1(step.query_scale[token]);
      for_lanes(key_size, [&](int64_t i, int n) { store_first(query + i, load_first(query + i, n) * factor, n); });
    }
  });
}

// In how many groups the heads attend. All share the keys, so one group reads them best. But if the step has fewer spans
// than threads could take, several groups keep more threads busy.
inline int64_t head_groups(int64_t heads, const StepLayout& step, int threads) {
  int64_t spans = 0;
  for (int64_t sequence = 0; sequence < step.sequences; sequence++) {
    if (step.query_start[sequence + 1] - step.query_start[sequence] > 1) return 1;
    spans += ceil_div(step.context_len[sequence], kSpan);
  }
  if (spans >= 2 * threads) return 1;
  int64_t groups = std::min<int64_t>(heads, threads);
  while (heads % groups != 0) groups--;
  return groups;
}

// `x` and `out` may be the same. Values are the front of the keys.
template <class T>
void latent_block(Engine& engine, const LatentAttention& block, const StepLayout& step, const StepHeads& heads,
                  const T* x, const KVPages& pages, T* residual, T* out) {
  const int64_t tokens = step.tokens, num_heads = block.shape.heads, key_size = block.shape.head_size;
  const int64_t latent = block.sizes.latent, query_size = block.sizes.nope + block.sizes.rope;
  T* down = engine.qkv.get<T>(tokens * block.down.outputs);
  linear(engine, block.down, static_cast<const T*>(block.down_bias), x, tokens, block.down.inputs, down);
  finish_down(engine, block, heads, tokens, down, pages);
  const T* projected = down;
  int64_t stride = block.down.outputs;
  if (block.sizes.query_rank) {
    T* up = engine.projected.get<T>(tokens * block.up.outputs);
    linear(engine, block.up, static_cast<const T*>(nullptr), down, tokens, stride, up);
    projected = up;
    stride = block.up.outputs;
  }
  T* queries = engine.queries.get<T>(tokens * num_heads * key_size);
  head_products(engine, block.key, num_heads, projected, tokens, stride, query_size, queries, num_heads * key_size,
                key_size);
  finish_queries(engine, block, heads, tokens, projected, stride, queries);
  AttentionShape shape = block.shape;
  shape.kv_heads = head_groups(num_heads, step, engine.pool.size());
  T* attended = engine.attended.get<T>(tokens * num_heads * latent);
  paged_attention(engine, shape, pages, step, queries, num_heads * key_size, attended);
  const int64_t value_size = block.value.outputs;
  T* values = engine.queries.get<T>(tokens * num_heads * value_size);  // the queries are not read any more
  head_products(engine, block.value, num_heads, attended, tokens, num_heads * latent, latent, values,
                num_heads * value_size, value_size);
  linear(engine, block.output, static_cast<const T*>(block.output_bias), values, tokens, num_heads * value_size, out);
  normalize(engine, block.next, tokens, block.output.outputs, residual, out);
}

}  // namespace moe
