// The gate of one token: scores, choice of experts, weights. Ties go to the lower expert.
#pragma once

#include "engine.h"
#include "norms.h"

namespace moe {

struct GateConfig {
  int64_t experts;
  int64_t top_k;
  int64_t groups;
  int64_t topk_groups;
  int32_t sigmoid;  // else softmax
  int32_t normalize;
  int32_t groups_by_best;  // a group's rank is its best choice, else the sum of its two best
  float scale;
  const float* correction_bias;  // affects the choice, not the weights; may be null
};

// An expert policy: how many of its chosen experts a token uses.
struct Policy {
  float top_k;      // at most this number
  float top_p;      // the fewest, in order of choice, whose probabilities reach this sum
  float threshold;  // drops experts whose probability is below this fraction of the largest
  float sharpness;  // a sigmoid gate's probabilities are the softmax of its logits times this
};

// The expert policies that a step applies to a layer's gate.
struct Policies {
  const int64_t* policy;   // each token's index into `policies`, 0 for none; null: no token has one
  const Policy* policies;  // of this layer; the first is not read
  int16_t* chosen;         // output [tokens, top_k]: the experts that each token uses, -1 for none; or null

  const Policy* of(int64_t token) const { return policy && policy[token] ? policies + policy[token] : nullptr; }
};

constexpr float kTaken = -std::numeric_limits<float>::infinity();

inline int64_t whole_lanes(int64_t size) { return ceil_div(size, kLanes) * kLanes; }

// Position of the first largest of `size` values (a whole number of lanes). At least one must not be NaN.
inline int64_t first_largest(const float* values, int64_t size) {
  Vec best = load(values);
  for (int64_t i = kLanes; i < size; i += kLanes) best = max(best, load(values + i));
  const Vec largest = set1(max(best));
  for (int64_t i = 0; i < size; i += kLanes) {
    const uint32_t lanes = equal_lanes(load(values + i), largest);
    if (lanes) return i + __builtin_ctz(lanes);
  }
  return 0;
}

inline void softmax_row(const float* logits, int64_t size, float* scores) {
  Vec most = set1(kTaken);
  for_lanes(size, [&](int64_t i, int n) {
    most = max(most, select_first(n, load_first(logits + i, n), set1(kTaken)));
  });
  const Vec largest = set1(max(most));
  Vec total = zero();
  for_lanes(size, [&](int64_t i, int n) {
    const Vec power = exp(load_first(logits + i, n) - largest);
    store_first(scores + i, power, n);
    total = total + select_first(n, power, zero());
  });
  const Vec sum_of_all = set1(sum(total));
  for_lanes(size, [&](int64_t i, int n) { store_first(scores + i, load_first(scores + i, n) / sum_of_all, n); });
}

// Sets `choice` to -inf for experts outside the best groups.
inline void keep_best_groups(const GateConfig& config, float* choice, float* group_scores) {
  const int64_t size = config.experts / config.groups;
  std::fill_n(group_scores, whole_lanes(config.groups), kTaken);
  for (int64_t g = 0; g < config.groups; g++) {
    float best = kTaken, second = kTaken;
    for (int64_t i = 0; i < size; i++) {
      const float value = choice[g * size + i];
      second = std::max(second, std::min(best, value));
      best = std::max(best, value);
    }
    group_scores[g] = config.groups_by_best ? best : best + second;
  }
  for (int64_t kept = 0; kept < config.topk_groups; kept++) {
    group_scores[first_largest(group_scores, whole_lanes(config.groups))] = kTaken;
  }
  for (int64_t g = 0; g < config.groups; g++) {
    if (group_scores[g] != kTaken) std::fill_n(choice + g * size, size, kTaken);
  }
}

// Replaces each chosen expert that the policy drops by -1, with weight 0; keeps at least one. `scratch` holds a row of
// floats.
inline void drop_experts(const GateConfig& config, const Policy& policy, const float* logits, const float* scores,
                         float* scratch, float* weights, int64_t* experts) {
  const float* probabilities = scores;
  if (config.sigmoid) {
    const Vec sharpness = set1(policy.sharpness);
    for_lanes(config.experts, [&](int64_t i, int n) {
      store_first(scratch + i, load_first(logits + i, n) * sharpness, n);
    });
    softmax_row(scratch, config.experts, scratch);
    probabilities = scratch;
  }
  float total = 0.0f, largest = 0.0f;
  int64_t kept = 0;
  while (kept < config.top_k && kept < policy.top_k && !(total >= policy.top_p)) {
    const float probability = probabilities[experts[kept++]];
    total += probability;
    largest = std::max(largest, probability);
  }
  for (int64_t k = 0; k < config.top_k; k++) {
    if (k >= kept || probabilities[experts[k]] < policy.threshold * largest) {
      experts[k] = -1;
      weights[k] = 0.0f;
    }
  }
}

// `scratch` holds 3 * whole_lanes(experts) floats; `policy` may be null.
inline void gate_row(const GateConfig& config, const Policy* policy, const float* logits, float* scratch,
                     float* weights, int64_t* experts) {
  const int64_t padded = whole_lanes(config.experts);
  float *scores = scratch, *choice = scratch + padded, *group_scores = scratch + 2 * padded;
  if (config.sigmoid) {
    for_lanes(config.experts, [&](int64_t i, int n) {
      const Vec one = set1(1.0f);
      store_first(scores + i, one / (one + exp(zero() - load_first(logits + i, n))), n);
    });
  } else {
    softmax_row(logits, config.experts, scores);
  }
  std::fill(choice + config.experts, choice + padded, kTaken);
  for (int64_t i = 0; i < config.experts; i++) {
    choice[i] = config.correction_bias ? scores[i] + config.correction_bias[i] : scores[i];
    // NaN equals nothing. Any finite value keeps the chosen experts valid and distinct.
    if (choice[i] != choice[i]) choice[i] = std::numeric_limits<float>::lowest();
  }
  if (config.groups > 1) keep_best_groups(config, choice, group_scores);
  for (int64_t k = 0; k < config.top_k; k++) {
    experts[k] = first_largest(choice, padded);
    choice[experts[k]] = kTaken;
    weights[k] = scores[experts[k]];
  }
  if (policy) drop_experts(config, *policy, logits, scores, choice, weights, experts);
  float total = 0.0f;
  for (int64_t k = 0; k < config.top_k; k++) total += weights[k];
  const float divisor = config.normalize ? total + 1e-20f : 1.0f;
  for (int64_t k = 0; k < config.top_k; k++) weights[k] = weights[k] / divisor * config.scale;
}

// weights[rows, top_k] and experts[rows, top_k], best first.
inline void gate_rows(Engine& engine, const GateConfig& config, const Policies& policies, const float* logits, int64_t rows,
                 float* weights, int64_t* experts) {
  constexpr int64_t kRows = 16;
  engine.pool.run(ceil_div(rows, kRows), [&](int64_t task, int thread) {
    float* scratch = engine.scratch[thread].sums.get<float>(3 * whole_lanes(config.experts));
    for (int64_t i = task * kRows; i < std::min(rows, (task + 1) * kRows); i++) {
      gate_row(config, policies.of(i), logits + i * config.experts, scratch, weights + i * config.top_k,
               experts + i * config.top_k);
    }
  });
}

}  // namespace moe
