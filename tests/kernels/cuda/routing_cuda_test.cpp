// Gates against the CPU's selection policies (double precision) and, where those have no such option, against plain
// loops; plans against plain loops. Everything is poisoned before each call.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "device_test_util.hpp"
#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/routing.hpp"
#include "sluice/scheduler/selection/relu.hpp"
#include "sluice/scheduler/selection/sigmoid_top_k.hpp"
#include "sluice/scheduler/selection/softmax_top_k.hpp"

namespace sluice::kernels::cuda {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr unsigned kSeed = 20260303;

class RoutingCuda : public DeviceTest<8> {};

std::vector<float> random_scores(std::int64_t tokens, int experts, unsigned seed, float mean = 0) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, 1.5f);
  std::vector<float> z(static_cast<std::size_t>(tokens * experts));
  for (float& x : z) x = normal(random);
  return z;
}

struct GateRun {
  std::int64_t tokens;
  int experts;
  DeviceArray<float> logits;
  DeviceArray<std::int64_t> row_ptr;
  DeviceArray<std::int32_t> expert;
  DeviceArray<float> weight;
  DeviceArray<std::uint32_t> status{1, 0u};
  DeviceArray<std::int32_t> of_expert, with_active;
  DeviceArray<float> dlogits;
  std::int64_t capacity;
  GateRun(const std::vector<float>& z, std::int64_t tokens, int experts, std::int64_t capacity)
      : tokens(tokens),
        experts(experts),
        logits(z),
        row_ptr(static_cast<std::size_t>(tokens) + 1, -7),
        expert(static_cast<std::size_t>(capacity), -7),
        weight(static_cast<std::size_t>(capacity), kNan),
        of_expert(static_cast<std::size_t>(experts), -7),
        with_active(static_cast<std::size_t>(experts) + 1, -7),
        dlogits(static_cast<std::size_t>(tokens * experts), kNan),
        capacity(capacity) {}
  GateScores scores() { return {logits.data(), experts, tokens, experts}; }
  RoutingBuffers buffers() { return {row_ptr.data(), expert.data(), weight.data(), capacity, status.data()}; }
  ConstRouting routing() { return {row_ptr.data(), expert.data(), weight.data()}; }
  GateCounts counts() { return {of_expert.data(), with_active.data()}; }
};

// Statistics follow from the routing itself.
void expect_counts(GateRun& run, const std::string& what) {
  const auto ptr = run.row_ptr.get();
  const auto expert = run.expert.get();
  std::vector<std::int32_t> of_expert(static_cast<std::size_t>(run.experts)),
      with_active(static_cast<std::size_t>(run.experts) + 1);
  for (std::int64_t t = 0; t < run.tokens; ++t) {
    const auto i = static_cast<std::size_t>(t);
    ++with_active[static_cast<std::size_t>(ptr[i + 1] - ptr[i])];
    for (std::int64_t r = ptr[i]; r < ptr[i + 1]; ++r)
      ++of_expert[static_cast<std::size_t>(expert[static_cast<std::size_t>(r)])];
  }
  EXPECT_EQ(run.of_expert.get(), of_expert) << what;
  EXPECT_EQ(run.with_active.get(), with_active) << what;
}

void expect_close(const std::vector<float>& got, const std::vector<float>& want, double tolerance,
                  const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  int bad = 0;
  for (std::size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(static_cast<double>(got[i]) - want[i]) <= tolerance * (1 + std::abs(want[i]))) &&
        ++bad < 4)
      ADD_FAILURE() << what << " [" << i << "]: " << got[i] << ", expected " << want[i];
  EXPECT_EQ(bad, 0) << what;
}

// Forward and backward of a policy on one rank.
struct PolicyRun {
  PolicyState state;
  std::vector<float> dweight, dlogits;
  PolicyRun(const SelectionPolicy& policy, const std::vector<float>& z, std::int64_t tokens, int experts,
            const AdaptiveState& adaptive) {
    const Scores scores{z, tokens, experts};
    while (!policy.step(scores, adaptive, true, state)) {
    }
    std::mt19937 random(kSeed + 1);
    std::normal_distribution<float> normal;
    dweight.resize(state.routing.weight.size());
    for (float& x : dweight) x = normal(random);
    dlogits.resize(z.size());
    policy.backward(scores, adaptive, state, dweight, dlogits);
  }
};

