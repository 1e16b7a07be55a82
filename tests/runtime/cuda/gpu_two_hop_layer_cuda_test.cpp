// A layer over pretended nodes: against a reference in double precision, exactly on integers, the same bits however
// the tokens are cut, the bits of the layer of one hop where sums are exact, and what it says of peers that are gone.
#include <signal.h>
#include <unistd.h>

#include <cstdlib>

#include "layer_reference.hpp"
#include "sluice/runtime/src/cuda/gpu_two_hop_layer.hpp"

namespace sluice {
namespace {

using namespace layer_reference;
using namespace std::chrono_literals;
using gpu_ranks::Rank;

struct Nodes {
  int nodes = 2, per_node = 1;
  Link between = Link::kNccl, inside = Link::kNvlink;
};

// NCCL takes every node for a host: sockets, no shared memory, no peer access. Before NCCL is loaded.
void pretend_hosts(int node) {
  setenv("NCCL_HOSTID", ("pretended-host-" + std::to_string(node)).c_str(), 1);
  setenv("NCCL_P2P_DISABLE", "1", 1);
  setenv("NCCL_SHM_DISABLE", "1", 1);
  setenv("NCCL_IB_DISABLE", "1", 1);
  setenv("NCCL_SOCKET_IFNAME", "lo", 1);
}

// The two groups of a rank, and their communicators.
struct Groups {
  Bootstrap between, inside;
  std::unique_ptr<NcclCommunicator> between_nccl, inside_nccl;
  Groups(Rank& rank, const Nodes& nodes) {
    const int node = rank.rank / nodes.per_node, place = rank.rank % nodes.per_node;
    pretend_hosts(node);
    std::vector<int> places, here;
    for (int i = 0; i < nodes.nodes; ++i) places.push_back(i * nodes.per_node + place);
    for (int i = 0; i < nodes.per_node; ++i) here.push_back(node * nodes.per_node + i);
    between = rank.bootstrap_of(places);
    inside = rank.bootstrap_of(here);
    if (nodes.between == Link::kNccl) between_nccl = std::make_unique<NcclCommunicator>(between, 60s);
    if (nodes.inside == Link::kNccl) inside_nccl = std::make_unique<NcclCommunicator>(inside, 60s);
  }
};

GpuTwoHopShape shape_of(const Nodes& nodes, Activation activation, int chunks) {
  GpuTwoHopShape s;
  s.layer.ffn = kFfn;
  s.layer.activation = activation;
  s.layer.num_experts = kExperts;
  s.layer.training = true;
  s.num_nodes = nodes.nodes;
  s.ranks_per_node = nodes.per_node;
  for (int e = 0; e < kExperts; ++e) s.layer.rank_of.push_back(e % (nodes.nodes * nodes.per_node));
  s.max_tokens = kTokens;
  s.hidden = kHidden;
  s.chunks = chunks;
  s.chunk_rows = 8;
  s.deadline = 30s;
  return s;
}

// One batch, the same at all ranks.
struct Batch {
  std::vector<HostRouting> routing;
  std::vector<std::vector<std::uint16_t>> x, dy;
};
// Seeds 1, 2: ragged; 3: a rank without tokens, another with fewer than chunks; 4: one expert takes all; 5: no routes.
Batch draw(unsigned seed, int ranks, bool integers) {
  std::mt19937 random(seed);
  Batch b;
  for (int r = 0; r < ranks; ++r) {
    const std::int64_t tokens = seed == 3 ? (r == 0 ? 0 : r == 1 ? 2 : kTokens) : kTokens - 7 * r;
    b.routing.push_back(draw_routing(random, tokens, kExperts,
                                     seed == 4   ? Draw::kOneExpert
                                     : seed == 5 ? Draw::kEmpty
                                                 : Draw::kRagged));
    for (auto* rows : {&b.x, &b.dy}) {
      rows->push_back(values(tokens * kHidden, seed * 100 + random() % 1000, 1.0f));
      if (integers)
        for (std::uint16_t& v : rows->back()) v = to_bf16(std::round(2 * from_bf16(v)));
    }
    if (integers)
      for (float& w : b.routing.back().weight) w = static_cast<float>(random() % 2 + 1);
  }
  return b;
}

struct Result {
  std::vector<std::uint16_t> y, dx;
  std::vector<float> dweight, g1, g2;
  bool operator==(const Result&) const = default;
};

// This rank's arrays for one batch.
struct Side {
  const HostRouting& routing;
  DeviceArray<std::int64_t> row_ptr;
  DeviceArray<std::int32_t> expert;
  DeviceArray<float> weight;
  DeviceArray<std::uint16_t> w1, w2, x, dy, y, dx;
  DeviceArray<float> dweight, g1, g2;
  kernels::cuda::GradientUpdate update = kernels::cuda::GradientUpdate::kAdd;
  cudaStream_t stream = nullptr;

