#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "sluice/base/hash.hpp"
#include "sluice/scheduler/plan.hpp"

// The inner loops run once per route and must not mispredict: "is this the first route of this token to that
// destination?" is random, so it moves an index by 0 or 1 instead of branching. Routes are sorted by destination in two
// steps, a few hundred at a time so that both work in the nearest cache: first only their numbers, then each
// destination's rows and routes one after the other with all state in registers. Costs are O(routes + ranks + slots).
//
// Header blocks (int32 words), one for each (hop, receiver, home rank):
//   hop 1, home s to gateway g of node n:
//     relay: for each rank d of n: rows(s,d), routes(s,d), row_begin(s,d) and route_begin(s,d) in d's receive list
//     send-list row and route where the block starts (results come back there)
//     (global slot | kFirstRoute, weight bits)[routes], then token[rows]
//   hop 2, gateway g to rank d:
//     g's send-list row and route where the block starts
//     (local slot | kFirstRoute, weight bits)[routes], then token[rows]

namespace sluice {
namespace {

constexpr std::int32_t kFirstRoute = std::int32_t{1} << 30;  // marks the first route of a row
constexpr std::int32_t kSlotMask = kFirstRoute - 1;
constexpr std::int64_t kRelayWords = 4;
constexpr std::int64_t kReturnWords = 2;
constexpr std::int64_t kMaxCount = std::int64_t{1} << 30;

constexpr std::int64_t block_words(std::int64_t rows, std::int64_t routes) {
  return 2 * routes + rows;
}

// The hash of a (source, destination) list: the sum over its routes of slot_factor(slot) * token_term(token). A sum
// has no order, so the source adds up tokens by expert while it counts its demand and multiplies once an expert.
constexpr std::uint64_t token_term(std::int32_t token) {
  const std::uint64_t x =
      (static_cast<std::uint64_t>(static_cast<std::uint32_t>(token)) + 1) * 0x9e3779b97f4a7c15ull;
  return x ^ (x >> 32);
}
constexpr std::uint64_t slot_factor(std::int32_t slot) {
  std::uint64_t x =
      (static_cast<std::uint64_t>(static_cast<std::uint32_t>(slot)) + 1) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 29)) * 0x94d049bb133111ebull;
  return (x ^ (x >> 32)) | 1;
}

// Own routes to one expert.
struct Demand {
  std::uint64_t routes;
  std::uint64_t tokens_hash;  // sum of token_term
};

// Where routes to an expert go.
struct Target {
  std::int32_t key;   // list: a remote node, or num_nodes + member of this node, or behind them: everywhere
  std::int32_t rank;  // num_ranks: everywhere
};

// What goes to each destination rank.
struct RankCount {
  std::int32_t rows;
  std::int32_t routes;
  std::uint64_t hash;
};

// Rows to a rank, while they are found.
struct Seen {
  std::int32_t last;  // token seen last
  std::int32_t rows;
};

// A destination's rows and routes while they are written.
struct List {
  std::int32_t* token;       // [rows] token at the source
  std::int32_t* pair;        // [2 * routes]
  std::int32_t* stage;       // [rows] stage row, in the send list; null where tokens are the stage rows
  std::int32_t first_route;  // where its routes start in the list of routes
  std::int32_t next_route;   // next route to write, in the list of routes
  std::int32_t num_rows;     // rows written
  std::int32_t batch_row;    // rows written before this batch
  std::int32_t last;         // row of the route written last

  // A block with room for `num_routes` pairs before its tokens.
  static List at(std::int32_t* block, std::int64_t num_routes, std::int32_t* stage,
                 std::int64_t first_route) {
    const auto first = static_cast<std::int32_t>(first_route);
    return {block + 2 * num_routes, block, stage, first, first, 0, 0, -1};
  }
  std::int32_t num_routes() const { return next_route - first_route; }
};

inline void write_pair(std::int32_t* at, std::int32_t slot, std::int64_t first, float weight) {
  at[0] = slot | static_cast<std::int32_t>(first << 30);
  std::memcpy(at + 1, &weight, sizeof weight);
}
// What waits in a pair's place until its list is written.
inline std::uint64_t waiting(std::int64_t row, std::int64_t route) {
  return (static_cast<std::uint64_t>(row) << 32) | static_cast<std::uint32_t>(route);
}

// Lists of a ragged array are written from their ends: end[of[i] - shift] falls by one for each i, and `first` + i goes
// there. What was an end is a beginning when all is placed.
inline void place_backwards(const std::int32_t* of, std::int64_t n, std::int64_t* end, std::int32_t shift,
                            std::int32_t first, std::int32_t* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t to = --end[of[i] - shift];
    out[to] = first + static_cast<std::int32_t>(i);
  }
}

// How many routes are sorted at a time: few enough for the nearest cache, enough for every list to get some.
constexpr std::int64_t sort_batch(std::int64_t num_lists) {
  return std::max<std::int64_t>(1024, 32 * num_lists);
}

// Takes a block's pairs apart. Returns whether they hold `num_rows` rows, the first one at the start, and slots below
// `num_slots` only: then walking the first-marks never leaves the rows. A straight loop that vectorises.
inline bool unpack(const std::int32_t* __restrict pairs, std::int32_t num_routes, std::int32_t num_rows,
                   std::int32_t num_slots, std::int32_t* __restrict slot_out, float* __restrict weight_out) {
  std::int32_t marks = 0, out_of_range = 0;
  for (std::int64_t q = 0; q < num_routes; ++q) {
    const std::int32_t word = pairs[2 * q];
    const std::int32_t slot = word & kSlotMask;
    marks += (word >> 30) & 1;
    out_of_range |= slot >= num_slots ? 1 : 0;
    slot_out[q] = slot;
    weight_out[q] = std::bit_cast<float>(pairs[2 * q + 1]);
  }
  return out_of_range == 0 && marks == num_rows && (num_routes == 0 || (pairs[0] & kFirstRoute) != 0);
}

}  // namespace

struct PlanBuilder::State {
  RankId rank;
  const Topology& topology;
  const Placement& placement;
  PlanOptions given;    // the constructor's
  PlanOptions options;  // of this plan
  // The topology that the exchange follows: the real one, or all ranks as one node.
  Topology exchange;
  NodeId my_node;
  std::int32_t my_local = 0;
  std::int32_t num_ranks = 0;
  std::int32_t num_nodes = 0;
  std::int32_t num_members = 0;  // ranks of my node

  RoutingView routing;
  Plan* plan = nullptr;
  std::uint64_t fixed_hash = 0;  // of what the builder was made with
  std::uint64_t prehash = 0;

  GrowArray<std::int32_t>
      member_of_slot;  // [num_slots + 1] local index of the slot's rank in my node, or num_members
  GrowArray<std::uint64_t> factor_of_slot;  // [local slots] slot_factor

  // Exchange 1.
  GrowArray<Demand> demand;                         // [num_experts]
  GrowArray<std::int64_t> summary, replica_demand;  // replica_demand: [num_ranks * num_experts]
  GrowArray<std::uint64_t> totals;                  // [num_experts]

  GrowArray<std::int32_t> slot_of_expert;  // [num_experts]
  GrowArray<Target> target;                // [num_experts]
  GrowArray<std::int32_t>
      wire_slot;  // [num_experts] the slot as the list's receiver knows it: global in hop 1, local in hop 2

