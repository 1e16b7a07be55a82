// What the CUDA tests share: memory on the device, canaries behind it, and skipping where there is no GPU.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace sluice::kernels::cuda {

#define CUDA_OK(call) ASSERT_EQ(call, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

// Values on the device with a guard behind them that nothing may write to.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()) {
    if (cudaMalloc(&data_, size_ * sizeof(T) + kGuardBytes) != cudaSuccess) std::abort();
    put(values);
    cudaMemset(reinterpret_cast<char*>(data_) + size_ * sizeof(T), kGuard, kGuardBytes);
  }
  DeviceArray(std::size_t size, T value) : DeviceArray(std::vector<T>(size, value)) {}
  ~DeviceArray() {
    std::vector<unsigned char> guard(kGuardBytes);
    cudaMemcpy(guard.data(), reinterpret_cast<const char*>(data_) + size_ * sizeof(T), kGuardBytes,
               cudaMemcpyDeviceToHost);
    EXPECT_TRUE(std::all_of(guard.begin(), guard.end(), [](unsigned char c) { return c == kGuard; }))
        << "memory behind an array of " << size_ << " elements was written";
    cudaFree(data_);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() { return data_; }
  void put(const std::vector<T>& values) {
    cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
    // From pageable memory the call may return before the last part is there, and streams that do not block do not wait.
    cudaStreamSynchronize(cudaStreamLegacy);
  }
  std::vector<T> get() const {
    std::vector<T> values(size_);
    cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  static constexpr std::size_t kGuardBytes = 64;
  static constexpr unsigned char kGuard = 0xA5;
  T* data_ = nullptr;
  std::size_t size_;
};

// Why there is no GPU of at least this compute capability; empty: there is one.
inline std::string no_device(int least_major) {
  int count = 0, major = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result != cudaSuccess || count == 0)
    return std::string("no CUDA device: ") + cudaGetErrorString(result);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (major >= least_major) return {};
  return "device 0 has compute capability " + std::to_string(major) + ".x; this needs " +
         std::to_string(least_major) + ".0";
}

// Skips without such a GPU.
template <int kLeastMajor>
class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = no_device(kLeastMajor); !why.empty()) GTEST_SKIP() << why;
  }
  void TearDown() override {
    if (!IsSkipped()) {
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    }
  }
};

}  // namespace sluice::kernels::cuda
