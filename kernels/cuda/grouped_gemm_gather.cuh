// The grouped GEMM's forward kernel that fetches each token row from where it lies, so that no kernel has to put rows
// in the order of the experts first. It is the kernel of grouped_gemm_impl.cuh with other shares in the cluster:
//
// Tensor copies fetch boxes, not single rows, and copies of 16 bytes by threads reach the own block alone. So a block's
// tile is 256 rows of X (weights) by up to 128 of Y (tokens): the cluster's two blocks take neighbouring halves of a
// tile's Y rows and share X, of which each loads half for both; Y is the block's own, fetched by the producer's four
// warps and laid out in the 128-byte swizzle by hand. Blocks read as many bytes a product as there. A consumer
// warpgroup has 128 rows of X as two products of 64; for SwiGLU one is of W1, the other of W3.
//
// A row's copies are ordinary writes to shared memory. Each producer thread's arrive at the stage's barrier by themselves,
// and consumers order them before the tensor cores' reads by a fence of shared memory, which costs nothing measurable.
// (Measured, times of the call: producers that wait for their copies, fence and then arrive, one stage later 1.25, two 1.9:
// the fence waits for all that the thread has on its way; a fence of all memory by consumers 1.05 to 1.25; a warp that
// waits, fences of shared memory and arrives, and three that copy 1.01 to 1.07.)
#pragma once

#include "sluice/kernels/cuda/grouped_gemm_impl.cuh"

namespace sluice::kernels::cuda {

struct GatherParams {
  GemmParams gemm;  // arrival: flags[0] covers the second base
  const std::int32_t* index;
  const unsigned char* first;
  const unsigned char* second;
  std::int64_t first_stride, second_stride;  // bytes
  int first_rows, second_rows;               // at least 1
};

namespace gather {

inline constexpr int kBoxes = 4;  // of 64 rows of X
inline constexpr int kSharedXBytes = kBoxes * kBoxBytes;
inline constexpr int kBlockY = 128;
static_assert(kSharedXBytes + kBlockY * kBlockK * 2 == kStageBytes<false>);

// ---- producer ------------------------------------------------------------------------------------------------------
inline constexpr int kGatherWarps = 4;
inline constexpr int kRowsAPass = kGatherWarps * 4;
inline constexpr int kPasses = ceil_div(kBlockY, kRowsAPass);

template <bool kSwiGLU>
__device__ __forceinline__ void produce(const GatherParams& p, const CUtensorMap* map_x, Ring<false> ring,
                                        std::uint32_t rank) {
  constexpr std::uint16_t kBoth = (1 << kClusterSize) - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int chunk = lane % 8, first_row = warp * 4 + lane / 8;
  const bool leader = threadIdx.x == 0;
  // Where in a stage the first row's chunk goes. In the 128-byte swizzle a chunk's place differs by its row's number
  // in eight; rows a pass apart differ by nothing or by bit 2.
  const std::uint32_t place = kSharedXBytes + first_row * 128 + ((chunk ^ (first_row % 8)) << 4);
  TileWalk<GemmOp::kForward> walk;
  bool waits = p.gemm.arrival.flags != nullptr, expired = false;
  if (p.gemm.ticket != nullptr && leader && rank == 0) take_ticket(p.gemm, 0);
  for (int index = 0;; ++index) {
    if (leader) {
      Tile tile{};
      if (walk.find(p.gemm, tile_of(p.gemm, index))) {
        tile = walk.tile();
        const int half = ceil_div(tile.y_rows, 16) * 8;
        tile.y_first += static_cast<int>(rank) * half;
        tile.y_rows = rank == 0 ? min(half, tile.y_rows) : max(tile.y_rows - half, 0);
      }
      tell(index, tile);
    }
    __syncwarp();
    ptx::mbarrier_wait(tile_written(index), tile_phase(index));
    const Tile* const told = tile_slot(index);
    const struct {
      int num_k, y_rows, y_first, x_pair, weight;
    } tile{told->num_k, told->y_rows, told->y_first, told->x_pair, told->weight};
    ptx::mbarrier_arrive(tile_read(index));
    if (tile.num_k == 0) break;
    const int rows = tile.y_rows - first_row;
    const std::int32_t* const where = p.index + tile.y_first + first_row;
    const unsigned char* row[kPasses];
    bool any_second = false;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const std::int32_t from = i * kRowsAPass < rows ? where[i * kRowsAPass] : 0;
      const bool second = from < 0;
      any_second |= second;
      row[i] = (second ? p.second + min(~from, p.second_rows - 1) * p.second_stride
                       : p.first + min(from, p.first_rows - 1) * p.first_stride) +
               chunk * 16;
    }
    if (waits && __any_sync(0xFFFFFFFFu, any_second)) {
      if (lane == 0) wait_for_rows(p.gemm.arrival, 0, 1, expired);
      __syncwarp();
      waits = false;
    }
    for (int kb = 0; kb < tile.num_k; ++kb) {
      ptx::mbarrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
      const int k = kb * kBlockK;
      const std::uint32_t stage = ring.x();
      if (leader) {
        const std::uint32_t full = ring.full(), x = stage + rank * (kSharedXBytes / kClusterSize);
        ptx::mbarrier_arrive_expect(full, kSharedXBytes);
        if constexpr (kSwiGLU)
          ptx::copy_4d_multicast(x, map_x, k, tile.x_pair * 128 + rank * 64, 0, tile.weight, full, kBoth);
        else
          ptx::copy_3d_multicast(x, map_x, k, tile.x_pair * 256 + rank * 128, tile.weight, full, kBoth);
      }
      const int bytes = k + chunk * 8 < p.gemm.k_extent ? 16 : 0;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (i * kRowsAPass < rows)
          ptx::copy_16((stage + place + i * kRowsAPass * 128) ^ (i * kRowsAPass % 8 * 16), row[i] + k * 2,
                       bytes);
      }
      ptx::copy_16_arrive(ring.full());
      if (leader && takes_next(p.gemm, rank, kb, tile.num_k)) take_ticket(p.gemm, index + 1);
      ring.advance();
    }
  }
}

