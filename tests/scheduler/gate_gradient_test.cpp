// The numbers of each policy: published or independently computed examples, and gradients against central
// differences of a separate double-precision model of the loss.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

#include "expect_error.hpp"
#include "selection_harness.hpp"
#include "sluice/scheduler/selection/factory.hpp"
#include "sluice/scheduler/selection/relu.hpp"
#include "sluice/scheduler/selection/sigmoid_top_k.hpp"
#include "sluice/scheduler/selection/softmax_top_k.hpp"

namespace sluice {
namespace {

using Doubles = std::vector<double>;
using Tokens = std::vector<std::int64_t>;

void expect_near(const std::vector<float>& actual, const Doubles& expected, double tolerance,
                 const std::string& what = "") {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (std::size_t i = 0; i < actual.size(); ++i)
    EXPECT_TRUE(std::abs(static_cast<double>(actual[i]) - expected[i]) <=
                tolerance * std::max(1.0, std::abs(expected[i])))
        << what << " entry " << i << ": " << actual[i] << ", expected " << expected[i];
}

void expect_near(double actual, double expected, double tolerance, const std::string& what = "") {
  EXPECT_TRUE(std::abs(actual - expected) <= tolerance * std::max(1.0, std::abs(expected)))
      << what << ": " << actual << ", expected " << expected;
}

// ---- a double-precision model, written from the formulas and apart from the code -----------------------------------

struct Model {
  std::int32_t num_experts;
  Tokens tokens_of_rank;
  // Weight of every (token, expert), 0 where not routed; and which are routed.
  std::function<Doubles(const Doubles& row, std::vector<bool>& routed)> gate;
  // Loss of the batch, from all scores, weights and the routing map (flat).
  std::function<double(const Doubles& z, const Doubles& weight, const std::vector<bool>& map)> auxiliary;

  double loss(const Doubles& z, const Doubles& dense) const {
    const auto width = static_cast<std::size_t>(num_experts);
    Doubles weight;
    std::vector<bool> map;
    double main = 0;
    for (std::size_t t = 0; t * width < z.size(); ++t) {
      std::vector<bool> routed(width, false);
      const Doubles row(z.begin() + static_cast<std::ptrdiff_t>(t * width),
                        z.begin() + static_cast<std::ptrdiff_t>((t + 1) * width));
      const Doubles w = gate(row, routed);
      for (std::size_t e = 0; e < width; ++e) main += dense[t * width + e] * w[e];
      weight.insert(weight.end(), w.begin(), w.end());
      map.insert(map.end(), routed.begin(), routed.end());
    }
    return main + auxiliary(z, weight, map);
  }

