// As many blocks as run at a time, each goes over its share of the tokens; scores stay in registers.
// Forward (softmax, sigmoid): 8 lanes a token (32 with more than 256 experts), so that a warp has 4 tokens under way and
// its shuffles serve all of them. A lane holds the scores of kItems experts in a row, the lower lane the lower ids; they
// come through shared memory, so that memory is read in whole lines. The experts chosen are those at or above the top_k-th
// best key; that is found from each lane's four best. Where that gives more than top_k experts (ties, or five and more in one
// lane: about one token in a hundred) the worst of them are taken out one by one.
// Backward: one warp a token, whose row is put together in shared memory, so that it is written in whole lines.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/launch.hpp"
#include "sluice/kernels/cuda/routing.hpp"

namespace sluice::kernels::cuda {
namespace {

constexpr int kWarps = 8;      // of a block
constexpr int kTopKWarps = 4;  // of a block of the softmax and the sigmoid gate
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kMaxItems = kMaxGateExperts / 32;
// Blocks a processor is to hold: warps enough to hide the latency of memory, registers enough for the scores. `most`: with
// few experts.
constexpr int blocks_a_processor(int items, int most) {
  return items <= 8 ? most : items <= 16 ? most / 2 : 1;
}
constexpr int kReluBlocks = 3, kBackwardBlocks = 8, kSoftmaxBackwardBlocks = 5;
constexpr int softmax_blocks(int items) {
  return items <= 16 ? 8 : 5;
}
constexpr int sigmoid_blocks(int items) {
  return items <= 8 ? 8 : items <= 16 ? 5 : 3;
}

// Keeps the order of floats in unsigned numbers; 0 is below all of them.
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
// Sum over the lanes up to this one, of those that work together.
template <int kLanes>
__device__ __forceinline__ int prefix(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int below = __shfl_up_sync(kAll, x, distance);
    if (lane % kLanes >= distance) x += below;
  }
  return x;
}
// Over kLanes neighbouring lanes.
template <int kLanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAll, x, distance));
  return x;
}
template <int kLanes, typename T>
__device__ __forceinline__ T lanes_sum(T x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}
template <int kLanes>
__device__ __forceinline__ unsigned lanes_ballot(bool yes, int lane) {
  return __ballot_sync(kAll, yes) >> (lane / kLanes * kLanes) & (kAll >> (32 - kLanes));
}

// The hardware's 2^x after one rounded product: exact to about 2^-22 of the result near 0, where the weights that matter
// are, and |x| * 2^-24 further down.
__device__ __forceinline__ float quick_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ float sigmoid(float z) {
  return __fdividef(1.0f, 1.0f + quick_exp(-z));
}
// sigmoid(z) / exp(shift) with shift = min(0, the largest z at hand): does not underflow for all of them.
__device__ __forceinline__ float shifted_sigmoid(float z, float shift) {
  return __fdividef(quick_exp(fminf(z, 0.0f) - shift), 1.0f + quick_exp(-fabsf(z)));
}

// ---- rows of scores ----------------------------------------------------------------------------------------------------
enum class Layout {
  kQuads,   // four neighbours a lane, then the next 128 experts
  kSingle,  // one a lane, then the next 32 experts
};
template <Layout kLayout, int kItems>
__device__ __forceinline__ int expert_of(int lane, int i) {
  constexpr int kVector = kItems < 4 ? kItems : 4;
  if constexpr (kLayout == Layout::kQuads) return i / kVector * 32 * kVector + lane * kVector + i % kVector;
  return lane + 32 * i;
}

// Scores of token t; experts that do not exist, and NaN, are -infinity. Reports what is not finite.
template <Layout kLayout, int kItems>
__device__ __forceinline__ void load_scores(const GateScores& scores, std::int64_t t, int lane, bool vector,
                                            std::uint32_t* status, float (&z)[kItems]) {
  const float* const row = scores.logits + t * scores.stride;
  bool loaded = false;
  if constexpr (kLayout != Layout::kSingle && kItems >= 4) {
    if (vector) {
      loaded = true;
#pragma unroll
      for (int i = 0; i < kItems; i += 4) {
        const int e = expert_of<kLayout, kItems>(lane, i);
        float4 four{0, 0, 0, 0};
        if (e < scores.num_experts) four = *reinterpret_cast<const float4*>(row + e);
        z[i] = four.x;
        z[i + 1] = four.y;
        z[i + 2] = four.z;
        z[i + 3] = four.w;
      }
    }
  }
  if (!loaded) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = expert_of<kLayout, kItems>(lane, i);
      z[i] = e < scores.num_experts ? row[e] : 0.0f;
    }
  }
  float probe = 0;  // NaN if one of them is not finite
#pragma unroll
  for (int i = 0; i < kItems; ++i) probe = fmaf(z[i], 0.0f, probe);
  if (__any_sync(kAll, probe != probe)) {
    if (status != nullptr && lane == 0) atomicOr(status, kStatusNonFinite);
#pragma unroll
    for (int i = 0; i < kItems; ++i) z[i] = fmaxf(z[i], -INFINITY);
  }
  if (scores.num_experts < kItems * 32) {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (expert_of<kLayout, kItems>(lane, i) >= scores.num_experts) z[i] = -INFINITY;
  }
}
__device__ __forceinline__ float clean(float z) {
  return fmaxf(z, -INFINITY);  // of a NaN and a number, the number
}

