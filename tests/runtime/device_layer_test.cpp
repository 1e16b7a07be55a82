// The layer and training with experts on a GPU: against the dense reference and against the CPU, over topologies,
// schedules, dtypes and what is kept. Ranks share one GPU. Skips where there is none.
#include <cmath>

#include "sluice/runtime/src/compute_device.hpp"
#include "train_harness.hpp"

namespace sluice::testing {
namespace {

constexpr std::uint64_t kSeed = 515151;

// Why there is no device, or nothing.
std::string no_device() {
  try {
    make_compute_device(0);
    return {};
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kNotSupported);
    return e.message();
  }
}

class DeviceLayer : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = no_device(); !why.empty()) GTEST_SKIP() << why;
  }
};

LayerSetup on_device(std::vector<std::vector<std::int32_t>> nodes, Placement placement) {
  LayerSetup setup;
  setup.topology = Topology(std::move(nodes));
  setup.placement = std::move(placement);
  setup.device = ComputeDevice::kCuda;
  return setup;
}

Placement contiguous(const Problem& p, std::int32_t num_ranks) {
  return contiguous_placement(p.shape.num_experts, num_ranks, p.kinds);
}

// Runs everywhere: without a device the error says what is missing.
TEST(ComputeDeviceTest, IsThereOrSaysWhyNot) {
  RuntimeOptions options;
  options.device = ComputeDevice::kCuda;
  const std::string why = no_device();
  if (why.empty()) {
    auto group = Runtime::create_local(Topology::uniform(2, 1), options);
    EXPECT_FALSE(device_name(*group[1]).empty());
    return;
  }
  EXPECT_NE(why.find("CUDA"), std::string::npos) << why;
  EXPECT_THROW(Runtime::create_local(Topology::uniform(2, 1), options), Error);
}

const std::vector<std::vector<std::vector<std::int32_t>>> kTopologies = {
    {{0}}, {{0, 1}}, {{0}, {1}}, {{0, 1}, {2, 3}}};

TEST_F(DeviceLayer, AgreesWithTheDenseReferenceInFp32) {
  std::mt19937_64 rng(kSeed);
  int round = 0;
  for (const auto& nodes : kTopologies)
    for (const ExpertActivation activation :
         {ExpertActivation::kSwiGLU, ExpertActivation::kGelu, ExpertActivation::kRelu}) {
      SCOPED_TRACE(str("round ", round, " seed ", kSeed));
      // Odd sizes, tiles that end within a row and a column, zero and copy experts.
      const Problem p = random_problem(rng, Shape{9, 67, 35, activation}, 150, 0, 5, double(round % 3),
                                       round % 2, round % 4 == 0);
      LayerSetup setup = on_device(nodes, {});
      setup.placement = contiguous(p, setup.topology.num_ranks());
      setup.save = round % 2 ? Save::kRows : Save::kActivations;
      setup.schedule = {static_cast<SchedulePolicy>(round % 4),
                        round % 3 ? Exchange::kGateway : Exchange::kDirect,
                        round % 4 == 0 ? 1 : 1 + round % 3};
      // As on the CPU: sums of at most 5 experts over 35..67 terms each, a few hundred roundings of 2^-24.
      expect_close(run_layer(p, setup), dense_reference(p), 2e-5);
      ++round;
    }
}

// Twice the roundings of the CPU's bound: the quick exponential of a fused bf16 activation is one more.
TEST_F(DeviceLayer, AgreesWithTheDenseReferenceInBf16) {
  std::mt19937_64 rng(kSeed + 1);
  for (const auto& nodes : kTopologies)
    for (const ExpertActivation activation :
         {ExpertActivation::kSwiGLU, ExpertActivation::kGelu, ExpertActivation::kRelu}) {
      const Problem p = random_problem(rng, Shape{8, 72, 40, activation}, 130, 0, 4, 1.0);
      LayerSetup setup = on_device(nodes, {});
      setup.placement = contiguous(p, setup.topology.num_ranks());
      setup.dtype = setup.wire_dtype = setup.combine_dtype = DType::kBF16;
      expect_close(run_layer(p, setup), dense_reference(p), 8.0 / 256);
      // The combining dtype and the wire's are free.
      setup.combine_dtype = DType::kF32;
      expect_close(run_layer(p, setup), dense_reference(p), 8.0 / 256);
      setup.wire_dtype = DType::kF32;
      expect_close(run_layer(p, setup), dense_reference(p), 8.0 / 256);
    }
}

TEST_F(DeviceLayer, Bf16WireUnderFp32Experts) {
  std::mt19937_64 rng(kSeed + 2);
  const Problem p = random_problem(rng, Shape{8, 32, 40}, 48, 1, 4);
  LayerSetup setup = on_device({{0, 1}, {2, 3}}, contiguous(p, 4));
  setup.wire_dtype = setup.combine_dtype = DType::kBF16;
  expect_close(run_layer(p, setup), dense_reference(p), 4.0 / 256);
}

