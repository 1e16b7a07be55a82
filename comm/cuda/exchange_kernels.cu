// Who does what: blocks below `push_blocks` store rows to peers, a warp a row; the others, and these when they are done,
// work on local memory. All blocks of a call fit on the device at once or wait only for peers, never for each other, so
// it does not matter when they start.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "sluice/comm/cuda/exchange_kernels.hpp"

namespace sluice::comm::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kCopyThreads = 1024;   // one block a processor
constexpr int kReduceThreads = 512;  // needs more registers a thread
constexpr int kPlanThreads = 512;
constexpr int kPlanBlocks = 32;

using Bf16 = __nv_bfloat16;

// ---- memory that others write or read ------------------------------------------------------------------------------
__device__ __forceinline__ std::uint32_t load_acquire(const std::uint32_t* p) {
  std::uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Orders nothing, and so leaves the L1 as it is.
__device__ __forceinline__ std::uint32_t load_relaxed(const std::uint32_t* p) {
  std::uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(std::uint32_t* p, std::uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Rows pass through once: no place in L1. Never the read-only path, since peers write rows while a kernel runs.
__device__ __forceinline__ uint4 load_row(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_half(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_row(uint4* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// Between warps of a block. Atomics, where a load and a store with these orders would do: racecheck knows that they meet.
__device__ __forceinline__ std::uint32_t load_shared_acquire(std::uint32_t* p) {
  std::uint32_t v;
  asm volatile("atom.acquire.cta.shared.or.b32 %0, [%1], 0;"
               : "=r"(v)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
  return v;
}
__device__ __forceinline__ void add_one_shared_release(std::uint32_t* p) {
  asm volatile(
      "red.release.cta.shared.add.u32 [%0], 1;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(p)))
      : "memory");
}
__device__ __forceinline__ std::uint64_t now_ns() {
  std::uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
// First thing in a kernel that launch_behind() launches: waits until the kernel before it in the stream is done. `early`: the
// one after it may come onto free processors from then on, where it waits the same way; else when this one's blocks end.
// Early where its start is much of a kernel's time; beside one that moves many rows it would only take shared memory, and
// with it the L1 through which they go.
__device__ __forceinline__ void begin_behind(bool early) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ bool has_failed(const ChannelView& c) {
  return *static_cast<volatile std::uint32_t*>(c.failed) != 0;
}

// Epochs may wrap. A flag of a chunk (chunk >= 0) is not raised in every pass, and 2^31 passes later an old one would look
// like one to come; but none is raised for a later pass before this one is over, so that it is there or not.
__device__ __forceinline__ bool is_raised(std::uint32_t seen, std::uint32_t value, int chunk) {
  return chunk >= 0 ? seen == value : static_cast<std::int32_t>(seen - value) >= 0;
}
// Waits until the flag reached `value`. False: the deadline passed, here or elsewhere in the group.
__device__ bool wait_for_slow(const ChannelView& c, const std::uint32_t* flag, std::uint32_t value,
                              WaitFor what, int peer, int chunk) {
  const std::uint64_t start = now_ns();
  // Many warps may wait for one flag: the longer it takes, the less often they look, so that they leave the memory system to
  // the rows.
  for (unsigned pause = 32;; pause = min(pause * 2, 1024u)) {
    const std::uint32_t seen = load_relaxed(flag);
    if (is_raised(seen, value, chunk)) {
      load_acquire(flag);
      return true;
    }
    if (has_failed(c)) return false;
    const std::uint64_t waited = now_ns() - start;
    if (waited > c.deadline_ns) {
      if (atomicCAS_system(&c.error->set, 0u, 1u) == 0) {
        c.error->what = static_cast<std::uint32_t>(what);
        c.error->peer = peer;
        c.error->channel = c.channel;
        c.error->chunk = chunk;
        c.error->expected = value;
        c.error->observed = seen;
        c.error->waited_ns = waited;
        __threadfence_system();
        *static_cast<volatile std::uint32_t*>(&c.error->set) = 2;
      }
      *static_cast<volatile std::uint32_t*>(c.failed) = 1;
      return false;
    }
    __nanosleep(pause);
  }
}
__device__ __forceinline__ bool wait_for(const ChannelView& c, const std::uint32_t* flag, std::uint32_t value,
                                         WaitFor what, int peer, int chunk = -1) {
  if (is_raised(load_acquire(flag), value, chunk)) return true;
  return wait_for_slow(c, flag, value, what, peer, chunk);
}
template <typename T>
__device__ __forceinline__ T* in_window(const ChannelView& c, int rank, std::size_t offset) {
  return reinterpret_cast<T*>(c.window[rank] + offset);
}

// The view in shared memory: what is read of it in global memory seems to come back behind all the rows that the processor
// has on their way.
__device__ __forceinline__ void load_view(ChannelView& to, const ChannelView* from) {
  static_assert(sizeof(ChannelView) % 8 == 0);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(ChannelView) / 8); i += blockDim.x)
    reinterpret_cast<std::uint64_t*>(&to)[i] = reinterpret_cast<const std::uint64_t*>(from)[i];
  __syncthreads();
}

// The last of `blocks` blocks to come gets true (all its threads), and sees what the others wrote.
__device__ __forceinline__ bool last_block(std::uint32_t* exits, int blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(exits, 1u) + 1 == static_cast<std::uint32_t>(blocks);
    if (last) *exits = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Every rank tells every other that it is here, and waits for all. The first R threads of the block.
// A rank that has failed, here and wherever data is announced, says nothing any more: what it makes without what it waited
// for must not become a result of a peer that was only late, and would see no error.
__device__ __forceinline__ bool announce_and_wait(const ChannelView& c, std::size_t flags,
                                                  std::uint32_t epoch, WaitFor what, bool announce) {
  bool ok = true;
  for (int d = threadIdx.x; d < c.num_ranks; d += blockDim.x) {
    if (d == c.rank) continue;
    const bool failed = has_failed(c);
    if (announce && !failed) store_release(in_window<std::uint32_t>(c, d, flags) + c.rank, epoch);
    ok = wait_for(c, in_window<std::uint32_t>(c, c.rank, flags) + d, epoch, what, d) && !failed;
  }
  return __syncthreads_and(ok) != 0;
}

// What comes behind a handshake that has failed, and is not a kernel of this file, takes no notice of that: copies that are
// under way, or what the caller writes where peers read. A peer that is only late must not take it for what it waited for.
// Before it is there, peers know, and see it in check().
__device__ __forceinline__ void give_up(const ChannelView& c) {
  for (int d = threadIdx.x; d < c.num_ranks; d += blockDim.x)
    if (d != c.rank) store_release(in_window<std::uint32_t>(c, d, c.at.given_up) + c.rank, 1);
  __threadfence_system();
}

// ---- plan ------------------------------------------------------------------------------------------------------------
struct Matrix {
  std::uint32_t rows[kMaxExchangeRanks][kMaxExchangeRanks];
  std::uint32_t routes[kMaxExchangeRanks][kMaxExchangeRanks];
};

__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const ChannelView* view, SendPlan plan, ExchangePart part, std::int64_t* staging) {
  begin_behind(true);
  __shared__ Matrix m;
  __shared__ std::int64_t receive_ptr[kMaxExchangeRanks + 1], route_ptr[kMaxExchangeRanks + 1];
  __shared__ std::int64_t push_base[kMaxExchangeRanks], push_route_base[kMaxExchangeRanks];
  __shared__ std::int64_t sent_rows, sent_routes;
  const ChannelView& c = *view;
  ChannelState& s = *c.state;
  const int ranks = c.num_ranks, me = c.rank;
  const std::uint32_t epoch = static_cast<volatile ChannelState&>(s).plan_epoch + 1;
  const auto counts = [&](int d) { return in_window<uint2>(c, d, c.at.counts); };

  if (blockIdx.x == 0 && part != ExchangePart::kHeaders) {
    // Peers' counts of the last plan were read before they sent the headers that this rank has waited for.
    for (int i = threadIdx.x; i < ranks * ranks; i += blockDim.x) {
      const int to = i / ranks, d = i % ranks;
      if (part != ExchangePart::kAll && to != me) continue;
      const std::int64_t first = plan.rank_ptr[d], end = plan.rank_ptr[d + 1];
      counts(to)[me * ranks + d] =
          make_uint2(static_cast<std::uint32_t>(end - first),
                     static_cast<std::uint32_t>(plan.send_route_ptr[end] - plan.send_route_ptr[first]));
    }
    __threadfence_system();
    __syncthreads();
    for (int d = threadIdx.x; d < ranks && part == ExchangePart::kAll && !has_failed(c); d += blockDim.x)
      store_release(in_window<std::uint32_t>(c, d, c.at.count_flag) + me, epoch);
  }
  if (part == ExchangePart::kBefore) return;
  bool ok = true;
  for (int d = threadIdx.x; d < ranks && part == ExchangePart::kAll; d += blockDim.x)
    ok = wait_for(c, in_window<std::uint32_t>(c, me, c.at.count_flag) + d, epoch, WaitFor::kPlanCounts, d);
  ok = __syncthreads_and(ok) != 0;

  if (ok) {
    for (int i = threadIdx.x; i < ranks * ranks; i += blockDim.x) {
      const volatile std::uint32_t* pair = reinterpret_cast<volatile std::uint32_t*>(counts(me) + i);
      m.rows[i / ranks][i % ranks] = pair[0];
      m.routes[i / ranks][i % ranks] = pair[1];
    }
    __syncthreads();
    bool fits = true;
    for (int d = threadIdx.x; d < ranks; d += blockDim.x) {
      std::int64_t rows = 0, routes = 0, own_rows = 0, own_routes = 0, home = 0, home_routes = 0;
      for (int from = 0; from < ranks; ++from) {
        if (from == me) own_rows = rows, own_routes = routes;
        if (d == me) receive_ptr[from] = rows, route_ptr[from] = routes;
        rows += m.rows[from][d];
        routes += m.routes[from][d];
      }
      if (d == me) receive_ptr[ranks] = rows, route_ptr[ranks] = routes;
      push_base[d] = own_rows;
      push_route_base[d] = own_routes;
      std::int64_t sent = 0, sent_r = 0, most = 0;
      for (int to = 0; to < ranks; ++to) {
        if (to == me) home = sent, home_routes = sent_r;
        sent += m.rows[d][to];
        sent_r += m.routes[d][to];
        if (m.rows[d][to] > most) most = m.rows[d][to];
      }
      fits = fits && rows <= c.max_received && routes <= c.max_routes && sent <= c.max_home &&
             sent_r <= c.max_routes && most <= c.max_tokens;
      if (d == me) sent_rows = sent, sent_routes = sent_r;
      if (blockIdx.x == 0) {
        s.push_base[d] = own_rows;
        s.push_route_base[d] = own_routes;
        s.home_base[d] = home;
        s.home_route_base[d] = home_routes;
      }
    }
    ok = __syncthreads_and(fits) != 0;  // the same answer at all ranks: all know all counts
  }
  if (!ok) {  // an empty receive list
    // Where counts have not come as well: what the caller has to send fits nowhere, and places are those of an older plan.
    if (threadIdx.x == 0) atomicOr(&s.status, kExchangeOverflow);
    for (int d = threadIdx.x; d <= ranks; d += blockDim.x) receive_ptr[d] = 0, route_ptr[d] = 0;
    __syncthreads();
  }
  if (blockIdx.x == 0) {
    for (int d = threadIdx.x; d <= ranks; d += blockDim.x) {
      s.receive_ptr[d] = receive_ptr[d];
      s.receive_route_ptr[d] = route_ptr[d];
    }
  }
  const std::int64_t thread = blockIdx.x * std::int64_t{kPlanThreads} + threadIdx.x;
  const std::int64_t threads = std::int64_t{kPlanThreads} * gridDim.x;
  if (ok) {
    const auto rank_of = [&](std::int64_t i, const std::int64_t* ptr_base, bool routes) {
      int d = 0;
      while (d + 1 < ranks && i >= (routes ? ptr_base[plan.rank_ptr[d + 1]] : ptr_base[d + 1])) ++d;
      return d;
    };
    for (std::int64_t i = thread; i < sent_rows; i += threads) {
      const int d = rank_of(i, plan.rank_ptr, false);
      const std::int64_t first = plan.rank_ptr[d];
      const std::int64_t at = push_route_base[d] + plan.send_route_ptr[i] - plan.send_route_ptr[first];
      if (part == ExchangePart::kHeaders) {
        staging[i] = at;
      } else {
        in_window<std::int64_t>(c, d, c.at.route_ptr)[push_base[d] + i - first] = at;
      }
    }
    for (std::int64_t i = thread; i < sent_routes && part == ExchangePart::kAll; i += threads) {
      const int d = rank_of(i, plan.send_route_ptr, true);
      const std::int64_t to = push_route_base[d] + i - plan.send_route_ptr[plan.rank_ptr[d]];
      in_window<std::int32_t>(c, d, c.at.slot)[to] = plan.send_slot[i];
      in_window<float>(c, d, c.at.weight)[to] = plan.send_weight != nullptr ? plan.send_weight[i] : 1.0f;
    }
  }
  for (std::int64_t i = receive_ptr[ranks] + thread; i <= c.max_received; i += threads)
    in_window<std::int64_t>(c, me, c.at.route_ptr)[i] = route_ptr[ranks];
  __threadfence_system();
  if (!last_block(&s.plan_exits, gridDim.x) || part != ExchangePart::kAll) return;
  __threadfence_system();
  for (int d = threadIdx.x; d < ranks && !has_failed(c); d += blockDim.x)
    store_release(in_window<std::uint32_t>(c, d, c.at.header_flag) + me, epoch);
  for (int d = threadIdx.x; d < ranks; d += blockDim.x)
    wait_for(c, in_window<std::uint32_t>(c, me, c.at.header_flag) + d, epoch, WaitFor::kPlanHeaders, d);
  if (threadIdx.x == 0) s.plan_epoch = epoch;
}

// No index comes from a peer unchecked: whatever is sent, row pointers end up within the routes there are, and slots that
// do not exist become 0, with weight 0. (Pointers that do not ascend give rows without routes.)
__global__ void __launch_bounds__(kPlanThreads) check_headers_kernel(const ChannelView* view) {
  begin_behind(true);
  const ChannelView& c = *view;
  ChannelState& s = *c.state;
  const std::int64_t rows = s.receive_ptr[c.num_ranks], routes = s.receive_route_ptr[c.num_ranks];
  std::int64_t* route_ptr = in_window<std::int64_t>(c, c.rank, c.at.route_ptr);
  std::int32_t* slot = in_window<std::int32_t>(c, c.rank, c.at.slot);
  float* weight = in_window<float>(c, c.rank, c.at.weight);
  const std::int64_t thread = blockIdx.x * std::int64_t{kPlanThreads} + threadIdx.x;
  const std::int64_t threads = std::int64_t{kPlanThreads} * gridDim.x;
  bool good = true;
  for (std::int64_t i = thread; i < rows; i += threads) {
    const std::int64_t begin = route_ptr[i];
    good = good && begin <= route_ptr[i + 1] && (i > 0 || begin == 0);
    if (begin < 0 || begin > routes) {
      route_ptr[i] = begin < 0 ? 0 : routes;
      good = false;
    }
  }
  for (std::int64_t i = thread; i < routes; i += threads) {
    if (slot[i] < 0 || slot[i] >= c.num_local_slots) {
      slot[i] = 0;
      weight[i] = 0;
      good = false;
    }
  }
  if (!good) atomicOr(&s.status, kExchangeBadHeader);
}

// ---- rows ------------------------------------------------------------------------------------------------------------
// Arrays of loads that may be left out begin with zeros here and below: else what is left out keeps what was there the last
// time, which takes registers, and more than there are.
template <int kAhead>
__device__ __forceinline__ void copy_row(const uint4* from, uint4* to, int units, int lane) {
  for (int base = lane; base < units; base += 32 * kAhead) {
    uint4 v[kAhead] = {};
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (base + 32 * j < units) v[j] = load_row(from + base + 32 * j);
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (base + 32 * j < units) store_row(to + base + 32 * j, v[j]);
  }
}

__device__ __forceinline__ float2 unpack_bf16(std::uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
}
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ void unpack_row(uint4 v, float (&f)[8]) {
  const float2 a = unpack_bf16(v.x), b = unpack_bf16(v.y), d = unpack_bf16(v.z), e = unpack_bf16(v.w);
  f[0] = a.x, f[1] = a.y, f[2] = b.x, f[3] = b.y, f[4] = d.x, f[5] = d.y, f[6] = e.x, f[7] = e.y;
}

// fp8 e4m3, 448 its largest value (OCP 8-bit floating point specification, 2023).
constexpr float kFp8Max = 448.0f;
__device__ __forceinline__ float row_max(const uint4* from, int units, int lane) {
  float most = 0;
  for (int i = lane; i < units; i += 32) {
    float f[8];
    unpack_row(load_row(from + i), f);
#pragma unroll
    for (float v : f) most = fmaxf(most, fabsf(v));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    most = fmaxf(most, __shfl_xor_sync(kAll, most, distance));
  return most;
}
__device__ __forceinline__ std::uint32_t to_fp8x4(float a, float b, float c, float d, float inverse) {
  const std::uint32_t low =
      __nv_cvt_float2_to_fp8x2(make_float2(a * inverse, b * inverse), __NV_SATFINITE, __NV_E4M3);
  const std::uint32_t high =
      __nv_cvt_float2_to_fp8x2(make_float2(c * inverse, d * inverse), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}
// 8 values of a unit of 16 bytes of bf16.
__device__ __forceinline__ uint2 quantize(uint4 v, float inverse) {
  float f[8];
  unpack_row(v, f);
  return make_uint2(to_fp8x4(f[0], f[1], f[2], f[3], inverse), to_fp8x4(f[4], f[5], f[6], f[7], inverse));
}
__device__ __forceinline__ std::uint32_t from_fp8x2(std::uint32_t bits, float scale) {
  const __half2_raw half =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bits & 0xFFFF), __NV_E4M3);
  const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&half));
  return pack_bf16(f.x * scale, f.y * scale);
}
__device__ __forceinline__ uint4 dequantize(uint2 v, float scale) {
  return make_uint4(from_fp8x2(v.x, scale), from_fp8x2(v.x >> 16, scale), from_fp8x2(v.y, scale),
                    from_fp8x2(v.y >> 16, scale));
}
struct Scale {
  float scale, inverse;
};
__device__ __forceinline__ Scale scale_of(float most) {
  if (!(most > 0.0f)) return {1.0f, 1.0f};
  return {most / kFp8Max, kFp8Max / most};
}
__device__ __forceinline__ void quantize_row(const uint4* from, uint2* to, float* scale, int units,
                                             int lane) {
  const Scale s = scale_of(row_max(from, units, lane));
  for (int base = 2 * lane; base < units; base += 64) {  // 16 bytes of fp8; units are even
    const uint2 a = quantize(load_row(from + base), s.inverse),
                b = quantize(load_row(from + base + 1), s.inverse);
    store_row(reinterpret_cast<uint4*>(to + base), make_uint4(a.x, a.y, b.x, b.y));
  }
  if (lane == 0) *scale = s.scale;
}

// Where row `v` of the list of all rows to (or from) others lies: peers take turns, chunk by chunk, the next rank first.
struct Turn {
  int peer, chunk, row;  // row within the peer's rows
};
__device__ __forceinline__ Turn turn_of(const ChannelView& c, int v) {
  const int group = v / c.chunk_rows, others = c.num_ranks - 1;
  const int chunk = group / others, step = group - chunk * others;
  int peer = c.rank + 1 + step;
  if (peer >= c.num_ranks) peer -= c.num_ranks;
  return {peer, chunk, chunk * c.chunk_rows + v - group * c.chunk_rows};
}
// The list's length: as if all peers had as many rows as the one with the most. ptr: [R + 1], shared memory.
__device__ __forceinline__ int turns(const ChannelView& c, const std::int64_t* ptr) {
  std::int64_t most = 0;
  for (int d = 0; d < c.num_ranks; ++d)
    if (d != c.rank && ptr[d + 1] - ptr[d] > most) most = ptr[d + 1] - ptr[d];
  const int chunks = static_cast<int>((most + c.chunk_rows - 1) / c.chunk_rows);
  return chunks * (c.num_ranks - 1) * c.chunk_rows;
}
// Units (of 16 bytes) of piece `part` of a row.
struct Span {
  int begin, end;
};
__device__ __forceinline__ Span span_of(const ChannelView& c, int part, int parts) {
  const int units = c.row_bytes / 16;
  return {units * part / parts, units * (part + 1) / parts};
}
// ---- rows to peers ---------------------------------------------------------------------------------------------------
// Rows are cut into `parts` pieces, dealt to the workers (warps) of all blocks in turn: worker w of a block has the pieces
// v = first(w) + k * step, k = 0, 1, ... A chunk gets its flag when all its pieces are there, and a fence waits until a
// warp's stores are there. So who announces, and how often, is the price of the flags:
enum class Announce {
  kAside,  // one warp of each block only fences and announces, the others go on storing: chunks as soon as they are there
  kLate,   // each warp fences after kLateRows of its rows: fastest, for whoever waits for all rows anyway
  kNever,  // rows stay here, nobody waits
};
constexpr int kLateRows = 16;
struct Pieces {
  const std::int64_t* ptr;  // rows of each peer, as in turns()
  int all, parts, step, blocks, block;
  __device__ __forceinline__ int first(int worker) const { return worker * blocks + block; }
  __device__ __forceinline__ int count(int worker) const {
    return first(worker) < all ? (all - first(worker) + step - 1) / step : 0;
  }
};
// Flags of a kind, and what has left of each chunk.
struct Flags {
  std::size_t at;       // in a window
  std::uint32_t* done;  // of this rank
  std::uint32_t epoch;
};
// One piece more of its chunk is there. kFenced: this thread's fence came after it; else this is one.
template <bool kFenced>
__device__ __forceinline__ void count_piece(const ChannelView& c, const Pieces& pieces, int piece,
                                            const Flags& flags) {
  const Turn turn = turn_of(c, piece / pieces.parts);
  const int rows = static_cast<int>(pieces.ptr[turn.peer + 1] - pieces.ptr[turn.peer]);
  if (turn.row >= rows) return;
  const int in_chunk = min(c.chunk_rows, rows - turn.chunk * c.chunk_rows) * pieces.parts;
  std::uint32_t* count = flags.done + turn.peer * c.max_chunks + turn.chunk;
  std::uint32_t before = 0;
  if constexpr (kFenced) {
    before = atomicAdd(count, 1u);
  } else {
    asm volatile("atom.add.acq_rel.sys.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  }
  if (before + 1 != static_cast<std::uint32_t>(in_chunk)) return;
  *count = 0;
  if constexpr (kFenced) __threadfence_system();  // what other blocks stored of this chunk
  store_release(in_window<std::uint32_t>(c, turn.peer, flags.at) + c.rank * c.max_chunks + turn.chunk,
                flags.epoch);
}
// The announcing warp: progress[w] is how many pieces worker w has stored.
__device__ __forceinline__ void announce(const ChannelView& c, const Pieces& pieces, int workers,
                                         std::uint32_t* progress, const Flags& flags, int lane) {
  const bool worker = lane < workers;
  const std::uint32_t total = worker ? static_cast<std::uint32_t>(pieces.count(lane)) : 0;
  std::uint32_t announced = 0;
  while (__any_sync(kAll, announced < total)) {
    const std::uint32_t stored = worker ? load_shared_acquire(progress + lane) : 0;
    if (!__any_sync(kAll, stored > announced)) {
      __nanosleep(200);
      continue;
    }
    __threadfence_system();
    for (; announced < stored; ++announced)
      count_piece<true>(c, pieces, pieces.first(lane) + static_cast<int>(announced) * pieces.step, flags);
    __syncwarp();
  }
}
// All rows to (or from) others; store(turn, part, parts) does a piece, all lanes of a warp.
template <int kWarps, typename Store>
__device__ __forceinline__ void push_rows(const ChannelView& c, const std::int64_t* ptr, int parts,
                                          int blocks, Announce how, std::uint32_t* progress,
                                          const Flags& flags, const Store& store) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = static_cast<int>(blockIdx.x);
  const int all = turns(c, ptr) * parts;
  // Where a warp has a piece or two, nothing is gained by going on meanwhile.
  const bool few = all <= 2 * blocks * kWarps;
  const bool aside = how == Announce::kAside && !few;
  const int workers = aside ? kWarps - 1 : kWarps, batch = few ? 1 : kLateRows;
  const Pieces pieces{ptr, all, parts, blocks * workers, blocks, block};
  if (aside && warp == workers) return announce(c, pieces, workers, progress, flags, lane);
  int since = 0;
  for (int v = pieces.first(warp); v < all; v += pieces.step) {
    const Turn turn = turn_of(c, v / parts);
    if (turn.row < ptr[turn.peer + 1] - ptr[turn.peer]) store(turn, v % parts, parts);
    if (how == Announce::kNever) continue;
    __syncwarp();
    if (aside) {
      if (lane == 0) add_one_shared_release(progress + warp);
    } else if (++since == batch || v + pieces.step >= all) {
      if (lane < since) count_piece<false>(c, pieces, v - lane * pieces.step, flags);
      __syncwarp();
      since = 0;
    }
  }
}
// All chunks from all peers; threads of one block.
__device__ __forceinline__ void wait_for_all_rows(const ChannelView& c, const std::int64_t* ptr,
                                                  std::size_t flags, std::uint32_t epoch, WaitFor what) {
  const std::uint32_t* own = in_window<std::uint32_t>(c, c.rank, flags);
  for (int s = 0; s < c.num_ranks; ++s) {
    if (s == c.rank) continue;
    const int chunks = static_cast<int>((ptr[s + 1] - ptr[s] + c.chunk_rows - 1) / c.chunk_rows);
    for (int i = threadIdx.x; i < chunks; i += blockDim.x)
      wait_for(c, own + s * c.max_chunks + i, epoch, what, s, i);
  }
}

// ---- dispatch --------------------------------------------------------------------------------------------------------
// One row into the positions of its routes.
template <bool kFp8, bool kOwn>
__device__ __forceinline__ void expand_row(const ChannelView& c, const DispatchCall& call,
                                           const std::byte* from, float scale, std::int64_t first_route,
                                           std::int64_t end_route, int part, int lane) {
  constexpr int kAhead = 4;
  const Span span = span_of(c, part, c.row_parts);
  const int units = span.end;
  Scale own{};
  if constexpr (kFp8 && kOwn)
    own = scale_of(row_max(reinterpret_cast<const uint4*>(from), c.row_bytes / 16, lane));
  for (std::int64_t first = first_route; first < end_route; first += 32) {
    const int routes = static_cast<int>(min(std::int64_t{32}, end_route - first));
    const int position = lane < routes ? call.position_of_route[first + lane] : 0;
    for (int turn = span.begin; turn < units; turn += 32 * kAhead) {  // all lanes together
      const int base = turn + lane;
      uint4 v[kAhead] = {};  // as in copy_row
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int unit = base + 32 * j;
        if (unit < units) {
          if constexpr (!kFp8) {
            v[j] = load_row(reinterpret_cast<const uint4*>(from) + unit);
          } else if constexpr (kOwn) {
            v[j] = dequantize(quantize(load_row(reinterpret_cast<const uint4*>(from) + unit), own.inverse),
                              own.scale);
          } else {
            v[j] = dequantize(load_half(reinterpret_cast<const uint2*>(from) + unit), scale);
          }
        }
      }
      for (int r = 0; r < routes; ++r) {
        const std::int64_t p = __shfl_sync(kAll, position, r);
        uint4* out = reinterpret_cast<uint4*>(call.out + p * call.out_stride_bytes);
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
          if (base + 32 * j < units) store_row(out + base + 32 * j, v[j]);
      }
    }
    __syncwarp();
    if (call.tile_flags != nullptr && lane < routes) {
      const std::int64_t all = c.state->receive_route_ptr[c.num_ranks];
      const std::int64_t tile = position / call.tile_rows;
      const std::int64_t in_tile =
          min(static_cast<std::int64_t>(call.tile_rows), all - tile * call.tile_rows);
      __threadfence();
      if (atomicAdd(c.tile_done + tile, 1u) + 1 == static_cast<std::uint32_t>(in_tile * c.row_parts)) {
        c.tile_done[tile] = 0;
        __threadfence();
        store_release(call.tile_flags + tile, 1);
      }
    }
    __syncwarp();
  }
}

template <bool kFp8>
__global__ void __launch_bounds__(kCopyThreads, 1)
    dispatch_kernel(const ChannelView* view, DispatchCall call) {
  begin_behind(view->few_rows);
  __shared__ std::int64_t send_ptr[kMaxExchangeRanks + 1], receive_ptr[kMaxExchangeRanks + 1];
  __shared__ std::int64_t push_base[kMaxExchangeRanks];
  __shared__ std::uint32_t progress[kCopyThreads / 32];
  __shared__ ChannelView c;
  load_view(c, view);
  ChannelState& s = *c.state;
  const int ranks = c.num_ranks, me = c.rank;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kWarps = kCopyThreads / 32;
  if (lane == 0) progress[warp] = 0;
  const std::uint32_t epoch = static_cast<volatile ChannelState&>(s).dispatch_epoch + 1;
  for (int d = threadIdx.x; d <= ranks; d += kCopyThreads) {
    send_ptr[d] = call.rank_ptr[d];
    receive_ptr[d] = s.receive_ptr[d];
    if (d < ranks) push_base[d] = s.push_base[d];
  }
  __syncthreads();
  const bool sendable = (s.status & kExchangeOverflow) == 0;
  const int block = blockIdx.x;
  if (block < call.push_blocks) {
    const bool ok = announce_and_wait(c, c.at.dispatch_ready, epoch, WaitFor::kDispatchReady, block == 0);
    if (ok && sendable && ranks > 1) {
      push_rows<kWarps>(
          c, send_ptr, 1, call.push_blocks, call.out == nullptr ? Announce::kLate : Announce::kAside,
          progress, {c.at.dispatch_flags, c.dispatch_done, epoch}, [&](const Turn& turn, int, int) {
            const std::int64_t from = call.send_row[send_ptr[turn.peer] + turn.row];
            const std::int64_t to = push_base[turn.peer] + turn.row;
            const uint4* source = reinterpret_cast<const uint4*>(call.x + from * call.x_stride_bytes);
            std::byte* target = in_window<std::byte>(c, turn.peer, c.at.rows) + to * c.wire_row_bytes;
            if constexpr (kFp8) {
              quantize_row(source, reinterpret_cast<uint2*>(target),
                           in_window<float>(c, turn.peer, c.at.scale) + to, c.row_bytes / 16, lane);
            } else {
              copy_row<8>(source, reinterpret_cast<uint4*>(target), c.row_bytes / 16, lane);
            }
          });
    }
  }
  if (call.out != nullptr && sendable) {
    // Own rows first, while those of others are on their way.
    const int own = call.own ? static_cast<int>(receive_ptr[me + 1] - receive_ptr[me]) : 0;
    const int parts = c.row_parts, all = own + (call.others ? turns(c, receive_ptr) : 0);
    std::uint32_t* ticket = call.pass ? &s.expand_ticket : &s.local_ticket;
    const std::int64_t* route_ptr = in_window<std::int64_t>(c, me, c.at.route_ptr);
    const std::uint32_t* flags = in_window<std::uint32_t>(c, me, c.at.dispatch_flags);
    for (;;) {
      int piece = 0;
      if (lane == 0) piece = static_cast<int>(atomicAdd(ticket, 1u));
      piece = __shfl_sync(kAll, piece, 0);
      const int v = piece / parts, part = piece % parts;
      if (v >= all) break;
      if (v < own) {
        const std::int64_t row = receive_ptr[me] + v;
        const std::int64_t token = call.send_row[send_ptr[me] + v];
        expand_row<kFp8, true>(c, call, call.x + token * call.x_stride_bytes, 0, route_ptr[row],
                               route_ptr[row + 1], part, lane);
        continue;
      }
      const Turn turn = turn_of(c, v - own);
      if (turn.row >= receive_ptr[turn.peer + 1] - receive_ptr[turn.peer]) continue;
      bool ok = true;
      if (lane == 0 && !call.arrived)
        ok = wait_for(c, flags + turn.peer * c.max_chunks + turn.chunk, epoch, WaitFor::kDispatchRows,
                      turn.peer, turn.chunk);
      if (!__shfl_sync(kAll, ok, 0)) break;
      __syncwarp();  // all lanes read behind the first one's wait: a shuffle orders no memory
      const std::int64_t row = receive_ptr[turn.peer] + turn.row;
      const float scale = kFp8 ? *(in_window<const volatile float>(c, me, c.at.scale) + row) : 0.0f;
      expand_row<kFp8, false>(c, call, in_window<std::byte>(c, me, c.at.rows) + row * c.wire_row_bytes, scale,
                              route_ptr[row], route_ptr[row + 1], part, lane);
    }
  } else if (block == 0 && sendable && !call.arrived) {
    wait_for_all_rows(c, receive_ptr, c.at.dispatch_flags, epoch, WaitFor::kDispatchRows);
  }
  if (!call.pass) {
    if (last_block(&s.local_exits, call.blocks) && threadIdx.x == 0) s.local_ticket = 0;
    return;
  }
  if (last_block(&s.dispatch_exits, call.blocks) && threadIdx.x == 0) {
    s.expand_ticket = 0;
    s.dispatch_epoch = epoch;
  }
}

// ---- combine ---------------------------------------------------------------------------------------------------------
// Values of 16 bytes.
template <typename T>
struct Unit;
template <>
struct Unit<Bf16> {
  static constexpr int kValues = 8;
  static __device__ __forceinline__ void get(uint4 v, float (&f)[8]) { unpack_row(v, f); }
  static __device__ __forceinline__ uint4 put(const float (&f)[8]) {
    return make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]),
                      pack_bf16(f[6], f[7]));
  }
};
template <>
struct Unit<float> {
  static constexpr int kValues = 4;
  static __device__ __forceinline__ void get(uint4 v, float (&f)[4]) {
    f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y), f[2] = __uint_as_float(v.z),
    f[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ uint4 put(const float (&f)[4]) {
    return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]),
                      __float_as_uint(f[3]));
  }
};

