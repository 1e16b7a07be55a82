// The Hopper kernel of wgrad, dW_g[o][i] += sum over rows p of group g of dc[p][o] * a[p][i]: X = dc, Y = a, both k outer;
// n in steps of 64; rows past the group's end are zeroed in shared memory. Tiles, clusters and the shares of the two
// consumer warpgroups are as in grouped_gemm_impl.cuh; what differs is that each block of a tile has 128 KB of fp32
// gradients to read and to write.
//
// Gradients go through shared memory in pieces of 32 columns and 64 rows, of which each warpgroup has kSlots there. A warp
// of the producer's warpgroup loads old values as soon as a slot is free, long before they are needed; the consumers add
// their sums in place; the warp stores the slot again and loads the next piece into it. So consumers wait for no store,
// and nothing is added in the memory system (its reductions reach two thirds of the speed of loading and storing).
// The first kAtOnce pieces are added when the tile is done, the others' sums wait in registers for their turns
// between the next tile's matrix instructions.
//
// Where gradients are written, not added to, the same pieces take the same ways but are not loaded.
//
// Groups come by size, the largest first, unless the caller gave an order: the last tiles are then short ones.
#pragma once

#include "sluice/kernels/cuda/grouped_gemm_impl.cuh"

namespace sluice::kernels::cuda::wgrad {

// Blocks of the reduction index half as long as the forward kernel's: a stage is free sooner, and what is added between the
// matrix instructions comes in smaller portions (measured: 64 with 3 stages 0.82, 0.80 instead of 0.85, 0.81).
inline constexpr int kBlockK = 32;
inline constexpr int kBoxBytes = 64 * kBlockK * 2;
inline constexpr int kXBytes = kBlockX / 64 * kBoxBytes;
inline constexpr int kStages = 6;
inline constexpr int kStageBytes = kXBytes + kMaxY / 64 * kBoxBytes;
// A piece of the gradients: 32 columns of a warpgroup's 64 rows.
inline constexpr int kPieceColumns = 32;
inline constexpr int kPieceSums = 16;  // of a thread
static_assert(kPieceBytes == 64 * kPieceColumns * 4);
inline constexpr int kAtOnce = 3;
inline constexpr int kWaiting = kMaxY / kPieceColumns - kAtOnce;
inline constexpr int kSlots = 5;
// A slot's next piece is loaded when the piece after this one is stored.
static_assert(kSlots >= 2);

inline constexpr int kSlotOffset = kStages * kStageBytes;
static_assert(kSlotOffset % 1024 == 0 && kSlotOffset + 2 * kSlots * kPieceBytes <= kBarrierOffset &&
              kStages <= kMaxStages);
// The tiles' counts, which this kernel does not need, make room for its own.
inline constexpr int kSortedOffset = kPrefixOffset;
inline constexpr int kScheduleOffset = kSortedOffset + kMaxGemmGroups * 2;
inline constexpr int kPlaceOffset = kScheduleOffset + 16;
inline constexpr int kSlotBarrierOffset = kPlaceOffset + 2 * kSlots * 16;
static_assert(kPlaceOffset % 16 == 0 && kSlotBarrierOffset + 2 * kSlots * 8 <= kMaxStepOffset);

// Named barriers, a slot's each: its sums are there. 128 consumers arrive, a warp waits.
inline constexpr int kSumsBarrier = kStagingBarrier + 2;
inline constexpr int kSumsThreads = 128 + 32;
static_assert(kSumsBarrier + 2 * kSlots <= 16);

__device__ __forceinline__ int pieces_of(int columns) {
  return ceil_div(columns, kPieceColumns);
}
// After which block of the next tile a waiting piece's sums are added.
__device__ __forceinline__ int block_of(int piece, int num_k) {
  return (piece - kAtOnce + 1) * num_k / (kWaiting + 1);
}

struct Ring {
  std::uint32_t base;
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ std::uint32_t x() const { return base + stage * kStageBytes; }
  __device__ __forceinline__ std::uint32_t y() const { return x() + kXBytes; }
  __device__ __forceinline__ std::uint32_t full(int s) const { return base + kBarrierOffset + s * 8; }
  __device__ __forceinline__ std::uint32_t full() const { return full(stage); }
  __device__ __forceinline__ std::uint32_t empty(int s) const { return full(kStages + s); }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A warpgroup's slots take turns.
struct Slots {
  std::uint32_t base;
  int warpgroup;
  int slot = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ int index() const { return warpgroup * kSlots + slot; }
  __device__ __forceinline__ std::uint32_t data() const { return base + kSlotOffset + index() * kPieceBytes; }
  __device__ __forceinline__ std::uint32_t full() const { return base + kSlotBarrierOffset + index() * 8; }
  __device__ __forceinline__ int sums_barrier() const { return kSumsBarrier + index(); }
  // Column, row and weight of the piece; row -1: past the gradients' end.
  __device__ __forceinline__ int4* place() const {
    return reinterpret_cast<int4*>(gemm_shared + kPlaceOffset) + index();
  }
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// ---- which tile comes when -----------------------------------------------------------------------------------------
struct Schedule {
  int num_groups;  // with rows
  int group_tiles;
};
__device__ __forceinline__ Schedule* schedule() {
  return reinterpret_cast<Schedule*>(gemm_shared + kScheduleOffset);
}
// Positions of the groups with rows, in the order of their turns.
__device__ __forceinline__ std::uint16_t* sorted_groups() {
  return reinterpret_cast<std::uint16_t*>(gemm_shared + kSortedOffset);
}

// By the whole block.
__device__ __forceinline__ void make_schedule(const GemmParams& p) {
  const bool by_size = p.order == nullptr && p.arrival.flags == nullptr;
  int* const rows = reinterpret_cast<int*>(gemm_shared);  // where stages come to lie
  for (int i = threadIdx.x; i < p.num_groups; i += kThreads) rows[i] = group_shape<GemmOp::kWgrad>(p, i).rows;
  __syncthreads();
  int with_rows = 0;
  for (int i = threadIdx.x; i < p.num_groups; i += kThreads) {
    const int mine = rows[i];
    if (mine == 0) continue;
    ++with_rows;
    int rank = 0;
    for (int j = 0; j < p.num_groups; ++j) {
      const bool tied = by_size ? rows[j] == mine : rows[j] > 0;
      rank += (by_size && rows[j] > mine) || (tied && j < i);
    }
    sorted_groups()[rank] = static_cast<std::uint16_t>(i);
  }
  if (threadIdx.x == 0) *schedule() = {0, 0};
  __syncthreads();
  if (with_rows > 0) atomicAdd(&schedule()->num_groups, with_rows);
  if (threadIdx.x == 0) {
    const int x_pairs = ceil_div(p.x_extent, kClusterSize * kBlockX);
    schedule()->group_tiles = ceil_div(p.y_extent, y_step<GemmOp::kWgrad>(p.y_extent)) * x_pairs;
  }
  ptx::fence_proxy_async();  // the stages' memory was used as scratch
  __syncthreads();
}

// The tiles of a cluster, one after the other.
struct Walk {
  int step = 0;
  int begin = 0;  // first row of the tile's group

