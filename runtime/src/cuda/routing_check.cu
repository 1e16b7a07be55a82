#include <cuda_runtime.h>

#include <algorithm>

#include "sluice/base/error.hpp"
#include "sluice/runtime/src/cuda/routing_check.hpp"

namespace sluice {

using comm::cuda::check_cuda;

struct RoutingProblem {
  enum class What : std::uint32_t { kRowPtr, kTooMany, kNoArrays, kExpert, kOrder, kWeight };
  std::uint32_t set;  // 2: the rest is there
  What what;
  long long token, value, other;
};

namespace {

constexpr const char* kWhat = "routing check";
constexpr int kThreads = 256;

__device__ void report(RoutingProblem* p, std::uint32_t* bad, RoutingProblem::What what, std::int64_t token,
                       std::int64_t value, std::int64_t other) {
  *static_cast<volatile std::uint32_t*>(bad) = 1;
  if (atomicCAS_system(&p->set, 0u, 1u) != 0) return;
  p->what = what;
  p->token = token;
  p->value = value;
  p->other = other;
  __threadfence_system();
  *static_cast<volatile std::uint32_t*>(&p->set) = 2;
}

// A thread a token.
__global__ void __launch_bounds__(kThreads)
    check_kernel(kernels::cuda::ConstRouting r, std::int64_t num_tokens, std::int64_t max_routes,
                 int num_experts, std::uint32_t* bad, RoutingProblem* problem) {
  using What = RoutingProblem::What;
  const std::int64_t t = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (t >= num_tokens) return;
  const std::int64_t begin = r.row_ptr[t], end = r.row_ptr[t + 1];
  if (begin > end || begin < 0 || (t == 0 && begin != 0))
    return report(problem, bad, What::kRowPtr, t, begin, end);
  if (end > max_routes) return report(problem, bad, What::kTooMany, t, end, max_routes);
  if (begin < end && (r.expert == nullptr || r.weight == nullptr))
    return report(problem, bad, What::kNoArrays, t, end, 0);
  std::int32_t before = -1;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int32_t expert = r.expert[i];
    if (expert < 0 || expert >= num_experts)
      return report(problem, bad, What::kExpert, t, expert, num_experts);
    if (expert <= before) return report(problem, bad, What::kOrder, t, expert, before);
    if (!isfinite(r.weight[i])) return report(problem, bad, What::kWeight, t, expert, 0);
    before = expert;
  }
}
__global__ void __launch_bounds__(kThreads)
    take_kernel(const std::int64_t* from, std::int64_t* to, std::int64_t count, const std::uint32_t* bad) {
  const std::int64_t t = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (t < count) to[t] = *bad != 0 ? 0 : from[t];
}

unsigned blocks_for(std::int64_t n) {
  return static_cast<unsigned>((n + kThreads - 1) / kThreads);
}

}  // namespace

RoutingCheck::RoutingCheck(std::int64_t max_tokens, std::int64_t max_routes, int num_experts)
    : max_routes_(max_routes),
      num_experts_(num_experts),
      row_ptr_(static_cast<std::size_t>(max_tokens + 1), kWhat),
      bad_(1, kWhat) {
  check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&problem_), sizeof *problem_,
                           cudaHostAllocMapped | cudaHostAllocPortable),
             kWhat);
  *problem_ = {};
}
RoutingCheck::~RoutingCheck() {
  cudaFreeHost(problem_);
  cudaGetLastError();
}

kernels::cuda::ConstRouting RoutingCheck::enqueue(const kernels::cuda::ConstRouting& routing,
                                                  std::int64_t num_tokens, comm::cuda::Stream stream) {
  if (num_tokens == 0) {
    check_cuda(cudaMemsetAsync(row_ptr_.get(), 0, sizeof(std::int64_t), stream), kWhat);
  } else {
    check_cuda(cudaMemsetAsync(bad_.get(), 0, bad_.bytes(), stream), kWhat);
    check_kernel<<<blocks_for(num_tokens), kThreads, 0, stream>>>(routing, num_tokens, max_routes_,
                                                                  num_experts_, bad_.get(), problem_);
    take_kernel<<<blocks_for(num_tokens + 1), kThreads, 0, stream>>>(routing.row_ptr, row_ptr_.get(),
                                                                     num_tokens + 1, bad_.get());
    check_cuda(cudaGetLastError(), kWhat);
  }
  return {row_ptr_.get(), routing.expert, routing.weight};
}

void RoutingCheck::throw_if_bad() {
  using What = RoutingProblem::What;
  if (*static_cast<volatile std::uint32_t*>(&problem_->set) != 2) return;
  const RoutingProblem p = *problem_;
  *problem_ = {};
  constexpr auto kCode = ErrorCode::kInvalidRouting;
  switch (p.what) {
    case What::kRowPtr:
      throw Error(kCode, str("the routes of token ", p.token, " are ", p.value, "..", p.other,
                             "; row_ptr must begin with 0 and ascend"));
    case What::kTooMany:
      throw Error(kCode, str("the routes up to token ", p.token, " are ", p.value, ", but there is room for ",
                             p.other, ": max_tokens * max_routes_of_token; make the layer with more"));
    case What::kNoArrays:
      throw Error(kCode, str("there are ", p.value, " routes up to token ", p.token,
                             ", but expert or weight is null"));
    case What::kExpert:
      throw Error(kCode,
                  str("token ", p.token, " has a route to expert ", p.value, "; 0..", p.other - 1, " exist"));
    case What::kOrder:
      throw Error(kCode, str("token ", p.token, " has expert ", p.value, " behind expert ", p.other,
                             "; experts must ascend within a token, each at most once"));
    case What::kWeight:
      throw Error(kCode, str("the weight of token ", p.token, "'s route to expert ", p.value,
                             " is no finite number"));
  }
}

}  // namespace sluice
