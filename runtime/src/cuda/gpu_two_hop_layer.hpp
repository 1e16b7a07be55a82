// One MoE layer over the GPUs of several nodes, bf16: a token's row crosses to a node once, to the GPU of the same place
// there (its gateway), which hands it on inside the node; results are added up inside the node and cross back once.
//
// Two exchanges do it, and a GpuLayer inside the node. `between` has the ranks of the same place on all nodes, its
// "experts" are all of a node; its receive list, own rows among them, are the tokens of the inner layer on `inside`, the
// ranks of this node:
//
//   forward   between.dispatch x | inner forward | between.combine, one row a token and node -> y
//   backward  between.dispatch dy | inner backward (weights are applied here) | between.combine, plain sums -> dx, and
//             the inner layer's d(weight) by return_scalars -> dweight
//
// Chunks: the tokens are cut into equal parts, each with a channel of its own in both exchanges and an inner layer of its
// own, so that parts travel between nodes while others are worked on inside. All parts leave first (stream `out`),
// inner layers follow as parts arrive (`work`), results return as they are there (`back`). How many: as given, or by a cost
// model (two_hop_chunks) of those three; every part reads all weights again, leaves half a tile of a GEMM empty an
// expert, and costs a fixed time. 1: one thing after the other.
//
// Order of sums, in fp32: a rank's experts ascending, rounded to bf16; the node's ranks ascending, rounded to bf16; the
// nodes ascending, rounded to bf16. The cut changes no bit of y, dx, dweight. Against GpuLayer over all ranks there is one
// more rounding a node; with one rank a node, or where sums are exact, the bits are the same. Gradients of weights add up
// chunk after chunk, within one as GpuLayer does (rows of gateways ascending, of a gateway by source node, then token).
//
// Ownership: buffers and three streams are the layer's; exchanges and communicators, weights, gradients and rows are the
// caller's. Thread-safety: one thread at a time. Blocking: plan() waits for the stream, because the number of tokens
// inside must be known; forward() and backward() do not wait for the device; wait() does.
// Errors: kInvalidArgument for shapes and for more routes than fit. What peers do comes from wait() or check(): of
// `between` first, then of `inside`, so that a rank names a peer of its own that is lost, not a neighbour that only waits
// for one. For that the exchanges are made with two_hop_between() and two_hop_inside() (inside waits twice as long), and
// their bootstraps carry the ranks' global numbers (Bootstrap::names). Where a chunk does not fit, nothing of it is sent,
// and the results of all tokens that should have passed there are NaN, on all nodes.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "sluice/comm/cuda/row_exchange.hpp"
#include "sluice/runtime/src/cuda/gpu_layer.hpp"

namespace sluice {

struct GpuTwoHopShape {
  GpuLayerShape layer;  // rank_of: global ranks, node * ranks_per_node + place
  int num_nodes = 1, ranks_per_node = 1;
  std::int64_t max_tokens = 0;  // of one rank
  std::int64_t hidden = 0;
  int max_routes_of_token = 8;  // on average over the tokens of a chunk
  // What one rank may get of a chunk, in multiples of what it gets when experts are chosen evenly; 0: all there is.
  double imbalance = 0;
  int chunks = 0;                 // parts the tokens are cut into, up to 16; 0: by the cost model
  double network_bytes_s = 40e9;  // of one rank to other nodes, for the cost model
  int chunk_rows = 64;            // as ExchangeShape
  std::chrono::nanoseconds deadline = std::chrono::seconds(10);
};

// shape.chunks, or what the cost model says.
int two_hop_chunks(const GpuTwoHopShape& shape);
// Shapes of the exchanges of `rank` (global). Several layers may share them: num_channels = layers * two_hop_chunks().
comm::cuda::ExchangeShape two_hop_between(const GpuTwoHopShape& shape, int rank);
comm::cuda::ExchangeShape two_hop_inside(const GpuTwoHopShape& shape, int rank);

class GpuTwoHopLayer {
 public:
  // between: this place on all nodes, ranks are nodes. inside: this node, ranks are places. Both outlive the layer, which
  // uses the channels first_channel .. first_channel + num_chunks() - 1 of both.
  GpuTwoHopLayer(comm::cuda::RowExchange& between, comm::cuda::RowExchange& inside, int first_channel,
                 const GpuTwoHopShape& shape);
  ~GpuTwoHopLayer();
  GpuTwoHopLayer(const GpuTwoHopLayer&) = delete;
  GpuTwoHopLayer& operator=(const GpuTwoHopLayer&) = delete;

  int num_chunks() const;
  std::size_t buffer_bytes() const;

  // As GpuLayer's; `options` are the inner layer's, but that over NVLink inside and with several chunks all schedules other
  // than kOverlapped are kSequential. Tokens, routes and experts are this rank's, by global expert.
  void plan(const kernels::cuda::ConstRouting& routing, std::int64_t num_tokens, comm::cuda::Stream stream);
  void forward(const GpuExperts& experts, const void* x, void* y, const GpuLayerOptions& options,
               comm::cuda::Stream stream);
  void backward(const GpuExperts& experts, const GpuExpertGradients& gradients, const void* dy, void* dx,
                float* dweight, const GpuLayerOptions& options, comm::cuda::Stream stream);

  // Waits until what was enqueued is done, then check().
  void wait(comm::cuda::Stream stream);
  void check() const;
  // After an overflow, before a plan that fits.
  void clear(comm::cuda::Stream stream);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
