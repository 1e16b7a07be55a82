// The dispatch plan: the numbers of one routing. Which row goes where, in which order, how often it crosses, and how
// outputs come home. Pure data and pure functions: the caller moves the bytes between the builder's steps.
//
// A token's way (gateway exchange):
//
//   home s  --hop 1: once per remote node-->  gateway g(s, n)  --hop 2: once per rank-->  expert rank d
//   home s  ------------------------ hop 2, own node: s is its own gateway ----------->  expert rank d
//
// and back over the same lists in reverse: d adds a row's experts (ascending expert id), the gateway adds its ranks
// (ascending), home adds the nodes (ascending). That is the one reduction tree of docs/design.md. A `direct` exchange
// has no hop 1: home sends to every rank itself and evaluates the same tree by adding per node first.
//
// Index spaces (all int32 unless said)
//   token         row of the caller's x, 0..num_tokens-1
//   stage row     what a gateway hands on: own tokens 0..num_tokens-1, then rows received over hop 1
//   stage route   own routes in the caller's order 0..num_routes-1, then routes received over hop 1
//   send list     rows in the order they leave: by peer, then source rank, then token
//   receive list  rows in the order they lie at the receiver: by source rank, then token
//   position      place of a received route in expert order: by block, local slot, then receive order
//   partial       a node's sum for a token, at the gateway: own partials (by token, node), then one per hop-1 row
//   home row      what home adds up: own partials, then one row per hop-1 send-list entry, in that order
//
// Exact sizes: nothing is padded, nothing dropped. Memory is reused: building into the same Plan allocates only until
// the high-water mark. Thread-safety: plain data; a builder serves one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/base/error.hpp"
#include "sluice/base/grow_array.hpp"
#include "sluice/base/ids.hpp"
#include "sluice/base/topology.hpp"
#include "sluice/scheduler/placement.hpp"
#include "sluice/scheduler/routing.hpp"

namespace sluice {

// How rows reach other nodes.
enum class Exchange : std::uint8_t {
  kGateway,  // once per node, through the gateway (two hops)
  kDirect,   // straight to every rank (one hop)
};

// Where a received row comes from, seen from its receiver: farthest first.
enum class SourceClass : std::uint8_t { kAcross, kInNode, kSelf };

inline SourceClass source_class(const Topology& topology, RankId receiver, RankId source) {
  if (source == receiver) return SourceClass::kSelf;
  return topology.same_node(receiver, source) ? SourceClass::kInNode : SourceClass::kAcross;
}

// Which received rows are worked on together.
enum class SourceSplit : std::uint8_t {
  kNone,        // one part
  kSelfApart,   // other ranks' rows | own rows
  kByDistance,  // other nodes' rows | this node's rows | own rows
};
constexpr std::int32_t num_parts(SourceSplit split) {
  return static_cast<std::int32_t>(split) + 1;
}
// Parts are numbered farthest first; only the classes of one part are ever together.
constexpr std::int32_t part_of(SourceSplit split, SourceClass source) {
  if (split == SourceSplit::kNone) return 0;
  if (split == SourceSplit::kSelfApart) return source == SourceClass::kSelf ? 1 : 0;
  return static_cast<std::int32_t>(source);
}

struct PlanOptions {
  Exchange exchange = Exchange::kGateway;
  std::int32_t num_chunks =
      1;  // transfer chunks; chunk c holds the tokens [T*c/C, T*(c+1)/C) of every source
  SourceSplit split = SourceSplit::kNone;

  // Expert work is done block by block; expert order is by block.
  std::int32_t num_blocks() const { return num_parts(split) * num_chunks; }
  std::int32_t block(std::int32_t part, std::int32_t chunk) const { return part * num_chunks + chunk; }
  friend bool operator==(const PlanOptions&, const PlanOptions&) = default;
};

// First token of chunk `chunk` of a source with `num_tokens` tokens.
constexpr std::int64_t chunk_begin(std::int64_t num_tokens, std::int32_t chunk, std::int32_t num_chunks) {
  return num_tokens * chunk / num_chunks;
}

// Rows of one home rank between this rank and one peer of a hop. Row and route ranges are contiguous on both sides.
struct Segment {
  std::int32_t peer = -1;
  std::int32_t source = -1;  // home rank of the rows
  std::int32_t num_rows = 0;
  std::int32_t num_routes = 0;
  std::int32_t row_begin = 0;         // in this side's list
  std::int32_t route_begin = 0;       // in this side's list
  std::int32_t peer_row_begin = 0;    // in the peer's list
  std::int32_t peer_route_begin = 0;  // in the peer's list
};

struct SendList {
  std::vector<Segment> segments;  // by peer, then source
  GrowArray<std::int32_t> row;    // [num_rows] stage row (hop 1: own token)
  GrowArray<std::int32_t> route;  // [num_routes] stage route
  GrowArray<std::int32_t>
      chunk_row;  // [segments * (num_chunks + 1)] first row of each chunk, absolute in the list
  GrowArray<std::int32_t> chunk_route;  // [segments * (num_chunks + 1)] first route of each chunk, likewise

