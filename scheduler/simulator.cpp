#include "sluice/scheduler/simulator.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

#include "sluice/base/error.hpp"

namespace sluice {
namespace {

using Ticks = std::int64_t;  // picoseconds
constexpr double kTicksPerUs = 1e6;
constexpr Ticks kNever = INT64_MAX;

Ticks to_ticks(double us) {
  return static_cast<Ticks>(std::llround(us * kTicksPerUs));
}
double from_ticks(Ticks t) {
  return static_cast<double>(t) / kTicksPerUs;
}
constexpr std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

// Whether rank r's template is that of its local index, shifted by whole nodes.
bool is_uniform(const Topology& topology) {
  const auto& first = topology.ranks_of(NodeId(0));
  for (std::int32_t n = 0; n < topology.num_nodes(); ++n) {
    const auto& ranks = topology.ranks_of(NodeId(n));
    if (ranks.size() != first.size()) return false;
    for (std::size_t i = 0; i < ranks.size(); ++i)
      if (at(ranks[i]) != at(n) * first.size() + i) return false;
  }
  return true;
}

}  // namespace

GroupTemplate group_template(std::vector<Template> templates) {
  GroupTemplate out;
  out.shape_of.resize(templates.size());
  std::iota(out.shape_of.begin(), out.shape_of.end(), 0);
  out.shift.assign(templates.size(), 0);
  out.shapes = std::move(templates);
  if (out.num_ranks() <= kMostFullRanks) {
    validate_group(out.shapes);
  } else {
    for (const Template& t : out.shapes) t.validate();
  }
  return out;
}

GroupTemplate build_group_template(const Topology& topology, const ScheduleOptions& schedule) {
  const std::int32_t ranks = topology.num_ranks();
  if (ranks <= kMostFullRanks || !is_uniform(topology)) {
    std::vector<Template> templates;
    for (std::int32_t r = 0; r < ranks; ++r)
      templates.push_back(build_template(RankId(r), topology, schedule));
    return group_template(std::move(templates));
  }
  GroupTemplate out;
  const auto size = static_cast<std::int32_t>(topology.ranks_of(NodeId(0)).size());
  for (std::int32_t r = 0; r < size; ++r) {
    out.shapes.push_back(build_template(RankId(r), topology, schedule));
    out.shapes.back().validate();
  }
  for (std::int32_t r = 0; r < ranks; ++r) {
    out.shape_of.push_back(r % size);
    out.shift.push_back(r - r % size);
  }
  return out;
}

std::string_view Simulation::bound() const {
  if (compute_floor_us >= std::max(link_floor_us[0], link_floor_us[1])) return "compute";
  return to_string(link_floor_us[0] >= link_floor_us[1] ? Resource::kInNodeLink : Resource::kAcrossNodesLink);
}
double Simulation::floor_us() const {
  return std::max(compute_floor_us, std::max(link_floor_us[0], link_floor_us[1]));
}

namespace {

// What the engine needs to know of a template's pass.
struct Shape {
  explicit Shape(const Template& t, PassKind kind) : pass(&t.pass(kind)) {
    const auto num_ranks = static_cast<std::uint32_t>(t.num_ranks);
    const std::size_t num_ops = pass->ops.size();
    waits.assign(num_ops, 0);
    after_op.resize(num_ops);
    after_signal.resize(pass->signal_totals.size() - num_ranks);
    ready_index.assign(num_ranks, -1);
    for (std::uint32_t i = 0; i < num_ops; ++i) {
      const Op& op = pass->ops[i];
      if (op.kind == OpKind::kReady) {
        ready_index[at(op.peer)] = num_ready++;
        continue;
      }
      for (const CounterWait& w : op.waits) {
        if (w.completion) {
          after_op[w.index].push_back(i);
        } else if (w.index < num_ranks) {
          continue;  // of the peer's ready signal: ready_at()
        } else {
          Require(w.value == pass->signal_totals[w.index], ErrorCode::kInternal, "op ", to_string(op.kind),
                  " waits for ", w.value, " of ", pass->signal_totals[w.index],
                  " signals; the simulator knows waits for all of them");
          after_signal[w.index - num_ranks].push_back(i);
        }
        ++waits[i];
      }
    }
  }

