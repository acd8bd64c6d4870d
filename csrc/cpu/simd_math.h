// Elementwise functions and transposition on the vectors of simd.h.
#pragma once

#include "simd.h"

#include <utility>

namespace fastprompt {
namespace FASTPROMPT_SIMD {

template <typename T>
inline T smaller(T a, T b) { return a < b ? a : b; }
template <typename T>
inline T larger(T a, T b) { return a > b ? a : b; }
inline int64_t round_down(int64_t n, int64_t to) { return n / to * to; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline floats maximum(floats a, floats b) { return a > b ? a : b; }

template <typename T>
void widen(const void* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    auto const lanes = smaller(LANES, count - i);
    store(to + i, load(static_cast<const T*>(from) + i, lanes), lanes);
  }
}

template <typename T>
void narrow(const float* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    auto const lanes = smaller(LANES, count - i);
    store(static_cast<T*>(to) + i, load(from + i, lanes), lanes);
  }
}

// As it is stored in the dtype of the pointer.
inline floats rounded(floats x, const float*) { return x; }
template <typename T>
inline floats rounded(floats x, const T*) {
  T stored[LANES];
  store(stored, x);
  return load(stored);
}

// e^x for x <= 88, to 1e-7 of itself; 0 below the normal numbers. With n the integer next to x / log(2), e^x = 2^n e^f.
inline floats exp(floats x) {
  constexpr float log2_e = 1.44269504f, magic = 0x1.8p23f;  // adding magic leaves the nearest integer in the low bits
  constexpr float ln2 = 0.693359375f, ln2_rest = -2.12194440e-4f;  // n * ln2 is exact
  auto const bounded = maximum(broadcast(-88.0f), x);  // in this order nan stays
  auto const shifted = bounded * log2_e + magic;
  auto const n = shifted - magic;
  auto const f = bounded - n * ln2 - n * ln2_rest;
  auto y = f * 1.39337068e-3f + 8.36320501e-3f;
  y = y * f + 4.16664630e-2f;
  y = y * f + 1.66665763e-1f;
  y = y * f + 0.5f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  y = bits_as<floats>(bits_as<words>(y) + (bits_as<words>(shifted) << 23));
  return x < -87.0f ? floats{} : y;
}

inline float exp(float x) { return exp(broadcast(x))[0]; }

inline floats tanh(floats x) {
  auto const square = x * x;
  auto y = square * -5.70498872745e-3f + 2.06390887954e-2f;  // near 0, where the other form cancels
  y = y * square - 5.37397155531e-2f;
  y = y * square + 1.33314422036e-1f;
  y = y * square - 3.33332819422e-1f;
  y = y * square * x + x;
  auto const size = x < 0.0f ? -x : x;
  auto const e = exp(size * -2.0f);
  auto const large = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? y : x < 0.0f ? -large : large;
}

template <int STEP, size_t... LANE>
inline floats swap_lanes(floats x, std::index_sequence<LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (LANE ^ STEP)...);
#else
  return __builtin_shuffle(x, words{uint32_t(LANE ^ STEP)...});
#endif
}

template <int32_t... LANE>
inline floats between(floats x, int32_t from, int32_t to, floats other, std::integer_sequence<int32_t, LANE...>) {
  typedef int32_t ints __attribute__((vector_size(4 * LANES)));
  constexpr ints lanes{LANE...};
  return ((lanes >= from) & (lanes < to)) ? x : other;
}

// The lanes of x from `from` to `to`, which may lie outside, and `other` in the rest.
inline floats between(floats x, int64_t from, int64_t to, float other) {
  if (from <= 0 && to >= LANES) return x;
  return between(x, int32_t(from), int32_t(to), broadcast(other), std::make_integer_sequence<int32_t, LANES>());
}

// All lanes combined in pairs.
template <int STEP = LANES / 2, typename Combine>
inline float fold(floats x, const Combine& combine) {
  if constexpr (STEP == 0) {
    return x[0];
  } else {
    return fold<STEP / 2>(combine(x, swap_lanes<STEP>(x, std::make_index_sequence<LANES>())), combine);
  }
}

inline float maximum(floats x) {
  return fold(x, [](floats a, floats b) { return maximum(a, b); });
}

inline float total(floats x) {
  return fold(x, [](floats a, floats b) { return a + b; });
}

template <int STEP, size_t... LANE>
inline void exchange(floats& a, floats& b, std::index_sequence<LANE...>) {
#if defined(__clang__)
  auto const low = __builtin_shufflevector(a, b, (LANE & STEP ? LANE - STEP + LANES : LANE)...);
  auto const high = __builtin_shufflevector(a, b, (LANE & STEP ? LANE + LANES : LANE + STEP)...);
#else
  auto const low = __builtin_shuffle(a, b, words{(LANE & STEP ? uint32_t(LANE - STEP + LANES) : uint32_t(LANE))...});
  auto const high = __builtin_shuffle(a, b, words{(LANE & STEP ? uint32_t(LANE + LANES) : uint32_t(LANE + STEP))...});
#endif
  a = low;
  b = high;
}

template <int STEP>
inline void transpose_step(floats (&x)[LANES]) {
  if constexpr (STEP < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (!(i & STEP)) exchange<STEP>(x[i], x[i + STEP], std::make_index_sequence<LANES>());
    }
    transpose_step<2 * STEP>(x);
  }
}

inline void transpose(floats (&x)[LANES]) { transpose_step<1>(x); }

template <int STEP = 1>
inline void add_pairs(floats (&x)[LANES]) {
  if constexpr (STEP < LANES) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / STEP / 2; ++i) {
      auto a = x[2 * i], b = x[2 * i + 1];
      exchange<STEP>(a, b, std::make_index_sequence<LANES>());
      x[i] = a + b;
    }
    add_pairs<2 * STEP>(x);
  }
}

// Lane i is the sum of all lanes of x[i].
inline floats totals(floats (&x)[LANES]) {
  add_pairs(x);
  return x[0];
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
