#include "sluice/scheduler/template.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"

namespace sluice {

std::string_view to_string(OpKind kind) noexcept {
  switch (kind) {
#define SLUICE_X(name, text, phase) \
  case OpKind::name:                \
    return text;
    SLUICE_OP_LIST(SLUICE_X)
#undef SLUICE_X
  }
  return "unknown op";
}
Phase phase_of(OpKind kind) noexcept {
  switch (kind) {
#define SLUICE_X(name, text, phase) \
  case OpKind::name:                \
    return phase;
    SLUICE_OP_LIST(SLUICE_X)
#undef SLUICE_X
  }
  return Phase::kDispatch;
}
std::string_view to_string(Phase phase) noexcept {
  switch (phase) {
    case Phase::kDispatch:
      return "dispatch";
    case Phase::kExperts:
      return "experts";
    case Phase::kCombine:
      return "combine";
  }
  return "unknown phase";
}
std::string_view to_string(Resource resource) noexcept {
  switch (resource) {
    case Resource::kHost:
      return "host";
    case Resource::kCompute:
      return "compute";
    case Resource::kInNodeLink:
      return "in-node link";
    case Resource::kAcrossNodesLink:
      return "across-nodes link";
  }
  return "unknown resource";
}
std::string_view to_string(PassKind pass) noexcept {
  return pass == PassKind::kForward ? "forward" : "backward";
}
std::string_view to_string(BufferId buffer) noexcept {
  switch (buffer) {
#define SLUICE_X(name, text, bound) \
  case BufferId::name:              \
    return text;
    SLUICE_BUFFER_LIST(SLUICE_X)
#undef SLUICE_X
  }
  return "unknown buffer";
}
std::string_view bound_of(BufferId buffer) noexcept {
  switch (buffer) {
#define SLUICE_X(name, text, bound) \
  case BufferId::name:              \
    return bound;
    SLUICE_BUFFER_LIST(SLUICE_X)
#undef SLUICE_X
  }
  return "unknown";
}
std::string_view to_string(SignalKind kind) noexcept {
  switch (kind) {
    case SignalKind::kArrived1:
      return "arrived1";
    case SignalKind::kArrived2:
      return "arrived2";
    case SignalKind::kReturned2:
      return "returned2";
    case SignalKind::kReturned1:
      return "returned1";
  }
  return "unknown signal";
}
std::string_view to_string(SchedulePolicy policy) noexcept {
  return policy == SchedulePolicy::kSequential ? "sequential" : "chunked";
}

namespace {

std::vector<std::int32_t> gateways_of(const Topology& exchange, RankId rank) {
  std::vector<std::int32_t> out;
  for (std::int32_t n = 0; n < exchange.num_nodes(); ++n)
    if (n != exchange.node_of(rank).value) out.push_back(exchange.gateway(rank, NodeId(n)).value);
  return out;
}

std::vector<std::int32_t> handed_on_by(const Topology& exchange, RankId rank) {
  std::vector<std::int32_t> out;
  for (std::int32_t s = 0; s < exchange.num_ranks(); ++s)
    if (!exchange.same_node(RankId(s), rank) && exchange.gateway(RankId(s), exchange.node_of(rank)) == rank)
      out.push_back(s);
  return out;
}

// Builds one pass. Ops are appended in order of preference: what peers wait for comes before what only this rank needs.
class PassBuilder {
 public:
  PassBuilder(const Template& t, const Topology& exchange, const Topology& topology, PassKind pass)
      : t_(t),
        exchange_(exchange),
        topology_(topology),
        pass_(pass),
        backward_(pass == PassKind::kBackward) {}

