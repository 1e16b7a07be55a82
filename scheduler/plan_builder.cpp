#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "sluice/base/hash.hpp"
#include "sluice/scheduler/plan.hpp"

// The inner loops run once per route and must not mispredict: "is this the first route of this token to that
// destination?" is random, so it moves cursors by 0 or 1 instead of branching. Costs are O(routes + ranks + slots).
//
// Header blocks (int32 words), one for each (hop, receiver, home rank):
//   hop 1, home s to gateway g of node n:
//     relay: for each rank d of n: rows(s,d), routes(s,d), row_begin(s,d) and route_begin(s,d) in d's receive list
//     send-list row and route where the block starts (results come back there)
//     token[rows], then (global slot | kFirstRoute, weight bits)[routes]
//   hop 2, gateway g to rank d:
//     g's send-list row and route where the block starts
//     token[rows], then (local slot | kFirstRoute, weight bits)[routes]

namespace sluice {
namespace {

constexpr std::int32_t kFirstRoute = std::int32_t{1} << 30;  // marks the first route of a row
constexpr std::int32_t kSlotMask = kFirstRoute - 1;
constexpr std::int64_t kRelayWords = 4;
constexpr std::int64_t kReturnWords = 2;
constexpr std::int64_t kMaxCount = std::int64_t{1} << 30;

struct RoutePair {
  std::int32_t slot_and_first;
  float weight;
};
static_assert(sizeof(RoutePair) == 8);

constexpr std::int64_t block_words(std::int64_t rows, std::int64_t routes) {
  return rows + 2 * routes;
}

// One term of the order-free hash over a (source, destination) list.
std::uint64_t pair_term(std::int32_t token, std::int32_t slot) {
  const std::uint64_t x = ((static_cast<std::uint64_t>(static_cast<std::uint32_t>(token)) << 32) |
                           static_cast<std::uint32_t>(slot)) *
                          0x9e3779b97f4a7c15ull;
  return x ^ (x >> 29);
}

// What is counted for each destination rank while its rows are found.
struct alignas(32) RankCount {
  std::int32_t last_token;
  std::int32_t rows;
  std::int32_t routes;
  std::uint64_t hash;
};
struct NodeCount {
  std::int32_t last_token;
  std::int32_t rows;
};

// Where the next row and route of a destination go.
struct alignas(32) Cursor {
  std::int32_t last = -1;        // stage row seen last
  std::int32_t row = 0;          // last row written, in the plan's send list
  std::int32_t route = 0;        // next route to write, in the plan's send list
  std::int32_t token_shift = 0;  // words[token_shift + row] is the row's token
  std::int64_t route_shift = 0;  // words[route_shift + 2 * route] is the route's pair
  std::int32_t first_row = 0, first_route = 0;

  Cursor() = default;
  // A block of `num_rows` whose tokens start at `token_begin` in the words.
  Cursor(std::int64_t row_begin, std::int64_t route_begin, std::int64_t token_begin, std::int64_t num_rows)
      : row(static_cast<std::int32_t>(row_begin - 1)),
        route(static_cast<std::int32_t>(route_begin)),
        token_shift(static_cast<std::int32_t>(token_begin - row_begin)),
        route_shift(token_begin + num_rows - 2 * route_begin),
        first_row(static_cast<std::int32_t>(row_begin)),
        first_route(static_cast<std::int32_t>(route_begin)) {}
  std::int32_t num_rows() const { return row + 1 - first_row; }
  std::int32_t num_routes() const { return route - first_route; }
};

// Appends one route to a destination's block, and its row if the destination has not seen it yet.
inline void append(Cursor& c, std::int32_t* words, std::int32_t* row_out, std::int32_t* route_out,
                   std::int32_t stage_row, std::int32_t token, std::int32_t stage_route, std::int32_t slot,
                   float weight) {
  const std::int32_t first = c.last != stage_row;
  c.last = stage_row;
  c.row += first;
  words[c.token_shift + c.row] = token;
  row_out[c.row] = stage_row;
  const RoutePair pair{slot | (first ? kFirstRoute : 0), weight};
  std::memcpy(&words[c.route_shift + 2 * std::int64_t{c.route}], &pair, sizeof pair);
  route_out[c.route] = stage_route;
  ++c.route;
}

}  // namespace

struct PlanBuilder::State {
  RankId rank;
  const Topology& topology;
  const Placement& placement;
  PlanOptions options;
  // The topology that the exchange follows: the real one, or all ranks as one node.
  Topology exchange;
  NodeId my_node;
  std::int32_t my_local = 0;
  std::int32_t num_ranks = 0;
  std::int32_t num_nodes = 0;
  std::int32_t num_members = 0;  // ranks of my node

  RoutingView routing;
  Plan* plan = nullptr;
  std::uint64_t prehash = 0;

  // Per expert; everywhere experts point at the extra entry behind the last rank / key.
  GrowArray<std::int32_t> slot_of_expert, rank_of_expert, key_of_expert;
  GrowArray<std::int32_t>
      member_of_slot;  // [num_slots + 1] local index of the slot's rank in my node, or num_members

  GrowArray<RankCount> rank_count;  // [num_ranks + 1]
  GrowArray<NodeCount> node_count;  // [num_nodes + 1]
  GrowArray<Cursor> cursors;

  GrowArray<std::int64_t> summary, counts, offsets, received_counts;
  GrowArray<std::int64_t> group_cursor, replica_demand;
  std::vector<Message> out1, in1, out2, in2;
  GrowArray<std::int32_t> words1, words2;
  // Own rows of hop 2 are found together with hop 1's; they wait here until hop 2's layout is known.
  GrowArray<std::int32_t> own_words, own_row, own_route;
  std::vector<Segment> own_segments;    // one per member, into own_*
  std::vector<std::int64_t> own_block;  // word where the member's own block starts
  struct BlockStart {
    std::int64_t word, row, route;
  };
  GrowArray<BlockStart> own_at;          // where the member's own block goes in hop 2
  GrowArray<std::int64_t> member_words;  // [num_members]
  GrowArray<std::int32_t> segment_of_rank;
  GrowArray<std::int32_t> row_count, row_cursor, last_node;

  State(RankId r, const Topology& t, const Placement& p, PlanOptions o)
      : rank(r),
        topology(t),
        placement(p),
        options(o),
        exchange(o.exchange == Exchange::kGateway ? t : Topology::uniform(t.num_ranks(), 1)) {
    Require(r.value >= 0 && r.value < t.num_ranks(), ErrorCode::kInvalidArgument, "rank ", r.value,
            " is not in a topology of ", t.num_ranks(), " ranks");
    Require(p.num_ranks == t.num_ranks(), ErrorCode::kInvalidArgument, "placement is for ", p.num_ranks,
            " ranks, topology has ", t.num_ranks());
    require_plannable(p);
    Require(o.num_chunks >= 1, ErrorCode::kInvalidArgument, "num_chunks is ", o.num_chunks,
            ", must be at least 1");
    my_node = exchange.node_of(rank);
    my_local = exchange.local_index(rank);
    num_ranks = exchange.num_ranks();
    num_nodes = exchange.num_nodes();
    num_members = static_cast<std::int32_t>(exchange.ranks_of(my_node).size());

    member_of_slot.resize(static_cast<std::size_t>(p.num_slots()) + 1);
    for (std::int32_t s = 0; s < p.num_slots(); ++s) {
      const RankId owner(p.slot_rank[static_cast<std::size_t>(s)]);
      member_of_slot[s] = exchange.node_of(owner) == my_node ? exchange.local_index(owner) : num_members;
    }
    member_of_slot[p.num_slots()] = num_members;
  }