// ---- consumers -----------------------------------------------------------------------------------------------------
// Where a result of a warpgroup's 64 rows of X goes: `half` is which of the two.
template <bool kSwiGLU>
__device__ __forceinline__ RowSink sink_of(const GemmParams& p, const Tile* tile, bool act, int half,
                                           int warpgroup) {
  const std::int64_t stride = act ? p.act_stride : p.c_stride;
  RowSink sink{(act ? p.act : p.c) + tile->y_first * stride, stride, tile->y_rows, 0, p.x_extent};
  if constexpr (kSwiGLU) {
    sink.columns /= 2;
    sink.column = tile->x_pair * 128 + warpgroup * 64;
    if (half == 1) sink.data += sink.columns;
  } else {
    sink.column = tile->x_pair * 256 + warpgroup * 128 + half * 64;
  }
  return sink;
}

// A finished tile's results, as Deferred: [half][32] of c, or of the activation; SwiGLU's alone are [32].
template <bool kSwiGLU>
struct Results {
  static constexpr int kPieces = 4;
  std::uint32_t packed[64];
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+r"(packed[i])::"memory");
  }
  // 64 rows of one half: of both the first rows, then of both the others, so that what a ragged tile has not comes last.
  template <int kPiece>
  __device__ __forceinline__ void store(const GemmParams& p, const Tile* tile, bool act,
                                        std::uint32_t staging, int warpgroup, int thread) const {
    constexpr int kBuffer = kPiece % 2 * kPieceBytes;
    // Who writes a buffer again, everyone has read it.
    if (kPiece == 0) ptx::named_barrier_sync(kStagingBarrier + warpgroup, 128);
    if (kSwiGLU && act) {
      if (kPiece < 2 && kPiece * 64 < tile->y_rows)
        store_piece<false>(sink_of<kSwiGLU>(p, tile, true, 0, warpgroup), kPiece * 64,
                           packed + kPiece % 2 * 16, staging + kBuffer, warpgroup, thread);
    } else if (kPiece / 2 * 64 < tile->y_rows) {
      store_piece<false>(sink_of<kSwiGLU>(p, tile, act, kPiece % 2, warpgroup), kPiece / 2 * 64,
                         packed + kPiece % 2 * 32 + kPiece / 2 * 16, staging + kBuffer, warpgroup, thread);
    }
  }
  __device__ __forceinline__ void store(int piece, const GemmParams& p, const Tile* tile, bool act,
                                        std::uint32_t staging, int warpgroup, int thread) const {
    if (piece == 0) store<0>(p, tile, act, staging, warpgroup, thread);
    if (piece == 1) store<1>(p, tile, act, staging, warpgroup, thread);
    if (piece == 2) store<2>(p, tile, act, staging, warpgroup, thread);
    if (piece == 3) store<3>(p, tile, act, staging, warpgroup, thread);
  }
};

