#include "sluice/scheduler/plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "expect_error.hpp"
#include "plain_plan.hpp"
#include "plan_harness.hpp"
#include "sluice/base/dtype.hpp"

namespace sluice {
namespace {

using testing::World;

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

World make_world(std::mt19937_64& rng, Topology topology, std::int32_t num_experts, std::int64_t max_tokens,
                 std::int32_t min_routes, std::int32_t max_routes, double skew, bool replicas,
                 std::int32_t zero = 0) {
  std::vector<ExpertKind> kinds(static_cast<std::size_t>(num_experts), ExpertKind::kFFN);
  for (std::int32_t i = 0; i < zero; ++i)
    kinds[static_cast<std::size_t>(num_experts - 1 - i)] = i % 2 ? ExpertKind::kZero : ExpertKind::kCopy;
  const std::int32_t num_ranks = topology.num_ranks();
  std::vector<std::vector<std::int32_t>> lists(static_cast<std::size_t>(num_ranks));
  for (std::int32_t e = 0; e < num_experts - zero; ++e) {
    // Any rank, in no order: placements need not be contiguous, ranks may stay empty.
    const auto first = static_cast<std::size_t>(rng() % static_cast<std::uint64_t>(num_ranks));
    lists[first].push_back(e);
    if (replicas)
      for (std::size_t r = 0; r < lists.size(); ++r)
        if (r != first && rng() % 4 == 0) lists[r].push_back(e);
  }
  World world{topology, placement_from_lists(num_experts, lists, kinds), {}};
  for (std::int32_t r = 0; r < num_ranks; ++r) {
    const auto tokens = static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(max_tokens + 1));
    world.routings.push_back(testing::random_routing(rng, tokens, num_experts, min_routes, max_routes, skew));
  }
  return world;
}

// ---- what the plan must mean, written down without any plan ----------------------------------------------------------

// A value that tells token and source; small integers so that sums are exact unless rounded to bf16 on purpose.
float row_value(std::int32_t source, std::int64_t token) {
  return static_cast<float>((source * 37 + token * 11) % 97 + 1) / 8.0f;
}
float expert_value(std::int32_t expert, float x) {
  return x * static_cast<float>(expert % 7 + 1) + 0.25f;
}

// The reduction tree of docs/design.md, from the routing alone: experts ascending within a rank, ranks within a node,
// nodes at home; rounded at both kinds of edge.
float tree_sum(const World& world, std::int32_t source, std::int64_t t, DType wire,
               const std::vector<std::int32_t>& slot_of) {
  const Routing& routing = world.routings[static_cast<std::size_t>(source)];
  float home = 0;
  bool home_first = true;
  for (std::int32_t n = 0; n < world.topology.num_nodes(); ++n) {
    float node = 0;
    bool node_first = true;
    for (const std::int32_t d : world.topology.ranks_of(NodeId(n))) {
      float rank = 0;
      bool rank_first = true;
      for (auto q = routing.row_ptr[t]; q < routing.row_ptr[t + 1]; ++q) {
        const std::int32_t slot = slot_of[routing.expert[q]];
        if (slot < 0 || world.placement.slot_rank[slot] != d) continue;
        const float term = routing.weight[q] * expert_value(routing.expert[q], row_value(source, t));
        rank = rank_first ? term : rank + term;
        rank_first = false;
      }
      if (rank_first) continue;
      rank = round_to(wire, rank);
      node = node_first ? rank : node + rank;
      node_first = false;
    }
    if (node_first) continue;
    node = round_to(wire, node);
    home = home_first ? node : home + node;
    home_first = false;
  }
  return home;
}

// Carries one float a row through the plans of all ranks, as an executor would, and returns y of every rank.
std::vector<std::vector<float>> run_plans(const World& world, const std::vector<Plan>& plans, DType wire) {
  const std::size_t n = plans.size();
  std::vector<std::vector<float>> recv1(n), recv2(n), send2(n), home(n), ret2(n), y(n);
  for (std::size_t r = 0; r < n; ++r) {
    recv1[r].assign(static_cast<std::size_t>(plans[r].recv1.num_rows()), kPoison);
    recv2[r].assign(static_cast<std::size_t>(plans[r].recv2.num_rows()), kPoison);
    ret2[r].assign(static_cast<std::size_t>(plans[r].send2.num_rows()), kPoison);
    home[r].assign(static_cast<std::size_t>(plans[r].num_home_rows()), kPoison);
  }
  for (std::size_t r = 0; r < n; ++r)
    for (const Segment& seg : plans[r].send1.segments)
      for (std::int32_t i = 0; i < seg.num_rows; ++i)
        recv1[static_cast<std::size_t>(seg.peer)].at(static_cast<std::size_t>(seg.peer_row_begin + i)) =
            row_value(static_cast<std::int32_t>(r), plans[r].send1.row[seg.row_begin + i]);
  for (std::size_t r = 0; r < n; ++r)
    for (const Segment& seg : plans[r].send2.segments)
      for (std::int32_t i = 0; i < seg.num_rows; ++i) {
        const std::int32_t stage = plans[r].send2.row[seg.row_begin + i];
        recv2[static_cast<std::size_t>(seg.peer)].at(static_cast<std::size_t>(seg.peer_row_begin + i)) =
            stage < plans[r].num_tokens ? row_value(static_cast<std::int32_t>(r), stage)
                                        : recv1[r].at(static_cast<std::size_t>(stage - plans[r].num_tokens));
      }
  for (std::size_t d = 0; d < n; ++d) {
    const Plan& plan = plans[d];
    std::vector<float> out(static_cast<std::size_t>(plan.num_positions()), kPoison);
    for (std::int32_t b = 0; b < plan.options.num_blocks(); ++b)
      for (std::int32_t l = 0; l < plan.num_local_slots; ++l) {
        const auto g = static_cast<std::size_t>(b * plan.num_local_slots + l);
        const std::int32_t expert = world.placement.experts_of(plan.rank)[l];
        for (auto p = plan.group_ptr[g]; p < plan.group_ptr[g + 1]; ++p)
          out[p] = expert_value(expert, recv2[d].at(static_cast<std::size_t>(plan.expert_row[p])));
      }
    for (const Segment& seg : plan.recv2.segments)
      for (std::int32_t i = 0; i < seg.num_rows; ++i) {
        const std::int32_t row = seg.row_begin + i;
        float sum = 0;
        for (auto q = plan.recv2.route_ptr[row]; q < plan.recv2.route_ptr[row + 1]; ++q) {
          const std::int32_t p = plan.position_of_route[q];
          const float term = plan.expert_weight[p] * out[p];
          sum = q == plan.recv2.route_ptr[row] ? term : sum + term;
        }
        ret2[static_cast<std::size_t>(seg.peer)].at(static_cast<std::size_t>(seg.peer_row_begin + i)) =
            round_to(wire, sum);
      }
  }
  for (std::size_t g = 0; g < n; ++g) {
    const Plan& plan = plans[g];
    const auto partial = [&](std::int64_t p) {
      float sum = 0;
      for (auto i = plan.partial_ptr[p]; i < plan.partial_ptr[p + 1]; ++i) {
        const float term = ret2[g].at(static_cast<std::size_t>(plan.partial_position[i]));
        sum = i == plan.partial_ptr[p] ? term : sum + term;
      }
      return round_to(wire, sum);
    };
    for (std::int32_t p = 0; p < plan.num_own_partials; ++p) home[g][p] = partial(p);
    for (const Segment& seg : plan.recv1.segments)
      for (std::int32_t i = 0; i < seg.num_rows; ++i) {
        auto& target = home[static_cast<std::size_t>(seg.peer)];
        target.at(static_cast<std::size_t>(plans[static_cast<std::size_t>(seg.peer)].num_own_partials +
                                           seg.peer_row_begin + i)) =
            partial(plan.num_own_partials + seg.row_begin + i);
      }
  }
  for (std::size_t r = 0; r < n; ++r)
    for (std::int32_t t = 0; t < plans[r].num_tokens; ++t) {
      float sum = 0;
      for (auto i = plans[r].home_ptr[t]; i < plans[r].home_ptr[t + 1]; ++i) {
        const float term = home[r].at(static_cast<std::size_t>(plans[r].home_position[i]));
        sum = i == plans[r].home_ptr[t] ? term : sum + term;
      }
      y[r].push_back(sum);
    }
  return y;
}

std::vector<std::vector<std::int32_t>> slots_of_all(const World& world) {
  const auto n = static_cast<std::size_t>(world.topology.num_ranks());
  const auto e = static_cast<std::size_t>(world.placement.num_experts);
  std::vector<std::int64_t> demand;
  for (const Routing& routing : world.routings) {
    const auto counts = expert_counts(routing);
    demand.insert(demand.end(), counts.begin(), counts.end());
  }
  std::vector<std::vector<std::int32_t>> out(n, std::vector<std::int32_t>(e));
  for (std::size_t r = 0; r < n; ++r)
    choose_replicas(world.placement, world.topology, demand, RankId(static_cast<std::int32_t>(r)), out[r]);
  return out;
}

// The same lists and messages come out of a builder written the plain way, fed with what the real ones receive.
void check_against_plain(const World& world, PlanOptions options) {
  auto builders = testing::make_builders(world, options);
  std::vector<testing::PlainPlanner> plain;
  std::vector<Plan> plans, plain_plans(builders.size());
  for (std::int32_t r = 0; r < world.topology.num_ranks(); ++r)
    plain.emplace_back(RankId(r), world.topology, world.placement, options);
  const auto same_messages = [](const PlanBuilder::Headers& sent,
                                const testing::PlainPlanner::Messages& want) {
    ASSERT_EQ(sent.messages.size(), want.size());
    for (std::size_t i = 0; i < want.size(); ++i) {
      const auto& m = sent.messages[i];
      EXPECT_EQ(m.peer.value, want[i].first);
      EXPECT_TRUE(std::ranges::equal(sent.words.subspan(m.word_begin, m.num_words), want[i].second))
          << "words for rank " << m.peer.value;
    }
  };
  testing::build_plans(builders, world, plans, [&](int step, std::size_t r, const auto& received) {
    if constexpr (std::is_same_v<std::decay_t<decltype(received)>, std::vector<std::int64_t>>) {
      switch (step) {
        case 0:
          plain[r].begin(world.routings[r], plain_plans[r]);
          for (std::size_t i = 0; i < plain[r].summary().size(); ++i)
            if (i != 1) {
              EXPECT_EQ(builders[r].summary()[i], plain[r].summary()[i]) << "summary " << i;
            }
          plain[r].take_summaries(received);
          break;
        case 1:
          for (std::size_t i = 0; i < plain[r].counts().size(); ++i)
            if (i % 6 != 2 && i % 6 != 5) {
              EXPECT_EQ(builders[r].counts()[i], plain[r].counts()[i]) << "counts " << i;
            }
          plain[r].take_counts(received);
          break;
        default:
          EXPECT_TRUE(std::ranges::equal(builders[r].offsets(), plain[r].offsets()));
          plain[r].take_offsets(received);
      }
    } else if (step == 3) {
      same_messages(builders[r].headers1(), plain[r].headers1());
      plain[r].take_headers1(received);
    } else {
      same_messages(builders[r].headers2(), plain[r].headers2());
      plain[r].take_headers2(received);
    }
  });
  for (std::size_t r = 0; r < plans.size(); ++r)
    EXPECT_EQ(testing::first_difference(plans[r], plain_plans[r]), "") << "rank " << r;
}

void check_world(const World& world, PlanOptions options) {
  check_against_plain(world, options);
  const std::vector<Plan> plans = testing::build_plans(world, options);
  const auto slot_of = slots_of_all(world);
  for (const Plan& plan : plans) {
    plan.validate();
    EXPECT_EQ(plan.agreement_hash, plans[0].agreement_hash);
  }
  for (const DType wire : {DType::kF32, DType::kBF16}) {
    const auto y = run_plans(world, plans, wire);
    for (std::int32_t r = 0; r < world.topology.num_ranks(); ++r)
      for (std::int64_t t = 0; t < world.routings[r].num_tokens(); ++t) {
        const float want = tree_sum(world, r, t, wire, slot_of[r]);
        ASSERT_EQ(std::bit_cast<std::uint32_t>(y[r][t]), std::bit_cast<std::uint32_t>(want))
            << "rank " << r << " token " << t << " got " << y[r][t] << " want " << want;
      }
  }
  // De-duplication: rows are distinct (token, destination) pairs, counted here with sets.
  for (std::int32_t r = 0; r < world.topology.num_ranks(); ++r) {
    std::set<std::pair<std::int64_t, std::int32_t>> nodes, in_node;
    std::int64_t same = 0, flat_in = 0, flat_across = 0;
    const Routing& routing = world.routings[r];
    for (std::int64_t t = 0; t < routing.num_tokens(); ++t) {
      bool here = false;
      for (auto q = routing.row_ptr[t]; q < routing.row_ptr[t + 1]; ++q) {
        const std::int32_t slot = slot_of[r][routing.expert[q]];
        if (slot < 0) continue;
        const RankId d(world.placement.slot_rank[slot]);
        if (d == RankId(r)) {
          here = true;
        } else if (world.topology.same_node(RankId(r), d)) {
          in_node.insert({t, d.value});
          ++flat_in;
        } else {
          nodes.insert(
              {t, options.exchange == Exchange::kGateway ? world.topology.node_of(d).value : d.value});
          ++flat_across;
        }
      }
      same += here;
    }
    EXPECT_EQ(plans[r].traffic.rows_same_rank, same);
    EXPECT_EQ(plans[r].traffic.rows_across_nodes, static_cast<std::int64_t>(nodes.size()));
    EXPECT_GE(plans[r].traffic.rows_in_node,
              static_cast<std::int64_t>(in_node.size()));  // gateways add theirs
    EXPECT_EQ(plans[r].traffic.flat_rows_in_node, flat_in);
    EXPECT_EQ(plans[r].traffic.flat_rows_across_nodes, flat_across);
  }
}

TEST(Plan, RandomWorldsEvaluateTheOneReductionTree) {
  std::uint64_t seed = 20250101;
  RecordProperty("seed", std::to_string(seed));
  std::mt19937_64 rng(seed);
  const std::vector<std::vector<std::vector<std::int32_t>>> topologies = {{{0}},
                                                                          {{0, 1}},
                                                                          {{0}, {1}},
                                                                          {{0, 1}, {2, 3}},
                                                                          {{0, 2}, {1, 3}},
                                                                          {{0, 1, 2}, {3}},
                                                                          {{3}, {0, 1, 2}},
                                                                          {{0, 1}, {2, 3, 4}, {5}},
                                                                          {{0, 1, 2, 3}, {4, 5, 6, 7}},
                                                                          {{0, 5}, {1, 4}, {2, 3}}};
  for (int round = 0; round < 120; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const auto& nodes = topologies[rng() % topologies.size()];
    const auto num_experts = static_cast<std::int32_t>(1 + rng() % 20);
    const bool dense = rng() % 5 == 0;
    const auto max_routes =
        dense ? num_experts : std::min<std::int32_t>(num_experts, static_cast<std::int32_t>(rng() % 6));
    const auto zero = num_experts > 4 && rng() % 3 == 0 ? 2 : 0;
    World world = make_world(rng, Topology(nodes), num_experts, rng() % 4 ? 40 : 2, dense ? num_experts : 0,
                             max_routes, double(rng() % 3), rng() % 2 == 0, zero);
    PlanOptions options{rng() % 2 ? Exchange::kGateway : Exchange::kDirect,
                        static_cast<std::int32_t>(1 + rng() % 5), static_cast<SourceSplit>(rng() % 3)};
    check_world(world, options);
    if (HasFatalFailure()) return;
  }
}

TEST(Plan, EdgeShapes) {
  std::mt19937_64 rng(7);
  const Topology topology({{0, 1}, {2, 3}});
  for (const Exchange exchange : {Exchange::kGateway, Exchange::kDirect})
    for (const std::int32_t chunks : {1, 3, 64}) {
      // One expert takes all; ranks 1..3 hold nothing.
      const std::vector<std::vector<std::int32_t>> lists = {{0}, {}, {}, {}};
      World one{topology, placement_from_lists(1, lists), {}};
      for (int r = 0; r < 4; ++r)
        one.routings.push_back(testing::random_routing(rng, r == 2 ? 0 : 9, 1, 1, 1));
      check_world(one, {exchange, chunks});
      // No tokens anywhere.
      World none{topology, contiguous_placement(8, 4), {}};
      for (int r = 0; r < 4; ++r) none.routings.push_back(testing::random_routing(rng, 0, 8, 0, 0));
      check_world(none, {exchange, chunks});
      // Tokens without routes.
      World idle{topology, contiguous_placement(8, 4), {}};
      for (int r = 0; r < 4; ++r) idle.routings.push_back(testing::random_routing(rng, 5, 8, 0, 0));
      check_world(idle, {exchange, chunks});
    }
}

// Chunks change neither who sends what nor the receive lists, only the positions.
TEST(Plan, ChunksLeaveListsAlone) {
  std::mt19937_64 rng(11);
  World world = make_world(rng, Topology({{0, 1}, {2, 3}}), 12, 60, 0, 5, 1.0, true);
  const auto whole = testing::build_plans(world, {Exchange::kGateway, 1});
  const auto cut = testing::build_plans(world, {Exchange::kGateway, 7});
  for (std::size_t r = 0; r < 4; ++r) {
    EXPECT_TRUE(std::ranges::equal(whole[r].recv2.token, cut[r].recv2.token));
    EXPECT_TRUE(std::ranges::equal(whole[r].send2.row, cut[r].send2.row));
    EXPECT_TRUE(std::ranges::equal(whole[r].slot_ptr, cut[r].slot_ptr));
    // Weight gradients visit rows in the same order.
    EXPECT_TRUE(std::ranges::equal(whole[r].expert_row, cut[r].wgrad_row));
  }
}

TEST(Plan, RebuildingDoesNotAllocate) {
  std::mt19937_64 rng(5);
  World world = make_world(rng, Topology({{0, 1}, {2, 3}}), 16, 200, 1, 6, 1.0, false);
  auto builders = testing::make_builders(world, {});
  std::vector<Plan> plans;
  testing::build_plans(builders, world, plans);
  std::vector<std::int64_t> before;
  for (const Plan& plan : plans) before.push_back(plan.capacity_bytes());
  for (int i = 0; i < 3; ++i) testing::build_plans(builders, world, plans);
  for (std::size_t r = 0; r < plans.size(); ++r) EXPECT_EQ(plans[r].capacity_bytes(), before[r]);
}

// Any word that a peer sends may be wrong. Whatever is changed, the builder refuses with a rank named, or the change
// was harmless and the plan still holds its invariants; it never crashes (run under sanitizers as well).
TEST(Plan, TamperedMessagesAreRefusedOrHarmless) {
  std::mt19937_64 rng(99);
  int refused = 0, harmless = 0;
  for (int round = 0; round < 400; ++round) {
    World world = make_world(rng, Topology({{0, 1}, {2, 3}}), 8, 12, 0, 4, 0.5, false);
    auto builders = testing::make_builders(world, {Exchange::kGateway, 1 + round % 3});
    std::vector<Plan> plans;
    const int step = static_cast<int>(rng() % 5);
    const auto victim = static_cast<std::size_t>(rng() % 4);
    const std::uint64_t draw = rng();
    const auto tamper = [&](int at, std::size_t rank, auto& values) {
      if (at != step || rank != victim || values.empty()) return;
      auto& v = values[draw % values.size()];
      using V = std::remove_reference_t<decltype(v)>;
      switch ((draw >> 32) % 5) {
        case 0:
          v = static_cast<V>(-1);
          break;
        case 1:
          v = static_cast<V>(v + 1);
          break;
        case 2:
          v = static_cast<V>(1) << 30;
          break;
        case 3:
          v = std::numeric_limits<V>::max();
          break;
        default:
          v = static_cast<V>(v ^ (V(1) << ((draw >> 40) % 20)));
      }
    };
    try {
      testing::build_plans(builders, world, plans, tamper);
      ++harmless;
      for (const Plan& plan : plans) plan.validate();
    } catch (const Error& e) {
      EXPECT_TRUE(e.code() == ErrorCode::kDisagreement || e.code() == ErrorCode::kInvalidRouting ||
                  e.code() == ErrorCode::kInvalidArgument)
          << e.what();
      ++refused;
    } catch (const std::runtime_error&) {
      ++refused;  // the harness itself saw that sizes differ between the two sides
    }
  }
  EXPECT_GT(refused, 150);
  EXPECT_GT(harmless, 0);  // weights carry no redundancy
}

TEST(Plan, DisagreementNamesTheRanks) {
  std::mt19937_64 rng(3);
  World world = make_world(rng, Topology({{0}, {1}, {2}}), 6, 10, 1, 2, 0, false);
  auto builders = testing::make_builders(world, {});
  const Placement other = contiguous_placement(6, 3, {}, std::vector<std::int32_t>{4, 1, 1});
  builders[2] = PlanBuilder(RankId(2), world.topology, other, {});
  std::vector<Plan> plans;
  expect_error(ErrorCode::kDisagreement, {"rank(s) 2 disagree with rank(s) 0, 1"},
               [&] { testing::build_plans(builders, world, plans); });
}

TEST(Plan, RefusesWhatDoesNotFit) {
  const Topology topology = Topology::uniform(2, 1);
  const Placement placement = contiguous_placement(4, 2);
  expect_error(ErrorCode::kInvalidArgument, {"num_chunks", "0"}, [&] {
    PlanBuilder(RankId(0), topology, placement, {Exchange::kGateway, 0});
  });
  expect_error(ErrorCode::kInvalidArgument, {"rank 2"},
               [&] { PlanBuilder(RankId(2), topology, placement, {}); });
  const Placement three = contiguous_placement(4, 3);
  expect_error(ErrorCode::kInvalidArgument, {"3", "2"}, [&] { PlanBuilder(RankId(0), topology, three, {}); });
  PlanBuilder builder(RankId(0), topology, placement, {});
  Plan plan;
  Routing routing;
  routing.num_experts = 5;
  expect_error(ErrorCode::kInvalidRouting, {"5", "4"}, [&] { builder.begin(routing, plan); });
}

}  // namespace
}  // namespace sluice