  // num_k 0: no more.
  __device__ __forceinline__ Tile next(const GemmParams& p) {
    const Schedule s = *schedule();
    const int clusters = gridDim.x / kClusterSize, cluster = blockIdx.x / kClusterSize;
    // Back and forth, so that no cluster gets the longer tiles each time.
    const int tile = step * clusters + (step % 2 == 0 ? cluster : clusters - 1 - cluster);
    ++step;
    if (tile >= s.num_groups * s.group_tiles) return Tile{};
    const int position = tile / s.group_tiles;
    const GroupShape group = group_shape<GemmOp::kWgrad>(p, sorted_groups()[position]);
    begin = group.begin;
    const int local = tile - position * s.group_tiles;
    const int x_pairs = ceil_div(p.x_extent, kClusterSize * kBlockX);
    const int first_y = local / (kSwath * x_pairs) * kSwath;
    const int swath = min(kSwath, group.y_tiles - first_y);
    const int in_swath = local - first_y * x_pairs;
    const int x_pair = in_swath / swath;
    const int y_begin = (first_y + in_swath - x_pair * swath) * group.y_step;
    const int y_rows = min(group.y_step, p.y_extent - y_begin);
    return {ceil_div(group.rows, kBlockK), y_rows, y_begin, x_pair, group.rows, group.weight, {}};
  }
};
__device__ __forceinline__ int first_row(const Tile& tile, int warpgroup) {
  return (tile.x_pair * kClusterSize + static_cast<int>(ptx::cluster_rank())) * kBlockX + warpgroup * 64;
}

// ---- operands ------------------------------------------------------------------------------------------------------
// By two threads, one for the rows of each warpgroup, because one would not keep up.
__device__ __forceinline__ void load_operands(const GemmParams& p, const CUtensorMap* map_x,
                                              const CUtensorMap* map_y, Ring ring, int warpgroup) {
  constexpr std::uint16_t kAll = (1 << kClusterSize) - 1;
  const int box = static_cast<int>(ptx::cluster_rank()) + kClusterSize * warpgroup;
  Walk walk;
  bool expired = false;
  for (int index = 0;; ++index) {
    const Tile tile = walk.next(p);
    if (warpgroup == 0) tell(index, tile);
    if (tile.num_k == 0) return;
    const int x_first = first_row(tile, warpgroup);
    const int boxes = ceil_div(tile.y_rows, 64);
    if (p.arrival.flags != nullptr) {
      wait_for_rows(p.arrival, walk.begin, tile.k_rows, expired);
      ptx::fence_proxy_async();
    }
    for (int kb = 0; kb < tile.num_k; ++kb) {
      ptx::mbarrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
      const std::uint32_t full = ring.full();
      const int row = walk.begin + kb * kBlockK;
      ptx::mbarrier_arrive_expect(full, kBoxBytes + (warpgroup == 0 ? boxes * kBoxBytes : 0));
      ptx::copy_2d(ring.x() + warpgroup * kBoxBytes, map_x, x_first, row, full);
      if (box < boxes)
        ptx::copy_2d_multicast(ring.y() + box * kBoxBytes, map_y, tile.y_first + box * 64, row, full, kAll);
      ring.advance();
    }
  }
}

// ---- gradients -----------------------------------------------------------------------------------------------------
// By a warp for each warpgroup.
template <bool kWrite>
__device__ __forceinline__ void move_gradients(const GemmParams& p, const CUtensorMap* map,
                                               std::uint32_t base, int warpgroup) {
  const bool first = threadIdx.x % 32 == 0;
  Slots load{base, warpgroup}, store{base, warpgroup};
  Walk walk;
  Tile tile = walk.next(p);  // of the next piece to load
  int piece = 0;
  int under_way = 0;  // pieces loaded and not yet stored
  const auto load_piece = [&] {
    if (tile.num_k == 0) return;
    if (first) {
      const int row = first_row(tile, warpgroup), column = tile.y_first + piece * kPieceColumns;
      const bool real = row < p.x_extent;
      *load.place() = make_int4(column, real ? row : -1, tile.weight, 0);
      ptx::mbarrier_arrive_expect(load.full(), real && !kWrite ? kPieceBytes : 0);
      if (real && !kWrite) ptx::copy_3d(load.data(), map, column, row, tile.weight, load.full());
    }
    load.advance();
    ++under_way;
    if (++piece == pieces_of(tile.y_rows)) {
      tile = walk.next(p);
      piece = 0;
    }
  };
  for (int i = 0; i < kSlots; ++i) load_piece();
  for (bool any_before = false; under_way > 0; any_before = true) {
    ptx::named_barrier_sync(store.sums_barrier(), kSumsThreads);
    if (first) {
      const int4 place = *store.place();
      if (place.y >= 0) ptx::store_3d(map, place.x, place.y, place.z, store.data());
      ptx::bulk_commit();
      ptx::bulk_wait_read<1>();
    }
    __syncwarp();
    store.advance();
    --under_way;
    if (any_before) load_piece();  // into the slot of the piece before this one
  }
  if (first) ptx::bulk_wait_read<0>();
}

// ---- consumers -----------------------------------------------------------------------------------------------------
__device__ __forceinline__ void release(const Ring& ring, int stage) {
  const int lane = threadIdx.x % 32;
  if (lane < kClusterSize) ptx::mbarrier_arrive_cluster(ptx::map_shared(ring.empty(stage), lane));
}

// Zeroes rows first..last-1 of boxes of 64 rows of 128 bytes.
__device__ __forceinline__ void zero_rows(std::uint32_t boxes, int num_boxes, int first, int last) {
#pragma unroll 1
  for (int box = 0; box < num_boxes; ++box) {
#pragma unroll 1
    for (int i = first * 8 + static_cast<int>(threadIdx.x % 128); i < last * 8; i += 128)
      ptx::store_shared_16(boxes + box * kBoxBytes + i * 16, uint4{0, 0, 0, 0});
  }
}

template <bool kWrite>
struct Consumer {
  Ring ring;
  Slots slots;

