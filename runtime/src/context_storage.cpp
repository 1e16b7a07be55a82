#include "sluice/runtime/src/context_storage.hpp"

#include <algorithm>
#include <new>

#include "sluice/base/hash.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/runtime/src/pass_run.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {
namespace {
constexpr std::size_t kAlignment = 64;
}

void RowBuffer::resize(std::int64_t rows, std::int64_t cols, DType dtype) {
  const auto bytes = static_cast<std::size_t>(rows * cols) * size_of(dtype);
  if (bytes > capacity_bytes_) {
    const std::size_t capacity = std::max(bytes, capacity_bytes_ + capacity_bytes_ / 2);
    release();
    void* memory = nullptr;
    if (allocator_.allocate)
      memory = allocator_.allocate(capacity, kAlignment, allocator_.user);
    else if (put_memory_)
      memory = put_memory_->allocate(capacity);
    in_put_memory_ = !allocator_.allocate && memory != nullptr;
    if (!allocator_.allocate && memory == nullptr)
      memory = ::operator new(capacity, std::align_val_t(kAlignment), std::nothrow);
    Require(memory != nullptr, ErrorCode::kOutOfMemory, "context buffer of ", capacity, " bytes");
    data_ = static_cast<std::byte*>(memory);
    capacity_bytes_ = capacity;
  }
  rows_ = rows;
  cols_ = cols;
  dtype_ = dtype;
}

void RowBuffer::release() {
  if (!data_) return;
  if (allocator_.allocate) {
    if (allocator_.deallocate) allocator_.deallocate(data_, capacity_bytes_, kAlignment, allocator_.user);
  } else if (in_put_memory_) {
    put_memory_->deallocate(data_, capacity_bytes_);
  } else {
    ::operator delete(data_, std::align_val_t(kAlignment));
  }
  data_ = nullptr;
  capacity_bytes_ = 0;
}

ContextStorage::ContextStorage() : pass(std::make_unique<PassSlot>()) {}
ContextStorage::~ContextStorage() = default;

void ContextStorage::set_memory(const Allocator& allocator,
                                const std::shared_ptr<comm::PutMemory>& put_memory) {
  for (RowBuffer* b : {&rounded, &send1, &recv1, &send2, &recv2, &recv_dy, &hidden, &activation, &out,
                       &partial, &ret2, &ret1, &home, &expert_rows.rows})
    b->set_allocator(allocator);
  // What PassRun sends from.
  for (RowBuffer* b : {&send1, &send2, &partial, &ret1}) b->set_put_memory(put_memory);
}

std::int64_t ContextStorage::capacity_bytes() const {
  std::int64_t bytes = 0;
  for (const RowBuffer* b : {&rounded, &send1, &recv1, &send2, &recv2, &recv_dy, &hidden, &activation, &out,
                             &partial, &ret2, &ret1, &home, &expert_rows.rows})
    bytes += b->capacity_bytes();
  for (const GrowArray<float>* a : {&dw_position, &dw_received, &dw_ret2, &dw_recv1, &dw_home})
    bytes += static_cast<std::int64_t>(a->capacity_bytes());
  if (pass->work) bytes += pass->work->capacity_bytes();
  return bytes;
}

ContextPool::~ContextPool() {
  comm::Transport& transport = runtime_.transport();
  for (auto& storage : storages_) {
    storage->pass->run.reset();
    bool quiet = false;
    try {
      if (!storage->poisoned && transport.wait_for_puts(storage->channel, storage->num_puts).ok()) {
        for (std::uint32_t w = 0; w < kNumWindows; ++w) transport.set_window(storage->channel, w, {});
        quiet = true;
      }
    } catch (...) {
      // Not quiet, then.
    }
    // Puts from or into these buffers may be on their way until the transport has closed.
    if (!quiet) runtime_.state().retired.push_back(std::move(storage));
  }
}

ContextStorage& ContextPool::acquire() {
  for (auto& storage : storages_)
    if (!storage->in_use) {
      storage->in_use = true;
      return *storage;
    }
  std::vector<std::shared_ptr<ContextStorage>>& retired = runtime_.state().retired;
  if (retired.capacity() < runtime_.state().next_channel) retired.reserve(2 * runtime_.state().next_channel);
  auto storage = std::make_shared<ContextStorage>();
  storage->channel = runtime_.state().next_channel++;
  storage->set_memory(runtime_.options().allocator, runtime_.transport().put_memory());
  storage->signal_base.assign(num_signals_, 0);
  runtime_.transport().open_channel(storage->channel, kNumWindows, num_signals_);
  storage->in_use = true;
  storages_.push_back(std::move(storage));
  return *storages_.back();
}

std::uint64_t ContextPool::state_hash() const {
  Hasher h;
  for (const auto& storage : storages_) h.add(storage->channel).add(storage->in_use);
  return h.value();
}

std::int64_t ContextPool::capacity_bytes() const {
  std::int64_t bytes = 0;
  for (const auto& storage : storages_) bytes += storage->capacity_bytes();
  return bytes;
}

}  // namespace sluice
