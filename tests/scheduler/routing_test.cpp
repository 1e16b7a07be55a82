#include "sluice/scheduler/routing.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "expect_error.hpp"
#include "sluice/base/clock.hpp"

namespace sluice {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// Tokens: {0,2}, {}, {1}, {}, {}, {0,1,2,3}, {}
Routing ragged() {
  return {4, {0, 2, 2, 3, 3, 3, 7, 7}, {0, 2, 1, 0, 1, 2, 3}, {.5f, 0, -1, 1, 2, 3, 4}};
}

Routing random_routing(std::mt19937& gen, std::int64_t num_tokens, std::int32_t num_experts, double density) {
  Routing out;
  out.num_experts = num_experts;
  std::bernoulli_distribution routed(density);
  std::normal_distribution<float> weight;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int32_t e = 0; e < num_experts; ++e) {
      if (!routed(gen)) continue;
      out.expert.push_back(e);
      out.weight.push_back(weight(gen));
    }
    out.row_ptr.push_back(out.num_routes());
  }
  return out;
}

TEST(Validate, AcceptsRaggedEmptyAndFull) {
  validate(ragged());
  validate(Routing{});
  validate(Routing{.num_experts = 8, .row_ptr = {0, 0, 0}, .expert = {}, .weight = {}});
  validate(Routing{.num_experts = 0, .row_ptr = {0, 0}, .expert = {}, .weight = {}});
  std::mt19937 gen(1);
  for (const double density : {0., .02, .3, 1.}) validate(random_routing(gen, 257, 9, density));
}

TEST(Validate, NamesTheFault) {
  const auto fault = [](std::initializer_list<std::string_view> words,
                        const std::function<void(Routing&)>& break_it) {
    Routing r = ragged();
    break_it(r);
    expect_error(ErrorCode::kInvalidRouting, words, [&] { validate(r); });
  };
  fault({"row_ptr is empty"}, [](Routing& r) { r.row_ptr.clear(); });
  fault({"row_ptr[0] is 1"}, [](Routing& r) { r.row_ptr[0] = 1; });
  fault({"descends", "token 3"}, [](Routing& r) { r.row_ptr[3] = 4; });
  fault({"beyond", "token 5"}, [](Routing& r) { r.row_ptr[6] = 9; });
  fault({"descends", "token 0", "-1"}, [](Routing& r) { r.row_ptr[1] = -1; });
  fault({"row_ptr[7]", "is 8", "7 routes"}, [](Routing& r) { r.row_ptr[7] = 8; });
  fault({"6 weights", "7 routes"}, [](Routing& r) { r.weight.pop_back(); });
  fault({"num_experts is -1"}, [](Routing& r) { r.num_experts = -1; });
  fault({"token 0, route 0", "expert -1", "0..3"}, [](Routing& r) { r.expert[0] = -1; });
  fault({"token 5, route 6", "expert 4", "0..3"}, [](Routing& r) { r.expert[6] = 4; });
  fault({"token 2, route 2", "expert 2147483647"}, [](Routing& r) { r.expert[2] = INT32_MAX; });
  fault({"token 5, route 4", "expert 0", "twice"}, [](Routing& r) { r.expert[4] = 0; });
  fault({"token 0, route 1", "expert 0", "after expert 2"},
        [](Routing& r) { std::swap(r.expert[0], r.expert[1]); });
  fault({"token 2, route 2", "expert 1", "nan"}, [](Routing& r) { r.weight[2] = kNaN; });
  fault({"token 5, route 5", "expert 2", "-inf"}, [](Routing& r) { r.weight[5] = -kInf; });
  fault({"token 0, route 0", "inf"}, [](Routing& r) { r.weight[0] = kInf; });
}

// Any single corrupted route is found, at its own token: the fast path's counting cannot be fooled.
TEST(Validate, FindsEverySingleCorruption) {
  const unsigned seed = 7;
  std::mt19937 gen(seed);
  const Routing good = random_routing(gen, 60, 6, .4);
  for (std::size_t i = 0; i < good.expert.size(); ++i) {
    const auto row = std::upper_bound(good.row_ptr.begin(), good.row_ptr.end(), static_cast<std::int64_t>(i));
    const auto token = row - good.row_ptr.begin() - 1;
    const std::string where = str("token ", token, ", route ");
    const auto begin = static_cast<std::size_t>(good.row_ptr[static_cast<std::size_t>(token)]);
    for (std::int32_t e = -1; e <= 6; ++e) {
      Routing bad = good;
      bad.expert[i] = e;
      const auto end = static_cast<std::size_t>(*row);
      const bool in_order = (i == begin || bad.expert[i - 1] < e) && (i + 1 == end || e < bad.expert[i + 1]);
      if (e >= 0 && e < 6 && in_order)
        EXPECT_NO_THROW(validate(bad)) << "seed " << seed << " route " << i << " expert " << e;
      else
        expect_error(ErrorCode::kInvalidRouting, {where}, [&] { validate(bad); });
    }
    Routing bad = good;
    bad.weight[i] = kNaN;
    expect_error(ErrorCode::kInvalidRouting, {str(where, i)}, [&] { validate(bad); });
  }
}

