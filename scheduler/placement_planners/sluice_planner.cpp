// Planner `sluice`: construction (pairwise.hpp and the other planners' placements), then local search on replayed tokens
// (replay.hpp). docs/placement.md has the objective.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"
#include "sluice/scheduler/placement_planners/pairwise.hpp"
#include "sluice/scheduler/placement_planners/replay.hpp"
#include "sluice/scheduler/placement_planners/unseen_load.hpp"

namespace sluice {
namespace {

using Lists = std::vector<std::vector<std::int32_t>>;

constexpr std::int64_t kPlanTokens = 4096;  // of a scenario
constexpr double kBalancePrice = 4;         // of load beyond EPLB's, in times of the step
constexpr double kUnseenMargin = 0.04;      // so much less of the slack where loads are not known
constexpr double kUnseenPart = 0.5;         // of the compute time is that of loads that are not known
constexpr double kFirstPrice = 0.1;         // of balance, at the beginning of the search
constexpr double kRisingPart = 0.4;         // of the search, until balance has its full price
constexpr std::int64_t kSettleMoves =
    400;  // after so many copies are chosen by the rule again; more in a long search
constexpr double kStartHeat = 0.002;  // worsening that the search takes at first, in parts of the objective

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

// A way the tokens may come: as assigned, or one domain alone from everywhere.
struct Scenario {
  Workload workload;
  double weight = 1;
  bool load_only = false;  // tokens were drawn from counts: they tell the balance, not what crosses
};

std::vector<Scenario> make_scenarios(const PlacementProblem& problem) {
  std::vector<RoutingStatistics> sampled,
      counted;  // domains with tokens, and domains of which only counts are known
  for (const RoutingStatistics& s : problem.domains) (s.sample.empty() ? counted : sampled).push_back(s);
  if (sampled.empty()) sampled.swap(counted);
  std::vector<Scenario> out;
  const auto even = SourceAssignment::kMixed;
  const auto each = kPlanTokens / static_cast<std::int64_t>(problem.domains.size());
  out.push_back({make_workload(sampled, problem.assignment, problem.topology, kPlanTokens)});
  if (problem.domains.size() == 1 && problem.assignment == even) return out;
  out[0].weight = 0.5;
  const double weight = 0.5 / static_cast<double>(problem.domains.size());
  for (const RoutingStatistics& s : sampled)
    out.push_back({make_workload(std::span(&s, 1), even, problem.topology, each), weight});
  for (const RoutingStatistics& s : counted)
    out.push_back({make_workload(std::span(&s, 1), even, problem.topology, each), weight, true});
  return out;
}

// What the objective compares a scenario with.
struct Reference {
  double step_us = 0;  // least of the reference placements
  double routes = 0;   // of the most loaded rank, least of the reference placements
};

double most_of(std::span<const std::int64_t> v) {
  return static_cast<double>(*std::max_element(v.begin(), v.end()));
}
template <typename Load>
double step_us(const PlacementProblem& problem, double scale, const Load& load, double unseen_max) {
  const double routes = most_of(load.routes);
  const auto all =
      static_cast<double>(std::accumulate(load.routes.begin(), load.routes.end(), std::int64_t{0}));
  return problem.costs.layer_us(scale * (routes + problem.hedge * kUnseenPart * (all * unseen_max - routes)),
                                scale * most_of(load.in_node), scale * most_of(load.across));
}

// The objective of one scenario of one layer, 1 where a placement is as good as the reference. unseen_max: the most loaded
// rank's share of the routes of a domain that is not known yet.
template <typename Load>
double price(const PlacementProblem& problem, double scale, const Reference& reference, bool load_only,
             const Load& load, double unseen_max, double balance_price) {
  const StepCosts& costs = problem.costs;
  const double routes = most_of(load.routes);
  const double balance = balance_price * std::max(0.0, routes / reference.routes - 1 - problem.balance_slack);
  if (load_only) return routes / reference.routes + balance;
  const double step = step_us(problem, scale, load, unseen_max);
  // A crossing occupies two links of the mean rank, there and back, forward and backward.
  const double mean = 4 * scale * static_cast<double>(load.node_crossings) /
                      static_cast<double>(load.routes.size()) * costs.row_across_us;
  return (step + problem.mean_price * mean) / reference.step_us + balance;
}

class LayerSearch {
 public:
  LayerSearch(const PlacementProblem& problem, std::span<const Scenario> scenarios, std::size_t layer)
      : problem_(problem),
        scenarios_(scenarios),
        layer_(layer),
        worlds_(draw_worlds(problem, layer)),
        unseen_(problem.topology, worlds_) {
    for (const Scenario& s : scenarios)
      scale_.push_back(static_cast<double>(problem.costs.tokens_per_rank * s.workload.num_ranks) /
                       static_cast<double>(s.workload.num_tokens()));
  }