  // Adds a thread's sums to the old values in the next slot.
  __device__ __forceinline__ void add_piece(const float* sums) {
    ptx::mbarrier_wait(slots.full(), slots.phase);
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int line = lane / 4, odd = line % 2;
    // Odd lines take the groups of 8 columns in the order 2, 3, 0, 1, so that 16 lanes meet 32 different banks.
    const std::uint32_t place = slots.data() + (warp * 16 + line) * 128 +
                                ((((odd * 4) ^ (line & 6)) | ((lane % 4 / 2) ^ odd)) << 4) + lane % 2 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 old[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = half * 2 + i / 2, lower = i % 2;
        old[i] = kWrite ? float2{0, 0} : ptx::load_shared_f32x2((place ^ (j << 5)) + lower * 1024);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = half * 2 + i / 2, lower = i % 2;
        const float* even = sums + j * 4 + lower * 2;
        const float* other = sums + (j ^ 2) * 4 + lower * 2;
        ptx::store_shared_f32x2((place ^ (j << 5)) + lower * 1024, old[i].x + (odd ? other[0] : even[0]),
                                old[i].y + (odd ? other[1] : even[1]));
      }
    }
    ptx::fence_proxy_async_shared();
    ptx::named_barrier_arrive(slots.sums_barrier(), kSumsThreads);
    slots.advance();
  }
  __device__ __forceinline__ void add_waiting(const float* sums, int piece) {
    // Registers are indexed with constants only.
#pragma unroll
    for (int i = 0; i < kWaiting; ++i) {
      if (piece == kAtOnce + i) add_piece(sums + kPieceSums * i);
    }
  }