// ---- what all forward kernels do ---------------------------------------------------------------------------------------
template <int kExperts>
struct SharedCounts {
  int of_expert[kExperts];
  int with_active[kExperts + 1];
};
template <int kExperts>
__device__ __forceinline__ void clear_counts(SharedCounts<kExperts>& shared) {
  for (int i = threadIdx.x; i <= kExperts; i += blockDim.x) {
    if (i < kExperts) shared.of_expert[i] = 0;
    shared.with_active[i] = 0;
  }
  __syncthreads();
}
template <int kExperts>
__device__ __forceinline__ void add_counts(const GateCounts& counts, const SharedCounts<kExperts>& shared,
                                           int num_experts) {
  __syncthreads();
  for (int i = threadIdx.x; i <= num_experts; i += blockDim.x) {
    if (counts.tokens_of_expert != nullptr && i < num_experts && shared.of_expert[i] != 0)
      atomicAdd(counts.tokens_of_expert + i, shared.of_expert[i]);
    if (counts.tokens_with_active != nullptr && shared.with_active[i] != 0)
      atomicAdd(counts.tokens_with_active + i, shared.with_active[i]);
  }
}

// ---- choosing ----------------------------------------------------------------------------------------------------------
constexpr int kBest = 4;  // keys of a lane that are looked at first
__device__ __forceinline__ void exchange(float& a, float& b) {
  const float more = fmaxf(a, b);
  b = fminf(a, b);
  a = more;
}
// The largest of items kFrom..kFrom+kCount-1, descending.
template <int kFrom, int kCount, int kItems>
__device__ __forceinline__ void best_of(const float (&key)[kItems], float (&best)[kBest]) {
  if constexpr (kCount < kBest) {
#pragma unroll
    for (int i = 0; i < kBest; ++i) best[i] = i < kCount ? key[kFrom + (i < kCount ? i : 0)] : -INFINITY;
    if constexpr (kCount == 2) exchange(best[0], best[1]);
  } else if constexpr (kCount == kBest) {
#pragma unroll
    for (int i = 0; i < kBest; ++i) best[i] = key[kFrom + i];
    exchange(best[0], best[1]);
    exchange(best[2], best[3]);
    exchange(best[0], best[2]);
    exchange(best[1], best[3]);
    exchange(best[1], best[2]);
  } else {
    float other[kBest];
    best_of<kFrom, kCount / 2>(key, best);
    best_of<kFrom + kCount / 2, kCount / 2>(key, other);
    // The larger halves of a descending and an ascending list fall, then rise; two steps put them in order.
#pragma unroll
    for (int i = 0; i < kBest; ++i) best[i] = fmaxf(best[i], other[kBest - 1 - i]);
    exchange(best[0], best[2]);
    exchange(best[1], best[3]);
    exchange(best[0], best[1]);
    exchange(best[2], best[3]);
  }
}

template <int kItems, typename Function>
__device__ __forceinline__ std::uint32_t items_where(const Function& f) {
  std::uint32_t items = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (f(i)) items |= 1u << i;
  return items;
}

// Bit i: item i is among the `count` best of the lanes by (key, z, lower id). best: the lane's best keys; used up.
template <int kLanes, int kItems>
__device__ __forceinline__ std::uint32_t choose(const float (&key)[kItems], const float (&z)[kItems],
                                                int count, int lane, float (&best)[kBest]) {
  constexpr int kFew = 12;  // more are likely to meet five in a lane
  // A key that at least `count` items reach: the count-th best, unless a lane had more of them than `best` holds.
  float least = -INFINITY;
  if (count <= kFew) {
#pragma unroll 4
    for (int n = 0; n < count; ++n) {
      least = lanes_max<kLanes>(best[0]);
      const bool mine = best[0] == least;
#pragma unroll
      for (int i = 0; i < kBest; ++i)
        best[i] = mine ? (i + 1 < kBest ? best[(i + 1) % kBest] : -INFINITY) : best[i];
    }
  } else {
    // The largest number of a key, bit by bit from above.
    std::uint32_t number = 0;
#pragma unroll 1
    for (int bit = 31; bit >= 0; --bit) {
      const float middle = from_ordered(number | 1u << bit);  // NaN above infinity: reached by none
      int reached = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) reached += key[i] >= middle ? 1 : 0;
      if (lanes_sum<kLanes>(reached) >= count) number |= 1u << bit;
    }
    least = number != 0 ? from_ordered(number) : -INFINITY;
  }
  std::uint32_t chosen = items_where<kItems>([&](int i) { return key[i] >= least; });
  int others = lanes_sum<kLanes>(__popc(chosen)) - count;  // too many
  while (__any_sync(kAll, others > 0)) {
    // The worst key of those chosen, and who has it.
    float worst = INFINITY;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (chosen >> i & 1u) worst = fminf(worst, key[i]);
    worst = -lanes_max<kLanes>(-worst);
    std::uint32_t tied = items_where<kItems>([&](int i) { return key[i] == worst; }) & chosen;
    const int ties = lanes_sum<kLanes>(__popc(tied));
    if (__any_sync(kAll, others > 0 && ties > others)) {
      // Not all of them go: those with the worst z.
      float worst_z = INFINITY;
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (tied >> i & 1u) worst_z = fminf(worst_z, z[i]);
      worst_z = -lanes_max<kLanes>(-worst_z);
      if (ties > others) tied &= items_where<kItems>([&](int i) { return z[i] == worst_z; });
    }
    const int mine = __popc(tied);
    const int upto = prefix<kLanes>(mine, lane);
    const int all = __shfl_sync(kAll, upto, lane / kLanes * kLanes + kLanes - 1);
    // If still not all go, the lower ids stay.
    int stay = max(all - max(others, 0), 0) - (upto - mine);
    for (; stay > 0 && tied != 0; --stay) tied &= tied - 1;
    if (others > 0) chosen &= ~tied;
    others = lanes_sum<kLanes>(__popc(chosen)) - count;
  }
  return chosen;
}

