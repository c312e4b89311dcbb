// Loops over rows and functions of sixteen floats; the order of every sum is fixed by the source.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace weaver {

// The first n < 16 values, zeros behind them.
template <typename T>
inline Vec load_some(const T* from, int64_t n) {
  T all[kLanes] = {};
  std::memcpy(all, from, n * sizeof(T));
  return load(all);
}

template <typename T>
inline void store_some(T* to, const Vec& v, int64_t n) {
  T all[kLanes];
  store(all, v);
  std::memcpy(to, all, n * sizeof(T));
}

// Calls body(position, load, store) over a row of n values: whole vectors, then what is left.
template <typename Body>
inline void over_row(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    body(
        i, [](const auto* from) { return load(from); },
        [](auto* to, const Vec& v) { store(to, v); });
  if (const int64_t left = n - i)
    body(
        i, [left](const auto* from) { return load_some(from, left); },
        [left](auto* to, const Vec& v) { store_some(to, v, left); });
}

// e^x to two units in the last place: 2^n e^r with |r| <= ln(2) / 2, and e^r by its Taylor series
// to the seventh power, whose remainder is below 1e-8 there.
inline Vec exp(Vec x) {
  x = -larger(-larger(x, splat(-87.0f)), splat(-88.0f));
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln(2) in two parts
  Vec p = splat(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + c;
  return p * floats_of((words_of(shifted) + 127) << 23);
}

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// One branch for sixteen values: a template per activation would quadruple the time to compile.
inline Vec apply(Activation activation, const Vec& x) {
  switch (activation) {
    case Activation::kSilu: return x / (1.0f + exp(-x));
    case Activation::kRelu: return larger(x, splat(0.0f));
    case Activation::kGeluTanh: {  // 0.5 (1 + tanh z) is the logistic function of 2 z.
      const Vec z = 0.797884561f * (x + 0.044715f * x * x * x);
      return x / (1.0f + exp(-2.0f * z));
    }
    case Activation::kGelu: {
      float all[kLanes];
      store(all, x);
      for (float& value : all) value *= 0.5f * (1.0f + std::erf(value * 0.707106781f));
      return load(all);
    }
  }
  return x;
}

}  // namespace weaver
