// Attention dropout's factors, in vectors of keys; defined, and explained, in ops/prefix_attention/dropout.py.
#pragma once

#include "simd_math.h"

namespace fastprompt {

struct Dropout {
  bool active;
  uint64_t key;        // the mixed seed
  uint32_t threshold;  // words below it are dropped
  float scale;         // of weights that are kept
};

namespace FASTPROMPT_SIMD {

// Of one row and head.
inline uint64_t dropout_key(const Dropout& dropout, int64_t row, int64_t head) {
  auto x = dropout.key + (uint64_t(head) << 40) + uint64_t(row);
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

template <uint32_t... LANE>
inline words lane_numbers(std::integer_sequence<uint32_t, LANE...>) { return words{LANE...}; }

// 0 or the scale, for keys at `position` and behind.
inline floats dropout_factors(const Dropout& dropout, uint64_t key, int64_t position) {
  constexpr uint32_t step = 0x9E3779B9;
  const uint32_t first = uint32_t(position) * step + uint32_t(key);
  auto x = lane_numbers(std::make_integer_sequence<uint32_t, LANES>()) * step + first;
  x = (x ^ x >> 16) * 0x21F0AAAD;
  x = (x ^ x >> 15 ^ uint32_t(key >> 32)) * 0x735A2D97;
  return x >= dropout.threshold ? broadcast(dropout.scale) : floats{};
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