// Validation is on the way of every plan. The bound is loose (a shared, unoptimised or instrumented machine);
// the figure is printed.
TEST(Validate, IsFast) {
  std::mt19937 gen(3);
  Routing r;
  r.num_experts = 64;
  for (int t = 0; t < 8192; ++t) {
    std::vector<std::int32_t> all(64);
    for (int e = 0; e < 64; ++e) all[static_cast<std::size_t>(e)] = e;
    std::shuffle(all.begin(), all.end(), gen);
    std::sort(all.begin(), all.begin() + 8);
    r.expert.insert(r.expert.end(), all.begin(), all.begin() + 8);
    r.row_ptr.push_back(r.num_routes());
  }
  r.weight.assign(r.expert.size(), .125f);
  double best_us = 1e30;
  for (int i = 0; i < 50; ++i) {
    const auto start = Clock::now();
    validate(r);
    best_us = std::min(best_us, to_us(Clock::now() - start));
  }
  std::printf("validate: %lld routes in %.1f us\n", static_cast<long long>(r.num_routes()), best_us);
  EXPECT_LT(best_us, 5000);
}

TEST(ExpertCounts, CountsRoutesOfWeightZeroToo) {
  EXPECT_EQ(expert_counts(ragged()), (std::vector<std::int64_t>{2, 2, 2, 1}));
  EXPECT_EQ(expert_counts(Routing{.num_experts = 2, .row_ptr = {0}, .expert = {}, .weight = {}}),
            (std::vector<std::int64_t>{0, 0}));
}

TEST(FromTopK, SortsAndMapsBack) {
  const std::vector<std::int32_t> expert = {3, 0, -1, -1, -1, -1, 2, 1, 0};
  const std::vector<float> weight = {.3f, .0f, kNaN, 9, 9, 9, .7f, .1f, -.2f};
  const AdaptedRouting a = routing_from_topk(expert, weight, 3, 3, 4);
  validate(a.routing);
  EXPECT_EQ(a.routing.row_ptr, (std::vector<std::int64_t>{0, 2, 2, 5}));
  EXPECT_EQ(a.routing.expert, (std::vector<std::int32_t>{0, 3, 0, 1, 2}));
  EXPECT_EQ(a.routing.weight, (std::vector<float>{0, .3f, -.2f, .1f, .7f}));
  EXPECT_EQ(a.caller_index, (std::vector<std::int64_t>{1, 0, 8, 7, 6}));
  std::vector<float> back(9, kNaN);
  scatter_to_caller(a, a.routing.weight, back);
  EXPECT_EQ(back, (std::vector<float>{.3f, 0, 0, 0, 0, 0, .7f, .1f, -.2f}));
}

TEST(FromTopK, NamesTheFault) {
  const std::vector<float> w = {1, 1, 1, 1};
  const auto fault = [&](std::initializer_list<std::string_view> words, std::vector<std::int32_t> expert,
                         std::vector<float> weight) {
    expect_error(ErrorCode::kInvalidRouting, words, [&] { routing_from_topk(expert, weight, 2, 2, 4); });
  };
  fault({"token 1, choices 0 and 1", "expert 2", "twice"}, {0, 1, 2, 2}, w);
  fault({"token 1, choice 0", "expert 4", "0..3"}, {0, 1, 4, 2}, w);
  fault({"token 0, choice 1", "expert -2"}, {0, -2, 3, 2}, w);
  fault({"token 1, choice 1", "inf"}, {0, 1, 3, 2}, {1, 1, 1, kInf});
  fault({"3", "4 entries", "is 4"}, {0, 1, 2}, w);
  expect_error(ErrorCode::kInvalidRouting, {"negative"}, [&] { routing_from_topk({}, {}, -1, 2, 4); });
}

