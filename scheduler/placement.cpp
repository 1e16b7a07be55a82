#include "sluice/scheduler/placement.hpp"

#include <algorithm>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"

namespace sluice {
namespace {

std::size_t at(std::int32_t i) {
  return static_cast<std::size_t>(i);
}

constexpr ErrorCode kBad = ErrorCode::kInvalidArgument;

// "4-6, 9": ascending runs are folded.
std::string list_of(std::span<const std::int32_t> values) {
  if (values.empty()) return "none";
  std::string out;
  for (std::size_t i = 0; i < values.size();) {
    std::size_t j = i;
    while (j + 1 < values.size() && values[j + 1] == values[j] + 1) ++j;
    if (!out.empty()) out += ", ";
    out += j == i ? str(values[i]) : str(values[i], "-", values[j]);
    i = j + 1;
  }
  return out;
}

// Makes all choices of all ranks in the documented order, and hands each to `choose(rank, expert, slot)`.
template <typename Choose>
void decide(const Placement& placement, const Topology& topology, std::span<const std::int64_t> demand,
            Choose&& choose) {
  const std::int32_t num_experts = placement.num_experts;
  const std::int32_t num_ranks = placement.num_ranks;
  const auto demand_of = [&](std::int32_t source, std::int32_t expert) {
    return demand[at(source) * at(num_experts) + at(expert)];
  };
  std::vector<std::int64_t> load(at(num_ranks), 0);  // routes

  // The slots among which the source may choose: narrowed to its rank, else its node. Slots of an expert
  // ascend by rank but a node's ranks need not be consecutive, so candidates are tested one by one.
  enum class Level { kRank, kNode, kAny };
  const auto level_of = [&](std::int32_t source, std::int32_t expert, std::int32_t& only) {
    std::int32_t in_node = 0;
    for (const std::int32_t s : placement.slots_of(ExpertId(expert))) {
      const std::int32_t rank = placement.slot_rank[at(s)];
      if (rank == source) {
        only = s;
        return Level::kRank;
      }
      if (topology.same_node(RankId(rank), RankId(source))) {
        only = s;
        ++in_node;
      }
    }
    if (in_node != 1) only = -1;
    return in_node > 0 ? Level::kNode : Level::kAny;
  };

  std::vector<std::int64_t> total(at(num_experts), 0);
  for (std::int32_t r = 0; r < num_ranks; ++r)
    for (std::int32_t e = 0; e < num_experts; ++e) total[at(e)] += demand_of(r, e);
  for (std::int32_t e = 0; e < num_experts; ++e) {
    const auto slots = placement.slots_of(ExpertId(e));
    if (slots.size() == 1) load[at(placement.slot_rank[at(slots[0])])] += total[at(e)];
  }
  for (const std::int32_t e : placement.replicated)
    for (std::int32_t source = 0; source < num_ranks; ++source) {
      Require(demand_of(source, e) >= 0, kBad, "demand of rank ", source, " for expert ", e, " is ",
              demand_of(source, e), "; it must not be negative");
      std::int32_t only = -1;
      level_of(source, e, only);
      if (only < 0) continue;
      load[at(placement.slot_rank[at(only)])] += demand_of(source, e);
      choose(source, e, only);
    }
  for (const std::int32_t e : placement.replicated)
    for (std::int32_t source = 0; source < num_ranks; ++source) {
      std::int32_t only = -1;
      const Level level = level_of(source, e, only);
      if (only >= 0) continue;
      std::int32_t best = -1;
      for (const std::int32_t s : placement.slots_of(ExpertId(e))) {
        const std::int32_t rank = placement.slot_rank[at(s)];
        if (level == Level::kNode && !topology.same_node(RankId(rank), RankId(source))) continue;
        if (best < 0 || load[at(rank)] < load[at(placement.slot_rank[at(best)])]) best = s;
      }
      load[at(placement.slot_rank[at(best)])] += demand_of(source, e);
      choose(source, e, best);
    }
}

}  // namespace

std::string_view to_string(ExpertKind kind) noexcept {
  switch (kind) {
    case ExpertKind::kFFN:
      return "ffn";
    case ExpertKind::kZero:
      return "zero";
    case ExpertKind::kCopy:
      return "copy";
    case ExpertKind::kConstant:
      return "constant";
  }
  return "unknown expert kind";
}

Placement make_placement(std::int32_t num_experts, std::int32_t num_ranks, std::span<const Slot> slots,
                         std::span<const ExpertKind> kinds, std::span<const ShardedExpert> sharded,
                         std::uint64_t version) {
  Require(num_experts >= 1, kBad, "num_experts is ", num_experts, "; it must be at least 1");
  Require(num_ranks >= 1, kBad, "num_ranks is ", num_ranks, "; it must be at least 1");
  Require(kinds.empty() || kinds.size() == at(num_experts), kBad, "there are ", kinds.size(),
          " expert kinds for ", num_experts, " experts; give one each, or none for all ffn");
  Require(slots.size() <= static_cast<std::size_t>(INT32_MAX), kBad, "there are ", slots.size(),
          " slots; at most ", INT32_MAX, " are possible");

  Placement out;
  out.num_experts = num_experts;
  out.num_ranks = num_ranks;
  out.version = version;
  out.kind.assign(kinds.begin(), kinds.end());
  out.kind.resize(at(num_experts), ExpertKind::kFFN);

  std::vector<bool> is_sharded(at(num_experts), false);
  for (const ShardedExpert& group : sharded) {
    Require(group.expert >= 0 && group.expert < num_experts, kBad, "sharded expert ", group.expert,
            " is outside 0..", num_experts - 1);
    Require(!is_sharded[at(group.expert)], kBad, "expert ", group.expert,
            " is sharded twice; name one group of ranks");
    const ExpertKind kind = out.kind[at(group.expert)];
    Require(kind == ExpertKind::kFFN, kBad, "expert ", group.expert, " is of kind ", to_string(kind),
            " and has nothing to shard; only ffn experts can be sharded");
    Require(group.ranks.size() >= 2, kBad, "sharded expert ", group.expert, " names ", group.ranks.size(),
            " ranks; a group has at least 2 (use a slot for one)");
    for (std::size_t i = 0; i < group.ranks.size(); ++i) {
      Require(group.ranks[i] >= 0 && group.ranks[i] < num_ranks, kBad, "sharded expert ", group.expert,
              " names rank ", group.ranks[i], ", outside 0..", num_ranks - 1);
      Require(i == 0 || group.ranks[i - 1] < group.ranks[i], kBad, "ranks of sharded expert ", group.expert,
              " are not ascending at rank ", group.ranks[i]);
    }
    is_sharded[at(group.expert)] = true;
  }
  out.sharded.assign(sharded.begin(), sharded.end());
  std::sort(out.sharded.begin(), out.sharded.end(),
            [](const ShardedExpert& a, const ShardedExpert& b) { return a.expert < b.expert; });

  for (std::size_t i = 0; i < slots.size(); ++i) {
    const Slot& slot = slots[i];
    Require(slot.expert >= 0 && slot.expert < num_experts, kBad, "slot ", i, " holds expert ", slot.expert,
            ", outside 0..", num_experts - 1);
    Require(slot.rank >= 0 && slot.rank < num_ranks, kBad, "slot ", i, " of expert ", slot.expert,
            " is on rank ", slot.rank, ", outside 0..", num_ranks - 1);
    Require(slot.local_index >= 0, kBad, "slot ", i, " of expert ", slot.expert, " on rank ", slot.rank,
            " has local index ", slot.local_index, "; it must not be negative");
    const ExpertKind kind = out.kind[at(slot.expert)];
    Require(!is_everywhere(kind), kBad, "slot ", i, " on rank ", slot.rank, " holds expert ", slot.expert,
            " of kind ", to_string(kind), ", which every rank computes itself; it must have no slot");
    Require(!is_sharded[at(slot.expert)], kBad, "slot ", i, " on rank ", slot.rank, " holds expert ",
            slot.expert, ", which is sharded; it must have no slot");
  }
  std::vector<Slot> sorted(slots.begin(), slots.end());
  std::sort(sorted.begin(), sorted.end(), [](const Slot& a, const Slot& b) {
    return a.rank != b.rank ? a.rank < b.rank : a.local_index < b.local_index;
  });
  out.rank_slot_ptr.assign(at(num_ranks) + 1, 0);
  out.expert_slot_ptr.assign(at(num_experts) + 1, 0);
  for (const Slot& slot : sorted) {
    std::int32_t& on_rank = out.rank_slot_ptr[at(slot.rank) + 1];
    Require(slot.local_index >= on_rank, kBad, "rank ", slot.rank, " has two slots with local index ",
            slot.local_index, " (the second holds expert ", slot.expert,
            "); local indices count 0, 1, 2, ...");
    Require(slot.local_index == on_rank, kBad, "rank ", slot.rank, " has no slot with local index ", on_rank,
            " but one with ", slot.local_index, " (expert ", slot.expert,
            "); local indices count 0, 1, 2, ...");
    ++on_rank;
    ++out.expert_slot_ptr[at(slot.expert) + 1];
    out.slot_expert.push_back(slot.expert);
    out.slot_rank.push_back(slot.rank);
    out.slot_local_index.push_back(slot.local_index);
  }
  for (std::int32_t r = 0; r < num_ranks; ++r) out.rank_slot_ptr[at(r) + 1] += out.rank_slot_ptr[at(r)];
  for (std::int32_t e = 0; e < num_experts; ++e) {
    const std::int32_t copies = out.expert_slot_ptr[at(e) + 1];
    Require(copies > 0 || is_everywhere(out.kind[at(e)]) || is_sharded[at(e)], kBad, "expert ", e,
            " has no slot on any rank; an ffn expert needs at least one");
    if (copies > 1) out.replicated.push_back(e);
    out.expert_slot_ptr[at(e) + 1] += out.expert_slot_ptr[at(e)];
  }
  out.expert_slots.resize(sorted.size());
  std::vector<std::int32_t> next(out.expert_slot_ptr.begin(), out.expert_slot_ptr.end() - 1);
  for (std::int32_t s = 0; s < out.num_slots(); ++s) {
    const std::int32_t e = out.slot_expert[at(s)];
    if (next[at(e)] > out.expert_slot_ptr[at(e)]) {
      const std::int32_t before = out.expert_slots[at(next[at(e)] - 1)];
      Require(out.slot_rank[at(before)] != out.slot_rank[at(s)], kBad, "expert ", e,
              " has two slots on rank ", out.slot_rank[at(s)], " (local indices ",
              out.slot_local_index[at(before)], " and ", out.slot_local_index[at(s)],
              "); a second copy on one rank does nothing");
    }
    out.expert_slots[at(next[at(e)]++)] = s;
  }
  return out;
}

Placement placement_from_lists(std::int32_t num_experts,
                               std::span<const std::vector<std::int32_t>> experts_of_rank,
                               std::span<const ExpertKind> kinds, std::uint64_t version) {
  std::vector<Slot> slots;
  for (std::size_t r = 0; r < experts_of_rank.size(); ++r)
    for (std::size_t i = 0; i < experts_of_rank[r].size(); ++i)
      slots.push_back({experts_of_rank[r][i], static_cast<std::int32_t>(r), static_cast<std::int32_t>(i)});
  return make_placement(num_experts, static_cast<std::int32_t>(experts_of_rank.size()), slots, kinds, {},
                        version);
}

Placement contiguous_placement(std::int32_t num_experts, std::int32_t num_ranks,
                               std::span<const ExpertKind> kinds,
                               std::span<const std::int32_t> slots_per_rank) {
  Require(num_experts >= 1, kBad, "num_experts is ", num_experts, "; it must be at least 1");
  Require(num_ranks >= 1, kBad, "num_ranks is ", num_ranks, "; it must be at least 1");
  Require(kinds.empty() || kinds.size() == at(num_experts), kBad, "there are ", kinds.size(),
          " expert kinds for ", num_experts, " experts; give one each, or none for all ffn");
  std::vector<std::int32_t> ffn;
  for (std::int32_t e = 0; e < num_experts; ++e)
    if (kinds.empty() || kinds[at(e)] == ExpertKind::kFFN) ffn.push_back(e);
  const auto num_ffn = static_cast<std::int32_t>(ffn.size());
  std::vector<std::int32_t> counts(slots_per_rank.begin(), slots_per_rank.end());
  if (counts.empty()) {
    for (std::int32_t r = 0; r < num_ranks; ++r)
      counts.push_back(num_ffn / num_ranks + (r < num_ffn % num_ranks ? 1 : 0));
  }
  Require(counts.size() == at(num_ranks), kBad, "slots_per_rank has ", counts.size(), " entries for ",
          num_ranks, " ranks");
  std::int64_t sum = 0;
  for (std::int32_t r = 0; r < num_ranks; ++r) {
    Require(counts[at(r)] >= 0, kBad, "slots_per_rank of rank ", r, " is ", counts[at(r)],
            "; it must not be negative");
    sum += counts[at(r)];
  }
  Require(sum == num_ffn, kBad, "slots_per_rank sums to ", sum, "; it must sum to the ", num_ffn,
          " ffn experts");
  std::vector<Slot> slots;
  std::size_t next = 0;
  for (std::int32_t r = 0; r < num_ranks; ++r)
    for (std::int32_t i = 0; i < counts[at(r)]; ++i) slots.push_back({ffn[next++], r, i});
  return make_placement(num_experts, num_ranks, slots, kinds);
}

void validate(const Placement& placement) {
  const std::size_t num_slots = placement.slot_expert.size();
  Require(placement.slot_rank.size() == num_slots && placement.slot_local_index.size() == num_slots, kBad,
          "slot_expert, slot_rank and slot_local_index have ", num_slots, ", ", placement.slot_rank.size(),
          " and ", placement.slot_local_index.size(), " entries; they must have the same number");
  std::vector<Slot> slots;
  for (std::size_t s = 0; s < num_slots; ++s)
    slots.push_back({placement.slot_expert[s], placement.slot_rank[s], placement.slot_local_index[s]});
  const Placement rebuilt = make_placement(placement.num_experts, placement.num_ranks, slots, placement.kind,
                                           placement.sharded, placement.version);
  Require(rebuilt == placement, kBad,
          "the placement's look-up arrays do not belong to its slots; build it with make_placement()");
}

void require_plannable(const Placement& placement) {
  Require(placement.sharded.empty(), ErrorCode::kNotSupported, "expert ",
          placement.sharded.empty() ? -1 : placement.sharded.front().expert,
          " is sharded over ranks; plans carry whole experts only, give it slots instead");
}

std::uint64_t Placement::hash() const {
  Hasher h;
  h.add_int(num_experts).add_int(num_ranks).add(version);
  for (const ExpertKind k : kind) h.add_int(static_cast<std::int64_t>(k));
  h.add_ints(slot_expert).add_ints(slot_rank);  // local indices follow from the order
  h.add(sharded.size());
  for (const ShardedExpert& group : sharded) h.add_int(group.expert).add_ints(group.ranks);
  return h.value();
}

std::string Placement::describe() const {
  std::string out = str(num_experts, num_experts == 1 ? " expert, " : " experts, ", num_slots(),
                        num_slots() == 1 ? " slot on " : " slots on ", num_ranks,
                        num_ranks == 1 ? " rank, version " : " ranks, version ", version, "\n");
  for (std::int32_t r = 0; r < num_ranks; ++r) {
    const std::int32_t n = num_slots_of(RankId(r));
    out += str("rank ", r, " (", n, n == 1 ? " slot): " : " slots): ", list_of(experts_of(RankId(r))), "\n");
  }
  for (const ExpertKind k : {ExpertKind::kZero, ExpertKind::kCopy, ExpertKind::kConstant}) {
    std::vector<std::int32_t> experts;
    for (std::int32_t e = 0; e < num_experts; ++e)
      if (kind[at(e)] == k) experts.push_back(e);
    if (!experts.empty()) out += str("everywhere, ", to_string(k), ": ", list_of(experts), "\n");
  }
  for (const ShardedExpert& group : sharded)
    out += str("sharded expert ", group.expert, " over ranks ", list_of(group.ranks), "\n");
  return out;
}

namespace {

void check_choice(const Placement& placement, const Topology& topology,
                  std::span<const std::int64_t> demand) {
  require_plannable(placement);
  Require(topology.num_ranks() == placement.num_ranks, kBad, "the topology has ", topology.num_ranks(),
          " ranks, the placement ", placement.num_ranks);
  const bool needless = demand.empty() && placement.replicated.empty();
  Require(needless || demand.size() == at(placement.num_ranks) * at(placement.num_experts), kBad,
          "demand has ", demand.size(), " entries, must be num_ranks ", placement.num_ranks,
          " times num_experts ", placement.num_experts);
}

// Right wherever there is no choice.
void take_first_slots(const Placement& placement, std::span<std::int32_t> slot_of) {
  for (std::int32_t e = 0; e < placement.num_experts; ++e) {
    const auto slots = placement.slots_of(ExpertId(e));
    slot_of[at(e)] = slots.empty() ? -1 : slots[0];
  }
}

}  // namespace

void choose_replicas(const Placement& placement, const Topology& topology,
                     std::span<const std::int64_t> demand, RankId source, std::span<std::int32_t> slot_of) {
  check_choice(placement, topology, demand);
  Require(slot_of.size() == at(placement.num_experts), kBad, "slot_of has ", slot_of.size(),
          " entries, must be ", placement.num_experts);
  Require(source.value >= 0 && source.value < placement.num_ranks, kBad, "source rank ", source.value,
          " is outside 0..", placement.num_ranks - 1);
  take_first_slots(placement, slot_of);
  if (placement.replicated.empty()) return;
  decide(placement, topology, demand, [&](std::int32_t rank, std::int32_t expert, std::int32_t slot) {
    if (rank == source.value) slot_of[at(expert)] = slot;
  });
}

void choose_all_replicas(const Placement& placement, const Topology& topology,
                         std::span<const std::int64_t> demand, std::span<std::int32_t> slot_of) {
  check_choice(placement, topology, demand);
  const std::size_t num_experts = at(placement.num_experts);
  Require(slot_of.size() == at(placement.num_ranks) * num_experts, kBad, "slot_of has ", slot_of.size(),
          " entries, must be ", at(placement.num_ranks) * num_experts);
  for (std::int32_t r = 0; r < placement.num_ranks; ++r)
    take_first_slots(placement, slot_of.subspan(at(r) * num_experts, num_experts));
  if (placement.replicated.empty()) return;
  decide(placement, topology, demand, [&](std::int32_t rank, std::int32_t expert, std::int32_t slot) {
    slot_of[at(rank) * num_experts + at(expert)] = slot;
  });
}

}  // namespace sluice
