#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>

#include "sluice/base/log.hpp"
#include "sluice/base/text_table.hpp"
#include "sluice/runtime/src/bench/layer_bench.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/rank_group.hpp"
#include "sluice/runtime/src/tune/predict.hpp"
#include "sluice/runtime/src/tune/probe.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice::cli {
namespace {

struct TuneOptions {
  ConfigOptions config;
  std::string output;
  int confirm = 4;
  bool json = false;
};

std::string_view exchange_text(Exchange exchange) {
  return exchange == Exchange::kGateway ? "gateway" : "direct";
}

LoadedConfig with_schedule(const LoadedConfig& base, const ScheduleOptions& s, const std::string& why) {
  LoadedConfig out = base;
  const ConfigSource source{ConfigSource::Kind::kCommandLine, why};
  out.set("schedule.policy", to_string(s.policy), source);
  out.set("schedule.num_chunks", str(s.num_chunks), source);
  out.set("schedule.exchange", exchange_text(s.exchange), source);
  return out;
}

// Rank 0's schedules, on all ranks. Collective.
std::vector<ScheduleOptions> agree(Runtime& runtime, const std::vector<ScheduleOptions>& mine) {
  constexpr std::string_view kPhase = "tune agreement";
  auto count = static_cast<std::int64_t>(mine.size());
  runtime.broadcast(std::as_writable_bytes(std::span(&count, 1)), RankId(0), kPhase);
  Require(count >= 0 && count <= 1024, ErrorCode::kDisagreement, "rank 0 announces ", count, " schedules");
  std::vector<std::int64_t> words;
  for (const ScheduleOptions& s : mine) {
    words.push_back(static_cast<std::int64_t>(s.policy));
    words.push_back(static_cast<std::int64_t>(s.exchange));
    words.push_back(s.num_chunks);
  }
  words.resize(static_cast<std::size_t>(3 * count));
  runtime.broadcast(std::as_writable_bytes(std::span(words)), RankId(0), kPhase);
  std::vector<ScheduleOptions> out;
  for (std::size_t i = 0; i < words.size(); i += 3) {
    Require(words[i] >= 0 && words[i] <= static_cast<std::int64_t>(SchedulePolicy::kHierarchical) &&
                words[i + 1] >= 0 && words[i + 1] <= 1 && words[i + 2] >= 1 && words[i + 2] <= INT32_MAX,
            ErrorCode::kDisagreement, "rank 0 sent a schedule that does not exist");
    out.push_back({static_cast<SchedulePolicy>(words[i]), static_cast<Exchange>(words[i + 1]),
                   static_cast<std::int32_t>(words[i + 2])});
  }
  return out;
}

struct Tried {
  ScheduleOptions schedule;
  double predicted_forward_us = 0, predicted_backward_us = 0;
  double forward_us = 0, backward_us = 0;
  double predicted_us() const { return predicted_forward_us + predicted_backward_us; }
  double measured_us() const { return forward_us + backward_us; }
};

// The best of the search, and the configured schedule and the sequential one beside them.
std::vector<ScheduleOptions> to_confirm(const ScheduleChoice& choice, const ScheduleOptions& configured,
                                        int most) {
  std::vector<ScheduleOptions> out = {configured};
  const auto add = [&](const ScheduleOptions& s) {
    if (std::find(out.begin(), out.end(), s) == out.end()) out.push_back(s);
  };
  add({SchedulePolicy::kSequential, configured.exchange, 1});
  for (std::size_t i = 0; i < choice.ranked.size() && i < static_cast<std::size_t>(most); ++i)
    add(choice.ranked[i].schedule);
  return out;
}

int run_tune(const TuneOptions& o) {
  const LoadedConfig loaded = o.config.load();
  Require(!rows_go_between_gpus(loaded.config), ErrorCode::kNotSupported, "comm.transport is ",
          loaded.config.comm.transport,
          ", but sluice tune searches schedules of the host; choose a transport of the host");
  Require(!o.output.empty(), ErrorCode::kInvalidArgument, "-o is empty; name the file to write");
  require_writable(o.output);
  const std::string profile_path = o.output + ".profile.json";
  GroupOptions group;
  group.default_ranks = 2;
  group.body = [&](Runtime& runtime, const LoadedConfig& config) {
    const bool leads = prints_results(runtime);
    const ScheduleOptions configured = layer_options(config.config).schedule;
    std::string used_profile = config.config.schedule.profile;
    std::optional<MachineProfile> profile;
    if (used_profile.empty()) {
      profile = probe_machine(runtime, config.config);
      used_profile = profile_path;
      if (leads) write_profile_file(profile_path, *profile);
    } else {
      profile = agreed_profile(runtime, config.config);
    }
    std::optional<Predictor> predictor;
    std::optional<ScheduleChoice> choice;
    std::vector<ScheduleOptions> schedules;
    if (leads) {
      predictor.emplace(config.config, runtime.topology(), *profile);
      SearchSpace space;
      const Topology& t = runtime.topology();
      // Where no node has more than one rank, or there is one node, exchanges do not differ.
      const bool differ = t.num_nodes() > 1 && t.num_nodes() < t.num_ranks();
      space.exchanges =
          differ ? std::vector{Exchange::kGateway, Exchange::kDirect} : std::vector{configured.exchange};
      choice = predictor->choose(space);
      schedules = to_confirm(*choice, configured, o.confirm);
      log_info("tune: ", choice->ranked.size(), " schedules predicted, running ", schedules.size());
    }
    schedules = agree(runtime, schedules);
    std::vector<LoadedConfig> configs;
    for (const ScheduleOptions& s : schedules) configs.push_back(with_schedule(config, s, "sluice tune"));
    const std::vector<LayerBenchReport> reports = run_layer_bench(runtime, configs);
    if (!leads) return;

    std::vector<Tried> tried;
    for (std::size_t i = 0; i < schedules.size(); ++i) {
      Tried t{schedules[i]};
      t.predicted_forward_us = predictor->run(t.schedule, PassKind::kForward).step_us;
      t.predicted_backward_us = predictor->run(t.schedule, PassKind::kBackward).step_us;
      t.forward_us = reports[i].forward.scheduled.median_us;
      t.backward_us = reports[i].backward.scheduled.median_us;
      tried.push_back(t);
    }
    const Tried& before = tried.front();
    const Tried& best = *std::min_element(tried.begin(), tried.end(), [](const Tried& a, const Tried& b) {
      return a.measured_us() < b.measured_us();
    });
    const auto sequential = std::find_if(tried.begin(), tried.end(), [](const Tried& t) {
      return t.schedule.policy == SchedulePolicy::kSequential;
    });

    TextTable table({"schedule", "predicted us", "measured us", "error", "against sequential", ""});
    const auto percent = [](double now, double reference) {
      return str(now < reference ? "" : "+", fixed(100 * (now / reference - 1), 1), "%");
    };
    for (const Tried& t : tried)
      table.add_row({describe(t.schedule), fixed(t.predicted_us(), 1), fixed(t.measured_us(), 1),
                     percent(t.predicted_us(), t.measured_us()),
                     percent(t.measured_us(), sequential->measured_us()),
                     &t == &best     ? "chosen"
                     : &t == &before ? "configured"
                                     : ""});
    const std::string gain = str("forward and backward ", fixed(best.measured_us(), 1), " us measured, ",
                                 fixed(best.predicted_us(), 1), " predicted; sequential ",
                                 fixed(sequential->measured_us(), 1), " measured");
    std::string head = str(
        "# Written by `sluice tune`: ", profile->name, ", ", runtime.topology().describe(),
        ".\n# One layer of [model] with the batches of [bench]; times are medians of the slowest rank.\n#\n");
    std::string line;
    for (const char c : table.to_string()) {
      line += c;
      if (c != '\n') continue;
      head += "# " + line;
      line.clear();
    }
    head += "#\n";
    LoadedConfig tuned = with_schedule(loaded, best.schedule, "sluice tune: " + gain);
    tuned.set("schedule.profile", used_profile,
              {ConfigSource::Kind::kCommandLine, "sluice tune: measured here"});
    validate(tuned);
    write_document(o.output, head + effective_text(tuned));

    if (o.json) {
      nlohmann::json out{{"profile", used_profile}, {"output", o.output}};
      const auto schedule_json = [](const ScheduleOptions& s) {
        return nlohmann::json{{"policy", to_string(s.policy)},
                              {"num_chunks", s.num_chunks},
                              {"exchange", exchange_text(s.exchange)}};
      };
      for (const Tried& t : tried)
        out["runs"].push_back({{"schedule", schedule_json(t.schedule)},
                               {"predicted_forward_us", t.predicted_forward_us},
                               {"predicted_backward_us", t.predicted_backward_us},
                               {"forward_us", t.forward_us},
                               {"backward_us", t.backward_us},
                               {"prediction_error", t.predicted_us() / t.measured_us() - 1}});
      out["chosen"] = schedule_json(best.schedule);
      out["predicted_gain"] = sequential->predicted_us() / best.predicted_us();
      out["measured_gain"] = sequential->measured_us() / best.measured_us();
      out["search"] = nlohmann::json::parse(choice->to_json());
      print_document(json_text(out));
      return;
    }
    print_document(str(choice->explain(), "\n", table.to_string(), "gain over sequential: predicted ",
                       fixed(sequential->predicted_us() / best.predicted_us(), 3), " x, measured ",
                       fixed(sequential->measured_us() / best.measured_us(), 3), " x\nwritten to ", o.output,
                       "\n"));
  };
  run_group(loaded, group);
  return 0;
}

}  // namespace

void add_tune(CLI::App& app, Run& run) {
  auto o = std::make_shared<TuneOptions>();
  CLI::App* command = app.add_subcommand(
      "tune", "measure the machine, search schedules by the model, confirm the best by running");
  add_config_options(*command, o->config);
  command->add_option("-o,--output", o->output, "the configuration to write, with the tuned keys")
      ->required();
  command->add_option("--confirm", o->confirm, "how many of the best predictions to run")
      ->check(CLI::Range(1, 32));
  command->add_flag("--json", o->json, "print as JSON");
  command->callback([o, &run] { run = [o] { return run_tune(*o); }; });
}

}  // namespace sluice::cli
