// A layer over two GPUs against a plain reference in double precision, forward and backward, sequential and overlapped
// (which must give the same bits), over links of both kinds.
#include <cmath>

#include "../../comm/cuda/exchange_harness.hpp"
#include "sluice/runtime/src/cuda/gpu_layer.hpp"

namespace sluice {
namespace {

using namespace comm::cuda;
using gpu_ranks::Rank;
using kernels::Activation;

constexpr int kExperts = 7;
constexpr std::int64_t kHidden = 64, kFfn = 40, kTokens = 90;

std::size_t n(std::int64_t v) {
  return static_cast<std::size_t>(v);
}
float hash_value(std::uint64_t i, std::uint64_t salt) {
  std::uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull ^ salt * 0xD6E8FEB86659FD93ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<float>((x ^ (x >> 31)) % 2001) / 1000.0f - 1.0f;
}
std::vector<std::uint16_t> values(std::int64_t count, std::uint64_t salt, float scale) {
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

double norm_error(const std::vector<double>& want, const std::vector<double>& got) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (want[i] - got[i]) * (want[i] - got[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(difference) / std::max(std::sqrt(size), 1e-30);
}
std::vector<double> widen(const std::vector<std::uint16_t>& v, std::size_t count) {
  std::vector<double> w(count);
  for (std::size_t i = 0; i < count; ++i) w[i] = static_cast<double>(from_bf16(v[i]));
  return w;
}

void check_layer(Rank& rank, Activation activation, Link link) {
  std::unique_ptr<NcclCommunicator> nccl;
  if (link == Link::kNccl)
    nccl = std::make_unique<NcclCommunicator>(rank.bootstrap(), std::chrono::seconds(60));
  const int ranks = rank.num_ranks, me = rank.rank;
  GpuLayerShape shape;
  shape.ffn = kFfn;
  shape.activation = activation;
  shape.num_experts = kExperts;
  shape.training = true;
  std::vector<int> local;
  for (int e = 0; e < kExperts; ++e) {
    shape.rank_of.push_back(e % ranks);
    if (e % ranks == me) local.push_back(e);
  }
  ExchangeShape rows;
  rows.max_tokens = kTokens;
  rows.hidden = kHidden;
  rows.num_local_slots = static_cast<int>(local.size());
  rows.chunk_rows = 16;
  {
    RowExchange exchange(rank.bootstrap(), rows, link, PeerPath::kBest, nccl.get());
    GpuLayer layer(exchange, 0, shape);
    std::vector<Expert> experts;
    for (int e = 0; e < kExperts; ++e) experts.emplace_back(activation, e);
    const std::int64_t pre = experts[0].pre;
    std::vector<std::uint16_t> w1, w2;
    for (const int e : local) {
      w1.insert(w1.end(), experts[n(e)].w1.begin(), experts[n(e)].w1.end());
      w2.insert(w2.end(), experts[n(e)].w2.begin(), experts[n(e)].w2.end());
    }
    DeviceArray<std::uint16_t> w1_d(w1), w2_d(w2);
    for (unsigned seed = 1; seed < 5 && !testing::Test::HasFailure(); ++seed) {
      SCOPED_TRACE(testing::Message() << "seed " << seed << " rank " << me);
      std::mt19937 random(seed);
      std::vector<HostRouting> routing;
      std::vector<std::vector<std::uint16_t>> x, dy;
      for (int r = 0; r < ranks; ++r) {
        const std::int64_t tokens = seed == 3 && r == 0 ? 0 : kTokens - 7 * r;
        routing.push_back(
            draw_routing(random, tokens, kExperts, seed == 4 ? Draw::kOneExpert : Draw::kRagged));
        x.push_back(values(tokens * kHidden, seed * 100 + static_cast<unsigned>(r), 1.0f));
        dy.push_back(values(tokens * kHidden, seed * 200 + static_cast<unsigned>(r), 1.0f));
      }
      const HostRouting& mine = routing[n(me)];
      const std::int64_t tokens = mine.tokens();
      DeviceArray<std::int64_t> row_ptr(mine.row_ptr);
      DeviceArray<std::int32_t> expert(mine.expert);
      DeviceArray<float> weight(mine.weight);
      DeviceArray<std::uint16_t> x_d(x[n(me)]), dy_d(dy[n(me)]);
      cudaStream_t stream;
      ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
      layer.plan({row_ptr.data(), expert.data(), weight.data()}, tokens, stream);
      std::vector<std::vector<std::uint16_t>> all_y, all_dx;
      std::vector<std::vector<float>> all_dweight, all_g1, all_g2;
      for (const GpuSchedule schedule : {GpuSchedule::kSequential, GpuSchedule::kOverlapped}) {
        DeviceArray<std::uint16_t> y(n(tokens * kHidden), 0x7FFF), dx(n(tokens * kHidden), 0x7FFF);
        DeviceArray<float> dweight(mine.expert.size(), std::nanf("")), g1(w1.size(), 0.5f),
            g2(w2.size(), 0.25f);
        rank.barrier();
        GpuLayerOptions options;
        options.schedule = schedule;
        options.comm_sms = 8;
        layer.forward({w1_d.data(), w2_d.data()}, x_d.data(), y.data(), options, stream);
        layer.backward({w1_d.data(), w2_d.data()}, {g1.data(), g2.data()}, dy_d.data(), dx.data(),
                       dweight.data(), options, stream);
        exchange.wait(0, stream);
        ASSERT_EQ(cudaGetLastError(), cudaSuccess);
        all_y.push_back(y.get());
        all_dx.push_back(dx.get());
        all_dweight.push_back(dweight.get());
        all_g1.push_back(g1.get());
        all_g2.push_back(g2.get());
        rank.barrier();
      }
      cudaStreamDestroy(stream);
      EXPECT_EQ(all_y[0], all_y[1]);
      EXPECT_EQ(all_dx[0], all_dx[1]);
      EXPECT_EQ(all_dweight[0], all_dweight[1]);
      EXPECT_EQ(all_g1[0], all_g1[1]);
      EXPECT_EQ(all_g2[0], all_g2[1]);
      // The reference.
      std::vector<double> y(n(tokens * kHidden)), dx(y.size()), dweight(mine.expert.size());
      std::vector<double> g1(w1.size(), 0.5), g2(w2.size(), 0.25);
      for (int r = 0; r < ranks; ++r)
        for (std::int64_t t = 0; t < routing[n(r)].tokens(); ++t) {
          std::vector<double> dx_t(n(kHidden));
          for (std::int64_t i = routing[n(r)].row_ptr[n(t)]; i < routing[n(r)].row_ptr[n(t + 1)]; ++i) {
            const int e = routing[n(r)].expert[n(i)];
            const double w = static_cast<double>(routing[n(r)].weight[n(i)]);
            const std::uint16_t* row = &x[n(r)][n(t * kHidden)];
            const std::uint16_t* grad = &dy[n(r)][n(t * kHidden)];
            if (r == me) {
              const auto f = experts[n(e)].forward(row);
              for (std::int64_t c = 0; c < kHidden; ++c) y[n(t * kHidden + c)] += w * f.out[n(c)];
            }
            std::vector<double> d1, d2;
            const bool here = e % ranks == me;
            if (here) d1.resize(n(pre * kHidden)), d2.resize(n(kHidden * kFfn));
            const double dw =
                experts[n(e)].backward(row, grad, w, dx_t, here ? &d1 : nullptr, here ? &d2 : nullptr);
            if (r == me) dweight[n(i)] = dw;
            for (std::size_t k = 0; k < d1.size(); ++k) g1[n(e / ranks) * d1.size() + k] += d1[k];
            for (std::size_t k = 0; k < d2.size(); ++k) g2[n(e / ranks) * d2.size() + k] += d2[k];
          }
          if (r == me)
            for (std::int64_t c = 0; c < kHidden; ++c) dx[n(t * kHidden + c)] = dx_t[n(c)];
        }
      EXPECT_TRUE(norm_error(y, widen(all_y[0], y.size())) <= 0.02)
          << norm_error(y, widen(all_y[0], y.size()));
      EXPECT_TRUE(norm_error(dx, widen(all_dx[0], dx.size())) <= 0.02)
          << norm_error(dx, widen(all_dx[0], dx.size()));
      const auto wide = [](const std::vector<float>& v) { return std::vector<double>(v.begin(), v.end()); };
      EXPECT_TRUE(norm_error(dweight, wide(all_dweight[0])) <= 0.02)
          << norm_error(dweight, wide(all_dweight[0]));
      EXPECT_TRUE(norm_error(g1, wide(all_g1[0])) <= 0.02) << norm_error(g1, wide(all_g1[0]));
      EXPECT_TRUE(norm_error(g2, wide(all_g2[0])) <= 0.02) << norm_error(g2, wide(all_g2[0]));
    }
    rank.barrier();
  }
  rank.barrier();
}

void run_layers(int ranks, const std::function<void(Rank&)>& body) {
  const auto results = gpu_ranks::run_processes(
      ranks,
      [&](Rank& rank) {
        rank.use_device();
        body(rank);
        return testing::Test::HasFailure() ? 1 : 0;
      },
      std::chrono::seconds(120));
  for (std::size_t r = 0; r < results.size(); ++r) EXPECT_EQ(results[r], 0) << "rank " << r;
}
#define NEED_DEVICES(n) \
  if (gpu_ranks::count_devices() < (n)) GTEST_SKIP() << "needs " << (n) << " GPUs"

TEST(GpuLayer, OneRank) {
  NEED_DEVICES(1);
  run_layers(1, [](Rank& rank) { check_layer(rank, Activation::kSwiGLU, Link::kNvlink); });
}
TEST(GpuLayer, TwoRanksSwiGlu) {
  NEED_DEVICES(2);
  run_layers(2, [](Rank& rank) { check_layer(rank, Activation::kSwiGLU, Link::kNvlink); });
}
TEST(GpuLayer, TwoRanksRelu) {
  NEED_DEVICES(2);
  run_layers(2, [](Rank& rank) { check_layer(rank, Activation::kRelu, Link::kNvlink); });
}
TEST(GpuLayer, FourRanks) {
  NEED_DEVICES(4);
  run_layers(4, [](Rank& rank) { check_layer(rank, Activation::kSwiGLU, Link::kNvlink); });
}
TEST(GpuLayer, OverNccl) {
  NEED_DEVICES(2);
  std::string why;
  if (!nccl_available(&why)) GTEST_SKIP() << why;
  run_layers(2, [](Rank& rank) { check_layer(rank, Activation::kSwiGLU, Link::kNccl); });
}

}  // namespace
}  // namespace sluice
