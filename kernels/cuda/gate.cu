// One warp a token; lane l holds the scores of experts l, l + 32, ...
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/launch.hpp"
#include "sluice/kernels/cuda/routing.hpp"

namespace sluice::kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kTokens = 8;  // of a block
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kMaxItems = kMaxGateExperts / 32;

// Keeps the order of floats in unsigned numbers.
__device__ __forceinline__ std::uint32_t ordered(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(std::uint32_t x) {
  return __uint_as_float(x & 0x80000000u ? x & 0x7FFFFFFFu : ~x);
}
__device__ __forceinline__ float warp_max(float x) {
  return from_ordered(__reduce_max_sync(kAll, ordered(x)));
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}
__device__ __forceinline__ float sigmoid(float z) {
  return 1.0f / (1.0f + expf(-z));
}
__device__ __forceinline__ float log_sigmoid(float z) {
  return fminf(z, 0.0f) - log1pf(expf(-fabsf(z)));
}

// Scores of token t; experts that do not exist, and NaN, are -infinity. Reports what is not finite.
template <int kItems>
__device__ __forceinline__ void load_scores(const GateScores& scores, std::int64_t t, int lane,
                                            std::uint32_t* status, float (&z)[kItems]) {
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = lane + 32 * i;
    z[i] = -INFINITY;
    if (e < scores.num_experts) {
      const float value = scores.logits[t * scores.stride + e];
      bad = bad || !(fabsf(value) < INFINITY);
      if (value == value) z[i] = value;
    }
  }
  if (status != nullptr && __any_sync(kAll, bad) && lane == 0) atomicOr(status, kStatusNonFinite);
}

// Bit i: item i is among the `count` best of the warp by (key, z, lower id), of the items in `allowed`. Each lane keeps
// its best; only the lane whose best was taken looks for its next.
template <int kItems>
__device__ __forceinline__ std::uint32_t choose(const float (&key)[kItems], const float (&z)[kItems],
                                                std::uint32_t allowed, int count, int lane) {
  std::uint32_t chosen = 0;
  std::uint32_t best = 0, best_z = 0, best_id = 0xFFFFFFFFu;  // 0 is below every float's number: nothing left
  const auto look = [&] {
    best = best_z = 0;
    best_id = 0xFFFFFFFFu;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((allowed & ~chosen) >> i & 1u) {
        const std::uint32_t k = ordered(key[i]), kz = ordered(z[i]);
        if (k > best || (k == best && kz > best_z)) {
          best = k;
          best_z = kz;
          best_id = static_cast<std::uint32_t>(lane + 32 * i);
        }
      }
    }
  };
  look();
  for (int n = 0; n < count; ++n) {
    const std::uint32_t top = __reduce_max_sync(kAll, best);
    std::uint32_t id = best == top ? best_id : 0xFFFFFFFFu;
    if (__popc(__ballot_sync(kAll, best == top)) > 1) {
      const std::uint32_t top_z = __reduce_max_sync(kAll, best == top ? best_z : 0);
      if (best_z != top_z) id = 0xFFFFFFFFu;
    }
    if (__reduce_min_sync(kAll, id) == id && id != 0xFFFFFFFFu) {
      chosen |= 1u << (id / 32);
      look();
    }
  }
  return chosen;
}

__device__ __forceinline__ void clear_counts(int* shared, int n) {
  for (int i = threadIdx.x; i < n; i += kWarps * 32) shared[i] = 0;
  __syncthreads();
}
__device__ __forceinline__ void add_counts(const GateCounts& counts, const int* of_expert,
                                           const int* with_active, int num_experts) {
  __syncthreads();
  for (int i = threadIdx.x; i <= num_experts; i += kWarps * 32) {
    if (counts.tokens_of_expert != nullptr && i < num_experts && of_expert[i] != 0)
      atomicAdd(counts.tokens_of_expert + i, of_expert[i]);
    if (counts.tokens_with_active != nullptr && with_active[i] != 0)
      atomicAdd(counts.tokens_with_active + i, with_active[i]);
  }
}

