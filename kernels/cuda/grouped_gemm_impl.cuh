// The kernel of the grouped GEMM. Persistent, one block of three warpgroups on each processor, two blocks a cluster:
// a producer thread keeps a ring of shared-memory stages full by tensor copies; two consumer warpgroups multiply.
//
// Operands change places: X = weights give the 64 rows of a matrix instruction (128 a block, 256 a cluster), and
// Y = token rows its n columns, 16..256 in steps of 16. So a ragged group costs its rows rounded up to 16, and the
// cluster's two blocks share one Y tile (each loads half of it for both), whatever the group's size.
//   forward  D[out, p]  = sum over in   W[out, in]  * A[p, in]     X, Y: k inner
//   dgrad    D[in, p]   = sum over out  W[out, in]  * dC[p, out]   X: k outer, Y: k inner
//   wgrad    D[out, in] = sum over p    dC[p, out]  * A[p, in]     X, Y: k outer; n = 256; rows past the group's end
//                                                                  are zeroed in shared memory
// The two warpgroups run kSkewBlocks apart, so that one's epilogue falls into the other's matrix instructions.
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
  // forward, dgrad: bf16 rows; c is null if not wanted, act is null without activation
  std::uint16_t* c;
  std::int64_t c_stride;
  std::uint16_t* act;
  std::int64_t act_stride;
};

inline constexpr int kClusterSize = 2;
inline constexpr int kThreads = 384;
inline constexpr int kBlockX = 128;  // X rows of a block: 64 a consumer warpgroup
inline constexpr int kMaxY = 256;    // Y rows of a tile
inline constexpr int kBlockK = 64;   // 128 bytes: one swizzle row
inline constexpr int kBoxBytes = 64 * kBlockK * 2;
inline constexpr int kXBytes = kBlockX * kBlockK * 2;
inline constexpr int kYBytes = kMaxY * kBlockK * 2;
inline constexpr int kStageBytes = kXBytes + kYBytes;
inline constexpr int kStages = 4;
inline constexpr int kStagingBytes = 16384;  // epilogue buffer of a warpgroup
// Y tiles worked on side by side, so that the X and Y tiles in use at a time are few and stay in L2 (measured: 9 and
// more read up to half as much again from memory).
inline constexpr int kSwath = 8;
inline constexpr int kStagingOffset = kStages * kStageBytes;
inline constexpr int kBarrierOffset = kStagingOffset + 2 * kStagingBytes;
inline constexpr int kPrefixOffset = kBarrierOffset + 2 * kStages * 8;
inline constexpr int kSharedBytes = kPrefixOffset + (kMaxGemmGroups + 1) * 4;
static_assert(kSharedBytes <= 232448, "shared memory of a Hopper block");

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
  if constexpr (kOp == GemmOp::kWgrad) {
    s.y_step = kMaxY;
    s.y_tiles = ceil_div(p.y_extent, kMaxY);
  } else {
    // Equal tiles rather than full ones and a small rest: a small tile is bound by loading X.
    const int even = ceil_div(s.rows, ceil_div(s.rows, kMaxY));
    s.y_step = ceil_div(even, 16) * 16;
    s.y_tiles = ceil_div(s.rows, s.y_step);
  }
  return s;
}

template <GemmOp kOp>
struct TileWalk {
  int position = -1;
  GroupShape group{};
  // The tile found by find()
  int x_pair;   // which 256 rows of X
  int y_begin;  // first Y row within the group (wgrad: first column of A)
  int y_rows;   // real Y rows
  int num_k;    // blocks of 64 of the reduction index

  // prefix[i]: tiles of the groups at positions < i. Tiles must be asked for in ascending order.
  __device__ __forceinline__ bool find(const GemmParams& p, const int* prefix, int tile) {
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
    if constexpr (kOp == GemmOp::kWgrad) {
      y_rows = kMaxY;
      num_k = ceil_div(group.rows, kBlockK);
    } else {
      y_rows = min(group.y_step, group.rows - y_begin);
      num_k = ceil_div(p.k_extent, kBlockK);
    }
    return true;
  }
};

