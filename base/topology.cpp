#include "sluice/base/topology.hpp"

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"

namespace sluice {

Topology::Topology(std::vector<std::vector<std::int32_t>> nodes) : nodes_(std::move(nodes)) {
  std::size_t num_ranks = 0;
  for (const auto& ranks : nodes_) num_ranks += ranks.size();
  Require(num_ranks > 0, ErrorCode::kInvalidConfig,
          "topology has no ranks; name at least one node with one rank");
  node_of_.assign(num_ranks, -1);
  local_index_.assign(num_ranks, -1);
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    Require(!nodes_[n].empty(), ErrorCode::kInvalidConfig, "node ", n, " of the topology has no ranks");
    for (std::size_t i = 0; i < nodes_[n].size(); ++i) {
      const std::int32_t rank = nodes_[n][i];
      Require(rank >= 0 && static_cast<std::size_t>(rank) < num_ranks, ErrorCode::kInvalidConfig, "node ", n,
              " names rank ", rank, "; ranks must be 0..", num_ranks - 1, " without gaps");
      Require(node_of_[rank] < 0, ErrorCode::kInvalidConfig, "rank ", rank, " is in node ", node_of_[rank],
              " and again in node ", n);
      Require(i == 0 || nodes_[n][i - 1] < rank, ErrorCode::kInvalidConfig, "ranks of node ", n,
              " are not ascending at rank ", rank);
      node_of_[rank] = static_cast<std::int32_t>(n);
      local_index_[rank] = static_cast<std::int32_t>(i);
    }
  }
}

Topology Topology::uniform(std::int32_t num_ranks, std::int32_t num_nodes) {
  Require(num_ranks > 0 && num_nodes > 0 && num_ranks % num_nodes == 0, ErrorCode::kInvalidConfig,
          "cannot put ", num_ranks, " ranks on ", num_nodes,
          " equal nodes; list the ranks of each node instead");
  const std::int32_t node_size = num_ranks / num_nodes;
  std::vector<std::vector<std::int32_t>> nodes(static_cast<std::size_t>(num_nodes));
  for (std::int32_t r = 0; r < num_ranks; ++r) nodes[static_cast<std::size_t>(r / node_size)].push_back(r);
  return Topology(std::move(nodes));
}

std::uint64_t Topology::hash() const {
  Hasher h;
  h.add_ints(node_of_);
  for (const LinkSpeed& link : {in_node, across_nodes})
    h.add_float(link.bytes_per_s).add_int(link.latency.count());
  return h.value();
}

std::string Topology::describe() const {
  std::string out = str(num_ranks(), num_ranks() == 1 ? " rank on " : " ranks on ", num_nodes(),
                        num_nodes() == 1 ? " node:" : " nodes:");
  for (const auto& ranks : nodes_) {
    out += " {";
    for (std::size_t i = 0; i < ranks.size(); ++i) out += str(i ? "," : "", ranks[i]);
    out += "}";
  }
  return out;
}

}  // namespace sluice
