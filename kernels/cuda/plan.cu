// Routes are sorted by counting: a tile of 64 tokens is one bit mask an expert and one a rank, so a route's place among
// its tile's is a population count; places of tiles come from prefix sums over the tiles' counts.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "sluice/base/error.hpp"
#include "sluice/kernels/cuda/launch.hpp"
#include "sluice/kernels/cuda/routing.hpp"

namespace sluice::kernels::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kThreads = 256;
constexpr unsigned kAll = 0xFFFFFFFFu;
using Mask = unsigned long long;

// Columns of the table of counts [columns][tiles]: experts, send rows of each rank, routes of each rank, send rows.
struct Shape {
  ConstRouting routing;
  PlanPlacement placement;
  std::int64_t num_tokens;
  int num_tiles;
  std::int32_t* counts;  // [num_columns][num_tiles], then exclusive prefix sums
  std::int32_t* totals;  // [num_columns]

  __host__ __device__ int rank_column() const { return placement.num_experts; }
  __host__ __device__ int route_column() const { return placement.num_experts + placement.num_ranks; }
  __host__ __device__ int home_column() const { return placement.num_experts + 2 * placement.num_ranks; }
  __host__ __device__ int num_columns() const { return home_column() + 1; }
};

// Shared memory of a block.
struct Tile {
  std::int64_t row_ptr[kTile + 1];
  Mask* experts;   // [num_experts] bit i: token i has a route to the expert
  Mask* ranks;     // [num_ranks] bit i: token i has a row for the rank
  int* rank_load;  // [num_ranks][kTile] routes of each token to each rank
};
std::size_t tile_bytes(int num_experts, int num_ranks) {
  return sizeof(Mask) * static_cast<std::size_t>(num_experts + num_ranks) +
         sizeof(int) * static_cast<std::size_t>(num_ranks * kTile);
}

__device__ __forceinline__ int tokens_of(const Shape& s) {
  const std::int64_t left = s.num_tokens - blockIdx.x * std::int64_t{kTile};
  return static_cast<int>(left < kTile ? (left < 0 ? 0 : left) : kTile);
}
// Token (within the tile) of a route.
__device__ __forceinline__ int token_of(const Tile& tile, int tokens, std::int64_t route) {
  int low = 0, high = tokens;  // row_ptr[low] <= route < row_ptr[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tile.row_ptr[middle] <= route) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ void fill_tile(const Shape& s, Tile& tile, unsigned char* memory, int tokens) {
  const int experts = s.placement.num_experts, ranks = s.placement.num_ranks;
  if (threadIdx.x == 0) {
    tile.experts = reinterpret_cast<Mask*>(memory);
    tile.ranks = tile.experts + experts;
    tile.rank_load = reinterpret_cast<int*>(tile.ranks + ranks);
  }
  for (int i = threadIdx.x; i <= tokens; i += kThreads)
    tile.row_ptr[i] = tokens > 0 ? s.routing.row_ptr[blockIdx.x * std::int64_t{kTile} + i] : 0;
  for (int i = threadIdx.x; i < experts + ranks; i += kThreads) reinterpret_cast<Mask*>(memory)[i] = 0;
  for (int i = threadIdx.x; i < ranks * kTile; i += kThreads)
    reinterpret_cast<int*>(reinterpret_cast<Mask*>(memory) + experts + ranks)[i] = 0;
  __syncthreads();
  for (std::int64_t r = tile.row_ptr[0] + threadIdx.x; r < tile.row_ptr[tokens]; r += kThreads) {
    const int expert = s.routing.expert[r];
    const int rank = s.placement.rank_of[expert];
    const int token = token_of(tile, tokens, r);
    atomicOr(&tile.experts[expert], Mask{1} << token);
    if (rank >= 0) {
      atomicOr(&tile.ranks[rank], Mask{1} << token);
      atomicAdd(&tile.rank_load[rank * kTile + token], 1);
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) count_kernel(Shape s) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Tile tile;
  fill_tile(s, tile, memory, tokens_of(s));
  const int experts = s.placement.num_experts, ranks = s.placement.num_ranks;
  const auto put = [&](int column, int value) {
    s.counts[static_cast<std::int64_t>(column) * s.num_tiles + blockIdx.x] = value;
  };
  for (int e = threadIdx.x; e < experts; e += kThreads) put(e, __popcll(tile.experts[e]));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = warp; d < ranks; d += kThreads / 32) {
    const int routes =
        __reduce_add_sync(kAll, tile.rank_load[d * kTile + lane] + tile.rank_load[d * kTile + 32 + lane]);
    if (lane == 0) {
      put(s.rank_column() + d, __popcll(tile.ranks[d]));
      put(s.route_column() + d, routes);
    }
  }
  if (threadIdx.x == 0) {
    int rows = 0;
    for (int d = 0; d < ranks; ++d) rows += __popcll(tile.ranks[d]);
    put(s.home_column(), rows);
  }
}

