#include "sluice/runtime/src/compute_device.hpp"

#include "sluice/runtime/src/machine.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

#ifdef SLUICE_HAS_CUDA
#include "sluice/kernels/cuda/cuda_device.hpp"
#endif

namespace sluice {

std::unique_ptr<kernels::Device> make_compute_device(int rank_in_node) {
#ifdef SLUICE_HAS_CUDA
  const int count = kernels::cuda::num_cuda_devices();
  return kernels::cuda::make_cuda_device(count > 0 ? rank_in_node % count : 0);
#else
  throw Error(
      ErrorCode::kNotSupported,
      str("rank ", rank_in_node,
          " of its node is to compute on a CUDA device, but this build has no CUDA kernels; configure with "
          "-DSLUICE_CUDA=ON, or use the device cpu"));
#endif
}

Allocator device_allocator(kernels::Device& device) {
  return {[](std::size_t bytes, std::size_t, void* user) {
            return static_cast<kernels::Device*>(user)->allocate_host(static_cast<std::int64_t>(bytes));
          },
          [](void* memory, std::size_t, std::size_t, void* user) {
            static_cast<kernels::Device*>(user)->release_host(memory);
          },
          &device};
}

std::string device_name(Runtime& runtime) {
  const auto& device = runtime.state().device;
  return device ? device->name() : cpu_name();
}

}  // namespace sluice
