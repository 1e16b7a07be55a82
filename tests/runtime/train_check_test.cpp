// The check against the dense reference: it passes over policies, kinds of experts, topologies and dtypes, and it can
// fail.
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "sluice/runtime/src/train/check.hpp"
#include "sluice/scheduler/placement_file.hpp"
#include "train_harness.hpp"

namespace sluice::testing {
namespace {

struct CheckCase {
  std::string name;
  std::vector<std::string> sets;
  std::int32_t num_ranks;
};
class TrainCheck : public ::testing::TestWithParam<CheckCase> {};

TEST_P(TrainCheck, Agrees) {
  const LoadedConfig loaded = tiny_config(GetParam().sets);
  const train::Text text = word_text(6000);
  run_job(loaded, GetParam().num_ranks, [&](Runtime& runtime) {
    const train::CheckReport report = train::check(runtime, loaded, text);
    if (runtime.rank() != RankId(0)) return;
    // Something was compared: f32 never agrees with f64 to the last bit.
    EXPECT_EQ(report.steps, 3);
    for (const auto* figure : {&report.loss, &report.scores, &report.gradient, &report.grad_norm})
      EXPECT_GT(figure->error, 0);
    // Names: embedding, projection, head, gain; gates and a gain a layer; two matrices an expert.
    const Config::Model& m = loaded.config.model;
    const int num_experts = m.num_ffn_experts() + (m.shared_ffn > 0 ? 1 : 0);
    int expected = 4 + 2 * (train::num_gates(loaded.config) + 1) + 2 * 2 * num_experts;
    expected += 2 * 2 * m.constant_experts + (m.gate_residual ? 1 : 0);
    EXPECT_EQ(report.num_parameters, expected);
    const auto json = nlohmann::json::parse(train::to_json(report));
    EXPECT_TRUE(json["passed"].get<bool>());
    EXPECT_LE(json["errors"]["gradient"]["error"], json["errors"]["gradient"]["limit"]);
  });
}

// Replicas, and another placement in each layer, from a file: the gradient of an expert is the sum over its copies, once.
TEST(TrainCheckPlacement, ReplicasOfAFile) {
  const std::string path = ::testing::TempDir() + "sluice_placement_" + std::to_string(::getpid()) + ".json";
  std::ofstream(path) << PlacementFile{"by hand",
                                       6,
                                       {{0, 1}, {2, 3}},
                                       {{0, {{0, 1, 5}, {2, 0}, {3, 4, 0, 5}, {5}}},
                                        {1, {{5, 4}, {}, {3, 4}, {0, 1, 2, 4}}}}}
                             .to_json();
  // Policies that look at places see each layer's own.
  for (const std::vector<std::string>& sets : std::vector<std::vector<std::string>>{
           {"routing.relu_lambda0=0.1"},
           {"routing.policy=bounded_regret", "routing.regret_epsilon=0.3", "routing.locality_loss=0.5"},
           {"routing.policy=etr", "routing.etr_tau=0.8", "routing.etr_choice=both"}}) {
    std::vector<std::string> all = {"placement.policy=file", "placement.file=" + path,
                                    "topology.nodes=[[0,1],[2,3]]"};
    all.insert(all.end(), sets.begin(), sets.end());
    const LoadedConfig loaded = tiny_config(all);
    const train::Text text = word_text(6000);
    run_job(loaded, 4, [&](Runtime& runtime) {
      const train::CheckReport report = train::check(runtime, loaded, text);
      if (runtime.rank() != RankId(0)) return;
      const auto json = nlohmann::json::parse(train::to_json(report));
      EXPECT_TRUE(json["passed"].get<bool>()) << json.dump();
      EXPECT_GT(report.gradient.error, 0);
    });
  }
  std::remove(path.c_str());
}

INSTANTIATE_TEST_SUITE_P(
    Train, TrainCheck,
    ::testing::Values(
        CheckCase{"Relu1", {}, 1}, CheckCase{"Relu4", {"routing.relu_lambda0=0.1"}, 4},
        CheckCase{"Nodes",
                  {"topology.nodes=[[0,3],[1,2]]", "schedule.policy=pipelined", "routing.relu_lambda0=0.1"},
                  4},
        CheckCase{
            "Softmax", {"routing.policy=softmax_topk", "routing.aux_loss=0.01", "routing.z_loss=0.01"}, 3},
        CheckCase{"SoftmaxNotRenormalized", {"routing.policy=softmax_topk", "routing.renormalize=false"}, 2},
        CheckCase{"Sigmoid", {"routing.policy=sigmoid_topk", "routing.route_scale=2.5"}, 2},
        CheckCase{"ZeroAndCopyExperts", {"model.zero_experts=1", "model.copy_experts=2"}, 3},
        CheckCase{"NodeLimited",
                  {"routing.policy=node_limited", "routing.num_groups=3", "routing.top_groups=2",
                   "routing.bias_update=0.05", "routing.aux_loss=0.1", "topology.nodes=2"},
                  4},
        CheckCase{"BoundedRegret",
                  {"routing.policy=bounded_regret", "routing.regret_epsilon=0.2", "routing.locality_loss=0.5",
                   "topology.nodes=2", "schedule.policy=pipelined"},
                  4},
        CheckCase{"BoundedRegretOnGroups",
                  {"routing.policy=bounded_regret", "routing.regret_base=node_limited",
                   "routing.regret_epsilon=0.3", "topology.nodes=[[0,3],[1,2]]"},
                  4},
        CheckCase{"LocalityLossByPosition",
                  {"routing.policy=softmax_topk", "routing.locality_loss=0.5", "train.deal=by_position",
                   "topology.nodes=2"},
                  4},
        CheckCase{"Moepp",
                  {"routing.policy=moepp", "model.zero_experts=1", "model.copy_experts=1",
                   "model.constant_experts=2", "model.gate_residual=true", "routing.aux_loss=0.05",
                   "routing.capacity_factor=0.7"},
                  4},
        CheckCase{"MoeppChain",
                  {"routing.policy=moepp", "model.constant_experts=2", "routing.capacity_factor=0",
                   "model.chain_iterations=2", "schedule.chain_chunks=2", "model.dtype=bf16"},
                  2},
        CheckCase{
            "EtrBoth",
            {"routing.policy=etr", "routing.etr_tau=0.8", "routing.etr_choice=both", "routing.aux_loss=0.05",
             "routing.locality_loss=0.3", "routing.capacity_factor=0.8", "topology.nodes=2"},
            4},
        CheckCase{"EtrToken",
                  {"routing.policy=etr", "routing.etr_tau=0.8", "routing.etr_choice=token",
                   "routing.renormalize=false", "routing.capacity_factor=0.8"},
                  3},
        CheckCase{"EtrAuto", {"routing.policy=etr", "routing.etr_tau=0.8", "routing.etr_switch_decay=0"}, 4},
        CheckCase{"RankWithoutExperts", {"placement.slots_per_rank=[4,0,2]"}, 3},
        CheckCase{"Chain",
                  {"model.chain_iterations=2", "model.chain_residual=inner", "model.shared_ffn=10",
                   "routing.policy=softmax_topk", "routing.renormalize=false", "routing.aux_loss=0.01",
                   "topology.nodes=2", "schedule.chain_chunks=3"},
                  4},
        CheckCase{"ChainOfRelu",
                  {"model.chain_iterations=3", "model.chain_residual=outer", "model.copy_experts=1",
                   "routing.relu_lambda0=0.1", "schedule.chain_chunks=2"},
                  2},
        CheckCase{"ChainSharedGate",
                  {"model.chain_iterations=2", "model.chain_shared_gate=true", "routing.policy=sigmoid_topk",
                   "runtime.save=rows", "schedule.chain_chunks=2"},
                  3},
        CheckCase{"ChainBf16",
                  {"model.chain_iterations=2", "model.chain_residual=inner", "model.shared_ffn=8",
                   "model.dtype=bf16", "schedule.chain_chunks=2"},
                  2},
        CheckCase{"Gelu", {"model.activation=gelu"}, 2},
        CheckCase{"ReluExperts", {"model.activation=relu"}, 2},
        CheckCase{"Clipped", {"train.grad_clip=0.05"}, 2}, CheckCase{"Bf16", {"model.dtype=bf16"}, 4},
        CheckCase{"Bf16Wire", {"comm.wire_dtype=bf16"}, 4}),
    [](const auto& info) { return info.param.name; });

// Quotas of each rank are not those of all: with a capacity that binds, several ranks are not one.
TEST(TrainCheckFails, WhenQuotasAreLocal) {
  const LoadedConfig loaded =
      tiny_config({"routing.policy=etr", "routing.etr_tau=0.8", "routing.etr_quota=local",
                   "routing.etr_choice=both", "routing.capacity_factor=0.5"});
  const train::Text text = word_text(6000);
  run_job(loaded, 4, [&](Runtime& runtime) { EXPECT_THROW(train::check(runtime, loaded, text), Error); });
}

// The official variant of ReLU routing takes load factors from a rank's own tokens, so with a strong L1 term several
// ranks are not one rank: the check must see that, on all ranks.
TEST(TrainCheckFails, WhenTheModelIsAnother) {
  const LoadedConfig loaded = tiny_config({"routing.relu_variant=official", "routing.relu_lambda0=1"});
  const train::Text text = word_text(6000);
  std::vector<std::string> messages(3);
  run_job(loaded, 3, [&](Runtime& runtime) {
    try {
      train::check(runtime, loaded, text);
    } catch (const Error& error) {
      messages[runtime.rank().index()] = error.message();
    }
  });
  for (const std::string& message : messages) {
    EXPECT_NE(message.find("gradient differs by"), std::string::npos) << message;
    EXPECT_EQ(message, messages[0]);
  }
}

}  // namespace
}  // namespace sluice::testing
