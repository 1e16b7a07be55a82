// The exchange template: the shape of one layer pass on one rank, as data. Ops, the counters they wait for, and the
// buffers they touch. Nothing here depends on the counts of a batch: a plan (plan.hpp) fills a template with numbers.
// CPU tasks, device streams with events, and kernels that wait on tile flags are lowerings of the same template; a
// lowering may merge ops but keeps the counters.
//
// Counters only grow within a pass, from 0. Two kinds:
//   signals     raised by peers' puts; numbered alike on all ranks (signal_index), totals known beforehand
//   completions one an op, 0 -> 1 when it is done
// An op may run once all its waits `counter >= value` hold. Ops stand in order of preference: an executor runs the first
// one that may run on a free resource. A pass is over when all ops are done.
//
// Forward pass of a rank (hop 1 crosses nodes, hop 2 stays within a node; self needs no link):
//
//   pack1 -> put1 ~~> arrived1 -> forward -> put2 (handed on) ~~> arrived_across --+
//   pack2 -> put2 ~~> arrived_in_node ----------------------------------------------+-> expert_gemm1 -> expert_gemm2
//   pack0 (rows that stay on this rank) --------------------------------------------+        |
//                                                                                          reduce
//   return1 <- node_reduce (handed on) <- returned_handed_on <~~ return2 (handed on) <-------+
//   unpack <- returned1 <~~ return1                                                          |
//      ^----- node_reduce (own) <--------- returned_own <~~~~~~~~ return2 <------------------+
//
// Rows are cut twice: along tokens into transfer chunks, and at the receiver by where they come from (plan.hpp,
// SourceSplit). A (part, chunk) is a block: the unit of expert work, which waits for nothing but its own rows.
//
// The backward pass has the same shape with dy in place of x, dgrad in place of the GEMMs, and wgrad at the end, behind
// everything that peers wait for. A rank's own rows (where they are a part) and wgrad are worked on in pieces: an op that
// has begun is not given up for another, so a peer's rows would wait for all of them otherwise.
//
// Thread-safety: plain data. Errors: build_template throws kInvalidArgument; validate throws kInternal.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/ids.hpp"
#include "sluice/base/topology.hpp"
#include "sluice/scheduler/plan.hpp"

