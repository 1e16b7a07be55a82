#include "sluice/runtime/src/device_layer.hpp"

#include <algorithm>

namespace sluice {

DeviceMemory::~DeviceMemory() {
  if (data_) device_.release(data_);
}

void DeviceMemory::at_least(std::int64_t bytes) {
  if (bytes <= bytes_) return;
  const std::int64_t capacity = std::max(bytes, bytes_ + bytes_ / 2);
  if (data_) device_.release(data_);
  data_ = nullptr;
  bytes_ = 0;
  data_ = device_.allocate(capacity);
  bytes_ = capacity;
}

void DeviceRows::resize(std::int64_t rows, std::int64_t cols, DType dtype) {
  memory_.at_least(rows * cols * static_cast<std::int64_t>(size_of(dtype)));
  rows_ = rows;
  cols_ = cols;
  dtype_ = dtype;
}

// ---- weights and gradients -------------------------------------------------------------------------------------------

DeviceExperts::DeviceExperts(kernels::Device& d, const MoeLayerOptions& o, kernels::Activation a)
    : device(d),
      options(o),
      activation(a),
      h_cols(kernels::preactivation_cols(a, o.ffn)),
      w1_memory_(d),
      w2_memory_(d),
      grad_w1_memory_(d),
      grad_w2_memory_(d) {
  Require(o.dtype == DType::kF32 || (o.hidden % 8 == 0 && o.ffn % 8 == 0), ErrorCode::kNotSupported,
          "a bf16 layer on a GPU needs hidden and ffn in multiples of 8; they are ", o.hidden, " and ",
          o.ffn);
}

void DeviceExperts::upload(DeviceMemory& memory, std::span<const std::byte* const> from,
                           std::int64_t elements, std::vector<const std::byte*>& to) {
  const std::int64_t bytes = elements * static_cast<std::int64_t>(size_of(options.dtype));
  memory.at_least(bytes * static_cast<std::int64_t>(from.size()));
  to.clear();
  for (const std::byte* slot : from) {
    std::byte* const at = memory.as<std::byte>() + static_cast<std::int64_t>(to.size()) * bytes;
    device.upload(at, slot, bytes);
    to.push_back(at);
  }
}

void DeviceExperts::make_gradients(DeviceMemory& memory, std::size_t num_slots, std::int64_t elements,
                                   std::vector<float*>& to) {
  const std::int64_t bytes = elements * static_cast<std::int64_t>(num_slots) * 4;
  memory.at_least(bytes);
  device.zero(memory.as<float>(), bytes);
  to.clear();
  for (std::size_t i = 0; i < num_slots; ++i)
    to.push_back(memory.as<float>() + static_cast<std::int64_t>(i) * elements);
}

void DeviceExperts::set_weights(std::span<const std::byte* const> from_w1,
                                std::span<const std::byte* const> from_w2, bool trainable) {
  device.make_current();
  device.synchronize();  // nothing that is under way reads what is overwritten
  const std::int64_t n1 = h_cols * options.hidden, n2 = options.hidden * options.ffn;
  upload(w1_memory_, from_w1, n1, w1);
  upload(w2_memory_, from_w2, n2, w2);
  if (!trainable) return;
  make_gradients(grad_w1_memory_, from_w1.size(), n1, grad_w1);
  make_gradients(grad_w2_memory_, from_w2.size(), n2, grad_w2);
  gradients_changed_ = false;
}

void DeviceExperts::move(std::span<float* const> from, std::span<float* const> to, std::int64_t elements) {
  staging_.resize(static_cast<std::size_t>(elements));
  for (std::size_t i = 0; i < from.size(); ++i) {
    device.download(staging_.data(), from[i], elements * 4);
    device.zero(from[i], elements * 4);
    device.synchronize();
    for (std::int64_t j = 0; j < elements; ++j) to[i][j] += staging_[static_cast<std::size_t>(j)];
  }
}

void DeviceExperts::move_gradients(std::span<float* const> to_w1, std::span<float* const> to_w2) {
  if (!gradients_changed_) return;
  device.make_current();
  move(grad_w1, to_w1, h_cols * options.hidden);
  move(grad_w2, to_w2, options.hidden * options.ffn);
  gradients_changed_ = false;
}

std::int64_t DeviceExperts::capacity_bytes() const {
  return w1_memory_.capacity_bytes() + w2_memory_.capacity_bytes() + grad_w1_memory_.capacity_bytes() +
         grad_w2_memory_.capacity_bytes();
}

// ---- passes ----------------------------------------------------------------------------------------------------------

DeviceWork::DeviceWork(DeviceExperts& experts, ContextStorage& s)
    : e_(experts),
      device_(experts.device),
      kernels_(experts.device.kernels()),
      s_(s),
      plan_copy_(device_),
      received_(device_),
      x_(device_),
      dy_(device_),
      hidden_(device_),
      act_(device_),
      out_(device_),
      sums_(device_),
      dw_(device_),
      later_ptr_(device_),
      later_position_(device_) {}

void DeviceWork::begin(PassRun& pass, const Plan& plan, WeightGradients when) {
  when_ = when;
  pass_ = &pass;
  plan_ = &plan;
  brought_.assign(static_cast<std::size_t>(plan.options.num_blocks()), 0);
  const MoeLayerOptions& o = e_.options;
  const std::int64_t positions = plan.num_positions();
  device_.make_current();
  if (pass.is_backward()) {
    dy_.resize(positions, o.hidden, o.dtype);
    dw_.at_least(positions * 4);
    s_.dw_position.resize(static_cast<std::size_t>(positions));
    if (o.save == Save::kRows) hidden_.resize(positions, e_.h_cols, o.dtype);
    return;  // the plan is the forward's
  }
  plan_copy_.group_ptr.upload(plan.group_ptr);
  plan_copy_.slot_ptr.upload(plan.slot_ptr);
  plan_copy_.route_ptr.upload(plan.recv2.route_ptr);
  plan_copy_.position_of_route.upload(plan.position_of_route);
  plan_copy_.wgrad_position.upload(plan.wgrad_position);
  plan_copy_.route_weight.upload(plan.recv2.weight);
  plan_copy_.position_weight.upload(plan.expert_weight);
  received_.resize(plan.recv2.num_rows(), o.hidden, o.wire_dtype);
  sums_.resize(plan.recv2.num_rows(), o.hidden, o.combine_dtype);
  x_.resize(positions, o.hidden, o.dtype);
  if (o.save == Save::kActivations) hidden_.resize(positions, e_.h_cols, o.dtype);
  act_.resize(positions, o.ffn, o.dtype);
  out_.resize(positions, o.hidden, o.dtype);
}

void DeviceWork::bring(const Op& op, const RowBuffer& from, DeviceRows& to) {
  // The first op of a block's pieces brings all of its rows.
  char& brought = brought_[static_cast<std::size_t>(plan_->options.block(op.part, op.chunk))];
  if (brought) return;
  brought = 1;
  pass_->for_each_received(op, [&](const Segment&, std::int32_t, PassRun::Range r) {
    const std::span<std::byte> rows = from.bytes(r.begin, r.end);
    device_.upload(received_.view().row(r.begin), rows.data(), static_cast<std::int64_t>(rows.size()));
    device_.lay_out_rows(received_.rows(r.begin, r.end), routes_of(r), plan_copy_.position_of_route.span(),
                         to.view());
  });
}

std::span<const std::int64_t> DeviceWork::routes_of(PassRun::Range r) const {
  return plan_copy_.route_ptr.span(static_cast<std::size_t>(r.begin),
                                   static_cast<std::size_t>(r.end - r.begin) + 1);
}

void DeviceWork::reduce(const Op& op, std::int64_t begin, std::int64_t end) {
  const bool backward = pass_->is_backward();
  const std::span<const float> weight = backward ? std::span<const float>() : plan_copy_.route_weight.span();
  // Rows without routes to experts of this rank do not exist, so every row of the block is summed here.
  pass_->for_each_received(op, [&](const Segment& segment, std::int32_t, PassRun::Range r) {
    const MatrixView sums = sums_.rows(r.begin, r.end);
    kernels_.weighted_reduce(out_.view(), routes_of(r), plan_copy_.position_of_route.span(), weight, sums);
    const MatrixView to = pass_->reduced_rows(segment, r);
    device_.download(to.data, sums.data, to.rows * to.row_bytes());
  });
  if (backward && begin < end)
    device_.download(s_.dw_position.data() + begin, dw_.as<float>() + begin, (end - begin) * 4);
  device_.synchronize();
  if (backward) pass_->send_dw(s_.dw_position, plan_->position_of_route, op);
}

void DeviceWork::run(const Op& op) {
  device_.make_current();
  const MoeLayerOptions& o = e_.options;
  const auto slots = static_cast<std::size_t>(plan_->num_local_slots);
  const auto begin_slot = static_cast<std::size_t>(op.begin_slot(plan_->num_local_slots));
  const std::size_t num_slots = static_cast<std::size_t>(op.end_slot(plan_->num_local_slots)) - begin_slot;
  const auto of_op = [&](auto& all) { return std::span(all).subspan(begin_slot, num_slots); };
  if (op.kind == OpKind::kWgrad) {
    if (when_ == WeightGradients::kLater || num_slots == 0 || plan_->num_positions() == 0) return;
    const std::span<const std::int64_t> slot_ptr = plan_copy_.slot_ptr.span(begin_slot, num_slots + 1);
    const std::span<const std::int32_t> position = plan_copy_.wgrad_position.span();  // empty: the identity
    kernels_.grouped_gemm_wgrad(slot_ptr, dy_.view(), position, act_.view(), position, of_op(e_.grad_w2));
    kernels_.grouped_gemm_wgrad(slot_ptr, hidden_.view(), position, x_.view(), position, of_op(e_.grad_w1));
    e_.gradients_changed_ = true;
    return;
  }
  const std::size_t first =
      static_cast<std::size_t>(plan_->options.block(op.part, op.chunk)) * slots + begin_slot;
  const std::int64_t begin = plan_->group_ptr[first], end = plan_->group_ptr[first + num_slots];
  if (op.kind == OpKind::kReduce) return reduce(op, begin, end);
  if (begin == end) return;
  const std::span<const std::int64_t> group_ptr = plan_copy_.group_ptr.span(first, num_slots + 1);
  const kernels::Groups with_w1{group_ptr, of_op(e_.w1)}, with_w2{group_ptr, of_op(e_.w2)};
  const std::span<const float> weight = plan_copy_.position_weight.span();
  switch (op.kind) {
    case OpKind::kExpertGemm1:
      if (pass_->is_backward()) {
        if (o.save == Save::kRows)
          kernels_.grouped_gemm_forward(with_w1, x_.view(), {}, o.dtype, e_.h_cols, e_.activation,
                                        hidden_.view(), {});
      } else {
        bring(op, s_.recv2, x_);
        kernels_.grouped_gemm_forward(with_w1, x_.view(), {}, o.dtype, e_.h_cols, e_.activation,
                                      o.save == Save::kActivations ? hidden_.view() : MatrixView{},
                                      act_.view());
      }
      break;
    case OpKind::kExpertGemm2:
      kernels_.grouped_gemm_forward(with_w2, act_.view(), {}, o.dtype, o.hidden, e_.activation, out_.view(),
                                    {});
      break;
    case OpKind::kExpertDgrad2:
      bring(op, s_.recv_dy, dy_);
      kernels_.grouped_gemm_dgrad(with_w2, dy_.view(), {}, o.dtype, act_.view());
      break;
    case OpKind::kActivationBackward:
      kernels_.activation_backward(e_.activation, hidden_.view(), act_.view(), weight,
                                   {dw_.as<float>(), weight.size()}, hidden_.view(), act_.view(), begin, end);
      break;
    case OpKind::kExpertDgrad1:
      kernels_.grouped_gemm_dgrad(with_w1, hidden_.view(), {}, o.dtype, out_.view());
      break;
    default:
      throw Error(ErrorCode::kInternal, str("op ", to_string(op.kind), " is no expert work"));
  }
}

void DeviceWork::add_gradients(std::span<const std::int64_t> group_ptr,
                               std::span<const std::int32_t> position, std::span<const std::int32_t>) {
  device_.make_current();
  later_ptr_.upload(group_ptr);
  later_position_.upload(position);
  kernels_.grouped_gemm_wgrad(later_ptr_.span(), dy_.view(), later_position_.span(), act_.view(),
                              later_position_.span(), e_.grad_w2);
  kernels_.grouped_gemm_wgrad(later_ptr_.span(), hidden_.view(), later_position_.span(), x_.view(),
                              later_position_.span(), e_.grad_w1);
  e_.gradients_changed_ = true;
}

std::int64_t DeviceWork::capacity_bytes() const {
  const PlanCopy& p = plan_copy_;
  std::int64_t bytes = dw_.capacity_bytes() + later_ptr_.capacity_bytes() + later_position_.capacity_bytes() +
                       p.group_ptr.capacity_bytes() + p.slot_ptr.capacity_bytes() +
                       p.route_ptr.capacity_bytes() + p.position_of_route.capacity_bytes() +
                       p.wgrad_position.capacity_bytes() + p.route_weight.capacity_bytes() +
                       p.position_weight.capacity_bytes();
  for (const DeviceRows* rows : {&received_, &x_, &dy_, &hidden_, &act_, &out_, &sums_})
    bytes += rows->capacity_bytes();
  return bytes;
}

}  // namespace sluice
