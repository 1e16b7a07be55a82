// The calls of kernels.hpp as plain scalar loops, one line of mathematics each: what every other
// implementation is compared with. Slow on purpose; no threads, no scratch, no library.
//
// GEMMs, weighted_reduce, add_scaled_rows, gather_rows and adamw are bitwise what kernels.hpp promises.
// Activations are evaluated in double precision and rounded once, so they agree with other implementations
// within a few ulp; dw is summed in double.
#pragma once

#include <memory>

#include "sluice/kernels/kernels.hpp"

namespace sluice::kernels {

std::unique_ptr<Kernels> make_reference_kernels();

}  // namespace sluice::kernels
