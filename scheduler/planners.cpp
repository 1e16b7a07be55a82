#include "sluice/scheduler/planners.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>

#include "sluice/base/error.hpp"

namespace sluice {
namespace {

constexpr ErrorCode kBad = ErrorCode::kInvalidArgument;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

using Lists = std::vector<std::vector<std::int32_t>>;

class ContiguousPlanner : public PlacementPlanner {
 public:
  std::string_view name() const override { return "contiguous"; }
  PlacementPlan plan(const PlacementProblem& problem) const override {
    validate(problem);
    const std::vector<std::int32_t> count = single_copies_per_rank(problem);
    Lists lists(count.size());
    std::int32_t next = 0;
    for (std::size_t r = 0; r < count.size(); ++r)
      for (std::int32_t i = 0; i < count[r]; ++i) lists[r].push_back(next++);
    PlacementPlan out;
    out.layers.assign(problem.domains[0].layers.size(), placement_of_lists(problem, lists));
    return out;
  }
};

class EplbPlanner : public PlacementPlanner {
 public:
  explicit EplbPlanner(bool hierarchical) : hierarchical_(hierarchical) {}
  std::string_view name() const override { return hierarchical_ ? "eplb_hierarchical" : "eplb_global"; }
  PlacementPlan plan(const PlacementProblem& problem) const override {
    validate(problem);
    const Topology& topology = problem.topology;
    const std::int32_t ranks = topology.num_ranks(), nodes = hierarchical_ ? topology.num_nodes() : 1;
    for (const std::int32_t n : problem.slots_per_rank)
      Require(n == problem.slots_per_rank[0], ErrorCode::kNotSupported, name(),
              " needs as many slots on every rank, not ", problem.slots_per_rank[0], " and ", n,
              "; planner sluice takes any number");
    if (hierarchical_)
      for (std::int32_t n = 0; n < nodes; ++n) {
        const auto& list = topology.ranks_of(NodeId(n));
        Require(list.front() == n * (ranks / nodes) &&
                    static_cast<std::int32_t>(list.size()) == ranks / nodes &&
                    list.back() == list.front() + ranks / nodes - 1,
                ErrorCode::kNotSupported, name(), " needs equal nodes of consecutive ranks; node ", n,
                " is another");
      }
    std::int32_t groups = 1;
    if (hierarchical_) {
      groups = problem.eplb_groups;
      if (groups == 0) groups = 8 % nodes == 0 && problem.num_ffn() % 8 == 0 ? 8 : nodes;
    }
    PlacementPlan out;
    for (std::size_t l = 0; l < problem.domains[0].layers.size(); ++l) {
      std::vector<float> weight(at(problem.num_ffn()));
      for (std::size_t e = 0; e < weight.size(); ++e) {
        double sum = 0;
        for (const RoutingStatistics& s : problem.domains) sum += s.layers[l].counts[e] / s.num_tokens();
        weight[e] = static_cast<float>(sum * problem.domains[0].num_tokens());
      }
      const EplbPlan plan =
          eplb_hierarchical(weight, problem.slots_per_rank[0] * ranks, groups, nodes, ranks);
      Lists lists(at(ranks));
      for (std::size_t i = 0; i < plan.slot_expert.size(); ++i)
        lists[i / at(problem.slots_per_rank[0])].push_back(plan.slot_expert[i]);
      out.layers.push_back(placement_of_lists(problem, lists));
    }
    return out;
  }

