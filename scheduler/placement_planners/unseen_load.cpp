#include "sluice/scheduler/placement_planners/unseen_load.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <numeric>
#include <random>

#include "sluice/base/hash.hpp"

namespace sluice {
namespace {

constexpr double kDomainPart = 0.6;  // of the variance of log shares, between domains
constexpr double kPriorDomains = 1;  // that weighs in the variance between domains like so many more of them
constexpr double kOwnDomains = 4;    // all experts' variance weighs in an expert's own likewise
constexpr double kFloor =
    0.05;  // of the mean share, added to each: an expert that was not seen at all may be seen

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

}  // namespace

std::vector<double> draw_worlds(const PlacementProblem& problem, std::size_t layer) {
  const std::size_t experts = at(problem.num_ffn()), domains = problem.domains.size();
  const auto num_experts = static_cast<double>(experts), num_domains = static_cast<double>(domains);
  std::vector<double> x(domains * experts);  // log shares
  double between_experts = 0, mean = 0;
  for (std::size_t d = 0; d < domains; ++d) {
    const std::span<const double> counts(problem.domains[d].layers[layer].counts.data(), experts);
    const double sum = std::accumulate(counts.begin(), counts.end(), 0.0);
    double first = 0, second = 0;
    for (std::size_t e = 0; e < experts; ++e) {
      const double log_share = std::log(num_experts * (sum > 0 ? counts[e] / sum : 0) + kFloor);
      x[d * experts + e] = log_share;
      first += log_share / num_experts;
      second += log_share * log_share / num_experts;
    }
    mean += first / num_domains;
    between_experts += std::max(0.0, second - first * first) / num_domains;
  }
  std::vector<double> center(experts, 0), own(experts, 0);  // means and variances over domains
  double pooled = kPriorDomains * kDomainPart * between_experts;
  for (std::size_t e = 0; e < experts; ++e) {
    for (std::size_t d = 0; d < domains; ++d) center[e] += x[d * experts + e] / num_domains;
    for (std::size_t d = 0; d < domains; ++d)
      own[e] += (x[d * experts + e] - center[e]) * (x[d * experts + e] - center[e]);
    pooled += own[e] / num_experts;
  }
  pooled = std::min(between_experts, pooled / (kPriorDomains + num_domains - 1));
  const double lasting = std::max(0.0, between_experts - pooled);

  std::mt19937_64 rng(Hasher().add_text("unseen load").add(problem.seed).add(layer).value());
  std::vector<double> out(experts * kWorlds);
  std::array<std::size_t, kWorlds> order;
  for (std::size_t e = 0; e < experts; ++e) {
    const double variance = (kOwnDomains * pooled + own[e]) / (kOwnDomains + num_domains - 1);
    const double kept = lasting > 0 ? lasting / (lasting + variance / num_domains) : 0;
    const double scale = std::sqrt(variance * (1 + kept / num_domains)) * std::sqrt(3.0) / std::numbers::pi;
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (std::size_t i = kWorlds; i > 1; --i) std::swap(order[i - 1], order[rng() % i]);
    for (std::size_t w = 0; w < kWorlds; ++w) {
      const double u = (static_cast<double>(order[w]) + 0.5) / static_cast<double>(kWorlds);
      out[e * kWorlds + w] = std::exp(kept * (center[e] - mean) + scale * std::log(u / (1 - u)));
    }
  }
  for (std::size_t w = 0; w < kWorlds; ++w) {
    double sum = 0;
    for (std::size_t e = 0; e < experts; ++e) sum += out[e * kWorlds + w];
    for (std::size_t e = 0; e < experts; ++e) out[e * kWorlds + w] /= sum;
  }
  return out;
}

UnseenLoad::UnseenLoad(const Topology& topology, std::span<const double> shares)
    : topology_(topology), shares_(shares) {
  parts_.resize(shares.size() / kWorlds);
  in_node_.assign(at(topology.num_nodes()), 0);
  load_.assign(at(topology.num_ranks()) * kWorlds, 0);
}

void UnseenLoad::add(std::int32_t expert, int sign) {
  const double* shares = shares_.data() + at(expert) * kWorlds;
  for (const Part& part : parts_[at(expert)]) {
    const double factor = sign * part.share;
    double* load = load_.data() + at(part.rank) * kWorlds;
    for (std::size_t w = 0; w < kWorlds; ++w) load[w] += factor * shares[w];
  }
}

void UnseenLoad::set_copies(std::int32_t expert, std::span<const std::int32_t> ranks) {
  add(expert, -1);
  auto& parts = parts_[at(expert)];
  parts.clear();
  std::size_t open = at(topology_.num_ranks());  // sources without a copy in their node
  for (const std::int32_t r : ranks) {
    const std::size_t node = topology_.node_of(RankId(r)).index();
    if (in_node_[node]++ == 0) open -= topology_.ranks_of(NodeId(static_cast<std::int32_t>(node))).size();
  }
  const auto num_ranks = static_cast<double>(topology_.num_ranks());
  for (const std::int32_t r : ranks) {
    const NodeId node = topology_.node_of(RankId(r));
    const auto near = static_cast<double>(topology_.ranks_of(node).size()) / in_node_[node.index()];
    parts.push_back({r, (near + static_cast<double>(open) / static_cast<double>(ranks.size())) / num_ranks});
  }
  for (const std::int32_t r : ranks) in_node_[topology_.node_of(RankId(r)).index()] = 0;
  add(expert, 1);
}

std::array<double, kWorlds> UnseenLoad::most() const {
  std::array<double, kWorlds> most{};
  for (std::size_t begin = 0; begin < load_.size(); begin += kWorlds)
    for (std::size_t w = 0; w < kWorlds; ++w) most[w] = std::max(most[w], load_[begin + w]);
  return most;
}

std::int32_t UnseenLoad::most_loaded(std::size_t world) const {
  std::size_t out = 0;
  for (std::size_t r = 1; r < load_.size() / kWorlds; ++r)
    if (load_[r * kWorlds + world] > load_[out * kWorlds + world]) out = r;
  return static_cast<std::int32_t>(out);
}

double UnseenLoad::expected_max() const {
  const std::array<double, kWorlds> all = most();
  return std::accumulate(all.begin(), all.end(), 0.0) / static_cast<double>(kWorlds);
}

}  // namespace sluice