  PassTemplate build() {
    const std::int32_t num_chunks = t_.schedule.num_chunks;
    const auto chunks = static_cast<std::size_t>(num_chunks);
    for (const std::int32_t p : t_.peers) {
      Op& op = add(OpKind::kReady, Resource::kHost, 0);
      op.peer = p;
      op.raises_signal = static_cast<std::int32_t>(ready_signal(t_.rank));
      op.raises = 1;
    }
    std::vector<std::uint32_t> pack1(chunks), pack2(chunks), forward(chunks), reduce(chunks),
        node_reduce(chunks), last_expert(chunks), act_backward(chunks);
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      pack1[at(c)] = pack(1, c);
      for (const std::int32_t g : t_.hop1_to) put(1, c, g, false, pack1[at(c)]);
    }
    std::vector<std::vector<std::uint32_t>> own_put(chunks);
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      pack2[at(c)] = pack(2, c);
      for (const std::int32_t d : t_.members)
        if (d != t_.rank.value) own_put[at(c)].push_back(put(2, c, d, false, pack2[at(c)]));
    }
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      forward[at(c)] = hand_on(c);
      std::size_t i = 0;
      for (const std::int32_t d : t_.members)
        if (d != t_.rank.value) {
          const std::uint32_t put_op = put(2, c, d, true, forward[at(c)]);
          // Both kinds of put raise the same signal; receivers expect own rows first.
          wait_for(put_op, own_put[at(c)][i++]);
        }
    }
    // Results first: each finished chunk goes home before the next one computes.
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      reduce[at(c)] = add_index(OpKind::kReduce, Resource::kCompute, c);
      touch(reduce[at(c)], {BufferId::kOut}, {BufferId::kPartial, BufferId::kRet2});
      for (const std::int32_t g : t_.members)
        if (g != t_.rank.value) send_back(2, c, g, reduce[at(c)]);
      node_reduce[at(c)] = add_index(OpKind::kNodeReduce, Resource::kCompute, c);
      touch(node_reduce[at(c)], {BufferId::kRet2}, {BufferId::kRet1, BufferId::kHome});
      wait_for(node_reduce[at(c)], reduce[at(c)]);
      wait_for_signal(node_reduce[at(c)], SignalKind::kReturned2, c, returned2_total());
      for (const std::int32_t s : t_.hop1_from) send_back(1, c, s, node_reduce[at(c)]);
      const std::uint32_t unpack = add_index(OpKind::kUnpack, Resource::kCompute, c);
      touch(unpack, {BufferId::kHome}, {BufferId::kY});
      wait_for(unpack, node_reduce[at(c)]);
      wait_for_signal(unpack, SignalKind::kReturned1, c, returned1_total());
    }
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      if (backward_) {
        // Recomputes the pre-activation where it was not kept; needs nothing from peers, so it fills their time.
        const std::uint32_t recompute = add_index(OpKind::kExpertGemm1, Resource::kCompute, c);
        touch(recompute, {BufferId::kRecv2}, {BufferId::kHidden});
        const std::uint32_t dgrad2 = add_index(OpKind::kExpertDgrad2, Resource::kCompute, c);
        touch(dgrad2, {BufferId::kRecvDy}, {BufferId::kActivation});
        wait_for_rows(dgrad2, c, pack2[at(c)], forward[at(c)]);
        act_backward[at(c)] = add_index(OpKind::kActivationBackward, Resource::kCompute, c);
        touch(act_backward[at(c)], {BufferId::kHidden, BufferId::kActivation},
              {BufferId::kHidden, BufferId::kActivation, BufferId::kDw});
        wait_for(act_backward[at(c)], recompute);
        wait_for(act_backward[at(c)], dgrad2);
        last_expert[at(c)] = add_index(OpKind::kExpertDgrad1, Resource::kCompute, c);
        touch(last_expert[at(c)], {BufferId::kHidden}, {BufferId::kOut});
        wait_for(last_expert[at(c)], act_backward[at(c)]);
      } else {
        const std::uint32_t gemm1 = add_index(OpKind::kExpertGemm1, Resource::kCompute, c);
        touch(gemm1, {BufferId::kRecv2}, {BufferId::kHidden, BufferId::kActivation});
        wait_for_rows(gemm1, c, pack2[at(c)], forward[at(c)]);
        last_expert[at(c)] = add_index(OpKind::kExpertGemm2, Resource::kCompute, c);
        touch(last_expert[at(c)], {BufferId::kActivation}, {BufferId::kOut});
        wait_for(last_expert[at(c)], gemm1);
      }
      wait_for(reduce[at(c)], last_expert[at(c)]);
    }
    if (backward_) {
      const std::uint32_t wgrad = add_index(OpKind::kWgrad, Resource::kCompute, 0);
      touch(wgrad, {BufferId::kRecv2, BufferId::kRecvDy, BufferId::kHidden, BufferId::kActivation},
            {BufferId::kGrads});
      for (const std::uint32_t op : act_backward) wait_for(wgrad, op);
    }
    set_totals();
    return std::move(out_);
  }

 private:
  static std::size_t at(std::int32_t i) { return static_cast<std::size_t>(i); }

  Op& add(OpKind kind, Resource resource, std::int32_t chunk) {
    Op op;
    op.kind = kind;
    op.resource = resource;
    op.chunk = chunk;
    out_.ops.push_back(std::move(op));
    return out_.ops.back();
  }
  std::uint32_t last() const { return static_cast<std::uint32_t>(out_.ops.size() - 1); }
  std::uint32_t add_index(OpKind kind, Resource resource, std::int32_t chunk) {
    add(kind, resource, chunk);
    return last();
  }
  void touch(std::uint32_t op, std::vector<BufferId> reads, std::vector<BufferId> writes) {
    out_.ops[op].reads = std::move(reads);
    out_.ops[op].writes = std::move(writes);
  }
  void wait_for(std::uint32_t op, std::uint32_t other) { out_.ops[op].waits.push_back({true, other, 1}); }
  void wait_for_signal(std::uint32_t op, SignalKind kind, std::int32_t chunk, std::uint64_t value) {
    if (value > 0) out_.ops[op].waits.push_back({false, signal(kind, chunk), value});
  }
  void wait_for_ready(std::uint32_t op, std::int32_t peer) {
    out_.ops[op].waits.push_back({false, ready_signal(RankId(peer)), 1});
  }
  std::uint32_t signal(SignalKind kind, std::int32_t chunk) const {
    return signal_index(t_.num_ranks, t_.schedule.num_chunks, pass_, kind, chunk);
  }
  Resource link(std::int32_t peer) const {
    return topology_.same_node(t_.rank, RankId(peer)) ? Resource::kInNodeLink : Resource::kAcrossNodesLink;
  }

  std::uint32_t pack(std::int32_t hop, std::int32_t chunk) {
    const std::uint32_t op = add_index(OpKind::kPack, Resource::kCompute, chunk);
    out_.ops[op].hop = hop;
    if (hop == 1) {
      touch(op, {BufferId::kX}, {BufferId::kSend1});
    } else {
      touch(op, {BufferId::kX}, {BufferId::kSend2, received2()});
    }
    return op;
  }
  std::uint32_t put(std::int32_t hop, std::int32_t chunk, std::int32_t peer, bool handed_on,
                    std::uint32_t after) {
    const std::uint32_t index = add_index(OpKind::kPut, link(peer), chunk);
    Op& op = out_.ops[index];
    op.hop = hop;
    op.peer = peer;
    op.handed_on = handed_on;
    op.raises_signal =
        static_cast<std::int32_t>(signal(hop == 1 ? SignalKind::kArrived1 : SignalKind::kArrived2, chunk));
    op.raises = handed_on ? static_cast<std::int32_t>(t_.hop1_from.size()) : 1;
    touch(index, {hop == 1 ? BufferId::kSend1 : BufferId::kSend2},
          {hop == 1 ? BufferId::kRecv1 : received2()});
    wait_for(index, after);
    wait_for_ready(index, peer);
    return index;
  }
  std::uint32_t hand_on(std::int32_t chunk) {
    const std::uint32_t op = add_index(OpKind::kForward, Resource::kCompute, chunk);
    touch(op, {BufferId::kRecv1}, {BufferId::kSend2, received2()});
    wait_for_signal(op, SignalKind::kArrived1, chunk, t_.hop1_from.size());
    return op;
  }
  void send_back(std::int32_t hop, std::int32_t chunk, std::int32_t peer, std::uint32_t after) {
    const std::uint32_t index = add_index(OpKind::kReturn, link(peer), chunk);
    Op& op = out_.ops[index];
    op.hop = hop;
    op.peer = peer;
    op.raises_signal =
        static_cast<std::int32_t>(signal(hop == 1 ? SignalKind::kReturned1 : SignalKind::kReturned2, chunk));
    const std::size_t sources = hop == 1 ? 1 : 1 + handed_on_by(exchange_, RankId(peer)).size();
    op.raises = static_cast<std::int32_t>(sources) * puts_per_return();
    touch(index, {hop == 1 ? BufferId::kRet1 : BufferId::kPartial},
          {hop == 1 ? BufferId::kHome : BufferId::kRet2});
    wait_for(index, after);
    wait_for_ready(index, peer);
  }
  void wait_for_rows(std::uint32_t op, std::int32_t chunk, std::uint32_t pack2, std::uint32_t forward) {
    wait_for_signal(op, SignalKind::kArrived2, chunk, arrived2_total());
    wait_for(op, pack2);
    wait_for(op, forward);
  }

  BufferId received2() const { return backward_ ? BufferId::kRecvDy : BufferId::kRecv2; }
  // Backward returns carry dx rows and dw scalars: two puts a source.
  std::int32_t puts_per_return() const { return backward_ ? 2 : 1; }
  // One put from every source that this rank is not the gateway of (a source is its own gateway in its node).
  std::uint64_t arrived2_total() const {
    return static_cast<std::uint64_t>(t_.num_ranks) - 1 - t_.hop1_from.size();
  }
  std::uint64_t returned2_total() const {
    return (t_.members.size() - 1) * (1 + t_.hop1_from.size()) *
           static_cast<std::uint64_t>(puts_per_return());
  }
  std::uint64_t returned1_total() const {
    return t_.hop1_to.size() * static_cast<std::uint64_t>(puts_per_return());
  }
  void set_totals() {
    out_.signal_totals.assign(num_signals(t_.num_ranks, t_.schedule.num_chunks), 0);
    for (const std::int32_t p : t_.peers) out_.signal_totals[ready_signal(RankId(p))] = 1;
    for (std::int32_t c = 0; c < t_.schedule.num_chunks; ++c) {
      out_.signal_totals[signal(SignalKind::kArrived1, c)] = static_cast<std::uint32_t>(t_.hop1_from.size());
      out_.signal_totals[signal(SignalKind::kArrived2, c)] = static_cast<std::uint32_t>(arrived2_total());
      out_.signal_totals[signal(SignalKind::kReturned2, c)] = static_cast<std::uint32_t>(returned2_total());
      out_.signal_totals[signal(SignalKind::kReturned1, c)] = static_cast<std::uint32_t>(returned1_total());
    }
  }

  const Template& t_;
  const Topology& exchange_;
  const Topology& topology_;
  PassKind pass_;
  bool backward_;
  PassTemplate out_;
};