  const std::vector<std::int32_t>& members() const { return exchange.ranks_of(my_node); }
  bool is_gateway_for(std::int32_t source) const { return exchange.gateway(RankId(source), my_node) == rank; }
  std::int64_t* counts_for(std::int32_t peer) {
    return &counts[static_cast<std::size_t>(peer) * kCountsPerPeer];
  }
  [[noreturn]] void blame(std::int32_t peer, std::string what) const {
    throw Error(ErrorCode::kDisagreement,
                str("rank ", peer, " sent rank ", rank.value, " a bad plan message: ", what));
  }

  void choose_slots(std::span<const std::int64_t> demand);
  void count_destinations();
  void fill_own_lists();
  void lay_out_messages1();
  void lay_out_receive1();
  void hand_on(std::span<const std::int32_t> words);
  void take_rows(std::span<const std::int32_t> words);
  void build_partials();
  void build_partials_over_nodes();
  void build_home();
  void build_chunks();
  void count_traffic();
};

PlanBuilder::PlanBuilder(RankId rank, const Topology& topology, const Placement& placement,
                         PlanOptions options)
    : state_(std::make_unique<State>(rank, topology, placement, options)) {}
PlanBuilder::~PlanBuilder() = default;
PlanBuilder::PlanBuilder(PlanBuilder&&) noexcept = default;
PlanBuilder& PlanBuilder::operator=(PlanBuilder&&) noexcept = default;

// ---- exchange 1: demand ----------------------------------------------------------------------------------------------

void PlanBuilder::begin(const RoutingView& routing, Plan& plan, std::uint64_t extra_hash) {
  State& s = *state_;
  Require(routing.num_experts == s.placement.num_experts, ErrorCode::kInvalidRouting, "routing has ",
          routing.num_experts, " experts, the placement has ", s.placement.num_experts);
  validate(routing);
  Require(routing.num_tokens() < kMaxCount && routing.num_routes() < kMaxCount, ErrorCode::kInvalidRouting,
          "routing has ", routing.num_tokens(), " tokens and ", routing.num_routes(),
          " routes; a rank may have up to ", kMaxCount - 1, " of each");
  s.routing = routing;
  s.plan = &plan;
  plan.rank = s.rank;
  plan.options = s.options;
  plan.num_tokens = static_cast<std::int32_t>(routing.num_tokens());
  plan.num_routes = static_cast<std::int32_t>(routing.num_routes());
  plan.num_experts = routing.num_experts;
  plan.num_local_slots = s.placement.num_slots_of(s.rank);
  plan.placement_version = s.placement.version;

  s.prehash = Hasher()
                  .add(s.placement.hash())
                  .add(s.topology.hash())
                  .add_int(static_cast<int>(s.options.exchange))
                  .add_int(s.options.num_chunks)
                  .add(extra_hash)
                  .value();
  std::int64_t* summary = s.summary.resize(static_cast<std::size_t>(routing.num_experts) + 2);
  summary[0] = routing.num_tokens();
  summary[1] = std::bit_cast<std::int64_t>(s.prehash);
  std::int64_t* demand = summary + 2;
  std::fill_n(demand, routing.num_experts, 0);
  for (const std::int32_t e : routing.expert) ++demand[e];
}

std::span<const std::int64_t> PlanBuilder::summary() const {
  return state_->summary;
}

void PlanBuilder::take_summaries(std::span<const std::int64_t> gathered) {
  State& s = *state_;
  Plan& plan = *s.plan;
  const auto stride = static_cast<std::size_t>(plan.num_experts) + 2;
  Require(gathered.size() == stride * static_cast<std::size_t>(s.num_ranks), ErrorCode::kInvalidArgument,
          "summaries have ", gathered.size(), " values, must be ", stride * s.num_ranks);
  plan.source_tokens.resize(static_cast<std::size_t>(s.num_ranks));
  std::string differ;
  Hasher agreement;
  agreement.add(s.prehash);
  for (std::int32_t r = 0; r < s.num_ranks; ++r) {
    const std::int64_t* summary = &gathered[static_cast<std::size_t>(r) * stride];
    if (std::bit_cast<std::uint64_t>(summary[1]) != s.prehash) differ += str(differ.empty() ? "" : ", ", r);
    if (summary[0] < 0 || summary[0] >= kMaxCount) s.blame(r, str(summary[0], " tokens"));
    plan.source_tokens[static_cast<std::size_t>(r)] = static_cast<std::int32_t>(summary[0]);
    agreement.add_int(summary[0]);
  }
  Require(differ.empty(), ErrorCode::kDisagreement, "rank ", s.rank.value, " disagrees with rank(s) ", differ,
          " about placement, topology, schedule or the order of calls; all ranks must use the same and call "
          "in the "
          "same order");
  GrowArray<std::int64_t>& totals = s.group_cursor;
  totals.assign(static_cast<std::size_t>(plan.num_experts), 0);
  for (std::int32_t r = 0; r < s.num_ranks; ++r) {
    const std::int64_t* demand = &gathered[static_cast<std::size_t>(r) * stride + 2];
    for (std::int32_t e = 0; e < plan.num_experts; ++e) totals[e] += demand[e];
  }
  agreement.add_ints(std::span<const std::int64_t>(totals));
  plan.agreement_hash = agreement.value();

  s.choose_slots(gathered);
  s.count_destinations();
}

void PlanBuilder::State::choose_slots(std::span<const std::int64_t> gathered) {
  const std::int32_t num_experts = plan->num_experts;
  slot_of_expert.resize(static_cast<std::size_t>(num_experts));
  const auto stride = static_cast<std::size_t>(num_experts) + 2;
  std::span<const std::int64_t> demand;
  if (!placement.replicated.empty()) {
    std::int64_t* dense = replica_demand.resize(static_cast<std::size_t>(num_ranks) * stride);
    for (std::int32_t r = 0; r < num_ranks; ++r)
      std::copy_n(&gathered[static_cast<std::size_t>(r) * stride + 2], num_experts,
                  dense + std::int64_t{r} * num_experts);
    demand =
        replica_demand.span(0, static_cast<std::size_t>(num_ranks) * static_cast<std::size_t>(num_experts));
  }
  choose_replicas(placement, topology, demand, rank, slot_of_expert);
  rank_of_expert.resize(static_cast<std::size_t>(num_experts));
  key_of_expert.resize(static_cast<std::size_t>(num_experts));
  for (std::int32_t e = 0; e < num_experts; ++e) {
    const std::int32_t slot = slot_of_expert[e];
    if (slot < 0) {  // everywhere
      rank_of_expert[e] = num_ranks;
      key_of_expert[e] = num_nodes + num_members;
      continue;
    }
    const RankId owner(placement.slot_rank[static_cast<std::size_t>(slot)]);
    const NodeId node = exchange.node_of(owner);
    rank_of_expert[e] = owner.value;
    key_of_expert[e] = node == my_node ? num_nodes + exchange.local_index(owner) : node.value;
  }
}

// ---- exchange 2: row counts and offsets ------------------------------------------------------------------------------

void PlanBuilder::State::count_destinations() {
  RankCount* by_rank = rank_count.resize(static_cast<std::size_t>(num_ranks) + 1);
  for (std::int32_t r = 0; r <= num_ranks; ++r) by_rank[r] = {-1, 0, 0, 0};
  const std::int32_t num_keys = num_nodes + num_members + 1;
  NodeCount* by_key = node_count.resize(static_cast<std::size_t>(num_keys));
  for (std::int32_t k = 0; k < num_keys; ++k) by_key[k] = {-1, 0};

  const std::int64_t* row_ptr = routing.row_ptr.data();
  const std::int32_t* expert = routing.expert.data();
  const std::int32_t* rank_of = rank_of_expert.data();
  const std::int32_t* key_of = key_of_expert.data();
  const std::int32_t* slot_of = slot_of_expert.data();
  for (std::int32_t t = 0; t < plan->num_tokens; ++t) {
    for (std::int64_t i = row_ptr[t]; i < row_ptr[t + 1]; ++i) {
      const std::int32_t e = expert[i];
      RankCount& c = by_rank[rank_of[e]];
      c.rows += c.last_token != t;
      c.last_token = t;
      ++c.routes;
      c.hash += pair_term(t, slot_of[e]);
      NodeCount& n = by_key[key_of[e]];
      n.rows += n.last_token != t;
      n.last_token = t;
    }
  }

  counts.assign(static_cast<std::size_t>(num_ranks * kCountsPerPeer), 0);
  for (std::int32_t r = 0; r < num_ranks; ++r) {
    std::int64_t* out = counts_for(r);
    out[0] = by_rank[r].rows;
    out[1] = by_rank[r].routes;
    out[2] = std::bit_cast<std::int64_t>(by_rank[r].hash);
    out[5] = std::bit_cast<std::int64_t>(plan->agreement_hash);
  }
  for (std::int32_t n = 0; n < num_nodes; ++n) {
    if (n == my_node.value) continue;
    std::int64_t routes = 0;
    for (const std::int32_t d : exchange.ranks_of(NodeId(n))) routes += by_rank[d].routes;
    std::int64_t* out = counts_for(exchange.gateway(rank, NodeId(n)).value);
    out[3] = by_key[n].rows;
    out[4] = routes;
  }
}

std::span<const std::int64_t> PlanBuilder::counts() const {
  return state_->counts;
}

void PlanBuilder::take_counts(std::span<const std::int64_t> received) {
  State& s = *state_;
  Plan& plan = *s.plan;
  Require(received.size() == static_cast<std::size_t>(s.num_ranks * kCountsPerPeer),
          ErrorCode::kInvalidArgument, "counts have ", received.size(), " values, must be ",
          s.num_ranks * kCountsPerPeer);
  std::copy(received.begin(), received.end(), s.received_counts.resize(received.size()));
  s.offsets.assign(static_cast<std::size_t>(s.num_ranks * kOffsetsPerPeer), 0);
  plan.recv1.segments.clear();
  plan.recv2.segments.clear();
  std::int64_t rows1 = 0, routes1 = 0, rows2 = 0, routes2 = 0;
  for (std::int32_t r = 0; r < s.num_ranks; ++r) {
    const std::int64_t* in = &received[static_cast<std::size_t>(r * kCountsPerPeer)];
    if (std::bit_cast<std::uint64_t>(in[5]) != plan.agreement_hash)
      s.blame(r, "its agreement hash differs: ranks saw different demand counts");
    const std::int64_t tokens = plan.source_tokens[static_cast<std::size_t>(r)];
    for (const int k : {0, 3}) {
      const bool gateway_only =
          k == 3 && !(s.exchange.node_of(RankId(r)) != s.my_node && s.is_gateway_for(r));
      if (in[k] < 0 || in[k] > tokens || in[k + 1] < in[k] || in[k + 1] >= kMaxCount ||
          (in[k] == 0 && in[k + 1] != 0) || (gateway_only && in[k] != 0))
        s.blame(r, str(in[k], " rows with ", in[k + 1], " routes, from a source of ", tokens, " tokens"));
    }
    std::int64_t* out = &s.offsets[static_cast<std::size_t>(r * kOffsetsPerPeer)];
    out[0] = rows2;
    out[1] = routes2;
    out[2] = rows1;
    out[3] = routes1;
    if (in[0] > 0) {
      Segment seg;
      seg.peer = s.exchange.gateway(RankId(r), s.my_node).value;
      seg.source = r;
      seg.num_rows = static_cast<std::int32_t>(in[0]);
      seg.num_routes = static_cast<std::int32_t>(in[1]);
      seg.row_begin = static_cast<std::int32_t>(rows2);
      seg.route_begin = static_cast<std::int32_t>(routes2);
      plan.recv2.segments.push_back(seg);
    }
    if (in[3] > 0) {
      Segment seg;
      seg.peer = r;
      seg.source = r;
      seg.num_rows = static_cast<std::int32_t>(in[3]);
      seg.num_routes = static_cast<std::int32_t>(in[4]);
      seg.row_begin = static_cast<std::int32_t>(rows1);
      seg.route_begin = static_cast<std::int32_t>(routes1);
      plan.recv1.segments.push_back(seg);
    }
    rows2 += in[0];
    routes2 += in[1];
    rows1 += in[3];
    routes1 += in[4];
    Require(rows1 < kMaxCount && routes1 < kMaxCount && rows2 < kMaxCount && routes2 < kMaxCount,
            ErrorCode::kInvalidRouting, "rank ", s.rank.value, " would receive ", rows2, " rows with ",
            routes2, " routes and hand on ", rows1, "; a rank may hold fewer than ", kMaxCount);
  }
  plan.recv1.token.resize(static_cast<std::size_t>(rows1));
  plan.recv1.route_ptr.resize(static_cast<std::size_t>(rows1) + 1);
  plan.recv1.slot.resize(static_cast<std::size_t>(routes1));
  plan.recv1.weight.resize(static_cast<std::size_t>(routes1));
  plan.recv2.token.resize(static_cast<std::size_t>(rows2));
  plan.recv2.route_ptr.resize(static_cast<std::size_t>(rows2) + 1);
  plan.recv2.slot.resize(static_cast<std::size_t>(routes2));
  plan.recv2.weight.resize(static_cast<std::size_t>(routes2));
  s.lay_out_receive1();
}

std::span<const std::int64_t> PlanBuilder::offsets() const {
  return state_->offsets;
}

void PlanBuilder::State::lay_out_receive1() {
  in1.clear();
  std::int64_t at = 0;
  for (const Segment& seg : plan->recv1.segments) {
    const std::int64_t words =
        kRelayWords * num_members + kReturnWords + block_words(seg.num_rows, seg.num_routes);
    in1.push_back({RankId(seg.peer), at, words});
    at += words;
  }
}

void PlanBuilder::take_offsets(std::span<const std::int64_t> received) {
  State& s = *state_;
  Require(received.size() == static_cast<std::size_t>(s.num_ranks * kOffsetsPerPeer),
          ErrorCode::kInvalidArgument, "offsets have ", received.size(), " values, must be ",
          s.num_ranks * kOffsetsPerPeer);
  for (std::int32_t r = 0; r < s.num_ranks; ++r)
    for (std::int64_t k = 0; k < kOffsetsPerPeer; ++k) {
      const std::int64_t v = received[static_cast<std::size_t>(r * kOffsetsPerPeer + k)];
      if (v < 0 || v >= kMaxCount) s.blame(r, str("offset ", v));
    }
  std::copy(received.begin(), received.end(), s.offsets.resize(received.size()));
  s.lay_out_messages1();
  s.fill_own_lists();
}

void PlanBuilder::State::lay_out_messages1() {
  SendList& send1 = plan->send1;
  send1.segments.clear();
  out1.clear();
  cursors.resize(static_cast<std::size_t>(num_nodes + num_members) + 1);

  // Hop 1: one block a remote node, addressed to its gateway. Gateways of different nodes are different ranks, but
  // node order need not be rank order: messages are sorted below.
  std::int64_t words = 0, rows = 0, routes = 0;
  for (std::int32_t n = 0; n < num_nodes; ++n) {
    if (n == my_node.value || node_count[n].rows == 0) continue;
    const std::int32_t gateway = exchange.gateway(rank, NodeId(n)).value;
    const std::int64_t* c = counts_for(gateway);
    Segment seg;
    seg.peer = gateway;
    seg.source = rank.value;
    seg.num_rows = static_cast<std::int32_t>(c[3]);
    seg.num_routes = static_cast<std::int32_t>(c[4]);
    seg.row_begin = static_cast<std::int32_t>(rows);
    seg.route_begin = static_cast<std::int32_t>(routes);
    seg.peer_row_begin =
        static_cast<std::int32_t>(offsets[static_cast<std::size_t>(gateway * kOffsetsPerPeer + 2)]);
    seg.peer_route_begin =
        static_cast<std::int32_t>(offsets[static_cast<std::size_t>(gateway * kOffsetsPerPeer + 3)]);
    const std::int64_t head =
        kRelayWords * static_cast<std::int64_t>(exchange.ranks_of(NodeId(n)).size()) + kReturnWords;
    out1.push_back({RankId(gateway), words, head + block_words(seg.num_rows, seg.num_routes)});
    const std::int64_t token_begin = words + head;
    cursors[n] = Cursor(seg.row_begin, seg.route_begin, token_begin, seg.num_rows);
    words += out1.back().num_words;
    rows += seg.num_rows;
    routes += seg.num_routes;
    send1.segments.push_back(seg);
  }
  Require(words < 2 * kMaxCount, ErrorCode::kInvalidRouting, "hop-1 headers of rank ", rank.value, " need ",
          words, " words; split the batch");
  words1.resize(static_cast<std::size_t>(words));
  send1.row.resize(static_cast<std::size_t>(rows));
  send1.route.resize(static_cast<std::size_t>(routes));

  for (std::size_t i = 0; i < out1.size(); ++i) {
    std::int32_t* w = &words1[static_cast<std::size_t>(out1[i].word_begin)];
    const NodeId node = exchange.node_of(out1[i].peer);
    for (const std::int32_t d : exchange.ranks_of(node)) {
      *w++ = static_cast<std::int32_t>(counts_for(d)[0]);
      *w++ = static_cast<std::int32_t>(counts_for(d)[1]);
      *w++ = static_cast<std::int32_t>(offsets[static_cast<std::size_t>(d * kOffsetsPerPeer)]);
      *w++ = static_cast<std::int32_t>(offsets[static_cast<std::size_t>(d * kOffsetsPerPeer + 1)]);
    }
    *w++ = send1.segments[i].row_begin;
    *w++ = send1.segments[i].route_begin;
  }
  std::sort(out1.begin(), out1.end(), [](const Message& a, const Message& b) { return a.peer < b.peer; });
}

void PlanBuilder::State::fill_own_lists() {
  // One pass finds hop-1 blocks, own hop-2 blocks and everywhere routes. All lie in one index space: hop-1 lists
  // first, then own blocks by member, then everywhere; cursors carry the shifts.
  SendList& send1 = plan->send1;
  std::int64_t rows = send1.num_rows(), routes = send1.num_routes(),
               words = static_cast<std::int64_t>(words1.size());
  own_segments.assign(static_cast<std::size_t>(num_members), {});
  own_block.assign(static_cast<std::size_t>(num_members), 0);
  for (std::int32_t m = 0; m < num_members; ++m) {
    const std::int32_t d = members()[static_cast<std::size_t>(m)];
    Segment& seg = own_segments[static_cast<std::size_t>(m)];
    seg.peer = d;
    seg.source = rank.value;
    seg.num_rows = rank_count[d].rows;
    seg.num_routes = rank_count[d].routes;
    seg.row_begin = static_cast<std::int32_t>(rows);
    seg.route_begin = static_cast<std::int32_t>(routes);
    seg.peer_row_begin = static_cast<std::int32_t>(offsets[static_cast<std::size_t>(d * kOffsetsPerPeer)]);
    seg.peer_route_begin =
        static_cast<std::int32_t>(offsets[static_cast<std::size_t>(d * kOffsetsPerPeer + 1)]);
    own_block[static_cast<std::size_t>(m)] = words;
    cursors[num_nodes + m] = Cursor(rows, routes, words, seg.num_rows);
    rows += seg.num_rows;
    routes += seg.num_routes;
    words += block_words(seg.num_rows, seg.num_routes);
  }
  const std::int64_t everywhere_rows = rank_count[num_ranks].rows,
                     everywhere_routes = rank_count[num_ranks].routes;
  cursors[num_nodes + num_members] = Cursor(rows, routes, words, everywhere_rows);
  const std::int64_t first_own_row = send1.num_rows(), first_own_route = send1.num_routes();
  rows += everywhere_rows;
  routes += everywhere_routes;
  words += block_words(everywhere_rows, everywhere_routes);
  Require(words < 2 * kMaxCount, ErrorCode::kInvalidRouting, "headers of rank ", rank.value, " need ", words,
          " words; split the batch");

  // The relay heads are already in words1: own_words takes over behind them through the same buffer.
  const std::size_t head_words = words1.size();
  own_words.resize(static_cast<std::size_t>(words));
  std::copy_n(words1.data(), head_words, own_words.data());
  own_row.resize(static_cast<std::size_t>(rows));
  own_route.resize(static_cast<std::size_t>(routes));
  words1.swap(own_words);

  const std::int64_t* row_ptr = routing.row_ptr.data();
  const std::int32_t* expert = routing.expert.data();
  const float* weight = routing.weight.data();
  const std::int32_t* key_of = key_of_expert.data();
  const std::int32_t* slot_of = slot_of_expert.data();
  const std::int32_t num_tokens = plan->num_tokens;
  std::int32_t* out_words = words1.data();
  std::int32_t* row_out = own_row.data();
  std::int32_t* route_out = own_route.data();
  Cursor* cur = cursors.data();
  for (std::int32_t t = 0; t < num_tokens; ++t)
    for (std::int64_t i = row_ptr[t]; i < row_ptr[t + 1]; ++i) {
      const std::int32_t e = expert[i];
      append(cur[key_of[e]], out_words, row_out, route_out, t, t, static_cast<std::int32_t>(i),
             slot_of[e] & kSlotMask, weight[i]);
    }

  std::copy_n(own_row.data(), first_own_row, send1.row.data());
  std::copy_n(own_route.data(), first_own_route, send1.route.data());

  EverywhereRoutes& everywhere = plan->everywhere;
  everywhere.token.resize(static_cast<std::size_t>(everywhere_routes));
  everywhere.expert.resize(static_cast<std::size_t>(everywhere_routes));
  everywhere.route.resize(static_cast<std::size_t>(everywhere_routes));
  everywhere.weight.resize(static_cast<std::size_t>(everywhere_routes));
  const std::int64_t first = routes - everywhere_routes;
  std::int64_t row = rows - everywhere_rows - 1;
  const std::int64_t pairs = words - 2 * everywhere_routes;
  for (std::int64_t i = 0; i < everywhere_routes; ++i) {
    RoutePair pair;
    std::memcpy(&pair, &words1[static_cast<std::size_t>(pairs + 2 * i)], sizeof pair);
    row += (pair.slot_and_first & kFirstRoute) != 0;
    const std::int32_t route = own_route[static_cast<std::size_t>(first + i)];
    everywhere.route[i] = route;
    everywhere.expert[i] = routing.expert[static_cast<std::size_t>(route)];
    everywhere.token[i] = own_row[static_cast<std::size_t>(row)];
    everywhere.weight[i] = pair.weight;
  }
}

PlanBuilder::Headers PlanBuilder::headers1() const {
  return {state_->out1, state_->words1};
}
std::span<const PlanBuilder::Message> PlanBuilder::expected_headers1() const {
  return state_->in1;
}

// ---- gateway: hop-1 rows become hop-2 rows ---------------------------------------------------------------------------

void PlanBuilder::take_headers1(std::span<const std::int32_t> words) {
  state_->hand_on(words);
}

void PlanBuilder::State::hand_on(std::span<const std::int32_t> words) {
  SendList& send2 = plan->send2;
  ReceiveList& recv1 = plan->recv1;
  const std::int64_t expected = in1.empty() ? 0 : in1.back().word_begin + in1.back().num_words;
  Require(static_cast<std::int64_t>(words.size()) == expected, ErrorCode::kInvalidArgument,
          "hop-1 headers have ", words.size(), " words, must be ", expected);

  // Segments of the send list: by member, then home rank (this rank among them, in rank order).
  send2.segments.clear();
  out2.clear();
  const std::int64_t num_in = static_cast<std::int64_t>(recv1.segments.size());
  std::int64_t rows = 0, routes = 0, at = 0;
  // Cursors of the i-th received source: one a member, and one for routes that belong to none (only from a liar).
  cursors.resize(static_cast<std::size_t>((num_in + 1) * (num_members + 1)));
  const auto cursor_of = [&](std::int64_t i, std::int32_t m) -> Cursor& {
    return cursors[static_cast<std::size_t>(i * (num_members + 1) + m)];
  };
  own_at.resize(static_cast<std::size_t>(num_members));
  for (std::int32_t m = 0; m < num_members; ++m) {
    const std::int32_t d = members()[static_cast<std::size_t>(m)];
    Message message{RankId(d), at, 0};
    bool own_done = false;
    for (std::int64_t i = 0; i <= num_in; ++i) {
      const bool at_end = i == num_in;
      if (!own_done && (at_end || recv1.segments[static_cast<std::size_t>(i)].source > rank.value)) {
        own_done = true;
        Segment seg = own_segments[static_cast<std::size_t>(m)];
        own_at[m] = {at + kReturnWords, rows, routes};
        if (seg.num_rows > 0) {
          seg.row_begin = static_cast<std::int32_t>(rows);
          seg.route_begin = static_cast<std::int32_t>(routes);
          send2.segments.push_back(seg);
          at += kReturnWords + block_words(seg.num_rows, seg.num_routes);
          rows += seg.num_rows;
          routes += seg.num_routes;
        }
      }
      if (at_end) break;
      const Segment& in = recv1.segments[static_cast<std::size_t>(i)];
      const std::int32_t* relay =
          &words[static_cast<std::size_t>(in1[static_cast<std::size_t>(i)].word_begin + kRelayWords * m)];
      Segment seg;
      seg.peer = d;
      seg.source = in.source;
      seg.num_rows = relay[0];
      seg.num_routes = relay[1];
      seg.peer_row_begin = relay[2];
      seg.peer_route_begin = relay[3];
      if (seg.num_rows < 0 || seg.num_rows > in.num_rows || seg.num_routes < seg.num_rows ||
          seg.num_routes > in.num_routes || (seg.num_rows == 0) != (seg.num_routes == 0) ||
          seg.peer_row_begin < 0 || seg.peer_route_begin < 0)
        blame(in.source, str("it hands ", seg.num_rows, " rows with ", seg.num_routes, " routes to rank ", d,
                             ", of ", in.num_rows, " and ", in.num_routes));
      seg.row_begin = static_cast<std::int32_t>(rows);
      seg.route_begin = static_cast<std::int32_t>(routes);
      const std::int64_t token_begin = at + kReturnWords;
      cursor_of(i, m) = Cursor(rows, routes, token_begin, seg.num_rows);
      if (seg.num_rows > 0) {
        send2.segments.push_back(seg);
        at += kReturnWords + block_words(seg.num_rows, seg.num_routes);
        rows += seg.num_rows;
        routes += seg.num_routes;
      }
    }
    message.num_words = at - message.word_begin;
    if (message.num_words > 0) out2.push_back(message);
  }
  Require(at < 2 * kMaxCount, ErrorCode::kInvalidRouting, "hop-2 headers of rank ", rank.value, " need ", at,
          " words; split the batch");

  // A source that lies about its counts may write past its block, never past the buffer: at most its own hop-1 routes.
  std::int64_t slack_rows = 0, slack_routes = 0;
  for (const Segment& in : recv1.segments) {
    slack_rows = std::max<std::int64_t>(slack_rows, in.num_rows);
    slack_routes = std::max<std::int64_t>(slack_routes, in.num_routes);
  }
  words2.resize(static_cast<std::size_t>(at + kReturnWords + block_words(slack_rows, slack_routes) + 2));
  send2.row.resize(static_cast<std::size_t>(rows + slack_rows + 1));
  send2.route.resize(static_cast<std::size_t>(routes + slack_routes + 1));
  std::int64_t block_at = 0;
  for (const Segment& seg : send2.segments) {
    words2[static_cast<std::size_t>(block_at)] = seg.row_begin;
    words2[static_cast<std::size_t>(block_at + 1)] = seg.route_begin;
    block_at += kReturnWords + block_words(seg.num_rows, seg.num_routes);
  }

  for (std::int32_t m = 0; m < num_members; ++m) {
    const Segment& seg = own_segments[static_cast<std::size_t>(m)];
    const BlockStart& to = own_at[m];
    if (seg.num_rows == 0) continue;
    std::copy_n(&words1[static_cast<std::size_t>(own_block[static_cast<std::size_t>(m)])],
                block_words(seg.num_rows, seg.num_routes), &words2[static_cast<std::size_t>(to.word)]);
    std::copy_n(&own_row[static_cast<std::size_t>(seg.row_begin)], seg.num_rows,
                &send2.row[static_cast<std::size_t>(to.row)]);
    std::copy_n(&own_route[static_cast<std::size_t>(seg.route_begin)], seg.num_routes,
                &send2.route[static_cast<std::size_t>(to.route)]);
    // The block carries global slots; a receiver knows its slots by local index.
    std::int32_t* pairs = &words2[static_cast<std::size_t>(to.word + seg.num_rows)];
    for (std::int32_t q = 0; q < seg.num_routes; ++q) {
      const std::int32_t word = pairs[2 * q];
      pairs[2 * q] =
          placement.slot_local_index[static_cast<std::size_t>(word & kSlotMask)] | (word & kFirstRoute);
    }
  }

  const std::int32_t num_slots = placement.num_slots();
  const std::int32_t* member_of = member_of_slot.data();
  const std::int32_t* local_index = placement.slot_local_index.data();
  const std::int32_t num_tokens = plan->num_tokens, num_routes = plan->num_routes;
  for (std::int64_t i = 0; i < num_in; ++i) {
    Segment& in = recv1.segments[static_cast<std::size_t>(i)];
    const std::int32_t* head = &words[static_cast<std::size_t>(in1[static_cast<std::size_t>(i)].word_begin +
                                                               kRelayWords * num_members)];
    in.peer_row_begin = head[0];
    in.peer_route_begin = head[1];
    if (in.peer_row_begin < 0 || in.peer_route_begin < 0)
      blame(in.source, str("its send list starts at ", in.peer_row_begin, ", ", in.peer_route_begin));
    const std::int32_t* token = head + kReturnWords;
    const std::int32_t* pairs = token + in.num_rows;
    cursor_of(i, num_members) = Cursor(rows, routes, at, slack_rows);
    std::copy_n(token, in.num_rows, &recv1.token[static_cast<std::size_t>(in.row_begin)]);
    std::int64_t* route_ptr = recv1.route_ptr.data() + in.row_begin;
    std::int32_t* slot_out = recv1.slot.data() + in.route_begin;
    float* weight_out = recv1.weight.data() + in.route_begin;
    std::int32_t row = -1;
    bool bad = false;
    const std::int32_t last_row = in.num_rows - 1;
    Cursor* cur = &cursor_of(i, 0);
    std::int32_t* out_words = words2.data();
    std::int32_t* row_out = send2.row.data();
    std::int32_t* route_out = send2.route.data();
    for (std::int32_t q = 0; q < in.num_routes; ++q) {
      RoutePair pair;
      std::memcpy(&pair, pairs + 2 * std::int64_t{q}, sizeof pair);
      row += (pair.slot_and_first & kFirstRoute) != 0;
      const std::int32_t row_safe = std::clamp(row, 0, last_row);
      bad |= row_safe != row;
      const std::int32_t slot = pair.slot_and_first & kSlotMask;
      const std::int32_t slot_safe = std::min(slot, num_slots);
      const std::int32_t key = member_of[slot_safe];
      const std::int32_t stage_row = num_tokens + in.row_begin + row_safe;
      append(cur[key], out_words, row_out, route_out, stage_row, token[row_safe],
             num_routes + in.route_begin + q, local_index[slot_safe < num_slots ? slot_safe : 0],
             pair.weight);
      route_ptr[row_safe] = in.route_begin + q + 1;
      slot_out[q] = slot;
      weight_out[q] = pair.weight;
    }
    if (bad || row != last_row) blame(in.source, str(row + 1, " row heads for ", in.num_rows, " rows"));
    for (std::int32_t m = 0; m < num_members; ++m) {
      const std::int32_t* relay =
          &words[static_cast<std::size_t>(in1[static_cast<std::size_t>(i)].word_begin + kRelayWords * m)];
      const Cursor& c = cur[m];
      if (c.num_rows() != relay[0] || c.num_routes() != relay[1])
        blame(in.source,
              str("rank ", members()[static_cast<std::size_t>(m)], " should get ", relay[0], " rows with ",
                  relay[1], " routes, the list holds ", c.num_rows(), " and ", c.num_routes()));
    }
    if (cur[num_members].last != -1) blame(in.source, "a route to a slot that is not in this node");
  }
  // route_ptr held row ends, one place early.
  {
    std::int64_t* p = recv1.route_ptr.data();
    const std::int64_t n = recv1.num_rows();
    for (std::int64_t r = n; r > 0; --r) p[r] = p[r - 1];
    p[0] = 0;
  }
  send2.row.resize(static_cast<std::size_t>(rows));
  send2.route.resize(static_cast<std::size_t>(routes));

  // What will come over hop 2: from each gateway its sources' blocks in rank order.
  in2.clear();
  std::int64_t* by_member = member_words.assign(static_cast<std::size_t>(num_members), 0);
  for (const Segment& seg : plan->recv2.segments)
    by_member[exchange.local_index(RankId(seg.peer))] +=
        kReturnWords + block_words(seg.num_rows, seg.num_routes);
  std::int64_t in_at = 0;
  for (std::int32_t m = 0; m < num_members; ++m) {
    const std::int64_t n = by_member[m];
    if (n > 0) in2.push_back({RankId(members()[static_cast<std::size_t>(m)]), in_at, n});
    in_at += n;
  }
}

PlanBuilder::Headers PlanBuilder::headers2() const {
  return {state_->out2, state_->words2};
}
std::span<const PlanBuilder::Message> PlanBuilder::expected_headers2() const {
  return state_->in2;
}

// ---- expert rank: received rows, expert order, and the way home ------------------------------------------------------

void PlanBuilder::take_headers2(std::span<const std::int32_t> words) {
  State& s = *state_;
  s.take_rows(words);
  if (s.options.exchange == Exchange::kDirect && s.topology.num_nodes() > 1) {
    s.build_partials_over_nodes();
  } else {
    s.build_partials();
  }
  s.build_home();
  s.build_chunks();
  s.count_traffic();
}

void PlanBuilder::State::take_rows(std::span<const std::int32_t> words) {
  ReceiveList& recv2 = plan->recv2;
  const std::int64_t expected = in2.empty() ? 0 : in2.back().word_begin + in2.back().num_words;
  Require(static_cast<std::int64_t>(words.size()) == expected, ErrorCode::kInvalidArgument,
          "hop-2 headers have ", words.size(), " words, must be ", expected);
  std::int64_t* at = member_words.assign(static_cast<std::size_t>(num_members), 0);
  for (const Message& m : in2) at[exchange.local_index(m.peer)] = m.word_begin;

  const std::int32_t num_slots = plan->num_local_slots, num_chunks = options.num_chunks;
  const std::int64_t num_groups = std::int64_t{num_slots} * num_chunks;
  // One group more than there are: routes to slots out of range are counted there, then refused.
  std::int64_t* group = group_cursor.assign(static_cast<std::size_t>(num_groups) + 1, 0);
  for (Segment& seg : recv2.segments) {
    std::int64_t& w = at[exchange.local_index(RankId(seg.peer))];
    seg.peer_row_begin = words[static_cast<std::size_t>(w)];
    seg.peer_route_begin = words[static_cast<std::size_t>(w + 1)];
    const std::int32_t* token = &words[static_cast<std::size_t>(w + kReturnWords)];
    const std::int32_t* pairs = token + seg.num_rows;
    w += kReturnWords + block_words(seg.num_rows, seg.num_routes);
    if (seg.peer_row_begin < 0 || seg.peer_route_begin < 0)
      blame(seg.peer, str("its send list starts at ", seg.peer_row_begin, ", ", seg.peer_route_begin));

    const std::int32_t source_tokens = plan->source_tokens[static_cast<std::size_t>(seg.source)];
    std::int32_t* token_out = &recv2.token[static_cast<std::size_t>(seg.row_begin)];
    bool bad = false;
    std::int32_t before = -1;
    for (std::int32_t r = 0; r < seg.num_rows; ++r) {
      bad |= token[r] <= before;
      before = token[r];
      token_out[r] = token[r];
    }
    if (bad || before >= source_tokens)
      blame(seg.peer, str("tokens of source ", seg.source, " are not ascending below ", source_tokens));

    // Chunk boundaries as rows of this segment.
    std::int32_t chunk = 0;
    std::int32_t chunk_end_row = seg.num_rows;
    const auto end_row_of = [&](std::int32_t c) {
      return static_cast<std::int32_t>(
          std::lower_bound(token, token + seg.num_rows, chunk_begin(source_tokens, c + 1, num_chunks)) -
          token);
    };
    if (num_chunks > 1) chunk_end_row = end_row_of(0);

    std::int64_t* route_ptr = &recv2.route_ptr[static_cast<std::size_t>(seg.row_begin)];
    std::int32_t* slot_out = &recv2.slot[static_cast<std::size_t>(seg.route_begin)];
    float* weight_out = &recv2.weight[static_cast<std::size_t>(seg.route_begin)];
    std::uint64_t hash = 0;
    std::int32_t row = -1;
    const std::int32_t last_row = seg.num_rows - 1;
    const std::int32_t first_slot = placement.rank_slot_ptr[rank.index()];
    for (std::int32_t q = 0; q < seg.num_routes; ++q) {
      RoutePair pair;
      std::memcpy(&pair, pairs + 2 * std::int64_t{q}, sizeof pair);
      row += (pair.slot_and_first & kFirstRoute) != 0;
      const std::int32_t row_safe = std::clamp(row, 0, last_row);
      bad |= row_safe != row;
      const std::int32_t slot = pair.slot_and_first & kSlotMask;
      const bool slot_ok = slot < num_slots;
      bad |= !slot_ok;
      while (row_safe >= chunk_end_row && chunk + 1 < num_chunks) chunk_end_row = end_row_of(++chunk);
      ++group[slot_ok ? chunk * std::int64_t{num_slots} + slot : num_groups];
      hash += pair_term(token[row_safe], first_slot + (slot_ok ? slot : 0));
      route_ptr[row_safe] = seg.route_begin + q + 1;
      slot_out[q] = slot;
      weight_out[q] = pair.weight;
    }
    if (bad || row != last_row)
      blame(seg.peer, str("rows of source ", seg.source, ": ", row + 1, " row heads for ", seg.num_rows,
                          " rows, or a slot outside this rank's ", num_slots));
    const auto promised = std::bit_cast<std::uint64_t>(
        received_counts[static_cast<std::size_t>(seg.source * kCountsPerPeer + 2)]);
    if (hash != promised)
      blame(seg.source, str("its list for rank ", rank.value, " differs from what it announced (pair hash)"));
  }
  {
    std::int64_t* p = recv2.route_ptr.data();
    for (std::int64_t r = recv2.num_rows(); r > 0; --r) p[r] = p[r - 1];
    p[0] = 0;
  }

  // Counting sort into expert order.
  plan->group_ptr.resize(static_cast<std::size_t>(num_groups) + 1);
  std::int64_t total = 0;
  for (std::int64_t g = 0; g < num_groups; ++g) {
    plan->group_ptr[static_cast<std::size_t>(g)] = total;
    total += group[g];
    group[g] = plan->group_ptr[static_cast<std::size_t>(g)];
  }
  plan->group_ptr[static_cast<std::size_t>(num_groups)] = total;
  const auto num_positions = static_cast<std::size_t>(recv2.num_routes());
  std::int32_t* expert_row = plan->expert_row.resize(num_positions);
  float* expert_weight = plan->expert_weight.resize(num_positions);
  std::int32_t* position_of_route = plan->position_of_route.resize(num_positions);
  for (const Segment& seg : recv2.segments) {
    const std::int32_t source_tokens = plan->source_tokens[static_cast<std::size_t>(seg.source)];
    const std::int32_t* token = &recv2.token[static_cast<std::size_t>(seg.row_begin)];
    std::int32_t r = 0;
    for (std::int32_t chunk = 0; chunk < num_chunks; ++chunk) {
      const std::int32_t end_row =
          chunk + 1 == num_chunks ? seg.num_rows
                                  : static_cast<std::int32_t>(
                                        std::lower_bound(token, token + seg.num_rows,
                                                         chunk_begin(source_tokens, chunk + 1, num_chunks)) -
                                        token);
      std::int64_t* cursor = group + chunk * std::int64_t{num_slots};
      for (; r < end_row; ++r) {
        const std::int64_t row = seg.row_begin + r;
        for (std::int64_t q = recv2.route_ptr[static_cast<std::size_t>(row)];
             q < recv2.route_ptr[static_cast<std::size_t>(row) + 1]; ++q) {
          const std::int64_t p = cursor[recv2.slot[static_cast<std::size_t>(q)]]++;
          expert_row[p] = static_cast<std::int32_t>(row);
          expert_weight[p] = recv2.weight[static_cast<std::size_t>(q)];
          position_of_route[q] = static_cast<std::int32_t>(p);
        }
      }
    }
  }

  // Weight gradients: a slot's routes in receive order.
  plan->slot_ptr.resize(static_cast<std::size_t>(num_slots) + 1);
  plan->slot_ptr[0] = 0;
  for (std::int32_t l = 0; l < num_slots; ++l) {
    std::int64_t n = 0;
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      const auto g = static_cast<std::size_t>(c * std::int64_t{num_slots} + l);
      n += plan->group_ptr[g + 1] - plan->group_ptr[g];
    }
    plan->slot_ptr[static_cast<std::size_t>(l) + 1] = plan->slot_ptr[static_cast<std::size_t>(l)] + n;
  }
  if (num_chunks == 1) {
    plan->wgrad_position.resize(0);
    plan->wgrad_row.resize(0);
    return;
  }
  plan->wgrad_position.resize(num_positions);
  plan->wgrad_row.resize(num_positions);
  std::copy_n(plan->slot_ptr.data(), num_slots, group);
  for (std::int32_t row = 0; row < recv2.num_rows(); ++row)
    for (std::int64_t q = recv2.route_ptr[static_cast<std::size_t>(row)];
         q < recv2.route_ptr[static_cast<std::size_t>(row) + 1]; ++q) {
      const std::int64_t i = group[recv2.slot[static_cast<std::size_t>(q)]]++;
      plan->wgrad_position[static_cast<std::size_t>(i)] = position_of_route[q];
      plan->wgrad_row[static_cast<std::size_t>(i)] = row;
    }
}

