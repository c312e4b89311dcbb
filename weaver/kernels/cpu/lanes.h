// Sixteen floats or words at a time, in the compiler's own vector types: no instruction set is
// named. A vector is a register where registers hold sixteen lanes, else two or four of them:
// compilers keep vectors that are longer than a register in memory.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace weaver {

constexpr int64_t kLanes = 16;
constexpr int64_t kLine = 64;  // bytes of a cache line

#if defined(__AVX512F__)
constexpr int64_t kHeld = 16;  // lanes of a register
#elif defined(__AVX__)
constexpr int64_t kHeld = 8;
#else
constexpr int64_t kHeld = 4;
#endif
using FloatRegister = float __attribute__((vector_size(4 * kHeld)));
using WordRegister = uint32_t __attribute__((vector_size(4 * kHeld)));
using ShortRegister = uint16_t __attribute__((vector_size(2 * kHeld)));

// The lanes of `low`, then those of `high`.
template <typename V>
struct Twin {
  V low, high;
};

template <typename V>
constexpr bool kTwin = false;
template <typename V>
constexpr bool kTwin<Twin<V>> = true;

template <typename Register, int64_t kRegisters>
struct Joined {
  using Half = typename Joined<Register, kRegisters / 2>::Vector;
  using Vector = Twin<Half>;
};
template <typename Register>
struct Joined<Register, 1> {
  using Vector = Register;
};
using Vec = Joined<FloatRegister, kLanes / kHeld>::Vector;
using Bits = Joined<WordRegister, kLanes / kHeld>::Vector;

#define WEAVER_LANEWISE(op)                                                              \
  template <typename V>                                                                  \
  inline Twin<V> operator op(const Twin<V>& a, const Twin<V>& b) {                       \
    return {a.low op b.low, a.high op b.high};                                           \
  }                                                                                      \
  template <typename V, typename S, typename = std::enable_if_t<std::is_arithmetic_v<S>>> \
  inline Twin<V> operator op(const Twin<V>& a, S b) {                                    \
    return {a.low op b, a.high op b};                                                    \
  }                                                                                      \
  template <typename V, typename S, typename = std::enable_if_t<std::is_arithmetic_v<S>>> \
  inline Twin<V> operator op(S a, const Twin<V>& b) {                                    \
    return {a op b.low, a op b.high};                                                    \
  }                                                                                      \
  template <typename V, typename B>                                                      \
  inline Twin<V>& operator op##=(Twin<V>& a, const B& b) {                               \
    return a = a op b;                                                                   \
  }
WEAVER_LANEWISE(+)
WEAVER_LANEWISE(-)
WEAVER_LANEWISE(*)
WEAVER_LANEWISE(/)
WEAVER_LANEWISE(&)
WEAVER_LANEWISE(|)
WEAVER_LANEWISE(<<)
WEAVER_LANEWISE(>>)
#undef WEAVER_LANEWISE

template <typename V>
inline Twin<V> operator-(const Twin<V>& v) {
  return {-v.low, -v.high};
}

// Lane by lane b where b is larger, else a: a value that is no number stays one.
template <typename V>
inline V larger(const V& a, const V& b) {
  if constexpr (kTwin<V>) return {larger(a.low, b.low), larger(a.high, b.high)};
  else return b > a ? b : a;
}

inline Vec splat(float value) { return Vec{} + value; }

// The same bits as words, or as floats.
template <typename V>
inline auto words_of(const V& v) {
  if constexpr (kTwin<V>) {
    const auto low = words_of(v.low), high = words_of(v.high);
    return Twin<std::remove_const_t<decltype(low)>>{low, high};
  } else {
    return (WordRegister)v;
  }
}

template <typename V>
inline auto floats_of(const V& v) {
  if constexpr (kTwin<V>) {
    const auto low = floats_of(v.low), high = floats_of(v.high);
    return Twin<std::remove_const_t<decltype(low)>>{low, high};
  } else {
    return (FloatRegister)v;
  }
}

