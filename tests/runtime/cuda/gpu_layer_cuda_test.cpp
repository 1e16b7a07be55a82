// A layer over two GPUs against a plain reference in double precision, forward and backward, sequential and overlapped
// (which must give the same bits), over links of both kinds.
#include "layer_reference.hpp"
#include "sluice/runtime/src/cuda/gpu_layer.hpp"

namespace sluice {
namespace {

using namespace layer_reference;
using gpu_ranks::Rank;

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
        DeviceArray<float> dweight(mine.expert.size(), std::nanf("")), g1(w1.size(), kFirstG1),
            g2(w2.size(), kFirstG2);
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
      // Gradients that are written, in each schedule: what is added without them.
      for (const GpuSchedule schedule : {GpuSchedule::kSequential, GpuSchedule::kOverlapped}) {
        DeviceArray<std::uint16_t> y(n(tokens * kHidden), 0x7FFF), dx(n(tokens * kHidden), 0x7FFF);
        DeviceArray<float> dweight(mine.expert.size(), std::nanf("")), g1(w1.size(), std::nanf("")),
            g2(w2.size(), std::nanf(""));
        rank.barrier();
        GpuLayerOptions options;
        options.schedule = schedule;
        layer.forward({w1_d.data(), w2_d.data()}, x_d.data(), y.data(), options, stream);
        layer.backward({w1_d.data(), w2_d.data()},
                       {g1.data(), g2.data(), kernels::cuda::GradientUpdate::kWrite}, dy_d.data(), dx.data(),
                       dweight.data(), options, stream);
        exchange.wait(0, stream);
        ASSERT_EQ(cudaGetLastError(), cudaSuccess);
        auto written1 = g1.get(), written2 = g2.get();
        for (float& v : written1) v += kFirstG1;
        for (float& v : written2) v += kFirstG2;
        EXPECT_EQ(all_g1[0], written1);
        EXPECT_EQ(all_g2[0], written2);
        EXPECT_EQ(all_dx[0], dx.get());
        rank.barrier();
      }
      // Without what backward() needs, GEMM 1 may fetch its rows itself; several times, with other processors.
      for (const int sms : {8, 0, 32}) {
        DeviceArray<std::uint16_t> y(n(tokens * kHidden), 0x7FFF);
        rank.barrier();
        GpuLayerOptions options;
        options.schedule = sms == 0 ? GpuSchedule::kAuto : GpuSchedule::kGathered;
        options.comm_sms = sms;
        options.keep = false;
        layer.forward({w1_d.data(), w2_d.data()}, x_d.data(), y.data(), options, stream);
        exchange.wait(0, stream);
        ASSERT_EQ(cudaGetLastError(), cudaSuccess);
        EXPECT_EQ(all_y[0], y.get()) << "gathered, " << sms << " processors for the exchange";
        rank.barrier();
      }
      cudaStreamDestroy(stream);
      EXPECT_EQ(all_y[0], all_y[1]);
      EXPECT_EQ(all_dx[0], all_dx[1]);
      EXPECT_EQ(all_dweight[0], all_dweight[1]);
      EXPECT_EQ(all_g1[0], all_g1[1]);
      EXPECT_EQ(all_g2[0], all_g2[1]);
      const Reference want = reference(experts, shape.rank_of, me, routing, x, dy);
      want.expect_near(all_y[0], all_dx[0], all_dweight[0], all_g1[0], all_g2[0]);
    }
    rank.barrier();
  }
  rank.barrier();
}

// What training on two and four H200s was faster with, or no slower (docs/benchmarks.md); needs no GPU.
TEST(GpuLayer, AutoOverlapsWhereTheLinkShows) {
  struct Case {
    std::int64_t tokens, hidden, ffn;
    int experts, top_k;
    bool on_four;
  };
  for (const Case& c : {Case{8192, 7168, 2048, 64, 8, false}, Case{8192, 4096, 14336, 8, 2, false},
                        Case{8192, 4096, 1536, 128, 8, true}, Case{16384, 2048, 768, 128, 8, true},
                        Case{16384, 2048, 1024, 64, 8, true}}) {
    GpuLayerShape shape;
    shape.ffn = c.ffn;
    ExchangeShape rows;
    rows.max_tokens = c.tokens;
    rows.hidden = c.hidden;
    rows.max_routes = c.tokens * c.top_k * 3 / 2;
    for (const int ranks : {1, 2, 4}) {
      rows.num_local_slots = c.experts / ranks;
      EXPECT_EQ(overlap_pays(shape, rows, ranks, 132), ranks == 4 && c.on_four) << c.hidden << " " << ranks;
    }
    rows.max_routes = 64 * rows.num_local_slots;  // as in decoding
    EXPECT_FALSE(overlap_pays(shape, rows, 4, 132)) << c.hidden;
  }
}
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