// Routes of one token from `first`, experts ascending; writes nothing past the capacity.
template <int kItems, typename Weight>
__device__ __forceinline__ void emit(const RoutingBuffers& routing, std::int64_t first, std::uint32_t chosen,
                                     int lane, int* of_expert, const Weight& weight) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool mine = chosen >> i & 1u;
    const unsigned votes = __ballot_sync(kAll, mine);
    const std::int64_t at = first + __popc(votes & ((1u << lane) - 1));
    if (mine && at < routing.capacity) {
      routing.expert[at] = lane + 32 * i;
      routing.weight[at] = weight(i);
      atomicAdd(of_expert + lane + 32 * i, 1);
    }
    first += __popc(votes);
  }
}

template <int kItems>
__global__ void __launch_bounds__(kWarps * 32, 1)
    softmax_kernel(GateScores scores, SoftmaxGate gate, RoutingBuffers routing, GateCounts counts) {
  __shared__ int shared[2 * kItems * 32 + 1];
  int* const of_expert = shared;
  int* const with_active = shared + kItems * 32;
  clear_counts(shared, 2 * kItems * 32 + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int n = warp; n < kTokens; n += kWarps) {
    const std::int64_t t = blockIdx.x * std::int64_t{kTokens} + n;
    if (t >= scores.num_tokens) break;
    float z[kItems], p[kItems];
    load_scores(scores, t, lane, routing.status, z);
    const std::uint32_t chosen = choose(z, z, 0xFFFFFFFFu, gate.top_k, lane);
    float top = z[0];
#pragma unroll
    for (int i = 1; i < kItems; ++i) top = fmaxf(top, z[i]);
    top = warp_max(top);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      p[i] = expf(z[i] - top);
      if (!gate.over_selected || (chosen >> i & 1u)) sum += p[i];
    }
    sum = warp_sum(sum);
    emit<kItems>(routing, t * gate.top_k, chosen, lane, of_expert,
                 [&](int i) { return gate.route_scale * (p[i] / sum); });
    if (lane == 0) {
      routing.row_ptr[t + 1] = (t + 1) * gate.top_k;
      if (t == 0) routing.row_ptr[0] = 0;
      atomicAdd(with_active + gate.top_k, 1);
    }
  }
  add_counts(counts, of_expert, with_active, scores.num_experts);
}

// Items of the best groups.
template <int kItems>
__device__ __forceinline__ std::uint32_t groups_allowed(const float (&key)[kItems], const SigmoidGate& gate,
                                                        int num_experts, int lane) {
  const int size = num_experts / gate.num_groups;
  float mine = -INFINITY;  // score of group `lane`
  for (int g = 0; g < gate.num_groups; ++g) {
    float first = -INFINITY, second = -INFINITY;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = lane + 32 * i;
      if (e / size == g && e < num_experts) {
        second = fmaxf(second, fminf(first, key[i]));
        first = fmaxf(first, key[i]);
      }
    }
    const float best = warp_max(first);
    const unsigned holders = __ballot_sync(kAll, first == best);
    const float next = warp_max(lane == __ffs(holders) - 1 ? second : first);
    if (lane == g) mine = size > 1 ? best + next : best;
  }
  unsigned groups = 0;
  for (int n = 0; n < gate.top_groups; ++n) {
    const bool open = lane < gate.num_groups && !(groups >> lane & 1u);
    const std::uint32_t score = open ? ordered(mine) : 0;
    const std::uint32_t best = __reduce_max_sync(kAll, score);
    groups |= 1u << (__ffs(__ballot_sync(kAll, open && score == best)) - 1);
  }
  std::uint32_t allowed = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = lane + 32 * i;
    if (e < num_experts && (groups >> (e / size) & 1u)) allowed |= 1u << i;
  }
  return allowed;
}

