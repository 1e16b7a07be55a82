#include "sluice/moe_layer.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "sluice/base/hash.hpp"
#include "sluice/base/telemetry.hpp"
#include "sluice/runtime/src/context_storage.hpp"
#include "sluice/runtime/src/device_layer.hpp"
#include "sluice/runtime/src/executor.hpp"
#include "sluice/runtime/src/gpu_group.hpp"
#include "sluice/runtime/src/layer_config.hpp"
#include "sluice/runtime/src/layer_work.hpp"
#include "sluice/runtime/src/pass_run.hpp"
#include "sluice/runtime/src/plan_exchange.hpp"
#include "sluice/runtime/src/plan_pool.hpp"
#include "sluice/runtime/src/runtime_state.hpp"
#include "sluice/scheduler/peer_order.hpp"

namespace sluice {

// ---- context ---------------------------------------------------------------------------------------------------------

Context::Context(Context&& other) noexcept {
  *this = std::move(other);
}
Context& Context::operator=(Context&& other) noexcept {
  if (this == &other) return *this;
  release();
  plan_ = std::move(other.plan_);
  storage_ = std::exchange(other.storage_, nullptr);
  pool_ = std::move(other.pool_);
  x_ = other.x_;
  in_ = other.in_;
  out_ = other.out_;
  dw_ = other.dw_;
  backward_done_ = other.backward_done_;
  gradients_left_ = other.gradients_left_;
  return *this;
}
Context::~Context() {
  release();
}

void Context::release() noexcept {
  if (storage_) {
    // Given up while a pass is in flight: peers may still write here, so this channel is never used again.
    if (storage_->pass->run) storage_->poisoned = true;
    storage_->pass->run.reset();
    storage_->pass->ran_on_gpus.reset();
    if (!storage_->poisoned) storage_->in_use = false;
  }
  storage_ = nullptr;
  plan_.reset();
  pool_.reset();
}

// ---- layer -----------------------------------------------------------------------------------------------------------

struct MoeLayer::State {
  Runtime& runtime;
  Placement placement;
  MoeLayerOptions options;
  // One a schedule, the first is options.schedule's. Passes in flight keep theirs.
  std::vector<std::shared_ptr<const Template>> shapes;
  std::shared_ptr<const Template> last_shape;
  kernels::Activation activation;
  std::int64_t h_cols = 0;
  PassFormat format;
  std::shared_ptr<ContextPool> pool;
  PlanPool plans;
  PlanExchange exchange;
  std::uint64_t layer_hash = 0;

  bool weights_set = false;
  bool trainable = false;
  std::vector<const std::byte*> w1, w2;  // [num_local_slots]
  std::vector<float*> grad_w1, grad_w2;  // [num_local_slots]
  std::vector<float> scale;              // per token, for copy experts
  std::vector<float> replica_sum;
  std::vector<std::int32_t> constant_ids;        // int32 [constant experts], ascending
  std::vector<ConstantExpertWeights> constants;  // [constant experts]
  std::vector<float> row_x, row_sum;             // f32 [hidden], of constant experts
  std::unique_ptr<DeviceExperts> on_device;      // null: the host computes
  // Over nvlink and nccl. Rows travel between GPUs and a pass runs whole when it is started; finish() adds what the host
  // computes. GPUs keep one forward for its backward: that of `kept`.
  std::unique_ptr<GpuRows> gpu_rows;
  struct Planned {
    const Plan* plan;
    Routing routing;
  };
  std::vector<Planned> planned;  // routings of the pool's plans
  const ContextStorage* kept = nullptr;
  // Of one source's rows in one context, for weight gradients that are added later.
  GrowArray<std::int64_t> later_ptr;                  // int64 [num_local_slots + 1]
  GrowArray<std::int32_t> later_position, later_row;  // int32 [routes]

  ScheduleChoice choice;
  std::vector<std::int64_t> chosen_for;  // the demand that `choice` was made for

  State(Runtime& r, Placement p, const MoeLayerOptions& o)
      : runtime(r),
        placement(std::move(p)),
        options(o),
        activation(kernel_activation(o.activation)),
        h_cols(kernels::preactivation_cols(activation, o.ffn)),
        format{o.hidden, o.wire_dtype, o.combine_dtype},
        pool(std::make_shared<ContextPool>(r, num_signals(r.num_ranks(), most_chunks(o)))),
        exchange(r, placement, o.schedule.plan_options()) {
    Require(o.hidden >= 1 && o.ffn >= 1, ErrorCode::kInvalidArgument, "hidden is ", o.hidden, " and ffn ",
            o.ffn, "; both must be at least 1");
    for (std::int32_t e = 0; e < placement.num_experts; ++e)
      if (placement.kind[static_cast<std::size_t>(e)] == ExpertKind::kConstant) constant_ids.push_back(e);
    layer_hash = Hasher()
                     .add_int(o.hidden)
                     .add_int(o.ffn)
                     .add_int(static_cast<int>(o.activation))
                     .add_int(static_cast<int>(o.dtype))
                     .add_int(static_cast<int>(o.wire_dtype))
                     .add_int(static_cast<int>(o.combine_dtype))
                     .add(o.auto_profile ? o.auto_profile->hash() : 0)
                     .value();
    last_shape = shape_of(o.schedule);
    layer_hash = Hasher().add(layer_hash).add(last_shape->schedule_hash()).value();
    if (o.auto_profile) o.auto_profile->validate();
    if (kernels::Device* device = r.state().device.get())
      on_device = std::make_unique<DeviceExperts>(*device, options, activation);
    if (GpuGroup* group = r.state().gpu_group.get()) make_gpu_rows(*group);
  }

