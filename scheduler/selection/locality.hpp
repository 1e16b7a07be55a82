// Where experts live, as every rank sees it, for policies that look at it; and the loss that draws tokens towards
// their own node.
//
// With copies, a rank's route goes to the copy on the rank, else on the lowest rank of its node, else to the expert's
// first slot. Plans choose by load among several copies elsewhere (scheduler/placement.hpp), so what is said here about
// replicas on other nodes is an estimate; without replicas it is exact.
//
// Locality loss, LocMoE (arXiv 2401.13920) eq 6, whose D_l and mu are not published. Ours, for the M nodes m and their
// T_m of the T tokens:
//   L = mu sum_m T_m/T KL(D_c^m || D_l^m)
//   D_c^m[n] = mean over the tokens t of node m of  sum over the experts e at n of p_te       (soft, so differentiable)
//   D_l^m[n] = 1 - epsilon for n = m, epsilon / (M - 1) for others     (epsilon above 0, else the divergence is infinite)
// "e at n" is where node m's route to e goes; experts that live everywhere are at m. With one node L = 0.
// Gradient: dL/dp_te = mu/T (ln(D_c^m[n] / D_l^m[n]) + 1), n where e is; the sums over tokens are exchanged, so nothing
// depends on how the tokens of a node are spread over its ranks.
//
// Thread-safety: plain data. Errors: kInvalidArgument when placement and topology are of different groups.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/base/topology.hpp"
#include "sluice/scheduler/placement.hpp"
#include "sluice/scheduler/selection.hpp"

namespace sluice {

struct Locality {
  std::int32_t num_ranks = 0;
  std::int32_t num_nodes = 0;
  std::int32_t num_experts = 0;
  std::vector<ExpertKind> kind;            // [num_experts]
  std::vector<std::int32_t> node_of_rank;  // int32 [num_ranks]
  std::vector<std::int32_t> destination;  // int32 [num_ranks, num_experts], a rank; -1 for everywhere experts
  std::vector<std::int32_t>
      first_rank;  // int32 [num_experts], of the first slot; e mod num_ranks for everywhere ones

  std::int32_t node_of(std::int32_t rank) const { return node_of_rank[static_cast<std::size_t>(rank)]; }
  // Of rank's routes. int32 [num_experts]
  const std::int32_t* destinations(std::int32_t rank) const {
    return destination.data() + static_cast<std::size_t>(rank) * static_cast<std::size_t>(num_experts);
  }
  // Where rank's route to the expert goes.
  std::int32_t node_to(std::int32_t rank, std::int32_t expert) const {
    const std::int32_t to = destinations(rank)[expert];
    return to < 0 ? node_of(rank) : node_of(to);
  }
  // Throws kInvalidArgument unless it is of these experts and the scores' tokens live on its ranks.
  void check(std::string_view policy, const Scores& scores) const;
};
Locality locality_of(const Placement& placement, const Topology& topology);

class LocalityLoss {
 public:
  // mu 0: no loss. `locality` is the caller's and must outlive the loss. Throws kInvalidConfig naming policy and option.
  LocalityLoss(std::string_view policy, const Locality* locality, double mu, double epsilon);
  bool on() const { return mu_ > 0 && locality_->num_nodes > 1; }
  // How many sums over tokens it wants exchanged.
  std::size_t num_sums() const {
    return on() ? static_cast<std::size_t>(locality_->num_nodes * locality_->num_nodes) : 0;
  }
  // Adds this rank's. p: f32 [num_tokens, num_experts], rows of sum 1; sums: f64 [num_sums()], [source node, node]
  void add_sums(const Scores& scores, const float* p, std::span<double> sums) const;
  // This rank's share. sums: over all ranks
  double loss(const Scores& scores, std::span<const double> sums) const;
  // Adds dL/dp of one token. out: f64 [num_experts]
  void add_gradient(const Scores& scores, std::size_t token, std::span<const double> sums,
                    std::span<double> out) const;

 private:
  double divergence_term(std::size_t from, std::size_t to, std::span<const double> sums, double& share) const;
  const Locality* locality_;
  double mu_, epsilon_;
};

}  // namespace sluice
