// One MoE layer over the GPUs of a group, bf16: the exchange of rows (comm/cuda) and the grouped GEMMs (kernels/cuda)
// put together so that the exchange hides behind the GEMMs.
//
// A rank's expert rows are sorted by (expert, own or others', source, token), and GEMMs take an expert's own rows, those of
// others, or both: everything about own rows can start before a row of others is here, everything about others' rows
// can end before the own ones, and a weight's gradient is read and written once:
//
//   forward    compute   own rows to experts | GEMM 1 some own | others' to experts | GEMM 1 the rest |
//              exchange  rows leave .........................  |
//              compute   GEMM 2 others | reduce | GEMM 2 own ...                      | sums
//              exchange                         | results leave ...|
//   gathered   compute   GEMM 1 own and others ............... GEMM 2 all | reduce and sums
//              exchange  rows leave ...| GEMM 1 too ......... |                results leave
//   backward   the same with dgrad 2, then dgrad 1, and with both wgrads in the place of GEMM 2 own
//
// Only the link is slow enough to hide: while rows travel, the few processors that keep it busy belong to the exchange, and
// the GEMM of the moment leaves them alone; it is cut by experts, so that only as much of it as the rows take runs on fewer
// processors. What is bound by memory (one row a route, reduced rows, sums) is done on all of them: beside a GEMM it takes as
// much from the GEMM as it saves. How many processors, and where the cut is, comes from a cost model (gpu_layer.cu) that
// knows shapes only, so that ranks need not agree and nothing is read back. kGathered lays no rows out: GEMM 1 fetches
// them where they are, the caller's own ones first, and waits inside for those of others; the exchange's processors join it
// when they are done. kSequential does one thing after the other on
// all processors, with the same results: forward the same bits; gradients of weights are added up own rows first in both.
//
// Ownership: the layer owns its buffers (docs/cuda_dispatch.md has the formula) and a stream for the exchange; weights,
// gradients, rows belong to the caller. Thread-safety: one thread at a time. Blocking: none, but for Link::kNccl
// (row_exchange.hpp). Errors: kInvalidArgument for shapes; what peers do comes from RowExchange::check().
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sluice/comm/cuda/row_exchange.hpp"
#include "sluice/kernels/cuda/grouped_gemm.hpp"
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
enum class GpuSchedule {
  kSequential,
  kOverlapped,
  kGathered,  // over Link::kNvlink with Wire::kRows, a forward() that keeps nothing for backward(), whose gradients of w1
  // need the rows laid out; all else as kSequential
  kAuto,  // over Link::kNvlink kGathered where it can be, unless experts have few rows or gathering_pays() says no; else
  // kOverlapped where overlap_pays(), else kSequential; over Link::kNccl kOverlapped
};
struct GpuLayerOptions {
  GpuSchedule schedule = GpuSchedule::kAuto;
  int comm_sms =
      0;  // even; kOverlapped, kGathered: of the exchange while it runs beside GEMMs; 0: by the cost model
  bool keep = true;  // forward() keeps what backward() needs, where the layer is for training
  // backward(): recorded on its stream when dx and dweight are there; kSequential makes the weights' gradients after that
  cudaEvent_t results_done = nullptr;
};

// bf16, row-major. w1: [local experts][preactivation_cols(ffn), hidden], for SwiGLU W1 above W3; w2: [..][hidden, ffn].
struct GpuExperts {
  const void* w1 = nullptr;
  const void* w2 = nullptr;
};
// f32, shapes of the weights. `update`: they are added to, or overwritten, which saves the first backward of a step their
// zeros and their reading. Of a rank without experts and of experts without rows too.
struct GpuExpertGradients {
  float* w1 = nullptr;
  float* w2 = nullptr;
  kernels::cuda::GradientUpdate update = kernels::cuda::GradientUpdate::kAdd;
};

// Whether a push beside a GEMM pays over NVLink. dispatch() and combine() hide the link behind the rows' own way through memory,
// and GEMMs in one piece gain more than that, until so many rows leave that the link shows. Of the buffers' sizes: the link's
// time for as many rows as may leave, against that of the GEMMs; never where GEMMs only read weights. The bound lies between
// what two and four H200s measured (docs/benchmarks.md).  processors: of the device
bool overlap_pays(const GpuLayerShape& shape, const comm::cuda::ExchangeShape& rows, int num_ranks,
                  int processors);

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
  void gemms_only(const GpuExperts& experts, const void* x, const GpuLayerOptions& options,
                  comm::cuda::Stream stream);
  // And with all else that this rank's processors do in forward() wherever rows come from: one row a route, reduced rows,
  // sums at home, of what the last pass brought.
  void local_only(const GpuExperts& experts, const void* x, void* y, const GpuLayerOptions& options,
                  comm::cuda::Stream stream);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
