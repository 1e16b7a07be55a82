// The Hopper kernel of the grouped GEMM's forward and dgrad, and what it shares with wgrad's (grouped_wgrad_impl.cuh).
// Persistent, one block of three warpgroups on each processor, two blocks a cluster: a producer thread keeps a ring of
// shared-memory stages full by tensor copies; two consumer warpgroups multiply.
//
// Operands change places: X = weights give the 64 rows of a matrix instruction (128 a block, 256 a cluster), and
// Y = token rows its n columns, 16..256 in steps of 16. So a ragged group costs its rows rounded up to 16, and the
// cluster's two blocks share one Y tile (each loads half of it for both), whatever the group's size.
//   forward  D[out, p]  = sum over in   W[out, in]  * A[p, in]     X, Y: k inner
//   dgrad    D[in, p]   = sum over out  W[out, in]  * dC[p, out]   X: k outer, Y: k inner
//   wgrad    D[out, in] = sum over p    dC[p, out]  * A[p, in]     X, Y: k outer; n in steps of 64
// A finished tile's results wait in registers, rounded to bf16, and are stored between the next tile's matrix
// instructions, so the tensor cores hardly wait for memory. Both warpgroups stay close together: a stage is
// free again when both have read it, and running them apart, so that one stores while the other multiplies, costs as
// many stages of prefetch (measured: 4% slower two blocks apart).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "sluice/kernels/cuda/arrival.cuh"
#include "sluice/kernels/cuda/gemm_activation.cuh"
#include "sluice/kernels/cuda/grouped_gemm.hpp"
#include "sluice/kernels/cuda/ptx.cuh"
#include "sluice/kernels/cuda/wgmma.cuh"

