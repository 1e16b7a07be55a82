// Grouped GEMM in fp32 on an NVIDIA GPU (any of compute capability 8.0 or newer): plain multiply-adds, no tensor cores.
// For models whose experts are fp32, and for tests; bf16 is what grouped_gemm.hpp is fast for.
//
// Result contract: kernels.hpp's, to the bit: each element is one chain of fused multiply-adds, the reduction index
// ascending. Ownership, thread-safety, blocking: as grouped_gemm.hpp. Errors: null pointers and extents give
// kInvalidArgument, a failing launch kInternal. Alignment: any. What lies in device memory is trusted, but rows outside
// 0..num_rows-1 are never touched.
#pragma once

#include <cstdint>

#include "sluice/base/tensor_view.hpp"
#include "sluice/kernels/cuda/grouped_gemm.hpp"

namespace sluice::kernels::cuda::fp32 {

struct Groups {
  const std::int64_t* group_ptr = nullptr;  // int64 [num_groups + 1], ascending
  int num_groups = 0;                       // <= kMaxGemmGroups
  std::int64_t num_rows = 0;                // positions that exist, >= group_ptr[num_groups]
};
// f32 [num_groups][out, in], row-major: group g at base + g * stride elements.
struct Weights {
  const float* base = nullptr;
  std::int64_t stride = 0;
  std::int64_t out = 0, in = 0;
};
// Rows of a matrix by position: row(p) = index null ? p : index[p].
struct Rows {
  const float* data = nullptr;
  std::int64_t stride = 0;
  const std::int32_t* index = nullptr;  // int32 [num_rows]
};

// h[p] = W_g a[row(p)]; act[p] = activation(h[p]). h: f32 [num_rows, out] or null data; act: f32 [num_rows, out, or out/2
// for SwiGLU] or null data, and then activation is kNone.
void forward(const Groups& groups, const Weights& weights, const Rows& a, MatrixView h, MatrixView act,
             GemmActivation activation, Stream stream);
// da[p] = W_g^T dc[row(p)].  da: f32 [num_rows, in]
void dgrad(const Groups& groups, const Weights& weights, const Rows& dc, MatrixView da, Stream stream);
// dW_g[o][i] += dc[row_c(p)][o] * a[row_a(p)][i] over the rows p of group g, in order.
// grads: f32 [num_groups][out, in], group g at base + g * grad_stride elements
void wgrad(const Groups& groups, const Rows& dc, std::int64_t out, const Rows& a, std::int64_t in,
           float* grads, std::int64_t grad_stride, Stream stream);

}  // namespace sluice::kernels::cuda::fp32
