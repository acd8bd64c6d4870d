// What rms_norm computes on single rows, once per instruction set; bf16 and fp16 are widened to fp32.
#pragma once

#include "simd.h"

#include <cstdint>

namespace fastprompt {

struct NormRow {
  const void *x, *weight;  // [width]
  int64_t width;
};

struct NormKernels {
  // Returns the factor 1 / sqrt(mean(x^2) + eps).
  float (*forward)(const NormRow&, float eps, void* out);
  void (*backward)(const NormRow&, float factor, const void* grad, void* dx);
};

namespace portable { NormKernels norm_kernels(Dtype); }
namespace avx2 { NormKernels norm_kernels(Dtype); }
namespace avx512 { NormKernels norm_kernels(Dtype); }

}  // namespace fastprompt
