#include "sluice/runtime/src/train/trainer.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <thread>

#include "sluice/base/log.hpp"
#include "sluice/base/progress.hpp"
#include "sluice/base/telemetry.hpp"
#include "sluice/base/text_table.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/runtime/src/gather.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/timeline.hpp"
#include "sluice/runtime/src/train/checkpoint.hpp"

namespace sluice::train {
namespace {

// Held-out tokens are spread evenly when there are more than this.
constexpr std::int64_t kMaxHeldoutTokens = 131072;
// Spans a rank keeps for the timeline.
constexpr std::size_t kTimelineSpans = 1 << 17;

std::vector<std::int64_t> heldout_positions(const TextSplit& split) {
  const std::int64_t count = std::min(split.num_heldout(), kMaxHeldoutTokens);
  std::vector<std::int64_t> out(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i)
    out[static_cast<std::size_t>(i)] = split.heldout_position(i * split.num_heldout() / count);
  return out;
}

// Collective. Bits per byte over the tokens at `positions`.
double evaluate(Runtime& runtime, Model& model, BatchReader& reader, std::span<const std::int64_t> positions,
                std::int64_t tokens_per_batch) {
  double sum = 0;
  for (std::size_t i = 0; i < positions.size(); i += static_cast<std::size_t>(tokens_per_batch))
    sum += model.evaluate(reader.at(
        positions.subspan(i, std::min(static_cast<std::size_t>(tokens_per_batch), positions.size() - i))));
  runtime.all_reduce_sum(std::span<double>(&sum, 1), "held-out loss");
  const double bits = sum / static_cast<double>(positions.size()) / std::numbers::ln2;
  Require(std::isfinite(bits), ErrorCode::kInvalidState,
          "the loss on the held-out text is not finite; lower train.learning_rate");
  return bits;
}

// Mean microseconds a step and rank, by name; on rank 0.
std::map<std::string, double> gather_phases(Runtime& runtime, const SpanRecorder& recorder,
                                            std::int64_t steps) {
  nlohmann::json mine = nlohmann::json::array();
  for (const PhaseTotals& phase : recorder.totals()) mine.push_back({phase.name, phase.total_ns});
  std::map<std::string, double> out;
  for (const std::string& text : gather_to_root(runtime, mine.dump(), "report"))
    for (const auto& entry : nlohmann::json::parse(text))
      out[entry[0].get<std::string>()] += entry[1].get<double>() / 1000 / static_cast<double>(steps) /
                                          static_cast<double>(runtime.num_ranks());
  return out;
}

void gather_totals(Runtime& runtime, TrainReport& report, const Model& model) {
  Traffic &rows = report.movement.rows, &end = report.movement_at_end.rows;
  Movement& bytes = report.movement;
  std::int64_t* const fields[] = {&rows.rows_same_rank,         &rows.rows_in_node,
                                  &rows.rows_across_nodes,      &rows.flat_rows_in_node,
                                  &rows.flat_rows_across_nodes, &rows.routes_everywhere,
                                  &bytes.in_node_bytes,         &bytes.across_nodes_bytes,
                                  &bytes.flat_in_node_bytes,    &bytes.flat_across_nodes_bytes,
                                  &end.rows_same_rank,          &end.rows_in_node,
                                  &end.rows_across_nodes,       &report.movement_at_end.across_nodes_bytes};
  std::vector<std::int64_t> mine;
  for (const std::int64_t* field : fields) mine.push_back(*field);
  for (const std::int64_t value : {model.parameter_bytes(), model.activation_bytes(), model.layer_bytes()})
    mine.push_back(value);
  const std::vector<std::int64_t> all = runtime.all_gather(mine, "report");
  for (std::int64_t* field : fields) *field = 0;
  for (std::size_t begin = 0; begin < all.size(); begin += mine.size()) {
    std::size_t i = begin;
    for (std::int64_t* field : fields) *field += all[i++];
    const TrainReport::Memory memory{all[i], all[i + 1], all[i + 2]};
    if (memory.total() > report.memory_max.total()) report.memory_max = memory;
    report.memory_sum.parameters += memory.parameters;
    report.memory_sum.activations += memory.activations;
    report.memory_sum.layers += memory.layers;
  }
}

double mean_of(std::span<const double> values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

// The last tenth of a series, at least one entry: where a run ended up, without the noise of one step.
double mean_at_end(std::span<const double> values) {
  const std::size_t count = std::max<std::size_t>(1, values.size() / 10);
  return values.empty() ? 0 : mean_of(values.last(std::min(count, values.size())));
}

double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t mid = values.size() / 2;
  return values.size() % 2 == 1 ? values[mid] : (values[mid - 1] + values[mid]) / 2;
}

// Collective. Times the step of `batch` in both schedules (trainer.hpp).
TrainReport::Overlap measure_overlap(Runtime& runtime, const Config& config, Model& model,
                                     const Batch& batch) {
  constexpr int kWarmup = 2, kPairs = 7;
  TrainReport::Overlap out;
  const MoeLayerOptions options = layer_options(config);
  out.note = shared_cores_note(runtime, config.runtime.threads_per_rank, "overlap");
  if (config.schedule.policy == Config::Schedule::Policy::kSequential && config.schedule.chain_chunks == 1)
    out.note = "the schedule is sequential";
  if (rows_go_between_gpus(config)) out.note = "rows travel between GPUs; sluice bench measures that";
  if (runtime.num_ranks() == 1) out.note = "one rank has nobody to wait for";
  if (!out.note.empty()) return out;

  model.add_schedule({SchedulePolicy::kSequential, options.schedule.exchange, 1}, 1);
  SpanRecorder spans(runtime.rank());
  std::vector<double> times[2];
  for (int round = 0; round < kWarmup + kPairs; ++round)
    for (int i = 0; i < 2; ++i) {
      const int arm = (round + i) % 2;  // 0: as scheduled
      if (arm == 1) model.swap_schedules();
      runtime.barrier("overlap");
      runtime.set_recorder(round >= kWarmup && arm == 0 ? &spans : nullptr);
      const auto begin = Clock::now();
      model.compute_gradients(batch);
      if (round >= kWarmup) times[arm].push_back(to_us(Clock::now() - begin));
      runtime.set_recorder(nullptr);
      if (arm == 1) model.swap_schedules();
    }
  const auto totals = spans.totals();
  const auto link = [&](const LinkSpeed& speed, std::int64_t bytes, std::string_view resource) {
    return speed.bytes_per_s > 0 ? static_cast<double>(bytes) / speed.bytes_per_s * 1e6
                                 : static_cast<double>(busy_ns(totals, resource)) / 1000 / kPairs;
  };
  const Topology& topology = runtime.topology();
  const auto floors = largest_of_ranks(
      runtime,
      {static_cast<double>(busy_ns(totals, "compute")) / 1000 / kPairs,
       link(topology.in_node, model.movement().in_node_link_bytes, to_string(Resource::kInNodeLink)),
       link(topology.across_nodes, model.movement().across_nodes_link_bytes,
            to_string(Resource::kAcrossNodesLink))},
      "overlap");
  out.compute_us = floors[0];
  out.in_node_us = floors[1];
  out.across_nodes_us = floors[2];
  out.scheduled_us = median_of(largest_of_ranks(runtime, times[0], "overlap"));
  out.sequential_us = median_of(largest_of_ranks(runtime, times[1], "overlap"));
  if (out.sequential_us >= 1.05 * out.floor_us())
    out.efficiency = (out.sequential_us - out.scheduled_us) / (out.sequential_us - out.floor_us());
  else
    out.note = "the sequential step is within 5% of its floor";
  return out;
}

// Series of the report as rows of a checkpoint, and back: these, then the policy's figures. lambda is 0 where the policy
// has none.
constexpr std::int64_t kHistoryCols = 11;

History history_of(const TrainReport& report) {
  History out{kHistoryCols + std::ssize(report.figures), {}};
  out.values.reserve(report.losses.size() * static_cast<std::size_t>(out.cols));
  for (std::size_t i = 0; i < report.losses.size(); ++i) {
    out.values.insert(out.values.end(),
                      {report.losses[i], report.auxiliary[i], report.grad_norms[i], report.active_mean[i],
                       static_cast<double>(report.active_min[i]), static_cast<double>(report.active_max[i]),
                       report.sparsity[i], report.lambda.empty() ? 0.0 : report.lambda[i],
                       report.expert_balance[i], report.rank_balance[i], report.learning_rates[i]});
    for (const auto& figure : report.figures) out.values.push_back(figure.values[i]);
  }
  return out;
}

void take_history(const History& history, bool with_lambda, TrainReport& report) {
  for (std::size_t at = 0; at < history.values.size(); at += static_cast<std::size_t>(history.cols)) {
    const double* row = history.values.data() + at;
    report.losses.push_back(row[0]);
    report.auxiliary.push_back(row[1]);
    report.grad_norms.push_back(row[2]);
    report.active_mean.push_back(row[3]);
    report.active_min.push_back(static_cast<std::int32_t>(row[4]));
    report.active_max.push_back(static_cast<std::int32_t>(row[5]));
    report.sparsity.push_back(row[6]);
    if (with_lambda) report.lambda.push_back(row[7]);
    report.expert_balance.push_back(row[8]);
    report.rank_balance.push_back(row[9]);
    report.learning_rates.push_back(row[10]);
    for (std::size_t i = 0; i < report.figures.size(); ++i)
      report.figures[i].values.push_back(row[kHistoryCols + static_cast<std::int64_t>(i)]);
  }
}

// Text of the progress line since the last one.
class Meter {
 public:
  void add(const StepResult& result, const Movement& movement, std::int64_t tokens) {
    loss_ += result.loss;
    active_ += result.mean_active;
    same_rank_ += movement.rows.rows_same_rank;
    in_node_ += movement.rows.rows_in_node;
    across_ += movement.rows.rows_across_nodes;
    tokens_ += tokens;
    ++steps_;
  }
  std::string take(std::int32_t num_experts) {
    const auto now = Clock::now();
    const double seconds = to_us(now - begin_) / 1e6, steps = std::max(1.0, double(steps_));
    const double rows = std::max(1.0, double(same_rank_ + in_node_ + across_));
    const auto percent = [&](std::int64_t part) { return fixed(100 * double(part) / rows, 0) + "%"; };
    std::string out = str("bits/byte ", fixed(loss_ / steps / std::numbers::ln2, 3), " tokens/s ",
                          grouped(std::llround(double(tokens_) / std::max(seconds, 1e-9))),
                          " active experts ", fixed(active_ / steps, 2), " of ", num_experts,
                          " rows kept on rank ", percent(same_rank_), " in node ", percent(in_node_));
    *this = Meter();
    begin_ = now;
    return out;
  }

