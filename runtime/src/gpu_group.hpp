// GPUs of a group that exchange rows among themselves (comm.transport nvlink and nccl), for code that knows no CUDA: what
// MoeLayer needs of them. Implemented in runtime/src/cuda where the build has CUDA; the functions below say so where it has
// not. Ranks meet, agree and add up gradients over a host transport as ever; only token rows, their
// headers and results travel between GPUs.
//
// Ownership: a GpuGroup belongs to its RuntimeState, GpuRows to a layer, which goes first. Thread-safety: that of the
// Runtime. Blocking: whatever is marked collective, forward() and backward(), with the Runtime's deadline.
// Errors: kNotSupported and kInvalidConfig for what cannot work here; a peer that does not come is kPeerLost, names it,
// and ends the group.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "sluice/base/topology.hpp"
#include "sluice/gpu_moe_layer.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/runtime.hpp"
#include "sluice/scheduler/placement.hpp"
#include "sluice/scheduler/routing.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice {

enum class GpuLink : std::uint8_t { kNvlink, kNccl };
// Of a value of comm.transport; none for transports of the host.
std::optional<GpuLink> gpu_link_of(std::string_view transport);
std::string_view to_string(GpuLink link);

// Which rank computes an expert, as GPUs see it: experts with weights, numbered without the others.
struct GpuPlacement {
  std::vector<std::int32_t> number_of;  // int32 [num_experts], -1: everywhere, never sent
  std::vector<std::int32_t> rank_of;    // int32 [experts with weights]
};
// Throws kNotSupported where an expert has several copies, or a rank's experts are not in ascending order.
GpuPlacement gpu_placement(const Placement& placement);

// A routing as GPUs see it: routes to experts that are everywhere are left out.
struct GpuRouting {
  std::vector<std::int64_t> row_ptr;  // int64 [num_tokens + 1]
  std::vector<std::int32_t> expert;   // int32 [routes sent], numbers of GpuPlacement
  std::vector<float> weight;          // f32 [routes sent]
  std::vector<std::int32_t> route;    // int32 [routes sent]: which of the caller's it is

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(row_ptr.size()) - 1; }
  void assign(const RoutingView& routing, const GpuPlacement& placement);
};

// How a layer's rows travel between the GPUs.
struct GpuWay {
  bool overlapped = false;  // one hop: exchange beside GEMMs, else one after the other; the same results
  bool two_hops = false;    // to a node once, and on inside it (cuda/gpu_two_hop_layer.hpp)
  int chunks = 0;           // two hops: parts that tokens are cut into; 0: by the layer's cost model
};
// What a schedule means on these nodes. Hierarchical is two hops where there are several nodes; on one there is one level of
// links, rows have one hop, and what is left of the schedule is by-source (own rows beside those that travel), in one piece.
// Throws kNotSupported for several nodes over nvlink, and for nodes without equally many ranks in a row.
GpuWay gpu_way(const ScheduleOptions& schedule, bool chunks_by_model, GpuLink link, const Topology& topology);
// Whether auto is two hops on these nodes: where a node's ranks share what comes from others, so that a row crosses to it
// once instead of once a rank. Of nodes of one rank each the rows that cross are the same with one hop, which needs no
// gateway; and nodes that two hops cannot have get one.
bool auto_is_two_hops(GpuLink link, const Topology& topology);

struct GpuRowsOptions {
  std::int64_t hidden = 0, ffn = 0;
  kernels::Activation activation = kernels::Activation::kSwiGLU;
  bool training = false;  // keeps what backward() needs
  GpuWay way;
};

// The passes of one layer on the GPUs, from and to host memory. Buffers grow to what a batch needs and stay.
class GpuRows {
 public:
  virtual ~GpuRows() = default;
  // Collective. The routing of the next passes.
  virtual void plan(const RoutingView& routing) = 0;
  // Collective; returns when y is there. w1: bf16 [local experts, preactivation_cols, hidden], w2: bf16 [local experts,
  // hidden, ffn], device memory of the Runtime's device; x, y: bf16 [num_tokens, hidden], host memory
  virtual void forward(const void* w1, const void* w2, ConstMatrixView x, MatrixView y) = 0;
  // Collective; of the last forward(), with `training`. grad_w1, grad_w2: f32, shapes of the weights, device memory, added
  // to; dy, dx: bf16 [num_tokens, hidden]; dw: f32 [routes of the caller's routing], routes to experts that are
  // everywhere are left alone
  virtual void backward(const void* w1, const void* w2, float* grad_w1, float* grad_w2, ConstMatrixView dy,
                        MatrixView dx, std::span<float> dw) = 0;
  virtual std::int64_t capacity_bytes() const = 0;  // on the GPU
};

struct GpuResidentOptions {
  GpuRowsOptions rows;
  bool automatic = false;  // one hop: the schedule by the measured costs, not by rows.way
  std::int64_t max_tokens = 0;
  int max_routes_of_token = 0;
  double imbalance = 1;  // 1..num_ranks
};
// The passes of one layer from and to the memory of the GPUs: what gpu_moe_layer.hpp says of the calls of the same names.
class GpuResidentLayer {
 public:
  virtual ~GpuResidentLayer() = default;
  virtual void set_weights(const void* w1, const void* w2, float* grad_w1, float* grad_w2) = 0;
  virtual void plan(const GpuRoutingView& routing, std::int64_t num_tokens, void* stream) = 0;
  virtual void forward(const void* x, void* y, bool keep, void* stream) = 0;
  virtual void backward(const void* dy, void* dx, float* dweight, bool write_gradients, void* stream) = 0;
  virtual void wait(void* stream) = 0;
  virtual std::int64_t memory_bytes() const = 0;
};

class GpuGroup {
 public:
  virtual ~GpuGroup() = default;
  virtual GpuLink link() const = 0;
  virtual int device() const = 0;  // of this rank, as CUDA numbers it
  // Collective.
  virtual std::unique_ptr<GpuResidentLayer> make_resident(const Placement& placement,
                                                          const GpuResidentOptions& options) = 0;
  // Not collective: the first plan() is.
  virtual std::unique_ptr<GpuRows> make_rows(const Placement& placement, const GpuRowsOptions& options) = 0;
};

// Throws kNotSupported at once, before anybody is waited for, where this build has no CUDA, this process sees no GPU, or
// NCCL is wanted and cannot be loaded.
void require_gpu_link(GpuLink link);

// Collective. A Runtime over a transport of the host whose layers move rows between GPUs: rank n of a host has the n-th GPU
// that it sees, modulo their number.
std::unique_ptr<Runtime> create_over_gpus(std::unique_ptr<comm::Transport> transport,
                                          const RuntimeOptions& options, GpuLink link);

// Collective. Of a Runtime that has a GPU. Throws the same error on all ranks when two of them have one GPU, or nvlink is
// to reach another host.
std::unique_ptr<GpuGroup> make_gpu_group(Runtime& runtime, GpuLink link);

}  // namespace sluice
