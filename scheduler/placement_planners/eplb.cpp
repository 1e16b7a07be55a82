#include <algorithm>
#include <numeric>

#include "sluice/base/error.hpp"
#include "sluice/scheduler/planners.hpp"

namespace sluice {
namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

}  // namespace

Packing balanced_packing(std::span<const float> weight, std::int32_t num_packs) {
  const auto n = static_cast<std::int32_t>(weight.size());
  Require(num_packs >= 1 && n % num_packs == 0, ErrorCode::kNotSupported, "EPLB packs ", n, " items to ",
          num_packs, " packs of equal numbers, which does not divide");
  const std::int32_t capacity = n / num_packs;
  Packing out;
  out.pack.resize(at(n));
  out.place.assign(at(n), 0);
  if (capacity == 1) {
    std::iota(out.pack.begin(), out.pack.end(), 0);
    return out;
  }
  std::vector<std::int32_t> order(at(n)), items(at(num_packs), 0);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return weight[at(a)] > weight[at(b)]; });
  std::vector<float> load(at(num_packs), 0.0f);
  for (const std::int32_t i : order) {
    std::int32_t best = -1;
    for (std::int32_t p = 0; p < num_packs; ++p)
      if (items[at(p)] < capacity && (best < 0 || load[at(p)] < load[at(best)])) best = p;
    out.pack[at(i)] = best;
    out.place[at(i)] = items[at(best)]++;
    load[at(best)] += weight[at(i)];
  }
  return out;
}

Replication replicate_experts(std::span<const float> weight, std::int32_t num_slots) {
  const std::size_t n = weight.size();
  Require(at(num_slots) >= n, ErrorCode::kNotSupported, "EPLB has ", num_slots, " slots for ", n,
          " experts; each needs one");
  Replication out;
  out.slot_expert.resize(at(num_slots));
  out.slot_copy.assign(at(num_slots), 0);
  out.copies.assign(n, 1);
  std::iota(out.slot_expert.begin(), out.slot_expert.begin() + static_cast<std::ptrdiff_t>(n), 0);
  for (std::size_t i = n; i < at(num_slots); ++i) {
    std::size_t best = 0;
    for (std::size_t e = 1; e < n; ++e)
      if (weight[e] / static_cast<float>(out.copies[e]) > weight[best] / static_cast<float>(out.copies[best]))
        best = e;
    out.slot_expert[i] = static_cast<std::int32_t>(best);
    out.slot_copy[i] = out.copies[best]++;
  }
  return out;
}

EplbPlan eplb_hierarchical(std::span<const float> weight, std::int32_t num_slots, std::int32_t num_groups,
                           std::int32_t num_nodes, std::int32_t num_ranks) {
  const auto num_experts = static_cast<std::int32_t>(weight.size());
  const auto divides = [](std::int32_t a, std::int32_t b) { return b >= 1 && a % b == 0; };
  Require(divides(num_experts, num_groups), ErrorCode::kNotSupported, "EPLB: ", num_experts,
          " experts do not divide by ", num_groups, " groups");
  Require(divides(num_groups, num_nodes), ErrorCode::kNotSupported, "EPLB: ", num_groups,
          " groups do not divide by ", num_nodes, " nodes; the global policy does not need that");
  Require(divides(num_ranks, num_nodes), ErrorCode::kNotSupported, "EPLB: ", num_ranks,
          " ranks do not divide by ", num_nodes, " nodes");
  Require(divides(num_slots, num_ranks), ErrorCode::kNotSupported, "EPLB: ", num_slots,
          " slots do not divide by ", num_ranks, " ranks; planner sluice takes any number a rank");
  const std::int32_t group_size = num_experts / num_groups, groups_per_node = num_groups / num_nodes;
  const std::int32_t experts_per_node = num_experts / num_nodes, slots_per_node = num_slots / num_nodes;
  const std::int32_t ranks_per_node = num_ranks / num_nodes, slots_per_rank = num_slots / num_ranks;

  // Groups to nodes; experts take the order of that ("mlog").
  std::vector<float> group_load(at(num_groups), 0.0f);
  for (std::int32_t e = 0; e < num_experts; ++e) group_load[at(e / group_size)] += weight[at(e)];
  const Packing groups = balanced_packing(group_load, num_nodes);
  std::vector<std::int32_t> expert_of(at(num_experts));
  for (std::int32_t e = 0; e < num_experts; ++e) {
    const std::int32_t g = e / group_size;
    expert_of[at((groups.pack[at(g)] * groups_per_node + groups.place[at(g)]) * group_size +
                 e % group_size)] = e;
  }
  EplbPlan out;
  out.slot_expert.resize(at(num_slots));
  out.copies.assign(at(num_experts), 0);
  for (std::int32_t node = 0; node < num_nodes; ++node) {
    std::vector<float> load;
    for (std::int32_t i = 0; i < experts_per_node; ++i)
      load.push_back(weight[at(expert_of[at(node * experts_per_node + i)])]);
    const Replication copies = replicate_experts(load, slots_per_node);
    std::vector<float> slot_load;
    for (const std::int32_t e : copies.slot_expert)
      slot_load.push_back(load[at(e)] / static_cast<float>(copies.copies[at(e)]));
    const Packing ranks = balanced_packing(slot_load, ranks_per_node);
    for (std::size_t i = 0; i < slot_load.size(); ++i) {
      const std::int32_t expert = expert_of[at(node * experts_per_node + copies.slot_expert[i])];
      out.slot_expert[at(node * slots_per_node + ranks.pack[i] * slots_per_rank + ranks.place[i])] = expert;
      ++out.copies[at(expert)];
    }
  }
  return out;
}

EplbPlan eplb(std::span<const float> weight, std::int32_t num_slots, std::int32_t num_groups,
              std::int32_t num_nodes, std::int32_t num_ranks) {
  return num_groups % num_nodes == 0 ? eplb_hierarchical(weight, num_slots, num_groups, num_nodes, num_ranks)
                                     : eplb_hierarchical(weight, num_slots, 1, 1, num_ranks);
}

}  // namespace sluice
