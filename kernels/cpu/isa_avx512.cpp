#include "sluice/kernels/cpu/isa.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "sluice/kernels/cpu/simd_avx512.hpp"
//
#include "sluice/kernels/cpu/isa_ops.inl"

namespace sluice::kernels {

const IsaOps* avx512_ops() {
  static constexpr IsaOps kOps = make_ops("avx512");
  static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                                __builtin_cpu_supports("fma");
  return supported ? &kOps : nullptr;
}

}  // namespace sluice::kernels

#else

namespace sluice::kernels {
const IsaOps* avx512_ops() {
  return nullptr;
}
}  // namespace sluice::kernels

#endif
