// An NVIDIA GPU as a Device (device.hpp): one stream of it, and the kernels of cuda_kernels.hpp.
#pragma once

#include <memory>

#include "sluice/kernels/device.hpp"

namespace sluice::kernels::cuda {

// GPUs that this process sees; 0 also where there is no driver.
int num_cuda_devices();
// `index`: 0..num_cuda_devices()-1. Throws kNotSupported without a driver, such a GPU, or compute capability 8.0.
std::unique_ptr<Device> make_cuda_device(int index);

}  // namespace sluice::kernels::cuda
