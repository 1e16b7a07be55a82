// Scratch memory that only grows. Contents are not kept when it grows.
//
// The memory is aligned to and a multiple of the size of a huge page, and the system is asked to use huge pages for
// it: the GEMM walks it with strides that would otherwise cost a page walk every few lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sluice::kernels {

class AlignedBuffer {
 public:
  // f32 [at least num_floats], uninitialised
  float* reserve(std::int64_t num_floats) {
    if (num_floats > num_floats_) {
      data_.reset();
      num_floats_ = 0;
      const std::size_t bytes =
          (static_cast<std::size_t>(num_floats) * 4 + kHugePage - 1) / kHugePage * kHugePage;
      data_.reset(static_cast<float*>(::operator new (bytes, std::align_val_t{kHugePage})));
#ifdef __linux__
      madvise(data_.get(), bytes, MADV_HUGEPAGE);  // only a hint: failure changes nothing
#endif
      num_floats_ = static_cast<std::int64_t>(bytes / 4);
    }
    return data_.get();
  }
  std::int64_t bytes() const {
    return num_floats_ * 4;
  }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
  struct Free {
    void operator()(float* p) const { ::operator delete (p, std::align_val_t{kHugePage}); }
  };
  std::unique_ptr<float, Free> data_;
  std::int64_t num_floats_ = 0;
};

}  // namespace sluice::kernels
