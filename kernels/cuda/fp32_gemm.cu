#include <cuda_runtime.h>

#include "sluice/kernels/cuda/fp32_gemm.hpp"
#include "sluice/kernels/cuda/launch.hpp"

namespace sluice::kernels::cuda::fp32 {
namespace {

constexpr auto kBad = ErrorCode::kInvalidArgument;
constexpr int kTile = 64;      // rows and columns of a block's tile
constexpr int kDepth = 16;     // of the reduction index at a time
constexpr int kThreads = 256;  // 16 x 16, each 4 x 4 elements, 16 apart

struct Output {
  float* data = nullptr;  // null: not wanted
  std::int64_t stride = 0;
};

// Tile number -> group and first row. All threads of a block get the same answer; false: no such tile.
__device__ bool find_tile(const Groups& groups, std::int64_t tile, int& group, std::int64_t& first,
                          std::int64_t& end) {
  for (int g = 0; g < groups.num_groups; ++g) {
    const std::int64_t begin = groups.group_ptr[g];
    end = min(groups.group_ptr[g + 1], groups.num_rows);
    if (begin < 0 || begin >= end) continue;
    const std::int64_t tiles = (end - begin + kTile - 1) / kTile;
    if (tile < tiles) {
      group = g;
      first = begin + tile * kTile;
      return true;
    }
    tile -= tiles;
  }
  return false;
}

__device__ float logistic(float x) {
  return 1.0f / (1.0f + expf(-x));
}
template <GemmActivation kActivation>
__device__ float activate(float gate, float up) {
  if constexpr (kActivation == GemmActivation::kSwiGLU) return gate * logistic(gate) * up;
  if constexpr (kActivation == GemmActivation::kGelu)
    return gate * logistic(2.0f * 0.7978845608028654f * fmaf(0.044715f * gate * gate, gate, gate));
  if constexpr (kActivation == GemmActivation::kRelu) return gate > 0.0f ? gate : 0.0f;
  return gate;
}

// C[p, n] = sum over k of rows[row(p)][k] * W[n][k] (kTransposed: W[k][n]). SwiGLU: columns n and cols + n together.
template <GemmActivation kActivation, bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Groups groups, const float* weights, std::int64_t weight_stride, std::int64_t ldw, Rows a,
                std::int64_t cols, std::int64_t depth, Output h, Output act) {
  constexpr int kFactors = kActivation == GemmActivation::kSwiGLU ? 2 : 1;
  __shared__ float as[kDepth][kTile + 1], ws[kFactors][kDepth][kTile + 1];
  int group;
  std::int64_t first, end;
  if (!find_tile(groups, blockIdx.y, group, first, end)) return;
  const float* w = weights + group * weight_stride;
  const std::int64_t n0 = blockIdx.x * std::int64_t{kTile};
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[kFactors][4][4] = {};
  for (std::int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      const int k = i % kDepth, r = i / kDepth;
      const std::int64_t p = first + r;
      float value = 0.0f;
      if (p < end && k0 + k < depth) {
        const std::int64_t row = a.index != nullptr ? a.index[p] : p;
        value = a.data[row * a.stride + k0 + k];
      }
      as[k][r] = value;
      // Neighbouring threads read neighbouring elements either way.
      const int wk = kTransposed ? i / kTile : k, wn = kTransposed ? i % kTile : r;
#pragma unroll
      for (int f = 0; f < kFactors; ++f) {
        const std::int64_t n = n0 + wn + f * cols, depth_at = k0 + wk;
        ws[f][wk][wn] = n0 + wn < cols && depth_at < depth
                            ? w[kTransposed ? depth_at * ldw + n : n * ldw + depth_at]
                            : 0.0f;
      }
    }
    __syncthreads();
    // The last block may be short: terms past the end are left out, so that -0 stays -0.
    const int steps = static_cast<int>(min(static_cast<std::int64_t>(kDepth), depth - k0));
    for (int k = 0; k < steps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int f = 0; f < kFactors; ++f)
            acc[f][i][j] = fmaf(as[k][ty + 16 * i], ws[f][k][tx + 16 * j], acc[f][i][j]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::int64_t p = first + ty + 16 * i;
    if (p >= end) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t n = n0 + tx + 16 * j;
      if (n >= cols) continue;
      if (h.data != nullptr) {
#pragma unroll
        for (int f = 0; f < kFactors; ++f) h.data[p * h.stride + n + f * cols] = acc[f][i][j];
      }
      if constexpr (kActivation != GemmActivation::kNone)
        act.data[p * act.stride + n] = activate<kActivation>(acc[0][i][j], acc[kFactors - 1][i][j]);
    }
  }
}

