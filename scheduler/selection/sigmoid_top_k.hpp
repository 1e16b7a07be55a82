// Sigmoid top-k and node-limited routing: DeepSeek-V3 (report eqs 12-20; inference/model.py:566-598).
//
// s = sigmoid(z), preference s_e + b_e. With G groups of E/G consecutive experts: a group's score is the sum of its two
// highest preferences (of its one, when it has one); the best `top_groups` groups stay (ties: the lower group).
// S = the top_k experts by preference within them (ties: the higher z, then the lower id; z decides where s has
// saturated). Where groups are the nodes - contiguous placement, as many experts on each node - a token visits at most
// top_groups nodes. G = 1 is plain sigmoid top-k.
// Weights: w_i = route_scale * s_i / sum_S s, or route_scale * s_i when not renormalized.
// The bias b (AdaptiveState.values, f64 [num_experts], one a layer; empty means none) acts on the choice only: it is
// not in the weights and gets no gradient. After a step (arXiv 2408.15664), with the routes c_e of ALL ranks:
//   b_e += bias_update * sign(mean(c) - c_e),  sign(0) = 0, compared in integers
// Balance loss (report eqs 17-20): aux_loss * sum_e f_e P_e, f_e = E c_e / (K T) constant, P_e = mean_t s_te / sum_j s_tj.
// The report takes T over one sequence; tokens here have none, so T is the batch of all ranks. That choice is ours.
// Backward (S and b constant), q_i = s_i / sum_S s, h_i = s_i / sum_j s_j over all experts, g_e = aux_loss f_e / T:
//   renormalized:  dz_i = w_i (1 - s_i) (a_i - sum_S a_e q_e)   on S, 0 elsewhere   (= rho (..)/sum_S s * s (1 - s))
//   else:          dz_i = w_i (1 - s_i) a_i
//   loss:          dz_i += h_i (1 - s_i) (g_i - sum_e g_e h_e)
// Traps: renormalizing divides by a sum that underflows for very negative scores; here the weights come from log s,
// which does not. With top_k 1 and renormalization the gate is constant: training is refused.
#pragma once

#include <memory>
#include <string>

#include "sluice/scheduler/selection/bounded_regret.hpp"
#include "sluice/scheduler/selection/staged.hpp"

namespace sluice {

struct SigmoidTopKOptions {
  std::int32_t top_k = 2;  // 1..num_experts
  bool renormalize = true;
  double route_scale = 1;       // above 0; DeepSeek-V3 has 2.5
  std::int32_t num_groups = 1;  // divides the number of experts; DeepSeek-V3 has 8
  std::int32_t top_groups = 1;  // 1..num_groups, with room for top_k; DeepSeek-V3 has 4
  double bias_update = 0;       // at least 0; 0.001 is DeepSeek-V3's
  double aux_loss = 0;          // at least 0; 1e-4 is DeepSeek-V3's
  std::string name = "sigmoid_topk";
  RegretOptions regret = {};
  std::shared_ptr<const Locality> locality = nullptr;  // for swaps
};

class SigmoidTopKPolicy final : public TokenLocalPolicy {
 public:
  // Throws kInvalidConfig naming the option out of range.
  explicit SigmoidTopKPolicy(const SigmoidTopKOptions& options);
  std::string_view name() const override { return options_.name; }
  std::span<const PolicyFigure> figures() const override {
    return swap_.on() ? std::span<const PolicyFigure>(kRegretFigures) : std::span<const PolicyFigure>();
  }
  AdaptiveScope adaptive_scope() const override { return AdaptiveScope::kPerLayer; }
  void adapt(std::span<const PolicyState* const> batches, AdaptiveState& adaptive) const override;

 private:
  void check_options(std::int32_t num_experts, bool training) const override;
  AdaptiveState initial_state(std::int32_t num_experts) const override;
  void select(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const override;
  double auxiliary(const Scores& scores, const AdaptiveState& adaptive, const BatchStatistics& local,
                   PolicyState& state) const override;
  void gradient(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                std::span<const float> dweight, std::span<float> dlogits) const override;
  // d(aux)/d(P sum of one token's h_e) = this times c_e
  double aux_factor(std::int32_t num_experts, const PolicyState& state) const;

  SigmoidTopKOptions options_;
  LocalitySwap swap_;
};

}  // namespace sluice