// ---- tokens of a warp --------------------------------------------------------------------------------------------------
// A lane's run of scores in shared memory, and 16 bytes, so that lanes of a quarter warp meet different banks.
template <int kItems>
constexpr int kRunStride = kItems < 4 ? kItems : kItems + 4;
template <int kItems>
__device__ __forceinline__ int place_of(int expert) {
  return expert / kItems * kRunStride<kItems> + expert % kItems;
}
template <int kLanes, int kItems>
struct alignas(16) TokenMemory {
  static constexpr int kTokens = 32 / kLanes;
  float scores[kTokens][kLanes * kRunStride<kItems>];
  std::int16_t chosen[kTokens][kLanes * kItems];
  float group_score[kTokens][32];
};

// Scores of tokens first.. of the warp's into shared memory; those of experts that do not exist were -infinity before
// and stay so, of tokens that do not exist they are whatever was there. True for a warp that met what is not finite.
template <int kLanes, int kItems>
__device__ __forceinline__ bool bring_scores(const GateScores& scores, std::int64_t first, int lane,
                                             bool vector, TokenMemory<kLanes, kItems>& memory) {
  constexpr int kTokens = TokenMemory<kLanes, kItems>::kTokens;
  constexpr int kExperts = kLanes * kItems;
  const float* const row = scores.logits + first * scores.stride;
  const auto tokens = static_cast<int>(min(std::int64_t{kTokens}, scores.num_tokens - first));
  float probe = 0;  // NaN if one of them is not finite
  __syncwarp();     // the last tokens' were read
  if (kItems >= 4 && vector) {
    constexpr int kEach = (kExperts / 4 + 31) / 32;
    float4 four[kTokens][kEach];
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int e = 4 * (lane + 32 * i);
        if (n < tokens && e < scores.num_experts)
          four[n][i] = *reinterpret_cast<const float4*>(row + n * scores.stride + e);
      }
    }
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int e = 4 * (lane + 32 * i);
        if (n < tokens && e < scores.num_experts) {
          const float4 v = four[n][i];
          probe = fmaf(v.x, 0.0f, fmaf(v.y, 0.0f, fmaf(v.z, 0.0f, fmaf(v.w, 0.0f, probe))));
          *reinterpret_cast<float4*>(&memory.scores[n][place_of<kItems>(e)]) = v;
        }
      }
    }
  } else {
    for (int n = 0; n < tokens; ++n) {
      for (int e = lane; e < scores.num_experts; e += 32) {
        const float v = row[n * scores.stride + e];
        probe = fmaf(v, 0.0f, probe);
        memory.scores[n][place_of<kItems>(e)] = v;
      }
    }
  }
  __syncwarp();
  return __any_sync(kAll, probe != probe);
}
template <int kItems>
__device__ __forceinline__ void read_run(const float* run, float (&z)[kItems]) {
  if constexpr (kItems >= 4) {
#pragma unroll
    for (int i = 0; i < kItems; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(run + i);
      z[i] = v.x;
      z[i + 1] = v.y;
      z[i + 2] = v.z;
      z[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) z[i] = run[i];
  }
}

// The chosen experts of a token, ascending; this lane's are those at lane, lane + kLanes, ...
template <int kLanes, int kItems>
struct Chosen {
  const std::int16_t* list;
  const float* scores;
  int count, lane;
  int expert = 0;  // at `lane`
  float z = -INFINITY;

  __device__ __forceinline__ Chosen(TokenMemory<kLanes, kItems>& memory, std::uint32_t chosen, int count,
                                    int warp_lane)
      : list(memory.chosen[warp_lane / kLanes]),
        scores(memory.scores[warp_lane / kLanes]),
        count(count),
        lane(warp_lane % kLanes) {
    std::int16_t* const to = memory.chosen[warp_lane / kLanes];
    const int mine = __popc(chosen);
    int at = prefix<kLanes>(mine, warp_lane) - mine;
    for (std::uint32_t left = chosen; left != 0; left &= left - 1)
      to[at++] = static_cast<std::int16_t>(lane * kItems + __ffs(static_cast<int>(left)) - 1);
    __syncwarp();
    if (lane < count) {
      expert = list[lane];
      z = score(expert);
    }
  }
  __device__ __forceinline__ float score(int e) const { return clean(scores[place_of<kItems>(e)]); }
  // f(position, expert, score)
  template <typename Function>
  __device__ __forceinline__ void each(const Function& f) const {
    if (lane < count) f(lane, expert, z);
#pragma unroll 1
    for (int n = lane + kLanes; n < count; n += kLanes) f(n, static_cast<int>(list[n]), score(list[n]));
  }
};

// What softmax and sigmoid gates do before and after a warp's tokens.
template <int kLanes, int kItems>
__device__ __forceinline__ void prepare(TokenMemory<kLanes, kItems>& memory, int lane) {
  float* const all = memory.scores[0];
  for (int i = lane; i < memory.kTokens * kLanes * kRunStride<kItems>; i += 32) all[i] = -INFINITY;
}
template <int kExperts>
__device__ __forceinline__ void finish_token(const RoutingBuffers& routing, SharedCounts<kExperts>& shared,
                                             std::int64_t t, int top_k) {
  routing.row_ptr[t + 1] = (t + 1) * top_k;
  if (t == 0) routing.row_ptr[0] = 0;
  atomicAdd(shared.with_active + top_k, 1);
}

template <int kLanes, int kItems>
__global__ void __launch_bounds__(kTopKWarps * 32, softmax_blocks(kItems))
    softmax_kernel(GateScores scores, SoftmaxGate gate, RoutingBuffers routing, GateCounts counts,
                   bool vector) {
  __shared__ SharedCounts<kLanes * kItems> shared;
  __shared__ __align__(16) TokenMemory<kLanes, kItems> memories[kTopKWarps];
  constexpr int kTokens = 32 / kLanes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  TokenMemory<kLanes, kItems>& memory = memories[warp];
  prepare(memory, lane);
  clear_counts(shared);
  const std::int64_t step = std::int64_t{gridDim.x} * kTopKWarps * kTokens;
  for (std::int64_t begin = (blockIdx.x * std::int64_t{kTopKWarps} + warp) * kTokens;
       begin < scores.num_tokens; begin += step) {
    const bool bad = bring_scores(scores, begin, lane, vector, memory);
    const std::int64_t t = begin + lane / kLanes;
    const bool real = t < scores.num_tokens;
    float z[kItems], best[kBest];
    read_run(memory.scores[lane / kLanes] + lane % kLanes * kRunStride<kItems>, z);
    if (bad) {
      if (lane == 0) atomicOr(routing.status, kStatusNonFinite);
#pragma unroll
      for (int i = 0; i < kItems; ++i) z[i] = clean(z[i]);
    }
    best_of<0, kItems>(z, best);
    const float top = lanes_max<kLanes>(best[0]);
    const std::uint32_t bits = choose<kLanes>(z, z, gate.top_k, lane, best);
    const Chosen<kLanes, kItems> chosen(memory, bits, gate.top_k, lane);
    float sum = 0;
    if (gate.over_selected) {
      chosen.each([&](int, int, float score) { sum += quick_exp(score - top); });
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) sum += quick_exp(z[i] - top);
    }
    const float scale = gate.route_scale / lanes_sum<kLanes>(sum);
    if (!real) continue;
    chosen.each([&](int n, int e, float score) {
      routing.expert[t * gate.top_k + n] = e;
      routing.weight[t * gate.top_k + n] = quick_exp(score - top) * scale;
      atomicAdd(shared.of_expert + e, 1);
    });
    if (lane % kLanes == 0) finish_token(routing, shared, t, gate.top_k);
  }
  add_counts(counts, shared, scores.num_experts);
}