  void make_gpu_rows(GpuGroup& group) {
    const std::string_view link = to_string(group.link());
    for (const auto& [dtype, what] : {std::pair{options.dtype, "rows"},
                                      {options.wire_dtype, "rows on the wire"},
                                      {options.combine_dtype, "sums on their way home"}})
      Require(dtype == DType::kBF16, ErrorCode::kNotSupported, "over ", link, " ", what,
              " are bf16, but the layer's are ", to_string(dtype));
    Require(
        !options.auto_profile, ErrorCode::kNotSupported, "over ", link,
        " a layer has the schedules sequential, by-source and hierarchical; it cannot choose by a profile");
    gpu_rows = group.make_rows(placement, {.hidden = options.hidden,
                                           .ffn = options.ffn,
                                           .activation = activation,
                                           .training = options.save != Save::kNone,
                                           .way = gpu_way(options.schedule, options.chunks_by_gpu_model,
                                                          group.link(), runtime.topology())});
  }
  void remember(const Plan& plan, const RoutingView& routing);
  void run_on_gpus(ContextStorage& storage, const Plan& plan, PassKind kind, ConstMatrixView in,
                   MatrixView out, std::span<float> dw);

  static std::int32_t most_chunks(const MoeLayerOptions& o) {
    if (!o.auto_profile) return o.schedule.num_chunks;
    const SearchSpace space;
    return *std::max_element(space.chunks.begin(), space.chunks.end());
  }
  const std::shared_ptr<const Template>& shape_of(const ScheduleOptions& schedule);
  const std::shared_ptr<const Template>& shape_of(const Plan& plan) const;
  void order_peers(std::span<const std::int64_t> gathered);
  PlanOptions choose(std::span<const std::int64_t> gathered);
  void start(ContextStorage& storage, const Plan& plan, PassKind kind, ConstMatrixView in, MatrixView out,
             std::span<float> dw, WeightGradients when = WeightGradients::kNow);
  void add_gradients_of_source(const Plan& plan, ContextStorage& storage, std::int32_t source);
  void add_everywhere(const Plan& plan, ConstMatrixView x, MatrixView y);
  void add_everywhere_backward(const Plan& plan, ConstMatrixView dy, ConstMatrixView x, MatrixView dx,
                               std::span<float> dw);
  void add_copy(const EverywhereRoutes& routes, std::size_t route, ConstMatrixView x, MatrixView y);
  const ConstantExpertWeights& constant(std::int32_t expert) const {
    return constants[static_cast<std::size_t>(
        std::lower_bound(constant_ids.begin(), constant_ids.end(), expert) - constant_ids.begin())];
  }
};

namespace {

// The work of this rank's experts on the host.
class HostWork final : public LayerPassWork {
 public:
  HostWork(MoeLayer::State& layer, ContextStorage& s)
      : layer_(layer), kernels_(layer.runtime.kernels()), s_(s) {}

  void begin(PassRun& pass, const Plan& plan, WeightGradients when) override {
    when_ = when;
    pass_ = &pass;
    plan_ = &plan;
    const MoeLayerOptions& o = layer_.options;
    const std::int64_t positions = plan.num_positions();
    if (!pass.is_backward()) {
      if (o.save == Save::kActivations) s_.hidden.resize(positions, layer_.h_cols, o.dtype);
      s_.activation.resize(positions, o.ffn, o.dtype);
      s_.out.resize(positions, o.hidden, o.dtype);
    } else {
      if (o.save == Save::kRows) s_.hidden.resize(positions, layer_.h_cols, o.dtype);
      s_.dw_position.resize(static_cast<std::size_t>(positions));
    }
  }

