// What rotary computes on a row, once per instruction set; bf16 and fp16 are widened to fp32.
#pragma once

#include "simd.h"

#include <cstdint>

namespace fastprompt {

struct RotaryRow {
  const void* x;             // [heads, width]
  const void *cosine, *sine; // [width]
  int64_t heads, width;      // the latter even
};

struct RotaryKernels {
  // out [heads, width]: x * cosine + turned(x) * sine, where turned(a, b) = (-b, a) of the halves of a head.
  void (*forward)(const RotaryRow&, void* out);
  // The gradient of x, from that of out in its place.
  void (*backward)(const RotaryRow&, void* out);
};

namespace portable { RotaryKernels rotary_kernels(Dtype); }
namespace avx2 { RotaryKernels rotary_kernels(Dtype); }
namespace avx512 { RotaryKernels rotary_kernels(Dtype); }

}  // namespace fastprompt
