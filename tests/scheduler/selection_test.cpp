// What every policy must do, and the factory. The numbers of each policy are in gate_gradient_test.cpp.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "expect_error.hpp"
#include "selection_harness.hpp"
#include "sluice/scheduler/selection/factory.hpp"

namespace sluice {
namespace {

using Tokens = std::vector<std::int64_t>;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Named {
  const char* name;
  PolicyOptions options;
};

PolicyOptions with(std::string name, std::int32_t top_k) {
  PolicyOptions o;
  o.name = std::move(name);
  o.top_k = top_k;
  o.num_layers = 3;
  o.relu_lambda0 = .25;
  o.renormalize = false;
  o.route_scale = 2.5;
  if (o.name == "softmax_topk") {
    o.aux_loss = .5;
    o.z_loss = .25;
  }
  return o;
}

std::vector<Named> all_policies() {
  std::vector<Named> out;
  out.push_back({"relu", with("relu", 2)});
  out.push_back({"relu_official", with("relu", 2)});
  out.back().options.relu_variant = "official";
  out.push_back({"relu_plain", with("relu", 2)});
  out.back().options.relu_load_balanced = false;
  out.push_back({"softmax_pre", with("softmax_topk", 2)});
  out.push_back({"softmax_pre_renormalized", with("softmax_topk", 2)});
  out.back().options.renormalize = true;
  out.push_back({"softmax_post", with("softmax_topk", 2)});
  out.back().options.pre_softmax = false;
  out.push_back({"sigmoid", with("sigmoid_topk", 2)});
  out.back().options.renormalize = true;
  out.push_back({"sigmoid_raw", with("sigmoid_topk", 2)});
  return out;
}

class EveryPolicy : public testing::TestWithParam<Named> {
 protected:
  std::unique_ptr<SelectionPolicy> make() const { return make_policy(GetParam().options); }
};
INSTANTIATE_TEST_SUITE_P(Selection, EveryPolicy, testing::ValuesIn(all_policies()),
                         [](const auto& info) { return std::string(info.param.name); });

// Routing, gradients and statistics do not depend on how tokens are spread over ranks.
TEST_P(EveryPolicy, SpreadOverRanksDoesNotMatter) {
  const unsigned seed = 21;
  std::mt19937 gen(seed);
  constexpr std::int32_t kExperts = 6;
  const auto policy = make();
  const std::vector<float> logits = random_logits(gen, 40 * kExperts);
  const std::vector<float> dense = random_logits(gen, logits.size());
  const AdaptiveState adaptive = policy->initial_adaptive_state(kExperts);
  auto one = run_policy(*policy, logits, kExperts, {40}, adaptive, true);
  backward_of(*policy, dense, adaptive, one);
  validate(one[0].state.routing);
  for (const Tokens& spread :
       {Tokens{20, 20}, Tokens{0, 40}, Tokens{7, 0, 32, 1}, Tokens{5, 5, 5, 5, 5, 5, 5, 5}}) {
    auto many = run_policy(*policy, logits, kExperts, spread, adaptive, true);
    backward_of(*policy, dense, adaptive, many);
    std::vector<std::int32_t> expert;
    std::vector<float> weight;
    for (const RankBatch& rank : many) {
      validate(rank.state.routing);
      expert.insert(expert.end(), rank.state.routing.expert.begin(), rank.state.routing.expert.end());
      weight.insert(weight.end(), rank.state.routing.weight.begin(), rank.state.routing.weight.end());
      const BatchStatistics& a = rank.state.statistics;
      const BatchStatistics& b = one[0].state.statistics;
      EXPECT_EQ(a.num_tokens, 40);
      EXPECT_EQ(a.num_routes, b.num_routes);
      EXPECT_EQ(a.min_active, b.min_active);
      EXPECT_EQ(a.max_active, b.max_active);
      EXPECT_EQ(a.tokens_of_expert, b.tokens_of_expert);
      EXPECT_EQ(a.tokens_with_active, b.tokens_with_active);
    }
    EXPECT_EQ(expert, one[0].state.routing.expert);
    EXPECT_EQ(weight, one[0].state.routing.weight);
    if (std::string_view(GetParam().name) == "relu_official") continue;  // its f_e is a rank's own
    EXPECT_EQ(concatenated_dlogits(many), concatenated_dlogits(one)) << "seed " << seed;
    EXPECT_TRUE(std::abs(total_loss(many) - total_loss(one)) <= 1e-12 * std::abs(total_loss(one)))
        << total_loss(many) << " against " << total_loss(one);
  }
}

TEST_P(EveryPolicy, StatisticsCountTheRouting) {
  std::mt19937 gen(4);
  const auto policy = make();
  const std::vector<float> logits = random_logits(gen, 33 * 5);
  for (const bool training : {false, true}) {
    auto ranks = run_policy(*policy, logits, 5, {33}, policy->initial_adaptive_state(5), training);
    const Routing& routing = ranks[0].state.routing;
    const BatchStatistics& s = ranks[0].state.statistics;
    EXPECT_EQ(s.num_tokens, 33);
    EXPECT_EQ(s.num_routes, routing.num_routes());
    EXPECT_EQ(s.tokens_of_expert, expert_counts(routing));
    std::int32_t least = 99, most = 0;
    for (std::size_t t = 0; t < 33; ++t) {
      const auto k = static_cast<std::int32_t>(routing.row_ptr[t + 1] - routing.row_ptr[t]);
      least = std::min(least, k);
      most = std::max(most, k);
    }
    EXPECT_EQ(s.min_active, least);
    EXPECT_EQ(s.max_active, most);
    EXPECT_DOUBLE_EQ(s.mean_active(), static_cast<double>(routing.num_routes()) / 33);
    EXPECT_EQ(std::accumulate(s.tokens_with_active.begin(), s.tokens_with_active.end(), std::int64_t{0}), 33);
  }
}

TEST_P(EveryPolicy, NoTokensAnywhere) {
  const auto policy = make();
  const AdaptiveState adaptive = policy->initial_adaptive_state(4);
  for (const bool training : {false, true}) {
    auto ranks = run_policy(*policy, {}, 4, {0, 0}, adaptive, training);
    for (const RankBatch& rank : ranks) {
      validate(rank.state.routing);
      EXPECT_EQ(rank.state.routing.num_tokens(), 0);
      EXPECT_EQ(rank.state.auxiliary_loss, 0);
      EXPECT_EQ(rank.state.statistics.min_active, 0);
      EXPECT_EQ(rank.state.statistics.max_active, 0);
    }
    if (training) backward_of(*policy, {}, adaptive, ranks);
    AdaptiveState next = adaptive;
    const PolicyState* batch = &ranks[0].state;
    if (training) policy->adapt({&batch, 1}, next);
    EXPECT_EQ(next.values, adaptive.values);
  }
}

TEST_P(EveryPolicy, AsManyChoicesAsExperts) {
  const auto policy = make();
  const std::vector<float> logits = {.5f, 1, 2, .25f};
  auto ranks = run_policy(*policy, logits, 2, {2}, policy->initial_adaptive_state(2), true);
  EXPECT_EQ(ranks[0].state.routing.expert, (std::vector<std::int32_t>{0, 1, 0, 1}));
}

TEST_P(EveryPolicy, MoreChoicesThanExpertsAreRefused) {
  const auto policy = make();
  const std::vector<float> logits = {.5f};
  expect_error(ErrorCode::kInvalidConfig, {"top_k is 2", "experts, 1"},
               [&] { run_policy(*policy, logits, 1, {1}, {{1}}, false); });
  expect_error(ErrorCode::kInvalidConfig, {"top_k is 2", "experts, 1"},
               [&] { policy->initial_adaptive_state(1); });
}

TEST_P(EveryPolicy, NonFiniteScoresAreRefusedByName) {
  const auto policy = make();
  for (const float bad : {kNaN, HUGE_VALF, -HUGE_VALF}) {
    std::vector<float> logits(12, .5f);
    logits[2 * 4 + 3] = bad;
    expect_error(ErrorCode::kInvalidRouting, {"token 2", "expert 3", bad != bad ? "nan" : "inf"},
                 [&] { run_policy(*policy, logits, 4, {3}, policy->initial_adaptive_state(4), false); });
  }
}

// Scores at the end of the float range still give finite weights and gradients.
TEST_P(EveryPolicy, ExtremeScores) {
  const auto policy = make();
  const float huge = 1e30f;
  const std::vector<float> logits = {huge, -huge, -1, -huge, -huge, -huge, 200, 100, 0, -300, -200, -250};
  const std::vector<float> dense(logits.size(), 1.5f);
  const AdaptiveState adaptive = policy->initial_adaptive_state(3);
  auto ranks = run_policy(*policy, logits, 3, {4}, adaptive, true);
  validate(ranks[0].state.routing);
  backward_of(*policy, dense, adaptive, ranks);
  for (const float d : ranks[0].dlogits) EXPECT_TRUE(std::isfinite(d));
}

TEST_P(EveryPolicy, NoExchangeOutsideTraining) {
  const auto policy = make();
  const std::vector<float> logits = {.5f, -1, 2, .25f};
  PolicyState state;
  EXPECT_TRUE(policy->step({logits, 2, 2}, policy->initial_adaptive_state(2), false, state));
  EXPECT_EQ(state.exchange, ExchangeKind::kNone);
  EXPECT_TRUE(state.routing_ready);
}

// The routing of a training batch is ready before its exchange, and stays.
TEST_P(EveryPolicy, RoutingIsReadyBeforeTheExchange) {
  const auto policy = make();
  const std::vector<float> logits = {.5f, -1, 2, .25f};
  const Scores scores{logits, 2, 2};
  const AdaptiveState adaptive = policy->initial_adaptive_state(2);
  PolicyState state;
  ASSERT_FALSE(policy->step(scores, adaptive, true, state));
  EXPECT_TRUE(state.routing_ready);
  const Routing early = state.routing;
  ASSERT_TRUE(policy->step(scores, adaptive, true, state));
  EXPECT_EQ(early.expert, state.routing.expert);
  EXPECT_EQ(early.weight, state.routing.weight);
}

TEST_P(EveryPolicy, StateIsUsedAgain) {
  std::mt19937 gen(8);
  const auto policy = make();
  const AdaptiveState adaptive = policy->initial_adaptive_state(4);
  const std::vector<float> big = random_logits(gen, 20 * 4);
  const std::vector<float> small = random_logits(gen, 3 * 4);
  PolicyState state;
  while (!policy->step({big, 20, 4}, adaptive, true, state)) continue;
  state.restart();
  while (!policy->step({small, 3, 4}, adaptive, true, state)) continue;
  PolicyState fresh;
  while (!policy->step({small, 3, 4}, adaptive, true, fresh)) continue;
  EXPECT_EQ(state.routing.row_ptr, fresh.routing.row_ptr);
  EXPECT_EQ(state.routing.weight, fresh.routing.weight);
  EXPECT_EQ(state.auxiliary_loss, fresh.auxiliary_loss);
  EXPECT_EQ(state.saved, fresh.saved);
}

TEST_P(EveryPolicy, MisuseIsRefused) {
  const auto policy = make();
  const std::vector<float> logits = {.5f, -1, 2, .25f};
  const Scores scores{logits, 2, 2};
  const AdaptiveState adaptive = policy->initial_adaptive_state(2);
  std::vector<float> dlogits(4), dweight(4);
  PolicyState state;
  expect_error(ErrorCode::kInvalidArgument, {"logits has 4", "is 6"}, [&] {
    policy->step({logits, 3, 2}, adaptive, true, state);
  });
  policy->step(scores, adaptive, true, state);
  expect_error(ErrorCode::kInvalidState, {"backward()", "step() is done"},
               [&] { policy->backward(scores, adaptive, state, dweight, dlogits); });
  expect_error(ErrorCode::kInvalidState, {"other scores"}, [&] {
    policy->step({std::span(logits).first(2), 1, 2}, adaptive, true, state);
  });
  state.buffer[0] = 0;  // an exchange that lost this rank's tokens
  expect_error(ErrorCode::kInvalidState, {"0 tokens", "has 2"},
               [&] { policy->step(scores, adaptive, true, state); });
  PolicyState done;
  while (!policy->step(scores, adaptive, true, done)) continue;
  expect_error(ErrorCode::kInvalidState, {"restart()"}, [&] { policy->step(scores, adaptive, true, done); });
  expect_error(ErrorCode::kInvalidArgument, {"dweight has 0"},
               [&] { policy->backward(scores, adaptive, done, {}, dlogits); });
  dweight.resize(done.routing.weight.size());
  expect_error(ErrorCode::kInvalidArgument, {"dlogits has 3"},
               [&] { policy->backward(scores, adaptive, done, dweight, std::span(dlogits).first(3)); });
  PolicyState inference;
  policy->step(scores, adaptive, false, inference);
  expect_error(ErrorCode::kInvalidState, {"in training"},
               [&] { policy->backward(scores, adaptive, inference, dweight, dlogits); });
}

TEST(Factory, RefusesUnknownWords) {
  PolicyOptions o;
  o.name = "rleu";
  expect_error(ErrorCode::kInvalidConfig,
               {"rleu", "bounded_regret, etr, moepp, node_limited, relu, sigmoid_topk, softmax_topk",
                "did you mean relu?"},
               [&] { make_policy(o); });
  o.name = "softmax_top_k";
  expect_error(ErrorCode::kInvalidConfig, {"did you mean softmax_topk?"}, [&] { make_policy(o); });
  o.name = "something else entirely";
  try {
    make_policy(o);
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.message().find("did you mean"), std::string::npos) << e.what();
  }
  o = {};
  o.relu_variant = "oficial";
  expect_error(ErrorCode::kInvalidConfig, {"oficial", "paper, official", "mean official?"},
               [&] { make_policy(o); });
}

TEST(Factory, RefusesNumbersOutOfRange) {
  const auto fault = [](std::string name, std::initializer_list<std::string_view> words, auto&& change) {
    PolicyOptions o;
    o.name = std::move(name);
    change(o);
    expect_error(ErrorCode::kInvalidConfig, words, [&] { make_policy(o); });
  };
  fault("relu", {"top_k is 0"}, [](auto& o) { o.top_k = 0; });
  fault("relu", {"num_layers is 0"}, [](auto& o) { o.num_layers = 0; });
  fault("relu", {"lambda0 is -1"}, [](auto& o) { o.relu_lambda0 = -1; });
  fault("relu", {"alpha is 0.9"}, [](auto& o) { o.relu_alpha = .9; });
  fault("relu", {"alpha is nan"}, [](auto& o) { o.relu_alpha = std::nan(""); });
  fault("softmax_topk", {"top_k is -3"}, [](auto& o) { o.top_k = -3; });
  fault("softmax_topk", {"route_scale is 0"}, [](auto& o) { o.route_scale = 0; });
  fault("softmax_topk", {"aux_loss is -1"}, [](auto& o) { o.aux_loss = -1; });
  fault("softmax_topk", {"z_loss is nan"}, [](auto& o) { o.z_loss = std::nan(""); });
  fault("relu", {"policy relu has no aux_loss", "0.5"}, [](auto& o) { o.aux_loss = .5; });
  fault("sigmoid_topk", {"policy sigmoid_topk has no z_loss"}, [](auto& o) { o.z_loss = 1; });
  fault("relu", {"policy relu has no locality_loss"}, [](auto& o) { o.locality_loss = 1; });
  fault("sigmoid_topk", {"top_k is 0"}, [](auto& o) { o.top_k = 0; });
  fault("sigmoid_topk", {"route_scale is inf"}, [](auto& o) { o.route_scale = HUGE_VAL; });
}

TEST(Factory, TakesTheConfiguration) {
  Config::Routing r = {};
  r.policy = Config::Routing::Policy::kSoftmaxTopK;
  r.top_k = 3;
  r.renormalize = true;
  r.pre_softmax = true;
  r.route_scale = 2;
  r.relu_variant = Config::Routing::ReluVariant::kOfficial;
  r.relu_lambda0 = .5;
  r.relu_alpha = 2;
  r.relu_load_balanced = true;
  r.aux_loss = .25;
  r.z_loss = .125;
  const PolicyOptions o = policy_options(r, 7);
  EXPECT_EQ(o.name, "softmax_topk");
  EXPECT_EQ(o.top_k, 3);
  EXPECT_EQ(o.num_layers, 7);
  EXPECT_TRUE(o.renormalize && o.pre_softmax && o.relu_load_balanced);
  EXPECT_EQ(o.route_scale, 2);
  EXPECT_EQ(o.relu_variant, "official");
  EXPECT_EQ(o.relu_lambda0, .5);
  EXPECT_EQ(o.relu_alpha, 2);
  EXPECT_EQ(o.aux_loss, .25);
  EXPECT_EQ(o.z_loss, .125);
  EXPECT_EQ(make_policy(o)->name(), "softmax_topk");
  r.policy = Config::Routing::Policy::kSigmoidTopK;
  EXPECT_EQ(policy_options(r, 1).name, "sigmoid_topk");
  r.policy = Config::Routing::Policy::kRelu;
  EXPECT_EQ(policy_options(r, 1).name, "relu");
}

TEST(Factory, NamesMatch) {
  for (const std::string_view name : policy_names()) {
    PolicyOptions o;
    o.name = std::string(name);
    o.locality =
        std::make_shared<const Locality>(locality_of(contiguous_placement(4, 2), Topology::uniform(2, 2)));
    EXPECT_EQ(make_policy(o)->name(), name);
  }
}

// A gate that cannot learn is refused in training only.
TEST(ConstantGate, IsRefusedInTraining) {
  const std::vector<float> logits = {.5f, 1};
  const auto check = [&](const PolicyOptions& o, bool refused) {
    const auto policy = make_policy(o);
    EXPECT_NO_THROW(run_policy(*policy, logits, 2, {1}, policy->initial_adaptive_state(2), false));
    const auto train = [&] { run_policy(*policy, logits, 2, {1}, policy->initial_adaptive_state(2), true); };
    if (refused)
      expect_error(ErrorCode::kInvalidConfig, {"top_k 1", "no gradient"}, train);
    else
      EXPECT_NO_THROW(train());
  };
  PolicyOptions o;
  o.top_k = 1;
  o.name = "softmax_topk";
  check(o, true);
  o.renormalize = false;
  check(o, false);
  o.pre_softmax = false;
  check(o, true);
  o.name = "sigmoid_topk";
  check(o, false);
  o.renormalize = true;
  check(o, true);
  o.name = "relu";
  check(o, false);
}

TEST(Ties, GoToTheLowerId) {
  const std::vector<float> logits = {1, 2, 2, 2, 1, 0, 0, 0, 0, 0, 3, 1, 3, 1, 3};
  for (const char* name : {"softmax_topk", "sigmoid_topk"}) {
    PolicyOptions o;
    o.name = name;
    const auto policy = make_policy(o);
    auto ranks = run_policy(*policy, logits, 5, {3}, {}, false);
    EXPECT_EQ(ranks[0].state.routing.expert, (std::vector<std::int32_t>{1, 2, 0, 1, 0, 2})) << name;
    if (policy->adaptive_scope() != AdaptiveScope::kPerLayer) continue;
    ranks = run_policy(*policy, logits, 5, {3}, {{0, 0, 0, .5, 0}}, false);
    EXPECT_EQ(ranks[0].state.routing.expert, (std::vector<std::int32_t>{1, 3, 0, 3, 0, 3})) << name;
  }
}

// The choice against sorting all experts, for every k.
TEST(TopK, IsTheHeadOfTheSortedList) {
  const unsigned seed = 17;
  std::mt19937 gen(seed);
  constexpr std::int32_t kExperts = 9;
  for (std::int32_t k = 1; k <= kExperts; ++k) {
    PolicyOptions o;
    o.name = "softmax_topk";
    o.top_k = k;
    const auto policy = make_policy(o);
    std::vector<float> logits(100 * kExperts);
    for (float& z : logits) z = static_cast<float>(gen() % 5);  // many ties
    auto ranks = run_policy(*policy, logits, kExperts, {100}, {}, false);
    for (std::size_t t = 0; t < 100; ++t) {
      std::vector<std::int32_t> all(kExperts);
      std::iota(all.begin(), all.end(), 0);
      const float* z = logits.data() + t * kExperts;
      std::stable_sort(all.begin(), all.end(), [z](std::int32_t a, std::int32_t b) { return z[a] > z[b]; });
      all.resize(static_cast<std::size_t>(k));
      std::sort(all.begin(), all.end());
      const auto begin = ranks[0].state.routing.expert.begin() + static_cast<std::ptrdiff_t>(t) * k;
      EXPECT_TRUE(std::equal(all.begin(), all.end(), begin))
          << "seed " << seed << " k " << k << " token " << t;
    }
  }
}

}  // namespace
}  // namespace sluice
