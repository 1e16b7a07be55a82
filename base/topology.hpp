// Which ranks share a node, and what the links between them are declared or measured to do.
//
// A Topology is immutable data, equal on all ranks (its hash is part of the agreement check). Pretended nodes
// (from `topology.nodes` in the config) are the same data with `declared` set, so that reports can label them.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "sluice/base/ids.hpp"

namespace sluice {

// One direction of one link. bytes_per_s == 0 means "as fast as the machine goes": nothing is emulated.
struct LinkSpeed {
  double bytes_per_s = 0;
  std::chrono::nanoseconds latency{0};

  bool limited() const { return bytes_per_s > 0 || latency.count() > 0; }
};

class Topology {
 public:
  // nodes[n] lists the ranks of node n in ascending order; together they are 0..num_ranks-1, each once; no node is
  // empty. Throws kInvalidConfig naming the node and rank at fault.
  explicit Topology(std::vector<std::vector<std::int32_t>> nodes);

  // num_nodes equal nodes of consecutive ranks. Throws if num_ranks is not a multiple of num_nodes.
  static Topology uniform(std::int32_t num_ranks, std::int32_t num_nodes);

  std::int32_t num_ranks() const { return static_cast<std::int32_t>(node_of_.size()); }
  std::int32_t num_nodes() const { return static_cast<std::int32_t>(nodes_.size()); }
  // int32 [ranks of the node], ascending
  const std::vector<std::int32_t>& ranks_of(NodeId node) const { return nodes_[node.index()]; }
  NodeId node_of(RankId rank) const { return NodeId(node_of_[rank.index()]); }
  // Position of the rank among the ranks of its node.
  std::int32_t local_index(RankId rank) const { return local_index_[rank.index()]; }
  bool same_node(RankId a, RankId b) const { return node_of_[a.index()] == node_of_[b.index()]; }
  // The rank of `node` that takes in what `source` sends to that node and hands it on. It is the source itself when
  // the source lives there.
  RankId gateway(RankId source, NodeId node) const {
    const auto& ranks = nodes_[node.index()];
    return RankId(ranks[static_cast<std::size_t>(local_index(source)) % ranks.size()]);
  }

  bool declared() const { return declared_; }
  void set_declared(bool declared) { declared_ = declared; }

  LinkSpeed in_node;       // between two ranks of one node, a rank each way
  LinkSpeed across_nodes;  // between ranks of different nodes, a rank each way

  const LinkSpeed& link(RankId a, RankId b) const { return same_node(a, b) ? in_node : across_nodes; }

  std::uint64_t hash() const;
  // "4 ranks on 2 nodes: {0,1} {2,3}"
  std::string describe() const;

 private:
  std::vector<std::vector<std::int32_t>> nodes_;
  std::vector<std::int32_t> node_of_;
  std::vector<std::int32_t> local_index_;
  bool declared_ = false;
};

}  // namespace sluice