std::string op_name(const Op& op) {
  std::string out(to_string(op.kind));
  if (op.hop > 0) out += str(op.hop);
  if (op.handed_on) out += " (handed on)";
  if (op.peer >= 0) out += str(" -> ", op.peer);
  return out;
}

template <typename... Parts>
void expect(bool condition, const Parts&... parts) {
  Require(condition, ErrorCode::kInternal, "template: ", str(parts...));
}

void hash_pass(const PassTemplate& pass, Hasher& h) {
  for (const Op& op : pass.ops) {
    h.add_int(static_cast<int>(op.kind))
        .add_int(op.chunk)
        .add_int(op.hop)
        .add_int(op.peer)
        .add_int(op.handed_on);
    h.add_int(op.raises_signal).add_int(op.raises);
    for (const CounterWait& w : op.waits)
      h.add_int(w.completion).add_int(w.index).add_int(static_cast<std::int64_t>(w.value));
  }
  h.add_ints(pass.signal_totals);
}

}  // namespace

Template build_template(RankId rank, const Topology& topology, const ScheduleOptions& schedule) {
  Require(schedule.num_chunks >= 1, ErrorCode::kInvalidArgument, "schedule.num_chunks is ",
          schedule.num_chunks, ", must be at least 1");
  Require(schedule.policy != SchedulePolicy::kSequential || schedule.num_chunks == 1,
          ErrorCode::kInvalidArgument, "a sequential schedule has 1 chunk, not ", schedule.num_chunks,
          "; use schedule.policy = \"chunked\"");
  Require(rank.value >= 0 && rank.value < topology.num_ranks(), ErrorCode::kInvalidArgument, "rank ",
          rank.value, " is not in a topology of ", topology.num_ranks(), " ranks");
  const Topology exchange =
      schedule.exchange == Exchange::kGateway ? topology : Topology::uniform(topology.num_ranks(), 1);
  Template t;
  t.rank = rank;
  t.schedule = schedule;
  t.num_ranks = topology.num_ranks();
  t.hop1_to = gateways_of(exchange, rank);
  t.hop1_from = handed_on_by(exchange, rank);
  t.members = exchange.ranks_of(exchange.node_of(rank));
  for (const std::int32_t m : t.members) {
    std::vector<std::int32_t> sources = {m};
    for (const std::int32_t s : handed_on_by(exchange, RankId(m))) sources.push_back(s);
    t.sources_of_member.push_back(std::move(sources));
  }
  t.peers = t.members;
  t.peers.insert(t.peers.end(), t.hop1_to.begin(), t.hop1_to.end());
  t.peers.insert(t.peers.end(), t.hop1_from.begin(), t.hop1_from.end());
  std::sort(t.peers.begin(), t.peers.end());
  t.peers.erase(std::unique(t.peers.begin(), t.peers.end()), t.peers.end());
  t.peers.erase(std::find(t.peers.begin(), t.peers.end(), rank.value));
  t.forward = PassBuilder(t, exchange, topology, PassKind::kForward).build();
  t.backward = PassBuilder(t, exchange, topology, PassKind::kBackward).build();
  return t;
}

