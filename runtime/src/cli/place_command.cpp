#include <CLI/CLI.hpp>
#include <charconv>

#include "sluice/base/log.hpp"
#include "sluice/runtime/src/cli/commands.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/place/place_report.hpp"
#include "sluice/runtime/src/trace/routing_trace.hpp"
#include "sluice/runtime/src/tune/profile.hpp"
#include "sluice/scheduler/placement_file.hpp"

namespace sluice::cli {
namespace {

constexpr std::int64_t kEvalTokens = 1 << 18;

struct PlaceOptions {
  ConfigOptions config;
  std::vector<std::string> stats, eval;
  std::int32_t nodes = 0, ranks_per_node = 0, groups = 0, everywhere = 0;
  std::string slots, policy = "all", assign = "auto", eval_assign = "auto", out, svg;
  std::int64_t moves = PlacementProblem().moves, tokens_per_rank = StepCosts().tokens_per_rank;
  std::int64_t seed = 1;
  bool json = false;
};

// The machine that step times are predicted for when no configuration says: experts of OLMoE's size on the machine of
// configs/h100-infiniband.toml.
constexpr std::pair<std::string_view, std::string_view> kDefaultMachine[] = {
    {"model.hidden", "2048"},
    {"model.ffn", "1024"},
    {"model.dtype", "bf16"},
    {"topology.in_node_bytes_per_s", "450e9"},
    {"topology.across_nodes_bytes_per_s", "50e9"},
    {"machine.name", "H100, NVLink, a 400 Gb/s port a GPU"},
    {"machine.gemm_flops_per_s", "640e12"},
    {"machine.memory_bytes_per_s", "2.8e12"}};

std::vector<std::int32_t> parse_slots(const std::string& text, std::int32_t num_ranks, std::int32_t num_ffn) {
  std::vector<std::int32_t> out;
  if (text.empty()) {
    out.assign(static_cast<std::size_t>(num_ranks), (num_ffn + num_ranks - 1) / num_ranks);
    return out;
  }
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    std::int32_t value = -1;
    const auto [stop, ec] = std::from_chars(text.data() + begin, text.data() + end, value);
    Require(ec == std::errc() && stop == text.data() + end && value >= 0 && value <= 65536,
            ErrorCode::kInvalidArgument, "--slots-per-rank is \"", text,
            "\"; it must be a number 0..65536, or one a rank, separated by commas");
    out.push_back(value);
    begin = end + 1;
  }
  if (out.size() == 1) out.assign(static_cast<std::size_t>(num_ranks), out[0]);
  Require(static_cast<std::int32_t>(out.size()) == num_ranks, ErrorCode::kInvalidArgument,
          "--slots-per-rank has ", out.size(), " numbers, there are ", num_ranks, " ranks");
  return out;
}

std::vector<RoutingStatistics> read_all(const std::vector<std::string>& files, std::int64_t max_sample) {
  std::vector<RoutingStatistics> out;
  for (const std::string& file : files) {
    out.push_back(read_statistics_file(file, max_sample));
    out.back().description = file;  // what errors and reports call it
    validate(out.back(), file);
    require_same_model(out.front(), files.front(), out.back(), file);
  }
  return out;
}

SourceAssignment assignment_of(const std::string& word, std::span<const RoutingStatistics> domains,
                               std::int32_t num_ranks) {
  if (word == "mixed") return SourceAssignment::kMixed;
  if (word == "skewed") return SourceAssignment::kSkewed;
  if (word == "recorded") return SourceAssignment::kRecorded;
  for (const RoutingStatistics& s : domains)
    if (s.num_sources() != num_ranks || s.sample.empty()) return SourceAssignment::kMixed;
  return SourceAssignment::kRecorded;
}

int run_place(const PlaceOptions& o) {
  LoadedConfig loaded = o.config.load();
  if (o.config.file.empty()) {
    for (const auto& [key, value] : kDefaultMachine)
      if (loaded.source(key).kind == ConfigSource::Kind::kDefault)
        loaded.set(key, value, {ConfigSource::Kind::kDefault, "default of sluice place"});
    validate(loaded);
  }
  const Config& config = loaded.config;
  set_log_level(config.runtime.log_level);
  const std::int64_t ranks = std::int64_t{o.nodes} * o.ranks_per_node;
  Require(ranks <= 4096, ErrorCode::kInvalidArgument, "--nodes ", o.nodes, " with --ranks-per-node ",
          o.ranks_per_node, " make ", ranks, " ranks; it must be 1..4096");
  const auto num_ranks = static_cast<std::int32_t>(ranks);
  for (const std::string& file : {o.out, o.svg})
    if (!file.empty()) require_writable(file);

  const std::vector<RoutingStatistics> domains = read_all(o.stats, RoutingStatistics::kDefaultSample);
  const std::vector<RoutingStatistics> others = read_all(o.eval, kEvalTokens);
  if (!others.empty()) require_same_model(domains[0], o.stats[0], others[0], o.eval[0]);

  PlacementProblem problem;
  problem.topology = Topology::uniform(num_ranks, o.nodes);
  problem.topology.set_declared(true);
  const auto link = [](double bytes_per_s) { return LinkSpeed{bytes_per_s, std::chrono::nanoseconds(0)}; };
  problem.topology.in_node = link(config.topology.in_node_bytes_per_s);
  problem.topology.across_nodes = link(config.topology.across_nodes_bytes_per_s);
  problem.domains = domains;
  problem.num_everywhere = o.everywhere;
  Require(o.everywhere >= 0 && o.everywhere < domains[0].num_experts, ErrorCode::kInvalidArgument,
          "--everywhere is ", o.everywhere, ", the statistics have ", domains[0].num_experts, " experts");
  problem.slots_per_rank = parse_slots(o.slots, num_ranks, problem.num_ffn());
  problem.assignment = assignment_of(o.assign, domains, num_ranks);
  problem.eplb_groups = o.groups;
  problem.moves = o.moves;
  problem.seed = static_cast<std::uint64_t>(o.seed);
  std::int64_t num_slots = 0;
  for (const std::int32_t n : problem.slots_per_rank) num_slots += n;
  double routes = 0;
  for (const LayerStatistics& l : domains[0].layers)
    for (const double c : l.counts)
      routes += c / domains[0].num_tokens() / static_cast<double>(domains[0].layers.size());
  problem.costs = step_costs(config, problem.topology, o.tokens_per_rank, routes, num_slots);
  validate(problem);

  std::vector<std::string> names;
  if (o.policy == "all") {
    for (const std::string_view name : planner_names()) names.emplace_back(name);
  } else {
    names.push_back(o.policy);
    make_planner(o.policy);
  }
  const Workload fit = make_workload(domains, problem.assignment, problem.topology, kEvalTokens);
  std::optional<Workload> eval;
  const SourceAssignment eval_assignment = assignment_of(o.eval_assign, others, num_ranks);
  if (!others.empty()) eval = make_workload(others, eval_assignment, problem.topology, kEvalTokens);
  PlaceReport report = run_planners(problem, names, fit, eval ? &*eval : nullptr, names.size() == 1);
  report.fit_names = o.stats;
  report.eval_names = o.eval;
  report.fit_assignment = to_string(problem.assignment);
  if (eval) report.eval_assignment = to_string(eval_assignment);

  const PlannerResult& chosen = report.planners.back();  // ours stands last
  if (!o.out.empty()) {
    PlacementFile file;
    file.planner = chosen.name;
    file.num_experts = domains[0].num_experts;
    for (std::int32_t n = 0; n < o.nodes; ++n) file.nodes.push_back(problem.topology.ranks_of(NodeId(n)));
    for (std::size_t l = 0; l < chosen.layers.size(); ++l) {
      PlacementFile::Layer layer{report.layer_numbers[l], {}};
      for (std::int32_t r = 0; r < num_ranks; ++r) {
        const auto held = chosen.layers[l].experts_of(RankId(r));
        layer.experts_of_rank.emplace_back(held.begin(), held.end());
      }
      file.layers.push_back(std::move(layer));
    }
    write_document(o.out, file.to_json());
  }
  if (!o.svg.empty()) {
    const PlannerResult before =
        run_planners(problem, {"contiguous"}, fit, eval ? &*eval : nullptr, true).planners.front();
    write_document(o.svg, report.to_svg(before, chosen));
  }
  print_document(o.json ? report.to_json() : report.to_text());
  return 0;
}

}  // namespace

