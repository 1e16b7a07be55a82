#include <CLI/CLI.hpp>

#include "sluice/runtime/src/bench/gpu_bench.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/rank_group.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice::cli {
namespace {

// The configured schedule, then auto and every other one.
std::vector<LoadedConfig> sweep(const LoadedConfig& configured) {
  std::vector<LoadedConfig> out = {configured};
  const auto add = [&](const std::string& policy, int chunks) {
    out.push_back(configured);
    out.back().set("schedule.policy", policy, {ConfigSource::Kind::kCommandLine, "--sweep"});
    out.back().set("schedule.num_chunks", str(chunks), {ConfigSource::Kind::kCommandLine, "--sweep"});
  };
  add("auto", 1);
  for (const std::string policy : {"pipelined", "by-source", "hierarchical"})
    for (const int chunks : {1, 2, 4, 8})
      if (chunks > 1 || policy != "pipelined") add(policy, chunks);
  return out;
}

}  // namespace

void add_bench(CLI::App& app, Run& run) {
  struct Options {
    ConfigOptions config;
    std::string replay;
    bool json = false, sweep = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("bench", "measure one MoE layer, forward and backward, beside its floors");
  add_config_options(*command, o->config);
  command->add_option("--replay", o->replay, "recorded routing in place of drawn one (bench.replay)")
      ->check(not_empty);
  add_device_option(*command, o->config);
  command->add_flag("--sweep", o->sweep, "measure every schedule, in turns");
  command->add_flag("--json", o->json, "print as JSON");
  command->callback([o, &run] {
    run = [o] {
      LoadedConfig config = o->config.load();
      if (!o->replay.empty()) set_by_option(config, "bench.replay", o->replay, "--replay");
      std::string json, text;
      GroupOptions group;
      // A GPU is used by one rank unless more are asked for.
      group.default_ranks = config.config.runtime.device == Config::Runtime::Device::kCuda ? 1 : 2;
      group.body = [&](Runtime& runtime, const LoadedConfig& agreed) {
        const std::string& timeline = agreed.config.runtime.timeline;
        // Before the work, of which nothing would be left.
        if (prints_results(runtime) && !timeline.empty()) require_writable(timeline);
        const std::vector<LoadedConfig> configs =
            o->sweep ? sweep(agreed) : std::vector<LoadedConfig>{agreed};
        const std::string why_host = why_host_rows(runtime, configs);
        std::vector<LayerBenchReport> reports;
        if (why_host.empty()) {
          reports.push_back(gpu_bench(runtime, configs.front()));
        } else {
          reports = run_layer_bench(runtime, configs);
          if (runtime.options().device == ComputeDevice::kCuda)
            for (LayerBenchReport& report : reports) report.host_rows_because = why_host;
        }
        if (!prints_results(runtime)) return;
        for (const LayerBenchReport& report : reports) {
          json += str(json.empty() ? "" : ",\n", report.to_json());
          text += str(text.empty() ? "" : "\n", report.to_text());
        }
        print_document(!o->json ? text : o->sweep ? "{\"runs\": [" + json + "]}" : json);
      };
      run_group(config, group);
      return 0;
    };
  });
}

}  // namespace sluice::cli