void Template::validate() const {
  for (const PassKind kind : {PassKind::kForward, PassKind::kBackward}) {
    const PassTemplate& p = pass(kind);
    expect(p.signal_totals.size() == num_signals(num_ranks, schedule.num_chunks), to_string(kind),
           " pass has ", p.signal_totals.size(), " signals");
    for (const Op& op : p.ops)
      for (const CounterWait& w : op.waits) {
        if (w.completion) {
          expect(w.index < p.ops.size() && w.value == 1, op_name(op), " waits for completion ", w.index,
                 " >= ", w.value);
        } else {
          expect(w.index < p.signal_totals.size() && w.value <= p.signal_totals[w.index], op_name(op),
                 " waits for signal ", w.index, " >= ", w.value, ", which never comes");
        }
      }
    // All signals there: the completions alone must let every op run.
    std::vector<char> done(p.ops.size(), 0);
    std::size_t num_done = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t i = 0; i < p.ops.size(); ++i) {
        if (done[i]) continue;
        const bool ready = std::all_of(p.ops[i].waits.begin(), p.ops[i].waits.end(),
                                       [&](const CounterWait& w) { return !w.completion || done[w.index]; });
        if (!ready) continue;
        done[i] = 1;
        ++num_done;
        moved = true;
      }
    }
    expect(num_done == p.ops.size(), to_string(kind), " pass has a cycle: ", p.ops.size() - num_done,
           " ops can never run");
  }
}

