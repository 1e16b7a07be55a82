// A grow-only array of plain values for hot paths: resizing neither initialises nor shrinks, so that a buffer reused
// step after step allocates only until its high-water mark. 64-byte aligned.
//
// Ownership: owns its memory, move-only. Thread-safety: as a plain array. After resize() the contents are unspecified
// (unlike std::vector) unless the capacity sufficed, in which case they stay.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

namespace sluice {

template <typename T>
class GrowArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  GrowArray() = default;
  GrowArray(GrowArray&& other) noexcept { swap(other); }
  GrowArray& operator=(GrowArray&& other) noexcept {
    swap(other);
    return *this;
  }
  ~GrowArray() { release(); }

  // Makes the array `size` long. Capacity grows by at least half so that creeping sizes settle.
  T* resize(std::size_t size) {
    if (size > capacity_) {
      const std::size_t capacity = size > capacity_ + capacity_ / 2 ? size : capacity_ + capacity_ / 2;
      T* fresh = static_cast<T*>(::operator new(capacity * sizeof(T), kAlignment));
      release();
      data_ = fresh;
      capacity_ = capacity;
    }
    size_ = size;
    return data_;
  }
  T* assign(std::size_t size, T value) {
    resize(size);
    for (std::size_t i = 0; i < size; ++i) data_[i] = value;
    return data_;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::size_t capacity_bytes() const { return capacity_ * sizeof(T); }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  operator std::span<T>() { return {data_, size_}; }
  operator std::span<const T>() const { return {data_, size_}; }
  std::span<const T> span(std::size_t first, std::size_t count) const { return {data_ + first, count}; }

  void swap(GrowArray& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void release() {
    if (data_) ::operator delete(data_, kAlignment);
    data_ = nullptr;
  }
  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace sluice
