// A dispatch plan built the plain way: one vector a destination, a branch a route. It writes down once more, in other
// words, what PlanBuilder must produce, and is what PlanBuilder's speed is measured against. It takes part in the same
// exchanges and reads and writes the same messages, but trusts them: it neither computes nor compares hashes and checks
// nothing that comes from peers, so the comparison of times is in its favour.
//
// Ownership: views of the routing are kept until take_headers2 returned. Thread-safety: one thread.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/scheduler/plan.hpp"

namespace sluice::testing {

class PlainPlanner {
 public:
  PlainPlanner(RankId rank, const Topology& topology, const Placement& placement, PlanOptions options)
      : rank_(rank.value),
        topology_(topology),
        placement_(placement),
        options_(options),
        exchange_(options.exchange == Exchange::kGateway ? topology
                                                         : Topology::uniform(topology.num_ranks(), 1)),
        my_node_(exchange_.node_of(rank)),
        members_(exchange_.ranks_of(my_node_)),
        to_node_(exchange_.num_nodes()),
        to_rank_(exchange_.num_ranks()) {}

  void begin(const RoutingView& routing, Plan& plan) {
    validate(routing);
    routing_ = routing;
    plan_ = &plan;
    plan.rank = RankId(rank_);
    plan.options = options_;
    plan.num_tokens = static_cast<std::int32_t>(routing.num_tokens());
    plan.num_routes = static_cast<std::int32_t>(routing.num_routes());
    plan.num_experts = routing.num_experts;
    plan.num_local_slots = placement_.num_slots_of(RankId(rank_));
    plan.placement_version = placement_.version;
    summary_.assign(routing.num_experts + 2, 0);
    summary_[0] = routing.num_tokens();
    for (const std::int32_t e : routing.expert) ++summary_[e + 2];
  }
  const std::vector<std::int64_t>& summary() const { return summary_; }  // without the hash at [1]

  void take_summaries(std::span<const std::int64_t> gathered) {
    const std::int32_t num_experts = plan_->num_experts, num_ranks = exchange_.num_ranks();
    plan_->source_tokens.clear();
    std::vector<std::int64_t> demand;
    for (std::int32_t r = 0; r < num_ranks; ++r) {
      const auto summary = gathered.subspan(r * (num_experts + 2), num_experts + 2);
      plan_->source_tokens.push_back(static_cast<std::int32_t>(summary[0]));
      demand.insert(demand.end(), summary.begin() + 2, summary.end());
    }
    slot_of_.resize(num_experts);
    choose_replicas(placement_, topology_, demand, RankId(rank_), slot_of_);

    // Each route goes to the list of its node, and to the list of its rank if that is in this node.
    for (Block& b : to_node_) b.clear();
    for (Block& b : to_rank_) b.clear();
    rows_of_rank_.assign(num_ranks, 0);
    routes_of_rank_.assign(num_ranks, 0);
    last_token_.assign(num_ranks, -1);
    everywhere_.clear();
    for (std::int32_t t = 0; t < plan_->num_tokens; ++t)
      for (std::int64_t i = routing_.row_ptr[t]; i < routing_.row_ptr[t + 1]; ++i) {
        const std::int32_t slot = slot_of_[routing_.expert[i]];
        const auto route = static_cast<std::int32_t>(i);
        if (slot < 0) {
          everywhere_.add(t, t, route, 0, routing_.weight[i]);
          continue;
        }
        const std::int32_t owner = placement_.slot_rank[slot];
        ++routes_of_rank_[owner];
        if (last_token_[owner] != t) {
          last_token_[owner] = t;
          ++rows_of_rank_[owner];
        }
        const NodeId node = exchange_.node_of(RankId(owner));
        if (node == my_node_) {
          to_rank_[owner].add(t, t, route, placement_.slot_local_index[slot], routing_.weight[i]);
        } else {
          to_node_[node.value].add(t, t, route, slot, routing_.weight[i]);
        }
      }
    counts_.assign(num_ranks * PlanBuilder::kCountsPerPeer, 0);
    for (std::int32_t r = 0; r < num_ranks; ++r) {
      counts_[r * PlanBuilder::kCountsPerPeer] = rows_of_rank_[r];
      counts_[r * PlanBuilder::kCountsPerPeer + 1] = routes_of_rank_[r];
    }
    for (std::int32_t n = 0; n < exchange_.num_nodes(); ++n) {
      if (n == my_node_.value) continue;
      const std::int32_t gateway = exchange_.gateway(RankId(rank_), NodeId(n)).value;
      counts_[gateway * PlanBuilder::kCountsPerPeer + 3] = to_node_[n].num_rows();
      counts_[gateway * PlanBuilder::kCountsPerPeer + 4] = to_node_[n].num_routes();
    }
  }
  const std::vector<std::int64_t>& counts() const { return counts_; }  // without the hashes at [2] and [5]