  const PassTemplate* pass;
  std::vector<std::uint16_t> waits;  // [ops]
  std::vector<std::vector<std::uint32_t>> after_op, after_signal;
  std::vector<std::int32_t> ready_index;  // [num_ranks] place of the peer's op among the ready ops
  std::int32_t num_ready = 0;
};

// The smallest number first.
struct Ready {
  std::vector<std::uint32_t> heap;
  bool empty() const { return heap.empty(); }
  std::uint32_t top() const { return heap.front(); }
  void push(std::uint32_t op) {
    heap.push_back(op);
    std::push_heap(heap.begin(), heap.end(), std::greater<>{});
  }
  std::uint32_t pop() {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>{});
    const std::uint32_t out = heap.back();
    heap.pop_back();
    return out;
  }
};

struct Rank {
  Ready compute, puts;
  std::vector<std::pair<Ticks, std::uint32_t>>
      held_back;           // puts until their peers' ready signals; earliest on top
  Ticks watched = kNever;  // when the next event for them is
  bool computing = false, posting = false;
  Ticks debt = 0;  // time that others took from this processor, owed by its next op
  struct Side {
    Ticks free = 0;  // when what was given to it is done
    // Outwards, queue model: the puts behind the one whose departure is an event.
    bool departing = false;
    std::vector<std::pair<std::uint32_t, Ticks>> queue;  // op, time on the link
    std::size_t head = 0;
  } out[2], in[2];  // by LinkClass
  Ticks end = 0;
  Ticks compute_busy = 0, send_busy = 0, receive_busy = 0, out_busy[2] = {0, 0}, in_busy[2] = {0, 0};
};

class Engine {
 public:
  Engine(const GroupTemplate& group, const PlanSummary& summary, const MachineProfile& profile,
         const LayerShape& layer, const SimulationOptions& options)
      : group_(group), summary_(summary), profile_(profile), layer_(layer), options_(options) {
    for (const Template& t : group.shapes) shapes_.emplace_back(t, options.pass);
    const std::size_t ranks = at(group.num_ranks());
    ranks_.resize(ranks);
    first_op_.push_back(0);
    for (std::size_t r = 0; r < ranks; ++r) first_op_.push_back(first_op_.back() + shape(r).pass->ops.size());
    num_signals_ = shapes_.front().after_signal.size();
    waits_.reserve(first_op_.back());
    for (std::size_t r = 0; r < ranks; ++r)
      waits_.insert(waits_.end(), shape(r).waits.begin(), shape(r).waits.end());
    signals_.assign(ranks * num_signals_, 0);
    arrived_.assign(ranks * num_signals_, 0);
    if (options.keep_spans) {
      spans_.resize(ranks);
      begun_.assign(first_op_.back(), 0);
    }
    ready_us_ = profile.op_us + profile.in_node.send(0);
  }

  Simulation run() {
    std::size_t left = first_op_.back();
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      const Shape& s = shape(r);
      left -= at(s.num_ready);
      // Ready signals go out first, before anything else of the rank.
      const Ticks busy = to_ticks(ready_us_ * s.num_ready);
      Rank& rank = ranks_[r];
      rank.send_busy += busy;
      if (profile_.posting != Posting::kOwnCore) rank.computing = true;
      rank.posting = true;
      push(busy, Event::kStart, r, 0);
      for (std::uint32_t i = 0; i < s.waits.size(); ++i)
        if (s.waits[i] == 0 && s.pass->ops[i].kind != OpKind::kReady) release(r, i);
      watch_held_back(r);
    }
    left_ = left;
    while (!events_.empty()) {
      std::pop_heap(events_.begin(), events_.end(), Later());
      const Event e = events_.back();
      events_.pop_back();
      now_ = e.time;
      ++num_events_;
      handle(e);
    }
    Require(left_ == 0, ErrorCode::kInternal, "a simulated pass stops with ", left_, " ops that never run");
    return result();
  }

 private:
  struct Event {
    enum Kind : std::uint8_t { kStart, kComputed, kPosted, kReadyNow, kDepart, kLanded, kSignal };
    Ticks time;
    std::uint64_t order;
    Kind kind;
    std::uint32_t rank;
    std::uint32_t what;  // op or signal
    Ticks held;          // of puts: time on the link
  };
  struct Later {
    bool operator()(const Event& a, const Event& b) const {
      return a.time != b.time ? a.time > b.time : a.order > b.order;
    }
  };
  void push(Ticks time, Event::Kind kind, std::size_t rank, std::uint32_t what, Ticks held = 0) {
    events_.push_back({time, order_++, kind, static_cast<std::uint32_t>(rank), what, held});
    std::push_heap(events_.begin(), events_.end(), Later());
  }

