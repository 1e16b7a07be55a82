// Bounded-regret locality: of the experts that a scored router chose, those far away are swapped for near ones when the
// loss of score is small. Ours (DESIGN: affinity-driven selection); opt-in, because it changes the model.
//
// Per token, home rank r on node m, preference P_e by which the router chose S (softmax: p_e; sigmoid: s_e + b_e):
//   regret of a swap = sum of P over the experts that leave - sum of P over those that come, at least 0
//   all swaps of a token together have regret <= epsilon
// 1. Node crossings. A row crosses to a node once however many experts it visits there, so a node is left as a whole:
//    its experts of S are swapped for the best experts of m that are not in S. Again and again the node with the least
//    regret (ties: the lower node) is left, while the budget lasts.
// 2. With scope kRank the same for the other ranks of m and the experts on r, with what is left of the budget.
// Who comes: the highest P, ties the lower id; experts with weights only, so that a swap changes where work is done and
// not how much. For one remote node that is the cheapest way to save the crossing; over several nodes the order is greedy.
// With epsilon 0 only exact ties are swapped.
//
// Weights and backward are the router's own on the swapped set, which is a constant of the gradient as top-k's is.
// Figures: regret a token; the share of routes swapped; crossings saved a token, to nodes and to ranks within the node,
// where a copy's place is as Locality says.
// Exact across ranks: a token's swaps depend on its own scores and home alone.
#pragma once

#include <array>
#include <memory>
#include <span>

#include "sluice/scheduler/selection/locality.hpp"

namespace sluice {

enum class RegretScope : std::uint8_t { kNode, kRank };

struct RegretOptions {
  double epsilon = -1;  // at least 0; negative: no swaps
  RegretScope scope = RegretScope::kRank;
};

inline constexpr std::array<PolicyFigure, 4> kRegretFigures = {
    PolicyFigure{"regret", false, "score given up"},
    PolicyFigure{"swapped_share", true, "routes swapped for nearer ones"},
    PolicyFigure{"saved_node_crossings", false, "nodes left by swapping"},
    PolicyFigure{"saved_rank_crossings", false, "ranks of the own node left by swapping"}};

class LocalitySwap {
 public:
  LocalitySwap() = default;
  // Throws kInvalidConfig naming policy and option.
  LocalitySwap(std::string_view policy, std::shared_ptr<const Locality> locality,
               const RegretOptions& options);
  bool on() const { return options_.epsilon >= 0; }
  void check(std::string_view policy, const Scores& scores) const {
    if (on()) locality_->check(policy, scores);
  }
  // preference: f64 [num_experts]; chosen: int32 [top_k], ids ascending, rewritten likewise; figures: f64
  // [kRegretFigures.size()], added to.
  void apply(std::int32_t rank, std::span<const double> preference, std::span<std::int32_t> chosen,
             std::span<double> figures) const;

 private:
  std::shared_ptr<const Locality> locality_;
  RegretOptions options_;
};

}  // namespace sluice