 private:
  Clock::time_point begin_ = Clock::now();
  double loss_ = 0, active_ = 0;
  std::int64_t same_rank_ = 0, in_node_ = 0, across_ = 0, tokens_ = 0, steps_ = 0;
};

// Collective. Routes a text with the trained model.
void record_text(Runtime& runtime, const Config& config, Model& model, const RecordRequest& request,
                 std::int64_t num_batches) {
  Config other = config;
  other.train.text = request.text;
  const Text text = load_text(runtime, other);
  const auto size = static_cast<std::int64_t>(text.bytes.size());
  const TextSplit split(size, config.model.context, config.train.heldout_fraction);
  BatchReader reader(text, split, config, runtime.rank(), runtime.num_ranks());
  RoutingRecorder recorder(runtime, config, request.file);
  const std::int64_t first = config.model.context, per_batch = config.train.tokens_per_step;
  const std::int64_t count = std::min(size - first, std::max<std::int64_t>(1, num_batches) * per_batch);
  std::vector<std::int64_t> positions;
  for (std::int64_t begin = 0; begin < count; begin += per_batch) {
    positions.clear();
    for (std::int64_t i = begin; i < std::min(count, begin + per_batch); ++i)
      positions.push_back(first + i * (size - first) / count);
    const StepResult result = model.compute_gradients(reader.at(positions));
    Require(std::isfinite(result.loss), ErrorCode::kInvalidState, "the loss on ", request.text, " is ",
            result.loss);
    recorder.add(model);
  }
  recorder.finish();
}

// The recorder of a Runtime while a job runs.
class RecorderScope {
 public:
  RecorderScope(Runtime& runtime, SpanRecorder& recorder) : runtime_(runtime), before_(runtime.recorder()) {
    runtime_.set_recorder(&recorder);
  }
  ~RecorderScope() { runtime_.set_recorder(before_); }
  RecorderScope(const RecorderScope&) = delete;
  RecorderScope& operator=(const RecorderScope&) = delete;