  void run(const Op& op) override {
    const MoeLayerOptions& o = layer_.options;
    const std::span<float*const> grad_w1 = layer_.grad_w1, grad_w2 = layer_.grad_w2;
    const auto slots = static_cast<std::size_t>(plan_->num_local_slots);
    const auto begin_slot = static_cast<std::size_t>(op.begin_slot(plan_->num_local_slots));
    const std::size_t num_slots = static_cast<std::size_t>(op.end_slot(plan_->num_local_slots)) - begin_slot;
    if (num_slots == 0 && op.kind != OpKind::kReduce) return;
    // The op's block; wgrad works on all of them.
    const auto first = op.kind == OpKind::kWgrad
                           ? 0
                           : static_cast<std::size_t>(plan_->options.block(op.part, op.chunk)) * slots;
    const std::span<const std::int64_t> group_ptr = plan_->group_ptr.span(first + begin_slot, num_slots + 1);
    const std::int64_t begin = group_ptr.front(), end = group_ptr.back();
    const auto weights_of = [&](std::span<const std::byte* const> w) {
      return w.subspan(begin_slot, num_slots);
    };
    const kernels::Groups with_w1{group_ptr, weights_of(layer_.w1)},
        with_w2{group_ptr, weights_of(layer_.w2)};
    switch (op.kind) {
      case OpKind::kExpertGemm1:
        if (pass_->is_backward()) {
          if (o.save == Save::kRows)
            kernels_.grouped_gemm_forward(with_w1, s_.recv2.view(), plan_->expert_row, o.dtype, layer_.h_cols,
                                          layer_.activation, s_.hidden.view(), {});
        } else {
          kernels_.grouped_gemm_forward(
              with_w1, s_.recv2.view(), plan_->expert_row, o.dtype, layer_.h_cols, layer_.activation,
              o.save == Save::kActivations ? s_.hidden.view() : MatrixView{}, s_.activation.view());
        }
        break;
      case OpKind::kExpertGemm2:
        kernels_.grouped_gemm_forward(with_w2, s_.activation.view(), {}, o.dtype, o.hidden, layer_.activation,
                                      s_.out.view(), {});
        break;
      case OpKind::kExpertDgrad2:
        kernels_.grouped_gemm_dgrad(with_w2, pass_->received().view(), plan_->expert_row, o.dtype,
                                    s_.activation.view());
        break;
      case OpKind::kActivationBackward:
        kernels_.activation_backward(layer_.activation, s_.hidden.view(), s_.activation.view(),
                                     plan_->expert_weight, s_.dw_position, s_.hidden.view(),
                                     s_.activation.view(), begin, end);
        break;
      case OpKind::kExpertDgrad1:
        kernels_.grouped_gemm_dgrad(with_w1, s_.hidden.view(), {}, o.dtype, s_.out.view());
        break;
      case OpKind::kReduce:
        if (pass_->is_backward()) {
          pass_->reduce_rows(s_.out.view(), plan_->position_of_route, {}, op);
          pass_->send_dw(s_.dw_position, plan_->position_of_route, op);
        } else {
          pass_->reduce_rows(s_.out.view(), plan_->position_of_route, plan_->recv2.weight, op);
        }
        break;
      case OpKind::kWgrad: {
        if (when_ == WeightGradients::kLater) break;
        // A slot's rows in receive order, whatever the blocks: positions are in that order only with one.
        const bool cut = plan_->options.num_blocks() > 1;
        const std::span<const std::int32_t> position = plan_->wgrad_position;
        const std::span<const std::int32_t> row = cut ? plan_->wgrad_row : plan_->expert_row;
        const std::span<const std::int64_t> slot_ptr = plan_->slot_ptr.span(begin_slot, num_slots + 1);
        kernels_.grouped_gemm_wgrad(slot_ptr, pass_->received().view(), row, s_.activation.view(), position,
                                    grad_w2.subspan(begin_slot, num_slots));
        kernels_.grouped_gemm_wgrad(slot_ptr, s_.hidden.view(), position, s_.recv2.view(), row,
                                    grad_w1.subspan(begin_slot, num_slots));
        break;
      }
      default:
        throw Error(ErrorCode::kInternal, str("op ", to_string(op.kind), " is no expert work"));
    }
  }

  void add_gradients(std::span<const std::int64_t> group_ptr, std::span<const std::int32_t> position,
                     std::span<const std::int32_t> row) override {
    kernels_.grouped_gemm_wgrad(group_ptr, s_.recv_dy.view(), row, s_.activation.view(), position,
                                layer_.grad_w2);
    kernels_.grouped_gemm_wgrad(group_ptr, s_.hidden.view(), position, s_.recv2.view(), row, layer_.grad_w1);
  }