template <GemmOp kOp>
__device__ __forceinline__ void count_tiles(const GemmParams& p, int* prefix, int lane) {
  const int x_pairs = ceil_div(p.x_extent, kClusterSize * kBlockX);
  int before = 0;
  for (int first = 0; first < p.num_groups; first += 32) {
    const int i = first + lane;
    int tiles = i < p.num_groups ? group_shape<kOp>(p, i).y_tiles * x_pairs : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, tiles, distance);
      if (lane >= distance) tiles += other;
    }
    if (i < p.num_groups) prefix[i + 1] = before + tiles;
    before += __shfl_sync(0xFFFFFFFFu, tiles, 31);
  }
  if (lane == 0) prefix[0] = 0;
}

// ---- the ring of stages --------------------------------------------------------------------------------------------
struct Ring {
  std::uint32_t base;      // shared memory of stage 0: X then Y
  std::uint32_t barriers;  // full[kStages], empty[kStages]
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ std::uint32_t x() const { return base + stage * kStageBytes; }
  __device__ __forceinline__ std::uint32_t y() const { return x() + kXBytes; }
  __device__ __forceinline__ std::uint32_t full() const { return barriers + stage * 8; }
  __device__ __forceinline__ std::uint32_t empty(int s) const { return barriers + (kStages + s) * 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Arrivals that empty a stage: each consumer warp of both blocks, because a block's Y tile is half written by the other.
inline constexpr int kEmptyArrivals = kClusterSize * 8;

// ---- producer ------------------------------------------------------------------------------------------------------
template <GemmOp kOp>
__device__ __forceinline__ void produce(const GemmParams& p, const CUtensorMap* map_x,
                                        const CUtensorMap* map_y, const int* prefix, Ring ring,
                                        std::uint32_t rank) {
  constexpr std::uint16_t kBoth = 0b11;
  const int clusters = gridDim.x / kClusterSize;
  TileWalk<kOp> tile;
  bool expired = false;
  for (int t = blockIdx.x / kClusterSize; tile.find(p, prefix, t); t += clusters) {
    const int x_first = tile.x_pair * kClusterSize * kBlockX + rank * kBlockX;
    const int boxes = ceil_div(tile.y_rows, 64);
    if (p.arrival.flags != nullptr) {
      if constexpr (kOp == GemmOp::kWgrad) {
        wait_for_rows(p.arrival, tile.group.begin, tile.group.rows, expired);
      } else {
        wait_for_rows(p.arrival, tile.group.begin + tile.y_begin, tile.y_rows, expired);
      }
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
      } else if constexpr (kOp == GemmOp::kDgrad) {
        ptx::copy_3d(ring.x(), map_x, x_first, k, tile.group.weight, full);
        ptx::copy_3d(ring.x() + kBoxBytes, map_x, x_first + 64, k, tile.group.weight, full);
      } else {
        ptx::copy_2d(ring.x(), map_x, x_first, tile.group.begin + k, full);
        ptx::copy_2d(ring.x() + kBoxBytes, map_x, x_first + 64, tile.group.begin + k, full);
      }
      for (int box = rank; box < boxes; box += kClusterSize) {
        const std::uint32_t y = ring.y() + box * kBoxBytes;
        if constexpr (kOp == GemmOp::kWgrad) {
          ptx::copy_2d_multicast(y, map_y, tile.y_begin + box * 64, tile.group.begin + k, full, kBoth);
        } else {
          ptx::copy_2d_multicast(y, map_y, k, tile.group.begin + tile.y_begin + box * 64, full, kBoth);
        }
      }
      ring.advance();
    }
  }
}

// ---- consumers -----------------------------------------------------------------------------------------------------
inline constexpr int kSkewBlocks = 2;
inline constexpr int kSkewMinBlocks =
    2 * kStages;                           // below, one warpgroup could run a whole tile ahead of the other
inline constexpr int kStagingBarrier = 1;  // +0, +1: one a warpgroup
inline constexpr int kSkewBarrier = 3;

__device__ __forceinline__ void release(const Ring& ring, int stage, int lane) {
  if (lane < kClusterSize) ptx::mbarrier_arrive_cluster(ptx::map_shared(ring.empty(stage), lane));
}

// Zeroes rows first..last-1 of boxes of 64 rows of 128 bytes.
__device__ __forceinline__ void zero_rows(std::uint32_t boxes, int num_boxes, int first, int last,
                                          int thread) {
  const int per_box = (last - first) * 8;
  for (int i = thread; i < per_box * num_boxes; i += 128) {
    ptx::store_shared_16(boxes + i / per_box * kBoxBytes + first * 128 + i % per_box * 16, uint4{0, 0, 0, 0});
  }
}

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
template <GemmOp kOp, int kN>
__device__ __forceinline__ int multiply(float (&acc)[128], Ring& ring, int num_k, int k_rows, int warpgroup,
                                        int thread) {
  constexpr int kXOuter = kOp == GemmOp::kDgrad || kOp == GemmOp::kWgrad ? 1 : 0;
  constexpr int kYOuter = kOp == GemmOp::kWgrad ? 1 : 0;
  const int lane = thread % 32;
  const int skew_block = min(kSkewBlocks, num_k - 1);
  int previous = 0;
  for (int kb = 0; kb < num_k; ++kb) {
    ptx::mbarrier_wait(ring.full(), ring.phase);
    int steps = kBlockK / 16;
    if constexpr (kOp == GemmOp::kWgrad) {
      const int rows = k_rows - kb * kBlockK;
      if (rows < kBlockK) {
        steps = ceil_div(rows, 16);
        zero_rows(ring.x() + warpgroup * kBoxBytes, 1, rows, steps * 16, thread);
        zero_rows(ring.y(), kMaxY / 64, rows, steps * 16, thread);
        ptx::fence_proxy_async();
        ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);
      }
    }
    const std::uint64_t x = matrix_descriptor(ring.x() + warpgroup * kBoxBytes, kBoxBytes);
    const std::uint64_t y = matrix_descriptor(ring.y(), kBoxBytes);
    const int accumulate = kb != 0;
    if (kOp != GemmOp::kWgrad || steps == 4) {
      multiply_block<kN, 4, kXOuter, kYOuter>(acc, x, y, accumulate);
    } else if (steps == 3) {
      multiply_block<kN, 3, kXOuter, kYOuter>(acc, x, y, accumulate);
    } else if (steps == 2) {
      multiply_block<kN, 2, kXOuter, kYOuter>(acc, x, y, accumulate);
    } else {
      multiply_block<kN, 1, kXOuter, kYOuter>(acc, x, y, accumulate);
    }
    ptx::wgmma_wait<1>();
    if (kb > 0) release(ring, previous, lane);
    if (warpgroup == 0 && kb == skew_block && num_k >= kSkewMinBlocks)
      ptx::named_barrier_arrive(kSkewBarrier, 256);
    previous = ring.stage;
    ring.advance();
  }
  return previous;
}

