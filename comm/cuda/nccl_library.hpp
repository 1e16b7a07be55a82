// NCCL, loaded on demand: a communicator that ends on an error instead of waiting for ever.
//
// Ownership: a communicator belongs to its rank. Thread-safety: one thread at a time. Errors: kNotSupported without NCCL
// (or one older than 2.28 where windows are asked for); kTransport with NCCL's text; kTimeout when a deadline passed;
// kPeerLost when Bootstrap::lost says so, which every wait asks. All three end the communicator.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sluice/comm/cuda/bootstrap.hpp"

namespace sluice::comm::cuda {

// Whether NCCL can be loaded here; `why_not` says why it cannot. SLUICE_NCCL_LIBRARY names the file to load instead of
// libnccl.so.2.
bool nccl_available(std::string* why_not = nullptr);
int nccl_version();  // as NCCL_VERSION_CODE

// One transfer between this rank and a peer.
struct NcclTransfer {
  int peer = 0;
  const void* send = nullptr;
  std::size_t send_bytes = 0;
  void* receive = nullptr;
  std::size_t receive_bytes = 0;
};

class NcclCommunicator {
 public:
  using Clock = std::chrono::steady_clock;

  // Collective. The communicator is non-blocking, so `deadline` also ends a set-up whose peers do not come; a `blocking` one
  // has no such deadline.
  NcclCommunicator(const Bootstrap& bootstrap, std::chrono::milliseconds deadline, bool blocking = false);
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  int rank() const { return rank_; }
  int num_ranks() const { return num_ranks_; }

  // All transfers as one group on the stream. Returns when they are enqueued.
  void exchange(const std::vector<NcclTransfer>& transfers, Stream stream);
  // Bytes of all ranks, ranks ascending.
  void all_gather(const void* mine, void* all, std::size_t bytes, Stream stream);
  // bf16 sums of num_ranks blocks of `count`; this rank gets its own.
  void reduce_scatter_bf16(const void* all, void* mine, std::size_t count, Stream stream);

  // Waits on the host until the stream is done, looking at the communicator's asynchronous error meanwhile. On an error
  // or after the deadline the communicator is aborted (kernels in flight end) and the error thrown; the communicator is
  // then dead, others are not touched.
  void wait(Stream stream, std::chrono::milliseconds deadline, const char* phase);
  // Ends everything in flight. Never throws. Returns after two seconds at most: what another communicator holds up on the
  // device ends when that one is aborted.
  void abort() noexcept;
  bool dead() const { return comm_ == nullptr; }

  // Windows of the device API: memory that all ranks of one load/store domain can address.
  void* allocate(std::size_t bytes);
  void release(void* memory) noexcept;
  void* register_window(void* memory, std::size_t bytes);
  void deregister_window(void* window) noexcept;

 private:
  void settle(int result, const char* call, std::chrono::milliseconds deadline);
  // Aborts and throws kPeerLost where the host knows that a rank is gone.
  void end_if_lost(const char* what);

  std::string who() const;  // this rank and its peers, for messages
  void require_alive() const;

  int rank_, num_ranks_;
  std::vector<int> names_;
  std::function<bool()> lost_;
  std::chrono::milliseconds deadline_;
  void* comm_ = nullptr;  // ncclComm_t
};

// Addresses of all parts of a window, as this device sees them. Implemented where NCCL's headers are found.
std::vector<std::byte*> window_parts(void* window, int num_ranks);

}  // namespace sluice::comm::cuda
