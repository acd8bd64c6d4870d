// The definitions of prompt_concat.h, for the instructions that the including file is compiled for.
#pragma once

#include "prompt_concat.h"
#include "simd.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

template <typename T>
void scale(const Scale& a) {
  auto const row = static_cast<const T*>(a.row);
  auto const out = static_cast<T*>(a.out);
  int64_t i = 0;
  for (; i + LANES <= a.width; i += LANES) store(out + i, load(row + i) * a.factor);
  if (i < a.width) store(out + i, load(row + i, a.width - i) * a.factor, a.width - i);
}

// Add `Count` rows to the sum so far; `total` is where the sum goes, unless these rows are the last.
template <int Count, typename T>
void add(const T* const* rows, float* total, T* out, int64_t width, bool first, bool last, float factor) {
  auto const step = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    floats x = first ? floats{} : load(total + i, lanes);
    for (int k = 0; k < Count; ++k) x += load(rows[k] + i, lanes);
    if (last) {
      store(out + i, x * factor, lanes);
    } else {
      store(total + i, x, lanes);
    }
  };
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) step(i, LANES);
  if (i < width) step(i, width - i);
}

template <typename T>
void sum_rows(const SumRows& a) {
  constexpr int64_t AT_ONCE = 4;  // so that the sum so far is read and written less often
  auto const row = [&](int64_t n) { return static_cast<const T*>(a.rows) + a.order[n] * a.stride; };
  float total[COLUMNS];
  for (int64_t n = 0; n < a.count || n == 0; n += AT_ONCE) {
    auto const count = a.count - n < AT_ONCE ? a.count - n : AT_ONCE;
    const T* rows[AT_ONCE];
    for (int64_t k = 0; k < count; ++k) rows[k] = row(n + k);
    for (auto k = n + AT_ONCE; k < a.count && k < n + 2 * AT_ONCE; ++k) prefetch(row(k), a.width * sizeof(T));
    auto const out = static_cast<T*>(a.out);
    auto const first = n == 0, last = n + AT_ONCE >= a.count;
    switch (count) {
      case 0: add<0>(rows, total, out, a.width, first, last, a.factor); break;
      case 1: add<1>(rows, total, out, a.width, first, last, a.factor); break;
      case 2: add<2>(rows, total, out, a.width, first, last, a.factor); break;
      case 3: add<3>(rows, total, out, a.width, first, last, a.factor); break;
      default: add<4>(rows, total, out, a.width, first, last, a.factor);
    }
  }
}

RowKernels row_kernels(Dtype dtype) {
  if (dtype == Dtype::fp32) return {scale<float>, sum_rows<float>};
  if (dtype == Dtype::bf16) return {scale<bf16>, sum_rows<bf16>};
  return {scale<fp16>, sum_rows<fp16>};
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
