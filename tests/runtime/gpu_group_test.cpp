// What GPUs are told of placements, routings and schedules, and that a group over GPUs says what is missing: needs no GPU.
#include "sluice/runtime/src/gpu_group.hpp"

#include <gtest/gtest.h>

#include <chrono>

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"
#include "sluice/runtime/src/compute_device.hpp"
#include "sluice/runtime/src/layer_config.hpp"

namespace sluice {
namespace {

TEST(GpuPlacementTest, NumbersExpertsThatHaveWeights) {
  const std::vector<ExpertKind> kinds = {ExpertKind::kFFN, ExpertKind::kZero, ExpertKind::kFFN,
                                         ExpertKind::kFFN, ExpertKind::kCopy};
  const std::vector<std::vector<std::int32_t>> experts = {{3}, {}, {0, 2}};
  const GpuPlacement p = gpu_placement(placement_from_lists(5, experts, kinds));
  EXPECT_EQ(p.number_of, (std::vector<std::int32_t>{0, -1, 1, 2, -1}));
  EXPECT_EQ(p.rank_of, (std::vector<std::int32_t>{2, 2, 0}));
}

void expect_refused(const std::vector<std::vector<std::int32_t>>& experts, std::string_view word) {
  try {
    gpu_placement(placement_from_lists(3, experts));
    ADD_FAILURE() << "taken: " << word;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kNotSupported);
    EXPECT_NE(e.message().find(word), std::string::npos) << e.message();
  }
}

TEST(GpuPlacementTest, RefusesCopiesAndOtherOrders) {
  expect_refused({{0, 1}, {1, 2}}, "expert 1 has 2 copies");
  expect_refused({{2, 0}, {1}}, "rank 0 holds expert 2 before expert 0");
}

TEST(GpuRoutingTest, LeavesOutWhatIsEverywhere) {
  const std::vector<ExpertKind> kinds = {ExpertKind::kZero, ExpertKind::kFFN, ExpertKind::kFFN};
  const std::vector<std::vector<std::int32_t>> experts = {{1}, {2}};
  const GpuPlacement p = gpu_placement(placement_from_lists(3, experts, kinds));
  Routing routing;
  routing.num_experts = 3;
  routing.row_ptr = {0, 3, 4, 4, 5};
  routing.expert = {0, 1, 2, 0, 2};
  routing.weight = {0.5f, 0.25f, 0.125f, 2, 3};
  GpuRouting out;
  for (int again = 0; again < 2; ++again) {
    out.assign(routing, p);
    EXPECT_EQ(out.row_ptr, (std::vector<std::int64_t>{0, 2, 2, 2, 3}));
    EXPECT_EQ(out.expert, (std::vector<std::int32_t>{0, 1, 1}));
    EXPECT_EQ(out.weight, (std::vector<float>{0.25f, 0.125f, 3}));
    EXPECT_EQ(out.route, (std::vector<std::int32_t>{1, 2, 4}));
    EXPECT_EQ(out.num_tokens(), 4);
  }
}

TEST(GpuGroupTest, LinksHaveTheNamesOfTransports) {
  for (const GpuLink link : {GpuLink::kNvlink, GpuLink::kNccl}) EXPECT_EQ(gpu_link_of(to_string(link)), link);
  for (const std::string_view other : {"", "shm", "tcp", "local", "NVLINK", "nccl "})
    EXPECT_FALSE(gpu_link_of(other).has_value()) << other;
}

GpuWay way_of(SchedulePolicy policy, const Topology& topology, GpuLink link = GpuLink::kNccl,
              bool by_model = false) {
  return gpu_way({policy, Exchange::kGateway, 5}, by_model, link, topology);
}

TEST(GpuWayTest, HierarchicalIsTwoHopsWhereThereAreTwoLevels) {
  for (const Topology& nodes : {Topology::uniform(4, 2), Topology::uniform(2, 2), Topology::uniform(6, 3)}) {
    const GpuWay way = way_of(SchedulePolicy::kHierarchical, nodes);
    EXPECT_TRUE(way.two_hops && !way.overlapped) << nodes.describe();
    EXPECT_EQ(way.chunks, 5);
    EXPECT_EQ(way_of(SchedulePolicy::kHierarchical, nodes, GpuLink::kNccl, true).chunks, 0);
    for (const auto policy : {SchedulePolicy::kSequential, SchedulePolicy::kBySource}) {
      EXPECT_FALSE(way_of(policy, nodes).two_hops) << nodes.describe();
      EXPECT_EQ(way_of(policy, nodes).overlapped, policy == SchedulePolicy::kBySource);
    }
  }
  // One node has one level: own rows beside those that travel.
  for (const GpuLink link : {GpuLink::kNvlink, GpuLink::kNccl})
    for (const std::int32_t ranks : {1, 4}) {
      const GpuWay way = way_of(SchedulePolicy::kHierarchical, Topology::uniform(ranks, 1), link);
      EXPECT_TRUE(way.overlapped && !way.two_hops) << ranks;
    }
}

TEST(GpuWayTest, RefusesNodesThatTwoHopsCannotHave) {
  const auto refused = [](const std::vector<std::vector<std::int32_t>>& nodes, GpuLink link,
                          std::string_view word) {
    try {
      way_of(SchedulePolicy::kHierarchical, Topology(nodes), link);
      ADD_FAILURE() << "taken: " << word;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kNotSupported);
      EXPECT_NE(e.message().find(word), std::string::npos) << e.message();
    }
  };
  refused({{0, 1}, {2}}, GpuLink::kNccl, "node 0 has 2 ranks and node 1 has 1");
  refused({{0}, {1, 2}}, GpuLink::kNccl, "node 0 has 1 ranks and node 1 has 2");
  refused({{0, 2}, {1, 3}}, GpuLink::kNccl, "node 0 has rank 2 where rank 1 would be");
  refused({{2, 3}, {0, 1}}, GpuLink::kNccl, "node 0 has rank 2 where rank 0 would be");
  refused({{0, 1}, {2, 3}}, GpuLink::kNvlink, "nvlink");
}

