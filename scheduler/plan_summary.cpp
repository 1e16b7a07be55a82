#include "sluice/scheduler/plan_summary.hpp"

#include <algorithm>
#include <numeric>

#include "sluice/base/error.hpp"

namespace sluice {
namespace {

constexpr std::size_t kClasses = 3;

constexpr std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}
Topology exchange_topology(const Topology& topology, Exchange exchange) {
  return exchange == Exchange::kGateway ? topology : Topology::uniform(topology.num_ranks(), 1);
}

}  // namespace

// ---- making ----------------------------------------------------------------------------------------------------------

PlanSummary::PlanSummary(const Topology& topology, Exchange exchange, std::int32_t num_chunks,
                         std::span<const std::int32_t> slots_of_rank)
    : topology_(&topology),
      exchange_topology_(exchange_topology(topology, exchange)),
      exchange_(exchange),
      num_chunks_(num_chunks),
      stride_(num_chunks) {
  Require(num_chunks >= 1, ErrorCode::kInvalidArgument, "num_chunks is ", num_chunks, ", must be at least 1");
  make_room(slots_of_rank);
}

void PlanSummary::make_room(std::span<const std::int32_t> slots_of_rank) {
  const std::size_t ranks = at(topology_->num_ranks());
  Require(slots_of_rank.size() == ranks, ErrorCode::kInvalidArgument, "slots are given for ",
          slots_of_rank.size(), " ranks, the topology has ", ranks);
  num_nodes_ = at(exchange_topology_.num_nodes());
  for (std::int32_t n = 0; n < exchange_topology_.num_nodes(); ++n)
    num_members_ = std::max(num_members_, exchange_topology_.ranks_of(NodeId(n)).size());
  slot_ptr_.assign(1, 0);
  for (const std::int32_t n : slots_of_rank) slot_ptr_.push_back(slot_ptr_.back() + n);
  tokens_.assign(ranks, 0);
  to_node_.assign(num_nodes_ > 1 ? cells(ranks * num_nodes_) : 0, {});
  to_rank_.assign(cells(ranks * num_members_), {});
  handed_on_.assign(num_nodes_ > 1 ? cells(ranks * num_members_) : 0, {});
  received_.assign(cells(ranks * kClasses), {});
  slot_rows_.assign(cells(at(slot_ptr_.back()) * kClasses), 0);
  for (auto* sum : {&sum_to_node_, &sum_to_others_, &sum_handed_on_, &sum_hop1_in_, &own_partials_})
    sum->assign(cells(ranks), {});
}

