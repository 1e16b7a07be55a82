// Gates, plans and work on rows on one GPU, at the sizes of one rank of deepseek-v3 (8,192 tokens, 8 of 256 experts on 8
// ranks, hidden 7168, ffn 2048), bf16 rows.
//
// usage: rows_cuda_benchmark [--json] [--only SUBSTRING] [--iterations N] [--commit HASH] [--date DATE]
//
// Memory-bound calls are compared with copying as many bytes (read + written) at the copy bandwidth measured in the same
// run; each input byte is counted once, each output byte once. Gates are timed in graphs of many calls. The plan is compared with its target of 40 us; it is
// timed in a CUDA graph: one plan with a cold L2, and 20 plans a graph (routing in L2, as it is behind a gate).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "sluice/kernels/cuda/routing.hpp"
#include "sluice/kernels/cuda/rows.hpp"
#include "timing.cuh"

namespace {

using namespace sluice;
using namespace sluice::kernels;
using namespace sluice::kernels::cuda;
using namespace sluice::benchmarks;

constexpr unsigned kSeed = 20260101;
constexpr std::int64_t kTokens = 8192, kHidden = 7168, kFfn = 2048, kRoutes = kTokens * 8;
constexpr int kExperts = 256, kRanks = 8, kTopK = 8;

struct Row {
  std::string kase, shape, baseline;
  Timing time;
  double baseline_us;
  std::string more;
};
std::vector<Row> g_rows;

__global__ void fill_floats(float* data, std::int64_t count, std::uint64_t salt, float scale) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x)
    data[i] = hash_value(i, salt) * scale;
}

struct Bench {
  Timer timer;
  bool json = false;
  std::string only;
  double copy_bytes_per_us = 0;

