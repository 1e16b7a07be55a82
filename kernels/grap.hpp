// GrAP affinities: cosines of token rows with fixed, orthogonal vectors, one an expert: the router of Expert-Token Resonance
// (arXiv 2406.00023 eqs 2-4; the vectors are LocMoE's, arXiv 2401.13920 eq 4).
//
// Expert i of n owns the slice i of hidden / n features; its vector is n/hidden there and 0 elsewhere, of norm
// sqrt(n / hidden). So   delta_ti = sqrt(n / hidden) * (sum of x_t over slice i) / ||x_t||,   and 0 where x_t = 0.
// sum_i delta_ti^2 <= 1. No parameters. Backward, g = d(loss)/d(delta):
//   dx_tj = sqrt(n / hidden) g_ti / ||x_t|| - x_tj / ||x_t||^2 sum_i g_ti delta_ti,   j in slice i
//
// Thread-safety: pure functions. Sums are f64, features ascending: the same bits however tokens are cut.
// Errors: kInvalidArgument for shapes and dtypes, and where hidden is not a multiple of the number of experts.
#pragma once

#include "sluice/base/tensor_view.hpp"

namespace sluice::kernels {

// x: f32 or bf16 [num_tokens, hidden]; out: f32 [num_tokens, num_experts], overwritten
void grap_affinity(ConstMatrixView x, MatrixView out);
// affinity: what grap_affinity() gave for x; d_affinity: f32 [num_tokens, num_experts]; dx: f32 [num_tokens, hidden],
// overwritten
void grap_backward(ConstMatrixView x, ConstMatrixView affinity, ConstMatrixView d_affinity, MatrixView dx);

}  // namespace sluice::kernels
