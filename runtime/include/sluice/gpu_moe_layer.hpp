// A Mixture-of-Experts layer whose tokens, routing, weights and gradients lie in the memory of the ranks' GPUs: what a training
// framework on GPUs calls. MoeLayer (moe_layer.hpp) does the same with batches in host memory.
//
//   y_t = sum over the routes (e, w) of token t of w * E_e(x_t),  rows and weights bf16, sums fp32
//
//   layer.set_weights(...); per batch: layer.plan(...); layer.forward(...); layer.backward(...)
//   and, before the host reads a result or once a step: layer.wait(stream), which throws what the GPUs have reported
//
// It needs a Runtime over nvlink or nccl (RuntimeOptions::device = kCuda), which gives each rank a GPU: the one of
// gpu_of(runtime), which must be the caller's current device. Every expert of the placement is an ffn expert that lives on one
// rank; a rank's experts are in ascending order, and so are its weights.
//
// Room for a plan is made once, from the options, and no count is read back: over nvlink nothing but wait() waits for the GPU.
// More rows than there is room for, and a routing that is none (row_ptr that does not ascend, an expert that does not exist or
// does not ascend within its token, a weight that is no number), send nothing anywhere and give zeros or NaNs, and wait() says
// which; the next plan may be a good one. One forward is kept for one backward; batches in flight at the same time
// need a layer each, which may share weights and gradients.
//
// Ownership: the layer owns its buffers; weights, gradients, rows and routing are the caller's, and stay until the stream has
// passed what reads them. The Runtime outlives the layer. Thread-safety: that of the Runtime. Blocking: constructor, destructor
// (collective: peers may still read this rank's memory), wait(); over nccl plan() as well, since NCCL needs sizes on the host.
// Collective: plan(), forward(), backward(), on all ranks in the same order.
// Errors: kInvalidArgument, kNotSupported, kDisagreement from the constructor, before anybody is waited for where it can be seen
// here; kInvalidRouting, kInvalidState (no room) and kPeerLost, which names the peer and ends the group, from wait().
#pragma once

#include <cstdint>
#include <memory>

#include "sluice/moe_layer.hpp"
#include "sluice/runtime.hpp"
#include "sluice/scheduler/placement.hpp"

namespace sluice {

// How rows travel. The results of the first three have the same bits.
enum class GpuMoeSchedule : std::uint8_t {
  kAuto,        // two hops between nodes of several ranks, else what is fastest by the measured costs
  kSequential,  // exchange and experts one after the other
  kOverlapped,  // the exchange beside the experts' GEMMs
  kTwoHops      // over nccl: a row crosses to a node once, in parts that overlap with the work inside
};

struct GpuMoeLayerOptions {
  std::int64_t hidden = 0, ffn = 0;  // multiples of 8
  ExpertActivation activation = ExpertActivation::kSwiGLU;
  GpuMoeSchedule schedule = GpuMoeSchedule::kAuto;
  std::int64_t max_tokens = 0;  // of one rank in one plan
  int max_routes_of_token = 0;  // on average over a rank's tokens
  // What the experts of one rank may get, in multiples of what they get when experts are chosen evenly; 0: all there is, which
  // is num_ranks times as much memory.
  double imbalance = 0;
  bool training = false;  // there will be backwards
};

// Device memory. A token without routes gives y = 0. expert and weight may be null where there is no route at all.
struct GpuRoutingView {
  const std::int64_t* row_ptr = nullptr;  // int64 [num_tokens + 1], from 0, ascending
  const std::int32_t* expert = nullptr;   // int32 [routes], ascending and unique within a token
  const float* weight = nullptr;          // f32 [routes], finite
};

// The GPU of this rank as CUDA numbers it in this process; -1 without one.
int gpu_of(const Runtime& runtime);

class GpuResidentLayer;  // of the group of GPUs; not for callers

class GpuMoeLayer {
 public:
  // Collective.
  GpuMoeLayer(Runtime& runtime, const Placement& placement, const GpuMoeLayerOptions& options);
  ~GpuMoeLayer();
  GpuMoeLayer(const GpuMoeLayer&) = delete;
  GpuMoeLayer& operator=(const GpuMoeLayer&) = delete;

  int num_local_experts() const;
  std::int64_t memory_bytes() const;  // of its buffers, on this rank's GPU

  // w1: bf16 [num_local_experts, 2*ffn or ffn, hidden], for SwiGLU W1 above W3; w2: bf16 [num_local_experts, hidden, ffn];
  // grad_w1, grad_w2: f32, the same shapes; null without training
  void set_weights(const void* w1, const void* w2, float* grad_w1, float* grad_w2);

  // stream: a cudaStream_t of this rank's GPU, for these calls the same one or one ordered behind it. routing: kept
  // until the next plan
  void plan(const GpuRoutingView& routing, std::int64_t num_tokens, void* stream);
  // x, y: bf16 [num_tokens, hidden], y overwritten. keep: a backward will follow
  void forward(const void* x, void* y, bool keep, void* stream);
  // dy, dx: bf16 [num_tokens, hidden], dx overwritten; dweight: f32 [routes], overwritten, or null. Weight gradients are
  // added to, or with write_gradients overwritten: the first backward of a step needs no zeros then
  void backward(const void* dy, void* dx, float* dweight, bool write_gradients, void* stream);
  // Waits on the host until the stream is done, with the Runtime's deadline.
  void wait(void* stream);

 private:
  std::unique_ptr<GpuResidentLayer> layer_;
  const std::int64_t max_tokens_;
  const bool training_;
  int num_local_experts_ = 0;
  std::int64_t num_tokens_ = 0;
  bool has_weights_ = false, has_gradients_ = false, planned_ = false, kept_ = false;
};

}  // namespace sluice
