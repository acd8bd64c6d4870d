// The definitions of gated_activation.h, for the instructions that the including file is compiled for.
#pragma once

#include "gated_activation.h"
#include "simd_math.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

// An activation and its derivative at the same place.
struct Activated {
  floats value, slope;
};

struct Silu {
  static Activated at(floats x) {
    auto const e = exp(x < 0.0f ? x : -x);  // of a number that is not positive: it cannot overflow
    auto const sigmoid = (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
    auto const value = x * sigmoid;
    return {value, sigmoid + value * (1.0f - sigmoid)};
  }
};

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
struct GeluTanh {
  static Activated at(floats x) {
    constexpr float scale = 0.79788456f, cubic = 0.044715f;
    auto const square = x * x;
    auto const t = tanh(scale * x * (1.0f + cubic * square));
    auto const half = 0.5f * (1.0f + t);
    return {x * half, half + 0.5f * x * (1.0f - t * t) * scale * (1.0f + 3.0f * cubic * square)};
  }
};

template <typename T, typename Function>
void gated_forward(const void* gate, const void* up, void* out, int64_t count) {
  auto const g = static_cast<const T*>(gate), u = static_cast<const T*>(up);
  for (int64_t i = 0; i < count; i += LANES) {
    auto const lanes = smaller(LANES, count - i);
    auto const activated = rounded(Function::at(load(g + i, lanes)).value, g);
    store(static_cast<T*>(out) + i, activated * load(u + i, lanes), lanes);
  }
}

template <typename T, typename Function>
void gated_backward(const void* grad, const void* gate, const void* up, void* dgate, void* dup, int64_t count) {
  auto const d = static_cast<const T*>(grad), g = static_cast<const T*>(gate), u = static_cast<const T*>(up);
  for (int64_t i = 0; i < count; i += LANES) {
    auto const lanes = smaller(LANES, count - i);
    auto const upstream = load(d + i, lanes);
    auto const [value, slope] = Function::at(load(g + i, lanes));
    if (dgate != nullptr) store(static_cast<T*>(dgate) + i, rounded(upstream * load(u + i, lanes), d) * slope, lanes);
    if (dup != nullptr) store(static_cast<T*>(dup) + i, rounded(value, d) * upstream, lanes);
  }
}

template <typename Function>
GatedKernels gated_kernels_of(Dtype dtype) {
  if (dtype == Dtype::fp32) return {gated_forward<float, Function>, gated_backward<float, Function>};
  if (dtype == Dtype::bf16) return {gated_forward<bf16, Function>, gated_backward<bf16, Function>};
  return {gated_forward<fp16, Function>, gated_backward<fp16, Function>};
}

GatedKernels gated_kernels(Dtype dtype, Activation activation) {
  return activation == Activation::silu ? gated_kernels_of<Silu>(dtype) : gated_kernels_of<GeluTanh>(dtype);
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