void add_place(CLI::App& app, Run& run) {
  auto o = std::make_shared<PlaceOptions>();
  CLI::App* command = app.add_subcommand("place", "plan placements from recorded routing, and judge them");
  add_config_options(*command, o->config);
  command
      ->add_option("--stats", o->stats,
                   "statistics, trace or routes to plan from; several are several domains")
      ->required()
      ->check(not_empty);
  CLI::Option* eval =
      command->add_option("--eval", o->eval, "other statistics, traces or routes to judge the placements by")
          ->check(not_empty);
  command->add_option("--nodes", o->nodes, "nodes")->required()->check(CLI::Range(1, 4096));
  command->add_option("--ranks-per-node", o->ranks_per_node, "ranks of a node")
      ->required()
      ->check(CLI::Range(1, 4096));
  command
      ->add_option("--slots-per-rank", o->slots,
                   "experts that a rank can hold, one number or one a rank; default: room for each once")
      ->check(not_empty);
  command->add_option("--policy", o->policy, "a planner, or all")->check(not_empty);
  command
      ->add_option("--assign", o->assign,
                   "home ranks of tokens: recorded, mixed, skewed, or auto: recorded if known")
      ->check(CLI::IsMember({"auto", "recorded", "mixed", "skewed"}));
  command->add_option("--eval-assign", o->eval_assign, "likewise, of --eval")
      ->check(CLI::IsMember({"auto", "recorded", "mixed", "skewed"}))
      ->needs(eval);
  command->add_option("--everywhere", o->everywhere,
                      "the last so many experts live on every rank and have no slots");
  command->add_option("--groups", o->groups, "groups of experts of eplb_hierarchical; 0: 8, or one a node")
      ->check(CLI::Range(0, 65536));
  command->add_option("--moves", o->moves, "placements that planner sluice may compare, over all layers")
      ->check(CLI::Range(std::int64_t{0}, std::int64_t{1} << 40));
  command->add_option("--seed", o->seed, "of the search")
      ->check(CLI::Range(std::int64_t{0}, std::int64_t{1} << 53));
  command->add_option("--tokens-per-rank", o->tokens_per_rank, "tokens of a step")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 40));
  command->add_option("--out", o->out, "write the placement (of planner sluice with all) for placement.file")
      ->check(not_empty);
  command->add_option("--svg", o->svg, "draw load and crossings, contiguous beside that placement")
      ->check(not_empty);
  command->add_flag("--json", o->json, "print as JSON");
  command->callback([o, &run] { run = [o] { return run_place(*o); }; });
}

}  // namespace sluice::cli
