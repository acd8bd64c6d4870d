// The definitions of multitask_prompt.h, for the instructions that the including file is compiled for.
//
// With F = rows @ cols, the factor of a prompt, and dF = grad * shared, there are four products: F of the forward pass;
// F, which is made again for dshared, rows^T dF and dF cols^T of the backward pass. All run on blocks in fp32, filled
// up with zeros.
#pragma once

#include "multitask_prompt.h"
#include "simd_math.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

constexpr int AT_ONCE = LANES == 16 ? 8 : 4;  // rows of a product: with two vectors each they fill the registers

// finish(i, d, x, lanes) for `count` <= AT_ONCE rows i and all columns d of a block, `lanes` at a time: x is the sum
// over s of a[i * row + s * step] * b[s, d].
template <int Count = AT_ONCE, typename Finish>
void multiply(int64_t count, const float* a, int64_t row, int64_t step, int64_t steps, const float* b, int64_t width,
              Finish finish) {
  if constexpr (Count > 1) {
    if (count < Count) return multiply<Count - 1>(count, a, row, step, steps, b, width, finish);
  }
  for (int64_t d = 0; d < width; d += 2 * LANES) {
    floats x[Count][2] = {};
    for (int64_t s = 0; s < steps; ++s) {
      auto const first = load(b + s * BLOCK + d), second = load(b + s * BLOCK + d + LANES);
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        auto const factor = broadcast(a[i * row + s * step]);
        x[i][0] += factor * first;
        x[i][1] += factor * second;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {  // the last vector of a row may be a part of one
      finish(i, d, x[i][0], smaller(LANES, width - d));
      if (d + LANES < width) finish(i, d + LANES, x[i][1], smaller(LANES, width - d - LANES));
    }
  }
}

// sums[m * stride + n] = the product of row m of x and row n of y, for `Ranks` rows of y and as many of x as make a
// vector of sums; the first `count` are written.
template <int Ranks>
void dot(int64_t count, const float* x, const float* y, int64_t width, float* sums, int64_t stride) {
  constexpr int POSITIONS = LANES / Ranks;
  floats parts[LANES] = {};
  for (int64_t d = 0; d < width; d += LANES) {
    floats column[Ranks];
#pragma GCC unroll 4
    for (int n = 0; n < Ranks; ++n) column[n] = load(y + n * BLOCK + d);
#pragma GCC unroll 16
    for (int m = 0; m < POSITIONS; ++m) {
      auto const number = load(x + m * BLOCK + d);
#pragma GCC unroll 4
      for (int n = 0; n < Ranks; ++n) parts[m * Ranks + n] += number * column[n];
    }
  }
  float result[POSITIONS][Ranks];
  store(result[0], totals(parts));
  for (int64_t m = 0; m < smaller<int64_t>(POSITIONS, count); ++m) {
    for (int n = 0; n < Ranks; ++n) sums[m * stride + n] = result[m][n];
  }
}

// The columns of a block of one prompt's factor.
template <typename T>
struct Factor {
  const T* task_rows;  // [P, r]
  int64_t length, rank, width;
  float *rows, *cols;  // of a chunk of positions [CHUNK, r], and [r, BLOCK]

  Factor(const TaskPrompts& a, int64_t n, int64_t column, float* room)
      : task_rows(static_cast<const T*>(a.rows) + a.tasks[n] * a.length * a.rank), length(a.length), rank(a.rank),
        width(smaller(BLOCK, a.width - column)), rows(room), cols(room + CHUNK * a.rank) {
    auto const from = static_cast<const T*>(a.cols) + a.tasks[n] * a.rank * a.width + column;
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t d = 0; d < width; d += LANES) {
        store(cols + k * BLOCK + d, load(from + k * a.width + d, smaller(LANES, width - d)));
      }
    }
  }

  // Turn to the positions from p on; returns how many there are.
  int64_t take(int64_t p) const {
    auto const count = smaller(CHUNK, length - p);
    widen<T>(task_rows + p * rank, rows, count * rank);
    return count;
  }

  // finish(i, d, x, lanes) as for multiply, of the first `count` positions.
  template <typename Finish>
  void each(int64_t count, Finish finish) const {
    for (int64_t i = 0; i < count; i += AT_ONCE) {
      multiply(smaller<int64_t>(AT_ONCE, count - i), rows + i * rank, rank, 1, rank, cols, width,
               [=](int64_t j, int64_t d, floats x, int64_t lanes) { finish(i + j, d, x, lanes); });
    }
  }
};

