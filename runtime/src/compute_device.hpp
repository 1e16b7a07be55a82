// The device of RuntimeOptions::device, where this build has one.
#pragma once

#include <memory>
#include <string>

#include "sluice/kernels/device.hpp"
#include "sluice/runtime.hpp"

namespace sluice {

// The GPU of the rank that is `rank_in_node`-th of its node: GPUs are taken in turns. Throws kNotSupported where the build
// has no CUDA kernels, or no GPU is there.
std::unique_ptr<kernels::Device> make_compute_device(int rank_in_node);

// GPUs that this process sees; 0 also in a build without CUDA kernels.
int num_gpus();

// Host memory of the device's choice for context buffers. The device must outlive them.
Allocator device_allocator(kernels::Device& device);

// What the runtime's experts are computed on, for reports.
std::string device_name(Runtime& runtime);

}  // namespace sluice