  void take_counts(std::span<const std::int64_t> received) {
    const std::int32_t num_ranks = exchange_.num_ranks();
    offsets_.assign(num_ranks * PlanBuilder::kOffsetsPerPeer, 0);
    plan_->recv1.segments.clear();
    plan_->recv2.segments.clear();
    std::int64_t rows1 = 0, routes1 = 0, rows2 = 0, routes2 = 0;
    for (std::int32_t r = 0; r < num_ranks; ++r) {
      const auto in = received.subspan(r * PlanBuilder::kCountsPerPeer, PlanBuilder::kCountsPerPeer);
      const std::int64_t begins[] = {rows2, routes2, rows1, routes1};
      std::copy(std::begin(begins), std::end(begins), &offsets_[r * PlanBuilder::kOffsetsPerPeer]);
      if (in[0] > 0)
        plan_->recv2.segments.push_back(
            segment(exchange_.gateway(RankId(r), my_node_).value, r, in[0], in[1], rows2, routes2));
      if (in[3] > 0) plan_->recv1.segments.push_back(segment(r, r, in[3], in[4], rows1, routes1));
      rows2 += in[0];
      routes2 += in[1];
      rows1 += in[3];
      routes1 += in[4];
    }
  }
  const std::vector<std::int64_t>& offsets() const { return offsets_; }

  void take_offsets(std::span<const std::int64_t> received) {
    const auto offset = [&](std::int32_t peer, int k) {
      return static_cast<std::int32_t>(received[peer * PlanBuilder::kOffsetsPerPeer + k]);
    };
    peer_row_begin_.clear();
    peer_route_begin_.clear();
    for (std::int32_t r = 0; r < exchange_.num_ranks(); ++r) {
      peer_row_begin_.push_back(offset(r, 0));
      peer_route_begin_.push_back(offset(r, 1));
    }
    start_list(plan_->send1);
    words1_.clear();
    for (std::int32_t n = 0; n < exchange_.num_nodes(); ++n) {
      const Block& block = to_node_[n];
      if (block.num_rows() == 0) continue;
      const std::int32_t gateway = exchange_.gateway(RankId(rank_), NodeId(n)).value;
      std::vector<std::int32_t>& words = words1_.emplace_back(gateway, std::vector<std::int32_t>{}).second;
      for (const std::int32_t d : exchange_.ranks_of(NodeId(n)))
        words.insert(words.end(), {rows_of_rank_[d], routes_of_rank_[d], offset(d, 0), offset(d, 1)});
      append_segment(plan_->send1, words, block, gateway, rank_, offset(gateway, 2), offset(gateway, 3));
    }
    std::sort(words1_.begin(), words1_.end());
    finish_list(plan_->send1);
    EverywhereRoutes& out = plan_->everywhere;
    const auto n = static_cast<std::size_t>(everywhere_.num_routes());
    fill(out.route, everywhere_.route);
    fill(out.weight, everywhere_.weight);
    out.token.resize(n);
    out.expert.resize(n);
    std::int32_t row = -1;
    for (std::size_t i = 0; i < n; ++i) {
      if (everywhere_.first[i]) ++row;
      out.token[i] = everywhere_.token[row];
      out.expert[i] = routing_.expert[everywhere_.route[i]];
    }
  }
  // [messages] peer and words, peers ascending
  using Messages = std::vector<std::pair<std::int32_t, std::vector<std::int32_t>>>;
  const Messages& headers1() const { return words1_; }

