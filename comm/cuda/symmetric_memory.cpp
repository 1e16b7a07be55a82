#include "sluice/comm/cuda/symmetric_memory.hpp"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>

#include "sluice/comm/cuda/nccl_library.hpp"

namespace sluice::comm::cuda {
namespace {

// What ranks tell each other about their part. Same process: the pointer itself; else the handle.
struct Announcement {
  std::int64_t process;
  std::uint64_t host;  // of the boot id, so that process numbers of other hosts are not mistaken for own ones
  std::int32_t device;
  std::int32_t usable;
  std::uint64_t address;
  cudaIpcMemHandle_t handle;
};

std::uint64_t host_hash() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  std::uint64_t hash = 14695981039346656037ull;  // FNV-1a
  for (const char ch : id + name) hash = (hash ^ static_cast<unsigned char>(ch)) * 1099511628211ull;
  return hash;
}

}  // namespace

SymmetricMemory::SymmetricMemory(const Bootstrap& bootstrap, std::size_t bytes, PeerPath path,
                                 NcclCommunicator* communicator)
    : rank_(bootstrap.rank),
      bytes_(bytes),
      parts_(static_cast<std::size_t>(bootstrap.num_ranks)),
      opened_(static_cast<std::size_t>(bootstrap.num_ranks)) {
  try {
    if (path == PeerPath::kNccl) {
      Require(communicator != nullptr, ErrorCode::kInvalidArgument,
              "symmetric memory: a window of NCCL needs a communicator");
      map_by_nccl(*communicator);
    } else {
      map_by_ipc(bootstrap);
    }
  } catch (...) {
    release();
    throw;
  }
}
SymmetricMemory::~SymmetricMemory() {
  release();
}

void SymmetricMemory::map_by_ipc(const Bootstrap& bootstrap) {
  const auto ranks = static_cast<std::size_t>(bootstrap.num_ranks);
  Announcement mine{};
  mine.process = getpid();
  mine.host = host_hash();
  int device = 0;
  check_cuda(cudaGetDevice(&device), "symmetric memory");
  mine.device = device;
  const cudaError_t allocated = cudaMalloc(reinterpret_cast<void**>(&own_), bytes_);
  cudaGetLastError();
  if (allocated == cudaSuccess) {
    check_cuda(cudaMemset(own_, 0, bytes_), "symmetric memory");
    check_cuda(cudaDeviceSynchronize(), "symmetric memory");
    check_cuda(cudaIpcGetMemHandle(&mine.handle, own_), "symmetric memory: cudaIpcGetMemHandle");
  }
  mine.usable = allocated == cudaSuccess;
  mine.address = reinterpret_cast<std::uint64_t>(own_);
  std::vector<Announcement> all(ranks);
  bootstrap.all_gather(&mine, all.data(), sizeof mine);
  for (std::size_t r = 0; r < ranks; ++r)
    Require(all[r].usable != 0, ErrorCode::kOutOfMemory, "symmetric memory: rank ", r, " cannot allocate ",
            bytes_, " bytes of device memory");
  for (std::size_t r = 0; r < ranks; ++r) {
    const Announcement& peer = all[r];
    if (static_cast<int>(r) == rank_) {
      parts_[r] = own_;
      continue;
    }
    Require(peer.host == mine.host, ErrorCode::kNotSupported, "symmetric memory: rank ", r,
            " is on another host; its GPU's memory can be reached through Link::kNccl only");
    if (peer.process == mine.process) {
      if (peer.device != device) {
        int possible = 0;
        check_cuda(cudaDeviceCanAccessPeer(&possible, device, peer.device), "cudaDeviceCanAccessPeer");
        Require(possible != 0, ErrorCode::kNotSupported, "symmetric memory: device ", device,
                " cannot reach the memory of device ", peer.device, " (rank ", r, ")");
        const cudaError_t enabled = cudaDeviceEnablePeerAccess(peer.device, 0);
        if (enabled == cudaErrorPeerAccessAlreadyEnabled) {
          cudaGetLastError();
        } else {
          check_cuda(enabled, "cudaDeviceEnablePeerAccess");
        }
      }
      parts_[r] = reinterpret_cast<std::byte*>(peer.address);
    } else {
      void* mapped = nullptr;
      const cudaError_t result = cudaIpcOpenMemHandle(&mapped, peer.handle, cudaIpcMemLazyEnablePeerAccess);
      Require(result == cudaSuccess, ErrorCode::kNotSupported, "symmetric memory: the memory of rank ", r,
              " cannot be mapped: ", cudaGetErrorString(result));
      parts_[r] = static_cast<std::byte*>(mapped);
      opened_[r] = true;
    }
  }
}

void SymmetricMemory::map_by_nccl(NcclCommunicator& communicator) {
  communicator_ = &communicator;
  own_ = static_cast<std::byte*>(communicator.allocate(bytes_));
  check_cuda(cudaMemset(own_, 0, bytes_), "symmetric memory");
  check_cuda(cudaDeviceSynchronize(), "symmetric memory");
  window_ = communicator.register_window(own_, bytes_);
  parts_ = window_parts(window_, communicator.num_ranks());
  // The own part by its plain address: the same memory, and the one the caller's copies know.
  parts_[static_cast<std::size_t>(rank_)] = own_;
}

void SymmetricMemory::release() noexcept {
  for (std::size_t r = 0; r < parts_.size(); ++r)
    if (opened_[r]) cudaIpcCloseMemHandle(parts_[r]);
  if (window_ != nullptr) communicator_->deregister_window(window_);
  if (communicator_ != nullptr) {
    if (own_ != nullptr) communicator_->release(own_);
  } else if (own_ != nullptr) {
    cudaFree(own_);
  }
  cudaGetLastError();
  own_ = nullptr;
}

}  // namespace sluice::comm::cuda