void expect_routing(GateRun& run, const Routing& want, const std::string& what) {
  EXPECT_EQ(run.status.get()[0], 0u) << what;
  ASSERT_EQ(run.row_ptr.get(), want.row_ptr) << what;
  auto expert = run.expert.get();
  auto weight = run.weight.get();
  expert.resize(want.expert.size());
  weight.resize(want.weight.size());
  EXPECT_EQ(expert, want.expert) << what;
  expect_close(weight, want.weight, 3e-6, what + " weights");
  expect_counts(run, what);
}

struct Size {
  std::int64_t tokens;
  int experts, top_k;
};
const Size kSizes[] = {{1, 2, 2},    {3, 5, 2},     {33, 8, 2},   {100, 31, 4}, {64, 64, 6},
                       {77, 100, 8}, {200, 256, 8}, {40, 300, 3}, {9, 1000, 8}, {70, 128, 128}};

TEST_F(RoutingCuda, SoftmaxTopK) {
  for (const Size& size : kSizes) {
    for (const bool over_selected : {false, true}) {
      const std::string what = "softmax " + std::to_string(size.tokens) + " x " +
                               std::to_string(size.experts) + " k " + std::to_string(size.top_k) +
                               (over_selected ? " over selected" : "");
      auto z = random_scores(size.tokens, size.experts, kSeed);
      for (int e = 0; e < size.experts; ++e) z[static_cast<std::size_t>(e)] = 0.25f;  // ties: the lower id
      SoftmaxTopKOptions options;
      options.top_k = size.top_k;
      options.renormalize = over_selected;
      options.route_scale = 1.5;
      options.aux_loss = 0.3;
      options.z_loss = 0.1;
      const PolicyRun want(SoftmaxTopKPolicy(options), z, size.tokens, size.experts, {});
      GateRun run(z, size.tokens, size.experts, size.tokens * size.top_k);
      const SoftmaxGate gate{size.top_k, over_selected, 1.5f};
      gate_softmax(run.scores(), gate, run.buffers(), run.counts(), nullptr);
      CUDA_OK(cudaDeviceSynchronize());
      expect_routing(run, want.state.routing, what);
      const auto tokens = static_cast<double>(size.tokens);
      std::vector<float> aux;
      for (const std::int64_t count : expert_counts(want.state.routing))
        aux.push_back(static_cast<float>(0.3 * size.experts * static_cast<double>(count) /
                                         (size.top_k * tokens * tokens)));
      DeviceArray<float> aux_gradient(aux), dweight(want.dweight);
      gate_softmax_backward(run.scores(), gate, run.routing(), dweight.data(), aux_gradient.data(),
                            static_cast<float>(0.1 / tokens), run.dlogits.data(), size.experts, nullptr);
      expect_close(run.dlogits.get(), want.dlogits, 4e-6, what + " backward");
    }
  }
}

TEST_F(RoutingCuda, SigmoidTopK) {
  for (const Size& size : kSizes) {
    for (const bool renormalize : {false, true}) {
      const std::string what = "sigmoid " + std::to_string(size.tokens) + " x " +
                               std::to_string(size.experts) + (renormalize ? " renormalized" : "");
      const auto z = random_scores(size.tokens, size.experts, kSeed + 2);
      SigmoidTopKOptions options;
      options.top_k = size.top_k;
      options.renormalize = renormalize;
      options.route_scale = 2.5;
      AdaptiveState adaptive;
      std::vector<float> bias;
      for (int e = 0; e < size.experts; ++e) {
        bias.push_back(0.125f *
                       static_cast<float>(e % 5));  // far apart, so that rounding cannot change the choice
        adaptive.values.push_back(bias.back());
      }
      const PolicyRun want(SigmoidTopKPolicy(options), z, size.tokens, size.experts, adaptive);
      GateRun run(z, size.tokens, size.experts, size.tokens * size.top_k);
      SigmoidGate gate;
      gate.top_k = size.top_k;
      gate.renormalize = renormalize;
      gate.route_scale = 2.5f;
      DeviceArray<float> device_bias(bias), dweight(want.dweight);
      gate_sigmoid(run.scores(), gate, device_bias.data(), run.buffers(), run.counts(), nullptr);
      CUDA_OK(cudaDeviceSynchronize());
      // Keys of two experts may be closer than fp32 tells apart: such tokens may choose either.
      const auto got = run.expert.get();
      std::size_t other = 0;
      for (std::size_t i = 0; i < want.state.routing.expert.size(); ++i)
        other += got[i] != want.state.routing.expert[i] ? 1 : 0;
      if (other == 0) {
        expect_routing(run, want.state.routing, what);
        gate_sigmoid_backward(run.scores(), gate, run.routing(), dweight.data(), run.dlogits.data(),
                              size.experts, nullptr);
        expect_close(run.dlogits.get(), want.dlogits, 4e-6, what + " backward");
      }
      EXPECT_LE(other, want.state.routing.expert.size() / 100) << what;
    }
  }
}