  void take_headers1(std::span<const std::int32_t> words) {
    ReceiveList& recv1 = plan_->recv1;
    std::vector<Block>& handed_on = handed_on_;  // [source, member]
    handed_on.resize(members_.size() * recv1.segments.size());
    for (Block& b : handed_on) b.clear();
    std::vector<const std::int32_t*> relay;
    start_list(recv1);
    for (std::size_t i = 0; i < recv1.segments.size(); ++i) {
      Segment& in = recv1.segments[i];
      relay.push_back(words.data());
      words = words.subspan(4 * members_.size());
      words = read_segment(
          recv1, in, words,
          [&](std::int32_t row, std::int32_t route, std::int32_t token, std::int32_t slot, float weight) {
            const RankId owner(placement_.slot_rank[slot]);
            handed_on[i * members_.size() + exchange_.local_index(owner)].add(
                plan_->num_tokens + row, token, plan_->num_routes + route, placement_.slot_local_index[slot],
                weight);
            return slot;
          });
    }
    finish_list(recv1);

    start_list(plan_->send2);
    words2_.clear();
    for (std::size_t m = 0; m < members_.size(); ++m) {
      const std::int32_t d = members_[m];
      std::vector<std::int32_t> out;
      const auto append_own = [&] {
        append_segment(plan_->send2, out, to_rank_[d], d, rank_, peer_row_begin_[d], peer_route_begin_[d]);
      };
      bool own_done = false;
      for (std::size_t i = 0; i < recv1.segments.size(); ++i) {
        const std::int32_t source = recv1.segments[i].source;
        if (!own_done && source > rank_) {
          append_own();
          own_done = true;
        }
        append_segment(plan_->send2, out, handed_on[i * members_.size() + m], d, source, relay[i][4 * m + 2],
                       relay[i][4 * m + 3]);
      }
      if (!own_done) append_own();
      if (!out.empty()) words2_.emplace_back(d, std::move(out));
    }
    finish_list(plan_->send2);
  }
  const Messages& headers2() const { return words2_; }