// Own tokens have at most one partial (this node); each hop-1 row has exactly one.
void PlanBuilder::State::build_partials() {
  const SendList& send2 = plan->send2;
  const std::int32_t num_tokens = plan->num_tokens;
  const std::int32_t num_stage = num_tokens + plan->recv1.num_rows();
  std::int32_t* count = row_count.assign(static_cast<std::size_t>(num_stage), 0);
  const std::int32_t num_sent = send2.num_rows();
  for (std::int32_t i = 0; i < num_sent; ++i) ++count[send2.row[i]];

  std::int32_t* own_ptr = plan->own_partial_ptr.resize(static_cast<std::size_t>(num_tokens) + 1);
  std::int32_t own = 0;
  for (std::int32_t t = 0; t < num_tokens; ++t) {
    own_ptr[t] = own;
    own += count[t] > 0;
  }
  own_ptr[num_tokens] = own;
  plan->num_own_partials = own;
  const std::int32_t num_partials = own + plan->recv1.num_rows();
  std::int64_t* ptr = plan->partial_ptr.resize(static_cast<std::size_t>(num_partials) + 1);
  std::int32_t* cursor = row_cursor.resize(static_cast<std::size_t>(num_stage));
  std::int32_t at = 0;
  for (std::int32_t t = 0; t < num_tokens; ++t) {
    cursor[t] = at;
    ptr[own_ptr[t]] = at;  // overwritten by the next token when this one has no partial
    at += count[t];
  }
  for (std::int32_t r = num_tokens; r < num_stage; ++r) {
    cursor[r] = at;
    ptr[own + r - num_tokens] = at;
    at += count[r];
  }
  ptr[num_partials] = at;
  std::int32_t* position = plan->partial_position.resize(static_cast<std::size_t>(num_sent));
  for (std::int32_t i = 0; i < num_sent; ++i) position[cursor[send2.row[i]]++] = i;
}

