// What GPUs are told of placements and routings, and that a group over GPUs says what is missing: needs no GPU.
#include "sluice/runtime/src/gpu_group.hpp"

#include <gtest/gtest.h>

#include <chrono>

#include "sluice/runtime.hpp"
#include "sluice/runtime/src/compute_device.hpp"

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
