#include <CLI/CLI.hpp>
#include <mutex>

#include "sluice/base/log.hpp"
#include "sluice/runtime/src/bench/layer_bench.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/rank_group.hpp"

namespace sluice::cli {
namespace {

// Schedules of a sweep. The configured one comes first.
std::vector<std::vector<std::string>> sweep_sets() {
  std::vector<std::vector<std::string>> out = {{}};
  for (const std::string exchange : {"gateway", "direct"}) {
    out.push_back({"schedule.policy=sequential", "schedule.exchange=" + exchange});
    for (const int chunks : {2, 4, 8})
      out.push_back(
          {"schedule.policy=pipelined", str("schedule.num_chunks=", chunks), "schedule.exchange=" + exchange});
  }
  return out;
}

}  // namespace

void add_bench(CLI::App& app, Run& run) {
  struct Options {
    ConfigOptions config;
    bool json = false, sweep = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("bench", "measure one MoE layer, forward and backward, beside its floors");
  add_config_options(*command, o->config);
  command->add_flag("--sweep", o->sweep, "measure every schedule");
  command->add_flag("--json", o->json, "print as JSON");
  command->callback([o, &run] {
    run = [o] {
      std::vector<LoadedConfig> configs;
      for (const auto& sets : o->sweep ? sweep_sets() : std::vector<std::vector<std::string>>{{}}) {
        ConfigOptions options = o->config;
        options.sets.insert(options.sets.end(), sets.begin(), sets.end());
        configs.push_back(options.load());
      }
      std::string json, text;
      GroupOptions group;
      group.default_ranks = 2;
      group.body = [&](Runtime& runtime, const LoadedConfig&) {
        for (std::size_t i = 0; i < configs.size(); ++i) {
          if (o->sweep && prints_results(runtime)) log_info("bench run ", i + 1, " of ", configs.size());
          const LayerBenchReport report = run_layer_bench(runtime, configs[i]);
          if (!prints_results(runtime)) continue;
          json += str(json.empty() ? "" : ",\n", report.to_json());
          text += str(text.empty() ? "" : "\n", report.to_text());
        }
        if (prints_results(runtime))
          print_document(!o->json ? text : o->sweep ? "{\"runs\": [" + json + "]}" : json);
      };
      run_group(configs.front(), group);
      return 0;
    };
  });
}

}  // namespace sluice::cli
