#include "sluice/dispatcher.hpp"

#include <algorithm>
#include <cstring>

#include "sluice/base/hash.hpp"
#include "sluice/runtime/src/context_storage.hpp"
#include "sluice/runtime/src/executor.hpp"
#include "sluice/runtime/src/pass_run.hpp"
#include "sluice/runtime/src/plan_exchange.hpp"
#include "sluice/runtime/src/plan_pool.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {

struct Dispatcher::State {
  Runtime& runtime;
  Placement placement;
  DispatcherOptions options;
  Template shape;
  PassFormat format;
  std::shared_ptr<ContextPool> pool;
  PlanPool plans;
  PlanExchange exchange;
  GrowArray<std::int64_t> one_each;  // int64 [n + 1], 0, 1, 2, ...
  GrowArray<std::int32_t> row_of_received_route;

  State(Runtime& r, Placement p, const DispatcherOptions& o)
      : runtime(r),
        placement(std::move(p)),
        options(o),
        shape(build_template(r.rank(), r.topology(), {SchedulePolicy::kSequential, o.exchange, 1})),
        format{o.hidden, o.wire_dtype, o.combine_dtype},
        pool(std::make_shared<ContextPool>(r, num_signals(r.num_ranks(), 1))),
        exchange(r, placement, {o.exchange, 1}) {
    Require(
        !r.state().gpu_group, ErrorCode::kNotSupported,
        "a dispatcher moves rows through host memory; choose a transport of the host (shm, tcp), not nvlink "
        "or nccl");
    Require(o.hidden >= 1, ErrorCode::kInvalidArgument, "hidden is ", o.hidden, ", must be at least 1");
    Require(o.alignment >= 1, ErrorCode::kInvalidArgument, "alignment is ", o.alignment,
            ", must be at least 1");
    for (std::int32_t e = 0; e < placement.num_experts; ++e)
      Require(!placement.everywhere(ExpertId(e)), ErrorCode::kNotSupported, "expert ", e, " is of kind ",
              to_string(placement.kind[static_cast<std::size_t>(e)]),
              "; a dispatcher's caller computes experts itself and keeps such routes out of the routing");
  }

  bool expert_layout() const { return options.layout == RowLayout::kExpertRows; }

  void lay_out(const Plan& plan, ContextStorage& s) {
    ExpertRows& e = s.expert_rows;
    const auto slots = static_cast<std::size_t>(plan.num_local_slots);
    e.slot_begin.resize(slots + 1);
    std::int64_t at = 0;
    for (std::size_t l = 0; l < slots; ++l) {
      e.slot_begin[l] = at;
      const std::int64_t rows = plan.slot_ptr[l + 1] - plan.slot_ptr[l];
      at += (rows + options.alignment - 1) / options.alignment * options.alignment;
    }
    e.slot_begin[slots] = at;
    const auto routes = static_cast<std::size_t>(plan.num_positions());
    e.row_of_route.resize(routes);
    for (std::size_t q = 0; q < routes; ++q) {
      const auto l = static_cast<std::size_t>(plan.recv2.slot[q]);
      e.row_of_route[q] =
          static_cast<std::int32_t>(e.slot_begin[l] + plan.position_of_route[q] - plan.slot_ptr[l]);
    }
    e.rows.resize(at, options.hidden, options.wire_dtype);
    one_each.resize(routes + 1);
    for (std::size_t i = 0; i <= routes; ++i) one_each[i] = static_cast<std::int64_t>(i);
  }

  // Fills expert rows from received rows, each times its weight if weighted; padding becomes zero.
  void fill(const Plan& plan, ContextStorage& s, const RowBuffer& received, bool weighted) {
    ExpertRows& e = s.expert_rows;
    for (std::size_t l = 0; l < static_cast<std::size_t>(plan.num_local_slots); ++l) {
      const std::int64_t p0 = plan.slot_ptr[l], n = plan.slot_ptr[l + 1] - p0;
      const std::int64_t first = e.slot_begin[l], end = e.slot_begin[l + 1];
      if (n > 0)
        runtime.kernels().weighted_reduce(
            received.view(), one_each.span(static_cast<std::size_t>(p0), static_cast<std::size_t>(n) + 1),
            plan.expert_row, weighted ? std::span<const float>(plan.expert_weight) : std::span<const float>(),
            e.rows.rows(first, first + n));
      const auto padding = e.rows.bytes(first + n, end);
      if (!padding.empty()) std::memset(padding.data(), 0, padding.size());
    }
  }
};

