#include "sluice/runtime/src/bench/layer_bench.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <tuple>

#include "sluice/base/clock.hpp"
#include "sluice/base/hash.hpp"
#include "sluice/base/telemetry.hpp"
#include "sluice/base/text_table.hpp"
#include "sluice/moe_layer.hpp"
#include "sluice/runtime/src/bench/dense_gemms.hpp"
#include "sluice/runtime/src/bench/draw_routing.hpp"
#include "sluice/runtime/src/compute_device.hpp"
#include "sluice/runtime/src/gather.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/runtime_state.hpp"
#include "sluice/runtime/src/timeline.hpp"
#include "sluice/runtime/src/tune/predict.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice {
namespace {

constexpr std::size_t kTimelineSpans = 1 << 14;

// A batch and the weights of one rank; a function of the seed, the rank and the expert.
struct Inputs {
  Routing routing;
  std::vector<std::byte> x, dy, y, dx;
  std::vector<std::vector<std::byte>> w1, w2;
  std::vector<std::vector<float>> g1, g2;
  std::vector<float> dw;
  // Constant experts: W_c [2, hidden], v [1, hidden] and their gradients, of each.
  std::vector<std::vector<float>> cw, cv, grad_cw, grad_cv;
};

std::vector<std::byte> random_rows(std::mt19937_64& rng, std::size_t n, float scale, DType dtype) {
  std::vector<std::byte> out(n * size_of(dtype));
  std::uniform_real_distribution<float> uniform(-scale, scale);
  for (std::size_t i = 0; i < n; ++i) {
    const float v = uniform(rng);
    if (dtype == DType::kF32) {
      std::memcpy(&out[4 * i], &v, 4);
    } else {
      const bf16 b(v);
      std::memcpy(&out[2 * i], &b, 2);
    }
  }
  return out;
}

Inputs make_inputs(const Config& config, const MoeLayerOptions& options, const Placement& placement,
                   RankId rank) {
  Inputs in;
  in.routing = draw_routing(config, placement.num_experts, rank, placement.num_ranks);
  std::mt19937_64 rng(Hasher().add_int(config.bench.seed).add_int(rank.value).add_text("rows").value());
  const auto n = static_cast<std::size_t>(in.routing.num_tokens() * options.hidden);
  in.x = random_rows(rng, n, 1, options.dtype);
  in.dy = random_rows(rng, n, 1, options.dtype);
  in.y.resize(n * size_of(options.dtype));
  in.dx.resize(in.y.size());
  in.dw.resize(in.routing.expert.size());
  const auto pre = static_cast<std::size_t>(preactivation_cols(options) * options.hidden);
  const auto ffn = static_cast<std::size_t>(options.hidden * options.ffn);
  for (const std::int32_t e : placement.experts_of(rank)) {
    std::mt19937_64 weights(Hasher().add_int(config.bench.seed).add_int(e).add_text("weights").value());
    in.w1.push_back(random_rows(weights, pre, 1 / std::sqrt(float(options.hidden)), options.dtype));
    in.w2.push_back(random_rows(weights, ffn, 1 / std::sqrt(float(options.ffn)), options.dtype));
    in.g1.emplace_back(pre, 0.0f);
    in.g2.emplace_back(ffn, 0.0f);
  }
  for (std::int32_t e = 0; e < placement.num_experts; ++e) {
    if (placement.kind[static_cast<std::size_t>(e)] != ExpertKind::kConstant) continue;
    std::mt19937_64 weights(Hasher().add_int(config.bench.seed).add_int(e).add_text("weights").value());
    std::uniform_real_distribution<float> uniform(-1, 1);
    const auto hidden = static_cast<std::size_t>(options.hidden);
    for (const auto& [values, gradient, rows] :
         {std::tuple(&in.cw, &in.grad_cw, std::size_t{2}), std::tuple(&in.cv, &in.grad_cv, std::size_t{1})}) {
      values->emplace_back(rows * hidden);
      for (float& w : values->back()) w = uniform(weights) / std::sqrt(static_cast<float>(hidden));
      gradient->emplace_back(rows * hidden, 0.0f);
    }
  }
  return in;
}

double elapsed_us(Clock::time_point begin) {
  return to_us(Clock::now() - begin);
}

// Per iteration, the slowest rank's time.
std::vector<double> slowest(Runtime& runtime, const std::vector<double>& mine_us) {
  return largest_of_ranks(runtime, mine_us, "bench");
}

double largest(Runtime& runtime, double mine) {
  return slowest(runtime, {mine})[0];
}
std::int64_t total(Runtime& runtime, std::int64_t mine) {
  std::int64_t sum = 0;
  for (const std::int64_t v : runtime.all_gather(std::span(&mine, 1), "bench")) sum += v;
  return sum;
}

// How long each resource of this rank was busy, a pass at a time: a floor is compared with medians over passes, and one
// pass that something disturbed would lift a mean above them.
struct BusyTimes {
  std::vector<double> compute_us, in_node_us, across_nodes_us;
  // Takes what the recorder has added since the last call.
  void add(const SpanRecorder& recorder) {
    const auto totals = recorder.totals();
    const auto add_one = [&](std::vector<double>& us, std::string_view resource, std::int64_t& before) {
      const std::int64_t now = busy_ns(totals, resource);
      us.push_back(static_cast<double>(now - std::exchange(before, now)) / 1000);
    };
    add_one(compute_us, "compute", compute_ns);
    add_one(in_node_us, "in-node link", in_node_ns);
    add_one(across_nodes_us, "across-nodes link", across_nodes_ns);
  }

