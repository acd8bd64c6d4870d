// The definitions of rms_norm.h, for the instructions that the including file is compiled for.
#pragma once

#include "rms_norm.h"
#include "simd_math.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

// The sum of term(i, lanes) over the columns. Four sums: an addition waits for the one before it.
template <typename Term>
inline float sum_of(int64_t width, const Term& term) {
  constexpr int64_t AT_ONCE = 4;
  floats sums[AT_ONCE] = {};
  int64_t i = 0;
  for (; i + AT_ONCE * LANES <= width; i += AT_ONCE * LANES) {
    for (int64_t k = 0; k < AT_ONCE; ++k) sums[k] += term(i + k * LANES, LANES);
  }
  for (; i < width; i += LANES) sums[0] += term(i, smaller(LANES, width - i));
  auto const all = sums[0] + sums[1] + (sums[2] + sums[3]);
  float total = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) total += all[lane];
  return total;
}

template <typename T>
float norm_forward(const NormRow& a, float eps, void* out) {
  auto const x = static_cast<const T*>(a.x), weight = static_cast<const T*>(a.weight);
  auto const squares = sum_of(a.width, [=](int64_t i, int64_t lanes) {
    auto const v = load(x + i, lanes);
    return v * v;
  });
  auto const factor = 1.0f / __builtin_sqrtf(squares / float(a.width) + eps);
  for (int64_t i = 0; i < a.width; i += LANES) {
    auto const lanes = smaller(LANES, a.width - i);
    store(static_cast<T*>(out) + i, rounded(load(x + i, lanes) * factor, x) * load(weight + i, lanes), lanes);
  }
  return factor;
}

template <typename T>
void norm_backward(const NormRow& a, float factor, const void* upstream, void* dx) {
  auto const x = static_cast<const T*>(a.x), weight = static_cast<const T*>(a.weight);
  auto const grad = static_cast<const T*>(upstream);
  auto const along = sum_of(a.width, [=](int64_t i, int64_t lanes) {
    return load(grad + i, lanes) * load(weight + i, lanes) * load(x + i, lanes);
  });
  auto const share = along / float(a.width) * factor * factor;
  for (int64_t i = 0; i < a.width; i += LANES) {
    auto const lanes = smaller(LANES, a.width - i);
    auto const direct = load(grad + i, lanes) * load(weight + i, lanes);
    store(static_cast<T*>(dx) + i, (direct - load(x + i, lanes) * share) * factor, lanes);
  }
}

NormKernels norm_kernels(Dtype dtype) {
  if (dtype == Dtype::fp32) return {norm_forward<float>, norm_backward<float>};
  if (dtype == Dtype::bf16) return {norm_forward<bf16>, norm_backward<bf16>};
  return {norm_forward<fp16>, norm_backward<fp16>};
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