namespace sluice::kernels::cuda {

enum class GemmOp { kForward, kForwardSwiGLU, kDgrad, kWgrad };

struct GemmParams {
  const std::int64_t* group_ptr;
  const std::int32_t* order;
  const std::int32_t* weight_index;
  Arrival arrival;
  std::int64_t num_rows;
  std::int64_t num_weights;
  int num_groups;
  int x_extent;  // rows of X: out (forward, wgrad), in (dgrad)
  int y_extent;  // wgrad: in
  int k_extent;  // forward: in, dgrad: out
  GemmActivation activation;
  std::uint32_t* ticket;  // null: tiles by a fixed stride
  int ticket_clusters;    // that take tickets, of all launches
  // forward, dgrad: bf16 rows; c is null if not wanted, act is null without activation
  std::uint16_t* c;
  std::int64_t c_stride;
  std::uint16_t* act;
  std::int64_t act_stride;
};

inline constexpr int kClusterSize = 2;
inline constexpr int kThreads = 384;
inline constexpr int kBlockX = 128;  // X rows of a block: 64 a consumer warpgroup
inline constexpr int kBlockK = 64;   // 128 bytes: one swizzle row
inline constexpr int kBoxBytes = 64 * kBlockK * 2;
inline constexpr int kXBytes = kBlockX * kBlockK * 2;
// Y tiles worked on side by side, so that the X and Y tiles in use at a time are few and stay in L2 (measured: 9 and
// more read up to half as much again from memory).
inline constexpr int kSwath = 8;
// Tiles that the producer may tell consumers of before they are done with the first: a consumer needs the one it
// multiplies and the one before, whose results it still stores.
inline constexpr int kTileSlots = 8;
static_assert(kTileSlots > 2);
inline constexpr int kMaxY = 256;  // Y rows of a tile
// Decode: where no tile has more Y rows than this, stages are half as large and twice as many, because then nothing but
// the bytes of weights under way counts.
inline constexpr int kFewY = 64;
template <bool kFew>
inline constexpr int kStages = kFew ? 8 : 4;
template <bool kFew>
inline constexpr int kStageBytes = kXBytes + (kFew ? kFewY : kMaxY) * kBlockK * 2;
inline constexpr int kMaxStages = kStages<true>;
static_assert(kStages<true> * kStageBytes<true> == kStages<false> * kStageBytes<false>);
inline constexpr int kPieceBytes = 8192;  // of results on their way through shared memory
inline constexpr int kBuffers = 2;        // pieces of a warpgroup there at a time
inline constexpr int kStagingOffset = kStages<false> * kStageBytes<false>;
inline constexpr int kBarrierOffset = kStagingOffset + 2 * kBuffers * kPieceBytes;
inline constexpr int kTileOffset = kBarrierOffset + 2 * (kMaxStages + kTileSlots) * 8;
inline constexpr int kPrefixOffset = kTileOffset + kTileSlots * 32;
inline constexpr int kMaxStepOffset = kPrefixOffset + (kMaxGemmGroups + 1) * 4;
// Tickets told to both blocks of a cluster. Blocks are at most a ring of stages apart, so a slot was read when its turn
// comes again.
inline constexpr int kTicketSlots = 16;
static_assert(kTicketSlots > kMaxStages + 1);
inline constexpr int kTicketOffset = (kMaxStepOffset + 4 + 7) / 8 * 8;
inline constexpr int kSharedBytes = kTicketOffset + kTicketSlots * 12;
static_assert(kTileOffset % 16 == 0);
static_assert(kSharedBytes <= 232448, "shared memory of a Hopper block");

// The block's shared memory; an address that is no register.
extern __shared__ __align__(1024) unsigned char gemm_shared[];

__host__ __device__ constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// ---- which tile comes when -----------------------------------------------------------------------------------------
struct GroupShape {
  int weight;
  int begin, rows;  // rows of the group
  int y_step;       // Y rows of each tile but the last
  int y_tiles;
};

// Equal tiles rather than full ones and a small rest: a small tile is bound by loading X.
template <GemmOp kOp>
__device__ __forceinline__ int y_step(int extent) {
  constexpr int kUnit = kOp == GemmOp::kWgrad ? 64 : 16;
  return ceil_div(ceil_div(extent, ceil_div(extent, kMaxY)), kUnit) * kUnit;
}

template <GemmOp kOp>
__device__ __forceinline__ GroupShape group_shape(const GemmParams& p, int position) {
  const int g = p.order != nullptr ? p.order[position] : position;
  GroupShape s{};
  if (g < 0 || g >= p.num_groups) return s;
  s.weight = p.weight_index != nullptr ? p.weight_index[g] : g;
  const std::int64_t begin = p.group_ptr[g], end = p.group_ptr[g + 1];
  if (begin < 0 || end > p.num_rows || begin >= end || s.weight < 0 || s.weight >= p.num_weights) return s;
  s.begin = static_cast<int>(begin);
  s.rows = static_cast<int>(end - begin);
  const int extent = kOp == GemmOp::kWgrad ? p.y_extent : s.rows;
  s.y_step = y_step<kOp>(extent);
  s.y_tiles = ceil_div(extent, s.y_step);
  return s;
}

// What consumers know of a tile.
struct alignas(16) Tile {
  int num_k;    // blocks of the reduction index (wgrad: of 32); 0: there are no more tiles
  int y_rows;   // real Y rows
  int y_first;  // first Y row among all rows (wgrad: first column of A)
  int x_pair;   // which 256 rows of X
  int k_rows;   // wgrad: rows of the group
  int weight;
  int unused[2];
};
static_assert(sizeof(Tile) == 32);

__device__ __forceinline__ Tile* tile_slot(int index) {
  return reinterpret_cast<Tile*>(gemm_shared + kTileOffset) + index % kTileSlots;
}
// Barriers of a slot: the producer wrote it; consumers are done with it. Their phases follow index / kTileSlots.
__device__ __forceinline__ std::uint32_t tile_written(int index) {
  return ptx::shared_address(gemm_shared) + kBarrierOffset + (2 * kMaxStages + index % kTileSlots) * 8;
}
__device__ __forceinline__ std::uint32_t tile_read(int index) {
  return tile_written(index) + kTileSlots * 8;
}
__device__ __forceinline__ std::uint32_t tile_phase(int index) {
  return static_cast<std::uint32_t>(index / kTileSlots) & 1;
}
// After count_tiles(): prefix[i]: tiles of the groups at positions < i.
__device__ __forceinline__ int* tile_prefix() {
  return reinterpret_cast<int*>(gemm_shared + kPrefixOffset);
}

template <GemmOp kOp>
struct TileWalk {
  int position = -1;
  GroupShape group{};
  // The tile found by find()
  int x_pair;   // which 256 rows of X
  int y_begin;  // first Y row within the group
  int y_rows;   // real Y rows
  int num_k;    // blocks of 64 of the reduction index

