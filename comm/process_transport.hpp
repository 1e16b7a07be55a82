// Ranks are processes that found each other over the rendezvous. Which bytes take which way is a matter of paths
// (data_path.hpp): every peer has one, so a group can move rows of a node through shared memory and those between nodes
// over a network.
#pragma once

#include <memory>
#include <string_view>

#include "sluice/comm/transport.hpp"

namespace sluice::comm {

// Whether `name` is a transport of this kind.
bool is_process_transport(std::string_view name);
// Joins the group that the launcher says. Collective; blocks until all ranks are there or options.timeout has passed.
std::unique_ptr<Transport> join_group(std::string_view name, const Topology* topology_override,
                                      const JoinOptions& options);

}  // namespace sluice::comm
