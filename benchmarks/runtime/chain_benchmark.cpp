// What token chunks hide of a chain's exchanges: forward and backward of one chain layer at several chunk counts, in turns,
// over a declared link that transport local emulates. Every arm's y and dx must have the same bits.
//
//   chain_benchmark [--config FILE] [--set SECTION.KEY=VALUE]...
//
// Without a file: 2 ranks as 2 nodes of one rank, one thread each. Tokens, pairs and warm-up are those of section bench,
// the chain that of model and routing, the schedule inside a pass that of schedule. Times are medians over pairs of the
// slowest rank. Floor: the larger of the busiest rank's compute spans (with one chunk) and of the rows over the link.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sluice/base/clock.hpp"
#include "sluice/base/config.hpp"
#include "sluice/base/telemetry.hpp"
#include "sluice/base/text_table.hpp"
#include "sluice/chain_layer.hpp"
#include "sluice/runtime/src/layer_config.hpp"

namespace {

using namespace sluice;

constexpr std::int32_t kChunks[] = {1, 2, 3, 4, 8};

constexpr std::string_view kDefaults = R"(
[model]
num_experts = 16
hidden = 512
ffn = 512
shared_ffn = 512
chain_iterations = 2
chain_residual = "inner"
[routing]
policy = "softmax_topk"
top_k = 2
renormalize = false
[topology]
nodes = "2x1"
across_nodes_bytes_per_s = 5e8
across_nodes_latency_us = 20
[schedule]
policy = "sequential"
[bench]
tokens_per_rank = 1024
iterations = 15
warmup = 3
)";

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? 0 : 0.5 * (v[(v.size() - 1) / 2] + v[v.size() / 2]);
}

struct Matrix {
  std::vector<float> values, gradient;
  std::int64_t rows, cols;
  Matrix(std::mt19937_64& rng, std::int64_t r, std::int64_t c)
      : values(static_cast<std::size_t>(r * c)), gradient(values.size()), rows(r), cols(c) {
    std::normal_distribution<float> normal(0, 1 / std::sqrt(static_cast<float>(c)));
    for (float& v : values) v = normal(rng);
  }
  ConstMatrixView view() const { return {values.data(), rows, cols}; }
};

// Times of one arm, of one rank, in microseconds.
struct Times {
  std::vector<double> forward, backward;
  double compute_forward_us = 0, compute_backward_us = 0;  // in compute spans
};
struct RankReport {
  std::vector<Times> arms;
  double link_us = 0;  // rows one way, forward or backward
};

void run_rank(Runtime& runtime, const Config& config, RankReport& report) {
  Require(config.model.dtype == DType::kF32, ErrorCode::kNotSupported, "the benchmark has f32 rows only");
  ChainLayerOptions options = chain_options(config);
  const auto policy = policy_of(config, runtime.topology());
  const AdaptiveState adaptive = policy->initial_adaptive_state(config.model.num_experts);
  const Placement placement = placement_of(config, runtime.num_ranks());
  const std::int64_t n = config.bench.tokens_per_rank, h = options.layer.hidden,
                     pre = preactivation_cols(options.layer);
  std::mt19937_64 rng(static_cast<std::uint64_t>(config.bench.seed) + runtime.rank().index());
  const auto make = [&](std::int64_t rows, std::int64_t cols) { return Matrix(rng, rows, cols); };
  std::vector<Matrix> w1, w2, gate_matrices;
  for (std::int32_t i = 0; i < placement.num_slots_of(runtime.rank()); ++i) {
    w1.push_back(make(pre, h));
    w2.push_back(make(h, options.layer.ffn));
  }
  for (std::int32_t t = 0; t < config.model.num_gates(); ++t)
    gate_matrices.push_back(make(config.model.num_experts, h));
  std::vector<ExpertWeights> slots;
  for (std::size_t i = 0; i < w1.size(); ++i)
    slots.push_back({w1[i].view(), w2[i].view(), w1[i].gradient.data(), w2[i].gradient.data()});
  std::vector<GateWeights> gates;
  for (Matrix& gate : gate_matrices) gates.push_back({gate.view(), gate.gradient.data()});
  std::optional<Matrix> s1, s2;
  if (options.shared_ffn > 0) {
    s1 = make(pre / options.layer.ffn * options.shared_ffn, h);
    s2 = make(h, options.shared_ffn);
  }
  Matrix x = make(n, h), dy = make(n, h);
  for (float& v : x.values) v *= std::sqrt(static_cast<float>(h));
  std::vector<float> y(x.values.size()), dx(x.values.size()), first_y, first_dx;

  std::vector<std::unique_ptr<ChainLayer>> arms;
  for (const std::int32_t chunks : kChunks) {
    options.num_chunks = chunks;
    arms.push_back(std::make_unique<ChainLayer>(runtime, placement, options, *policy));
    arms.back()->set_weights(slots);
    arms.back()->set_gates(gates);
    if (s1)
      arms.back()->set_shared_expert({s1->view(), s2->view(), s1->gradient.data(), s2->gradient.data()});
  }
  report.arms.resize(arms.size());
  std::vector<SpanRecorder> forward_spans(arms.size(), SpanRecorder(runtime.rank()));
  std::vector<SpanRecorder> backward_spans = forward_spans;
  const std::int64_t rounds = config.bench.warmup + config.bench.iterations;
  for (std::int64_t round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < arms.size(); ++i) {
      const std::size_t a = (static_cast<std::size_t>(round) + i) % arms.size();
      const bool measured = round >= config.bench.warmup;
      std::memset(y.data(), 0xff, y.size() * sizeof(float));
      std::memset(dx.data(), 0xff, dx.size() * sizeof(float));
      runtime.barrier("bench");
      runtime.set_recorder(measured ? &forward_spans[a] : nullptr);
      auto begin = Clock::now();
      ChainContext context =
          arms[a]->forward(x.view(), MatrixView(y.data(), n, h), std::span(&adaptive, 1), true);
      if (measured) report.arms[a].forward.push_back(to_us(Clock::now() - begin));
      runtime.barrier("bench");
      runtime.set_recorder(measured ? &backward_spans[a] : nullptr);
      begin = Clock::now();
      arms[a]->backward(context, dy.view(), MatrixView(dx.data(), n, h));
      if (measured) report.arms[a].backward.push_back(to_us(Clock::now() - begin));
      runtime.set_recorder(nullptr);
      if (first_y.empty()) {
        first_y = y;
        first_dx = dx;
      }
      Require(std::memcmp(y.data(), first_y.data(), y.size() * sizeof(float)) == 0 &&
                  std::memcmp(dx.data(), first_dx.data(), dx.size() * sizeof(float)) == 0,
              ErrorCode::kInternal, kChunks[a], " chunks gave other bits on rank ", runtime.rank().value);
      if (round == 0 && a == 0 && runtime.topology().across_nodes.bytes_per_s > 0) {
        std::int64_t rows = 0;  // either way: dispatched, and sums on their way home
        for (std::int32_t t = 0; t < options.num_iterations; ++t)
          rows += context.plan(t, 0).send1.num_rows() + context.plan(t, 0).recv1.num_rows();
        report.link_us =
            static_cast<double>(rows * h) * sizeof(float) / runtime.topology().across_nodes.bytes_per_s * 1e6;
      }
    }
  const auto busy = [&](const SpanRecorder& spans) {
    return static_cast<double>(busy_ns(spans.totals(), "compute")) / 1000 /
           static_cast<double>(config.bench.iterations);
  };
  for (std::size_t a = 0; a < arms.size(); ++a) {
    report.arms[a].compute_forward_us = busy(forward_spans[a]);
    report.arms[a].compute_backward_us = busy(backward_spans[a]);
  }
}