 private:
  MoeLayer::State& layer_;
  kernels::Kernels& kernels_;
  ContextStorage& s_;
  PassRun* pass_ = nullptr;
  const Plan* plan_ = nullptr;
  WeightGradients when_ = WeightGradients::kNow;
};

LayerPassWork& work_of(MoeLayer::State& layer, ContextStorage& storage) {
  std::unique_ptr<ExpertWork>& work = storage.pass->work;
  if (!work && layer.on_device) work = std::make_unique<DeviceWork>(*layer.on_device, storage);
  if (!work) work = std::make_unique<HostWork>(layer, storage);
  return static_cast<LayerPassWork&>(*work);
}

}  // namespace

MoeLayer::MoeLayer(Runtime& runtime, Placement placement, const MoeLayerOptions& options)
    : state_(std::make_unique<State>(runtime, std::move(placement), options)) {}
MoeLayer::~MoeLayer() = default;

const MoeLayerOptions& MoeLayer::options() const {
  return state_->options;
}
const Placement& MoeLayer::placement() const {
  return state_->placement;
}
const Template& MoeLayer::exchange_template() const {
  return *state_->last_shape;
}
const ScheduleChoice* MoeLayer::schedule_choice() const {
  return state_->choice.ranked.empty() ? nullptr : &state_->choice;
}

const std::shared_ptr<const Template>& MoeLayer::State::shape_of(const ScheduleOptions& schedule) {
  for (const auto& shape : shapes)
    if (shape->schedule == schedule) return shape;
  shapes.push_back(
      std::make_shared<const Template>(build_template(runtime.rank(), runtime.topology(), schedule)));
  return shapes.back();
}

// A plan knows how its rows are cut; there is one schedule for each way.
const std::shared_ptr<const Template>& MoeLayer::State::shape_of(const Plan& plan) const {
  if (!options.auto_profile) return shapes.front();
  for (const auto& shape : shapes)
    if (shape->schedule.plan_options() == plan.options) return shape;
  throw Error(ErrorCode::kInvalidArgument, "the plan is cut as no plan of this layer was");
}

// Under skew, peers are sent to in the order that keeps receivers from queueing (peer_order.hpp).
void MoeLayer::State::order_peers(std::span<const std::int64_t> gathered) {
  const Topology& topology = runtime.topology();
  if (topology.num_ranks() < 3) return;
  const ScheduleOptions& schedule = choice.schedule();
  const PlanSummary summary(topology, schedule.exchange, placement, gathered);
  Template shape = build_template(runtime.rank(), topology, schedule);
  const bool blocking = options.auto_profile->link_model == LinkModel::kCalendar;
  for (const std::int32_t hop : {1, 2}) {
    const std::vector<double> rows = hop_rows(summary, hop);
    apply_peer_order({&shape, 1}, hop, best_peer_order(rows, topology.num_ranks(), blocking), rows);
  }
  for (auto& known : shapes)
    if (known->schedule == schedule) known = std::make_shared<const Template>(std::move(shape));
  last_shape = shape_of(schedule);
}

// The schedule of a batch. Demand that is much like the one of the last choice keeps it: a simulation of all candidates
// costs more than it could win then. Ranks see the same demands, so they keep and change together.
PlanOptions MoeLayer::State::choose(std::span<const std::int64_t> gathered) {
  constexpr double kMuchAlike = 0.05;
  const std::size_t stride = static_cast<std::size_t>(placement.num_experts) + 2;
  bool alike = chosen_for.size() == gathered.size();
  if (alike) {
    double sum = 0, difference = 0;
    for (std::size_t i = 0; i < gathered.size(); ++i) {
      if (i % stride == 1) continue;  // a hash
      sum += static_cast<double>(gathered[i]);
      difference += std::abs(static_cast<double>(gathered[i]) - static_cast<double>(chosen_for[i]));
    }
    alike = difference <= kMuchAlike * sum;
  }
  if (!alike) {
    SearchSpace space;
    space.exchanges = {options.schedule.exchange};
    space.backward = options.save != Save::kNone;
    const LayerShape layer = layer_shape(options, runtime.options().threads_per_rank);
    choice = choose_schedule(runtime.topology(), placement, gathered, layer, *options.auto_profile, space);
    chosen_for.assign(gathered.begin(), gathered.end());
    last_shape = shape_of(choice.schedule());
    order_peers(gathered);
  }
  return choice.schedule().plan_options();
}

void MoeLayer::set_weights(std::span<const ExpertWeights> slots) {
  State& s = *state_;
  const std::int32_t expected = s.placement.num_slots_of(s.runtime.rank());
  Require(slots.size() == static_cast<std::size_t>(expected), ErrorCode::kInvalidArgument, "weights for ",
          slots.size(), " slots were given; rank ", s.runtime.rank().value, " has ", expected);
  s.w1.clear();
  s.w2.clear();
  s.grad_w1.clear();
  s.grad_w2.clear();
  s.trainable = true;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const ExpertWeights& w = slots[i];
    require_shape(w.w1, str("w1 of slot ", i), s.h_cols, s.options.hidden);
    require_shape(w.w2, str("w2 of slot ", i), s.options.hidden, s.options.ffn);
    for (const ConstMatrixView& m : {w.w1, w.w2}) {
      Require(m.dtype == s.options.dtype, ErrorCode::kInvalidArgument, "weights of slot ", i, " are ",
              to_string(m.dtype), ", the layer's dtype is ", to_string(s.options.dtype));
      Require(m.row_stride == m.cols, ErrorCode::kInvalidArgument, "weights of slot ", i,
              " are not contiguous");
    }
    s.w1.push_back(w.w1.data);
    s.w2.push_back(w.w2.data);
    s.grad_w1.push_back(w.grad_w1);
    s.grad_w2.push_back(w.grad_w2);
    s.trainable = s.trainable && w.grad_w1 && w.grad_w2;
  }
  if (s.on_device) s.on_device->set_weights(s.w1, s.w2, s.trainable);
  s.weights_set = true;
}

std::shared_ptr<const Plan> MoeLayer::plan(const RoutingView& routing) {
  State& s = *state_;
  std::shared_ptr<Plan> plan = s.plans.acquire();
  PlanExchange::Choose choose;
  if (s.options.auto_profile)
    choose = [&s](std::span<const std::int64_t> gathered) { return s.choose(gathered); };
  s.exchange.build(routing, *plan, Hasher().add(s.layer_hash).add(s.pool->state_hash()).value(), choose);
  if (s.gpu_rows) s.remember(*plan, routing);
  return plan;
}

// GPUs make their own plan of a routing, when a pass begins.
void MoeLayer::State::remember(const Plan& plan, const RoutingView& routing) {
  auto at = std::find_if(planned.begin(), planned.end(), [&](const Planned& p) { return p.plan == &plan; });
  if (at == planned.end()) at = planned.insert(planned.end(), {&plan, {}});
  at->routing.num_experts = routing.num_experts;
  at->routing.row_ptr.assign(routing.row_ptr.begin(), routing.row_ptr.end());
  at->routing.expert.assign(routing.expert.begin(), routing.expert.end());
  at->routing.weight.assign(routing.weight.begin(), routing.weight.end());
}

