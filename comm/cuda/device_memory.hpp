// Device memory, streams and events that go with their owner.
//
// Ownership: each object owns what it made and frees it in its destructor. Thread-safety: one thread at a time, with the
// device current that was current when they were made. Blocking: making and freeing device memory waits for the device.
// Errors: kOutOfMemory, kInternal; `what` says for what.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "sluice/comm/cuda/bootstrap.hpp"

namespace sluice::comm::cuda {

// T [count], zero at first.
template <typename T>
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(std::size_t count, const char* what) : bytes_(std::max<std::size_t>(count, 1) * sizeof(T)) {
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), bytes_), what);
    check_cuda(cudaMemset(data_, 0, bytes_), what);
    // Streams that do not wait for the legacy one may use it at once.
    check_cuda(cudaStreamSynchronize(nullptr), what);
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  T* get() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  T* data_ = nullptr;
  std::size_t bytes_ = 0;
};

template <typename T>
DeviceMemory<T> upload(const std::vector<T>& values, const char* what) {
  DeviceMemory<T> to(values.size(), what);
  check_cuda(cudaMemcpy(to.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), what);
  return to;
}

// For the order of streams, not for times.
struct EventHandle {
  cudaEvent_t event = nullptr;
  EventHandle() { check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event"); }
  ~EventHandle() { cudaEventDestroy(event); }
  EventHandle(const EventHandle&) = delete;
  EventHandle& operator=(const EventHandle&) = delete;
};

// A stream of the highest priority that does not wait for the legacy one.
struct StreamHandle {
  cudaStream_t stream = nullptr;
  StreamHandle() {
    int least = 0, greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream");
    check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "stream");
  }
  ~StreamHandle() { cudaStreamDestroy(stream); }
  StreamHandle(const StreamHandle&) = delete;
  StreamHandle& operator=(const StreamHandle&) = delete;
};

}  // namespace sluice::comm::cuda
