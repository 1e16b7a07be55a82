// The interface of kernels.hpp over device memory and a stream of the current device.
//
// What a span or view names is DEVICE memory: rows, indices, weights of routes, group_ptr. Only the lists of base
// pointers (Groups::weights, grads) are host memory; their entries are device addresses, all given and evenly spaced
// (one allocation), so that one tensor map covers them. Sizes of spans and shapes of views are the host's bounds; how
// many rows there are is read from group_ptr on the device.
// Calls are queued on the stream and return at once; nothing waits for the device except a call whose scratch must grow
// (gathered operands of a grouped GEMM: the tensor copies read rows as they lie).
// Beyond kernels.hpp: the operands of a grouped GEMM have one dtype (kNotSupported otherwise). bf16 ones have the
// alignment of grouped_gemm.hpp; fp32 ones any, on the plain kernel of fp32_gemm.hpp. Results of bf16 GEMMs, row_dots, dw
// and activations have the order of grouped_gemm.hpp and rows.hpp, so they agree with the CPU within rounding, the other
// calls bit by bit.
#pragma once

#include <memory>

#include "sluice/kernels/cuda/grouped_gemm.hpp"
#include "sluice/kernels/kernels.hpp"

namespace sluice::kernels::cuda {

// Throws kNotSupported without a device of compute capability 8.0 or newer. The stream must outlive the object.
std::unique_ptr<Kernels> make_cuda_kernels(Stream stream, GemmPath path = GemmPath::kBest);

}  // namespace sluice::kernels::cuda