  std::int32_t num_rows() const { return static_cast<std::int32_t>(row.size()); }
  std::int32_t num_routes() const { return static_cast<std::int32_t>(route.size()); }
};

struct ReceiveList {
  std::vector<Segment> segments;        // by source
  GrowArray<std::int32_t> token;        // [num_rows] token at the source
  GrowArray<std::int64_t> route_ptr;    // int64 [num_rows + 1]
  GrowArray<std::int32_t> slot;         // [num_routes] local slot of this rank; empty for hop 1
  GrowArray<float> weight;              // f32 [num_routes]; empty for hop 1
  GrowArray<std::int32_t> chunk_row;    // [segments * (num_chunks + 1)]
  GrowArray<std::int32_t> chunk_route;  // [segments * (num_chunks + 1)]

  std::int32_t num_rows() const { return static_cast<std::int32_t>(token.size()); }
  std::int32_t num_routes() const {
    return route_ptr.size() == 0 ? 0 : static_cast<std::int32_t>(route_ptr[route_ptr.size() - 1]);
  }
};

// Rows and routes of this rank's tokens by how far they go. "Flat" is an exchange without de-duplication: one row per
// route, straight to the expert's rank.
struct Traffic {
  std::int64_t rows_same_rank = 0;  // (token, own rank) pairs: nothing moves
  std::int64_t rows_in_node = 0;  // crossings between ranks of a node, sent by this rank (own and handed on)
  std::int64_t rows_across_nodes = 0;  // crossings between nodes, sent by this rank
  std::int64_t flat_rows_in_node = 0;
  std::int64_t flat_rows_across_nodes = 0;
  std::int64_t routes_everywhere = 0;  // routes to experts that live on every rank: never on the wire

  Traffic& operator+=(const Traffic& other);
};

// Routes of own tokens to experts that live everywhere.
struct EverywhereRoutes {
  GrowArray<std::int32_t> token;   // [n] ascending
  GrowArray<std::int32_t> expert;  // [n]
  GrowArray<std::int32_t> route;   // [n] own route
  GrowArray<float> weight;         // [n]
};

struct Plan {
  RankId rank;
  PlanOptions options;
  std::int32_t num_tokens = 0;
  std::int32_t num_routes = 0;
  std::int32_t num_experts = 0;
  std::int32_t num_local_slots = 0;
  std::uint64_t placement_version = 0;
  std::uint64_t agreement_hash = 0;         // placement, topology, options and all counts; equal on all ranks
  std::vector<std::int32_t> source_tokens;  // [num_ranks] tokens of every source

  SendList send1;     // hop 1, across nodes: own tokens to gateways
  ReceiveList recv1;  // hop 1: rows this rank hands on
  SendList send2;     // hop 2, within the node: stage rows to expert ranks (this rank included)
  ReceiveList recv2;  // hop 2: rows this rank's experts work on

  // Experts. Positions group_ptr[b * num_local_slots + l] .. [.. + 1] belong to slot l in block b.
  GrowArray<std::int64_t> group_ptr;          // int64 [num_blocks * num_local_slots + 1]
  GrowArray<std::int32_t> expert_row;         // [num_positions] receive-list row
  GrowArray<float> expert_weight;             // f32 [num_positions]
  GrowArray<std::int32_t> position_of_route;  // [recv2.num_routes] in receive order
  // Weight gradients run over a slot's routes in receive order, whatever the blocks.
  GrowArray<std::int64_t> slot_ptr;  // int64 [num_local_slots + 1]
  GrowArray<std::int32_t>
      wgrad_position;                 // [num_positions], empty when num_blocks() == 1 (then the identity)
  GrowArray<std::int32_t> wgrad_row;  // [num_positions], empty when num_blocks() == 1 (then expert_row)

