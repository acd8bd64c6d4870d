// What multitask_prompt computes on blocks, once per instruction set; bf16 and fp16 are widened to fp32.
#pragma once

#include "simd.h"

#include <cstdint>

namespace fastprompt {

struct TaskPrompts {  // contiguous tensors of one dtype
  const void *shared, *rows, *cols;  // [P, D], [T, P, r], [T, r, D]
  const int64_t* tasks;  // [N]
  int64_t count, length, width, rank;  // N, P, D, r
};

constexpr int64_t BLOCK = 256;  // columns that are computed together, so that what is used again stays in a cache
constexpr int64_t CHUNK = 16;  // positions of a prompt, likewise

struct BlockGradients {  // of BLOCK columns, or those that are left; null is not computed
  void* shared;  // [P, D], written in these columns
  float* rows;  // [N, P, r], written: what these columns add to the gradient of each prompt's rows
  float* cols;  // [slots, r, BLOCK], added to
  const int64_t* slots;  // [N], which of them is that of the prompt's task
};

struct MultitaskKernels {
  // Both compute the columns from `column` on, BLOCK or those that are left; `room` holds CHUNK * r + r * BLOCK floats.
  void (*forward)(const TaskPrompts&, void* out, int64_t n, int64_t column, float* room);  // [N, P, D], prompt n
  void (*backward)(const TaskPrompts&, const void* grad, int64_t column, const BlockGradients&, float* room);
  void (*narrow)(const float* from, void* to, int64_t count);  // to the dtype
};

namespace portable { MultitaskKernels multitask_kernels(Dtype); }
namespace avx2 { MultitaskKernels multitask_kernels(Dtype); }
namespace avx512 { MultitaskKernels multitask_kernels(Dtype); }

}  // namespace fastprompt
