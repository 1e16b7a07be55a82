// What the arithmetic of a pass costs on a device when nothing is ragged and nothing travels: its GEMMs as one group.
//
// Ownership: owns its device memory; the device outlives it. Thread-safety: that of the device. Blocking: each call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sluice/kernels/device.hpp"
#include "sluice/moe_layer.hpp"
#include "sluice/runtime/src/device_layer.hpp"

namespace sluice {

class DenseGemms {
 public:
  // a: dtype [rows, hidden]; w1: dtype [preactivation_cols, hidden]; w2: dtype [hidden, ffn], host memory. rows >= 1
  DenseGemms(kernels::Device& device, const MoeLayerOptions& options, std::int64_t rows,
             std::span<const std::byte> a, std::span<const std::byte> w1, std::span<const std::byte> w2);

  // By the host's clock from the first call to the end of the last, in microseconds.
  double forward_us();   // two products
  double backward_us();  // four

 private:
  ConstMatrixView a() const {
    return {x_.span().data(), options_.dtype, rows_, options_.hidden, options_.hidden};
  }
  kernels::Device& device_;
  const MoeLayerOptions& options_;
  const std::int64_t rows_, pre_;
  DeviceCopy<std::byte> x_, w1_, w2_;
  DeviceCopy<std::int64_t> ptr_;
  DeviceRows h_, act_, out_;
  DeviceMemory g1_, g2_;
};

}  // namespace sluice
