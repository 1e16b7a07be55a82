#include "sluice/kernels/cpu/isa.hpp"

#if defined(__AVX2__) && defined(__FMA__)

#include "sluice/kernels/cpu/simd_avx2.hpp"
//
#include "sluice/kernels/cpu/isa_ops.inl"

namespace sluice::kernels {

const IsaOps* avx2_ops() {
  static constexpr IsaOps kOps = make_ops("avx2");
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported ? &kOps : nullptr;
}

}  // namespace sluice::kernels

#else

namespace sluice::kernels {
const IsaOps* avx2_ops() {
  return nullptr;
}
}  // namespace sluice::kernels

#endif