TEST_F(RoutingCuda, SigmoidKeepsApartWhatSaturates) {
  // s is 1 for all of them in fp32; the choice is by z, the weights are equal.
  const std::vector<float> z = {40, 60, 50, 45};
  GateRun run(z, 1, 4, 2);
  SigmoidGate gate;
  gate_sigmoid(run.scores(), gate, nullptr, run.buffers(), run.counts(), nullptr);
  EXPECT_EQ(run.expert.get(), (std::vector<std::int32_t>{1, 2}));
  expect_close(run.weight.get(), {0.5f, 0.5f}, 1e-6, "weights");
  // And all far below: renormalized weights do not underflow.
  const std::vector<float> low = {-200, -199, -300, -400};
  GateRun deep(low, 1, 4, 2);
  gate_sigmoid(deep.scores(), gate, nullptr, deep.buffers(), deep.counts(), nullptr);
  EXPECT_EQ(deep.expert.get(), (std::vector<std::int32_t>{0, 1}));
  expect_close(deep.weight.get(), {0.26894142f, 0.73105858f}, 1e-6, "weights");
}

// Scores of few values: ties inside and across the k-th best, and more of the best in a few neighbours than elsewhere.
TEST_F(RoutingCuda, TiesGoToTheLowerExpert) {
  for (const Size& size : kSizes) {
    for (const int pattern : {0, 1, 2}) {
      auto z = random_scores(size.tokens, size.experts, kSeed + 6);
      for (std::size_t i = 0; i < z.size(); ++i) {
        const int e = static_cast<int>(i % static_cast<std::size_t>(size.experts));
        if (pattern == 0) z[i] = std::round(z[i] * 2) / 2 + 0.0f * z[i];  // -0 beside 0
        if (pattern == 1) z[i] += e % 64 < 6 ? 4.0f : 0.0f;
        if (pattern == 2) z[i] = 1.5f;
      }
      const std::string what = "ties " + std::to_string(pattern) + ", " + std::to_string(size.tokens) +
                               " x " + std::to_string(size.experts) + " k " + std::to_string(size.top_k);
      SoftmaxTopKOptions softmax;
      softmax.top_k = size.top_k;
      const PolicyRun want(SoftmaxTopKPolicy(softmax), z, size.tokens, size.experts, {});
      GateRun run(z, size.tokens, size.experts, size.tokens * size.top_k);
      gate_softmax(run.scores(), {size.top_k, softmax.renormalize, static_cast<float>(softmax.route_scale)},
                   run.buffers(), run.counts(), nullptr);
      CUDA_OK(cudaDeviceSynchronize());
      expect_routing(run, want.state.routing, what);
      // The same choice by sigmoid, from rows that are not aligned for 16-byte accesses.
      const auto stride = static_cast<std::int64_t>(size.experts) + 1;
      std::vector<float> wide(static_cast<std::size_t>(size.tokens * stride), 100.0f);
      for (std::int64_t t = 0; t < size.tokens; ++t)
        std::copy_n(z.begin() + t * size.experts, size.experts, wide.begin() + t * stride);
      DeviceArray<float> logits(wide);
      SigmoidGate gate;
      gate.top_k = size.top_k;
      gate_sigmoid({logits.data(), stride, size.tokens, size.experts}, gate, nullptr, run.buffers(),
                   run.counts(), nullptr);
      CUDA_OK(cudaDeviceSynchronize());
      auto expert = run.expert.get();
      expert.resize(want.state.routing.expert.size());
      EXPECT_EQ(expert, want.state.routing.expert) << what << " sigmoid";
      expect_counts(run, what + " sigmoid");
    }
  }
}

