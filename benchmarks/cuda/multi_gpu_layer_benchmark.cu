// A whole MoE layer over the GPUs of one host, one process a GPU, forward and backward, overlapped and sequential, against
// the time of dense cuBLAS products of the same FLOPs (forward: two; backward: dgrad and wgrad of each).
//
// usage: multi_gpu_layer_cuda_benchmark [--ranks N] [--shapes A,B] [--routing uniform|zipf|FILE] [--experts N]
//        [--comm-sms A,B] [--link nvlink|nccl|nccl-hosts|two-hop] [--nodes N] [--chunks A,B] [--iterations N] [--json]
//        [--commit HASH] [--date DATE]
//   --link      nccl: NCCL as it likes; nccl-hosts: NCCL that takes every rank for a host of its own, over sockets of the
//               loopback interface (emulated: no network card has that speed and its delays)
//               two-hop: rows cross once to each of --nodes (2) pretended hosts of nccl-hosts' kind, and go on over
//               NVLink: in one piece, and in as many chunks as the layer's cost model says for the network's measured
//               speed, beside one hop over NCCL;
//               --chunks: and in so many
//   --comm-sms  processors of the exchange beside GEMMs, 0: by the layer's cost model
//
// The plan is ready when the clock starts; `plan` is timed by itself. Times are of the slowest rank (see
// exchange_benchmark.cu); all arms of a shape take turns, each after the dense products, because a card at its power limit
// has the clock that what ran before has left it. The overlapped and the sequential way must give the same bits.
// floor: the larger of what this rank's processors must do anyway (`local_work`: rows to experts, GEMMs, reduced rows, sums,
// back to back, nobody waiting for anybody) and of the exchange alone; overlap efficiency = (sequential - measured) /
// (sequential - floor), where sequential is above the floor by 5% or more; exposed = measured - local_work. The sequential
// schedule waits for an exchange before it starts a GEMM, but inside an exchange rows travel while others are expanded or
// reduced.
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../tests/support/gpu_ranks.hpp"
#include "sluice/comm/cuda/nccl_library.hpp"
#include "sluice/comm/cuda/row_exchange.hpp"
#include "sluice/runtime/src/cuda/gpu_layer.hpp"
#include "sluice/runtime/src/cuda/gpu_two_hop_layer.hpp"
#include "timing.cuh"

namespace {

using namespace sluice;
using namespace sluice::benchmarks;
using namespace sluice::comm::cuda;
using gpu_ranks::Rank;
using kernels::Activation;

constexpr unsigned kSeed = 20260101;

struct ShapeOf {
  const char* name;
  std::int64_t tokens, hidden, ffn;
  int experts, top_k;
  Activation activation;
};
// The last two: Megatron-Core's moe_perf cases.
constexpr ShapeOf kShapes[] = {
    {"deepseek-v3", 8192, 7168, 2048, 64, 8, Activation::kSwiGLU},
    {"mixtral", 8192, 4096, 14336, 8, 2, Activation::kSwiGLU},
    {"qwen3-235b", 8192, 4096, 1536, 128, 8, Activation::kSwiGLU},
    {"qwen3-30b", 16384, 2048, 768, 128, 8, Activation::kSwiGLU},
    {"olmoe", 16384, 2048, 1024, 64, 8, Activation::kSwiGLU},
    {"moe_perf-deepseek", 4096, 7168, 2048, 32, 8, Activation::kGelu},
    {"moe_perf-mixtral", 4096, 4096, 14336, 8, 2, Activation::kGelu},
};
struct Arguments {
  Options given;
  int ranks, experts, nodes;
  std::string shapes, routing, comm_sms, link, chunks;
  explicit Arguments(Options options)
      : given(std::move(options)),
        ranks(std::atoi(given.value("--ranks").c_str())),
        experts(std::atoi(given.value("--experts").c_str())),
        nodes(std::atoi(given.value("--nodes", "2").c_str())),
        shapes(given.value("--shapes", "deepseek-v3,mixtral,qwen3-235b,qwen3-30b,olmoe")),
        routing(given.value("--routing", "uniform")),
        comm_sms(given.value("--comm-sms", "0")),
        link(given.value("--link", "nvlink")),
        chunks(given.value("--chunks")) {}
};
struct Row {
  std::string shape, kase;
  Timing time;
  double baseline_us, sequential_us, floor_us, efficiency, exposed_us;
};

std::string efficiency_of(const Row& row, const char* undefined) {
  if (std::isnan(row.efficiency)) return undefined;
  char text[32];
  std::snprintf(text, sizeof text, "%.3f", row.efficiency);
  return text;
}

__global__ void wait_kernel(std::uint64_t ns) {
  std::uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < ns);
}
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

