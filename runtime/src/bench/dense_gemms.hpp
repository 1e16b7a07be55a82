// What the arithmetic of a pass costs on a device when nothing is ragged and nothing travels: its GEMMs as one group.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sluice/kernels/device.hpp"
#include "sluice/moe_layer.hpp"

namespace sluice {

inline constexpr int kDenseRuns = 5;

// Adds kDenseRuns times of each pass, by the host's clock from the first call to the end of the last. a: dtype [rows,
// hidden]; w1: dtype [preactivation_cols, hidden]; w2: dtype [hidden, ffn], host memory
void dense_gemms_on_device(kernels::Device& device, const MoeLayerOptions& options, std::int64_t rows,
                           std::span<const std::byte> a, std::span<const std::byte> w1,
                           std::span<const std::byte> w2, std::vector<double>& forward_us,
                           std::vector<double>& backward_us);

}  // namespace sluice