 private:
  bool hierarchical_;
};

// Items to parts of given sizes so that the affinity inside parts is large: seeds and greedy filling, then swaps of two
// items as long as the best of them gains. affinity: f64 [n, n], symmetric.
std::vector<std::int32_t> cluster(const std::vector<double>& affinity, std::span<const std::int32_t> items,
                                  std::size_t stride, std::span<const std::int32_t> sizes,
                                  std::int64_t& moves) {
  const std::size_t n = items.size(), parts = sizes.size();
  const auto c = [&](std::size_t i, std::size_t j) { return affinity[at(items[i]) * stride + at(items[j])]; };
  std::vector<std::int32_t> part(n, -1), room(sizes.begin(), sizes.end());
  std::vector<double> to(n * parts, 0);  // affinity of an item to a part
  const auto put = [&](std::size_t i, std::size_t p, double sign) {
    for (std::size_t j = 0; j < n; ++j)
      if (j != i) to[j * parts + p] += sign * c(i, j);
  };
  for (std::size_t p = 0; p < parts; ++p)
    while (room[p] > 0) {
      // An empty part begins with the item that has most affinity to what is left.
      std::size_t best = n;
      double best_value = -1;
      const bool first = room[p] == sizes[p];
      for (std::size_t i = 0; i < n; ++i) {
        if (part[i] >= 0) continue;
        double value = to[i * parts + p];
        if (first) {
          value = 0;
          for (std::size_t j = 0; j < n; ++j)
            if (part[j] < 0 && j != i) value += c(i, j);
        }
        if (value > best_value) {
          best = i;
          best_value = value;
        }
      }
      if (best == n) break;  // nothing is left
      part[best] = static_cast<std::int32_t>(p);
      --room[p];
      put(best, p, 1);
    }
  for (std::size_t sweep = 0; sweep < 50; ++sweep) {
    bool any = false;
    for (std::size_t i = 0; i < n; ++i) {
      std::size_t best = n;
      double best_gain = 1e-12;
      const auto a = at(part[i]);
      for (std::size_t j = 0; j < n; ++j) {
        const auto b = at(part[j]);
        if (a == b) continue;
        ++moves;
        const double gain =
            to[i * parts + b] - to[i * parts + a] + to[j * parts + a] - to[j * parts + b] - 2 * c(i, j);
        if (gain > best_gain) {
          best = j;
          best_gain = gain;
        }
      }
      if (best == n) continue;
      const auto b = at(part[best]);
      put(i, a, -1), put(best, b, -1);
      put(i, b, 1), put(best, a, 1);
      std::swap(part[i], part[best]);
      any = true;
    }
    if (!any) break;
  }
  return part;
}

class CoactivationPlanner : public PlacementPlanner {
 public:
  std::string_view name() const override { return "coactivation"; }
  PlacementPlan plan(const PlacementProblem& problem) const override {
    validate(problem);
    const Topology& topology = problem.topology;
    const std::vector<std::int32_t> count = single_copies_per_rank(problem);
    const Workload workload = make_workload(problem.domains, problem.assignment, topology, 1024);
    const std::size_t stride = at(problem.num_experts());
    std::vector<std::int32_t> all(at(problem.num_ffn()));
    std::iota(all.begin(), all.end(), 0);
    std::vector<std::int32_t> node_sizes;
    for (std::int32_t n = 0; n < topology.num_nodes(); ++n) {
      node_sizes.push_back(0);
      for (const std::int32_t r : topology.ranks_of(NodeId(n))) node_sizes.back() += count[at(r)];
    }
    PlacementPlan out;
    for (std::size_t l = 0; l < problem.domains[0].layers.size(); ++l) {
      const std::vector<double> together = layer_affinity(problem, workload, l).together;
      const std::vector<std::int32_t> node_of = cluster(together, all, stride, node_sizes, out.moves);
      Lists lists(count.size());
      for (std::int32_t n = 0; n < topology.num_nodes(); ++n) {
        std::vector<std::int32_t> members, sizes;
        for (std::size_t e = 0; e < all.size(); ++e)
          if (node_of[e] == n) members.push_back(all[e]);
        const auto& ranks = topology.ranks_of(NodeId(n));
        for (const std::int32_t r : ranks) sizes.push_back(count[at(r)]);
        const std::vector<std::int32_t> part = cluster(together, members, stride, sizes, out.moves);
        for (std::size_t i = 0; i < members.size(); ++i) lists[at(ranks[at(part[i])])].push_back(members[i]);
      }
      for (auto& list : lists) std::sort(list.begin(), list.end());
      out.layers.push_back(placement_of_lists(problem, lists));
    }
    return out;
  }
};

class ExflowPlanner : public PlacementPlanner {
 public:
  std::string_view name() const override { return "exflow"; }
  PlacementPlan plan(const PlacementProblem& problem) const override {
    validate(problem);
    const std::size_t num_layers = problem.domains[0].layers.size(), all = at(problem.num_experts());
    const std::size_t ffn = at(problem.num_ffn());
    std::vector<std::vector<double>> transitions;
    for (std::size_t l = 0; l + 1 < num_layers; ++l) {
      std::vector<double> sum(ffn * ffn, 0);
      for (const RoutingStatistics& s : problem.domains) {
        Require(!s.layers[l].transitions.empty(), ErrorCode::kNotSupported, "exflow: ", s.description,
                " has no transitions from layer ", s.layers[l].layer,
                " to the next; it plans from nothing else");
        for (std::size_t p = 0; p < ffn; ++p)
          for (std::size_t q = 0; q < ffn; ++q)
            sum[p * ffn + q] += s.layers[l].transitions[p * all + q] / s.num_tokens();
      }
      transitions.push_back(std::move(sum));
    }
    const std::vector<std::int32_t> count = single_copies_per_rank(problem);
    PlacementPlan out;
    if (num_layers == 1) {
      out.layers = make_planner("contiguous")->plan(problem).layers;
      return out;
    }
    for (const auto& rank_of : exflow_assign(transitions, problem.num_ffn(), problem.topology, count)) {
      Lists lists(count.size());
      for (std::size_t e = 0; e < rank_of.size(); ++e)
        lists[at(rank_of[e])].push_back(static_cast<std::int32_t>(e));
      out.layers.push_back(placement_of_lists(problem, lists));
    }
    return out;
  }
};

constexpr std::array<std::string_view, 6> kNames = {"contiguous",   "eplb_global", "eplb_hierarchical",
                                                    "coactivation", "exflow",      "sluice"};

// One level of ExFlow: items of every layer to parts. benefit of item i of layer l in part p: transitions to and from the
// neighbouring layers' items there. within[l][i] < 0: not in this sub-problem.
void assign_level(std::span<const std::vector<double>> transitions, std::size_t num_experts,
                  const Lists& members, std::span<const std::int32_t> sizes, Lists& part) {
  const std::size_t layers = members.size(), parts = sizes.size();
  // Start: in the order of the members.
  for (std::size_t l = 0; l < layers; ++l) {
    std::size_t p = 0;
    std::int32_t used = 0;
    for (const std::int32_t e : members[l]) {
      while (used == sizes[p]) {
        ++p;
        used = 0;
      }
      part[l][at(e)] = static_cast<std::int32_t>(p);
      ++used;
    }
  }
  std::vector<double> benefit(num_experts * parts);
  const auto sweep_layer = [&](std::size_t l, bool assign) {
    std::fill(benefit.begin(), benefit.end(), 0.0);
    for (const std::int32_t e : members[l]) {
      if (l > 0)
        for (const std::int32_t q : members[l - 1])
          benefit[at(e) * parts + at(part[l - 1][at(q)])] += transitions[l - 1][at(q) * num_experts + at(e)];
      if (l + 1 < layers)
        for (const std::int32_t q : members[l + 1])
          benefit[at(e) * parts + at(part[l + 1][at(q)])] += transitions[l][at(e) * num_experts + at(q)];
    }
    const auto value = [&] {
      double sum = 0;
      for (const std::int32_t e : members[l]) sum += benefit[at(e) * parts + at(part[l][at(e)])];
      return sum;
    };
    const double before = value();
    if (assign) {  // greedy: the largest benefit first
      const std::vector<std::int32_t> old = part[l];
      struct Entry {
        double value;
        std::int32_t item, part;
      };
      std::vector<Entry> order;
      for (const std::int32_t e : members[l])
        for (std::size_t p = 0; p < parts; ++p)
          order.push_back({benefit[at(e) * parts + p], e, static_cast<std::int32_t>(p)});
      std::stable_sort(order.begin(), order.end(),
                       [](const Entry& a, const Entry& b) { return a.value > b.value; });
      std::vector<std::int32_t> room(sizes.begin(), sizes.end());
      for (const std::int32_t e : members[l]) part[l][at(e)] = -1;
      for (const Entry& entry : order) {
        if (part[l][at(entry.item)] >= 0 || room[at(entry.part)] == 0) continue;
        part[l][at(entry.item)] = entry.part;
        --room[at(entry.part)];
      }
      if (value() < before) part[l] = old;
    }
    bool swapped = true;
    for (int round = 0; swapped && round < 50; ++round) {
      swapped = false;
      for (const std::int32_t a : members[l])
        for (const std::int32_t b : members[l]) {
          const auto pa = at(part[l][at(a)]), pb = at(part[l][at(b)]);
          if (pa == pb) continue;
          const double gain = benefit[at(a) * parts + pb] + benefit[at(b) * parts + pa] -
                              benefit[at(a) * parts + pa] - benefit[at(b) * parts + pb];
          if (gain <= 1e-12) continue;
          std::swap(part[l][at(a)], part[l][at(b)]);
          swapped = true;
        }
    }
    return value() - before;
  };
  for (int round = 0; round < 20; ++round) {
    double gain = 0;
    for (std::size_t l = 0; l < layers; ++l) gain += sweep_layer(l, round == 0 && l > 0);
    for (std::size_t l = layers; l-- > 0;) gain += sweep_layer(l, false);
    if (gain <= 1e-9 && round > 0) break;
  }
}

// The best of several starts: in order, then shuffled; as many as a fixed amount of work allows.
void assign_best(std::span<const std::vector<double>> transitions, std::size_t num_experts,
                 const Lists& members, std::span<const std::int32_t> sizes, Lists& part) {
  std::size_t work = 1;
  for (const auto& list : members) work += list.size() * list.size();
  const std::size_t starts = std::clamp<std::size_t>(200000 / work, 1, 32);
  std::mt19937_64 rng(1);
  Lists order = members, tried = part;
  double best = -1;
  for (std::size_t i = 0; i < starts; ++i) {
    assign_level(transitions, num_experts, order, sizes, tried);
    double kept = 0;
    for (std::size_t l = 0; l + 1 < members.size(); ++l)
      for (const std::int32_t p : members[l])
        for (const std::int32_t q : members[l + 1])
          if (tried[l][at(p)] == tried[l + 1][at(q)]) kept += transitions[l][at(p) * num_experts + at(q)];
    if (kept > best) {
      best = kept;
      part = tried;
    }
    for (auto& list : order)
      for (std::size_t k = list.size(); k > 1; --k) std::swap(list[k - 1], list[rng() % k]);
  }
}

}  // namespace

void validate(const PlacementProblem& problem) {
  Require(!problem.domains.empty(), kBad, "there are no statistics to plan from");
  for (const RoutingStatistics& s : problem.domains) {
    validate(s, s.description);
    require_same_model(problem.domains[0], problem.domains[0].description, s, s.description);
    Require(s.num_tokens() > 0, kBad, s.description, " has no tokens");
  }
  const auto ranks = at(problem.topology.num_ranks());
  Require(problem.slots_per_rank.size() == ranks, kBad, "slots are given for ", problem.slots_per_rank.size(),
          " ranks, there are ", ranks);
  Require(problem.num_everywhere >= 0 && problem.num_everywhere < problem.num_experts(), kBad,
          "num_everywhere is ", problem.num_everywhere, "; it must be 0..", problem.num_experts() - 1);
  std::int64_t slots = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    Require(problem.slots_per_rank[r] >= 0, kBad, "rank ", r, " has ", problem.slots_per_rank[r],
            " slots; it must not be negative");
    slots += std::min(problem.slots_per_rank[r], problem.num_ffn());
  }
  Require(slots >= problem.num_ffn(), kBad, "all ranks together have ", slots, " slots for ",
          problem.num_ffn(), " experts; each needs one");
  Require(problem.moves >= 0, kBad, "the budget is ", problem.moves, " moves; it must not be negative");
}

