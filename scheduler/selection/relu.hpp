// ReLU routing: ReMoE (arXiv 2412.14711; code thu-ml/ReMoE 463c6af3).
//
// Gate (eq 5): R_te = max(z_te, 0) is the weight; token t is routed to e iff z_te > 0. No softmax, no top-k, no
// renormalization: a token has 0..num_experts experts, weights may exceed 1.
// Sparsity (eq 8): S = 1 - routes / (L T E), over all L layers and T tokens; its target is 1 - k/E (k = top_k,
// used in the losses and here only).
// Loss, plain (eq 9):          lambda/(L T) sum_l sum_t sum_e R_te
// Loss, load-balanced (10-11): lambda/(L T) sum_l sum_t sum_e f_le R_te,  f_le = E c_le / (k T), f a constant.
// Gradient: dz_te = (dweight_te + lambda f_le / (L T)) [z_te > 0]; the derivative at exactly 0 is 0. Experts that
// are not active get none, from either term.
// Adaptation (eq 7): lambda <- lambda * alpha^sign((1 - k/E) - S): too dense, lambda grows. One lambda for all
// layers: AdaptiveState.values = {lambda}, scope kShared.
//
// Paper and official code differ; `variant` chooses all three at once:
//                      kPaper                             kOfficial
//   1/L in the loss    yes                                no (so lambda there is lambda_paper / L)
//   S == target        lambda stays (sign(0) = 0)         lambda /= alpha
//   f_e, from          the tokens of all ranks            the tokens of this rank in this micro-batch
// The official f_e makes results depend on how tokens are spread over ranks. Its T outside f_e is the global one
// here (the code takes a mean over ranks of means over tokens: the same where ranks have equally many). The sparsity
// is pooled over batches in both.
//
// Traps: at the start about half of all experts are active for every token, up to E/k times the steady state, until
// lambda has grown (about 100 steps); nothing may be sized T*k. -0.0 and 0.0 are not routed.
#pragma once

#include "sluice/scheduler/selection/staged.hpp"

namespace sluice {

enum class ReluVariant : std::uint8_t { kPaper, kOfficial };

struct ReluOptions {
  std::int32_t top_k = 1;       // k of the target: mean experts a token, 1..num_experts
  std::int32_t num_layers = 1;  // L, layers that share lambda, at least 1
  double lambda0 = 1e-8;        // before the first step, at least 0
  double alpha = 1.2;           // at least 1; 1 keeps lambda fixed
  bool load_balanced = true;
  ReluVariant variant = ReluVariant::kPaper;
};

class ReluPolicy final : public TokenLocalPolicy {
 public:
  // Throws kInvalidConfig naming the option out of range.
  explicit ReluPolicy(const ReluOptions& options);
  std::string_view name() const override { return "relu"; }
  // The official load factors count the tokens of one state.
  bool token_local() const override { return options_.variant == ReluVariant::kPaper; }
  AdaptiveScope adaptive_scope() const override { return AdaptiveScope::kShared; }
  void adapt(std::span<const PolicyState* const> batches, AdaptiveState& adaptive) const override;

 private:
  void check_options(std::int32_t num_experts, bool training) const override;
  AdaptiveState initial_state(std::int32_t num_experts) const override;
  void select(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const override;
  double auxiliary(const Scores& scores, const AdaptiveState& adaptive, const BatchStatistics& local,
                   PolicyState& state) const override;
  void gradient(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                std::span<const float> dweight, std::span<float> dlogits) const override;
  double lambda_of(const AdaptiveState& adaptive) const;

  ReluOptions options_;
};

}  // namespace sluice
