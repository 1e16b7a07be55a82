// Scratch memory that only grows. Contents are not kept when it grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace sluice::kernels {

class AlignedBuffer {
 public:
  // f32 [at least num_floats], 64-byte aligned, uninitialised
  float* reserve(std::int64_t num_floats) {
    if (num_floats > num_floats_) {
      data_.reset();
      num_floats_ = 0;
      data_.reset(static_cast<float*>(::operator new(static_cast<std::size_t>(num_floats) * 4, kAlignment)));
      num_floats_ = num_floats;
    }
    return data_.get();
  }
  float* data() const { return data_.get(); }
  std::int64_t bytes() const { return num_floats_ * 4; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
  std::int64_t num_floats_ = 0;
};

}  // namespace sluice::kernels
