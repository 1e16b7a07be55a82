// A device that computes for one rank: its memory, copies between it and the host, and its kernels, all in one order
// (its stream). The CPU is none: it computes where the rows are.
//
// Ownership: a Device owns its stream and kernels; memory from allocate() belongs to the caller, who gives it back
// before the Device goes. Thread-safety: one thread at a time, and each thread calls make_current() before it uses the
// Device. Blocking: synchronize(), allocate() and release() wait for the device; the rest queues and returns.
// Errors: kOutOfMemory; kInternal with the runtime's text, also for faults of calls queued before.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "sluice/kernels/kernels.hpp"

namespace sluice::kernels {

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;
  // The interface of kernels.hpp over this device's memory; calls are queued.
  virtual Kernels& kernels() = 0;
  virtual void make_current() = 0;

  // Rows by position, the other way round of gathering them: each is read once. For r and i in row_ptr[r]..row_ptr[r+1]-1:
  // dst[position[i]] = src[r], rounded to dst's dtype. All device memory; each position occurs once.
  // src: any dtype [n, cols]; row_ptr: int64 [n + 1] (its first value need not be 0); position: int32; dst: any dtype [*, cols]
  virtual void lay_out_rows(ConstMatrixView src, std::span<const std::int64_t> row_ptr,
                            std::span<const std::int32_t> position, MatrixView dst) = 0;

  // 256-byte aligned; contents are unspecified.
  virtual void* allocate(std::int64_t bytes) = 0;
  virtual void release(void* memory) noexcept = 0;
  // Host memory that the device copies from and to at full speed. Null: there is none left.
  virtual void* allocate_host(std::int64_t bytes) = 0;
  virtual void release_host(void* memory) noexcept = 0;

  // `from` of the host must stay as it is until synchronize() if it is from allocate_host(); any other may change as soon
  // as upload() returns. What download() brings is there after synchronize().
  virtual void upload(void* to, const void* from, std::int64_t bytes) = 0;
  virtual void download(void* to, const void* from, std::int64_t bytes) = 0;
  virtual void zero(void* memory, std::int64_t bytes) = 0;
  virtual void synchronize() = 0;
};

}  // namespace sluice::kernels