void validate_group(std::span<const Template> templates) {
  const std::size_t n = templates.size();
  for (const Template& t : templates) t.validate();
  for (const PassKind kind : {PassKind::kForward, PassKind::kBackward}) {
    std::vector<std::vector<std::uint64_t>> seen(n), done(n);
    for (std::size_t r = 0; r < n; ++r) {
      seen[r].assign(templates[r].pass(kind).signal_totals.size(), 0);
      done[r].assign(templates[r].pass(kind).ops.size(), 0);
    }
    std::size_t left = 0;
    for (const auto& ops : done) left += ops.size();
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t r = 0; r < n; ++r) {
        const PassTemplate& p = templates[r].pass(kind);
        for (std::size_t i = 0; i < p.ops.size(); ++i) {
          const Op& op = p.ops[i];
          if (done[r][i]) continue;
          const bool ready = std::all_of(op.waits.begin(), op.waits.end(), [&](const CounterWait& w) {
            return (w.completion ? done[r][w.index] : seen[r][w.index]) >= w.value;
          });
          if (!ready) continue;
          done[r][i] = 1;
          --left;
          moved = true;
          if (op.raises_signal >= 0) {
            expect(op.peer >= 0 && static_cast<std::size_t>(op.peer) < n, op_name(op), " has no peer");
            seen[static_cast<std::size_t>(op.peer)].at(static_cast<std::size_t>(op.raises_signal)) +=
                static_cast<std::uint64_t>(op.raises);
          }
        }
      }
    }
    expect(left == 0, to_string(kind), " passes of the group stop with ", left, " ops that never run");
    for (std::size_t r = 0; r < n; ++r) {
      const auto& totals = templates[r].pass(kind).signal_totals;
      for (std::size_t s = 0; s < totals.size(); ++s)
        expect(seen[r][s] == totals[s], to_string(kind), " pass: signal ", s, " of rank ", r, " is raised ",
               seen[r][s], " times, expected ", totals[s]);
    }
  }
}