template <typename T>
void multitask_forward(const TaskPrompts& a, void* out, int64_t n, int64_t column, float* room) {
  const Factor<T> factor(a, n, column, room);
  for (int64_t p = 0; p < a.length; p += CHUNK) {
    auto const count = factor.take(p);
    auto const shared = static_cast<const T*>(a.shared) + p * a.width + column;
    auto const to = static_cast<T*>(out) + (n * a.length + p) * a.width + column;
    factor.each(count, [=, stride = a.width](int64_t i, int64_t d, floats x, int64_t lanes) {
      store(to + i * stride + d, load(shared + i * stride + d, lanes) * x, lanes);
    });
  }
}

template <typename T>
void multitask_backward(const TaskPrompts& a, const void* grad, int64_t column, const BlockGradients& g, float* room) {
  auto const width = smaller(BLOCK, a.width - column);
  float dshared[CHUNK * BLOCK], dfactor[CHUNK * BLOCK] = {};
  for (int64_t p = 0; p < a.length; p += CHUNK) {
    std::memset(dshared, 0, sizeof(dshared));
    auto const count = smaller(CHUNK, a.length - p);
    auto const shared = static_cast<const T*>(a.shared) + p * a.width + column;
    for (int64_t n = 0; n < a.count; ++n) {
      const Factor<T> factor(a, n, column, room);
      factor.take(p);
      auto const upstream = static_cast<const T*>(grad) + (n * a.length + p) * a.width + column;
      if (g.shared) {
        factor.each(count, [=, stride = a.width, sums = &dshared[0]](int64_t i, int64_t d, floats x, int64_t lanes) {
          auto const to = sums + i * BLOCK + d;
          store(to, load(to) + x * load(upstream + i * stride + d, lanes));
        });
      }
      if (!g.rows && !g.cols) continue;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < width; d += LANES) {
          auto const lanes = smaller(LANES, width - d), at = i * a.width + d;
          store(dfactor + i * BLOCK + d, load(upstream + at, lanes) * load(shared + at, lanes));
        }
      }
      for (int64_t k = 0; g.cols && k < a.rank; k += AT_ONCE) {
        auto const to = g.cols + (g.slots[n] * a.rank + k) * BLOCK;
        multiply(smaller<int64_t>(AT_ONCE, a.rank - k), factor.rows + k, 1, a.rank, count, dfactor, width,
                 [=](int64_t i, int64_t d, floats x, int64_t) {
                   store(to + i * BLOCK + d, load(to + i * BLOCK + d) + x);
                 });
      }
      auto const drows = [&](auto ranks, int64_t k) {
        constexpr int step = LANES / ranks;
        for (int64_t i = 0; i < count; i += step) {
          auto const to = g.rows + (n * a.length + p + i) * a.rank + k;
          dot<ranks>(count - i, dfactor + i * BLOCK, factor.cols + k * BLOCK, width, to, a.rank);
        }
      };
      int64_t k = 0;
      for (; g.rows && k + 4 <= a.rank; k += 4) drows(std::integral_constant<int, 4>(), k);
      for (; g.rows && k < a.rank; ++k) drows(std::integral_constant<int, 1>(), k);
    }
    for (int64_t i = 0; g.shared && i < count; ++i) {
      narrow<T>(dshared + i * BLOCK, static_cast<T*>(g.shared) + (p + i) * a.width + column, width);
    }
  }
}

MultitaskKernels multitask_kernels(Dtype dtype) {
  if (dtype == Dtype::fp32) return {multitask_forward<float>, multitask_backward<float>, narrow<float>};
  if (dtype == Dtype::bf16) return {multitask_forward<bf16>, multitask_backward<bf16>, narrow<bf16>};
  return {multitask_forward<fp16>, multitask_backward<fp16>, narrow<fp16>};
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