// Bit i: item i belongs to one of the best groups, whatever ties there are and wherever groups begin.
template <int kLanes, int kItems>
__device__ __forceinline__ std::uint32_t items_of_best_groups(const float (&score)[kItems],
                                                              const SigmoidGate& gate, int num_experts,
                                                              int lane, float* group_score) {
  const int size = num_experts / gate.num_groups, run = lane % kLanes * kItems;
  __syncwarp();
#pragma unroll 1
  for (int g = 0; g < gate.num_groups; ++g) {
    float first = -INFINITY, second = -INFINITY;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (run + i >= g * size && run + i < (g + 1) * size) {
        second = fmaxf(second, fminf(first, score[i]));
        first = fmaxf(first, score[i]);
      }
    }
    const float best = lanes_max<kLanes>(first);
    const unsigned holders = lanes_ballot<kLanes>(first == best, lane);
    const float next =
        lanes_max<kLanes>(lane % kLanes == __ffs(static_cast<int>(holders)) - 1 ? second : first);
    if (lane % kLanes == 0) group_score[g] = size > 1 ? best + next : best;
  }
  __syncwarp();
  unsigned groups = 0;
#pragma unroll 1
  for (int n = 0; n < gate.top_groups; ++n) {
    int best = -1;
#pragma unroll 1
    for (int g = 0; g < gate.num_groups; ++g)
      if (!(groups >> g & 1u) && (best < 0 || group_score[g] > group_score[best])) best = g;
    groups |= 1u << best;
  }
  std::uint32_t allowed = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (run + i < num_experts && (groups >> ((run + i) / size) & 1u)) allowed |= 1u << i;
  return allowed;
}

