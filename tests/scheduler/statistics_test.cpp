#include "sluice/scheduler/statistics.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "expect_error.hpp"

namespace sluice {
namespace {

constexpr std::int32_t kLayers[] = {0, 7};

SampledToken token(std::vector<std::vector<std::int32_t>> layers) {
  SampledToken out;
  for (const auto& experts : layers) {
    out.expert.insert(out.expert.end(), experts.begin(), experts.end());
    out.end.push_back(static_cast<std::int32_t>(out.expert.size()));
  }
  return out;
}

SampledToken random_token(std::mt19937_64& rng, std::int32_t num_experts) {
  std::vector<std::vector<std::int32_t>> layers(std::size(kLayers));
  for (auto& experts : layers)
    for (std::int32_t e = 0; e < num_experts; ++e)
      if (rng() % 3 == 0) experts.push_back(e);
  return token(layers);
}

TEST(Statistics, CountsByHand) {
  StatisticsRecorder recorder(4, kLayers, 2);
  recorder.add(0, 0, token({{0, 2}, {1}}));
  recorder.add(1, 0, token({{2}, {1, 3}}));
  recorder.add(1, 1, token({{}, {3}}));
  const RoutingStatistics s = recorder.statistics();
  EXPECT_EQ(s.num_tokens(), 3);
  EXPECT_EQ(s.layers[0].counts, (std::vector<double>{1, 0, 2, 0}));
  EXPECT_EQ(s.layers[1].counts, (std::vector<double>{0, 2, 0, 2}));
  EXPECT_EQ(s.layers[0].coactivation, (std::vector<double>{0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(s.layers[0].transitions, (std::vector<double>{0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0, 0}));
  EXPECT_TRUE(s.layers[1].transitions.empty());
  EXPECT_EQ(s.layers[0].demand, (std::vector<double>{1, 0, 1, 0, 0, 0, 1, 0}));
  ASSERT_EQ(s.sample.size(), 3u);
  EXPECT_NO_THROW(validate(s, "s"));
}

TEST(Statistics, RanksMergeToWhatOneRecorderSees) {
  std::mt19937_64 rng(5);
  StatisticsRecorder whole(6, kLayers, 3, 40);
  std::vector<StatisticsRecorder> parts(3, StatisticsRecorder(6, kLayers, 3, 40));
  for (std::int32_t i = 0; i < 50; ++i)
    for (std::int32_t r = 0; r < 3; ++r) {
      const SampledToken t = random_token(rng, 6);
      whole.add(r, i, t);
      parts[static_cast<std::size_t>(r)].add(r, i, t);
    }
  RoutingStatistics merged = parts[2].statistics();
  merged.merge(parts[0].statistics());
  merged.merge(parse_statistics(parts[1].statistics().to_json(), "part"));
  EXPECT_EQ(merged, whole.statistics());
  EXPECT_EQ(merged.sample.size(), 40u);
  EXPECT_EQ(parse_statistics(merged.to_json(), "text"), merged);
}

TEST(Statistics, SampleIsUniform) {
  // Tokens come with growing index; the mean index of the sample must be near the middle (4 standard errors).
  StatisticsRecorder recorder(2, std::span(kLayers).first(1), 1, 1000);
  for (std::int32_t i = 0; i < 20000; ++i) {
    SampledToken t = token({{0}});
    recorder.add(0, i, t);
  }
  std::vector<std::uint64_t> keys;
  for (const SampledToken& t : recorder.statistics().sample) keys.push_back(t.key);
  ASSERT_EQ(keys.size(), 1000u);
  // The 1000th smallest of 20000 uniform keys lies at 1/20 of the range.
  EXPECT_NEAR(static_cast<double>(keys.back()) / 18446744073709551615.0, 0.05, 0.008);
}

TEST(Statistics, OlmoeCounts) {
  const RoutingStatistics s = parse_statistics(
      R"({"model": "m", "domain": "d", "num_experts": 2, "top_k": 2, "layers": [0, 7],
          "expert_counts": {"0": [4, 6], "7": [5, 5]}, "slot_aligned_transitions": {"0->7": [[1, 3], [4, 2]]}})",
      "f");
  EXPECT_EQ(s.num_tokens(), 5);
  EXPECT_EQ(s.layers[0].counts, (std::vector<double>{4, 6}));
  EXPECT_EQ(s.layers[0].transitions, (std::vector<double>{1, 3, 4, 2}));
  EXPECT_TRUE(s.layers[0].coactivation.empty());
  EXPECT_TRUE(s.sample.empty());
}

TEST(Statistics, DamageIsNamed) {
  StatisticsRecorder recorder(3, kLayers, 1);
  recorder.add(0, 0, token({{0, 2}, {1}}));
  const std::string good = recorder.statistics().to_json();
  ASSERT_NO_THROW(parse_statistics(good, "f"));
  const auto with = [&](auto&& change) {
    nlohmann::json json = nlohmann::json::parse(good);
    change(json);
    return json.dump();
  };
  using J = nlohmann::json;
  const struct {
    std::string text, what;
  } cases[] = {
      {good.substr(0, good.size() / 2), "f: is no JSON"},
      {"[]", "object"},
      {"{}", "sluice_statistics"},
      {with([](J& j) { j["sluice_statistics"] = 9; }), "version 9"},
      {with([](J& j) { j["layers"][0]["counts"][1] = -1; }), "counts[1] is -1"},
      {with([](J& j) { j["layers"][0]["counts"][1] = nullptr; }), "counts[1] is null"},
      {with([](J& j) { j["layers"][0]["counts"][1] = "NaN"; }), "counts[1] is \"NaN\""},
      {with([](J& j) { j["layers"][0]["counts"].push_back(1); }), "has 4 numbers; it must have 3"},
      {with([](J& j) {
         j["layers"][1]["demand"].push_back(J{1, 1, 1});
       }),
       "demand must be a list of 1 rows"},
      {with([](J& j) { j["layers"][0]["coactivation"][0][2] = 0; }), "symmetric"},
      {with([](J& j) { j["layers"][0]["coactivation"][0][0] = 1; }), "diagonal"},
      {with([](J& j) { j["layers"][1]["layer"] = 0; }), "ascend"},
      {with([](J& j) { j["sample"][0][2][0][1] = 3; }), "sample[0][2][0][1] is 3"},
      {with([](J& j) { j["sample"][0][2].erase(1); }), "it has 1 layers"},
      {with([](J& j) { j["sample"][0][1] = 4; }), "source rank 4"},
      {with([](J& j) { j["surprise"] = 4; }), "no field \"surprise\""},
      {R"({"num_experts": 2, "top_k": 1, "layers": [0, 7], "expert_counts": {"0": [1, 1]}})",
       "expert_counts"},
      {R"({"num_experts": 2, "top_k": 1, "layers": [7], "expert_counts": {"0": [1, 1]}})",
       "\"7\" is missing"},
      {R"({"num_experts": 2, "top_k": 1, "layers": [0], "expert_counts": {"0": [1, 1e999]}})",
       "f: is no JSON"},
      {R"({"num_experts": 2, "top_k": 1, "layers": [0], "expert_counts": {"0": [1, NaN]}})", "f: is no JSON"},
  };
  for (const auto& c : cases) {
    try {
      parse_statistics(c.text, "f");
      ADD_FAILURE() << "accepted: " << c.text;
    } catch (const Error& e) {
      EXPECT_NE(e.message().find(c.what), std::string::npos) << e.message() << " lacks " << c.what;
    }
  }
}

TEST(Statistics, AnotherModelIsRefused) {
  const RoutingStatistics a = StatisticsRecorder(3, kLayers, 1).statistics();
  RoutingStatistics b = StatisticsRecorder(4, kLayers, 1).statistics();
  EXPECT_THROW(require_same_model(a, "a", b, "b"), Error);
  b = StatisticsRecorder(3, std::span(kLayers).first(1), 1).statistics();
  EXPECT_THROW(b.merge(a), Error);
}

}  // namespace
}  // namespace sluice