  // Own routes, sorted into lists by key (see Target).
  std::int32_t num_keys = 0;
  GrowArray<std::int64_t> list_routes,
      list_word;                       // [num_keys] routes of the list; word where its block starts
  GrowArray<Seen> seen;                // [num_ranks + 1]
  GrowArray<RankCount> rank_count;     // [num_ranks + 1]
  GrowArray<List> lists;               // [num_keys]
  GrowArray<std::int32_t*> next_pair;  // [num_keys] where the list's next route waits
  GrowArray<std::uint64_t>
      waiting_routes;                      // [num_members + 1, batch] received routes on their way into lists
  GrowArray<std::uint64_t*> next_waiting;  // [num_members + 1]
  std::int64_t partials_end = 0;           // where the partials placed so far end
  GrowArray<std::int32_t> row_of_route;    // [recv2 routes]
  GrowArray<std::int32_t> words1, words2;
  GrowArray<std::int32_t> own_route;  // routes of members and everywhere; hop 1's are in the plan

  // Exchange 2.
  GrowArray<std::int64_t> counts, offsets, received_counts;
  std::vector<Message> out1, in1, out2, in2;
  std::vector<Segment> own_segments;  // one per member, route_begin into own_route
  struct BlockAt {
    std::int64_t word, row, route;
  };
  GrowArray<BlockAt>
      relay_at;  // [recv1 segments, num_members] where in hop 2 a source's rows for a member go
  GrowArray<List> relay_lists;             // [num_members]
  GrowArray<std::int64_t> own_word;        // [num_members] where the member's own block goes in hop 2
  GrowArray<std::int64_t> member_words;    // [num_members]
  GrowArray<std::int64_t> segment_word;    // [recv2 segments] where the segment's pairs start
  GrowArray<std::int32_t> group_size;      // [groups] routes of each; then where the next one goes
  GrowArray<std::int64_t> partial_cursor;  // [own partials]
  GrowArray<std::int32_t> segment_of_rank;
  GrowArray<std::int32_t> row_count, row_cursor, last_node;

  State(RankId r, const Topology& t, const Placement& p, PlanOptions o)
      : rank(r),
        topology(t),
        placement(p),
        given(o),
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

    num_keys = num_nodes + num_members + 1;

    std::int32_t* member_of = member_of_slot.resize(static_cast<std::size_t>(p.num_slots()) + 1);
    member_of[p.num_slots()] = num_members;  // slots out of range are looked up here
    for (std::int32_t s = 0; s < p.num_slots(); ++s) {
      const RankId owner(p.slot_rank[static_cast<std::size_t>(s)]);
      member_of[s] = exchange.node_of(owner) == my_node ? exchange.local_index(owner) : num_members;
    }
    const std::int32_t first_slot = p.slot_at(rank, 0).value, num_local = p.num_slots_of(rank);
    std::uint64_t* factor = factor_of_slot.resize(static_cast<std::size_t>(num_local));
    for (std::int32_t l = 0; l < num_local; ++l) factor[l] = slot_factor(first_slot + l);
    fixed_hash = Hasher()
                     .add(p.hash())
                     .add(t.hash())
                     .add_int(static_cast<int>(o.exchange))
                     .add_int(o.num_chunks)
                     .add_int(static_cast<int>(o.split))
                     .value();
  }

  const std::vector<std::int32_t>& members() const { return exchange.ranks_of(my_node); }
  static constexpr std::int64_t kRelayBatch = 1024;  // routes sorted at a time, and the rest of a row
  std::uint64_t* waiting_for(std::int32_t member) {
    return waiting_routes.data() + member * (kRelayBatch + plan->num_experts);
  }
  bool is_gateway_for(std::int32_t source) const { return exchange.gateway(RankId(source), my_node) == rank; }
  std::int64_t* counts_for(std::int32_t peer) {
    return &counts[static_cast<std::size_t>(peer) * kCountsPerPeer];
  }
  [[noreturn]] void blame(std::int32_t peer, std::string what) const {
    throw PlanDisagreement(RankId(peer),
                           str("rank ", peer, " sent rank ", rank.value, " a bad plan message: ", what));
  }

  // First block of a source's rows (chunk 0).
  std::int32_t first_block(std::int32_t source) const {
    return options.block(part_of(options.split, source_class(topology, rank, RankId(source))), 0);
  }

  // A direct exchange over several real nodes: home adds up each node itself.
  bool adds_nodes_itself() const { return options.exchange == Exchange::kDirect && topology.num_nodes() > 1; }

  void count_demand();

  void choose_slots(std::span<const std::int64_t> gathered);
  void list_own_routes();
  void write_own(List& list, const std::int32_t* end);
  void finish_own_lists();
  void write_counts();
  void lay_out_receive1();
  void lay_out_messages1();
  void start_partials();
  void lay_out_send2(std::span<const std::int32_t> words);
  void check_relayed_to_self(std::span<const std::int32_t> words, std::int32_t member) const;
  void copy_own_blocks();
  void write_relayed(List& list, const std::uint64_t* from, const std::uint64_t* to, const Segment& in,
                     const std::int32_t* pairs, SlotId first_slot);
  void sort_relayed(const Segment& in, const std::int32_t* relay, const BlockAt* block_at,
                    const std::int32_t* pairs);
  void hand_on(std::span<const std::int32_t> words);
  void lay_out_receive2();
  void take_rows(std::span<const std::int32_t> words);
  void order_routes();
  void order_weight_gradients();
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
  s.options = s.given;
  plan.rank = s.rank;
  plan.options = s.options;
  plan.num_tokens = static_cast<std::int32_t>(routing.num_tokens());
  plan.num_routes = static_cast<std::int32_t>(routing.num_routes());
  plan.num_experts = routing.num_experts;
  plan.num_local_slots = s.placement.num_slots_of(s.rank);
  plan.placement_version = s.placement.version;

  s.prehash = Hasher().add(s.fixed_hash).add(extra_hash).value();
  s.count_demand();
}

void PlanBuilder::State::count_demand() {
  const auto num_experts = static_cast<std::size_t>(plan->num_experts);
  Demand* by_expert = demand.assign(num_experts, {0, 0});
  const std::int64_t* row_ptr = routing.row_ptr.data();
  const std::int32_t* expert = routing.expert.data();
  for (std::int32_t t = 0; t < plan->num_tokens; ++t) {
    const std::uint64_t term = token_term(t);
    for (std::int64_t i = row_ptr[t], end = row_ptr[t + 1]; i < end; ++i) {
      Demand& d = by_expert[expert[i]];
      d.routes += 1;
      d.tokens_hash += term;
    }
  }
  std::int64_t* out = summary.resize(num_experts + 2);
  out[0] = plan->num_tokens;
  out[1] = std::bit_cast<std::int64_t>(prehash);
  for (std::size_t e = 0; e < num_experts; ++e) out[e + 2] = static_cast<std::int64_t>(by_expert[e].routes);
}

void PlanBuilder::set_cut(std::int32_t num_chunks, SourceSplit split) {
  Require(num_chunks >= 1, ErrorCode::kInvalidArgument, "num_chunks is ", num_chunks, ", must be at least 1");
  state_->options.num_chunks = num_chunks;
  state_->options.split = split;
  state_->plan->options = state_->options;
}

