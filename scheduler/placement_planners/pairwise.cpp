#include "sluice/scheduler/placement_planners/pairwise.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace sluice {
namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

double h(double mu) {
  return mu < 1e-6 ? 1 - mu / 2 : (1 - std::exp(-mu)) / mu;
}

}  // namespace

PairwiseNodes::PairwiseNodes(const PlacementProblem& problem, LayerAffinity affinity)
    : problem_(problem),
      a_(std::move(affinity)),
      experts_(at(problem.num_ffn())),
      stride_(at(problem.num_experts())),
      nodes_(at(problem.topology.num_nodes())) {
  for (std::size_t e = 0; e < experts_; ++e) inverse_load_.push_back(a_.load[e] > 0 ? 1 / a_.load[e] : 0);
  copies_.assign(nodes_ * experts_, 0);
  holders_.assign(experts_, 0);
  foreign_.assign(experts_, 0);
  weight_.assign(nodes_ * experts_, 0);
  mu_.assign(nodes_ * experts_, 0);
  in_.assign(nodes_, 0);
  load_.assign(nodes_, 0);
  room_.assign(nodes_, 0);
  for (std::size_t n = 0; n < nodes_; ++n) {
    const auto& ranks = problem.topology.ranks_of(NodeId(static_cast<std::int32_t>(n)));
    num_ranks_.push_back(static_cast<double>(ranks.size()));
    for (const std::int32_t r : ranks) room_[n] += std::min(problem.slots_per_rank[at(r)], problem.num_ffn());
  }
  const auto num_ranks = static_cast<double>(problem.topology.num_ranks());
  total_tokens_ = static_cast<double>(problem.costs.tokens_per_rank) * num_ranks;
  double sum = 0, hottest = 0;
  std::int64_t slots = 0;
  for (std::size_t e = 0; e < experts_; ++e) {
    sum += a_.load[e];
    hottest = std::max(hottest, a_.load[e]);
  }
  for (const std::int32_t r : room_) slots += r;
  mean_load_ = sum / num_ranks;
  // With spare slots the hottest expert can be cut up; without, its rank is the most loaded whatever else is done, and
  // nodes may be as uneven as that.
  const double cuts = 1 + static_cast<double>(slots - problem.num_ffn()) / 4;
  load_limit_ = std::max(1.04 * mean_load_, 0.5 * (mean_load_ + std::min(hottest, hottest * 4 / cuts)));
}

double PairwiseNodes::copy_load(std::size_t node, std::size_t expert) const {
  return (a_.node_load[node * stride_ + expert] + foreign_[expert]) / copies_[cell(node, expert)];
}

void PairwiseNodes::change(std::size_t node, std::size_t expert, int sign) {
  std::int32_t& count = copies_[cell(node, expert)];
  const bool had = count > 0;
  count += sign;
  if (had == (count > 0)) return;  // as many nodes as before
  holders_[expert] += sign;
  double open = 0;
  for (std::size_t n = 0; n < nodes_; ++n)
    if (copies_[cell(n, expert)] == 0) open += a_.node_load[n * stride_ + expert];
  foreign_[expert] = holders_[expert] > 0 ? open / holders_[expert] : 0;
  const double* together = a_.together.data() + expert * stride_;
  for (std::size_t n = 0; n < nodes_; ++n) {
    const bool here = copies_[cell(n, expert)] > 0;
    const double others = a_.load[expert] - a_.node_load[n * stride_ + expert];
    const double w = here && others > 0 ? std::min(1.0, foreign_[expert] / others) : 0;
    double& weight = weight_[cell(n, expert)];
    if (!here && weight == 0) continue;
    const double delta = w - weight;
    weight = w;
    double* mu = mu_.data() + n * experts_;
    for (std::size_t e = 0; e < experts_; ++e) mu[e] += delta * together[e] * inverse_load_[e];
    mu[expert] -= delta * together[expert] * inverse_load_[expert];
    if (n != node) refresh(n);
  }
  refresh(node);
}

void PairwiseNodes::refresh(std::size_t n) {
  double in = 0, load = 0;
  for (std::size_t e = 0; e < experts_; ++e) {
    if (copies_[cell(n, e)] == 0) continue;
    in += foreign_[e] * h(mu_[cell(n, e)]);
    load += a_.node_load[n * stride_ + e] + foreign_[e];
  }
  in_[n] = in;
  load_[n] = load;
}

