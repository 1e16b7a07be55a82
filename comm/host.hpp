// The host that this process runs on: which one it is, what it has (hwloc), and which part of it the process may use. What
// ranks tell each other of themselves when a group forms, and what `sluice info` prints. Nothing is bound to cores here:
// whoever starts the ranks does that, and this says what came of it.
//
// Thread-safety: any thread. Cost: describe_host() reads the system's files each time, some milliseconds.
#pragma once

#include <cstdint>
#include <string>

namespace sluice::comm {

std::string host_name();  // "unknown" where there is none

// Equal for processes that reach each other over loopback and can map the same shared memory: one running kernel, one
// name, one network, one /dev/shm. So namespaces that pretend to be hosts are hosts.
std::string host_identity();

struct HostDescription {
  std::int32_t packages = 0;  // of the machine, as far as this process is allowed to see it
  std::int32_t cores = 0;
  std::int32_t threads = 0;  // hardware threads
  std::int32_t numa_nodes = 0;
  std::int64_t l3_bytes = 0;   // of one cache; 0: none, or not known
  std::string own_threads;     // hardware threads that this process may run on, "0-7,16"
  std::string own_numa_nodes;  // that they belong to
  std::int32_t num_own_cores = 0;
};
// Throws kNotSupported when hwloc cannot read this machine.
HostDescription describe_host();

}  // namespace sluice::comm