  // Tiles must be asked for in ascending order.
  __device__ __forceinline__ bool find(const GemmParams& p, int tile) {
    const int* const prefix = tile_prefix();
    if (tile >= prefix[p.num_groups]) return false;
    int next = position < 0 ? 0 : position;
    while (tile >= prefix[next + 1]) ++next;
    if (next != position) {
      position = next;
      group = group_shape<kOp>(p, position);
    }
    const int local = tile - prefix[position];
    const int x_pairs = ceil_div(p.x_extent, kClusterSize * kBlockX);
    const int first_y = local / (kSwath * x_pairs) * kSwath;
    const int width = min(kSwath, group.y_tiles - first_y);
    const int in_swath = local - first_y * x_pairs;
    x_pair = in_swath / width;
    y_begin = (first_y + in_swath % width) * group.y_step;
    y_rows = min(group.y_step, group.rows - y_begin);
    num_k = ceil_div(p.k_extent, kBlockK);
    return true;
  }
  __device__ __forceinline__ Tile tile() const {
    return {num_k, y_rows, group.begin + y_begin, x_pair, group.rows, group.weight, {}};
  }
};

template <GemmOp kOp>
__device__ __forceinline__ void count_tiles(const GemmParams& p, int lane) {
  int* const prefix = tile_prefix();
  const int x_pairs = ceil_div(p.x_extent, kClusterSize * kBlockX);
  int before = 0, max_step = 0;
  for (int first = 0; first < p.num_groups; first += 32) {
    const int i = first + lane;
    const GroupShape shape = i < p.num_groups ? group_shape<kOp>(p, i) : GroupShape{};
    int tiles = shape.y_tiles * x_pairs;
    max_step = max(max_step, shape.y_step);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, tiles, distance);
      if (lane >= distance) tiles += other;
    }
    if (i < p.num_groups) prefix[i + 1] = before + tiles;
    before += __shfl_sync(0xFFFFFFFFu, tiles, 31);
  }
  max_step = __reduce_max_sync(0xFFFFFFFFu, max_step);
  if (lane == 0) {
    prefix[0] = 0;
    *reinterpret_cast<int*>(gemm_shared + kMaxStepOffset) = max_step;
  }
}

// ---- the ring of stages --------------------------------------------------------------------------------------------
template <bool kFew>
struct Ring {
  std::uint32_t base;  // shared memory of stage 0: X then Y
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ std::uint32_t x() const { return base + stage * kStageBytes<kFew>; }
  __device__ __forceinline__ std::uint32_t y() const { return x() + kXBytes; }
  __device__ __forceinline__ std::uint32_t full(int s) const { return base + kBarrierOffset + s * 8; }
  __device__ __forceinline__ std::uint32_t full() const { return full(stage); }
  __device__ __forceinline__ std::uint32_t empty(int s) const { return full(kMaxStages + s); }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages<kFew>) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// ---- tickets -------------------------------------------------------------------------------------------------------