  static std::vector<std::uint16_t> weights(const std::vector<Expert>& experts,
                                            const std::vector<std::int32_t>& rank_of, int me, bool first) {
    std::vector<std::uint16_t> w;
    for (std::size_t e = 0; e < experts.size(); ++e) {
      const auto& of = first ? experts[e].w1 : experts[e].w2;
      if (rank_of[e] == me) w.insert(w.end(), of.begin(), of.end());
    }
    return w;
  }
  Side(const Batch& b, int me, const std::vector<Expert>& experts, const std::vector<std::int32_t>& rank_of)
      : routing(b.routing[n(me)]),
        row_ptr(routing.row_ptr),
        expert(routing.expert),
        weight(routing.weight),
        w1(weights(experts, rank_of, me, true)),
        w2(weights(experts, rank_of, me, false)),
        x(b.x[n(me)]),
        dy(b.dy[n(me)]),
        y(b.x[n(me)].size(), 0x7FFF),
        dx(b.x[n(me)].size(), 0x7FFF),
        dweight(routing.expert.size(), std::nanf("")),
        g1(weights(experts, rank_of, me, true).size(), kFirstG1),
        g2(weights(experts, rank_of, me, false).size(), kFirstG2) {
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  }
  ~Side() { cudaStreamDestroy(stream); }
  template <typename Layer, typename Wait>
  Result run(Layer& layer, const Wait& wait) {
    layer.plan({row_ptr.data(), expert.data(), weight.data()}, routing.tokens(), stream);
    layer.forward({w1.data(), w2.data()}, x.data(), y.data(), {}, stream);
    layer.backward({w1.data(), w2.data()}, {g1.data(), g2.data(), update}, dy.data(), dx.data(),
                   dweight.data(), {}, stream);
    wait(stream);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    return {y.get(), dx.get(), dweight.get(), g1.get(), g2.get()};
  }
  // The same with gradients that are written over poison; they come back with what run() adds to.
  template <typename Layer, typename Wait>
  Result run_writing(Layer& layer, const Wait& wait) {
    g1.put(std::vector<float>(g1.get().size(), std::nanf("")));
    g2.put(std::vector<float>(g2.get().size(), std::nanf("")));
    update = kernels::cuda::GradientUpdate::kWrite;
    Result out = run(layer, wait);
    for (float& v : out.g1) v += kFirstG1;
    for (float& v : out.g2) v += kFirstG2;
    return out;
  }
};

// The reference in double precision is exact on integers, and small enough for bf16.
void expect_exact(const Reference& want, const Result& got) {
  const auto same = [](const std::vector<double>& a, const std::vector<double>& b, const char* what) {
    ASSERT_EQ(a.size(), b.size()) << what;
    for (std::size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i], b[i]) << what << " at " << i;
  };
  const auto wide = [](const std::vector<float>& v) { return std::vector<double>(v.begin(), v.end()); };
  same(want.y, widen(got.y, got.y.size()), "y");
  same(want.dx, widen(got.dx, got.dx.size()), "dx");
  same(want.dweight, wide(got.dweight), "dweight");
  same(want.g1, wide(got.g1), "gradient of w1");
  same(want.g2, wide(got.g2), "gradient of w2");
}

void check_two_hop(Rank& rank, const Nodes& nodes, Activation activation, bool integers, bool with_one_hop) {
  const int me = rank.rank, ranks = rank.num_ranks;
  Groups groups(rank, nodes);
  std::vector<Expert> experts;
  for (int e = 0; e < kExperts; ++e) experts.push_back(integers ? Expert(e) : Expert(activation, e));
  std::vector<std::vector<Result>> results;  // [way][seed]
  const std::vector<int> cuts = {1, 3};
  for (std::size_t way = 0; way < cuts.size() + (with_one_hop ? 1 : 0); ++way) {
    const bool one_hop = way == cuts.size();
    const GpuTwoHopShape s = shape_of(nodes, activation, one_hop ? 1 : cuts[way]);
    std::unique_ptr<RowExchange> between, inside;
    std::unique_ptr<GpuTwoHopLayer> layer;
    std::unique_ptr<GpuLayer> plain;
    if (one_hop) {
      ExchangeShape rows;
      rows.max_tokens = kTokens;
      rows.hidden = kHidden;
      rows.num_local_slots = static_cast<int>(std::count(s.layer.rank_of.begin(), s.layer.rank_of.end(), me));
      rows.chunk_rows = 8;
      between = std::make_unique<RowExchange>(rank.bootstrap(), rows);
      plain = std::make_unique<GpuLayer>(*between, 0, s.layer);
    } else {
      between = std::make_unique<RowExchange>(groups.between, two_hop_between(s, me), nodes.between,
                                              PeerPath::kBest, groups.between_nccl.get());
      inside = std::make_unique<RowExchange>(groups.inside, two_hop_inside(s, me), nodes.inside,
                                             PeerPath::kBest, groups.inside_nccl.get());
      layer = std::make_unique<GpuTwoHopLayer>(*between, *inside, 0, s);
      EXPECT_EQ(layer->num_chunks(), cuts[way]);
    }
    results.emplace_back();
    for (unsigned seed = 1; seed <= 5 && !testing::Test::HasFailure(); ++seed) {
      SCOPED_TRACE(testing::Message() << "way " << way << " seed " << seed << " rank " << me);
      const Batch batch = draw(seed, ranks, integers);
      Side side(batch, me, experts, s.layer.rank_of);
      rank.barrier();
      const auto wait_plain = [&](cudaStream_t stream) { between->wait(0, stream); };
      const auto wait_two = [&](cudaStream_t stream) { layer->wait(stream); };
      const Result got = one_hop ? side.run(*plain, wait_plain) : side.run(*layer, wait_two);
      rank.barrier();
      const Result written =
          one_hop ? side.run_writing(*plain, wait_plain) : side.run_writing(*layer, wait_two);
      const Reference want = reference(experts, s.layer.rank_of, me, batch.routing, batch.x, batch.dy);
      for (const Result* r : {&got, &written}) {
        if (integers) {
          expect_exact(want, *r);
        } else {
          want.expect_near(r->y, r->dx, r->dweight, r->g1, r->g2);
        }
      }
      // Gradients of weights add up in another order where tokens are cut.
      if (way > 0 && results[0].size() == seed) {
        EXPECT_EQ(results[0].back().y, got.y);
      }
      results.back().push_back(got);
      rank.barrier();
    }
    rank.barrier();
    layer.reset();
    plain.reset();
    between.reset();
    inside.reset();
    rank.barrier();
  }
  for (std::size_t way = 1; way < results.size() && !testing::Test::HasFailure(); ++way)
    for (std::size_t i = 0; i < results[0].size(); ++i) {
      SCOPED_TRACE(testing::Message() << "way " << way << " seed " << i + 1 << " rank " << me);
      EXPECT_EQ(results[0][i].y, results[way][i].y);
      EXPECT_EQ(results[0][i].dx, results[way][i].dx);
      EXPECT_EQ(results[0][i].dweight, results[way][i].dweight);
      if (integers) {
        EXPECT_EQ(results[0][i].g1, results[way][i].g1);
        EXPECT_EQ(results[0][i].g2, results[way][i].g2);
      }
    }
  rank.barrier();
}

#define NEED_NCCL()                                 \
  do {                                              \
    std::string why;                                \
    if (!nccl_available(&why)) GTEST_SKIP() << why; \
  } while (false)

TEST(GpuTwoHopLayer, OneRank) {
  NEED_DEVICES(1);
  run_layers(1, [](Rank& rank) {
    check_two_hop(rank, {1, 1, Link::kNvlink, Link::kNvlink}, Activation::kSwiGLU, false, true);
  });
}
TEST(GpuTwoHopLayer, OneNodeOfTwoRanks) {
  NEED_DEVICES(2);
  run_layers(2, [](Rank& rank) {
    check_two_hop(rank, {1, 2, Link::kNvlink, Link::kNvlink}, Activation::kSwiGLU, false, true);
  });
}
TEST(GpuTwoHopLayer, TwoNodesOverNvlink) {
  NEED_DEVICES(2);
  run_layers(2, [](Rank& rank) {
    check_two_hop(rank, {2, 1, Link::kNvlink, Link::kNvlink}, Activation::kRelu, true, true);
  });
}
TEST(GpuTwoHopLayer, TwoNodesOfOneRank) {
  NEED_DEVICES(2);
  NEED_NCCL();
  run_layers(2, [](Rank& rank) { check_two_hop(rank, {2, 1}, Activation::kSwiGLU, false, true); });
}
TEST(GpuTwoHopLayer, TwoNodesOfOneRankExactly) {
  NEED_DEVICES(2);
  NEED_NCCL();
  run_layers(2, [](Rank& rank) { check_two_hop(rank, {2, 1}, Activation::kRelu, true, true); });
}

// Four ranks on four GPUs; on two, ranks share them so that no exchange has two ranks on one GPU. Ranks that share a GPU
// wait for each other's turns, so it is slow.
std::vector<int> four_ranks() {
  return gpu_ranks::count_devices() >= 4 ? std::vector<int>{0, 1, 2, 3} : std::vector<int>{0, 1, 1, 0};
}
TEST(GpuTwoHopLayer, TwoNodesOfTwoRanks) {
  NEED_DEVICES(2);
  NEED_NCCL();
  run_layers(
      4,
      [](Rank& rank) {
        check_two_hop(rank, {2, 2}, Activation::kSwiGLU, false, false);
      },
      four_ranks());
}
TEST(GpuTwoHopLayer, TwoNodesOfTwoRanksExactly) {
  NEED_DEVICES(2);
  NEED_NCCL();
  run_layers(
      4,
      [](Rank& rank) {
        check_two_hop(rank, {2, 2}, Activation::kRelu, true, false);
      },
      four_ranks());
}
TEST(GpuTwoHopLayer, TwoNodesOfTwoRanksBothOverNccl) {
  NEED_DEVICES(2);
  NEED_NCCL();
  run_layers(
      4,
      [](Rank& rank) {
        check_two_hop(rank, {2, 2, Link::kNccl, Link::kNccl}, Activation::kRelu, true, false);
      },
      four_ranks());
}

// A rank of another node is killed: its peer there says so, by the number it has among all ranks, within the deadline.
TEST(GpuTwoHopLayer, LostPeerIsNamed) {
  NEED_DEVICES(2);
  NEED_NCCL();
  const auto results = gpu_ranks::run_processes(
      2,
      [](Rank& rank) {
        rank.use_device();
        const Nodes nodes{2, 1};
        Groups groups(rank, nodes);
        groups.between.names = {10, 11};
        groups.between_nccl = std::make_unique<NcclCommunicator>(groups.between, 20s);
        GpuTwoHopShape s = shape_of(nodes, Activation::kRelu, 3);
        s.deadline = 3s;
        RowExchange between(groups.between, two_hop_between(s, rank.rank), Link::kNccl, PeerPath::kBest,
                            groups.between_nccl.get());
        RowExchange inside(groups.inside, two_hop_inside(s, rank.rank));
        GpuTwoHopLayer layer(between, inside, 0, s);
        std::vector<Expert> experts;
        for (int e = 0; e < kExperts; ++e) experts.emplace_back(e);
        const Batch batch = draw(1, 2, true);
        Side side(batch, rank.rank, experts, s.layer.rank_of);
        side.run(layer, [&](cudaStream_t stream) { layer.wait(stream); });
        rank.barrier();
        if (rank.rank == 1) kill(getpid(), SIGKILL);
        const auto start = std::chrono::steady_clock::now();
        try {
          side.run(layer, [&](cudaStream_t stream) { layer.wait(stream); });
          ADD_FAILURE() << "no error";
        } catch (const Error& e) {
          EXPECT_TRUE(e.code() == ErrorCode::kTimeout || e.code() == ErrorCode::kTransport) << e.what();
          EXPECT_NE(e.message().find("rank 11"), std::string::npos) << e.what();
          std::fprintf(stderr, "reported: %s\n", e.what());
        }
        EXPECT_LT(std::chrono::steady_clock::now() - start, 12s);
        return testing::Test::HasFailure() ? 1 : 0;
      },
      60s);
  EXPECT_EQ(results[0], 0);
  EXPECT_EQ(results[1], -SIGKILL);
}

// A rank is killed, and a layer with a pass on its way is destroyed, not waited for. told: the host knows who is gone, and no
// deadline is waited for.
void destroyed_in_flight(const Nodes& nodes, std::chrono::seconds deadline, bool told) {
  const auto results = gpu_ranks::run_processes(
      2,
      [&](Rank& rank) {
        rank.use_device();
        auto known_from = std::chrono::steady_clock::time_point::max();
        Groups groups(rank, nodes);
        if (told) groups.inside.lost = [&] { return std::chrono::steady_clock::now() >= known_from; };
        GpuTwoHopShape s = shape_of(nodes, Activation::kRelu, 1);
        s.deadline = deadline;
        auto start = std::chrono::steady_clock::now();
        {
          RowExchange between(groups.between, two_hop_between(s, rank.rank), nodes.between, PeerPath::kBest,
                              groups.between_nccl.get());
          RowExchange inside(groups.inside, two_hop_inside(s, rank.rank), nodes.inside, PeerPath::kBest,
                             groups.inside_nccl.get());
          auto layer = std::make_unique<GpuTwoHopLayer>(between, inside, 0, s);
          std::vector<Expert> experts;
          for (int e = 0; e < kExperts; ++e) experts.emplace_back(e);
          const Batch batch = draw(1, 2, true);
          Side side(batch, rank.rank, experts, s.layer.rank_of);
          side.run(*layer, [&](cudaStream_t stream) { layer->wait(stream); });
          rank.barrier();
          if (rank.rank == 1) kill(getpid(), SIGKILL);
          start = std::chrono::steady_clock::now();
          known_from = start + 300ms;
          try {
            layer->forward({side.w1.data(), side.w2.data()}, side.x.data(), side.y.data(), {}, side.stream);
          } catch (const Error& e) {  // NCCL may find out by itself
            EXPECT_EQ(nodes.between, Link::kNccl) << e.what();
          }
          layer.reset();
          EXPECT_LT(std::chrono::steady_clock::now() - start, told ? 4s : 10s);
          EXPECT_TRUE(between.failed() || inside.failed());
        }
        EXPECT_LT(std::chrono::steady_clock::now() - start, told ? 8s : 16s);
        return testing::Test::HasFailure() ? 1 : 0;
      },
      60s);
  EXPECT_EQ(results[0], 0);
  EXPECT_EQ(results[1], -SIGKILL);
}
TEST(GpuTwoHopLayer, LostPeerOfTheNodeDoesNotHoldUpTheDestructor) {
  NEED_DEVICES(2);
  destroyed_in_flight({1, 2, Link::kNvlink, Link::kNvlink}, 25s, true);
}
TEST(GpuTwoHopLayer, LostPeerOfAnotherNodeDoesNotHoldUpTheDestructor) {
  NEED_DEVICES(2);
  NEED_NCCL();
  destroyed_in_flight({2, 1}, 3s, false);
}

// More routes for one node than fit: both say so, sums are NaN, and a plan that fits works afterwards.
TEST(GpuTwoHopLayer, OverflowIsReported) {
  NEED_DEVICES(2);
  NEED_NCCL();
  run_layers(2, [](Rank& rank) {
    const Nodes nodes{2, 1};
    Groups groups(rank, nodes);
    GpuTwoHopShape s = shape_of(nodes, Activation::kRelu, 2);
    s.max_routes_of_token = 1;
    s.imbalance = 1;
    {
      RowExchange between(groups.between, two_hop_between(s, rank.rank), Link::kNccl, PeerPath::kBest,
                          groups.between_nccl.get());
      RowExchange inside(groups.inside, two_hop_inside(s, rank.rank));
      GpuTwoHopLayer layer(between, inside, 0, s);
      std::vector<Expert> experts;
      for (int e = 0; e < kExperts; ++e) experts.emplace_back(e);
      const auto wait = [&](cudaStream_t stream) { layer.wait(stream); };
      const Batch all_to_one = draw(4, 2, true);
      Side large(all_to_one, rank.rank, experts, s.layer.rank_of);
      try {
        large.run(layer, wait);
        ADD_FAILURE() << "no error";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::kInvalidState) << e.what();
        EXPECT_NE(e.message().find("max_routes"), std::string::npos) << e.what();
      }
      for (const std::uint16_t v : large.y.get()) ASSERT_TRUE(std::isnan(from_bf16(v)));
      layer.clear(large.stream);
      Batch fits = draw(4, 2, true);  // every rank to itself
      for (int r = 0; r < 2; ++r)
        for (std::int32_t& e : fits.routing[n(r)].expert) e = r;
      Side small(fits, rank.rank, experts, s.layer.rank_of);
      expect_exact(reference(experts, s.layer.rank_of, rank.rank, fits.routing, fits.x, fits.dy),
                   small.run(layer, wait));
      // More than this rank's own buffers hold is refused before anything is written.
      HostRouting many;
      for (std::int64_t t = 0; t < kTokens; ++t)
        for (int e = 0; e < kExperts; ++e) {
          many.expert.push_back(e);
          many.weight.push_back(1);
          if (e + 1 == kExperts) many.row_ptr.push_back(static_cast<std::int64_t>(many.expert.size()));
        }
      DeviceArray<std::int64_t> row_ptr(many.row_ptr);
      DeviceArray<std::int32_t> expert(many.expert);
      DeviceArray<float> weight(many.weight);
      EXPECT_THROW(layer.plan({row_ptr.data(), expert.data(), weight.data()}, kTokens, small.stream), Error);
      rank.barrier();
    }
    rank.barrier();
  });
}