void MoeLayer::State::run_on_gpus(ContextStorage& storage, const Plan& plan, PassKind kind,
                                  ConstMatrixView in, MatrixView out, std::span<float> dw) {
  const Span span(runtime.recorder(), StaticText::promised("pass on GPUs"), "compute");
  const void* const base1 = on_device->w1.empty() ? nullptr : on_device->w1.front();
  const void* const base2 = on_device->w2.empty() ? nullptr : on_device->w2.front();
  if (kind == PassKind::kForward) {
    const auto at =
        std::find_if(planned.begin(), planned.end(), [&](const Planned& p) { return p.plan == &plan; });
    Require(at != planned.end(), ErrorCode::kInternal, "a plan without its routing");
    kept = nullptr;
    gpu_rows->plan(at->routing);
    gpu_rows->forward(base1, base2, in, out);
    kept = &storage;
  } else {
    kept = nullptr;  // the kept rows become gradients
    gpu_rows->backward(base1, base2, on_device->grad_w1.empty() ? nullptr : on_device->grad_w1.front(),
                       on_device->grad_w2.empty() ? nullptr : on_device->grad_w2.front(), in, out, dw);
    on_device->gradients_changed();
  }
  storage.pass->ran_on_gpus = kind;
}

namespace {

void check_rows(const ConstMatrixView& view, std::string_view what, const Plan& plan, std::int64_t hidden,
                DType dtype) {
  require_shape(view, what, plan.num_tokens, hidden);
  Require(view.dtype == dtype, ErrorCode::kInvalidArgument, what, " is ", to_string(view.dtype), ", must be ",
          to_string(dtype));
}

}  // namespace

namespace {

void load_row(const ConstMatrixView& m, std::int64_t row, std::vector<float>& to) {
  to.resize(static_cast<std::size_t>(m.cols));
  if (m.dtype == DType::kF32)
    std::copy_n(m.row_as<float>(row), m.cols, to.begin());
  else
    for (std::size_t j = 0; j < to.size(); ++j) to[j] = static_cast<float>(m.row_as<bf16>(row)[j]);
}
void store_row(const std::vector<float>& from, const MatrixView& m, std::int64_t row) {
  if (m.dtype == DType::kF32)
    std::copy(from.begin(), from.end(), m.row_as<float>(row));
  else
    for (std::size_t j = 0; j < from.size(); ++j) m.row_as<bf16>(row)[j] = static_cast<bf16>(from[j]);
}
double dot(const float* a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t j = 0; j < b.size(); ++j) sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  return sum;
}
// softmax(W_c x)
std::array<double, 2> constant_mix(const ConstantExpertWeights& expert, const std::vector<float>& x) {
  const double a = dot(expert.w.row_as<float>(0), x), b = dot(expert.w.row_as<float>(1), x);
  const double first = 1 / (1 + std::exp(b - a));
  return {first, 1 / (1 + std::exp(a - b))};
}

}  // namespace

void MoeLayer::set_constant_experts(std::span<const ConstantExpertWeights> experts) {
  State& s = *state_;
  Require(experts.size() == s.constant_ids.size(), ErrorCode::kInvalidArgument, "weights of ", experts.size(),
          " constant experts were given; the placement has ", s.constant_ids.size());
  for (std::size_t i = 0; i < experts.size(); ++i) {
    const std::string what = str(" of constant expert ", s.constant_ids[i]);
    require_shape(experts[i].w, "W_c" + what, 2, s.options.hidden);
    require_shape(experts[i].v, "v" + what, 1, s.options.hidden);
    for (const ConstMatrixView& m : {experts[i].w, experts[i].v})
      Require(m.dtype == DType::kF32 && m.row_stride == m.cols, ErrorCode::kInvalidArgument, "weights", what,
              " must be f32 and contiguous");
  }
  s.constants.assign(experts.begin(), experts.end());
}

void MoeLayer::State::add_copy(const EverywhereRoutes& routes, std::size_t route, ConstMatrixView x,
                               MatrixView y) {
  const std::int64_t t = routes.token[route];
  runtime.kernels().add_scaled_rows({x.row(t), x.dtype, 1, x.cols, x.row_stride},
                                    std::span<const float>(&routes.weight[route], 1),
                                    {y.row(t), y.dtype, 1, y.cols, y.row_stride});
}

void MoeLayer::State::add_everywhere(const Plan& plan, ConstMatrixView x, MatrixView y) {
  const EverywhereRoutes& routes = plan.everywhere;
  // Zero experts add nothing. Others of one token add one after the other, experts ascending.
  for (std::size_t i = 0; i < routes.token.size(); ++i) {
    const ExpertKind kind = placement.kind[static_cast<std::size_t>(routes.expert[i])];
    if (kind == ExpertKind::kCopy) add_copy(routes, i, x, y);
    if (kind != ExpertKind::kConstant) continue;
    const ConstantExpertWeights& expert = constant(routes.expert[i]);
    load_row(x, routes.token[i], row_x);
    load_row(y, routes.token[i], row_sum);
    const auto mix = constant_mix(expert, row_x);
    const auto w = static_cast<double>(routes.weight[i]);
    const float* v = expert.v.row_as<float>(0);
    for (std::size_t j = 0; j < row_x.size(); ++j)
      row_sum[j] += static_cast<float>(
          w * (mix[0] * static_cast<double>(row_x[j]) + mix[1] * static_cast<double>(v[j])));
    store_row(row_sum, y, routes.token[i]);
  }
}