TEST_F(RoutingCuda, TiedGroupsGoToTheLower) {
  for (const auto& [experts, groups] : {std::pair{256, 8}, {160, 8}, {16, 16}}) {
    GateRun run(std::vector<float>(static_cast<std::size_t>(20 * experts), -0.5f), 20, experts, 20 * 3);
    SigmoidGate gate;
    gate.top_k = 3;
    gate.num_groups = groups;
    gate.top_groups = 4;
    gate_sigmoid(run.scores(), gate, nullptr, run.buffers(), run.counts(), nullptr);
    CUDA_OK(cudaDeviceSynchronize());
    std::vector<std::int32_t> want;
    for (int i = 0; i < 60; ++i) want.push_back(i % 3);
    EXPECT_EQ(run.expert.get(), want) << experts << " experts in " << groups << " groups";
  }
}

TEST_F(RoutingCuda, SigmoidGroupLimited) {
  struct Groups {
    int experts, groups, top_groups, top_k;
  };
  for (const Groups& g : {Groups{256, 8, 4, 8}, Groups{16, 16, 3, 3}, Groups{48, 4, 1, 8},
                          Groups{160, 8, 3, 6}, Groups{12, 2, 2, 5}}) {
    const std::int64_t tokens = 150;
    const std::string what = "groups " + std::to_string(g.groups) + " of " + std::to_string(g.experts);
    const auto z = random_scores(tokens, g.experts, kSeed + 3);
    std::vector<float> bias;
    for (int e = 0; e < g.experts; ++e) bias.push_back(0.1f * static_cast<float>(e * 7 % 11));
    GateRun run(z, tokens, g.experts, tokens * g.top_k);
    SigmoidGate gate;
    gate.top_k = g.top_k;
    gate.num_groups = g.groups;
    gate.top_groups = g.top_groups;
    DeviceArray<float> device_bias(bias);
    gate_sigmoid(run.scores(), gate, device_bias.data(), run.buffers(), run.counts(), nullptr);
    CUDA_OK(cudaDeviceSynchronize());
    const auto expert = run.expert.get();
    const auto weight = run.weight.get();
    const int size = g.experts / g.groups;
    int wrong = 0;
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<double> key, score(static_cast<std::size_t>(g.groups));
      for (int e = 0; e < g.experts; ++e)
        key.push_back(
            1 / (1 + std::exp(-static_cast<double>(z[static_cast<std::size_t>(t * g.experts + e)]))) +
            bias[static_cast<std::size_t>(e)]);
      for (int group = 0; group < g.groups; ++group) {
        std::vector<double> in(key.begin() + group * size, key.begin() + (group + 1) * size);
        std::sort(in.rbegin(), in.rend());
        score[static_cast<std::size_t>(group)] = in[0] + (size > 1 ? in[1] : 0);
      }
      std::vector<int> order(static_cast<std::size_t>(g.groups));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        return score[static_cast<std::size_t>(a)] > score[static_cast<std::size_t>(b)];
      });
      std::vector<int> candidates;
      for (int i = 0; i < g.top_groups; ++i)
        for (int e = 0; e < size; ++e) candidates.push_back(order[static_cast<std::size_t>(i)] * size + e);
      std::stable_sort(candidates.begin(), candidates.end(), [&](int a, int b) {
        return key[static_cast<std::size_t>(a)] > key[static_cast<std::size_t>(b)];
      });
      candidates.resize(static_cast<std::size_t>(g.top_k));
      std::sort(candidates.begin(), candidates.end());
      double sum = 0;
      for (const int e : candidates)
        sum += key[static_cast<std::size_t>(e)] - bias[static_cast<std::size_t>(e)];
      for (int i = 0; i < g.top_k; ++i) {
        const auto at = static_cast<std::size_t>(t * g.top_k + i);
        const int e = candidates[static_cast<std::size_t>(i)];
        const double w = (key[static_cast<std::size_t>(e)] - bias[static_cast<std::size_t>(e)]) / sum;
        if (expert[at] != e || !(std::abs(weight[at] - w) < 1e-5)) {
          ++wrong;
          break;
        }
      }
    }
    EXPECT_LE(wrong, 1) << what << ": tokens that differ from double precision";
    expect_counts(run, what);
  }
}