std::span<const std::string_view> planner_names() {
  return kNames;
}

std::unique_ptr<PlacementPlanner> make_planner(std::string_view name) {
  if (name == "contiguous") return std::make_unique<ContiguousPlanner>();
  if (name == "eplb_global") return std::make_unique<EplbPlanner>(false);
  if (name == "eplb_hierarchical") return std::make_unique<EplbPlanner>(true);
  if (name == "coactivation") return std::make_unique<CoactivationPlanner>();
  if (name == "exflow") return std::make_unique<ExflowPlanner>();
  if (name == "sluice") return make_sluice_planner();
  std::string allowed;
  for (const std::string_view n : kNames) allowed += str(allowed.empty() ? "" : ", ", n);
  throw Error(ErrorCode::kNotFound, str("there is no planner \"", name, "\"; there are ", allowed));
}

std::vector<std::int32_t> single_copies_per_rank(const PlacementProblem& problem) {
  std::vector<std::int32_t> out(problem.slots_per_rank.size(), 0);
  for (std::int32_t placed = 0; placed < problem.num_ffn();) {
    const std::int32_t before = placed;
    // Level by level; what is left over goes to the first ranks.
    std::int32_t open = 0;
    for (std::size_t r = 0; r < out.size(); ++r) open += out[r] < problem.slots_per_rank[r];
    const std::int32_t each = std::max(1, (problem.num_ffn() - placed) / std::max(1, open));
    for (std::size_t r = 0; r < out.size() && placed < problem.num_ffn(); ++r) {
      const std::int32_t n = std::min({each, problem.slots_per_rank[r] - out[r], problem.num_ffn() - placed});
      out[r] += n;
      placed += n;
    }
    if (placed == before) break;  // validate() has seen to it that this does not happen
  }
  return out;
}