void PlanSummary::add(const Plan& plan) {
  Require(exact() && plan.options.num_chunks == num_chunks_ && plan.options.exchange == exchange_,
          ErrorCode::kInvalidArgument, "a plan of ", plan.options.num_chunks,
          " chunks was added to a summary of ", num_chunks_, ", or its exchange differs");
  Require(plan.rank.index() < tokens_.size() && plan.num_local_slots == num_slots(plan.rank),
          ErrorCode::kInvalidArgument, "the plan of rank ", plan.rank.value, " has ", plan.num_local_slots,
          " slots; this summary is of another placement");
  const RankId self = plan.rank;
  const std::size_t r = self.index();
  const auto chunks = at(num_chunks_);
  const auto amount = [&](const auto& list, std::size_t segment, std::size_t c) {
    const std::size_t i = segment * (chunks + 1) + c;
    return Cell{static_cast<double>(list.chunk_row[i + 1] - list.chunk_row[i]),
                static_cast<double>(list.chunk_route[i + 1] - list.chunk_route[i])};
  };
  tokens_[r] = plan.num_tokens;
  for (std::size_t c = 0; c < chunks; ++c) {
    const std::size_t own = cells(r) + c;
    for (auto* sum : {&sum_to_node_, &sum_to_others_, &sum_handed_on_, &sum_hop1_in_, &own_partials_})
      (*sum)[own] = {};
    for (std::size_t m = 0; m < num_members_; ++m) {
      if (num_nodes_ > 1) handed_on_[cells(r * num_members_ + m) + c] = {};
    }
    for (std::size_t i = 0; i < plan.send1.segments.size(); ++i) {
      const RankId gateway(plan.send1.segments[i].peer);
      const Cell a = amount(plan.send1, i, c);
      to_node_[cells(r * num_nodes_ + exchange_topology_.node_of(gateway).index()) + c] = a;
      sum_to_node_[own] += a;
    }
    for (std::size_t i = 0; i < plan.recv1.segments.size(); ++i)
      sum_hop1_in_[own] += amount(plan.recv1, i, c);
    // What others send here, where only this plan is known; their own plans say the same.
    for (std::size_t i = 0; i < plan.recv1.segments.size(); ++i) {
      const auto source = at(plan.recv1.segments[i].source);
      to_node_[cells(source * num_nodes_ + exchange_topology_.node_of(self).index()) + c] =
          amount(plan.recv1, i, c);
    }
    for (std::size_t i = 0; i < plan.send2.segments.size(); ++i) {
      const Segment& seg = plan.send2.segments[i];
      const Cell a = amount(plan.send2, i, c);
      if (seg.source == self.value) {
        to_rank_[cells(pair(self, RankId(seg.peer))) + c] = a;
        if (seg.peer != self.value) sum_to_others_[own] += a;
      } else {
        handed_on_[cells(pair(self, RankId(seg.peer))) + c] += a;
        sum_handed_on_[own] += a;
      }
    }
    const auto t0 = at(chunk_begin(plan.num_tokens, static_cast<std::int32_t>(c), num_chunks_));
    const auto t1 = at(chunk_begin(plan.num_tokens, static_cast<std::int32_t>(c) + 1, num_chunks_));
    own_partials_[own].rows = plan.own_partial_ptr[t1] - plan.own_partial_ptr[t0];
    std::vector<Cell> through(num_members_);
    for (std::size_t k = 0; k < kClasses; ++k) received_[cells(r * kClasses + k) + c] = {};
    for (std::int32_t l = 0; l < plan.num_local_slots; ++l)
      for (std::size_t k = 0; k < kClasses; ++k)
        slot_rows_[cells((at(slot_ptr_[r]) + at(l)) * kClasses + k) + c] = 0;
    for (std::size_t i = 0; i < plan.recv2.segments.size(); ++i) {
      const RankId source(plan.recv2.segments[i].source);
      const auto k = static_cast<std::size_t>(source_class(*topology_, self, source));
      const Cell a = amount(plan.recv2, i, c);
      received_[cells(r * kClasses + k) + c] += a;
      if (exchange_topology_.same_node(source, self)) {
        to_rank_[cells(pair(source, self)) + c] = a;
      } else {
        through[member(exchange_topology_.gateway(source, exchange_topology_.node_of(self)))] += a;
      }
      const std::size_t row = i * (chunks + 1) + c;
      for (std::int32_t q = plan.recv2.chunk_route[row]; q < plan.recv2.chunk_route[row + 1]; ++q)
        slot_rows_[cells((at(slot_ptr_[r]) + at(plan.recv2.slot[at(q)])) * kClasses + k) + c] += 1;
    }
    if (num_nodes_ > 1)
      for (const std::int32_t g : exchange_topology_.ranks_of(exchange_topology_.node_of(self)))
        handed_on_[cells(pair(RankId(g), self)) + c] = through[member(RankId(g))];
  }
}

