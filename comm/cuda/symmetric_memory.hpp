// Device memory of the same size on every GPU of a group, each part of which every member can load from and store to.
//
// Two ways to map it, with the same result, plain pointers:
//   kNccl     a window of NCCL's device API (2.28 or newer), load/store accessible to all ranks of the group. NCCL's
//             multicast (NVLS) is neither asked for nor used; NCCL_NVLS_ENABLE=0 is set if the caller has not set it.
//   kCudaIpc  CUDA IPC between processes, peer access between devices of one process.
// kBest is kCudaIpc, which needs no communicator; measured, the two have the same speed.
//
// Ownership: the object owns its part; parts of others stay mapped as long as it lives. Its destructor waits for nobody:
// the caller sees to it that no peer still stores into this part (RowExchange's destructor says how).
// Thread-safety: construct and destroy on the rank's thread, with the rank's device current. Pointers may be used by any.
// Blocking: the constructor is collective.
// Errors: kNotSupported where two devices cannot reach each other, or kNccl without NCCL; kOutOfMemory.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <vector>

#include "sluice/comm/cuda/bootstrap.hpp"

namespace sluice::comm::cuda {

class NcclCommunicator;

enum class PeerPath { kBest, kNccl, kCudaIpc };

class SymmetricMemory {
 public:
  // communicator: required for kNccl, of the same ranks; must outlive the object.
  SymmetricMemory(const Bootstrap& bootstrap, std::size_t bytes, PeerPath path,
                  NcclCommunicator* communicator);
  ~SymmetricMemory();
  SymmetricMemory(const SymmetricMemory&) = delete;
  SymmetricMemory& operator=(const SymmetricMemory&) = delete;

  std::size_t bytes() const { return bytes_; }
  // The part of `rank` as this rank's device addresses it.
  std::byte* part(int rank) const { return parts_[static_cast<std::size_t>(rank)]; }
  std::string_view path_name() const { return window_ != nullptr ? "nccl" : "cuda-ipc"; }

 private:
  void map_by_ipc(const Bootstrap& bootstrap);
  void map_by_nccl(NcclCommunicator& communicator);
  void release() noexcept;

  int rank_;
  std::size_t bytes_;
  std::byte* own_ = nullptr;
  std::vector<std::byte*> parts_;
  std::vector<bool> opened_;  // by IPC
  NcclCommunicator* communicator_ = nullptr;
  void* window_ = nullptr;  // ncclWindow_t
};

}  // namespace sluice::comm::cuda