TEST(GpuWayTest, AutoIsTwoHopsWhereRanksOfANodeShareRows) {
  EXPECT_TRUE(auto_is_two_hops(GpuLink::kNccl, Topology::uniform(4, 2)));
  EXPECT_FALSE(auto_is_two_hops(GpuLink::kNvlink, Topology::uniform(4, 2)));
  EXPECT_FALSE(auto_is_two_hops(GpuLink::kNccl, Topology::uniform(4, 1)));
  EXPECT_FALSE(auto_is_two_hops(GpuLink::kNccl, Topology::uniform(4, 4)));
  EXPECT_FALSE(auto_is_two_hops(GpuLink::kNccl, Topology({{0, 1}, {2}})));
  EXPECT_FALSE(auto_is_two_hops(GpuLink::kNccl, Topology({{0, 2}, {1, 3}})));
}

// What the configuration takes over nccl and nvlink, and what options layers get of it.
TEST(GpuWayTest, ConfigurationTakesHierarchicalOverNcclAlone) {
  const auto options = [](const std::string& link, const std::string& policy, int chunks) {
    const std::vector<std::string> sets = {"comm.transport=" + link, "schedule.policy=" + policy,
                                           str("schedule.num_chunks=", chunks), "runtime.device=cuda",
                                           "model.dtype=bf16"};
    return layer_options(parse_config("# nothing\n", "f.toml", sets, {}).config);
  };
  for (const int chunks : {1, 2, 16}) {
    const ScheduleOptions schedule = options("nccl", "hierarchical", chunks).schedule;
    EXPECT_EQ(schedule, (ScheduleOptions{SchedulePolicy::kHierarchical, Exchange::kGateway, chunks}));
  }
  const ScheduleOptions one_hop = options("nccl", "auto", 2).schedule;
  EXPECT_EQ(one_hop, (ScheduleOptions{SchedulePolicy::kBySource, Exchange::kDirect, 1}));
  const auto refused = [&](const std::string& link, const std::string& policy, int chunks,
                           std::initializer_list<std::string_view> words) {
    try {
      options(link, policy, chunks);
      ADD_FAILURE() << link << " " << policy << " " << chunks << " was taken";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidConfig);
      for (const std::string_view word : words)
        EXPECT_NE(e.message().find(word), std::string::npos) << word << ": " << e.message();
    }
  };
  refused("nccl", "hierarchical", 17, {"schedule.num_chunks 17", "at most 16"});
  refused("nvlink", "hierarchical", 2, {"schedule.policy hierarchical", "comm.transport = nccl"});
  refused("nccl", "pipelined", 2, {"schedule.policy pipelined", "hierarchical"});
  refused("nccl", "by-source", 2, {"schedule.num_chunks = 1"});
}

// Before anybody is waited for: nobody else is there, and nothing was launched.
TEST(GpuGroupTest, SaysAtOnceWhatIsMissing) {
  const auto began = std::chrono::steady_clock::now();
  for (const std::string_view link : {"nvlink", "nccl"}) {
    RuntimeOptions options;
    try {
      Runtime::create(link, nullptr, options);
      ADD_FAILURE() << link << " over the device cpu was taken";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(e.message().find("runtime.device"), std::string::npos) << e.message();
    }
    if (num_gpus() > 0) continue;
    options.device = ComputeDevice::kCuda;
    try {
      Runtime::create(link, nullptr, options);
      ADD_FAILURE() << link << " without a GPU was taken";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kNotSupported);
      EXPECT_NE(e.message().find(link), std::string::npos) << e.message();
      EXPECT_NE(e.message().find("CUDA"), std::string::npos) << e.message();
    }
  }
  EXPECT_TRUE(std::chrono::steady_clock::now() - began < std::chrono::seconds(20));
}

}  // namespace
}  // namespace sluice
