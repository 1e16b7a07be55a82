// GpuGroup and GpuRows (gpu_group.hpp) with CUDA: RowExchange between the ranks' GPUs, GpuLayer over it.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "sluice/comm/cuda/nccl_library.hpp"
#include "sluice/comm/cuda/row_exchange.hpp"
#include "sluice/runtime/src/cuda/gpu_layer.hpp"
#include "sluice/runtime/src/device_layer.hpp"
#include "sluice/runtime/src/gpu_group.hpp"

namespace sluice {

class CudaGroup final : public GpuGroup {
 public:
  CudaGroup(Runtime& runtime, GpuLink link);
  ~CudaGroup() override;
  CudaGroup(const CudaGroup&) = delete;
  CudaGroup& operator=(const CudaGroup&) = delete;

  GpuLink link() const override { return link_; }
  std::unique_ptr<GpuRows> make_rows(const Placement& placement, const GpuRowsOptions& options) override;

  Runtime& runtime() { return runtime_; }
  kernels::Device& device() const { return *device_; }
  cudaStream_t stream() const { return stream_; }
  comm::cuda::NcclCommunicator* communicator() const { return communicator_.get(); }  // null over nvlink

  // What the routings of all ranks need. Collective.
  struct Needs {
    std::int64_t tokens = 0;  // of one rank
    std::int64_t routes = 0;  // of one rank's tokens, or to one rank's experts
  };
  Needs needs_of(const GpuRouting& routing, const GpuPlacement& placement);
  // For layers of such a placement. Collective.
  std::unique_ptr<comm::cuda::RowExchange> make_exchange(const GpuPlacement& placement, std::int64_t hidden,
                                                         const Needs& capacity);
  // Runs a part of a pass. A failure ends the group with its reason, since peers wait for this rank on their GPUs.
  template <typename Call>
  void in_pass(std::string_view phase, Call&& call) {
    try {
      device_->make_current();
      call();
    } catch (const Error& e) {
      // Who is lost, and how, the host's transport finds out when ranks meet there: at once where a process died, by its
      // deadline where one does not answer. Ranks whose own wait has ended come here as well.
      if (e.scope() == Scope::kGroup && runtime_.async_error().ok()) {
        try {
          runtime_.barrier("GPU pass");
        } catch (const Error&) {  // async_error() tells of it
        }
      }
      const Status known = runtime_.async_error();
      if (!known.ok() && known.message != e.message())
        throw Error(known.code, str(known.message, "; on the GPU: ", e.message()));
      if (known.ok()) runtime_.abort(phase, e.message());
      throw;
    }
  }

 private:
  comm::cuda::Bootstrap bootstrap();
  void check_devices();

  Runtime& runtime_;
  kernels::Device* device_;
  GpuLink link_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<comm::cuda::NcclCommunicator> communicator_;
};

}  // namespace sluice