std::span<const std::int64_t> PlanBuilder::summary() const {
  return state_->summary;
}

void PlanBuilder::check_summaries(std::span<const std::int64_t> gathered) const {
  const State& s = *state_;
  const auto stride = static_cast<std::size_t>(s.plan->num_experts) + 2;
  Require(gathered.size() == stride * static_cast<std::size_t>(s.num_ranks), ErrorCode::kInvalidArgument,
          "summaries have ", gathered.size(), " values, must be ", stride * s.num_ranks);
  for (std::int32_t r = 0; r < s.num_ranks; ++r) {
    const std::int64_t* summary = &gathered[static_cast<std::size_t>(r) * stride];
    if (summary[0] < 0 || summary[0] >= kMaxCount) s.blame(r, str(summary[0], " tokens"));
    // Every bit that any count has: a count that is negative or too large shows in it.
    std::int64_t bits = 0;
    for (std::size_t e = 2; e < stride; ++e) bits |= summary[e];
    if (bits >= 0 && bits < kMaxCount) continue;
    for (std::size_t e = 2; e < stride; ++e)
      if (summary[e] < 0 || summary[e] >= kMaxCount)
        s.blame(r, str("a demand of ", summary[e], " routes to expert ", e - 2));
  }
}

// The lowest rank outside the only group of more than half that has one value; invalid when there is none. Every rank
// comes to the same.
static RankId odd_one_out(std::span<const std::int64_t> gathered, std::size_t stride) {
  const std::size_t n = gathered.size() / stride;
  for (std::size_t a = 0; a < n; ++a) {
    std::size_t same = 0;
    RankId other;
    for (std::size_t b = n; b-- > 0;)
      if (gathered[b * stride + 1] == gathered[a * stride + 1])
        ++same;
      else
        other = RankId(static_cast<std::int32_t>(b));
    if (2 * same > n) return other;
  }
  return RankId();
}

void PlanBuilder::take_summaries(std::span<const std::int64_t> gathered) {
  State& s = *state_;
  Plan& plan = *s.plan;
  const auto stride = static_cast<std::size_t>(plan.num_experts) + 2;
  check_summaries(gathered);
  plan.source_tokens.resize(static_cast<std::size_t>(s.num_ranks));
  bool differ = false;
  Hasher agreement;
  agreement.add(s.prehash);
  for (std::int32_t r = 0; r < s.num_ranks; ++r) {
    const std::int64_t* summary = &gathered[static_cast<std::size_t>(r) * stride];
    differ |= std::bit_cast<std::uint64_t>(summary[1]) != s.prehash;
    plan.source_tokens[static_cast<std::size_t>(r)] = static_cast<std::int32_t>(summary[0]);
    agreement.add_int(summary[0]);
  }
  if (differ) {
    // The same words on every rank, whose report others may get: rank 0's side is named first, unless it is the odd one.
    const RankId odd = odd_one_out(gathered, stride);
    const std::int64_t side =
        gathered[odd == RankId(0) ? static_cast<std::size_t>(s.num_ranks - 1) * stride + 1 : 1];
    std::string same, other;
    for (std::int32_t r = 0; r < s.num_ranks; ++r) {
      std::string& list = gathered[static_cast<std::size_t>(r) * stride + 1] == side ? same : other;
      list += str(list.empty() ? "" : ", ", r);
    }
    throw PlanDisagreement(odd,
                           str("rank(s) ", other, " disagree with rank(s) ", same,
                               " about placement, topology, schedule or the order of calls; all ranks must "
                               "use the same and call in the same order"));
  }
  std::uint64_t* totals = s.totals.assign(static_cast<std::size_t>(plan.num_experts), 0);
  for (std::int32_t r = 0; r < s.num_ranks; ++r) {
    const std::int64_t* demand = &gathered[static_cast<std::size_t>(r) * stride + 2];
    for (std::int32_t e = 0; e < plan.num_experts; ++e) totals[e] += static_cast<std::uint64_t>(demand[e]);
  }
  agreement.add_ints(std::span<const std::uint64_t>(s.totals));
  agreement.add_int(s.options.num_chunks).add_int(static_cast<int>(s.options.split));
  plan.agreement_hash = agreement.value();

  s.choose_slots(gathered);
  s.list_own_routes();
  s.finish_own_lists();
  s.write_counts();
}

void PlanBuilder::State::choose_slots(std::span<const std::int64_t> gathered) {
  const std::int32_t num_experts = plan->num_experts;
  slot_of_expert.resize(static_cast<std::size_t>(num_experts));
  const auto stride = static_cast<std::size_t>(num_experts) + 2;
  std::span<const std::int64_t> dense;
  if (!placement.replicated.empty()) {
    std::int64_t* out =
        replica_demand.resize(static_cast<std::size_t>(num_ranks) * static_cast<std::size_t>(num_experts));
    for (std::int32_t r = 0; r < num_ranks; ++r)
      std::copy_n(&gathered[static_cast<std::size_t>(r) * stride + 2], num_experts,
                  out + std::int64_t{r} * num_experts);
    dense = replica_demand;
  }
  choose_replicas(placement, topology, dense, rank, slot_of_expert);
  target.resize(static_cast<std::size_t>(num_experts));
  wire_slot.resize(static_cast<std::size_t>(num_experts));
  for (std::int32_t e = 0; e < num_experts; ++e) {
    const std::int32_t slot = slot_of_expert[e];
    if (slot < 0) {  // everywhere
      target[e] = {num_nodes + num_members, num_ranks};
      wire_slot[e] = 0;
      continue;
    }
    const RankId owner(placement.slot_rank[static_cast<std::size_t>(slot)]);
    const NodeId node = exchange.node_of(owner);
    const bool near = node == my_node;
    target[e] = {near ? num_nodes + exchange.local_index(owner) : node.value, owner.value};
    wire_slot[e] = near ? placement.slot_local_index[static_cast<std::size_t>(slot)] : slot;
  }
}

// ---- own routes ------------------------------------------------------------------------------------------------------

