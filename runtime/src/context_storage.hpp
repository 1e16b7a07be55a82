// Buffers of one context in flight: what a pass receives, computes and keeps. Pooled by a layer; each has a channel of
// the transport for its life. Grows to its high-water mark and stays there.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "sluice/base/grow_array.hpp"
#include "sluice/base/tensor_view.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/runtime.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice {

// Rows in memory of the caller's allocator; without one, where puts are sent from, in the transport's put memory. Contents
// are unspecified after resize.
class RowBuffer {
 public:
  RowBuffer() = default;
  ~RowBuffer() { release(); }
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;

  void set_allocator(const Allocator& allocator) { allocator_ = allocator; }
  void set_put_memory(std::shared_ptr<comm::PutMemory> memory) { put_memory_ = std::move(memory); }
  void resize(std::int64_t rows, std::int64_t cols, DType dtype);
  MatrixView view() const { return {data_, dtype_, rows_, cols_, cols_}; }
  // Rows [begin, end).
  MatrixView rows(std::int64_t begin, std::int64_t end) const {
    return {data_ + begin * row_bytes(), dtype_, end - begin, cols_, cols_};
  }
  std::int64_t row_bytes() const { return cols_ * static_cast<std::int64_t>(size_of(dtype_)); }
  std::span<std::byte> bytes() const { return {data_, static_cast<std::size_t>(rows_ * row_bytes())}; }
  std::span<std::byte> bytes(std::int64_t begin, std::int64_t end) const {
    return {data_ + begin * row_bytes(), static_cast<std::size_t>((end - begin) * row_bytes())};
  }
  std::int64_t capacity_bytes() const { return static_cast<std::int64_t>(capacity_bytes_); }

 private:
  void release();
  Allocator allocator_;
  std::shared_ptr<comm::PutMemory> put_memory_;
  bool in_put_memory_ = false;
  std::byte* data_ = nullptr;
  std::size_t capacity_bytes_ = 0;
  DType dtype_ = DType::kF32;
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
};

// Windows of a context's channel.
enum Window : std::uint32_t {
  kWindowRecv1,
  kWindowRecv2,
  kWindowRecvDy,
  kWindowRet2,
  kWindowRet1,
  kWindowDw2,
  kWindowDw1,
  kNumWindows
};

// Small tables of the pass in flight (pass_run.cpp).
struct PassTables {
  std::vector<char> done;  // [ops]
  // Indices into the plan's segments, -1 where a pair has none.
  std::vector<std::int32_t> send1_segment;               // [hop1_to]
  std::vector<std::int32_t> recv1_segment;               // [hop1_from]
  std::vector<std::int32_t> send2_segment;               // [members][own, then hop1_from]
  std::vector<std::int32_t> recv2_segment;               // [num_ranks], by source
  std::vector<std::int32_t> source_index, member_index;  // [num_ranks]
  std::vector<comm::Expect> expects;
};

// Rows laid out for a caller's own experts (dispatcher.cpp).
struct ExpertRows {
  RowBuffer rows;                      // wire dtype [padded rows, hidden]
  GrowArray<std::int64_t> slot_begin;  // int64 [num_local_slots + 1]
  GrowArray<std::int32_t> row_of_route;
  GrowArray<float> dw;  // f32 [recv2 routes]
};

struct PassSlot;

struct ContextStorage {
  ContextStorage();
  ~ContextStorage();

  std::uint32_t channel = 0;
  bool in_use = false;
  bool poisoned = false;  // a pass failed here: peers may still write, so it is never used again

  // Named as in the template (BufferId).
  RowBuffer rounded;  // own rows rounded to the wire's dtype, where that differs
  RowBuffer send1, recv1, send2, recv2, recv_dy, hidden, activation, out, partial, ret2, ret1, home;
  GrowArray<float> dw_position;  // f32 [positions]
  GrowArray<float> dw_received;  // f32 [recv2 routes], receive order
  GrowArray<float> dw_ret2;      // f32 [send2 routes], window
  GrowArray<float> dw_recv1;     // f32 [recv1 routes]
  GrowArray<float> dw_home;      // f32 [send1 routes], window

  std::vector<std::uint64_t> signal_base;  // totals before the pass in flight
  std::uint64_t num_puts = 0;              // on the channel, ever
  PassTables tables;
  ExpertRows expert_rows;
  std::unique_ptr<PassSlot> pass;             // never null; its run is there while a pass is in flight
  std::span<std::byte> windows[kNumWindows];  // as last registered

  // put_memory: null where the transport has none.
  void set_memory(const Allocator& allocator, const std::shared_ptr<comm::PutMemory>& put_memory);
  std::int64_t capacity_bytes() const;
};

// Runs a part of a pass. A failure between its start and its end leaves peers waiting and writing: the group ends with
// the reason, and the storage is never used again.
template <typename Call>
void run_in_flight(Runtime& runtime, ContextStorage& storage, std::string_view phase, Call&& call) {
  try {
    call();
  } catch (...) {
    const Status status = current_exception_status();
    storage.poisoned = true;
    if (status.scope() != Scope::kGroup) runtime.abort(phase, status.message);
    throw;
  }
}

// The storages of one layer. The lowest free one is used, so that ranks which create and destroy contexts in the same
// order use the same channels.
class ContextPool {
 public:
  ContextPool(Runtime& runtime, std::uint32_t num_signals) : runtime_(runtime), num_signals_(num_signals) {}
  // Waits for own puts to land, with the deadline. Storages that the transport may still use stay with the runtime.
  ~ContextPool();
  ContextPool(const ContextPool&) = delete;
  ContextPool& operator=(const ContextPool&) = delete;
  ContextStorage& acquire();
  // Changes whenever acquire() would return another channel than before; part of the agreement check.
  std::uint64_t state_hash() const;
  std::int64_t capacity_bytes() const;

 private:
  Runtime& runtime_;  // its RuntimeState has room for all storages to retire
  std::uint32_t num_signals_;
  std::vector<std::shared_ptr<ContextStorage>> storages_;
};

}  // namespace sluice