// Returns the stage whose matrix instructions are still running.
template <bool kSwiGLU, int kN>
__device__ __forceinline__ int multiply(const GemmParams& p, float (&upper)[64], float (&lower)[64],
                                        Ring<false>& ring, int num_k, const Results<kSwiGLU>& results,
                                        const Tile* last_tile, std::uint32_t staging, int warpgroup,
                                        int thread) {
  int previous = 0;
  int piece = last_tile == nullptr ? Results<kSwiGLU>::kPieces : 0;
  for (int kb = 0; kb < num_k; ++kb) {
    ptx::mbarrier_wait(ring.full(), ring.phase);
    ptx::fence_proxy_async_shared();  // the rows were written by ordinary copies
    const std::uint64_t x = matrix_descriptor(ring.x() + warpgroup * 2 * kBoxBytes, kBoxBytes);
    const std::uint64_t y = matrix_descriptor(ring.x() + kSharedXBytes, kBoxBytes);
    const int accumulate = kb != 0;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
      constexpr int kStep = 32 >> 4;
      const int add = k == 0 ? accumulate : 1;
      wgmma<kN, 0, 0>(upper, x + k * kStep, y + k * kStep, add);
      wgmma<kN, 0, 0>(lower, x + (kBoxBytes >> 4) + k * kStep, y + k * kStep, add);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (kb > 0) release(ring, previous, thread % 32);
    if (piece < Results<kSwiGLU>::kPieces)
      results.store(piece++, p, last_tile, p.c == nullptr, staging, warpgroup, thread);
    previous = ring.stage;
    ring.advance();
  }
  for (; piece < Results<kSwiGLU>::kPieces; ++piece)
    results.store(piece, p, last_tile, p.c == nullptr, staging, warpgroup, thread);
  return previous;
}

// Stores what cannot wait, and leaves the rest in `results`.
template <bool kSwiGLU>
__device__ __forceinline__ void finish_tile(const GemmParams& p, const Tile* tile, const float (&upper)[64],
                                            const float (&lower)[64], Results<kSwiGLU>& results,
                                            std::uint32_t staging, int warpgroup, int thread) {
  const auto activate_all = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if constexpr (kSwiGLU) {
        results.packed[i] =
            ptx::pack_bf16(silu(upper[2 * i]) * lower[2 * i], silu(upper[2 * i + 1]) * lower[2 * i + 1]);
      } else {
        results.packed[i] =
            ptx::pack_bf16(activate(p.activation, upper[2 * i]), activate(p.activation, upper[2 * i + 1]));
        results.packed[32 + i] =
            ptx::pack_bf16(activate(p.activation, lower[2 * i]), activate(p.activation, lower[2 * i + 1]));
      }
    }
  };
  if (p.c == nullptr) {
    activate_all();
  } else {
    if (p.act != nullptr) {
      activate_all();
#pragma unroll
      for (int piece = 0; piece < Results<kSwiGLU>::kPieces; ++piece)
        results.store(piece, p, tile, true, staging, warpgroup, thread);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      results.packed[i] = ptx::pack_bf16(upper[2 * i], upper[2 * i + 1]);
      results.packed[32 + i] = ptx::pack_bf16(lower[2 * i], lower[2 * i + 1]);
    }
  }
  results.pin();
}

