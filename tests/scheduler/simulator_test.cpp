#include "sluice/scheduler/simulator.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>

#include "expect_error.hpp"
#include "plan_harness.hpp"
#include "profile_harness.hpp"
#include "sluice/scheduler/choose_schedule.hpp"

namespace sluice {
namespace {

using testing::build_plans;
using testing::random_routing;
using testing::tiny_layer;
using testing::tiny_profile;
using testing::World;

std::vector<std::int32_t> slots_of(const Placement& p) {
  std::vector<std::int32_t> out;
  for (std::int32_t r = 0; r < p.num_ranks; ++r) out.push_back(p.num_slots_of(RankId(r)));
  return out;
}
PlanSummary exact_summary(const World& world, const std::vector<Plan>& plans) {
  PlanSummary out(world.topology, plans[0].options.exchange, plans[0].options.num_chunks,
                  slots_of(world.placement));
  for (const Plan& p : plans) out.add(p);
  return out;
}
std::vector<std::int64_t> gathered_of(const World& world) {
  std::vector<std::int64_t> out;
  for (const Routing& r : world.routings) {
    out.push_back(r.num_tokens());
    out.push_back(0);
    for (const std::int64_t n : expert_counts(r)) out.push_back(n);
  }
  return out;
}
// `tokens` tokens that all visit one expert.
Routing all_to(std::int32_t expert, std::int64_t tokens, std::int32_t num_experts) {
  Routing r;
  r.num_experts = num_experts;
  for (std::int64_t t = 0; t < tokens; ++t) {
    r.expert.push_back(expert);
    r.weight.push_back(1);
    r.row_ptr.push_back(t + 1);
  }
  return r;
}
World world_of(Topology topology, std::int32_t num_experts, std::vector<Routing> routings) {
  const std::int32_t ranks = topology.num_ranks();
  return {std::move(topology), contiguous_placement(num_experts, ranks), std::move(routings)};
}
Simulation run(const World& world, const ScheduleOptions& schedule, const MachineProfile& profile,
               PassKind pass = PassKind::kForward) {
  const auto plans = build_plans(world, schedule.plan_options());
  return simulate(build_group_template(world.topology, schedule), exact_summary(world, plans), profile,
                  tiny_layer(), {pass, true});
}

// ---- by hand ---------------------------------------------------------------------------------------------------------

TEST(Simulator, OneMessageThereAndBack) {
  const World world = world_of(Topology({{0}, {1}}), 2, {all_to(1, 4, 2), all_to(1, 0, 2)});
  const Simulation s = run(world, {SchedulePolicy::kSequential, Exchange::kGateway, 1}, tiny_profile());
  // Rank 0 packs until 1 and may put when rank 1's ready signal is there at 5. 10 on the link and 5 of latency: 20.
  // Rank 1 hands on 1, GEMM 1 8, GEMM 2 4, reduce 2, the node's sum 2: 37. Back at 52, unpacked at 54.
  EXPECT_DOUBLE_EQ(s.step_us, 54);
  EXPECT_DOUBLE_EQ(s.compute_floor_us, 17);
  EXPECT_DOUBLE_EQ(s.link_floor_us[1], 10);
  EXPECT_DOUBLE_EQ(s.link_floor_us[0], 0);
  EXPECT_DOUBLE_EQ(s.exposed_comm_us, 37);
  EXPECT_EQ(s.bound(), "compute");
  EXPECT_DOUBLE_EQ(s.ranks[0].compute_us, 3);
  EXPECT_DOUBLE_EQ(s.ranks[0].out_us[1], 10);
  EXPECT_DOUBLE_EQ(s.ranks[1].in_us[1], 10);
}

TEST(Simulator, TwoChunksOverlap) {
  const World world = world_of(Topology({{0}, {1}}), 2, {all_to(1, 4, 2), all_to(1, 0, 2)});
  const ScheduleOptions schedule{SchedulePolicy::kPipelined, Exchange::kGateway, 2};
  const Simulation s = run(world, schedule, tiny_profile());
  // Chunks arrive at 15 and 20. Rank 1: handed on 15.5, GEMMs 19.5 and 21.5, then chunk 1 is handed on (22) before
  // chunk 0's sums (23, 24) go home (34). Chunk 1: 28, 30, sums 31, 32, home 42, unpacked 43.
  EXPECT_DOUBLE_EQ(s.step_us, 43);
  std::string order;
  const Template t = build_template(RankId(1), world.topology, schedule);
  for (const OpSpan& span : s.spans[1]) {
    const Op& op = t.forward.ops[span.op];
    if (span.end_us > span.begin_us) order += str(to_string(op.kind), op.chunk, "@", span.end_us, " ");
  }
  EXPECT_EQ(order,
            "forward0@15.5 expert_gemm10@19.5 expert_gemm20@21.5 forward1@22 reduce0@23 node_reduce0@24 "
            "return0@29 expert_gemm11@28 expert_gemm21@30 reduce1@31 node_reduce1@32 return1@37 ");
}

TEST(Simulator, OneReceiverAtATime) {
  // Ranks 0 and 1 send 4 rows each to rank 2: the second message waits for the first, 5..15 and 15..25.
  const World world = world_of(Topology({{0, 1, 2}}), 3, {all_to(2, 4, 3), all_to(2, 4, 3), all_to(2, 0, 3)});
  for (const LinkModel model : {LinkModel::kQueue, LinkModel::kCalendar}) {
    MachineProfile p = tiny_profile();
    p.link_model = model;
    const Simulation s = run(world, {SchedulePolicy::kSequential, Exchange::kGateway, 1}, p);
    // Seen at 30; 8 rows: 16 + 8, reduce 4: 58. Back one after the other over rank 2's outward side: 68 and 78, seen
    // at 83; sums 2 and unpacking 2.
    EXPECT_DOUBLE_EQ(s.step_us, 87) << to_string(model);
    EXPECT_DOUBLE_EQ(s.ranks[2].in_us[0], 20);
    EXPECT_DOUBLE_EQ(s.link_floor_us[0], 20);
    EXPECT_EQ(s.bound(), "compute");
  }
}

TEST(Simulator, WhoPostsPays) {
  const World world = world_of(Topology({{0}, {1}}), 2, {all_to(1, 4, 2), all_to(1, 0, 2)});
  MachineProfile p = tiny_profile();
  p.across_nodes.send = Curve({{0, 0}, {160, 3}});
  p.across_nodes.receive = Curve({{0, 0}, {160, 2}});
  p.op_us = 0;
  const ScheduleOptions schedule{SchedulePolicy::kSequential, Exchange::kGateway, 1};
  p.posting = Posting::kCaller;
  // The put may start at 5 and is on the link from 8; the return likewise: 6 more than in OneMessageThereAndBack.
  const Simulation caller = run(world, schedule, p);
  EXPECT_DOUBLE_EQ(caller.step_us, 60);
  EXPECT_DOUBLE_EQ(caller.ranks[0].send_us, 3);
  EXPECT_DOUBLE_EQ(caller.ranks[0].receive_us, 2);
  p.posting = Posting::kOwnCore;
  EXPECT_DOUBLE_EQ(run(world, schedule, p).step_us, 60);  // nothing else to do: it hides nothing
  p.op_us = 1;                                            // every op costs; zero-row ops too
  p.posting = Posting::kCaller;
  EXPECT_GT(run(world, schedule, p).step_us, 60);
}

// Nothing is in two places at once: no resource is busier than the pass is long, and its ops do not overlap.
TEST(Simulator, ResourcesDoOneThingAtATime) {
  std::mt19937_64 rng(5);
  const Topology topology = Topology::uniform(6, 3);
  World world{topology, contiguous_placement(12, 6), {}};
  for (std::int32_t r = 0; r < 6; ++r) world.routings.push_back(random_routing(rng, 40, 12, 0, 4, 1.0));
  MachineProfile p = tiny_profile();
  p.op_us = 1;
  p.in_node.send = p.across_nodes.send = Curve({{0, 2}, {100, 3}});
  p.in_node.receive = Curve({{0, 0}, {100, 3}});
  for (const Posting posting : {Posting::kCaller, Posting::kThread, Posting::kOwnCore})
    for (const LinkModel model : {LinkModel::kQueue, LinkModel::kCalendar})
      for (const ScheduleOptions& schedule :
           {ScheduleOptions{SchedulePolicy::kSequential, Exchange::kDirect, 1},
            ScheduleOptions{SchedulePolicy::kBySource, Exchange::kGateway, 3},
            ScheduleOptions{SchedulePolicy::kHierarchical, Exchange::kGateway, 4}})
        for (const PassKind pass : {PassKind::kForward, PassKind::kBackward}) {
          SCOPED_TRACE(str(to_string(posting), " ", to_string(model), " ", describe(schedule)));
          p.posting = posting;
          p.link_model = model;
          const Simulation s = run(world, schedule, p, pass);
          EXPECT_GE(s.step_us, s.floor_us());
          const auto group = build_group_template(topology, schedule);
          for (std::int32_t r = 0; r < 6; ++r) {
            const auto& ops = group.of(RankId(r)).pass(pass).ops;
            double end = 0, busy = 0;
            std::size_t num_compute = 0;
            for (const OpSpan& span : s.spans[static_cast<std::size_t>(r)]) {
              if (ops[span.op].resource != Resource::kCompute) continue;
              EXPECT_GE(span.begin_us, end);
              end = span.end_us;
              busy += span.end_us - span.begin_us;
              ++num_compute;
            }
            EXPECT_EQ(num_compute,
                      static_cast<std::size_t>(std::count_if(ops.begin(), ops.end(), [](const Op& op) {
                        return op.resource == Resource::kCompute;
                      })));
            EXPECT_GE(busy, s.ranks[static_cast<std::size_t>(r)].compute_us - 1e-6);
          }
        }
}

TEST(Simulator, RefusesWhatTheExecutorWould) {
  const World world = world_of(Topology({{0}, {1}}), 2, {all_to(1, 4, 2), all_to(1, 0, 2)});
  const ScheduleOptions two{SchedulePolicy::kPipelined, Exchange::kGateway, 2};
  const auto plans = build_plans(world, two.plan_options());
  const PlanSummary summary = exact_summary(world, plans);
  const PlanSummary estimate(world.topology, Exchange::kGateway, world.placement, gathered_of(world));
  const MachineProfile profile = tiny_profile();
  const auto refuse = [&](ErrorCode code, std::initializer_list<std::string_view> words,
                          const ScheduleOptions& schedule, const PlanSummary& counts) {
    expect_error(code, words, [&] {
      simulate(build_group_template(world.topology, schedule), counts, profile, tiny_layer());
    });
  };
  refuse(ErrorCode::kInvalidArgument, {"num_chunks", "5", "4 tokens"},
         {SchedulePolicy::kPipelined, Exchange::kGateway, 5}, estimate);
  refuse(ErrorCode::kInvalidArgument, {"3 chunks", "2"}, {SchedulePolicy::kPipelined, Exchange::kGateway, 3},
         summary);
  refuse(ErrorCode::kInvalidArgument, {"exchanges"}, {SchedulePolicy::kPipelined, Exchange::kDirect, 2},
         summary);
  auto templates = build_group_template(world.topology, two).shapes;
  templates[0].forward.ops.pop_back();
  expect_error(ErrorCode::kInternal, {"template"}, [&] { group_template(templates); });
  templates = build_group_template(world.topology, two).shapes;
  for (Op& op : templates[1].forward.ops)
    if (op.kind == OpKind::kPut) op.raises = 0;
  expect_error(ErrorCode::kInternal, {"stop with"}, [&] { group_template(templates); });
  MachineProfile bad = profile;
  bad.gemms.clear();
  expect_error(ErrorCode::kInvalidConfig, {"neither"},
               [&] { simulate(build_group_template(world.topology, two), summary, bad, tiny_layer()); });
  LayerShape other = tiny_layer();
  other.ffn = 30;
  expect_error(ErrorCode::kNotFound, {"GEMM"},
               [&] { simulate(build_group_template(world.topology, two), summary, profile, other); });
}

// ---- counts ----------------------------------------------------------------------------------------------------------

TEST(PlanSummary, ExactFromPlans) {
  for (const std::uint64_t seed : {1, 2, 3})
    for (const auto& nodes : std::vector<std::vector<std::vector<std::int32_t>>>{
             {{0, 1}, {2, 3}}, {{0, 1, 2}, {3}, {4, 5}}, {{0, 1, 2, 3}}, {{0}, {1}, {2}}})
      for (const Exchange exchange : {Exchange::kGateway, Exchange::kDirect}) {
        SCOPED_TRACE(str("seed ", seed, " nodes ", nodes.size(), " exchange ", static_cast<int>(exchange)));
        std::mt19937_64 rng(seed);
        const Topology topology(nodes);
        World world{topology, contiguous_placement(9, topology.num_ranks()), {}};
        for (std::int32_t r = 0; r < topology.num_ranks(); ++r)
          world.routings.push_back(random_routing(rng, r == 1 ? 0 : 40 + 7 * r, 9, 0, 4, 1.0));
        const ScheduleOptions schedule{SchedulePolicy::kHierarchical, exchange, 3};
        const auto plans = build_plans(world, schedule.plan_options());
        const PlanSummary all = exact_summary(world, plans);
        const auto group = build_group_template(topology, schedule);
        OpWork a, b;
        for (const Plan& plan : plans) {
          // Blocks by the plan's own group sizes.
          for (std::int32_t part = 0; part < 3; ++part)
            for (std::int32_t c = 0; c < 3; ++c)
              for (std::int32_t l = 0; l < plan.num_local_slots; ++l) {
                const auto g =
                    static_cast<std::size_t>(plan.options.block(part, c) * plan.num_local_slots + l);
                EXPECT_EQ(all.slot_rows(plan.rank, static_cast<SourceClass>(part), l, c, 3),
                          static_cast<double>(plan.group_ptr[g + 1] - plan.group_ptr[g]));
              }
          // What a rank knows from its own plan is what all plans say.
          PlanSummary own(topology, exchange, 3, slots_of(world.placement));
          own.add(plan);
          for (const PassKind pass : {PassKind::kForward, PassKind::kBackward}) {
            const Template& t = group.of(plan.rank);
            for (const Op& op : t.pass(pass).ops) {
              all.op_work(t, pass, op, plan.rank, op.peer, tiny_layer(), a);
              own.op_work(t, pass, op, plan.rank, op.peer, tiny_layer(), b);
              EXPECT_EQ(a.bytes, b.bytes) << to_string(op.kind) << op.hop << op.handed_on;
              EXPECT_EQ(a.rows, b.rows);
              EXPECT_EQ(a.group_rows, b.group_rows);
            }
          }
          // Rows that cross, against the plan's traffic.
          double across = 0, in_node = 0;
          for (std::int32_t c = 0; c < 3; ++c) {
            for (std::int32_t n = 0; n < topology.num_nodes(); ++n)
              across += all.to_node(plan.rank, NodeId(n), c, 3).rows;
            for (std::int32_t d = 0; d < topology.num_ranks(); ++d) {
              if (d == plan.rank.value) continue;
              const double rows = all.to_rank(plan.rank, RankId(d), c, 3).rows +
                                  all.handed_on(plan.rank, RankId(d), c, 3).rows;
              (topology.same_node(plan.rank, RankId(d)) ? in_node : across) += rows;
            }
          }
          EXPECT_EQ(across, static_cast<double>(plan.traffic.rows_across_nodes));
          EXPECT_EQ(in_node, static_cast<double>(plan.traffic.rows_in_node));
        }
      }
}

// Routes are exact, rows expected values. With 1 expert a rank and any routing, rows to a rank are its routes: exact.
TEST(PlanSummary, EstimateFromDemand) {
  const Topology topology = Topology::uniform(8, 2);
  for (const Exchange exchange : {Exchange::kGateway, Exchange::kDirect}) {
    for (const bool one_each : {true, false}) {
      for (const double skew : {0.0, 1.0}) {
        std::mt19937_64 rng(7);
        const std::int32_t experts = one_each ? 8 : 32;
        World world{topology, contiguous_placement(experts, 8), {}};
        for (std::int32_t r = 0; r < 8; ++r)
          world.routings.push_back(random_routing(rng, 2000, experts, 4, 4, skew));
        const ScheduleOptions schedule{SchedulePolicy::kHierarchical, exchange, 1};
        const auto plans = build_plans(world, schedule.plan_options());
        const PlanSummary exact = exact_summary(world, plans);
        const PlanSummary estimate(topology, exchange, world.placement, gathered_of(world));
        EXPECT_FALSE(estimate.exact());
        double worst = 0;
        const auto compare = [&](PlanSummary::Amount want, PlanSummary::Amount got, bool to_a_rank) {
          EXPECT_EQ(got.routes, want.routes);
          if (one_each && to_a_rank) {
            EXPECT_NEAR(got.rows, want.rows, 1e-6 * want.rows + 1e-9);
          } else if (want.rows > 0) {
            worst = std::max(worst, std::abs(got.rows / want.rows - 1));
          }
        };
        for (std::int32_t r = 0; r < 8; ++r) {
          const RankId rank(r);
          for (std::int32_t d = 0; d < 8; ++d) {
            compare(exact.to_rank(rank, RankId(d), 0, 1), estimate.to_rank(rank, RankId(d), 0, 1), true);
            compare(exact.handed_on(rank, RankId(d), 0, 1), estimate.handed_on(rank, RankId(d), 0, 1), true);
          }
          for (std::int32_t n = 0; n < 2; ++n)
            compare(exact.to_node(rank, NodeId(n), 0, 1), estimate.to_node(rank, NodeId(n), 0, 1), false);
          for (const SourceClass k : {SourceClass::kAcross, SourceClass::kInNode, SourceClass::kSelf}) {
            compare(exact.received(rank, k, 0, 1), estimate.received(rank, k, 0, 1), true);
            for (std::int32_t l = 0; l < world.placement.num_slots_of(rank); ++l)
              EXPECT_EQ(estimate.slot_rows(rank, k, l, 0, 1), exact.slot_rows(rank, k, l, 0, 1));
          }
        }
        EXPECT_LE(worst, 0.06) << "exchange " << static_cast<int>(exchange) << " one_each " << one_each
                               << " skew " << skew;
        // And what comes of it in time.
        for (const PassKind pass : {PassKind::kForward, PassKind::kBackward}) {
          const auto group = build_group_template(topology, schedule);
          const double a = simulate(group, exact, tiny_profile(), tiny_layer(), {pass, false}).step_us;
          const double b = simulate(group, estimate, tiny_profile(), tiny_layer(), {pass, false}).step_us;
          EXPECT_NEAR(b, a, 0.02 * a) << to_string(pass);
        }
      }
    }
  }
}

TEST(PlanSummary, RefusesNonsense) {
  const Topology topology = Topology::uniform(2, 1);
  const Placement placement = contiguous_placement(2, 2);
  const std::vector<std::int64_t> too_many = {3, 0, 4, 0, 3, 0, 0, 0};
  expect_error(ErrorCode::kInvalidArgument, {"rank 0", "4 routes", "expert 0"},
               [&] { PlanSummary(topology, Exchange::kGateway, placement, too_many); });
  expect_error(ErrorCode::kInvalidArgument, {"demand", "7"},
               [&] { PlanSummary(topology, Exchange::kGateway, placement, std::span(too_many).first(7)); });
  PlanSummary estimate(topology, Exchange::kGateway, placement,
                       std::vector<std::int64_t>{3, 0, 3, 0, 3, 0, 0, 0});
  expect_error(ErrorCode::kInvalidArgument, {"plan"}, [&] { estimate.add(Plan()); });
}

// ---- scale -----------------------------------------------------------------------------------------------------------

std::vector<std::int64_t> even_demand(std::int32_t ranks, std::int32_t experts, std::int64_t tokens,
                                      std::int64_t top_k) {
  std::vector<std::int64_t> out;
  for (std::int32_t r = 0; r < ranks; ++r) {
    out.push_back(tokens);
    out.push_back(0);
    for (std::int32_t e = 0; e < experts; ++e)
      out.push_back((tokens * top_k * (e + 1)) / experts - (tokens * top_k * e) / experts);
  }
  return out;
}
// Rank r holds expert r mod E: every rank a slot, every expert ranks / E copies.
Placement repeated_placement(std::int32_t experts, std::int32_t ranks) {
  std::vector<std::vector<std::int32_t>> lists(static_cast<std::size_t>(ranks));
  for (std::int32_t r = 0; r < ranks; ++r) lists[static_cast<std::size_t>(r)] = {r % experts};
  return placement_from_lists(experts, lists);
}

// Shared templates give what a template for every rank gives.
TEST(GroupTemplate, SharedAndFullAgree) {
  for (const Exchange exchange : {Exchange::kGateway, Exchange::kDirect}) {
    const Topology topology = Topology::uniform(72, 9);
    const Placement placement = contiguous_placement(144, 72);
    std::mt19937_64 rng(3);
    World world{topology, placement, {}};
    for (std::int32_t r = 0; r < 72; ++r)
      world.routings.push_back(random_routing(rng, 30 + r, 144, 0, 6, 0.7));
    const PlanSummary counts(topology, exchange, placement, gathered_of(world));
    const ScheduleOptions schedule{SchedulePolicy::kHierarchical, exchange, 2};
    const GroupTemplate shared = build_group_template(topology, schedule);
    EXPECT_EQ(shared.shapes.size(), 8u);
    std::vector<Template> templates;
    for (std::int32_t r = 0; r < 72; ++r) templates.push_back(build_template(RankId(r), topology, schedule));
    const GroupTemplate full = group_template(templates);
    for (const PassKind pass : {PassKind::kForward, PassKind::kBackward}) {
      const Simulation a = simulate(shared, counts, tiny_profile(), tiny_layer(), {pass, false});
      const Simulation b = simulate(full, counts, tiny_profile(), tiny_layer(), {pass, false});
      EXPECT_EQ(a.step_us, b.step_us);
      for (std::size_t r = 0; r < 72; ++r) EXPECT_EQ(a.ranks[r].end_us, b.ranks[r].end_us);
    }
  }
}

TEST(Simulator, FourThousandRanks) {
  const std::clock_t begin = std::clock();
  const Topology topology = Topology::uniform(4096, 512);
  const Placement placement = repeated_placement(256, 4096);
  const PlanSummary counts(topology, Exchange::kGateway, placement, even_demand(4096, 256, 4096, 8));
  MachineProfile p = tiny_profile();
  p.posting = Posting::kOwnCore;
  const Simulation s =
      simulate(build_group_template(topology, {SchedulePolicy::kHierarchical, Exchange::kGateway, 2}), counts,
               p, tiny_layer());
  const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  RecordProperty("cpu_seconds", str(seconds));
  std::printf("4096 ranks: %.2f s of processor time, %lld events\n", seconds,
              static_cast<long long>(s.num_events));
  EXPECT_GT(s.step_us, s.floor_us());
  EXPECT_EQ(s.ranks.size(), 4096u);
#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT_LT(seconds, 10);
#endif
}

// ---- choosing --------------------------------------------------------------------------------------------------------

TEST(ChooseSchedule, ChunksWhenTheyPay) {
  const Topology topology = Topology::uniform(2, 2);
  const Placement placement = contiguous_placement(2, 2);
  const auto demand = even_demand(2, 2, 64, 1);
  MachineProfile p = tiny_profile();
  const ScheduleChoice cheap = choose_schedule(topology, placement, demand, tiny_layer(), p);
  EXPECT_NE(cheap.schedule().policy, SchedulePolicy::kSequential) << cheap.explain();
  // A message and an op that cost more than all rows: nothing is worth a second one.
  p.across_nodes.occupied = Curve({{0, 5000}, {160, 5010}});
  p.op_us = 100;
  const ScheduleChoice dear = choose_schedule(topology, placement, demand, tiny_layer(), p);
  EXPECT_EQ(dear.schedule().num_chunks, 1) << dear.explain();
  EXPECT_NE(dear.explain().find("do not chunk"), std::string::npos);
  // The same on every rank and every time.
  EXPECT_EQ(choose_schedule(topology, placement, demand, tiny_layer(), p).to_json(), dear.to_json());
  for (std::size_t i = 2; i < cheap.ranked.size(); ++i)
    EXPECT_LE(cheap.ranked[i - 1].total_us(), cheap.ranked[i].total_us());
  for (const char* word : {"choice: ", "bound by", "sequential", "exposed"})
    EXPECT_NE(cheap.explain().find(word), std::string::npos) << word << " is not in\n" << cheap.explain();
}

TEST(ChooseSchedule, LeavesOutChunksWithoutRows) {
  const Topology topology = Topology::uniform(2, 2);
  SearchSpace space;
  space.policies = {SchedulePolicy::kPipelined};
  space.chunks = {2, 8};
  const auto choice = choose_schedule(topology, contiguous_placement(2, 2), even_demand(2, 2, 4, 1),
                                      tiny_layer(), tiny_profile(), space);
  ASSERT_EQ(choice.ranked.size(), 1u);
  EXPECT_EQ(choice.schedule().num_chunks, 2);
  space.chunks = {8};
  expect_error(ErrorCode::kInvalidArgument, {"chunk counts"}, [&] {
    choose_schedule(topology, contiguous_placement(2, 2), even_demand(2, 2, 4, 1), tiny_layer(),
                    tiny_profile(), space);
  });
}

}  // namespace
}  // namespace sluice