TEST_F(RoutingCuda, Relu) {
  struct Case {
    std::int64_t tokens;
    int experts;
    float mean;
  };
  for (const Case& c : {Case{1, 4, 0}, Case{33, 8, -1}, Case{200, 100, -2}, Case{1000, 256, 0},
                        Case{70, 64, -100}, Case{65, 600, 100}, Case{5, 1024, -3}, Case{30011, 16, 0}}) {
    const std::string what = "relu " + std::to_string(c.tokens) + " x " + std::to_string(c.experts) +
                             " mean " + std::to_string(c.mean);
    auto z = random_scores(c.tokens, c.experts, kSeed + 4, c.mean);
    z[0] = -0.0f;
    ReluOptions options;
    options.lambda0 = 0.2;
    const PolicyRun want(ReluPolicy(options), z, c.tokens, c.experts, {{0.2}});
    GateRun run(z, c.tokens, c.experts, c.tokens * c.experts);
    DeviceArray<unsigned char> scratch(gate_relu_scratch_bytes(c.tokens), 0xEE);
    gate_relu(run.scores(), run.buffers(), run.counts(), scratch.data(), nullptr);
    CUDA_OK(cudaDeviceSynchronize());
    expect_routing(run, want.state.routing, what);
    std::vector<float> l1;
    for (const std::int64_t count : expert_counts(want.state.routing))
      l1.push_back(static_cast<float>(0.2 * c.experts * static_cast<double>(count) /
                                      (static_cast<double>(c.tokens) * static_cast<double>(c.tokens))));
    DeviceArray<float> l1_gradient(l1), dweight(want.dweight);
    gate_relu_backward(run.scores(), run.routing(), dweight.data(), l1_gradient.data(), run.dlogits.data(),
                       c.experts, nullptr);
    expect_close(run.dlogits.get(), want.dlogits, 2e-6, what + " backward");
  }
}

TEST_F(RoutingCuda, OverflowAndBadScoresAreSaid) {
  const auto z = random_scores(100, 16, kSeed + 5, 1);
  GateRun run(z, 100, 16, 50);
  DeviceArray<unsigned char> scratch(gate_relu_scratch_bytes(100), 0);
  gate_relu(run.scores(), run.buffers(), run.counts(), scratch.data(), nullptr);
  EXPECT_EQ(run.status.get()[0], kStatusOverflow);
  for (const std::int64_t p : run.row_ptr.get())
    EXPECT_LE(p, 50);  // nothing downstream reads past the arrays
  auto bad = z;
  bad[37] = kNan;
  GateRun other(bad, 100, 16, 200);
  gate_softmax(other.scores(), {2, false, 1}, other.buffers(), {}, nullptr);
  EXPECT_EQ(other.status.get()[0], kStatusNonFinite);
  EXPECT_THROW(gate_softmax(other.scores(), {17, false, 1}, other.buffers(), {}, nullptr), Error);
  EXPECT_THROW(gate_softmax(other.scores(), {3, false, 1}, other.buffers(), {}, nullptr), Error);  // capacity
}

// ---- plan --------------------------------------------------------------------------------------------------------------
struct HostRouting {
  std::vector<std::int64_t> row_ptr{0};
  std::vector<std::int32_t> expert;
  std::vector<float> weight;
};
HostRouting random_routing(std::int64_t tokens, int experts, double density, unsigned seed, int only = -1) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform;
  HostRouting r;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (int e = 0; e < experts; ++e) {
      if (only >= 0 ? e != only : uniform(random) >= density) continue;
      r.expert.push_back(e);
      r.weight.push_back(static_cast<float>(uniform(random)));
    }
    r.row_ptr.push_back(static_cast<std::int64_t>(r.expert.size()));
  }
  return r;
}