  Doubles gradient(Doubles z, const Doubles& dense) const {
    Doubles out;
    for (double& value : z) {
      const double at = value;
      constexpr double kStep = 1e-5;
      value = at + kStep;
      const double up = loss(z, dense);
      value = at - kStep;
      const double down = loss(z, dense);
      value = at;
      out.push_back((up - down) / (2 * kStep));
    }
    return out;
  }
};

Doubles softmax(const Doubles& z) {
  Doubles out;
  double sum = 0;
  for (const double v : z) sum += std::exp(v);
  for (const double v : z) out.push_back(std::exp(v) / sum);
  return out;
}

std::vector<bool> best(const Doubles& key, std::int32_t k) {
  std::vector<std::size_t> order(key.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return key[a] > key[b]; });
  std::vector<bool> out(key.size(), false);
  for (std::int32_t i = 0; i < k; ++i) out[order[static_cast<std::size_t>(i)]] = true;
  return out;
}

Model relu_model(const ReluOptions& o, double lambda, std::int32_t num_experts,
                 const Tokens& tokens_of_rank) {
  Model m{num_experts, tokens_of_rank, {}, {}};
  m.gate = [](const Doubles& row, std::vector<bool>& routed) {
    Doubles w;
    for (std::size_t e = 0; e < row.size(); ++e) {
      routed[e] = row[e] > 0;
      w.push_back(std::max(row[e], 0.0));
    }
    return w;
  };
  m.auxiliary = [=](const Doubles&, const Doubles& w, const std::vector<bool>& map) {
    const auto width = static_cast<std::size_t>(num_experts);
    const std::size_t total = w.size() / width;
    const bool official = o.variant == ReluVariant::kOfficial;
    // Groups of tokens over which f is counted.
    const Tokens groups = official ? tokens_of_rank : Tokens{static_cast<std::int64_t>(total)};
    double sum = 0;
    std::size_t begin = 0;
    for (const std::int64_t n : groups) {
      const std::size_t end = begin + static_cast<std::size_t>(n);
      for (std::size_t e = 0; e < width; ++e) {
        double count = 0, weights = 0;
        for (std::size_t t = begin; t < end; ++t) {
          count += map[t * width + e] ? 1 : 0;
          weights += w[t * width + e];
        }
        sum += (o.load_balanced && n > 0 ? num_experts * count / (o.top_k * static_cast<double>(n)) : 1) *
               weights;
      }
      begin = end;
    }
    return lambda * sum / static_cast<double>(total) / (official ? 1 : o.num_layers);
  };
  return m;
}

Model softmax_model(const SoftmaxTopKOptions& o, std::int32_t num_experts, const Tokens& tokens_of_rank) {
  Model m{num_experts, tokens_of_rank, {}, {}};
  m.gate = [=](const Doubles& row, std::vector<bool>& routed) {
    routed = best(row, o.top_k);
    const Doubles p = softmax(row);
    double sum = 0;
    for (std::size_t e = 0; e < row.size(); ++e) sum += routed[e] ? p[e] : 0;
    const bool renormalize = o.renormalize || o.order == SoftmaxOrder::kPost;
    Doubles w;
    for (std::size_t e = 0; e < row.size(); ++e)
      w.push_back(routed[e] ? o.route_scale * p[e] / (renormalize ? sum : 1) : 0);
    return w;
  };
  m.auxiliary = [=](const Doubles& z, const Doubles&, const std::vector<bool>& map) {
    const auto width = static_cast<std::size_t>(num_experts);
    const std::size_t total = z.size() / width;
    Doubles count(width, 0), sum(width, 0);
    double squares = 0;
    for (std::size_t t = 0; t < total; ++t) {
      const Doubles row(z.begin() + static_cast<std::ptrdiff_t>(t * width),
                        z.begin() + static_cast<std::ptrdiff_t>((t + 1) * width));
      const Doubles p = softmax(row);
      double exps = 0;
      for (std::size_t e = 0; e < width; ++e) {
        count[e] += map[t * width + e] ? 1 : 0;
        sum[e] += p[e];
        exps += std::exp(row[e]);
      }
      squares += std::log(exps) * std::log(exps);
    }
    const auto n = static_cast<double>(total);
    double out = 0;
    for (std::size_t e = 0; e < width; ++e) out += count[e] * sum[e];
    return out * o.aux_loss * num_experts / (o.top_k * n * n) + o.z_loss * squares / n;
  };
  return m;
}

Model sigmoid_model(const SigmoidTopKOptions& o, const Doubles& bias, std::int32_t num_experts,
                    const Tokens& tokens_of_rank) {
  Model m{num_experts, tokens_of_rank, {}, {}};
  m.gate = [=](const Doubles& row, std::vector<bool>& routed) {
    Doubles s, key;
    for (std::size_t e = 0; e < row.size(); ++e) {
      s.push_back(1 / (1 + std::exp(-row[e])));
      key.push_back(s[e] + (bias.empty() ? 0 : bias[e]));
    }
    routed = best(key, o.top_k);
    double sum = 0;
    for (std::size_t e = 0; e < row.size(); ++e) sum += routed[e] ? s[e] : 0;
    Doubles w;
    for (std::size_t e = 0; e < row.size(); ++e)
      w.push_back(routed[e] ? o.route_scale * s[e] / (o.renormalize ? sum : 1) : 0);
    return w;
  };
  m.auxiliary = [](const Doubles&, const Doubles&, const std::vector<bool>&) { return 0.0; };
  return m;
}

// Weights, loss and gradient of the policy against the model, over random batches.
void compare(const SelectionPolicy& policy, const Model& model, const AdaptiveState& adaptive,
             unsigned seed) {
  std::mt19937 gen(seed);
  const auto width = static_cast<std::size_t>(model.num_experts);
  const auto total = static_cast<std::size_t>(
      std::accumulate(model.tokens_of_rank.begin(), model.tokens_of_rank.end(), std::int64_t{0}));
  for (int round = 0; round < 5; ++round) {
    const std::string what = str("seed ", seed, " round ", round);
    const std::vector<float> logits = random_logits(gen, total * width);
    const std::vector<float> dense = random_logits(gen, total * width);
    const Doubles z(logits.begin(), logits.end());
    const Doubles a(dense.begin(), dense.end());
    auto ranks = run_policy(policy, logits, model.num_experts, model.tokens_of_rank, adaptive, true);
    backward_of(policy, dense, adaptive, ranks);
    double main = 0;
    std::size_t t = 0;
    for (const RankBatch& rank : ranks) {
      const Routing& routing = rank.state.routing;
      for (std::size_t i = 0; i + 1 < routing.row_ptr.size(); ++i, ++t) {
        std::vector<bool> routed(width, false);
        const Doubles w = model.gate(Doubles(z.begin() + static_cast<std::ptrdiff_t>(t * width),
                                             z.begin() + static_cast<std::ptrdiff_t>((t + 1) * width)),
                                     routed);
        std::vector<float> got(width, 0);
        std::vector<bool> got_routed(width, false);
        for (auto j = static_cast<std::size_t>(routing.row_ptr[i]);
             j < static_cast<std::size_t>(routing.row_ptr[i + 1]); ++j) {
          const auto e = static_cast<std::size_t>(routing.expert[j]);
          got[e] = routing.weight[j];
          got_routed[e] = true;
          main += static_cast<double>(routing.weight[j]) * a[t * width + e];
        }
        EXPECT_EQ(got_routed, routed) << what;
        expect_near(got, w, 3e-7, what);
      }
    }
    expect_near(main + total_loss(ranks), model.loss(z, a), 1e-6, what);
    expect_near(concatenated_dlogits(ranks), model.gradient(z, a), 2e-6, what);
  }
}

const std::vector<Tokens>& spreads() {
  static const std::vector<Tokens> all = {{7}, {3, 0, 4}, {1, 5}};
  return all;
}

TEST(Gradient, Relu) {
  for (const Tokens& spread : spreads())
    for (const bool balanced : {true, false})
      for (const ReluVariant variant : {ReluVariant::kPaper, ReluVariant::kOfficial}) {
        const ReluOptions o{.top_k = 2, .num_layers = 3, .load_balanced = balanced, .variant = variant};
        // A large lambda, so that the loss counts beside the task.
        compare(ReluPolicy(o), relu_model(o, 5, 5, spread), {{5}}, 31);
      }
}

TEST(Gradient, SoftmaxTopK) {
  for (const Tokens& spread : spreads())
    for (const std::int32_t k : {1, 2, 5})
      for (const bool renormalize : {false, true})
        for (const SoftmaxOrder order : {SoftmaxOrder::kPre, SoftmaxOrder::kPost}) {
          if (k == 1 && (renormalize || order == SoftmaxOrder::kPost)) continue;  // refused
          const SoftmaxTopKOptions o{.top_k = k,
                                     .order = order,
                                     .renormalize = renormalize,
                                     .route_scale = 2.5,
                                     .aux_loss = 3,
                                     .z_loss = .7};
          compare(SoftmaxTopKPolicy(o), softmax_model(o, 5, spread), {}, 32);
        }
}

TEST(Gradient, SigmoidTopK) {
  for (const Tokens& spread : spreads())
    for (const std::int32_t k : {1, 2, 5})
      for (const bool renormalize : {false, true})
        for (const Doubles& bias : {Doubles{}, Doubles{.3, 0, -.2, .1, -.4}}) {
          if (k == 1 && renormalize) continue;  // refused
          const SigmoidTopKOptions o{.top_k = k, .renormalize = renormalize, .route_scale = 2.5};
          compare(SigmoidTopKPolicy(o), sigmoid_model(o, bias, 5, spread), {bias}, 33);
        }
}

// ---- examples -------------------------------------------------------------------------------------------------------

const std::vector<float> kReluLogits = {.6f,  -.2f, .1f,  -1,   .4f, -.5f, -.1f, -.3f,
                                        -.3f, -.1f, -.2f, -.4f, .2f, .5f,  .3f,  .8f};

TEST(ReluExample, RoutingLossAndGradient) {
  const ReluPolicy policy({.top_k = 1, .num_layers = 1});
  const AdaptiveState adaptive{{1e-2}};
  auto ranks = run_policy(policy, kReluLogits, 4, {4}, adaptive, true);
  const PolicyState& state = ranks[0].state;
  EXPECT_EQ(state.routing.row_ptr, (std::vector<std::int64_t>{0, 2, 3, 3, 7}));
  EXPECT_EQ(state.routing.expert, (std::vector<std::int32_t>{0, 2, 0, 0, 1, 2, 3}));
  EXPECT_EQ(state.routing.weight, (std::vector<float>{.6f, .1f, .4f, .2f, .5f, .3f, .8f}));
  EXPECT_EQ(state.statistics.tokens_of_expert, (std::vector<std::int64_t>{3, 1, 2, 1}));
  EXPECT_EQ(state.statistics.tokens_with_active, (std::vector<std::int64_t>{1, 1, 1, 0, 1}));
  EXPECT_EQ(state.statistics.min_active, 0);
  EXPECT_EQ(state.statistics.max_active, 4);
  EXPECT_DOUBLE_EQ(1 - state.statistics.mean_active() / 4, .5625);
  expect_near(state.auxiliary_loss / 1e-2, 1.425, 1e-7);
  backward_of(policy, std::vector<float>(16, 0), adaptive, ranks);
  expect_near(ranks[0].dlogits, {.0075, 0, .005, 0, .0075, 0, 0, 0, 0, 0, 0, 0, .0075, .0025, .005, .0025},
              1e-9);

  const ReluPolicy plain({.top_k = 1, .load_balanced = false});
  auto plain_ranks = run_policy(plain, kReluLogits, 4, {4}, {{1}}, true);
  expect_near(plain_ranks[0].state.auxiliary_loss, .725, 1e-7);
  // The official loss is L times the paper's at one lambda.
  const ReluPolicy paper({.top_k = 1, .num_layers = 12});
  const ReluPolicy official({.top_k = 1, .num_layers = 12, .variant = ReluVariant::kOfficial});
  expect_near(total_loss(run_policy(paper, kReluLogits, 4, {4}, {{1}}, true)), 1.425 / 12, 1e-8);
  expect_near(total_loss(run_policy(official, kReluLogits, 4, {4}, {{1}}, true)), 1.425, 1e-7);

  AdaptiveState next{{1e-2}};
  const PolicyState* batch = &state;
  policy.adapt({&batch, 1}, next);
  EXPECT_DOUBLE_EQ(next.values[0], .012);
}

TEST(ReluExample, AllNegativeAndKink) {
  const ReluPolicy policy({.top_k = 1});
  const std::vector<float> logits = {-1, -2, -.5f, 0.0f, -0.0f, -3, 0.0f, 1e-45f, 0.0f};
  const AdaptiveState adaptive{{1}};
  auto ranks = run_policy(policy, logits, 3, {3}, adaptive, true);
  EXPECT_EQ(ranks[0].state.routing.row_ptr, (std::vector<std::int64_t>{0, 0, 0, 1}));
  EXPECT_EQ(ranks[0].state.routing.expert, (std::vector<std::int32_t>{1}));
  backward_of(policy, std::vector<float>(9, 5), adaptive, ranks);
  for (std::size_t i = 0; i < 9; ++i)
    EXPECT_TRUE(i == 7 ? ranks[0].dlogits[i] > 5 : ranks[0].dlogits[i] == 0)
        << i << " " << ranks[0].dlogits[i];
}

// A batch of `tokens` tokens that all take their first `active` experts of 4.
PolicyState batch_of(const ReluPolicy& policy, std::int64_t tokens, std::int32_t active) {
  std::vector<float> logits;
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int32_t e = 0; e < 4; ++e) logits.push_back(e < active ? 1.0f : -1.0f);
  return run_policy(policy, logits, 4, {tokens}, {{1}}, true)[0].state;
}