namespace {

// Brings a caller's rows to where they leave from, and dw with them.
class RowsWork : public ExpertWork {
 public:
  RowsWork(PassRun& pass, const Plan& plan, ConstMatrixView rows, const ExpertRows* expert_rows,
           std::span<const float> dw)
      : pass_(pass), plan_(plan), rows_(rows), expert_rows_(expert_rows), dw_(dw) {}

  void run(const Op& op) override {
    if (op.kind != OpKind::kReduce) return;  // the caller's own work
    if (!expert_rows_) {
      pass_.reduce_none(rows_, op);
    } else {
      pass_.reduce_rows(
          rows_, expert_rows_->row_of_route,
          pass_.is_backward() ? std::span<const float>() : std::span<const float>(plan_.recv2.weight), op);
    }
    if (pass_.is_backward()) pass_.send_dw(dw_, {}, op);
  }

 private:
  PassRun& pass_;
  const Plan& plan_;
  ConstMatrixView rows_;
  const ExpertRows* expert_rows_;
  std::span<const float> dw_;
};

}  // namespace

Dispatcher::Dispatcher(Runtime& runtime, Placement placement, const DispatcherOptions& options)
    : state_(std::make_unique<State>(runtime, std::move(placement), options)) {}
Dispatcher::~Dispatcher() = default;

const DispatcherOptions& Dispatcher::options() const {
  return state_->options;
}
const Placement& Dispatcher::placement() const {
  return state_->placement;
}

std::shared_ptr<const Plan> Dispatcher::plan(const RoutingView& routing) {
  State& s = *state_;
  std::shared_ptr<Plan> plan = s.plans.acquire();
  s.exchange.build(routing, *plan,
                   Hasher()
                       .add_int(s.options.hidden)
                       .add_int(static_cast<int>(s.options.layout))
                       .add_int(static_cast<int>(s.options.wire_dtype))
                       .add_int(static_cast<int>(s.options.combine_dtype))
                       .add(s.pool->state_hash())
                       .value());
  return plan;
}

namespace {

void check_view(const ConstMatrixView& view, std::string_view what, std::int64_t rows, std::int64_t cols,
                DType dtype) {
  require_shape(view, what, rows, cols);
  Require(view.dtype == dtype, ErrorCode::kInvalidArgument, what, " is ", to_string(view.dtype), ", must be ",
          to_string(dtype));
}

void require_own(bool valid, bool own, std::string_view call) {
  Require(valid, ErrorCode::kInvalidState, call, " was given an empty context");
  Require(own, ErrorCode::kInvalidState, call, " was given a context of another dispatcher or of a layer");
}

ContextStorage& require_open(ContextStorage* storage, bool open, bool backward, std::string_view call,
                             std::string_view needs) {
  const std::optional<PassRun>& pass = storage->pass->run;
  const bool is_open = pass && pass->is_backward() == backward;
  Require(is_open == open && (open || !pass), ErrorCode::kInvalidState, call, " needs ", needs,
          " on this context before it");
  return *storage;
}

}  // namespace

Context Dispatcher::dispatch(const std::shared_ptr<const Plan>& plan, ConstMatrixView x) {
  State& s = *state_;
  Require(plan != nullptr, ErrorCode::kInvalidArgument, "dispatch was given no plan");
  s.exchange.require_own(*plan, "dispatch");
  check_view(x, "x", plan->num_tokens, s.options.hidden, s.options.dtype);
  Context context;
  context.plan_ = plan;
  context.pool_ = s.pool;
  context.storage_ = &s.pool->acquire();
  ContextStorage& storage = *context.storage_;
  run_in_flight(s.runtime, storage, "dispatch", [&] {
    PassRun& pass =
        storage.pass->run.emplace(s.runtime, s.shape, *plan, s.format, storage, PassKind::kForward);
    pass.start(x);
    pass.run_dispatch();
    if (s.expert_layout()) {
      s.lay_out(*plan, storage);
      s.fill(*plan, storage, pass.received(), false);
    }
  });
  return context;
}

ConstMatrixView Dispatcher::rows(const Context& context) const {
  require_own(context.valid(), context.pool_ == state_->pool, "rows");
  Require(context.storage_->pass->run.has_value(), ErrorCode::kInvalidState,
          "there are rows only between dispatch and combine, or combine_backward and dispatch_backward");
  const ContextStorage& storage = *context.storage_;
  return state_->expert_layout() ? storage.expert_rows.rows.view() : storage.pass->run->received().view();
}

std::span<const std::int64_t> Dispatcher::slot_begin(const Context& context) const {
  require_own(context.valid(), context.pool_ == state_->pool, "slot_begin");
  Require(state_->expert_layout(), ErrorCode::kInvalidState, "only expert rows have slot_begin");
  return context.storage_->expert_rows.slot_begin;
}

