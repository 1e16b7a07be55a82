// Placement: which physical copies (slots) of which experts live on which ranks.
//
// Any number of slots a rank (also none) and of copies an expert; num_experts need not divide by num_ranks.
// Three ways for an expert to be somewhere:
//   slots       an ffn expert has at least one slot; at most one on any rank
//   everywhere  zero, copy and constant experts have no weights to move: every rank computes them for its
//               own tokens, they have no slots and never cross a link
//   sharded     each rank of a group holds a slice of the expert's ffn dimension; part of the data model,
//               but plans refuse it (require_plannable)
//
// A Placement is plain data, built once by make_placement() and the same on all ranks (its hash is part of
// the agreement check). Slot ids are canonical: ascending by rank, then by local index, so the slots of a
// rank are contiguous. Thread-safety: plain data, read concurrently. Errors: kInvalidArgument naming expert,
// rank and slot.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/ids.hpp"
#include "sluice/base/topology.hpp"

namespace sluice {

enum class ExpertKind : std::uint8_t {
  kFFN,       // weights, lives in slots (or shards)
  kZero,      // E(x) = 0                  } MoE++ (arXiv 2410.07348) eqs 3-5
  kCopy,      // E(x) = x                  }
  kConstant,  // E(x) = a1(x) x + a2(x) v  }
};
std::string_view to_string(ExpertKind kind) noexcept;
// Whether every rank computes the expert for its own tokens.
constexpr bool is_everywhere(ExpertKind kind) {
  return kind != ExpertKind::kFFN;
}

struct Slot {
  std::int32_t expert = -1;
  std::int32_t rank = -1;
  std::int32_t local_index = -1;  // position on its rank, 0..slots of the rank - 1
  friend bool operator==(const Slot&, const Slot&) = default;
};

struct ShardedExpert {
  std::int32_t expert = -1;
  std::vector<std::int32_t> ranks;  // at least two, ascending; ranks[i] holds slice i of the ffn dimension
  friend bool operator==(const ShardedExpert&, const ShardedExpert&) = default;
};

struct Placement {
  std::int32_t num_experts = 0;
  std::int32_t num_ranks = 0;
  std::uint64_t version = 0;     // grows with every change of placement in a run
  std::vector<ExpertKind> kind;  // [num_experts]

  // Slots, ascending by (rank, local_index).
  std::vector<std::int32_t> slot_expert;       // int32 [num_slots]
  std::vector<std::int32_t> slot_rank;         // int32 [num_slots]
  std::vector<std::int32_t> slot_local_index;  // int32 [num_slots]
  // Slots of rank r are the ids rank_slot_ptr[r] .. rank_slot_ptr[r+1]-1.
  std::vector<std::int32_t> rank_slot_ptr;  // int32 [num_ranks + 1]
  // Slots of expert e are expert_slots[expert_slot_ptr[e] .. expert_slot_ptr[e+1]-1], ascending (ranks too).
  std::vector<std::int32_t> expert_slot_ptr;  // int32 [num_experts + 1]
  std::vector<std::int32_t> expert_slots;     // int32 [num_slots]
  std::vector<std::int32_t> replicated;       // int32 [*], experts with more than one slot, ascending
  std::vector<ShardedExpert> sharded;         // ascending by expert