Context MoeLayer::forward(const std::shared_ptr<const Plan>& plan, ConstMatrixView x, MatrixView y) {
  Context context = start_forward(plan, x, y);
  finish(context);
  return context;
}

void MoeLayer::backward(Context& context, ConstMatrixView dy, MatrixView dx, std::span<float> dw) {
  start_backward(context, dy, dx, dw);
  finish(context);
}

Context MoeLayer::start_forward(const std::shared_ptr<const Plan>& plan, ConstMatrixView x, MatrixView y) {
  State& s = *state_;
  Require(plan != nullptr, ErrorCode::kInvalidArgument, "forward was given no plan");
  s.exchange.require_own(*plan, "forward", s.options.auto_profile != nullptr);
  Require(s.weights_set, ErrorCode::kInvalidState, "forward before set_weights");
  Require(s.constants.size() == s.constant_ids.size(), ErrorCode::kInvalidState,
          "forward before set_constant_experts");
  check_rows(x, "x", *plan, s.options.hidden, s.options.dtype);
  check_rows(y, "y", *plan, s.options.hidden, s.options.dtype);
  Context context;
  context.plan_ = plan;
  context.pool_ = s.pool;
  context.storage_ = &s.pool->acquire();
  context.x_ = context.in_ = x;
  context.out_ = y;
  s.start(*context.storage_, *plan, PassKind::kForward, x, y, {});
  return context;
}

void MoeLayer::start_backward(Context& context, ConstMatrixView dy, MatrixView dx, std::span<float> dw,
                              WeightGradients when) {
  State& s = *state_;
  Require(context.valid() && context.pool_ == s.pool, ErrorCode::kInvalidState,
          "backward needs a context that forward of this layer returned");
  Require(!context.backward_done_, ErrorCode::kInvalidState, "backward was already run on this context");
  Require(!context.storage_->pass->run, ErrorCode::kInvalidState,
          "backward on a context whose forward is still in flight; finish() it first");
  Require(s.options.save != Save::kNone, ErrorCode::kInvalidState,
          "the layer keeps nothing for backward; set save to rows or activations");
  Require(s.trainable, ErrorCode::kInvalidState, "set_weights gave no gradients for some slot");
  if (s.gpu_rows) {
    Require(!context.storage_->pass->ran_on_gpus, ErrorCode::kInvalidState,
            "backward on a context whose forward is still in flight; finish() it first");
    Require(
        s.kept == context.storage_, ErrorCode::kInvalidState,
        "over GPUs a layer keeps its last forward alone for backward, and this context's is an earlier one; "
        "run backward before the next forward");
    Require(when == WeightGradients::kNow, ErrorCode::kNotSupported,
            "over GPUs weight gradients are added up in the pass, not later");
  }
  const Plan& plan = *context.plan_;
  check_rows(dy, "dy", plan, s.options.hidden, s.options.dtype);
  check_rows(dx, "dx", plan, s.options.hidden, s.options.dtype);
  Require(dw.size() == static_cast<std::size_t>(plan.num_routes), ErrorCode::kInvalidArgument, "dw has ",
          dw.size(), " elements, the routing has ", plan.num_routes, " routes");
  context.backward_done_ = true;
  context.gradients_left_ = when == WeightGradients::kLater;
  context.in_ = dy;
  context.out_ = dx;
  context.dw_ = dw;
  s.start(*context.storage_, plan, PassKind::kBackward, dy, dx, dw, when);
}

void MoeLayer::State::start(ContextStorage& storage, const Plan& plan, PassKind kind, ConstMatrixView in,
                            MatrixView out, std::span<float> dw, WeightGradients when) {
  run_in_flight(runtime, storage, to_string(kind), [&] {
    if (gpu_rows) return run_on_gpus(storage, plan, kind, in, out, dw);
    storage.pass->shape = shape_of(plan);
    PassRun& pass = storage.pass->run.emplace(runtime, *storage.pass->shape, plan, format, storage, kind);
    LayerPassWork& work = work_of(*this, storage);
    work.begin(pass, plan, when);
    pass.start(in);
    runtime.state().executor->send_off(pass);  // dispatch only: the pass has no expert work yet
    pass.set_work(work, out, dw);
  });
}

