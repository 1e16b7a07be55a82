// CPU kernels over a chosen instruction set, for tests and benchmarks that compare them; everyone else calls
// make_cpu_kernels(num_threads) of kernels.hpp, which takes best_ops().
#pragma once

#include <memory>

#include "sluice/kernels/cpu/isa.hpp"
#include "sluice/kernels/kernels.hpp"

namespace sluice::kernels {

// ops: one of the tables of isa.hpp, not null
std::unique_ptr<Kernels> make_cpu_kernels(const IsaOps& ops, int num_threads);

}  // namespace sluice::kernels