  // Reduction. Partials [0, num_own_partials) are own; then one per recv1 row.
  std::int32_t num_own_partials = 0;
  GrowArray<std::int32_t> own_partial_ptr;   // [num_tokens + 1] own partials of each token, nodes ascending
  GrowArray<std::int64_t> partial_ptr;       // int64 [num_own_partials + recv1 rows + 1]
  GrowArray<std::int32_t> partial_position;  // [send2 rows] send2-list rows, ranks ascending
  GrowArray<std::int64_t> home_ptr;          // int64 [num_tokens + 1]
  GrowArray<std::int32_t> home_position;     // [num_home_rows] home rows, nodes ascending

  EverywhereRoutes everywhere;
  Traffic traffic;

  std::int32_t num_positions() const { return recv2.num_routes(); }
  std::int32_t num_home_rows() const { return num_own_partials + send1.num_rows(); }

  // Recomputes every invariant from the lists; throws kInternal naming the first that fails. O(plan), for tests and
  // for `sluice plan`.
  void validate() const;
  // A few lines: rows, bytes and crossings per level beside a flat exchange without de-duplication.
  std::string explain(std::int64_t row_bytes) const;
  // Bytes held, for the memory report.
  std::int64_t capacity_bytes() const;
};

// What a peer sent cannot be true, or not beside what others sent: kDisagreement, with the rank to blame (invalid when
// none can be singled out, as between two ranks that differ).
class PlanDisagreement : public Error {
 public:
  PlanDisagreement(RankId peer, std::string message)
      : Error(ErrorCode::kDisagreement, std::move(message)), peer_(peer) {}
  RankId peer() const { return peer_; }

 private:
  RankId peer_;
};

// Builds one rank's plans. Steps alternate with exchanges that the caller performs (over a transport, or between
// builders of one process). Each take_* checks what came from peers and throws PlanDisagreement naming the rank at
// fault.
//
//   builder.begin(routing, plan);
//   builder.take_summaries(all_gather(builder.summary()));        // exchange 1: demand
//   builder.take_counts(all_to_all(builder.counts()));            // exchange 2: row counts ...
//   builder.take_offsets(all_to_all(builder.offsets()));          //             ... and offsets
//   builder.take_headers1(exchange(builder.headers1()));          // hop-1 row headers, to gateways
//   builder.take_headers2(exchange(builder.headers2()));          // hop-2 row headers, to expert ranks
//
// WRONG: changing the routing's arrays before take_headers2 returned - the builder reads them again.
class PlanBuilder {
 public:
  // References must outlive the builder.
  PlanBuilder(RankId rank, const Topology& topology, const Placement& placement, PlanOptions options);
  ~PlanBuilder();
  PlanBuilder(PlanBuilder&&) noexcept;
  PlanBuilder& operator=(PlanBuilder&&) noexcept;

  // Validates the routing (kInvalidRouting) and starts. `extra_hash` joins the agreement check (template, channel).
  void begin(const RoutingView& routing, Plan& plan, std::uint64_t extra_hash = 0);

  // Another cut than the constructor's for this plan only, between begin() and take_summaries(); the exchange stays.
  // All ranks must come to the same one: it joins the agreement check of take_counts().
  void set_cut(std::int32_t num_chunks, SourceSplit split);

  static constexpr std::int64_t kCountsPerPeer = 6;
  static constexpr std::int64_t kOffsetsPerPeer = 4;
  std::span<const std::int64_t> summary() const;                // int64 [num_experts + 2]
  // Tokens and demand are sums of something: for who looks at them before take_summaries(), which does the same.
  void check_summaries(std::span<const std::int64_t> gathered) const;
  void take_summaries(std::span<const std::int64_t> gathered);  // int64 [num_ranks * (num_experts + 2)]
  std::span<const std::int64_t> counts() const;                 // int64 [num_ranks * kCountsPerPeer]
  void take_counts(std::span<const std::int64_t> received);     // int64 [num_ranks * kCountsPerPeer]
  std::span<const std::int64_t> offsets() const;                // int64 [num_ranks * kOffsetsPerPeer]
  void take_offsets(std::span<const std::int64_t> received);    // int64 [num_ranks * kOffsetsPerPeer]

  // A block of int32 words for or from one peer.
  struct Message {
    RankId peer;
    std::int64_t word_begin = 0;
    std::int64_t num_words = 0;
  };
  // Messages in ascending peer order; peers without a block are left out, so both sides know who talks to whom.
  struct Headers {
    std::span<const Message> messages;
    std::span<const std::int32_t> words;
  };
  Headers headers1() const;
  std::span<const Message> expected_headers1() const;  // where to lay what comes in, for take_headers1
  void take_headers1(std::span<const std::int32_t> words);
  Headers headers2() const;
  std::span<const Message> expected_headers2() const;
  void take_headers2(std::span<const std::int32_t> words);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sluice
