#include "sluice/scheduler/selection/locality.hpp"

#include <algorithm>
#include <cmath>

namespace sluice {

void Locality::check(std::string_view policy, const Scores& scores) const {
  Require(scores.num_experts == num_experts, ErrorCode::kInvalidArgument, "policy ", policy, ": scores of ",
          scores.num_experts, " experts, but the placement it was made for has ", num_experts);
  Require(scores.rank >= 0 && scores.rank < num_ranks, ErrorCode::kInvalidArgument, "policy ", policy,
          ": the tokens' rank is ", scores.rank, "; the placement it was made for has ", num_ranks, " ranks");
  Require(scores.rank_of_token.empty() ||
              scores.rank_of_token.size() == static_cast<std::size_t>(scores.num_tokens),
          ErrorCode::kInvalidArgument, "policy ", policy, ": rank_of_token has ", scores.rank_of_token.size(),
          " entries for ", scores.num_tokens, " tokens");
  for (std::size_t t = 0; t < scores.rank_of_token.size(); ++t)
    Require(scores.rank_of_token[t] >= 0 && scores.rank_of_token[t] < num_ranks, ErrorCode::kInvalidArgument,
            "policy ", policy, ": token ", t, " lives on rank ", scores.rank_of_token[t], "; there are ",
            num_ranks, " ranks");
}

Locality locality_of(const Placement& placement, const Topology& topology) {
  Require(placement.num_ranks == topology.num_ranks(), ErrorCode::kInvalidArgument, "the placement is of ",
          placement.num_ranks, " ranks, the topology of ", topology.num_ranks());
  Locality out;
  out.num_ranks = placement.num_ranks;
  out.num_nodes = topology.num_nodes();
  out.num_experts = placement.num_experts;
  out.kind = placement.kind;
  for (std::int32_t r = 0; r < out.num_ranks; ++r)
    out.node_of_rank.push_back(topology.node_of(RankId(r)).value);
  const auto num_experts = static_cast<std::size_t>(out.num_experts);
  out.destination.resize(static_cast<std::size_t>(out.num_ranks) * num_experts, -1);
  out.first_rank.resize(num_experts);
  for (std::int32_t e = 0; e < out.num_experts; ++e) {
    const auto slots = placement.slots_of(ExpertId(e));
    out.first_rank[static_cast<std::size_t>(e)] =
        slots.empty() ? e % out.num_ranks : placement.slot_rank[static_cast<std::size_t>(slots.front())];
    for (std::int32_t r = 0; r < out.num_ranks; ++r) {
      std::int32_t best = -1, best_level = 3;
      for (const std::int32_t slot : slots) {  // ranks ascending
        const std::int32_t to = placement.slot_rank[static_cast<std::size_t>(slot)];
        const std::int32_t level = to == r ? 0 : out.node_of(to) == out.node_of(r) ? 1 : 2;
        if (level >= best_level) continue;
        best = to;
        best_level = level;
      }
      out.destination[static_cast<std::size_t>(r) * num_experts + static_cast<std::size_t>(e)] = best;
    }
  }
  return out;
}

LocalityLoss::LocalityLoss(std::string_view policy, const Locality* locality, double mu, double epsilon)
    : locality_(locality), mu_(mu), epsilon_(epsilon) {
  constexpr ErrorCode kBad = ErrorCode::kInvalidConfig;
  Require(mu >= 0 && std::isfinite(mu), kBad, "policy ", policy, ": locality_loss is ", mu,
          "; it must not be negative");
  if (mu == 0) return;
  Require(locality != nullptr, kBad, "policy ", policy, ": locality_loss is ", mu,
          " but it was not told where experts live");
  Require(epsilon > 0 && epsilon < 1, kBad, "policy ", policy, ": locality_epsilon is ", epsilon,
          "; it must be above 0 and below 1");
}

void LocalityLoss::add_sums(const Scores& scores, const float* p, std::span<double> sums) const {
  if (!on()) return;
  const auto nodes = static_cast<std::size_t>(locality_->num_nodes);
  for (std::size_t t = 0; t < static_cast<std::size_t>(scores.num_tokens); ++t) {
    const std::int32_t rank = scores.rank_of(t);
    double* row = sums.data() + static_cast<std::size_t>(locality_->node_of(rank)) * nodes;
    for (std::int32_t e = 0; e < scores.num_experts; ++e, ++p)
      row[locality_->node_to(rank, e)] += static_cast<double>(*p);
  }
}

// ln(D_c / D_l) of one pair of nodes; share: D_c.
double LocalityLoss::divergence_term(std::size_t from, std::size_t to, std::span<const double> sums,
                                     double& share) const {
  const auto nodes = static_cast<std::size_t>(locality_->num_nodes);
  double tokens = 0;
  for (std::size_t n = 0; n < nodes; ++n) tokens += sums[from * nodes + n];
  // Scores far apart can leave a node no probability at all: its part of the divergence is 0, and the gradient is
  // multiplied by that probability.
  share = std::max(sums[from * nodes + to] / tokens, 1e-30);
  const double wanted = from == to ? 1 - epsilon_ : epsilon_ / static_cast<double>(nodes - 1);
  return std::log(share / wanted);
}

double LocalityLoss::loss(const Scores& scores, std::span<const double> sums) const {
  if (!on()) return 0;
  const auto nodes = static_cast<std::size_t>(locality_->num_nodes);
  std::vector<double> own(nodes, 0);
  for (std::size_t t = 0; t < static_cast<std::size_t>(scores.num_tokens); ++t)
    own[static_cast<std::size_t>(locality_->node_of(scores.rank_of(t)))] += 1;
  double total = 0, out = 0;
  for (const double s : sums) total += s;
  for (std::size_t from = 0; from < nodes; ++from) {
    if (own[from] == 0) continue;
    double divergence = 0;
    for (std::size_t to = 0; to < nodes; ++to) {
      double share = 0;
      const double term = divergence_term(from, to, sums, share);
      divergence += share * term;
    }
    out += own[from] / total * divergence;
  }
  return mu_ * out;
}

void LocalityLoss::add_gradient(const Scores& scores, std::size_t token, std::span<const double> sums,
                                std::span<double> out) const {
  if (!on()) return;
  const auto nodes = static_cast<std::size_t>(locality_->num_nodes);
  double total = 0;
  for (const double s : sums) total += s;
  const std::int32_t rank = scores.rank_of(token);
  const auto from = static_cast<std::size_t>(locality_->node_of(rank));
  for (std::size_t to = 0; to < nodes; ++to) {
    double share = 0;
    const double value = mu_ / total * (divergence_term(from, to, sums, share) + 1);
    for (std::int32_t e = 0; e < scores.num_experts; ++e)
      if (static_cast<std::size_t>(locality_->node_to(rank, e)) == to)
        out[static_cast<std::size_t>(e)] += value;
  }
}

}  // namespace sluice
