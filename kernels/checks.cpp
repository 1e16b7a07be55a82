#include "sluice/kernels/checks.hpp"

#include <tuple>

namespace sluice::kernels {

namespace {

constexpr auto kBad = ErrorCode::kInvalidArgument;

// The view has at least `rows` rows of exactly `cols` columns.
void check_view(const ConstMatrixView& view, std::string_view what, std::int64_t rows, std::int64_t cols) {
  Require(view.rows >= rows, kBad, what, " has ", view.rows, " rows, must have at least ", rows);
  require_shape(view, what, view.rows, cols);
}

void check_size(std::size_t size, std::string_view what, std::int64_t at_least) {
  Require(static_cast<std::int64_t>(size) >= at_least, kBad, what, " has ", size,
          " elements, must have at least ", at_least);
}

void check_ascending(std::span<const std::int64_t> ptr, std::string_view what) {
  Require(!ptr.empty(), kBad, what, " is empty, must have one element more than there are groups or rows");
  Require(ptr.front() >= 0, kBad, what, "[0] is ", ptr.front(), ", must not be negative");
  for (std::size_t i = 1; i < ptr.size(); ++i)
    Require(ptr[i] >= ptr[i - 1], kBad, what, "[", i, "] is ", ptr[i], ", less than the ", ptr[i - 1],
            " before it");
}

// Rows are read at positions 0..end-1, through an index or directly.
void check_source(const ConstMatrixView& view, std::string_view what, std::span<const std::int32_t> index,
                  std::string_view index_name, std::int64_t begin, std::int64_t end) {
  if (index.empty()) {
    check_view(view, what, end > begin ? end : 0, view.cols);
  } else {
    check_size(index.size(), index_name, end);
    check_view(view, what, 0, view.cols);
  }
}

void check_groups(const Groups& groups) {
  check_ascending(groups.group_ptr, "group_ptr");
  Require(groups.weights.size() + 1 == groups.group_ptr.size(), kBad, "weights has ", groups.weights.size(),
          " groups, group_ptr has ", groups.num_groups());
  for (std::size_t g = 0; g < groups.weights.size(); ++g)
    Require(groups.weights[g] != nullptr || groups.group_ptr[g] == groups.group_ptr[g + 1], kBad, "weights[",
            g, "] is null but the group has rows");
}

void check_range(std::int64_t begin, std::int64_t end) {
  Require(0 <= begin && begin <= end, kBad, "rows begin..end-1 are ", begin, "..", end,
          ", must satisfy 0 <= begin <= end");
}

void check_activation(Activation activation) {
  Require(activation <= Activation::kRelu, kBad, "activation is ", static_cast<int>(activation),
          ", must be one of kSwiGLU, kGelu, kRelu");
}

}  // namespace

void check_gather_rows(const ConstMatrixView& first, const ConstMatrixView& second,
                       std::span<const std::int32_t> index, const MatrixView& dst) {
  require_shape(dst, "dst", static_cast<std::int64_t>(index.size()), dst.cols);
  if (first.rows > 0) {
    require_shape(first, "first", first.rows, dst.cols);
    Require(first.dtype == dst.dtype, kBad, "first is ", to_string(first.dtype), ", dst is ",
            to_string(dst.dtype));
  }
  if (second.rows > 0) {
    require_shape(second, "second", second.rows, dst.cols);
    Require(second.dtype == dst.dtype, kBad, "second is ", to_string(second.dtype), ", dst is ",
            to_string(dst.dtype));
  }
}

void check_weighted_reduce(const ConstMatrixView& src, std::span<const std::int64_t> row_ptr,
                           std::span<const std::int32_t> position, std::span<const float> weight,
                           const MatrixView& out) {
  Require(static_cast<std::int64_t>(row_ptr.size()) == out.rows + 1, kBad, "row_ptr has ", row_ptr.size(),
          " elements, must have out.rows + 1 = ", out.rows + 1);
  check_ascending(row_ptr, "row_ptr");
  check_size(position.size(), "position", row_ptr.back());
  if (!weight.empty()) check_size(weight.size(), "weight", row_ptr.back());
  require_shape(out, "out", out.rows, out.cols);
  if (row_ptr.back() > row_ptr.front()) require_shape(src, "src", src.rows, out.cols);
}

void check_add_scaled_rows(const ConstMatrixView& x, std::span<const float> scale, const MatrixView& y) {
  require_shape(y, "y", y.rows, y.cols);
  require_shape(x, "x", y.rows, y.cols);
  Require(static_cast<std::int64_t>(scale.size()) == y.rows, kBad, "scale has ", scale.size(),
          " elements, y has ", y.rows, " rows");
}

void check_row_dots(const ConstMatrixView& a, std::span<const std::int32_t> a_index, const ConstMatrixView& b,
                    std::span<const std::int32_t> b_index, std::span<const float> out) {
  const auto n = static_cast<std::int64_t>(out.size());
  Require(a.cols == b.cols, kBad, "a has ", a.cols, " columns, b has ", b.cols);
  for (const auto& [rows, index, name] :
       {std::tuple(a.rows, a_index, "a"), std::tuple(b.rows, b_index, "b")}) {
    Require(index.empty() || static_cast<std::int64_t>(index.size()) == n, kBad, name, "_index has ",
            index.size(), " elements, out has ", n);
    Require(!index.empty() || rows >= n, kBad, name, " has ", rows, " rows, out has ", n, " elements");
  }
}

void check_forward(const Groups& groups, const ConstMatrixView& a, std::span<const std::int32_t> a_index,
                   std::int64_t out_cols, Activation activation, const MatrixView& h, const MatrixView& act) {
  check_groups(groups);
  check_activation(activation);
  const std::int64_t begin = groups.group_ptr.front(), end = groups.group_ptr.back();
  if (begin == end) return;
  check_source(a, "a", a_index, "a_index", begin, end);
  Require(a.cols > 0 && out_cols > 0, kBad, "weights are [", out_cols, ", ", a.cols, "], must not be empty");
  Require(h.data != nullptr || act.data != nullptr, kBad,
          "h and act are both null, at least one must be given");
  if (h.data) check_view(h, "h", end, out_cols);
  if (act.data) {
    Require(activation != Activation::kSwiGLU || out_cols % 2 == 0, kBad, "out_cols is ", out_cols,
            ", must be even for SwiGLU");
    check_view(act, "act", end, activation == Activation::kSwiGLU ? out_cols / 2 : out_cols);
  }
}

void check_dgrad(const Groups& groups, const ConstMatrixView& dc, std::span<const std::int32_t> dc_index,
                 const MatrixView& da) {
  check_groups(groups);
  const std::int64_t begin = groups.group_ptr.front(), end = groups.group_ptr.back();
  if (begin == end) return;
  check_source(dc, "dc", dc_index, "dc_index", begin, end);
  Require(dc.cols > 0 && da.cols > 0, kBad, "weights are [", dc.cols, ", ", da.cols, "], must not be empty");
  check_view(da, "da", end, da.cols);
}

void check_wgrad(std::span<const std::int64_t> group_ptr, const ConstMatrixView& dc,
                 std::span<const std::int32_t> dc_index, const ConstMatrixView& a,
                 std::span<const std::int32_t> a_index, std::span<float* const> grads) {
  check_ascending(group_ptr, "group_ptr");
  Require(grads.size() + 1 == group_ptr.size(), kBad, "grads has ", grads.size(), " groups, group_ptr has ",
          group_ptr.size() - 1);
  for (std::size_t g = 0; g < grads.size(); ++g)
    Require(grads[g] != nullptr || group_ptr[g] == group_ptr[g + 1], kBad, "grads[", g,
            "] is null but the group has rows");
  check_source(dc, "dc", dc_index, "dc_index", group_ptr.front(), group_ptr.back());
  check_source(a, "a", a_index, "a_index", group_ptr.front(), group_ptr.back());
}

void check_activation_forward(Activation activation, const ConstMatrixView& h, const MatrixView& act,
                              std::int64_t begin, std::int64_t end) {
  check_activation(activation);
  check_range(begin, end);
  if (begin == end) return;
  check_view(act, "act", end, act.cols);
  check_view(h, "h", end, preactivation_cols(activation, act.cols));
}

void check_activation_backward(Activation activation, const ConstMatrixView& h, const ConstMatrixView& u,
                               std::span<const float> weight, std::span<const float> dw, const MatrixView& dh,
                               const MatrixView& wa, std::int64_t begin, std::int64_t end) {
  check_activation(activation);
  check_range(begin, end);
  if (begin == end) return;
  check_view(u, "u", end, u.cols);
  check_view(h, "h", end, preactivation_cols(activation, u.cols));
  check_view(dh, "dh", end, h.cols);
  check_view(wa, "wa", end, u.cols);
  Require(dh.dtype == h.dtype, kBad, "dh is ", to_string(dh.dtype), ", h is ", to_string(h.dtype));
  Require(wa.dtype == u.dtype, kBad, "wa is ", to_string(wa.dtype), ", u is ", to_string(u.dtype));
  check_size(weight.size(), "weight", end);
  check_size(dw.size(), "dw", end);
}

void check_adamw(const AdamW& options, std::span<const float> master, std::span<const float> grad,
                 std::span<const float> m, std::span<const float> v, const MatrixView& copy) {
  Require(options.step >= 1, kBad, "step is ", options.step, ", must be at least 1");
  const auto check = [&](std::span<const float> x, std::string_view what) {
    Require(x.size() == master.size(), kBad, what, " has ", x.size(), " elements, master has ",
            master.size());
  };
  check(grad, "grad");
  check(m, "m");
  check(v, "v");
  if (copy.data) require_shape(copy, "copy", 1, static_cast<std::int64_t>(master.size()));
}

}  // namespace sluice::kernels