struct Bench {
  Rank& rank;
  const Arguments& options;
  std::vector<Row>& rows;
  cudaStream_t stream = nullptr;
  cudaEvent_t begin{}, end{};
  Buffer<unsigned char> flush{std::int64_t{256} << 20};
  cublasHandle_t blas{};
  RowExchange* exchange = nullptr;
  std::unique_ptr<RowExchange> meeting;  // for barriers: over NVLink whatever is measured
  std::unique_ptr<NcclCommunicator> nccl;

  Bench(Rank& r, const Arguments& o, std::vector<Row>& out) : rank(r), options(o), rows(out) {
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cublasCreate(&blas));
    CHECK(cublasSetStream(blas, stream));
    ExchangeShape small;
    small.max_tokens = 1;
    small.hidden = 8;
    meeting = std::make_unique<RowExchange>(rank.bootstrap(), small);
    if (options.link != "nvlink")
      nccl = std::make_unique<NcclCommunicator>(rank.bootstrap(), std::chrono::seconds(60));
  }
  // Arms take turns, each after `before`.
  std::vector<Timing> time(const std::vector<std::function<void()>>& arms,
                           const std::function<void()>& before = {}) {
    std::vector<float> mine;
    for (int i = -2; i < options.given.iterations; ++i) {
      for (const auto& arm : arms) {
        if (before) before();
        CHECK(cudaMemsetAsync(flush.data, i & 0xFF, std::size_t{256} << 20, stream));
        wait_kernel<<<1, 1, 0, stream>>>(400000);
        meeting->barrier(stream);
        CHECK(cudaEventRecord(begin, stream));
        arm();
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaStreamSynchronize(stream));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 0) mine.push_back(ms);
      }
    }
    if (exchange != nullptr) exchange->check(0);
    std::vector<float> all(mine.size() * static_cast<std::size_t>(rank.num_ranks));
    rank.all_gather(mine.data(), all.data(), mine.size() * sizeof(float));
    std::vector<std::vector<double>> slowest(arms.size(), std::vector<double>(mine.size() / arms.size(), 0));
    for (std::size_t i = 0; i < all.size(); ++i) {
      double& us = slowest[i % arms.size()][i % mine.size() / arms.size()];
      us = std::max(us, all[i] * 1e3);
    }
    std::vector<Timing> times;
    for (auto& us : slowest) times.push_back(summarize(std::move(us)));
    return times;
  }
  void report(Row row) {
    if (rank.rank != 0) return;
    std::fprintf(stderr, "%-18s %-26s %9.1f us (mad %5.1f)", row.shape.c_str(), row.kase.c_str(),
                 row.time.median_us, row.time.mad_us);
    if (row.baseline_us > 0)
      std::fprintf(stderr, "  dense %9.1f x %.3f", row.baseline_us, row.time.median_us / row.baseline_us);
    if (row.sequential_us > 0)
      std::fprintf(stderr, "  sequential %9.1f floor %9.1f efficiency %s exposed %.1f", row.sequential_us,
                   row.floor_us, efficiency_of(row, "undefined").c_str(), row.exposed_us);
    std::fprintf(stderr, "\n");
    rows.push_back(std::move(row));
  }
  // Column-major: c[n, m] = op_b(b)[n, k] op_a(a)[k, m]. wgrad adds to fp32.
  void dense(cublasOperation_t op_b, cublasOperation_t op_a, std::int64_t n, std::int64_t m, std::int64_t k,
             const void* b, std::int64_t ldb, const void* a, std::int64_t lda, void* c, std::int64_t ldc,
             bool wgrad) {
    const float one = 1, zero = 0;
    CHECK(cublasGemmEx(blas, op_b, op_a, static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), &one,
                       b, CUDA_R_16BF, static_cast<int>(ldb), a, CUDA_R_16BF, static_cast<int>(lda),
                       wgrad ? &one : &zero, c, wgrad ? CUDA_R_32F : CUDA_R_16BF, static_cast<int>(ldc),
                       CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

  // Tokens' experts, CSR.
  std::pair<std::vector<std::int64_t>, std::vector<std::int32_t>> draw(const ShapeOf& shape) const {
    std::mt19937 random(kSeed + static_cast<unsigned>(rank.rank));
    std::vector<double> weights(static_cast<std::size_t>(shape.experts), 1.0);
    if (options.routing == "zipf") {
      for (int e = 0; e < shape.experts; ++e) weights[static_cast<std::size_t>(e)] = 1.0 / (e + 1);
      std::mt19937 same(7);
      std::shuffle(weights.begin(), weights.end(), same);
    }
    if (options.routing != "uniform" && options.routing != "zipf") {
      std::ifstream file(options.routing);
      std::vector<double> counts;
      for (double count; file >> count;) counts.push_back(count);
      if (counts.empty()) throw Error(ErrorCode::kIo, "no counts in " + options.routing);
      for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = counts[i % counts.size()] + 1e-3;
    }
    std::discrete_distribution<std::int32_t> pick(weights.begin(), weights.end());
    std::vector<std::int64_t> row_ptr{0};
    std::vector<std::int32_t> expert;
    for (std::int64_t t = 0; t < shape.tokens; ++t) {
      std::vector<std::int32_t> chosen;
      while (static_cast<int>(chosen.size()) < shape.top_k) {
        const std::int32_t e = pick(random);
        if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
      }
      std::sort(chosen.begin(), chosen.end());
      expert.insert(expert.end(), chosen.begin(), chosen.end());
      row_ptr.push_back(static_cast<std::int64_t>(expert.size()));
    }
    return {row_ptr, expert};
  }

  void run(ShapeOf shape) {
    const int ranks = rank.num_ranks;
    const int local = shape.experts / ranks;
    const auto [row_ptr, expert] = draw(shape);
    const std::vector<float> route_weight(expert.size(), 1.0f / static_cast<float>(shape.top_k));
    ExchangeShape e;
    e.max_tokens = shape.tokens;
    e.hidden = shape.hidden;
    e.max_routes = shape.tokens * ranks * shape.top_k;
    if (options.routing == "uniform") e.max_routes = shape.tokens * shape.top_k * 3 / 2;
    e.num_local_slots = local;
    RowExchange rows_between(rank.bootstrap(), e, nccl != nullptr ? Link::kNccl : Link::kNvlink,
                             PeerPath::kBest, nccl.get());
    exchange = &rows_between;
    GpuLayerShape s;
    s.ffn = shape.ffn;
    s.activation = shape.activation;
    s.num_experts = shape.experts;
    for (int i = 0; i < shape.experts; ++i) s.rank_of.push_back(i / local);
    s.training = true;
    {
      GpuLayer layer(rows_between, 0, s);
      const std::int64_t pre = kernels::preactivation_cols(shape.activation, shape.ffn);
      const std::int64_t count1 = local * pre * shape.hidden, count2 = local * shape.hidden * shape.ffn;
      Bf16 w1(count1), w2(count2), x(shape.tokens * shape.hidden), dy(shape.tokens * shape.hidden),
          y(shape.tokens * shape.hidden), dx(shape.tokens * shape.hidden);
      Buffer<float> g1(count1), g2(count2), dweight(static_cast<std::int64_t>(expert.size()));
      const Buffer<std::int64_t> row_ptr_d(row_ptr);
      const Buffer<std::int32_t> expert_d(expert);
      const Buffer<float> weight_d(route_weight);
      const auto salt = static_cast<std::uint64_t>(rank.rank) * 10;
      fill<<<1024, 256>>>(w1.data, count1, salt + 1, 0.03f);
      fill<<<1024, 256>>>(w2.data, count2, salt + 2, 0.03f);
      fill<<<1024, 256>>>(x.data, shape.tokens * shape.hidden, salt + 3, 1.0f);
      fill<<<1024, 256>>>(dy.data, shape.tokens * shape.hidden, salt + 4, 1.0f);
      CHECK(cudaMemset(g1.data, 0, static_cast<std::size_t>(count1) * 4));
      CHECK(cudaMemset(g2.data, 0, static_cast<std::size_t>(count2) * 4));
      CHECK(cudaDeviceSynchronize());
      const auto plan = [&] {
        layer.plan({row_ptr_d.data, expert_d.data, weight_d.data}, shape.tokens, stream);
      };
      report({shape.name, "plan", time({plan})[0], 0, 0, 0, 0, 0});
      const auto received = rows_between.host_counts(0, stream).receive_routes;
      std::vector<std::int64_t> all(static_cast<std::size_t>(ranks));
      rank.all_gather(&received, all.data(), sizeof received);
      const GpuExperts experts{w1.data, w2.data};
      const auto forward = [&](const GpuLayerOptions& o) {
        layer.forward(experts, x.data, y.data, o, stream);
      };
      using kernels::cuda::GradientUpdate;
      const auto backward = [&](const GpuLayerOptions& o, GradientUpdate update = GradientUpdate::kAdd) {
        layer.backward(experts, {g1.data, g2.data, update}, dy.data, dx.data, dweight.data, o, stream);
      };
      const auto options_of = [](GpuSchedule schedule, int sms, bool keep) {
        GpuLayerOptions o;
        o.schedule = schedule;
        o.comm_sms = sms;
        o.keep = keep;
        return o;
      };
      std::vector<int> wanted;
      for (const std::string& sms : split(options.comm_sms)) wanted.push_back(std::atoi(sms.c_str()));
      // The same bits.
      std::vector<std::uint16_t> y0(static_cast<std::size_t>(shape.tokens * shape.hidden)), y1(y0.size()),
          d0(y0.size()), d1(y0.size());
      const auto pass = [&](const GpuLayerOptions& o, std::vector<std::uint16_t>& yy,
                            std::vector<std::uint16_t>& dd) {
        CHECK(cudaMemset(y.data, 0xFF, yy.size() * 2));
        CHECK(cudaMemset(dx.data, 0xFF, dd.size() * 2));
        CHECK(cudaDeviceSynchronize());
        forward(o);
        backward(o);
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaMemcpy(yy.data(), y.data, yy.size() * 2, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(dd.data(), dx.data, dd.size() * 2, cudaMemcpyDeviceToHost));
      };
      pass(options_of(GpuSchedule::kSequential, 0, true), y0, d0);
      for (const int sms : wanted) {
        pass(options_of(GpuSchedule::kOverlapped, sms, true), y1, d1);
        if (y0 != y1 || d0 != d1) {
          std::fprintf(stderr, "rank %d %s: overlapped and sequential differ (y %d, dx %d)\n", rank.rank,
                       shape.name, y0 != y1, d0 != d1);
          std::exit(1);
        }
      }
      CHECK(cudaMemset(y.data, 0xFF, y0.size() * 2));
      CHECK(cudaDeviceSynchronize());
      forward(options_of(GpuSchedule::kAuto, 0, false));
      CHECK(cudaStreamSynchronize(stream));
      CHECK(cudaMemcpy(y1.data(), y.data, y1.size() * 2, cudaMemcpyDeviceToHost));
      if (y0 != y1) {
        std::fprintf(stderr, "rank %d %s: without keeping, y differs\n", rank.rank, shape.name);
        std::exit(1);
      }
      // Dense products of the heaviest rank's FLOPs.
      const std::int64_t m = *std::max_element(all.begin(), all.end()), hidden = shape.hidden,
                         ffn = shape.ffn;
      Bf16 rows_in(m * hidden), rows_h(m * pre), rows_act(m * ffn), big1(pre * hidden), big2(hidden * ffn);
      Buffer<float> big_g(pre * hidden);
      for (const auto& [data, count] :
           {std::pair{&rows_in, m * hidden}, std::pair{&rows_h, m * pre}, std::pair{&rows_act, m * ffn},
            std::pair{&big1, pre * hidden}, std::pair{&big2, hidden * ffn}})
        fill<<<1024, 256>>>(data->data, count, 77, 0.03f);
      CHECK(cudaMemset(big_g.data, 0, static_cast<std::size_t>(pre * hidden) * 4));
      CHECK(cudaDeviceSynchronize());
      const auto dense_forward = [&] {
        dense(CUBLAS_OP_T, CUBLAS_OP_N, pre, m, hidden, big1.data, hidden, rows_in.data, hidden, rows_h.data,
              pre, false);
        dense(CUBLAS_OP_T, CUBLAS_OP_N, hidden, m, ffn, big2.data, ffn, rows_act.data, ffn, rows_in.data,
              hidden, false);
      };
      const auto dense_backward = [&] {
        dense(CUBLAS_OP_N, CUBLAS_OP_N, ffn, m, hidden, big2.data, ffn, rows_in.data, hidden, rows_act.data,
              ffn, false);
        dense(CUBLAS_OP_N, CUBLAS_OP_N, hidden, m, pre, big1.data, hidden, rows_h.data, pre, rows_in.data,
              hidden, false);
        dense(CUBLAS_OP_N, CUBLAS_OP_T, ffn, hidden, m, rows_act.data, ffn, rows_in.data, hidden, big_g.data,
              ffn, true);
        dense(CUBLAS_OP_N, CUBLAS_OP_T, hidden, pre, m, rows_in.data, hidden, rows_h.data, pre, big_g.data,
              hidden, true);
      };
      const GpuLayerOptions sequential = options_of(GpuSchedule::kSequential, 0, false),
                            sequential_kept = options_of(GpuSchedule::kSequential, 0, true),
                            best = options_of(GpuSchedule::kAuto, 0, false),
                            best_kept = options_of(GpuSchedule::kAuto, 0, true);
      std::vector<std::function<void()>> arms = {
          dense_forward,
          [&] {
            dense_forward();
            dense_backward();
          },
          [&] { layer.gemms_only(experts, x.data, best, stream); },
          [&] { layer.local_only(experts, x.data, y.data, best, stream); },
          [&] { layer.exchange_only(x.data, y.data, sequential, stream); },
          [&] { forward(sequential); },
          [&] {
            forward(sequential_kept);
            backward(sequential_kept);
          },
          [&] {
            forward(best_kept);
            backward(best_kept, GradientUpdate::kWrite);
          }};
      std::vector<std::pair<std::string, GpuLayerOptions>> ways = {{"", best}};
      for (const int sms : wanted)
        ways.emplace_back(sms == 0 ? "_overlapped" : "_overlapped, comm " + std::to_string(sms),
                          options_of(GpuSchedule::kOverlapped, sms, false));
      for (const int sms : wanted)
        if (sms != 0)
          ways.emplace_back("_gathered, comm " + std::to_string(sms),
                            options_of(GpuSchedule::kGathered, sms, false));
      for (const auto& [name, way] : ways) {
        GpuLayerOptions kept = way;
        kept.keep = true;
        arms.push_back([&forward, way] { forward(way); });
        arms.push_back([&forward, &backward, kept] {
          forward(kept);
          backward(kept);
        });
      }
      const std::vector<Timing> times = time(arms, dense_forward);
      const double dense_f = times[0].median_us, dense_fb = times[1].median_us, local_us = times[3].median_us;
      const double floor = std::max(local_us, times[4].median_us), sequential_us = times[5].median_us;
      report({shape.name, "gemms_alone", times[2], dense_f, 0, 0, 0, 0});
      report({shape.name, "local_work", times[3], dense_f, 0, 0, 0, 0});
      report({shape.name, "exchange_alone", times[4], 0, 0, 0, 0, 0});
      report({shape.name, "layer_forward_sequential", times[5], dense_f, 0, 0, 0, 0});
      report({shape.name, "layer_forward_backward_sequential", times[6], dense_fb, 0, 0, 0, 0});
      // As in the first backward of a step.
      report({shape.name, "layer_forward_backward, gradients written", times[7], dense_fb, 0, 0, 0, 0});
      for (std::size_t i = 0; i < ways.size(); ++i) {
        const Timing f = times[8 + 2 * i], fb = times[9 + 2 * i];
        const bool defined = sequential_us >= 1.05 * floor;
        report({shape.name, "layer_forward" + ways[i].first, f, dense_f, sequential_us, floor,
                defined ? (sequential_us - f.median_us) / (sequential_us - floor) : std::nan(""),
                f.median_us - local_us});
        report({shape.name, "layer_forward_backward" + ways[i].first, fb, dense_fb, 0, 0, 0, 0});
      }
      rank.barrier();
    }
    rank.barrier();
  }

  // One hop over NCCL (`sequential` of the report), two hops in one piece, and in the number of chunks of the cost model.
  void run_two_hop(const ShapeOf& shape) {
    const int ranks = rank.num_ranks, local = shape.experts / ranks, per_node = ranks / options.nodes;
    const auto [row_ptr, expert] = draw(shape);
    const std::vector<float> route_weight(expert.size(), 1.0f / static_cast<float>(shape.top_k));
    const double imbalance = options.routing == "uniform" ? 1.5 : 0;
    GpuTwoHopShape s;
    s.layer.ffn = shape.ffn;
    s.layer.activation = shape.activation;
    s.layer.num_experts = shape.experts;
    for (int i = 0; i < shape.experts; ++i) s.layer.rank_of.push_back(i / local);
    s.layer.training = true;
    s.num_nodes = options.nodes;
    s.ranks_per_node = per_node;
    s.max_tokens = shape.tokens;
    s.hidden = shape.hidden;
    s.max_routes_of_token = shape.top_k;
    s.imbalance = imbalance;
    s.deadline = std::chrono::seconds(20);
    std::vector<int> places, here;
    for (int i = 0; i < options.nodes; ++i) places.push_back(i * per_node + rank.rank % per_node);
    for (int i = 0; i < per_node; ++i) here.push_back(rank.rank / per_node * per_node + i);
    const Bootstrap between = rank.bootstrap_of(places), inside = rank.bootstrap_of(here);
    const std::int64_t values = shape.tokens * shape.hidden;
    const auto salt = static_cast<std::uint64_t>(rank.rank) * 10;
    {
      NcclCommunicator network(between, std::chrono::seconds(60));
      Bf16 x(values), y(values);
      fill<<<1024, 256>>>(x.data, values, salt + 3, 1.0f);
      CHECK(cudaDeviceSynchronize());
      // What the network carries, for the cost model: every row to another node.
      std::vector<NcclTransfer> all_rows;
      const auto part = static_cast<std::size_t>(values / std::max(1, options.nodes - 1)) * 2;
      for (int d = 0, at = 0; d < options.nodes; ++d) {
        if (d == between.rank) continue;
        const std::size_t offset = part * static_cast<std::size_t>(at++);
        all_rows.push_back({d, reinterpret_cast<char*>(x.data) + offset, part,
                            reinterpret_cast<char*>(y.data) + offset, part});
      }
      const Timing travel = time({[&] { network.exchange(all_rows, stream); }})[0];
      report({shape.name, "network, " + std::to_string(values * 2 / 1000000) + " MB", travel, 0, 0, 0,
              std::nan(""), 0});
      s.network_bytes_s = static_cast<double>(values * 2) / travel.median_us * 1e6;
      struct Way {
        std::string name;
        std::unique_ptr<RowExchange> between, inside;
        std::unique_ptr<GpuTwoHopLayer> two;
        std::unique_ptr<GpuLayer> one;
      };
      std::vector<Way> ways(1);
      ExchangeShape e;
      e.max_tokens = shape.tokens;
      e.hidden = shape.hidden;
      e.max_routes = static_cast<std::int64_t>(static_cast<double>(shape.tokens * shape.top_k) *
                                               (imbalance > 0 ? imbalance : ranks));
      e.num_local_slots = local;
      ways[0].name = "one_hop";
      ways[0].between =
          std::make_unique<RowExchange>(rank.bootstrap(), e, Link::kNccl, PeerPath::kBest, nccl.get());
      ways[0].one = std::make_unique<GpuLayer>(*ways[0].between, 0, s.layer);
      std::vector<int> cuts = {1, two_hop_chunks(s)};
      for (const std::string& more : split(options.chunks)) cuts.push_back(std::atoi(more.c_str()));
      for (const int cut : cuts) {
        s.chunks = cut;
        Way w;
        w.name = "two_hops, " + std::to_string(cut) + (cut == 1 ? " chunk" : " chunks");
        w.between = std::make_unique<RowExchange>(between, two_hop_between(s, rank.rank), Link::kNccl,
                                                  PeerPath::kBest, &network);
        w.inside = std::make_unique<RowExchange>(inside, two_hop_inside(s, rank.rank));
        w.two = std::make_unique<GpuTwoHopLayer>(*w.between, *w.inside, 0, s);
        ways.push_back(std::move(w));
      }
      const std::int64_t pre = kernels::preactivation_cols(shape.activation, shape.ffn);
      const std::int64_t count1 = local * pre * shape.hidden, count2 = local * shape.hidden * shape.ffn;
      Bf16 w1(count1), w2(count2), dy(values), dx(values);
      Buffer<float> g1(count1), g2(count2), dweight(static_cast<std::int64_t>(expert.size()));
      const Buffer<std::int64_t> row_ptr_d(row_ptr);
      const Buffer<std::int32_t> expert_d(expert);
      const Buffer<float> weight_d(route_weight);
      fill<<<1024, 256>>>(w1.data, count1, salt + 1, 0.03f);
      fill<<<1024, 256>>>(w2.data, count2, salt + 2, 0.03f);
      fill<<<1024, 256>>>(dy.data, values, salt + 4, 1.0f);
      CHECK(cudaMemset(g1.data, 0, static_cast<std::size_t>(count1) * 4));
      CHECK(cudaMemset(g2.data, 0, static_cast<std::size_t>(count2) * 4));
      CHECK(cudaDeviceSynchronize());
      const auto plan = [&](Way& w) {
        const kernels::cuda::ConstRouting routing{row_ptr_d.data, expert_d.data, weight_d.data};
        w.one != nullptr ? w.one->plan(routing, shape.tokens, stream)
                         : w.two->plan(routing, shape.tokens, stream);
      };
      const auto pass = [&](Way& w, bool both) {
        const GpuExperts experts{w1.data, w2.data};
        const GpuExpertGradients gradients{g1.data, g2.data};
        GpuLayerOptions o;
        o.keep = both;
        const auto run = [&](auto& layer) {
          layer.forward(experts, x.data, y.data, o, stream);
          if (both) layer.backward(experts, gradients, dy.data, dx.data, dweight.data, o, stream);
        };
        w.one != nullptr ? run(*w.one) : run(*w.two);
      };
      const auto done = [&](Way& w) { w.one != nullptr ? w.between->wait(0, stream) : w.two->wait(stream); };
      // The same bits from all cuts, and from one hop where a node has one rank.
      std::vector<std::uint16_t> first_y(static_cast<std::size_t>(values)), first_dx(first_y.size()),
          this_y(first_y.size()), this_dx(first_y.size());
      for (std::size_t i = 0; i < ways.size(); ++i) {
        CHECK(cudaMemset(y.data, 0xFF, this_y.size() * 2));
        CHECK(cudaMemset(dx.data, 0xFF, this_y.size() * 2));
        CHECK(cudaDeviceSynchronize());
        plan(ways[i]);
        pass(ways[i], true);
        done(ways[i]);
        CHECK(cudaMemcpy(this_y.data(), y.data, this_y.size() * 2, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(this_dx.data(), dx.data, this_y.size() * 2, cudaMemcpyDeviceToHost));
        if (i == 0 || (i == 1 && per_node > 1)) first_y = this_y, first_dx = this_dx;
        if (first_y != this_y || first_dx != this_dx) {
          std::fprintf(stderr, "rank %d %s: %s differs (y %d, dx %d)\n", rank.rank, shape.name,
                       ways[i].name.c_str(), first_y != this_y, first_dx != this_dx);
          std::exit(1);
        }
        rank.barrier();
      }
      std::vector<std::function<void()>> arms;
      for (Way& w : ways) {
        arms.push_back([&] { plan(w); });
        arms.push_back([&] { pass(w, false); });
        arms.push_back([&] { pass(w, true); });
      }
      const std::vector<Timing> times = time(arms);
      for (std::size_t i = 0; i < ways.size(); ++i) {
        const char* const kinds[] = {"plan, ", "layer_forward, ", "layer_forward_backward, "};
        for (std::size_t kind = 0; kind < 3; ++kind)
          report({shape.name, kinds[kind] + ways[i].name, times[3 * i + kind], 0, 0, 0, std::nan(""), 0});
        done(ways[i]);
      }
      rank.barrier();
    }
    rank.barrier();
  }
};

int run_rank(Rank& rank, const Arguments& options) {
  if (options.link == "two-hop" && (options.nodes < 1 || rank.num_ranks % options.nodes != 0))
    throw Error(ErrorCode::kInvalidArgument, "--nodes must divide the ranks");
  if (options.link == "nccl-hosts" || options.link == "two-hop") {  // before NCCL is loaded
    const int host = options.link == "two-hop" ? rank.rank / (rank.num_ranks / options.nodes) : rank.rank;
    setenv("NCCL_HOSTID", ("pretended-host-" + std::to_string(host)).c_str(), 1);
    setenv("NCCL_P2P_DISABLE", "1", 1);
    setenv("NCCL_SHM_DISABLE", "1", 1);
    setenv("NCCL_IB_DISABLE", "1", 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 1);
  } else if (options.link != "nvlink" && options.link != "nccl") {
    throw Error(ErrorCode::kInvalidArgument,
                "--link is " + options.link + "; nvlink, nccl, nccl-hosts or two-hop is needed");
  }
  rank.use_device();
  std::vector<Row> rows;
  Bench bench(rank, options, rows);
  for (const std::string& name : split(options.shapes)) {
    const ShapeOf* found = nullptr;
    for (const ShapeOf& s : kShapes)
      if (name == s.name) found = &s;
    if (found == nullptr) throw Error(ErrorCode::kInvalidArgument, "no shape " + name);
    ShapeOf shape = *found;
    if (options.experts > 0 && shape.experts >= 64) shape.experts = options.experts;
    if (options.link == "two-hop") {
      bench.run_two_hop(shape);
    } else {
      bench.run(shape);
    }
  }
  if (rank.rank != 0 || !options.given.json) return 0;
  cudaDeviceProp properties{};
  CHECK(cudaGetDeviceProperties(&properties, rank.device));
  std::string version = "unknown";
  std::ifstream("/sys/module/nvidia/version") >> version;
  std::printf(
      "{\"date\": \"%s\", \"commit\": \"%s\", \"device\": \"%d x %s\", \"driver\": \"%s\", \"link\": \"%s\", "
      "\"routing\": \"%s\", "
      "\"iterations\": %d,\n \"rows\": [\n",
      options.given.date.c_str(), options.given.commit.c_str(), rank.num_ranks, properties.name,
      version.c_str(), options.link.c_str(), options.routing.c_str(), options.given.iterations);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    std::printf(
        "  {\"shape\": \"%s\", \"case\": \"%s\", \"median_us\": %.2f, \"mad_us\": %.2f, \"baseline\": "
        "\"cublas_dense\", \"baseline_us\": %.2f, \"ratio\": %.4f, \"sequential_us\": %.2f, \"floor_us\": "
        "%.2f, "
        "\"overlap_efficiency\": %s, \"exposed_us\": %.1f}%s\n",
        r.shape.c_str(), r.kase.c_str(), r.time.median_us, r.time.mad_us, r.baseline_us,
        r.baseline_us / r.time.median_us, r.sequential_us, r.floor_us, efficiency_of(r, "null").c_str(),
        r.exposed_us, i + 1 < rows.size() ? "," : "");
  }
  std::printf("]}\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments options(parse_options(
      argc, argv,
      {"--ranks", "--shapes", "--routing", "--experts", "--comm-sms", "--link", "--nodes", "--chunks"}));
  if (options.ranks == 0) options.ranks = gpu_ranks::count_devices();
  if (options.ranks < 1) {
    std::fprintf(stderr, "no CUDA device\n");
    return 1;
  }
  const auto results = gpu_ranks::run_processes(
      options.ranks, [&](Rank& rank) { return run_rank(rank, options); }, std::chrono::seconds(500));
  for (std::size_t r = 0; r < results.size(); ++r) {
    if (results[r] == 0) continue;
    std::fprintf(stderr, "rank %zu ended with %d\n", r, results[r]);
    return 1;
  }
  return 0;
}
