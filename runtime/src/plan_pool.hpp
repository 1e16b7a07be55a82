// Plans whose memory is reused: a plan goes back when its last user lets go of it, and comes out again with its
// capacity. So a training step allocates nothing once sizes have settled.
#pragma once

#include <memory>
#include <vector>

#include "sluice/scheduler/plan.hpp"

namespace sluice {

class PlanPool {
 public:
  // A plan that nobody else holds. One thread at a time.
  std::shared_ptr<Plan> acquire() {
    for (auto& plan : plans_)
      if (plan.use_count() == 1) return plan;
    plans_.push_back(std::make_shared<Plan>());
    return plans_.back();
  }
  std::int64_t capacity_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& plan : plans_) bytes += plan->capacity_bytes();
    return bytes;
  }

 private:
  std::vector<std::shared_ptr<Plan>> plans_;
};

}  // namespace sluice