// ---- sums ------------------------------------------------------------------------------------------------------------
constexpr int kSide = 2;  // units (unit, unit + 32) a lane works on side by side

// One row of a sum in two levels: terms of a rank are added, in order, and rounded to T; ranks are added, in order.
// Lane i has term i of a group of up to 32.
struct Term {
  const std::byte* row;
  float weight;
  bool closes;  // the last of its rank
};
template <typename T>
struct Sum {
  static constexpr int kN = Unit<T>::kValues;
  float rank[kSide][kN], all[kSide][kN];
  // -0 + x is x, for every x.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kSide; ++j)
#pragma unroll
      for (int i = 0; i < kN; ++i) rank[j][i] = all[j][i] = -0.0f;
  }
  __device__ __forceinline__ void add(int j, uint4 v, float weight) {
    float f[kN];
    Unit<T>::get(v, f);
#pragma unroll
    for (int i = 0; i < kN; ++i) rank[j][i] = rank[j][i] + weight * f[i];
  }
  __device__ __forceinline__ void close() {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      float rounded[kN];
      Unit<T>::get(Unit<T>::put(rank[j]), rounded);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        all[j][i] = all[j][i] + rounded[i];
        rank[j][i] = -0.0f;
      }
    }
  }
};
// kTerms terms are on their way together. kLevels 1: the terms are of one rank, or of one each; rounding a row again
// changes nothing.
template <typename T, int kTerms, int kLevels>
__device__ __forceinline__ void sum_few_terms(const Term& term, int terms, Span span, uint4* out, int lane) {
  for (int turn = span.begin; turn < span.end; turn += 32 * kSide) {  // all lanes together
    Sum<T> sum;
    sum.clear();
    // Behind the end lanes read the last unit again: conditions would take registers.
    int unit[kSide];
#pragma unroll
    for (int j = 0; j < kSide; ++j) unit[j] = min(turn + lane + 32 * j, span.end - 1);
    for (int first = 0; first < terms; first += kTerms) {
      uint4 v[kTerms][kSide] = {};  // as in copy_row
#pragma unroll
      for (int t = 0; t < kTerms; ++t) {
        const auto row = reinterpret_cast<const uint4*>(
            __shfl_sync(kAll, reinterpret_cast<std::uint64_t>(term.row), (first + t) % 32));
        if (first + t >= terms) continue;
#pragma unroll
        for (int j = 0; j < kSide; ++j) v[t][j] = load_row(row + unit[j]);
      }
#pragma unroll
      for (int t = 0; t < kTerms; ++t) {
        const float weight = __shfl_sync(kAll, term.weight, (first + t) % 32);
        const bool closes = __shfl_sync(kAll, term.closes, (first + t) % 32);
        if (first + t >= terms) continue;
#pragma unroll
        for (int j = 0; j < kSide; ++j) sum.add(j, v[t][j], weight);
        if (kLevels == 2 && closes) sum.close();
      }
    }
#pragma unroll
    for (int j = 0; j < kSide; ++j)
      if (turn + lane + 32 * j < span.end)
        store_row(out + unit[j], Unit<T>::put(kLevels == 2 ? sum.all[j] : sum.rank[j]));
  }
}