// Needs no GPU.
TEST(GpuTwoHopLayer, CostModelCutsWhereTravelAndWorkAreAlike) {
  GpuTwoHopShape s = shape_of({2, 1}, Activation::kSwiGLU, 0);
  EXPECT_EQ(two_hop_chunks(s), 1);  // too small to be cut
  s.layer.ffn = 1024;
  s.hidden = 2048;
  s.max_tokens = 16384;
  s.layer.num_experts = 64;
  s.layer.rank_of.assign(64, 0);
  s.layer.rank_of[1] = 1;
  const int even = two_hop_chunks(s);
  EXPECT_GE(even, 2);
  EXPECT_LE(even, 8);
  s.network_bytes_s = 1e15;  // nothing to hide
  EXPECT_EQ(two_hop_chunks(s), 1);
  s.network_bytes_s = 40e9;
  s.chunks = 5;
  EXPECT_EQ(two_hop_chunks(s), 5);
  s.chunks = 0;
  s.num_nodes = 1;
  s.layer.rank_of[1] = 0;
  EXPECT_EQ(two_hop_chunks(s), 1);
}
TEST(GpuTwoHopLayer, RefusesShapes) {
  const auto refused = [](auto change, const char* name) {
    GpuTwoHopShape s = shape_of({2, 2}, Activation::kSwiGLU, 0);
    change(s);
    try {
      two_hop_between(s, 0);
      ADD_FAILURE() << name << " was taken";
    } catch (const Error& e) {
      EXPECT_NE(e.message().find(name), std::string::npos) << e.what();
    }
  };
  refused([](GpuTwoHopShape& s) { s.num_nodes = 0; }, "nodes");
  refused([](GpuTwoHopShape& s) { s.max_tokens = 0; }, "max_tokens");
  refused([](GpuTwoHopShape& s) { s.hidden = 12; }, "hidden");
  refused([](GpuTwoHopShape& s) { s.chunks = 17; }, "chunks");
  refused([](GpuTwoHopShape& s) { s.imbalance = 0.5; }, "imbalance");
  refused([](GpuTwoHopShape& s) { s.network_bytes_s = 0; }, "network_bytes_s");
  refused([](GpuTwoHopShape& s) { s.layer.rank_of[2] = 4; }, "an expert lives on rank 4");
  refused([](GpuTwoHopShape& s) { s.layer.rank_of.pop_back(); }, "rank_of");
}

}  // namespace
}  // namespace sluice
