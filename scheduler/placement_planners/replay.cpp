#include "sluice/scheduler/placement_planners/replay.hpp"

namespace sluice {
namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

}  // namespace

Replay::Replay(const Topology& topology, const Workload& workload, std::size_t layer)
    : topology_(topology),
      ranks_(at(workload.num_ranks)),
      nodes_(at(topology.num_nodes())),
      experts_(at(workload.num_experts)) {
  for (std::size_t r = 0; r < ranks_; ++r) {
    const RankId rank(static_cast<std::int32_t>(r));
    node_of_.push_back(topology.node_of(rank).value);
    for (std::size_t n = 0; n < nodes_; ++n) {
      const NodeId node(static_cast<std::int32_t>(n));
      gateway_.push_back(node == topology.node_of(rank) ? rank.value : topology.gateway(rank, node).value);
    }
  }
  const WorkloadLayer& l = workload.layers[layer];
  ptr_.assign(experts_ * ranks_ + 1, 0);
  for (std::size_t t = 0; t < workload.source.size(); ++t)
    for (auto q = l.row_ptr[t]; q < l.row_ptr[t + 1]; ++q)
      ++ptr_[at(l.expert[at(q)]) * ranks_ + at(workload.source[t]) + 1];
  for (std::size_t i = 1; i < ptr_.size(); ++i) ptr_[i] += ptr_[i - 1];
  tokens_.resize(l.expert.size());
  std::vector<std::int64_t> next(ptr_.begin(), ptr_.end() - 1);
  for (std::size_t t = 0; t < workload.source.size(); ++t)
    for (auto q = l.row_ptr[t]; q < l.row_ptr[t + 1]; ++q)
      tokens_[at(next[at(l.expert[at(q)]) * ranks_ + at(workload.source[t])]++)] =
          static_cast<std::int32_t>(t);
  demand_ = workload.demand(layer);
  dest_.assign(ranks_ * experts_, -1);
  to_rank_.assign(workload.source.size() * ranks_, 0);
  to_node_.assign(workload.source.size() * nodes_, 0);
  load_.routes.assign(ranks_, 0);
  load_.in_node.assign(ranks_, 0);
  load_.across.assign(ranks_, 0);
}

void Replay::direct(std::size_t source, std::size_t expert, std::int32_t to) {
  std::int32_t& dest = dest_[source * experts_ + expert];
  const std::int32_t from = dest;
  if (from == to) return;
  dest = to;
  const std::size_t cell = expert * ranks_ + source;
  const std::span<const std::int32_t> tokens(tokens_.data() + ptr_[cell], at(ptr_[cell + 1] - ptr_[cell]));
  const std::int32_t home = node_of_[source];
  // Adds (sign 1) or takes away (-1) a route of each token at a rank.
  const auto change = [&](std::int32_t rank, int sign) {
    const std::int32_t node = node_of_[at(rank)];
    const std::int32_t gateway = gateway_[source * nodes_ + at(node)];
    std::int64_t first_at_rank = 0, first_at_node = 0;
    const auto edge =
        static_cast<std::uint16_t>(sign > 0 ? 1 : 0);  // the count that a first or last route leaves
    for (const std::int32_t t : tokens) {
      std::uint16_t& r = to_rank_[at(t) * ranks_ + at(rank)];
      r = static_cast<std::uint16_t>(r + sign);
      first_at_rank += r == edge;
      std::uint16_t& n = to_node_[at(t) * nodes_ + at(node)];
      n = static_cast<std::uint16_t>(n + sign);
      first_at_node += n == edge;
    }
    load_.routes[at(rank)] += sign * static_cast<std::int64_t>(tokens.size());
    if (rank != gateway) {
      load_.in_node[at(rank)] += sign * first_at_rank;
      load_.in_node[at(gateway)] += sign * first_at_rank;
    }
    if (node != home) {
      load_.node_crossings += sign * first_at_node;
      load_.across[source] += sign * first_at_node;
      load_.across[at(gateway)] += sign * first_at_node;
    }
  };
  if (from >= 0) change(from, -1);
  if (to >= 0) change(to, 1);
}

void Replay::set_copies(std::int32_t expert, std::span<const std::int32_t> ranks) {
  const std::size_t e = at(expert);
  for (std::size_t s = 0; s < ranks_; ++s) {
    const std::size_t cell = e * ranks_ + s;
    const std::int64_t demand = ptr_[cell + 1] - ptr_[cell];
    if (demand == 0) continue;
    const std::int32_t before = dest_[s * experts_ + e];
    std::int32_t best = -1;
    int best_level = 3;
    std::int64_t best_load = 0;
    for (const std::int32_t r : ranks) {
      const int level = at(r) == s ? 0 : node_of_[at(r)] == node_of_[s] ? 1 : 2;
      const std::int64_t load = load_.routes[at(r)] - (before == r ? demand : 0);
      if (level < best_level || (level == best_level && load < best_load)) {
        best = r;
        best_level = level;
        best_load = load;
      }
    }
    if (best == before) continue;
    log_.push_back({static_cast<std::int32_t>(s), expert, before});
    direct(s, e, best);
  }
}

void Replay::follow_rule(const Placement& placement) {
  slot_of_.resize(demand_.size());
  choose_all_replicas(placement, topology_, demand_, slot_of_);
  for (std::size_t s = 0; s < ranks_; ++s)
    for (std::size_t e = 0; e < experts_; ++e) {
      const std::int32_t slot = slot_of_[s * experts_ + e];
      if (slot >= 0 && demand_[s * experts_ + e] > 0) direct(s, e, placement.slot_rank[at(slot)]);
    }
  log_.clear();
}

void Replay::undo() {
  for (auto change = log_.rbegin(); change != log_.rend(); ++change)
    direct(at(change->source), at(change->expert), change->from);
  log_.clear();
}

}  // namespace sluice
