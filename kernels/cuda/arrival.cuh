// Waiting on the device for rows that others write while the kernel runs. Device code only; any architecture.
#pragma once

#include <cstdint>

#include "sluice/kernels/cuda/grouped_gemm.hpp"

namespace sluice::kernels::cuda {

__device__ __forceinline__ std::uint32_t load_acquire_system(const std::uint32_t* pointer) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}
__device__ __forceinline__ std::uint64_t global_timer_ns() {
  std::uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// Waits for the flags over rows first..first+rows-1. After one deadline passed nothing is waited for any more.
__device__ __forceinline__ void wait_for_rows(const Arrival& arrival, int first, int rows, bool& expired) {
  const std::uint32_t last_flag = (first + rows - 1) / arrival.rows_per_flag;
  for (std::uint32_t flag = first / arrival.rows_per_flag; flag <= last_flag && !expired; ++flag) {
    std::uint32_t seen = load_acquire_system(arrival.flags + flag);
    if (static_cast<std::int32_t>(seen - arrival.value) >= 0) continue;
    const std::uint64_t start = global_timer_ns();
    while (static_cast<std::int32_t>((seen = load_acquire_system(arrival.flags + flag)) - arrival.value) <
           0) {
      if (global_timer_ns() - start > arrival.timeout_ns) {
        expired = true;
        if (atomicCAS_system(&arrival.diagnosis->expired, 0u, 1u) == 0) {
          arrival.diagnosis->flag_index = flag;
          arrival.diagnosis->expected = arrival.value;
          arrival.diagnosis->observed = seen;
          __threadfence_system();
        }
        break;
      }
    }
  }
}

}  // namespace sluice::kernels::cuda
