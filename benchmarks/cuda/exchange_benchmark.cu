// Dispatch and combine between the GPUs of one host, one process a GPU, beside what NCCL and a plain peer copy take.
//
// usage: exchange_cuda_benchmark [--ranks N] [--shapes A,B] [--routing uniform|zipf|FILE] [--experts N]
//        [--cases A,B] [--iterations N] [--sweep] [--json] [--commit HASH] [--date DATE]
//   --routing FILE  one count an expert a line: experts are drawn as often
//   --cases         only these (of the phases below), and nothing of NCCL
//   --sweep         more splits of the processors than the ones that are reported
//
// Every time is of the slowest rank: ranks meet on the device, an event is recorded on each, the work is enqueued, a second
// event is recorded; an iteration's time is the largest of the ranks', and medians and median absolute deviations are over
// iterations. What the host takes to enqueue is hidden behind a kernel that waits. 256 MB are written before, so that
// nothing is left in L2. Bounds of the phases:
//   dispatch            plan ready -> rows of others in the receive list (own rows are read where they are)
//   dispatch_expanded   plan ready -> one row a route, grouped by expert, own ones as well
//   dispatch_uncached   routing ready -> rows of others in the receive list, and the receiver's plan
//   combine_rows        one reduced row a token and rank ready -> sums at home       (a)
//   combine_rows_pull   the same, home reads the rows where they are made; processors: of home
//   combine_experts     expert outputs ready -> sums at home                         (b)
//   floor               copy engines move as many bytes as rows cross, one copy a peer
// With 128 tokens a call is 1/20 of a graph of 20.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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
#include "sluice/comm/cuda/symmetric_memory.hpp"
#include "sluice/kernels/cuda/routing.hpp"
#include "timing.cuh"

namespace {

using namespace sluice;
using namespace sluice::benchmarks;
using namespace sluice::comm::cuda;
using gpu_ranks::Rank;
using kernels::cuda::build_plan;
using kernels::cuda::plan_scratch_bytes;
using kernels::cuda::PlanBuffers;

constexpr unsigned kSeed = 20260101;
constexpr int kGraphCalls = 20;

struct ShapeOf {
  const char* name;
  std::int64_t tokens, hidden;
  int experts, top_k;
};
constexpr ShapeOf kShapes[] = {
    {"deepseek-v3", 8192, 7168, 64, 8}, {"qwen3-235b", 8192, 4096, 128, 8},
    {"qwen3-30b", 16384, 2048, 128, 8}, {"mixtral", 8192, 4096, 8, 2},
    {"olmoe", 16384, 2048, 64, 8},      {"decode", 128, 7168, 64, 8},
};

struct Arguments {
  Options given;
  int ranks, experts;
  std::string shapes, routing, cases;
  bool sweep;
  explicit Arguments(Options options)
      : given(std::move(options)),
        ranks(std::atoi(given.value("--ranks").c_str())),
        experts(std::atoi(given.value("--experts").c_str())),
        shapes(given.value("--shapes", "deepseek-v3,qwen3-235b,qwen3-30b,mixtral,olmoe,decode")),
        routing(given.value("--routing", "uniform")),
        cases(given.value("--cases")),
        sweep(!given.value("--sweep").empty()) {}
};
struct Row {
  std::string shape, kase, sms, baseline;
  Timing time;
  double baseline_us = 0, megabytes = 0;
};

__global__ void wait_kernel(std::uint64_t ns) {
  std::uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < ns);
}

// Experts of every token, distinct, drawn with the given weights. mean_routes > 0: each expert independently instead, so
// that a token has that many on average (ReLU routing).
struct Routing {
  std::vector<std::int64_t> row_ptr{0};
  std::vector<std::int32_t> expert;
  std::vector<float> weight;
};
Routing draw(std::mt19937& random, const ShapeOf& shape, const std::vector<double>& weights,
             double mean_routes) {
  Routing r;
  std::discrete_distribution<std::int32_t> pick(weights.begin(), weights.end());
  std::binomial_distribution<int> number(shape.experts, mean_routes / shape.experts);
  std::vector<std::int32_t> chosen;
  for (std::int64_t t = 0; t < shape.tokens; ++t) {
    const int routes = mean_routes > 0 ? number(random) : shape.top_k;
    chosen.clear();
    while (static_cast<int>(chosen.size()) < routes) {
      const std::int32_t e = pick(random);
      if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
    }
    std::sort(chosen.begin(), chosen.end());
    for (const std::int32_t e : chosen) {
      r.expert.push_back(e);
      r.weight.push_back(1.0f / static_cast<float>(routes));
    }
    r.row_ptr.push_back(static_cast<std::int64_t>(r.expert.size()));
  }
  return r;
}
std::vector<double> weights_of(const std::string& routing, int experts) {
  std::vector<double> weights(static_cast<std::size_t>(experts), 1.0);
  if (routing == "zipf") {
    for (int e = 0; e < experts; ++e) weights[static_cast<std::size_t>(e)] = 1.0 / (e + 1);
    std::mt19937 random(7);
    std::shuffle(weights.begin(), weights.end(), random);  // the popular ones live anywhere
  } else if (routing != "uniform") {
    std::ifstream file(routing);
    std::vector<double> counts;
    for (double count; file >> count;) counts.push_back(count);
    if (counts.empty()) throw Error(ErrorCode::kIo, "no counts in " + routing);
    for (int e = 0; e < experts; ++e)
      weights[static_cast<std::size_t>(e)] = counts[static_cast<std::size_t>(e) % counts.size()] + 1e-3;
  }
  return weights;
}