std::span<const std::int32_t> Dispatcher::row_of_route(const Context& context) const {
  require_own(context.valid(), context.pool_ == state_->pool, "row_of_route");
  Require(state_->expert_layout(), ErrorCode::kInvalidState, "only expert rows have row_of_route");
  return context.storage_->expert_rows.row_of_route;
}

void Dispatcher::combine(Context& context, ConstMatrixView out, MatrixView y) {
  State& s = *state_;
  require_own(context.valid(), context.pool_ == s.pool, "combine");
  ContextStorage& storage = require_open(context.storage_, true, false, "combine", "dispatch");
  const ConstMatrixView shape = rows(context);
  check_view(out, "out", shape.rows, shape.cols, s.options.combine_dtype);
  check_view(y, "y", context.plan_->num_tokens, s.options.hidden, s.options.dtype);
  run_in_flight(s.runtime, storage, "combine", [&] {
    PassRun& pass = *storage.pass->run;
    RowsWork work(pass, *context.plan_, out, s.expert_layout() ? &storage.expert_rows : nullptr, {});
    pass.set_work(work, y, {});
    s.runtime.state().executor->finish(pass);
  });
  storage.pass->run.reset();
}

void Dispatcher::combine_backward(Context& context, ConstMatrixView dy, ConstMatrixView out) {
  State& s = *state_;
  require_own(context.valid(), context.pool_ == s.pool, "combine_backward");
  ContextStorage& storage = require_open(context.storage_, false, true, "combine_backward", "combine (once)");
  const Plan& plan = *context.plan_;
  check_view(dy, "dy", plan.num_tokens, s.options.hidden, s.options.dtype);
  if (s.expert_layout()) {
    check_view(out, "out", storage.expert_rows.rows.view().rows, s.options.hidden, s.options.combine_dtype);
  } else {
    Require(out.data == nullptr, ErrorCode::kInvalidArgument,
            "rank rows: dw is the caller's, so out must be empty");
  }
  run_in_flight(s.runtime, storage, "combine_backward", [&] {
    PassRun& pass =
        storage.pass->run.emplace(s.runtime, s.shape, plan, s.format, storage, PassKind::kBackward);
    pass.start(dy);
    pass.run_dispatch();
    if (s.expert_layout()) {
      const RowBuffer& received = pass.received();
      ExpertRows& e = storage.expert_rows;
      const auto routes = static_cast<std::size_t>(plan.num_positions());
      e.dw.resize(routes);
      // Received routes lie row by row: the row of each is what the position says.
      GrowArray<std::int32_t>& row = s.row_of_received_route;
      row.resize(routes);
      for (std::size_t q = 0; q < routes; ++q)
        row[q] = plan.expert_row[static_cast<std::size_t>(plan.position_of_route[q])];
      s.runtime.kernels().row_dots(received.view(), row, out, e.row_of_route, e.dw);
      s.fill(plan, storage, received, true);
    }
  });
}

void Dispatcher::dispatch_backward(Context& context, ConstMatrixView drows,
                                   std::span<const float> received_dw, MatrixView dx, std::span<float> dw) {
  State& s = *state_;
  require_own(context.valid(), context.pool_ == s.pool, "dispatch_backward");
  ContextStorage& storage =
      require_open(context.storage_, true, true, "dispatch_backward", "combine_backward");
  const Plan& plan = *context.plan_;
  const ConstMatrixView shape = rows(context);
  check_view(drows, "drows", shape.rows, shape.cols, s.options.combine_dtype);
  check_view(dx, "dx", plan.num_tokens, s.options.hidden, s.options.dtype);
  Require(dw.size() == static_cast<std::size_t>(plan.num_routes), ErrorCode::kInvalidArgument, "dw has ",
          dw.size(), " elements, the routing has ", plan.num_routes, " routes");
  const std::size_t expected = s.expert_layout() ? 0 : static_cast<std::size_t>(plan.num_positions());
  Require(received_dw.size() == expected, ErrorCode::kInvalidArgument, "received_dw has ", received_dw.size(),
          " elements, must have ", expected);
  run_in_flight(s.runtime, storage, "dispatch_backward", [&] {
    PassRun& pass = *storage.pass->run;
    RowsWork work(pass, plan, drows, s.expert_layout() ? &storage.expert_rows : nullptr,
                  s.expert_layout() ? std::span<const float>(storage.expert_rows.dw) : received_dw);
    pass.set_work(work, dx, dw);
    s.runtime.state().executor->finish(pass);
  });
  storage.pass->run.reset();
}

}  // namespace sluice
