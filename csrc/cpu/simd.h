// Vectors of floats, as wide as the instructions that the including file is compiled for; loads of fp32, bf16 and fp16
// widen, stores round to nearest even.
//
// Everything lives in a namespace of the instruction set, because an inline function that two files share is linked
// once.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define FASTPROMPT_SIMD avx512
#define FASTPROMPT_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FASTPROMPT_SIMD avx2
#define FASTPROMPT_LANES 8
#else
#define FASTPROMPT_SIMD portable
#define FASTPROMPT_LANES 4
#endif

namespace fastprompt {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
enum class Dtype { fp32, bf16, fp16 };

namespace FASTPROMPT_SIMD {

constexpr int64_t LANES = FASTPROMPT_LANES;
typedef float floats __attribute__((vector_size(4 * FASTPROMPT_LANES)));
typedef uint32_t words __attribute__((vector_size(4 * FASTPROMPT_LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * FASTPROMPT_LANES)));

template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline floats broadcast(float x) { return x - floats{}; }

inline floats load(const float* p) {
  floats x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, floats x) { std::memcpy(p, &x, sizeof(x)); }

// The intrinsics are what the other line means, but GCC takes five instructions for that.
#if FASTPROMPT_LANES == 16
inline words widen(halves x) { return bits_as<words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(x))); }
inline halves narrow(words x) { return bits_as<halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(x))); }
#elif FASTPROMPT_LANES == 8
inline words widen(halves x) { return bits_as<words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(x))); }
inline halves narrow(words x) { return __builtin_convertvector(x, halves); }
#else
inline words widen(halves x) { return __builtin_convertvector(x, words); }
inline halves narrow(words x) { return __builtin_convertvector(x, halves); }
#endif

inline floats load(const bf16* p) {
  halves x;
  std::memcpy(&x, p, sizeof(x));
  return bits_as<floats>(widen(x) << 16);
}

// To bf16, in the lower half of each word.
inline words round_to_bf16(floats x) {
  auto const bits = bits_as<words>(x);
  auto const rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  auto const number = bits_as<words>(x == x);  // all ones or, for nan, zero
  return (rounded & number) | (0x7fc0 & ~number);
}

inline void store(bf16* p, floats x) {
  auto const y = narrow(round_to_bf16(x));
  std::memcpy(p, &y, sizeof(y));
}

#if FASTPROMPT_LANES == 16

inline floats load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline void store(fp16* p, floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif FASTPROMPT_LANES == 8

inline floats load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void store(fp16* p, floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else

// fp16 by arithmetic on the bits: an exponent of 5 bits is moved into one of 8 by a multiplication, which also makes
// subnormal numbers normal and the other way round.
inline floats load(const fp16* p) {
  halves h;
  std::memcpy(&h, p, sizeof(h));
  auto const x = widen(h);
  auto const magnitude = bits_as<words>(bits_as<floats>((x & 0x7fff) << 13) * 0x1p112f);
  auto const special = bits_as<words>((x & 0x7c00) == 0x7c00);  // infinite or nan
  return bits_as<floats>(magnitude | (special & 0x7f800000) | ((x & 0x8000) << 16));
}

inline void store(fp16* p, floats x) {
  auto const bits = bits_as<words>(x);
  auto const sign = (bits >> 16) & 0x8000;
  auto const magnitude = bits & 0x7fffffff;
  auto const tiny = bits_as<words>(magnitude < 0x38800000);  // below 2^-14: adding 0.5 puts fp16's last bit last
  auto const subnormal = bits_as<words>(bits_as<floats>(magnitude) + 0.5f) - 0x3f000000;
  auto const normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  auto const large = bits_as<words>(magnitude >= 0x477ff000);  // rounds to infinity
  auto const nan = bits_as<words>(magnitude > 0x7f800000);
  auto y = (tiny & subnormal) | (~tiny & normal);
  y = (large & 0x7c00) | (~large & y);
  y = ((nan & 0x7e00) | (~nan & y)) | sign;
  auto const h = narrow(y);
  std::memcpy(p, &h, sizeof(h));
}

#endif

// Two vectors at once. Of bf16 one has the even numbers and the other the odd ones, which are there without widening.
struct Pair {
  floats a, b;
  Pair operator*(float factor) const { return {a * factor, b * factor}; }
  Pair operator+(const Pair& other) const { return {a + other.a, b + other.b}; }
};

template <typename T>
inline Pair load_pair(const T* p) { return {load(p), load(p + LANES)}; }

inline Pair load_pair(const bf16* p) {
  words x;
  std::memcpy(&x, p, sizeof(x));
  return {bits_as<floats>(x << 16), bits_as<floats>(x & 0xffff0000)};
}

template <typename T>
inline void store_pair(T* p, Pair x) {
  store(p, x.a);
  store(p + LANES, x.b);
}

inline void store_pair(bf16* p, Pair x) {
  auto const y = round_to_bf16(x.a) | round_to_bf16(x.b) << 16;
  std::memcpy(p, &y, sizeof(y));
}

// The first `count` lanes, for the end of a row; the others are zero.
template <typename T>
inline floats load(const T* p, int64_t count) {
  if (count == LANES) return load(p);
  T lanes[LANES] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

template <typename T>
inline void store(T* p, floats x, int64_t count) {
  if (count == LANES) return store(p, x);
  T lanes[LANES];
  store(lanes, x);
  std::memcpy(p, lanes, count * sizeof(T));
}

// For a row that is read next. The hardware looks ahead only once it sees a pattern, and only within a page, so the
// head of each page is asked for.
inline void prefetch(const void* row, int64_t bytes) {
  constexpr int64_t PAGE = 4096, LINE = 64, HEAD = 8 * LINE;
  for (int64_t page = 0; page < bytes; page += PAGE) {
    for (auto i = page; i < bytes && i < page + HEAD; i += LINE) __builtin_prefetch(static_cast<const char*>(row) + i);
  }
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
