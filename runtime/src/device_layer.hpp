// A layer's experts on a device: their weights and gradients there, and the work of a pass (ExpertWork) on rows that come
// from host memory and whose sums return to it. The exchange between ranks stays on the host.
//
//   forward   rows up -> by position -> GEMM 1 with activation -> GEMM 2 -> weighted sums of a row's routes -> down
//   backward  dy up -> by position -> dgrad 2 -> activation backward -> dgrad 1 -> sums -> down; wgrads
// In between everything stays on the device: rows by position, pre-activations, activations, gradients of weights.
//
// Ownership: refers to the Runtime's device, which outlives it. Thread-safety: that of the Runtime.
// Blocking: kReduce waits for what it downloads; the rest queues. Errors: kInvalidArgument, kNotSupported, those of the
// device.
// Memory: grows to its high-water mark and stays there, as the context's host buffers do.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/kernels/device.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/moe_layer.hpp"
#include "sluice/runtime/src/layer_work.hpp"

namespace sluice {

// Memory of a device that grows and is kept. Contents are unspecified after growing.
class DeviceMemory {
 public:
  explicit DeviceMemory(kernels::Device& device) : device_(device) {}
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void at_least(std::int64_t bytes);
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::int64_t capacity_bytes() const { return bytes_; }

 private:
  kernels::Device& device_;
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

// A host array's copy on the device.
template <typename T>
class DeviceCopy {
 public:
  explicit DeviceCopy(kernels::Device& device) : device_(device), memory_(device) {}
  void upload(std::span<const T> values) {
    size_ = values.size();
    memory_.at_least(static_cast<std::int64_t>(values.size_bytes()));
    device_.upload(memory_.template as<T>(), values.data(), static_cast<std::int64_t>(values.size_bytes()));
  }
  std::span<const T> span() const { return {memory_.template as<const T>(), size_}; }
  std::span<const T> span(std::size_t first, std::size_t count) const { return span().subspan(first, count); }
  std::int64_t capacity_bytes() const { return memory_.capacity_bytes(); }

 private:
  kernels::Device& device_;
  DeviceMemory memory_;
  std::size_t size_ = 0;
};

// Rows on the device.
class DeviceRows {
 public:
  explicit DeviceRows(kernels::Device& device) : memory_(device) {}
  void resize(std::int64_t rows, std::int64_t cols, DType dtype);
  MatrixView view() const { return {memory_.as<std::byte>(), dtype_, rows_, cols_, cols_}; }
  MatrixView rows(std::int64_t begin, std::int64_t end) const {
    const MatrixView all = view();
    return {all.row(begin), dtype_, end - begin, cols_, cols_};
  }
  std::int64_t capacity_bytes() const { return memory_.capacity_bytes(); }

 private:
  DeviceMemory memory_;
  DType dtype_ = DType::kF32;
  std::int64_t rows_ = 0, cols_ = 0;
};

// Weights and gradients of a layer's local experts.
class DeviceExperts {
 public:
  DeviceExperts(kernels::Device& device, const MoeLayerOptions& options, kernels::Activation activation);
  // Copies the weights; gradients on the device start from zero.
  void set_weights(std::span<const std::byte* const> w1, std::span<const std::byte* const> w2,
                   bool trainable);
  // Adds the device's gradients to the host's, which blocks, and starts them from zero again.
  void move_gradients(std::span<float* const> grad_w1, std::span<float* const> grad_w2);
  // Somebody else has added to them.
  void gradients_changed() { gradients_changed_ = true; }
  std::int64_t capacity_bytes() const;

  kernels::Device& device;
  const MoeLayerOptions& options;
  const kernels::Activation activation;
  const std::int64_t h_cols;
  // [num_local_slots], device addresses; a slot lies behind the one before it, without gaps
  std::vector<const std::byte*> w1, w2;
  std::vector<float*> grad_w1, grad_w2;

 private:
  void upload(DeviceMemory& memory, std::span<const std::byte* const> from, std::int64_t elements,
              std::vector<const std::byte*>& to);
  void make_gradients(DeviceMemory& memory, std::size_t num_slots, std::int64_t elements,
                      std::vector<float*>& to);
  void move(std::span<float* const> from, std::span<float* const> to, std::int64_t elements);
  DeviceMemory w1_memory_, w2_memory_, grad_w1_memory_, grad_w2_memory_;
  std::vector<float> staging_;
  bool gradients_changed_ = false;
  friend class DeviceWork;
};

// The expert work of one storage's passes.
class DeviceWork final : public LayerPassWork {
 public:
  DeviceWork(DeviceExperts& experts, ContextStorage& s);
  void begin(PassRun& pass, const Plan& plan, WeightGradients when) override;
  void run(const Op& op) override;
  // group_ptr: int64 [num_local_slots + 1]; position: int32 [group_ptr.back()], of the pass's positions
  void add_gradients(std::span<const std::int64_t> group_ptr, std::span<const std::int32_t> position,
                     std::span<const std::int32_t> row) override;
  std::int64_t capacity_bytes() const override;

 private:
  struct PlanCopy {
    explicit PlanCopy(kernels::Device& d)
        : group_ptr(d),
          slot_ptr(d),
          route_ptr(d),
          position_of_route(d),
          wgrad_position(d),
          route_weight(d),
          position_weight(d) {}
    DeviceCopy<std::int64_t> group_ptr, slot_ptr, route_ptr;
    DeviceCopy<std::int32_t> position_of_route, wgrad_position;
    DeviceCopy<float> route_weight, position_weight;
  };
  // Brings the received rows of the op's block and lays them out by position.
  void bring(const Op& op, const RowBuffer& from, DeviceRows& to);
  std::span<const std::int64_t> routes_of(PassRun::Range r) const;
  void reduce(const Op& op, std::int64_t begin, std::int64_t end);

  DeviceExperts& e_;
  kernels::Device& device_;
  kernels::Kernels& kernels_;
  ContextStorage& s_;
  PassRun* pass_ = nullptr;
  const Plan* plan_ = nullptr;
  WeightGradients when_ = WeightGradients::kNow;
  std::vector<char> brought_;  // [blocks] whether the block's rows are on the device
  PlanCopy plan_copy_;
  DeviceRows received_;  // wire dtype [recv2 rows, hidden]
  DeviceRows x_, dy_;    // dtype [positions, hidden]
  DeviceRows hidden_;    // dtype [positions, h_cols]
  DeviceRows act_;       // dtype [positions, ffn]
  DeviceRows out_;       // dtype [positions, hidden]
  DeviceRows sums_;      // combine dtype [recv2 rows, hidden]
  DeviceMemory dw_;      // f32 [positions]
  DeviceCopy<std::int64_t> later_ptr_;
  DeviceCopy<std::int32_t> later_position_;
};

}  // namespace sluice
