// Grouped GEMM for GPUs of compute capability 8.0 or newer that are no Hopper: mma.sync over tiles of 128 x 128 in shared
// memory, four stages of asynchronous copies. The contract is grouped_gemm.hpp's, which checks the arguments and calls
// these; nobody else does. Each checks its launch (kInternal).
#pragma once

#include <cstdint>

#include "sluice/kernels/cuda/grouped_gemm.hpp"

namespace sluice::kernels::cuda::portable {

// gathered.index null: rows lie in gathered.first by position.
void forward(const GemmGroups& groups, const GemmWeights& weights, const GatheredRows& gathered, GemmRows h,
             GemmRows act, GemmActivation activation, int processors, Stream stream);
void dgrad(const GemmGroups& groups, const GemmWeights& weights, ConstGemmRows dc, GemmRows da,
           int processors, Stream stream);
void wgrad(const GemmGroups& groups, ConstGemmRows dc, std::int64_t out, ConstGemmRows a, std::int64_t in,
           float* grads, std::int64_t grad_stride, GradientUpdate update, int processors, Stream stream);

}  // namespace sluice::kernels::cuda::portable