void MoeLayer::finish(Context& context) {
  State& s = *state_;
  Require(context.valid() && context.pool_ == s.pool, ErrorCode::kInvalidState,
          "finish needs a context of this layer");
  ContextStorage& storage = *context.storage_;
  std::optional<PassKind>& ran = storage.pass->ran_on_gpus;
  Require(storage.pass->run.has_value() || ran, ErrorCode::kInvalidState,
          "finish on a context that has no pass in flight");
  const bool backward = ran ? *ran == PassKind::kBackward : storage.pass->run->is_backward();
  const Plan& plan = *context.plan_;
  run_in_flight(s.runtime, storage, backward ? "backward" : "forward", [&] {
    if (!ran) s.runtime.state().executor->finish(*storage.pass->run);
    if (s.on_device && !ran) s.on_device->device.synchronize();  // weight gradients are queued last
    if (backward)
      s.add_everywhere_backward(plan, context.in_, context.x_, context.out_, context.dw_);
    else
      s.add_everywhere(plan, context.in_, context.out_);
  });
  ran.reset();
  storage.pass->run.reset();
}

void MoeLayer::State::add_gradients_of_source(const Plan& plan, ContextStorage& storage,
                                              std::int32_t source) {
  const std::vector<Segment>& segments = plan.recv2.segments;
  const auto segment =
      std::find_if(segments.begin(), segments.end(), [&](const Segment& s) { return s.source == source; });
  if (segment == segments.end() || segment->num_routes == 0) return;
  const std::int32_t begin_row = segment->row_begin, end_row = begin_row + segment->num_rows;
  // A slot's routes are in receive order, so those of one source stand together.
  const bool cut = plan.options.num_blocks() > 1;
  const std::int32_t* const row = (cut ? plan.wgrad_row : plan.expert_row).data();
  const auto slots = static_cast<std::size_t>(plan.num_local_slots);
  later_ptr.resize(slots + 1);
  later_position.resize(static_cast<std::size_t>(segment->num_routes));
  later_row.resize(static_cast<std::size_t>(segment->num_routes));
  std::size_t n = 0;
  for (std::size_t l = 0; l < slots; ++l) {
    later_ptr[l] = static_cast<std::int64_t>(n);
    const std::int32_t* const end = row + plan.slot_ptr[l + 1];
    for (const std::int32_t* r = std::lower_bound(row + plan.slot_ptr[l], end, begin_row);
         r != end && *r < end_row; ++r, ++n) {
      const std::ptrdiff_t at = r - row;
      later_row[n] = *r;
      later_position[n] =
          cut ? plan.wgrad_position[static_cast<std::size_t>(at)] : static_cast<std::int32_t>(at);
    }
  }
  later_ptr[slots] = static_cast<std::int64_t>(n);
  work_of(*this, storage).add_gradients(later_ptr, later_position, later_row);
}

void MoeLayer::finish_experts(Context& context) {
  State& s = *state_;
  Require(context.valid() && context.pool_ == s.pool && context.storage_->pass->run.has_value(),
          ErrorCode::kInvalidState, "finish_experts needs a context of this layer that has a pass in flight");
  const PassRun& pass = *context.storage_->pass->run;
  run_in_flight(s.runtime, *context.storage_, pass.is_backward() ? "backward" : "forward",
                [&] { s.runtime.state().executor->run_while([&] { return !pass.experts_done(); }); });
}

void MoeLayer::add_weight_gradients(std::span<Context> contexts) {
  State& s = *state_;
  for (const Context& context : contexts)
    Require(context.valid() && context.pool_ == s.pool && context.gradients_left_ &&
                (!context.storage_->pass->run || context.storage_->pass->run->experts_done()),
            ErrorCode::kInvalidState,
            "add_weight_gradients needs contexts of this layer whose experts are done with backward and left "
            "them for later");
  const Span span(s.runtime.recorder(), StaticText::promised(to_string(OpKind::kWgrad)), "compute");
  const ComputeTurn turn(*s.runtime.state().executor);
  for (std::int32_t source = 0; source < s.runtime.num_ranks(); ++source)
    for (Context& context : contexts) s.add_gradients_of_source(*context.plan_, *context.storage_, source);
  for (Context& context : contexts) context.gradients_left_ = false;
}

// Constant, with d = w dy, [a1, a2] its mix:  dx += a1 d + W_c^T dl,  dv += a2 d,  dW_c += dl x^T,
// dl_i = a_i (b_i - a1 b1 - a2 b2),  b = [<d, x>, <d, v>]
void MoeLayer::State::add_everywhere_backward(const Plan& plan, ConstMatrixView dy, ConstMatrixView x,
                                              MatrixView dx, std::span<float> dw) {
  const EverywhereRoutes& routes = plan.everywhere;
  for (std::size_t i = 0; i < routes.token.size(); ++i) {
    float value = 0;  // zero: E(x) = 0
    const ExpertKind kind = placement.kind[static_cast<std::size_t>(routes.expert[i])];
    if (kind == ExpertKind::kCopy) {  // J = 1, so dx += w dy
      add_copy(routes, i, dy, dx);
      runtime.kernels().row_dots(dy, routes.token.span(i, 1), x, routes.token.span(i, 1),
                                 std::span<float>(&value, 1));
    }
    if (kind == ExpertKind::kConstant) {
      const ConstantExpertWeights& expert = constant(routes.expert[i]);
      Require(expert.grad_w && expert.grad_v, ErrorCode::kInvalidState,
              "set_constant_experts gave no gradients for expert ", routes.expert[i]);
      load_row(x, routes.token[i], row_x);
      load_row(dy, routes.token[i], row_sum);
      const auto mix = constant_mix(expert, row_x);
      const float* v = expert.v.row_as<float>(0);
      const auto w = static_cast<double>(routes.weight[i]);
      const double along[2] = {dot(row_x.data(), row_sum), dot(v, row_sum)};
      const double mean = mix[0] * along[0] + mix[1] * along[1];
      value = static_cast<float>(mean);
      const double dl[2] = {w * mix[0] * (along[0] - mean), w * mix[1] * (along[1] - mean)};
      const float *w0 = expert.w.row_as<float>(0), *w1 = expert.w.row_as<float>(1);
      const auto hidden = row_x.size();
      for (std::size_t j = 0; j < hidden; ++j) {
        const double d = w * static_cast<double>(row_sum[j]);
        expert.grad_v[j] += static_cast<float>(mix[1] * d);
        expert.grad_w[j] += static_cast<float>(dl[0] * static_cast<double>(row_x[j]));
        expert.grad_w[hidden + j] += static_cast<float>(dl[1] * static_cast<double>(row_x[j]));
        row_sum[j] = static_cast<float>(mix[0] * d + dl[0] * static_cast<double>(w0[j]) +
                                        dl[1] * static_cast<double>(w1[j]));
      }
      load_row(dx, routes.token[i], row_x);
      for (std::size_t j = 0; j < hidden; ++j) row_x[j] += row_sum[j];
      store_row(row_x, dx, routes.token[i]);
    }
    dw[static_cast<std::size_t>(routes.route[i])] = value;
  }
}