template <int kLanes, int kItems>
__global__ void __launch_bounds__(kTopKWarps * 32, sigmoid_blocks(kItems))
    sigmoid_kernel(GateScores scores, SigmoidGate gate, const float* bias, RoutingBuffers routing,
                   GateCounts counts, bool vector) {
  __shared__ SharedCounts<kLanes * kItems> shared;
  __shared__ __align__(16) TokenMemory<kLanes, kItems> memories[kTopKWarps];
  __shared__ __align__(16) float bias_of[kLanes * kRunStride<kItems>];
  constexpr int kTokens = 32 / kLanes;
  constexpr std::uint32_t kAllItems = 0xFFFFFFFFu >> (32 - kItems);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  TokenMemory<kLanes, kItems>& memory = memories[warp];
  prepare(memory, lane);
  for (int e = threadIdx.x; e < kLanes * kItems; e += kTopKWarps * 32)
    bias_of[place_of<kItems>(e)] = bias != nullptr && e < scores.num_experts ? bias[e] : -INFINITY;
  clear_counts(shared);
  const int size = scores.num_experts / gate.num_groups;
  // Lanes of a group, where no lane has items of two.
  const int lanes = size % kItems == 0 ? size / kItems : 0;
  const bool groups_of_lanes = lanes > 0 && (lanes & (lanes - 1)) == 0;
  const std::int64_t step = std::int64_t{gridDim.x} * kTopKWarps * kTokens;
  for (std::int64_t begin = (blockIdx.x * std::int64_t{kTopKWarps} + warp) * kTokens;
       begin < scores.num_tokens; begin += step) {
    const bool bad = bring_scores(scores, begin, lane, vector, memory);
    const std::int64_t t = begin + lane / kLanes;
    const bool real = t < scores.num_tokens;
    const int run = lane % kLanes * kRunStride<kItems>;
    float z[kItems], key[kItems], best[kBest];
    read_run(memory.scores[lane / kLanes] + run, z);
    if (bad) {
      if (lane == 0) atomicOr(routing.status, kStatusNonFinite);
#pragma unroll
      for (int i = 0; i < kItems; ++i) z[i] = clean(z[i]);
    }
    // Without a bias the order is that of z, which still tells apart what s cannot.
    if (bias != nullptr) {
      read_run(bias_of + run, key);
#pragma unroll
      for (int i = 0; i < kItems; ++i) key[i] += sigmoid(z[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) key[i] = z[i];
    }
    best_of<0, kItems>(key, best);
    std::uint32_t items = kAllItems;
    if (gate.num_groups > 1) {
      bool found = false;
      if (groups_of_lanes) {
        float first = best[0], second = best[1];
#pragma unroll 1
        for (int distance = 1; distance < lanes; distance *= 2) {
          const float other = __shfl_xor_sync(kAll, first, distance);
          const float other_second = __shfl_xor_sync(kAll, second, distance);
          second = fmaxf(fminf(first, other), fmaxf(second, other_second));
          first = fmaxf(first, other);
        }
        if (bias == nullptr) {
          first = sigmoid(first);
          second = sigmoid(second);
        }
        float score =
            lane % kLanes < lanes * gate.num_groups ? (size > 1 ? first + second : first) : -INFINITY;
        bool open = false;
#pragma unroll 4
        for (int n = 0; n < gate.top_groups; ++n) {
          const float most = lanes_max<kLanes>(score);
          if (score == most && score != -INFINITY) {
            open = true;
            score = -INFINITY;
          }
        }
        items = open ? kAllItems : 0;
        found = __all_sync(kAll, __popc(lanes_ballot<kLanes>(open, lane)) == gate.top_groups * lanes);
      }
      if (!found) {  // groups tie, or begin inside a lane
        float score[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) score[i] = bias != nullptr ? key[i] : sigmoid(z[i]);
        items = items_of_best_groups<kLanes>(score, gate, scores.num_experts, lane,
                                             memory.group_score[lane / kLanes]);
      }
    }
    if (__any_sync(kAll, items != kAllItems)) {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (!(items >> i & 1u)) key[i] = -INFINITY;
      if (__all_sync(kAll, items == 0 || items == kAllItems)) {
#pragma unroll
        for (int i = 0; i < kBest; ++i) best[i] = items != 0 ? best[i] : -INFINITY;
      } else {
        best_of<0, kItems>(key, best);
      }
    }
    const std::uint32_t bits = choose<kLanes>(key, z, gate.top_k, lane, best);
    const Chosen<kLanes, kItems> chosen(memory, bits, gate.top_k, lane);
    float shift = 0, scale = gate.route_scale;
    if (gate.renormalize) {
      float most = -INFINITY, sum = 0;
      chosen.each([&](int, int, float score) { most = fmaxf(most, score); });
      shift = fminf(lanes_max<kLanes>(most), 0.0f);
      chosen.each([&](int, int, float score) { sum += shifted_sigmoid(score, shift); });
      scale /= lanes_sum<kLanes>(sum);
    }
    if (!real) continue;
    chosen.each([&](int n, int e, float score) {
      routing.expert[t * gate.top_k + n] = e;
      routing.weight[t * gate.top_k + n] =
          scale * (gate.renormalize ? shifted_sigmoid(score, shift) : sigmoid(score));
      atomicAdd(shared.of_expert + e, 1);
    });
    if (lane % kLanes == 0) finish_token(routing, shared, t, gate.top_k);
  }
  add_counts(counts, shared, scores.num_experts);
}

// ---- ReLU: one pass; how many routes come before a tile of tokens is asked of the tiles before ---------------------------
constexpr int kTileTokens = 32, kTokensAWarp = kTileTokens / kWarps;
// State of a tile: what it is, then a number of routes. Source: Merrill and Garland, "Single-pass parallel prefix scan with
// decoupled look-back", 2016.
constexpr std::uint64_t kOwnCount = std::uint64_t{1} << 62, kAllCounts = std::uint64_t{2} << 62;
constexpr std::uint64_t kCountMask = kOwnCount - 1;
struct ReluScratch {
  std::uint64_t next_tile;
  std::uint64_t state[1];  // of every tile
};

__device__ __forceinline__ std::uint64_t read_state(const std::uint64_t* state) {
  return *reinterpret_cast<const volatile std::uint64_t*>(state);
}
__device__ __forceinline__ void write_state(std::uint64_t* state, std::uint64_t value) {
  *reinterpret_cast<volatile std::uint64_t*>(state) = value;
}
// Routes before the tile; one warp's. `own`: its own routes. Tiles are handed out in order, so all before are in work.
__device__ __forceinline__ std::int64_t routes_before(ReluScratch* scratch, std::int64_t tile,
                                                      std::int64_t own, int lane) {
  if (lane == 0)
    write_state(scratch->state + tile,
                (tile == 0 ? kAllCounts : kOwnCount) | static_cast<std::uint64_t>(own));
  std::int64_t before = 0;
  for (std::int64_t last = tile - 1; last >= 0; last -= 32) {
    const std::int64_t other = last - lane;
    std::uint64_t seen = kAllCounts;
    if (other >= 0) {
      do {
        seen = read_state(scratch->state + other);
      } while ((seen & ~kCountMask) == 0);
    }
    __syncwarp();
    const unsigned complete = __ballot_sync(kAll, (seen & ~kCountMask) == kAllCounts);
    const int until = complete != 0 ? __ffs(static_cast<int>(complete)) - 1 : 31;
    auto sum = static_cast<long long>(lane <= until ? seen & kCountMask : 0);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
    before += sum;
    if (complete != 0) break;
  }
  if (lane == 0 && tile > 0)
    write_state(scratch->state + tile, kAllCounts | static_cast<std::uint64_t>(before + own));
  return before;
}

template <int kItems>
__global__ void __launch_bounds__(kWarps * 32, blocks_a_processor(kItems, kReluBlocks))
    relu_kernel(GateScores scores, RoutingBuffers routing, GateCounts counts, ReluScratch* scratch,
                std::int64_t num_tiles) {
  __shared__ SharedCounts<kItems * 32> shared;
  __shared__ int routes_of[kTileTokens];
  __shared__ std::int64_t begin_of[kTileTokens];
  __shared__ std::int64_t tile_shared;
  clear_counts(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int seen[kItems] = {};  // of this lane's experts
  for (;;) {
    if (threadIdx.x == 0)
      tile_shared = static_cast<std::int64_t>(
          atomicAdd(reinterpret_cast<unsigned long long*>(&scratch->next_tile), 1ull));
    __syncthreads();
    const std::int64_t tile = tile_shared;
    if (tile >= num_tiles) break;
    float z[kTokensAWarp][kItems];
#pragma unroll
    for (int n = 0; n < kTokensAWarp; ++n) {
      const std::int64_t t = tile * kTileTokens + warp * kTokensAWarp + n;
      int routes = 0;
      if (t < scores.num_tokens) {
        load_scores<Layout::kSingle>(scores, t, lane, false, routing.status, z[n]);
#pragma unroll
        for (int i = 0; i < kItems; ++i) routes += z[n][i] > 0.0f ? 1 : 0;
        routes = __reduce_add_sync(kAll, routes);
        if (lane == 0) atomicAdd(shared.with_active + routes, 1);
      }
      if (lane == 0) routes_of[warp * kTokensAWarp + n] = routes;
    }
    __syncthreads();
    if (warp == 0) {
      const int mine = lane < kTileTokens ? routes_of[lane] : 0;
      const int upto = prefix<32>(mine, lane);
      const std::int64_t before = routes_before(scratch, tile, __shfl_sync(kAll, upto, 31), lane);
      if (lane < kTileTokens) begin_of[lane] = before + upto - mine;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kTokensAWarp; ++n) {
      const std::int64_t t = tile * kTileTokens + warp * kTokensAWarp + n;
      if (t >= scores.num_tokens) break;
      const std::int64_t begin = begin_of[warp * kTokensAWarp + n];
      const auto room =
          static_cast<int>(max(std::int64_t{0}, min(routing.capacity - begin, std::int64_t{kItems} * 32)));
      std::int32_t* const experts = routing.expert + begin;
      float* const weights = routing.weight + begin;
      int at = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool mine = z[n][i] > 0.0f;
        const unsigned votes = __ballot_sync(kAll, mine);
        const int place = at + __popc(votes & ((1u << lane) - 1));
        if (mine && place < room) {
          experts[place] = lane + 32 * i;
          weights[place] = z[n][i];
          ++seen[i];
        }
        at += __popc(votes);
      }
      if (lane == 0) {
        routing.row_ptr[t + 1] = min(begin + at, routing.capacity);
        if (t == 0) routing.row_ptr[0] = 0;
        if (begin + at > routing.capacity) atomicOr(routing.status, kStatusOverflow);
      }
    }
    // The next tile's number and counts are written behind barriers that all pass after reading this one's.
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (seen[i] != 0) atomicAdd(shared.of_expert + lane + 32 * i, seen[i]);
  add_counts(counts, shared, scores.num_experts);
}

// ---- backward ----------------------------------------------------------------------------------------------------------
enum class Gate { kSoftmax, kSigmoid, kRelu };
struct BackwardOptions {
  float route_scale;
  bool normalized;  // over the chosen ones
  float z_factor;
};

constexpr int backward_blocks(Gate gate) {
  return gate == Gate::kSoftmax ? kSoftmaxBackwardBlocks : kBackwardBlocks;
}

template <Gate kGate, int kItems>
__global__ void __launch_bounds__(kWarps * 32, blocks_a_processor(kItems, backward_blocks(kGate)))
    backward_kernel(GateScores scores, ConstRouting routing, BackwardOptions options, const float* dweight,
                    const float* expert_gradient, float* dlogits, std::int64_t dlogits_stride, bool vector) {
  constexpr int kVector = kItems < 4 ? kItems : 4;
  __shared__ __align__(16) float rows[kWarps][kItems * 32];
  __shared__ __align__(16) float extra[kItems * 32];
  for (int e = threadIdx.x; e < kItems * 32; e += kWarps * 32)
    extra[e] = expert_gradient != nullptr && e < scores.num_experts ? expert_gradient[e] : 0.0f;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const row = rows[warp];
  for (std::int64_t t = blockIdx.x * std::int64_t{kWarps} + warp; t < scores.num_tokens;
       t += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t first = routing.row_ptr[t];
    const int routes = static_cast<int>(routing.row_ptr[t + 1] - first);
    float z[kItems];
    if constexpr (kGate == Gate::kSoftmax) load_scores<Layout::kQuads>(scores, t, lane, vector, nullptr, z);
    __syncwarp();  // the last token's row was read
#pragma unroll
    for (int i = 0; i < kItems; ++i) row[expert_of<Layout::kQuads, kItems>(lane, i)] = 0;
    __syncwarp();
    // f(expert, gradient of its weight)
    const auto each = [&](const auto& f) {
#pragma unroll 1
      for (int j = lane; j < routes; j += 32)
        f(routing.expert[first + j], dweight[first + j] * options.route_scale);
    };
    const auto score = [&](int e) { return clean(scores.logits[t * scores.stride + e]); };
    float top = -INFINITY;
    if constexpr (kGate == Gate::kRelu) {
      each([&](int e, float a) { row[e] = a + extra[e]; });
    } else if constexpr (kGate == Gate::kSigmoid) {
      float shift = 0, sum = 1, mean = 0;
      if (options.normalized) {
        each([&](int e, float) { top = fmaxf(top, score(e)); });
        shift = fminf(warp_max(top), 0.0f);
        sum = 0;
        each([&](int e, float a) {
          const float s = shifted_sigmoid(score(e), shift);
          sum += s;
          mean += s * a;
        });
        sum = warp_sum(sum);
        mean = warp_sum(mean) / sum;
      }
      each([&](int e, float a) {
        const float s_e = score(e);
        const float q = options.normalized ? shifted_sigmoid(s_e, shift) / sum : sigmoid(s_e);
        row[e] = q * sigmoid(-s_e) * (a - mean);
      });
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) top = fmaxf(top, z[i]);
      top = warp_max(top);
      // Through all experts goes what is in `extra`, and a; where weights are normalized over the chosen ones, a goes
      // through those only.
      if (options.normalized) {
        float sum = 0, mean = 0;
        each([&](int e, float a) {
          const float p = quick_exp(score(e) - top);
          sum += p;
          mean += p * a;
        });
        sum = warp_sum(sum);
        mean = warp_sum(mean) / sum;
        each([&](int e, float a) { row[e] = quick_exp(score(e) - top) / sum * (a - mean); });
      } else {
        each([&](int e, float a) { row[e] = a; });
      }
    }
    __syncwarp();
    float out[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) out[i] = row[expert_of<Layout::kQuads, kItems>(lane, i)];
    if constexpr (kGate == Gate::kSoftmax) {
      float sum = 0, all = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float x = extra[expert_of<Layout::kQuads, kItems>(lane, i)];
        const float u = x + (options.normalized ? 0.0f : out[i]);
        z[i] = quick_exp(z[i] - top);
        sum += z[i];
        all += z[i] * u;
      }
      sum = warp_sum(sum);
      const float inverse = 1.0f / sum;
      const float shift = options.z_factor * 2.0f * (top + logf(sum)) - warp_sum(all) * inverse;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float x = extra[expert_of<Layout::kQuads, kItems>(lane, i)];
        const float u = x + (options.normalized ? 0.0f : out[i]);
        out[i] = z[i] * inverse * (u + shift) + (options.normalized ? out[i] : 0.0f);
      }
    }
    float* const to = dlogits + t * dlogits_stride;
    if (kVector == 4 && vector) {
#pragma unroll
      for (int i = 0; i + 3 < kItems; i += 4) {
        const int e = expert_of<Layout::kQuads, kItems>(lane, i);
        if (e < scores.num_experts)
          *reinterpret_cast<float4*>(to + e) = make_float4(out[i], out[i + 1], out[i + 2], out[i + 3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int e = expert_of<Layout::kQuads, kItems>(lane, i);
        if (e < scores.num_experts) to[e] = out[i];
      }
    }
  }
}

// Zeroes what is counted up.
__global__ void clear_kernel(std::int32_t* first, std::int64_t num_first, std::int32_t* second,
                             std::int64_t num_second, std::uint64_t* third, std::int64_t num_third) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
       i < max(max(num_first, num_second), num_third); i += step) {
    if (i < num_first) first[i] = 0;
    if (i < num_second) second[i] = 0;
    if (i < num_third) third[i] = 0;
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

// Lanes of a token and items of a lane.
template <int kLanes, int kItems>
struct Lanes {};
template <typename Function>
void with_lanes(int num_experts, const Function& function) {
  const int items = (num_experts + 7) / 8;
  if (items <= 1) return function(Lanes<8, 1>{});
  if (items <= 2) return function(Lanes<8, 2>{});
  if (items <= 4) return function(Lanes<8, 4>{});
  if (items <= 8) return function(Lanes<8, 8>{});
  if (items <= 16) return function(Lanes<8, 16>{});
  if (items <= 32) return function(Lanes<8, 32>{});
  if (items <= 64) return function(Lanes<32, 16>{});
  function(Lanes<32, kMaxItems>{});
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
// Overwritten results start at zero, in one launch; without tokens that is all. `state`: more that does.
bool begin_batch(const GateScores& scores, const RoutingBuffers& routing, const GateCounts& counts,
                 Stream stream, std::uint64_t* state = nullptr, std::int64_t num_state = 0) {
  const std::int64_t of_expert = counts.tokens_of_expert != nullptr ? scores.num_experts : 0;
  const std::int64_t with_active = counts.tokens_with_active != nullptr ? scores.num_experts + 1 : 0;
  const std::int64_t most = std::max(std::max(of_expert, with_active), num_state);
  if (most > 0) {
    constexpr int kThreads = 512;
    clear_kernel<<<static_cast<unsigned>(std::min<std::int64_t>((most + kThreads - 1) / kThreads, 256)),
                   kThreads, 0, stream>>>(counts.tokens_of_expert, of_expert, counts.tokens_with_active,
                                          with_active, state, num_state);
    check_cuda(cudaGetLastError(), "gate: clearing counts");
  }
  if (scores.num_tokens > 0) return true;
  check_cuda(cudaMemsetAsync(routing.row_ptr, 0, sizeof(std::int64_t), stream), "gate: an empty routing");
  return false;
}

// Blocks that all run at a time, `blocks` a processor, with the same number of rounds each.
unsigned blocks_of_tokens(std::int64_t num_tokens, int tokens_a_block, int blocks) {
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), "gate: cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "gate: cudaDeviceGetAttribute");
  const std::int64_t needed = (num_tokens + tokens_a_block - 1) / tokens_a_block;
  const std::int64_t at_a_time = std::int64_t{processors} * blocks;
  const std::int64_t rounds = (needed + at_a_time - 1) / at_a_time;
  return static_cast<unsigned>((needed + rounds - 1) / rounds);
}
// Rows that can be read or written 16 bytes at a time.
bool in_vectors(const void* data, std::int64_t stride, int num_experts) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % 4 == 0 && num_experts % 4 == 0;
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
  const bool vector = in_vectors(scores.logits, scores.stride, scores.num_experts) &&
                      in_vectors(dlogits, dlogits_stride, scores.num_experts);
  with_items(scores.num_experts, [&]<int kItems>(Items<kItems>) {
    backward_kernel<kGate, kItems>
        <<<blocks_of_tokens(scores.num_tokens, kWarps, blocks_a_processor(kItems, backward_blocks(kGate))),
           kWarps * 32, 0, stream>>>(scores, routing, options, dweight, expert_gradient, dlogits,
                                     dlogits_stride, vector);
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
  with_lanes(scores.num_experts, [&]<int kLanes, int kItems>(Lanes<kLanes, kItems>) {
    softmax_kernel<kLanes, kItems>
        <<<blocks_of_tokens(scores.num_tokens, kTopKWarps * 32 / kLanes, softmax_blocks(kItems)),
           kTopKWarps * 32, 0, stream>>>(scores, gate, routing, counts,
                                         in_vectors(scores.logits, scores.stride, scores.num_experts));
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
  with_lanes(scores.num_experts, [&]<int kLanes, int kItems>(Lanes<kLanes, kItems>) {
    sigmoid_kernel<kLanes, kItems>
        <<<blocks_of_tokens(scores.num_tokens, kTopKWarps * 32 / kLanes, sigmoid_blocks(kItems)),
           kTopKWarps * 32, 0, stream>>>(scores, gate, bias, routing, counts,
                                         in_vectors(scores.logits, scores.stride, scores.num_experts));
  });
  check_cuda(cudaGetLastError(), "gate_sigmoid");
}

void gate_sigmoid_backward(const GateScores& scores, const SigmoidGate& gate, const ConstRouting& routing,
                           const float* dweight, float* dlogits, std::int64_t dlogits_stride, Stream stream) {
  backward<Gate::kSigmoid>(scores, routing, {gate.route_scale, gate.renormalize, 0}, dweight, nullptr,
                           dlogits, dlogits_stride, stream);
}

std::size_t gate_relu_scratch_bytes(std::int64_t num_tokens) {
  return sizeof(std::uint64_t) * static_cast<std::size_t>((num_tokens + kTileTokens - 1) / kTileTokens + 1);
}

void gate_relu(const GateScores& scores, const RoutingBuffers& routing, const GateCounts& counts,
               void* scratch, Stream stream) {
  check_scores(scores);
  check_routing(routing, 0);
  const std::int64_t num_tiles = (scores.num_tokens + kTileTokens - 1) / kTileTokens;
  Require(num_tiles == 0 || (scratch != nullptr && reinterpret_cast<std::uintptr_t>(scratch) % 8 == 0),
          ErrorCode::kInvalidArgument, "gate: scratch is null or not 8-byte aligned");
  if (!begin_batch(scores, routing, counts, stream, static_cast<std::uint64_t*>(scratch),
                   num_tiles == 0 ? 0 : num_tiles + 1))
    return;
  with_items(scores.num_experts, [&]<int kItems>(Items<kItems>) {
    relu_kernel<kItems>
        <<<blocks_of_tokens(scores.num_tokens, kTileTokens, blocks_a_processor(kItems, kReluBlocks)),
           kWarps * 32, 0, stream>>>(scores, routing, counts, static_cast<ReluScratch*>(scratch), num_tiles);
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
