// Activations in the epilogue of a GEMM: fp32 in and out, rounded to bf16 afterwards. Device code only; any architecture.
#pragma once

#include "sluice/kernels/cuda/grouped_gemm.hpp"

namespace sluice::kernels::cuda {

__device__ __forceinline__ float gelu(float x) {
  // x * (1 + tanh(u)) / 2 = x / (1 + exp(-2u))
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-2.0f * u));
}
__device__ __forceinline__ float silu(float x) {
  return __fdividef(x, 1.0f + __expf(-x));
}
__device__ __forceinline__ float activate(GemmActivation activation, float x) {
  if (activation == GemmActivation::kGelu) return gelu(x);
  return activation == GemmActivation::kRelu ? fmaxf(x, 0.0f) : x;
}

}  // namespace sluice::kernels::cuda