__device__ __forceinline__ std::uint32_t ticket_barrier(int index) {
  return ptx::shared_address(gemm_shared) + kTicketOffset + index % kTicketSlots * 8;
}
__device__ __forceinline__ std::uint32_t ticket_word(int index) {
  return ptx::shared_address(gemm_shared) + kTicketOffset + kTicketSlots * 8 + index % kTicketSlots * 4;
}
// The first block's producer: takes the cluster's ticket number `index` for both blocks.
__device__ __forceinline__ void take_ticket(const GemmParams& p, int index) {
  const std::uint32_t ticket = atomicAdd(p.ticket, 1u);
  // Every cluster's last ticket is past the tiles; who has the very last one leaves the counter as it was.
  if (ticket + 1 == static_cast<std::uint32_t>(tile_prefix()[p.num_groups] + p.ticket_clusters))
    *p.ticket = 0;
#pragma unroll
  for (int block = 0; block < kClusterSize; ++block)
    ptx::store_cluster(ptx::map_shared(ticket_word(index), block), ticket,
                       ptx::map_shared(ticket_barrier(index), block));
}
// When a tile's producer takes the next ticket: soon enough that it is there in time, late enough that who is slow takes
// fewer.
__device__ __forceinline__ bool takes_next(const GemmParams& p, std::uint32_t rank, int kb, int num_k) {
  return p.ticket != nullptr && rank == 0 && kb == max(num_k - 6, 0);
}
// Each block's producer: its tile number `index`.
__device__ __forceinline__ int tile_of(const GemmParams& p, int index) {
  if (p.ticket == nullptr) return static_cast<int>(blockIdx.x + index * gridDim.x) / kClusterSize;
  const std::uint32_t barrier = ticket_barrier(index);
  ptx::mbarrier_arrive_expect(barrier, 4);
  ptx::mbarrier_wait(barrier, static_cast<std::uint32_t>(index / kTicketSlots) & 1);
  return static_cast<int>(ptx::load_shared(ticket_word(index)));
}

// Arrivals that empty a stage: each consumer warp of both blocks, because a block's Y tile is half written by the other.
inline constexpr int kEmptyArrivals = kClusterSize * 8;

// One thread's.
__device__ __forceinline__ void tell(int index, const Tile& tile) {
  ptx::mbarrier_wait(tile_read(index), tile_phase(index) ^ 1);
  *tile_slot(index) = tile;
  ptx::mbarrier_arrive(tile_written(index));
}

// ---- producer ------------------------------------------------------------------------------------------------------
template <GemmOp kOp, bool kFew>
__device__ __forceinline__ void produce(const GemmParams& p, const CUtensorMap* map_x,
                                        const CUtensorMap* map_y, Ring<kFew> ring, std::uint32_t rank) {
  constexpr std::uint16_t kBoth = (1 << kClusterSize) - 1;
  TileWalk<kOp> tile;
  bool expired = false;
  int index = 0;
  if (p.ticket != nullptr && rank == 0) take_ticket(p, 0);
  for (; tile.find(p, tile_of(p, index)); ++index) {
    tell(index, tile.tile());
    const int x_first = tile.x_pair * kClusterSize * kBlockX + rank * kBlockX;
    const int boxes = ceil_div(tile.y_rows, 64);
    if (p.arrival.flags != nullptr) {
      wait_for_rows(p.arrival, tile.group.begin + tile.y_begin, tile.y_rows, expired);
      ptx::fence_proxy_async();
    }
    for (int kb = 0; kb < tile.num_k; ++kb) {
      ptx::mbarrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
      const std::uint32_t full = ring.full();
      const int k = kb * kBlockK;
      ptx::mbarrier_arrive_expect(full, kXBytes + boxes * kBoxBytes);
      if constexpr (kOp == GemmOp::kForward) {
        ptx::copy_3d(ring.x(), map_x, k, x_first, tile.group.weight, full);
      } else if constexpr (kOp == GemmOp::kForwardSwiGLU) {
        ptx::copy_5d(ring.x(), map_x, k, 0, 0, x_first / 16, tile.group.weight, full);
      } else {
        ptx::copy_3d(ring.x(), map_x, x_first, k, tile.group.weight, full);
        ptx::copy_3d(ring.x() + kBoxBytes, map_x, x_first + 64, k, tile.group.weight, full);
      }
      for (int box = rank; box < boxes; box += kClusterSize) {
        ptx::copy_2d_multicast(ring.y() + box * kBoxBytes, map_y, k,
                               tile.group.begin + tile.y_begin + box * 64, full, kBoth);
      }
      if (takes_next(p, rank, kb, tile.num_k)) take_ticket(p, index + 1);
      ring.advance();
    }
  }
  tell(index, Tile{});
}

