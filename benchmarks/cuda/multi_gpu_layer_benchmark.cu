// A whole MoE layer over the GPUs of one host, one process a GPU, forward and backward, overlapped and sequential, against
// the time of dense cuBLAS products of the same FLOPs (forward: two; backward: dgrad and wgrad of each).
//
// usage: multi_gpu_layer_cuda_benchmark [--ranks N] [--shapes A,B] [--routing uniform|zipf] [--experts N] [--iterations N]
//        [--comm-sms A,B] [--json] [--commit HASH] [--date DATE]
//
// The plan is ready when the clock starts; `plan` is timed by itself. Times are of the slowest rank (see
// exchange_benchmark.cu). The overlapped and the sequential way must give the same bits.
// floor: the larger of the GEMMs' own time (all launched back to back, no exchange) and the exchange's (dispatch and combine
// alone, sequential); overlap efficiency = (sequential - overlapped) / (sequential - floor); exposed = overlapped - GEMMs.
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
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
#include "sluice/comm/cuda/row_exchange.hpp"
#include "sluice/runtime/src/cuda/gpu_layer.hpp"
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
  int ranks = 0, iterations = 12, experts = 0;
  std::string shapes = "deepseek-v3,mixtral,qwen3-235b,qwen3-30b,olmoe", routing = "uniform",
              comm_sms = "16,24,32";
  bool json = false;
  std::string commit = "unknown", date = "unknown";
};
struct Row {
  std::string shape, kase;
  Timing time;
  double baseline_us, sequential_us, floor_us, efficiency, exposed_us;
};

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

  Bench(Rank& r, const Arguments& o, std::vector<Row>& out) : rank(r), options(o), rows(out) {
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cublasCreate(&blas));
    CHECK(cublasSetStream(blas, stream));
  }
  Timing time(const std::function<void()>& arm) {
    std::vector<float> mine;
    for (int i = -2; i < options.iterations; ++i) {
      CHECK(cudaMemsetAsync(flush.data, i & 0xFF, std::size_t{256} << 20, stream));
      wait_kernel<<<1, 1, 0, stream>>>(400000);
      exchange->barrier(stream);
      CHECK(cudaEventRecord(begin, stream));
      arm();
      CHECK(cudaEventRecord(end, stream));
      CHECK(cudaStreamSynchronize(stream));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 0) mine.push_back(ms);
    }
    exchange->check(0);
    std::vector<float> all(mine.size() * static_cast<std::size_t>(rank.num_ranks));
    rank.all_gather(mine.data(), all.data(), mine.size() * sizeof(float));
    std::vector<double> slowest(mine.size(), 0);
    for (std::size_t i = 0; i < all.size(); ++i)
      slowest[i % mine.size()] = std::max(slowest[i % mine.size()], all[i] * 1e3);
    return summarize(std::move(slowest));
  }
  void report(Row row) {
    if (rank.rank != 0) return;
    std::fprintf(stderr, "%-18s %-26s %9.1f us (mad %5.1f)", row.shape.c_str(), row.kase.c_str(),
                 row.time.median_us, row.time.mad_us);
    if (row.baseline_us > 0)
      std::fprintf(stderr, "  dense %9.1f x %.3f", row.baseline_us, row.time.median_us / row.baseline_us);
    if (row.sequential_us > 0)
      std::fprintf(stderr, "  sequential %9.1f floor %9.1f efficiency %.2f exposed %.1f", row.sequential_us,
                   row.floor_us, row.efficiency, row.exposed_us);
    std::fprintf(stderr, "\n");
    rows.push_back(std::move(row));
  }
  // out[m, n] = a[m, k] b[n, k]^T, all bf16.
  void dense(std::int64_t m, std::int64_t n, std::int64_t k, Bf16& a, Bf16& b, Bf16& c) {
    const float one = 1, zero = 0;
    CHECK(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(n), static_cast<int>(m),
                       static_cast<int>(k), &one, b.data, CUDA_R_16BF, static_cast<int>(k), a.data,
                       CUDA_R_16BF, static_cast<int>(k), &zero, c.data, CUDA_R_16BF, static_cast<int>(n),
                       CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

  void run(ShapeOf shape) {
    const int ranks = rank.num_ranks;
    if (options.experts > 0 && shape.experts >= 64) shape.experts = options.experts;
    const int local = shape.experts / ranks;
    std::mt19937 random(kSeed + static_cast<unsigned>(rank.rank));
    std::vector<double> weights(static_cast<std::size_t>(shape.experts), 1.0);
    if (options.routing == "zipf") {
      for (int e = 0; e < shape.experts; ++e) weights[static_cast<std::size_t>(e)] = 1.0 / (e + 1);
      std::mt19937 same(7);
      std::shuffle(weights.begin(), weights.end(), same);
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
    const std::vector<float> route_weight(expert.size(), 1.0f / static_cast<float>(shape.top_k));
    ExchangeShape e;
    e.max_tokens = shape.tokens;
    e.hidden = shape.hidden;
    e.max_routes = shape.tokens * ranks * shape.top_k;
    if (options.routing == "uniform") e.max_routes = shape.tokens * shape.top_k * 3 / 2;
    e.num_local_slots = local;
    RowExchange rows_between(rank.bootstrap(), e);
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
      report({shape.name, "plan", time(plan), 0, 0, 0, 0, 0});
      const auto received = rows_between.host_counts(0, stream).receive_routes;
      std::vector<std::int64_t> all(static_cast<std::size_t>(ranks));
      rank.all_gather(&received, all.data(), sizeof received);
      const std::int64_t heaviest = *std::max_element(all.begin(), all.end());
      // The dense products of the heaviest rank's FLOPs.
      double dense_forward = 0, dense_backward = 0;
      {
        Bf16 a(heaviest * std::max(shape.hidden, pre)), c(heaviest * std::max(shape.hidden, pre));
        fill<<<1024, 256>>>(a.data, heaviest * std::max(shape.hidden, pre), 77, 1.0f);
        Bf16 big(std::max(pre, shape.hidden) * std::max(shape.hidden, shape.ffn));
        fill<<<1024, 256>>>(big.data, std::max(pre, shape.hidden) * std::max(shape.hidden, shape.ffn), 78,
                            0.03f);
        CHECK(cudaDeviceSynchronize());
        dense_forward = time([&] {
                          dense(heaviest, pre, shape.hidden, a, big, c);
                          dense(heaviest, shape.hidden, shape.ffn, a, big, c);
                        }).median_us;
        dense_backward = time([&] {
                           dense(heaviest, shape.ffn, shape.hidden, a, big, c);
                           dense(heaviest, shape.hidden, pre, a, big, c);
                           dense(shape.hidden, shape.ffn, heaviest, a, c, big);
                           dense(pre, shape.hidden, heaviest, a, c, big);
                         }).median_us;
      }
      const GpuExperts experts{w1.data, w2.data};
      const auto forward = [&](const GpuLayerOptions& o) {
        layer.forward(experts, x.data, y.data, o, stream);
      };
      const auto backward = [&](const GpuLayerOptions& o) {
        layer.backward(experts, {g1.data, g2.data}, dy.data, dx.data, dweight.data, o, stream);
      };
      const GpuLayerOptions sequential{GpuSchedule::kSequential, 16};
      const Timing f0 = time([&] { forward(sequential); });
      const Timing fb0 = time([&] {
        forward(sequential);
        backward(sequential);
      });
      std::vector<std::uint16_t> y0(static_cast<std::size_t>(shape.tokens * shape.hidden)), y1(y0.size()),
          d0(y0.size()), d1(y0.size());
      const auto fetch = [&](std::vector<std::uint16_t>& yy, std::vector<std::uint16_t>& dd) {
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaMemcpy(yy.data(), y.data, yy.size() * 2, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(dd.data(), dx.data, dd.size() * 2, cudaMemcpyDeviceToHost));
      };
      fetch(y0, d0);
      const double exchange_us =
          time([&] {
            layer.exchange_only(x.data, y.data, {GpuSchedule::kSequential, 16}, stream);
          }).median_us;
      const double gemm_us = time([&] { layer.gemms_only(experts, stream); }).median_us;
      const double floor = std::max(gemm_us, exchange_us);
      report({shape.name, "gemms_alone", {gemm_us, 0}, dense_forward, 0, 0, 0, 0});
      report({shape.name, "exchange_alone", {exchange_us, 0}, 0, 0, 0, 0, 0});
      report({shape.name, "layer_forward_sequential", f0, dense_forward, 0, 0, 0, 0});
      report(
          {shape.name, "layer_forward_backward_sequential", fb0, dense_forward + dense_backward, 0, 0, 0, 0});
      for (const std::string& sms : split(options.comm_sms)) {
        const GpuLayerOptions overlapped{GpuSchedule::kOverlapped, std::atoi(sms.c_str())};
        const Timing f = time([&] { forward(overlapped); });
        report({shape.name, "layer_forward, comm " + sms, f, dense_forward, f0.median_us, floor,
                (f0.median_us - f.median_us) / (f0.median_us - floor), f.median_us - gemm_us});
        CHECK(cudaMemset(y.data, 0xFF, y0.size() * 2));
        CHECK(cudaMemset(dx.data, 0xFF, y0.size() * 2));
        const Timing fb = time([&] {
          forward(overlapped);
          backward(overlapped);
        });
        report({shape.name, "layer_forward_backward, comm " + sms, fb, dense_forward + dense_backward,
                fb0.median_us, 0, 0, 0});
        fetch(y1, d1);
        if (y0 != y1 || d0 != d1) {
          std::fprintf(stderr, "rank %d %s: overlapped and sequential differ (y %d, dx %d)\n", rank.rank,
                       shape.name, y0 != y1, d0 != d1);
          std::exit(1);
        }
      }
      rank.barrier();
    }
    rank.barrier();
  }
};

int run_rank(Rank& rank, const Arguments& options) {
  rank.use_device();
  std::vector<Row> rows;
  Bench bench(rank, options, rows);
  for (const std::string& name : split(options.shapes)) {
    const ShapeOf* found = nullptr;
    for (const ShapeOf& s : kShapes)
      if (name == s.name) found = &s;
    if (found == nullptr) throw Error(ErrorCode::kInvalidArgument, "no shape " + name);
    bench.run(*found);
  }
  if (rank.rank != 0 || !options.json) return 0;
  cudaDeviceProp properties{};
  CHECK(cudaGetDeviceProperties(&properties, rank.device));
  std::string version = "unknown";
  std::ifstream("/sys/module/nvidia/version") >> version;
  std::printf(
      "{\"date\": \"%s\", \"commit\": \"%s\", \"device\": \"%d x %s\", \"driver\": \"%s\", \"routing\": "
      "\"%s\", "
      "\"iterations\": %d,\n \"rows\": [\n",
      options.date.c_str(), options.commit.c_str(), rank.num_ranks, properties.name, version.c_str(),
      options.routing.c_str(), options.iterations);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    std::printf(
        "  {\"shape\": \"%s\", \"case\": \"%s\", \"median_us\": %.2f, \"mad_us\": %.2f, \"baseline\": "
        "\"cublas_dense\", \"baseline_us\": %.2f, \"ratio\": %.4f, \"sequential_us\": %.2f, \"floor_us\": "
        "%.2f, "
        "\"overlap_efficiency\": %.3f, \"exposed_us\": %.1f}%s\n",
        r.shape.c_str(), r.kase.c_str(), r.time.median_us, r.time.mad_us, r.baseline_us,
        r.baseline_us / r.time.median_us, r.sequential_us, r.floor_us, r.efficiency, r.exposed_us,
        i + 1 < rows.size() ? "," : "");
  }
  std::printf("]}\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) {
        std::fprintf(stderr, "%s needs a value\n", arg.c_str());
        std::exit(2);
      }
      return argv[++i];
    };
    if (arg == "--ranks") {
      options.ranks = std::atoi(value().c_str());
    } else if (arg == "--shapes") {
      options.shapes = value();
    } else if (arg == "--routing") {
      options.routing = value();
    } else if (arg == "--experts") {
      options.experts = std::atoi(value().c_str());
    } else if (arg == "--iterations") {
      options.iterations = std::max(1, std::atoi(value().c_str()));
    } else if (arg == "--comm-sms") {
      options.comm_sms = value();
    } else if (arg == "--json") {
      options.json = true;
    } else if (arg == "--commit") {
      options.commit = value();
    } else if (arg == "--date") {
      options.date = value();
    } else {
      std::fprintf(stderr, "unknown argument %s; see the head of the source\n", arg.c_str());
      return 2;
    }
  }
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
