// `sluice train --check`: the job's first steps beside a dense reference of the same model, on rank 0, in double, by
// plain loops: every expert for every token, no routing plan, no exchange, no shared arithmetic.
//
// In each step the reference gets the values of all parameters, the tokens of the whole group and the scores by which
// the model chose experts (its own scores must agree with them; a choice is not continuous, so choices are taken over).
// It computes loss, gradients and norm. Then the model updates its parameters, and the reference does from the model's
// gradients. In the first step it starts from its own initial values.
//
// Errors compared: loss and gradient norm relative; scores absolute; a gradient as |difference| / |gradient| in the
// 2-norm by parameter (no norm counts as less than 1e-3 of the norm over all); an updated value relative to the learning
// rate, after a rounding error of f32.
// Tolerances: f32 rows everywhere, 5e-5 for gradients; with bf16 rows, weights or wire, 5e-2. The others follow.
//
// The official variant of ReLU routing depends on how tokens are spread over ranks (scheduler/selection/relu.hpp); over
// several ranks it fails the check once its L1 term is strong.
//
// Collective; blocks; allocates. Few tokens a step are used, so that the reference takes about a second.
// Errors: kInternal on all ranks alike, naming step, parameter and figures, when something differs by more.
#pragma once

#include <cstdint>
#include <string>

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"
#include "sluice/runtime/src/train/text.hpp"

namespace sluice::train {

// The largest errors seen, and their limits. Complete on rank 0.
struct CheckReport {
  std::int64_t steps = 0, tokens_per_step = 0;
  std::int64_t num_parameters = 0;  // named ones
  struct Figure {
    double error = 0, limit = 0;
    std::string where;  // "step 2, layer.0.gate"
  };
  Figure loss, scores, gradient, grad_norm, update;
};

CheckReport check(Runtime& runtime, const LoadedConfig& loaded, const Text& text);

std::string to_json(const CheckReport& report);
std::string to_text(const CheckReport& report);

}  // namespace sluice::train