TEST(ReluLambda, GrowthAndSteps) {
  const ReluPolicy policy({.top_k = 1});
  EXPECT_EQ(policy.adaptive_scope(), AdaptiveScope::kShared);
  const PolicyState dense = batch_of(policy, 2, 4);
  const PolicyState* batch = &dense;
  AdaptiveState state = policy.initial_adaptive_state(4);
  EXPECT_EQ(state.values, (Doubles{1e-8}));
  int above_1e4 = 0, above_1e2 = 0, above_1 = 0;
  for (int i = 1; i <= 110; ++i) {
    policy.adapt({&batch, 1}, state);
    if (above_1e4 == 0 && state.values[0] > 1e-4) above_1e4 = i;
    if (above_1e2 == 0 && state.values[0] > 1e-2) above_1e2 = i;
    if (above_1 == 0 && state.values[0] > 1) above_1 = i;
    if (i == 100) {
      expect_near(state.values[0], .8281797452, 1e-9);
    }
  }
  EXPECT_EQ(above_1e4, 51);
  EXPECT_EQ(above_1e2, 76);
  EXPECT_EQ(above_1, 102);
}

// The sparsity is that of all layers together, and the target met exactly is where the variants part.
TEST(ReluLambda, PoolsLayersAndVariantsDifferAtTheTarget) {
  const ReluPolicy paper({.top_k = 2, .num_layers = 2});
  const ReluPolicy official({.top_k = 2, .num_layers = 2, .variant = ReluVariant::kOfficial});
  const auto adapted = [](const ReluPolicy& policy, std::int32_t a, std::int32_t b) {
    const PolicyState first = batch_of(policy, 5, a);
    const PolicyState second = batch_of(policy, 5, b);
    const PolicyState* batches[] = {&first, &second};
    AdaptiveState state{{1}};
    policy.adapt(batches, state);
    return state.values[0];
  };
  EXPECT_EQ(adapted(paper, 4, 1), 1.2);  // 2.5 active in the mean
  EXPECT_EQ(adapted(paper, 1, 2), 1 / 1.2);
  EXPECT_EQ(adapted(paper, 3, 1), 1);
  EXPECT_EQ(adapted(official, 4, 1), 1.2);
  EXPECT_EQ(adapted(official, 1, 2), 1 / 1.2);
  EXPECT_EQ(adapted(official, 3, 1), 1 / 1.2);
}

