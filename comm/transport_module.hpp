// What a transport module (libsluice_comm_NAME.so) exports: one factory with C linkage. Module and program are built
// from one version of Sluice; the symbol's name changes whenever Transport's layout does.
#pragma once

#include "sluice/comm/transport.hpp"

namespace sluice::comm {

// Returns a new transport, owned by the caller; throws Error.
using MakeTransport = Transport*(const Topology* topology_override);
inline constexpr const char* kMakeTransportSymbol = "sluice_comm_make_transport_1";

// The function `symbol` of the module of `name`, which stays loaded. Throws kNotSupported.
void* load_module_symbol(std::string_view name, const char* symbol);

}  // namespace sluice::comm
