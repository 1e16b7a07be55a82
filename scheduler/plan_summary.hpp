// How much work each op of a pass has, on every rank: rows and routes by (source, destination, chunk), without the row
// lists of a plan. It is what the cost model and the simulator need of a batch.
//
//   exact      from plans: add() of a rank's plan tells what that rank sends, receives and computes
//   estimated  from the demand counts (source, expert) that all ranks have after a plan's first exchange. Routes are
//              exact; rows to a rank or node are the expected number of tokens that visit one of its experts. Where a
//              source's routes are K a token, K whole, a token visits K experts (Poisson sampling given its size:
//              Hajek, Ann. Math. Stat. 35, 1964); else visits are independent: rows = T (1 - prod (1 - demand / T)).
//              Chunks get equal shares. tests/scheduler/simulator_test.cpp says how far off that is.
//
// Memory: O(ranks * (nodes + ranks of a node)), times the chunks when exact; a direct exchange has O(ranks^2).
// Thread-safety: plain data. Errors: kInvalidArgument on sizes that do not fit.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/base/topology.hpp"
#include "sluice/scheduler/cost_model.hpp"
#include "sluice/scheduler/placement.hpp"
#include "sluice/scheduler/plan.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice {

class PlanSummary {
 public:
  // Empty and exact, to add plans to. slots_of_rank: int32 [num_ranks]. References must outlive the summary.
  PlanSummary(const Topology& topology, Exchange exchange, std::int32_t num_chunks,
              std::span<const std::int32_t> slots_of_rank);
  // Estimated. gathered: int64 [num_ranks * (num_experts + 2)], as PlanBuilder::take_summaries has it.
  PlanSummary(const Topology& topology, Exchange exchange, const Placement& placement,
              std::span<const std::int64_t> gathered);

  // The plan must have this summary's exchange and chunks.
  void add(const Plan& plan);

  const Topology& topology() const { return *topology_; }
  Exchange exchange() const { return exchange_; }
  bool exact() const { return num_chunks_ > 0; }
  // Of the plans; 0 when estimated: any number will do.
  std::int32_t num_chunks() const { return num_chunks_; }
  std::int64_t tokens(RankId rank) const { return tokens_[rank.index()]; }
  std::int64_t most_tokens() const;

  // Rows (and routes) of one chunk of `num_chunks`.
  struct Amount {
    double rows = 0, routes = 0;
    Amount& operator+=(const Amount& o) {
      rows += o.rows;
      routes += o.routes;
      return *this;
    }
  };
  Amount to_node(RankId source, NodeId node, std::int32_t chunk, std::int32_t num_chunks) const;
  // Own rows over hop 2; `to` may be the source.
  Amount to_rank(RankId source, RankId to, std::int32_t chunk, std::int32_t num_chunks) const;
  Amount handed_on(RankId gateway, RankId to, std::int32_t chunk, std::int32_t num_chunks) const;
  Amount received(RankId rank, SourceClass source, std::int32_t chunk, std::int32_t num_chunks) const;
  double slot_rows(RankId rank, SourceClass source, std::int32_t slot, std::int32_t chunk,
                   std::int32_t num_chunks) const;
  std::int32_t num_slots(RankId rank) const { return slot_ptr_[rank.index() + 1] - slot_ptr_[rank.index()]; }

  // The work of `op` of `rank`'s template; `peer` is the op's peer (a template may be shared, simulator.hpp).
  void op_work(const Template& shape, PassKind pass, const Op& op, RankId rank, std::int32_t peer,
               const LayerShape& layer, OpWork& out) const;

 private:
  using Cell = Amount;
  struct Sums {  // of one rank
    Cell to_nodes, to_others, handed_on, hop1_in;
    double own_partials = 0;
  };
  std::size_t cells(std::size_t index) const { return index * static_cast<std::size_t>(stride_); }
  Amount share(const std::vector<Cell>& cells, std::size_t index, std::int32_t chunk,
               std::int32_t num_chunks) const;
  std::size_t member(RankId rank) const {
    return static_cast<std::size_t>(exchange_topology_.local_index(rank));
  }
  std::size_t pair(RankId from, RankId to) const { return from.index() * num_members_ + member(to); }
  void make_room(std::span<const std::int32_t> slots_of_rank);
  Sums sums(RankId rank, std::int32_t chunk, std::int32_t num_chunks) const;

  const Topology* topology_;
  Topology exchange_topology_;
  Exchange exchange_;
  std::int32_t num_chunks_ = 0;
  std::int32_t stride_ = 1;
  std::size_t num_nodes_ = 0;
  std::size_t num_members_ = 0;  // most ranks of a node of the exchange

  std::vector<std::int64_t> tokens_;    // [num_ranks]
  std::vector<std::int32_t> slot_ptr_;  // [num_ranks + 1]
  std::vector<Cell> to_node_;           // [num_ranks, num_nodes, stride]
  std::vector<Cell> to_rank_;           // [num_ranks, num_members, stride]
  std::vector<Cell> handed_on_;         // [num_ranks, num_members, stride]
  std::vector<Cell> received_;          // [num_ranks, 3, stride]
  std::vector<double> slot_rows_;       // [slots, 3, stride]
  // Sums over the above, by rank: [num_ranks, stride]
  std::vector<Cell> sum_to_node_, sum_to_others_, sum_handed_on_, sum_hop1_in_;
  std::vector<Cell> own_partials_;  // rows only
};

}  // namespace sluice
