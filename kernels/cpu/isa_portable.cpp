#include "sluice/kernels/cpu/isa.hpp"
#include "sluice/kernels/cpu/simd_portable.hpp"
//
#include "sluice/kernels/cpu/isa_ops.inl"

namespace sluice::kernels {

const IsaOps* portable_ops() {
  static constexpr IsaOps kOps = make_ops("portable");
  return &kOps;
}

const IsaOps& best_ops() {
  static const IsaOps* const best = [] {
    if (const IsaOps* ops = avx512_ops()) return ops;
    if (const IsaOps* ops = avx2_ops()) return ops;
    return portable_ops();
  }();
  return *best;
}

}  // namespace sluice::kernels