// A direct exchange: own tokens have one partial for each real node that holds one of their experts.
void PlanBuilder::State::build_partials_over_nodes() {
  const SendList& send2 = plan->send2;
  const std::int32_t num_tokens = plan->num_tokens;
  segment_of_rank.assign(static_cast<std::size_t>(num_ranks), -1);
  for (std::size_t i = 0; i < send2.segments.size(); ++i)
    segment_of_rank[send2.segments[i].peer] = static_cast<std::int32_t>(i);
  const auto for_each_sent = [&](auto&& visit) {  // nodes ascending, ranks ascending within
    for (std::int32_t n = 0; n < topology.num_nodes(); ++n)
      for (const std::int32_t d : topology.ranks_of(NodeId(n))) {
        const std::int32_t index = segment_of_rank[d];
        if (index < 0) continue;
        const Segment& seg = send2.segments[static_cast<std::size_t>(index)];
        for (std::int32_t i = seg.row_begin; i < seg.row_begin + seg.num_rows; ++i)
          visit(n, send2.row[static_cast<std::size_t>(i)], i);
      }
  };
  std::int32_t* nodes = row_count.assign(static_cast<std::size_t>(num_tokens), 0);
  std::int32_t* last = last_node.assign(static_cast<std::size_t>(num_tokens), -1);
  for_each_sent([&](std::int32_t n, std::int32_t t, std::int32_t) {
    nodes[t] += last[t] != n;
    last[t] = n;
  });
  std::int32_t* own_ptr = plan->own_partial_ptr.resize(static_cast<std::size_t>(num_tokens) + 1);
  own_ptr[0] = 0;
  for (std::int32_t t = 0; t < num_tokens; ++t) own_ptr[t + 1] = own_ptr[t] + nodes[t];
  plan->num_own_partials = own_ptr[num_tokens];
  std::int64_t* ptr = plan->partial_ptr.resize(static_cast<std::size_t>(plan->num_own_partials) + 1);
  std::fill_n(ptr, plan->num_own_partials + 1, 0);
  std::int32_t* partial = row_cursor.resize(static_cast<std::size_t>(num_tokens));
  const auto restart = [&] {
    for (std::int32_t t = 0; t < num_tokens; ++t) {
      partial[t] = own_ptr[t] - 1;
      last[t] = -1;
    }
  };
  restart();
  for_each_sent([&](std::int32_t n, std::int32_t t, std::int32_t) {
    partial[t] += last[t] != n;
    last[t] = n;
    ++ptr[partial[t] + 1];
  });
  for (std::int32_t p = 0; p < plan->num_own_partials; ++p) ptr[p + 1] += ptr[p];
  group_cursor.resize(static_cast<std::size_t>(plan->num_own_partials));
  std::copy_n(ptr, plan->num_own_partials, group_cursor.data());
  std::int32_t* position = plan->partial_position.resize(static_cast<std::size_t>(send2.num_rows()));
  restart();
  for_each_sent([&](std::int32_t n, std::int32_t t, std::int32_t i) {
    partial[t] += last[t] != n;
    last[t] = n;
    position[group_cursor[static_cast<std::size_t>(partial[t])]++] = i;
  });
}

