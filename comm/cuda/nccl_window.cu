#include <cuda_runtime.h>
#include <nccl_device.h>

#include <cstddef>
#include <vector>

#include "sluice/comm/cuda/nccl_library.hpp"

namespace sluice::comm::cuda {
namespace {

// The device API knows the addresses of a window's parts; everything else works with plain pointers.
__global__ void window_parts_kernel(ncclWindow_t window, int ranks, std::byte** parts) {
  for (int r = threadIdx.x; r < ranks; r += blockDim.x)
    parts[r] = static_cast<std::byte*>(ncclGetLsaPointer(window, 0, r));
}

}  // namespace

std::vector<std::byte*> window_parts(void* window, int num_ranks) {
  std::byte** on_device = nullptr;
  std::vector<std::byte*> parts(static_cast<std::size_t>(num_ranks));
  check_cuda(cudaMalloc(&on_device, parts.size() * sizeof(std::byte*)), "window addresses");
  window_parts_kernel<<<1, 64>>>(static_cast<ncclWindow_t>(window), num_ranks, on_device);
  const cudaError_t result =
      cudaMemcpy(parts.data(), on_device, parts.size() * sizeof(std::byte*), cudaMemcpyDeviceToHost);
  cudaFree(on_device);
  check_cuda(result, "addresses of an NCCL window");
  return parts;
}

}  // namespace sluice::comm::cuda
