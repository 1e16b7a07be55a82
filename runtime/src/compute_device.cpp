#include "sluice/runtime/src/compute_device.hpp"

#include "sluice/runtime/src/bench/gpu_bench.hpp"
#include "sluice/runtime/src/gpu_group.hpp"
#include "sluice/runtime/src/machine.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

#ifdef SLUICE_HAS_CUDA
#include "sluice/comm/cuda/nccl_library.hpp"
#include "sluice/kernels/cuda/cuda_device.hpp"
#include "sluice/runtime/src/cuda/cuda_bench.hpp"
#include "sluice/runtime/src/cuda/cuda_group.hpp"
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

int num_gpus() {
#ifdef SLUICE_HAS_CUDA
  return kernels::cuda::num_cuda_devices();
#else
  return 0;
#endif
}

void require_gpu_link(GpuLink link) {
#ifdef SLUICE_HAS_CUDA
  Require(
      kernels::cuda::num_cuda_devices() > 0, ErrorCode::kNotSupported, "comm.transport ", to_string(link),
      " moves rows from GPU to GPU, but this process sees no CUDA device; run it where GPUs are, or choose "
      "another transport");
  std::string why_not;
  Require(link != GpuLink::kNccl || comm::cuda::nccl_available(&why_not), ErrorCode::kNotSupported,
          "comm.transport nccl: ", why_not,
          "; install NCCL, or name its library in SLUICE_NCCL_LIBRARY, or choose another transport");
#else
  throw Error(ErrorCode::kNotSupported,
              str("comm.transport ", to_string(link),
                  " moves rows from GPU to GPU, but this build has no CUDA kernels; configure with "
                  "-DSLUICE_CUDA=ON, or choose another transport"));
#endif
}

std::unique_ptr<GpuGroup> make_gpu_group([[maybe_unused]] Runtime& runtime, GpuLink link) {
  require_gpu_link(link);
#ifdef SLUICE_HAS_CUDA
  return std::make_unique<CudaGroup>(runtime, link);
#else
  return nullptr;  // not reached
#endif
}

LayerBenchReport gpu_bench([[maybe_unused]] Runtime& runtime, [[maybe_unused]] const LoadedConfig& config) {
#ifdef SLUICE_HAS_CUDA
  return cuda_bench(runtime, config);
#else
  require_gpu_link(GpuLink::kNvlink);
  return {};  // not reached
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