  const Shape& shape(std::size_t r) const { return shapes_[at(group_.shape_of[r])]; }
  const Op& op_of(std::size_t r, std::uint32_t op) const { return shape(r).pass->ops[op]; }
  static bool is_put(const Op& op) { return op.kind == OpKind::kPut || op.kind == OpKind::kReturn; }
  static std::size_t class_of(const Op& op) { return op.resource == Resource::kAcrossNodesLink ? 1 : 0; }
  RankId id(std::size_t r) const { return RankId(static_cast<std::int32_t>(r)); }

  OpCost cost(std::size_t r, std::uint32_t index) {
    const Op& op = op_of(r, index);
    const std::int32_t peer = op.peer < 0 ? -1 : group_.peer(id(r), op);
    summary_.op_work(group_.of(id(r)), options_.pass, op, id(r), peer, layer_, work_);
    return op_cost(profile_, layer_, options_.pass, op, work_);
  }

  // When the peer's ready signal is here.
  Ticks ready_at(std::size_t r, std::uint32_t index) const {
    const Op& op = op_of(r, index);
    const auto peer = at(group_.peer(id(r), op));
    const std::int32_t num_ranks = group_.num_ranks();
    const std::int32_t me = (static_cast<std::int32_t>(r) - group_.shift[peer] + num_ranks) % num_ranks;
    return to_ticks(ready_us_ * (shape(peer).ready_index[at(me)] + 1) +
                    profile_.link(static_cast<LinkClass>(class_of(op))).latency_us);
  }

  // All that the op waits for is there, but perhaps for the peer's ready signal.
  void release(std::size_t r, std::uint32_t index) {
    if (is_put(op_of(r, index))) {
      const Ticks ready = ready_at(r, index);
      if (ready > now_) {
        auto& held_back = ranks_[r].held_back;
        held_back.emplace_back(ready, index);
        std::push_heap(held_back.begin(), held_back.end(), std::greater<>{});
        return;
      }
    }
    enqueue(r, index);
  }
  // One event a rank is enough: for the first put that it holds back. Called when all that an event releases is there.
  void watch_held_back(std::size_t r) {
    Rank& rank = ranks_[r];
    if (rank.held_back.empty() || rank.held_back.front().first >= rank.watched) return;
    rank.watched = rank.held_back.front().first;
    push(rank.watched, Event::kReadyNow, r, 0);
  }
  void release_ready(std::size_t r) {
    auto& held_back = ranks_[r].held_back;
    bool any = false;
    while (!held_back.empty() && held_back.front().first <= now_) {
      std::pop_heap(held_back.begin(), held_back.end(), std::greater<>{});
      ranks_[r].puts.push(held_back.back().second);
      held_back.pop_back();
      any = true;
    }
    if (!any) return;  // an event that an earlier one has overtaken
    ranks_[r].watched = kNever;
    watch_held_back(r);
    take_next(r);
  }
  void enqueue(std::size_t r, std::uint32_t index) {
    (is_put(op_of(r, index)) ? ranks_[r].puts : ranks_[r].compute).push(index);
    take_next(r);
  }

  // Gives idle resources of the rank their next op.
  void take_next(std::size_t r) {
    Rank& rank = ranks_[r];
    if (profile_.posting == Posting::kCaller) {
      if (rank.computing || (rank.compute.empty() && rank.puts.empty())) return;
      const bool put = rank.compute.empty() || (!rank.puts.empty() && rank.puts.top() < rank.compute.top());
      begin(r, put ? rank.puts.pop() : rank.compute.pop());
      return;
    }
    if (!rank.posting && !rank.puts.empty()) begin(r, rank.puts.pop());
    if (!rank.computing && !rank.compute.empty()) begin(r, rank.compute.pop());
  }

  void begin(std::size_t r, std::uint32_t index) {
    Rank& rank = ranks_[r];
    const OpCost k = cost(r, index);
    const Ticks busy = to_ticks(k.compute_us), held = to_ticks(k.link_us);
    if (!spans_.empty()) begun_[first_op_[r] + index] = now_;
    if (is_put(op_of(r, index))) {
      rank.send_busy += busy;
      if (profile_.posting == Posting::kCaller) {
        rank.computing = true;
        push(now_ + busy, Event::kComputed, r, index, held);
      } else {
        rank.posting = true;
        if (profile_.posting == Posting::kThread && rank.computing) rank.debt += busy;
        push(now_ + busy, Event::kPosted, r, index, held);
      }
      return;
    }
    rank.computing = true;
    rank.compute_busy += busy;
    push(now_ + busy, Event::kComputed, r, index);
  }

