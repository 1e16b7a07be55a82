#include "sluice/runtime/src/place/place_report.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "sluice/base/clock.hpp"
#include "sluice/base/text_table.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/tune/profile.hpp"

namespace sluice {
namespace {

using Json = nlohmann::ordered_json;

Json metrics_json(const PlannerResult& p, const PlacementMetrics& m,
                  const std::vector<std::int32_t>& layer_numbers) {
  const auto known = [&](double v) { return m.drawn ? Json() : Json(v); };
  Json out{{"node_crossings_per_token", known(m.node_crossings_per_token)},
           {"rank_crossings_per_token", known(m.rank_crossings_per_token)},
           {"hops_per_token", m.has_hops ? Json(m.hops_per_token) : Json()},
           {"balance", m.balance},
           {"busiest_node_crossings", known(m.busiest_node_crossings)},
           {"busiest_node_in", known(m.busiest_node_in)},
           {"busiest_node_out", known(m.busiest_node_out)},
           {"predicted_step_us", m.predicted_step_us},
           {"estimated", m.drawn},
           {"planning_ms", p.planning_ms},
           {"moves", p.moves}};
  Json& balances = out["balance_by_layer"] = Json::array();
  for (const LayerLoad& l : m.layers) balances.push_back(l.balance());
  Json& placement = out["placement"] = Json::object();
  for (std::size_t l = 0; l < p.layers.size(); ++l) {
    Json ranks = Json::array();
    for (std::int32_t e = 0; e < p.layers[l].num_experts; ++e) {
      Json of_expert = Json::array();
      for (const std::int32_t s : p.layers[l].slots_of(ExpertId(e)))
        of_expert.push_back(p.layers[l].slot_rank[static_cast<std::size_t>(s)]);
      ranks.push_back(std::move(of_expert));
    }
    placement[str(layer_numbers[l])] = std::move(ranks);
  }
  return out;
}

// Bars of two series side by side.
std::string bars(double x, double y, double width, double height, const std::string& title,
                 const std::string& unit, const std::vector<double>& before,
                 const std::vector<double>& after) {
  double most = 1e-12;
  for (const auto* series : {&before, &after})
    for (const double v : *series) most = std::max(most, v);
  std::string out = str("<text x=\"", x, "\" y=\"", y - 8, "\" class=\"title\">", title, "</text>\n");
  for (int i = 0; i <= 4; ++i) {
    const double at = y + height - height * i / 4;
    out += str("<line x1=\"", x, "\" y1=\"", at, "\" x2=\"", x + width, "\" y2=\"", at,
               "\" class=\"grid\"/>\n", "<text x=\"", x - 6, "\" y=\"", at + 4, "\" class=\"tick\">",
               fixed(most * i / 4, 2), "</text>\n");
  }
  const double slot = width / static_cast<double>(std::max<std::size_t>(1, before.size()));
  for (std::size_t i = 0; i < before.size(); ++i) {
    const auto bar = [&](double v, double offset, const char* style) {
      const double h = height * v / most;
      out += str("<rect x=\"", x + slot * (static_cast<double>(i) + offset), "\" y=\"", y + height - h,
                 "\" width=\"", slot * 0.38, "\" height=\"", h, "\" class=\"", style, "\"/>\n");
    };
    bar(before[i], 0.1, "before");
    bar(after[i], 0.52, "after");
    const std::size_t step = (before.size() + 15) / 16;
    if (i % step == 0)
      out += str("<text x=\"", x + slot * (static_cast<double>(i) + 0.5), "\" y=\"", y + height + 16,
                 "\" class=\"label\">", i, "</text>\n");
  }
  return out + str("<text x=\"", x + width, "\" y=\"", y - 8, "\" class=\"tick\">", unit, "</text>\n");
}

}  // namespace

StepCosts step_costs(const Config& config, const Topology& topology, std::int64_t tokens_per_rank,
                     double routes_per_token, std::int64_t num_slots) {
  const MachineProfile profile = profile_of(config, topology);
  const LayerShape layer = layer_shape(layer_options(config), config.runtime.threads_per_rank);
  StepCosts out;
  out.tokens_per_rank = tokens_per_rank;
  out.source = str(profile.name, profile.measured ? " (measured)" : " (declared, not measured)", ", hidden ",
                   layer.hidden, ", ffn ", layer.ffn, ", rows of ", to_string(layer.wire_dtype));
  const double rows =
      std::max(1.0, static_cast<double>(tokens_per_rank * topology.num_ranks()) * routes_per_token /
                        static_cast<double>(std::max<std::int64_t>(1, num_slots)));
  const auto gemms = [&](GemmKind kind) {
    return profile.gemm_us(layer.gemm1(kind), std::span(&rows, 1)) +
           profile.gemm_us(layer.gemm2(kind), std::span(&rows, 1));
  };
  out.route_forward_us = gemms(GemmKind::kForward) / rows;
  out.route_backward_us = (gemms(GemmKind::kDgrad) + gemms(GemmKind::kWgrad)) / rows;
  constexpr double kRows = 1024;
  const double bytes = kRows * static_cast<double>(layer.row_bytes() + layer.sum_bytes()) / 2;
  out.row_in_node_us = profile.in_node.occupied(bytes) / kRows;
  out.row_across_us = profile.across_nodes.occupied(bytes) / kRows;
  return out;
}

PlaceReport run_planners(const PlacementProblem& problem, const std::vector<std::string>& names,
                         const Workload& fit, const Workload* eval, bool refuse) {
  PlaceReport out;
  out.topology = problem.topology;
  out.slots_per_rank = problem.slots_per_rank;
  for (const WorkloadLayer& l : fit.layers) out.layer_numbers.push_back(l.layer);
  out.costs = problem.costs;
  for (const std::string& name : names) {
    PlannerResult result;
    result.name = name;
    const auto planner = make_planner(name);
    try {
      const auto begin = Clock::now();
      PlacementPlan plan = planner->plan(problem);
      result.planning_ms = to_us(Clock::now() - begin) / 1000;
      result.moves = plan.moves;
      result.layers = std::move(plan.layers);
    } catch (const Error& e) {
      if (refuse || e.code() != ErrorCode::kNotSupported) throw;
      result.refused = e.message();
      out.planners.push_back(std::move(result));
      continue;
    }
    result.fit = measure(fit, result.layers, problem.topology, problem.costs);
    if (eval) result.eval = measure(*eval, result.layers, problem.topology, problem.costs);
    out.planners.push_back(std::move(result));
  }
  return out;
}

std::string PlaceReport::to_json() const {
  Json out{{"topology", topology.describe()},
           {"slots_per_rank", slots_per_rank},
           {"layers", layer_numbers},
           {"fit_files", fit_names},
           {"fit_assignment", fit_assignment},
           {"eval_files", eval_names},
           {"eval_assignment", eval_assignment},
           {"costs",
            {{"source", costs.source},
             {"route_forward_us", costs.route_forward_us},
             {"route_backward_us", costs.route_backward_us},
             {"row_in_node_us", costs.row_in_node_us},
             {"row_across_us", costs.row_across_us},
             {"unhidden", StepCosts::kUnhidden},
             {"tokens_per_rank", costs.tokens_per_rank}}}};
  Json fit = Json::object(), eval = Json::object(), refused = Json::object();
  for (const PlannerResult& p : planners) {
    if (!p.refused.empty()) {
      refused[p.name] = p.refused;
      continue;
    }
    fit[p.name] = metrics_json(p, p.fit, layer_numbers);
    if (p.eval) eval[p.name] = metrics_json(p, *p.eval, layer_numbers);
  }
  out["fit"] = std::move(fit);
  if (!eval.empty()) out["eval"] = std::move(eval);
  if (!refused.empty()) out["refused"] = std::move(refused);
  return out.dump(1, ' ', false, Json::error_handler_t::replace);
}

std::string PlaceReport::to_text() const {
  std::string out = str(topology.describe(), "; step time for ", costs.source, ", ", costs.tokens_per_rank,
                        " tokens a rank\n");
  const auto table = [&](const std::string& title, const std::vector<std::string>& files,
                         const std::string& assignment, auto&& get) {
    std::string list;
    for (const std::string& f : files) list += (list.empty() ? "" : ", ") + f;
    out += str("\n", title, ": ", list, "; sources ", assignment, "\n");
    TextTable t({"planner", "node crossings", "rank crossings", "hops", "balance", "busiest node", "step us",
                 "planned in ms"});
    bool drawn = false;
    for (const PlannerResult& p : planners) {
      if (!p.refused.empty()) {
        t.add_row({p.name, "refused"});
        continue;
      }
      const PlacementMetrics& m = get(p);
      drawn = drawn || m.drawn;
      const auto known = [&](double v) { return m.drawn ? std::string("-") : fixed(v, 3); };
      t.add_row({p.name, known(m.node_crossings_per_token), known(m.rank_crossings_per_token),
                 m.has_hops ? fixed(m.hops_per_token, 3) : "-", fixed(m.balance, 3),
                 known(m.busiest_node_crossings), fixed(m.predicted_step_us, 0), fixed(p.planning_ms, 0)});
    }
    out += t.to_string();
    if (drawn)
      out += "from counts alone: the step is an estimate for experts that are chosen independently\n";
  };
  table("planned on", fit_names, fit_assignment,
        [](const PlannerResult& p) -> const PlacementMetrics& { return p.fit; });
  const bool evaluated = std::any_of(planners.begin(), planners.end(),
                                     [](const PlannerResult& p) { return p.eval.has_value(); });
  if (evaluated)
    table("evaluated on", eval_names, eval_assignment,
          [](const PlannerResult& p) -> const PlacementMetrics& { return *p.eval; });
  for (const PlannerResult& p : planners)
    if (!p.refused.empty()) out += str("refused: ", p.refused, "\n");
  return out;
}

std::string PlaceReport::to_svg(const PlannerResult& before, const PlannerResult& after) const {
  struct Series {
    std::vector<double> routes, in, out;
  };
  const auto series = [&](const PlannerResult& p) {
    const PlacementMetrics& m = p.eval ? *p.eval : p.fit;
    Series s;
    s.routes.assign(m.layers[0].routes.size(), 0);
    s.in.assign(m.layers[0].node_in.size(), 0);
    s.out = s.in;
    const auto layers = static_cast<double>(m.layers.size());
    for (const LayerLoad& l : m.layers) {
      double mean_load = 0, in = 0;
      for (const auto v : l.routes)
        mean_load += static_cast<double>(v) / static_cast<double>(l.routes.size());
      for (const auto v : l.node_in) in += static_cast<double>(v);
      // Rows of a node, of a token of the mean node: crossings a token times nodes.
      const double per_row =
          l.node_crossings == 0
              ? 0
              : m.node_crossings_per_token * static_cast<double>(s.in.size()) / std::max(1.0, in) / layers;
      for (std::size_t r = 0; r < s.routes.size(); ++r)
        s.routes[r] += static_cast<double>(l.routes[r]) / std::max(1e-12, mean_load) / layers;
      for (std::size_t n = 0; n < s.in.size(); ++n) {
        s.in[n] += static_cast<double>(l.node_in[n]) * per_row;
        s.out[n] += static_cast<double>(l.node_out[n]) * per_row;
      }
    }
    return s;
  };
  const Series a = series(before), b = series(after);
  const bool drawn = before.fit.drawn || after.fit.drawn;
  std::string out =
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"900\" height=\"820\" viewBox=\"0 0 900 820\">\n"
      "<style>text{font-family:sans-serif;font-size:12px;fill:#222}.title{font-size:14px;font-weight:bold}"
      ".tick{text-anchor:end;fill:#555}.label{text-anchor:middle;fill:#555}.grid{stroke:#ddd}"
      ".before{fill:#b0b7c3}.after{fill:#2a6fb0}</style>\n<rect width=\"900\" height=\"820\" "
      "fill=\"#fff\"/>\n";
  out +=
      str("<rect x=\"60\" y=\"18\" width=\"12\" height=\"12\" class=\"before\"/><text x=\"78\" y=\"29\">",
          before.name,
          "</text>\n<rect x=\"240\" y=\"18\" width=\"12\" height=\"12\" class=\"after\"/><text x=\"258\" "
          "y=\"29\">",
          after.name, "</text>\n<text x=\"860\" y=\"29\" class=\"tick\">", topology.num_nodes(), " nodes, ",
          topology.num_ranks(), " ranks", before.eval ? ", held-out routing" : "", "</text>\n");
  out += bars(60, 80, 800, 190, "Load of ranks", "routes / mean", a.routes, b.routes);
  if (drawn) {
    out += "<text x=\"60\" y=\"330\">Crossings are not known from counts alone.</text>\n";
  } else {
    out += bars(60, 330, 800, 190, "Rows that enter a node", "rows a token of a node", a.in, b.in);
    out += bars(60, 580, 800, 190, "Rows that leave a node", "rows a token of a node", a.out, b.out);
  }
  return out + "</svg>\n";
}

}  // namespace sluice
