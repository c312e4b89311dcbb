// Sixteen floats at a time, in the compiler's own vector types: no instruction set is named, and
// the order of every sum is fixed by the source.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace weaver {

constexpr int64_t kLanes = 16;
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

// e^x to two units in the last place: 2^n e^r with |r| <= ln(2) / 2, and e^r by its Taylor series to
// the seventh power, whose remainder is below 1e-8 there.
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