// One pass sorts own routes into lists: by remote node, then by member of this node, then everywhere. How many routes a
// list gets is known from the demand; how many rows comes out, so each block keeps room for a row a route, and a
// message is as long as its rows turn out.
void PlanBuilder::State::list_own_routes() {
  RankCount* by_rank = rank_count.assign(static_cast<std::size_t>(num_ranks) + 1, {0, 0, 0});
  std::int64_t* routes_of = list_routes.assign(static_cast<std::size_t>(num_keys), 0);
  for (std::int32_t e = 0; e < plan->num_experts; ++e) {
    const Demand& d = demand[e];
    RankCount& c = by_rank[target[e].rank];
    c.routes += static_cast<std::int32_t>(d.routes);
    c.hash += slot_factor(slot_of_expert[e]) * d.tokens_hash;
    routes_of[target[e].key] += static_cast<std::int64_t>(d.routes);
  }

  std::int64_t* word_of = list_word.resize(static_cast<std::size_t>(num_keys));
  std::int64_t words = 0;
  for (std::int32_t k = 0; k < num_keys; ++k) {
    if (k < num_nodes && routes_of[k] > 0)
      words += kRelayWords * std::ssize(exchange.ranks_of(NodeId(k))) + kReturnWords;
    word_of[k] = words;
    words += block_words(std::min<std::int64_t>(routes_of[k], plan->num_tokens), routes_of[k]);
  }
  Require(words < 2 * kMaxCount, ErrorCode::kInvalidRouting, "headers of rank ", rank.value, " need ", words,
          " words; split the batch");
  List* list = lists.resize(static_cast<std::size_t>(num_keys));
  std::int32_t** next = next_pair.resize(static_cast<std::size_t>(num_keys));
  std::int32_t* block = words1.resize(static_cast<std::size_t>(words));
  std::int64_t first_route = 0;
  for (std::int32_t k = 0; k < num_keys; ++k) {
    list[k] = List::at(block + word_of[k], routes_of[k], nullptr, first_route);
    next[k] = list[k].pair;
    first_route += routes_of[k];
  }

  Seen* seen_by = seen.assign(static_cast<std::size_t>(num_ranks) + 1, {-1, 0});
  plan->send1.route.resize(static_cast<std::size_t>(plan->num_routes));
  const std::int64_t* row_ptr = routing.row_ptr.data();
  const std::int32_t* expert = routing.expert.data();
  const Target* target_of = target.data();
  const std::int32_t num_tokens = plan->num_tokens;
  for (std::int32_t t = 0; t < num_tokens;) {
    const std::int64_t batch_end = row_ptr[t] + sort_batch(num_keys);
    for (; t < num_tokens && row_ptr[t] < batch_end; ++t)
      for (std::int64_t i = row_ptr[t], end = row_ptr[t + 1]; i < end; ++i) {
        const Target to = target_of[expert[i]];
        Seen& s = seen_by[to.rank];
        s.rows += s.last != t;
        s.last = t;
        std::int32_t* at = next[to.key];
        next[to.key] = at + 2;
        const std::uint64_t word = waiting(t, i);
        std::memcpy(at, &word, sizeof word);
      }
    for (std::int32_t k = 0; k < num_keys; ++k) write_own(list[k], next[k]);
  }
  for (std::int32_t r = 0; r <= num_ranks; ++r) by_rank[r].rows = seen_by[r].rows;
}

// Writes the rows and routes that wait in a list up to `end`.
void PlanBuilder::State::write_own(List& list, const std::int32_t* end) {
  std::int32_t* route = plan->send1.route.data() + list.next_route;
  const std::int32_t* expert = routing.expert.data();
  const float* weight = routing.weight.data();
  const std::int32_t* slot_of = wire_slot.data();
  std::int32_t* token = list.token;
  std::int64_t row = list.num_rows - 1;
  std::int32_t last = list.last;
  for (std::int32_t* pair = list.pair + 2 * std::int64_t{list.num_routes()}; pair < end; pair += 2) {
    std::uint64_t word;
    std::memcpy(&word, pair, sizeof word);
    const auto i = static_cast<std::uint32_t>(word);
    const auto t = static_cast<std::int32_t>(word >> 32);
    const std::int64_t first = t != last;
    last = t;
    row += first;
    token[row] = t;
    *route++ = static_cast<std::int32_t>(i);
    write_pair(pair, slot_of[static_cast<std::uint32_t>(expert[i])], first, weight[i]);
  }
  list.num_rows = static_cast<std::int32_t>(row + 1);
  list.next_route = static_cast<std::int32_t>(route - plan->send1.route.data());
  list.last = last;
}

// Hop 1's lists go to the plan; the others wait for hop 2's layout.
void PlanBuilder::State::finish_own_lists() {
  SendList& send1 = plan->send1;
  std::int64_t rows1 = 0, routes1 = 0;
  for (std::int32_t n = 0; n < num_nodes; ++n) {
    rows1 += lists[n].num_rows;
    routes1 += list_routes[n];
  }
  const std::int32_t* route = send1.route.data();
  std::copy(route + routes1, route + plan->num_routes,
            own_route.resize(static_cast<std::size_t>(plan->num_routes - routes1)));
  send1.route.resize(static_cast<std::size_t>(routes1));
  std::int32_t* row = send1.row.resize(static_cast<std::size_t>(rows1));
  for (std::int32_t n = 0; n < num_nodes; ++n) {
    if (list_routes[n] == 0) continue;
    row = std::copy_n(&words1[static_cast<std::size_t>(list_word[n] + 2 * list_routes[n])], lists[n].num_rows,
                      row);
  }

  const std::int32_t key = num_keys - 1;
  const auto num_everywhere = static_cast<std::size_t>(list_routes[key]);
  EverywhereRoutes& everywhere = plan->everywhere;
  everywhere.token.resize(num_everywhere);
  everywhere.expert.resize(num_everywhere);
  everywhere.route.resize(num_everywhere);
  everywhere.weight.resize(num_everywhere);
  if (num_everywhere == 0) return;
  const std::int32_t* pairs = &words1[static_cast<std::size_t>(list_word[key])];
  const std::int32_t* token = pairs + 2 * num_everywhere - 1;
  const std::int32_t* everywhere_route = own_route.end() - num_everywhere;
  for (std::size_t i = 0; i < num_everywhere; ++i) {
    token += (pairs[2 * i] & kFirstRoute) != 0;
    everywhere.token[i] = *token;
    everywhere.route[i] = everywhere_route[i];
    everywhere.expert[i] = routing.expert[static_cast<std::size_t>(everywhere_route[i])];
    everywhere.weight[i] = std::bit_cast<float>(pairs[2 * i + 1]);
  }
}

// ---- exchange 2: row counts and offsets ------------------------------------------------------------------------------