TEST(ReluLambda, RefusesWhatItCannotUse) {
  const ReluPolicy policy({.top_k = 1});
  expect_error(ErrorCode::kInvalidState, {"lambda is inf"},
               [&] { run_policy(policy, kReluLogits, 4, {4}, {{HUGE_VAL}}, true); });
  expect_error(ErrorCode::kInvalidArgument, {"0 values"},
               [&] { run_policy(policy, kReluLogits, 4, {4}, {}, true); });
  const auto inference = run_policy(policy, kReluLogits, 4, {4}, {{1}}, false);
  const PolicyState* batch = &inference[0].state;
  AdaptiveState state{{1}};
  expect_error(ErrorCode::kInvalidState, {"adapt()", "training"}, [&] { policy.adapt({&batch, 1}, state); });
}

TEST(GateJacobian, Softmax) {
  const std::vector<float> logits = {1, 2, .5f};
  const std::vector<float> dense = {-.2f, .7f, 99};
  const SoftmaxTopKPolicy plain({.top_k = 2});
  auto ranks = run_policy(plain, logits, 3, {1}, {}, true);
  expect_near(ranks[0].state.routing.weight, {.2312238976, .6285317192}, 1e-7);
  backward_of(plain, dense, {}, ranks);
  expect_near(ranks[0].dlogits, {-.1372839691, .1925020288, -.0552180597}, 1e-7);
  for (const SoftmaxTopKOptions& o : {SoftmaxTopKOptions{.top_k = 2, .renormalize = true},
                                      SoftmaxTopKOptions{.top_k = 2, .order = SoftmaxOrder::kPost}}) {
    const SoftmaxTopKPolicy policy(o);
    ranks = run_policy(policy, logits, 3, {1}, {}, true);
    expect_near(ranks[0].state.routing.weight, {.2689414214, .7310585786}, 1e-7);
    backward_of(policy, dense, {}, ranks);
    expect_near(ranks[0].dlogits, {-.1769507399, .1769507399, 0}, 1e-7);
    EXPECT_EQ(ranks[0].dlogits[2], 0.0f);
  }
}

