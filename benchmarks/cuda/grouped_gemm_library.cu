// The grouped GEMMs behind a C function, so that torch_grouped_mm.py can call them in the process, on the tensors and in turns
// with torch._grouped_mm: cards clock by their heat, and times of two processes are not comparable to a few percent.
#include <cstdint>
#include <exception>
#include <string>

#include "sluice/kernels/cuda/grouped_gemm.hpp"

// op: 'f' forward, 'd' dgrad, 'w' wgrad that adds, 'o' wgrad that overwrites. group_ptr: int64 [num_groups + 1]. first: bf16, weights [num_groups, out, in]
// ('f', 'd') or dc [num_rows, out] ('w', 'o'). rows: bf16 [num_rows, in] ('f', 'w', 'o') or dc [num_rows, out] ('d').
// result: bf16 [num_rows, out] ('f') or [num_rows, in] ('d'); f32 [num_groups, out, in] ('w', 'o').
// All device memory. Returns null, or what went wrong (valid until the next call of this thread).
extern "C" const char* sluice_grouped_gemm(char op, const std::int64_t* group_ptr, std::int32_t num_groups,
                                           std::int64_t num_rows, std::int64_t out, std::int64_t in,
                                           const void* first, const void* rows, void* result, void* stream) {
  using namespace sluice::kernels::cuda;
  static thread_local std::string problem;
  try {
    GemmGroups groups;
    groups.group_ptr = group_ptr;
    groups.num_groups = num_groups;
    groups.num_rows = num_rows;
    const GemmWeights weights{first, num_groups, out * in, out, in};
    const auto on = static_cast<Stream>(stream);
    switch (op) {
      case 'f':
        grouped_gemm_forward(groups, weights, {rows, in}, {result, out}, {}, GemmActivation::kNone, on);
        return nullptr;
      case 'd':
        grouped_gemm_dgrad(groups, weights, {rows, out}, {result, in}, on);
        return nullptr;
      case 'w':
      case 'o':
        grouped_gemm_wgrad(groups, {first, out}, out, {rows, in}, in, static_cast<float*>(result), out * in,
                           op == 'w' ? GradientUpdate::kAdd : GradientUpdate::kWrite, on);
        return nullptr;
      default:
        problem = "op must be f, d, w or o";
        return problem.c_str();
    }
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