void MoeLayer::sync_replica_gradients() {
  State& s = *state_;
  if (s.on_device && s.trainable) s.on_device->move_gradients(s.grad_w1, s.grad_w2);
  if (s.placement.replicated.empty()) return;
  Require(s.trainable || s.placement.num_slots_of(s.runtime.rank()) == 0, ErrorCode::kInvalidState,
          "set_weights gave no gradients for some slot");
  // Every rank adds its copy, ranks without one add zero: the fixed order of all_reduce_sum is ranks ascending.
  const std::int64_t n1 = s.h_cols * s.options.hidden, n2 = s.options.hidden * s.options.ffn;
  s.replica_sum.resize(static_cast<std::size_t>(n1 + n2));
  for (const std::int32_t e : s.placement.replicated) {
    const SlotId slot = s.placement.slot_on(ExpertId(e), s.runtime.rank());
    float* g1 = nullptr;
    float* g2 = nullptr;
    if (slot.valid()) {
      const auto local = static_cast<std::size_t>(s.placement.slot_local_index[slot.index()]);
      g1 = s.grad_w1[local];
      g2 = s.grad_w2[local];
      std::copy_n(g1, n1, s.replica_sum.data());
      std::copy_n(g2, n2, s.replica_sum.data() + n1);
    } else {
      std::fill(s.replica_sum.begin(), s.replica_sum.end(), 0.0f);
    }
    s.runtime.all_reduce_sum(std::span<float>(s.replica_sum), "replica gradients");
    if (slot.valid()) {
      std::copy_n(s.replica_sum.data(), n1, g1);
      std::copy_n(s.replica_sum.data() + n1, n2, g2);
    }
  }
}

MoeLayer::Memory MoeLayer::memory() const {
  const State& s = *state_;
  Memory out{s.pool->capacity_bytes(), s.plans.capacity_bytes(), s.runtime.kernels().scratch_bytes()};
  if (s.on_device) {
    out.contexts += s.on_device->capacity_bytes();
    if (s.gpu_rows) out.contexts += s.gpu_rows->capacity_bytes();
    out.scratch += s.on_device->device.kernels().scratch_bytes();
  }
  return out;
}

ContextBytes context_bytes(const Plan& plan, const MoeLayerOptions& options) {
  const std::int64_t h = options.hidden;
  const std::int64_t pre = kernels::preactivation_cols(kernel_activation(options.activation), options.ffn);
  const auto row = static_cast<std::int64_t>(size_of(options.dtype));
  const auto wire = static_cast<std::int64_t>(size_of(options.wire_dtype));
  const auto combine = static_cast<std::int64_t>(size_of(options.combine_dtype));
  const std::int64_t positions = plan.num_positions();
  const std::int64_t sent = std::int64_t{plan.send1.num_rows()} + plan.send2.num_rows();
  const std::int64_t received = std::int64_t{plan.recv1.num_rows()} + plan.recv2.num_rows();
  const std::int64_t sums = std::int64_t{plan.recv2.num_rows()} + plan.send2.num_rows() +
                            plan.recv1.num_rows() + plan.num_home_rows();
  ContextBytes out;
  out.forward = (sent + received) * h * wire + sums * h * combine + positions * (options.ffn + h) * row;
  if (options.wire_dtype != options.dtype) out.forward += plan.num_tokens * h * wire;
  if (options.save == Save::kActivations) out.forward += positions * pre * row;
  out.peak = out.forward;
  if (options.save != Save::kNone) {
    if (options.save == Save::kRows) out.peak += positions * pre * row;
    out.peak += plan.recv2.num_rows() * h * wire;  // dy
    out.peak += 4 * (2 * positions + std::int64_t{plan.send2.num_routes()} + plan.recv1.num_routes() +
                     plan.send1.num_routes());
  }
  return out;
}

}  // namespace sluice