double PairwiseNodes::objective_us() const {
  double sum = 0, most_in = 0, most_load = 0, excess = 0;
  for (std::size_t n = 0; n < nodes_; ++n) {
    sum += in_[n];
    most_in = std::max(most_in, in_[n] / num_ranks_[n]);
    most_load = std::max(most_load, load_[n] / num_ranks_[n]);
    excess += std::max(0.0, load_[n] / num_ranks_[n] - load_limit_);
  }
  const double mean = sum / static_cast<double>(problem_.topology.num_ranks());
  const StepCosts& c = problem_.costs;
  return c.layer_us(total_tokens_ * most_load, 0, total_tokens_ * (mean + most_in)) +
         total_tokens_ * (c.row_across_us * mean + 4 * (c.route_forward_us + c.route_backward_us) * excess);
}

void PairwiseNodes::place_once() {
  std::vector<std::size_t> order(experts_);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return a_.load[a] > a_.load[b]; });
  const auto total_room = static_cast<double>(std::accumulate(room_.begin(), room_.end(), 0));
  // What every node may hold while each expert is placed once: in proportion to its slots.
  std::vector<std::int32_t> share(nodes_);
  std::int32_t left = problem_.num_ffn();
  for (std::size_t n = 0; n < nodes_; ++n) {
    share[n] = std::min(left, static_cast<std::int32_t>(problem_.num_ffn() * (room_[n] / total_room)));
    left -= share[n];
  }
  for (std::size_t n = 0; left > 0; n = (n + 1) % nodes_)
    if (share[n] < room_[n]) ++share[n], --left;
  for (const std::size_t e : order) {
    std::size_t best = nodes_;
    double best_cost = 0;
    for (std::size_t n = 0; n < nodes_; ++n) {
      if (share[n] == 0) continue;
      const double load = (load_[n] + a_.load[e]) / num_ranks_[n];
      const double cost = (a_.load[e] - a_.node_load[n * stride_ + e]) * std::exp(-mu_[cell(n, e)]) +
                          8 * num_ranks_[n] * std::max(0.0, load - load_limit_);
      if (best == nodes_ || cost < best_cost - 1e-12) {
        best = n;
        best_cost = cost;
      }
    }
    change(best, e, 1);
    --share[best];
    --room_[best];
  }
}

void PairwiseNodes::place_copies() {
  const StepCosts& c = problem_.costs;
  const double row_us = 4 * c.row_across_us / static_cast<double>(problem_.topology.num_ranks());
  const double route_us = c.route_forward_us + c.route_backward_us;
  while (true) {
    std::size_t best_node = nodes_, best_expert = 0;
    double best_gain = -1;
    for (std::size_t n = 0; n < nodes_; ++n) {
      if (room_[n] == 0) continue;
      for (std::size_t e = 0; e < experts_; ++e) {
        const std::int32_t here = copies_[cell(n, e)];
        if (here >= static_cast<std::int32_t>(num_ranks_[n])) continue;
        // Rows that no longer cross, and load that leaves the most loaded copy.
        double alone = 0, heaviest = 0;
        for (std::size_t m = 0; m < nodes_; ++m)
          if (copies_[cell(m, e)] > 0) {
            alone += std::exp(-mu_[cell(m, e)]) / holders_[e];
            heaviest = std::max(heaviest, copy_load(m, e));
          }
        const double own = a_.node_load[n * stride_ + e];
        double after = 0;
        if (here > 0) {
          after = copy_load(n, e) * here / (here + 1);
        } else {
          const double open = foreign_[e] * holders_[e] - own;
          after = std::max(0.0, heaviest - (foreign_[e] - open / (holders_[e] + 1)));
        }
        const double relief = std::max(0.0, heaviest - std::max(mean_load_, after));
        const double gain =
            (here > 0 ? 0 : own * alone * row_us) + relief * route_us / 2 - 1e-9 * static_cast<double>(here);
        if (gain > best_gain) {
          best_gain = gain;
          best_node = n;
          best_expert = e;
        }
      }
    }
    if (best_node == nodes_) return;
    change(best_node, best_expert, 1);
    --room_[best_node];
  }
}

