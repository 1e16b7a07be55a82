// One MoE layer over the GPUs of a group, bf16: the exchange of rows (comm/cuda) and the grouped GEMMs (kernels/cuda)
// put together so that the exchange hides behind the GEMMs.
//
// A rank's expert rows are sorted by (own or others', expert, source, token), so that everything about own rows can start
// before a row of others is here, and everything about others' rows can end before the own ones:
//
//   forward    compute   own rows to experts | GEMM 1 own          | GEMM 1 others | GEMM 2 others | GEMM 2 own | sums
//              exchange  rows leave ........ others' to experts ...|                               | results home ...
//   backward   compute   own rows | dgrad own    | dgrad others | wgrad .................................. |
//              exchange  rows leave, others' ... |              | gradients home, sums ...
//
// While rows travel, `comm_sms` processors belong to the exchange and the GEMM of the moment leaves them alone; it is cut
// by experts, so that only a part of it runs on fewer processors. kSequential does one thing after the other on all
// processors, with the same results: forward the same bits; gradients of weights are added up own rows first in both.
//
// Ownership: the layer owns its buffers (docs/cuda_dispatch.md has the formula) and a stream for the exchange; weights,
// gradients, rows belong to the caller. Thread-safety: one thread at a time. Blocking: none, but for Link::kNccl
// (row_exchange.hpp). Errors: kInvalidArgument for shapes; what peers do comes from RowExchange::check().
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sluice/comm/cuda/row_exchange.hpp"
#include "sluice/kernels/cuda/routing.hpp"
#include "sluice/kernels/kernels.hpp"

namespace sluice {

struct GpuLayerShape {
  std::int64_t ffn = 0;  // of one expert; a multiple of 8
  kernels::Activation activation = kernels::Activation::kSwiGLU;
  int num_experts = 0;
  std::vector<std::int32_t> rank_of;  // [num_experts]; a rank's experts are its slots in ascending order
  bool training = false;              // keeps what backward needs
};
enum class GpuSchedule { kSequential, kOverlapped };
struct GpuLayerOptions {
  GpuSchedule schedule = GpuSchedule::kOverlapped;
  int comm_sms = 24;  // even; kOverlapped: of the exchange while it runs beside GEMMs
};

// bf16, row-major. w1: [local experts][preactivation_cols(ffn), hidden], for SwiGLU W1 above W3; w2: [..][hidden, ffn].
struct GpuExperts {
  const void* w1 = nullptr;
  const void* w2 = nullptr;
};
// f32, shapes of the weights; added to.
struct GpuExpertGradients {
  float* w1 = nullptr;
  float* w2 = nullptr;
};

class GpuLayer {
 public:
  // exchange: bf16 rows, channel not used by others; must outlive the layer. Its num_local_slots must be this rank's experts.
  GpuLayer(comm::cuda::RowExchange& exchange, int channel, const GpuLayerShape& shape);
  ~GpuLayer();
  GpuLayer(const GpuLayer&) = delete;
  GpuLayer& operator=(const GpuLayer&) = delete;

  int num_local_experts() const;
  std::size_t buffer_bytes() const;

  // Routing of this rank's tokens in device memory (routing.hpp); the layer keeps the pointers until the next plan().
  void plan(const kernels::cuda::ConstRouting& routing, std::int64_t num_tokens, comm::cuda::Stream stream);
  // x, y: bf16 [num_tokens, hidden]
  void forward(const GpuExperts& experts, const void* x, void* y, const GpuLayerOptions& options,
               comm::cuda::Stream stream);
  // After forward() with `training`. dy, dx: bf16 [num_tokens, hidden]; dweight: f32 [routes], by the routing's order
  void backward(const GpuExperts& experts, const GpuExpertGradients& gradients, const void* dy, void* dx,
                float* dweight, const GpuLayerOptions& options, comm::cuda::Stream stream);

  // For measurements: the exchange of forward() alone (expert outputs are what is there), and its GEMMs alone.
  void exchange_only(const void* x, void* y, const GpuLayerOptions& options, comm::cuda::Stream stream);
  void gemms_only(const GpuExperts& experts, comm::cuda::Stream stream);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