template <bool kSwiGLU>
__device__ __forceinline__ void consume(const GemmParams& p, Ring<false> ring, std::uint32_t staging,
                                        int warpgroup, int thread) {
  float upper[64], lower[64];
  Results<kSwiGLU> results;
  const Tile* last_tile = nullptr;
  for (int index = 0;; ++index) {
    const Tile* const tile = tile_slot(index);
    ptx::mbarrier_wait(tile_written(index), tile_phase(index));
    const int num_k = tile->num_k;
    if (num_k == 0) break;
    int last = 0;
#define SLUICE_CASE(i)                                                                                    \
  case i:                                                                                                 \
    last = multiply<kSwiGLU, 8 * i>(p, upper, lower, ring, num_k, results, last_tile, staging, warpgroup, \
                                    thread);                                                              \
    break;
    switch (max(1, ceil_div(tile->y_rows, 8))) {
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
        last = multiply<kSwiGLU, kBlockY>(p, upper, lower, ring, num_k, results, last_tile, staging,
                                          warpgroup, thread);
    }
#undef SLUICE_CASE
    if (index > 0) ptx::mbarrier_arrive(tile_read(index - 1));
    ptx::wgmma_wait<0>();
    fence_accumulators(upper);
    fence_accumulators(lower);
    release(ring, last, thread % 32);
    finish_tile<kSwiGLU>(p, tile, upper, lower, results, staging, warpgroup, thread);
    last_tile = tile;
  }
  if (last_tile == nullptr) return;
#pragma unroll
  for (int piece = 0; piece < Results<kSwiGLU>::kPieces; ++piece)
    results.store(piece, p, last_tile, p.c == nullptr, staging, warpgroup, thread);
}

}  // namespace gather

template <bool kSwiGLU>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    gathering_gemm_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ GatherParams p) {
  const std::uint32_t base = ptx::shared_address(gemm_shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::uint32_t rank = ptx::cluster_rank();
  if (warp == 0) {
    count_tiles<GemmOp::kForward>(p.gemm, lane);
  } else if (threadIdx.x == 32) {
    if (base % 1024 != 0) __trap();  // the swizzle needs it
    ptx::prefetch_map(&map_x);
    const Ring<false> ring{base};
    for (int s = 0; s < kStages<false>; ++s) {
      ptx::mbarrier_init(ring.full(s), 1 + gather::kGatherWarps * 32);
      ptx::mbarrier_init(ring.empty(s), kEmptyArrivals);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      ptx::mbarrier_init(tile_written(i), 1);
      ptx::mbarrier_init(tile_read(i), kThreads);  // all read it
    }
    for (int i = 0; i < kTicketSlots; ++i) ptx::mbarrier_init(ticket_barrier(i), 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warp < 4) {
    ptx::registers_fewer<56>();
    gather::produce<kSwiGLU>(p, &map_x, Ring<false>{base}, rank);
  } else {
    ptx::registers_more<224>();
    const int warpgroup = warp / 4 - 1;
    const std::uint32_t staging = base + kStagingOffset + warpgroup * kBuffers * kPieceBytes;
    gather::consume<kSwiGLU>(p.gemm, Ring<false>{base}, staging, warpgroup, threadIdx.x % 128);
  }
  // The other block may still signal this one's barriers.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace sluice::kernels::cuda