 private:
  std::int64_t compute_ns = 0, in_node_ns = 0, across_nodes_ns = 0;
};

// A schedule under measurement.
struct Arm {
  Arm(Runtime& runtime, const Placement& placement, const MoeLayerOptions& options)
      : layer(runtime, placement, options), forward_spans(runtime.rank()), backward_spans(runtime.rank()) {}
  MoeLayer layer;
  std::shared_ptr<const Plan> plan;
  std::vector<double> forward_us, backward_us, plan_us;
  SpanRecorder forward_spans, backward_spans;
  BusyTimes forward_busy, backward_busy;
};

// The rows of one pass at this rank by level: what leaves, and what comes.
struct LinkBytes {
  std::int64_t out = 0, in = 0;
  double time_us(const LinkSpeed& link) const {
    return static_cast<double>(std::max(out, in)) / link.bytes_per_s * 1e6;
  }
};

LinkBytes link_bytes(const Plan& plan, const Topology& topology, const MoeLayerOptions& options,
                     bool across) {
  const std::int64_t row = options.hidden * static_cast<std::int64_t>(size_of(options.wire_dtype));
  const std::int64_t sum_row = options.hidden * static_cast<std::int64_t>(size_of(options.combine_dtype));
  std::int64_t sent = 0, received = 0;
  const auto count = [&](const std::vector<Segment>& segments, std::int64_t& rows) {
    for (const Segment& seg : segments)
      if (seg.peer != plan.rank.value && topology.same_node(plan.rank, RankId(seg.peer)) != across)
        rows += seg.num_rows;
  };
  count(plan.send1.segments, sent);
  count(plan.send2.segments, sent);
  count(plan.recv1.segments, received);
  count(plan.recv2.segments, received);
  return {sent * row + received * sum_row, received * row + sent * sum_row};
}

// The slowest rank's of every pass, the median over passes; a link of declared speed by its bytes.
Floor measure_floor(Runtime& runtime, const BusyTimes& busy, const Plan& plan,
                    const MoeLayerOptions& options) {
  const Topology& topology = runtime.topology();
  const auto typical = [&](const std::vector<double>& us) {
    return sample_of(slowest(runtime, us)).median_us;
  };
  const auto link = [&](const LinkSpeed& speed, bool across, const std::vector<double>& us) {
    return speed.bytes_per_s > 0
               ? largest(runtime, link_bytes(plan, topology, options, across).time_us(speed))
               : typical(us);
  };
  return {typical(busy.compute_us), link(topology.in_node, false, busy.in_node_us),
          link(topology.across_nodes, true, busy.across_nodes_us)};
}

constexpr int kDenseRuns = 5;

// The pass's GEMMs as one group of all local rows: what the arithmetic costs when nothing is ragged.
std::pair<double, double> dense_gemm_us(Runtime& runtime, const Plan& plan, const MoeLayerOptions& options,
                                        Inputs& in) {
  const std::int64_t rows = plan.num_positions();
  std::vector<double> forward, backward;
  if (rows > 0 && !in.w1.empty()) {
    kernels::Kernels& kernels = runtime.kernels();
    const std::int64_t pre = preactivation_cols(options);
    std::mt19937_64 rng(1);
    auto a = random_rows(rng, static_cast<std::size_t>(rows * options.hidden), 1, options.dtype);
    if (kernels::Device* device = runtime.state().device.get()) {
      DenseGemms gemms(*device, options, rows, a, in.w1[0], in.w2[0]);
      for (int i = 0; i < 1 + kDenseRuns; ++i) {
        const double forward_us = gemms.forward_us(), backward_us = gemms.backward_us();
        if (i == 0) continue;  // kernels are loaded
        forward.push_back(forward_us);
        backward.push_back(backward_us);
      }
      return {largest(runtime, sample_of(forward).median_us),
              largest(runtime, sample_of(backward).median_us)};
    }
    std::vector<std::byte> h(static_cast<std::size_t>(rows * pre) * size_of(options.dtype));
    std::vector<std::byte> act(static_cast<std::size_t>(rows * options.ffn) * size_of(options.dtype));
    std::vector<std::byte> out(a.size());
    const MatrixView va(a.data(), options.dtype, rows, options.hidden, options.hidden);
    const MatrixView vh(h.data(), options.dtype, rows, pre, pre);
    const MatrixView vact(act.data(), options.dtype, rows, options.ffn, options.ffn);
    const MatrixView vout(out.data(), options.dtype, rows, options.hidden, options.hidden);
    const std::int64_t ptr[2] = {0, rows};
    const std::byte* w1[1] = {in.w1[0].data()};
    const std::byte* w2[1] = {in.w2[0].data()};
    float* g1[1] = {in.g1[0].data()};
    float* g2[1] = {in.g2[0].data()};
    const kernels::Groups groups1{ptr, w1}, groups2{ptr, w2};
    for (int i = 0; i < kDenseRuns; ++i) {
      auto begin = Clock::now();
      kernels.grouped_gemm_forward(groups1, va, {}, options.dtype, pre, kernels::Activation::kRelu, vh, {});
      kernels.grouped_gemm_forward(groups2, vact, {}, options.dtype, options.hidden,
                                   kernels::Activation::kRelu, vout, {});
      forward.push_back(elapsed_us(begin));
      begin = Clock::now();
      kernels.grouped_gemm_dgrad(groups2, va, {}, options.dtype, vact);
      kernels.grouped_gemm_dgrad(groups1, vh, {}, options.dtype, vout);
      kernels.grouped_gemm_wgrad(ptr, va, {}, vact, {}, g2);
      kernels.grouped_gemm_wgrad(ptr, vh, {}, va, {}, g1);
      backward.push_back(elapsed_us(begin));
    }
  }
  const auto median = [](std::vector<double>& v) { return v.empty() ? 0.0 : sample_of(v).median_us; };
  return {largest(runtime, median(forward)), largest(runtime, median(backward))};
}

nlohmann::json number(double v) {
  return std::isfinite(v) ? nlohmann::json(v) : nlohmann::json();
}
nlohmann::json sample_json(const Sample& s) {
  return {{"median", s.median_us}, {"mad", s.mad_us}};
}
nlohmann::json ratio_json(const PairedRatio& r) {
  return {{"median", number(r.median)}, {"upper95", number(r.upper95)}};
}
nlohmann::json floor_json(const Floor& f) {
  return {{"compute", number(f.compute_us)},
          {"in_node", number(f.in_node_us)},
          {"across_nodes", number(f.across_nodes_us)}};
}

}  // namespace

