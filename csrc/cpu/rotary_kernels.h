// The definitions of rotary.h, for the instructions that the including file is compiled for.
#pragma once

#include "rotary.h"
#include "simd_math.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

// Both are out = (a * cosine - b * sine, b * cosine + a * sine), where backward takes the sine of the other half, and
// its negative.
template <typename T, bool backward>
void rotate(const RotaryRow& row, void* out) {
  auto const cosine = static_cast<const T*>(row.cosine), sine = static_cast<const T*>(row.sine);
  auto const half = row.width / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    auto const lanes = smaller(LANES, half - i);
    auto const low_cosine = load(cosine + i, lanes), high_cosine = load(cosine + half + i, lanes);
    auto const own = load(sine + i, lanes), other = load(sine + half + i, lanes);
    auto const low_sine = backward ? -other : own, high_sine = backward ? -own : other;
    for (int64_t head = 0; head < row.heads; ++head) {
      auto const at = head * row.width + i;
      auto const a = load(static_cast<const T*>(row.x) + at, lanes);
      auto const b = load(static_cast<const T*>(row.x) + at + half, lanes);
      store(static_cast<T*>(out) + at, a * low_cosine - b * low_sine, lanes);
      store(static_cast<T*>(out) + at + half, b * high_cosine + a * high_sine, lanes);
    }
  }
}

template <typename T>
RotaryKernels rotary_kernels_of() {
  return {rotate<T, false>, rotate<T, true>};
}

RotaryKernels rotary_kernels(Dtype dtype) {
  if (dtype == Dtype::fp32) return rotary_kernels_of<float>();
  return dtype == Dtype::bf16 ? rotary_kernels_of<bf16>() : rotary_kernels_of<fp16>();
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