 private:
  Runtime& runtime_;
  SpanRecorder* before_;
};

}  // namespace

// ---- batches ---------------------------------------------------------------------------------------------------------

BatchReader::BatchReader(const Text& text, const TextSplit& split, const Config& config, RankId rank,
                         std::int32_t num_ranks)
    : text_(text),
      split_(split),
      order_(static_cast<std::uint64_t>(config.train.seed), split.num_train()),
      context_(config.model.context),
      tokens_per_step_(config.train.tokens_per_step),
      by_position_(config.train.deal == Config::Train::Deal::kByPosition),
      rank_(rank.value),
      num_ranks_(num_ranks) {}

Batch BatchReader::train(std::int64_t step) {
  const std::int64_t begin = tokens_per_step_ * rank_ / num_ranks_,
                     end = tokens_per_step_ * (rank_ + 1) / num_ranks_;
  position_.clear();
  const auto take = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i)
      position_.push_back(split_.train_position(order_.at((step - 1) * tokens_per_step_ + i)));
  };
  if (by_position_) {  // every rank sorts all, so that all agree
    take(0, tokens_per_step_);
    std::sort(position_.begin(), position_.end());
    position_.erase(position_.begin() + end, position_.end());
    position_.erase(position_.begin(), position_.begin() + begin);
  } else {
    take(begin, end);
  }
  return fill(tokens_per_step_);
}