// One block a tile of one group's gradient.
__global__ void __launch_bounds__(kThreads, 2)
    wgrad_kernel(Groups groups, Rows dc, std::int64_t out, Rows a, std::int64_t in, float* grads,
                 std::int64_t grad_stride) {
  __shared__ float cs[kDepth][kTile + 1], as[kDepth][kTile + 1];
  const std::int64_t begin = groups.group_ptr[blockIdx.z],
                     end = min(groups.group_ptr[blockIdx.z + 1], groups.num_rows);
  if (begin < 0 || begin >= end) return;
  const std::int64_t i0 = blockIdx.x * std::int64_t{kTile}, o0 = blockIdx.y * std::int64_t{kTile};
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float* grad = grads + blockIdx.z * grad_stride;
  float acc[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t o = o0 + ty + 16 * i, c = i0 + tx + 16 * j;
      acc[i][j] = o < out && c < in ? grad[o * in + c] : 0.0f;
    }
  }
  for (std::int64_t p0 = begin; p0 < end; p0 += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      const int k = i / kTile, n = i % kTile;
      const std::int64_t p = p0 + k;
      const bool there = p < end;
      const std::int64_t row_c = !there ? 0 : dc.index != nullptr ? dc.index[p] : p;
      const std::int64_t row_a = !there ? 0 : a.index != nullptr ? a.index[p] : p;
      cs[k][n] = there && o0 + n < out ? dc.data[row_c * dc.stride + o0 + n] : 0.0f;
      as[k][n] = there && i0 + n < in ? a.data[row_a * a.stride + i0 + n] : 0.0f;
    }
    __syncthreads();
    const int steps = static_cast<int>(min(static_cast<std::int64_t>(kDepth), end - p0));
    for (int k = 0; k < steps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(cs[k][ty + 16 * i], as[k][tx + 16 * j], acc[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t o = o0 + ty + 16 * i, c = i0 + tx + 16 * j;
      if (o < out && c < in) grad[o * in + c] = acc[i][j];
    }
  }
}

void check(const Groups& groups, std::int64_t out, std::int64_t in) {
  Require(groups.num_groups >= 1 && groups.num_groups <= kMaxGemmGroups, kBad,
          "fp32 grouped GEMM: ", groups.num_groups, " groups; 1..", kMaxGemmGroups,
          " are possible in one call");
  Require(groups.group_ptr != nullptr, kBad, "fp32 grouped GEMM: group_ptr is null");
  Require(out >= 1 && in >= 1, kBad, "fp32 grouped GEMM: weights are [", out, ", ", in,
          "]; both must be at least 1");
}
unsigned tiles_of(std::int64_t columns) {
  return blocks_for(columns, kTile, "fp32 grouped GEMM");
}
// Row tiles of all groups at most: each group may have a ragged one. The grid's second dimension ends at 65,535.
unsigned row_tiles(const Groups& groups) {
  const std::int64_t tiles = groups.num_rows / kTile + groups.num_groups;
  Require(tiles <= 65535, ErrorCode::kNotSupported, "fp32 grouped GEMM: ", groups.num_rows,
          " rows are more than one call can take (about 4 million)");
  return static_cast<unsigned>(tiles);
}

}  // namespace

void forward(const Groups& groups, const Weights& weights, const Rows& a, MatrixView h, MatrixView act,
             GemmActivation activation, Stream stream) {
  check(groups, weights.out, weights.in);
  Require((activation == GemmActivation::kNone) == (act.data == nullptr), kBad,
          "fp32 grouped GEMM: act must be given with an activation, and only then");
  if (groups.num_rows == 0) return;
  const std::int64_t cols = activation == GemmActivation::kSwiGLU ? weights.out / 2 : weights.out;
  const dim3 grid(tiles_of(cols), row_tiles(groups));
  const Output to_h{reinterpret_cast<float*>(h.data), h.row_stride},
      to_act{reinterpret_cast<float*>(act.data), act.row_stride};
  const auto launch = [&](auto* kernel) {
    kernel<<<grid, kThreads, 0, stream>>>(groups, weights.base, weights.stride, weights.in, a, cols,
                                          weights.in, to_h, to_act);
  };
  switch (activation) {
    case GemmActivation::kNone:
      launch(rows_kernel<GemmActivation::kNone, false>);
      break;
    case GemmActivation::kSwiGLU:
      launch(rows_kernel<GemmActivation::kSwiGLU, false>);
      break;
    case GemmActivation::kGelu:
      launch(rows_kernel<GemmActivation::kGelu, false>);
      break;
    case GemmActivation::kRelu:
      launch(rows_kernel<GemmActivation::kRelu, false>);
      break;
  }
  check_cuda(cudaGetLastError(), "fp32 grouped GEMM: forward");
}

void dgrad(const Groups& groups, const Weights& weights, const Rows& dc, MatrixView da, Stream stream) {
  check(groups, weights.out, weights.in);
  if (groups.num_rows == 0) return;
  const dim3 grid(tiles_of(weights.in), row_tiles(groups));
  rows_kernel<GemmActivation::kNone, true>
      <<<grid, kThreads, 0, stream>>>(groups, weights.base, weights.stride, weights.in, dc, weights.in,
                                      weights.out, {reinterpret_cast<float*>(da.data), da.row_stride}, {});
  check_cuda(cudaGetLastError(), "fp32 grouped GEMM: dgrad");
}

void wgrad(const Groups& groups, const Rows& dc, std::int64_t out, const Rows& a, std::int64_t in,
           float* grads, std::int64_t grad_stride, Stream stream) {
  check(groups, out, in);
  Require(grads != nullptr && grad_stride >= out * in, kBad,
          "fp32 grouped GEMM: grads is null or grad_stride ", grad_stride, " is below out * in = ", out * in);
  if (groups.num_rows == 0) return;
  const dim3 grid(tiles_of(in), tiles_of(out), static_cast<unsigned>(groups.num_groups));
  Require(grid.y <= 65535, ErrorCode::kNotSupported, "fp32 grouped GEMM: ", out,
          " rows of a gradient are too many");
  wgrad_kernel<<<grid, kThreads, 0, stream>>>(groups, dc, out, a, in, grads, grad_stride);
  check_cuda(cudaGetLastError(), "fp32 grouped GEMM: wgrad");
}

}  // namespace sluice::kernels::cuda::fp32