Placement placement_of_lists(const PlacementProblem& problem,
                             std::span<const std::vector<std::int32_t>> experts) {
  Lists unique(experts.begin(), experts.end());
  for (auto& list : unique) {
    std::vector<std::int32_t> kept;
    for (const std::int32_t e : list)
      if (std::find(kept.begin(), kept.end(), e) == kept.end()) kept.push_back(e);
    std::sort(kept.begin(), kept.end());
    list = std::move(kept);
  }
  std::vector<ExpertKind> kinds(at(problem.num_experts()), ExpertKind::kFFN);
  std::fill(kinds.begin() + problem.num_ffn(), kinds.end(), ExpertKind::kCopy);
  return placement_from_lists(problem.num_experts(), unique, kinds);
}

double count_hops(std::span<const std::vector<double>> transitions,
                  std::span<const std::vector<std::int32_t>> rank_of) {
  double out = 0;
  for (std::size_t l = 0; l < transitions.size(); ++l) {
    const std::size_t n = rank_of[l].size();
    for (std::size_t p = 0; p < n; ++p)
      for (std::size_t q = 0; q < n; ++q)
        if (rank_of[l][p] != rank_of[l + 1][q]) out += transitions[l][p * n + q];
  }
  return out;
}

std::vector<std::vector<std::int32_t>> exflow_assign(std::span<const std::vector<double>> transitions,
                                                     std::int32_t num_experts, const Topology& topology,
                                                     std::span<const std::int32_t> experts_per_rank) {
  const std::size_t layers = transitions.size() + 1, experts = at(num_experts);
  std::vector<std::int32_t> all(experts), node_sizes;
  std::iota(all.begin(), all.end(), 0);
  for (std::int32_t n = 0; n < topology.num_nodes(); ++n) {
    node_sizes.push_back(0);
    for (const std::int32_t r : topology.ranks_of(NodeId(n))) node_sizes.back() += experts_per_rank[at(r)];
  }
  Lists node(layers, std::vector<std::int32_t>(experts, -1)), rank = node;
  assign_best(transitions, experts, Lists(layers, all), node_sizes, node);
  for (std::int32_t n = 0; n < topology.num_nodes(); ++n) {
    Lists members(layers), local(layers, std::vector<std::int32_t>(experts, -1));
    for (std::size_t l = 0; l < layers; ++l)
      for (const std::int32_t e : all)
        if (node[l][at(e)] == n) members[l].push_back(e);
    std::vector<std::int32_t> sizes;
    for (const std::int32_t r : topology.ranks_of(NodeId(n))) sizes.push_back(experts_per_rank[at(r)]);
    assign_best(transitions, experts, members, sizes, local);
    for (std::size_t l = 0; l < layers; ++l)
      for (const std::int32_t e : members[l])
        rank[l][at(e)] = topology.ranks_of(NodeId(n))[at(local[l][at(e)])];
  }
  return rank;
}