Batch BatchReader::at(std::span<const std::int64_t> positions) {
  const auto n = static_cast<std::int64_t>(positions.size());
  const auto begin = static_cast<std::size_t>(n * rank_ / num_ranks_),
             end = static_cast<std::size_t>(n * (rank_ + 1) / num_ranks_);
  position_.assign(positions.begin() + static_cast<std::ptrdiff_t>(begin),
                   positions.begin() + static_cast<std::ptrdiff_t>(end));
  return fill(n);
}

Batch BatchReader::fill(std::int64_t num_global) {
  const auto byte_at = [&](std::int64_t p) {
    return static_cast<std::int32_t>(static_cast<unsigned char>(text_.bytes[static_cast<std::size_t>(p)]));
  };
  bytes_.clear();
  target_.clear();
  for (const std::int64_t p : position_) {
    for (std::int64_t i = context_; i >= 1; --i) bytes_.push_back(byte_at(p - i));
    target_.push_back(byte_at(p));
  }
  return {bytes_, target_, num_global};
}

// ---- train -----------------------------------------------------------------------------------------------------------

double learning_rate(const Config::Train& train, std::int64_t step) {
  if (step <= train.warmup_steps)
    return train.learning_rate * static_cast<double>(step) / static_cast<double>(train.warmup_steps);
  const double done = static_cast<double>(step - train.warmup_steps) /
                      static_cast<double>(std::max<std::int64_t>(1, train.steps - train.warmup_steps));
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * std::min(done, 1.0)));
  return train.learning_rate * (train.min_learning_rate_ratio + (1 - train.min_learning_rate_ratio) * cosine);
}

kernels::AdamW optimizer(const Config::Train& train, std::int64_t step) {
  return {static_cast<float>(learning_rate(train, step)),
          static_cast<float>(train.beta1),
          static_cast<float>(train.beta2),
          static_cast<float>(train.epsilon),
          static_cast<float>(train.weight_decay),
          step};
}

