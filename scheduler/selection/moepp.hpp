// MoE++: zero-computation experts (arXiv 2410.07348; code SkyworkAI/MoE-plus-plus 7f43967).
//
// Experts of four kinds (placement.hpp): ffn, zero E(x) = 0, copy E(x) = x, constant E(x) = a1 x + a2 v with
// [a1, a2] = softmax(W_c x). Those without ffn ("zc") live on every rank and never touch the wire.
// p = softmax(z) over all experts; S = the top_k by z (ties: the lower id).
// Weights (code, moe_plus_plus_layer.py:59-80): w_i = p_i; but when S holds a zero expert, its weight is 0 and the others'
// are p_i / sum of p over S without its zero experts. The code also multiplies the layer's input by top_k; not here.
// Balance loss (heterogeneous; no factor of the number of experts):
//   aux_loss * sum_e eta_e f_e P_e,  f_e = tokens that select e / T (before drops), P_e = mean_t p_te,
//   eta = 1 for ffn, tau for zc.  0.01 is the paper's coefficient.
// Capacity, T' = top_k T assignments (the paper's T; with top-2 and T tokens half of all routes would drop), N_f ffn and
// N_z zc experts:   C_ffn = ceil(gamma tau T' / (tau N_f + N_z)),   C_zc = ceil(gamma T' / (tau N_f + N_z))
// Routes beyond it are dropped, the last ones in the order (rank, token) over ALL ranks, by one exchange of counts: exact,
// however tokens are dealt. Dropped routes leave the other weights as they are. Outside training nothing drops (the
// published inference code has no capacity).  So ffn work is at most gamma tau N_f / (tau N_f + N_z) of a plain layer's.
// Backward: of p as in softmax top-k; where S was renormalized dz_i = q_i (a_i - sum a q) on what was; a of a dropped route
// is 0; the losses' part on all experts.
// The pathway-aware residual of the scores, z^j = W^j x + W_g^j z^(j-1), is the layer's: model.gate_residual.
// Figures: dropped routes, zc routes and ffn routes a token.
#pragma once

#include <array>
#include <vector>

#include "sluice/scheduler/placement.hpp"
#include "sluice/scheduler/selection/staged.hpp"

namespace sluice {

struct MoeppOptions {
  std::int32_t top_k = 2;              // 1..num_experts
  std::vector<ExpertKind> kinds = {};  // [num_experts]
  double tau = 0.75;                   // above 0, at most 1
  double capacity_factor = 1.1;        // gamma, at least 0; 0: no capacity
  double aux_loss = 0;                 // at least 0; 0.01 is the paper's
};

class MoeppPolicy final : public StagedPolicy {
 public:
  // Throws kInvalidConfig naming the option out of range.
  explicit MoeppPolicy(const MoeppOptions& options);
  std::string_view name() const override { return "moepp"; }
  std::span<const PolicyFigure> figures() const override { return kFigures; }
  // Without a capacity a token's routing is its own affair.
  bool token_local() const override { return options_.capacity_factor == 0; }
  // Routes that an expert of the kind takes of a batch of so many tokens.
  std::int64_t capacity(ExpertKind kind, std::int64_t num_tokens) const;

 private:
  static constexpr std::array<PolicyFigure, 3> kFigures = {
      PolicyFigure{"dropped_routes", false, "routes beyond an expert's capacity"},
      PolicyFigure{"free_routes", false, "routes to experts without ffn, which never touch the wire"},
      PolicyFigure{"ffn_routes", false, "routes to experts with ffn"}};

  void check_options(std::int32_t num_experts, bool training) const override;
  std::size_t num_sums(std::int32_t num_experts) const override {
    return kFigures.size() + static_cast<std::size_t>(num_experts);  // and tokens that select each expert
  }
  bool choose(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const override;
  void finish(PolicyState& state) const;
  double auxiliary(const Scores& scores, const AdaptiveState& adaptive, const BatchStatistics& local,
                   PolicyState& state) const override;
  void gradient(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                std::span<const float> dweight, std::span<float> dlogits) const override;
  ExpertKind kind(std::size_t e) const { return options_.kinds[e]; }
  // d(aux)/d(p_te) / (tokens that select e)
  double aux_factor(std::size_t expert, const PolicyState& state) const;

  MoeppOptions options_;
  double num_ffn_ = 0, num_zc_ = 0;
};

}  // namespace sluice
