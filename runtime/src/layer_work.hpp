// What MoeLayer needs from the work of its experts, wherever it is done: moe_layer.cpp has the host's, device_layer.hpp a
// device's. One object serves one storage, pass by pass.
#pragma once

#include <cstdint>
#include <span>

#include "sluice/moe_layer.hpp"
#include "sluice/runtime/src/pass_run.hpp"

namespace sluice {

class LayerPassWork : public ExpertWork {
 public:
  // Before each pass. A backward follows the forward of the same plan.
  virtual void begin(PassRun& pass, const Plan& plan, WeightGradients when) = 0;
  // Adds the weight gradients of some of the last backward's rows: group_ptr: int64 [num_local_slots + 1] into position
  // (int32, of the plan's positions) and row (int32, of the received rows)
  virtual void add_gradients(std::span<const std::int64_t> group_ptr, std::span<const std::int32_t> position,
                             std::span<const std::int32_t> row) = 0;
};

}  // namespace sluice