  void set_reference(std::span<const Placement> placements) {
    reference_.assign(scenarios_.size(), {});
    unseen_reference_ = INFINITY;
    for (const Placement& p : placements) {
      const double unseen = unseen_max(p);
      unseen_reference_ = std::min(unseen_reference_, unseen);
      for (std::size_t i = 0; i < scenarios_.size(); ++i) {
        const LayerLoad load = count_layer(scenarios_[i].workload, layer_, p, problem_.topology);
        const double routes = most_of(load.routes), step = step_us(problem_, scale_[i], load, unseen);
        Reference& r = reference_[i];
        if (r.step_us == 0 || step < r.step_us) r.step_us = std::max(step, 1e-9);
        if (r.routes == 0 || routes < r.routes) r.routes = std::max(routes, 1.0);
      }
    }
  }

  // By the rule that layers follow. balance_price: kBalancePrice, or less to see past balance.
  double measured(const Placement& placement, double balance_price) const {
    const double unseen = unseen_max(placement);
    double sum = unseen_price(unseen, balance_price);
    for (std::size_t i = 0; i < scenarios_.size(); ++i) {
      const LayerLoad load = count_layer(scenarios_[i].workload, layer_, placement, problem_.topology);
      sum += scenarios_[i].weight *
             price(problem_, scale_[i], reference_[i], scenarios_[i].load_only, load, unseen, balance_price);
    }
    return sum;
  }

  // Local search from `start`; returns the best placement met and adds to `moves`.
  Lists search(const Lists& start, std::int64_t budget, std::uint64_t seed, std::int64_t& moves) {
    experts_of_ = start;
    copies_.assign(at(problem_.num_ffn()), {});
    for (std::size_t r = 0; r < start.size(); ++r)
      for (const std::int32_t e : start[r]) copies_[at(e)].push_back(static_cast<std::int32_t>(r));
    replays_.clear();
    for (const Scenario& s : scenarios_) replays_.emplace_back(problem_.topology, s.workload, layer_);
    for (std::size_t e = 0; e < copies_.size(); ++e) set_copies(static_cast<std::int32_t>(e));
    slots_.clear();
    bool spare = false;
    for (std::size_t r = 0; r < start.size(); ++r)
      for (std::size_t i = 0; i < start[r].size(); ++i)
        slots_.push_back({static_cast<std::int32_t>(r), static_cast<std::int32_t>(i)});
    for (const auto& c : copies_) spare = spare || c.size() > 1;
    std::mt19937_64 rng(Hasher().add(seed).add(layer_).value());
    // The price of balance rises from little to all of it: a placement that keeps tokens together is found before it is
    // evened out, which is nearer than the way from one that is even to one that keeps tokens together.
    const auto rising = static_cast<std::int64_t>(kRisingPart * static_cast<double>(budget));
    const std::int64_t every = std::max(budget / 32, std::min(kSettleMoves, budget / 4 + 1));
    double balance_price = kBalancePrice, current = 0, best = INFINITY;
    Lists best_lists = start;
    // Only what is good by the rule itself counts as met.
    const auto settle = [&] {
      const Placement placement = placement_of_lists(problem_, experts_of_);
      for (Replay& r : replays_) r.follow_rule(placement);
      current = value(balance_price);
      const double full = value(kBalancePrice);
      if (full >= best) return;
      best = full;
      best_lists = experts_of_;
    };
    const auto uniform = [&] { return static_cast<double>(rng() >> 11) * 0x1p-53; };
    for (std::int64_t i = 0; i < budget; ++i) {
      ++moves;
      if (i % every == 0) {
        const double risen =
            rising > 0 ? std::min(1.0, static_cast<double>(i) / static_cast<double>(rising)) : 1;
        balance_price = kBalancePrice * (kFirstPrice + (1 - kFirstPrice) * risen);
        settle();
      }
      const double heat =
          kStartHeat * std::max(0.0, 1 - static_cast<double>(i) / (0.7 * static_cast<double>(budget)));
      const auto kind = rng() % 6;
      if (!(kind == 0 ? try_exchange_ranks(rng) : spare && kind < 3 ? try_replace(rng) : try_swap(rng)))
        continue;
      const double after = value(balance_price);
      const double allowed = current * (1 - heat * std::log(1 - uniform()));
      if (after < current || (heat > 0 && after < allowed)) {
        current = after;
      } else {
        take_back();
      }
    }
    settle();
    return best_lists;
  }

