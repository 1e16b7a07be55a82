#include "sluice/scheduler/template.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "expect_error.hpp"

namespace sluice {
namespace {

std::vector<Template> templates_of(const Topology& topology, const ScheduleOptions& schedule) {
  std::vector<Template> out;
  for (std::int32_t r = 0; r < topology.num_ranks(); ++r)
    out.push_back(build_template(RankId(r), topology, schedule));
  return out;
}

constexpr SchedulePolicy kPolicies[] = {SchedulePolicy::kSequential, SchedulePolicy::kPipelined,
                                        SchedulePolicy::kBySource, SchedulePolicy::kHierarchical};

TEST(Template, GroupsFitTogether) {
  const std::vector<std::vector<std::vector<std::int32_t>>> topologies = {{{0}},
                                                                          {{0, 1}},
                                                                          {{0}, {1}},
                                                                          {{0, 1}, {2, 3}},
                                                                          {{0, 2}, {1, 3}},
                                                                          {{0, 1, 2}, {3}},
                                                                          {{3}, {0, 1, 2}},
                                                                          {{0, 1}, {2, 3, 4}, {5}},
                                                                          {{0, 1, 2, 3}, {4, 5, 6, 7}},
                                                                          {{0}, {1}, {2}, {3, 4, 5, 6, 7}}};
  for (const auto& nodes : topologies)
    for (const Exchange exchange : {Exchange::kGateway, Exchange::kDirect})
      for (const SchedulePolicy policy : kPolicies)
        for (const std::int32_t chunks : {1, 2, 5}) {
          if (policy == SchedulePolicy::kSequential && chunks > 1) continue;
          const Topology topology(nodes);
          SCOPED_TRACE(str(topology.describe(), " ", to_string(policy), " chunks ", chunks));
          const auto templates = templates_of(topology, {policy, exchange, chunks});
          EXPECT_NO_THROW(validate_group(templates));
          for (const Template& t : templates) EXPECT_EQ(t.schedule_hash(), templates[0].schedule_hash());
        }
}

// The checks can fail: each kind of damage is found.
TEST(Template, DamageIsFound) {
  const Topology topology({{0, 1}, {2, 3}});
  const ScheduleOptions schedule{SchedulePolicy::kPipelined, Exchange::kGateway, 2};
  const auto good = templates_of(topology, schedule);
  const auto find = [](PassTemplate& p, OpKind kind) -> Op& {
    for (Op& op : p.ops)
      if (op.kind == kind) return op;
    throw std::logic_error("no such op");
  };
  const auto self_index = [](const PassTemplate& p, const Op& op) {
    return static_cast<std::uint32_t>(&op - p.ops.data());
  };

  auto cyclic = good;
  Op& reduce = find(cyclic[1].forward, OpKind::kReduce);
  find(cyclic[1].forward, OpKind::kExpertGemm1)
      .waits.push_back({true, self_index(cyclic[1].forward, reduce), 1});
  expect_error(ErrorCode::kInternal, {"cycle"}, [&] { cyclic[1].validate(); });

  auto starved = good;
  for (CounterWait& w : find(starved[0].forward, OpKind::kUnpack).waits)
    if (!w.completion) ++w.value;
  expect_error(ErrorCode::kInternal, {"never comes"}, [&] { starved[0].validate(); });

  auto missing = good;  // one put less than the receiver counts on
  --find(missing[2].forward, OpKind::kPut).raises;
  expect_error(ErrorCode::kInternal, {"stop with"}, [&] { validate_group(missing); });

  auto surplus = good;
  ++find(surplus[2].backward, OpKind::kReturn).raises;
  expect_error(ErrorCode::kInternal, {"raised"}, [&] { validate_group(surplus); });
}

TEST(Template, HashTellsSchedulesApart) {
  const Topology topology({{0, 1}, {2, 3}});
  const auto hash = [&](std::int32_t chunks, Exchange exchange, std::int32_t rank) {
    return build_template(RankId(rank), topology, {SchedulePolicy::kPipelined, exchange, chunks}).hash();
  };
  EXPECT_EQ(hash(2, Exchange::kGateway, 0), hash(2, Exchange::kGateway, 0));
  EXPECT_NE(hash(2, Exchange::kGateway, 0), hash(3, Exchange::kGateway, 0));
  EXPECT_NE(hash(2, Exchange::kGateway, 0), hash(2, Exchange::kDirect, 0));
  EXPECT_NE(hash(2, Exchange::kGateway, 0), hash(2, Exchange::kGateway, 1));
}

// Remote rows leave before own rows are copied, remote blocks are preferred to own ones, and their results to both.
TEST(Template, BySourcePrefersWhatPeersWaitFor) {
  const Template t =
      build_template(RankId(0), Topology({{0}, {1}}), {SchedulePolicy::kBySource, Exchange::kGateway, 2});
  const auto first = [&](auto&& is) {
    const auto& ops = t.forward.ops;
    return std::find_if(ops.begin(), ops.end(), is) - ops.begin();
  };
  const auto work = [&](OpKind kind, std::int32_t part) {
    return first([&](const Op& op) { return op.kind == kind && op.part == part; });
  };
  const auto put = first([](const Op& op) { return op.kind == OpKind::kPut; });
  const auto self_copy = first([](const Op& op) { return op.kind == OpKind::kPack && op.hop == 0; });
  EXPECT_LT(put, self_copy);
  EXPECT_LT(work(OpKind::kReduce, 0), work(OpKind::kExpertGemm1, 0));
  EXPECT_LT(work(OpKind::kExpertGemm1, 0), work(OpKind::kExpertGemm1, 1));
  EXPECT_LT(work(OpKind::kExpertGemm1, 0), self_copy);
  // A remote block that comes while own rows are worked on need not wait for all of them.
  const auto pieces = std::count_if(t.forward.ops.begin(), t.forward.ops.end(), [](const Op& op) {
    return op.kind == OpKind::kExpertGemm1 && op.part == 1 && op.chunk == 0;
  });
  EXPECT_GT(pieces, 1);
  std::int64_t slots = 0;
  for (const Op& op : t.forward.ops)
    if (op.kind == OpKind::kExpertGemm1 && op.part == 1 && op.chunk == 0) {
      EXPECT_EQ(op.num_pieces, pieces);
      EXPECT_EQ(op.begin_slot(10), slots);
      slots = op.end_slot(10);
    }
  EXPECT_EQ(slots, 10);
  // An own block waits for nothing that travels.
  for (const CounterWait& w : t.forward.ops[static_cast<std::size_t>(work(OpKind::kExpertGemm1, 1))].waits)
    EXPECT_TRUE(w.completion);
}

TEST(Template, PrintsItself) {
  const Template t = build_template(RankId(1), Topology({{0, 1}, {2, 3}}),
                                    {SchedulePolicy::kPipelined, Exchange::kGateway, 2});
  const std::string text = t.explain();
  for (const char* word : {"rank 1", "pipelined", "pack1", "expert_gemm1",
                           "arrived_across[1] >= ", "returned_handed_on[0]", "wgrad"})
    EXPECT_NE(text.find(word), std::string::npos) << word << " is not in\n" << text;
  EXPECT_NE(t.to_json().find("\"expert_dgrad1\""), std::string::npos);
}

TEST(Template, RefusesContradictions) {
  const Topology topology = Topology::uniform(2, 1);
  expect_error(ErrorCode::kInvalidArgument, {"num_chunks", "0"}, [&] {
    build_template(RankId(0), topology, {SchedulePolicy::kPipelined, Exchange::kGateway, 0});
  });
  expect_error(ErrorCode::kInvalidArgument, {"sequential", "3"}, [&] {
    build_template(RankId(0), topology, {SchedulePolicy::kSequential, Exchange::kGateway, 3});
  });
  expect_error(ErrorCode::kInvalidArgument, {"rank 5"}, [&] { build_template(RankId(5), topology, {}); });
}

}  // namespace
}  // namespace sluice
