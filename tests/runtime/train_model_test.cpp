// The model's gradients against finite differences, and the same training over world sizes, schedules and threads.
#include "sluice/base/hash.hpp"
#include "train_harness.hpp"

namespace sluice::testing {
namespace {

using train::Model;
using train::Parameter;
using train::ParameterShape;

std::vector<ParameterShape> all_shapes(const Config& config) {
  const Config::Model& model = config.model;
  std::vector<ParameterShape> out = train::replicated_shapes(config);
  for (std::int32_t l = 0; l < model.num_layers; ++l)
    for (std::int32_t e = 0; e < model.num_ffn_experts(); ++e)
      for (const ParameterShape& shape : train::expert_shapes(model, l, e)) out.push_back(shape);
  return out;
}

// -1 or 1, a function of name, trial and place.
float sign_of(const std::string& name, int trial, std::size_t i) {
  return Hasher().add_text(name).add_int(trial).add(i).value() & 1 ? 1.0f : -1.0f;
}

// Every parameter is moved along random signs; the loss must change as its gradient says. The step is small because of
// the kinks of ReLU routing; the constant is what f32 rounding leaves of it.
void check_gradients(const LoadedConfig& loaded, std::int32_t num_ranks, double tolerance) {
  const train::Text text = word_text(4000);
  run_job(loaded, num_ranks, [&](Runtime& runtime) {
    const train::TextSplit split(static_cast<std::int64_t>(text.bytes.size()), loaded.config.model.context,
                                 0.1);
    train::BatchReader reader(text, split, loaded.config, runtime.rank(), num_ranks);
    const train::Batch batch = reader.train(1);
    Model model(runtime, loaded.config);
    const auto loss = [&] {
      const train::StepResult result = model.compute_gradients(batch);
      return result.loss + result.auxiliary;
    };
    // The norm is that of the gradients below.
    const double norm = model.compute_gradients(batch).grad_norm;
    std::map<std::string, std::vector<float>> gradients;
    for (const Parameter& p : model.parameters())
      gradients[p.shape.name].assign(p.gradient.begin(), p.gradient.end());
    double squares = 0;
    for (const ParameterShape& shape : all_shapes(loaded.config)) {
      const Parameter* mine = nullptr;
      for (const Parameter& p : model.parameters())
        if (p.shape.name == shape.name) mine = &p;
      double size = 0;
      for (int trial = 0; trial < 3; ++trial) {
        double told[2] = {0, 0};
        if (mine && (shape.expert >= 0 ? mine->owned : runtime.rank() == RankId(0))) {
          const std::vector<float>& g = gradients[shape.name];
          for (std::size_t i = 0; i < g.size(); ++i) {
            told[0] += g[i] * sign_of(shape.name, trial, i);
            told[1] += double(g[i]) * g[i];
          }
        }
        runtime.all_reduce_sum(std::span<double>(told));
        size = std::sqrt(told[1]);
        constexpr float kStep = 4e-4f;
        double at[2];
        for (const int side : {0, 1}) {
          std::vector<float> before;
          if (mine) {
            before.assign(mine->value.begin(), mine->value.end());
            for (std::size_t i = 0; i < before.size(); ++i)
              mine->value[i] += (side == 0 ? -kStep : kStep) * sign_of(shape.name, trial, i);
          }
          at[side] = loss();
          if (mine) std::copy(before.begin(), before.end(), mine->value.begin());
        }
        const double slope = (at[1] - at[0]) / (2 * double(kStep));
        if (runtime.rank() == RankId(0)) {
          EXPECT_TRUE(std::abs(slope - told[0]) <= tolerance * size + 3e-4)
              << shape.name << " trial " << trial << ": loss changes by " << slope << ", the gradient says "
              << told[0] << " (norm " << size << ")";
        }
      }
      squares += size * size;
    }
    if (runtime.rank() == RankId(0)) {
      EXPECT_NEAR(norm, std::sqrt(squares), 1e-6 * norm);
    }
  });
}

struct GradientCase {
  std::string name;
  std::vector<std::string> sets;
  std::int32_t num_ranks;
};
class Gradients : public ::testing::TestWithParam<GradientCase> {};

TEST_P(Gradients, AreThoseOfTheLoss) {
  check_gradients(tiny_config(GetParam().sets), GetParam().num_ranks, 2e-2);
}

// The load factors of ReLU's L1 term and of the balancing loss are constants of the gradient: they are off, or all
// experts are chosen.
const std::vector<std::string> kRelu = {"routing.relu_load_balanced=false", "routing.relu_lambda0=0.05"};
const std::vector<std::string> kAllChosen = {"routing.policy=softmax_topk", "routing.top_k=6",
                                             "routing.z_loss=0.01", "routing.aux_loss=0.01"};
std::vector<std::string> with(std::vector<std::string> sets, const std::vector<std::string>& more) {
  sets.insert(sets.end(), more.begin(), more.end());
  return sets;
}
INSTANTIATE_TEST_SUITE_P(
    Train, Gradients,
    ::testing::Values(
        GradientCase{"Relu1", kRelu, 1}, GradientCase{"Relu4", kRelu, 4},
        GradientCase{"Relu4Nodes",
                     with(kRelu, {"topology.nodes=2", "schedule.policy=pipelined", "schedule.num_chunks=3"}),
                     4},
        GradientCase{"Softmax4", kAllChosen, 4},
        GradientCase{"Sigmoid2", {"routing.policy=sigmoid_topk", "routing.top_k=6"}, 2},
        GradientCase{"ZeroAndCopyExperts", with(kRelu, {"model.zero_experts=1", "model.copy_experts=2"}), 4},
        GradientCase{"ConstantExperts",
                     with(kRelu, {"model.zero_experts=1", "model.constant_experts=2",
                                  "model.gate_residual=true", "schedule.policy=pipelined"}),
                     3},
        GradientCase{
            "MoeppAllChosen",
            {"routing.policy=moepp", "routing.top_k=6", "routing.capacity_factor=0", "model.copy_experts=1",
             "model.constant_experts=1", "model.gate_residual=true", "routing.aux_loss=0.05"},
            2},
        GradientCase{"Gelu", with(kRelu, {"model.activation=gelu", "runtime.save=rows"}), 2},
        GradientCase{"ChainOfRelu",
                     with(kRelu, {"model.chain_iterations=2", "model.chain_residual=inner",
                                  "model.shared_ffn=6", "topology.nodes=2", "schedule.chain_chunks=3"}),
                     4},
        GradientCase{"ChainOfSoftmax",
                     with(kAllChosen, {"model.chain_iterations=3", "model.chain_residual=outer",
                                       "model.chain_shared_gate=true", "schedule.chain_chunks=2"}),
                     2},
        GradientCase{"MoreRanksThanTokens", with(kRelu, {"train.tokens_per_step=3"}), 4}),
    [](const auto& info) { return info.param.name; });

TEST(TrainWorld, SizesAgree) {
  const train::Text text = word_text(20000);
  for (const std::string policy : {"relu", "softmax_topk", "sigmoid_topk"}) {
    const LoadedConfig loaded = tiny_config({"routing.policy=" + policy});
    const train::TrainReport one = run_train(loaded, 1, text);
    for (const std::int32_t num_ranks : {2, 4}) {
      const train::TrainReport many = run_train(loaded, num_ranks, text);
      ASSERT_EQ(many.losses.size(), one.losses.size());
      for (std::size_t i = 0; i < one.losses.size(); ++i)
        EXPECT_TRUE(std::abs(many.losses[i] - one.losses[i]) <= 2e-5 * one.losses[i])
            << policy << ", " << num_ranks << " ranks, step " << i + 1 << ": " << many.losses[i] << " and "
            << one.losses[i];
      EXPECT_NEAR(many.heldout_bpb, one.heldout_bpb, 1e-3);
    }
  }
}

TEST(TrainWorld, SchedulesAndThreadsGiveTheSameBits) {
  const train::Text text = word_text(20000);
  for (const std::string dtype : {"f32", "bf16"}) {
    const std::vector<std::string> base = {"topology.nodes=2", "model.dtype=" + dtype,
                                           "model.copy_experts=1"};
    const train::TrainReport want = run_train(tiny_config(base), 4, text);
    for (const std::vector<std::string>& sets :
         std::vector<std::vector<std::string>>{{"schedule.policy=pipelined", "schedule.num_chunks=2"},
                                               {"schedule.policy=pipelined", "schedule.num_chunks=5"},
                                               {"schedule.exchange=direct"},
                                               {"runtime.threads_per_rank=2"},
                                               {"runtime.save=rows"}}) {
      const train::TrainReport got = run_train(tiny_config(with(base, sets)), 4, text);
      EXPECT_EQ(got.losses, want.losses) << dtype << " " << sets[0];
      EXPECT_EQ(got.grad_norms, want.grad_norms) << dtype << " " << sets[0];
      EXPECT_EQ(got.heldout_bpb, want.heldout_bpb) << dtype << " " << sets[0];
    }
    EXPECT_EQ(run_train(tiny_config(base), 4, text).losses, want.losses) << dtype << ", run again";
    EXPECT_NE(run_train(tiny_config(with(base, {"train.seed=8"})), 4, text).losses, want.losses)
        << "another seed";
  }
}

TEST(TrainWorld, ChainsGiveTheSameBitsOverChunksAndSchedules) {
  const train::Text text = word_text(20000);
  for (const std::string policy : {"relu", "softmax_topk", "sigmoid_topk"}) {
    const std::vector<std::string> base = {"topology.nodes=2", "model.chain_iterations=2",
                                           "model.chain_residual=inner", "model.shared_ffn=10",
                                           "routing.policy=" + policy};
    const train::TrainReport want = run_train(tiny_config(base), 4, text);
    for (const std::vector<std::string>& sets : std::vector<std::vector<std::string>>{
             {"schedule.chain_chunks=2"},
             {"schedule.chain_chunks=5", "runtime.save=rows"},
             {"schedule.chain_chunks=3", "schedule.policy=by-source", "runtime.threads_per_rank=2"}}) {
      const train::TrainReport got = run_train(tiny_config(with(base, sets)), 4, text);
      EXPECT_EQ(got.losses, want.losses) << policy << " " << sets[0];
      EXPECT_EQ(got.grad_norms, want.grad_norms) << policy << " " << sets[0];
      EXPECT_EQ(got.heldout_bpb, want.heldout_bpb) << policy << " " << sets[0];
    }
    const train::TrainReport one = run_train(tiny_config(with({base.begin() + 1, base.end()}, {})), 1, text);
    for (std::size_t i = 0; i < one.losses.size(); ++i)
      EXPECT_TRUE(std::abs(want.losses[i] - one.losses[i]) <= 2e-5 * one.losses[i])
          << policy << ", step " << i + 1;
    EXPECT_NE(run_train(tiny_config(with(base, {"model.chain_shared_gate=true"})), 4, text).losses,
              want.losses);
  }
}

TEST(TrainWorld, LossFallsOnASmallText) {
  for (const std::string dtype : {"f32", "bf16"}) {
    const LoadedConfig loaded =
        tiny_config({"train.steps=150", "train.tokens_per_step=128", "model.hidden=24", "model.ffn=16",
                     "routing.relu_alpha=1.1", "model.dtype=" + dtype});
    const train::TrainReport report = run_train(loaded, 2, word_text(30000));
    EXPECT_NEAR(report.losses.front(), std::log(256.0), 0.3);
    EXPECT_LT(report.losses.back(), 1.0) << dtype;
    EXPECT_LT(report.heldout_bpb, report.baselines.order0_bpb * 0.5) << dtype;
    EXPECT_LT(report.active_mean.back(), report.active_mean.front()) << "ReLU routing became sparser";
  }
}

TEST(TrainWorld, DivergenceIsNamedWithItsStepOnAllRanks) {
  const LoadedConfig loaded =
      tiny_config({"train.learning_rate=10", "train.grad_clip=0", "train.warmup_steps=0",
                   "train.weight_decay=10", "train.steps=200"});
  const train::Text text = word_text(20000);
  std::vector<std::string> messages(3);
  run_job(loaded, 3, [&](Runtime& runtime) {
    try {
      train::train(runtime, loaded, text, {.progress = false});
    } catch (const Error& error) {
      messages[runtime.rank().index()] = error.message();
    }
  });
  for (const std::string& message : messages) {
    EXPECT_EQ(message.rfind("training diverged: in step ", 0), 0u) << message;
    EXPECT_EQ(message, messages[0]);
  }
}

}  // namespace
}  // namespace sluice::testing
