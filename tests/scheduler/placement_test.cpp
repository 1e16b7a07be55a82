#include "sluice/scheduler/placement.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>

#include "expect_error.hpp"

namespace sluice {
namespace {

using Lists = std::vector<std::vector<std::int32_t>>;
using Ints = std::vector<std::int32_t>;
constexpr ErrorCode kBad = ErrorCode::kInvalidArgument;

TEST(MakePlacement, BuildsLookUps) {
  // Slots in no order; rank 1 has none; expert 0 twice; expert 3 everywhere; expert 4 sharded.
  const std::vector<Slot> slots = {{0, 2, 1}, {1, 0, 1}, {0, 0, 0}, {2, 2, 0}};
  const std::vector<ExpertKind> kinds = {ExpertKind::kFFN, ExpertKind::kFFN, ExpertKind::kFFN,
                                         ExpertKind::kCopy, ExpertKind::kFFN};
  const std::vector<ShardedExpert> sharded = {{4, {0, 2}}};
  const Placement p = make_placement(5, 3, slots, kinds, sharded, 9);
  validate(p);
  EXPECT_EQ(p.slot_expert, (Ints{0, 1, 2, 0}));
  EXPECT_EQ(p.slot_rank, (Ints{0, 0, 2, 2}));
  EXPECT_EQ(p.slot_local_index, (Ints{0, 1, 0, 1}));
  EXPECT_EQ(p.rank_slot_ptr, (Ints{0, 2, 2, 4}));
  EXPECT_EQ(p.expert_slot_ptr, (Ints{0, 2, 3, 4, 4, 4}));
  EXPECT_EQ(p.expert_slots, (Ints{0, 3, 1, 2}));
  EXPECT_EQ(p.replicated, (Ints{0}));
  EXPECT_EQ(p.num_slots_of(RankId(1)), 0);
  EXPECT_TRUE(p.experts_of(RankId(1)).empty());
  EXPECT_EQ(p.slot_at(RankId(2), 1), SlotId(3));
  EXPECT_EQ(p.slot_on(ExpertId(0), RankId(2)), SlotId(3));
  EXPECT_FALSE(p.slot_on(ExpertId(1), RankId(2)).valid());
  EXPECT_TRUE(p.everywhere(ExpertId(3)));
  EXPECT_EQ(p.describe(),
            "5 experts, 4 slots on 3 ranks, version 9\nrank 0 (2 slots): 0-1\nrank 1 (0 slots): none\n"
            "rank 2 (2 slots): 2, 0\neverywhere, copy: 3\nsharded expert 4 over ranks 0, 2\n");
  expect_error(ErrorCode::kNotSupported, {"expert 4", "sharded"}, [&] { require_plannable(p); });
}

TEST(MakePlacement, NamesTheFault) {
  const auto fault = [](std::initializer_list<std::string_view> words, std::vector<Slot> slots,
                        std::vector<ExpertKind> kinds = {}, std::vector<ShardedExpert> sharded = {}) {
    expect_error(kBad, words, [&] { make_placement(2, 2, slots, kinds, sharded); });
  };
  fault({"expert 1", "no slot on any rank"}, {{0, 0, 0}});
  fault({"expert 0", "two slots on rank 1", "0 and 2"}, {{0, 1, 0}, {1, 1, 1}, {0, 1, 2}});
  fault({"slot 1", "rank 2", "0..1"}, {{0, 0, 0}, {1, 2, 0}});
  fault({"slot 1", "rank -1"}, {{0, 0, 0}, {1, -1, 0}});
  fault({"slot 0", "expert 2", "0..1"}, {{2, 0, 0}});
  fault({"slot 1", "expert 1", "local index -1"}, {{0, 0, 0}, {1, 0, -1}});
  fault({"rank 0", "two slots with local index 0"}, {{0, 0, 0}, {1, 0, 0}});
  fault({"rank 0", "no slot with local index 1", "one with 2"}, {{0, 0, 0}, {1, 0, 2}});
  fault({"expert 1", "zero", "no slot"}, {{0, 0, 0}, {1, 0, 1}}, {ExpertKind::kFFN, ExpertKind::kZero});
  fault({"1 expert kinds", "2 experts"}, {{0, 0, 0}, {1, 0, 1}}, {ExpertKind::kFFN});
  fault({"expert 1", "sharded", "no slot"}, {{0, 0, 0}, {1, 0, 1}}, {}, {{1, {0, 1}}});
  fault({"sharded expert 1", "1 ranks", "at least 2"}, {{0, 0, 0}}, {}, {{1, {0}}});
  fault({"sharded expert 1", "not ascending", "rank 0"}, {{0, 0, 0}}, {}, {{1, {1, 0}}});
  fault({"sharded expert 1", "rank 2"}, {{0, 0, 0}}, {}, {{1, {0, 2}}});
  fault({"sharded expert 5", "0..1"}, {{0, 0, 0}}, {}, {{5, {0, 1}}});
  fault({"expert 1", "sharded twice"}, {{0, 0, 0}}, {}, {{1, {0, 1}}, {1, {0, 1}}});
  fault({"expert 1", "copy", "nothing to shard"}, {{0, 0, 0}}, {ExpertKind::kFFN, ExpertKind::kCopy},
        {{1, {0, 1}}});
  expect_error(kBad, {"num_experts is 0"}, [] { make_placement(0, 1, {}); });
  expect_error(kBad, {"num_ranks is 0"}, [] { make_placement(1, 0, {}); });
}

TEST(Validate, RefusesHandMadeLookUps) {
  Placement p = contiguous_placement(4, 2);
  validate(p);
  std::swap(p.expert_slots[0], p.expert_slots[1]);
  expect_error(kBad, {"make_placement"}, [&] { validate(p); });
  p = contiguous_placement(4, 2);
  p.slot_rank.pop_back();
  expect_error(kBad, {"same number"}, [&] { validate(p); });
}

TEST(ContiguousPlacement, SpreadsRemainderOverTheFirstRanks) {
  const Placement p = contiguous_placement(7, 3);
  EXPECT_EQ(p, placement_from_lists(7, Lists{{0, 1, 2}, {3, 4}, {5, 6}}));
  EXPECT_EQ(contiguous_placement(2, 4), placement_from_lists(2, Lists{{0}, {1}, {}, {}}));
  EXPECT_EQ(contiguous_placement(3, 3, {}, Ints{0, 3, 0}), placement_from_lists(3, Lists{{}, {0, 1, 2}, {}}));
  const std::vector<ExpertKind> kinds = {ExpertKind::kZero, ExpertKind::kFFN, ExpertKind::kConstant,
                                         ExpertKind::kFFN};
  EXPECT_EQ(contiguous_placement(4, 2, kinds), placement_from_lists(4, Lists{{1}, {3}}, kinds));
  const std::vector<ExpertKind> all_zero(3, ExpertKind::kZero);
  EXPECT_EQ(contiguous_placement(3, 2, all_zero).num_slots(), 0);
}

TEST(ContiguousPlacement, NamesTheFault) {
  expect_error(kBad, {"sums to 5", "7 ffn experts"}, [] { contiguous_placement(7, 2, {}, Ints{3, 2}); });
  expect_error(kBad, {"rank 1 is -1"}, [] { contiguous_placement(2, 2, {}, Ints{3, -1}); });
  expect_error(kBad, {"3 entries", "2 ranks"}, [] { contiguous_placement(2, 2, {}, Ints{1, 1, 0}); });
  expect_error(kBad, {"num_ranks is 0"}, [] { contiguous_placement(2, 0); });
}

TEST(Hash, TellsPlacementsApart) {
  const Placement p = contiguous_placement(4, 2);
  EXPECT_EQ(p.hash(), contiguous_placement(4, 2).hash());
  std::vector<std::uint64_t> hashes = {p.hash()};
  hashes.push_back(placement_from_lists(4, Lists{{1, 0}, {2, 3}}).hash());
  hashes.push_back(placement_from_lists(4, Lists{{0, 1, 2}, {3}}).hash());
  hashes.push_back(placement_from_lists(4, Lists{{0, 1, 2}, {2, 3}}).hash());
  hashes.push_back(placement_from_lists(4, Lists{{0, 1}, {2, 3}, {}}).hash());
  hashes.push_back(placement_from_lists(4, Lists{{0, 1}, {2, 3}}, {}, 1).hash());
  hashes.push_back(
      placement_from_lists(5, Lists{{0, 1}, {2, 3}},
                           std::vector<ExpertKind>{ExpertKind::kFFN, ExpertKind::kFFN, ExpertKind::kFFN,
                                                   ExpertKind::kFFN, ExpertKind::kZero})
          .hash());
  std::sort(hashes.begin(), hashes.end());
  EXPECT_EQ(std::unique(hashes.begin(), hashes.end()), hashes.end());
}

// Slots as the rank they are on, which is easier to read.
Ints ranks_chosen(const Placement& p, const Topology& topology, const std::vector<std::int64_t>& demand,
                  std::int32_t source) {
  Ints slot_of(static_cast<std::size_t>(p.num_experts), -7);
  choose_replicas(p, topology, demand, RankId(source), slot_of);
  for (std::size_t e = 0; e < slot_of.size(); ++e) {
    if (slot_of[e] < 0) continue;
    EXPECT_EQ(p.slot_expert[static_cast<std::size_t>(slot_of[e])], static_cast<std::int32_t>(e));
    slot_of[e] = p.slot_rank[static_cast<std::size_t>(slot_of[e])];
  }
  return slot_of;
}

TEST(ChooseReplicas, SameRankThenSameNodeThenLeastLoaded) {
  const Topology topology = Topology::uniform(6, 3);  // {0,1} {2,3} {4,5}
  // Expert 0 on ranks 0 and 2; expert 1 on rank 3 only; expert 2 everywhere.
  const std::vector<ExpertKind> kinds = {ExpertKind::kFFN, ExpertKind::kFFN, ExpertKind::kZero};
  const Placement p = placement_from_lists(3, Lists{{0}, {}, {0}, {1}, {}, {}}, kinds);
  std::vector<std::int64_t> demand(18, 0);
  demand[0 * 3] = 10;  // rank 0 takes its own copy
  demand[4 * 3] = 4;   // goes to rank 2 (load 0 against 10)
  demand[5 * 3] = 1;   // still rank 2 (4 against 10)
  EXPECT_EQ(ranks_chosen(p, topology, demand, 0), (Ints{0, 3, -1}));
  EXPECT_EQ(ranks_chosen(p, topology, demand, 1), (Ints{0, 3, -1}));  // node {0,1}
  EXPECT_EQ(ranks_chosen(p, topology, demand, 2), (Ints{2, 3, -1}));
  EXPECT_EQ(ranks_chosen(p, topology, demand, 3), (Ints{2, 3, -1}));  // node {2,3}
  EXPECT_EQ(ranks_chosen(p, topology, demand, 4), (Ints{2, 3, -1}));
  EXPECT_EQ(ranks_chosen(p, topology, demand, 5), (Ints{2, 3, -1}));
  demand[4 * 3] = 11;
  EXPECT_EQ(ranks_chosen(p, topology, demand, 5), (Ints{0, 3, -1}));  // 11 against 10
  demand[4 * 3] = 10;
  EXPECT_EQ(ranks_chosen(p, topology, demand, 5), (Ints{0, 3, -1}));  // a tie: the lower rank
}

TEST(ChooseReplicas, LoadOfOtherExpertsCounts) {
  const Topology topology = Topology::uniform(3, 3);
  const Placement p = placement_from_lists(2, Lists{{0, 1}, {0}, {}});
  EXPECT_EQ(ranks_chosen(p, topology, {0, 0, 0, 0, 5, 0}, 2), (Ints{0, 0}));
  EXPECT_EQ(ranks_chosen(p, topology, {0, 1, 0, 0, 5, 0}, 2), (Ints{1, 0}));  // rank 0 is busy with expert 1
}

TEST(ChooseReplicas, SeveralCopiesInTheNode) {
  const Topology topology({{0, 2, 4}, {1, 3}});
  const Placement p = placement_from_lists(2, Lists{{0}, {0}, {0, 1}, {}, {}});
  // Rank 4 shares its node with ranks 0 and 2; rank 2 has expert 1's load; rank 1 is idle but in the other
  // node.
  std::vector<std::int64_t> demand(10, 0);
  demand[3 * 2 + 1] = 3;
  demand[4 * 2] = 1;
  EXPECT_EQ(ranks_chosen(p, topology, demand, 4), (Ints{0, 2}));
  EXPECT_EQ(ranks_chosen(p, topology, demand, 3), (Ints{1, 2}));
  demand[0] = 9;  // rank 0 now has more
  EXPECT_EQ(ranks_chosen(p, topology, demand, 4), (Ints{2, 2}));
}

TEST(ChooseReplicas, PrefersNear) {
  const unsigned seed = 5;
  std::mt19937 gen(seed);
  for (int round = 0; round < 100; ++round) {
    const std::int32_t num_ranks = 1 + static_cast<std::int32_t>(gen() % 8);
    const std::int32_t num_experts = 1 + static_cast<std::int32_t>(gen() % 10);
    std::vector<Ints> nodes;
    for (std::int32_t r = 0; r < num_ranks; ++r) {
      if (nodes.empty() || gen() % 2 == 0) nodes.emplace_back();
      nodes[gen() % nodes.size()].push_back(r);
    }
    nodes.erase(std::remove_if(nodes.begin(), nodes.end(), [](const Ints& n) { return n.empty(); }),
                nodes.end());
    const Topology topology(nodes);
    Lists lists(static_cast<std::size_t>(num_ranks));
    for (std::int32_t e = 0; e < num_experts; ++e) {
      Ints ranks(static_cast<std::size_t>(num_ranks));
      std::iota(ranks.begin(), ranks.end(), 0);
      std::shuffle(ranks.begin(), ranks.end(), gen);
      ranks.resize(1 + gen() % ranks.size());
      for (const std::int32_t r : ranks) lists[static_cast<std::size_t>(r)].push_back(e);
    }
    const Placement p = placement_from_lists(num_experts, lists);
    validate(p);
    const auto entries = static_cast<std::size_t>(num_ranks * num_experts);
    std::vector<std::int64_t> demand(entries);
    for (auto& d : demand) d = static_cast<std::int64_t>(gen() % 50);
    for (std::int32_t r = 0; r < num_ranks; ++r) {
      Ints one(static_cast<std::size_t>(num_experts), -7);
      choose_replicas(p, topology, demand, RankId(r), one);
      for (std::int32_t e = 0; e < num_experts; ++e) {
        const std::int32_t chosen = p.slot_rank[static_cast<std::size_t>(one[static_cast<std::size_t>(e)])];
        if (p.slot_on(ExpertId(e), RankId(r)).valid()) {
          EXPECT_EQ(chosen, r);
          continue;
        }
        for (const std::int32_t s : p.slots_of(ExpertId(e))) {
          const RankId other(p.slot_rank[static_cast<std::size_t>(s)]);
          if (topology.same_node(other, RankId(r))) {
            EXPECT_TRUE(topology.same_node(RankId(chosen), RankId(r))) << "seed " << seed;
          }
        }
      }
    }
  }
}

TEST(ChooseReplicas, NamesTheFault) {
  const Placement p = placement_from_lists(1, Lists{{0}, {0}});
  const Topology topology = Topology::uniform(2, 1);
  Ints slot_of(1);
  const std::vector<std::int64_t> demand = {1, -2};
  expect_error(kBad, {"rank 1", "expert 0", "-2"},
               [&] { choose_replicas(p, topology, demand, RankId(0), slot_of); });
  expect_error(kBad, {"demand has 1"},
               [&] { choose_replicas(p, topology, std::span(demand).first(1), RankId(0), slot_of); });
  expect_error(kBad, {"slot_of has 0"}, [&] { choose_replicas(p, topology, demand, RankId(0), {}); });
  expect_error(kBad, {"source rank 2"}, [&] { choose_replicas(p, topology, demand, RankId(2), slot_of); });
  expect_error(kBad, {"3 ranks", "2"},
               [&] { choose_replicas(p, Topology::uniform(3, 1), demand, RankId(0), slot_of); });
  const std::vector<ShardedExpert> sharded = {{0, {0, 1}}};
  expect_error(ErrorCode::kNotSupported, {"expert 0"}, [&] {
    choose_replicas(make_placement(1, 2, {}, {}, sharded), topology, demand, RankId(0), slot_of);
  });
}

}  // namespace
}  // namespace sluice
