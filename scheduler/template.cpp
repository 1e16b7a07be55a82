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
    case Resource::kCopyEngine:
      return "copy engine";
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
    case SignalKind::kArrivedAcross:
      return "arrived_across";
    case SignalKind::kArrivedInNode:
      return "arrived_in_node";
    case SignalKind::kReturnedHandedOn:
      return "returned_handed_on";
    case SignalKind::kReturnedOwn:
      return "returned_own";
    case SignalKind::kReturned1:
      return "returned1";
  }
  return "unknown signal";
}
std::string_view to_string(SchedulePolicy policy) noexcept {
  switch (policy) {
#define SLUICE_X(name, text) \
  case SchedulePolicy::name: \
    return text;
    SLUICE_SCHEDULE_LIST(SLUICE_X)
#undef SLUICE_X
  }
  return "unknown schedule";
}

SourceSplit ScheduleOptions::split() const {
  switch (policy) {
    case SchedulePolicy::kBySource:
      return SourceSplit::kSelfApart;
    case SchedulePolicy::kHierarchical:
      return SourceSplit::kByDistance;
    case SchedulePolicy::kSequential:
    case SchedulePolicy::kPipelined:
      break;
  }
  return SourceSplit::kNone;
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

// Peers in the order in which a rank sends to them: the next one first, so that all ranks together keep all links busy
// instead of queueing at the lowest rank.
std::vector<std::int32_t> in_turn(std::vector<std::int32_t> peers, std::int32_t rank) {
  std::rotate(peers.begin(), std::upper_bound(peers.begin(), peers.end(), rank), peers.end());
  return peers;
}

// Builds one pass. Ops are appended in order of preference: what peers wait for comes before what only this rank needs.
class PassBuilder {
 public:
  PassBuilder(const Template& t, const Topology& exchange, const Topology& topology, PassKind pass)
      : t_(t),
        exchange_(exchange),
        topology_(topology),
        pass_(pass),
        backward_(pass == PassKind::kBackward),
        split_(t.schedule.split()) {
    for (const std::int32_t m : in_turn(t.members, t.rank.value))
      if (m != t.rank.value) others_.push_back(m);
    for (const std::int32_t m : others_)
      if (!topology.same_node(t.rank, RankId(m))) ++members_across_;
  }

  PassTemplate build() {
    const std::int32_t num_chunks = t_.schedule.num_chunks;
    const auto chunks = static_cast<std::size_t>(num_chunks);
    for (const std::int32_t p : t_.peers) {
      Op& op = add(OpKind::kReady, Resource::kHost, 0);
      op.peer = p;
      op.raises_signal = static_cast<std::int32_t>(ready_signal(t_.rank));
      op.raises = 1;
    }
    // Rows leave, farthest first; what stays here is copied last.
    const bool split = split_ != SourceSplit::kNone;
    pack_self_.resize(chunks);
    for (std::int32_t c = 0; c < num_chunks && !t_.hop1_to.empty(); ++c) {
      const std::uint32_t pack1 = pack(1, c);
      for (const std::int32_t g : in_turn(t_.hop1_to, t_.rank.value)) put(1, c, g, false, pack1);
    }
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      if (!others_.empty()) {
        const std::uint32_t pack2 = pack(2, c);
        for (const std::int32_t d : others_) put(2, c, d, false, pack2);
      }
      if (!split) pack_self_[at(c)] = pack(0, c);
    }
    forward_.resize(chunks);
    for (std::int32_t c = 0; c < num_chunks && !t_.hop1_from.empty(); ++c) {
      forward_[at(c)] = hand_on(c);
      for (const std::int32_t d : others_) put(2, c, d, true, forward_[at(c)]);
    }

    // Results come before new work, and before both what lets a peer go on: each finished block goes home at once. Ops
    // refer to others by number, so expert work is numbered first and put in order afterwards.
    std::vector<std::uint32_t> order(out_.ops.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::uint32_t>(i);
    if (split)
      for (std::int32_t c = 0; c < num_chunks; ++c) pack_self_[at(c)] = pack(0, c);
    std::vector<Block> blocks;
    for (std::int32_t part = 0; part < num_parts(split_); ++part)
      for (std::int32_t c = 0; c < num_chunks; ++c)
        if (has_sources(part)) blocks.push_back(expert_work(part, c));
    const auto reduce_of = [&](SourceClass source, std::int32_t chunk) -> std::uint32_t {
      const std::int32_t part = part_of(split_, source);
      for (const Block& b : blocks)
        if (b.part == part && b.chunk == chunk) return b.reduce;
      throw Error(ErrorCode::kInternal, "template: a block without sources is waited for");
    };
    const auto append = [&](std::uint32_t first) {
      for (std::size_t i = first; i < out_.ops.size(); ++i) order.push_back(static_cast<std::uint32_t>(i));
    };
    std::vector<std::uint32_t> own_results;
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      for (const Block& b : blocks)
        if (b.chunk == c && b.part != self_part()) order.push_back(b.reduce);
      std::uint32_t first = last() + 1;
      if (topology_.num_nodes() > 1) {
        const std::uint32_t across = reduce_of(SourceClass::kAcross, c);
        for (const std::int32_t g : others_) send_back(2, c, g, true, across);
        if (!t_.hop1_from.empty()) {
          const std::uint32_t sums = add_index(OpKind::kNodeReduce, Resource::kCompute, c);
          out_.ops[sums].handed_on = true;
          touch(sums, {BufferId::kRet2}, {BufferId::kRet1});
          wait_for(sums, across);
          wait_for_signal(sums, SignalKind::kReturnedHandedOn, c, returned_handed_on_total());
          for (const std::int32_t s : in_turn(t_.hop1_from, t_.rank.value)) send_back(1, c, s, false, sums);
        }
      }
      for (const std::int32_t g : others_)
        send_back(
            2, c, g, false,
            reduce_of(topology_.same_node(t_.rank, RankId(g)) ? SourceClass::kInNode : SourceClass::kAcross,
                      c));
      append(first);
      first = last() + 1;
      const std::uint32_t sums = add_index(OpKind::kNodeReduce, Resource::kCompute, c);
      touch(sums, {BufferId::kRet2}, {BufferId::kHome});
      wait_for(sums, reduce_of(SourceClass::kSelf, c));
      wait_for_signal(sums, SignalKind::kReturnedOwn, c, returned_own_total());
      const std::uint32_t unpack = add_index(OpKind::kUnpack, Resource::kCompute, c);
      touch(unpack, {BufferId::kHome}, {BufferId::kY});
      wait_for(unpack, sums);
      wait_for_signal(unpack, SignalKind::kReturned1, c, returned1_total());
      own_results.push_back(sums);
      own_results.push_back(unpack);
    }
    for (const Block& b : blocks)
      if (b.part != self_part()) order.insert(order.end(), b.work.begin(), b.work.end());
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      if (split) order.push_back(pack_self_[at(c)]);
      for (const Block& b : blocks)
        if (b.part == self_part() && b.chunk == c) order.push_back(b.reduce);
    }
    order.insert(order.end(), own_results.begin(), own_results.end());
    for (const Block& b : blocks)
      if (b.part == self_part()) order.insert(order.end(), b.work.begin(), b.work.end());
    if (backward_) {
      const std::int32_t num_pieces = t_.schedule.policy == SchedulePolicy::kSequential ? 1 : kNumPieces;
      for (std::int32_t piece = 0; piece < num_pieces; ++piece) {
        const std::uint32_t wgrad = add_index(OpKind::kWgrad, Resource::kCompute, 0);
        out_.ops[wgrad].piece = piece;
        out_.ops[wgrad].num_pieces = num_pieces;
        touch(wgrad, {BufferId::kRecv2, BufferId::kRecvDy, BufferId::kHidden, BufferId::kActivation},
              {BufferId::kGrads});
        for (const Block& b : blocks)
          for (const std::uint32_t op : b.ready_for_wgrad) wait_for(wgrad, op);
        order.push_back(wgrad);
      }
    }
    put_in_order(order);
    set_totals();
    return std::move(out_);
  }

 private:
  static std::size_t at(std::int32_t i) { return static_cast<std::size_t>(i); }

  struct Block {
    std::int32_t part = 0, chunk = 0;
    std::vector<std::uint32_t> work;  // in the order in which it runs
    std::vector<std::uint32_t> ready_for_wgrad;
    std::uint32_t reduce = 0;
  };
  // Enough that what peers wait for need not wait long, few enough that a piece is worth its start.
  static constexpr std::int32_t kNumPieces = 4;
  std::int32_t self_part() const { return part_of(split_, SourceClass::kSelf); }
  bool has_sources(std::int32_t part) const {
    if (part == self_part()) return true;
    return (part == part_of(split_, SourceClass::kAcross) && topology_.num_nodes() > 1) ||
           (part == part_of(split_, SourceClass::kInNode) && arrived_in_node_total() > 0);
  }

  Block expert_work(std::int32_t part, std::int32_t chunk) {
    Block b;
    b.part = part;
    b.chunk = chunk;
    const std::int32_t num_pieces = split_ != SourceSplit::kNone && part == self_part() ? kNumPieces : 1;
    std::int32_t piece = 0;
    const auto work = [&](OpKind kind, std::vector<BufferId> reads, std::vector<BufferId> writes) {
      const std::uint32_t op = add_index(kind, Resource::kCompute, chunk);
      out_.ops[op].part = part;
      out_.ops[op].piece = piece;
      out_.ops[op].num_pieces = num_pieces;
      touch(op, std::move(reads), std::move(writes));
      return op;
    };
    std::vector<std::uint32_t> last_work;
    for (; piece < num_pieces; ++piece) {
      // What is under way is finished before the next piece or block is begun.
      if (backward_) {
        const std::uint32_t dgrad2 =
            work(OpKind::kExpertDgrad2, {BufferId::kRecvDy}, {BufferId::kActivation});
        wait_for_rows(dgrad2, part, chunk);
        // Recomputes the pre-activation where it was not kept; needs nothing from peers, so it fills their time.
        const std::uint32_t recompute = work(OpKind::kExpertGemm1, {BufferId::kRecv2}, {BufferId::kHidden});
        const std::uint32_t activation =
            work(OpKind::kActivationBackward, {BufferId::kHidden, BufferId::kActivation},
                 {BufferId::kHidden, BufferId::kActivation, BufferId::kDw});
        wait_for(activation, recompute);
        wait_for(activation, dgrad2);
        b.ready_for_wgrad.push_back(activation);
        last_work.push_back(work(OpKind::kExpertDgrad1, {BufferId::kHidden}, {BufferId::kOut}));
        wait_for(last_work.back(), activation);
        b.work.insert(b.work.end(), {last_work.back(), activation, dgrad2, recompute});
      } else {
        const std::uint32_t gemm1 =
            work(OpKind::kExpertGemm1, {BufferId::kRecv2}, {BufferId::kHidden, BufferId::kActivation});
        wait_for_rows(gemm1, part, chunk);
        last_work.push_back(work(OpKind::kExpertGemm2, {BufferId::kActivation}, {BufferId::kOut}));
        wait_for(last_work.back(), gemm1);
        b.work.insert(b.work.end(), {last_work.back(), gemm1});
      }
    }
    piece = 0;
    const std::uint32_t reduce =
        work(OpKind::kReduce, {BufferId::kOut}, {BufferId::kPartial, BufferId::kRet2});
    out_.ops[reduce].num_pieces = 1;
    for (const std::uint32_t op : last_work) wait_for(reduce, op);
    b.reduce = reduce;
    return b;
  }

  // Ops take their places in the order of preference; waits follow.
  void put_in_order(const std::vector<std::uint32_t>& order) {
    Require(order.size() == out_.ops.size(), ErrorCode::kInternal, "template: ", order.size(), " of ",
            out_.ops.size(), " ops have a place");
    std::vector<std::uint32_t> place(order.size());
    std::vector<Op> ops;
    ops.reserve(order.size());
    for (std::size_t i = 0; i < order.size(); ++i) {
      place[order[i]] = static_cast<std::uint32_t>(i);
      ops.push_back(std::move(out_.ops[order[i]]));
    }
    for (Op& op : ops)
      for (CounterWait& w : op.waits)
        if (w.completion) w.index = place[w.index];
    out_.ops = std::move(ops);
  }

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
    touch(op, {BufferId::kX}, {hop == 1 ? BufferId::kSend1 : hop == 2 ? BufferId::kSend2 : received2()});
    return op;
  }
  std::uint32_t put(std::int32_t hop, std::int32_t chunk, std::int32_t peer, bool handed_on,
                    std::uint32_t after) {
    const std::uint32_t index = add_index(OpKind::kPut, link(peer), chunk);
    Op& op = out_.ops[index];
    op.hop = hop;
    op.peer = peer;
    op.handed_on = handed_on;
    op.raises_signal = static_cast<std::int32_t>(
        signal(hop == 1                                                   ? SignalKind::kArrived1
               : handed_on || !topology_.same_node(t_.rank, RankId(peer)) ? SignalKind::kArrivedAcross
                                                                          : SignalKind::kArrivedInNode,
               chunk));
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
  // hop 1: sums of a source's rows that this rank handed on. hop 2: sums of the peer's own rows, or of rows that it
  // handed on.
  void send_back(std::int32_t hop, std::int32_t chunk, std::int32_t peer, bool handed_on,
                 std::uint32_t after) {
    std::size_t sources = 1;
    if (handed_on) sources = handed_on_by(exchange_, RankId(peer)).size();
    if (sources == 0) return;
    const std::uint32_t index = add_index(OpKind::kReturn, link(peer), chunk);
    Op& op = out_.ops[index];
    op.hop = hop;
    op.peer = peer;
    op.handed_on = handed_on;
    op.raises_signal = static_cast<std::int32_t>(signal(hop == 1    ? SignalKind::kReturned1
                                                        : handed_on ? SignalKind::kReturnedHandedOn
                                                                    : SignalKind::kReturnedOwn,
                                                        chunk));
    op.raises = static_cast<std::int32_t>(sources) * puts_per_return();
    touch(index, {hop == 1 ? BufferId::kRet1 : BufferId::kPartial},
          {hop == 1 ? BufferId::kHome : BufferId::kRet2});
    wait_for(index, after);
    wait_for_ready(index, peer);
  }
  void wait_for_rows(std::uint32_t op, std::int32_t part, std::int32_t chunk) {
    if (part == part_of(split_, SourceClass::kAcross)) {
      wait_for_signal(op, SignalKind::kArrivedAcross, chunk, arrived_across_total());
      if (!t_.hop1_from.empty()) wait_for(op, forward_[at(chunk)]);
    }
    if (part == part_of(split_, SourceClass::kInNode))
      wait_for_signal(op, SignalKind::kArrivedInNode, chunk, arrived_in_node_total());
    if (part == self_part()) wait_for(op, pack_self_[at(chunk)]);
  }

  BufferId received2() const { return backward_ ? BufferId::kRecvDy : BufferId::kRecv2; }
  // Backward returns carry dx rows and dw scalars: two puts a source.
  std::int32_t puts_per_return() const { return backward_ ? 2 : 1; }
  // Through another gateway, or straight from a rank of another node: one put from every source that is neither of this
  // node nor handed on by this rank itself.
  std::uint64_t arrived_across_total() const {
    return static_cast<std::uint64_t>(t_.num_ranks) - topology_.ranks_of(topology_.node_of(t_.rank)).size() -
           t_.hop1_from.size();
  }
  std::uint64_t arrived_in_node_total() const { return others_.size() - members_across_; }
  std::uint64_t returned_handed_on_total() const {
    return others_.size() * t_.hop1_from.size() * static_cast<std::uint64_t>(puts_per_return());
  }
  std::uint64_t returned_own_total() const {
    return others_.size() * static_cast<std::uint64_t>(puts_per_return());
  }
  std::uint64_t returned1_total() const {
    return t_.hop1_to.size() * static_cast<std::uint64_t>(puts_per_return());
  }
  void set_totals() {
    out_.signal_totals.assign(num_signals(t_.num_ranks, t_.schedule.num_chunks), 0);
    for (const std::int32_t p : t_.peers) out_.signal_totals[ready_signal(RankId(p))] = 1;
    for (std::int32_t c = 0; c < t_.schedule.num_chunks; ++c) {
      const auto set = [&](SignalKind kind, std::uint64_t total) {
        out_.signal_totals[signal(kind, c)] = static_cast<std::uint32_t>(total);
      };
      set(SignalKind::kArrived1, t_.hop1_from.size());
      set(SignalKind::kArrivedAcross, arrived_across_total());
      set(SignalKind::kArrivedInNode, arrived_in_node_total());
      set(SignalKind::kReturnedHandedOn, returned_handed_on_total());
      set(SignalKind::kReturnedOwn, returned_own_total());
      set(SignalKind::kReturned1, returned1_total());
    }
  }

  const Template& t_;
  const Topology& exchange_;
  const Topology& topology_;
  PassKind pass_;
  bool backward_;
  SourceSplit split_;
  std::vector<std::int32_t> others_;  // members without this rank, in the order in which they are sent to
  std::size_t members_across_ = 0;    // of these on other nodes: a direct exchange
  std::vector<std::uint32_t> pack_self_, forward_;  // [chunk] op
  PassTemplate out_;
};

std::string op_name(const Op& op) {
  std::string out(to_string(op.kind));
  if (op.hop > 0 || op.kind == OpKind::kPack) out += str(op.hop);
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
        .add_int(op.part)
        .add_int(op.piece)
        .add_int(op.num_pieces)
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
          "; choose another schedule.policy");
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
          schedule.num_chunks, schedule.num_chunks == 1 ? " chunk" : " chunks", ", ",
          num_parts(schedule.split()), num_parts(schedule.split()) == 1 ? " part\n" : " parts by source\n");
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
          waits += str(to_string(static_cast<SignalKind>(index / schedule.num_chunks % kNumSignalKinds)), "[",
                       index % schedule.num_chunks, "] >= ", w.value);
        }
      }
      out += str("  #", i, " chunk ", op.chunk, op.part > 0 ? str(" part ", op.part) : std::string(),
                 op.num_pieces > 1 ? str(" piece ", op.piece + 1, "/", op.num_pieces) : std::string(), " ",
                 op_name(op), " on ", to_string(op.resource), waits.empty() ? "" : "  ", waits, "\n");
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
                       {"part", op.part},
                       {"piece", op.piece},
                       {"num_pieces", op.num_pieces},
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