namespace {

// The probability that a token visits a group of experts (those of a rank, of a node) at all, given how many tokens visit
// each expert. Where a token visits K experts, K whole, visits are Poisson sampling given its size (Hajek 1964): a
// token that visits one expert has one visit less for the others. Taken as independent instead, uniform top-2 of 16 over
// two ranks would come out 14% low. Where routes are not a multiple of tokens they are ragged, and taken as independent.
//
// P(j in g | K) = [z^K-j] prod_{h != g} P_h(z) [z^j] P_g(z) / [z^K] prod_h P_h(z),  P_h(z) = prod_e (1 - p_e + p_e z).
//
// The p_e are visits, where Poisson sampling would need chances that lead to them; so a group's probability is scaled by
// its visits over those of the formula, which makes groups of one expert exact.
class Visits {
 public:
  void begin(std::int64_t num_tokens, std::int64_t num_routes) {
    const bool whole =
        num_tokens > 0 && num_routes % num_tokens == 0 && num_routes / num_tokens <= kMostFixed;
    degree_ = whole ? static_cast<std::size_t>(num_routes / num_tokens) : 0;
    groups_.clear();
    node_of_.clear();
    group_visits_.clear();
    elsewhere_.assign(degree_ + 1, 0);
    elsewhere_[0] = 1;
  }
  std::size_t new_group(std::size_t node) {
    node_of_.push_back(node);
    group_visits_.push_back(0);
    groups_.resize(groups_.size() + degree_ + 1, 0);
    poly(groups_, node_of_.size() - 1)[0] = 1;
    return node_of_.size() - 1;
  }
  void add(std::size_t group, double p) {
    add(poly(groups_, group), p);
    group_visits_[group] += p;
  }
  void add_elsewhere(double p) { add(elsewhere_.data(), p); }

  // double [groups] and [num_nodes]: of each group, and of each node's groups together.
  void finish(std::size_t num_nodes, std::vector<double>& of_group, std::vector<double>& of_node) {
    visited(groups_, group_visits_, of_group);
    nodes_.assign(num_nodes * (degree_ + 1), 0);
    for (std::size_t n = 0; n < num_nodes; ++n) poly(nodes_, n)[0] = 1;
    node_visits_.assign(num_nodes, 0);
    for (std::size_t g = 0; g < node_of_.size(); ++g) {
      multiply(poly(nodes_, node_of_[g]), poly(groups_, g), poly(nodes_, node_of_[g]));
      node_visits_[node_of_[g]] += group_visits_[g];
    }
    visited(nodes_, node_visits_, of_node);
  }

 private:
  static constexpr std::int64_t kMostFixed = 64;

  double* poly(std::vector<double>& polys, std::size_t i) { return polys.data() + i * (degree_ + 1); }
  void add(double* a, double p) const {
    for (std::size_t j = degree_; j > 0; --j) a[j] = a[j] * (1 - p) + a[j - 1] * p;
    a[0] *= 1 - p;
  }
  // out may be a.
  void multiply(const double* a, const double* b, double* out) const {
    for (std::size_t j = degree_ + 1; j-- > 0;) {
      double sum = 0;
      for (std::size_t i = 0; i <= j; ++i) sum += a[i] * b[j - i];
      out[j] = sum;
    }
  }
  void visited(std::vector<double>& polys, const std::vector<double>& visits, std::vector<double>& out) {
    const std::size_t n = polys.size() / (degree_ + 1);
    out.resize(n);
    for (std::size_t g = 0; g < n; ++g) out[g] = 1 - poly(polys, g)[0];
    if (degree_ == 0) return;
    // before_[g] is the product of what comes before g; `after` of what comes behind it.
    before_.resize((n + 1) * (degree_ + 1));
    std::copy(elsewhere_.begin(), elsewhere_.end(), before_.begin());
    for (std::size_t g = 0; g < n; ++g) multiply(poly(before_, g), poly(polys, g), poly(before_, g + 1));
    const double all = poly(before_, n)[degree_];
    if (!(all > 0)) return;
    after_.assign(degree_ + 1, 0);
    after_[0] = 1;
    for (std::size_t g = n; g-- > 0;) {
      const double* of = poly(polys, g);
      double none = 0, expected = 0;
      for (std::size_t j = 0; j <= degree_; ++j) {  // j visits elsewhere
        double others = 0;
        for (std::size_t i = 0; i <= j; ++i) others += poly(before_, g)[i] * after_[j - i];
        const std::size_t here = degree_ - j;
        expected += static_cast<double>(here) * others * of[here] / all;
        if (here == 0) none = others * of[0] / all;
      }
      out[g] = std::clamp((1 - none) * visits[g] / expected, 0.0, std::min(1.0, visits[g]));
      multiply(after_.data(), poly(polys, g), after_.data());
    }
  }

  std::size_t degree_ = 0;  // experts a token visits; 0: ragged
  std::vector<std::size_t> node_of_;
  std::vector<double> group_visits_, node_visits_;                   // a token's, mean
  std::vector<double> groups_, nodes_, elsewhere_, before_, after_;  // polynomials in z up to z^degree_
};

}  // namespace

