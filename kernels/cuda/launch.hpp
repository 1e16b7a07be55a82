// What every launch here does: check the runtime's answer. Host code only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "sluice/base/error.hpp"

namespace sluice::kernels::cuda {

// Throws kInternal with the runtime's text; clears the runtime's last error.
inline void check_cuda(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();
  throw Error(ErrorCode::kInternal, std::string(what) + ": " + cudaGetErrorString(result));
}

// Blocks for `items` items of which a block does `per_block`; throws kInvalidArgument where a grid cannot hold them.
inline unsigned blocks_for(std::int64_t items, std::int64_t per_block, const char* what) {
  const std::int64_t blocks = (items + per_block - 1) / per_block;
  Require(blocks <= 0x7FFFFFFF, ErrorCode::kInvalidArgument, what, ": ", items,
          " elements are more than one launch can hold");
  return static_cast<unsigned>(blocks);
}

}  // namespace sluice::kernels::cuda
