// The definitions of prompt_concat.h, for the instructions that the including file is compiled for.
#pragma once

#include "prompt_concat.h"
#include "simd.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

// How to load and store two vectors, or a part of one.
struct Two {
  template <typename T>
  Pair load(const T* p) const { return load_pair(p); }
  template <typename T>
  void store(T* p, Pair x) const { store_pair(p, x); }
};
struct Part {
  int64_t lanes;
  template <typename T>
  floats load(const T* p) const { return FASTPROMPT_SIMD::load(p, lanes); }
  template <typename T>
  void store(T* p, floats x) const { FASTPROMPT_SIMD::store(p, x, lanes); }
};

// step(i, how) for the columns from i on: two vectors of them, and parts at the end of the row.
template <typename Step>
inline __attribute__((always_inline)) void along(int64_t width, const Step& step) {
  int64_t i = 0;
  for (; i + 2 * LANES <= width; i += 2 * LANES) step(i, Two());
  for (; i < width; i += LANES) step(i, Part{width - i < LANES ? width - i : LANES});
}

template <typename T>
void scale(const Scale& a) {
  auto const row = static_cast<const T*>(a.row);
  auto const out = static_cast<T*>(a.out);
  along(a.width, [&](int64_t i, auto how) { how.store(out + i, how.load(row + i) * a.factor); });
}

// Add `Count` rows to the sum so far; `total` is where the sum goes, unless these rows are the last.
template <int Count, typename T>
void add(const T* const* rows, float* total, T* out, int64_t width, bool first, bool last, float factor) {
  along(width, [&](int64_t i, auto how) __attribute__((always_inline)) {
    auto x = first ? decltype(how.load(total)){} : how.load(total + i);
    for (int k = 0; k < Count; ++k) x = x + how.load(rows[k] + i);
    if (last) {
      how.store(out + i, x * factor);
    } else {
      how.store(total + i, x);
    }
  });
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
