// The definitions of multitask_prompt.h, for the instructions that the including file is compiled for.
#pragma once

#include "multitask_prompt.h"
#include "simd.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

// `Count` positions of one prompt: out = shared * (rows @ cols).
template <int Count, typename T>
void positions(const T* shared, const float* rows, const T* cols, T* out, int64_t width, int64_t rank) {
  auto const step = [&](int64_t d, int64_t lanes) __attribute__((always_inline)) {
    floats factor[Count] = {};
    for (int64_t k = 0; k < rank; ++k) {
      auto const col = load(cols + k * width + d, lanes);
      for (int i = 0; i < Count; ++i) factor[i] += rows[i * rank + k] * col;
    }
    for (int i = 0; i < Count; ++i) store(out + i * width + d, load(shared + i * width + d, lanes) * factor[i], lanes);
  };
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) step(d, LANES);
  if (d < width) step(d, width - d);
}

template <typename T>
void multitask_forward(const TaskPrompts& a, void* out, int64_t n, int64_t p, float* room) {
  auto const task = a.tasks[n];
  auto const count = a.length - p < POSITIONS ? a.length - p : POSITIONS;
  auto const rows = static_cast<const T*>(a.rows) + (task * a.length + p) * a.rank;
  for (int64_t i = 0; i < count * a.rank; ++i) room[i] = load(rows + i, 1)[0];
  auto const cols = static_cast<const T*>(a.cols) + task * a.rank * a.width;
  auto const shared = static_cast<const T*>(a.shared) + p * a.width;
  auto const to = static_cast<T*>(out) + (n * a.length + p) * a.width;
  switch (count) {
    case 1: return positions<1>(shared, room, cols, to, a.width, a.rank);
    case 2: return positions<2>(shared, room, cols, to, a.width, a.rank);
    case 3: return positions<3>(shared, room, cols, to, a.width, a.rank);
    default: return positions<4>(shared, room, cols, to, a.width, a.rank);
  }
}

// What `Count` ranks from k on add to the gradients, at position p of prompt n and in `width` columns: of the gradient that
// comes in, `upstream`, and of that times the shared prompt, `dfactor`.
template <int Count, typename T>
void ranks(const TaskPrompts& a, const BlockGradients& g, int64_t n, int64_t p, int64_t k, int64_t column, int64_t width,
           const float* upstream, const float* dfactor, float* dshared) {
  auto const rows = static_cast<const T*>(a.rows) + (a.tasks[n] * a.length + p) * a.rank + k;
  auto const cols = static_cast<const T*>(a.cols) + (a.tasks[n] * a.rank + k) * a.width + column;
  auto const dcols = g.cols ? g.cols + (g.slots[n] * a.rank + k) * BLOCK : nullptr;
  float row[Count];
  for (int i = 0; i < Count; ++i) row[i] = load(rows + i, 1)[0];
  floats drow[Count] = {};
  auto const step = [&](int64_t d, int64_t lanes) __attribute__((always_inline)) {
    auto const df = load(dfactor + d);
    floats factor = {};
    for (int i = 0; i < Count; ++i) {
      auto const col = load(cols + i * a.width + d, lanes);
      factor += row[i] * col;
      if (g.rows) drow[i] += col * df;
      if (g.cols) store(dcols + i * BLOCK + d, load(dcols + i * BLOCK + d) + row[i] * df);
    }
    if (g.shared) store(dshared + d, load(dshared + d) + factor * load(upstream + d));
  };
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) step(d, LANES);
  if (d < width) step(d, width - d);
  if (g.rows) {
    for (int i = 0; i < Count; ++i) g.rows[(n * a.length + p) * a.rank + k + i] = sum(drow[i]);
  }
}

template <typename T>
void multitask_backward(const TaskPrompts& a, const void* grad, int64_t column, const BlockGradients& g) {
  auto const width = a.width - column < BLOCK ? a.width - column : BLOCK;
  // The end of a row is filled up with zeros, which add nothing.
  auto const lanes = [&](int64_t d) { return width - d < LANES ? width - d : LANES; };
  for (int64_t p = 0; p < a.length; ++p) {
    auto const shared = static_cast<const T*>(a.shared) + p * a.width + column;
    float dshared[BLOCK] = {};
    for (int64_t n = 0; n < a.count; ++n) {
      auto const dout = static_cast<const T*>(grad) + (n * a.length + p) * a.width + column;
      float upstream[BLOCK], dfactor[BLOCK];
      for (int64_t d = 0; d < width; d += LANES) {
        auto const x = load(dout + d, lanes(d));
        store(upstream + d, x);
        store(dfactor + d, x * load(shared + d, lanes(d)));
      }
      int64_t k = 0;
      for (; k + 4 <= a.rank; k += 4) ranks<4, T>(a, g, n, p, k, column, width, upstream, dfactor, dshared);
      for (; k < a.rank; ++k) ranks<1, T>(a, g, n, p, k, column, width, upstream, dfactor, dshared);
    }
    if (g.shared) {
      auto const to = static_cast<T*>(g.shared) + p * a.width + column;
      for (int64_t d = 0; d < width; d += LANES) store(to + d, load(dshared + d), lanes(d));
    }
  }
}

template <typename T>
void narrow(void* out, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    auto const lanes = count - i < LANES ? count - i : LANES;
    store(static_cast<T*>(out) + i, load(values + i, lanes), lanes);
  }
}

MultitaskKernels multitask_kernels(Dtype dtype) {
  if (dtype == Dtype::fp32) return {multitask_forward<float>, multitask_backward<float>, narrow<float>};
  if (dtype == Dtype::bf16) return {multitask_forward<bf16>, multitask_backward<bf16>, narrow<bf16>};
  return {multitask_forward<fp16>, multitask_backward<fp16>, narrow<fp16>};
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