TEST(SoftmaxLosses, UniformAuxAndZ) {
  const SoftmaxTopKPolicy aux({.top_k = 2, .aux_loss = .01});
  expect_near(total_loss(run_policy(aux, std::vector<float>(7 * 5, .3f), 5, {4, 3}, {}, true)), .01, 1e-9);
  const SoftmaxTopKPolicy z({.top_k = 1, .z_loss = 1});
  expect_near(total_loss(run_policy(z, {1, 2, 3}, 3, {1}, {}, true)), 11.6117784089, 1e-6);
  // Two such tokens on two ranks: the mean stays.
  expect_near(total_loss(run_policy(z, {1, 2, 3, 3, 1, 2}, 3, {1, 1}, {}, true)), 11.6117784089, 1e-6);
}

TEST(SigmoidExample, DeepSeekWeights) {
  const std::vector<float> logits = {2, -1, 1, .9f, 1.5f, -3, .2f, .1f};
  const SigmoidTopKPolicy policy({.top_k = 2, .route_scale = 2.5});
  EXPECT_EQ(policy.initial_adaptive_state(8).values, Doubles(8, 0));
  auto ranks = run_policy(policy, logits, 8, {1}, {}, true);
  EXPECT_EQ(ranks[0].state.routing.expert, (std::vector<std::int32_t>{0, 4}));
  const double s0 = 1 / (1 + std::exp(-2.0)), s4 = 1 / (1 + std::exp(-1.5));
  expect_near(ranks[0].state.routing.weight, {2.5 * s0 / (s0 + s4), 2.5 * s4 / (s0 + s4)}, 1e-7);
  // A bias that leaves experts 0 and 2: the published weights, in which no bias shows.
  ranks = run_policy(policy, logits, 8, {1}, {{-3, -9, -3, -9, -9, -9, -9, -9}}, true);
  EXPECT_EQ(ranks[0].state.routing.expert, (std::vector<std::int32_t>{0, 2}));
  expect_near(ranks[0].state.routing.weight, {1.3661227578, 1.1338772421}, 1e-7);
}