// ---- consumers -----------------------------------------------------------------------------------------------------
inline constexpr int kStagingBarrier = 1;  // +0, +1: one a warpgroup

template <bool kFew>
__device__ __forceinline__ void release(const Ring<kFew>& ring, int stage, int lane) {
  if (lane < kClusterSize) ptx::mbarrier_arrive_cluster(ptx::map_shared(ring.empty(stage), lane));
}

// Where a warpgroup's columns of a tile go.
struct RowSink {
  std::uint16_t* data;  // first row of the tile
  std::int64_t stride;
  int rows;
  int column, columns;
};

// Rows first..first+kRows-1 of the sink, as far as there are, from staging rows 0.., each kChunks * 16 bytes. Threads
// store: whole lines, and a tile's ragged end needs nothing special. (Tensor stores were measured: 2 to 3% slower over the
// shapes.)
template <int kChunks, int kRows>
__device__ __forceinline__ void store_rows(const RowSink& sink, int first, std::uint32_t staging,
                                           int warpgroup, int thread) {
  constexpr int kRowsAStep = 128 / kChunks;
  ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);
  const int chunk = thread % kChunks;
  if (sink.column + chunk * 8 < sink.columns) {
    std::uint16_t* out = sink.data + (first + thread / kChunks) * sink.stride + sink.column + chunk * 8;
    const std::int64_t step_stride = sink.stride * kRowsAStep;
#pragma unroll
    for (int step = 0; step < kRows / kRowsAStep; ++step) {
      const int row = step * kRowsAStep + thread / kChunks;
      if (row < sink.rows - first) {
        const int swizzled = kChunks == 8 ? chunk ^ (row % 8) : chunk ^ (row / 2 % 4);
        *reinterpret_cast<uint4*>(out + step * step_stride) =
            ptx::load_shared_16(staging + row * kChunks * 16 + swizzled * 16);
      }
    }
  }
}

// Results are stored a piece at a time: 8 KB of a warpgroup's columns, transposed on the way through shared memory. A
// piece is 16 registers of two values: with 64 columns 64 rows, with the 32 of SwiGLU 128 rows.
// packed[i]: accumulators 2i, 2i+1 in the order of wgmma's fragment (SwiGLU: the two of the gate, or of the other factor).
template <bool kHalf>
__device__ __forceinline__ void store_piece(const RowSink& sink, int first, const std::uint32_t* packed,
                                            std::uint32_t staging, int warpgroup, int thread) {
  const int lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t* four = packed + 4 * i;
    if constexpr (kHalf) {
      const int row = i * 32 + lane;
      if (first + i * 32 < sink.rows)
        ptx::store_matrix_x4_transposed(staging + row * 64 + ((warp ^ (row / 2 % 4)) << 4), four[0], four[1],
                                        four[2], four[3]);
    } else {
      const int row = i * 16 + (lane / 16) * 8 + lane % 8;
      const int chunk = warp * 2 + (lane / 8) % 2;
      if (first + i * 16 < sink.rows)
        ptx::store_matrix_x4_transposed(staging + row * 128 + ((chunk ^ (row % 8)) << 4), four[0], four[1],
                                        four[2], four[3]);
    }
  }
  store_rows<kHalf ? 4 : 8, kHalf ? 128 : 64>(sink, first, staging, warpgroup, thread);
}

