// Checks of arguments that every implementation of Kernels makes alike. They throw kInvalidArgument naming
// the argument and cost no allocation when they pass.
#pragma once

#include <cstdint>
#include <span>

#include "sluice/base/tensor_view.hpp"
#include "sluice/kernels/kernels.hpp"

namespace sluice::kernels {

void check_gather_rows(const ConstMatrixView& first, const ConstMatrixView& second,
                       std::span<const std::int32_t> index, const MatrixView& dst);
void check_weighted_reduce(const ConstMatrixView& src, std::span<const std::int64_t> row_ptr,
                           std::span<const std::int32_t> position, std::span<const float> weight,
                           const MatrixView& out);
void check_add_scaled_rows(const ConstMatrixView& x, std::span<const float> scale, const MatrixView& y);
void check_row_dots(const ConstMatrixView& a, std::span<const std::int32_t> a_index, const ConstMatrixView& b,
                    std::span<const std::int32_t> b_index, std::span<const float> out);
void check_forward(const Groups& groups, const ConstMatrixView& a, std::span<const std::int32_t> a_index,
                   std::int64_t out_cols, Activation activation, const MatrixView& h, const MatrixView& act);
void check_dgrad(const Groups& groups, const ConstMatrixView& dc, std::span<const std::int32_t> dc_index,
                 const MatrixView& da);
void check_wgrad(std::span<const std::int64_t> group_ptr, const ConstMatrixView& dc,
                 std::span<const std::int32_t> dc_index, const ConstMatrixView& a,
                 std::span<const std::int32_t> a_index, std::span<float* const> grads);
void check_activation_forward(Activation activation, const ConstMatrixView& h, const MatrixView& act,
                              std::int64_t begin, std::int64_t end);
void check_activation_backward(Activation activation, const ConstMatrixView& h, const ConstMatrixView& u,
                               std::span<const float> weight, std::span<const float> dw, const MatrixView& dh,
                               const MatrixView& wa, std::int64_t begin, std::int64_t end);
void check_adamw(const AdamW& options, std::span<const float> master, std::span<const float> grad,
                 std::span<const float> m, std::span<const float> v, const MatrixView& copy);

}  // namespace sluice::kernels
