// gpu_bench() (bench/gpu_bench.hpp) with CUDA.
#pragma once

#include "sluice/runtime/src/bench/gpu_bench.hpp"

namespace sluice {

LayerBenchReport cuda_bench(Runtime& runtime, const LoadedConfig& loaded);

}  // namespace sluice