std::string Template::explain() const {
  std::string out =
      str("template of rank ", rank.value, " of ", num_ranks, ": schedule ", to_string(schedule.policy),
          ", exchange ", schedule.exchange == Exchange::kGateway ? "gateway" : "direct", ", ",
          schedule.num_chunks, schedule.num_chunks == 1 ? " chunk\n" : " chunks\n");
  for (const PassKind kind : {PassKind::kForward, PassKind::kBackward}) {
    const PassTemplate& p = pass(kind);
    out += str(to_string(kind), " pass, ", p.ops.size(), " ops in order of preference:\n");
    for (std::size_t i = 0; i < p.ops.size(); ++i) {
      const Op& op = p.ops[i];
      if (op.kind == OpKind::kReady) continue;
      std::string waits;
      for (const CounterWait& w : op.waits) {
        if (!w.completion && w.index < static_cast<std::uint32_t>(num_ranks))
          continue;  // ready signals: always
        waits += waits.empty() ? "after " : ", ";
        if (w.completion) {
          waits += str("#", w.index);
        } else {
          const auto index = static_cast<std::int32_t>(w.index) - num_ranks;
          waits += str(to_string(static_cast<SignalKind>(index / schedule.num_chunks % 4)), "[",
                       index % schedule.num_chunks, "] >= ", w.value);
        }
      }
      out += str("  #", i, " chunk ", op.chunk, " ", op_name(op), " on ", to_string(op.resource),
                 waits.empty() ? "" : "  ", waits, "\n");
    }
  }
  return out;
}

std::string Template::to_json() const {
  nlohmann::json out;
  out["rank"] = rank.value;
  out["num_ranks"] = num_ranks;
  out["policy"] = to_string(schedule.policy);
  out["exchange"] = schedule.exchange == Exchange::kGateway ? "gateway" : "direct";
  out["num_chunks"] = schedule.num_chunks;
  out["hash"] = hash();
  for (const PassKind kind : {PassKind::kForward, PassKind::kBackward}) {
    auto& ops = out[std::string(to_string(kind))] = nlohmann::json::array();
    for (const Op& op : pass(kind).ops) {
      nlohmann::json j{{"kind", to_string(op.kind)},
                       {"chunk", op.chunk},
                       {"hop", op.hop},
                       {"resource", to_string(op.resource)},
                       {"handed_on", op.handed_on}};
      if (op.peer >= 0) j["peer"] = op.peer;
      if (op.raises_signal >= 0) j["raises"] = {{"signal", op.raises_signal}, {"times", op.raises}};
      auto& waits = j["waits"] = nlohmann::json::array();
      for (const CounterWait& w : op.waits)
        waits.push_back({{w.completion ? "op" : "signal", w.index}, {"at_least", w.value}});
      for (const BufferId b : op.reads) j["reads"].push_back(to_string(b));
      for (const BufferId b : op.writes) j["writes"].push_back(to_string(b));
      ops.push_back(std::move(j));
    }
  }
  auto& buffers = out["buffers"] = nlohmann::json::object();
#define SLUICE_X(name, text, bound) buffers[text] = bound;
  SLUICE_BUFFER_LIST(SLUICE_X)
#undef SLUICE_X
  return out.dump();
}

std::uint64_t Template::hash() const {
  Hasher h;
  h.add_int(rank.value).add(schedule_hash());
  hash_pass(forward, h);
  hash_pass(backward, h);
  return h.value();
}

std::uint64_t Template::schedule_hash() const {
  return Hasher()
      .add_int(static_cast<int>(schedule.policy))
      .add_int(static_cast<int>(schedule.exchange))
      .add_int(schedule.num_chunks)
      .add_int(num_ranks)
      .value();
}

}  // namespace sluice