Sample sample_of(std::vector<double> values) {
  Require(!values.empty(), ErrorCode::kInvalidArgument, "no samples");
  const auto median = [](std::vector<double>& v) {
    const std::size_t mid = v.size() / 2;
    std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(mid), v.end());
    if (v.size() % 2 == 1) return v[mid];
    return (v[mid] + *std::max_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(mid))) / 2;
  };
  Sample out;
  out.median_us = median(values);
  for (double& v : values) v = std::abs(v - out.median_us);
  out.mad_us = median(values);
  return out;
}

double PassFigures::to_dense() const {
  return dense_gemm_us > 0 ? scheduled.median_us / dense_gemm_us : std::nan("");
}

double PassFigures::overlap_efficiency() const {
  if (!(sequential.median_us >= 1.05 * floor.largest_us())) return std::nan("");
  return (sequential.median_us - scheduled.median_us) / (sequential.median_us - floor.largest_us());
}

PairedRatio paired_ratio(std::span<const double> values, std::span<const double> baseline) {
  std::vector<double> ratio;
  for (std::size_t i = 0; i < values.size(); ++i) ratio.push_back(values[i] / baseline[i]);
  std::sort(ratio.begin(), ratio.end());
  PairedRatio out;
  out.median = sample_of(ratio).median_us;
  // The median is below the k-th smallest of n with the probability that fewer than k of n fair coins show heads.
  const auto n = static_cast<double>(ratio.size());
  double below = 0, log_heads = -n * std::log(2.0);  // of the probability of k heads
  std::size_t k = 0;
  while (k < ratio.size() && below < 0.95) {
    below += std::exp(log_heads);
    log_heads += std::log((n - static_cast<double>(k)) / static_cast<double>(k + 1));
    ++k;
  }
  out.upper95 = below >= 0.95 ? ratio[k - 1] : std::nan("");
  return out;
}