  void take_headers2(std::span<const std::int32_t> words) {
    Plan& plan = *plan_;
    ReceiveList& recv2 = plan.recv2;
    // Blocks come by gateway, then source; the list goes by source.
    std::vector<std::span<const std::int32_t>> block(recv2.segments.size());
    for (const std::int32_t gateway : members_)
      for (std::size_t i = 0; i < recv2.segments.size(); ++i) {
        const Segment& seg = recv2.segments[i];
        if (seg.peer != gateway) continue;
        block[i] = words.first(2 + seg.num_rows + 2 * std::size_t(seg.num_routes));
        words = words.subspan(block[i].size());
      }
    const std::int32_t num_slots = plan.num_local_slots, num_chunks = options_.num_chunks;
    std::vector<std::vector<Work>>& group = group_;
    group.resize(num_slots * options_.num_blocks());
    for (auto& list : group) list.clear();
    start_list(recv2);
    for (std::size_t i = 0; i < recv2.segments.size(); ++i) {
      const std::int32_t source = recv2.segments[i].source;
      const std::int64_t num_tokens = plan.source_tokens[source];
      std::int32_t part = 0;
      if (options_.split == SourceSplit::kSelfApart) part = source == rank_ ? 1 : 0;
      if (options_.split == SourceSplit::kByDistance)
        part = source == rank_ ? 2 : topology_.same_node(RankId(source), RankId(rank_)) ? 1 : 0;
      read_segment(
          recv2, recv2.segments[i], block[i],
          [&](std::int32_t row, std::int32_t route, std::int32_t token, std::int32_t slot, float weight) {
            std::int32_t chunk = 0;
            while (token >= chunk_begin(num_tokens, chunk + 1, num_chunks)) ++chunk;
            group[(part * num_chunks + chunk) * num_slots + slot].push_back({row, route, weight});
            return slot;
          });
    }
    finish_list(recv2);
    std::vector<std::int64_t> group_ptr = {0};
    std::vector<std::int32_t>&expert_row = list_row_, &position_of_route = list_route_;
    std::vector<float>& expert_weight = list_weight_;
    expert_row.clear();
    expert_weight.clear();
    position_of_route.resize(recv2.slot.size());
    for (const auto& list : group) {
      for (const Work& w : list) {
        position_of_route[w.route] = static_cast<std::int32_t>(expert_row.size());
        expert_row.push_back(w.row);
        expert_weight.push_back(w.weight);
      }
      group_ptr.push_back(static_cast<std::int64_t>(expert_row.size()));
    }
    std::vector<std::int64_t> slot_ptr = {0};
    std::vector<std::int32_t> wgrad_position, wgrad_row;
    for (std::int32_t l = 0; l < num_slots; ++l) {
      std::vector<Work> all;
      for (std::int32_t b = 0; b < options_.num_blocks(); ++b)
        all.insert(all.end(), group[b * num_slots + l].begin(), group[b * num_slots + l].end());
      slot_ptr.push_back(slot_ptr.back() + static_cast<std::int64_t>(all.size()));
      if (options_.num_blocks() == 1) continue;
      std::sort(all.begin(), all.end(), [](const Work& a, const Work& b) { return a.route < b.route; });
      for (const Work& w : all) {
        wgrad_position.push_back(position_of_route[w.route]);
        wgrad_row.push_back(w.row);
      }
    }
    fill(plan.group_ptr, group_ptr);
    fill(plan.expert_row, expert_row);
    fill(plan.expert_weight, expert_weight);
    fill(plan.position_of_route, position_of_route);
    fill(plan.slot_ptr, slot_ptr);
    fill(plan.wgrad_position, wgrad_position);
    fill(plan.wgrad_row, wgrad_row);

    build_reduction();
    for (ReceiveList* list : {&plan.recv1, &plan.recv2})
      cut(
          *list, [&](std::int32_t row) { return list->token[row]; },
          [&](std::int32_t row) { return list->route_ptr[row + 1] - list->route_ptr[row]; });
    const auto token_of = [&](std::int32_t stage) {
      return stage < plan.num_tokens ? stage : plan.recv1.token[stage - plan.num_tokens];
    };
    for (SendList* list : {&plan.send1, &plan.send2}) {
      const std::vector<std::int32_t>& routes_of_row =
          list == &plan.send1 ? routes_of_row1_ : routes_of_row2_;
      cut(
          *list, [&](std::int32_t row) { return token_of(list->row[row]); },
          [&](std::int32_t row) { return routes_of_row[row]; });
    }
    count_traffic();
  }

 private:
  struct Work {
    std::int32_t row, route;
    float weight;
  };

  // Rows of one home rank on their way to one destination.
  struct Block {
    std::vector<std::int32_t> row, token;   // [rows]
    std::vector<std::int32_t> routes;       // [rows] routes of each row
    std::vector<std::int32_t> route, slot;  // [routes]
    std::vector<float> weight;              // [routes]
    std::vector<char> first;                // [routes] whether a row starts here

    void clear() {
      row.clear();
      token.clear();
      routes.clear();
      route.clear();
      slot.clear();
      weight.clear();
      first.clear();
    }
    void add(std::int32_t stage_row, std::int32_t source_token, std::int32_t stage_route, std::int32_t s,
             float w) {
      const bool starts = row.empty() || row.back() != stage_row;
      if (starts) {
        row.push_back(stage_row);
        token.push_back(source_token);
        routes.push_back(0);
      }
      ++routes.back();
      route.push_back(stage_route);
      slot.push_back(s);
      weight.push_back(w);
      first.push_back(starts);
    }
    std::int32_t num_rows() const { return static_cast<std::int32_t>(row.size()); }
    std::int32_t num_routes() const { return static_cast<std::int32_t>(route.size()); }
  };