// One rank's buffers for one shape and routing.
struct Case {
  Rank& rank;
  const ShapeOf shape;
  const Arguments& options;
  const int ranks, local_experts;
  int processors = 0;
  const Routing routing;
  std::int64_t routes, received_rows = 0, received_routes = 0, crossing_rows = 0;
  std::unique_ptr<RowExchange> exchange;
  cudaStream_t stream = nullptr, side = nullptr;
  cudaEvent_t begin{}, end{}, fork{}, join{};
  Bf16 x, y;
  Buffer<std::int64_t> row_ptr, expert_ptr, rank_ptr, rank_route_ptr, send_route_ptr, home_ptr, local_ptr,
      local_rank;
  Buffer<std::int32_t> expert, send_row, send_route, send_slot, home_position, rank_of, slot_of,
      local_rank_of, local_slot_of, position;
  Buffer<float> weight, send_weight;
  Buffer<unsigned char> scratch, local_scratch, flush;
  std::unique_ptr<Bf16> expert_rows, partial;
  RowExchange::HostCounts counts;
  std::vector<Row>& rows;
  std::string suffix;

  static std::vector<std::int32_t> placed(int experts, int per_rank, bool slot) {
    std::vector<std::int32_t> of;
    for (int e = 0; e < experts; ++e) of.push_back(slot ? e % per_rank : e / per_rank);
    return of;
  }
  Case(Rank& r, const ShapeOf& s, const Arguments& o, const std::vector<double>& weights, double mean_routes,
       std::vector<Row>& out, std::string name_suffix, Wire wire = Wire::kRows)
      : rank(r),
        shape(s),
        options(o),
        ranks(r.num_ranks),
        local_experts((s.experts + ranks - 1) / ranks),
        routing([&] {
          std::mt19937 random(kSeed + static_cast<unsigned>(r.rank));
          return draw(random, s, weights, mean_routes);
        }()),
        routes(static_cast<std::int64_t>(routing.expert.size())),
        x(s.tokens * s.hidden),
        y(s.tokens * s.hidden),
        row_ptr(routing.row_ptr),
        expert_ptr(s.experts + 1),
        rank_ptr(ranks + 1),
        rank_route_ptr(ranks + 1),
        send_route_ptr(s.tokens * ranks + 1),
        home_ptr(s.tokens + 1),
        local_ptr(local_experts + 1),
        local_rank(2),
        expert(routing.expert),
        send_row(s.tokens * ranks),
        send_route(routes),
        send_slot(routes),
        home_position(s.tokens * ranks),
        rank_of(placed(s.experts, local_experts, false)),
        slot_of(placed(s.experts, local_experts, true)),
        local_rank_of(std::vector<std::int32_t>(static_cast<std::size_t>(local_experts), 0)),
        local_slot_of(placed(local_experts, local_experts, true)),
        position(s.tokens * ranks * std::max(s.top_k, mean_routes > 0 ? 2 * s.top_k : 1)),
        weight(routing.weight),
        send_weight(routes),
        scratch(static_cast<std::int64_t>(plan_scratch_bytes(s.tokens, s.experts, ranks))),
        local_scratch(static_cast<std::int64_t>(plan_scratch_bytes(s.tokens * ranks, local_experts, 1))),
        flush(std::int64_t{256} << 20),
        rows(out),
        suffix(std::move(name_suffix)) {
    CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, r.device));
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
    CHECK(cudaEventCreateWithFlags(&join, cudaEventDisableTiming));
    ExchangeShape e;
    e.max_tokens = s.tokens;
    e.hidden = s.hidden;
    e.max_routes = s.tokens * ranks * std::max(s.top_k, mean_routes > 0 ? 2 * s.top_k : 1);
    e.num_local_slots = local_experts;
    e.wire = wire;
    e.chunk_rows = s.tokens <= 512 ? 8 : 64;
    exchange = std::make_unique<RowExchange>(rank.bootstrap(), e);
    fill<<<1024, 256>>>(x.data, s.tokens * s.hidden, 100 + static_cast<std::uint64_t>(r.rank), 1.0f);
    CHECK(cudaDeviceSynchronize());
    plan();
    CHECK(cudaStreamSynchronize(stream));
    exchange->check(0);
    counts = exchange->host_counts(0, stream);
    received_rows = counts.receive_ptr.back();
    received_routes = counts.receive_routes;
    crossing_rows = counts.send_ptr.back() - (counts.send_ptr[static_cast<std::size_t>(r.rank) + 1] -
                                              counts.send_ptr[static_cast<std::size_t>(r.rank)]);
    expert_rows = std::make_unique<Bf16>(received_routes * s.hidden);
    partial = std::make_unique<Bf16>(received_rows * s.hidden);
    fill<<<1024, 256>>>(partial->data, received_rows * s.hidden, 200 + static_cast<std::uint64_t>(r.rank),
                        1.0f);
    CHECK(cudaDeviceSynchronize());
    rank.barrier();
  }
  ~Case() {
    cudaDeviceSynchronize();
    try {
      rank.barrier();
    } catch (const std::exception&) {
    }
    exchange.reset();
    cudaStreamDestroy(stream);
    cudaStreamDestroy(side);
    for (cudaEvent_t event : {begin, end, fork, join}) cudaEventDestroy(event);
  }

  SendPlan send_plan() const {
    return {rank_ptr.data,  send_row.data,    send_route_ptr.data, send_route.data,
            send_slot.data, send_weight.data, home_ptr.data,       home_position.data};
  }
  void own_plan() {
    const PlanBuffers buffers{expert_ptr.data,   nullptr,
                              nullptr,           nullptr,
                              rank_ptr.data,     rank_route_ptr.data,
                              send_row.data,     send_route_ptr.data,
                              send_route.data,   send_slot.data,
                              send_weight.data,  home_ptr.data,
                              home_position.data};
    build_plan({row_ptr.data, expert.data, weight.data}, shape.tokens,
               {rank_of.data, slot_of.data, shape.experts, ranks}, buffers, scratch.data, stream);
    exchange->exchange_plan(0, send_plan(), stream);
  }
  void receivers_plan(cudaStream_t on) {
    const ReceiveList list = exchange->receive_list(0);
    const PlanBuffers local{local_ptr.data, position.data, nullptr, nullptr, local_rank.data};
    build_plan({list.route_ptr, list.slot, list.weight}, exchange->shape().max_received,
               {local_rank_of.data, local_slot_of.data, local_experts, 1}, local, local_scratch.data, on);
  }
  void plan() {
    own_plan();
    receivers_plan(stream);
  }
  void dispatch(MoverOptions movers) {
    exchange->dispatch(0, send_plan(), x.data, shape.hidden, {}, movers, stream);
  }
  void dispatch_expanded(MoverOptions movers) {
    exchange->dispatch(0, send_plan(), x.data, shape.hidden,
                       {expert_rows->data, shape.hidden, position.data, {}}, movers, stream);
  }
  void dispatch_uncached(MoverOptions movers) {
    own_plan();
    CHECK(cudaEventRecord(fork, stream));
    CHECK(cudaStreamWaitEvent(side, fork, 0));
    receivers_plan(side);
    CHECK(cudaEventRecord(join, side));
    dispatch(movers);
    CHECK(cudaStreamWaitEvent(stream, join, 0));
  }
  CombineSource reduced() const { return {partial->data, shape.hidden, nullptr, false}; }
  // One reduced row a receive list entry where peers read them.
  void put_results() {
    void* place = exchange->result_rows(0, stream);
    CHECK(cudaMemcpyAsync(place, partial->data, static_cast<std::size_t>(received_rows * shape.hidden) * 2,
                          cudaMemcpyDeviceToDevice, stream));
    CHECK(cudaStreamSynchronize(stream));
    rank.barrier();
  }
  void pull(int sms) {
    exchange->combine_by_pull(0, send_plan(), y.data, shape.hidden, shape.tokens, sms, stream);
  }
  CombineSource outputs() const { return {expert_rows->data, shape.hidden, position.data, true}; }
  void combine(const CombineSource& source, MoverOptions movers) {
    exchange->combine(0, send_plan(), source, y.data, shape.hidden, shape.tokens, movers, stream);
  }
  // The largest over the ranks of each iteration's time.
  // `before` and `after` are not timed.
  Timing time(const std::function<void()>& arm, double divide = 1, std::uint64_t hide_us = 250,
              const std::function<void()>& before = {}, const std::function<void()>& after = {}) {
    std::vector<float> mine;
    for (int i = -3; i < options.given.iterations; ++i) {
      CHECK(cudaMemsetAsync(flush.data, i & 0xFF, std::size_t{256} << 20, stream));
      wait_kernel<<<1, 1, 0, stream>>>(hide_us * 1000);
      if (before) before();
      exchange->barrier(stream);
      CHECK(cudaEventRecord(begin, stream));
      arm();
      CHECK(cudaEventRecord(end, stream));
      if (after) after();
      CHECK(cudaStreamSynchronize(stream));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 0) mine.push_back(ms);
    }
    exchange->check(0);
    std::vector<float> all(mine.size() * static_cast<std::size_t>(ranks));
    rank.all_gather(mine.data(), all.data(), mine.size() * sizeof(float));
    std::vector<double> slowest(mine.size(), 0);
    for (std::size_t i = 0; i < all.size(); ++i) {
      double& us = slowest[i % mine.size()];
      us = std::max(us, all[i] * 1e3 / divide);
    }
    return summarize(std::move(slowest));
  }
  void report(const std::string& kase, const std::string& sms, Timing t, const char* baseline = "",
              double baseline_us = 0, double megabytes = 0) {
    if (rank.rank != 0) return;
    std::fprintf(stderr, "%-12s %-30s %-10s %9.1f us (mad %4.1f)", (shape.name + suffix).c_str(),
                 kase.c_str(), sms.c_str(), t.median_us, t.mad_us);
    if (baseline_us > 0)
      std::fprintf(stderr, "  %s %.1f us, ratio %.3f", baseline, baseline_us, baseline_us / t.median_us);
    if (megabytes > 0) std::fprintf(stderr, "  %.1f MB, %.0f GB/s", megabytes, megabytes * 1e3 / t.median_us);
    std::fprintf(stderr, "\n");
    rows.push_back({shape.name + suffix, kase, sms, baseline, t, baseline_us, megabytes});
  }
  // That leave this rank in a dispatch.
  std::int64_t crossing_bytes() const {
    return crossing_rows * (exchange->shape().wire == Wire::kFp8 ? shape.hidden + 4 : shape.hidden * 2);
  }
  double largest(double value) {
    std::vector<double> all(static_cast<std::size_t>(ranks));
    rank.all_gather(&value, all.data(), sizeof value);
    return *std::max_element(all.begin(), all.end());
  }

  // Identity experts, all weights of a token adding to 1: y must be x, but for two roundings. Everything else is poison.
  void verify(const std::string& what) {
    const bool fp8 = exchange->shape().wire == Wire::kFp8;
    const float tolerance = fp8 ? 0.09f : 0.02f, floor = fp8 ? 1e-3f : 0.0f;
    std::vector<std::uint16_t> got(static_cast<std::size_t>(shape.tokens * shape.hidden)), want(got.size());
    CHECK(cudaMemcpy(got.data(), y.data, got.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(want.data(), x.data, want.size() * 2, cudaMemcpyDeviceToHost));
    const auto value = [](std::uint16_t b) {
      const std::uint32_t bits = static_cast<std::uint32_t>(b) << 16;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    };
    for (std::size_t i = 0; i < got.size(); ++i) {
      const auto token = i / static_cast<std::size_t>(shape.hidden);
      const bool routed = routing.row_ptr[token + 1] > routing.row_ptr[token];
      const float w = routed ? value(want[i]) : 0.0f, g = value(got[i]);
      if (!(std::abs(g - w) <= tolerance * std::abs(w) + floor)) {
        std::fprintf(stderr, "rank %d, %s, %s: wrong result at token %zu: %g instead of %g\n", rank.rank,
                     shape.name, what.c_str(), token, static_cast<double>(g), static_cast<double>(w));
        std::exit(1);
      }
    }
    rank.barrier();
  }
  // Of the same reduced rows, both ways must give the same bits.
  std::vector<std::uint16_t> sums() {
    std::vector<std::uint16_t> got(static_cast<std::size_t>(shape.tokens * shape.hidden));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(got.data(), y.data, got.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaMemset(y.data, 0xFF, got.size() * 2));
    CHECK(cudaDeviceSynchronize());
    rank.barrier();
    return got;
  }
  void verify_pull(int sms) {
    combine(reduced(), {8, 32});
    const std::vector<std::uint16_t> want = sums();
    put_results();
    pull(sms);
    if (sums() != want) {
      std::fprintf(stderr, "rank %d, %s: pulled sums differ from pushed ones\n", rank.rank, shape.name);
      std::exit(1);
    }
  }
  void poison() {
    CHECK(cudaMemset(expert_rows->data, 0xFF, static_cast<std::size_t>(received_routes * shape.hidden) * 2));
    CHECK(cudaMemset(y.data, 0xFF, static_cast<std::size_t>(shape.tokens * shape.hidden) * 2));
    CHECK(cudaDeviceSynchronize());
    rank.barrier();
  }
  std::string split(MoverOptions m, bool local) const {
    return std::to_string(m.push_sms) + (local ? "+" + std::to_string(m.local_sms) : "");
  }

  double floor_us(SymmetricMemory& target) {
    const auto bytes = static_cast<std::size_t>(crossing_bytes());
    const Timing t = time([&] {
      const std::size_t part = ranks > 1 ? bytes / static_cast<std::size_t>(ranks - 1) / 16 * 16 : 0;
      CHECK(cudaEventRecord(fork, stream));
      for (int step = 1; step < ranks; ++step) {
        cudaStream_t on = step == 1 ? stream : streams(step);
        if (step > 1) CHECK(cudaStreamWaitEvent(on, fork, 0));
        CHECK(cudaMemcpyAsync(
            target.part((rank.rank + step) % ranks) + static_cast<std::size_t>(rank.rank) * part, x.data,
            std::min(part, static_cast<std::size_t>(shape.tokens * shape.hidden) * 2), cudaMemcpyDefault,
            on));
        if (step > 1) {
          CHECK(cudaEventRecord(join, on));
          CHECK(cudaStreamWaitEvent(stream, join, 0));
        }
      }
    });
    const double megabytes = largest(static_cast<double>(bytes)) / 1e6;
    report("floor", "0", t, "", 0, megabytes);
    return t.median_us;
  }
  // What a copy engine's time depends on (2 ranks): the stream, the place, the number of copies.
  void probe_copies(SymmetricMemory& target) {
    if (ranks != 2) return;
    const auto bytes = static_cast<std::size_t>(crossing_rows * shape.hidden * 2) / 16384 * 16384 - 16384;
    std::byte* to = target.part(1 - rank.rank);
    const auto copy = [&](cudaStream_t on, std::size_t from_offset, std::size_t to_offset,
                          std::size_t parts) {
      for (std::size_t i = 0; i < parts; ++i) {
        const std::size_t first = bytes * i / parts / 256 * 256, next = bytes * (i + 1) / parts / 256 * 256;
        CHECK(cudaMemcpyAsync(to + to_offset + first,
                              reinterpret_cast<const std::byte*>(x.data) + from_offset + first, next - first,
                              cudaMemcpyDefault, on));
      }
    };
    const auto on_side = [&](std::size_t parts) {
      CHECK(cudaEventRecord(fork, stream));
      CHECK(cudaStreamWaitEvent(side, fork, 0));
      copy(side, 0, 0, parts);
      CHECK(cudaEventRecord(join, side));
      CHECK(cudaStreamWaitEvent(stream, join, 0));
    };
    report("copy probe: same stream", "0", time([&] { copy(stream, 0, 0, 1); }, 1, 2000));
    report("copy probe: other stream", "0", time([&] { on_side(1); }, 1, 2000));
    report("copy probe: to + 256", "0", time([&] { copy(stream, 0, 256, 1); }, 1, 2000));
    report("copy probe: from + 2048", "0", time([&] { copy(stream, 2048, 0, 1); }, 1, 2000));
    report("copy probe: from and to + 256", "0", time([&] { copy(stream, 256, 256, 1); }, 1, 2000));
    report("copy probe: 4 copies", "0", time([&] { copy(stream, 0, 0, 4); }, 1, 2000));
    report("copy probe: 4 on other stream", "0", time([&] { on_side(4); }, 1, 2000));
  }
  cudaStream_t streams(int i) {
    while (static_cast<int>(more_streams.size()) <= i) {
      cudaStream_t s;
      CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
      more_streams.push_back(s);
    }
    return more_streams[static_cast<std::size_t>(i)];
  }
  std::vector<cudaStream_t> more_streams;

  bool wanted(const std::string& kase) const {
    return options.cases.empty() || ("," + options.cases + ",").find("," + kase + ",") != std::string::npos;
  }
  void run_large(SymmetricMemory& target, bool brief) {
    const double floor = floor_us(target);
    const double megabytes = largest(static_cast<double>(crossing_bytes())) / 1e6;
    const int all = processors;
    const auto measure = [&](const char* kase, MoverOptions m, bool local, const std::function<void()>& arm) {
      if (!wanted(kase)) return;
      report(m.push_sms == 8 ? std::string(kase) + "_8sm" : kase, split(m, local), time(arm), "floor", floor,
             megabytes);
    };
    std::vector<int> pushes = {8, 16, 32, 64, 128, 132};
    if (options.sweep) pushes = {4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 132};
    if (brief) pushes = {8, 32};
    for (const int p : pushes) {
      const MoverOptions m{p, 0};
      measure("dispatch", m, false, [&] { dispatch(m); });
    }
    if (options.sweep && !brief) {
      probe_copies(target);
      for (const int slices : {1, 2, 3, 6}) {
        report("dispatch_copy slices " + std::to_string(slices), "all",
               time(
                   [&] {
                     exchange->dispatch_by_copy(0, send_plan(), counts, x.data, shape.hidden, {1, 0, slices},
                                                stream);
                   },
                   1, 3000));
        for (const int local : {0, 24, 48})
          report("combine_copy slices " + std::to_string(slices), "home: " + std::to_string(local),
                 time(
                     [&] {
                       exchange->combine_by_copy(0, send_plan(), counts, reduced(), y.data, shape.hidden,
                                                 shape.tokens, {1, local, slices}, stream);
                     },
                     1, 3000));
      }
    }
    if (!brief && options.cases.empty()) {
      report("dispatch_copy_engine", "pack: " + std::to_string(all),
             time(
                 [&] {
                   exchange->dispatch_by_copy(0, send_plan(), counts, x.data, shape.hidden, {1, 0}, stream);
                 },
                 1, 3000),
             "floor", floor, megabytes);
      report("dispatch_copy_engine", "pack: 16",
             time(
                 [&] {
                   exchange->dispatch_by_copy(0, send_plan(), counts, x.data, shape.hidden, {1, 16}, stream);
                 },
                 1, 3000),
             "floor", floor, megabytes);
    }
    if (!brief) {
      for (const int p : {16, 64, 128}) {
        const MoverOptions m{p, 0};
        measure("dispatch_uncached", m, false, [&] { dispatch_uncached(m); });
      }
    }
    std::vector<int> splits = {16, 32};
    if (options.sweep) splits = {8, 16, 24, 32, 48, 64};
    if (brief) splits = {24};
    poison();
    for (const int p : splits) {
      const MoverOptions m{p, all - p};
      measure("dispatch_expanded", m, true, [&] { dispatch_expanded(m); });
    }
    splits = {32, 40, 48, 64, 88};
    if (options.sweep) splits = {16, 24, 32, 40, 48, 56, 64, 80};
    if (brief) splits = {48};
    for (const int p : splits) {
      const MoverOptions m{p, all - p};
      measure("combine_experts", m, true, [&] { combine(outputs(), m); });
      if (wanted("combine_experts") && wanted("dispatch_expanded")) verify("combine_experts");
    }
    splits = {8, 16, 32, 64};
    if (brief) splits = {8, 32};
    for (const int p : splits) {
      for (const int local :
           options.sweep && !brief ? std::vector<int>{24, 48, all - p} : std::vector<int>{all - p}) {
        const MoverOptions m{p, std::min(local, all - p)};
        measure("combine_rows", m, true, [&] { combine(reduced(), m); });
      }
    }
    if (wanted("combine_rows_pull")) verify_pull(all);
    std::vector<int> pulls = {8, 12, 16, 32, all};
    if (brief) pulls = {8, all};
    for (const int p : pulls) {
      const MoverOptions m{p, 0};
      measure("combine_rows_pull", m, false, [&] { pull(p); });
    }
    if (brief || !options.cases.empty()) return;
    const auto push = [&](const CombineSource& source, int sms) {
      exchange->push_results(0, source, {sms, 0}, stream);
    };
    const auto sum = [&](const CombineSource& source) {
      exchange->sum_at_home(0, send_plan(), source, y.data, shape.hidden, 0, shape.tokens, true, {1, 0},
                            stream);
    };
    for (const int p : {8, 64}) {
      report("push_of_rows", std::to_string(p),
             time([&] { push(reduced(), p); }, 1, 250, {}, [&] { sum(reduced()); }), "floor", floor,
             megabytes);
      report("push_of_experts", std::to_string(p),
             time([&] { push(outputs(), p); }, 1, 250, {}, [&] { sum(outputs()); }), "floor", floor,
             megabytes);
    }
    report("home_sum_of_rows", std::to_string(all),
           time([&] { sum(reduced()); }, 1, 250, [&] { push(reduced(), 32); }));
    report("home_sum_of_experts", std::to_string(all),
           time([&] { sum(outputs()); }, 1, 250, [&] { push(outputs(), 64); }));
    for (const int local : {0, 32, 64})
      report("combine_rows_copy_engine", "home: " + std::to_string(local == 0 ? all : local),
             time(
                 [&] {
                   exchange->combine_by_copy(0, send_plan(), counts, reduced(), y.data, shape.hidden,
                                             shape.tokens, {1, local}, stream);
                 },
                 1, 3000),
             "floor", floor, megabytes);
  }
  void run_nccl(NcclCommunicator& nccl) {
    const auto row = static_cast<std::size_t>(shape.hidden) * 2;
    // No de-duplication: one row a route. Buffers as large as the rows that leave and come.
    std::vector<std::int64_t> mine(static_cast<std::size_t>(ranks), 0),
        all(static_cast<std::size_t>(ranks * ranks));
    for (const std::int32_t e : routing.expert) ++mine[static_cast<std::size_t>(e / local_experts)];
    rank.all_gather(mine.data(), all.data(), mine.size() * 8);
    std::int64_t in = 0, out = 0;
    for (int d = 0; d < ranks; ++d) {
      out += mine[static_cast<std::size_t>(d)];
      in += all[static_cast<std::size_t>(d * ranks + rank.rank)];
    }
    Buffer<unsigned char> from(out * static_cast<std::int64_t>(row)), to(in * static_cast<std::int64_t>(row));
    std::vector<NcclTransfer> transfers;
    std::int64_t from_at = 0, to_at = 0;
    for (int d = 0; d < ranks; ++d) {
      const std::int64_t o = mine[static_cast<std::size_t>(d)],
                         i = all[static_cast<std::size_t>(d * ranks + rank.rank)];
      if (d != rank.rank)
        transfers.push_back(
            {d, from.data + static_cast<std::size_t>(from_at) * row, static_cast<std::size_t>(o) * row,
             to.data + static_cast<std::size_t>(to_at) * row, static_cast<std::size_t>(i) * row});
      from_at += o;
      to_at += i;
    }
    report("nccl_all_to_all", "nccl's", time([&] { nccl.exchange(transfers, stream); }, 1, 1500), "", 0,
           static_cast<double>((out - mine[static_cast<std::size_t>(rank.rank)])) * static_cast<double>(row) /
               1e6);
    Bf16 gathered(shape.tokens * shape.hidden * ranks);
    report("nccl_all_gather", "nccl's",
           time(
               [&] {
                 nccl.all_gather(x.data, gathered.data, static_cast<std::size_t>(shape.tokens) * row, stream);
               },
               1, 1500));
    report("nccl_reduce_scatter", "nccl's",
           time(
               [&] {
                 nccl.reduce_scatter_bf16(gathered.data, y.data,
                                          static_cast<std::size_t>(shape.tokens * shape.hidden), stream);
               },
               1, 1500));
  }
  void run_small() {
    const auto graph_of = [&](const std::function<void()>& call) {
      cudaGraph_t graph;
      cudaGraphExec_t exec;
      CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < kGraphCalls; ++i) call();
      CHECK(cudaStreamEndCapture(stream, &graph));
      CHECK(cudaGraphInstantiate(&exec, graph, 0));
      CHECK(cudaGraphDestroy(graph));
      return exec;
    };
    const auto measure = [&](const char* kase, MoverOptions m, bool local,
                             const std::function<void()>& call) {
      if (!wanted(kase)) return;
      cudaGraphExec_t graph = graph_of(call);
      report(kase, split(m, local), time([&] { CHECK(cudaGraphLaunch(graph, stream)); }, kGraphCalls));
      CHECK(cudaGraphExecDestroy(graph));
    };
    poison();
    for (const int p : {4, 8, 16, 32}) {
      const MoverOptions m{p, 0};
      measure("dispatch", m, false, [&] { dispatch(m); });
    }
    for (const int p : {8, 16, 32}) {
      const MoverOptions m{p, 32};
      measure("dispatch_expanded", m, true, [&] { dispatch_expanded(m); });
    }
    for (const int p : {8, 16, 32, 64}) {
      const MoverOptions m{p, 64};
      measure("combine_experts", m, true, [&] { combine(outputs(), m); });
      if (wanted("combine_experts") && wanted("dispatch_expanded")) verify("combine_experts");
      measure("combine_rows", m, true, [&] { combine(reduced(), m); });
    }
    if (wanted("combine_rows_pull")) verify_pull(32);
    for (const int p : {8, 16, 32, 64, 128}) {
      const MoverOptions m{p, 0};
      measure("combine_rows_pull", m, false, [&] { pull(p); });
    }
    measure("plan_and_dispatch", {16, 0}, false, [&] {
      plan();
      dispatch({16, 0});
    });
  }
};

