// Softmax top-k, with the Switch load-balancing loss and the router z-loss.
//
// p = softmax(z) over all experts; S = the top_k experts by z (ties: the lower id).
// Weights, times route_scale:
//   kPre,  not renormalized:  w_i = p_i                   Switch (arXiv 2101.03961), DeepSeek-V2
//   kPre,  renormalized:      w_i = p_i / sum_S p         Megatron-Core
//   kPost:                    w_i = softmax of z over S   Mixtral (arXiv 2401.04088)
// The last two are the same function and are computed the same way here, bit for bit.
// With one expert a token they are constant: the gate is route_scale and the router learns nothing from the task;
// training with them is refused.
//
// Losses over the T tokens of all ranks (c_e: global routes of e):
//   aux = aux_loss * E / (K T^2) * sum_e c_e sum_t p_te      Switch eqs 4-6 with K experts; uniform: = coeff
//   z   = z_loss / T * sum_t logsumexp(z_t)^2                ST-MoE (arXiv 2202.08906) eq 5
// c_e is a constant of the gradient. And LocMoE's locality loss on p (locality.hpp).
// S may be swapped for nearer experts within a bound (bounded_regret.hpp), with preference p.
//
// Backward, a = route_scale * dweight:
//   not renormalized:  dz_i = p_i (u_i - sum_e p_e u_e), u_e = a_e [e in S] + g_e: not zero for experts not chosen
//   renormalized:      dz_i = q_i (a_i - sum_S a_e q_e) on S, q the weights before scaling; plus the losses' part
//   losses:            g_e = aux_loss * E c_e / (K T^2);   z-loss: dz_i += z_loss / T * 2 lse p_i
#pragma once

#include <memory>
#include <string>

#include "sluice/scheduler/selection/bounded_regret.hpp"
#include "sluice/scheduler/selection/staged.hpp"

namespace sluice {

enum class SoftmaxOrder : std::uint8_t { kPre, kPost };

struct SoftmaxTopKOptions {
  std::int32_t top_k = 2;  // 1..num_experts
  SoftmaxOrder order = SoftmaxOrder::kPre;
  bool renormalize = false;  // with kPre
  double route_scale = 1;    // above 0
  double aux_loss = 0;       // 1e-2 is usual; at least 0
  double z_loss = 0;         // 1e-3 is usual; at least 0
  std::string name = "softmax_topk";
  RegretOptions regret = {};
  double locality_loss = 0;  // mu, at least 0
  double locality_epsilon = 0.05;
  std::shared_ptr<const Locality> locality = nullptr;  // for swaps and the locality loss
};

class SoftmaxTopKPolicy final : public TokenLocalPolicy {
 public:
  // Throws kInvalidConfig naming the option out of range.
  explicit SoftmaxTopKPolicy(const SoftmaxTopKOptions& options);
  std::string_view name() const override { return options_.name; }
  std::span<const PolicyFigure> figures() const override {
    return swap_.on() ? std::span<const PolicyFigure>(kRegretFigures) : std::span<const PolicyFigure>();
  }

 private:
  void check_options(std::int32_t num_experts, bool training) const override;
  std::size_t num_sums(std::int32_t) const override { return figures().size() + locality_loss_.num_sums(); }
  void select(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const override;
  double auxiliary(const Scores& scores, const AdaptiveState& adaptive, const BatchStatistics& local,
                   PolicyState& state) const override;
  void gradient(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                std::span<const float> dweight, std::span<float> dlogits) const override;
  bool over_selected() const { return options_.order == SoftmaxOrder::kPost || options_.renormalize; }
  // d(aux)/d(p_te) = this times c_e
  double aux_factor(std::int32_t num_experts, const PolicyState& state) const;

  SoftmaxTopKOptions options_;
  LocalitySwap swap_;
  LocalityLoss locality_loss_;
};

}  // namespace sluice