std::int64_t PairwiseNodes::swap_copies(std::int64_t max_moves) {
  std::int64_t moves = 0;
  double current = objective_us();
  std::vector<double> alone(nodes_ *
                            experts_);  // of each (node, expert): rows that only this expert brings there
  const auto refresh_alone = [&](std::size_t n) {
    for (std::size_t e = 0; e < experts_; ++e)
      alone[cell(n, e)] = (a_.load[e] - a_.node_load[n * stride_ + e]) * std::exp(-mu_[cell(n, e)]);
  };
  for (std::size_t n = 0; n < nodes_; ++n) refresh_alone(n);
  bool any = true;
  while (any && moves < max_moves) {
    any = false;
    for (std::size_t e = 0; e < experts_ && moves < max_moves; ++e)
      for (std::size_t a = 0; a < nodes_ && moves < max_moves; ++a) {
        if (copies_[cell(a, e)] != 1) continue;
        // The partner that looks best when the two are seen alone.
        std::size_t best_b = nodes_, best_f = 0;
        double best_gain = -1e300;
        for (std::size_t b = 0; b < nodes_; ++b) {
          if (b == a || copies_[cell(b, e)] > 0) continue;
          const double leave = alone[cell(a, e)] / holders_[e] - alone[cell(b, e)] / holders_[e];
          for (std::size_t f = 0; f < experts_; ++f) {
            if (copies_[cell(b, f)] != 1 || copies_[cell(a, f)] > 0) continue;
            const double both = a_.together[e * stride_ + f];
            const double gain = leave + (alone[cell(b, f)] - alone[cell(a, f)]) / holders_[f] -
                                both * (std::exp(-mu_[cell(b, e)]) + std::exp(-mu_[cell(a, f)])) * 0.5;
            if (gain > best_gain) {
              best_gain = gain;
              best_b = b;
              best_f = f;
            }
          }
        }
        if (best_b == nodes_) continue;
        ++moves;
        const auto apply = [&](int sign) {
          change(a, e, -sign), change(best_b, best_f, -sign);
          change(best_b, e, sign), change(a, best_f, sign);
        };
        apply(1);
        const double after = objective_us();
        if (after < current * (1 - 1e-9)) {
          current = after;
          any = true;
          refresh_alone(a);
          refresh_alone(best_b);
        } else {
          apply(-1);
        }
      }
  }
  return moves;
}

std::int64_t PairwiseNodes::build(std::int64_t max_moves) {
  place_once();
  place_copies();
  return swap_copies(max_moves);
}

std::vector<std::vector<std::int32_t>> PairwiseNodes::ranks() const {
  std::vector<std::vector<std::int32_t>> out(problem_.slots_per_rank.size());
  for (std::size_t n = 0; n < nodes_; ++n) {
    struct Copy {
      double load;
      std::int32_t expert;
    };
    std::vector<Copy> order;
    for (std::size_t e = 0; e < experts_; ++e)
      for (std::int32_t i = 0; i < copies_[cell(n, e)]; ++i)
        order.push_back({copy_load(n, e), static_cast<std::int32_t>(e)});
    std::stable_sort(order.begin(), order.end(),
                     [](const Copy& a, const Copy& b) { return a.load > b.load; });
    const auto& ranks = problem_.topology.ranks_of(NodeId(static_cast<std::int32_t>(n)));
    std::vector<double> load(ranks.size(), 0);
    for (const Copy& copy : order) {
      std::size_t best = ranks.size();
      for (std::size_t i = 0; i < ranks.size(); ++i) {
        const auto& list = out[at(ranks[i])];
        if (static_cast<std::int32_t>(list.size()) >= problem_.slots_per_rank[at(ranks[i])]) continue;
        if (std::find(list.begin(), list.end(), copy.expert) != list.end()) continue;
        if (best == ranks.size() || load[i] < load[best]) best = i;
      }
      if (best == ranks.size()) continue;  // a second copy that finds no rank without the first
      out[at(ranks[best])].push_back(copy.expert);
      load[best] += copy.load;
    }
  }
  return out;
}

}  // namespace sluice
