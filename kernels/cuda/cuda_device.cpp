#include "sluice/kernels/cuda/cuda_device.hpp"

#include <cuda_runtime.h>

#include "sluice/kernels/cuda/cuda_kernels.hpp"
#include "sluice/kernels/cuda/launch.hpp"
#include "sluice/kernels/cuda/rows.hpp"

namespace sluice::kernels::cuda {
namespace {

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {
    make_current();
    cudaDeviceProp properties{};
    check_cuda(cudaGetDeviceProperties(&properties, index), "CUDA device: cudaGetDeviceProperties");
    name_ = properties.name;
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "CUDA device: cudaStreamCreate");
    kernels_ = make_cuda_kernels(stream_);
  }
  ~CudaDevice() override {
    cudaSetDevice(index_);
    cudaStreamSynchronize(stream_);
    kernels_.reset();
    cudaStreamDestroy(stream_);
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  std::string name() const override { return name_; }
  Kernels& kernels() override { return *kernels_; }
  void make_current() override { check_cuda(cudaSetDevice(index_), "CUDA device: cudaSetDevice"); }

  void lay_out_rows(ConstMatrixView src, std::span<const std::int64_t> row_ptr,
                    std::span<const std::int32_t> position, MatrixView dst) override {
    weighted_reduce_backward(src, {}, row_ptr.data(), position.data(), nullptr, dst, nullptr, stream_);
  }

  void* allocate(std::int64_t bytes) override {
    void* memory = nullptr;
    const cudaError_t result = cudaMalloc(&memory, static_cast<std::size_t>(bytes));
    if (result == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      throw Error(ErrorCode::kOutOfMemory, str(name_, " has no ", bytes, " bytes left"));
    }
    check_cuda(result, "CUDA device: cudaMalloc");
    return memory;
  }
  void release(void* memory) noexcept override { cudaFree(memory); }
  void* allocate_host(std::int64_t bytes) override {
    void* memory = nullptr;
    if (cudaMallocHost(&memory, static_cast<std::size_t>(bytes)) == cudaSuccess) return memory;
    cudaGetLastError();
    return nullptr;
  }
  void release_host(void* memory) noexcept override { cudaFreeHost(memory); }

  void upload(void* to, const void* from, std::int64_t bytes) override {
    copy(to, from, bytes, cudaMemcpyHostToDevice);
  }
  void download(void* to, const void* from, std::int64_t bytes) override {
    copy(to, from, bytes, cudaMemcpyDeviceToHost);
  }
  void zero(void* memory, std::int64_t bytes) override {
    if (bytes > 0)
      check_cuda(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes), stream_), "CUDA device: memset");
  }
  void synchronize() override { check_cuda(cudaStreamSynchronize(stream_), "CUDA device"); }

 private:
  void copy(void* to, const void* from, std::int64_t bytes, cudaMemcpyKind kind) {
    if (bytes <= 0) return;
    const cudaError_t result = cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream_);
    if (result == cudaSuccess) return;
    cudaGetLastError();
    throw Error(ErrorCode::kInternal,
                str(name_, ": copying ", bytes, " bytes ", kind == cudaMemcpyHostToDevice ? "to" : "from",
                    " it, from ", from, " to ", to, ": ", cudaGetErrorString(result)));
  }
  int index_;
  std::string name_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<Kernels> kernels_;
};

}  // namespace

int num_cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::unique_ptr<Device> make_cuda_device(int index) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result != cudaSuccess) {
    cudaGetLastError();
    throw Error(ErrorCode::kNotSupported, str("no CUDA device: ", cudaGetErrorString(result)));
  }
  Require(index >= 0 && index < count, ErrorCode::kNotSupported, "no CUDA device ", index,
          ": this process sees ", count);
  return std::make_unique<CudaDevice>(index);
}

}  // namespace sluice::kernels::cuda