  static constexpr std::int32_t kFirst = std::int32_t{1} << 30;  // as in PlanBuilder's messages

  template <typename T>
  static void fill(GrowArray<T>& to, const std::vector<T>& from) {
    std::copy(from.begin(), from.end(), to.resize(from.size()));
  }
  static Segment segment(std::int32_t peer, std::int32_t source, std::int64_t rows, std::int64_t routes,
                         std::int64_t row_begin, std::int64_t route_begin) {
    Segment seg;
    seg.peer = peer;
    seg.source = source;
    seg.num_rows = static_cast<std::int32_t>(rows);
    seg.num_routes = static_cast<std::int32_t>(routes);
    seg.row_begin = static_cast<std::int32_t>(row_begin);
    seg.route_begin = static_cast<std::int32_t>(route_begin);
    return seg;
  }

  // Send lists grow in vectors and are copied when complete.
  void start_list(SendList& list) {
    list.segments.clear();
    list_row_.clear();
    list_route_.clear();
    list_routes_of_row_.clear();
  }
  void append_segment(SendList& list, std::vector<std::int32_t>& words, const Block& block, std::int32_t peer,
                      std::int32_t source, std::int32_t peer_row_begin, std::int32_t peer_route_begin) {
    if (block.num_rows() == 0) return;
    Segment seg = segment(peer, source, block.num_rows(), block.num_routes(), std::ssize(list_row_),
                          std::ssize(list_route_));
    seg.peer_row_begin = peer_row_begin;
    seg.peer_route_begin = peer_route_begin;
    list.segments.push_back(seg);
    list_row_.insert(list_row_.end(), block.row.begin(), block.row.end());
    list_route_.insert(list_route_.end(), block.route.begin(), block.route.end());
    list_routes_of_row_.insert(list_routes_of_row_.end(), block.routes.begin(), block.routes.end());
    words.insert(words.end(), {seg.row_begin, seg.route_begin});
    for (std::int32_t i = 0; i < block.num_routes(); ++i) {
      words.push_back(block.slot[i] | (block.first[i] ? kFirst : 0));
      words.push_back(std::bit_cast<std::int32_t>(block.weight[i]));
    }
    words.insert(words.end(), block.token.begin(), block.token.end());
  }
  void finish_list(SendList& list) {
    fill(list.row, list_row_);
    fill(list.route, list_route_);
    (&list == &plan_->send1 ? routes_of_row1_ : routes_of_row2_) = list_routes_of_row_;
  }

  void start_list(ReceiveList&) {
    list_token_.clear();
    list_ptr_.assign(1, 0);
    list_slot_.clear();
    list_weight_.clear();
  }
  // Reads a segment's block; visit(row, route, token, slot, weight) sees each route. Returns the words behind it.
  template <typename Visit>
  std::span<const std::int32_t> read_segment(ReceiveList&, Segment& seg, std::span<const std::int32_t> words,
                                             Visit&& visit) {
    seg.peer_row_begin = words[0];
    seg.peer_route_begin = words[1];
    const auto pairs = words.subspan(2, 2 * std::size_t(seg.num_routes));
    const auto token = words.subspan(2 + pairs.size(), seg.num_rows);
    std::int32_t row = -1;
    for (std::int32_t q = 0; q < seg.num_routes; ++q) {
      if (pairs[2 * q] & kFirst) {
        ++row;
        list_token_.push_back(token[row]);
        list_ptr_.push_back(list_ptr_.back());
      }
      const float weight = std::bit_cast<float>(pairs[2 * q + 1]);
      const std::int32_t slot = pairs[2 * q] & ~kFirst;
      visit(seg.row_begin + row, seg.route_begin + q, token[row], slot, weight);
      ++list_ptr_.back();
      list_slot_.push_back(slot);
      list_weight_.push_back(weight);
    }
    return words.subspan(2 + seg.num_rows + 2 * std::size_t(seg.num_routes));
  }
  void finish_list(ReceiveList& list) {
    fill(list.token, list_token_);
    fill(list.route_ptr, list_ptr_);
    if (&list == &plan_->recv1) return;
    fill(list.slot, list_slot_);
    fill(list.weight, list_weight_);
  }

