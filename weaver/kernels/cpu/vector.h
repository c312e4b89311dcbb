// Sixteen floats at a time, in the compiler's own vector types: no instruction set is named, and
// the order of every sum is fixed by the source.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace weaver {

constexpr int64_t kLanes = 16;
constexpr int64_t kLine = 64;  // bytes of a cache line
using Vec = float __attribute__((vector_size(64)));
using Bits = uint32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(32)));

inline Vec splat(float value) { return Vec{} + value; }

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const c10::BFloat16* from) {
  Shorts s;
  std::memcpy(&s, from, sizeof s);
  const Bits bits = __builtin_convertvector(s, Bits) << 16;
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// The bits of the nearest bfloat16 in the low half; ties to even.
inline Bits rounded(Vec v) {
  Bits bits;
  std::memcpy(&bits, &v, sizeof v);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(c10::BFloat16* to, Vec v) {
  const Shorts s = __builtin_convertvector(rounded(v), Shorts);
  std::memcpy(to, &s, sizeof s);
}

#ifdef __FLT16_MAX__
using Halves = _Float16 __attribute__((vector_size(32)));

inline Vec load(const c10::Half* from) {
  Halves h;
  std::memcpy(&h, from, sizeof h);
  return __builtin_convertvector(h, Vec);
}

inline void store(c10::Half* to, Vec v) {
  const Halves h = __builtin_convertvector(v, Halves);
  std::memcpy(to, &h, sizeof h);
}
#else
inline Vec load(const c10::Half* from) {
  Vec v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = from[i];
  return v;
}

inline void store(c10::Half* to, Vec v) {
  for (int64_t i = 0; i < kLanes; ++i) to[i] = v[i];
}
#endif

// Thirty-two values in whatever order costs least: those of bfloat16 are the halves of words, taken
// apart by a shift and a mask instead of being widened, which takes most compilers four shuffles.
struct Two {
  Vec first, second;
};

inline Two load_two(const float* from) { return {load(from), load(from + kLanes)}; }
inline Two load_two(const c10::Half* from) { return {load(from), load(from + kLanes)}; }

inline Two load_two(const c10::BFloat16* from) {
  Bits words;
  std::memcpy(&words, from, sizeof words);
  const Bits even = words << 16, odd = words & 0xffff0000u;
  Two two;
  std::memcpy(&two.first, &even, sizeof even);
  std::memcpy(&two.second, &odd, sizeof odd);
  return two;
}

// The first n < 16 values, zeros behind them.
template <typename T>
inline Vec load_some(const T* from, int64_t n) {
  T all[kLanes] = {};
  std::memcpy(all, from, n * sizeof(T));
  return load(all);
}

template <typename T>
inline void store_some(T* to, Vec v, int64_t n) {
  T all[kLanes];
  store(all, v);
  std::memcpy(to, all, n * sizeof(T));
}

inline float sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define WEAVER_SHUFFLES 1
#endif
#endif

#ifdef WEAVER_SHUFFLES
template <size_t... I>
inline Two merge(Vec even, Vec odd, std::index_sequence<I...>) {
  return {__builtin_shufflevector(even, odd, int(I / 2 + I % 2 * kLanes)...),
          __builtin_shufflevector(even, odd, int(kLanes / 2 + I / 2 + I % 2 * kLanes)...)};
}

// The values of even and odd places, in their order.
inline Two merged(Two two) {
  return merge(two.first, two.second, std::make_index_sequence<kLanes>{});
}

template <size_t S, size_t... I>
inline Vec add_halves(Vec a, Vec b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? 16 + I - S : I)...) +
         __builtin_shufflevector(a, b, int(I & S ? 16 + I : I + S)...);
}

// One step of a tree for each of N vectors: halves of S lanes are added, and while there are more
// vectors than half a vector's lanes are free, two of them share the result.
template <size_t N, size_t S = kLanes / 2>
inline Vec fold(Vec* v) {
  if constexpr (S >= N) {
    for (size_t i = 0; i < N; ++i)
      v[i] = add_halves<S>(v[i], v[i], std::make_index_sequence<kLanes>{});
    if constexpr (S == 1) return v[0];
    else return fold<N, S / 2>(v);
  } else {
    for (size_t i = 0; i < S; ++i)
      v[i] = add_halves<S>(v[i], v[i + S], std::make_index_sequence<kLanes>{});
    if constexpr (S == 1) return v[0];
    else return fold<S, S / 2>(v);
  }
}

// Lane i is the sum of v[i], for N vectors, N a power of two up to 16; the other lanes repeat them.
template <int N>
inline Vec each_sum(Vec (&v)[N]) {
  return fold<N>(v);
}
#else
inline Two merged(Two two) {
  float all[2 * kLanes];
  for (int64_t i = 0; i < 2 * kLanes; ++i) all[i] = (i % 2 ? two.second : two.first)[i / 2];
  return {load(all), load(all + kLanes)};
}

template <int N>
inline Vec each_sum(Vec (&v)[N]) {
  Vec sums{};
  for (int i = 0; i < N; ++i) sums[i] = sum(v[i]);
  return sums;
}
#endif

// Thirty-two values in the order of load_two, in their own order.
template <typename T>
inline Two in_order(Two two) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) return merged(two);
  return two;
}

// Calls body(position, load, store) over a row of n values: whole vectors, then what is left.
template <typename Body>
inline void over_row(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    body(
        i, [](const auto* from) { return load(from); }, [](auto* to, Vec v) { store(to, v); });
  if (const int64_t left = n - i)
    body(
        i, [left](const auto* from) { return load_some(from, left); },
        [left](auto* to, Vec v) { store_some(to, v, left); });
}

// e^x to two units in the last place: 2^n e^r with |r| <= ln(2) / 2, and e^r by its Taylor series
// to the seventh power, whose remainder is below 1e-8 there.
inline Vec exp(Vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln(2) in two parts
  Vec p = splat(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + c;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// One branch for sixteen values: a template per activation would quadruple the time to compile.
inline Vec apply(Activation activation, Vec x) {
  switch (activation) {
    case Activation::kSilu: return x / (1.0f + exp(-x));
    case Activation::kRelu: return x > 0.0f ? x : splat(0.0f);
    case Activation::kGeluTanh: {  // 0.5 (1 + tanh z) is the logistic function of 2 z.
      const Vec z = 0.797884561f * (x + 0.044715f * x * x * x);
      return x / (1.0f + exp(-2.0f * z));
    }
    case Activation::kGelu:
      for (int64_t i = 0; i < kLanes; ++i) x[i] *= 0.5f * (1.0f + std::erf(x[i] * 0.707106781f));
  }
  return x;
}

}  // namespace weaver