TEST(FromTopK, EmptyShapes) {
  EXPECT_EQ(routing_from_topk({}, {}, 0, 2, 4).routing.num_tokens(), 0);
  EXPECT_EQ(routing_from_topk({}, {}, 3, 0, 4).routing.row_ptr, (std::vector<std::int64_t>{0, 0, 0, 0}));
}

TEST(FromMultihot, MapsBack) {
  const std::vector<std::uint8_t> map = {0, 1, 0, 0, 0, 0, 7, 1, 1};
  const std::vector<float> weight = {kNaN, 2, 3, 4, 5, 6, 0, 8, 9};
  const AdaptedRouting a = routing_from_multihot(map, weight, 3, 3);
  validate(a.routing);
  EXPECT_EQ(a.routing.row_ptr, (std::vector<std::int64_t>{0, 1, 1, 4}));
  EXPECT_EQ(a.routing.expert, (std::vector<std::int32_t>{1, 0, 1, 2}));
  std::vector<float> back(9, kNaN);
  scatter_to_caller(a, a.routing.weight, back);
  EXPECT_EQ(back, (std::vector<float>{0, 2, 0, 0, 0, 0, 0, 8, 9}));
  expect_error(ErrorCode::kInvalidRouting, {"token 1", "route 1", "expert 2", "nan"}, [] {
    const std::vector<std::uint8_t> m = {1, 0, 0, 0, 0, 1};
    routing_from_multihot(m, std::vector<float>{1, 1, 1, 1, 1, kNaN}, 2, 3);
  });
  expect_error(ErrorCode::kInvalidRouting, {"9", "6"}, [&] { routing_from_multihot(map, weight, 2, 3); });
}

TEST(ScatterToCaller, ChecksSizes) {
  const AdaptedRouting a =
      routing_from_topk(std::vector<std::int32_t>{1, 0}, std::vector<float>{1, 2}, 1, 2, 2);
  std::vector<float> small(1);
  expect_error(ErrorCode::kInvalidArgument, {"caller has 1", "at least 2"},
               [&] { scatter_to_caller(a, a.routing.weight, small); });
  expect_error(ErrorCode::kInvalidArgument, {"per_route has 0", "2 routes"},
               [&] { scatter_to_caller(a, {}, small); });
}

// Random round trip: the adapters are inverses on what is routed.
TEST(Adapters, RoundTrip) {
  const unsigned seed = 11;
  std::mt19937 gen(seed);
  for (int round = 0; round < 50; ++round) {
    const std::int64_t k = 1 + static_cast<std::int64_t>(gen() % 5);
    const std::int64_t tokens = static_cast<std::int64_t>(gen() % 20);
    const std::int32_t experts = 5 + static_cast<std::int32_t>(gen() % 4);
    std::vector<std::int32_t> expert;
    std::vector<float> weight;
    std::vector<std::uint8_t> map(static_cast<std::size_t>(tokens * experts), 0);
    std::vector<float> dense(map.size(), 0);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<std::int32_t> all(static_cast<std::size_t>(experts));
      for (std::int32_t e = 0; e < experts; ++e) all[static_cast<std::size_t>(e)] = e;
      std::shuffle(all.begin(), all.end(), gen);
      for (std::int64_t j = 0; j < k; ++j) {
        const bool none = gen() % 4 == 0;
        expert.push_back(none ? -1 : all[static_cast<std::size_t>(j)]);
        weight.push_back(none ? 0.0f : 1.0f + static_cast<float>(gen() % 100));
        if (none) continue;
        const auto at = static_cast<std::size_t>(t * experts + expert.back());
        map[at] = 1;
        dense[at] = weight.back();
      }
    }
    const AdaptedRouting a = routing_from_topk(expert, weight, tokens, k, experts);
    const AdaptedRouting b = routing_from_multihot(map, dense, tokens, experts);
    validate(a.routing);
    EXPECT_EQ(a.routing.row_ptr, b.routing.row_ptr) << "seed " << seed;
    EXPECT_EQ(a.routing.expert, b.routing.expert) << "seed " << seed;
    EXPECT_EQ(a.routing.weight, b.routing.weight) << "seed " << seed;
    std::vector<float> back(weight.size(), kNaN);
    scatter_to_caller(a, a.routing.weight, back);
    EXPECT_EQ(back, weight) << "seed " << seed;
    std::vector<float> back_dense(dense.size(), kNaN);
    scatter_to_caller(b, b.routing.weight, back_dense);
    EXPECT_EQ(back_dense, dense) << "seed " << seed;
  }
}

}  // namespace
}  // namespace sluice