void PlanBuilder::State::build_home() {
  const std::int32_t num_tokens = plan->num_tokens;
  const SendList& send1 = plan->send1;
  const std::int32_t* own_ptr = plan->own_partial_ptr.data();
  std::int32_t* cursor = row_cursor.resize(static_cast<std::size_t>(num_tokens));
  for (std::int32_t t = 0; t < num_tokens; ++t) cursor[t] = own_ptr[t + 1] - own_ptr[t];
  for (std::int32_t i = 0; i < send1.num_rows(); ++i) ++cursor[send1.row[static_cast<std::size_t>(i)]];
  std::int64_t* ptr = plan->home_ptr.resize(static_cast<std::size_t>(num_tokens) + 1);
  std::int32_t at = 0;
  for (std::int32_t t = 0; t < num_tokens; ++t) {
    ptr[t] = at;
    const std::int32_t n = cursor[t];
    cursor[t] = at;
    at += n;
  }
  ptr[num_tokens] = at;
  std::int32_t* position =
      plan->home_position.resize(static_cast<std::size_t>(at) + 1);  // one spare, see below
  const std::int32_t own = plan->num_own_partials;
  std::size_t next = 0;
  for (std::int32_t n = 0; n < num_nodes; ++n) {
    if (n == my_node.value) {
      if (options.exchange == Exchange::kDirect) {
        for (std::int32_t t = 0; t < num_tokens; ++t)
          for (std::int32_t p = own_ptr[t]; p < own_ptr[t + 1]; ++p) position[cursor[t]++] = p;
      } else {
        for (std::int32_t t = 0; t < num_tokens; ++t) {  // 0 or 1: without one the write goes to the spare
          const bool has = own_ptr[t + 1] != own_ptr[t];
          position[has ? cursor[t] : at] = own_ptr[t];
          cursor[t] += has;
        }
      }
    } else if (next < send1.segments.size() &&
               exchange.node_of(RankId(send1.segments[next].peer)).value == n) {
      const Segment& seg = send1.segments[next++];
      for (std::int32_t i = seg.row_begin; i < seg.row_begin + seg.num_rows; ++i)
        position[cursor[send1.row[static_cast<std::size_t>(i)]]++] = own + i;
    }
  }
  plan->home_position.resize(static_cast<std::size_t>(at));
}