LayerAffinity layer_affinity(const PlacementProblem& problem, const Workload& workload, std::size_t layer) {
  const std::size_t experts = at(problem.num_experts()), nodes = at(problem.topology.num_nodes());
  const auto share = 1 / static_cast<double>(problem.domains.size());
  LayerAffinity out;
  out.load.assign(experts, 0);
  bool known = true;
  for (const RoutingStatistics& s : problem.domains) {
    for (std::size_t e = 0; e < experts; ++e)
      out.load[e] += share * s.layers[layer].counts[e] / s.num_tokens();
    known = known && !s.layers[layer].coactivation.empty();
  }
  out.together.assign(experts * experts, 0);
  if (known) {
    for (const RoutingStatistics& s : problem.domains)
      for (std::size_t i = 0; i < out.together.size(); ++i)
        out.together[i] += share * s.layers[layer].coactivation[i] / s.num_tokens();
  } else {
    for (std::size_t e = 0; e < experts; ++e)
      for (std::size_t f = 0; f < experts; ++f)
        if (e != f) out.together[e * experts + f] = std::min(1.0, out.load[e]) * std::min(1.0, out.load[f]);
  }
  // By node as the workload's homes have it; all of it adds up to the load.
  std::vector<double> by_node(nodes * experts, 0), sum(experts, 0), tokens(nodes, 0);
  const WorkloadLayer& l = workload.layers[layer];
  for (std::size_t t = 0; t < workload.source.size(); ++t) {
    const std::size_t n = problem.topology.node_of(RankId(workload.source[t])).index();
    tokens[n] += 1 / static_cast<double>(workload.num_tokens());
    for (auto q = l.row_ptr[t]; q < l.row_ptr[t + 1]; ++q) {
      by_node[n * experts + at(l.expert[at(q)])] += 1;
      sum[at(l.expert[at(q)])] += 1;
    }
  }
  out.node_load.resize(nodes * experts);
  for (std::size_t n = 0; n < nodes; ++n)
    for (std::size_t e = 0; e < experts; ++e)
      out.node_load[n * experts + e] =
          out.load[e] * (sum[e] > 0 ? by_node[n * experts + e] / sum[e] : tokens[n]);
  return out;
}

}  // namespace sluice