int run(int argc, char** argv) {
  std::optional<std::string> file;
  std::vector<std::string> sets;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view flag = argv[i];
    Require(flag == "--config" || flag == "--set", ErrorCode::kInvalidArgument, "unknown option ", flag,
            "; there are --config FILE and --set SECTION.KEY=VALUE");
    if (flag == "--config")
      file = argv[i + 1];
    else
      sets.push_back(argv[i + 1]);
  }
  Require(argc % 2 == 1, ErrorCode::kInvalidArgument, argv[argc - 1], " has no value");
  const Config config =
      file ? load_config(*file, sets).config : parse_config(kDefaults, "built in", sets).config;
  const Topology topology = configured_topology(config, std::max(1, configured_ranks(config)));
  RuntimeOptions options;
  options.threads_per_rank = config.runtime.threads_per_rank;
  auto group = Runtime::create_local(topology, options);
  std::vector<RankReport> reports(group.size());
  std::vector<std::exception_ptr> errors(group.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < group.size(); ++r)
    threads.emplace_back([&, r] {
      try {
        run_rank(*group[r], config, reports[r]);
      } catch (...) {
        errors[r] = std::current_exception();
        group[r]->abort("bench", current_exception_status().message);
      }
    });
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);

  const auto slowest = [&](std::size_t arm, std::vector<double> Times::*pass) {
    std::vector<double> out((reports[0].arms[arm].*pass).size(), 0);
    for (const RankReport& report : reports)
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = std::max(out[i], (report.arms[arm].*pass)[i]);
    return median(out);
  };
  const auto busiest = [&](std::size_t arm, double Times::*pass) {
    double out = 0;
    for (const RankReport& report : reports) out = std::max(out, report.arms[arm].*pass);
    return out;
  };
  const double compute[2] = {busiest(0, &Times::compute_forward_us), busiest(0, &Times::compute_backward_us)};
  double link = 0;
  for (const RankReport& report : reports) link = std::max(link, report.link_us);
  std::printf("chain of %d iterations on %s%s, %lld tokens a rank, %s, schedule inside a pass %s\n",
              config.model.chain_iterations, topology.describe().c_str(),
              topology.across_nodes.limited() ? " (links emulated)" : "",
              static_cast<long long>(config.bench.tokens_per_rank),
              policy_of(config, topology)->name().data(),
              std::string(to_string(chain_options(config).layer.schedule.policy)).c_str());
  std::printf("floor, us: compute %.0f forward, %.0f backward; link %.0f either\n", compute[0], compute[1],
              link);
  TextTable table({"chunks", "forward, us", "compute", "of 1 chunk", "overlap", "backward, us", "compute",
                   "of 1 chunk", "overlap"});
  double one[2] = {0, 0};
  for (std::size_t a = 0; a < std::size(kChunks); ++a) {
    std::vector<std::string> row = {std::to_string(kChunks[a])};
    for (const int pass : {0, 1}) {
      const double us = slowest(a, pass == 0 ? &Times::forward : &Times::backward);
      if (a == 0) one[pass] = us;
      const double floor = std::max(compute[pass], link);
      row.push_back(fixed(us, 0));
      row.push_back(
          fixed(busiest(a, pass == 0 ? &Times::compute_forward_us : &Times::compute_backward_us), 0));
      row.push_back(fixed(us / one[pass], 3));
      row.push_back(one[pass] >= 1.05 * floor ? fixed((one[pass] - us) / (one[pass] - floor), 2) : "-");
    }
    table.add_row(row);
  }
  std::printf("%s", table.to_string().c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "chain_benchmark: %s\n", error.what());
    return 1;
  }
}
