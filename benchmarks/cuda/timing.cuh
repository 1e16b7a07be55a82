// What the CUDA benchmarks share: their command line, memory, random data, and times of arms taken in turns.
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
#include <map>
#include <string>
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

// The options of every benchmark, and those of one.
struct Options {
  bool json = false;
  int iterations = 15;
  std::string commit = "unknown", date = "unknown";
  std::map<std::string, std::string> others;  // by name; flags are "1"
  std::string value(const std::string& name, const std::string& otherwise = "") const {
    const auto found = others.find(name);
    return found == others.end() ? otherwise : found->second;
  }
};
// `values` and `flags` are the names of options that only this benchmark has. Ends the program where one is wrong.
inline Options parse_options(int argc, char** argv, const std::vector<std::string>& values,
                             const std::vector<std::string>& flags = {}) {
  const auto has = [](const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  Options out;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--json") {
      out.json = true;
    } else if (has(flags, arg)) {
      out.others[arg] = "1";
    } else if (has(values, arg) || arg == "--iterations" || arg == "--commit" || arg == "--date") {
      if (i + 1 == argc) {
        std::fprintf(stderr, "%s needs a value\n", arg.c_str());
        std::exit(2);
      }
      const std::string value = argv[++i];
      if (arg == "--iterations") {
        out.iterations = std::max(1, std::atoi(value.c_str()));
      } else if (arg == "--commit") {
        out.commit = value;
      } else if (arg == "--date") {
        out.date = value;
      } else {
        out.others[arg] = value;
      }
    } else {
      std::fprintf(stderr,
                   "unknown argument %s\nusage: %s [--json] [--iterations N] [--commit HASH] [--date DATE]",
                   arg.c_str(), argv[0]);
      for (const std::string& name : values) std::fprintf(stderr, " [%s VALUE]", name.c_str());
      for (const std::string& name : flags) std::fprintf(stderr, " [%s]", name.c_str());
      std::fprintf(stderr, "\n");
      std::exit(2);
    }
  }
  return out;
}
// Opens the result: where and when it was measured. `more`: further members, each with a comma behind.
inline void print_json_head(const Options& options, unsigned seed, const std::string& more) {
  cudaDeviceProp properties{};
  CHECK(cudaGetDeviceProperties(&properties, 0));
  int driver = 0;
  CHECK(cudaDriverGetVersion(&driver));
  std::printf(
      "{\"date\": \"%s\", \"commit\": \"%s\", \"device\": \"%s\", \"driver\": \"CUDA %d.%d\", \"runtime\": "
      "\"CUDA %d.%d\",\n \"iterations\": %d, \"seed\": %u, %s\n \"rows\": [\n",
      options.date.c_str(), options.commit.c_str(), properties.name, driver / 1000, driver % 1000 / 10,
      CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, options.iterations, seed, more.c_str());
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
