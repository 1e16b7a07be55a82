// How the ranks of a GPU group find each other before they share device memory: one collective on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sluice/base/error.hpp"

namespace sluice::comm::cuda {

using Stream = cudaStream_t;

// `all_gather(mine, all, bytes)`: every rank gives `bytes` bytes and gets num_ranks * bytes, ranks ascending. It blocks
// until all ranks are there and throws if one does not come. All ranks make the same calls in the same order.
struct Bootstrap {
  int rank = 0;
  int num_ranks = 1;
  std::function<void(const void* mine, void* all, std::size_t bytes)> all_gather;
  // int [num_ranks]: what messages call the members, for a group of some ranks of a larger one; empty: their ranks.
  std::vector<int> names = {};
  // Whether the host has learned that a rank of the group is gone. Asked again and again while a GPU is waited for, so that
  // nobody sits out a deadline for a peer that has died: must not block or throw. Empty: the host learns nothing.
  std::function<bool()> lost = {};
};
inline int name_of_rank(const std::vector<int>& names, int rank) {
  return names.empty() ? rank : names.at(static_cast<std::size_t>(rank));
}

// Throws kInternal with the runtime's text (kOutOfMemory where that is the reason); clears the runtime's last error.
inline void check_cuda(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();
  throw Error(result == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kInternal,
              std::string(what) + ": " + cudaGetErrorString(result));
}

}  // namespace sluice::comm::cuda