void expect_plan(const HostRouting& r, int experts, int ranks, const std::vector<std::int32_t>& rank_of,
                 const std::vector<std::int32_t>& slot_of, const std::string& what) {
  const auto tokens = static_cast<std::int64_t>(r.row_ptr.size()) - 1;
  const std::size_t routes = r.expert.size(), none = static_cast<std::size_t>(tokens * ranks);
  // Plain loops.
  std::vector<std::int64_t> expert_ptr{0}, rank_ptr{0}, rank_route_ptr{0}, send_route_ptr{0}, home_ptr{0};
  std::vector<std::int32_t> position(routes), row_of, send_row, send_route, send_slot, home_position;
  std::vector<float> weight_of, send_weight;
  std::vector<std::vector<std::int32_t>> home(static_cast<std::size_t>(tokens));
  for (int e = 0; e < experts; ++e) {
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t i = r.row_ptr[static_cast<std::size_t>(t)];
           i < r.row_ptr[static_cast<std::size_t>(t) + 1]; ++i)
        if (r.expert[static_cast<std::size_t>(i)] == e) {
          position[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(row_of.size());
          row_of.push_back(static_cast<std::int32_t>(t));
          weight_of.push_back(r.weight[static_cast<std::size_t>(i)]);
        }
    expert_ptr.push_back(static_cast<std::int64_t>(row_of.size()));
  }
  for (int d = 0; d < ranks; ++d) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      bool any = false;
      for (std::int64_t i = r.row_ptr[static_cast<std::size_t>(t)];
           i < r.row_ptr[static_cast<std::size_t>(t) + 1]; ++i) {
        const auto e = static_cast<std::size_t>(r.expert[static_cast<std::size_t>(i)]);
        if (rank_of[e] != d) continue;
        any = true;
        send_route.push_back(static_cast<std::int32_t>(i));
        send_slot.push_back(slot_of[e]);
        send_weight.push_back(r.weight[static_cast<std::size_t>(i)]);
      }
      if (!any) continue;
      home[static_cast<std::size_t>(t)].push_back(static_cast<std::int32_t>(send_row.size()));
      send_row.push_back(static_cast<std::int32_t>(t));
      send_route_ptr.push_back(static_cast<std::int64_t>(send_route.size()));
    }
    rank_ptr.push_back(static_cast<std::int64_t>(send_row.size()));
    rank_route_ptr.push_back(static_cast<std::int64_t>(send_route.size()));
  }
  for (const auto& rows : home) {
    home_position.insert(home_position.end(), rows.begin(), rows.end());
    home_ptr.push_back(static_cast<std::int64_t>(home_position.size()));
  }
  // The device.
  DeviceArray<std::int64_t> row_ptr(r.row_ptr);
  DeviceArray<std::int32_t> expert(r.expert), rank_map(rank_of), slot_map(slot_of);
  DeviceArray<float> weight(r.weight);
  DeviceArray<std::int64_t> d_expert_ptr(expert_ptr.size(), -7), d_rank_ptr(rank_ptr.size(), -7),
      d_rank_route_ptr(rank_ptr.size(), -7), d_send_route_ptr(none + 1, -7), d_home_ptr(home_ptr.size(), -7);
  DeviceArray<std::int32_t> d_position(routes, -7), d_row_of(routes, -7), d_send_row(none, -7),
      d_send_route(routes, -7), d_send_slot(routes, -7), d_home_position(none, -7);
  DeviceArray<float> d_weight_of(routes, kNan), d_send_weight(routes, kNan);
  PlanBuffers plan;
  plan.expert_ptr = d_expert_ptr.data();
  plan.position_of_route = d_position.data();
  plan.row_of_position = d_row_of.data();
  plan.weight_of_position = d_weight_of.data();
  plan.rank_ptr = d_rank_ptr.data();
  plan.rank_route_ptr = d_rank_route_ptr.data();
  plan.send_row = d_send_row.data();
  plan.send_route_ptr = d_send_route_ptr.data();
  plan.send_route = d_send_route.data();
  plan.send_slot = d_send_slot.data();
  plan.send_weight = d_send_weight.data();
  plan.home_ptr = d_home_ptr.data();
  plan.home_position = d_home_position.data();
  DeviceArray<unsigned char> scratch(plan_scratch_bytes(tokens, experts, ranks), 0xEE);
  build_plan({row_ptr.data(), expert.data(), weight.data()}, tokens,
             {rank_map.data(), slot_map.data(), experts, ranks}, plan, scratch.data(), nullptr);
  CUDA_OK(cudaDeviceSynchronize());
  const auto head = [](auto values, std::size_t size) {
    values.resize(size);
    return values;
  };
  EXPECT_EQ(d_expert_ptr.get(), expert_ptr) << what;
  EXPECT_EQ(d_position.get(), position) << what;
  EXPECT_EQ(d_row_of.get(), row_of) << what;
  EXPECT_EQ(d_weight_of.get(), weight_of) << what;
  EXPECT_EQ(d_rank_ptr.get(), rank_ptr) << what;
  EXPECT_EQ(d_rank_route_ptr.get(), rank_route_ptr) << what;
  EXPECT_EQ(head(d_send_row.get(), send_row.size()), send_row) << what;
  EXPECT_EQ(head(d_send_route_ptr.get(), send_route_ptr.size()), send_route_ptr) << what;
  EXPECT_EQ(head(d_send_route.get(), send_route.size()), send_route) << what;
  EXPECT_EQ(head(d_send_slot.get(), send_slot.size()), send_slot) << what;
  EXPECT_EQ(head(d_send_weight.get(), send_weight.size()), send_weight) << what;
  EXPECT_EQ(d_home_ptr.get(), home_ptr) << what;
  EXPECT_EQ(head(d_home_position.get(), home_position.size()), home_position) << what;
}