 private:
  struct SlotRef {
    std::int32_t rank, place;
  };
  double value(double balance_price) const {
    const double unseen = unseen_.expected_max();
    double sum = unseen_price(unseen, balance_price);
    for (std::size_t i = 0; i < replays_.size(); ++i)
      sum += scenarios_[i].weight * price(problem_, scale_[i], reference_[i], scenarios_[i].load_only,
                                          replays_[i].load(), unseen, balance_price);
    return sum;
  }
  double unseen_price(double unseen, double balance_price) const {
    return problem_.hedge * balance_price *
           std::max(0.0, unseen / unseen_reference_ - 1 + kUnseenMargin - problem_.balance_slack);
  }
  double unseen_max(const Placement& placement) const {
    UnseenLoad load(problem_.topology, worlds_);
    std::vector<std::int32_t> ranks;
    for (std::int32_t e = 0; e < problem_.num_ffn(); ++e) {
      ranks.clear();
      for (const std::int32_t s : placement.slots_of(ExpertId(e)))
        ranks.push_back(placement.slot_rank[at(s)]);
      load.set_copies(e, ranks);
    }
    return load.expected_max();
  }
  void set_copies(std::int32_t expert) {
    for (Replay& r : replays_) r.set_copies(expert, copies_[at(expert)]);
    unseen_.set_copies(expert, copies_[at(expert)]);
  }
  bool holds(std::int32_t rank, std::int32_t expert) const {
    const auto& c = copies_[at(expert)];
    return std::find(c.begin(), c.end(), rank) != c.end();
  }
  void put(SlotRef slot, std::int32_t expert) {
    std::int32_t& held = experts_of_[at(slot.rank)][at(slot.place)];
    changed_.push_back({slot, held});
    auto& old = copies_[at(held)];
    old.erase(std::find(old.begin(), old.end(), slot.rank));
    touched_.push_back(held);
    held = expert;
    auto& now = copies_[at(expert)];
    now.insert(std::lower_bound(now.begin(), now.end(), slot.rank), slot.rank);
    touched_.push_back(expert);
  }
  void begin() {
    changed_.clear();
    touched_.clear();
    for (Replay& r : replays_) r.mark();
  }
  void apply() {
    std::sort(touched_.begin(), touched_.end());
    touched_.erase(std::unique(touched_.begin(), touched_.end()), touched_.end());
    for (const std::int32_t e : touched_) set_copies(e);
  }
  void take_back() {
    for (Replay& r : replays_) r.undo();
    const auto changes = changed_;
    for (auto c = changes.rbegin(); c != changes.rend(); ++c) put(c->slot, c->held);
    std::sort(touched_.begin(), touched_.end());
    touched_.erase(std::unique(touched_.begin(), touched_.end()), touched_.end());
    for (const std::int32_t e : touched_) unseen_.set_copies(e, copies_[at(e)]);
  }
  // A slot: any, or half of the time one of a rank that is most loaded, in some world or in the first scenario.
  SlotRef pick(std::mt19937_64& rng) {
    if (rng() % 2 != 0) return slots_[rng() % slots_.size()];
    const Replay& r = replays_[0];
    const auto most = [](const std::vector<std::int64_t>& v) {
      return static_cast<std::int32_t>(std::max_element(v.begin(), v.end()) - v.begin());
    };
    const auto kind = rng() % 4;
    const std::int32_t rank = kind < 2    ? unseen_.most_loaded(rng() % kWorlds)
                              : kind == 2 ? most(r.load().routes)
                                          : most(r.load().across);
    const auto n = experts_of_[at(rank)].size();
    if (n == 0) return slots_[rng() % slots_.size()];
    return {rank, static_cast<std::int32_t>(rng() % n)};
  }
  bool try_swap(std::mt19937_64& rng) {
    const SlotRef a = pick(rng), b = slots_[rng() % slots_.size()];
    if (a.rank == b.rank) return false;
    const std::int32_t e = experts_of_[at(a.rank)][at(a.place)], f = experts_of_[at(b.rank)][at(b.place)];
    if (e == f || holds(a.rank, f) || holds(b.rank, e)) return false;
    begin();
    put(a, f);
    put(b, e);
    apply();
    return true;
  }
  // Two ranks of different nodes change places: no load of a rank changes but for the choice of copies.
  bool try_exchange_ranks(std::mt19937_64& rng) {
    const auto a = static_cast<std::int32_t>(rng() % experts_of_.size());
    const auto b = static_cast<std::int32_t>(rng() % experts_of_.size());
    if (problem_.topology.same_node(RankId(a), RankId(b)) ||
        experts_of_[at(a)].size() != experts_of_[at(b)].size())
      return false;
    const std::vector<std::int32_t> of_a = experts_of_[at(a)], of_b = experts_of_[at(b)];
    begin();
    for (std::size_t i = 0; i < of_a.size(); ++i) {
      put({a, static_cast<std::int32_t>(i)}, of_b[i]);
      put({b, static_cast<std::int32_t>(i)}, of_a[i]);
    }
    apply();
    return true;
  }
  bool try_replace(std::mt19937_64& rng) {
    const SlotRef a = pick(rng);
    const std::int32_t e = experts_of_[at(a.rank)][at(a.place)];
    if (copies_[at(e)].size() < 2) return false;
    const auto f = static_cast<std::int32_t>(rng() % copies_.size());
    if (f == e || holds(a.rank, f)) return false;
    begin();
    put(a, f);
    apply();
    return true;
  }