  void handle(const Event& e) {
    Rank& rank = ranks_[e.rank];
    switch (e.kind) {
      case Event::kStart:
        rank.posting = false;
        if (profile_.posting != Posting::kOwnCore) rank.computing = false;
        take_next(e.rank);
        return;
      case Event::kComputed:
        // What was taken from the processor meanwhile comes on top.
        if (rank.debt > 0 && profile_.posting != Posting::kOwnCore) {
          push(now_ + std::exchange(rank.debt, 0), Event::kComputed, e.rank, e.what, e.held);
          return;
        }
        rank.computing = false;
        finish(e.rank, e.what, e.held);
        return;
      case Event::kPosted:
        rank.posting = false;
        finish(e.rank, e.what, e.held);
        return;
      case Event::kReadyNow:
        release_ready(e.rank);
        return;
      case Event::kDepart:
        depart(e.rank, e.what, e.held);
        return;
      case Event::kLanded:
        landed(e.rank, e.what);
        return;
      case Event::kSignal:
        for (const std::uint32_t op : shape(e.rank).after_signal[e.what]) wait_less(e.rank, op);
        watch_held_back(e.rank);
        return;
    }
  }

  void wait_less(std::size_t r, std::uint32_t op) {
    if (--waits_[first_op_[r] + op] == 0) release(r, op);
  }

  // The processor is done with the op.
  void finish(std::size_t r, std::uint32_t index, Ticks held) {
    --left_;
    Rank& rank = ranks_[r];
    rank.end = std::max(rank.end, now_);
    const Op& op = op_of(r, index);
    if (is_put(op)) {
      send(r, index, held);
    } else if (!spans_.empty()) {
      spans_[r].push_back({index, from_ticks(begun_[first_op_[r] + index]), from_ticks(now_)});
    }
    for (const std::uint32_t next : shape(r).after_op[index]) wait_less(r, next);
    watch_held_back(r);
    take_next(r);
  }

  // ---- links ----

  Ticks latency(std::size_t c) const { return to_ticks(profile_.link(static_cast<LinkClass>(c)).latency_us); }
  bool receives(std::size_t c) const { return !profile_.link(static_cast<LinkClass>(c)).receive.empty(); }

  void send(std::size_t r, std::uint32_t index, Ticks held) {
    const Op& op = op_of(r, index);
    const std::size_t c = class_of(op);
    Rank::Side& out = ranks_[r].out[c];
    if (profile_.link_model == LinkModel::kCalendar) {
      const auto peer = at(group_.peer(id(r), op));
      Rank::Side& in = ranks_[peer].in[c];
      const Ticks start = std::max({now_, out.free, in.free});
      out.free = in.free = start + held;
      occupy(r, peer, c, index, start, held);
      arrive(peer, op, start + held + latency(c));
      if (receives(c)) push(start + held, Event::kLanded, r, index);
      return;
    }
    // Queue model: it leaves when the messages before it have left.
    if (out.departing) {
      out.queue.push_back({index, held});
      return;
    }
    out.departing = true;
    push(std::max(now_, out.free), Event::kDepart, r, index, held);
  }
  // Queue model: the first bytes leave; the receiver takes the message when it is done with those that left earlier.
  void depart(std::size_t r, std::uint32_t index, Ticks held) {
    const Op& op = op_of(r, index);
    const std::size_t c = class_of(op);
    const auto peer = at(group_.peer(id(r), op));
    Rank::Side& out = ranks_[r].out[c];
    out.free = now_ + held;
    out.departing = out.head < out.queue.size();
    if (out.departing) {
      const auto [next, next_held] = out.queue[out.head++];
      push(out.free, Event::kDepart, r, next, next_held);
      if (out.head == out.queue.size()) {
        out.queue.clear();
        out.head = 0;
      }
    }
    Rank::Side& in = ranks_[peer].in[c];
    const Ticks start = std::max(now_, in.free);
    in.free = start + held;
    occupy(r, peer, c, index, now_, held);
    arrive(peer, op, in.free + latency(c));
    if (receives(c)) push(in.free, Event::kLanded, r, index);
  }