namespace sluice {

// X(enumerator, text, phase of the report)
#define SLUICE_OP_LIST(X)                                        \
  X(kReady, "ready", Phase::kDispatch)                           \
  X(kPack, "pack", Phase::kDispatch)                             \
  X(kPut, "put", Phase::kDispatch)                               \
  X(kForward, "forward", Phase::kDispatch)                       \
  X(kExpertGemm1, "expert_gemm1", Phase::kExperts)               \
  X(kExpertGemm2, "expert_gemm2", Phase::kExperts)               \
  X(kExpertDgrad2, "expert_dgrad2", Phase::kExperts)             \
  X(kActivationBackward, "activation_backward", Phase::kExperts) \
  X(kExpertDgrad1, "expert_dgrad1", Phase::kExperts)             \
  X(kReduce, "reduce", Phase::kCombine)                          \
  X(kReturn, "return", Phase::kCombine)                          \
  X(kNodeReduce, "node_reduce", Phase::kCombine)                 \
  X(kUnpack, "unpack", Phase::kCombine)                          \
  X(kWgrad, "wgrad", Phase::kExperts)

enum class OpKind : std::uint8_t {
#define SLUICE_X(name, text, phase) name,
  SLUICE_OP_LIST(SLUICE_X)
#undef SLUICE_X
};
enum class Phase : std::uint8_t { kDispatch, kExperts, kCombine };
std::string_view to_string(OpKind kind) noexcept;
std::string_view to_string(Phase phase) noexcept;
Phase phase_of(OpKind kind) noexcept;

// What an op occupies while it runs. A put occupies its link outwards here and inwards at the peer.
enum class Resource : std::uint8_t { kHost, kCompute, kInNodeLink, kAcrossNodesLink, kCopyEngine };
std::string_view to_string(Resource resource) noexcept;

enum class PassKind : std::uint8_t { kForward, kBackward };
std::string_view to_string(PassKind pass) noexcept;

// Buffers of a context, with what bounds their rows. T = most tokens of a source, R = ranks, K = most experts a token
// may visit. Exact sizes come from the plan; the bounds are what a device without host counts would have to hold.
// X(enumerator, text, bound on rows)
#define SLUICE_BUFFER_LIST(X)                                \
  X(kX, "x or dy (caller)", "T")                             \
  X(kSend1, "send1", "T * (nodes - 1)")                      \
  X(kRecv1, "recv1", "T * sources handed on")                \
  X(kSend2, "send2", "(T + recv1) * ranks of the node")      \
  X(kRecv2, "recv2 (rows of x, kept for backward)", "T * R") \
  X(kRecvDy, "recv2 of dy", "recv2")                         \
  X(kHidden, "h (pre-activation)", "recv2 * min(K, slots)")  \
  X(kActivation, "a (activation)", "recv2 * min(K, slots)")  \
  X(kOut, "expert outputs", "recv2 * min(K, slots)")         \
  X(kPartial, "partial (a rank's sum)", "recv2")             \
  X(kRet2, "ret2 (ranks' sums at the gateway)", "send2")     \
  X(kRet1, "ret1 (nodes' sums to send home)", "recv1")       \
  X(kHome, "home (nodes' sums at home)", "T * nodes")        \
  X(kY, "y or dx (caller)", "T")                             \
  X(kDw, "dw per route", "T * K")                            \
  X(kGrads, "weight gradients (caller)", "slots")

enum class BufferId : std::uint8_t {
#define SLUICE_X(name, text, bound) name,
  SLUICE_BUFFER_LIST(SLUICE_X)
#undef SLUICE_X
};
std::string_view to_string(BufferId buffer) noexcept;
std::string_view bound_of(BufferId buffer) noexcept;

// Signals of a channel. Ready signals are numbered by the sender's rank and shared by both passes.
enum class SignalKind : std::uint8_t {
  kArrived1,          // rows to hand on
  kArrivedAcross,     // rows for own experts from other nodes (through the gateways, or straight)
  kArrivedInNode,     // rows for own experts from ranks of this node
  kReturnedHandedOn,  // sums of rows that were handed on, at the gateway
  kReturnedOwn,       // sums of own rows from the ranks they were sent to over hop 2
  kReturned1,         // sums of own rows from gateways
};
constexpr std::int32_t kNumSignalKinds = 6;
std::string_view to_string(SignalKind kind) noexcept;
constexpr std::uint32_t ready_signal(RankId from) {
  return static_cast<std::uint32_t>(from.value);
}
constexpr std::uint32_t signal_index(std::int32_t num_ranks, std::int32_t num_chunks, PassKind pass,
                                     SignalKind kind, std::int32_t chunk) {
  return static_cast<std::uint32_t>(
      num_ranks +
      (static_cast<std::int32_t>(pass) * kNumSignalKinds + static_cast<std::int32_t>(kind)) * num_chunks +
      chunk);
}
constexpr std::uint32_t num_signals(std::int32_t num_ranks, std::int32_t num_chunks) {
  return static_cast<std::uint32_t>(num_ranks + 2 * kNumSignalKinds * num_chunks);
}

struct CounterWait {
  bool completion = false;  // of op `index`; else signal `index`
  std::uint32_t index = 0;
  std::uint64_t value = 1;
};

struct Op {
  OpKind kind = OpKind::kReady;
  Resource resource = Resource::kHost;
  std::int32_t chunk = 0;
  std::int32_t part = 0;  // of expert work and kReduce: PlanOptions::block(part, chunk)
  // Expert work in several ops is cut by slots, so that what peers wait for goes between them: op `piece` of
  // `num_pieces` has the slots [L*piece/num_pieces, L*(piece+1)/num_pieces) of the rank's L.
  std::int32_t piece = 0, num_pieces = 1;
  std::int32_t hop = 0;    // of pack, put and return: 1, 2, or 0 for rows that stay on this rank
  std::int32_t peer = -1;  // of put, return and ready
  bool handed_on = false;  // put, return and node_reduce: of rows received over hop 1 (else own rows)
  std::int32_t raises_signal = -1;  // at the peer
  std::int32_t raises = 0;          // how often: one put a source, empty or not
  std::vector<CounterWait> waits;
  std::vector<BufferId> reads, writes;