  // Partials by (token, node), then one a received row; home adds own partials and returned rows, nodes ascending.
  void build_reduction() {
    Plan& plan = *plan_;
    const std::int32_t num_tokens = plan.num_tokens;
    group_by_row(plan.send2, num_tokens + plan.recv1.num_rows(), sent2_);
    group_by_row(plan.send1, num_tokens, sent1_);
    std::vector<std::int32_t>&position = list_row_, &home_position = list_route_,
    &own_partial_ptr = list_slot_;
    position.clear();
    home_position.clear();
    own_partial_ptr.clear();
    partial_ptr_.clear();
    list_ptr_.assign(1, 0);  // home_ptr
    const auto num_partials = [&] { return static_cast<std::int32_t>(partial_ptr_.size()); };
    // How many partials are own must be known before home can point at those that return behind them.
    std::int32_t num_own = 0;
    for (std::int32_t t = 0; t < num_tokens; ++t)
      for (std::int32_t j = sent2_.ptr[t]; j < sent2_.ptr[t + 1]; ++j)
        if (j == sent2_.ptr[t] || sent2_.node[j] != sent2_.node[j - 1]) ++num_own;
    for (std::int32_t t = 0; t < num_tokens; ++t) {
      own_partial_ptr.push_back(num_partials());
      std::int32_t returned = sent1_.ptr[t];
      for (std::int32_t j = sent2_.ptr[t]; j < sent2_.ptr[t + 1]; ++j) {
        if (j == sent2_.ptr[t] || sent2_.node[j] != sent2_.node[j - 1]) {
          while (returned < sent1_.ptr[t + 1] && sent1_.node[returned] < sent2_.node[j])
            home_position.push_back(num_own + sent1_.row[returned++]);
          home_position.push_back(num_partials());
          partial_ptr_.push_back(std::ssize(position));
        }
        position.push_back(sent2_.row[j]);
      }
      while (returned < sent1_.ptr[t + 1]) home_position.push_back(num_own + sent1_.row[returned++]);
      list_ptr_.push_back(std::ssize(home_position));
    }
    plan.num_own_partials = num_partials();
    own_partial_ptr.push_back(plan.num_own_partials);
    for (std::int32_t stage = num_tokens; stage < num_tokens + plan.recv1.num_rows(); ++stage) {
      partial_ptr_.push_back(std::ssize(position));
      for (std::int32_t j = sent2_.ptr[stage]; j < sent2_.ptr[stage + 1]; ++j)
        position.push_back(sent2_.row[j]);
    }
    partial_ptr_.push_back(std::ssize(position));
    fill(plan.own_partial_ptr, own_partial_ptr);
    fill(plan.partial_ptr, partial_ptr_);
    fill(plan.partial_position, position);
    fill(plan.home_ptr, list_ptr_);
    fill(plan.home_position, home_position);
  }

  // The rows of a send list by the stage row they come from, nodes of their peers ascending.
  struct Grouped {
    std::vector<std::int32_t> ptr, next, row, node;
  };
  void group_by_row(const SendList& list, std::int32_t num_stage_rows, Grouped& out) const {
    std::vector<const Segment*> order;
    for (const Segment& seg : list.segments) order.push_back(&seg);
    const auto node_of = [&](const Segment* seg) { return topology_.node_of(RankId(seg->peer)).value; };
    std::stable_sort(order.begin(), order.end(),
                     [&](const Segment* a, const Segment* b) { return node_of(a) < node_of(b); });
    out.ptr.assign(num_stage_rows + 1, 0);
    for (const std::int32_t stage : list.row) ++out.ptr[stage + 1];
    for (std::int32_t i = 0; i < num_stage_rows; ++i) out.ptr[i + 1] += out.ptr[i];
    out.next.assign(out.ptr.begin(), out.ptr.end());
    out.row.resize(list.row.size());
    out.node.resize(list.row.size());
    for (const Segment* seg : order)
      for (std::int32_t i = seg->row_begin; i < seg->row_begin + seg->num_rows; ++i) {
        const std::int32_t at = out.next[list.row[i]]++;
        out.row[at] = i;
        out.node[at] = node_of(seg);
      }
  }

