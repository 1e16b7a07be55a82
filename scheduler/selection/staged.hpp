// What selection policies share: checks, statistics, and the order of the exchanges of a batch.
//
// Steps of a batch: 1. check the scores; choose(), which may ask for exchanges of its own and is called again after each.
// Outside training that is all. In training ask for the sum over ranks of [T, tokens of each expert, tokens with 0, 1,
// ... experts, the policy's own sums] (the routing is ready meanwhile). 2. unpack it and compute the auxiliary loss.
// Counts are integers in doubles: exact, whatever the order of the sum.
#pragma once

#include <cstdint>
#include <span>

#include "sluice/scheduler/selection.hpp"

namespace sluice {

class StagedPolicy : public SelectionPolicy {
 public:
  AdaptiveState initial_adaptive_state(std::int32_t num_experts) const final;
  bool step(const Scores& scores, const AdaptiveState& adaptive, bool training,
            PolicyState& state) const final;
  void backward(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                std::span<const float> dweight, std::span<float> dlogits) const final;

 protected:
  // Throws kInvalidConfig if the options cannot work with so many experts or with training.
  virtual void check_options(std::int32_t num_experts, bool training) const = 0;
  virtual AdaptiveState initial_state(std::int32_t num_experts) const {
    (void)num_experts;
    return {};
  }
  // Length of statistics.sums in training, at least figures().size(); outside training it has the figures only.
  virtual std::size_t num_sums(std::int32_t num_experts) const {
    (void)num_experts;
    return figures().size();
  }
  // Sets state.routing (cleared, num_experts set), what auxiliary() and gradient() want in state.saved, and this rank's
  // state.statistics.sums (zeroed, of the right length); returns true. Or asks for an exchange, returns false and is
  // called again. state.step: calls of step() before this one. Outside training it must not ask.
  virtual bool choose(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const = 0;
  // This rank's share of the loss. state.statistics is global; `local` is this rank's.
  virtual double auxiliary(const Scores& scores, const AdaptiveState& adaptive, const BatchStatistics& local,
                           PolicyState& state) const {
    (void)scores, (void)adaptive, (void)local, (void)state;
    return 0;
  }
  // dlogits comes in as zeros.
  virtual void gradient(const Scores& scores, const AdaptiveState& adaptive, const PolicyState& state,
                        std::span<const float> dweight, std::span<float> dlogits) const = 0;
};

// Policies whose choice for a token depends on that token alone: one exchange, after the routing.
class TokenLocalPolicy : public StagedPolicy {
 public:
  bool token_local() const override { return true; }

 protected:
  virtual void select(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const = 0;
  bool choose(const Scores& scores, const AdaptiveState& adaptive, PolicyState& state) const final {
    select(scores, adaptive, state);
    return true;
  }
};

// Throws unless sizes fit (kInvalidArgument) and all logits are finite (kInvalidRouting naming token and expert).
void check_scores(const Scores& scores);

// Counts of one rank's routing.
void count_routes(const Routing& routing, BatchStatistics& statistics);

// Throws kInvalidConfig unless 1 <= top_k <= num_experts.
void check_top_k(std::string_view policy, std::int32_t top_k, std::int32_t num_experts);

// The `top_k` best of experts 0..num_experts-1 into out[0..top_k-1], ids ascending. better(a, b): whether expert a
// is preferred to expert b, strictly; where neither is, the lower id wins. 1 <= top_k <= num_experts.
template <typename Better>
void select_top_k(std::int32_t num_experts, std::int32_t top_k, Better&& better, std::int32_t* out) {
  if (top_k == num_experts) {
    for (std::int32_t e = 0; e < num_experts; ++e) out[e] = e;
    return;
  }
  // Best first. Ids come in ascending order and only a strictly better one passes another, so ties stay with the
  // lower id.
  std::int32_t filled = 0;
  for (std::int32_t e = 0; e < num_experts; ++e) {
    if (filled == top_k && !better(e, out[top_k - 1])) continue;
    std::int32_t i = filled < top_k ? filled++ : top_k - 1;
    for (; i > 0 && better(e, out[i - 1]); --i) out[i] = out[i - 1];
    out[i] = e;
  }
  for (std::int32_t i = 1; i < top_k; ++i) {
    const std::int32_t e = out[i];
    std::int32_t j = i;
    for (; j > 0 && out[j - 1] > e; --j) out[j] = out[j - 1];
    out[j] = e;
  }
}

}  // namespace sluice
