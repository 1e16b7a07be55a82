// GpuGroup and GpuRows (gpu_group.hpp) with CUDA: RowExchange between the ranks' GPUs, GpuLayer over it, or GpuTwoHopLayer
// over one exchange between nodes and one inside each.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "sluice/comm/cuda/nccl_library.hpp"
#include "sluice/comm/cuda/row_exchange.hpp"
#include "sluice/runtime/src/cuda/gpu_layer.hpp"
#include "sluice/runtime/src/cuda/gpu_two_hop_layer.hpp"
#include "sluice/runtime/src/device_layer.hpp"
#include "sluice/runtime/src/gpu_group.hpp"

namespace sluice {

// A layer with its exchanges between all GPUs of a group, whichever way rows go. Calls are those of GpuLayer and
// GpuTwoHopLayer; constructor and destructor are collective.
class GroupLayer {
 public:
  virtual ~GroupLayer() = default;
  virtual int num_chunks() const = 0;
  virtual void plan(const kernels::cuda::ConstRouting& routing, std::int64_t num_tokens,
                    cudaStream_t stream) = 0;
  virtual void forward(const GpuExperts& experts, const void* x, void* y, const GpuLayerOptions& options,
                       cudaStream_t stream) = 0;
  virtual void backward(const GpuExperts& experts, const GpuExpertGradients& gradients, const void* dy,
                        void* dx, float* dweight, const GpuLayerOptions& options, cudaStream_t stream) = 0;
  // Until what was enqueued is done. Throws what the exchanges report.
  virtual void wait(cudaStream_t stream) = 0;
  // After a plan that did not fit.
  virtual void clear(cudaStream_t stream) = 0;
  virtual std::size_t memory_bytes() const = 0;
};

// What every way has in common: the calls go to its member `layer`.
template <typename Way>
struct LayerOfWay : GroupLayer {
  void plan(const kernels::cuda::ConstRouting& routing, std::int64_t num_tokens, cudaStream_t stream) final {
    layer().plan(routing, num_tokens, stream);
  }
  void forward(const GpuExperts& experts, const void* x, void* y, const GpuLayerOptions& options,
               cudaStream_t stream) final {
    layer().forward(experts, x, y, options, stream);
  }
  void backward(const GpuExperts& experts, const GpuExpertGradients& gradients, const void* dy, void* dx,
                float* dweight, const GpuLayerOptions& options, cudaStream_t stream) final {
    layer().backward(experts, gradients, dy, dx, dweight, options, stream);
  }

 private:
  auto& layer() { return static_cast<Way*>(this)->layer; }
};

struct OneHopLayer final : LayerOfWay<OneHopLayer> {
  comm::cuda::RowExchange exchange;
  GpuLayer layer;

  OneHopLayer(const comm::cuda::Bootstrap& bootstrap, const comm::cuda::ExchangeShape& rows,
              comm::cuda::Link link, comm::cuda::NcclCommunicator* communicator, const GpuLayerShape& shape)
      : exchange(bootstrap, rows, link, comm::cuda::PeerPath::kBest, communicator),
        layer(exchange, 0, shape) {}
  int num_chunks() const override { return 1; }
  void wait(cudaStream_t stream) override { exchange.wait(0, stream); }
  void clear(cudaStream_t stream) override { exchange.clear(0, stream); }
  std::size_t memory_bytes() const override { return layer.buffer_bytes() + exchange.window_bytes(); }
};

class CudaGroup final : public GpuGroup {
 public:
  CudaGroup(Runtime& runtime, GpuLink link);
  ~CudaGroup() override;
  CudaGroup(const CudaGroup&) = delete;
  CudaGroup& operator=(const CudaGroup&) = delete;

  GpuLink link() const override { return link_; }
  int device() const override { return cuda_device_; }
  std::unique_ptr<GpuResidentLayer> make_resident(const Placement& placement,
                                                  const GpuResidentOptions& options) override;
  std::unique_ptr<GpuRows> make_rows(const Placement& placement, const GpuRowsOptions& options) override;

  Runtime& runtime() { return runtime_; }
  kernels::Device& compute_device() const { return *device_; }
  cudaStream_t stream() const { return stream_; }
  comm::cuda::NcclCommunicator* communicator() const { return communicator_.get(); }  // null over nvlink

  // What the routings of all ranks need, with every rank's tokens in `chunks` equal parts.
  struct Needs {
    std::int64_t tokens = 0;           // of one rank, all parts
    std::int64_t routes = 0;           // of a part: a rank's own, to its experts, or through it as a gateway
    std::int64_t routes_of_token = 0;  // two hops: of a rank's part, on average, rounded up
  };
  // Collective.
  Needs needs_of(const GpuRouting& routing, const GpuPlacement& placement, bool two_hops, int chunks);
  // How many parts a layer of two hops that has room for so much cuts its tokens into.
  int two_hop_chunks_of(const GpuPlacement& placement, const GpuRowsOptions& options,
                        const Needs& room) const;
  // Room for `room`, of two hops with tokens in `chunks` parts. Collective.
  std::unique_ptr<OneHopLayer> make_one_hop(const GpuPlacement& placement, const GpuRowsOptions& options,
                                            const Needs& room);
  std::unique_ptr<GroupLayer> make_two_hops(const GpuPlacement& placement, const GpuRowsOptions& options,
                                            const Needs& room, int chunks);
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
      // Kernels of NCCL that wait for peers would keep streams, and so destructors, waiting.
      abort_communicators();
      const Status known = runtime_.async_error();
      if (!known.ok() && known.message != e.message())
        throw Error(known.code, str(known.message, "; on the GPU: ", e.message()));
      if (known.ok()) runtime_.abort(phase, e.message());
      throw;
    }
  }

 private:
  // The groups of this rank for two hops.
  struct TwoHops {
    comm::cuda::Bootstrap between, inside;
    comm::cuda::Link inside_link;
    std::unique_ptr<comm::cuda::NcclCommunicator> between_nccl, inside_nccl;  // inside: null over nvlink
  };

  comm::cuda::Bootstrap bootstrap();
  // Of some ranks, this one among them. All ranks of the group must gather at the same time, each with its own.
  comm::cuda::Bootstrap bootstrap_of(const std::vector<int>& members);
  void check_devices();
  // Made when first asked for. Collective.
  TwoHops& two_hops();
  // Whether on all nodes all GPUs store into each other's memory. Collective.
  bool nodes_have_peer_access(const std::vector<int>& node);
  GpuTwoHopShape two_hop_shape(const GpuPlacement& placement, const GpuRowsOptions& options,
                               const Needs& room) const;
  void abort_communicators() noexcept;

  Runtime& runtime_;
  kernels::Device* device_;
  GpuLink link_;
  int cuda_device_ = 0;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<comm::cuda::NcclCommunicator> communicator_;
  std::unique_ptr<TwoHops> two_hops_;
};

}  // namespace sluice