// Terms of this rank's expert outputs. Values, no references, which would put what they refer to into local memory.
struct Terms {
  const std::byte* source;
  std::int64_t stride_bytes;
  const std::int32_t* position_of_route;
  const float* weight;  // null: 1
  __device__ __forceinline__ Term of_route(std::int64_t route, bool closes) const {
    return {source + static_cast<std::int64_t>(position_of_route[route]) * stride_bytes,
            weight != nullptr ? weight[route] : 1.0f, closes};
  }
};
// Any number of terms, one after the other; `term_of(i)` gives term i to all lanes.
template <typename T, typename TermOf>
__device__ __noinline__ void sum_many_terms(TermOf term_of, int terms, Span span, uint4* out, int lane) {
  for (int unit = span.begin + lane; unit < span.end; unit += 32 * kSide) {
    Sum<T> sum;
    sum.clear();
    for (int i = 0; i < terms; ++i) {
      const Term term = term_of(i);
#pragma unroll
      for (int j = 0; j < kSide; ++j)
        if (unit + 32 * j < span.end)
          sum.add(j, load_row(reinterpret_cast<const uint4*>(term.row) + unit + 32 * j), term.weight);
      if (term.closes) sum.close();
    }
#pragma unroll
    for (int j = 0; j < kSide; ++j)
      if (unit + 32 * j < span.end) store_row(out + unit + 32 * j, Unit<T>::put(sum.all[j]));
  }
}
template <typename T>
__device__ __forceinline__ void fill_row(uint4* out, Span span, float value, int lane) {
  float f[Unit<T>::kValues];
#pragma unroll
  for (float& v : f) v = value;
  for (int unit = span.begin + lane; unit < span.end; unit += 32) store_row(out + unit, Unit<T>::put(f));
}