PlanSummary::PlanSummary(const Topology& topology, Exchange exchange, const Placement& placement,
                         std::span<const std::int64_t> gathered)
    : topology_(&topology), exchange_topology_(exchange_topology(topology, exchange)), exchange_(exchange) {
  const std::size_t ranks = at(topology.num_ranks()), experts = at(placement.num_experts);
  Require(placement.num_ranks == topology.num_ranks(), ErrorCode::kInvalidArgument, "placement is for ",
          placement.num_ranks, " ranks, topology has ", ranks);
  Require(gathered.size() == ranks * (experts + 2), ErrorCode::kInvalidArgument, "demand has ",
          gathered.size(), " values, must be ", ranks * (experts + 2));
  std::vector<std::int32_t> slots(ranks);
  for (std::size_t r = 0; r < ranks; ++r)
    slots[r] = placement.num_slots_of(RankId(static_cast<std::int32_t>(r)));
  make_room(slots);

  std::vector<std::int64_t> demand(ranks * experts);
  for (std::size_t r = 0; r < ranks; ++r) {
    tokens_[r] = gathered[r * (experts + 2)];
    Require(tokens_[r] >= 0, ErrorCode::kInvalidArgument, "rank ", r, " has ", tokens_[r], " tokens");
    for (std::size_t e = 0; e < experts; ++e) {
      demand[r * experts + e] = gathered[r * (experts + 2) + 2 + e];
      Require(demand[r * experts + e] >= 0 && demand[r * experts + e] <= tokens_[r],
              ErrorCode::kInvalidArgument, "rank ", r, " has ", demand[r * experts + e], " routes to expert ",
              e, " and ", tokens_[r], " tokens; a token visits an expert once at most");
    }
  }
  std::vector<std::int32_t> slot_of(ranks * experts);
  choose_all_replicas(placement, topology, demand, slot_of);

  // By rank and by node of this source's tokens.
  std::vector<std::size_t> rank_group(ranks, 0), node_group(at(topology.num_nodes()), 0), to_ranks, to_nodes;
  std::vector<double> routes_rank(ranks, 0), routes_node(at(topology.num_nodes()), 0);
  Visits visits;
  std::vector<double> visit_rank, visit_node;
  for (std::size_t s = 0; s < ranks; ++s) {
    const RankId source(static_cast<std::int32_t>(s));
    const auto tokens = static_cast<double>(tokens_[s]);
    const std::span<const std::int64_t> routes_of = std::span(demand).subspan(s * experts, experts);
    to_ranks.clear();
    to_nodes.clear();
    visits.begin(tokens_[s], std::accumulate(routes_of.begin(), routes_of.end(), std::int64_t{0}));
    for (std::size_t e = 0; e < experts; ++e) {
      const auto routes = static_cast<double>(routes_of[e]);
      const std::int32_t slot = slot_of[s * experts + e];
      if (routes == 0) continue;
      if (slot < 0) {
        visits.add_elsewhere(routes / tokens);
        continue;
      }
      const RankId d(placement.slot_rank[at(slot)]);
      const std::size_t n = topology.node_of(d).index();
      if (routes_node[n] == 0) {
        node_group[n] = to_nodes.size();
        to_nodes.push_back(n);
      }
      if (routes_rank[d.index()] == 0) {
        rank_group[d.index()] = visits.new_group(node_group[n]);
        to_ranks.push_back(d.index());
      }
      routes_rank[d.index()] += routes;
      routes_node[n] += routes;
      visits.add(rank_group[d.index()], routes / tokens);
      const auto k = static_cast<std::size_t>(source_class(topology, d, source));
      slot_rows_[(at(slot_ptr_[d.index()]) + at(placement.slot_local_index[at(slot)])) * kClasses + k] +=
          routes;
    }
    visits.finish(to_nodes.size(), visit_rank, visit_node);
    for (const std::size_t n : to_nodes) {
      const Cell a{tokens * visit_node[node_group[n]], routes_node[n]};
      if (exchange == Exchange::kGateway && n != topology.node_of(source).index()) {
        to_node_[s * num_nodes_ + n] = a;
        sum_to_node_[s] += a;
        const RankId gateway = topology.gateway(source, NodeId(static_cast<std::int32_t>(n)));
        sum_hop1_in_[gateway.index()] += a;
      } else {
        own_partials_[s].rows += a.rows;
      }
      routes_node[n] = 0;
    }
    for (const std::size_t d : to_ranks) {
      const RankId to(static_cast<std::int32_t>(d));
      const Cell a{tokens * visit_rank[rank_group[d]], routes_rank[d]};
      received_[d * kClasses + static_cast<std::size_t>(source_class(topology, to, source))] += a;
      if (exchange_topology_.same_node(source, to)) {
        to_rank_[pair(source, to)] = a;
        if (d != s) sum_to_others_[s] += a;
      } else {
        const RankId gateway = topology.gateway(source, topology.node_of(to));
        handed_on_[pair(gateway, to)] += a;
        sum_handed_on_[gateway.index()] += a;
      }
      routes_rank[d] = 0;
    }
  }
}

