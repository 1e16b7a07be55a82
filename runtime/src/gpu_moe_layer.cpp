#include "sluice/gpu_moe_layer.hpp"

#include <algorithm>

#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"
#include "sluice/runtime/src/gpu_group.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {
namespace {

constexpr auto kBad = ErrorCode::kInvalidArgument;

GpuGroup& group_of(Runtime& runtime) {
  GpuGroup* group = runtime.state().gpu_group.get();
  Require(group != nullptr, ErrorCode::kNotSupported,
          "a layer whose rows stay on GPUs needs a runtime over nvlink or nccl with the device cuda; this "
          "one is over ",
          runtime.transport().name());
  return *group;
}

GpuResidentOptions checked(Runtime& runtime, const Placement& placement, const GpuMoeLayerOptions& o) {
  const GpuGroup& group = group_of(runtime);
  Require(o.hidden >= 8 && o.hidden % 8 == 0 && o.ffn >= 8 && o.ffn % 8 == 0, kBad, "GPU layer: hidden is ",
          o.hidden, " and ffn ", o.ffn, "; positive multiples of 8 are needed");
  Require(o.max_tokens >= 1, kBad, "GPU layer: max_tokens is ", o.max_tokens, "; at least 1");
  Require(o.max_routes_of_token >= 1 && o.max_routes_of_token <= placement.num_experts, kBad,
          "GPU layer: max_routes_of_token is ", o.max_routes_of_token, "; 1..", placement.num_experts,
          " (the number of experts) are possible");
  Require(o.imbalance == 0 || o.imbalance >= 1, kBad, "GPU layer: imbalance is ", o.imbalance,
          "; 0 or at least 1");
  Require(placement.num_ranks == runtime.num_ranks(), kBad, "GPU layer: the placement is for ",
          placement.num_ranks, " ranks, the group has ", runtime.num_ranks());
  for (std::int32_t e = 0; e < placement.num_experts; ++e)
    Require(!placement.everywhere(ExpertId(e)), ErrorCode::kNotSupported, "GPU layer: expert ", e,
            " is no ffn expert; zero, copy and constant experts are MoeLayer's");
  GpuResidentOptions out;
  out.rows.hidden = o.hidden;
  out.rows.ffn = o.ffn;
  out.rows.activation = kernel_activation(o.activation);
  out.rows.training = o.training;
  out.max_tokens = o.max_tokens;
  out.max_routes_of_token = o.max_routes_of_token;
  const auto ranks = static_cast<double>(runtime.num_ranks());
  out.imbalance = o.imbalance == 0 ? ranks : std::min(o.imbalance, ranks);
  out.automatic = o.schedule == GpuMoeSchedule::kAuto;
  if (o.schedule == GpuMoeSchedule::kTwoHops ||
      (out.automatic && auto_is_two_hops(group.link(), runtime.topology()))) {
    ScheduleOptions hierarchical;
    hierarchical.policy = SchedulePolicy::kHierarchical;
    out.rows.way = gpu_way(hierarchical, true, group.link(), runtime.topology());
  }
  out.rows.way.overlapped = o.schedule == GpuMoeSchedule::kOverlapped;
  return out;
}

// Ranks that were told different things would wait for each other in vain.
void agree(Runtime& runtime, const Placement& placement, const GpuMoeLayerOptions& o) {
  Hasher hash;
  for (const std::int64_t v :
       {o.hidden, o.ffn, static_cast<std::int64_t>(o.activation), static_cast<std::int64_t>(o.schedule),
        o.max_tokens, std::int64_t{o.max_routes_of_token}, static_cast<std::int64_t>(o.imbalance * 1024),
        static_cast<std::int64_t>(o.training), std::int64_t{placement.num_experts}})
    hash.add_int(v);
  for (const std::int32_t r : gpu_placement(placement).rank_of) hash.add_int(r);
  const auto mine = static_cast<std::int64_t>(hash.value());
  const auto all = runtime.all_gather(std::span(&mine, 1), "GPU layer");
  for (std::size_t r = 0; r < all.size(); ++r)
    Require(all[r] == all[0], ErrorCode::kDisagreement, "GPU layer: ranks 0 and ", r,
            " were given different options or placements");
}

void check_pointer(const void* data, bool needed, const char* what) {
  Require(!needed || (data != nullptr && reinterpret_cast<std::uintptr_t>(data) % 16 == 0), kBad,
          "GPU layer: ", what, data == nullptr ? " is null" : " is not 16-byte aligned");
}

}  // namespace