__device__ __forceinline__ int scan_exclusive(int value, int lane, int& total) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAll, sum, distance);
    if (lane >= distance) sum += other;
  }
  total = __shfl_sync(kAll, sum, 31);
  return sum - value;
}

// One warp a column.
__global__ void __launch_bounds__(kThreads) scan_kernel(Shape s) {
  constexpr int kEach = 8;
  const int lane = threadIdx.x % 32;
  const int column = (blockIdx.x * kThreads + threadIdx.x) / 32;
  if (column >= s.num_columns()) return;
  std::int32_t* counts = s.counts + static_cast<std::int64_t>(column) * s.num_tiles;
  int before = 0;
  for (int first = 0; first < s.num_tiles; first += 32 * kEach) {
    int value[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = first + j * 32 + lane;
      value[j] = i < s.num_tiles ? counts[i] : 0;
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = first + j * 32 + lane;
      int total;
      const int place = scan_exclusive(value[j], lane, total);
      if (i < s.num_tiles) counts[i] = before + place;
      before += total;
    }
  }
  if (lane == 0) s.totals[column] = before;
}

// Starts of n columns from their totals: base[i] = sum before i + what tiles before this one have of column i.
// The first block also writes the starts themselves. `warps` warps work together, this one is number `warp`; their sums
// meet in `sums` (shared, [warps]). meet(): a barrier of theirs; all of them come to it equally often.
template <typename Meet>
__device__ __forceinline__ void find_bases(const Shape& s, int first_column, int n, int* base,
                                           std::int64_t* starts, int lane, int warp, int warps, int* sums,
                                           const Meet& meet) {
  int before = 0;
  for (int first = 0; first < n; first += 32 * warps) {
    const int i = first + warp * 32 + lane;
    const bool mine = warp < warps && i < n;
    const int value = mine ? s.totals[first_column + i] : 0;
    const int tiles =
        mine ? s.counts[static_cast<std::int64_t>(first_column + i) * s.num_tiles + blockIdx.x] : 0;
    int total;
    int start = scan_exclusive(value, lane, total);
    if (warp < warps && lane == 0) sums[warp] = total;
    meet();
    for (int w = 0; w < warps; ++w) {
      if (w == warp) start += before;
      before += sums[w];
    }
    meet();
    if (mine) {
      base[i] = start + tiles;
      if (blockIdx.x == 0 && starts != nullptr) {
        starts[i] = start;
        if (i == n - 1) starts[n] = start + value;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) place_kernel(Shape s, PlanBuffers plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Tile tile;
  __shared__ int rank_base[kMaxPlanRanks], route_base[kMaxPlanRanks], home_of[kTile];
  const int experts = s.placement.num_experts, ranks = s.placement.num_ranks;
  const int tokens = tokens_of(s);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t first_token = blockIdx.x * std::int64_t{kTile};
  fill_tile(s, tile, memory, tokens);
  int* const expert_base = tile.rank_load + ranks * kTile;  // [num_experts]
  constexpr int kExpertWarps = kThreads / 32 - 3;
  __shared__ int sums[kThreads / 32];
  if (warp == kExpertWarps) {
    find_bases(s, s.rank_column(), ranks, rank_base, plan.rank_ptr, lane, 0, 1, sums + warp,
               [] { __syncwarp(); });
  } else if (warp == kExpertWarps + 1) {
    find_bases(s, s.route_column(), ranks, route_base, plan.rank_route_ptr, lane, 0, 1, sums + warp,
               [] { __syncwarp(); });
  } else if (warp > kExpertWarps) {
    // Each token's first home row.
    int before = s.counts[static_cast<std::int64_t>(s.home_column()) * s.num_tiles + blockIdx.x];
#pragma unroll
    for (int half = 0; half < kTile; half += 32) {
      int rows = 0, total;
      for (int d = 0; d < ranks; ++d) rows += static_cast<int>(tile.ranks[d] >> (half + lane) & 1);
      const int place = before + scan_exclusive(rows, lane, total);
      home_of[half + lane] = place;
      if (plan.home_ptr != nullptr && half + lane < tokens) {
        plan.home_ptr[first_token + half + lane] = place;
        if (first_token + half + lane == s.num_tokens - 1) plan.home_ptr[s.num_tokens] = place + rows;
      }
      before += total;
    }
    if (plan.home_ptr != nullptr && s.num_tokens == 0 && lane == 0) plan.home_ptr[0] = 0;
  }
  // Every warp comes along to the barriers of the block.
  find_bases(s, 0, experts, expert_base, plan.expert_ptr, lane, warp, kExpertWarps, sums,
             [] { __syncthreads(); });
  // Routes of a rank before each token of the tile.
  for (int d = warp; d < ranks; d += kThreads / 32) {
    int* load = tile.rank_load + d * kTile;
    int low_total, high_total;
    const int low = scan_exclusive(load[lane], lane, low_total);
    const int high = low_total + scan_exclusive(load[32 + lane], lane, high_total);
    load[lane] = low;
    load[32 + lane] = high;
  }
  __syncthreads();

  for (std::int64_t r = tile.row_ptr[0] + threadIdx.x; r < tile.row_ptr[tokens]; r += kThreads) {
    const int expert = s.routing.expert[r];
    const int rank = s.placement.rank_of[expert];
    const float weight = s.routing.weight != nullptr ? s.routing.weight[r] : 1.0f;
    const int token = token_of(tile, tokens, r);
    const int position = expert_base[expert] + __popcll(tile.experts[expert] & ((Mask{1} << token) - 1));
    if (plan.position_of_route != nullptr) plan.position_of_route[r] = position;
    if (plan.row_of_position != nullptr)
      plan.row_of_position[position] = static_cast<int>(first_token) + token;
    if (plan.weight_of_position != nullptr) plan.weight_of_position[position] = weight;
    if (rank >= 0 &&
        (plan.send_route != nullptr || plan.send_slot != nullptr || plan.send_weight != nullptr)) {
      int place = route_base[rank] + tile.rank_load[rank * kTile + token];
      for (std::int64_t other = tile.row_ptr[token]; other < r; ++other)
        place += s.placement.rank_of[s.routing.expert[other]] == rank ? 1 : 0;
      if (plan.send_route != nullptr) plan.send_route[place] = static_cast<std::int32_t>(r);
      if (plan.send_slot != nullptr) plan.send_slot[place] = s.placement.slot_of[expert];
      if (plan.send_weight != nullptr) plan.send_weight[place] = weight;
    }
  }
  for (int i = threadIdx.x; i < ranks * kTile; i += kThreads) {
    const int d = i / kTile, token = i % kTile;
    if (!(tile.ranks[d] >> token & 1)) continue;
    const int row = rank_base[d] + __popcll(tile.ranks[d] & ((Mask{1} << token) - 1));
    if (plan.send_row != nullptr) plan.send_row[row] = static_cast<int>(first_token) + token;
    if (plan.send_route_ptr != nullptr)
      plan.send_route_ptr[row] = route_base[d] + tile.rank_load[d * kTile + token];
    if (plan.home_position != nullptr) {
      int place = home_of[token];
      for (int before = 0; before < d; ++before) place += static_cast<int>(tile.ranks[before] >> token & 1);
      plan.home_position[place] = row;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && plan.send_route_ptr != nullptr) {
    std::int64_t rows = 0, routes = 0;
    for (int d = 0; d < ranks; ++d) {
      rows += s.totals[s.rank_column() + d];
      routes += s.totals[s.route_column() + d];
    }
    plan.send_route_ptr[rows] = routes;
  }
}

int num_tiles_of(std::int64_t num_tokens) {
  return static_cast<int>(std::max<std::int64_t>(1, (num_tokens + kTile - 1) / kTile));
}

}  // namespace

std::size_t plan_scratch_bytes(std::int64_t num_tokens, int num_experts, int num_ranks) {
  const std::size_t columns = static_cast<std::size_t>(num_experts + 2 * num_ranks + 1);
  return sizeof(std::int32_t) * columns * (static_cast<std::size_t>(num_tiles_of(num_tokens)) + 1);
}

void build_plan(const ConstRouting& routing, std::int64_t num_tokens, const PlanPlacement& placement,
                const PlanBuffers& plan, void* scratch, Stream stream) {
  constexpr auto kBad = ErrorCode::kInvalidArgument;
  Require(placement.num_experts >= 1 && placement.num_experts <= kMaxPlanExperts, kBad,
          "plan: num_experts is ", placement.num_experts, "; 1..", kMaxPlanExperts, " are possible");
  Require(placement.num_ranks >= 1 && placement.num_ranks <= kMaxPlanRanks, kBad, "plan: num_ranks is ",
          placement.num_ranks, "; 1..", kMaxPlanRanks, " are possible");
  Require(num_tokens >= 0 && num_tokens < (std::int64_t{1} << 24), kBad, "plan: num_tokens is ", num_tokens,
          "; fewer than 2^24 are possible");
  Require(placement.rank_of != nullptr && (placement.slot_of != nullptr || plan.send_slot == nullptr), kBad,
          "plan: rank_of, and slot_of for send_slot, must be given");
  Require(plan.expert_ptr != nullptr && plan.rank_ptr != nullptr, kBad,
          "plan: expert_ptr and rank_ptr must be given");
  Require(scratch != nullptr && (num_tokens == 0 || routing.row_ptr != nullptr), kBad,
          "plan: scratch or row_ptr is null");
  Shape s{};
  s.routing = routing;
  s.placement = placement;
  s.num_tokens = num_tokens;
  s.num_tiles = num_tiles_of(num_tokens);
  s.totals = static_cast<std::int32_t*>(scratch);
  s.counts = s.totals + s.num_columns();
  const std::size_t shared = tile_bytes(placement.num_experts, placement.num_ranks);
  const std::size_t with_bases = shared + sizeof(int) * static_cast<std::size_t>(placement.num_experts);
  const auto tiles = static_cast<unsigned>(s.num_tiles);
  count_kernel<<<tiles, kThreads, shared, stream>>>(s);
  check_cuda(cudaGetLastError(), "build_plan: counting");
  scan_kernel<<<blocks_for(s.num_columns(), kThreads / 32, "plan"), kThreads, 0, stream>>>(s);
  check_cuda(cudaGetLastError(), "build_plan: prefix sums");
  place_kernel<<<tiles, kThreads, with_bases, stream>>>(s, plan);
  check_cuda(cudaGetLastError(), "build_plan: placing");
}

}  // namespace sluice::kernels::cuda
