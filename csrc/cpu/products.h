// The small matrix products that attention and the LSTM are made of: C [rows, LANES * vectors] (+)= A B, one register
// block a call.
//
// The block stays in registers while the sum runs: ROWS x VECTORS accumulators, a row of B, and one number of A at a
// time, broadcast. A comes as rows WIDTH apart (`step` is 1) or transposed: the numbers of a step side by side, `step`
// floats from those of the next.
#pragma once

#include "simd_math.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

constexpr int ROWS = FASTPROMPT_LANES == 16 ? 12 : FASTPROMPT_LANES == 8 ? 6 : 4;  // <= LANES
constexpr int VECTORS = 2;
constexpr int64_t PANEL = VECTORS * LANES;
constexpr int64_t KEYS = 128;          // keys in a block, a multiple of PANEL
// Floats between rows of a block of scores: an odd number of cache lines, and room for one vector more than the keys.
constexpr int64_t WIDTH = KEYS + 16;

template <int rows, int vectors, int64_t step>
struct Block {
  template <typename Visit>
  static inline __attribute__((always_inline)) void each(Visit visit) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) visit(i, j);
    }
  }

  static void multiply(int64_t steps, const float* a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                       bool add) {
    floats x[rows][vectors];
    each([&](int i, int j) { __builtin_prefetch(c + i * c_stride + j * LANES, 1); });
    // the addresses are worked out again at the end: no registers for them in the loop
    asm("" : "+r"(c), "+r"(c_stride));
    each([&](int i, int j) { x[i][j] = floats{}; });  // not c: sums of like size round less
    for (int64_t k = 0; k < steps; ++k) {
      floats row[vectors];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) row[j] = load(b + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        auto const factor = broadcast(a[step > 1 ? i : i * WIDTH]);
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) x[i][j] += factor * row[j];
      }
      a += step;
      b += b_stride;
    }
    asm("" : "+r"(c), "+r"(c_stride));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i, c += c_stride) {
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) store(c + j * LANES, add ? x[i][j] + load(c + j * LANES) : x[i][j]);
    }
  }
};

using Multiply = void (*)(int64_t, const float*, const float*, int64_t, float*, int64_t, bool);

template <int vectors, int64_t step, size_t... I>
inline Multiply choose_block(int64_t rows, std::index_sequence<I...>) {
  static constexpr Multiply table[] = {&Block<int(I) + 1, vectors, step>::multiply...};
  return table[rows - 1];
}

// The product for a block of 1 to ROWS rows and 1 to VECTORS vectors.
template <int64_t step>
inline Multiply block(int64_t rows, int64_t vectors) {
  auto const all = std::make_index_sequence<ROWS>();
  return vectors == 1 ? choose_block<1, step>(rows, all) : choose_block<2, step>(rows, all);
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
