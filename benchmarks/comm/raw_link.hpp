// The raw way over the same wire as a transport, for link_benchmark to stand beside it. Made by ranks 0 and 1 together;
// other ranks only take part in making it. Rank 0 measures.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "sluice/comm/collectives.hpp"

namespace sluice::bench {

class RawLink {
 public:
  virtual ~RawLink() = default;
  virtual std::string name() const = 0;
  // It may not run while a transport lives, as MPI's rule is.
  virtual bool needs_all() const { return false; }
  // Whether every message lies in the same place, as in ucx_perftest; else they follow each other through the buffers.
  virtual bool one_place() const { return false; }
  // Microseconds one way of a message of 8 bytes, of `pings` there and back; 0: it has none.
  virtual double ping_us(int pings) = 0;
  // Microseconds of `count` messages from rank 0 to rank 1, until all are there.
  virtual double stream_us(std::size_t bytes, std::size_t count) = 0;
};

// Buffers of a rank: as large as the transport's.
struct RawBuffers {
  std::span<const std::byte> source;
  std::span<std::byte> sink;
};

// One thread's memcpy, at rank 0.
std::unique_ptr<RawLink> make_raw_memcpy(comm::Collectives& collectives, RawBuffers buffers);
// A blocking socket over loopback: TCP_NODELAY, one loop that writes and one that reads.
std::unique_ptr<RawLink> make_raw_socket(comm::Collectives& collectives, RawBuffers buffers);
// Debian's ucx_perftest, tag_lat and tag_bw, both sides started by the ranks, with their environment.
std::unique_ptr<RawLink> make_raw_ucx_perftest(comm::Collectives& collectives);
// MPI_Send and MPI_Recv for latency; for bandwidth all messages posted at once. Null when built without MPI.
std::unique_ptr<RawLink> make_raw_mpi(RawBuffers buffers);

}  // namespace sluice::bench