// Where a warpgroup's columns of a tile go.
struct RowSink {
  std::uint16_t* data;  // first row of the tile
  std::int64_t stride;
  int rows;
  int column, columns;
};

// Rows first..last-1 of the sink from staging rows 0.., each kChunks * 16 bytes. Threads store: whole lines, and a
// tile's ragged end needs nothing special. (Tensor stores were measured: 2 to 3% slower over the shapes.)
template <int kChunks>
__device__ __forceinline__ void store_rows(const RowSink& sink, int first, int last, std::uint32_t staging,
                                           int warpgroup, int thread) {
  ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);
  const int chunk = thread % kChunks;
  if (sink.column + chunk * 8 < sink.columns) {
    std::uint16_t* out = sink.data + (first + thread / kChunks) * sink.stride + sink.column + chunk * 8;
    const std::int64_t step_stride = sink.stride * (128 / kChunks);
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const int row = step * (128 / kChunks) + thread / kChunks;
      if (row < last - first) {
        const int swizzled = kChunks == 8 ? chunk ^ (row % 8) : chunk ^ (row / 2 % 4);
        *reinterpret_cast<uint4*>(out + step * step_stride) =
            ptx::load_shared_16(staging + row * kChunks * 16 + swizzled * 16);
      }
    }
  }
}

