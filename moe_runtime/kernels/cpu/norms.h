// Row operations outside the matrix products: norms, rotary embedding, SwiGLU. Each rounds where its torch twin rounds.
#pragma once

#include "vec.h"

namespace moe {

// out = weight * round(x / sqrt(mean(x^2) + eps)). `x` and `out` may be the same.
template <class T>
void rms_norm_row(const T* x, const T* weight, int64_t size, float eps, T* out) {
  Vec squares = zero();
  for_lanes(size, [&](int64_t i, int n) {
    const Vec v = load_first(x + i, n);
    squares = fma(v, v, squares);
  });
  const Vec scale = set1(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps));
  for_lanes(size, [&](int64_t i, int n) {
    store_first(out + i, load_first(weight + i, n) * rounded<T>(load_first(x + i, n) * scale), n);
  });
}

// total = residual + multiplier * x, then the norm of total.
template <class T>
void add_rms_norm_row(const T* x, const T* residual, const T* weight, int64_t size, float eps, float multiplier,
                      T* total, T* out) {
  const Vec factor = set1(multiplier);
  for_lanes(size, [&](int64_t i, int n) {
    store_first(total + i, fma(load_first(x + i, n), factor, load_first(residual + i, n)), n);
  });
  rms_norm_row(total, weight, size, eps, out);
}

// Rotates the first `turned` dimensions of one head in place; dimension i pairs with i + turned / 2.
template <class T>
void rotate_head(T* head, const float* cos, const float* sin, int64_t turned) {
  const int64_t half = turned / 2;
  for_lanes(half, [&](int64_t i, int n) {
    const Vec first = load_first(head + i, n), second = load_first(head + half + i, n);
    const Vec cos1 = load_first(cos + i, n), cos2 = load_first(cos + half + i, n);
    const Vec sin1 = load_first(sin + i, n), sin2 = load_first(sin + half + i, n);
    store_first(head + i, first * cos1 - second * sin1, n);
    store_first(head + half + i, second * cos2 + first * sin2, n);
  });
}

inline Vec sigmoid(Vec x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

inline Vec silu(Vec x) { return x / (set1(1.0f) + exp(zero() - x)); }

// The activation between an expert's projections, for finite limits; kernels/swiglu.py has the same.
struct SwiGLU {
  float alpha;
  float limit;  // infinite: silu(gate) * up
  float offset;
};

// out = round((clamp(up) + offset) * gate * sigmoid(alpha * gate)), with the gate at most at the limit; in float32.
template <class T>
void swiglu_row(const SwiGLU& swiglu, const float* gate, const float* up, int64_t size, T* out) {
  const Vec limit = set1(swiglu.limit), least = set1(-swiglu.limit), offset = set1(swiglu.offset);
  const Vec alpha = set1(swiglu.alpha);
  for_lanes(size, [&](int64_t i, int n) {
    const Vec g = min(load_first(gate + i, n), limit), u = min(max(load_first(up + i, n), least), limit);
    store_first(out + i, (u + offset) * (g * sigmoid(alpha * g)), n);
  });
}

// out = round(silu(gate) * up), computed in float32.
template <class T, class Input>
void silu_mul_row(const Input* gate, const Input* up, int64_t size, T* out) {
  for_lanes(size, [&](int64_t i, int n) {
    store_first(out + i, silu(load_first(gate + i, n)) * load_first(up + i, n), n);
  });
}

}  // namespace moe
