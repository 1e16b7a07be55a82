#include "sluice/scheduler/workload.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"

namespace sluice {
namespace {

constexpr ErrorCode kBad = ErrorCode::kInvalidArgument;
constexpr std::int64_t kDrawnTokens = 8192;  // for each domain of counts

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

// Tokens whose experts have the shares of the counts and nothing in common. Systematic sampling (Madow 1949) over a
// shuffled order: expert e is drawn with probability n(e) / tokens exactly, and no expert twice.
std::vector<SampledToken> draw_tokens(const RoutingStatistics& s, std::int64_t num_tokens) {
  std::vector<SampledToken> out(at(num_tokens));
  const double total = s.num_tokens();
  const std::size_t experts = at(s.num_experts);
  for (std::size_t l = 0; l < s.layers.size(); ++l) {
    std::mt19937_64 rng(Hasher().add_text("drawn tokens").add(l).value());
    std::vector<std::size_t> order(experts);
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (std::size_t t = 0; t < out.size(); ++t) {
      if (t % 8 == 0)  // a new order for each token would be most of the work
        for (std::size_t i = experts; i > 1; --i) std::swap(order[i - 1], order[rng() % i]);
      // Starts are spread evenly over the tokens, so that the sums come out right soon.
      double next = (static_cast<double>(t) + 0.5) * 0.6180339887498949;
      next -= std::floor(next);
      double sum = 0;
      SampledToken& token = out[t];
      const auto begin = static_cast<std::ptrdiff_t>(token.expert.size());
      for (const std::size_t e : order) {
        sum += std::min(1.0, s.layers[l].counts[e] / total);
        if (sum <= next) continue;
        token.expert.push_back(static_cast<std::int32_t>(e));
        next += 1;
      }
      std::sort(token.expert.begin() + begin, token.expert.end());
      token.end.push_back(static_cast<std::int32_t>(token.expert.size()));
    }
  }
  return out;
}

}  // namespace

std::string_view to_string(SourceAssignment assignment) noexcept {
  switch (assignment) {
    case SourceAssignment::kRecorded:
      return "recorded";
    case SourceAssignment::kMixed:
      return "mixed";
    case SourceAssignment::kSkewed:
      return "skewed";
  }
  return "unknown assignment";
}

std::vector<std::int64_t> Workload::demand(std::size_t layer) const {
  std::vector<std::int64_t> out(at(num_ranks) * at(num_experts), 0);
  const WorkloadLayer& l = layers[layer];
  for (std::size_t t = 0; t < source.size(); ++t)
    for (auto q = l.row_ptr[t]; q < l.row_ptr[t + 1]; ++q)
      ++out[at(source[t]) * at(num_experts) + at(l.expert[at(q)])];
  return out;
}

Workload make_workload(std::span<const RoutingStatistics> domains, SourceAssignment assignment,
                       const Topology& topology, std::int64_t max_tokens) {
  Require(!domains.empty(), kBad, "there are no statistics to make a workload of");
  const auto num_domains = domains.size();
  const std::int32_t num_ranks = topology.num_ranks(), num_nodes = topology.num_nodes();
  Workload out;
  out.num_experts = domains[0].num_experts;
  out.num_ranks = num_ranks;
  std::vector<std::vector<SampledToken>> drawn(num_domains);
  std::vector<std::span<const SampledToken>> tokens(num_domains);
  std::int64_t share = std::max<std::int64_t>(1, max_tokens / static_cast<std::int64_t>(num_domains));
  for (std::size_t d = 0; d < num_domains; ++d) {
    require_same_model(domains[0], domains[0].description, domains[d], domains[d].description);
    if (assignment == SourceAssignment::kRecorded)
      Require(domains[d].num_sources() == num_ranks, kBad, domains[d].description, " has tokens of ",
              domains[d].num_sources(), " source ranks, there are ", num_ranks,
              " ranks; choose another assignment of sources");
    out.drawn = out.drawn || domains[d].sample.empty();
  }
  for (std::size_t d = 0; d < num_domains; ++d) {
    if (out.drawn) {
      drawn[d] = draw_tokens(domains[d], std::min(share, kDrawnTokens));
      tokens[d] = drawn[d];
    } else {
      tokens[d] = domains[d].sample;
    }
    share = std::min(share, static_cast<std::int64_t>(tokens[d].size()));
  }

  // Tokens by home: (rank, domain, place in the domain's sample)
  std::vector<std::vector<std::pair<std::size_t, std::size_t>>> of_rank(at(num_ranks));
  if (assignment == SourceAssignment::kSkewed) {
    std::vector<std::vector<std::size_t>> domains_of(at(num_ranks));
    std::vector<std::int64_t> homes(num_domains, 0), next(num_domains, 0);
    const std::size_t nodes = at(num_nodes);
    for (std::size_t i = 0; i < std::max(nodes, num_domains); ++i)
      for (const std::int32_t r : topology.ranks_of(NodeId(static_cast<std::int32_t>(i % nodes)))) {
        domains_of[at(r)].push_back(i % num_domains);
        ++homes[i % num_domains];
      }
    std::int64_t quota = INT64_MAX;
    for (const auto& list : domains_of) {
      std::int64_t least = INT64_MAX;
      for (const std::size_t d : list) least = std::min(least, share / homes[d]);
      quota = std::min(quota, least * static_cast<std::int64_t>(list.size()));
    }
    for (std::int64_t i = 0; i < quota; ++i)
      for (std::size_t r = 0; r < of_rank.size(); ++r) {
        const std::size_t d = domains_of[r][at(i) % domains_of[r].size()];
        of_rank[r].push_back({d, at(next[d]++)});
      }
  } else {
    for (std::size_t d = 0; d < num_domains; ++d)
      for (std::int64_t i = 0; i < share; ++i) {
        const std::size_t r = assignment == SourceAssignment::kRecorded && !out.drawn
                                  ? at(tokens[d][at(i)].source)
                                  : (at(i) + d) % of_rank.size();
        of_rank[r].push_back({d, at(i)});
      }
  }

  const std::size_t num_layers = domains[0].layers.size();
  out.layers.resize(num_layers);
  for (std::size_t l = 0; l < num_layers; ++l) {
    WorkloadLayer& layer = out.layers[l];
    layer.layer = domains[0].layers[l].layer;
    layer.row_ptr.push_back(0);
    bool known = l + 1 < num_layers;
    for (const RoutingStatistics& s : domains) known = known && !s.layers[l].transitions.empty();
    if (!known) continue;
    layer.transitions.assign(at(out.num_experts) * at(out.num_experts), 0.0);
    for (const RoutingStatistics& s : domains)
      for (std::size_t i = 0; i < layer.transitions.size(); ++i)
        layer.transitions[i] += s.layers[l].transitions[i] / s.num_tokens();
  }
  for (std::size_t r = 0; r < of_rank.size(); ++r)
    for (const auto& [d, i] : of_rank[r]) {
      const SampledToken& token = tokens[d][i];
      out.source.push_back(static_cast<std::int32_t>(r));
      out.domain.push_back(static_cast<std::int32_t>(d));
      for (std::size_t l = 0; l < num_layers; ++l) {
        WorkloadLayer& layer = out.layers[l];
        const auto here = token.experts_at(l);
        layer.expert.insert(layer.expert.end(), here.begin(), here.end());
        layer.row_ptr.push_back(static_cast<std::int64_t>(layer.expert.size()));
      }
    }
  return out;
}

double StepCosts::layer_us(double routes, double in_node_rows, double across_rows) const {
  const double i = in_node_rows * row_in_node_us, a = across_rows * row_across_us;
  double us = 0;
  for (const double route_us : {route_forward_us, route_backward_us}) {
    const double c = routes * route_us, most = std::max({c, i, a});
    us += most + kUnhidden * (c + i + a - most);
  }
  return us;
}

double LayerLoad::step_us(const StepCosts& costs, double scale) const {
  const auto most = [&](const std::vector<std::int64_t>& v) {
    return scale * static_cast<double>(*std::max_element(v.begin(), v.end()));
  };
  return costs.layer_us(most(routes), most(in_node), most(across));
}

double LayerLoad::balance() const {
  const auto most = static_cast<double>(*std::max_element(routes.begin(), routes.end()));
  const auto sum = static_cast<double>(std::accumulate(routes.begin(), routes.end(), std::int64_t{0}));
  return most == 0 ? 1 : sum / static_cast<double>(routes.size()) / most;
}

LayerLoad count_layer(const Workload& workload, std::size_t index, const Placement& placement,
                      const Topology& topology) {
  Require(placement.num_experts == workload.num_experts && placement.num_ranks == workload.num_ranks &&
              topology.num_ranks() == workload.num_ranks,
          kBad, "the placement is of ", placement.num_experts, " experts on ", placement.num_ranks,
          " ranks, the workload of ", workload.num_experts, " on ", workload.num_ranks, ", the topology of ",
          topology.num_ranks(), " ranks");
  const std::size_t ranks = at(workload.num_ranks), experts = at(workload.num_experts),
                    nodes = at(topology.num_nodes());
  std::vector<std::int32_t> slot_of(ranks * experts);
  choose_all_replicas(placement, topology, workload.demand(index), slot_of);
  LayerLoad out;
  out.routes.assign(ranks, 0);
  out.in_node.assign(ranks, 0);
  out.across.assign(ranks, 0);
  out.node_out.assign(nodes, 0);
  out.node_in.assign(nodes, 0);
  std::vector<std::int64_t> rank_seen(ranks, -1), node_seen(nodes, -1);
  const WorkloadLayer& layer = workload.layers[index];
  for (std::size_t t = 0; t < workload.source.size(); ++t) {
    const RankId home(workload.source[t]);
    const auto token = static_cast<std::int64_t>(t);
    for (auto q = layer.row_ptr[t]; q < layer.row_ptr[t + 1]; ++q) {
      const std::int32_t slot = slot_of[home.index() * experts + at(layer.expert[at(q)])];
      if (slot < 0) continue;  // everywhere: at home
      const RankId to(placement.slot_rank[at(slot)]);
      ++out.routes[to.index()];
      if (std::exchange(rank_seen[to.index()], token) == token) continue;
      const NodeId node = topology.node_of(to);
      const RankId gateway = topology.same_node(home, to) ? home : topology.gateway(home, node);
      if (to != home) ++out.rank_crossings;
      if (to != gateway) {
        ++out.in_node[gateway.index()];
        ++out.in_node[to.index()];
      }
      if (topology.same_node(home, to) || std::exchange(node_seen[node.index()], token) == token) continue;
      ++out.node_crossings;
      ++out.across[home.index()];
      ++out.across[gateway.index()];
      ++out.node_out[topology.node_of(home).index()];
      ++out.node_in[node.index()];
    }
  }
  return out;
}

PlacementMetrics measure(const Workload& workload, std::span<const Placement> placements,
                         const Topology& topology, const StepCosts& costs) {
  Require(placements.size() == workload.layers.size(), kBad, "there are ", placements.size(),
          " placements for ", workload.layers.size(), " layers");
  Require(workload.num_tokens() > 0, kBad, "the workload has no tokens");
  PlacementMetrics out;
  out.drawn = workload.drawn;
  const auto tokens = static_cast<double>(workload.num_tokens()),
             layers = static_cast<double>(placements.size());
  const double node_tokens = tokens / topology.num_nodes();
  const double scale =
      static_cast<double>(costs.tokens_per_rank) * static_cast<double>(workload.num_ranks) / tokens;
  const std::size_t experts = at(workload.num_experts);
  out.has_hops = placements.size() > 1;
  for (std::size_t l = 0; l < placements.size(); ++l) {
    LayerLoad load = count_layer(workload, l, placements[l], topology);
    out.node_crossings_per_token += static_cast<double>(load.node_crossings) / tokens / layers;
    out.rank_crossings_per_token += static_cast<double>(load.rank_crossings) / tokens / layers;
    out.balance += load.balance() / layers;
    std::int64_t both = 0, in = 0, left = 0;
    for (std::size_t n = 0; n < load.node_in.size(); ++n) {
      both = std::max(both, load.node_in[n] + load.node_out[n]);
      in = std::max(in, load.node_in[n]);
      left = std::max(left, load.node_out[n]);
    }
    out.busiest_node_crossings += static_cast<double>(both) / node_tokens / layers;
    out.busiest_node_in += static_cast<double>(in) / node_tokens / layers;
    out.busiest_node_out += static_cast<double>(left) / node_tokens / layers;
    out.predicted_step_us += load.step_us(costs, scale);
    out.layers.push_back(std::move(load));
    if (l + 1 == placements.size()) continue;
    const std::vector<double>& transitions = workload.layers[l].transitions;
    if (transitions.empty()) {
      out.has_hops = false;
      continue;
    }
    double moved = 0, all = 0;
    for (std::size_t p = 0; p < experts; ++p)
      for (std::size_t q = 0; q < experts; ++q) {
        const ExpertId from(static_cast<std::int32_t>(p)), to(static_cast<std::int32_t>(q));
        if (placements[l].everywhere(from) || placements[l + 1].everywhere(to)) continue;
        const double n = transitions[p * experts + q];
        bool stays = false;
        for (const std::int32_t s : placements[l].slots_of(from))
          stays = stays || placements[l + 1].slot_on(to, RankId(placements[l].slot_rank[at(s)])).valid();
        all += n;
        moved += stays ? 0 : n;
      }
    if (all > 0) out.hops_per_token += moved / all;
  }
  return out;
}

}  // namespace sluice
