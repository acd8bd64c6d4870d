// What the entry points of the operators share: dtypes, integer tensors, memory.
#pragma once

#include "simd.h"

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastprompt {

inline Dtype dtype_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  auto const type = x.scalar_type();
  if (type == ScalarType::Float) return Dtype::fp32;
  if (type == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, "expected fp32, bf16 or fp16");
  return Dtype::fp16;
}

// Ask for large pages below memory that is about to be written: to be given it in pages of 4 KiB takes longer than to
// fill it. What stands before or behind on the same large page gets it, too, and that may be more of what is written.
inline void use_large_pages(const void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 1 << 21;
  constexpr int64_t LEAST = 1 << 16;  // less is not worth the call
  if (bytes < LEAST) return;
  auto const begin = reinterpret_cast<uintptr_t>(data) / PAGE * PAGE;
  auto const end = (reinterpret_cast<uintptr_t>(data) + bytes + PAGE - 1) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// For a new tensor. One this large comes straight from the system.
inline void use_large_pages(const torch::stable::Tensor& x) {
  constexpr int64_t LARGE = 1 << 25;
  auto const bytes = int64_t(x.numel() * x.element_size());
  if (bytes >= LARGE) use_large_pages(x.data_ptr(), bytes);
}

// Aligned and not initialised.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(::operator new(std::max<int64_t>(count, 1) * sizeof(float), ALIGNED))) {
    use_large_pages(data_.get(), count * sizeof(float));
  }
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t ALIGNED{64};
  struct Delete {
    void operator()(float* p) const { ::operator delete(p, ALIGNED); }
  };
  std::unique_ptr<float, Delete> data_;
};

// A vector of int32 or int64.
class Ints {
 public:
  explicit Ints(const torch::stable::Tensor& x)
      : data_(x.const_data_ptr()), stride_(x.stride(0)), size_(x.size(0)), wide_(x.element_size() == 8) {}
  int64_t size() const { return size_; }
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i * stride_] : static_cast<const int32_t*>(data_)[i * stride_];
  }

 private:
  const void* data_;
  int64_t stride_, size_;
  bool wide_;
};

}  // namespace fastprompt
