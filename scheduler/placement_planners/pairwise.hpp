// Which experts, and which copies of them, a node should hold, from loads and pairwise co-activation alone.
//
// How many of the tokens of other nodes come to node n with experts S: a token that visits some of S is counted by each of
// them with one part in as many, so
//   in(n) = sum over e in S of F(e) E[1 / (1 + others of S that the token visits) | e]  ~  sum of F(e) h(mu(e, n))
//   mu(e, n) = sum over f in S, f != e, of P(f | e) w(f, n),    h(mu) = (1 - exp(-mu)) / mu   (others as if Poisson)
// F(e): load of e from nodes without a copy, an equal part for each node with one. w(f, n): the part of the foreign load
// of f that the copy at n takes. Adding e to S adds about F(e) exp(-mu(e, n)): tokens that visit none of S otherwise.
// mu is kept for all pairs, so a change of S costs the number of experts.
//
// Thread-safety: none.
#pragma once

#include <cstdint>
#include <vector>

#include "sluice/scheduler/planners.hpp"

namespace sluice {

class PairwiseNodes {
 public:
  PairwiseNodes(const PlacementProblem& problem, LayerAffinity affinity);

  // Each expert once, the hottest first; then copies into what slots are left; then swaps between nodes, at most
  // `max_moves` of them compared. Returns how many were.
  std::int64_t build(std::int64_t max_moves);
  // Copies of the nodes to ranks: the heaviest first to the least loaded. Experts of each rank.
  std::vector<std::vector<std::int32_t>> ranks() const;

  double in(std::int32_t node) const { return in_[static_cast<std::size_t>(node)]; }
  double objective_us() const;

 private:
  std::size_t cell(std::size_t node, std::size_t expert) const { return node * experts_ + expert; }
  // Adds (+1) or takes away (-1) a copy and brings everything up to date.
  void change(std::size_t node, std::size_t expert, int sign);
  void refresh(std::size_t node);
  double copy_load(std::size_t node, std::size_t expert) const;
  void place_once();
  void place_copies();
  std::int64_t swap_copies(std::int64_t max_moves);

  const PlacementProblem& problem_;
  LayerAffinity a_;
  std::size_t experts_, stride_, nodes_;                      // ffn experts; of the statistics; nodes
  std::vector<double> inverse_load_;                          // [experts]
  std::vector<std::int32_t> copies_;                          // [nodes, experts], copies in the node
  std::vector<std::int32_t> holders_;                         // [experts], nodes with a copy
  std::vector<double> foreign_;                               // [experts], F
  std::vector<double> weight_;                                // [nodes, experts], w, 0 without a copy
  std::vector<double> mu_;                                    // [nodes, experts]
  std::vector<double> in_, load_;                             // [nodes]
  std::vector<std::int32_t> room_;                            // [nodes]
  std::vector<double> num_ranks_;                             // [nodes]
  double total_tokens_ = 0, mean_load_ = 0, load_limit_ = 0;  // load of a rank
};

}  // namespace sluice