void PlanBuilder::State::build_chunks() {
  const std::int32_t num_chunks = options.num_chunks;
  const std::int32_t num_tokens = plan->num_tokens;
  const auto fill = [&](const std::vector<Segment>& segments, GrowArray<std::int32_t>& rows,
                        GrowArray<std::int32_t>& routes, auto&& token_of_row, auto&& route_of_row) {
    const std::size_t stride = static_cast<std::size_t>(num_chunks) + 1;
    rows.resize(segments.size() * stride);
    routes.resize(segments.size() * stride);
    for (std::size_t i = 0; i < segments.size(); ++i) {
      const Segment& seg = segments[i];
      std::int32_t* row = &rows[i * stride];
      std::int32_t* route = &routes[i * stride];
      const std::int32_t end = seg.row_begin + seg.num_rows;
      row[0] = seg.row_begin;
      route[0] = seg.route_begin;
      for (std::int32_t c = 1; c < num_chunks; ++c) {
        const std::int64_t bound =
            chunk_begin(plan->source_tokens[static_cast<std::size_t>(seg.source)], c, num_chunks);
        std::int32_t lo = row[c - 1], hi = end;
        while (lo < hi) {
          const std::int32_t mid = lo + (hi - lo) / 2;
          if (token_of_row(mid) < bound) {
            lo = mid + 1;
          } else {
            hi = mid;
          }
        }
        row[c] = lo;
        route[c] = lo == end ? seg.route_begin + seg.num_routes : route_of_row(seg, lo);
      }
      row[num_chunks] = end;
      route[num_chunks] = seg.route_begin + seg.num_routes;
    }
  };
  ReceiveList& recv1 = plan->recv1;
  ReceiveList& recv2 = plan->recv2;
  SendList& send1 = plan->send1;
  SendList& send2 = plan->send2;
  const auto received_route = [](const ReceiveList& list) {
    return [&list](const Segment&, std::int32_t row) {
      return static_cast<std::int32_t>(list.route_ptr[static_cast<std::size_t>(row)]);
    };
  };
  // In a send list routes ascend with rows: the first route of a row is the first whose stage route belongs to a stage
  // row at or behind it.
  const auto stage_route_begin = [&](std::int32_t stage_row) {
    return stage_row < num_tokens
               ? routing.row_ptr[static_cast<std::size_t>(stage_row)]
               : plan->num_routes + recv1.route_ptr[static_cast<std::size_t>(stage_row - num_tokens)];
  };
  const auto sent_route = [&](const SendList& list) {
    return [&](const Segment& seg, std::int32_t row) {
      const std::int32_t* first = &list.route[static_cast<std::size_t>(seg.route_begin)];
      const std::int64_t bound = stage_route_begin(list.row[static_cast<std::size_t>(row)]);
      return seg.route_begin +
             static_cast<std::int32_t>(std::lower_bound(first, first + seg.num_routes, bound) - first);
    };
  };
  fill(
      recv1.segments, recv1.chunk_row, recv1.chunk_route,
      [&](std::int32_t r) { return recv1.token[static_cast<std::size_t>(r)]; }, received_route(recv1));
  fill(
      recv2.segments, recv2.chunk_row, recv2.chunk_route,
      [&](std::int32_t r) { return recv2.token[static_cast<std::size_t>(r)]; }, received_route(recv2));
  fill(
      send1.segments, send1.chunk_row, send1.chunk_route,
      [&](std::int32_t r) { return send1.row[static_cast<std::size_t>(r)]; }, sent_route(send1));
  fill(
      send2.segments, send2.chunk_row, send2.chunk_route,
      [&](std::int32_t r) {
        const std::int32_t stage = send2.row[static_cast<std::size_t>(r)];
        return stage < num_tokens ? stage : recv1.token[static_cast<std::size_t>(stage - num_tokens)];
      },
      sent_route(send2));
}

void PlanBuilder::State::count_traffic() {
  Traffic& traffic = plan->traffic;
  traffic = {};
  traffic.rows_same_rank = rank_count[rank.value].rows;
  for (const Segment& seg : plan->send2.segments) {
    if (seg.peer == rank.value) continue;
    (topology.same_node(rank, RankId(seg.peer)) ? traffic.rows_in_node : traffic.rows_across_nodes) +=
        seg.num_rows;
  }
  traffic.rows_across_nodes += plan->send1.num_rows();
  for (std::int32_t r = 0; r < num_ranks; ++r) {
    if (r == rank.value) continue;
    (topology.same_node(rank, RankId(r)) ? traffic.flat_rows_in_node : traffic.flat_rows_across_nodes) +=
        rank_count[r].routes;
  }
  traffic.routes_everywhere = rank_count[num_ranks].routes;
}

}  // namespace sluice
