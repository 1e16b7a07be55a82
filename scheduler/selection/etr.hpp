// Expert-Token Resonance (arXiv 2406.00023 v4; no official code) with LocMoE's losses (arXiv 2401.13920).
//
// The scores are affinities delta_te in [-1, 1]: cosines of the token and each expert's GrAP vector (kernels/grap.hpp),
// not a trained gate. What the papers leave open is marked "ours"; each such choice is an option.
//
// 1. Token choice. Experts by (delta descending, id ascending); the token offers itself to the first l_t:
//      l_t = min{ l : sum of the first l deltas >= tau }, at least 1, at most top_k, and none of delta <= 0 after the first
//    "a threshold of the sum of affinity scores" is the paper's; its value, the cap and the stop at 0 are ours.
// 2. Capacity. C = clamp(ceil(max(C_min, capacity_factor * offers / n)), 1, T) for the offers of all T tokens to the n
//    experts: the paper's capacity factor on the mean l (ours). C_min = exp(d delta_max^2 / (2 - delta_max^2)) / n
//    (Remark 7) when etr_delta_max is given. It grows with delta, though the paper says that it falls, and explodes: hence the
//    clamp, and off by default (ours).
// 3. Which offers an expert takes:
//      token: the first C in the order (rank, token)                                               (TCR)
//      both:  the C of highest delta; ties: the earlier in that order. The paper prints "Bottom-C" but says "highest
//             affinity"; the text is taken.                                                           (TCR, then ECR)
//    Outside training all offers are taken: the choice of a token must not depend on tokens after it (ours).
//    etr_quota global: over all ranks, exactly, by offer and accept. Counts are gathered first; for "both" the rank that
//    owns the expert's first slot is sent the deltas of the offers, and answers a bit for each; rows travel for accepted
//    offers alone. local: each rank takes the best of its own offers, with C of its own offers and tokens (C_min over the
//    number of ranks); no exchange, but another result, which depends on how tokens are dealt.
// 4. auto switches between the two, one switch a layer. Corollary 6: expert choice once 2 s q <= C for all experts, q the share
//    of other tokens that score higher at the expert than the token that belongs there; the estimate and its threshold are
//    not published. Ours: q_e = share of all tokens whose delta at e is above the mean delta of those that e took in the
//    last batch; crowding = mean over e of 2 T q_e / C, smoothed: r <- decay r + (1 - decay) crowding. Token choice until
//    r <= etr_switch_on; back when r > etr_switch_off: hysteresis, so that it does not flutter.
//    AdaptiveState.values = {mode (0 token, 1 both), r (negative: not seen yet), threshold of each expert (2: none yet)}
// 5. Weights (under-specified): route_scale * p_te, p = softmax(delta_t / temperature) over all experts, not renormalized;
//    or renormalized over what the token kept. Temperature and choice are ours.
// Losses:  aux_loss * n sum_e f_e P_e, f_e = share of the offers, P_e = mean_t p_te (LocMoE eq 5; 0.01)
//          locality loss on p (locality.hpp; LocMoE eq 6)
// Backward: d(delta)_i = p_i (u_i - sum p u) / temperature, and over the kept set where renormalized; choices are constants.
// Figures: offers a token, refused offers a token, and whether the batch used both choices.
#pragma once

#include <array>
#include <memory>

#include "sluice/scheduler/selection/capacity.hpp"
#include "sluice/scheduler/selection/locality.hpp"
#include "sluice/scheduler/selection/staged.hpp"

namespace sluice {

enum class EtrChoice : std::uint8_t { kAuto, kToken, kBoth };

struct EtrOptions {
  std::int32_t top_k = 1;  // most experts a token, 1..num_experts
  double tau = 0;          // affinity mass, at least 0; 0: one expert a token
  double temperature = 1;  // above 0
  bool renormalize = false;
  double route_scale = 1;        // above 0
  double capacity_factor = 1.1;  // at least 0; 0: no capacity, all offers are taken
  double delta_max = 0;          // 0..1; 0: no C_min
  std::int64_t hidden = 0;       // d, for C_min
  EtrChoice choice = EtrChoice::kAuto;
  bool local_quota = false;
  double switch_on = 1, switch_off = 1.25;  // 0 <= on <= off
  double switch_decay = 0.9;                // 0 .. below 1
  double aux_loss = 0;                      // at least 0
  double locality_loss = 0;                 // mu, at least 0
  double locality_epsilon = 0.05;
  std::shared_ptr<const Locality> locality = nullptr;
};

// Remark 7 and LocMoE eq 9's bound: exp(d delta^2 / (2 - delta^2)) / n; infinite where a double cannot hold it.
double etr_min_capacity(std::int64_t hidden, std::int32_t num_experts, double delta);

class EtrPolicy final : public StagedPolicy {
 public:
  // Throws kInvalidConfig naming the option out of range.
  explicit EtrPolicy(const EtrOptions& options);
  std::string_view name() const override { return "etr"; }
  std::span<const PolicyFigure> figures() const override { return kFigures; }
  AdaptiveScope adaptive_scope() const override { return AdaptiveScope::kPerLayer; }
  void adapt(std::span<const PolicyState* const> batches, AdaptiveState& adaptive) const override;

  // C for these counts; num_ranks: among which C_min is shared.
  std::int64_t capacity(std::int64_t num_offers, std::int64_t num_tokens, std::int32_t num_experts,
                        std::int32_t num_ranks = 1) const;

 private:
  static constexpr std::array<PolicyFigure, 3> kFigures = {
      PolicyFigure{"offers", false, "experts that tokens chose"},
      PolicyFigure{"refused", false, "offers that experts did not take"},
      PolicyFigure{"both_choices", false, "1: experts chose too; 0: first come"}};

  void check_options(std::int32_t num_experts, bool training) const override;
  AdaptiveState initial_state(std::int32_t num_experts) const override;
  // Figures; then of each expert: delta of the offers taken, tokens above the threshold, offers; then the locality loss's.
  std::size_t num_sums(std::int32_t num_experts) const override {
    return kFigures.size() + 3 * static_cast<std::size_t>(num_experts) + locality_loss_.num_sums();
  }
  bool choose(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const override;
  void make_offers(const Scores& scores, PolicyState& state) const;
  void send_offers(const Scores& scores, const GatheredCounts& counts, PolicyState& state) const;
  void answer(const Scores& scores, const GatheredCounts& counts, PolicyState& state) const;
  void take_answers(const Scores& scores, const GatheredCounts& counts, PolicyState& state) const;
  bool finish(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const;
  bool both(const AdaptiveState& adaptive) const {
    return options_.choice == EtrChoice::kBoth ||
           (options_.choice == EtrChoice::kAuto && adaptive.values[0] != 0);
  }
  std::int32_t owner(std::int32_t expert, std::int32_t num_ranks) const;
  std::span<const double> locality_sums(const PolicyState& state, std::int32_t num_experts) const;
  double auxiliary(const Scores& scores, const AdaptiveState& adaptive, const BatchStatistics& local,
                   PolicyState& state) const override;
  void gradient(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                std::span<const float> dweight, std::span<float> dlogits) const override;
  double aux_factor(std::int32_t num_experts, const PolicyState& state) const;

  EtrOptions options_;
  LocalityLoss locality_loss_;
};

}  // namespace sluice