int run_rank(Rank& rank, const Arguments& options) {
  rank.use_device();
  std::vector<Row> rows;
  std::unique_ptr<NcclCommunicator> nccl;
  std::string why;
  const bool with_nccl = options.cases.empty();
  if (with_nccl && rank.num_ranks > 1 && nccl_available(&why)) {
    nccl = std::make_unique<NcclCommunicator>(rank.bootstrap(), std::chrono::seconds(60));
  } else if (with_nccl && rank.rank == 0) {
    std::fprintf(stderr, "no baseline of NCCL: %s\n", why.c_str());
  }
  std::stringstream wanted(options.shapes);
  for (std::string name; std::getline(wanted, name, ',');) {
    const ShapeOf* found = nullptr;
    for (const ShapeOf& s : kShapes)
      if (name == s.name) found = &s;
    if (found == nullptr) throw Error(ErrorCode::kInvalidArgument, "no shape " + name);
    ShapeOf shape = *found;
    if (options.experts > 0 && shape.experts >= 64) shape.experts = options.experts;
    const std::vector<double> weights = weights_of(options.routing, shape.experts);
    const bool small = shape.tokens <= 512;
    {
      SymmetricMemory target(rank.bootstrap(),
                             static_cast<std::size_t>(shape.tokens * shape.hidden) * 2 *
                                 static_cast<std::size_t>(rank.num_ranks),
                             PeerPath::kBest, nullptr);
      Case c(rank, shape, options, weights, 0, rows, "");
      if (small) {
        c.run_small();
      } else {
        c.run_large(target, false);
        if (nccl != nullptr) c.run_nccl(*nccl);
      }
      rank.barrier();
      if (!small && name == "deepseek-v3" && options.routing == "uniform" && options.cases.empty()) {
        for (const int percent : {25, 100}) {
          Case ragged(rank, shape, options, weights, shape.top_k * percent / 100.0, rows,
                      "-relu-" + std::to_string(percent) + "%");
          ragged.run_large(target, true);
          rank.barrier();
        }
        Case fp8(rank, shape, options, weights, 0, rows, "-fp8", Wire::kFp8);
        fp8.run_large(target, true);
        rank.barrier();
      }
    }
    rank.barrier();
  }
  if (rank.rank != 0 || !options.given.json) return 0;
  cudaDeviceProp properties{};
  CHECK(cudaGetDeviceProperties(&properties, rank.device));
  int driver = 0;
  CHECK(cudaDriverGetVersion(&driver));
  std::string version = "unknown";
  std::ifstream("/sys/module/nvidia/version") >> version;
  std::printf(
      "{\"date\": \"%s\", \"commit\": \"%s\", \"device\": \"%d x %s\", \"driver\": \"%s, CUDA %d.%d\", "
      "\"nccl\": %d,\n"
      " \"routing\": \"%s\", \"iterations\": %d, \"seed\": %u,\n \"rows\": [\n",
      options.given.date.c_str(), options.given.commit.c_str(), rank.num_ranks, properties.name,
      version.c_str(), driver / 1000, driver % 1000 / 10, nccl != nullptr ? nccl_version() : 0,
      options.routing.c_str(), options.given.iterations, kSeed);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    std::printf(
        "  {\"shape\": \"%s\", \"case\": \"%s\", \"sms\": \"%s\", \"median_us\": %.2f, \"mad_us\": %.2f, "
        "\"baseline\": \"%s\", \"baseline_us\": %.2f, \"ratio\": %.4f, \"megabytes\": %.1f}%s\n",
        r.shape.c_str(), r.kase.c_str(), r.sms.c_str(), r.time.median_us, r.time.mad_us, r.baseline.c_str(),
        r.baseline_us, r.baseline_us / r.time.median_us, r.megabytes, i + 1 < rows.size() ? "," : "");
  }
  std::printf("]}\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments options(
      parse_options(argc, argv, {"--ranks", "--shapes", "--routing", "--experts", "--cases"}, {"--sweep"}));
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