TEST_F(RoutingCuda, Plan) {
  struct Case {
    std::int64_t tokens;
    int experts, ranks;
    double density;
    int only;
  };
  for (const Case& c :
       {Case{0, 4, 2, 0.5, -1}, Case{1, 1, 1, 1, -1}, Case{63, 8, 2, 0.25, -1}, Case{64, 8, 8, 1, -1},
        Case{65, 16, 4, 0, -1}, Case{300, 256, 8, 0.03, -1}, Case{1000, 32, 5, 0.2, -1},
        Case{129, 40, 3, 0.5, 17}, Case{20000, 24, 3, 0.1, -1}, Case{70, 2048, 64, 0.02, -1}}) {
    const std::string what = "plan " + std::to_string(c.tokens) + " tokens, " + std::to_string(c.experts) +
                             " experts, " + std::to_string(c.ranks) + " ranks";
    const HostRouting r = random_routing(c.tokens, c.experts, c.density, kSeed + 6, c.only);
    std::vector<std::int32_t> block, strided, slot_block, slot_strided,
        used(static_cast<std::size_t>(c.ranks));
    for (int e = 0; e < c.experts; ++e) {
      block.push_back(e * c.ranks / c.experts);
      slot_block.push_back(used[static_cast<std::size_t>(block.back())]++);
      // Every fifth expert lives everywhere; the last rank has none.
      strided.push_back(e % 5 == 4 ? -1 : e % std::max(1, c.ranks - 1));
      slot_strided.push_back(e / std::max(1, c.ranks - 1));
    }
    expect_plan(r, c.experts, c.ranks, block, slot_block, what + ", blocks");
    expect_plan(r, c.experts, c.ranks, strided, slot_strided, what + ", strided");
  }
}

TEST_F(RoutingCuda, PlanInAGraphFollowsTheRouting) {
  constexpr int kExperts = 16, kRanks = 4;
  constexpr std::int64_t kTokens = 200;
  const HostRouting a = random_routing(kTokens, kExperts, 0.2, kSeed + 7),
                    b = random_routing(kTokens, kExperts, 0.3, kSeed + 8);
  const std::size_t capacity = std::max(a.expert.size(), b.expert.size());
  std::vector<std::int32_t> rank_of;
  for (int e = 0; e < kExperts; ++e) rank_of.push_back(e / 4);
  DeviceArray<std::int64_t> row_ptr(a.row_ptr), expert_ptr(kExperts + 1, -7), rank_ptr(kRanks + 1, -7);
  DeviceArray<std::int32_t> expert(capacity, 0), rank_map(rank_of);
  PlanBuffers plan;
  plan.expert_ptr = expert_ptr.data();
  plan.rank_ptr = rank_ptr.data();
  DeviceArray<unsigned char> scratch(plan_scratch_bytes(kTokens, kExperts, kRanks), 0xEE);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamCreate(&stream));
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  build_plan({row_ptr.data(), expert.data(), nullptr}, kTokens, {rank_map.data(), nullptr, kExperts, kRanks},
             plan, scratch.data(), stream);
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  for (const HostRouting* r : {&a, &b, &a}) {
    row_ptr.put(r->row_ptr);
    expert.put(r->expert);
    CUDA_OK(cudaGraphLaunch(exec, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    std::vector<std::int64_t> want(kExperts + 1);
    for (const std::int32_t e : r->expert) ++want[static_cast<std::size_t>(e) + 1];
    std::partial_sum(want.begin(), want.end(), want.begin());
    EXPECT_EQ(expert_ptr.get(), want);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace sluice::kernels::cuda