std::vector<LayerBenchReport> run_layer_bench(Runtime& runtime, std::span<const LoadedConfig> configs) {
  Require(!configs.empty(), ErrorCode::kInvalidArgument, "nothing to measure");
  const Config& config = configs.front().config;
  for (const LoadedConfig& other : configs)
    Require(semantic_hash(other.config) == semantic_hash(config), ErrorCode::kInvalidArgument,
            "schedules are compared on one model, routing and group; the configs differ in more");
  check_placement_file(config, runtime.topology(), 0, runtime.rank() == RankId(0));
  const Placement placement = placement_of(config, runtime.num_ranks(), config.bench.replay_layer);
  const MoeLayerOptions options = layer_options(config);
  Inputs in = make_inputs(config, options, placement, runtime.rank());
  std::vector<ExpertWeights> weights;
  for (std::size_t i = 0; i < in.w1.size(); ++i)
    weights.push_back(
        {ConstMatrixView(in.w1[i].data(), options.dtype, preactivation_cols(options), options.hidden,
                         options.hidden),
         ConstMatrixView(in.w2[i].data(), options.dtype, options.hidden, options.ffn, options.ffn),
         in.g1[i].data(), in.g2[i].data()});
  // The last arm is the baseline.
  std::vector<std::unique_ptr<Arm>> arms;
  for (const LoadedConfig& c : configs) {
    MoeLayerOptions o = layer_options(c.config);
    Require(o.schedule.num_chunks <= std::max<std::int64_t>(1, config.bench.tokens_per_rank),
            ErrorCode::kInvalidConfig, "schedule.num_chunks is ", o.schedule.num_chunks, ", but a rank has ",
            config.bench.tokens_per_rank, " tokens (bench.tokens_per_rank); chunks would be empty");
    choose_automatically(runtime, c.config, o);
    arms.push_back(std::make_unique<Arm>(runtime, placement, o));
  }
  MoeLayerOptions sequential = options;
  sequential.schedule = {SchedulePolicy::kSequential, options.schedule.exchange, 1};
  arms.push_back(std::make_unique<Arm>(runtime, placement, sequential));
  std::vector<ConstantExpertWeights> constants;
  for (std::size_t i = 0; i < in.cw.size(); ++i)
    constants.push_back({ConstMatrixView(in.cw[i].data(), 2, options.hidden),
                         ConstMatrixView(in.cv[i].data(), 1, options.hidden), in.grad_cw[i].data(),
                         in.grad_cv[i].data()});
  for (const auto& arm : arms) {
    arm->layer.set_weights(weights);
    arm->layer.set_constant_experts(constants);
  }

  const std::int64_t tokens = in.routing.num_tokens();
  const auto view = [&](std::vector<std::byte>& b) {
    return MatrixView(b.data(), options.dtype, tokens, options.hidden, options.hidden);
  };
  SpanRecorder timeline(runtime.rank(), config.runtime.timeline.empty() ? 0 : kTimelineSpans);
  std::vector<std::byte> first_y, first_dx;
  const std::int64_t rounds = config.bench.warmup + config.bench.iterations;
  for (std::int64_t round = 0; round < rounds; ++round) {
    const bool measured = round >= config.bench.warmup;
    for (std::size_t i = 0; i < arms.size(); ++i) {
      Arm& arm = *arms[(static_cast<std::size_t>(round) + i) % arms.size()];
      const auto timed = [&](std::vector<double>& us, SpanRecorder* spans, BusyTimes* busy, auto&& call) {
        runtime.barrier("bench");
        runtime.set_recorder(measured ? spans : nullptr);
        const auto begin = Clock::now();
        call();
        if (measured) us.push_back(elapsed_us(begin));
        runtime.set_recorder(nullptr);
        if (measured && busy != nullptr) busy->add(*spans);
      };
      timed(arm.plan_us, nullptr, nullptr, [&] {
        arm.plan.reset();
        arm.plan = arm.layer.plan(in.routing);
      });
      std::memset(in.y.data(), 0xff, in.y.size());
      std::memset(in.dx.data(), 0xff, in.dx.size());
      Context context;
      timed(arm.forward_us, &arm.forward_spans, &arm.forward_busy,
            [&] { context = arm.layer.forward(arm.plan, view(in.x), view(in.y)); });
      timed(arm.backward_us, &arm.backward_spans, &arm.backward_busy,
            [&] { arm.layer.backward(context, view(in.dy), view(in.dx), in.dw); });
      if (first_y.empty()) {
        first_y = in.y;
        first_dx = in.dx;
      }
      Require(first_y == in.y && first_dx == in.dx, ErrorCode::kInternal,
              "schedules gave different bits on rank ", runtime.rank().value);
    }
  }
  if (!config.runtime.timeline.empty()) {
    Arm& arm = *arms.front();
    runtime.barrier("bench");
    runtime.set_recorder(&timeline);
    Context context = arm.layer.forward(arm.plan, view(in.x), view(in.y));
    arm.layer.backward(context, view(in.dy), view(in.dx), in.dw);
    runtime.set_recorder(nullptr);
    write_timeline(runtime, timeline, config.runtime.timeline);
  }

  const Arm& baseline = *arms.back();
  const std::vector<double> baseline_forward = slowest(runtime, baseline.forward_us);
  const std::vector<double> baseline_backward = slowest(runtime, baseline.backward_us);
  // Predictions are made from the counts of full plans; only rank 0 makes them.
  // Profiles are of CPUs: for a device there is a prediction only from a profile file.
  std::optional<Predictor> predictor;
  if (!runtime.state().device || has_profile(config)) {
    const std::shared_ptr<const MachineProfile> profile = group_profile(runtime, config);
    if (runtime.rank() == RankId(0)) predictor.emplace(config, runtime.topology(), *profile);
  }
  const auto dense = dense_gemm_us(runtime, *baseline.plan, options, in);
  std::vector<LayerBenchReport> reports;
  for (std::size_t i = 0; i < configs.size(); ++i) {
    const Arm& arm = *arms[i];
    const MoeLayerOptions& o = arm.layer.options();
    const Plan& plan = *arm.plan;
    LayerBenchReport out;
    out.device = device_name(runtime);
    out.num_ranks = runtime.num_ranks();
    out.topology = runtime.topology().describe();
    out.emulated_links = runtime.topology().in_node.limited() || runtime.topology().across_nodes.limited();
    const ScheduleOptions schedule = arm.layer.exchange_template().schedule;
    out.automatic = o.auto_profile != nullptr;
    out.policy = to_string(schedule.policy);
    out.exchange = schedule.exchange == Exchange::kGateway ? "gateway" : "direct";
    out.num_chunks = schedule.num_chunks;
    out.config_hash = semantic_hash(config);
    out.plan = sample_of(slowest(runtime, arm.plan_us));
    const std::vector<double> forward = slowest(runtime, arm.forward_us);
    const std::vector<double> backward = slowest(runtime, arm.backward_us);
    out.forward.scheduled = sample_of(forward);
    out.forward.sequential = sample_of(baseline_forward);
    out.forward.to_sequential = paired_ratio(forward, baseline_forward);
    out.backward.scheduled = sample_of(backward);
    out.backward.sequential = sample_of(baseline_backward);
    out.backward.to_sequential = paired_ratio(backward, baseline_backward);
    out.forward.floor = measure_floor(runtime, arm.forward_busy, plan, o);
    out.backward.floor = measure_floor(runtime, arm.backward_busy, plan, o);
    std::tie(out.forward.dense_gemm_us, out.backward.dense_gemm_us) = dense;
    if (predictor) {
      out.forward.predicted_us = predictor->run(schedule, PassKind::kForward).step_us;
      out.backward.predicted_us = predictor->run(schedule, PassKind::kBackward).step_us;
    }
    for (PassFigures* p : {&out.forward, &out.backward})
      p->exposed_comm_us = std::max(0.0, p->scheduled.median_us - p->floor.compute_us);
    const std::int64_t both_ways = options.hidden * static_cast<std::int64_t>(size_of(options.wire_dtype) +
                                                                              size_of(options.combine_dtype));
    const Traffic& t = plan.traffic;
    out.bytes_in_node = total(runtime, t.rows_in_node) * both_ways;
    out.bytes_across_nodes = total(runtime, t.rows_across_nodes) * both_ways;
    out.flat_bytes_in_node = total(runtime, t.flat_rows_in_node) * both_ways;
    out.flat_bytes_across_nodes = total(runtime, t.flat_rows_across_nodes) * both_ways;
    const double all_tokens = static_cast<double>(std::max<std::int64_t>(1, total(runtime, tokens)));
    out.crossings_same_rank = static_cast<double>(total(runtime, t.rows_same_rank)) / all_tokens;
    out.crossings_in_node = static_cast<double>(total(runtime, t.rows_in_node)) / all_tokens;
    out.crossings_across_nodes = static_cast<double>(total(runtime, t.rows_across_nodes)) / all_tokens;
    out.memory_bytes = std::llround(largest(runtime, static_cast<double>(arm.layer.memory().total())));
    reports.push_back(std::move(out));
  }
  return reports;
}