  std::int32_t num_slots() const { return static_cast<std::int32_t>(slot_expert.size()); }
  std::int32_t num_slots_of(RankId rank) const {
    return rank_slot_ptr[rank.index() + 1] - rank_slot_ptr[rank.index()];
  }
  // The slot at a rank's local index.
  SlotId slot_at(RankId rank, std::int32_t local_index) const {
    return SlotId(rank_slot_ptr[rank.index()] + local_index);
  }
  // int32 [slots of the rank], the experts in local order
  std::span<const std::int32_t> experts_of(RankId rank) const {
    return {slot_expert.data() + rank_slot_ptr[rank.index()], static_cast<std::size_t>(num_slots_of(rank))};
  }
  // int32 [slots of the expert], slot ids ascending
  std::span<const std::int32_t> slots_of(ExpertId expert) const {
    const std::int32_t begin = expert_slot_ptr[expert.index()];
    return {expert_slots.data() + begin,
            static_cast<std::size_t>(expert_slot_ptr[expert.index() + 1] - begin)};
  }
  // The expert's slot on the rank, invalid if it has none there.
  SlotId slot_on(ExpertId expert, RankId rank) const {
    for (const std::int32_t s : slots_of(expert))
      if (slot_rank[static_cast<std::size_t>(s)] == rank.value) return SlotId(s);
    return {};
  }
  bool everywhere(ExpertId expert) const { return is_everywhere(kind[expert.index()]); }

  // The same placement, the version included, gives the same hash; anything else another.
  std::uint64_t hash() const;
  // A head line and a line a rank: "rank 2 (3 slots): 4-5, 9".
  std::string describe() const;
  friend bool operator==(const Placement&, const Placement&) = default;
};

// Builds a placement from its slots (in any order). kinds: [num_experts], or empty for all ffn.
// Throws kInvalidArgument: rank or expert out of range; two slots of one expert on one rank; two slots with
// one local index, or a gap; an ffn expert without a slot that is not sharded; a slot of an everywhere or
// sharded expert; a sharded group of fewer than two ranks, not ascending, or of an everywhere expert.
Placement make_placement(std::int32_t num_experts, std::int32_t num_ranks, std::span<const Slot> slots,
                         std::span<const ExpertKind> kinds = {}, std::span<const ShardedExpert> sharded = {},
                         std::uint64_t version = 0);

// The same from lists: experts_of_rank[r] are the experts of rank r in local order.
Placement placement_from_lists(std::int32_t num_experts,
                               std::span<const std::vector<std::int32_t>> experts_of_rank,
                               std::span<const ExpertKind> kinds = {}, std::uint64_t version = 0);

// Each ffn expert once, ascending over the ranks. slots_per_rank: int32 [num_ranks], summing to the number of
// ffn experts; or empty: num_ffn / num_ranks each, the first num_ffn % num_ranks ranks one more.
Placement contiguous_placement(std::int32_t num_experts, std::int32_t num_ranks,
                               std::span<const ExpertKind> kinds = {},
                               std::span<const std::int32_t> slots_per_rank = {});

// Throws as make_placement() does; also when the derived arrays do not belong to the slots (a hand-made
// placement).
void validate(const Placement& placement);

// Throws kNotSupported naming the first sharded expert: plans cannot carry it.
void require_plannable(const Placement& placement);

// Which copy of each expert a source rank sends to: the one on the source itself, else one in its node, else any.
// Where several qualify, the rank with the least load, ties to the lower rank. Load is counted in routes: first
// everything that leaves no choice, then the open choices one by one, experts ascending and within one sources
// ascending, each adding its demand to the rank it takes. A source's routes to one expert all take one copy.
// It is a pure function of the arguments, so any rank computes for any source what the source does.
//   demand   int64 [num_ranks, num_experts], routes from rank to expert; may be empty while nothing is replicated
//   slot_of  int32 [num_experts], overwritten, -1 for everywhere experts
// Cost: num_experts when nothing is replicated; else one pass over demand and a choice for each (replicated expert,
// rank). Throws kInvalidArgument on sizes or a negative demand of a replicated expert, kNotSupported on sharded experts.
void choose_replicas(const Placement& placement, const Topology& topology,
                     std::span<const std::int64_t> demand, RankId source, std::span<std::int32_t> slot_of);

// The same for all sources at once, at the cost of one. slot_of: int32 [num_ranks, num_experts]
void choose_all_replicas(const Placement& placement, const Topology& topology,
                         std::span<const std::int64_t> demand, std::span<std::int32_t> slot_of);

}  // namespace sluice