void PlanBuilder::State::write_counts() {
  counts.assign(static_cast<std::size_t>(num_ranks * kCountsPerPeer), 0);
  for (std::int32_t r = 0; r < num_ranks; ++r) {
    std::int64_t* out = counts_for(r);
    out[0] = rank_count[r].rows;
    out[1] = rank_count[r].routes;
    out[2] = std::bit_cast<std::int64_t>(rank_count[r].hash);
    out[5] = std::bit_cast<std::int64_t>(plan->agreement_hash);
  }
  for (std::int32_t n = 0; n < num_nodes; ++n) {
    if (n == my_node.value) continue;
    std::int64_t* out = counts_for(exchange.gateway(rank, NodeId(n)).value);
    out[3] = lists[n].num_rows;
    out[4] = list_routes[n];
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
      s.blame(r,
              "its agreement hash differs: ranks saw different demand counts, or cut their rows differently");
    const std::int64_t tokens = plan.source_tokens[static_cast<std::size_t>(r)];
    for (const int k : {0, 3}) {
      const bool gateway_only =
          k == 3 && !(s.exchange.node_of(RankId(r)) != s.my_node && s.is_gateway_for(r));
      if (in[k] < 0 || in[k] > tokens || in[k + 1] < in[k] || in[k + 1] >= kMaxCount ||
          in[k + 1] > in[k] * plan.num_experts || (in[k] == 0 && in[k + 1] != 0) ||
          (gateway_only && in[k] != 0))
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
  plan.recv1.route_ptr.resize(static_cast<std::size_t>(rows1) + 1)[rows1] = routes1;
  plan.recv2.token.resize(static_cast<std::size_t>(rows2));
  plan.recv2.route_ptr.resize(static_cast<std::size_t>(rows2) + 1)[rows2] = routes2;
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
  if (!s.adds_nodes_itself()) s.start_partials();
}

void PlanBuilder::State::lay_out_messages1() {
  SendList& send1 = plan->send1;
  send1.segments.clear();
  out1.clear();
  const auto offset = [&](std::int32_t peer, std::int64_t k) {
    return static_cast<std::int32_t>(offsets[static_cast<std::size_t>(peer * kOffsetsPerPeer + k)]);
  };
  const auto append_segment = [&](std::vector<Segment>& to, std::int32_t peer, std::int32_t rows,
                                  std::int64_t routes, std::int64_t k) -> Segment& {
    Segment seg;
    seg.peer = peer;
    seg.source = rank.value;
    seg.num_rows = rows;
    seg.num_routes = static_cast<std::int32_t>(routes);
    seg.peer_row_begin = offset(peer, k);
    seg.peer_route_begin = offset(peer, k + 1);
    return to.emplace_back(seg);
  };

  // Hop 1: one block a remote node, addressed to its gateway. Gateways of different nodes are different ranks, but
  // node order need not be rank order: messages are sorted below.
  std::int32_t rows = 0, routes = 0;
  for (std::int32_t n = 0; n < num_nodes; ++n) {
    if (list_routes[n] == 0) continue;
    const std::int32_t gateway = exchange.gateway(rank, NodeId(n)).value;
    Segment& seg = append_segment(send1.segments, gateway, lists[n].num_rows, list_routes[n], 2);
    seg.row_begin = rows;
    seg.route_begin = routes;
    rows += seg.num_rows;
    routes += seg.num_routes;

    const std::vector<std::int32_t>& ranks = exchange.ranks_of(NodeId(n));
    const std::int64_t head = kRelayWords * std::ssize(ranks) + kReturnWords;
    out1.push_back({RankId(gateway), list_word[n] - head, head + block_words(seg.num_rows, seg.num_routes)});
    std::int32_t* w = &words1[static_cast<std::size_t>(list_word[n] - head)];
    for (const std::int32_t d : ranks) {
      *w++ = rank_count[d].rows;
      *w++ = rank_count[d].routes;
      *w++ = offset(d, 0);
      *w++ = offset(d, 1);
    }
    *w++ = seg.row_begin;
    *w++ = seg.route_begin;
  }
  std::sort(out1.begin(), out1.end(), [](const Message& a, const Message& b) { return a.peer < b.peer; });

  own_segments.clear();
  std::int32_t own_routes = 0;
  for (const std::int32_t d : members()) {
    append_segment(own_segments, d, rank_count[d].rows, rank_count[d].routes, 0).route_begin = own_routes;
    own_routes += rank_count[d].routes;
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
  State& s = *state_;
  const std::int64_t expected = s.in1.empty() ? 0 : s.in1.back().word_begin + s.in1.back().num_words;
  Require(static_cast<std::int64_t>(words.size()) == expected, ErrorCode::kInvalidArgument,
          "hop-1 headers have ", words.size(), " words, must be ", expected);
  s.lay_out_send2(words);
  s.copy_own_blocks();
  s.hand_on(words);
  s.lay_out_receive2();
}

// Segments of the send list: by member, then home rank (this rank among them, in rank order).
void PlanBuilder::State::lay_out_send2(std::span<const std::int32_t> words) {
  SendList& send2 = plan->send2;
  const ReceiveList& recv1 = plan->recv1;
  send2.segments.clear();
  out2.clear();
  const std::int64_t num_in = std::ssize(recv1.segments);
  std::int64_t rows = 0, routes = 0, at = 0;
  const auto append_segment = [&](Segment seg) {
    seg.row_begin = static_cast<std::int32_t>(rows);
    seg.route_begin = static_cast<std::int32_t>(routes);
    send2.segments.push_back(seg);
    at += kReturnWords + block_words(seg.num_rows, seg.num_routes);
    rows += seg.num_rows;
    routes += seg.num_routes;
  };
  relay_at.resize(static_cast<std::size_t>(num_in * num_members));
  own_word.resize(static_cast<std::size_t>(num_members));
  for (std::int32_t m = 0; m < num_members; ++m) {
    const std::int32_t d = members()[static_cast<std::size_t>(m)];
    Message message{RankId(d), at, 0};
    const auto append_own = [&] {
      Segment& own = own_segments[static_cast<std::size_t>(m)];
      own.row_begin = static_cast<std::int32_t>(rows);
      own_word[m] = at + kReturnWords;
      if (own.num_rows > 0) append_segment(own);
    };
    bool own_done = false;
    for (std::int64_t i = 0; i < num_in; ++i) {
      const Segment& in = recv1.segments[static_cast<std::size_t>(i)];
      if (!own_done && in.source > rank.value) {
        own_done = true;
        append_own();
      }
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
      relay_at[static_cast<std::size_t>(i * num_members + m)] = {at + kReturnWords, rows, routes};
      if (seg.num_rows > 0) append_segment(seg);
    }
    if (!own_done) append_own();
    if (d == rank.value) check_relayed_to_self(words, m);
    message.num_words = at - message.word_begin;
    if (message.num_words > 0) out2.push_back(message);
  }
  Require(at < 2 * kMaxCount, ErrorCode::kInvalidRouting, "hop-2 headers of rank ", rank.value, " need ", at,
          " words; split the batch");

  // A source that lies about its counts may write past its block, never past the buffer: it is found out after a batch.
  const std::int64_t slack = kRelayBatch + plan->num_experts;
  words2.resize(static_cast<std::size_t>(at + block_words(slack, slack)));
  send2.row.resize(static_cast<std::size_t>(rows + slack));
  send2.route.resize(static_cast<std::size_t>(routes + slack));
  std::int64_t block_at = 0;
  for (const Segment& seg : send2.segments) {
    words2[static_cast<std::size_t>(block_at)] = seg.row_begin;
    words2[static_cast<std::size_t>(block_at + 1)] = seg.route_begin;
    block_at += kReturnWords + block_words(seg.num_rows, seg.num_routes);
  }
  // From here on the lists have their sizes; the room behind them stays.
  send2.row.resize(static_cast<std::size_t>(rows));
  send2.route.resize(static_cast<std::size_t>(routes));
  plan->partial_position.resize(static_cast<std::size_t>(rows));
}

// What a source of another node said to this rank about its rows here must be what it said to this rank as its gateway;
// else this rank would expect other words of itself than it sends.
void PlanBuilder::State::check_relayed_to_self(std::span<const std::int32_t> words,
                                               std::int32_t member) const {
  std::size_t next = 0;
  const std::vector<Segment>& in = plan->recv1.segments;  // sources ascending
  for (std::int32_t r = 0; r < num_ranks; ++r) {
    std::int64_t relayed[2] = {0, 0};
    if (next < in.size() && in[next].source == r) {
      const std::int32_t* relay =
          &words[static_cast<std::size_t>(in1[next].word_begin + kRelayWords * member)];
      relayed[0] = relay[0];
      relayed[1] = relay[1];
      ++next;
    } else if (exchange.node_of(RankId(r)) == my_node || !is_gateway_for(r)) {
      continue;
    }
    const std::int64_t* said = &received_counts[static_cast<std::size_t>(r * kCountsPerPeer)];
    if (said[0] != relayed[0] || said[1] != relayed[1])
      blame(r, str("it announces ", said[0], " rows with ", said[1], " routes and sends ", relayed[0],
                   " with ", relayed[1]));
  }
}

void PlanBuilder::State::copy_own_blocks() {
  SendList& send2 = plan->send2;
  for (std::int32_t m = num_members - 1; m >= 0; --m) {  // descending, see start_partials
    const Segment& seg = own_segments[static_cast<std::size_t>(m)];
    if (seg.num_rows == 0) continue;
    const std::int32_t* block = &words1[static_cast<std::size_t>(list_word[num_nodes + m])];
    const std::int32_t* token = block + 2 * std::int64_t{seg.num_routes};
    std::copy_n(block, block_words(seg.num_rows, seg.num_routes),
                &words2[static_cast<std::size_t>(own_word[m])]);
    std::copy_n(token, seg.num_rows, &send2.row[static_cast<std::size_t>(seg.row_begin)]);
    // Its routes lie behind those of the segments before it.
    const auto after =
        std::upper_bound(send2.segments.begin(), send2.segments.end(), seg.row_begin,
                         [](std::int32_t row, const Segment& other) { return row < other.row_begin; });
    std::copy_n(&own_route[static_cast<std::size_t>(seg.route_begin)], seg.num_routes,
                &send2.route[static_cast<std::size_t>(std::prev(after)->route_begin)]);
    if (adds_nodes_itself()) continue;
    const std::int32_t* partial_of = plan->own_partial_ptr.data();
    std::int64_t* end = plan->partial_ptr.data();
    std::int32_t* position = plan->partial_position.data();
    for (std::int32_t i = 0; i < seg.num_rows; ++i) position[--end[partial_of[token[i]]]] = seg.row_begin + i;
  }
}

// Own tokens have at most one partial (this node); each hop-1 row has exactly one. partial_ptr first holds where each
// partial ends; writing its rows backwards, from the last member to the first, leaves it where the partial begins.
void PlanBuilder::State::start_partials() {
  const std::int32_t num_tokens = plan->num_tokens;
  std::int32_t* count = row_count.assign(static_cast<std::size_t>(num_tokens), 0);
  for (std::int32_t k = num_nodes; k < num_nodes + num_members; ++k) {
    if (list_routes[k] == 0) continue;
    const std::int32_t* token = &words1[static_cast<std::size_t>(list_word[k] + 2 * list_routes[k])];
    for (std::int32_t i = 0; i < lists[k].num_rows; ++i) ++count[token[i]];
  }
  std::int32_t* own_ptr = plan->own_partial_ptr.resize(static_cast<std::size_t>(num_tokens) + 1);
  std::int64_t* end =
      plan->partial_ptr.resize(static_cast<std::size_t>(num_tokens + plan->recv1.num_rows()) + 1);
  std::int32_t own = 0, at = 0;
  for (std::int32_t t = 0; t < num_tokens; ++t) {
    own_ptr[t] = own;
    at += count[t];
    end[own] = at;  // overwritten by the next token when this one has no partial
    own += count[t] > 0;
  }
  own_ptr[num_tokens] = own;
  end[own] = at;
  plan->num_own_partials = own;
  plan->partial_ptr.resize(static_cast<std::size_t>(own + plan->recv1.num_rows()) + 1);
}

// Writes the rows and routes that wait in [from, to) for a member.
void PlanBuilder::State::write_relayed(List& list, const std::uint64_t* from, const std::uint64_t* to,
                                       const Segment& in, const std::int32_t* pairs, SlotId first_slot) {
  const std::int32_t* token_of = plan->recv1.token.data();
  std::int64_t* num_members_of = plan->partial_ptr.data() + plan->num_own_partials;
  const std::int32_t num_tokens = plan->num_tokens, first_route = plan->num_routes + in.route_begin,
                     slot_begin = first_slot.value;
  std::int32_t* route = plan->send2.route.data() + list.next_route;
  std::int32_t* pair = list.pair + 2 * std::int64_t{list.num_routes()};
  std::int32_t* token = list.token;
  std::int32_t* stage = list.stage;
  std::int64_t row = list.num_rows - 1;
  std::int64_t last = list.last;
  list.next_route += static_cast<std::int32_t>(to - from);
  list.batch_row = list.num_rows;
  for (; from < to; ++from, ++route, pair += 2) {
    const auto q = static_cast<std::uint32_t>(*from);
    const auto r = static_cast<std::int64_t>(*from >> 32);
    const std::int32_t* got = pairs + 2 * std::int64_t{q};
    const std::int64_t first = r != last;
    last = r;
    row += first;
    token[row] = token_of[r];
    stage[row] = num_tokens + static_cast<std::int32_t>(r);
    num_members_of[r] += first;
    *route = first_route + static_cast<std::int32_t>(q);
    write_pair(pair, (got[0] & kSlotMask) - slot_begin, first, std::bit_cast<float>(got[1]));
  }
  list.num_rows = static_cast<std::int32_t>(row + 1);
  list.last = static_cast<std::int32_t>(last);
}

// Sorts the routes of a received segment by member. Nothing in the block is believed: rows, slots, and what each member
// gets of it are checked batch by batch, before anything that they lead to is written outside the lists' slack.
void PlanBuilder::State::sort_relayed(const Segment& in, const std::int32_t* relay, const BlockAt* block_at,
                                      const std::int32_t* pairs) {
  const std::int32_t num_slots = placement.num_slots();
  const std::int32_t* member_of = member_of_slot.data();
  std::int64_t* route_end = plan->recv1.route_ptr.data() + 1;
  std::int64_t* partial_end = plan->partial_ptr.data() + plan->num_own_partials;
  std::uint64_t** next = next_waiting.data();
  List* list = relay_lists.data();
  const std::int64_t num_routes = in.num_routes, end_row = std::int64_t{in.row_begin} + in.num_rows;
  const auto starts_row = [&](std::int64_t route) { return (pairs[2 * route] & kFirstRoute) != 0; };
  if (!starts_row(0)) blame(in.source, "its first route does not start a row");
  std::int64_t row = in.row_begin - 1;
  for (std::int64_t q = 0; q < num_routes;) {
    // A batch ends where a row does: then its rows' partials are complete, too.
    std::int64_t batch_end = std::min(num_routes, q + kRelayBatch);
    const std::int64_t limit = std::min<std::int64_t>(num_routes, batch_end + plan->num_experts);
    while (batch_end < limit && !starts_row(batch_end)) ++batch_end;
    if (batch_end < num_routes && !starts_row(batch_end))
      blame(in.source, str("a row with more routes than the ", plan->num_experts, " experts"));
    std::int32_t heads = 0;
    for (std::int64_t i = q; i < batch_end; ++i) heads += (pairs[2 * i] >> 30) & 1;
    if (row + heads >= end_row || (batch_end == num_routes && row + heads != end_row - 1))
      blame(in.source, str("row heads that are not ", in.num_rows));

    for (std::int32_t m = 0; m <= num_members; ++m) next[m] = waiting_for(m);
    const std::int64_t first_row = row + 1;
    for (; q < batch_end; ++q) {
      const std::int32_t word = pairs[2 * q];
      row += (word >> 30) & 1;
      route_end[row] = in.route_begin + q + 1;
      std::uint64_t*& at = next[member_of[std::min(word & kSlotMask, num_slots)]];
      *at++ = waiting(row, q);
    }
    if (next[num_members] != waiting_for(num_members))
      blame(in.source, str("a route to a slot that is not one of this node's, or not in 0..", num_slots - 1));
    for (std::int32_t m = 0; m < num_members; ++m) {
      const std::int32_t d = members()[static_cast<std::size_t>(m)];
      write_relayed(list[m], waiting_for(m), next[m], in, pairs, placement.slot_at(RankId(d), 0));
      const std::int32_t rows = relay[kRelayWords * m], routes = relay[kRelayWords * m + 1];
      const bool fits = q < num_routes ? list[m].num_rows <= rows && list[m].num_routes() <= routes
                                       : list[m].num_rows == rows && list[m].num_routes() == routes;
      if (!fits)
        blame(in.source,
              str("rank ", d, " should get ", rows, " rows with ", routes, " routes, the list holds ",
                  list[m].num_rows, " and ", list[m].num_routes(), q < num_routes ? " or more" : ""));
    }

    std::int64_t end = partials_end;
    for (std::int64_t r = first_row; r <= row; ++r) partial_end[r] = end += partial_end[r];
    partials_end = end;
    for (std::int32_t m = num_members - 1; m >= 0; --m) {
      const std::int32_t begin = list[m].batch_row;
      place_backwards(list[m].stage + begin, list[m].num_rows - begin, partial_end, plan->num_tokens,
                      static_cast<std::int32_t>(block_at[m].row) + begin, plan->partial_position.data());
    }
  }
}

void PlanBuilder::State::hand_on(std::span<const std::int32_t> words) {
  SendList& send2 = plan->send2;
  ReceiveList& recv1 = plan->recv1;
  recv1.route_ptr[0] = 0;
  if (recv1.segments.empty()) return;
  List* list = relay_lists.resize(static_cast<std::size_t>(num_members));
  const auto num_waiting_lists =
      static_cast<std::size_t>(num_members) + 1;  // the last for routes to no member
  next_waiting.resize(num_waiting_lists);
  waiting_routes.resize(num_waiting_lists * static_cast<std::size_t>(kRelayBatch + plan->num_experts));
  std::int64_t* partial_end = plan->partial_ptr.data() + plan->num_own_partials;
  partials_end = *partial_end;
  std::fill_n(partial_end, recv1.num_rows(), 0);  // the rows' members are counted there first
  for (std::size_t i = 0; i < recv1.segments.size(); ++i) {
    Segment& in = recv1.segments[i];
    const std::int32_t* relay = &words[static_cast<std::size_t>(in1[i].word_begin)];
    const std::int32_t* head = relay + kRelayWords * num_members;
    in.peer_row_begin = head[0];
    in.peer_route_begin = head[1];
    if (in.peer_row_begin < 0 || in.peer_route_begin < 0)
      blame(in.source, str("its send list starts at ", in.peer_row_begin, ", ", in.peer_route_begin));
    const std::int32_t* pairs = head + kReturnWords;
    std::copy_n(pairs + 2 * std::int64_t{in.num_routes}, in.num_rows, recv1.token.data() + in.row_begin);
    const BlockAt* block_at = relay_at.data() + i * static_cast<std::size_t>(num_members);
    for (std::int32_t m = 0; m < num_members; ++m) {
      const BlockAt& to = block_at[m];
      list[m] =
          List::at(words2.data() + to.word, relay[kRelayWords * m + 1], send2.row.data() + to.row, to.route);
    }
    sort_relayed(in, relay, block_at, pairs);
  }
  partial_end[recv1.num_rows()] = partials_end;
}

// What will come over hop 2: from each gateway its sources' blocks in rank order.
void PlanBuilder::State::lay_out_receive2() {
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
  s.build_chunks();
  s.order_routes();
  s.order_weight_gradients();
  if (s.adds_nodes_itself()) s.build_partials_over_nodes();
  s.build_home();
  s.count_traffic();
}

void PlanBuilder::State::take_rows(std::span<const std::int32_t> words) {
  ReceiveList& recv2 = plan->recv2;
  const std::int64_t expected = in2.empty() ? 0 : in2.back().word_begin + in2.back().num_words;
  Require(static_cast<std::int64_t>(words.size()) == expected, ErrorCode::kInvalidArgument,
          "hop-2 headers have ", words.size(), " words, must be ", expected);
  std::int64_t* at = member_words.assign(static_cast<std::size_t>(num_members), 0);
  for (const Message& m : in2) at[exchange.local_index(m.peer)] = m.word_begin;
  std::int64_t* word_of = segment_word.resize(recv2.segments.size());
  for (std::size_t i = 0; i < recv2.segments.size(); ++i) {
    Segment& seg = recv2.segments[i];
    std::int64_t& w = at[exchange.local_index(RankId(seg.peer))];
    seg.peer_row_begin = words[static_cast<std::size_t>(w)];
    seg.peer_route_begin = words[static_cast<std::size_t>(w + 1)];
    if (seg.peer_row_begin < 0 || seg.peer_route_begin < 0)
      blame(seg.peer, str("its send list starts at ", seg.peer_row_begin, ", ", seg.peer_route_begin));
    word_of[i] = w + kReturnWords;
    w += kReturnWords + block_words(seg.num_rows, seg.num_routes);
  }

  // Read and check each source's rows; count their routes by (block, local slot).
  const std::int32_t num_slots = plan->num_local_slots, num_chunks = options.num_chunks;
  std::int32_t* group = group_size.assign(
      static_cast<std::size_t>(num_slots) * static_cast<std::size_t>(options.num_blocks()), 0);
  std::int32_t* row_of = row_of_route.resize(recv2.slot.size());
  const std::uint64_t* factor = factor_of_slot.data();
  const std::int32_t* token_of = recv2.token.data();
  const std::int32_t* slot = recv2.slot.data();
  std::int64_t* route_end = recv2.route_ptr.data() + 1;
  recv2.route_ptr[0] = 0;
  for (std::size_t i = 0; i < recv2.segments.size(); ++i) {
    const Segment& seg = recv2.segments[i];
    const std::int32_t num_rows = seg.num_rows, num_routes = seg.num_routes;
    const std::int32_t* pairs = words.data() + word_of[i];
    const std::int32_t* token = pairs + 2 * std::int64_t{num_routes};
    const std::int32_t source_tokens = plan->source_tokens[static_cast<std::size_t>(seg.source)];
    std::copy_n(token, num_rows, recv2.token.data() + seg.row_begin);
    std::int32_t bad = token[0] < 0 ? 1 : 0;
    for (std::int32_t r = 1; r < num_rows; ++r) bad |= token[r] <= token[r - 1] ? 1 : 0;
    if (bad != 0 || token[num_rows - 1] >= source_tokens)
      blame(seg.peer, str("tokens of source ", seg.source, " are not ascending below ", source_tokens));
    if (!unpack(pairs, num_routes, num_rows, num_slots, recv2.slot.data() + seg.route_begin,
                recv2.weight.data() + seg.route_begin))
      blame(seg.peer, str("rows of source ", seg.source, ": row heads that are not ", num_rows,
                          ", or a slot outside this rank's ", num_slots));

    std::int32_t* count = group + std::int64_t{first_block(seg.source)} * num_slots;
    std::int32_t chunk = 0;
    const auto end_row_of_chunk = [&] {
      return seg.row_begin +
             (std::lower_bound(token, token + num_rows, chunk_begin(source_tokens, chunk + 1, num_chunks)) -
              token);
    };
    std::int64_t end_row = end_row_of_chunk();
    std::int64_t row = seg.row_begin - 1;
    std::uint64_t hash = 0;
    for (std::int64_t q = seg.route_begin, end = q + num_routes; q < end; ++q, pairs += 2) {
      row += (*pairs >> 30) & 1;
      while (row >= end_row) {
        ++chunk;
        end_row = end_row_of_chunk();
        count += num_slots;
      }
      row_of[q] = static_cast<std::int32_t>(row);
      route_end[row] = q + 1;
      const auto l = static_cast<std::uint32_t>(slot[q]);
      ++count[l];
      hash += factor[l] * token_term(token_of[row]);
    }
    const auto promised = std::bit_cast<std::uint64_t>(
        received_counts[static_cast<std::size_t>(seg.source * kCountsPerPeer + 2)]);
    if (hash != promised)
      blame(seg.source, str("its list for rank ", rank.value, " differs from what it announced (pair hash)"));
  }
}

// Counting sort of the received routes by (block, local slot); within one in receive order.
void PlanBuilder::State::order_routes() {
  const ReceiveList& recv2 = plan->recv2;
  const std::int32_t num_slots = plan->num_local_slots, num_chunks = options.num_chunks;
  const std::int64_t num_groups = std::int64_t{num_slots} * options.num_blocks();
  std::int64_t* group_ptr = plan->group_ptr.resize(static_cast<std::size_t>(num_groups) + 1);
  std::int32_t* cursor = group_size.data();
  std::int32_t total = 0;
  for (std::int64_t g = 0; g < num_groups; ++g) {
    group_ptr[g] = total;
    total += std::exchange(cursor[g], total);
  }
  group_ptr[num_groups] = total;
  const std::size_t num_positions = recv2.slot.size();
  std::int32_t* expert_row = plan->expert_row.resize(num_positions);
  float* expert_weight = plan->expert_weight.resize(num_positions);
  std::int32_t* position = plan->position_of_route.resize(num_positions);
  const std::int32_t* slot = recv2.slot.data();
  const float* weight = recv2.weight.data();
  const std::int32_t* row_of = row_of_route.data();
  for (std::size_t i = 0; i < recv2.segments.size(); ++i) {
    const std::int32_t* bound = recv2.chunk_route.data() + i * (static_cast<std::size_t>(num_chunks) + 1);
    const std::int32_t block = first_block(recv2.segments[i].source);
    for (std::int32_t c = 0; c < num_chunks; ++c) {
      std::int32_t* next = cursor + std::int64_t{block + c} * num_slots;
      for (std::int64_t q = bound[c], end = bound[c + 1]; q < end; ++q) {
        const std::int32_t p = next[slot[q]]++;
        position[q] = p;
        expert_row[p] = row_of[q];
        expert_weight[p] = weight[q];
      }
    }
  }
}

// Weight gradients: a slot's routes in receive order.
void PlanBuilder::State::order_weight_gradients() {
  const ReceiveList& recv2 = plan->recv2;
  const std::int32_t num_slots = plan->num_local_slots, num_blocks = options.num_blocks();
  plan->slot_ptr.resize(static_cast<std::size_t>(num_slots) + 1);
  plan->slot_ptr[0] = 0;
  for (std::int32_t l = 0; l < num_slots; ++l) {
    std::int64_t n = 0;
    for (std::int32_t b = 0; b < num_blocks; ++b) {
      const auto g = static_cast<std::size_t>(b * std::int64_t{num_slots} + l);
      n += plan->group_ptr[g + 1] - plan->group_ptr[g];
    }
    plan->slot_ptr[static_cast<std::size_t>(l) + 1] = plan->slot_ptr[static_cast<std::size_t>(l)] + n;
  }
  const std::size_t num_positions = num_blocks == 1 ? 0 : recv2.slot.size();
  plan->wgrad_position.resize(num_positions);
  plan->wgrad_row.resize(num_positions);
  if (num_blocks == 1) return;
  std::int32_t* cursor = group_size.data();
  for (std::int32_t l = 0; l < num_slots; ++l) cursor[l] = static_cast<std::int32_t>(plan->slot_ptr[l]);
  for (std::size_t q = 0; q < num_positions; ++q) {
    const std::int32_t i = cursor[recv2.slot[q]]++;
    const std::int32_t p = plan->position_of_route[q];
    plan->wgrad_position[i] = p;
    plan->wgrad_row[i] = plan->expert_row[p];
  }
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
  std::copy_n(ptr, plan->num_own_partials,
              partial_cursor.resize(static_cast<std::size_t>(plan->num_own_partials)));
  std::int32_t* position = plan->partial_position.resize(static_cast<std::size_t>(send2.num_rows()));
  restart();
  for_each_sent([&](std::int32_t n, std::int32_t t, std::int32_t i) {
    partial[t] += last[t] != n;
    last[t] = n;
    position[partial_cursor[static_cast<std::size_t>(partial[t])]++] = i;
  });
}

// home_ptr first holds where each token's rows end; writing them backwards, from the last node to the first, leaves it
// where they begin.
void PlanBuilder::State::build_home() {
  const std::int32_t num_tokens = plan->num_tokens;
  const SendList& send1 = plan->send1;
  const std::int32_t* own_ptr = plan->own_partial_ptr.data();
  std::int32_t* count = row_count.resize(static_cast<std::size_t>(num_tokens));
  for (std::int32_t t = 0; t < num_tokens; ++t) count[t] = own_ptr[t + 1] - own_ptr[t];
  for (const std::int32_t t : send1.row) ++count[t];
  std::int64_t* end = plan->home_ptr.resize(static_cast<std::size_t>(num_tokens) + 1);
  std::int32_t total = 0;
  for (std::int32_t t = 0; t < num_tokens; ++t) end[t] = total += count[t];
  end[num_tokens] = total;

  const std::int32_t own = plan->num_own_partials;
  std::int32_t* position =
      plan->home_position.resize(static_cast<std::size_t>(total) + 1);  // one spare, see below
  const auto place_own = [&] {
    if (adds_nodes_itself()) {
      for (std::int32_t t = 0; t < num_tokens; ++t)
        for (std::int32_t p = own_ptr[t + 1] - 1; p >= own_ptr[t]; --p) position[--end[t]] = p;
    } else {
      for (std::int32_t t = 0; t < num_tokens; ++t) {  // 0 or 1: without one the write goes to the spare
        const std::int32_t has = own_ptr[t + 1] - own_ptr[t];
        end[t] -= has;
        position[has != 0 ? end[t] : total] = own_ptr[t];
      }
    }
  };
  bool own_placed = false;
  for (auto seg = send1.segments.rbegin(); seg != send1.segments.rend(); ++seg) {
    if (!own_placed && exchange.node_of(RankId(seg->peer)) < my_node) {
      place_own();
      own_placed = true;
    }
    const std::int32_t* row = send1.row.data() + seg->row_begin;
    place_backwards(row, seg->num_rows, end, 0, own + seg->row_begin, position);
  }
  if (!own_placed) place_own();
  plan->home_position.resize(static_cast<std::size_t>(total));
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