std::int64_t PlanSummary::most_tokens() const {
  return *std::max_element(tokens_.begin(), tokens_.end());
}

// ---- asking ----------------------------------------------------------------------------------------------------------

PlanSummary::Amount PlanSummary::share(const std::vector<Cell>& values, std::size_t index, std::int32_t chunk,
                                       std::int32_t num_chunks) const {
  if (exact()) return values[cells(index) + at(chunk)];
  const Cell& all = values[index];
  return {all.rows / num_chunks, all.routes / num_chunks};
}

PlanSummary::Amount PlanSummary::to_node(RankId source, NodeId node, std::int32_t chunk,
                                         std::int32_t num_chunks) const {
  if (to_node_.empty()) return {};
  return share(to_node_, source.index() * num_nodes_ + node.index(), chunk, num_chunks);
}
PlanSummary::Amount PlanSummary::to_rank(RankId source, RankId to, std::int32_t chunk,
                                         std::int32_t num_chunks) const {
  if (!exchange_topology_.same_node(source, to)) return {};
  return share(to_rank_, pair(source, to), chunk, num_chunks);
}
PlanSummary::Amount PlanSummary::handed_on(RankId gateway, RankId to, std::int32_t chunk,
                                           std::int32_t num_chunks) const {
  if (handed_on_.empty() || !exchange_topology_.same_node(gateway, to)) return {};
  return share(handed_on_, pair(gateway, to), chunk, num_chunks);
}
PlanSummary::Amount PlanSummary::received(RankId rank, SourceClass source, std::int32_t chunk,
                                          std::int32_t num_chunks) const {
  return share(received_, rank.index() * kClasses + static_cast<std::size_t>(source), chunk, num_chunks);
}
double PlanSummary::slot_rows(RankId rank, SourceClass source, std::int32_t slot, std::int32_t chunk,
                              std::int32_t num_chunks) const {
  const std::size_t i =
      (at(slot_ptr_[rank.index()]) + at(slot)) * kClasses + static_cast<std::size_t>(source);
  return exact() ? slot_rows_[cells(i) + at(chunk)] : slot_rows_[i] / num_chunks;
}

PlanSummary::Sums PlanSummary::sums(RankId rank, std::int32_t chunk, std::int32_t num_chunks) const {
  const std::size_t r = rank.index();
  return {share(sum_to_node_, r, chunk, num_chunks), share(sum_to_others_, r, chunk, num_chunks),
          share(sum_handed_on_, r, chunk, num_chunks), share(sum_hop1_in_, r, chunk, num_chunks),
          share(own_partials_, r, chunk, num_chunks).rows};
}

