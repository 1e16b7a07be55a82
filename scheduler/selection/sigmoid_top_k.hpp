// Sigmoid top-k: DeepSeek-V3 (report eqs 12-16; inference/model.py:566-598) without its group limit.
//
// s = sigmoid(z); S = the top_k experts by s_e + b_e (ties: the higher z, then the lower id; z decides where s has
// saturated). Weights: w_i = route_scale * s_i / sum_S s, or route_scale * s_i when not renormalized.
// The bias b (AdaptiveState.values, f64 [num_experts], one a layer; empty means none) acts on the choice only: it is
// not in the weights and gets no gradient.
// Backward (S and b constant), q_i = s_i / sum_S s:
//   renormalized:  dz_i = w_i (1 - s_i) (a_i - sum_S a_e q_e)   on S, 0 elsewhere   (= rho (..)/sum_S s * s (1 - s))
//   else:          dz_i = w_i (1 - s_i) a_i
// Traps: renormalizing divides by a sum that underflows for very negative scores; here the weights come from log s,
// which does not. With top_k 1 and renormalization the gate is constant: training is refused.
#pragma once

#include "sluice/scheduler/selection/token_local.hpp"

namespace sluice {

struct SigmoidTopKOptions {
  std::int32_t top_k = 2;  // 1..num_experts
  bool renormalize = true;
  double route_scale = 1;  // above 0; DeepSeek-V3 has 2.5
};

class SigmoidTopKPolicy final : public TokenLocalPolicy {
 public:
  // Throws kInvalidConfig naming the option out of range.
  explicit SigmoidTopKPolicy(const SigmoidTopKOptions& options);
  std::string_view name() const override { return "sigmoid_topk"; }
  AdaptiveScope adaptive_scope() const override { return AdaptiveScope::kPerLayer; }

 private:
  void check_options(std::int32_t num_experts, bool training) const override;
  AdaptiveState initial_state(std::int32_t num_experts) const override;
  void select(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const override;
  void gradient(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                std::span<const float> dweight, std::span<float> dlogits) const override;

  SigmoidTopKOptions options_;
};

}  // namespace sluice
