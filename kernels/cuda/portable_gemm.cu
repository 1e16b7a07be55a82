#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "sluice/kernels/cuda/arrival.cuh"
#include "sluice/kernels/cuda/gemm_activation.cuh"
#include "sluice/kernels/cuda/launch.hpp"
#include "sluice/kernels/cuda/portable_gemm.hpp"

namespace sluice::kernels::cuda::portable {
namespace {

//   forward  C[p, out] = sum over in   A[p, in]   * W[out, in]     A, B: k inner
//   dgrad    C[p, in]  = sum over out  dC[p, out] * W[out, in]     A: k inner, B: k outer
//   wgrad    C[out, in] = sum over p   dC[p, out] * A[p, in]       A, B: k outer
enum class Op { kForward, kForwardSwiGLU, kDgrad, kWgrad };

using Bits = std::uint16_t;  // bf16

constexpr int kTile = 128;  // rows and columns of a block's tile
constexpr int kBlockK = 32;
constexpr int kStages = 4;
constexpr int kThreads = 256;  // 2 x 4 warps of 64 x 32
// Rows of shared memory are padded so that eight of them, 16 bytes each, lie in different banks.
constexpr int kInnerStride = kBlockK + 8;
constexpr int kOuterStride = kTile + 8;
constexpr int kOperandElements = kTile * kInnerStride;
static_assert(kBlockK * kOuterStride <= kOperandElements);
constexpr int kSharedBytes = kStages * 2 * kOperandElements * 2;

struct Params {
  const std::int64_t* group_ptr;
  const std::int32_t* order;
  const std::int32_t* weight_index;
  Arrival arrival;
  std::int64_t num_rows, num_weights;
  int num_groups;
  const Bits* a;  // rows: [num_rows, *]; with an index [a_rows, *]
  std::int64_t a_stride;
  const std::int32_t* index;  // forward: null, or where rows are (GatheredRows)
  const Bits* second;
  std::int64_t second_stride, a_rows, second_rows;
  std::uint32_t* ticket;  // null: tiles by a fixed stride
  unsigned ticket_blocks;
  const Bits* b;  // weights, or rows (wgrad)
  std::int64_t b_stride, b_group_stride;
  int m_extent;  // wgrad: out; else rows of the group
  int n_extent;
  int k_extent;  // wgrad: rows of the group
  GemmActivation activation;
  Bits* c;
  std::int64_t c_stride;
  Bits* act;
  std::int64_t act_stride;
  float* grads;
  std::int64_t grad_stride;
  bool write;  // gradients, instead of adding to them
};

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}
// 16 bytes, or zeros.
__device__ __forceinline__ void copy_16(Bits* to, const Bits* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
template <bool kTransposed>
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], const Bits* from) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(from))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(from))
                 : "memory");
  }
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rows first..first+127 of a k-inner operand, columns k..k+31. `row_of` gives the row, negative for none.
template <typename RowOf>
__device__ __forceinline__ void load_inner(Bits* to, const Bits* from, std::int64_t stride, int k,
                                           int k_extent, const RowOf& row_of) {
#pragma unroll
  for (int step = 0; step < kTile * 4 / kThreads; ++step) {
    const int at = step * kThreads + static_cast<int>(threadIdx.x), line = at / 4, column = at % 4 * 8;
    const std::int64_t row = row_of(line);
    const bool valid = row >= 0 && k + column < k_extent;
    copy_16(to + line * kInnerStride + column, valid ? from + row * stride + k + column : from, valid);
  }
}
// The same of rows where the index says; `index` is of the tile's first row.
__device__ __forceinline__ void load_gathered(Bits* to, const Params& p, const std::int32_t* index, int rows,
                                              int k) {
#pragma unroll
  for (int step = 0; step < kTile * 4 / kThreads; ++step) {
    const int at = step * kThreads + static_cast<int>(threadIdx.x), line = at / 4, column = at % 4 * 8;
    const bool valid = line < rows && k + column < p.k_extent;
    const std::int64_t where = valid ? index[line] : 0;
    const Bits* const row = where < 0 ? p.second + min(~where, p.second_rows - 1) * p.second_stride
                                      : p.a + min(where, p.a_rows - 1) * p.a_stride;
    copy_16(to + line * kInnerStride + column, valid ? row + k + column : p.a, valid);
  }
}
// Rows k..k+31 of a k-outer operand, columns first..first+127.
__device__ __forceinline__ void load_outer(Bits* to, const Bits* from, std::int64_t stride, int k,
                                           int k_extent, int first, int extent) {
#pragma unroll
  for (int step = 0; step < kBlockK * 16 / kThreads; ++step) {
    const int at = step * kThreads + static_cast<int>(threadIdx.x), line = at / 16, column = at % 16 * 8;
    const bool valid = k + line < k_extent && first + column < extent;
    copy_16(to + line * kOuterStride + column, valid ? from + (k + line) * stride + first + column : from,
            valid);
  }
}

