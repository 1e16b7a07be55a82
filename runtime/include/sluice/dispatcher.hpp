// Dispatch and combine for frameworks that run their own experts. Two layouts of received rows:
//
//   rank_rows    one row per (token, this rank), in receive order (source rank, token). The caller reduces its experts
//                and hands back one row each; combine adds them up unweighted. dw is the caller's and is carried home.
//   expert_rows  one row per route, expert-major, each local slot's rows starting at a multiple of `alignment` (padding
//                rows are zero). combine is weighted: y_t = sum w * row; backward gives w * dy rows, dw = <dy, row>.
//
// The plan holds the permutations: recv2.token / route_ptr / slot / weight for rank rows, row_of_route() for expert
// rows, and the caller's own route order for dw.
//
// Usage, on every rank, in the same order:
//   auto plan = dispatcher.plan(routing);
//   Context c = dispatcher.dispatch(plan, x);         rows = dispatcher.rows(c)         -> caller's experts
//   dispatcher.combine(c, expert_out, y);
//   dispatcher.combine_backward(c, dy);               drows = dispatcher.rows(c)        -> caller's expert backward
//   dispatcher.dispatch_backward(c, expert_dx, dw_of_routes, dx, dw);
// rows(c) is valid until the next call on the context. Ownership, thread-safety, errors: as moe_layer.hpp; all but
// rows() and row_of_route() block and are collective.
#pragma once

#include "sluice/moe_layer.hpp"

namespace sluice {

enum class RowLayout : std::uint8_t { kRankRows, kExpertRows };

struct DispatcherOptions {
  std::int64_t hidden = 0;
  DType dtype = DType::kF32;
  DType wire_dtype = DType::kF32;
  DType combine_dtype = DType::kF32;
  RowLayout layout = RowLayout::kRankRows;
  std::int64_t alignment = 1;  // rows, kExpertRows only
  Exchange exchange = Exchange::kGateway;
};

class Dispatcher {
 public:
  Dispatcher(Runtime& runtime, Placement placement, const DispatcherOptions& options);
  ~Dispatcher();
  Dispatcher(const Dispatcher&) = delete;
  Dispatcher& operator=(const Dispatcher&) = delete;

  const DispatcherOptions& options() const;
  const Placement& placement() const;

  // Collective. routing: host CSR; read only during the call.
  std::shared_ptr<const Plan> plan(const RoutingView& routing);

  // Sends x to the experts' ranks. x: dtype [num_tokens, hidden]
  Context dispatch(const std::shared_ptr<const Plan>& plan, ConstMatrixView x);
  // What dispatch or combine_backward brought. wire dtype [num_rows, hidden]; rank rows: num_rows = recv2 rows;
  // expert rows: slot_begin().back() rows, padding included.
  ConstMatrixView rows(const Context& context) const;
  // Expert rows only. int64 [num_local_slots + 1]: slot l has rows slot_begin[l] .. + its count; multiples of alignment.
  std::span<const std::int64_t> slot_begin(const Context& context) const;
  // Expert rows only. int32 [recv2 routes]: the row of each received route.
  std::span<const std::int32_t> row_of_route(const Context& context) const;

  // Brings the experts' results home. out: combine dtype, shaped as rows(); y: dtype [num_tokens, hidden]
  void combine(Context& context, ConstMatrixView out, MatrixView y);

  // dy to the experts. Afterwards rows() holds dy (rank rows) or w * dy (expert rows, computed in fp32).
  // With expert rows, `out` must be what combine() was given: dw = <dy, out> comes from it. Else pass an empty view.
  void combine_backward(Context& context, ConstMatrixView dy, ConstMatrixView out);
  // Brings dx and dw home. drows: combine dtype, shaped as rows(); received_dw: f32 [recv2 routes] in receive order,
  // rank rows only (empty for expert rows); dx: dtype [num_tokens, hidden]; dw: f32 [num_routes], caller's route order.
  void dispatch_backward(Context& context, ConstMatrixView drows, std::span<const float> received_dw,
                         MatrixView dx, std::span<float> dw);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sluice
