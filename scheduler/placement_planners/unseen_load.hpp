// Loads that experts may have on routing that nobody has seen, and what they make of a placement's ranks.
//
// Log shares of experts in a domain are taken as x(d, e) = m(e) + noise: m of variance t^2 between experts, noise of variance
// s^2 between domains. Both come from the data: V = t^2 + s^2 is the variance between the experts of a domain, s^2 that of an
// expert between domains, drawn towards a fixed part of V as if one more domain had been seen; of one domain alone that is
// all there is to know. An expert's own s^2 is drawn towards all experts'. What follows for a domain that is not known yet
// (one-way random effects, empirical Bayes):
//   mean  x + b (x(e) - x),   b = t^2 / (t^2 + s^2 / D),   variance  s^2 (1 + b / D)
// A draw of all experts' shares is a "world". The deviates of an expert are the quantiles of the logistic distribution, whose
// tails are heavier than the normal's, in an order of its own (Latin hypercube).
//
// Tokens come evenly from all ranks; a source takes a copy on its rank, else one in its node, else any, evenly among several.
//
// Thread-safety: none. Deterministic: a function of the counts and the seed.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "sluice/scheduler/planners.hpp"

namespace sluice {

constexpr std::size_t kWorlds = 64;

// f64 [num_ffn, kWorlds]: share of the routes in each world; columns sum to 1.
std::vector<double> draw_worlds(const PlacementProblem& problem, std::size_t layer);

// The loads of ranks in every world, kept up to date while copies change.
class UnseenLoad {
 public:
  // shares: as draw_worlds() returns; must outlive it, and so must the topology
  UnseenLoad(const Topology& topology, std::span<const double> shares);

  // The expert's copies: ranks ascending. Costs the number of copies times kWorlds.
  void set_copies(std::int32_t expert, std::span<const std::int32_t> ranks);
  // The most loaded rank's share of all routes in each world, and the mean of it.
  std::array<double, kWorlds> most() const;
  double expected_max() const;
  // The most loaded rank of a world.
  std::int32_t most_loaded(std::size_t world) const;

 private:
  struct Part {
    std::int32_t rank;
    double share;  // of the expert's routes
  };
  void add(std::int32_t expert, int sign);
  const Topology& topology_;
  std::span<const double> shares_;
  std::vector<std::vector<Part>> parts_;  // by expert
  std::vector<std::int32_t> in_node_;     // int32 [num_nodes], copies of the expert at hand
  std::vector<double> load_;              // f64 [num_ranks, kWorlds]
};

}  // namespace sluice