template <int kItems>
__global__ void __launch_bounds__(kWarps * 32)
    sigmoid_kernel(GateScores scores, SigmoidGate gate, const float* bias, RoutingBuffers routing,
                   GateCounts counts) {
  __shared__ int shared[2 * kItems * 32 + 1];
  int* const of_expert = shared;
  int* const with_active = shared + kItems * 32;
  clear_counts(shared, 2 * kItems * 32 + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int n = warp; n < kTokens; n += kWarps) {
    const std::int64_t t = blockIdx.x * std::int64_t{kTokens} + n;
    if (t >= scores.num_tokens) break;
    float z[kItems], key[kItems];
    load_scores(scores, t, lane, routing.status, z);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = lane + 32 * i;
      // Without a bias s grows with z, and z still tells apart what s cannot.
      key[i] = e >= scores.num_experts ? -INFINITY : sigmoid(z[i]) + (bias != nullptr ? bias[e] : 0.0f);
    }
    std::uint32_t allowed = 0xFFFFFFFFu;
    if (gate.num_groups > 1) allowed = groups_allowed(key, gate, scores.num_experts, lane);
    const std::uint32_t chosen = choose(key, z, allowed, gate.top_k, lane);
    if (gate.renormalize) {
      // From log s, which does not underflow.
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (chosen >> i & 1u) top = fmaxf(top, key[i] = log_sigmoid(z[i]));
      top = warp_max(top);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (chosen >> i & 1u) sum += key[i] = expf(key[i] - top);
      sum = warp_sum(sum);
#pragma unroll
      for (int i = 0; i < kItems; ++i) key[i] = key[i] / sum;
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) key[i] = sigmoid(z[i]);
    }
    emit<kItems>(routing, t * gate.top_k, chosen, lane, of_expert,
                 [&](int i) { return gate.route_scale * key[i]; });
    if (lane == 0) {
      routing.row_ptr[t + 1] = (t + 1) * gate.top_k;
      if (t == 0) routing.row_ptr[0] = 0;
      atomicAdd(with_active + gate.top_k, 1);
    }
  }
  add_counts(counts, of_expert, with_active, scores.num_experts);
}

// ---- ReLU: count, then write behind the tokens before ------------------------------------------------------------------
template <int kItems>
__device__ __forceinline__ std::uint32_t active(const float (&z)[kItems]) {
  std::uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) bits |= (z[i] > 0.0f ? 1u : 0u) << i;
  return bits;
}

template <int kItems>
__global__ void __launch_bounds__(kWarps * 32)
    relu_count_kernel(GateScores scores, std::uint32_t* status, std::int32_t* block_routes) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int mine = 0;
  for (int n = warp; n < kTokens; n += kWarps) {
    const std::int64_t t = blockIdx.x * std::int64_t{kTokens} + n;
    if (t >= scores.num_tokens) break;
    float z[kItems];
    load_scores(scores, t, lane, status, z);
    mine += __popc(active(z));
  }
  mine = __reduce_add_sync(kAll, mine);
  if (lane == 0) atomicAdd(&total, mine);
  __syncthreads();
  if (threadIdx.x == 0) block_routes[blockIdx.x] = total;
}

