// The loads that one layer of a workload puts on ranks under a placement that changes bit by bit: what count_layer() counts,
// kept up to date. Moving the routes of one (source, expert) to another rank costs the number of those routes.
//
// Which copy a source takes: on its rank, else in its node, else any, there the least loaded so far. choose_all_replicas()
// makes the open choices in one order for the whole placement; here they are made when an expert's copies change, so
// loads differ where several copies qualify, and a search that keeps what looks better drifts away from the rule:
// follow_rule() brings it back.
// Thread-safety: none. The topology and the workload must outlive it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/scheduler/workload.hpp"

namespace sluice {

class Replay {
 public:
  Replay(const Topology& topology, const Workload& workload, std::size_t layer);

  // The experts' copies: ranks ascending. Every source of the expert is directed anew.
  void set_copies(std::int32_t expert, std::span<const std::int32_t> ranks);
  // All sources as choose_all_replicas() directs them.
  void follow_rule(const Placement& placement);
  // From now on changes are noted, so that undo() takes them back.
  void mark() { log_.clear(); }
  void undo();

  struct Load {
    std::vector<std::int64_t> routes, in_node, across;  // int64 [ranks], as in LayerLoad
    std::int64_t node_crossings = 0;
  };
  const Load& load() const { return load_; }

 private:
  void direct(std::size_t source, std::size_t expert, std::int32_t to);
  struct Change {
    std::int32_t source, expert, from;
  };
  const Topology& topology_;
  std::size_t ranks_, nodes_, experts_;
  std::vector<std::int32_t> node_of_;   // int32 [ranks]
  std::vector<std::int32_t> gateway_;   // int32 [ranks, nodes]
  std::vector<std::int64_t> ptr_;       // int64 [experts * ranks + 1], into tokens_
  std::vector<std::int32_t> tokens_;    // int32 [routes], by expert, then source
  std::vector<std::int64_t> demand_;    // int64 [ranks, experts]
  std::vector<std::int32_t> slot_of_;   // int32 [ranks, experts], of follow_rule()
  std::vector<std::int32_t> dest_;      // int32 [ranks, experts], -1: nowhere yet
  std::vector<std::uint16_t> to_rank_;  // uint16 [num_tokens, ranks], routes
  std::vector<std::uint16_t> to_node_;  // uint16 [num_tokens, nodes]
  Load load_;
  std::vector<Change> log_;
};

}  // namespace sluice