  // Where each chunk starts in each segment.
  template <typename List, typename TokenOf, typename RoutesOf>
  void cut(List& list, TokenOf&& token_of, RoutesOf&& routes_of) {
    std::vector<std::int32_t> chunk_row, chunk_route;
    for (const Segment& seg : list.segments) {
      std::int32_t row = seg.row_begin;
      std::int64_t route = seg.route_begin;
      for (std::int32_t c = 0; c <= options_.num_chunks; ++c) {
        const std::int64_t bound = chunk_begin(plan_->source_tokens[seg.source], c, options_.num_chunks);
        while (row < seg.row_begin + seg.num_rows && token_of(row) < bound) route += routes_of(row++);
        chunk_row.push_back(row);
        chunk_route.push_back(static_cast<std::int32_t>(route));
      }
    }
    fill(list.chunk_row, chunk_row);
    fill(list.chunk_route, chunk_route);
  }

  void count_traffic() {
    Traffic& traffic = plan_->traffic;
    traffic = {};
    traffic.rows_same_rank = rows_of_rank_[rank_];
    traffic.routes_everywhere = everywhere_.num_routes();
    for (std::int32_t r = 0; r < exchange_.num_ranks(); ++r) {
      if (r == rank_) continue;
      (topology_.same_node(RankId(rank_), RankId(r)) ? traffic.flat_rows_in_node
                                                     : traffic.flat_rows_across_nodes) += routes_of_rank_[r];
    }
    for (const SendList* list : {&plan_->send1, &plan_->send2})
      for (const Segment& seg : list->segments) {
        if (seg.peer == rank_) continue;
        (topology_.same_node(RankId(rank_), RankId(seg.peer)) ? traffic.rows_in_node
                                                              : traffic.rows_across_nodes) += seg.num_rows;
      }
  }