template <int kItems>
__global__ void __launch_bounds__(kWarps * 32)
    relu_kernel(GateScores scores, RoutingBuffers routing, GateCounts counts,
                const std::int32_t* block_routes) {
  __shared__ int shared[2 * kItems * 32 + 1];
  __shared__ int count[kTokens];
  __shared__ long long before[kWarps];
  int* const of_expert = shared;
  int* const with_active = shared + kItems * 32;
  clear_counts(shared, 2 * kItems * 32 + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  long long sum = 0;
  for (unsigned b = threadIdx.x; b < blockIdx.x; b += kWarps * 32) sum += block_routes[b];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  if (lane == 0) before[warp] = sum;
  for (int n = warp; n < kTokens; n += kWarps) {
    const std::int64_t t = blockIdx.x * std::int64_t{kTokens} + n;
    int routes = 0;
    if (t < scores.num_tokens) {
      float z[kItems];
      load_scores(scores, t, lane, nullptr, z);
      routes = __reduce_add_sync(kAll, __popc(active(z)));
      if (lane == 0) atomicAdd(with_active + routes, 1);
    }
    if (lane == 0) count[n] = routes;
  }
  __syncthreads();
  std::int64_t first = 0;
  for (int w = 0; w < kWarps; ++w) first += before[w];
  for (int n = warp; n < kTokens; n += kWarps) {
    const std::int64_t t = blockIdx.x * std::int64_t{kTokens} + n;
    if (t >= scores.num_tokens) break;
    const std::int64_t begin = first + __reduce_add_sync(kAll, lane < n ? count[lane] : 0);
    float z[kItems];
    load_scores(scores, t, lane, nullptr, z);
    emit<kItems>(routing, begin, active(z), lane, of_expert, [&](int i) { return z[i]; });
    if (lane == 0) {
      const std::int64_t end = begin + count[n];
      routing.row_ptr[t + 1] = min(end, routing.capacity);
      if (t == 0) routing.row_ptr[0] = 0;
      if (end > routing.capacity) atomicOr(routing.status, kStatusOverflow);
    }
  }
  add_counts(counts, of_expert, with_active, scores.num_experts);
}

// ---- backward ----------------------------------------------------------------------------------------------------------
enum class Gate { kSoftmax, kSigmoid, kRelu };
struct BackwardOptions {
  float route_scale;
  bool normalized;  // over the chosen ones
  float z_factor;
};

template <Gate kGate, int kItems>
__global__ void __launch_bounds__(kWarps * 32)
    backward_kernel(GateScores scores, ConstRouting routing, BackwardOptions options, const float* dweight,
                    const float* expert_gradient, float* dlogits, std::int64_t dlogits_stride) {
  __shared__ std::int16_t route_of[kWarps][kItems * 32];  // -1: not chosen
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t t = blockIdx.x * std::int64_t{kWarps} + warp;
  if (t >= scores.num_tokens) return;
#pragma unroll
  for (int i = 0; i < kItems; ++i) route_of[warp][lane + 32 * i] = -1;
  __syncwarp();
  const std::int64_t first = routing.row_ptr[t];
  const int routes = static_cast<int>(routing.row_ptr[t + 1] - first);
  for (int j = lane; j < routes; j += 32)
    route_of[warp][routing.expert[first + j]] = static_cast<std::int16_t>(j);
  __syncwarp();
  float z[kItems], a[kItems];
  std::uint32_t chosen = 0;
  load_scores(scores, t, lane, nullptr, z);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int j = route_of[warp][lane + 32 * i];
    a[i] = j >= 0 ? dweight[first + j] * options.route_scale : 0.0f;
    if (j >= 0) chosen |= 1u << i;
  }
  const auto extra = [&](int i) {
    const int e = lane + 32 * i;
    return expert_gradient != nullptr && e < scores.num_experts ? expert_gradient[e] : 0.0f;
  };
  const auto put = [&](int i, float value) {
    const int e = lane + 32 * i;
    if (e < scores.num_experts) dlogits[t * dlogits_stride + e] = value;
  };
  if constexpr (kGate == Gate::kRelu) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) put(i, z[i] > 0.0f ? a[i] + extra(i) : 0.0f);
  } else if constexpr (kGate == Gate::kSigmoid) {
    float q[kItems];
    float mean = 0;
    if (options.normalized) {
      float top = -INFINITY, sum = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (chosen >> i & 1u) top = fmaxf(top, q[i] = log_sigmoid(z[i]));
      top = warp_max(top);
#pragma unroll
      for (int i = 0; i < kItems; ++i) sum += q[i] = chosen >> i & 1u ? expf(q[i] - top) : 0.0f;
      sum = warp_sum(sum);
#pragma unroll
      for (int i = 0; i < kItems; ++i) mean += a[i] * (q[i] = q[i] / sum);
      mean = warp_sum(mean);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) q[i] = sigmoid(z[i]);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) put(i, chosen >> i & 1u ? q[i] * sigmoid(-z[i]) * (a[i] - mean) : 0.0f);
  } else {
    float p[kItems];
    float top = z[0];
#pragma unroll
    for (int i = 1; i < kItems; ++i) top = fmaxf(top, z[i]);
    top = warp_max(top);
    float sum = 0, chosen_sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      p[i] = expf(z[i] - top);
      sum += p[i];
      if (chosen >> i & 1u) chosen_sum += p[i];
    }
    sum = warp_sum(sum);
    chosen_sum = warp_sum(chosen_sum);
    // Through all experts goes u; through the chosen ones, when weights are normalized over them, a.
    float all = 0, selected = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float u = extra(i) + (options.normalized ? 0.0f : a[i]);
      all += p[i] / sum * u;
      if (options.normalized && (chosen >> i & 1u)) selected += p[i] / chosen_sum * a[i];
    }
    all = warp_sum(all);
    selected = warp_sum(selected);
    const float lse = top + logf(sum);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float u = extra(i) + (options.normalized ? 0.0f : a[i]);
      float value = p[i] / sum * (u - all + options.z_factor * 2.0f * lse);
      if (options.normalized && (chosen >> i & 1u)) value += p[i] / chosen_sum * (a[i] - selected);
      put(i, value);
    }
  }
}

