#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>

#include "sluice/base/clock.hpp"
#include "sluice/base/log.hpp"
#include "sluice/base/text_table.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/tune/predict.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice::cli {
namespace {

struct SimulateOptions {
  ConfigOptions config;
  std::int32_t ranks = 0;
  std::vector<std::int32_t> node_sizes, chunks;
  std::vector<std::string> policies;
  bool explain = false, json = false;
};

// Ranks of a node as the configuration declares it.
std::int32_t configured_node_size(const Config& config, std::int32_t ranks) {
  const NodesSpec& nodes = config.topology.nodes;
  if (!nodes.declared()) return ranks;
  if (!nodes.lists.empty()) {
    for (const auto& list : nodes.lists)
      Require(list.size() == nodes.lists[0].size(), ErrorCode::kInvalidConfig,
              "topology.nodes has nodes of different sizes; simulate needs one size, as in \"2x8\", or "
              "--node-sizes");
    return static_cast<std::int32_t>(nodes.lists[0].size());
  }
  if (nodes.ranks_per_node > 0) return nodes.ranks_per_node;
  return std::max(1, ranks / nodes.num_nodes);
}

SchedulePolicy policy_named(const std::string& name) {
  std::string allowed;
  for (const SchedulePolicy p : SearchSpace().policies) {
    if (name == to_string(p)) return p;
    allowed += str(allowed.empty() ? "" : ", ", to_string(p));
  }
  throw Error(ErrorCode::kInvalidArgument, str("--policies names \"", name, "\"; there are ", allowed));
}

Topology topology_of(const Config& config, std::int32_t ranks, std::int32_t node_size) {
  Require(ranks % node_size == 0, ErrorCode::kInvalidArgument, "--ranks ", ranks, " does not fill nodes of ",
          node_size, " ranks");
  Topology out = Topology::uniform(ranks, ranks / node_size);
  out.set_declared(true);
  const auto link = [](double bytes_per_s, double latency_us) {
    return LinkSpeed{bytes_per_s, std::chrono::nanoseconds(static_cast<std::int64_t>(latency_us * 1000))};
  };
  out.in_node = link(config.topology.in_node_bytes_per_s, config.topology.in_node_latency_us);
  out.across_nodes = link(config.topology.across_nodes_bytes_per_s, config.topology.across_nodes_latency_us);
  return out;
}

struct Entry {
  std::int32_t node_size = 0;
  ScheduleOptions schedule;
  Simulation forward, backward;
};

nlohmann::json pass_json(const Simulation& s) {
  return {{"step_us", s.step_us},
          {"exposed_comm_us", s.exposed_comm_us},
          {"floor_us",
           {{"compute", s.compute_floor_us},
            {"in_node", s.link_floor_us[0]},
            {"across_nodes", s.link_floor_us[1]}}},
          {"bound", s.bound()}};
}

int run_simulate(const SimulateOptions& o) {
  const LoadedConfig loaded = o.config.load();
  const Config& config = loaded.config;
  set_log_level(config.runtime.log_level);
  const std::int32_t ranks = o.ranks > 0 ? o.ranks : configured_ranks(config);
  Require(ranks > 0, ErrorCode::kInvalidArgument, "say how many ranks: --ranks, or topology.ranks");
  Require(ranks <= 65536, ErrorCode::kInvalidArgument, "--ranks is ", ranks, "; at most 65536");
  const bool large = ranks > kMostFullRanks, huge = ranks > 1024;

  const std::int32_t own_size = std::min(ranks, configured_node_size(config, ranks));
  std::vector<std::int32_t> sizes = o.node_sizes;
  if (sizes.empty()) {
    Require(ranks % own_size == 0, ErrorCode::kInvalidArgument, "--ranks ", ranks, " does not fill nodes of ",
            own_size, " ranks (topology.nodes); choose a multiple, or --node-sizes");
    sizes = {own_size};
    for (const std::int32_t other : {own_size / 2, own_size * 2})
      if (!large && other >= 1 && other <= ranks && ranks % other == 0 &&
          has_profile_of_links(config, topology_of(config, ranks, other)))
        sizes.push_back(other);
  }
  for (const std::int32_t s : sizes)
    Require(s >= 1 && s <= ranks, ErrorCode::kInvalidArgument, "--node-sizes has ", s, "; must be 1..",
            ranks);
  SearchSpace space;
  if (!o.policies.empty()) {
    space.policies.clear();
    for (const std::string& name : o.policies) space.policies.push_back(policy_named(name));
  }
  space.chunks = huge    ? std::vector<std::int32_t>{1, 2}
                 : large ? std::vector<std::int32_t>{1, 2, 4}
                         : space.chunks;
  if (!o.chunks.empty()) {
    space.chunks = o.chunks;
    for (const std::int32_t c : o.chunks) {
      Require(c >= 1 && c <= 256, ErrorCode::kInvalidArgument, "--chunks has ", c,
              "; must be 1..256, as schedule.num_chunks");
      Require(c <= std::max<std::int64_t>(1, config.bench.tokens_per_rank), ErrorCode::kInvalidArgument,
              "--chunks has ", c, ", but a rank has ", config.bench.tokens_per_rank,
              " tokens (bench.tokens_per_rank); chunks would be empty");
    }
    // A sequential schedule has one chunk whatever is asked for.
    if (std::find(o.chunks.begin(), o.chunks.end(), 1) == o.chunks.end())
      space.chunks.insert(space.chunks.begin(), 1);
  }
  space.exchanges = {layer_options(config).schedule.exchange};
  // Forward alone where it takes seconds.
  space.backward = !huge;

  std::vector<Entry> entries;
  std::string explanation, machine;
  nlohmann::json profile_json;
  std::string counts;
  const auto begin = Clock::now();
  for (const std::int32_t size : sizes) {
    const Topology topology = topology_of(config, ranks, size);
    MachineProfile profile = profile_of(config, topology);
    if (const std::string differs = foreign_machine(profile, config.comm.transport); !differs.empty())
      log_warn(differs);
    machine = str(profile.name, profile.measured ? " (measured)" : " (declared, not measured)");
    profile_json = {{"name", profile.name}, {"measured", profile.measured}, {"source", profile.source}};
    Predictor predictor(config, topology, std::move(profile));
    counts = predictor.from_full_plans() ? "full plans" : "plan summaries";
    if (predictor.copies() > 1)
      counts += str("; fewer experts than ranks: rank r holds a copy of expert r mod ",
                    config.model.num_ffn_experts(), ", up to ", predictor.copies(), " of each");
    for (const SchedulePolicy policy : space.policies)
      for (const std::int32_t chunks : space.chunks) {
        const bool fits =
            policy == SchedulePolicy::kSequential
                ? chunks == 1
                : o.chunks.empty() || std::find(o.chunks.begin(), o.chunks.end(), chunks) != o.chunks.end();
        if (!fits || chunks > std::max<std::int64_t>(1, predictor.most_tokens())) continue;
        Entry e{size, {policy, space.exchanges[0], chunks}, {}, {}};
        if (huge) log_info("simulating ", describe(e.schedule), ", ", ranks, " ranks, nodes of ", size);
        e.forward = predictor.run(e.schedule, PassKind::kForward);
        if (space.backward) e.backward = predictor.run(e.schedule, PassKind::kBackward);
        entries.push_back(std::move(e));
      }
    if (o.explain && size == sizes.front()) explanation = predictor.choose(space).explain();
  }
  Require(!entries.empty(), ErrorCode::kInvalidArgument, "there is nothing to simulate: no chunk count fits");
  const double seconds = to_us(Clock::now() - begin) / 1e6;

  const auto best = std::min_element(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.forward.step_us + a.backward.step_us < b.forward.step_us + b.backward.step_us;
  });
  if (o.json) {
    nlohmann::json out{{"ranks", ranks},
                       {"profile", profile_json},
                       {"counts", counts},
                       {"layer",
                        {{"hidden", config.model.hidden},
                         {"ffn", config.model.ffn},
                         {"num_experts", config.model.num_experts},
                         {"top_k", config.bench.top_k},
                         {"tokens_per_rank", config.bench.tokens_per_rank},
                         {"skew", config.bench.skew}}},
                       {"seconds", seconds}};
    for (const Entry& e : entries) {
      nlohmann::json run = pass_json(e.forward);
      run["ranks"] = ranks;
      run["node_size"] = e.node_size;
      run["schedule"] = {{"policy", to_string(e.schedule.policy)},
                         {"num_chunks", e.schedule.num_chunks},
                         {"exchange", e.schedule.exchange == Exchange::kGateway ? "gateway" : "direct"}};
      run["events"] = e.forward.num_events;
      if (space.backward) run["backward"] = pass_json(e.backward);
      out["runs"].push_back(std::move(run));
    }
    out["best"] = best - entries.begin();
    print_document(json_text(out));
    return 0;
  }
  std::string text = str("one MoE layer on ", ranks, " ranks, ", machine, ", ", config.bench.tokens_per_rank,
                         " tokens a rank, ", config.bench.top_k, " of ", config.model.num_experts,
                         " experts each, counts from ", counts, "\n");
  TextTable table(
      {"ranks a node", "schedule", "chunks", "forward us", "exposed us", "bound by", "backward us", "best"});
  std::int32_t last_size = sizes.front();
  for (const Entry& e : entries) {
    if (e.node_size != last_size) table.add_rule();
    last_size = e.node_size;
    table.add_row({str(e.node_size), std::string(to_string(e.schedule.policy)), str(e.schedule.num_chunks),
                   fixed(e.forward.step_us, 1), fixed(e.forward.exposed_comm_us, 1),
                   std::string(e.forward.bound()), space.backward ? fixed(e.backward.step_us, 1) : "-",
                   &e == &*best ? "<" : ""});
  }
  text += table.to_string();
  if (!explanation.empty()) text += "\n" + explanation;
  print_document(text);
  return 0;
}

}  // namespace

void add_simulate(CLI::App& app, Run& run) {
  auto o = std::make_shared<SimulateOptions>();
  CLI::App* command =
      app.add_subcommand("simulate", "predicted time of one layer at scale, swept over schedules");
  add_config_options(*command, o->config);
  command->add_option("--ranks", o->ranks, "ranks of the group; else those of the configuration")
      ->check(CLI::Range(1, 65536));
  command
      ->add_option("--node-sizes", o->node_sizes,
                   "ranks a node, several with commas; else the configured, half and double")
      ->delimiter(',');
  command->add_option("--chunks", o->chunks, "chunk counts, with commas")->delimiter(',');
  command->add_option("--policies", o->policies, "schedule policies, with commas; else all")->delimiter(',');
  command->add_flag("--explain", o->explain, "say why the best schedule is the best");
  command->add_flag("--json", o->json, "print as JSON");
  command->callback([o, &run] { run = [o] { return run_simulate(*o); }; });
}

}  // namespace sluice::cli
