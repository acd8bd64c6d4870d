// What gated_activation computes on runs of numbers, once per instruction set; bf16 and fp16 are widened to fp32, and
// rounded where PyTorch's own two operations would round.
#pragma once

#include "simd.h"

#include <cstdint>

namespace fastprompt {

enum class Activation { silu, gelu_tanh };

struct GatedKernels {
  void (*forward)(const void* gate, const void* up, void* out, int64_t count);
  // dgate or dup may be null: nobody needs it.
  void (*backward)(const void* grad, const void* gate, const void* up, void* dgate, void* dup, int64_t count);
};

namespace portable { GatedKernels gated_kernels(Dtype, Activation); }
namespace avx2 { GatedKernels gated_kernels(Dtype, Activation); }
namespace avx512 { GatedKernels gated_kernels(Dtype, Activation); }

}  // namespace fastprompt
