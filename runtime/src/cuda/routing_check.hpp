// Looks at a routing in device memory before a plan is built from it: a plan takes rows and experts as indices.
//
// Ownership: the checker owns its copy of row_ptr and the record; the routing is the caller's. Thread-safety: one thread at a
// time. Blocking: constructor and destructor; enqueue() none; throw_if_bad() none, after the stream was waited for.
// Errors: kInvalidRouting, naming the first token found, the value and what was allowed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sluice/comm/cuda/device_memory.hpp"
#include "sluice/kernels/cuda/routing.hpp"

namespace sluice {

struct RoutingProblem;  // pinned host memory

class RoutingCheck {
 public:
  RoutingCheck(std::int64_t max_tokens, std::int64_t max_routes, int num_experts);
  ~RoutingCheck();
  RoutingCheck(const RoutingCheck&) = delete;
  RoutingCheck& operator=(const RoutingCheck&) = delete;

  // The routing to plan with: the given one, or of as many tokens without routes where it is none. Valid until the next call.
  kernels::cuda::ConstRouting enqueue(const kernels::cuda::ConstRouting& routing, std::int64_t num_tokens,
                                      comm::cuda::Stream stream);
  std::size_t memory_bytes() const { return row_ptr_.bytes() + bad_.bytes(); }
  // Of all calls since the last throw.
  void throw_if_bad();

 private:
  const std::int64_t max_routes_;
  const int num_experts_;
  comm::cuda::DeviceMemory<std::int64_t> row_ptr_;
  comm::cuda::DeviceMemory<std::uint32_t> bad_;
  RoutingProblem* problem_ = nullptr;
};

}  // namespace sluice