// 64 columns of up to 256 rows, transposed on the way to shared memory.
// value(i): accumulator i, in the order of wgmma's fragment.
template <typename Value>
__device__ __forceinline__ void store_64_columns(const RowSink& sink, std::uint32_t staging, int warpgroup,
                                                 int thread, Value value) {
  constexpr int kPart = kStagingBytes / 128;
  const int lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int first = 0; first < kMaxY; first += kPart) {
    if (first < sink.rows) {
      ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);  // the last rows were read
#pragma unroll
      for (int pair = 0; pair < kPart / 16; ++pair) {
        if (first + pair * 16 < sink.rows) {
          const int i = (first / 8 + pair * 2) * 4;
          const int row = pair * 16 + (lane / 16) * 8 + lane % 8;
          const int chunk = warp * 2 + (lane / 8) % 2;
          ptx::store_matrix_x4_transposed(
              staging + row * 128 + ((chunk ^ (row % 8)) << 4), ptx::pack_bf16(value(i), value(i + 1)),
              ptx::pack_bf16(value(i + 2), value(i + 3)), ptx::pack_bf16(value(i + 4), value(i + 5)),
              ptx::pack_bf16(value(i + 6), value(i + 7)));
        }
      }
      store_rows<8>(sink, first, min(sink.rows, first + kPart), staging, warpgroup, thread);
    }
  }
}

// 32 columns of up to 256 rows. value(j, i): of rows 8j.. the fragment's element i in {0, 1}.
template <typename Value>
__device__ __forceinline__ void store_32_columns(const RowSink& sink, std::uint32_t staging, int warpgroup,
                                                 int thread, Value value) {
  const int lane = thread % 32, warp = thread / 32;
  ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);
#pragma unroll
  for (int quad = 0; quad < 8; ++quad) {
    if (quad * 32 < sink.rows) {
      const int j = quad * 4;
      const int row = quad * 32 + lane;
      ptx::store_matrix_x4_transposed(
          staging + row * 64 + ((warp ^ (row / 2 % 4)) << 4), ptx::pack_bf16(value(j, 0), value(j, 1)),
          ptx::pack_bf16(value(j + 1, 0), value(j + 1, 1)), ptx::pack_bf16(value(j + 2, 0), value(j + 2, 1)),
          ptx::pack_bf16(value(j + 3, 0), value(j + 3, 1)));
    }
  }
  store_rows<4>(sink, 0, sink.rows, staging, warpgroup, thread);
}

// Adds 64 rows of 256 columns to the gradient, 32 columns (8 KB) at a time; the buffers take turns.
__device__ __forceinline__ void add_to_gradient(const CUtensorMap* map, int row, int column, int group,
                                                int rows, int columns, const float (&acc)[128],
                                                std::uint32_t staging, int warpgroup, int thread) {
  constexpr int kBuffers = kStagingBytes / 8192;
  const int lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int box = 0; box < kMaxY / 32; ++box) {
    const std::uint32_t buffer = staging + box % kBuffers * 8192;
    if (thread == 0) ptx::bulk_wait_read<kBuffers - 1>();
    ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int line = warp * 16 + lower * 8 + lane / 4;
        const int chunk = j * 2 + lane % 4 / 2;
        const int i = (box * 4 + j) * 4 + lower * 2;
        ptx::store_shared_f32x2(buffer + line * 128 + ((chunk ^ (line % 8)) << 4) + lane % 2 * 8, acc[i],
                                acc[i + 1]);
      }
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);
    if (thread == 0) {
      if (row < rows && column + box * 32 < columns)
        ptx::reduce_add_3d(map, column + box * 32, row, group, buffer);
      ptx::bulk_commit();
    }
  }
}