std::string LayerBenchReport::to_json() const {
  nlohmann::json out{
      {"device", device},
      {"rows", on_gpus ? "device" : "host"},
      {"ranks", num_ranks},
      {"topology", topology},
      {"emulated_links", emulated_links},
      {"schedule",
       {{"policy", policy}, {"exchange", exchange}, {"num_chunks", num_chunks}, {"automatic", automatic}}},
      {"plan_us", sample_json(plan)},
      {"forward_us", sample_json(forward.scheduled)},
      {"backward_us", sample_json(backward.scheduled)},
      {"sequential_forward_us", sample_json(forward.sequential)},
      {"sequential_backward_us", sample_json(backward.sequential)},
      {"forward_to_sequential", ratio_json(forward.to_sequential)},
      {"backward_to_sequential", ratio_json(backward.to_sequential)},
      {"floor_us", floor_json(forward.floor)},
      {"floor_backward_us", floor_json(backward.floor)},
      {"dense_gemm_us", {{"forward", forward.dense_gemm_us}, {"backward", backward.dense_gemm_us}}},
      {"predicted_forward_us", number(forward.predicted_us)},
      {"predicted_backward_us", number(backward.predicted_us)},
      {"prediction_error",
       {{"forward", number(forward.prediction_error())}, {"backward", number(backward.prediction_error())}}},
      {"overlap_efficiency", number(forward.overlap_efficiency())},
      {"overlap_efficiency_backward", number(backward.overlap_efficiency())},
      {"exposed_comm_us", number(forward.exposed_comm_us)},
      {"exposed_comm_backward_us", number(backward.exposed_comm_us)},
      {"bytes", {{"in_node", bytes_in_node}, {"across_nodes", bytes_across_nodes}}},
      {"flat_bytes", {{"in_node", flat_bytes_in_node}, {"across_nodes", flat_bytes_across_nodes}}},
      {"crossings_per_token",
       {{"same_rank", crossings_same_rank},
        {"in_node", crossings_in_node},
        {"across_nodes", crossings_across_nodes}}},
      {"memory_bytes", memory_bytes},
      {"config_hash", hash_text(config_hash)}};
  if (!host_rows_because.empty()) out["rows_because"] = host_rows_because;
  if (on_gpus) {
    out["link"] = on_gpus->link;
    out["to_dense_gemm"] = {{"forward", number(forward.to_dense())},
                            {"backward", number(backward.to_dense())}};
    out["exchange_alone_us"] = sample_json(on_gpus->exchange);
    out["gemms_alone_us"] = sample_json(on_gpus->gemms);
    out["local_work_us"] = sample_json(on_gpus->local);
    out["check"] = {{"tokens", on_gpus->checked_tokens},
                    {"tolerance", on_gpus->tolerance},
                    {"y_error", on_gpus->y_error},
                    {"dx_error", on_gpus->dx_error},
                    {"dweight_error", on_gpus->dweight_error},
                    {"gradient_error", on_gpus->gradient_error},
                    {"y_bits", hash_text(on_gpus->y_bits)},
                    {"dx_bits", hash_text(on_gpus->dx_bits)}};
  }
  return out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string LayerBenchReport::to_text() const {
  std::string out =
      str("one MoE layer on ", device, ", ", topology, emulated_links ? " (links emulated)" : "",
          ", schedule ", automatic ? "auto: " : "", policy, ", exchange ", exchange, ", ", num_chunks,
          num_chunks == 1 ? " chunk\n" : " chunks\n");
  TextTable table({"us, slowest rank", "forward", "backward"});
  const auto both = [&](std::string name, auto&& get) {
    table.add_row({std::move(name), get(forward), get(backward)});
  };
  const auto spread = [](const Sample& s) { return fixed(s.median_us, 1) + " +- " + fixed(s.mad_us, 1); };
  both("scheduled", [&](const PassFigures& p) { return spread(p.scheduled); });
  both("sequential", [&](const PassFigures& p) { return spread(p.sequential); });
  both("ratio to sequential, pairwise", [](const PassFigures& p) {
    return fixed(p.to_sequential.median, 3) + ", 95% below " + fixed(p.to_sequential.upper95, 3);
  });
  table.add_rule();
  both("floor: compute", [](const PassFigures& p) { return fixed(p.floor.compute_us, 1); });
  both("floor: in node", [](const PassFigures& p) { return fixed(p.floor.in_node_us, 1); });
  both("floor: across nodes", [](const PassFigures& p) { return fixed(p.floor.across_nodes_us, 1); });
  both("dense GEMM of as many rows", [](const PassFigures& p) { return fixed(p.dense_gemm_us, 1); });
  table.add_rule();
  if (on_gpus) {
    both("ratio to dense GEMM", [](const PassFigures& p) { return fixed(p.to_dense(), 3); });
    table.add_row({"exchange alone", spread(on_gpus->exchange)});
    table.add_row({"GEMMs alone", spread(on_gpus->gemms)});
    table.add_row({"all but the link", spread(on_gpus->local)});
  }
  both("predicted", [](const PassFigures& p) -> std::string {
    if (!std::isfinite(p.predicted_us)) return "no profile of this device";
    return fixed(p.predicted_us, 1) + " (" + (p.prediction_error() < 0 ? "" : "+") +
           fixed(100 * p.prediction_error(), 1) + "%)";
  });
  both("exposed communication", [](const PassFigures& p) { return fixed(p.exposed_comm_us, 1); });
  both("overlap efficiency", [](const PassFigures& p) { return fixed(p.overlap_efficiency(), 3); });
  out += table.to_string();
  out += str("plan ", spread(plan), " us, memory ", bytes_text(memory_bytes), "\n");
  TextTable traffic({"a forward, all ranks", "bytes", "flat, no de-duplication", "crossings a token"});
  traffic.add_row({"same rank", "0", "0", fixed(crossings_same_rank, 3)});
  traffic.add_row(
      {"in node", grouped(bytes_in_node), grouped(flat_bytes_in_node), fixed(crossings_in_node, 3)});
  traffic.add_row({"across nodes", grouped(bytes_across_nodes), grouped(flat_bytes_across_nodes),
                   fixed(crossings_across_nodes, 3)});
  out += traffic.to_string();
  if (!host_rows_because.empty())
    out += str("rows pass through the host's memory: ", host_rows_because, "\n");
  if (on_gpus)
    out += str("rows stay on the GPUs, link ", on_gpus->link, "; against the CPU's kernels on ",
               on_gpus->checked_tokens, " tokens a rank: y off by ", fixed(on_gpus->y_error, 4), ", dx ",
               fixed(on_gpus->dx_error, 4), ", gate weights' gradients ", fixed(on_gpus->dweight_error, 4),
               ", weights' gradients ", fixed(on_gpus->gradient_error, 4), " of their norm (tolerance ",
               fixed(on_gpus->tolerance, 3), ")\n");
  return out;
}

}  // namespace sluice