// Blocks of the first `push_blocks` send rows home, all sum what is there. Rows of others are terms with weight 1.
// kReduce: the source holds expert outputs; else a row a receive list entry.
template <typename T, bool kReduce, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const ChannelView* view, CombineCall call) {
  begin_behind(view->few_rows);
  __shared__ ChannelView c;
  __shared__ std::int64_t send_ptr[kMaxExchangeRanks + 1], receive_ptr[kMaxExchangeRanks + 1];
  __shared__ const std::byte* rows[kMaxExchangeRanks];  // from each rank, where the sums find them
  __shared__ std::byte* targets[kMaxExchangeRanks];     // to each rank
  __shared__ std::uint32_t progress[kThreads / 32];
  load_view(c, view);
  ChannelState& s = *c.state;
  const int ranks = c.num_ranks, me = c.rank, row_bytes = c.row_bytes;
  const std::int64_t source_stride = call.source_stride_bytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kWarps = kThreads / 32;
  if (lane == 0) progress[warp] = 0;
  const int block = blockIdx.x;
  for (int d = threadIdx.x; d <= ranks; d += kThreads) {
    const std::int64_t sent = call.rank_ptr != nullptr ? call.rank_ptr[d] : 0, received = s.receive_ptr[d];
    send_ptr[d] = sent;
    receive_ptr[d] = received;
    if (d == ranks) continue;
    rows[d] = d == me ? call.source + received * source_stride
                      : in_window<std::byte>(c, me, c.at.home) + sent * row_bytes;
    targets[d] = call.staging != nullptr ? call.staging + received * row_bytes
                                         : in_window<std::byte>(c, d, c.at.home) + s.home_base[d] * row_bytes;
  }
  __syncthreads();
  const std::uint32_t push_epoch = static_cast<volatile ChannelState&>(s).push_epoch + 1;
  const std::uint32_t sum_epoch = static_cast<volatile ChannelState&>(s).sum_epoch + 1;
  const bool sendable = (s.status & kExchangeOverflow) == 0;
  const std::int64_t* route_ptr = in_window<std::int64_t>(c, me, c.at.route_ptr);
  const Terms terms{call.source, source_stride, call.position_of_route,
                    call.weighted ? in_window<float>(c, me, c.at.weight) : nullptr};
  if (call.push && block < call.push_blocks) {
    // Peers say when their sums of the last pass are done.
    const bool ok = call.staging != nullptr ||
                    announce_and_wait(c, c.at.combine_ready, push_epoch - 1, WaitFor::kCombineReady, false);
    if (ok && sendable && ranks > 1) {
      push_rows<kWarps>(
          c, receive_ptr, kReduce ? c.row_parts : 1, call.push_blocks,
          call.staging != nullptr ? Announce::kNever
          : call.sum              ? Announce::kAside
                                  : Announce::kLate,
          progress, {c.at.combine_flags, c.combine_done, push_epoch},
          [&](const Turn& turn, int part, int parts) {
            const std::int64_t row = receive_ptr[turn.peer] + turn.row;
            uint4* target = reinterpret_cast<uint4*>(targets[turn.peer] + std::int64_t{turn.row} * row_bytes);
            const Span span = span_of(c, part, parts);
            if constexpr (kReduce) {
              const std::int64_t begin = route_ptr[row];
              const int count = max(0, static_cast<int>(route_ptr[row + 1] - begin));
              if (count <= 32) {
                Term term{nullptr, 0, false};
                if (lane < count) term = terms.of_route(begin + lane, lane == count - 1);
                sum_few_terms<T, 4, 1>(term, count, span, target, lane);
              } else {
                const Terms of = terms;
                sum_many_terms<T>([=](int i) { return of.of_route(begin + i, i == count - 1); }, count, span,
                                  target, lane);
              }
            } else {
              copy_row<8>(reinterpret_cast<const uint4*>(terms.source + row * source_stride) + span.begin,
                          target + span.begin, span.end - span.begin, lane);
            }
          });
    }
  }
  if (call.sum) {
    const std::uint32_t* flags = in_window<std::uint32_t>(c, me, c.at.combine_flags);
    const int parts = c.row_parts, tokens = static_cast<int>(call.end_token - call.first_token);
    for (;;) {
      int piece = 0;
      if (lane == 0) piece = static_cast<int>(atomicAdd(&s.sum_ticket, 1u));
      piece = __shfl_sync(kAll, piece, 0);
      if (piece / parts >= tokens) break;
      const std::int64_t t = call.first_token + piece / parts;
      const Span span = span_of(c, piece % parts, parts);
      uint4* out = reinterpret_cast<uint4*>(call.y + t * call.y_stride_bytes);
      const std::int64_t begin = call.home_ptr[t];
      const int num_rows = static_cast<int>(call.home_ptr[t + 1] - begin);
      const std::int32_t* places = call.home_position + begin;
      // A token's rows, ranks ascending; its own one may stand for several routes. Waits for what comes from others.
      bool ok = sendable;
      int own_at = -1, own_place = 0;
      for (int first = 0; first < num_rows; first += 32) {
        const bool mine = first + lane < num_rows;
        const int place = mine ? places[first + lane] : 0;
        int d = 0;
        while (mine && place >= send_ptr[d + 1]) ++d;
        const unsigned own = __ballot_sync(kAll, mine && d == me);
        if (own != 0) {
          own_at = first + __ffs(static_cast<int>(own)) - 1;
          own_place = __shfl_sync(kAll, place, own_at - first);
        }
        if (!mine || d == me || call.arrived || !ok) continue;
        const int chunk = static_cast<int>(place - send_ptr[d]) / c.chunk_rows;
        ok = wait_for(c, flags + d * c.max_chunks + chunk, sum_epoch, WaitFor::kCombineRows, d, chunk);
      }
      if (!__all_sync(kAll, ok)) {
        fill_row<T>(out, span, __int_as_float(0x7FC00000), lane);
        continue;
      }
      __syncwarp();  // each lane reads behind the waits of all: a vote orders no memory
      if (num_rows == 0) {
        fill_row<T>(out, span, 0.0f, lane);
        continue;
      }
      int own_count = 1;
      std::int64_t own_routes = 0;
      if (kReduce && own_at >= 0) {
        const std::int64_t row = receive_ptr[me] + own_place - send_ptr[me];
        own_routes = route_ptr[row];
        own_count = max(0, static_cast<int>(route_ptr[row + 1] - own_routes));
      }
      const Terms of = terms;
      const std::int64_t* ptr = send_ptr;
      const std::byte* const* base = rows;
      const auto term_of = [=](int i) -> Term {
        int at = i;
        if (kReduce && own_at >= 0 && at >= own_at) {
          if (at < own_at + own_count)
            return of.of_route(own_routes + at - own_at, at - own_at == own_count - 1);
          at -= own_count - 1;
        }
        const std::int64_t place = places[at];
        int d = 0;
        while (place >= ptr[d + 1]) ++d;
        return {base[d] + (place - ptr[d]) * (d == me ? source_stride : row_bytes), 1.0f, true};
      };
      const int count = num_rows + own_count - 1;
      if (count <= 32) {
        Term term{nullptr, 0, false};
        if (lane < count) term = term_of(lane);
        sum_few_terms<T, kReduce ? 4 : 2, kReduce ? 2 : 1>(term, count, span, out, lane);
      } else {
        sum_many_terms<T>(term_of, count, span, out, lane);
      }
    }
  }
  if (last_block(call.push ? &s.push_exits : &s.sum_exits, call.blocks)) {
    if (call.sum && call.last && !call.arrived)
      for (int d = threadIdx.x; d < ranks; d += kThreads)
        if (d != me) store_release(in_window<std::uint32_t>(c, d, c.at.combine_ready) + me, sum_epoch);
    if (threadIdx.x == 0) {
      if (call.push && call.staging == nullptr) s.push_epoch = push_epoch;
      if (call.sum) s.sum_ticket = 0;
      if (call.sum && call.last) s.sum_epoch = sum_epoch;
    }
  }
}

