#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "sluice/base/text_table.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/plan_exchange.hpp"
#include "sluice/runtime/src/rank_group.hpp"
#include "sluice/runtime/src/trace/routing_trace.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice::cli {
namespace {

nlohmann::json traffic_json(const Traffic& t, std::int64_t row_bytes) {
  return {
      {"rows",
       {{"same_rank", t.rows_same_rank}, {"in_node", t.rows_in_node}, {"across_nodes", t.rows_across_nodes}}},
      {"bytes", {{"in_node", t.rows_in_node * row_bytes}, {"across_nodes", t.rows_across_nodes * row_bytes}}},
      {"flat_bytes",
       {{"in_node", t.flat_rows_in_node * row_bytes},
        {"across_nodes", t.flat_rows_across_nodes * row_bytes}}},
      {"routes_everywhere", t.routes_everywhere}};
}

// Plans of all ranks for one layer of the trace. The configuration's transport does not matter: nothing but the plan
// is exchanged, between threads.
std::vector<std::shared_ptr<Plan>> plan_layer(const LoadedConfig& config, const std::vector<Routing>& sources,
                                              const ScheduleOptions& schedule, std::int32_t layer) {
  LoadedConfig local = config;
  local.set("comm.transport", "local", {ConfigSource::Kind::kCommandLine, "sluice plan"});
  const auto num_ranks = static_cast<std::int32_t>(sources.size());
  std::vector<std::shared_ptr<Plan>> plans(sources.size());
  const Placement placement = placement_of(local.config, num_ranks, layer);
  GroupOptions group;
  group.alone = true;
  group.default_ranks = num_ranks;
  group.body = [&](Runtime& runtime, const LoadedConfig&) {
    auto plan = std::make_shared<Plan>();
    PlanExchange(runtime, placement, schedule.plan_options())
        .build(sources[runtime.rank().index()], *plan, 0);
    plan->validate();
    plans[runtime.rank().index()] = std::move(plan);
  };
  run_group(local, group);
  return plans;
}

}  // namespace

void add_plan(CLI::App& app, Run& run) {
  struct Options {
    ConfigOptions config;
    std::string trace;
    std::int32_t layer = 0;
    bool explain = false, json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("plan", "build and explain the plan and the schedule of a recorded routing");
  add_config_options(*command, o->config);
  command->add_option("--trace", o->trace, "recorded routing (docs/trace.md)")->required()->check(not_empty);
  command->add_option("--layer", o->layer, "layer of the trace");
  command->add_flag("--explain", o->explain, "print every rank's plan and the schedule's ops");
  command->add_flag("--json", o->json, "print as JSON");
  command->callback([o, &run] {
    run = [o] {
      LoadedConfig config = o->config.load();
      RoutingTrace trace = read_trace_file(o->trace);
      Require(o->layer >= 0 && o->layer < trace.num_layers, ErrorCode::kInvalidArgument, "--layer is ",
              o->layer, "; the trace has layers 0..", trace.num_layers - 1);
      std::vector<Routing>& sources = trace.layers[static_cast<std::size_t>(o->layer)];
      const std::int32_t configured = configured_ranks(config.config);
      const auto num_ranks =
          static_cast<std::size_t>(configured > 0 ? configured : std::max(1, trace.num_sources()));
      Require(sources.size() <= num_ranks, ErrorCode::kInvalidConfig, "the trace has tokens of source rank ",
              static_cast<std::int64_t>(sources.size()) - 1, ", the configuration has ", num_ranks,
              " ranks; set topology.ranks or topology.nodes");
      Routing none;
      none.num_experts = trace.num_experts;
      sources.resize(num_ranks, none);
      Require(trace.num_experts == config.config.model.num_experts, ErrorCode::kInvalidConfig,
              "the trace has ", trace.num_experts, " experts, model.num_experts is ",
              config.config.model.num_experts, " (from ", config.source("model.num_experts").text, ")");
      const MoeLayerOptions layer = layer_options(config.config);
      const std::int64_t row_bytes = layer.hidden * static_cast<std::int64_t>(size_of(layer.wire_dtype));
      const auto plans = plan_layer(config, sources, layer.schedule, o->layer);
      const Topology topology = configured_topology(config.config, static_cast<std::int32_t>(num_ranks));
      Traffic total;
      std::int64_t tokens = 0, routes = 0, most_routes = 0;
      for (const auto& plan : plans) {
        total += plan->traffic;
        tokens += plan->num_tokens;
        routes += plan->num_routes;
        most_routes = std::max<std::int64_t>(most_routes, plan->num_positions());
      }
      std::vector<Template> templates;
      for (std::size_t r = 0; r < num_ranks; ++r)
        templates.push_back(build_template(RankId(static_cast<std::int32_t>(r)), topology, layer.schedule));
      validate_group(templates);
      if (o->json) {
        nlohmann::json out{{"trace", o->trace},
                           {"layer", o->layer},
                           {"tokens", tokens},
                           {"routes", routes},
                           {"topology", topology.describe()},
                           {"agreement_hash", hash_text(plans[0]->agreement_hash)},
                           {"total", traffic_json(total, row_bytes)}};
        for (std::size_t r = 0; r < num_ranks; ++r) {
          nlohmann::json rank = traffic_json(plans[r]->traffic, row_bytes);
          rank["rank"] = r;
          rank["tokens"] = plans[r]->num_tokens;
          rank["handed_on_rows"] = plans[r]->recv1.num_rows();
          rank["received_rows"] = plans[r]->recv2.num_rows();
          rank["received_routes"] = plans[r]->num_positions();
          out["ranks"].push_back(std::move(rank));
          if (o->explain) out["templates"].push_back(nlohmann::json::parse(templates[r].to_json()));
        }
        print_document(json_text(out));
        return 0;
      }
      std::string text =
          str("layer ", o->layer, " of ", o->trace, ": ", tokens, " tokens, ", routes, " routes, ",
              topology.describe(), topology.declared() ? " (declared)" : "", "\n");
      TextTable table({"level", "rows", "bytes one way", "flat, no de-duplication", "saved"});
      const auto saved = [](std::int64_t rows, std::int64_t flat) {
        return flat == 0 ? std::string("-") : fixed(100.0 * (1.0 - double(rows) / double(flat)), 1) + "%";
      };
      table.add_row({"same rank", grouped(total.rows_same_rank), "0", "0", "-"});
      table.add_row({"in node", grouped(total.rows_in_node), grouped(total.rows_in_node * row_bytes),
                     grouped(total.flat_rows_in_node * row_bytes),
                     saved(total.rows_in_node, total.flat_rows_in_node)});
      table.add_row({"across nodes", grouped(total.rows_across_nodes),
                     grouped(total.rows_across_nodes * row_bytes),
                     grouped(total.flat_rows_across_nodes * row_bytes),
                     saved(total.rows_across_nodes, total.flat_rows_across_nodes)});
      text += table.to_string();
      text += str(
          "balance (mean / most routes of a rank): ",
          most_routes == 0
              ? std::string("-")
              : fixed(double(routes - total.routes_everywhere) / double(num_ranks) / double(most_routes), 3),
          "\n");
      if (o->explain)
        for (std::size_t r = 0; r < num_ranks; ++r)
          text += "\n" + plans[r]->explain(row_bytes) + templates[r].explain();
      print_document(text);
      return 0;
    };
  });
}

}  // namespace sluice::cli