TEST_F(DeviceLayer, BitsDoNotDependOnScheduleExchangeChunksOrSave) {
  std::mt19937_64 rng(kSeed + 3);
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Problem p = random_problem(rng, Shape{8, 24, 32}, 61, 0, 6, 1.0, 1, 1);
    LayerSetup setup = on_device({{0, 1}, {2, 3}}, contiguous(p, 4));
    setup.dtype = setup.wire_dtype = setup.combine_dtype = dtype;
    const Result base = run_layer(p, setup);
    for (const Exchange exchange : {Exchange::kGateway, Exchange::kDirect})
      for (const auto& [policy, chunks] :
           std::vector<std::pair<SchedulePolicy, std::int32_t>>{{SchedulePolicy::kPipelined, 3},
                                                                {SchedulePolicy::kPipelined, 100},
                                                                {SchedulePolicy::kBySource, 2},
                                                                {SchedulePolicy::kHierarchical, 7}}) {
        LayerSetup other = setup;
        other.schedule = {policy, exchange, chunks};
        other.save = chunks % 2 ? Save::kRows : Save::kActivations;
        SCOPED_TRACE(str("dtype ", to_string(dtype), " ", to_string(policy), " chunks ", chunks));
        expect_same_bits(run_layer(p, other), base);
      }
  }
}

TEST_F(DeviceLayer, ReplicasHoldOneSum) {
  std::mt19937_64 rng(kSeed + 4);
  const Problem p = random_problem(rng, Shape{4, 16, 24}, 60, 1, 3);
  const std::vector<std::vector<std::int32_t>> experts = {{0, 1}, {1, 2}, {1, 3}, {3}};
  const LayerSetup setup = on_device({{0, 1}, {2, 3}}, placement_from_lists(4, experts, p.kinds));
  expect_close(run_layer(p, setup), dense_reference(p), 2e-5);
}

TEST_F(DeviceLayer, EdgeShapes) {
  std::mt19937_64 rng(kSeed + 5);
  const auto check = [&](const Problem& p) {
    expect_close(run_layer(p, on_device({{0, 1}, {2, 3}}, contiguous(p, 4))), dense_reference(p), 2e-5);
  };
  check(random_problem(rng, Shape{8, 16, 16}, 0, 0, 0));    // no tokens
  check(random_problem(rng, Shape{8, 16, 16}, 3, 8, 8));    // fewer tokens than ranks, every expert
  check(random_problem(rng, Shape{1, 16, 16}, 400, 1, 1));  // one expert takes all, ranks without experts
  check(random_problem(rng, Shape{3, 1, 1}, 20, 0, 3));     // one column
  check(random_problem(rng, Shape{8, 16, 16}, 20, 0, 0));   // no routes
  Problem odd = random_problem(rng, Shape{4, 20, 16}, 20, 1, 2);
  LayerSetup setup = on_device({{0}}, contiguous(odd, 1));
  setup.dtype = setup.wire_dtype = setup.combine_dtype = DType::kBF16;
  try {
    run_layer(odd, setup);
    ADD_FAILURE() << "bf16 rows of 20 columns were taken";
  } catch (const Error& e) {
    EXPECT_NE(e.message().find("multiples of 8"), std::string::npos) << e.what();
  }
}

// The job learns, its steps are those of the CPU within rounding, and the dense reference of --check agrees.
TEST_F(DeviceLayer, TrainingFollowsTheCpu) {
  const train::Text text = word_text(4000);
  const auto losses = [&](ComputeDevice device, std::int32_t num_ranks,
                          const std::vector<std::string>& sets) {
    const LoadedConfig loaded = tiny_config(sets);
    RuntimeOptions options;
    options.timeout = std::chrono::seconds(60);
    options.device = device;
    auto group = Runtime::create_local(configured_topology(loaded.config, num_ranks), options);
    std::vector<double> out;
    run_ranks(group, [&](Runtime& runtime) {
      const train::TrainReport report = train::train(runtime, loaded, text, {.progress = false});
      if (runtime.rank() == RankId(0)) {
        out = report.losses;
        out.push_back(report.heldout_bpb);
      }
    });
    return out;
  };
  const std::vector<std::string> chain = {"model.chain_iterations=2", "model.shared_ffn=8",
                                          "schedule.chain_chunks=2"};
  for (const auto& sets : {std::vector<std::string>{}, chain})
    for (const std::int32_t ranks : {1, 2}) {
      const auto cpu = losses(ComputeDevice::kCpu, ranks, sets),
                 gpu = losses(ComputeDevice::kCuda, ranks, sets);
      ASSERT_EQ(cpu.size(), gpu.size());
      for (std::size_t i = 0; i < cpu.size(); ++i)
        // fp32 steps that differ by rounding: five updates of at most 1e-2 each move apart by a small part of a step.
        EXPECT_TRUE(std::abs(cpu[i] - gpu[i]) <= 1e-3 * std::abs(cpu[i]))
            << "step " << i << ", " << ranks << " ranks: " << cpu[i] << " on the CPU, " << gpu[i]
            << " on the GPU";
    }
  const auto bf16_cpu = losses(ComputeDevice::kCpu, 2, {"model.dtype=bf16", "model.hidden=16"}),
             bf16_gpu = losses(ComputeDevice::kCuda, 2, {"model.dtype=bf16", "model.hidden=16"});
  for (std::size_t i = 0; i < bf16_cpu.size(); ++i)
    EXPECT_TRUE(std::abs(bf16_cpu[i] - bf16_gpu[i]) <= 2e-2 * std::abs(bf16_cpu[i])) << "bf16 step " << i;
}

}  // namespace
}  // namespace sluice::testing