// ---- combine by pull -------------------------------------------------------------------------------------------------
// Every rank's rows lie in its window; home reads and adds them. Plain loads: 16 processors have enough of them on their way
// for the link. (cp.async of near and far rows through one ring comes to three quarters of that, bulk copies to as much.)
constexpr int kPullThreads = 768;            // registers for two rows on their way and what comes next
constexpr int kPullUnits = 4;                // of a lane and row ...
constexpr int kPullWidth = 32 * kPullUnits;  // ... so that a warp's piece of a row is 2 KB
// One or two rows' pieces from their first unit: all loads are on their way together. Without conditions, which would
// take registers.
template <typename T, bool kTwo>
__device__ __forceinline__ void add_pieces(const uint4* first, const uint4* second, uint4* out) {
  uint4 a[kPullUnits], b[kPullUnits];
#pragma unroll
  for (int j = 0; j < kPullUnits; ++j) a[j] = load_row(first + 32 * j);
#pragma unroll
  for (int j = 0; kTwo && j < kPullUnits; ++j) b[j] = load_row(second + 32 * j);
#pragma unroll
  for (int j = 0; j < kPullUnits; ++j) {
    float sum[Unit<T>::kValues];
    Unit<T>::get(a[j], sum);
    if constexpr (kTwo) {
      float f[Unit<T>::kValues];
      Unit<T>::get(b[j], f);
#pragma unroll
      for (int i = 0; i < Unit<T>::kValues; ++i) sum[i] = sum[i] + f[i];
    }
    store_row(out + 32 * j, Unit<T>::put(sum));
  }
}
// Of any number of rows and any width, four rows at a time. Not in line: it must take no registers from the common case.
template <typename T, typename RowAt>
__device__ __noinline__ void add_rows(RowAt row_at, int count, Span span, uint4* out, int lane) {
  constexpr int kValues = Unit<T>::kValues, kRows = 4;
  for (int turn = span.begin; turn < span.end; turn += 32) {  // all lanes together
    const int unit = turn + lane;
    float sum[kValues];
#pragma unroll
    for (float& v : sum) v = -0.0f;  // -0 + x is x, for every x
    for (int first = 0; first < count; first += kRows) {
      uint4 v[kRows] = {};  // as in copy_row
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r >= count) continue;
        const uint4* row = row_at(first + r);
        if (unit < span.end) v[r] = load_row(row + unit);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r >= count) continue;
        float f[kValues];
        Unit<T>::get(v[r], f);
#pragma unroll
        for (int i = 0; i < kValues; ++i) sum[i] = sum[i] + f[i];
      }
    }
    if (unit < span.end) store_row(out + unit, Unit<T>::put(sum));
  }
}