  const std::int32_t rank_;
  const Topology& topology_;
  const Placement& placement_;
  const PlanOptions options_;
  const Topology exchange_;
  const NodeId my_node_;
  const std::vector<std::int32_t> members_;
  RoutingView routing_;
  Plan* plan_ = nullptr;
  std::vector<Block> to_node_, to_rank_;
  Block everywhere_;
  std::vector<std::int32_t> slot_of_, rows_of_rank_, routes_of_rank_, last_token_;
  std::vector<std::int32_t> peer_row_begin_, peer_route_begin_;
  std::vector<std::int64_t> summary_, counts_, offsets_;
  Messages words1_, words2_;
  std::vector<std::int32_t> list_row_, list_route_, list_routes_of_row_, routes_of_row1_, routes_of_row2_;
  std::vector<std::int32_t> list_token_, list_slot_;
  std::vector<std::int64_t> list_ptr_, partial_ptr_;
  std::vector<std::vector<Work>> group_;
  std::vector<Block> handed_on_;
  Grouped sent1_, sent2_;
  std::vector<float> list_weight_;
};

// Names the first part in which two plans differ, or nothing. Weights compare by their bits.
inline std::string first_difference(const Plan& a, const Plan& b) {
  std::string out;
  const auto same = [&](std::string_view name, const auto& x, const auto& y) {
    const auto equal = [](const auto& u, const auto& v) {
      if constexpr (std::is_same_v<std::decay_t<decltype(u)>, float>) {
        return std::bit_cast<std::uint32_t>(u) == std::bit_cast<std::uint32_t>(v);
      } else {
        return u == v;
      }
    };
    if (!out.empty()) return;
    if (x.size() != y.size()) {
      out = str(name, " has ", x.size(), " against ", y.size(), " entries");
      return;
    }
    for (std::size_t i = 0; i < x.size(); ++i)
      if (!equal(x[i], y[i])) {
        out = str(name, "[", i, "] is ", x[i], " against ", y[i]);
        return;
      }
  };
  const auto same_numbers = [&](std::string_view name, std::vector<std::int64_t> x,
                                std::vector<std::int64_t> y) { same(name, x, y); };
  const auto numbers = [](const Plan& p) {
    return std::vector<std::int64_t>{p.rank.value,
                                     p.num_tokens,
                                     p.num_routes,
                                     p.num_experts,
                                     p.num_local_slots,
                                     p.num_own_partials,
                                     static_cast<std::int64_t>(p.placement_version)};
  };
  const auto traffic = [](const Plan& p) {
    const Traffic& t = p.traffic;
    return std::vector<std::int64_t>{t.rows_same_rank,    t.rows_in_node,           t.rows_across_nodes,
                                     t.flat_rows_in_node, t.flat_rows_across_nodes, t.routes_everywhere};
  };
  const auto segments = [](const auto& list) {
    std::vector<std::int64_t> out;
    for (const Segment& s : list.segments)
      out.insert(out.end(), {s.peer, s.source, s.num_rows, s.num_routes, s.row_begin, s.route_begin,
                             s.peer_row_begin, s.peer_route_begin});
    return out;
  };
  const auto same_sent = [&](std::string_view name, const SendList& x, const SendList& y) {
    same_numbers(str(name, ".segments (as numbers)"), segments(x), segments(y));
    same(str(name, ".row"), x.row, y.row);
    same(str(name, ".route"), x.route, y.route);
    same(str(name, ".chunk_row"), x.chunk_row, y.chunk_row);
    same(str(name, ".chunk_route"), x.chunk_route, y.chunk_route);
  };
  const auto same_received = [&](std::string_view name, const ReceiveList& x, const ReceiveList& y) {
    same_numbers(str(name, ".segments (as numbers)"), segments(x), segments(y));
    same(str(name, ".token"), x.token, y.token);
    same(str(name, ".route_ptr"), x.route_ptr, y.route_ptr);
    same(str(name, ".slot"), x.slot, y.slot);
    same(str(name, ".weight"), x.weight, y.weight);
    same(str(name, ".chunk_row"), x.chunk_row, y.chunk_row);
    same(str(name, ".chunk_route"), x.chunk_route, y.chunk_route);
  };
  same_numbers("numbers", numbers(a), numbers(b));
  same("source_tokens", a.source_tokens, b.source_tokens);
  same_sent("send1", a.send1, b.send1);
  same_received("recv1", a.recv1, b.recv1);
  same_sent("send2", a.send2, b.send2);
  same_received("recv2", a.recv2, b.recv2);
  same("group_ptr", a.group_ptr, b.group_ptr);
  same("expert_row", a.expert_row, b.expert_row);
  same("expert_weight", a.expert_weight, b.expert_weight);
  same("position_of_route", a.position_of_route, b.position_of_route);
  same("slot_ptr", a.slot_ptr, b.slot_ptr);
  same("wgrad_position", a.wgrad_position, b.wgrad_position);
  same("wgrad_row", a.wgrad_row, b.wgrad_row);
  same("own_partial_ptr", a.own_partial_ptr, b.own_partial_ptr);
  same("partial_ptr", a.partial_ptr, b.partial_ptr);
  same("partial_position", a.partial_position, b.partial_position);
  same("home_ptr", a.home_ptr, b.home_ptr);
  same("home_position", a.home_position, b.home_position);
  same("everywhere.token", a.everywhere.token, b.everywhere.token);
  same("everywhere.expert", a.everywhere.expert, b.everywhere.expert);
  same("everywhere.route", a.everywhere.route, b.everywhere.route);
  same("everywhere.weight", a.everywhere.weight, b.everywhere.weight);
  same_numbers("traffic", traffic(a), traffic(b));
  return out;
}

}  // namespace sluice::testing