  // Returns the stage whose matrix instructions are still running.
  template <int kN>
  __device__ __forceinline__ int multiply(float (&acc)[128], int num_k, int k_rows, const float* sums,
                                          int last_columns) {
    const int last_pieces = pieces_of(last_columns);
    int piece = kAtOnce;
    int previous = 0;
    for (int kb = 0; kb < num_k; ++kb) {
      ptx::mbarrier_wait(ring.full(), ring.phase);
      const int rows = k_rows - kb * kBlockK;
      if (rows < kBlockK) {
        const int end = ceil_div(rows, 16) * 16;
        zero_rows(ring.x() + slots.warpgroup * kBoxBytes, 1, rows, end);
        zero_rows(ring.y(), ceil_div(kN, 64), rows, end);
        ptx::fence_proxy_async_shared();
        ptx::named_barrier_sync(kStagingBarrier + slots.warpgroup, 128);
      }
      const std::uint64_t x = matrix_descriptor(ring.x() + slots.warpgroup * kBoxBytes, kBoxBytes);
      const std::uint64_t y = matrix_descriptor(ring.y(), kBoxBytes);
      if (rows > 16)
        multiply_block<kN, 2, 1, 1>(acc, x, y, kb != 0);
      else
        multiply_block<kN, 1, 1, 1>(acc, x, y, kb != 0);
      ptx::wgmma_wait<1>();
      if (kb > 0) release(ring, previous);
      previous = ring.stage;
      ring.advance();
      for (; piece < last_pieces && kb == block_of(piece, num_k); ++piece) add_waiting(sums, piece);
    }
    return previous;
  }