// Registers are what it must be careful with: with what did not fit in local memory it was four times slower.
template <typename T>
__global__ void __launch_bounds__(kPullThreads, 1) pull_kernel(const ChannelView* view, CombineCall call) {
  begin_behind(view->few_rows);
  __shared__ std::int64_t send_ptr[kMaxExchangeRanks + 1];
  __shared__ const std::byte* rows[kMaxExchangeRanks];  // of each rank, those of this one's tokens
  __shared__ bool may_sum;
  const int lane = threadIdx.x % 32;
  const int row_bytes = view->row_bytes, units = row_bytes / 16;
  const int tokens = static_cast<int>(call.end_token);
  const int parts = (units + kPullWidth - 1) / kPullWidth;
  // Piece `part` of a token's row. The next one of a warp is as many pieces further on as there are warps.
  const int stride = kPullThreads / 32 * call.blocks, step_tokens = stride / parts,
            step_parts = stride % parts;
  const auto step = [&](int& token, int& part) {
    token += step_tokens;
    part += step_parts;
    if (part >= parts) part -= parts, ++token;
  };
  // Where a piece's rows lie is looked up one piece ahead, and how many they are two.
  const auto places_of = [&](int token, int& begin, int& count) {
    begin = count = 0;
    if (token >= tokens) return;
    begin = static_cast<int>(call.home_ptr[token]);
    count = static_cast<int>(call.home_ptr[token + 1]) - begin;
  };
  const auto place_of = [&](int begin, int count) {  // each lane one
    return lane < count ? call.home_position[begin + lane] : 0;
  };
  const int start = threadIdx.x / 32 * call.blocks + static_cast<int>(blockIdx.x);
  int token = start / parts, part = start % parts, next_token = token, next_part = part;
  step(next_token, next_part);
  int begin, count, next_begin, next_count;
  places_of(token, begin, count);
  places_of(next_token, next_begin, next_count);
  int place = place_of(begin, count);
  {
    const ChannelView& c = *view;
    const ChannelState& s = *c.state;
    for (int d = threadIdx.x; d <= c.num_ranks; d += kPullThreads) {
      send_ptr[d] = call.rank_ptr[d];
      if (d < c.num_ranks) rows[d] = in_window<std::byte>(c, d, c.at.home) + s.push_base[d] * row_bytes;
    }
    const std::uint32_t epoch = static_cast<const volatile ChannelState&>(s).sum_epoch + 1;
    const bool there = announce_and_wait(c, c.at.result_flag, epoch, WaitFor::kCombineRows, blockIdx.x == 0);
    if (threadIdx.x == 0) may_sum = there && (s.status & kExchangeOverflow) == 0;
    __syncthreads();
  }
  while (token < tokens) {
    // Before this piece's rows are asked for.
    const int next_place = place_of(next_begin, next_count);
    int last_token = next_token, last_part = next_part, last_begin, last_count;
    step(last_token, last_part);
    places_of(last_token, last_begin, last_count);
    const Span span{part * kPullWidth, min(units, (part + 1) * kPullWidth)};
    uint4* out = reinterpret_cast<uint4*>(call.y + token * call.y_stride_bytes);
    if (!may_sum || count == 0) {
      fill_row<T>(out, span, may_sum ? 0.0f : __int_as_float(0x7FC00000), lane);
    } else {
      const std::int64_t* ptr = send_ptr;
      const std::byte* const* base = rows;
      const auto row_of = [=](std::int64_t p) {
        int d = 0;
        while (p >= ptr[d + 1]) ++d;
        return reinterpret_cast<const uint4*>(base[d] + (p - ptr[d]) * row_bytes);
      };
      if (count <= 2 && span.end - span.begin == kPullWidth) {
        const auto mine = reinterpret_cast<std::uint64_t>(lane < count ? row_of(place) : nullptr);
        const auto* first = reinterpret_cast<const uint4*>(__shfl_sync(kAll, mine, 0)) + span.begin + lane;
        const auto* second = reinterpret_cast<const uint4*>(__shfl_sync(kAll, mine, 1)) + span.begin + lane;
        if (count == 2) {
          add_pieces<T, true>(first, second, out + span.begin + lane);
        } else {
          add_pieces<T, false>(first, second, out + span.begin + lane);
        }
      } else {
        const std::int32_t* places = call.home_position + begin;
        add_rows<T>([=](int i) { return row_of(places[i]); }, count, span, out, lane);
      }
    }
    token = next_token, part = next_part, begin = next_begin, count = next_count, place = next_place;
    next_token = last_token, next_part = last_part, next_begin = last_begin, next_count = last_count;
  }
  const ChannelView& c = *view;
  ChannelState& s = *c.state;
  if (last_block(&s.sum_exits, call.blocks)) {
    const std::uint32_t epoch = static_cast<volatile ChannelState&>(s).sum_epoch + 1;
    __syncthreads();
    for (int d = threadIdx.x; d < c.num_ranks; d += kPullThreads)
      if (d != c.rank) store_release(in_window<std::uint32_t>(c, d, c.at.combine_ready) + c.rank, epoch);
    if (threadIdx.x == 0) s.push_epoch = s.sum_epoch = epoch;
  }
}