struct Group {
  std::int64_t begin;
  int rows, weight;
};
__device__ __forceinline__ Group group_at(const Params& p, int position) {
  Group group{0, 0, 0};
  const int g = p.order != nullptr ? p.order[position] : position;
  if (g < 0 || g >= p.num_groups) return group;
  group.weight = p.weight_index != nullptr ? p.weight_index[g] : g;
  const std::int64_t begin = p.group_ptr[g], end = p.group_ptr[g + 1];
  if (begin < 0 || end > p.num_rows || begin >= end || group.weight < 0 || group.weight >= p.num_weights)
    return group;
  group.begin = begin;
  group.rows = static_cast<int>(end - begin);
  return group;
}
__device__ __forceinline__ int tiles_of(int extent) {
  return (extent + kTile - 1) / kTile;
}

__device__ __forceinline__ void store_pair(Bits* to, float low, float high) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(low, high);
}

template <Op kOp>
__global__ void __launch_bounds__(kThreads, 2) gemm_kernel(const __grid_constant__ Params p) {
  constexpr bool kAOuter = kOp == Op::kWgrad, kBOuter = kOp == Op::kDgrad || kOp == Op::kWgrad;
  extern __shared__ __align__(16) Bits shared[];
  __shared__ int prefix[kMaxGemmGroups + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;
  const int n_tiles = tiles_of(p.n_extent);
  if (warp == 0) {
    int before = 0;
    for (int first = 0; first < p.num_groups; first += 32) {
      const int i = first + lane;
      int tiles = 0;
      if (i < p.num_groups) {
        const Group group = group_at(p, i);
        if (group.rows > 0) tiles = n_tiles * tiles_of(kOp == Op::kWgrad ? p.m_extent : group.rows);
      }
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
  __syncthreads();
  __shared__ int ticket;
  const auto next_tile = [&](int last) {
    if (p.ticket == nullptr)
      return last < 0 ? static_cast<int>(blockIdx.x) : last + static_cast<int>(gridDim.x);
    __syncthreads();  // the last ticket was read
    if (threadIdx.x == 0) {
      const unsigned mine = atomicAdd(p.ticket, 1u);
      // Every block's last ticket is past the tiles; who has the very last one leaves the counter as it was.
      if (mine + 1 == prefix[p.num_groups] + p.ticket_blocks) *p.ticket = 0;
      ticket = static_cast<int>(mine);
    }
    __syncthreads();
    return ticket;
  };
  bool expired = false;
  int position = 0;
  for (int t = next_tile(-1); t < prefix[p.num_groups]; t = next_tile(t)) {
    while (t >= prefix[position + 1]) ++position;
    const Group group = group_at(p, position);
    const int local = t - prefix[position];
    // Tiles of one column of tiles come one after another: they share their weights.
    const int m_tiles = tiles_of(kOp == Op::kWgrad ? p.m_extent : group.rows);
    const int m = local % m_tiles * kTile, n = local / m_tiles * kTile;
    const int k_extent = kOp == Op::kWgrad ? group.rows : p.k_extent;
    if (p.arrival.flags != nullptr) {
      if (threadIdx.x == 0) {
        if constexpr (kOp == Op::kWgrad) {
          wait_for_rows(p.arrival, static_cast<int>(group.begin), group.rows, expired);
        } else if (p.index != nullptr) {
          bool any_second = false;
          for (int row = m; row < min(m + kTile, group.rows); ++row)
            any_second |= p.index[group.begin + row] < 0;
          if (any_second) wait_for_rows(p.arrival, 0, 1, expired);
        } else {
          wait_for_rows(p.arrival, static_cast<int>(group.begin) + m, min(kTile, group.rows - m), expired);
        }
      }
      __syncthreads();
    }
    const Bits* a = p.a + group.begin * p.a_stride;
    const Bits* b =
        kOp == Op::kWgrad ? p.b + group.begin * p.b_stride : p.b + group.weight * p.b_group_stride;
    const auto load = [&](int kb) {
      Bits* const to = shared + kb % kStages * 2 * kOperandElements;
      const int k = kb * kBlockK;
      if (k < k_extent) {
        if constexpr (kAOuter) {
          load_outer(to, a, p.a_stride, k, k_extent, m, p.m_extent);
        } else if (p.index != nullptr) {
          load_gathered(to, p, p.index + group.begin + m, group.rows - m, k);
        } else {
          load_inner(to, a, p.a_stride, k, k_extent,
                     [&](int line) { return m + line < group.rows ? std::int64_t{m + line} : -1; });
        }
        if constexpr (kBOuter) {
          load_outer(to + kOperandElements, b, p.b_stride, k, k_extent, n, p.n_extent);
        } else {
          load_inner(to + kOperandElements, b, p.b_stride, k, k_extent, [&](int line) -> std::int64_t {
            if constexpr (kOp == Op::kForwardSwiGLU) {
              // Rows of W1 and W3 alternate in blocks of 8, so that one thread has both factors of an element.
              const int column = n / 2 + line / 16 * 8 + line % 8, ffn = p.n_extent / 2;
              return column < ffn ? column + (line % 16 < 8 ? 0 : ffn) : -1;
            } else {
              return n + line < p.n_extent ? n + line : -1;
            }
          });
        }
      }
      copy_commit();
    };

    float acc[4][4][4] = {};
    const int num_k = (k_extent + kBlockK - 1) / kBlockK;
    for (int kb = 0; kb < kStages - 1; ++kb) load(kb);
    for (int kb = 0; kb < num_k; ++kb) {
      copy_wait<kStages - 2>();
      __syncthreads();
      load(kb + kStages - 1);
      const Bits* const sa = shared + kb % kStages * 2 * kOperandElements;
      const Bits* const sb = sa + kOperandElements;
#pragma unroll
      for (int k = 0; k < kBlockK; k += 16) {
        std::uint32_t fa[4][4], fb[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp_m + i * 16;
          if constexpr (kAOuter) {
            load_matrix_x4<true>(fa[i],
                                 sa + (k + lane / 16 * 8 + lane % 8) * kOuterStride + row + lane / 8 % 2 * 8);
          } else {
            load_matrix_x4<false>(fa[i], sa + (row + lane % 16) * kInnerStride + k + lane / 16 * 8);
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = warp_n + j * 16;
          if constexpr (kBOuter) {
            load_matrix_x4<true>(
                fb[j], sb + (k + lane / 8 % 2 * 8 + lane % 8) * kOuterStride + column + lane / 16 * 8);
          } else {
            load_matrix_x4<false>(
                fb[j], sb + (column + lane / 16 * 8 + lane % 8) * kInnerStride + k + lane / 8 % 2 * 8);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            multiply_add(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
      }
    }
    copy_wait<0>();
    __syncthreads();  // the next tile's copies overwrite what was read here

    // Fragment: rows lane / 4 and 8 below, columns 2 (lane % 4) and the next.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m + warp_m + i * 16 + half * 8 + lane / 4;
        if (row >= (kOp == Op::kWgrad ? p.m_extent : group.rows)) continue;
        const std::int64_t absolute = group.begin + row;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float x = acc[i][j][half * 2], y = acc[i][j][half * 2 + 1];
          if constexpr (kOp == Op::kForwardSwiGLU) {
            const int ffn = p.n_extent / 2;
            const int column = (n + warp_n) / 2 + j / 2 * 8 + lane % 4 * 2;
            if (column >= ffn) continue;
            if (p.c != nullptr) store_pair(p.c + absolute * p.c_stride + column + j % 2 * ffn, x, y);
            if (j % 2 == 1)
              store_pair(p.act + absolute * p.act_stride + column, silu(acc[i][j - 1][half * 2]) * x,
                         silu(acc[i][j - 1][half * 2 + 1]) * y);
          } else {
            const int column = n + warp_n + j * 8 + lane % 4 * 2;
            if (column >= p.n_extent) continue;
            if constexpr (kOp == Op::kWgrad) {
              auto* const to = reinterpret_cast<float2*>(p.grads + group.weight * p.grad_stride +
                                                         std::int64_t{row} * p.n_extent + column);
              const float2 old = p.write ? float2{0, 0} : *to;
              *to = make_float2(old.x + x, old.y + y);
            } else {
              if (p.c != nullptr) store_pair(p.c + absolute * p.c_stride + column, x, y);
              if (kOp == Op::kForward && p.act != nullptr)
                store_pair(p.act + absolute * p.act_stride + column, activate(p.activation, x),
                           activate(p.activation, y));
            }
          }
        }
      }
    }
  }
}

Params group_params(const GemmGroups& groups) {
  Params p{};
  p.ticket = groups.tickets.next;
  p.group_ptr = groups.group_ptr;
  p.order = groups.order;
  p.weight_index = groups.weight_index;
  p.arrival = groups.arrival;
  p.num_rows = groups.num_rows;
  p.num_groups = groups.num_groups;
  return p;
}

template <Op kOp>
void launch(const GemmGroups& groups, const Params& p, int processors, Stream stream) {
  check_cuda(
      cudaFuncSetAttribute(gemm_kernel<kOp>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "grouped GEMM: cudaFuncSetAttribute");
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, gemm_kernel<kOp>, kThreads, kSharedBytes),
             "grouped GEMM: cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  Require(blocks > 0, ErrorCode::kNotSupported, "grouped GEMM: this device has less than ", kSharedBytes,
          " bytes of shared memory a block");
  const int sms = groups.max_sms > 0 && groups.max_sms < processors ? groups.max_sms : processors;
  const auto grid = static_cast<unsigned>(sms * blocks);
  Params q = p;
  q.ticket_blocks = groups.tickets.sms > 0 ? static_cast<unsigned>(groups.tickets.sms * blocks) : grid;
  gemm_kernel<kOp><<<grid, kThreads, kSharedBytes, stream>>>(q);
  check_cuda(cudaGetLastError(), "grouped GEMM: launch");
}

}  // namespace

void forward(const GemmGroups& groups, const GemmWeights& weights, const GatheredRows& gathered, GemmRows h,
             GemmRows act, GemmActivation activation, int processors, Stream stream) {
  Params p = group_params(groups);
  p.num_weights = weights.num_weights;
  p.a = static_cast<const Bits*>(gathered.first.data);
  p.a_stride = gathered.first.stride;
  p.a_rows = gathered.first_rows;
  p.index = gathered.index;
  p.second = static_cast<const Bits*>(gathered.second.data);
  p.second_stride = gathered.second.stride;
  p.second_rows = gathered.second_rows;
  p.b = static_cast<const Bits*>(weights.base);
  p.b_stride = weights.in;
  p.b_group_stride = weights.stride;
  p.n_extent = static_cast<int>(weights.out);
  p.k_extent = static_cast<int>(weights.in);
  p.activation = activation;
  p.c = static_cast<Bits*>(h.data);
  p.c_stride = h.stride;
  p.act = static_cast<Bits*>(act.data);
  p.act_stride = act.stride;
  if (activation == GemmActivation::kSwiGLU) {
    launch<Op::kForwardSwiGLU>(groups, p, processors, stream);
  } else {
    launch<Op::kForward>(groups, p, processors, stream);
  }
}

void dgrad(const GemmGroups& groups, const GemmWeights& weights, ConstGemmRows dc, GemmRows da,
           int processors, Stream stream) {
  Params p = group_params(groups);
  p.num_weights = weights.num_weights;
  p.a = static_cast<const Bits*>(dc.data);
  p.a_stride = dc.stride;
  p.b = static_cast<const Bits*>(weights.base);
  p.b_stride = weights.in;
  p.b_group_stride = weights.stride;
  p.n_extent = static_cast<int>(weights.in);
  p.k_extent = static_cast<int>(weights.out);
  p.c = static_cast<Bits*>(da.data);
  p.c_stride = da.stride;
  launch<Op::kDgrad>(groups, p, processors, stream);
}

void wgrad(const GemmGroups& groups, ConstGemmRows dc, std::int64_t out, ConstGemmRows a, std::int64_t in,
           float* grads, std::int64_t grad_stride, GradientUpdate update, int processors, Stream stream) {
  Params p = group_params(groups);
  p.num_weights = groups.num_groups;
  p.a = static_cast<const Bits*>(dc.data);
  p.a_stride = dc.stride;
  p.b = static_cast<const Bits*>(a.data);
  p.b_stride = a.stride;
  p.m_extent = static_cast<int>(out);
  p.n_extent = static_cast<int>(in);
  p.grads = grads;
  p.grad_stride = grad_stride;
  p.write = update == GradientUpdate::kWrite;
  launch<Op::kWgrad>(groups, p, processors, stream);
}

}  // namespace sluice::kernels::cuda::portable