  __device__ __forceinline__ void run() {
    float acc[128];
    float sums[kWaiting * kPieceSums];
    int last_columns = 0;  // of the tile before
    for (int index = 0;; ++index) {
      const Tile* const tile = tile_slot(index);
      ptx::mbarrier_wait(tile_written(index), tile_phase(index));
      // The same in every lane, so that they take no registers of each.
      const int num_k = __shfl_sync(0xFFFFFFFFu, tile->num_k, 0);
      const int y_rows = __shfl_sync(0xFFFFFFFFu, tile->y_rows, 0);
      const int k_rows = __shfl_sync(0xFFFFFFFFu, tile->k_rows, 0);
      ptx::mbarrier_arrive(tile_read(index));  // every thread for itself, as it read the slot itself
      if (num_k == 0) break;
      int last = 0;
      if (y_rows > 192)
        last = multiply<256>(acc, num_k, k_rows, sums, last_columns);
      else if (y_rows > 128)
        last = multiply<192>(acc, num_k, k_rows, sums, last_columns);
      else if (y_rows > 64)
        last = multiply<128>(acc, num_k, k_rows, sums, last_columns);
      else
        last = multiply<64>(acc, num_k, k_rows, sums, last_columns);
      ptx::wgmma_wait<0>();
      fence_accumulators(acc);
      release(ring, last);
#pragma unroll
      for (int i = 0; i < kWaiting * kPieceSums; ++i) {
        sums[i] = acc[kAtOnce * kPieceSums + i];
        asm volatile("" : "+f"(sums[i])::"memory");  // here, before the accumulators are used again
      }
#pragma unroll
      for (int piece = 0; piece < kAtOnce; ++piece) {
        if (piece < pieces_of(y_rows)) add_piece(acc + kPieceSums * piece);
      }
      last_columns = y_rows;
    }
    for (int piece = kAtOnce; piece < pieces_of(last_columns); ++piece) add_waiting(sums, piece);
  }
};

template <bool kWrite>
static __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_wgrad_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
                         const __grid_constant__ CUtensorMap map_grads,
                         const __grid_constant__ GemmParams p) {
  const std::uint32_t base = ptx::shared_address(gemm_shared);
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  if (threadIdx.x == 32) {
    if (base % 1024 != 0) __trap();  // the swizzle needs it
    ptx::prefetch_map(&map_x);
    ptx::prefetch_map(&map_y);
    ptx::prefetch_map(&map_grads);
    const Ring ring{base};
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(ring.full(s), 2);                  // the two threads that load
      ptx::mbarrier_init(ring.empty(s), kClusterSize * 8);  // consumer warps
    }
    for (int i = 0; i < 2 * kSlots; ++i) ptx::mbarrier_init(base + kSlotBarrierOffset + i * 8, 1);
    for (int i = 0; i < kTileSlots; ++i) {
      ptx::mbarrier_init(tile_written(i), 1);
      ptx::mbarrier_init(tile_read(i), 256);  // consumer threads
    }
    ptx::fence_mbarrier_init();
  }
  make_schedule(p);
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warp < 4) {
    ptx::registers_fewer<40>();
    if (warp >= 2)
      move_gradients<kWrite>(p, &map_grads, base, warp - 2);
    else if (threadIdx.x % 32 == 0)
      load_operands(p, &map_x, &map_y, Ring{base}, warp);
  } else {
    ptx::registers_more<232>();
    Consumer<kWrite> consumer{Ring{base}, Slots{base, warp / 4 - 1}};
    consumer.run();
  }
  // The other block may still signal this one's barriers.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace sluice::kernels::cuda::wgrad