int gpu_of(const Runtime& runtime) {
  const GpuGroup* group = const_cast<Runtime&>(runtime).state().gpu_group.get();
  return group != nullptr ? group->device() : -1;
}

GpuMoeLayer::GpuMoeLayer(Runtime& runtime, const Placement& placement, const GpuMoeLayerOptions& options)
    : max_tokens_(options.max_tokens), training_(options.training) {
  const GpuResidentOptions resident = checked(runtime, placement, options);
  agree(runtime, placement, options);
  layer_ = group_of(runtime).make_resident(placement, resident);
  num_local_experts_ = static_cast<int>(placement.experts_of(runtime.rank()).size());
}
GpuMoeLayer::~GpuMoeLayer() = default;

int GpuMoeLayer::num_local_experts() const {
  return num_local_experts_;
}
std::int64_t GpuMoeLayer::memory_bytes() const {
  return layer_->memory_bytes();
}

void GpuMoeLayer::set_weights(const void* w1, const void* w2, float* grad_w1, float* grad_w2) {
  check_pointer(w1, num_local_experts_ > 0, "w1");
  check_pointer(w2, num_local_experts_ > 0, "w2");
  check_pointer(grad_w1, grad_w1 != nullptr, "grad_w1");
  check_pointer(grad_w2, grad_w2 != nullptr, "grad_w2");
  Require((grad_w1 == nullptr) == (grad_w2 == nullptr), kBad, "GPU layer: one of the two gradients is null");
  layer_->set_weights(w1, w2, grad_w1, grad_w2);
  has_weights_ = true;
  has_gradients_ = num_local_experts_ == 0 || grad_w1 != nullptr;
}
void GpuMoeLayer::plan(const GpuRoutingView& routing, std::int64_t num_tokens, void* stream) {
  Require(num_tokens >= 0 && num_tokens <= max_tokens_, kBad, "GPU layer: ", num_tokens,
          " tokens; max_tokens is ", max_tokens_);
  Require(num_tokens == 0 || routing.row_ptr != nullptr, kBad, "GPU layer: row_ptr is null");
  planned_ = kept_ = false;
  layer_->plan(routing, num_tokens, stream);
  num_tokens_ = num_tokens;
  planned_ = true;
}
void GpuMoeLayer::forward(const void* x, void* y, bool keep, void* stream) {
  Require(has_weights_, ErrorCode::kInvalidState,
          "GPU layer: forward without weights; set_weights() comes first");
  Require(planned_, ErrorCode::kInvalidState, "GPU layer: forward without a plan");
  Require(!keep || training_, ErrorCode::kInvalidState,
          "GPU layer: a forward for a backward needs the option training");
  check_pointer(x, num_tokens_ > 0, "x");
  check_pointer(y, num_tokens_ > 0, "y");
  kept_ = false;
  layer_->forward(x, y, keep, stream);
  kept_ = keep;
}
void GpuMoeLayer::backward(const void* dy, void* dx, float* dweight, bool write_gradients, void* stream) {
  Require(kept_, ErrorCode::kInvalidState,
          "GPU layer: backward needs a forward with `keep` of the same plan");
  Require(has_gradients_, ErrorCode::kInvalidState,
          "GPU layer: backward without places for the gradients; give them to set_weights()");
  check_pointer(dy, num_tokens_ > 0, "dy");
  check_pointer(dx, num_tokens_ > 0, "dx");
  kept_ = false;
  layer_->backward(dy, dx, dweight, write_gradients, stream);
}
void GpuMoeLayer::wait(void* stream) {
  layer_->wait(stream);
}

}  // namespace sluice