// ---- host side -------------------------------------------------------------------------------------------------------
template <int kItems>
struct Items {};
template <typename Function>
void with_items(int num_experts, const Function& function) {
  const int items = (num_experts + 31) / 32;
  if (items <= 1) return function(Items<1>{});
  if (items <= 2) return function(Items<2>{});
  if (items <= 4) return function(Items<4>{});
  if (items <= 8) return function(Items<8>{});
  if (items <= 16) return function(Items<16>{});
  function(Items<kMaxItems>{});
}

void check_scores(const GateScores& scores) {
  Require(scores.num_experts >= 1 && scores.num_experts <= kMaxGateExperts, ErrorCode::kInvalidArgument,
          "gate: num_experts is ", scores.num_experts, "; 1..", kMaxGateExperts, " are possible");
  Require(scores.num_tokens >= 0 && scores.stride >= scores.num_experts, ErrorCode::kInvalidArgument,
          "gate: ", scores.num_tokens, " tokens, stride ", scores.stride, ", ", scores.num_experts,
          " experts do not fit together");
  Require(scores.logits != nullptr || scores.num_tokens == 0, ErrorCode::kInvalidArgument,
          "gate: logits is null");
}
void check_routing(const RoutingBuffers& routing, std::int64_t at_least) {
  Require(routing.row_ptr != nullptr && routing.status != nullptr, ErrorCode::kInvalidArgument,
          "gate: row_ptr and status must be given");
  Require(routing.capacity >= at_least, ErrorCode::kInvalidArgument, "gate: capacity is ", routing.capacity,
          " routes; ", at_least, " are needed");
  Require(routing.capacity == 0 || (routing.expert != nullptr && routing.weight != nullptr),
          ErrorCode::kInvalidArgument, "gate: expert or weight is null");
}
void check_top_k(int top_k, int num_experts) {
  Require(top_k >= 1 && top_k <= num_experts, ErrorCode::kInvalidConfig, "gate: top_k is ", top_k,
          "; it must be 1..", num_experts);
}
// Overwritten results start at zero; without tokens that is all.
bool begin_batch(const GateScores& scores, const RoutingBuffers& routing, const GateCounts& counts,
                 Stream stream) {
  if (counts.tokens_of_expert != nullptr)
    check_cuda(cudaMemsetAsync(counts.tokens_of_expert, 0,
                               sizeof(std::int32_t) * static_cast<std::size_t>(scores.num_experts), stream),
               "gate: clearing counts");
  if (counts.tokens_with_active != nullptr)
    check_cuda(
        cudaMemsetAsync(counts.tokens_with_active, 0,
                        sizeof(std::int32_t) * (static_cast<std::size_t>(scores.num_experts) + 1), stream),
        "gate: clearing counts");
  if (scores.num_tokens > 0) return true;
  check_cuda(cudaMemsetAsync(routing.row_ptr, 0, sizeof(std::int64_t), stream), "gate: an empty routing");
  return false;
}

template <Gate kGate>
void backward(const GateScores& scores, const ConstRouting& routing, const BackwardOptions& options,
              const float* dweight, const float* expert_gradient, float* dlogits, std::int64_t dlogits_stride,
              Stream stream) {
  check_scores(scores);
  Require(dlogits_stride >= scores.num_experts, ErrorCode::kInvalidArgument, "gate: dlogits_stride is ",
          dlogits_stride, "; it must be at least ", scores.num_experts);
  if (scores.num_tokens == 0) return;
  Require(routing.row_ptr != nullptr && dlogits != nullptr, ErrorCode::kInvalidArgument,
          "gate: row_ptr or dlogits is null");
  with_items(scores.num_experts, [&]<int kItems>(Items<kItems>) {
    backward_kernel<kGate, kItems><<<blocks_for(scores.num_tokens, kWarps, "gate"), kWarps * 32, 0, stream>>>(
        scores, routing, options, dweight, expert_gradient, dlogits, dlogits_stride);
  });
  check_cuda(cudaGetLastError(), "gate backward");
}

}  // namespace