  std::int64_t begin_slot(std::int64_t num_slots) const { return num_slots * piece / num_pieces; }
  std::int64_t end_slot(std::int64_t num_slots) const { return num_slots * (piece + 1) / num_pieces; }
};

struct PassTemplate {
  std::vector<Op> ops;
  // Puts that will come to this rank, by signal. uint32 [num_signals]
  std::vector<std::uint32_t> signal_totals;
};

// X(enumerator, name in configs)
#define SLUICE_SCHEDULE_LIST(X) \
  X(kSequential, "sequential")  \
  X(kPipelined, "pipelined")    \
  X(kBySource, "by-source")     \
  X(kHierarchical, "hierarchical")

enum class SchedulePolicy : std::uint8_t {
// kSequential    one chunk: exchange, compute, exchange
// kPipelined     rows in equal chunks of tokens: one chunk computes while the next travels
// kBySource      and apart by source: remote rows leave first, own rows compute while they travel, remote rows'
//                results go home before own rows are finished
// kHierarchical  and remote rows apart by level: rows of this node compute while those of other nodes are under way
#define SLUICE_X(name, text) name,
  SLUICE_SCHEDULE_LIST(SLUICE_X)
#undef SLUICE_X
};
std::string_view to_string(SchedulePolicy policy) noexcept;

struct ScheduleOptions {
  SchedulePolicy policy = SchedulePolicy::kSequential;
  Exchange exchange = Exchange::kGateway;
  std::int32_t num_chunks = 1;  // 1 for kSequential

  SourceSplit split() const;
  PlanOptions plan_options() const { return {exchange, num_chunks, split()}; }
  friend bool operator==(const ScheduleOptions&, const ScheduleOptions&) = default;
};

struct Template {
  RankId rank;
  ScheduleOptions schedule;
  std::int32_t num_ranks = 0;
  // Peers of the hops, ascending. hop1_to[i] is the gateway of the i-th other node (nodes ascending).
  std::vector<std::int32_t> hop1_to;
  std::vector<std::int32_t> hop1_from;  // sources whose rows this rank hands on
  std::vector<std::int32_t> members;    // ranks of the own node, this rank included
  // Sources whose rows come here through members[m], in the order in which it sends them: itself, then those that it
  // hands on, ascending.
  std::vector<std::vector<std::int32_t>> sources_of_member;
  std::vector<std::int32_t> peers;  // all ranks that put here or are put to, ascending, without this rank
  PassTemplate forward;
  PassTemplate backward;

  const PassTemplate& pass(PassKind kind) const { return kind == PassKind::kForward ? forward : backward; }

  // Counters exist, waits can be met by this rank's ops and its peers' signals, and there is no cycle among completions.
  void validate() const;
  std::string explain() const;
  std::string to_json() const;
  std::uint64_t hash() const;  // of this rank's template
  // Equal on all ranks that built theirs from the same topology and schedule; part of the agreement check.
  std::uint64_t schedule_hash() const;
};

Template build_template(RankId rank, const Topology& topology, const ScheduleOptions& schedule);

// The templates of all ranks fit together: every signal's total equals what peers raise, and a run of all ranks comes
// to its end whatever the order of arrival. templates[r] is that of rank r.
void validate_group(std::span<const Template> templates);

}  // namespace sluice