// Where a result of a tile goes.
template <GemmOp kOp>
__device__ __forceinline__ RowSink sink_of(const GemmParams& p, const Tile* tile, bool act,
                                           std::uint32_t rank, int warpgroup) {
  constexpr bool kHalf = kOp == GemmOp::kForwardSwiGLU;
  const int x_first = tile->x_pair * kClusterSize * kBlockX + rank * kBlockX + warpgroup * 64;
  const std::int64_t stride = act ? p.act_stride : p.c_stride;
  return {(act ? p.act : p.c) + tile->y_first * stride, stride, tile->y_rows, kHalf ? x_first / 2 : x_first,
          kHalf ? p.x_extent / 2 : p.x_extent};
}

// A finished tile's results in registers, until they are stored between the next tile's matrix instructions: c, or the
// activation where c is not wanted. SwiGLU: the gate's columns of c, then the other factor's.
template <GemmOp kOp>
struct Deferred {
  static constexpr int kPieces = 4;
  std::uint32_t packed[16 * kPieces];
  // The values are taken here, before the accumulators are used again.
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int i = 0; i < 16 * kPieces; ++i) asm volatile("" : "+r"(packed[i])::"memory");
  }
  template <int kPiece>
  __device__ __forceinline__ void store(const GemmParams& p, const Tile* tile, std::uint32_t rank,
                                        std::uint32_t staging, int warpgroup, int thread) const {
    constexpr bool kHalf = kOp == GemmOp::kForwardSwiGLU;
    constexpr int kFirst = kHalf ? kPiece % 2 * 128 : kPiece * 64;
    // Who writes a buffer again, everyone has read it: SwiGLU's third piece may come right after the first.
    if (kPiece == 0 || (kHalf && kPiece == 2)) ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);
    if (kFirst >= tile->y_rows || (kHalf && kPiece >= 2 && p.c == nullptr)) return;
    RowSink sink = sink_of<kOp>(p, tile, p.c == nullptr, rank, warpgroup);
    if (kHalf && kPiece >= 2) sink.data += sink.columns;
    store_piece<kHalf>(sink, kFirst, packed + 16 * kPiece, staging + kPiece % 2 * kPieceBytes, warpgroup,
                       thread);
  }
  __device__ __forceinline__ void store(int piece, const GemmParams& p, const Tile* tile, std::uint32_t rank,
                                        std::uint32_t staging, int warpgroup, int thread) const {
    if (piece == 0) store<0>(p, tile, rank, staging, warpgroup, thread);
    if (piece == 1) store<1>(p, tile, rank, staging, warpgroup, thread);
    if (piece == 2) store<2>(p, tile, rank, staging, warpgroup, thread);
    if (piece == 3) store<3>(p, tile, rank, staging, warpgroup, thread);
  }
};

// kSteps * 16 of the reduction index, as one group of matrix instructions.
template <int kN, int kSteps, int kXOuter, int kYOuter>
__device__ __forceinline__ void multiply_block(float (&acc)[128], std::uint64_t x, std::uint64_t y,
                                               int accumulate) {
  constexpr int kXStep = (kXOuter ? 16 * 128 : 32) >> 4;
  constexpr int kYStep = (kYOuter ? 16 * 128 : 32) >> 4;
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    wgmma<kN, kXOuter, kYOuter>(acc, x + k * kXStep, y + k * kYStep, k == 0 ? accumulate : 1);
  }
  ptx::wgmma_commit();
}

