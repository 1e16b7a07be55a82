// What the CUDA benchmarks share: memory, random data, and times of arms taken in turns.
// Times are from events around one call; before each, 256 MB are written, so that nothing is left in L2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace sluice::benchmarks {

#define CHECK(call)                                                                                     \
  do {                                                                                                  \
    if (const auto result = (call); static_cast<int>(result) != 0) {                                    \
      std::fprintf(stderr, "%s:%d: %s gave %d\n", __FILE__, __LINE__, #call, static_cast<int>(result)); \
      std::exit(1);                                                                                     \
    }                                                                                                   \
  } while (0)

__device__ inline float hash_value(std::uint64_t i, std::uint64_t salt) {
  std::uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull ^ salt * 0xD6E8FEB86659FD93ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  x ^= x >> 31;
  // The sum of four uniform values, near enough to a normal one of variance 1.
  float sum = 0;
  for (int part = 0; part < 4; ++part)
    sum += static_cast<float>((x >> (16 * part)) & 0xFFFF) / 65536.0f - 0.5f;
  return sum * 1.7320508f;
}
static __global__ void fill(__nv_bfloat16* data, std::int64_t count, std::uint64_t salt, float scale) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x)
    data[i] = __float2bfloat16(hash_value(i, salt) * scale);
}
template <typename T>
struct Buffer {
  T* data = nullptr;
  explicit Buffer(std::int64_t count) {
    CHECK(cudaMalloc(&data, std::max<std::int64_t>(count, 1) * sizeof(T)));
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(static_cast<std::int64_t>(values.size())) {
    CHECK(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};
using Bf16 = Buffer<__nv_bfloat16>;

struct Timing {
  double median_us, mad_us;
};
inline Timing summarize(std::vector<double> us) {
  const auto median = [](std::vector<double>& v) {
    std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
    return v[v.size() / 2];
  };
  const double middle = median(us);
  for (double& u : us) u = std::abs(u - middle);
  return {middle, median(us)};
}

class Timer {
 public:
  explicit Timer(int iterations) : iterations_(iterations), flush_(std::int64_t{256} << 20) {
    CHECK(cudaEventCreate(&begin_));
    CHECK(cudaEventCreate(&end_));
  }
  // Times of each arm, taken in turns.
  std::vector<Timing> run(const std::vector<std::function<void()>>& arms) {
    std::vector<std::vector<double>> us(arms.size());
    for (int i = -2; i < iterations_; ++i) {
      for (std::size_t arm = 0; arm < arms.size(); ++arm) {
        CHECK(cudaMemsetAsync(flush_.data, i & 0xFF, std::size_t{256} << 20, nullptr));
        CHECK(cudaEventRecord(begin_, nullptr));
        arms[arm]();
        CHECK(cudaEventRecord(end_, nullptr));
        CHECK(cudaEventSynchronize(end_));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, begin_, end_));
        if (i >= 0) us[arm].push_back(ms * 1e3);
      }
    }
    std::vector<Timing> result;
    for (auto& arm : us) result.push_back(summarize(std::move(arm)));
    return result;
  }

 private:
  int iterations_;
  Buffer<unsigned char> flush_;
  cudaEvent_t begin_{}, end_{};
};

}  // namespace sluice::benchmarks