TrainReport train(Runtime& runtime, const LoadedConfig& loaded, const Text& text,
                  const TrainOptions& options) {
  const Config& config = loaded.config;
  const bool root = runtime.rank() == RankId(0);
  const std::int64_t most_tokens =
      (config.train.tokens_per_step + runtime.num_ranks() - 1) / runtime.num_ranks();
  // A sequential schedule has one chunk, and auto chooses.
  const bool cuts = config.schedule.policy != Config::Schedule::Policy::kSequential &&
                    config.schedule.policy != Config::Schedule::Policy::kAuto;
  const std::int32_t chunks = std::max(cuts ? config.schedule.num_chunks : 1, config.schedule.chain_chunks);
  Require(chunks <= most_tokens, ErrorCode::kInvalidConfig, "schedule has ", chunks,
          " chunks, but a rank has at most ", most_tokens, " tokens: train.tokens_per_step ",
          config.train.tokens_per_step, " over ", runtime.num_ranks(),
          " ranks; chunks would be empty. Choose fewer chunks or more tokens");
  const TextSplit split(static_cast<std::int64_t>(text.bytes.size()), config.model.context,
                        config.train.heldout_fraction);
  const std::vector<std::int64_t> heldout = heldout_positions(split);

  TrainReport report;
  report.text = text.description;
  report.text_bytes = static_cast<std::int64_t>(text.bytes.size());
  report.num_train_tokens = split.num_train();
  report.num_heldout_tokens = static_cast<std::int64_t>(heldout.size());
  report.seed = config.train.seed;
  report.steps = config.train.steps;
  report.tokens_per_step = config.train.tokens_per_step;
  report.num_layers = config.model.num_layers;
  report.num_experts = config.model.num_experts;
  report.num_ranks = runtime.num_ranks();
  report.num_nodes = runtime.topology().num_nodes();
  report.topology = runtime.topology().describe();
  report.transport =
      rows_go_between_gpus(config) ? config.comm.transport : std::string(runtime.transport().name());
  report.emulated_links = runtime.topology().in_node.limited() || runtime.topology().across_nodes.limited();
  report.config_hash = semantic_hash(config);
  const auto steps = static_cast<std::size_t>(config.train.steps);
  for (auto* series :
       {&report.losses, &report.auxiliary, &report.grad_norms, &report.active_mean, &report.sparsity,
        &report.expert_balance, &report.rank_balance, &report.learning_rates})
    series->reserve(steps);
  report.active_min.reserve(steps);
  report.active_max.reserve(steps);
  const bool relu = config.routing.policy == Config::Routing::Policy::kRelu;
  if (relu) report.lambda.reserve(steps);
  // As mean_at_end() takes them.
  report.steps_at_end = std::max<std::int64_t>(1, config.train.steps / 10);

  const bool timeline = !config.runtime.timeline.empty();
  SpanRecorder recorder(runtime.rank(), timeline ? kTimelineSpans : 0);
  const RecorderScope scope(runtime, recorder);
  Model model(runtime, config);
  report.policy = std::string(model.policy().name());
  for (const PolicyFigure& figure : model.policy().figures()) {
    report.figures.push_back({std::string(figure.name), std::string(figure.doc), {}});
    report.figures.back().values.reserve(steps);
  }
  BatchReader reader(text, split, config, runtime.rank(), runtime.num_ranks());

  std::optional<CheckpointStore> store;
  report.recoveries = options.recoveries;
  Require(!options.resume || !config.train.checkpoint_dir.empty(), ErrorCode::kInvalidConfig,
          "--resume needs train.checkpoint_dir, the folder of the checkpoints to go on from");
  if (!config.train.checkpoint_dir.empty()) {
    store.emplace(runtime, loaded, text);
    const bool recovering = !options.recoveries.empty();
    bool resume = options.resume || recovering;
    if (recovering) {  // a rank lost before the first checkpoint: from the beginning, or as the user began
      std::int64_t saved =
          root ? static_cast<std::int64_t>(list_checkpoints(config.train.checkpoint_dir).size()) : 0;
      runtime.broadcast(std::as_writable_bytes(std::span(&saved, 1)), RankId(0), "checkpoint");
      resume = saved > 0;
    }
    if (resume) {
      History history{kHistoryCols + std::ssize(report.figures), {}};
      report.resumed_from = store->restore(model, history, recovering ? 0 : options.resume_step, recovering);
      take_history(history, relu, report);
      if (root)
        log_info("train: going on from the checkpoint of step ", report.resumed_from, " with ",
                 runtime.num_ranks(), runtime.num_ranks() == 1 ? " rank" : " ranks");
    } else if (!recovering) {
      store->require_fresh();
    }
  }
  report.measured_steps = config.train.steps - report.resumed_from;
  report.steps_at_end = std::clamp<std::int64_t>(report.measured_steps, 1, report.steps_at_end);
  std::vector<std::unique_ptr<RoutingRecorder>> routing_recorders;
  for (const RecordRequest& request : options.record)
    if (request.text.empty())
      routing_recorders.push_back(std::make_unique<RoutingRecorder>(runtime, config, request.file));
  {
    std::optional<Progress> progress;
    if (root && options.progress) progress.emplace("train", config.train.steps);
    runtime.barrier("train");
    Meter meter;
    const auto begin = Clock::now();
    for (std::int64_t step = report.resumed_from + 1; step <= config.train.steps; ++step) {
      if (relu) report.lambda.push_back(model.adaptive(0).values[0]);
      const StepResult result = model.compute_gradients(reader.train(step));
      // Both are sums over all ranks, so all ranks stop here together.
      Require(std::isfinite(result.loss), ErrorCode::kInvalidState, "training diverged: in step ", step,
              " the loss is ", result.loss, "; lower train.learning_rate, or set train.grad_clip");
      Require(std::isfinite(result.grad_norm), ErrorCode::kInvalidState, "training diverged: in step ", step,
              " the norm of the gradient is ", result.grad_norm,
              "; lower train.learning_rate, or set train.grad_clip");
      const kernels::AdamW adamw = optimizer(config.train, step);
      model.update(adamw, config.train.grad_clip, result.grad_norm);

      report.losses.push_back(result.loss);
      report.auxiliary.push_back(result.auxiliary);
      report.grad_norms.push_back(result.grad_norm);
      report.active_mean.push_back(result.mean_active);
      report.active_min.push_back(result.min_active);
      report.active_max.push_back(result.max_active);
      report.sparsity.push_back(1 - result.mean_active / static_cast<double>(config.model.num_experts));
      report.expert_balance.push_back(result.expert_balance);
      report.rank_balance.push_back(result.rank_balance);
      report.learning_rates.push_back(adamw.learning_rate);
      for (std::size_t i = 0; i < report.figures.size(); ++i)
        report.figures[i].values.push_back(result.figures[i]);
      report.movement += model.movement();
      if (step > config.train.steps - report.steps_at_end) report.movement_at_end += model.movement();
      meter.add(result, model.movement(), config.train.tokens_per_step);
      if (options.record_steps == 0 || step > config.train.steps - options.record_steps)
        for (const auto& r : routing_recorders) r->add(model);
      if (progress) progress->update(step, [&] { return meter.take(config.model.num_experts); });
      const std::int64_t every = config.train.checkpoint_every;
      if (store && (step == config.train.steps || (every > 0 && step % every == 0)))
        store->save(model, step, history_of(report));
      if (options.after_step) options.after_step(step);
    }
    report.seconds = to_us(Clock::now() - begin) / 1e6;
  }
  report.tokens_per_s = static_cast<double>(report.measured_steps) *
                        static_cast<double>(config.train.tokens_per_step) / report.seconds;
  recorder.set_on(false);

  report.heldout_bpb = evaluate(runtime, model, reader, heldout, config.train.tokens_per_step);
  gather_totals(runtime, report, model);
  report.phases_us = gather_phases(runtime, recorder, std::max<std::int64_t>(1, report.measured_steps));
  report.overlap = measure_overlap(runtime, config, model, reader.train(config.train.steps));
  for (const auto& r : routing_recorders) r->finish();
  for (const RecordRequest& request : options.record)
    if (!request.text.empty()) record_text(runtime, config, model, request, options.record_steps);
  if (timeline) write_timeline(runtime, recorder, config.runtime.timeline);
  if (root) report.baselines = byte_baselines(text.bytes, split, heldout);
  runtime.barrier("report");
  return report;
}