__global__ void combine_handshake_kernel(const ChannelView* view, bool begin) {
  const ChannelView& c = *view;
  const std::uint32_t epoch = c.state->push_epoch;
  if (!announce_and_wait(c, c.at.combine_ready, epoch, WaitFor::kCombineReady, false)) give_up(c);
  if (begin && threadIdx.x == 0) c.state->push_epoch = epoch + 1;
}

// ---- copy engines ----------------------------------------------------------------------------------------------------
template <bool kFp8>
__global__ void __launch_bounds__(kCopyThreads, 1) pack_kernel(const ChannelView* view, PackCall call) {
  __shared__ std::int64_t send_ptr[kMaxExchangeRanks + 1];
  const ChannelView& c = *view;
  ChannelState& s = *c.state;
  const int ranks = c.num_ranks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kWarps = kCopyThreads / 32;
  // The first slice's kernel raises the epoch, so later ones find it raised.
  const std::uint32_t epoch = static_cast<volatile ChannelState&>(s).dispatch_epoch + (call.first ? 1u : 0u);
  for (int d = threadIdx.x; d <= ranks; d += kCopyThreads) send_ptr[d] = call.rank_ptr[d];
  __syncthreads();
  if (call.first && blockIdx.x == 0) {
    if (call.handshake && !announce_and_wait(c, c.at.dispatch_ready, epoch, WaitFor::kDispatchReady, true))
      give_up(c);
  }
  const int all = turns(c, send_ptr), others = (ranks - 1) * c.chunk_rows;
  const int begin = call.first_chunk * others, end = min(all, call.end_chunk * others);
  for (int v = begin + warp * call.blocks + static_cast<int>(blockIdx.x); v < end;
       v += call.blocks * kWarps) {
    const Turn turn = turn_of(c, v);
    if (turn.row >= send_ptr[turn.peer + 1] - send_ptr[turn.peer]) continue;
    const std::int64_t at = send_ptr[turn.peer] + turn.row;
    const uint4* source = reinterpret_cast<const uint4*>(call.x + call.send_row[at] * call.x_stride_bytes);
    std::byte* target = call.staging + at * c.wire_row_bytes;
    if constexpr (kFp8) {
      quantize_row(source, reinterpret_cast<uint2*>(target), call.staging_scale + at, c.row_bytes / 16, lane);
    } else {
      copy_row<8>(source, reinterpret_cast<uint4*>(target), c.row_bytes / 16, lane);
    }
  }
  if (last_block(&s.dispatch_exits, call.blocks) && threadIdx.x == 0 && call.first) s.dispatch_epoch = epoch;
}
// What the copy engine brought before it, in stream order, is announced.
__global__ void raise_flags_kernel(const ChannelView* view, int peer, bool dispatch, int first_chunk,
                                   int end_chunk) {
  const ChannelView& c = *view;
  const std::uint32_t epoch = dispatch ? c.state->dispatch_epoch : c.state->push_epoch;
  std::uint32_t* flags =
      in_window<std::uint32_t>(c, peer, dispatch ? c.at.dispatch_flags : c.at.combine_flags);
  for (int i = first_chunk + static_cast<int>(threadIdx.x); i < end_chunk && !has_failed(c); i += blockDim.x)
    store_release(flags + c.rank * c.max_chunks + i, epoch);
}
__global__ void wait_dispatch_kernel(const ChannelView* view) {
  const ChannelView& c = *view;
  const ChannelState& s = *c.state;
  if ((s.status & kExchangeOverflow) == 0)
    wait_for_all_rows(c, s.receive_ptr, c.at.dispatch_flags, s.dispatch_epoch, WaitFor::kDispatchRows);
}