template <GemmOp kOp>
__device__ __forceinline__ void store_tile(const GemmParams& p, const CUtensorMap* map_grads,
                                           const TileWalk<kOp>& tile, const float (&acc)[128],
                                           std::uint32_t rank, std::uint32_t staging, int warpgroup,
                                           int thread) {
  const int x_first = tile.x_pair * kClusterSize * kBlockX + rank * kBlockX + warpgroup * 64;
  if constexpr (kOp == GemmOp::kWgrad) {
    add_to_gradient(map_grads, x_first, tile.y_begin, tile.group.weight, p.x_extent, p.y_extent, acc, staging,
                    warpgroup, thread);
  } else {
    const std::int64_t row = tile.group.begin + tile.y_begin;
    if constexpr (kOp == GemmOp::kForwardSwiGLU) {
      const int ffn = p.x_extent / 2;
      const int column = x_first / 2;
      if (p.c != nullptr) {
        const RowSink gate{p.c + row * p.c_stride, p.c_stride, tile.y_rows, column, ffn};
        store_32_columns(gate, staging, warpgroup, thread, [&](int j, int i) { return acc[4 * j + i]; });
        const RowSink up{p.c + row * p.c_stride + ffn, p.c_stride, tile.y_rows, column, ffn};
        store_32_columns(up, staging, warpgroup, thread, [&](int j, int i) { return acc[4 * j + 2 + i]; });
      }
      const RowSink act{p.act + row * p.act_stride, p.act_stride, tile.y_rows, column, ffn};
      store_32_columns(act, staging, warpgroup, thread,
                       [&](int j, int i) { return silu(acc[4 * j + i]) * acc[4 * j + 2 + i]; });
    } else {
      if (p.c != nullptr) {
        const RowSink c{p.c + row * p.c_stride, p.c_stride, tile.y_rows, x_first, p.x_extent};
        store_64_columns(c, staging, warpgroup, thread, [&](int i) { return acc[i]; });
      }
      if (kOp == GemmOp::kForward && p.act != nullptr) {
        const RowSink act{p.act + row * p.act_stride, p.act_stride, tile.y_rows, x_first, p.x_extent};
        store_64_columns(act, staging, warpgroup, thread,
                         [&](int i) { return activate(p.activation, acc[i]); });
      }
    }
  }
}

template <GemmOp kOp>
__device__ __forceinline__ void consume(const GemmParams& p, const CUtensorMap* map_grads, const int* prefix,
                                        Ring ring, std::uint32_t rank, std::uint32_t staging, int warpgroup,
                                        int thread) {
  const int clusters = gridDim.x / kClusterSize;
  TileWalk<kOp> next;
  float acc[128];
  int t = blockIdx.x / kClusterSize;
  bool more = next.find(p, prefix, t);
  while (more) {
    const TileWalk<kOp> tile = next;
    if (warpgroup == 1 && tile.num_k >= kSkewMinBlocks) ptx::named_barrier_sync(kSkewBarrier, 256);
    int last = 0;
#define SLUICE_CASE(i)                                                                       \
  case i:                                                                                    \
    last = multiply<kOp, 16 * i>(acc, ring, tile.num_k, tile.group.rows, warpgroup, thread); \
    break;
    if constexpr (kOp == GemmOp::kWgrad) {
      last = multiply<kOp, kMaxY>(acc, ring, tile.num_k, tile.group.rows, warpgroup, thread);
    } else {
      switch (ceil_div(tile.y_rows, 16)) {
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
          last = multiply<kOp, kMaxY>(acc, ring, tile.num_k, tile.group.rows, warpgroup, thread);
      }
    }
#undef SLUICE_CASE
    t += clusters;
    more = next.find(p, prefix, t);  // while the last matrix instructions run
    ptx::wgmma_wait<0>();
    fence_accumulators(acc);
    release(ring, last, thread % 32);
    store_tile<kOp>(p, map_grads, tile, acc, rank, staging, warpgroup, thread);
  }
  if constexpr (kOp == GemmOp::kWgrad) ptx::bulk_wait_read<0>();  // the last adds have read shared memory
}

template <GemmOp kOp>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
                        const __grid_constant__ CUtensorMap map_grads, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const std::uint32_t base = ptx::shared_address(shared);
  int* prefix = reinterpret_cast<int*>(shared + kPrefixOffset);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::uint32_t rank = ptx::cluster_rank();
  const Ring ring{base, base + kBarrierOffset};
  if (warp == 0) {
    count_tiles<kOp>(p, prefix, lane);
  } else if (threadIdx.x == 32) {
    if (base % 1024 != 0) __trap();  // the swizzle needs it
    ptx::prefetch_map(&map_x);
    ptx::prefetch_map(&map_y);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(ring.barriers + s * 8, 1);
      ptx::mbarrier_init(ring.empty(s), kEmptyArrivals);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warp < 4) {
    ptx::registers_fewer<56>();
    if (threadIdx.x == 0) produce<kOp>(p, &map_x, &map_y, prefix, ring, rank);
  } else {
    ptx::registers_more<224>();
    const int warpgroup = warp / 4 - 1;
    consume<kOp>(p, &map_grads, prefix, ring, rank, base + kStagingOffset + warpgroup * kStagingBytes,
                 warpgroup, threadIdx.x % 128);
  }
  // The other block may still signal this one's barriers.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace sluice::kernels::cuda