// ---- report ----------------------------------------------------------------------------------------------------------

namespace {

// Tokens times layers of the measured steps; 1 when there were none, so that nothing is divided by zero.
double visits_of(const TrainReport& report) {
  return static_cast<double>(
      std::max<std::int64_t>(1, report.measured_steps * report.tokens_per_step * report.num_layers));
}

nlohmann::json recoveries_json(const std::vector<Recovery>& recoveries) {
  nlohmann::json out = nlohmann::json::array();
  for (const Recovery& r : recoveries)
    out.push_back({{"lost_rank", r.lost_rank},
                   {"phase", r.phase},
                   {"chunk", r.chunk},
                   {"error", r.error},
                   {"ranks_before", r.ranks_before},
                   {"ranks_after", r.ranks_after}});
  return out;
}

nlohmann::json overlap_json(const TrainReport::Overlap& overlap) {
  if (overlap.scheduled_us == 0) return {{"measured", false}, {"note", overlap.note}};
  return {{"measured", true},
          {"scheduled_us", overlap.scheduled_us},
          {"sequential_us", overlap.sequential_us},
          {"floor_us",
           {{"compute", overlap.compute_us},
            {"in_node", overlap.in_node_us},
            {"across_nodes", overlap.across_nodes_us}}},
          {"exposed_comm_us", std::max(0.0, overlap.scheduled_us - overlap.compute_us)},
          {"note", overlap.note}};
}

}  // namespace

