// Experts of a small layer and what a layer must give, in double precision.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "../../comm/cuda/exchange_harness.hpp"
#include "sluice/kernels/kernels.hpp"

namespace sluice::layer_reference {

using namespace comm::cuda;
using kernels::Activation;

inline constexpr int kExperts = 7;
inline constexpr std::int64_t kHidden = 64, kFfn = 40, kTokens = 90;

inline std::size_t n(std::int64_t v) {
  return static_cast<std::size_t>(v);
}
inline float hash_value(std::uint64_t i, std::uint64_t salt) {
  std::uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull ^ salt * 0xD6E8FEB86659FD93ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<float>((x ^ (x >> 31)) % 2001) / 1000.0f - 1.0f;
}
inline std::vector<std::uint16_t> values(std::int64_t count, std::uint64_t salt, float scale) {
  std::vector<std::uint16_t> v(n(count));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = to_bf16(hash_value(i, salt) * scale);
  return v;
}

// One expert on one row.
struct Expert {
  Activation activation;
  std::vector<std::uint16_t> w1, w2;
  std::int64_t pre;
  Expert(Activation a, int e)
      : activation(a),
        w1(values(kernels::preactivation_cols(a, kFfn) * kHidden, 1000 + static_cast<std::uint64_t>(e),
                  0.2f)),
        w2(values(kHidden * kFfn, 2000 + static_cast<std::uint64_t>(e), 0.2f)),
        pre(kernels::preactivation_cols(a, kFfn)) {}
  // ReLU with small integers everywhere: one weight of a row is 1 or -1, so that every sum is exact in bf16.
  explicit Expert(int e) : Expert(Activation::kRelu, e) {
    const auto only = [&](std::vector<std::uint16_t>& w, std::int64_t cols, std::int64_t step) {
      for (std::size_t i = 0; i < w.size(); ++i) {
        const auto row = static_cast<std::int64_t>(i) / cols, col = static_cast<std::int64_t>(i) % cols;
        w[i] = to_bf16(col == (row * step + e) % cols ? ((row + e) % 3 == 0 ? -1.0f : 1.0f) : 0.0f);
      }
    };
    only(w1, kHidden, 5);
    only(w2, kFfn, 7);
  }
  struct Forward {
    std::vector<double> h, act, out;
  };
  Forward forward(const std::uint16_t* x) const {
    Forward f{std::vector<double>(n(pre)), std::vector<double>(n(kFfn)), std::vector<double>(n(kHidden))};
    for (std::int64_t o = 0; o < pre; ++o)
      for (std::int64_t i = 0; i < kHidden; ++i)
        f.h[n(o)] +=
            static_cast<double>(from_bf16(w1[n(o * kHidden + i)])) * static_cast<double>(from_bf16(x[i]));
    for (std::int64_t j = 0; j < kFfn; ++j) {
      const double gate = f.h[n(j)];
      f.act[n(j)] = activation == Activation::kSwiGLU ? gate / (1 + std::exp(-gate)) * f.h[n(kFfn + j)]
                                                      : std::max(gate, 0.0);
    }
    for (std::int64_t o = 0; o < kHidden; ++o)
      for (std::int64_t j = 0; j < kFfn; ++j)
        f.out[n(o)] += static_cast<double>(from_bf16(w2[n(o * kFfn + j)])) * f.act[n(j)];
    return f;
  }
  // Adds to dx, dw1, dw2; returns dweight.
  double backward(const std::uint16_t* x, const std::uint16_t* dy, double weight, std::vector<double>& dx,
                  std::vector<double>* dw1, std::vector<double>* dw2) const {
    const Forward f = forward(x);
    std::vector<double> u(n(kFfn)), dh(n(pre));
    double dweight = 0;
    for (std::int64_t j = 0; j < kFfn; ++j) {
      for (std::int64_t o = 0; o < kHidden; ++o)
        u[n(j)] +=
            static_cast<double>(from_bf16(w2[n(o * kFfn + j)])) * static_cast<double>(from_bf16(dy[o]));
      dweight += u[n(j)] * f.act[n(j)];
      const double gate = f.h[n(j)], du = weight * u[n(j)];
      if (activation == Activation::kSwiGLU) {
        const double s = 1 / (1 + std::exp(-gate));
        dh[n(j)] = du * f.h[n(kFfn + j)] * (s + gate * s * (1 - s));
        dh[n(kFfn + j)] = du * gate * s;
      } else {
        dh[n(j)] = gate > 0 ? du : 0;
      }
    }
    for (std::int64_t o = 0; o < pre; ++o)
      for (std::int64_t i = 0; i < kHidden; ++i) {
        dx[n(i)] += static_cast<double>(from_bf16(w1[n(o * kHidden + i)])) * dh[n(o)];
        if (dw1 != nullptr) (*dw1)[n(o * kHidden + i)] += dh[n(o)] * static_cast<double>(from_bf16(x[i]));
      }
    for (std::int64_t o = 0; o < kHidden && dw2 != nullptr; ++o)
      for (std::int64_t j = 0; j < kFfn; ++j)
        (*dw2)[n(o * kFfn + j)] += static_cast<double>(from_bf16(dy[o])) * weight * f.act[n(j)];
    return dweight;
  }
};

inline double norm_error(const std::vector<double>& want, const std::vector<double>& got) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (want[i] - got[i]) * (want[i] - got[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(difference) / std::max(std::sqrt(size), 1e-30);
}
inline std::vector<double> widen(const std::vector<std::uint16_t>& v, std::size_t count) {
  std::vector<double> w(count);
  for (std::size_t i = 0; i < count; ++i) w[i] = static_cast<double>(from_bf16(v[i]));
  return w;
}

// What gradients of weights start with, because they are added to.
inline constexpr float kFirstG1 = 0.5f, kFirstG2 = 0.25f;

// Of one rank: its tokens' results and its experts' gradients.
struct Reference {
  std::vector<double> y, dx, dweight, g1, g2;

  void expect_near(const std::vector<std::uint16_t>& got_y, const std::vector<std::uint16_t>& got_dx,
                   const std::vector<float>& got_dweight, const std::vector<float>& got_g1,
                   const std::vector<float>& got_g2) const {
    const auto near = [](const std::vector<double>& want, const std::vector<double>& got, const char* what) {
      ASSERT_EQ(want.size(), got.size()) << what;
      const double error = norm_error(want, got);
      EXPECT_TRUE(error <= 0.02) << what << " is off by " << error;
    };
    const auto wide = [](const std::vector<float>& v) { return std::vector<double>(v.begin(), v.end()); };
    near(y, widen(got_y, y.size()), "y");
    near(dx, widen(got_dx, dx.size()), "dx");
    near(dweight, wide(got_dweight), "dweight");
    near(g1, wide(got_g1), "gradient of w1");
    near(g2, wide(got_g2), "gradient of w2");
  }
};
// routing, x, dy: of every rank. Gradients are of the experts whose rank_of is `me`, ascending.
inline Reference reference(const std::vector<Expert>& experts, const std::vector<std::int32_t>& rank_of,
                           int me, const std::vector<HostRouting>& routing,
                           const std::vector<std::vector<std::uint16_t>>& x,
                           const std::vector<std::vector<std::uint16_t>>& dy) {
  std::vector<std::size_t> slot_of;
  std::size_t local = 0;
  for (const std::int32_t r : rank_of) slot_of.push_back(r == me ? local++ : 0);
  const std::size_t size1 = experts[0].w1.size(), size2 = experts[0].w2.size();
  const std::int64_t tokens = routing[n(me)].tokens();
  Reference out{std::vector<double>(n(tokens * kHidden)), std::vector<double>(n(tokens * kHidden)),
                std::vector<double>(routing[n(me)].expert.size()),
                std::vector<double>(local * size1, static_cast<double>(kFirstG1)),
                std::vector<double>(local * size2, static_cast<double>(kFirstG2))};
  for (std::size_t r = 0; r < routing.size(); ++r)
    for (std::int64_t t = 0; t < routing[r].tokens(); ++t) {
      std::vector<double> dx_t(n(kHidden));
      for (std::int64_t i = routing[r].row_ptr[n(t)]; i < routing[r].row_ptr[n(t + 1)]; ++i) {
        const auto e = static_cast<std::size_t>(routing[r].expert[n(i)]);
        const double w = static_cast<double>(routing[r].weight[n(i)]);
        const std::uint16_t* row = &x[r][n(t * kHidden)];
        const bool mine = static_cast<int>(r) == me, here = rank_of[e] == me;
        if (mine) {
          const auto f = experts[e].forward(row);
          for (std::int64_t c = 0; c < kHidden; ++c) out.y[n(t * kHidden + c)] += w * f.out[n(c)];
        }
        std::vector<double> d1(here ? size1 : 0), d2(here ? size2 : 0);
        const double dw = experts[e].backward(row, &dy[r][n(t * kHidden)], w, dx_t, here ? &d1 : nullptr,
                                              here ? &d2 : nullptr);
        if (mine) out.dweight[n(i)] = dw;
        for (std::size_t k = 0; k < d1.size(); ++k) out.g1[slot_of[e] * size1 + k] += d1[k];
        for (std::size_t k = 0; k < d2.size(); ++k) out.g2[slot_of[e] * size2 + k] += d2[k];
      }
      if (static_cast<int>(r) == me)
        for (std::int64_t c = 0; c < kHidden; ++c) out.dx[n(t * kHidden + c)] = dx_t[n(c)];
    }
  return out;
}

// Ranks as processes. device_of: the GPU of a rank (modulo the number of GPUs); none: of its own number.
inline void run_layers(int ranks, const std::function<void(gpu_ranks::Rank&)>& body,
                       const std::vector<int>& device_of = {},
                       std::chrono::seconds deadline = std::chrono::seconds(120)) {
  const auto results = gpu_ranks::run_processes(
      ranks,
      [&](gpu_ranks::Rank& rank) {
        rank.use_device(device_of.empty() ? rank.rank : device_of[n(rank.rank)]);
        body(rank);
        return testing::Test::HasFailure() ? 1 : 0;
      },
      deadline);
  for (std::size_t r = 0; r < results.size(); ++r) EXPECT_EQ(results[r], 0) << "rank " << r;
}
#define NEED_DEVICES(n) \
  if (gpu_ranks::count_devices() < (n)) GTEST_SKIP() << "needs " << (n) << " GPUs"

}  // namespace sluice::layer_reference