void gate_softmax(const GateScores& scores, const SoftmaxGate& gate, const RoutingBuffers& routing,
                  const GateCounts& counts, Stream stream) {
  check_scores(scores);
  check_top_k(gate.top_k, scores.num_experts);
  check_routing(routing, scores.num_tokens * gate.top_k);
  if (!begin_batch(scores, routing, counts, stream)) return;
  with_items(scores.num_experts, [&]<int kItems>(Items<kItems>) {
    softmax_kernel<kItems><<<blocks_for(scores.num_tokens, kTokens, "gate"), kWarps * 32, 0, stream>>>(
        scores, gate, routing, counts);
  });
  check_cuda(cudaGetLastError(), "gate_softmax");
}

void gate_softmax_backward(const GateScores& scores, const SoftmaxGate& gate, const ConstRouting& routing,
                           const float* dweight, const float* aux_gradient, float z_factor, float* dlogits,
                           std::int64_t dlogits_stride, Stream stream) {
  backward<Gate::kSoftmax>(scores, routing, {gate.route_scale, gate.over_selected, z_factor}, dweight,
                           aux_gradient, dlogits, dlogits_stride, stream);
}

void gate_sigmoid(const GateScores& scores, const SigmoidGate& gate, const float* bias,
                  const RoutingBuffers& routing, const GateCounts& counts, Stream stream) {
  check_scores(scores);
  check_top_k(gate.top_k, scores.num_experts);
  check_routing(routing, scores.num_tokens * gate.top_k);
  Require(gate.num_groups >= 1 && gate.num_groups <= 32 && scores.num_experts % gate.num_groups == 0,
          ErrorCode::kInvalidConfig, "gate: num_groups is ", gate.num_groups,
          "; it must be 1..32 and divide ", scores.num_experts);
  Require(gate.top_groups >= 1 && gate.top_groups <= gate.num_groups &&
              gate.top_groups * (scores.num_experts / gate.num_groups) >= gate.top_k,
          ErrorCode::kInvalidConfig, "gate: top_groups is ", gate.top_groups, "; of ", gate.num_groups,
          " groups it must leave at least top_k = ", gate.top_k, " experts");
  if (!begin_batch(scores, routing, counts, stream)) return;
  with_items(scores.num_experts, [&]<int kItems>(Items<kItems>) {
    sigmoid_kernel<kItems><<<blocks_for(scores.num_tokens, kTokens, "gate"), kWarps * 32, 0, stream>>>(
        scores, gate, bias, routing, counts);
  });
  check_cuda(cudaGetLastError(), "gate_sigmoid");
}

void gate_sigmoid_backward(const GateScores& scores, const SigmoidGate& gate, const ConstRouting& routing,
                           const float* dweight, float* dlogits, std::int64_t dlogits_stride, Stream stream) {
  backward<Gate::kSigmoid>(scores, routing, {gate.route_scale, gate.renormalize, 0}, dweight, nullptr,
                           dlogits, dlogits_stride, stream);
}

std::size_t gate_relu_scratch_bytes(std::int64_t num_tokens) {
  return sizeof(std::int32_t) * static_cast<std::size_t>((num_tokens + kTokens - 1) / kTokens + 1);
}

void gate_relu(const GateScores& scores, const RoutingBuffers& routing, const GateCounts& counts,
               void* scratch, Stream stream) {
  check_scores(scores);
  check_routing(routing, 0);
  if (!begin_batch(scores, routing, counts, stream)) return;
  Require(scratch != nullptr, ErrorCode::kInvalidArgument, "gate: scratch is null");
  const unsigned blocks = blocks_for(scores.num_tokens, kTokens, "gate");
  with_items(scores.num_experts, [&]<int kItems>(Items<kItems>) {
    relu_count_kernel<kItems>
        <<<blocks, kWarps * 32, 0, stream>>>(scores, routing.status, static_cast<std::int32_t*>(scratch));
    check_cuda(cudaGetLastError(), "gate_relu");
    relu_kernel<kItems><<<blocks, kWarps * 32, 0, stream>>>(scores, routing, counts,
                                                            static_cast<const std::int32_t*>(scratch));
  });
  check_cuda(cudaGetLastError(), "gate_relu");
}

void gate_relu_backward(const GateScores& scores, const ConstRouting& routing, const float* dweight,
                        const float* l1_gradient, float* dlogits, std::int64_t dlogits_stride,
                        Stream stream) {
  backward<Gate::kRelu>(scores, routing, {1.0f, false, 0}, dweight, l1_gradient, dlogits, dlogits_stride,
                        stream);
}

}  // namespace sluice::kernels::cuda