std::string to_json(const TrainReport& report) {
  using nlohmann::json;
  const auto range = [](const std::vector<double>& mean, const std::vector<std::int32_t>& min,
                        const std::vector<std::int32_t>& max) {
    return json{{"mean", mean_of(mean)},
                {"min", min.empty() ? 0 : *std::min_element(min.begin(), min.end())},
                {"max", max.empty() ? 0 : *std::max_element(max.begin(), max.end())},
                {"start", mean.empty() ? 0 : mean.front()},
                {"end", mean_at_end(mean)},
                {"series", {{"mean", mean}, {"min", min}, {"max", max}}}};
  };
  const Traffic& rows = report.movement.rows;
  const double visits = visits_of(report);
  const Traffic& end = report.movement_at_end.rows;
  const double visits_at_end = static_cast<double>(report.steps_at_end) *
                               static_cast<double>(report.tokens_per_step) *
                               static_cast<double>(report.num_layers);
  json figures = json::object();
  for (const TrainReport::Figure& figure : report.figures)
    figures[figure.name] = {{"meaning", figure.doc},
                            {"mean", mean_of(figure.values)},
                            {"end", mean_at_end(figure.values)},
                            {"series", figure.values}};
  const auto memory = [](const TrainReport::Memory& m) {
    return json{{"parameters", m.parameters},
                {"activations", m.activations},
                {"layers", m.layers},
                {"total", m.total()}};
  };
  const json out{
      {"heldout_bpb", report.heldout_bpb},
      {"order0_bpb", report.baselines.order0_bpb},
      {"order1_bpb", report.baselines.order1_bpb},
      {"order2_bpb", report.baselines.order2_bpb},
      {"losses", report.losses},
      {"auxiliary_losses", report.auxiliary},
      {"grad_norms", report.grad_norms},
      {"learning_rates", report.learning_rates},
      {"tokens_per_s", report.tokens_per_s},
      {"seconds", report.seconds},
      {"active_experts", range(report.active_mean, report.active_min, report.active_max)},
      {"sparsity", report.sparsity},
      {"lambda", report.lambda},
      {"balance", {{"experts", report.expert_balance}, {"ranks", report.rank_balance}}},
      {"routing", {{"policy", report.policy}, {"figures", figures}}},
      {"crossings_per_token",
       {{"same_rank", static_cast<double>(rows.rows_same_rank) / visits},
        {"in_node", static_cast<double>(rows.rows_in_node) / visits},
        {"across_nodes", static_cast<double>(rows.rows_across_nodes) / visits}}},
      {"crossings_per_token_at_end",
       {{"same_rank", static_cast<double>(end.rows_same_rank) / visits_at_end},
        {"in_node", static_cast<double>(end.rows_in_node) / visits_at_end},
        {"across_nodes", static_cast<double>(end.rows_across_nodes) / visits_at_end}}},
      {"across_nodes_bytes_per_step_at_end", static_cast<double>(report.movement_at_end.across_nodes_bytes) /
                                                 static_cast<double>(report.steps_at_end)},
      {"bytes",
       {{"in_node", report.movement.in_node_bytes}, {"across_nodes", report.movement.across_nodes_bytes}}},
      {"flat_bytes",
       {{"in_node", report.movement.flat_in_node_bytes},
        {"across_nodes", report.movement.flat_across_nodes_bytes}}},
      {"phases_us", report.phases_us},
      {"overlap_efficiency", report.overlap.efficiency ? json(*report.overlap.efficiency) : json()},
      {"overlap", overlap_json(report.overlap)},
      {"memory_bytes",
       {{"largest_rank", memory(report.memory_max)}, {"all_ranks", memory(report.memory_sum)}}},
      {"text",
       {{"source", report.text},
        {"bytes", report.text_bytes},
        {"train_tokens", report.num_train_tokens},
        {"heldout_tokens", report.num_heldout_tokens}}},
      {"seed", report.seed},
      {"steps", report.steps},
      {"resumed_from", report.resumed_from},
      {"measured_steps", report.measured_steps},
      {"recoveries", recoveries_json(report.recoveries)},
      {"tokens_per_step", report.tokens_per_step},
      {"world",
       {{"ranks", report.num_ranks},
        {"nodes", report.num_nodes},
        {"topology", report.topology},
        {"transport", report.transport},
        {"emulated_links", report.emulated_links}}},
      {"config_hash", hash_text(report.config_hash)}};
  // Paths need not be UTF-8: what is not is replaced.
  return out.dump(2, ' ', false, json::error_handler_t::replace);
}

