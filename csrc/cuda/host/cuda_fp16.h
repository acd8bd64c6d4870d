// Half precision of the emulation in cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half { uint16_t bits; };

inline float __half2float(__half x) {
  auto const magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinite or NaN
  // The exponent's bias is 112 larger in a float; as a product this is right for subnormal numbers, too.
  auto const value = __uint_as_float(magnitude << 13) * __uint_as_float((127 + 112) << 23);
  return __uint_as_float(sign | __float_as_uint(value));
}