// ---- one value a route -----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kPlanThreads)
    scalars_kernel(const ChannelView* view, SendPlan plan, const float* values,
                   const std::int32_t* position_of_route, float* value_of_route, ExchangePart part,
                   float* staging) {
  const ChannelView& c = *view;
  ChannelState& s = *c.state;
  const int ranks = c.num_ranks, me = c.rank;
  const std::uint32_t epoch = static_cast<volatile ChannelState&>(s).scalar_epoch + 1;
  const bool peers = part == ExchangePart::kAll;
  bool ok = !peers || announce_and_wait(c, c.at.scalar_ready, epoch, WaitFor::kScalarsReady, blockIdx.x == 0);
  ok = ok && (s.status & kExchangeOverflow) == 0;
  const std::int64_t thread = blockIdx.x * std::int64_t{kPlanThreads} + threadIdx.x;
  const std::int64_t threads = std::int64_t{kPlanThreads} * gridDim.x;
  const std::int64_t received = s.receive_route_ptr[ranks];
  for (std::int64_t i = thread; i < received && ok && part != ExchangePart::kAfter; i += threads) {
    if (!peers) {
      staging[i] = values[position_of_route[i]];
      continue;
    }
    int d = 0;
    while (i >= s.receive_route_ptr[d + 1]) ++d;
    in_window<float>(c, d, c.at.scalars)[s.home_route_base[d] + i - s.receive_route_ptr[d]] =
        values[position_of_route[i]];
  }
  if (part == ExchangePart::kBefore) return;
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0 && peers) {
    __threadfence_system();
    if (atomicAdd(&s.scalar_arrivals, 1u) + 1 == gridDim.x) {
      s.scalar_arrivals = 0;
      __threadfence_system();
      for (int d = 0; d < ranks && !has_failed(c); ++d)
        store_release(in_window<std::uint32_t>(c, d, c.at.scalar_flag) + me, epoch);
    }
  }
  for (int d = threadIdx.x; d < ranks && peers; d += blockDim.x)
    ok =
        wait_for(c, in_window<std::uint32_t>(c, me, c.at.scalar_flag) + d, epoch, WaitFor::kScalars, d) && ok;
  ok = __syncthreads_and(ok) != 0;
  const std::int64_t sent = plan.send_route_ptr[plan.rank_ptr[ranks]];
  const volatile float* scalars = in_window<float>(c, me, c.at.scalars);
  for (std::int64_t i = thread; i < sent; i += threads)
    value_of_route[plan.send_route[i]] = ok ? scalars[i] : __int_as_float(0x7FC00000);
  if (last_block(&s.scalar_exits, gridDim.x) && threadIdx.x == 0) s.scalar_epoch = epoch;
}

__global__ void barrier_kernel(const ChannelView* view, std::uint32_t* epoch, std::size_t flags) {
  const std::uint32_t next = *epoch + 1;
  announce_and_wait(*view, flags, next, WaitFor::kBarrier, true);
  __syncthreads();
  if (threadIdx.x == 0) *epoch = next;
}

__global__ void leave_kernel(const ChannelView* view, std::size_t flags, std::uint64_t deadline_ns,
                             std::uint64_t failed_ns) {
  const ChannelView& c = *view;
  const int d = static_cast<int>(threadIdx.x);
  if (d >= c.num_ranks || d == c.rank) return;
  store_release(in_window<std::uint32_t>(c, d, flags) + c.rank, 1);
  const std::uint32_t* theirs = in_window<std::uint32_t>(c, c.rank, flags) + d;
  const std::uint64_t start = now_ns();
  while (load_acquire(theirs) == 0 && now_ns() - start < (has_failed(c) ? failed_ns : deadline_ns))
    __nanosleep(1000);
}

// The kernel begins with begin_behind(): it may be brought onto the device before the one before it has ended. `paired`: kernels that leave processors to others take them in pairs of neighbours:
// what the others run in clusters of two, the grouped GEMM, would else find single processors that it cannot use.
template <typename... Types, typename... Arguments>
cudaError_t launch_behind(void (*kernel)(Types...), int blocks, int threads, int bytes, bool paired,
                          Stream stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = 2;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = paired ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
template <typename Call>
cudaError_t run_paired(void (*kernel)(const ChannelView*, Call), int threads, int bytes,
                       const ChannelView* view, const Call& call, int processors, Stream stream) {
  return launch_behind(kernel, call.blocks, threads, bytes,
                       call.blocks % 2 == 0 && call.blocks <= processors / 2, stream, view, call);
}
template <typename T>
cudaError_t run_combine(const ChannelView* view, const CombineCall& call, int processors, Stream stream) {
  if (call.pull) return run_paired(pull_kernel<T>, kPullThreads, 0, view, call, processors, stream);
  if (call.position_of_route == nullptr)
    return run_paired(combine_kernel<T, false, kCopyThreads>, kCopyThreads, 0, view, call, processors,
                      stream);
  return run_paired(combine_kernel<T, true, kReduceThreads>, kReduceThreads, 0, view, call, processors,
                    stream);
}

}  // namespace

cudaError_t preload_kernels() {
  cudaFuncAttributes attributes{};
  cudaError_t result = cudaSuccess;
  const auto load = [&](auto* kernel) {
    if (result == cudaSuccess) result = cudaFuncGetAttributes(&attributes, kernel);
  };
  load(plan_kernel);
  load(check_headers_kernel);
  load(dispatch_kernel<false>);
  load(dispatch_kernel<true>);
  load(combine_kernel<Bf16, true, kReduceThreads>);
  load(combine_kernel<Bf16, false, kCopyThreads>);
  load(combine_kernel<float, true, kReduceThreads>);
  load(combine_kernel<float, false, kCopyThreads>);
  load(pull_kernel<Bf16>);
  load(pull_kernel<float>);
  load(combine_handshake_kernel);
  load(pack_kernel<false>);
  load(pack_kernel<true>);
  load(wait_dispatch_kernel);
  load(raise_flags_kernel);
  load(scalars_kernel);
  load(barrier_kernel);
  load(leave_kernel);
  return result;
}

cudaError_t launch_plan(const ChannelView* view, const SendPlan& plan, ExchangePart part,
                        std::int64_t* staging, Stream stream) {
  return launch_behind(plan_kernel, kPlanBlocks, kPlanThreads, 0, false, stream, view, plan, part, staging);
}
cudaError_t launch_check_headers(const ChannelView* view, Stream stream) {
  return launch_behind(check_headers_kernel, kPlanBlocks, kPlanThreads, 0, false, stream, view);
}
cudaError_t launch_dispatch(const ChannelView* view, const DispatchCall& call, bool fp8, int processors,
                            Stream stream) {
  return run_paired(fp8 ? dispatch_kernel<true> : dispatch_kernel<false>, kCopyThreads, 0, view, call,
                    processors, stream);
}
cudaError_t launch_combine(const ChannelView* view, const CombineCall& call, DType dtype, int processors,
                           Stream stream) {
  return dtype == DType::kBF16 ? run_combine<Bf16>(view, call, processors, stream)
                               : run_combine<float>(view, call, processors, stream);
}
cudaError_t launch_scalars(const ChannelView* view, const SendPlan& plan, const float* values,
                           const std::int32_t* position_of_route, float* value_of_route, ExchangePart part,
                           float* staging, Stream stream) {
  scalars_kernel<<<kPlanBlocks, kPlanThreads, 0, stream>>>(view, plan, values, position_of_route,
                                                           value_of_route, part, staging);
  return cudaGetLastError();
}
cudaError_t launch_pack(const ChannelView* view, const PackCall& call, bool fp8, Stream stream) {
  if (fp8) {
    pack_kernel<true><<<call.blocks, kCopyThreads, 0, stream>>>(view, call);
  } else {
    pack_kernel<false><<<call.blocks, kCopyThreads, 0, stream>>>(view, call);
  }
  return cudaGetLastError();
}
cudaError_t launch_wait_dispatch(const ChannelView* view, Stream stream) {
  wait_dispatch_kernel<<<1, kPlanThreads, 0, stream>>>(view);
  return cudaGetLastError();
}
cudaError_t launch_raise_flags(const ChannelView* view, int peer, bool dispatch, int first_chunk,
                               int end_chunk, Stream stream) {
  raise_flags_kernel<<<1, 128, 0, stream>>>(view, peer, dispatch, first_chunk, end_chunk);
  return cudaGetLastError();
}
cudaError_t launch_combine_handshake(const ChannelView* view, bool begin, Stream stream) {
  combine_handshake_kernel<<<1, kPlanThreads, 0, stream>>>(view, begin);
  return cudaGetLastError();
}
cudaError_t launch_barrier(const ChannelView* view, std::uint32_t* epoch, std::size_t flags_at,
                           Stream stream) {
  barrier_kernel<<<1, kMaxExchangeRanks, 0, stream>>>(view, epoch, flags_at);
  return cudaGetLastError();
}
cudaError_t launch_leave(const ChannelView* view, std::size_t flags_at, std::chrono::nanoseconds deadline,
                         std::chrono::nanoseconds failed, Stream stream) {
  leave_kernel<<<1, kMaxExchangeRanks, 0, stream>>>(view, flags_at,
                                                    static_cast<std::uint64_t>(deadline.count()),
                                                    static_cast<std::uint64_t>(failed.count()));
  return cudaGetLastError();
}

}  // namespace sluice::comm::cuda