  struct Changed {
    SlotRef slot;
    std::int32_t held;
  };
  const PlacementProblem& problem_;
  std::span<const Scenario> scenarios_;
  std::size_t layer_;
  std::vector<double> worlds_;  // f64 [num_ffn, kWorlds]
  UnseenLoad unseen_;
  double unseen_reference_ = 0;  // expected_max() of the best of the reference placements
  std::vector<double> scale_;    // of each scenario: tokens of a step over the workload's
  std::vector<Reference> reference_;
  std::vector<Replay> replays_;
  Lists experts_of_;                               // by rank
  std::vector<std::vector<std::int32_t>> copies_;  // by expert: ranks ascending
  std::vector<SlotRef> slots_;
  std::vector<Changed> changed_;
  std::vector<std::int32_t> touched_;
};

class SluicePlanner : public PlacementPlanner {
 public:
  std::string_view name() const override { return "sluice"; }
  PlacementPlan plan(const PlacementProblem& problem) const override {
    validate(problem);
    const std::vector<Scenario> scenarios = make_scenarios(problem);
    const std::size_t num_layers = problem.domains[0].layers.size();
    const auto each = problem.moves / static_cast<std::int64_t>(num_layers);
    // EPLB is the measure of balance, and a place to start from, where it can plan at all.
    std::vector<PlacementPlan> others;
    for (const std::string_view name : {"eplb_global", "eplb_hierarchical"}) {
      try {
        others.push_back(make_planner(name)->plan(problem));
      } catch (const Error& e) {
        if (e.code() != ErrorCode::kNotSupported) throw;
      }
    }
    PlacementPlan out;
    for (std::size_t l = 0; l < num_layers; ++l) {
      bool pairs_known = true;
      for (const RoutingStatistics& s : problem.domains)
        pairs_known = pairs_known && !s.layers[l].coactivation.empty();
      PairwiseNodes nodes(problem, layer_affinity(problem, scenarios[0].workload, l));
      const std::int64_t built_moves = nodes.build(each / 4);
      out.moves += built_moves;
      const Lists built = nodes.ranks();
      const Placement pairwise = placement_of_lists(problem, built);
      // Tokens that were drawn know nothing of pairs that the statistics do know.
      if (scenarios[0].workload.drawn && pairs_known) {
        out.layers.push_back(pairwise);
        continue;
      }
      LayerSearch search(problem, scenarios, l);
      std::vector<Placement> starts, reference;
      for (const PlacementPlan& p : others) reference.push_back(p.layers[l]);
      if (reference.empty()) reference.push_back(pairwise);
      search.set_reference(reference);
      starts.push_back(pairwise);
      for (const PlacementPlan& p : others) starts.push_back(p.layers[l]);
      std::size_t best = 0, first = 0;  // by the objective; by the one that the search begins with
      double least = INFINITY, least_first = INFINITY;
      for (std::size_t i = 0; i < starts.size(); ++i) {
        ++out.moves;
        if (const double v = search.measured(starts[i], kBalancePrice); v < least) {
          least = v;
          best = i;
        }
        if (const double v = search.measured(starts[i], kBalancePrice * kFirstPrice); v < least_first) {
          least_first = v;
          first = i;
        }
      }
      Placement chosen = starts[best];
      if (each > built_moves) {
        const Lists start = filled(problem, starts[first], built);
        const Placement found =
            placement_of_lists(problem, search.search(start, each - built_moves, problem.seed, out.moves));
        if (search.measured(found, kBalancePrice) < least) chosen = found;
      }
      out.layers.push_back(std::move(chosen));
    }
    return out;
  }

 private:
  // EPLB may leave slots unused (two copies on one rank): they take experts that their ranks lack, hottest first.
  static Lists filled(const PlacementProblem& problem, const Placement& start, const Lists& hint) {
    Lists out(problem.slots_per_rank.size());
    for (std::size_t r = 0; r < out.size(); ++r) {
      const auto held = start.experts_of(RankId(static_cast<std::int32_t>(r)));
      out[r].assign(held.begin(), held.end());
      const auto add = [&](std::int32_t e) {
        if (static_cast<std::int32_t>(out[r].size()) < problem.slots_per_rank[r] &&
            std::find(out[r].begin(), out[r].end(), e) == out[r].end())
          out[r].push_back(e);
      };
      for (const std::int32_t e : hint[r]) add(e);
      for (std::int32_t e = 0; e < problem.num_ffn(); ++e) add(e);
    }
    return out;
  }
};

}  // namespace

std::unique_ptr<PlacementPlanner> make_sluice_planner() {
  return std::make_unique<SluicePlanner>();
}

}  // namespace sluice