// Returns the stage whose matrix instructions are still running.
template <GemmOp kOp, int kN, bool kFew>
__device__ __forceinline__ int multiply(const GemmParams& p, float (&acc)[128], Ring<kFew>& ring, int num_k,
                                        const Deferred<kOp>& deferred, const Tile* last_tile,
                                        std::uint32_t rank, std::uint32_t staging, int warpgroup,
                                        int thread) {
  constexpr int kXOuter = kOp == GemmOp::kDgrad ? 1 : 0;
  const int lane = thread % 32;
  int previous = 0;
  int piece = last_tile == nullptr ? Deferred<kOp>::kPieces : 0;
  for (int kb = 0; kb < num_k; ++kb) {
    ptx::mbarrier_wait(ring.full(), ring.phase);
    const std::uint64_t x = matrix_descriptor(ring.x() + warpgroup * kBoxBytes, kBoxBytes);
    const std::uint64_t y = matrix_descriptor(ring.y(), kBoxBytes);
    multiply_block<kN, 4, kXOuter, 0>(acc, x, y, kb != 0);
    ptx::wgmma_wait<1>();
    if (kb > 0) release(ring, previous, lane);
    if (piece < Deferred<kOp>::kPieces)
      deferred.store(piece++, p, last_tile, rank, staging, warpgroup, thread);
    previous = ring.stage;
    ring.advance();
  }
  for (; piece < Deferred<kOp>::kPieces; ++piece)
    deferred.store(piece, p, last_tile, rank, staging, warpgroup, thread);
  return previous;
}

// Stores what cannot wait, and leaves the rest in `deferred`.
template <GemmOp kOp>
__device__ __forceinline__ void finish_tile(const GemmParams& p, const Tile* tile, const float (&acc)[128],
                                            Deferred<kOp>& deferred, std::uint32_t rank,
                                            std::uint32_t staging, int warpgroup, int thread) {
  constexpr bool kSwiGLU = kOp == GemmOp::kForwardSwiGLU;
  constexpr int kActRegisters = kSwiGLU ? 32 : 64;
  // Values 2i, 2i+1 of the activation.
  const auto value = [&](int i) {
    if constexpr (kSwiGLU)
      return ptx::pack_bf16(silu(acc[4 * i]) * acc[4 * i + 2], silu(acc[4 * i + 1]) * acc[4 * i + 3]);
    else
      return ptx::pack_bf16(activate(p.activation, acc[2 * i]), activate(p.activation, acc[2 * i + 1]));
  };
  if (p.c == nullptr) {
#pragma unroll
    for (int i = 0; i < kActRegisters; ++i) deferred.packed[i] = value(i);
  } else {
    if (kOp != GemmOp::kDgrad && p.act != nullptr) {
      const RowSink act = sink_of<kOp>(p, tile, true, rank, warpgroup);
#pragma unroll
      for (int piece = 0; piece < kActRegisters / 16; ++piece) {
        std::uint32_t packed[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) packed[i] = value(piece * 16 + i);
        const int first = piece * (kSwiGLU ? 128 : 64);
        if (piece == 0)
          ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);  // the last results were read
        if (first < act.rows)
          store_piece<kSwiGLU>(act, first, packed, staging + piece % 2 * kPieceBytes, warpgroup, thread);
      }
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int at = kSwiGLU ? 4 * (i % 32) + i / 32 * 2 : 2 * i;
      deferred.packed[i] = ptx::pack_bf16(acc[at], acc[at + 1]);
    }
  }
  deferred.pin();
}