// A vector of V's lanes, widened from where T lies.
template <typename V, typename T>
inline V load_as(const T* from) {
  if constexpr (kTwin<V>) {
    using Part = decltype(V::low);
    return {load_as<Part>(from), load_as<Part>(from + sizeof(Part) / 4)};
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    ShortRegister shorts;
    std::memcpy(&shorts, from, sizeof shorts);
    return (V)(__builtin_convertvector(shorts, WordRegister) << 16);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#ifdef __FLT16_MAX__
    using Halves = _Float16 __attribute__((vector_size(2 * kHeld)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, V);
#else
    V v;
    for (int64_t i = 0; i < kHeld; ++i) v[i] = from[i];
    return v;
#endif
  } else {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
}

template <typename T>
inline Vec load(const T* from) {
  return load_as<Vec>(from);
}

// The bits of the nearest bfloat16 in the low half; ties to even.
template <typename V>
inline auto rounded(const V& v) {
  const auto bits = words_of(v);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <typename T, typename V>
inline void store(T* to, const V& v) {
  if constexpr (kTwin<V>) {
    store(to, v.low);
    store(to + sizeof v.low / 4, v.high);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto shorts = __builtin_convertvector(rounded(v), ShortRegister);
    std::memcpy(to, &shorts, sizeof shorts);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#ifdef __FLT16_MAX__
    using Halves = _Float16 __attribute__((vector_size(2 * kHeld)));
    const auto halves = __builtin_convertvector(v, Halves);
    std::memcpy(to, &halves, sizeof halves);
#else
    for (int64_t i = 0; i < kHeld; ++i) to[i] = v[i];
#endif
  } else {
    std::memcpy(to, &v, sizeof v);
  }
}

// Thirty-two values in whatever order costs least: those of bfloat16 are the halves of words, taken
// apart by a shift and a mask instead of being widened, which takes most compilers four shuffles.
struct Two {
  Vec first, second;
};

template <typename T>
inline Two load_two(const T* from) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const Bits words = load_as<Bits>(reinterpret_cast<const uint32_t*>(from));
    return {floats_of(words << 16), floats_of(words & 0xffff0000u)};
  } else {
    return {load(from), load(from + kLanes)};
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define WEAVER_SHUFFLES 1
#endif
#endif

#ifdef WEAVER_SHUFFLES
template <typename V, size_t... I>
inline std::pair<V, V> interleaved(const V& a, const V& b, std::index_sequence<I...>) {
  return {__builtin_shufflevector(a, b, int(I / 2 + I % 2 * kHeld)...),
          __builtin_shufflevector(a, b, int(kHeld / 2 + I / 2 + I % 2 * kHeld)...)};
}

// Lanes of a and b in turn: the first half of them, and the second.
template <typename V>
inline std::pair<V, V> interleaved(const V& a, const V& b) {
  if constexpr (kTwin<V>) {
    const auto low = interleaved(a.low, b.low), high = interleaved(a.high, b.high);
    return {{low.first, low.second}, {high.first, high.second}};
  } else {
    return interleaved(a, b, std::make_index_sequence<kHeld>{});
  }
}

template <size_t S, size_t... I>
inline FloatRegister add_halves(FloatRegister a, FloatRegister b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? kHeld + I - S : I)...) +
         __builtin_shufflevector(a, b, int(I & S ? kHeld + I : I + S)...);
}

// One step of a tree for each of N registers: halves of S lanes are added, and while there are more
// registers than half a register's lanes are free, two of them share the result.
template <size_t N, size_t S = kHeld / 2>
inline FloatRegister fold(FloatRegister* v) {
  static_assert(N <= kHeld, "one register holds the sums");
  constexpr size_t kLeft = S >= N ? N : S;
  for (size_t i = 0; i < kLeft; ++i)
    v[i] = add_halves<S>(v[i], v[S >= N ? i : i + S], std::make_index_sequence<kHeld>{});
  if constexpr (S == 1) return v[0];
  else return fold<kLeft, S / 2>(v);
}

// Lane i is the sum of v[i], for N vectors, N a power of two up to the lanes of a register; the
// other lanes repeat them.
template <int N, typename V>
inline V each_sum(V (&v)[N]) {
  if constexpr (kTwin<V>) {
    decltype(V::low) halves[N];
    for (int i = 0; i < N; ++i) halves[i] = v[i].low + v[i].high;
    const auto sums = each_sum<N>(halves);
    return {sums, sums};
  } else {
    return fold<N>(v);
  }
}
#else
inline std::pair<Vec, Vec> interleaved(const Vec& a, const Vec& b) {
  float from[2][kLanes], all[2 * kLanes];
  store(from[0], a);
  store(from[1], b);
  for (int64_t i = 0; i < 2 * kLanes; ++i) all[i] = from[i % 2][i / 2];
  return {load(all), load(all + kLanes)};
}

template <int N>
inline Vec each_sum(Vec (&v)[N]) {
  float sums[kLanes] = {};
  for (int i = 0; i < N; ++i) {
    float lanes[kLanes];
    store(lanes, v[i]);
    for (int64_t width = kLanes / 2; width > 0; width /= 2)
      for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    sums[i] = lanes[0];
  }
  return load(sums);
}
#endif

// Thirty-two values in the order of load_two, in their own order.
template <typename T>
inline Two in_order(const Two& two) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto [first, second] = interleaved(two.first, two.second);
    return {first, second};
  }
  return two;
}

}  // namespace weaver
