// The norm that follows a block.
#pragma once

#include "engine.h"
#include "norms.h"

namespace moe {

// The norm between a block and the next: residual += multiplier * out, out = norm(residual). No norm if `weight` is
// null.
struct NextNorm {
  const void* weight;
  float eps;
  float multiplier;
};

template <class T>
void normalize(Engine& engine, const NextNorm& next, int64_t rows, int64_t size, T* residual, T* out) {
  if (next.weight == nullptr) return;
  for_rows(engine.pool, rows, [&](int64_t i) {
    T *total = residual + i * size, *row = out + i * size;
    add_rms_norm_row(row, total, static_cast<const T*>(next.weight), size, next.eps, next.multiplier, total, row);
  });
}

}  // namespace moe