void PlanSummary::op_work(const Template& shape, PassKind pass, const Op& op, RankId rank, std::int32_t peer,
                          const LayerShape& layer, OpWork& out) const {
  out.clear();
  const std::int32_t chunks = shape.schedule.num_chunks, c = op.chunk;
  Require(!exact() || chunks == num_chunks_, ErrorCode::kInvalidArgument, "the template has ", chunks,
          " chunks, the summary is of plans with ", num_chunks_);
  const auto row = static_cast<double>(layer.row_bytes()), sum_row = static_cast<double>(layer.sum_bytes());
  const auto out_row = static_cast<double>(layer.hidden) * static_cast<double>(size_of(layer.dtype));
  const SourceSplit split = shape.schedule.split();
  constexpr SourceClass kAll[] = {SourceClass::kAcross, SourceClass::kInNode, SourceClass::kSelf};
  const auto block_rows = [&] {
    const std::int32_t slots = num_slots(rank);
    const auto end = static_cast<std::int32_t>(op.end_slot(slots));
    for (auto l = static_cast<std::int32_t>(op.begin_slot(slots)); l < end; ++l) {
      double rows = 0;
      for (const SourceClass k : kAll)
        if (part_of(split, k) == op.part) rows += slot_rows(rank, k, l, c, chunks);
      out.group_rows.push_back(rows);
    }
  };
  const auto block = [&] {
    Amount sum;
    for (const SourceClass k : kAll)
      if (part_of(split, k) == op.part) sum += received(rank, k, c, chunks);
    return sum;
  };
  switch (op.kind) {
    case OpKind::kReady:
      out.num_messages = 1;
      return;
    case OpKind::kPack:
      out.bytes = 2 * row *
                  (op.hop == 1   ? sums(rank, c, chunks).to_nodes.rows
                   : op.hop == 2 ? sums(rank, c, chunks).to_others.rows
                                 : to_rank(rank, rank, c, chunks).rows);
      return;
    case OpKind::kForward:
      out.bytes = 2 * row * sums(rank, c, chunks).handed_on.rows;
      return;
    case OpKind::kPut: {
      const RankId to(peer);
      const Amount a = op.hop == 1    ? to_node(rank, topology_->node_of(to), c, chunks)
                       : op.handed_on ? handed_on(rank, to, c, chunks)
                                      : to_rank(rank, to, c, chunks);
      out.bytes = a.rows * row;
      out.num_messages = op.raises;
      return;
    }
    case OpKind::kReturn: {
      const RankId to(peer);
      const Amount a = op.hop == 1    ? to_node(to, topology_->node_of(rank), c, chunks)
                       : op.handed_on ? handed_on(to, rank, c, chunks)
                                      : to_rank(to, rank, c, chunks);
      out.bytes = a.rows * sum_row + (pass == PassKind::kBackward ? 4 * a.routes : 0);
      out.num_messages = op.raises;
      return;
    }
    case OpKind::kExpertGemm1:
    case OpKind::kExpertGemm2:
    case OpKind::kExpertDgrad1:
    case OpKind::kExpertDgrad2:
      block_rows();
      return;
    case OpKind::kActivationBackward:
      block_rows();
      for (const double rows : out.group_rows) out.rows += rows;
      return;
    case OpKind::kReduce: {
      const Amount a = block();
      out.bytes = a.routes * out_row + a.rows * sum_row;
      return;
    }
    case OpKind::kNodeReduce: {
      const Sums s = sums(rank, c, chunks);
      out.bytes =
          sum_row * (op.handed_on ? s.handed_on.rows + s.hop1_in.rows
                                  : s.to_others.rows + to_rank(rank, rank, c, chunks).rows + s.own_partials);
      return;
    }
    case OpKind::kUnpack: {
      const Sums s = sums(rank, c, chunks);
      const auto t = static_cast<double>(chunk_begin(tokens(rank), c + 1, chunks) -
                                         chunk_begin(tokens(rank), c, chunks));
      out.bytes = sum_row * (s.own_partials + s.to_nodes.rows) + out_row * t;
      return;
    }
    case OpKind::kWgrad: {
      const std::int64_t slots = num_slots(rank);
      for (std::int64_t l = op.begin_slot(slots), end = op.end_slot(slots); l < end; ++l) {
        double rows = 0;
        for (const SourceClass k : kAll)
          for (std::int32_t i = 0; i < chunks; ++i)
            rows += slot_rows(rank, k, static_cast<std::int32_t>(l), i, chunks);
        out.group_rows.push_back(rows);
      }
      return;
    }
  }
}

}  // namespace sluice
