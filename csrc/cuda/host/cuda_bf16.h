// bfloat16 of the emulation in cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
