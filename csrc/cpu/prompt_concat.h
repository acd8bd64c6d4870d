// What prompt_concat computes on single rows, once per instruction set; bf16 and fp16 are widened to fp32.
#pragma once

#include "simd.h"

#include <cstdint>

namespace fastprompt {

struct Scale {  // out = row * factor
  void* out;
  const void* row;  // [width]
  int64_t width;
  float factor;
};

constexpr int64_t COLUMNS = 1024;  // the sum of so many stays in the first-level cache

struct SumRows {  // out = factor * (the rows numbered by `order`, added up one after the other)
  void* out;
  const void* rows;  // [R, width], rows `stride` elements apart
  int64_t stride, width;  // width <= COLUMNS
  const int64_t* order;  // [count]
  int64_t count;
  float factor;
};

struct RowKernels {
  void (*scale)(const Scale&);
  void (*sum_rows)(const SumRows&);
};

namespace portable { RowKernels row_kernels(Dtype); }
namespace avx2 { RowKernels row_kernels(Dtype); }
namespace avx512 { RowKernels row_kernels(Dtype); }

}  // namespace fastprompt