  void occupy(std::size_t r, std::size_t peer, std::size_t c, std::uint32_t index, Ticks start, Ticks held) {
    ranks_[r].out_busy[c] += held;
    ranks_[peer].in_busy[c] += held;
    if (!spans_.empty()) spans_[r].push_back({index, from_ticks(start), from_ticks(start + held)});
  }

  // The receiver's processor has its part in the message.
  void landed(std::size_t r, std::uint32_t index) {
    const Op& op = op_of(r, index);
    Rank& peer = ranks_[at(group_.peer(id(r), op))];
    const Ticks busy = to_ticks(cost(r, index).receive_us);
    peer.receive_busy += busy;
    if (peer.computing) peer.debt += busy;  // an idle processor does it in idle time
  }

  // Whoever waits for the signal waits for all of it: the last to arrive counts.
  void arrive(std::size_t peer, const Op& op, Ticks when) {
    const std::size_t signal = at(op.raises_signal) - at(group_.num_ranks());
    const std::size_t i = peer * num_signals_ + signal;
    arrived_[i] = std::max(arrived_[i], when);
    signals_[i] += static_cast<std::uint32_t>(op.raises);
    const PassTemplate& pass = *shape(peer).pass;
    if (signals_[i] == pass.signal_totals[at(op.raises_signal)])
      push(arrived_[i], Event::kSignal, peer, static_cast<std::uint32_t>(signal));
  }

  Simulation result() {
    Simulation out;
    out.num_events = num_events_;
    for (const Rank& r : ranks_) {
      RankTimes t{from_ticks(r.end), from_ticks(r.compute_busy), from_ticks(r.send_busy),
                  from_ticks(r.receive_busy)};
      out.step_us = std::max(out.step_us, t.end_us);
      out.compute_floor_us = std::max(out.compute_floor_us, t.compute_us);
      for (int c = 0; c < 2; ++c) {
        t.out_us[c] = from_ticks(r.out_busy[c]);
        t.in_us[c] = from_ticks(r.in_busy[c]);
        out.link_floor_us[c] = std::max({out.link_floor_us[c], t.out_us[c], t.in_us[c]});
      }
      out.ranks.push_back(t);
    }
    out.exposed_comm_us = std::max(0.0, out.step_us - out.compute_floor_us);
    out.spans = std::move(spans_);
    return out;
  }

  const GroupTemplate& group_;
  const PlanSummary& summary_;
  const MachineProfile& profile_;
  const LayerShape& layer_;
  SimulationOptions options_;
  std::vector<Shape> shapes_;
  std::vector<Rank> ranks_;
  std::vector<std::size_t> first_op_;  // [num_ranks + 1] where a rank's ops start in waits_
  std::vector<std::uint16_t> waits_;
  std::size_t num_signals_ = 0;
  std::vector<std::uint32_t> signals_;  // [num_ranks, num_signals] raised, those on their way included
  std::vector<Ticks> arrived_;          // the latest of them
  std::vector<Event> events_;
  std::uint64_t order_ = 0;
  std::int64_t num_events_ = 0;
  std::size_t left_ = 0;
  Ticks now_ = 0;
  double ready_us_ = 0;
  OpWork work_;
  std::vector<std::vector<OpSpan>> spans_;
  std::vector<Ticks> begun_;
};

}  // namespace

Simulation simulate(const GroupTemplate& group, const PlanSummary& summary, const MachineProfile& profile,
                    const LayerShape& layer, const SimulationOptions& options) {
  Require(!group.shapes.empty() && group.num_ranks() == summary.topology().num_ranks(),
          ErrorCode::kInvalidArgument, "the templates are of ", group.num_ranks(), " ranks, the counts of ",
          summary.topology().num_ranks());
  const ScheduleOptions& schedule = group.shapes.front().schedule;
  for (const Template& t : group.shapes) {
    Require(t.schedule == schedule && t.num_ranks == group.num_ranks(), ErrorCode::kInvalidArgument,
            "the template of rank ", t.rank.value, " has another schedule than that of rank ",
            group.shapes.front().rank.value);
  }
  Require(schedule.exchange == summary.exchange(), ErrorCode::kInvalidArgument,
          "the templates and the counts have different exchanges");
  const std::int64_t most = std::max<std::int64_t>(1, summary.most_tokens());
  Require(schedule.num_chunks <= most, ErrorCode::kInvalidArgument, "schedule.num_chunks is ",
          schedule.num_chunks, ", but no rank has more than ", most, " tokens; chunks would be empty");
  profile.validate();
  return Engine(group, summary, profile, layer, options).run();
}

}  // namespace sluice