  explicit Bench(int iterations) : timer(iterations) {
    const std::int64_t bytes = std::int64_t{2} << 30;
    Buffer<unsigned char> from(bytes), to(bytes);
    fill<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(from.data), bytes / 2, 1, 1.0f);
    const auto times = timer.run(
        {[&] { CHECK(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, nullptr)); }});
    copy_bytes_per_us = 2.0 * static_cast<double>(bytes) / times[0].median_us;
    std::fprintf(stderr, "copy %.0f GB/s (read + written)\n", copy_bytes_per_us / 1e3);
  }
  void add(const std::string& kase, const std::string& shape, Timing time, const char* baseline,
           double baseline_us, std::string more = "") {
    std::fprintf(json ? stderr : stdout, "%-28s %-22s %9.2f us (mad %5.2f)  %-16s %9.2f us  ratio %.3f%s\n",
                 kase.c_str(), shape.c_str(), time.median_us, time.mad_us, baseline, baseline_us,
                 baseline_us / time.median_us, more.c_str());
    g_rows.push_back({kase, shape, baseline, time, baseline_us, std::move(more)});
  }
  // `bytes`: read and written, each once.
  void memory(const std::string& kase, const std::string& shape, double bytes,
              const std::function<void()>& arm) {
    if (!only.empty() && kase.find(only) == std::string::npos) return;
    const auto times = timer.run({arm});
    CHECK(cudaGetLastError());
    add(kase, shape, times[0], "copy_bandwidth", bytes / copy_bytes_per_us);
  }

  void rows() {
    std::mt19937 random(kSeed);
    Bf16 many(kRoutes * kHidden), other(kRoutes * kHidden), few(kTokens * kHidden);
    fill<<<1024, 256>>>(many.data, kRoutes * kHidden, 2, 1.0f);
    fill<<<1024, 256>>>(few.data, kTokens * kHidden, 3, 1.0f);
    std::vector<std::int32_t> permutation(kRoutes);
    std::iota(permutation.begin(), permutation.end(), 0);
    std::shuffle(permutation.begin(), permutation.end(), random);
    std::vector<std::int64_t> ptr(kTokens + 1);
    for (std::int64_t t = 0; t <= kTokens; ++t) ptr[static_cast<std::size_t>(t)] = t * kTopK;
    std::vector<float> weights(kRoutes, 0.125f);
    const Buffer<std::int32_t> position(permutation);
    const Buffer<std::int64_t> row_ptr(ptr);
    const Buffer<float> weight(weights);
    Buffer<float> dweight(kRoutes);
    const auto view = [](Bf16& b, std::int64_t rows, std::int64_t cols) {
      return MatrixView(reinterpret_cast<std::byte*>(b.data), DType::kBF16, rows, cols, cols);
    };
    const auto floats = [](Buffer<float>& b, std::int64_t rows, std::int64_t cols) {
      return MatrixView(reinterpret_cast<std::byte*>(b.data), DType::kF32, rows, cols, cols);
    };
    const double row = 2.0 * kHidden, k = kRoutes, t = kTokens;
    memory("gather_rows", "65536x7168", 2 * k * row, [&] {
      gather_rows(view(many, kRoutes, kHidden), {}, position.data, view(other, kRoutes, kHidden), nullptr,
                  nullptr);
    });
    memory("weighted_reduce", "65536to8192x7168", (k + t) * row, [&] {
      weighted_reduce(view(many, kRoutes, kHidden), row_ptr.data, position.data, weight.data,
                      view(few, kTokens, kHidden), nullptr);
    });
    memory("weighted_reduce_backward", "8192to65536x7168", (2 * k + t) * row, [&] {
      weighted_reduce_backward(view(few, kTokens, kHidden), view(many, kRoutes, kHidden), row_ptr.data,
                               position.data, weight.data, view(other, kRoutes, kHidden), dweight.data,
                               nullptr);
    });
    memory("row_dots", "65536x7168", 2 * k * row, [&] {
      row_dots(view(many, kRoutes, kHidden), nullptr, view(other, kRoutes, kHidden), position.data,
               dweight.data, kRoutes, nullptr);
    });
    memory("add_scaled_rows", "65536x7168", 3 * k * row, [&] {
      add_scaled_rows(view(many, kRoutes, kHidden), weight.data, view(other, kRoutes, kHidden), nullptr);
    });
    const double ffn = 2.0 * kFfn;
    memory("activation_forward_swiglu", "65536x2048", 3 * k * ffn, [&] {
      activation_forward(Activation::kSwiGLU, view(many, kRoutes, 2 * kFfn), view(other, kRoutes, kFfn), 0,
                         kRoutes, nullptr, nullptr);
    });
    fill<<<1024, 256>>>(other.data, kRoutes * kFfn, 4, 1.0f);
    Bf16 dh(kRoutes * 2 * kFfn), wa(kRoutes * kFfn);
    for (const Activation activation : {Activation::kSwiGLU, Activation::kGelu, Activation::kRelu}) {
      const char* names[] = {"swiglu", "gelu", "relu"};
      const std::int64_t cols = preactivation_cols(activation, kFfn);
      memory(std::string("activation_backward_") + names[static_cast<int>(activation)], "65536x2048",
             k * (4.0 * static_cast<double>(cols) + 2 * ffn), [&] {
               activation_backward(activation, view(many, kRoutes, cols), view(other, kRoutes, kFfn),
                                   weight.data, dweight.data, view(dh, kRoutes, cols),
                                   view(wa, kRoutes, kFfn), 0, kRoutes, nullptr, nullptr);
             });
    }
    Buffer<float> wide(kRoutes * 2048);
    fill_floats<<<1024, 256>>>(wide.data, kRoutes * 2048, 5, 1.0f);
    memory("convert_f32_to_bf16", "65536x2048", k * 2048 * 6,
           [&] { convert_rows(floats(wide, kRoutes, 2048), view(wa, kRoutes, 2048), nullptr, nullptr); });
    memory("convert_bf16_to_f32", "65536x2048", k * 2048 * 6,
           [&] { convert_rows(view(wa, kRoutes, 2048), floats(wide, kRoutes, 2048), nullptr, nullptr); });
  }

  void optimizer() {
    constexpr std::int64_t kCount = std::int64_t{128} << 20;
    Buffer<float> w(kCount), g(kCount), m(kCount), v(kCount);
    Bf16 copy(kCount);
    fill_floats<<<1024, 256>>>(w.data, kCount, 6, 1.0f);
    fill_floats<<<1024, 256>>>(g.data, kCount, 7, 0.1f);
    CHECK(cudaMemset(m.data, 0, kCount * 4));
    CHECK(cudaMemset(v.data, 0, kCount * 4));
    std::int64_t step = 0;
    memory("adamw", "128Mi", 30.0 * kCount, [&] {
      adamw({1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, ++step}, w.data, g.data, m.data, v.data, copy.data,
            DType::kBF16, kCount, nullptr);
    });
  }

  // The `launches` calls f(0), f(1), ... as a graph.
  static cudaGraphExec_t capture(cudaStream_t stream, int launches, const std::function<void(int)>& f) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) f(i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    return exec;
  }

  // One set of a gate's arguments.
  struct GateSet {
    Buffer<float> logits, dlogits, weight, dweight;
    Buffer<std::int64_t> row_ptr;
    Buffer<std::int32_t> expert, of_expert{kExperts}, with_active{kExperts + 1};
    Buffer<unsigned char> scratch;
    GateSet(std::int64_t tokens, std::int64_t capacity, std::uint64_t salt)
        : logits(tokens * kExperts),
          dlogits(tokens * kExperts),
          weight(capacity),
          dweight(capacity),
          row_ptr(tokens + 1),
          expert(capacity),
          scratch(static_cast<std::int64_t>(gate_relu_scratch_bytes(tokens))) {
      fill_floats<<<1024, 256>>>(logits.data, tokens * kExperts, salt, 1.0f);
      fill_floats<<<1024, 256>>>(dweight.data, capacity, salt + 1, 1.0f);
    }
    GateCounts counts() { return {of_expert.data, with_active.data}; }
    ConstRouting made() const { return {row_ptr.data, expert.data, weight.data}; }
  };

  // Gates are too short for events around one call: graphs of many calls, over sets of arguments that together do not fit
  // into L2 by far. Beside the copy bandwidth: copies of as many bytes in a graph alike.
  void gates(std::int64_t tokens) {
    constexpr double kSetBytes = 512e6;
    const std::string shape = std::to_string(tokens) + "x256";
    const double t = static_cast<double>(tokens), table = 4.0 * t * kExperts;
    const double list = 8.0 * kTopK * t, pointers = 8.0 * t;
    const int sets = static_cast<int>(kSetBytes / (2 * table)) + 2, launches = 2 * sets;
    Buffer<std::uint32_t> status(1);
    CHECK(cudaMemset(status.data, 0, 4));
    std::vector<std::unique_ptr<GateSet>> of;
    for (int i = 0; i < sets; ++i)
      of.push_back(std::make_unique<GateSet>(tokens, tokens * kExperts, 100 + 2 * static_cast<unsigned>(i)));
    CHECK(cudaDeviceSynchronize());
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    Buffer<unsigned char> from(static_cast<std::int64_t>(kSetBytes)),
        to(static_cast<std::int64_t>(kSetBytes));
    const auto time = [&](const std::string& kase, double bytes, const std::function<void(GateSet&)>& f) {
      if (!only.empty() && kase.find(only) == std::string::npos) return;
      const auto half = static_cast<std::int64_t>(bytes / 2);
      const std::int64_t places = std::max<std::int64_t>(1, static_cast<std::int64_t>(kSetBytes) / half);
      f(*of[0]);
      cudaGraphExec_t exec =
          capture(stream, launches, [&](int i) { f(*of[static_cast<std::size_t>(i % sets)]); });
      cudaGraphExec_t copies = capture(stream, launches, [&](int i) {
        CHECK(cudaMemcpyAsync(to.data + i % places * half, from.data + i % places * half,
                              static_cast<std::size_t>(half), cudaMemcpyDeviceToDevice, stream));
      });
      const auto times = timer.run(
          {[&] { CHECK(cudaGraphLaunch(exec, nullptr)); }, [&] { CHECK(cudaGraphLaunch(copies, nullptr)); }});
      const double copy_us = times[1].median_us / launches;
      const Timing each{times[0].median_us / launches, times[0].mad_us / launches};
      char more[96];
      std::snprintf(more, sizeof more, ", \"copy_in_graph_us\": %.2f, \"copy_in_graph_ratio\": %.4f", copy_us,
                    copy_us / each.median_us);
      add(kase, shape, each, "copy_bandwidth", bytes / copy_bytes_per_us, more);
      CHECK(cudaGraphExecDestroy(exec));
      CHECK(cudaGraphExecDestroy(copies));
    };
    const auto scores = [&](const GateSet& s) {
      return GateScores{s.logits.data, kExperts, tokens, kExperts};
    };
    const auto routing = [&](const GateSet& s) {
      return RoutingBuffers{s.row_ptr.data, s.expert.data, s.weight.data, tokens * kExperts, status.data};
    };
    // Half of the scores are above zero. Their backward does not need the scores.
    const double active = t * kExperts / 2;
    time("gate_relu", table + 8 * active + pointers,
         [&](GateSet& s) { gate_relu(scores(s), routing(s), {}, s.scratch.data, stream); });
    for (const auto& s : of) gate_relu(scores(*s), routing(*s), s->counts(), s->scratch.data, stream);
    time("gate_relu_backward", table + 8 * active + pointers, [&](GateSet& s) {
      gate_relu_backward(scores(s), s.made(), s.dweight.data, nullptr, s.dlogits.data, kExperts, stream);
    });
    const SoftmaxGate softmax{kTopK, false, 1.0f};
    time("gate_softmax", table + list + pointers,
         [&](GateSet& s) { gate_softmax(scores(s), softmax, routing(s), {}, stream); });
    time("gate_softmax_counts", table + list + pointers,
         [&](GateSet& s) { gate_softmax(scores(s), softmax, routing(s), s.counts(), stream); });
    for (const auto& s : of) gate_softmax(scores(*s), softmax, routing(*s), {}, stream);
    time("gate_softmax_backward", 2 * table + list + pointers, [&](GateSet& s) {
      gate_softmax_backward(scores(s), softmax, s.made(), s.dweight.data, nullptr, 0, s.dlogits.data,
                            kExperts, stream);
    });
    SigmoidGate sigmoid;
    sigmoid.top_k = kTopK;
    sigmoid.num_groups = 8;
    sigmoid.top_groups = 4;
    Buffer<float> bias(kExperts);
    fill_floats<<<8, 32>>>(bias.data, kExperts, 7, 0.05f);
    time("gate_sigmoid_8_groups", table + list + pointers,
         [&](GateSet& s) { gate_sigmoid(scores(s), sigmoid, nullptr, routing(s), {}, stream); });
    time("gate_sigmoid_8_groups_bias", table + list + pointers,
         [&](GateSet& s) { gate_sigmoid(scores(s), sigmoid, bias.data, routing(s), {}, stream); });
    // Reads the chosen scores only: a sector of 32 bytes each.
    for (const auto& s : of) gate_sigmoid(scores(*s), sigmoid, nullptr, routing(*s), {}, stream);
    time("gate_sigmoid_backward", table + list + pointers + 32.0 * kTopK * t, [&](GateSet& s) {
      gate_sigmoid_backward(scores(s), sigmoid, s.made(), s.dweight.data, s.dlogits.data, kExperts, stream);
    });
    CHECK(cudaStreamDestroy(stream));
  }

  void plans() {
    if (!only.empty() && std::string("plan_build").find(only) == std::string::npos) return;

    GateSet set(kTokens, kRoutes, 8);
    Buffer<std::uint32_t> status(1);
    CHECK(cudaMemset(status.data, 0, 4));
    gate_softmax({set.logits.data, kExperts, kTokens, kExperts}, {kTopK, false, 1.0f},
                 {set.row_ptr.data, set.expert.data, set.weight.data, kRoutes, status.data}, {}, nullptr);
    std::vector<std::int32_t> ranks, slots;
    for (int e = 0; e < kExperts; ++e) {
      ranks.push_back(e / (kExperts / kRanks));
      slots.push_back(e % (kExperts / kRanks));
    }
    const Buffer<std::int32_t> rank_of(ranks), slot_of(slots);
    Buffer<std::int64_t> expert_ptr(kExperts + 1), rank_ptr(kRanks + 1), rank_route_ptr(kRanks + 1),
        send_route_ptr(kRoutes + 1), home_ptr(kTokens + 1);
    Buffer<std::int32_t> position(kRoutes), row_of(kRoutes), send_row(kRoutes), send_route(kRoutes),
        send_slot(kRoutes), home(kRoutes);
    Buffer<float> weight_of(kRoutes), send_weight(kRoutes);
    const PlanBuffers plan{expert_ptr.data, position.data,       row_of.data,      weight_of.data,
                           rank_ptr.data,   rank_route_ptr.data, send_row.data,    send_route_ptr.data,
                           send_route.data, send_slot.data,      send_weight.data, home_ptr.data,
                           home.data};
    Buffer<unsigned char> plan_scratch(
        static_cast<std::int64_t>(plan_scratch_bytes(kTokens, kExperts, kRanks)));
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    const auto build = [&](int) {
      build_plan(set.made(), kTokens, {rank_of.data, slot_of.data, kExperts, kRanks}, plan, plan_scratch.data,
                 stream);
    };
    cudaGraphExec_t one = capture(stream, 1, build), twenty = capture(stream, 20, build);
    const auto times = timer.run(
        {[&] { CHECK(cudaGraphLaunch(one, nullptr)); }, [&] { CHECK(cudaGraphLaunch(twenty, nullptr)); }});
    const std::string size = "8192x8of256on8";
    add("plan_build_device_cold", size, times[0], "target", 40);
    add("plan_build_device", size, {times[1].median_us / 20, times[1].mad_us / 20}, "target", 40);
    CHECK(cudaGraphExecDestroy(one));
    CHECK(cudaGraphExecDestroy(twenty));
    CHECK(cudaStreamDestroy(stream));
  }
};

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse_options(argc, argv, {"--only"});
  Bench bench(options.iterations);
  bench.json = options.json;
  bench.only = options.value("--only");
  bench.rows();
  bench.optimizer();
  for (const std::int64_t tokens : {kTokens, 8 * kTokens}) bench.gates(tokens);
  bench.plans();
  if (!options.json) return 0;
  char bandwidth[64];
  std::snprintf(bandwidth, sizeof bandwidth, "\"copy_gb_per_s\": %.0f,", bench.copy_bytes_per_us / 1e3);
  print_json_head(options, kSeed, bandwidth);
  for (std::size_t i = 0; i < g_rows.size(); ++i) {
    const Row& row = g_rows[i];
    std::printf(
        "  {\"shape\": \"%s\", \"case\": \"%s\", \"median_us\": %.2f, \"mad_us\": %.2f, \"baseline\": "
        "\"%s\", "
        "\"baseline_us\": %.2f, \"ratio\": %.4f%s}%s\n",
        row.shape.c_str(), row.kase.c_str(), row.time.median_us, row.time.mad_us, row.baseline.c_str(),
        row.baseline_us, row.baseline_us / row.time.median_us, row.more.c_str(),
        i + 1 < g_rows.size() ? "," : "");
  }
  std::printf("]}\n");
}
