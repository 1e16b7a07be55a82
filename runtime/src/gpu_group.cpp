#include "sluice/runtime/src/gpu_group.hpp"

namespace sluice {

std::optional<GpuLink> gpu_link_of(std::string_view transport) {
  if (transport == "nvlink") return GpuLink::kNvlink;
  if (transport == "nccl") return GpuLink::kNccl;
  return std::nullopt;
}

std::string_view to_string(GpuLink link) {
  return link == GpuLink::kNvlink ? "nvlink" : "nccl";
}

namespace {

// "", or why two hops cannot have these nodes: ranks are numbered node by node, and each has a peer on every node.
std::string why_not_two_hops(const Topology& topology) {
  const std::size_t each = topology.ranks_of(NodeId(0)).size();
  for (std::int32_t n = 0; n < topology.num_nodes(); ++n) {
    const std::vector<std::int32_t>& ranks = topology.ranks_of(NodeId(n));
    if (ranks.size() != each) return str("node 0 has ", each, " ranks and node ", n, " has ", ranks.size());
    const std::int32_t first = n * static_cast<std::int32_t>(each);
    for (std::size_t i = 0; i < each; ++i)
      if (const std::int32_t want = first + static_cast<std::int32_t>(i); ranks[i] != want)
        return str("node ", n, " has rank ", ranks[i], " where rank ", want, " would be");
  }
  return {};
}

}  // namespace

GpuWay gpu_way(const ScheduleOptions& schedule, bool chunks_by_model, GpuLink link,
               const Topology& topology) {
  if (schedule.policy != SchedulePolicy::kHierarchical || topology.num_nodes() == 1)
    return {.overlapped = schedule.policy == SchedulePolicy::kBySource ||
                          schedule.policy == SchedulePolicy::kHierarchical};
  Require(link == GpuLink::kNccl, ErrorCode::kNotSupported,
          "the schedule hierarchical has two hops, of which ", to_string(link),
          " has none between nodes; use nccl");
  const std::string why_not = why_not_two_hops(topology);
  Require(
      why_not.empty(), ErrorCode::kNotSupported,
      "over nccl the schedule hierarchical needs nodes of equally many ranks, numbered node by node, but ",
      why_not, " (", topology.describe(), "); use by-source or auto");
  return {.two_hops = true, .chunks = chunks_by_model ? 0 : schedule.num_chunks};
}

bool auto_is_two_hops(GpuLink link, const Topology& topology) {
  return link == GpuLink::kNccl && topology.num_nodes() > 1 && topology.ranks_of(NodeId(0)).size() > 1 &&
         why_not_two_hops(topology).empty();
}

GpuPlacement gpu_placement(const Placement& placement) {
  GpuPlacement out;
  out.number_of.assign(static_cast<std::size_t>(placement.num_experts), -1);
  Require(placement.sharded.empty(), ErrorCode::kNotSupported,
          "rows that stay on GPUs need whole experts; expert ",
          placement.sharded.empty() ? 0 : placement.sharded.front().expert, " is sharded");
  for (std::int32_t e = 0; e < placement.num_experts; ++e) {
    if (placement.everywhere(ExpertId(e))) continue;
    const auto slots = placement.slots_of(ExpertId(e));
    Require(slots.size() == 1, ErrorCode::kNotSupported, "expert ", e, " has ", slots.size(),
            " copies; with rows that stay on GPUs (comm.transport nvlink and nccl) each expert lives on one "
            "rank: place it once, or choose another transport");
    out.number_of[static_cast<std::size_t>(e)] = static_cast<std::int32_t>(out.rank_of.size());
    out.rank_of.push_back(placement.slot_rank[static_cast<std::size_t>(slots.front())]);
  }
  for (std::int32_t r = 0; r < placement.num_ranks; ++r) {
    const auto experts = placement.experts_of(RankId(r));
    for (std::size_t i = 1; i < experts.size(); ++i)
      Require(experts[i - 1] < experts[i], ErrorCode::kNotSupported, "rank ", r, " holds expert ",
              experts[i - 1], " before expert ", experts[i],
              "; with rows that stay on GPUs (comm.transport nvlink and nccl) the experts of a rank must be "
              "listed in ascending order");
  }
  return out;
}

void GpuRouting::assign(const RoutingView& routing, const GpuPlacement& placement) {
  row_ptr.assign(1, 0);
  expert.clear();
  weight.clear();
  route.clear();
  for (std::size_t t = 0; t + 1 < routing.row_ptr.size(); ++t) {
    for (auto i = static_cast<std::size_t>(routing.row_ptr[t]);
         i < static_cast<std::size_t>(routing.row_ptr[t + 1]); ++i) {
      const std::int32_t number = placement.number_of[static_cast<std::size_t>(routing.expert[i])];
      if (number < 0) continue;
      expert.push_back(number);
      weight.push_back(routing.weight[i]);
      route.push_back(static_cast<std::int32_t>(i));
    }
    row_ptr.push_back(static_cast<std::int64_t>(expert.size()));
  }
}

}  // namespace sluice
