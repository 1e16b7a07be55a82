// Policies that look at where experts live, or that drop: their examples, what is exact across ranks, their gradients
// against central differences of a separate double-precision model, and what they refuse.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <set>

#include "expect_error.hpp"
#include "plan_harness.hpp"
#include "selection_harness.hpp"
#include "sluice/scheduler/selection/etr.hpp"
#include "sluice/scheduler/selection/factory.hpp"
#include "sluice/scheduler/selection/moepp.hpp"
#include "sluice/scheduler/selection/sigmoid_top_k.hpp"
#include "sluice/scheduler/selection/softmax_top_k.hpp"

namespace sluice {
namespace {

using Doubles = std::vector<double>;
using Ints = std::vector<std::int32_t>;
using Tokens = std::vector<std::int64_t>;

void expect_near(double actual, double expected, double tolerance, const std::string& what = "") {
  EXPECT_TRUE(std::abs(actual - expected) <= tolerance * std::max(1.0, std::abs(expected)))
      << what << ": " << actual << ", expected " << expected;
}
template <typename Values>
void expect_near(const Values& actual, const Doubles& expected, double tolerance,
                 const std::string& what = "") {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (std::size_t i = 0; i < expected.size(); ++i)
    expect_near(static_cast<double>(actual[i]), expected[i], tolerance, str(what, " entry ", i));
}

// 2 nodes of 2 ranks unless said otherwise; the last `kinds` experts have no weights.
std::shared_ptr<const Locality> locality(std::int32_t num_experts, std::int32_t num_nodes = 2,
                                         std::int32_t num_ranks = 4, std::vector<ExpertKind> free = {}) {
  std::vector<ExpertKind> kinds(static_cast<std::size_t>(num_experts) - free.size(), ExpertKind::kFFN);
  kinds.insert(kinds.end(), free.begin(), free.end());
  return std::make_shared<const Locality>(locality_of(contiguous_placement(num_experts, num_ranks, kinds),
                                                      Topology::uniform(num_ranks, num_nodes)));
}

std::vector<float> random_affinities(std::mt19937& gen, std::size_t n) {
  std::uniform_real_distribution<float> uniform(-0.6f, 0.9f);
  std::vector<float> out(n);
  for (float& v : out) v = uniform(gen);
  return out;
}

Doubles softmax(const double* z, std::size_t n, double temperature = 1) {
  Doubles out(z, z + n);
  double sum = 0;
  for (double& v : out) sum += v = std::exp(v / temperature);
  for (double& v : out) v /= sum;
  return out;
}

// loss(z) is the model's, with the choices of the run as constants.
void expect_gradient(
    const SelectionPolicy& policy, const std::vector<float>& logits, std::int32_t num_experts,
    const Tokens& spread, const AdaptiveState& adaptive, const std::vector<float>& dense,
    const std::function<std::function<double(const Doubles&)>(const std::vector<RankBatch>&)>& make,
    const std::string& what) {
  auto ranks = run_policy(policy, logits, num_experts, spread, adaptive, true);
  backward_of(policy, dense, adaptive, ranks);
  const auto loss = make(ranks);
  Doubles z(logits.begin(), logits.end());
  double main = total_loss(ranks);
  std::size_t row = 0;
  for (const RankBatch& rank : ranks)
    for (std::size_t t = 0; t + 1 < rank.state.routing.row_ptr.size(); ++t, ++row)
      for (auto i = rank.state.routing.row_ptr[t]; i < rank.state.routing.row_ptr[t + 1]; ++i)
        main +=
            double(rank.state.routing.weight[static_cast<std::size_t>(i)]) *
            double(dense[row * static_cast<std::size_t>(num_experts) +
                         static_cast<std::size_t>(rank.state.routing.expert[static_cast<std::size_t>(i)])]);
  expect_near(main, loss(z), 2e-6, what + " loss");
  const std::vector<float> got = concatenated_dlogits(ranks);
  for (std::size_t i = 0; i < z.size(); ++i) {
    const double at = z[i];
    z[i] = at + 1e-5;
    const double up = loss(z);
    z[i] = at - 1e-5;
    const double down = loss(z);
    z[i] = at;
    expect_near(double(got[i]), (up - down) / 2e-5, 3e-6, str(what, " dlogits ", i));
  }
}

std::vector<std::vector<char>> routed_of(const std::vector<RankBatch>& ranks) {
  std::vector<std::vector<char>> out;
  for (const RankBatch& rank : ranks)
    for (std::size_t t = 0; t + 1 < rank.state.routing.row_ptr.size(); ++t) {
      out.emplace_back(static_cast<std::size_t>(rank.state.routing.num_experts), 0);
      for (auto i = rank.state.routing.row_ptr[t]; i < rank.state.routing.row_ptr[t + 1]; ++i)
        out.back()[static_cast<std::size_t>(rank.state.routing.expert[static_cast<std::size_t>(i)])] = 1;
    }
  return out;
}

Ints homes_of(const Tokens& spread) {
  Ints out;
  for (std::size_t r = 0; r < spread.size(); ++r)
    out.insert(out.end(), static_cast<std::size_t>(spread[r]), static_cast<std::int32_t>(r));
  return out;
}

// The ranks together did what one rank that plays all did: routes, weights and gradients; sums but for their rounding.
void expect_as_one(const SelectionPolicy& policy, const std::vector<float>& logits, std::int32_t num_experts,
                   const Tokens& spread, const AdaptiveState& adaptive, std::mt19937& gen,
                   const std::string& what) {
  const std::vector<float> dense = random_logits(gen, logits.size());
  auto many = run_policy(policy, logits, num_experts, spread, adaptive, true);
  const Ints homes = homes_of(spread);
  std::vector<RankBatch> one;
  one.push_back(run_as_one(policy, logits, num_experts, homes, adaptive, true));
  backward_of(policy, dense, adaptive, many);
  backward_of(policy, dense, adaptive, one);
  Ints expert;
  std::vector<float> weight;
  for (const RankBatch& rank : many) {
    validate(rank.state.routing);
    expert.insert(expert.end(), rank.state.routing.expert.begin(), rank.state.routing.expert.end());
    weight.insert(weight.end(), rank.state.routing.weight.begin(), rank.state.routing.weight.end());
    EXPECT_EQ(rank.state.statistics.tokens_of_expert, one[0].state.statistics.tokens_of_expert) << what;
    expect_near(rank.state.statistics.sums, one[0].state.statistics.sums, 1e-12, what + " sums");
  }
  EXPECT_EQ(expert, one[0].state.routing.expert) << what;
  EXPECT_EQ(weight, one[0].state.routing.weight) << what;
  EXPECT_EQ(routed_of(many), routed_of(one)) << what;
  const std::vector<float> got = concatenated_dlogits(many), want = one[0].dlogits;
  for (std::size_t i = 0; i < got.size(); ++i) expect_near(double(got[i]), double(want[i]), 1e-6, what);
  expect_near(total_loss(many), total_loss(one), 1e-12, what);
}

const std::vector<Tokens>& spreads() {
  static const std::vector<Tokens> all = {{40, 0, 0, 0}, {10, 10, 10, 10}, {0, 25, 1, 14}, {13, 0, 0, 27}};
  return all;
}

// ---- every policy of this file ----------------------------------------------------------------------------------------

struct Named {
  const char* name;
  PolicyOptions options;
  bool affinities = false;
};
std::vector<Named> all_policies() {
  std::vector<Named> out;
  const auto add = [&](const char* name, const char* policy, auto&& change, bool affinities = false) {
    PolicyOptions o;
    o.name = policy;
    o.top_k = 3;
    o.locality = locality(8);
    change(o);
    out.push_back({name, std::move(o), affinities});
  };
  add("NodeLimited", "node_limited", [](auto& o) { o.aux_loss = .5; });
  add("NodeLimitedOfFour", "node_limited",
      [](auto& o) { o.num_groups = 4, o.top_groups = 2, o.renormalize = false; });
  add("RegretSoftmax", "bounded_regret",
      [](auto& o) { o.regret_epsilon = .2, o.aux_loss = .5, o.z_loss = .1; });
  add("RegretSigmoid", "bounded_regret",
      [](auto& o) { o.regret_base = "sigmoid_topk", o.regret_epsilon = .3, o.regret_scope = "node"; });
  add("RegretNodeLimited", "bounded_regret",
      [](auto& o) { o.regret_base = "node_limited", o.regret_epsilon = .3; });
  add("LocalityLoss", "softmax_topk", [](auto& o) { o.locality_loss = 2; });
  const auto mixed = [](auto& o) {
    o.locality = locality(8, 2, 4, {ExpertKind::kZero, ExpertKind::kCopy, ExpertKind::kConstant});
    o.aux_loss = .5;
  };
  add("Moepp", "moepp", mixed);
  add("MoeppTight", "moepp", [&](auto& o) { mixed(o), o.capacity_factor = .6, o.moepp_tau = .3; });
  add("MoeppNoCapacity", "moepp", [&](auto& o) { mixed(o), o.capacity_factor = 0; });
  const auto etr = [](auto& o) {
    o.etr_tau = 1.2, o.capacity_factor = .8, o.aux_loss = .5, o.locality_loss = .7, o.etr_temperature = .5;
    o.renormalize = false, o.route_scale = 4;
  };
  add(
      "EtrToken", "etr", [&](auto& o) { etr(o), o.etr_choice = "token"; }, true);
  add(
      "EtrBoth", "etr", [&](auto& o) { etr(o), o.etr_choice = "both"; }, true);
  add(
      "EtrBothRenormalized", "etr", [&](auto& o) { etr(o), o.etr_choice = "both", o.renormalize = true; },
      true);
  add("EtrAuto", "etr", etr, true);
  return out;
}

class Affinity : public ::testing::TestWithParam<Named> {
 protected:
  std::unique_ptr<SelectionPolicy> make() const { return make_policy(GetParam().options); }
  std::vector<float> scores(std::mt19937& gen, std::size_t n) const {
    return GetParam().affinities ? random_affinities(gen, n) : random_logits(gen, n);
  }
};
INSTANTIATE_TEST_SUITE_P(Selection, Affinity, ::testing::ValuesIn(all_policies()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(Affinity, RanksTogetherAreAsOne) {
  const unsigned seed = 11;
  std::mt19937 gen(seed);
  const auto policy = make();
  AdaptiveState adaptive = policy->initial_adaptive_state(8);
  if (GetParam().options.name == "node_limited") adaptive.values = {.1, -.2, 0, .3, -.1, .05, .2, -.4};
  for (const Tokens& spread : spreads())
    for (int round = 0; round < 3; ++round)
      expect_as_one(*policy, scores(gen, 40 * 8), 8, spread, adaptive, gen,
                    str("seed ", seed, " round ", round));
}

// Ties everywhere: few distinct scores.
TEST_P(Affinity, TiesDoNotDependOnTheSpread) {
  std::mt19937 gen(12);
  const auto policy = make();
  const AdaptiveState adaptive = policy->initial_adaptive_state(8);
  std::vector<float> logits(40 * 8);
  for (float& z : logits) z = static_cast<float>(static_cast<int>(gen() % 4) - 1) * .25f;
  for (const Tokens& spread : spreads()) expect_as_one(*policy, logits, 8, spread, adaptive, gen, "ties");
}

TEST_P(Affinity, NoExchangeOutsideTrainingAndNoTokens) {
  std::mt19937 gen(13);
  const auto policy = make();
  const AdaptiveState adaptive = policy->initial_adaptive_state(8);
  const std::vector<float> logits = scores(gen, 24);
  PolicyState state;
  EXPECT_TRUE(policy->step({logits, 3, 8, 1}, adaptive, false, state));
  EXPECT_TRUE(state.routing_ready);
  validate(state.routing);
  auto ranks = run_policy(*policy, {}, 8, {0, 0, 0, 0}, adaptive, true);
  AdaptiveState next = adaptive;
  const PolicyState* batch = &ranks[2].state;
  policy->adapt({&batch, 1}, next);
  EXPECT_EQ(next.values, adaptive.values);
  EXPECT_EQ(total_loss(ranks), 0);
}

TEST_P(Affinity, StateIsUsedAgain) {
  std::mt19937 gen(14);
  const auto policy = make();
  const AdaptiveState adaptive = policy->initial_adaptive_state(8);
  const std::vector<float> big = scores(gen, 160), small = scores(gen, 24);
  const auto run = [&](const std::vector<float>& z, PolicyState& state) {
    const Scores s{z, static_cast<std::int64_t>(z.size() / 8), 8, 0};
    while (!policy->step(s, adaptive, true, state)) state.gathered = state.buffer;
  };
  PolicyState state, fresh;
  run(big, state);
  state.restart();
  run(small, state);
  run(small, fresh);
  EXPECT_EQ(state.routing.row_ptr, fresh.routing.row_ptr);
  EXPECT_EQ(state.routing.expert, fresh.routing.expert);
  EXPECT_EQ(state.routing.weight, fresh.routing.weight);
  EXPECT_EQ(state.statistics.sums, fresh.statistics.sums);
  EXPECT_EQ(state.auxiliary_loss, fresh.auxiliary_loss);
}

TEST_P(Affinity, NonFiniteScoresAreRefusedByName) {
  const auto policy = make();
  for (const float bad : {std::nanf(""), HUGE_VALF}) {
    std::vector<float> logits(24, .5f);
    logits[2 * 8 + 5] = bad;
    expect_error(ErrorCode::kInvalidRouting, {"token 2", "expert 5"},
                 [&] { run_policy(*policy, logits, 8, {3}, policy->initial_adaptive_state(8), true); });
  }
}

TEST_P(Affinity, OtherExpertsThanThePlacementsAreRefused) {
  const PolicyOptions& o = GetParam().options;
  if (o.name == "node_limited") return;  // it does not look at places
  if (o.name == "bounded_regret" && o.regret_base == "node_limited")
    return;  // and this refuses for its groups
  const auto policy = make();
  const std::vector<float> logits(12, .5f);
  try {
    run_policy(*policy, logits, 4, {3}, AdaptiveState{}, false);
    ADD_FAILURE() << "accepted";
  } catch (const Error& e) {
    EXPECT_TRUE(e.code() == ErrorCode::kInvalidArgument || e.code() == ErrorCode::kInvalidConfig) << e.what();
    EXPECT_NE(e.message().find("8"), std::string::npos) << e.message();
    EXPECT_NE(e.message().find("4"), std::string::npos) << e.message();
  }
}

// ---- node-limited groups ----------------------------------------------------------------------------------------------

TEST(NodeLimited, DeepSeekExample) {
  const std::vector<float> logits = {2, -1, 1, .9f, 1.5f, -3, .2f, .1f};
  const SigmoidTopKPolicy policy({.top_k = 2, .route_scale = 2.5, .num_groups = 4, .top_groups = 2});
  auto ranks = run_policy(policy, logits, 8, {1}, policy.initial_adaptive_state(8), true);
  EXPECT_EQ(ranks[0].state.routing.expert, (Ints{0, 2}));
  expect_near(ranks[0].state.routing.weight, {1.3661227578, 1.1338772421}, 1e-7);
  // Without the limit experts 0 and 4.
  const SigmoidTopKPolicy plain({.top_k = 2});
  EXPECT_EQ(run_policy(plain, logits, 8, {1}, {}, false)[0].state.routing.expert, (Ints{0, 4}));
  // A bias lifts group 2 over group 0, and is in no weight.
  ranks = run_policy(policy, logits, 8, {1}, {{0, 0, 0, 0, 1, 1, 0, 0}}, true);
  EXPECT_EQ(ranks[0].state.routing.expert, (Ints{4, 5}));
  const double s4 = 1 / (1 + std::exp(-1.5)), s5 = 1 / (1 + std::exp(3.0));
  expect_near(ranks[0].state.routing.weight, {2.5 * s4 / (s4 + s5), 2.5 * s5 / (s4 + s5)}, 1e-6);
}

// Against sorting groups and experts.
TEST(NodeLimited, IsTheSortedChoice) {
  const unsigned seed = 3;
  std::mt19937 gen(seed);
  for (const auto& [groups, top, k] : {std::tuple{4, 2, 3}, {2, 1, 4}, {8, 3, 3}, {1, 1, 2}, {4, 4, 5}}) {
    const SigmoidTopKPolicy policy({.top_k = k, .num_groups = groups, .top_groups = top});
    const auto logits = random_logits(gen, 50 * 8);
    const auto ranks = run_policy(policy, logits, 8, {50}, {}, false);
    for (std::size_t t = 0; t < 50; ++t) {
      Doubles s;
      for (std::size_t e = 0; e < 8; ++e) s.push_back(1 / (1 + std::exp(-double(logits[t * 8 + e]))));
      const int size = 8 / groups;
      std::vector<std::pair<double, int>> score;
      for (int g = 0; g < groups; ++g) {
        Doubles of(s.begin() + g * size, s.begin() + (g + 1) * size);
        std::sort(of.rbegin(), of.rend());
        score.push_back({-(size > 1 ? of[0] + of[1] : of[0]), g});
      }
      std::sort(score.begin(), score.end());
      std::vector<std::pair<double, int>> allowed;
      for (int i = 0; i < top; ++i)
        for (int e = score[std::size_t(i)].second * size; e < (score[std::size_t(i)].second + 1) * size; ++e)
          allowed.push_back({-s[std::size_t(e)], e});
      std::sort(allowed.begin(), allowed.end());
      std::set<int> want;
      for (int i = 0; i < k; ++i) want.insert(allowed[std::size_t(i)].second);
      const auto* chosen = ranks[0].state.routing.expert.data() + t * std::size_t(k);
      EXPECT_EQ(std::set<int>(chosen, chosen + k), want) << "seed " << seed << " token " << t;
    }
  }
}

TEST(NodeLimited, BiasFollowsTheLoadOfAllRanks) {
  const SigmoidTopKPolicy policy({.top_k = 1, .renormalize = false, .bias_update = .001});
  // 10, 2, 4 and 0 tokens, over two ranks.
  std::vector<float> logits;
  for (const auto& [expert, count] : {std::pair{0, 10}, {1, 2}, {2, 4}})
    for (int i = 0; i < count; ++i)
      for (int e = 0; e < 4; ++e) logits.push_back(e == expert ? 1.0f : -1.0f);
  auto ranks = run_policy(policy, logits, 4, {5, 11}, policy.initial_adaptive_state(4), true);
  for (const RankBatch& rank : ranks) {
    AdaptiveState bias = policy.initial_adaptive_state(4);
    const PolicyState* batch = &rank.state;
    policy.adapt({&batch, 1}, bias);
    EXPECT_EQ(bias.values, (Doubles{-.001, .001, 0, .001}));
  }
}

TEST(NodeLimited, BalanceLossExampleAndGradient) {
  const auto logit = [](double s) { return static_cast<float>(std::log(s / (1 - s))); };
  std::vector<float> logits;
  for (const double s : {.9, .6, .3, .2, .8, .1, .7, .4}) logits.push_back(logit(s));
  const SigmoidTopKPolicy policy({.top_k = 2, .aux_loss = 1});
  expect_near(total_loss(run_policy(policy, logits, 4, {1, 1}, {}, true)), 1.275, 1e-6);

  std::mt19937 gen(5);
  for (const bool renormalize : {false, true}) {
    const SigmoidTopKOptions o{.top_k = 2,
                               .renormalize = renormalize,
                               .route_scale = 2.5,
                               .num_groups = 3,
                               .top_groups = 2,
                               .aux_loss = 3};
    const auto z = random_logits(gen, 7 * 6), dense = random_logits(gen, z.size());
    expect_gradient(
        SigmoidTopKPolicy(o), z, 6, {4, 3}, {{.1, 0, .2, 0, 0, -.1}}, dense,
        [&](const std::vector<RankBatch>& ranks) {
          const auto map = routed_of(ranks);
          return [&, map](const Doubles& at) {
            double out = 0;
            Doubles count(6, 0), share(6, 0);
            for (std::size_t t = 0; t < 7; ++t) {
              Doubles s;
              double all = 0, chosen = 0;
              for (std::size_t e = 0; e < 6; ++e) {
                s.push_back(1 / (1 + std::exp(-at[t * 6 + e])));
                all += s[e];
                chosen += map[t][e] ? s[e] : 0;
              }
              for (std::size_t e = 0; e < 6; ++e) {
                count[e] += map[t][e];
                share[e] += s[e] / all / 7;
                if (map[t][e]) out += 2.5 * s[e] / (renormalize ? chosen : 1) * double(dense[t * 6 + e]);
              }
            }
            for (std::size_t e = 0; e < 6; ++e) out += 3 * 6 * count[e] / (2 * 7.0) * share[e];
            return out;
          };
        },
        renormalize ? "renormalized" : "raw");
  }
}

TEST(NodeLimited, Refuses) {
  const std::vector<float> logits(6, .5f);
  const SigmoidTopKPolicy uneven({.top_k = 2, .num_groups = 4});
  expect_error(ErrorCode::kInvalidConfig, {"6 experts", "4 groups", "divisors"},
               [&] { run_policy(uneven, logits, 6, {1}, {}, false); });
  const SigmoidTopKPolicy narrow({.top_k = 3, .num_groups = 3, .top_groups = 1});
  expect_error(ErrorCode::kInvalidConfig, {"top_k is 3", "1 of 3 groups have 2 experts"},
               [&] { run_policy(narrow, logits, 6, {1}, {}, false); });
  expect_error(ErrorCode::kInvalidConfig, {"top_groups is 3", "num_groups, 2"},
               [] { SigmoidTopKPolicy({.num_groups = 2, .top_groups = 3}); });
  expect_error(ErrorCode::kInvalidConfig, {"bias_update is -1"},
               [] { SigmoidTopKPolicy({.bias_update = -1}); });
  PolicyOptions o;
  o.name = "node_limited";
  expect_error(ErrorCode::kInvalidConfig, {"num_groups is 0", "where experts live"}, [&] { make_policy(o); });
}

// ---- bounded regret ---------------------------------------------------------------------------------------------------

SoftmaxTopKOptions regret(double epsilon, std::shared_ptr<const Locality> where, std::int32_t top_k = 2,
                          RegretScope scope = RegretScope::kNode) {
  return {.top_k = top_k, .name = "bounded_regret", .regret = {epsilon, scope}, .locality = std::move(where)};
}

// Nodes other than `node` that the experts of a token are on: 8 experts, 2 a rank, 2 ranks a node.
int remote_nodes(const std::int32_t* expert, int k, int node) {
  std::set<int> nodes;
  for (int i = 0; i < k; ++i) nodes.insert(expert[i] / 4);
  nodes.erase(node);
  return static_cast<int>(nodes.size());
}

// With one other node the swap happens exactly when some set of local experts is within the bound; what comes is the best.
TEST(BoundedRegret, TwoNodesAgainstAllSets) {
  const unsigned seed = 9;
  std::mt19937 gen(seed);
  int swaps = 0, kept = 0;
  for (const double epsilon : {0.0, .05, .2, 1.0})
    for (const int k : {1, 2, 3, 5}) {
      const SoftmaxTopKPolicy policy(regret(epsilon, locality(8), k));
      const SoftmaxTopKPolicy plain({.top_k = k});
      const auto logits = random_logits(gen, 40 * 8);
      const auto got = run_policy(policy, logits, 8, {10, 10, 10, 10}, {}, false);
      const auto base = run_policy(plain, logits, 8, {40}, {}, false);
      double total_regret = 0, sums[3] = {0, 0, 0};
      for (const RankBatch& rank : got) {
        total_regret += rank.state.statistics.sums[0];
        sums[1] += rank.state.statistics.sums[1];
        sums[2] += rank.state.statistics.sums[2];
      }
      double realised = 0, swapped = 0, saved = 0;
      for (std::size_t t = 0; t < 40; ++t) {
        const int node = t < 20 ? 0 : 1;
        const Doubles p = softmax(
            Doubles(logits.begin() + std::ptrdiff_t(t * 8), logits.begin() + std::ptrdiff_t(t * 8 + 8))
                .data(),
            8);
        const auto* was = base[0].state.routing.expert.data() + t * std::size_t(k);
        const auto* is = got[t / 10].state.routing.expert.data() + (t % 10) * std::size_t(k);
        const std::set<int> before(was, was + k), after(is, is + k);
        double top = 0, now = 0, best = -1;
        for (const int e : before) top += p[std::size_t(e)];
        for (const int e : after) now += p[std::size_t(e)];
        // The best set of k experts of the own node that keeps the near ones of before.
        for (int mask = 0; mask < 16; ++mask) {
          if (__builtin_popcount(static_cast<unsigned>(mask)) != k) continue;
          double sum = 0;
          bool keeps = true;
          for (int i = 0; i < 4; ++i) {
            const int e = node * 4 + i;
            if (mask >> i & 1)
              sum += p[std::size_t(e)];
            else if (before.count(e))
              keeps = false;
          }
          if (keeps) best = std::max(best, sum);
        }
        const bool possible = best >= 0 && top - best <= epsilon + 1e-12;
        if (remote_nodes(was, k, node) == 0 || !possible) {
          EXPECT_EQ(after, before) << "seed " << seed << " token " << t;
          ++kept;
        } else {
          EXPECT_EQ(remote_nodes(is, k, node), 0) << "seed " << seed << " token " << t;
          expect_near(now, best, 1e-6, str("seed ", seed, " token ", t));
          ++swaps;
          saved += 1;
        }
        realised += top - now;
        for (const int e : after) swapped += before.count(e) ? 0 : 1;
      }
      expect_near(total_regret, realised, 1e-5);
      EXPECT_EQ(sums[1], swapped);
      EXPECT_EQ(sums[2], saved);
    }
  EXPECT_GT(swaps, 50);
  EXPECT_GT(kept, 50);
}

// Over several nodes, and ranks: the bound holds, crossings never grow, and no single place could still be left.
TEST(BoundedRegret, BoundHoldsAndNothingIsLeftToSave) {
  const unsigned seed = 10;
  std::mt19937 gen(seed);
  const auto where = locality(12, 3, 6);
  for (const RegretScope scope : {RegretScope::kNode, RegretScope::kRank})
    for (const double epsilon : {0.0, .1, .4}) {
      const SoftmaxTopKPolicy policy(regret(epsilon, where, 4, scope)), plain({.top_k = 4});
      const auto logits = random_logits(gen, 60 * 12);
      const auto got = run_policy(policy, logits, 12, Tokens(6, 10), {}, false);
      const auto base = run_policy(plain, logits, 12, {60}, {}, false);
      for (std::size_t t = 0; t < 60; ++t) {
        const int rank = static_cast<int>(t / 10), node = rank / 2;
        const Doubles p = softmax(
            Doubles(logits.begin() + std::ptrdiff_t(t * 12), logits.begin() + std::ptrdiff_t(t * 12 + 12))
                .data(),
            12);
        const auto* was = base[0].state.routing.expert.data() + t * 4;
        const auto* is = got[t / 10].state.routing.expert.data() + (t % 10) * 4;
        double loss = 0;
        const auto nodes = [&](const std::int32_t* set) {
          std::set<int> out;
          for (int i = 0; i < 4; ++i) out.insert(set[i] / 4);
          out.erase(node);
          return out;
        };
        for (int i = 0; i < 4; ++i) loss += p[std::size_t(was[i])] - p[std::size_t(is[i])];
        const std::string what = str("seed ", seed, " epsilon ", epsilon, " token ", t);
        EXPECT_TRUE(loss <= epsilon + 1e-6) << what << ": " << loss;
        EXPECT_LE(nodes(is).size(), nodes(was).size()) << what;
        if (scope == RegretScope::kRank) continue;
        for (const int n : nodes(is)) {  // leaving n would cost more than what is left
          Doubles out, in;
          for (int i = 0; i < 4; ++i)
            if (is[i] / 4 == n) out.push_back(p[std::size_t(is[i])]);
          for (int e = node * 4; e < node * 4 + 4; ++e)
            if (std::find(is, is + 4, e) == is + 4) in.push_back(p[std::size_t(e)]);
          std::sort(in.rbegin(), in.rend());
          if (in.size() < out.size()) continue;
          double cost = 0;
          for (std::size_t i = 0; i < out.size(); ++i) cost += out[i] - in[i];
          EXPECT_TRUE(cost > epsilon - loss - 1e-6) << what << " node " << n;
        }
      }
    }
}

TEST(BoundedRegret, TiesAndFreeExperts) {
  // Ranks {0,1}, {2,3}; expert e on rank e; expert 4 is a copy, everywhere. Home: rank 0.
  const auto where = locality(5, 2, 4, {ExpertKind::kCopy});
  const SoftmaxTopKPolicy policy(regret(0, where, 1));
  // 2 and 3 tie with 1: already with the lower id. 2 is best: stays. 2 ties with 0 and 1: 0 is chosen at once.
  auto ranks = run_policy(policy, {0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0}, 5, {3, 0, 0, 0}, {}, false);
  EXPECT_EQ(ranks[0].state.routing.expert, (Ints{1, 2, 0}));
  // From node 1 the choice of 0 among equals is swapped for the lowest near one, at no loss.
  ranks = run_policy(policy, {1, 1, 1, 1, 0}, 5, {0, 0, 0, 1}, {}, false);
  EXPECT_EQ(ranks[3].state.routing.expert, (Ints{2}));
  EXPECT_EQ(ranks[3].state.statistics.sums, (Doubles{0, 1, 1, 0}));
  // A bound that allows all: the copy expert does not come in, nor leave.
  const SoftmaxTopKPolicy wide(regret(9, where, 2, RegretScope::kRank));
  ranks = run_policy(wide, {0, -5, 1, 3, 2}, 5, {1, 0, 0, 0}, {}, false);
  EXPECT_EQ(ranks[0].state.routing.expert, (Ints{0, 4}));
}

TEST(BoundedRegret, GradientIsTheRoutersOnTheSwappedSet) {
  std::mt19937 gen(6);
  for (const bool renormalize : {false, true}) {
    SoftmaxTopKOptions o = regret(.5, locality(8), 3, RegretScope::kRank);
    o.renormalize = renormalize;
    o.locality_loss = 2;
    o.aux_loss = 1;
    const auto z = random_logits(gen, 8 * 8), dense = random_logits(gen, z.size());
    expect_gradient(
        SoftmaxTopKPolicy(o), z, 8, {3, 0, 4, 1}, {}, dense,
        [&](const std::vector<RankBatch>& ranks) {
          const auto map = routed_of(ranks);
          return [&, map](const Doubles& at) {
            double out = 0;
            Doubles count(8, 0), share(8, 0), mass(4, 0);
            for (std::size_t t = 0; t < 8; ++t) {
              const Doubles p = softmax(at.data() + t * 8, 8);
              double chosen = 0;
              for (std::size_t e = 0; e < 8; ++e) {
                chosen += map[t][e] ? p[e] : 0;
                count[e] += map[t][e];
                share[e] += p[e];
                mass[(t < 3 ? 0 : 2) + e / 4] += p[e];
              }
              for (std::size_t e = 0; e < 8; ++e)
                if (map[t][e]) out += p[e] / (renormalize ? chosen : 1) * double(dense[t * 8 + e]);
            }
            for (std::size_t e = 0; e < 8; ++e) out += 8 * count[e] * share[e] / (3 * 64);
            for (std::size_t m = 0; m < 2; ++m) {
              const double tokens = m == 0 ? 3 : 5;
              for (std::size_t n = 0; n < 2; ++n) {
                const double q = mass[2 * m + n] / tokens;
                out += 2 * tokens / 8 * q * std::log(q / (m == n ? .95 : .05));
              }
            }
            return out;
          };
        },
        renormalize ? "renormalized" : "raw");
  }
}

TEST(BoundedRegret, Refuses) {
  PolicyOptions o;
  o.name = "bounded_regret";
  expect_error(ErrorCode::kInvalidConfig, {"bounded_regret", "where experts live"}, [&] { make_policy(o); });
  o.locality = locality(4);
  o.regret_epsilon = -1;
  expect_error(ErrorCode::kInvalidConfig, {"regret_epsilon is -1"}, [&] { make_policy(o); });
  o.regret_epsilon = std::nan("");
  expect_error(ErrorCode::kInvalidConfig, {"regret_epsilon is nan"}, [&] { make_policy(o); });
  o.regret_epsilon = 0;
  o.regret_base = "relu";
  expect_error(ErrorCode::kInvalidConfig, {"relu", "node_limited, sigmoid_topk, softmax_topk"},
               [&] { make_policy(o); });
}

// ---- MoE++ ------------------------------------------------------------------------------------------------------------

const std::vector<ExpertKind> kSix = {ExpertKind::kFFN,      ExpertKind::kFFN,  ExpertKind::kConstant,
                                      ExpertKind::kConstant, ExpertKind::kCopy, ExpertKind::kZero};

TEST(Moepp, ZeroExpertLeavesItsWeightToTheOthers) {
  const MoeppPolicy policy({.top_k = 2, .kinds = kSix});
  const std::vector<float> logits = {1, .5f, -1, -1, .2f, 2};
  auto ranks = run_policy(policy, logits, 6, {1}, {}, true);
  EXPECT_EQ(ranks[0].state.routing.expert, (Ints{0, 5}));
  EXPECT_EQ(ranks[0].state.routing.weight, (std::vector<float>{1, 0}));
  expect_near(double(ranks[0].state.saved[5]), .538827, 1e-6);
  expect_near(double(ranks[0].state.saved[0]), .198223, 1e-6);
  backward_of(policy, std::vector<float>(6, 3), {}, ranks);
  EXPECT_EQ(ranks[0].dlogits, std::vector<float>(6, 0.0f));  // a constant gate
}

TEST(Moepp, CapacityIsTheFormula) {
  const auto policy = [](int ffn, int zc, double tau) {
    std::vector<ExpertKind> kinds(static_cast<std::size_t>(ffn), ExpertKind::kFFN);
    kinds.insert(kinds.end(), static_cast<std::size_t>(zc), ExpertKind::kZero);
    return MoeppPolicy({.top_k = 1, .kinds = kinds, .tau = tau, .capacity_factor = 1.1});
  };
  constexpr std::int64_t kTokens = 100'000'000;
  const auto check = [&](int ffn, int zc, double tau, double of_ffn, double of_zc, double ratio) {
    const MoeppPolicy p = policy(ffn, zc, tau);
    const auto a = double(p.capacity(ExpertKind::kFFN, kTokens)),
               b = double(p.capacity(ExpertKind::kCopy, kTokens));
    EXPECT_NEAR(a / kTokens, of_ffn, 2e-8);
    EXPECT_NEAR(b / kTokens, of_zc, 2e-8);
    EXPECT_NEAR((ffn * a + zc * b) / kTokens, 1.1, 1e-6);
    EXPECT_NEAR(ffn * a / (1.1 * kTokens), ratio, 1e-4);
  };
  check(8, 4, .75, .0825, .11, .6);
  check(16, 4, .75, .0515625, .06875, .75);
  check(32, 8, .75, .02578125, .034375, .75);
  check(8, 4, .1, .0229166667, .2291666667, .1667);
  check(8, 4, 1, .0916666667, .0916666667, .6667);
  // With top-2, T counts assignments.
  EXPECT_EQ(
      MoeppPolicy({.top_k = 2, .kinds = kSix, .tau = 1, .capacity_factor = 1}).capacity(ExpertKind::kFFN, 30),
      10);
}

// Tokens that spread as the balance loss asks (ffn tau, zc 1) use tau N_f / (tau N_f + N_z) of a plain layer's ffn
// routes, and nothing is dropped; however tokens crowd, no expert has more than its capacity.
TEST(Moepp, ComputeFallsAsTheFormulaSays) {
  constexpr int kFfn = 8, kZc = 4, kTokens = 4000;
  std::vector<ExpertKind> kinds(kFfn, ExpertKind::kFFN);
  kinds.insert(kinds.end(), kZc, ExpertKind::kCopy);
  for (const double tau : {.25, .5, .75, 1.0}) {
    const MoeppPolicy policy({.top_k = 2, .kinds = kinds, .tau = tau, .capacity_factor = 1.1});
    std::vector<float> logits(kTokens * (kFfn + kZc), 0.0f);
    std::mt19937 gen(7);
    // Routes dealt in proportion: expert e is due share_e of 2 T; each token takes the two that are most behind.
    Doubles due(kFfn + kZc, 0);
    for (int t = 0; t < kTokens; ++t) {
      for (int e = 0; e < kFfn + kZc; ++e)
        due[std::size_t(e)] += 2 * (e < kFfn ? tau : 1) / (tau * kFfn + kZc);
      for (int i = 0; i < 2; ++i) {
        const auto most = std::max_element(due.begin(), due.end());
        *most -= 1;
        logits[std::size_t(t * (kFfn + kZc) + (most - due.begin()))] = 3;
      }
    }
    auto ranks = run_policy(policy, logits, kFfn + kZc, {1500, 0, 2500}, {}, true);
    const Doubles& sums = ranks[0].state.statistics.sums;
    EXPECT_EQ(sums[0], 0) << "dropped";
    const double ratio = tau * kFfn / (tau * kFfn + kZc);
    expect_near(sums[2] / (2.0 * kTokens), ratio, 2e-3, str("tau ", tau));
    expect_near(sums[1] / (2.0 * kTokens), 1 - ratio, 2e-3, str("tau ", tau));
    // All crowd the first two ffn experts.
    for (int t = 0; t < kTokens; ++t)
      for (int e = 0; e < kFfn + kZc; ++e) logits[std::size_t(t * (kFfn + kZc) + e)] = float(-e);
    ranks = run_policy(policy, logits, kFfn + kZc, {1500, 0, 2500}, {}, true);
    const std::int64_t limit = policy.capacity(ExpertKind::kFFN, kTokens);
    EXPECT_EQ(ranks[0].state.statistics.tokens_of_expert[0], std::min<std::int64_t>(limit, kTokens));
    EXPECT_EQ(ranks[0].state.statistics.sums[0], 2.0 * (kTokens - std::min<std::int64_t>(limit, kTokens)));
    // The first comers of all ranks stay.
    const Routing& first = ranks[0].state.routing;
    for (std::int64_t t = 0; t < 1500; ++t)
      EXPECT_EQ(first.row_ptr[std::size_t(t + 1)] - first.row_ptr[std::size_t(t)], t < limit ? 2 : 0) << t;
  }
}

TEST(Moepp, Gradient) {
  const unsigned seed = 16;
  std::mt19937 gen(seed);
  for (const double gamma : {0.0, .7}) {
    const MoeppOptions o{.top_k = 3, .kinds = kSix, .tau = .5, .capacity_factor = gamma, .aux_loss = 2};
    const auto z = random_logits(gen, 12 * 6), dense = random_logits(gen, z.size());
    expect_gradient(
        MoeppPolicy(o), z, 6, {5, 0, 7}, {}, dense,
        [&](const std::vector<RankBatch>& ranks) {
          const auto map = routed_of(ranks);  // after drops
          std::vector<std::vector<char>> selected;
          for (std::size_t t = 0; t < 12; ++t) {
            Ints order(6);
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
              return z[t * 6 + std::size_t(a)] > z[t * 6 + std::size_t(b)];
            });
            selected.emplace_back(6, 0);
            for (int i = 0; i < 3; ++i) selected.back()[std::size_t(order[std::size_t(i)])] = 1;
          }
          return [&, map, selected](const Doubles& at) {
            double out = 0;
            Doubles count(6, 0), share(6, 0);
            for (std::size_t t = 0; t < 12; ++t) {
              const Doubles p = softmax(at.data() + t * 6, 6);
              const bool zero = selected[t][5];
              double others = 0;
              for (std::size_t e = 0; e < 6; ++e) {
                others += selected[t][e] && e != 5 ? p[e] : 0;
                count[e] += selected[t][e];
                share[e] += p[e];
              }
              for (std::size_t e = 0; e < 6; ++e)
                if (map[t][e]) out += (zero ? (e == 5 ? 0 : p[e] / others) : p[e]) * double(dense[t * 6 + e]);
            }
            for (std::size_t e = 0; e < 6; ++e) out += 2 * (e < 2 ? 1 : .5) * count[e] / 12 * share[e] / 12;
            return out;
          };
        },
        str("seed ", seed, " gamma ", gamma));
  }
}

TEST(Moepp, Refuses) {
  expect_error(ErrorCode::kInvalidConfig, {"moepp_tau is 0"}, [] { MoeppPolicy({.tau = 0}); });
  expect_error(ErrorCode::kInvalidConfig, {"moepp_tau is 1.5"}, [] { MoeppPolicy({.tau = 1.5}); });
  expect_error(ErrorCode::kInvalidConfig, {"capacity_factor is -1"},
               [] { MoeppPolicy({.capacity_factor = -1}); });
  const MoeppPolicy policy({.top_k = 2, .kinds = kSix});
  PolicyState state;
  const std::vector<float> logits(12, .5f);
  policy.step({logits, 2, 6}, {}, true, state);
  state.gathered = {9, 9, 9, 9, 9, 9, 9};  // not what this rank gave
  expect_error(ErrorCode::kInvalidState, {"row 0", "not what rank 0 gave"}, [&] {
    policy.step({logits, 2, 6}, {}, true, state);
  });
}

// ---- Expert-Token Resonance ----------------------------------------------------------------------------------------------

// The affinities of the published example (kernels' GrAP test has its tokens).
const std::vector<float> kDelta = {.632456f, 0,        0,        .632456f, .894427f, 0,        0,   0,
                                   0,        .894427f, 0,        0,        .5f,      .5f,      .5f, .5f,
                                   0,        0,        .707107f, 0,        0,        .136083f, 0,   .816497f};

std::vector<Ints> tokens_of(const std::vector<RankBatch>& ranks, std::int32_t num_experts) {
  std::vector<Ints> out(static_cast<std::size_t>(num_experts));
  const auto map = routed_of(ranks);
  for (std::size_t t = 0; t < map.size(); ++t)
    for (std::size_t e = 0; e < out.size(); ++e)
      if (map[t][e]) out[e].push_back(static_cast<std::int32_t>(t));
  return out;
}

TEST(Etr, ChoicesOfTheExample) {
  const auto run = [&](EtrChoice choice, double factor, const Tokens& spread, bool local = false) {
    const EtrPolicy policy({.top_k = 1, .capacity_factor = factor, .choice = choice, .local_quota = local});
    return tokens_of(run_policy(policy, kDelta, 4, spread, policy.initial_adaptive_state(4), true), 4);
  };
  // 6 offers, 4 experts: factor 2/3 is a capacity of 1, factor 4/3 of 2.
  for (const Tokens& spread : {Tokens{6}, Tokens{1, 5}, Tokens{3, 0, 3}, Tokens{1, 1, 1, 1, 1, 1}}) {
    EXPECT_EQ(run(EtrChoice::kBoth, .6, spread), (std::vector<Ints>{{1}, {2}, {4}, {5}}));
    EXPECT_EQ(run(EtrChoice::kToken, .6, spread), (std::vector<Ints>{{0}, {2}, {4}, {5}}));
    EXPECT_EQ(run(EtrChoice::kBoth, 1.3, spread), (std::vector<Ints>{{0, 1}, {2}, {4}, {5}}));
    EXPECT_EQ(run(EtrChoice::kToken, 1.3, spread), (std::vector<Ints>{{0, 1}, {2}, {4}, {5}}));
    EXPECT_EQ(run(EtrChoice::kToken, 0, spread), (std::vector<Ints>{{0, 1, 3}, {2}, {4}, {5}}));
  }
  // Quotas of each rank are another thing: with one token each, all are taken.
  EXPECT_EQ(run(EtrChoice::kBoth, .6, {1, 1, 1, 1, 1, 1}, true),
            (std::vector<Ints>{{0, 1, 3}, {2}, {4}, {5}}));
}

TEST(Etr, ExpertsByAffinityMass) {
  const auto counts = [&](double tau, std::int32_t top_k) {
    const EtrPolicy policy({.top_k = top_k, .tau = tau});
    const auto ranks = run_policy(policy, kDelta, 4, {6}, {}, false);
    Ints out;
    for (std::size_t t = 0; t < 6; ++t)
      out.push_back(static_cast<std::int32_t>(ranks[0].state.routing.row_ptr[t + 1] -
                                              ranks[0].state.routing.row_ptr[t]));
    return out;
  };
  EXPECT_EQ(counts(0, 4), (Ints{1, 1, 1, 1, 1, 1}));
  EXPECT_EQ(counts(.8, 4), (Ints{2, 1, 1, 2, 1, 1}));
  EXPECT_EQ(counts(.99, 4), (Ints{2, 1, 1, 2, 1, 2}));
  EXPECT_EQ(counts(1.9, 4), (Ints{2, 1, 1, 4, 1, 2}));
  EXPECT_EQ(counts(1.9, 3), (Ints{2, 1, 1, 3, 1, 2}));
  // No affinity above 0: one expert, the best, all the same.
  const EtrPolicy policy({.top_k = 3, .tau = 5});
  EXPECT_EQ(run_policy(policy, {-.2f, -.1f, -.3f}, 3, {1}, {}, false)[0].state.routing.expert, (Ints{1}));
}

TEST(Etr, Capacity) {
  expect_near(etr_min_capacity(5120, 16, .03), .626534, 1e-5);
  expect_near(etr_min_capacity(4096, 8, .03), .790245, 1e-5);
  expect_near(etr_min_capacity(4096, 8, .05), 21.051387, 1e-6);
  const EtrPolicy plain({.capacity_factor = 1.5});
  EXPECT_EQ(plain.capacity(100, 80, 8), 19);
  EXPECT_EQ(plain.capacity(0, 80, 8), 1);
  EXPECT_EQ(plain.capacity(100, 7, 8), 7);
  const EtrPolicy least({.capacity_factor = 1.5, .delta_max = .05, .hidden = 4096});
  EXPECT_EQ(least.capacity(100, 80, 8), 22);
  EXPECT_EQ(least.capacity(100, 80, 8, 4), 19);
  // A C_min beyond all bounds is clamped.
  EXPECT_EQ(EtrPolicy({.delta_max = 1, .hidden = 4096}).capacity(100, 80, 8), 80);
}

// Both choices over many ranks against sorting all offers in one place.
TEST(Etr, OfferAndAcceptIsExact) {
  const unsigned seed = 20;
  std::mt19937 gen(seed);
  for (const double factor : {.3, .8, 1.5})
    for (const Tokens& spread : spreads()) {
      const EtrPolicy policy({.top_k = 3,
                              .tau = 1.5,
                              .capacity_factor = factor,
                              .choice = EtrChoice::kBoth,
                              .locality = locality(8)});
      auto delta = random_affinities(gen, 40 * 8);
      for (float& v : delta) v = std::round(v * 20) / 20;  // many ties
      const auto offers = routed_of(run_policy(policy, delta, 8, {40}, {}, false));
      std::vector<std::vector<std::pair<double, int>>> of(8);
      std::int64_t total = 0;
      for (std::size_t t = 0; t < 40; ++t)
        for (std::size_t e = 0; e < 8; ++e)
          if (offers[t][e]) {
            of[e].push_back({-double(delta[t * 8 + e]), static_cast<int>(t)});
            ++total;
          }
      std::vector<Ints> want(8);
      for (std::size_t e = 0; e < 8; ++e) {
        std::sort(of[e].begin(), of[e].end());
        of[e].resize(std::min(of[e].size(), static_cast<std::size_t>(std::ceil(factor * double(total) / 8))));
        for (const auto& [_, t] : of[e]) want[e].push_back(t);
        std::sort(want[e].begin(), want[e].end());
      }
      EXPECT_EQ(tokens_of(run_policy(policy, delta, 8, spread, policy.initial_adaptive_state(8), true), 8),
                want)
          << "seed " << seed << " factor " << factor;
    }
}

// Tokens at home with one expert each, well apart: crowding falls and experts choose; when all crowd one expert they cease to;
// between the thresholds nothing changes.
TEST(Etr, SwitchHasHysteresis) {
  const EtrPolicy policy({.capacity_factor = 2, .switch_on = 1, .switch_off = 1.25, .switch_decay = 0});
  AdaptiveState state = policy.initial_adaptive_state(4);
  EXPECT_EQ(state.values, (Doubles{0, -1, 2, 2, 2, 2}));
  // `above` of 10 tokens of each expert stand above the mean of its tokens.
  const auto batch = [&](int above) {
    std::vector<float> delta;
    for (int t = 0; t < 40; ++t)
      for (int e = 0; e < 4; ++e) {
        const bool own = t % 4 == e;
        const int place = t / 4;
        delta.push_back(own ? (place < above ? .9f : .1f) : -.5f);
      }
    return run_policy(policy, delta, 4, {15, 25}, state, true);
  };
  const auto step = [&](int above) {
    const auto ranks = batch(above);
    AdaptiveState other = state;
    const PolicyState *first = &ranks[0].state, *second = &ranks[1].state;
    policy.adapt({&first, 1}, state);
    policy.adapt({&second, 1}, other);
    EXPECT_EQ(state.values, other.values);
    return state.values[0];
  };
  EXPECT_EQ(step(5), 0);  // thresholds only: nothing was compared yet
  EXPECT_EQ(state.values[1], -1);
  // Capacity 2 * 40 / 4 = 20; 2 T q / C = 2 * above / 20.
  EXPECT_EQ(step(5), 1);
  expect_near(state.values[1], .5, 1e-12);
  EXPECT_EQ(batch(5)[0].state.statistics.sums[2], 40);  // both choices, all tokens
  // Thresholds are the mean of the last batch, so force them to see crowds.
  const auto crowd = [&](double q) {
    for (std::size_t e = 0; e < 4; ++e) state.values[2 + e] = q;
  };
  crowd(.05);  // all 10 of 10 are above: crowding 1, not over switch_off
  EXPECT_EQ(step(5), 1);
  expect_near(state.values[1], 1, 1e-12);
  crowd(-.9);  // all 40 tokens are: crowding 4
  EXPECT_EQ(step(5), 0);
  crowd(.05);
  EXPECT_EQ(step(5), 1);  // at switch_on exactly
  state.values[0] = 0;
  state.values[1] = 1.1;
  const EtrPolicy slow({.capacity_factor = 2, .switch_decay = .999});
  const auto ranks = batch(5);
  const PolicyState* first = &ranks[0].state;
  slow.adapt({&first, 1}, state);
  EXPECT_EQ(state.values[0], 0);  // smoothed: still above on
  state.values[0] = 1;
  slow.adapt({&first, 1}, state);
  EXPECT_EQ(state.values[0], 1);  // and below off
}

TEST(Etr, Gradient) {
  const unsigned seed = 22;
  std::mt19937 gen(seed);
  for (const bool renormalize : {false, true})
    for (const EtrChoice choice : {EtrChoice::kToken, EtrChoice::kBoth}) {
      const EtrOptions o{.top_k = 3,
                         .tau = 1.1,
                         .temperature = .4,
                         .renormalize = renormalize,
                         .route_scale = 2,
                         .capacity_factor = .8,
                         .choice = choice,
                         .aux_loss = 1.5,
                         .locality_loss = 2,
                         .locality = locality(8)};
      const auto z = random_affinities(gen, 12 * 8), dense = random_logits(gen, z.size());
      const EtrPolicy policy(o);
      expect_gradient(
          policy, z, 8, {5, 0, 4, 3}, policy.initial_adaptive_state(8), dense,
          [&](const std::vector<RankBatch>& ranks) {
            const auto map = routed_of(ranks);
            const auto offers = routed_of(run_policy(policy, z, 8, {12}, {}, false));
            return [&, map, offers](const Doubles& at) {
              double out = 0, total = 0;
              Doubles count(8, 0), share(8, 0), mass(4, 0);
              for (std::size_t t = 0; t < 12; ++t) {
                const Doubles p = softmax(at.data() + t * 8, 8, .4);
                double kept = 0;
                for (std::size_t e = 0; e < 8; ++e) {
                  kept += map[t][e] ? p[e] : 0;
                  count[e] += offers[t][e];
                  total += offers[t][e];
                  share[e] += p[e] / 12;
                  mass[(t < 5 ? 0 : 2) + e / 4] += p[e];
                }
                for (std::size_t e = 0; e < 8; ++e)
                  if (map[t][e]) out += 2 * p[e] / (renormalize ? kept : 1) * double(dense[t * 8 + e]);
              }
              for (std::size_t e = 0; e < 8; ++e) out += 1.5 * 8 * count[e] / total * share[e];
              for (std::size_t m = 0; m < 2; ++m) {
                const double tokens = m == 0 ? 5 : 7;
                for (std::size_t n = 0; n < 2; ++n) {
                  const double q = mass[2 * m + n] / tokens;
                  out += 2 * tokens / 12 * q * std::log(q / (m == n ? .95 : .05));
                }
              }
              return out;
            };
          },
          str("seed ", seed, renormalize ? " renormalized" : "",
              choice == EtrChoice::kBoth ? " both" : " token"));
    }
}

TEST(Etr, Refuses) {
  expect_error(ErrorCode::kInvalidConfig, {"etr_tau is -1"}, [] { EtrPolicy({.tau = -1}); });
  expect_error(ErrorCode::kInvalidConfig, {"etr_temperature is 0"}, [] { EtrPolicy({.temperature = 0}); });
  expect_error(ErrorCode::kInvalidConfig, {"etr_switch_off is 0.5", "etr_switch_on, 1"},
               [] { EtrPolicy({.switch_off = .5}); });
  expect_error(ErrorCode::kInvalidConfig, {"etr_delta_max is 2"}, [] { EtrPolicy({.delta_max = 2}); });
  expect_error(ErrorCode::kInvalidConfig, {"hidden is 0"}, [] { EtrPolicy({.delta_max = .1}); });
  expect_error(ErrorCode::kInvalidConfig, {"locality_loss is 1", "where experts live"},
               [] { EtrPolicy({.locality_loss = 1}); });
  const EtrPolicy constant({.top_k = 1, .renormalize = true});
  expect_error(ErrorCode::kInvalidConfig, {"no gradient"},
               [&] { run_policy(constant, kDelta, 4, {6}, constant.initial_adaptive_state(4), true); });
  const EtrPolicy policy({.choice = EtrChoice::kBoth});
  expect_error(ErrorCode::kInvalidArgument, {"0 values", "must have 6"},
               [&] { run_policy(policy, kDelta, 4, {6}, {}, true); });
  // Answers that are no bits.
  PolicyState state;
  const AdaptiveState adaptive = policy.initial_adaptive_state(4);
  const Scores scores{kDelta, 6, 4};
  for (int i = 0; i < 3; ++i) {
    ASSERT_FALSE(policy.step(scores, adaptive, true, state));
    state.gathered = state.buffer;
  }
  state.gathered.assign(state.gathered.size(), -1);
  expect_error(ErrorCode::kInvalidState, {"rank 0", "no set of"},
               [&] { policy.step(scores, adaptive, true, state); });
}

// ---- what travels -----------------------------------------------------------------------------------------------------

// Over 4 ranks on 2 nodes, with these kinds of experts.
Traffic traffic_of(const std::vector<RankBatch>& ranks, const std::vector<ExpertKind>& kinds) {
  const auto num_experts = static_cast<std::int32_t>(kinds.size());
  testing::World world{Topology::uniform(4, 2), contiguous_placement(num_experts, 4, kinds), {}};
  for (const RankBatch& rank : ranks) world.routings.push_back(rank.state.routing);
  Traffic out;
  for (const Plan& plan : testing::build_plans(world, PlanOptions{})) out += plan.traffic;
  return out;
}

TEST(WhatTravels, MoeppFreeRoutesNeverTouchTheWire) {
  std::vector<ExpertKind> kinds(12, ExpertKind::kConstant);
  std::fill_n(kinds.begin(), 8, ExpertKind::kFFN);
  kinds[8] = ExpertKind::kZero;
  kinds[9] = ExpertKind::kCopy;
  const MoeppPolicy policy({.top_k = 2, .kinds = kinds, .capacity_factor = 0});
  std::mt19937 gen(31);
  auto logits = random_logits(gen, 400 * 12);
  const auto crossings = [&] {
    const auto ranks = run_policy(policy, logits, 12, {100, 100, 100, 100}, {}, true);
    const Traffic t = traffic_of(ranks, kinds);
    const Doubles& sums = ranks[0].state.statistics.sums;
    EXPECT_EQ(static_cast<double>(t.routes_everywhere), sums[1]);
    EXPECT_EQ(t.rows_same_rank + t.flat_rows_in_node + t.flat_rows_across_nodes > 0, sums[2] > 0);
    return t;
  };
  const Traffic mixed = crossings();
  EXPECT_GT(mixed.rows_across_nodes, 0);
  // Rows between nodes without de-duplication are the ffn routes to the other node: half of them, within chance.
  const double ffn = 2 * 400 - static_cast<double>(mixed.routes_everywhere);
  EXPECT_NEAR(static_cast<double>(mixed.flat_rows_across_nodes) / ffn, .5, .08);
  EXPECT_NEAR(ffn / 800, 8. / 12, .06);  // no balance loss: scores are drawn alike
  for (std::size_t t = 0; t < 400; ++t)
    for (std::size_t e = 8; e < 12; ++e) logits[t * 12 + e] += 100;
  const Traffic none = crossings();
  EXPECT_EQ(none.routes_everywhere, 800);
  EXPECT_EQ(none.rows_across_nodes + none.rows_in_node + none.rows_same_rank + none.flat_rows_in_node +
                none.flat_rows_across_nodes,
            0);
}

// What bounded regret says it saved is what plans then do not send; and the node limit is one.
TEST(WhatTravels, RegretAndNodeLimitInThePlan) {
  const std::vector<ExpertKind> kinds(8, ExpertKind::kFFN);
  std::mt19937 gen(32);
  const auto logits = random_logits(gen, 400 * 8);
  const Tokens spread = {100, 100, 100, 100};
  const SoftmaxTopKPolicy plain({.top_k = 2});
  const Traffic before = traffic_of(run_policy(plain, logits, 8, spread, {}, true), kinds);
  std::int64_t last = before.rows_across_nodes;
  for (const double epsilon : {.02, .1, .5}) {
    const SoftmaxTopKPolicy policy(regret(epsilon, locality(8)));
    const auto ranks = run_policy(policy, logits, 8, spread, {}, true);
    const Traffic after = traffic_of(ranks, kinds);
    EXPECT_EQ(static_cast<double>(before.rows_across_nodes - after.rows_across_nodes),
              ranks[0].state.statistics.sums[2]);
    EXPECT_LT(after.rows_across_nodes, last);
    last = after.rows_across_nodes;
  }
  const SigmoidTopKPolicy limited({.top_k = 2, .num_groups = 2});
  for (const RankBatch& rank :
       run_policy(limited, logits, 8, spread, limited.initial_adaptive_state(8), true))
    for (std::size_t t = 0; t < 100; ++t)
      EXPECT_EQ(rank.state.routing.expert[2 * t] / 4, rank.state.routing.expert[2 * t + 1] / 4);
}

// ---- locality ---------------------------------------------------------------------------------------------------------

TEST(LocalityLossTest, IsTheDivergence) {
  // Four nodes, an expert each; the tokens of node 0 have the shares below. D_l: .7 at home and .1 elsewhere.
  const auto where = locality(4, 4, 4);
  const LocalityLoss loss("test", where.get(), 3, .3);
  const std::vector<float> p = {.5f, .25f, .125f, .125f};
  const Scores scores{p, 1, 4, 0};
  Doubles sums(loss.num_sums(), 0);
  loss.add_sums(scores, p.data(), sums);
  expect_near(loss.loss(scores, sums), 3 * .1166224525, 1e-6);
  const auto together = locality(4, 1, 4);
  const LocalityLoss one_node("test", together.get(), 3, .3);
  EXPECT_FALSE(one_node.on());
  expect_error(ErrorCode::kInvalidConfig, {"locality_epsilon is 1"},
               [&] { LocalityLoss("test", where.get(), 3, 1); });
}

TEST(LocalityTest, NearestCopy) {
  // Expert 0 on ranks 1 and 3, expert 1 on rank 2, expert 2 everywhere. Nodes {0,1}, {2,3}.
  const std::vector<Slot> slots = {{0, 1, 0}, {0, 3, 0}, {1, 2, 0}};
  const std::vector<ExpertKind> kinds = {ExpertKind::kFFN, ExpertKind::kFFN, ExpertKind::kZero};
  const Locality where = locality_of(make_placement(3, 4, slots, kinds), Topology::uniform(4, 2));
  EXPECT_EQ(where.destination, (Ints{1, 2, -1, 1, 2, -1, 3, 2, -1, 3, 2, -1}));
  EXPECT_EQ(where.first_rank, (Ints{1, 2, 2}));
  EXPECT_EQ(where.node_to(0, 1), 1);
  EXPECT_EQ(where.node_to(3, 2), 1);
}

}  // namespace
}  // namespace sluice