std::string to_text(const TrainReport& report) {
  std::string out =
      str("trained on ", report.text, ", ", grouped(report.text_bytes), " bytes; ", report.topology,
          ", transport ", report.transport, report.emulated_links ? " (links emulated)" : "", "\n");
  TextTable quality({"held-out text", "bits per byte"});
  quality.add_row({"this model", fixed(report.heldout_bpb, 4)});
  quality.add_row({"order-2 statistics", fixed(report.baselines.order2_bpb, 4)});
  quality.add_row({"order-1 statistics", fixed(report.baselines.order1_bpb, 4)});
  quality.add_row({"order-0 statistics", fixed(report.baselines.order0_bpb, 4)});
  out += quality.to_string() + "\n";

  const auto at_start = [](const std::vector<double>& v) { return v.empty() ? 0 : v.front(); };
  TextTable run({"step", "first", "last tenth", "mean"});
  const auto series = [&](std::string name, const std::vector<double>& v, double scale, int decimals) {
    if (!v.empty())
      run.add_row({std::move(name), fixed(at_start(v) * scale, decimals),
                   fixed(mean_at_end(v) * scale, decimals), fixed(mean_of(v) * scale, decimals)});
  };
  series("training bits per byte", report.losses, 1 / std::numbers::ln2, 4);
  series(str("active experts of ", report.num_experts), report.active_mean, 1, 2);
  series("sparsity, %", report.sparsity, 100, 1);
  series("balance of experts, mean/max", report.expert_balance, 1, 3);
  series("balance of ranks, mean/max", report.rank_balance, 1, 3);
  series("norm of the gradient", report.grad_norms, 1, 3);
  for (const TrainReport::Figure& figure : report.figures)
    series(str(report.policy, ": ", figure.doc, figure.name == "swapped_share" ? ", share" : ""),
           figure.values, 1, 4);
  out += run.to_string() + "\n";

  const Traffic& rows = report.movement.rows;
  const double visits = visits_of(report);
  TextTable traffic({"all steps and ranks", "rows a token and layer", "bytes", "flat, no de-duplication"});
  traffic.add_row({"same rank", fixed(double(rows.rows_same_rank) / visits, 3), "0 B", "0 B"});
  traffic.add_row({"in node", fixed(double(rows.rows_in_node) / visits, 3),
                   bytes_text(report.movement.in_node_bytes),
                   bytes_text(report.movement.flat_in_node_bytes)});
  traffic.add_row({"across nodes", fixed(double(rows.rows_across_nodes) / visits, 3),
                   bytes_text(report.movement.across_nodes_bytes),
                   bytes_text(report.movement.flat_across_nodes_bytes)});
  out += traffic.to_string() + "\n";

  TextTable phases({"phase", "us a step", "share, %"});
  std::vector<std::pair<double, std::string>> order;
  double sum = 0;
  for (const auto& [name, us] : report.phases_us) {
    order.push_back({us, name});
    sum += us;
  }
  std::sort(order.rbegin(), order.rend());
  for (const auto& [us, name] : order) phases.add_row({name, fixed(us, 1), fixed(100 * us / sum, 1)});
  out += phases.to_string() + "\n";

  out += str(grouped(std::llround(report.tokens_per_s)), " tokens/s, ", fixed(report.seconds, 1), " s, ",
             report.measured_steps, " steps; memory ", bytes_text(report.memory_max.total()),
             " on the largest rank, ", bytes_text(report.memory_sum.total()), " in all\n");
  if (report.resumed_from > 0) out += str("went on from the checkpoint of step ", report.resumed_from, "\n");
  for (const Recovery& r : report.recoveries)
    out += str("lost rank ", r.lost_rank, " of ", r.ranks_before, " in phase ", r.phase, "; ", r.ranks_after,
               " went on\n");
  const TrainReport::Overlap& overlap = report.overlap;
  if (overlap.scheduled_us > 0)
    out += str("forward and backward of a step: as scheduled ", fixed(overlap.scheduled_us, 0),
               " us, sequential ", fixed(overlap.sequential_us, 0), " us, floor ",
               fixed(overlap.floor_us(), 0), " us; exposed communication ",
               fixed(std::max(0.0, overlap.scheduled_us - overlap.compute_us), 0), " us; overlap efficiency ",
               overlap.efficiency ? fixed(*overlap.efficiency, 3) : "not defined: " + overlap.note, "\n");
  else
    out += str("overlap not measured: ", overlap.note, "\n");
  return out;
}

}  // namespace sluice::train