TEST(SigmoidExample, SaturationAndUnderflow) {
  const SigmoidTopKPolicy policy({.top_k = 2});
  // s is 1 to the last bit for all of the first token; z still decides. The second token's s all underflow.
  const std::vector<float> logits = {50, 60, 55, 60, -2000, -1000, -1001, -3000};
  for (const AdaptiveState& adaptive : {AdaptiveState{}, AdaptiveState{{.5, .5, .5, .5}}}) {
    auto ranks = run_policy(policy, logits, 4, {2}, adaptive, true);
    EXPECT_EQ(ranks[0].state.routing.expert, (std::vector<std::int32_t>{1, 3, 1, 2}));
    const double q = 1 / (1 + std::exp(-1.0));
    expect_near(ranks[0].state.routing.weight, {.5, .5, q, 1 - q}, 1e-7);
  }
}

TEST(SigmoidBias, RefusesWhatItCannotUse) {
  const SigmoidTopKPolicy policy({.top_k = 2});
  expect_error(ErrorCode::kInvalidArgument, {"3 values", "4 experts"}, [&] {
    run_policy(policy, kReluLogits, 4, {4}, {{0, 0, 0}}, false);
  });
  expect_error(ErrorCode::kInvalidState, {"bias of expert 1", "nan"}, [&] {
    run_policy(policy, kReluLogits, 4, {4}, {{0, std::nan(""), 0, 0}}, false);
  });
}

}  // namespace
}  // namespace sluice