template <GemmOp kOp, bool kFew>
__device__ __forceinline__ void consume(const GemmParams& p, Ring<kFew> ring, std::uint32_t rank,
                                        std::uint32_t staging, int warpgroup, int thread) {
  float acc[128];
  Deferred<kOp> deferred;
  const Tile* last_tile = nullptr;
  for (int index = 0;; ++index) {
    const Tile* const tile = tile_slot(index);
    ptx::mbarrier_wait(tile_written(index), tile_phase(index));
    const int num_k = tile->num_k;
    if (num_k == 0) break;
    int last = 0;
#define SLUICE_MULTIPLY(n) \
  last = multiply<kOp, n>(p, acc, ring, num_k, deferred, last_tile, rank, staging, warpgroup, thread)
#define SLUICE_CASE(i)       \
  case i:                    \
    SLUICE_MULTIPLY(16 * i); \
    break;
    if constexpr (kFew) {
      switch (ceil_div(tile->y_rows, 16)) {
        SLUICE_CASE(1)
        SLUICE_CASE(2)
        SLUICE_CASE(3)
        default:
          SLUICE_MULTIPLY(kFewY);
      }
    } else {
      switch (ceil_div(tile->y_rows, 16)) {
        SLUICE_CASE(1)
        SLUICE_CASE(2)
        SLUICE_CASE(3)
        SLUICE_CASE(4)
        SLUICE_CASE(5)
        SLUICE_CASE(6)
        SLUICE_CASE(7)
        SLUICE_CASE(8)
        SLUICE_CASE(9)
        SLUICE_CASE(10)
        SLUICE_CASE(11)
        SLUICE_CASE(12)
        SLUICE_CASE(13)
        SLUICE_CASE(14)
        SLUICE_CASE(15)
        default:
          SLUICE_MULTIPLY(256);
      }
    }
#undef SLUICE_CASE
#undef SLUICE_MULTIPLY
    // Every thread for itself, as it read the slot itself.
    if (index > 0) ptx::mbarrier_arrive(tile_read(index - 1));
    ptx::wgmma_wait<0>();
    fence_accumulators(acc);
    release(ring, last, thread % 32);
    finish_tile<kOp>(p, tile, acc, deferred, rank, staging, warpgroup, thread);
    last_tile = tile;
  }
  if (last_tile == nullptr) return;
  for (int piece = 0; piece < Deferred<kOp>::kPieces; ++piece)
    deferred.store(piece, p, last_tile, rank, staging, warpgroup, thread);
}

template <GemmOp kOp>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
                        const __grid_constant__ GemmParams p) {
  const std::uint32_t base = ptx::shared_address(gemm_shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::uint32_t rank = ptx::cluster_rank();
  if (warp == 0) {
    count_tiles<kOp>(p, lane);
  } else if (threadIdx.x == 32) {
    if (base % 1024 != 0) __trap();  // the swizzle needs it
    ptx::prefetch_map(&map_x);
    ptx::prefetch_map(&map_y);
    const Ring<true> ring{base};
    for (int s = 0; s < kMaxStages; ++s) {
      ptx::mbarrier_init(ring.full(s), 1);
      ptx::mbarrier_init(ring.empty(s), kEmptyArrivals);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      ptx::mbarrier_init(tile_written(i), 1);
      ptx::mbarrier_init(tile_read(i), 256);  // consumer threads
    }
    for (int i = 0; i < kTicketSlots; ++i) ptx::mbarrier_init(ticket_barrier(i), 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::cluster_arrive();
  ptx::cluster_wait();

  const bool few = *reinterpret_cast<const int*>(gemm_shared + kMaxStepOffset) <= kFewY;
  if (warp < 4) {
    ptx::registers_fewer<40>();
    if (threadIdx.x == 0) {
      if (few)
        produce<kOp>(p, &map_x, &map_y, Ring<true>{base}, rank);
      else
        produce<kOp>(p, &map_x, &map_y, Ring<false>{base}, rank);
    }
  } else {
    ptx::registers_more<232>();
    const int warpgroup = warp / 4 - 1;
    const std::uint32_t staging = base + kStagingOffset + warpgroup * kBuffers * kPieceBytes;
    if (few)
      consume<kOp>(p, Ring<true>{base}, rank, staging, warpgroup, threadIdx.x % 128);
    else
      consume<kOp>(p, Ring<false>{base}, rank, staging, warpgroup, threadIdx.x % 128);
  }
  // The other block may still signal this one's barriers.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace sluice::kernels::cuda
