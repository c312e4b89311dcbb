// Three engines that add A (16 x 32) times B (32 x 16) to C (16 x 16) in bfloat16: matrix tiles,
// dot products of pairs, and products of floats. All sums are float32.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#include "vector.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define WEAVER_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define WEAVER_AMX 0
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define WEAVER_DOT 1
#else
#define WEAVER_DOT 0
#endif
#if WEAVER_AMX || WEAVER_DOT
#include <immintrin.h>
#endif

namespace weaver::tiles {

using Pair = uint32_t;

constexpr int64_t kSide = 16;   // rows and columns of a tile of pairs or floats
constexpr int64_t kDepth = 32;  // bfloat16 values in a row of a tile

struct alignas(64) Tile {
  Pair at[kSide][kSide];
};

// Where A tiles are read: sixteen rows as they lie, or copied.
struct Rows {
  const void* tile;
  int64_t row_bytes, tile_bytes;

  const char* at(int64_t c) const { return static_cast<const char*>(tile) + c * tile_bytes; }
};

// Where B tiles are read: those of the same 16 columns `step` apart, the next 16 columns `next` on.
struct Columns {
  const Tile* tile;
  int64_t step, next;

  const Tile& at(int64_t c, int64_t column) const { return tile[c * step + column * next]; }
};

// Memory that is needed next, fetched bit by bit while the tiles compute.
struct Ahead {
  const char* from;
  int64_t bytes;

  void fetch(int64_t step, int64_t steps) const {
    for (int64_t at = bytes * step / steps; at < bytes * (step + 1) / steps; at += kLine)
      __builtin_prefetch(from + at, 0, 2);
  }
};

#if WEAVER_AMX
// The matrix tiles of AMX.
struct Amx {
  // Linux lends the tiles to processes that ask for them.
  static bool permitted() {
    constexpr int64_t kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return granted;
  }

  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }

  static void end() { _tile_release(); }

  // out[a][b] = sum over `depth` tiles of A[a] B[b], for kA by kB of them.
  template <int kA, int kB>
  static void product(const Rows (&a)[2], Columns b, int64_t depth, Ahead ahead,
                      Tile (&out)[2][2]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < depth; ++c) {
      ahead.fetch(c, depth);
      _tile_loadd(4, a[0].at(c), a[0].row_bytes);
      _tile_loadd(6, &b.at(c, 0), 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kB > 1) {
        _tile_loadd(7, &b.at(c, 1), 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kA > 1) {
        _tile_loadd(5, a[1].at(c), a[1].row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kB > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, &out[0][0], 64);
    if constexpr (kB > 1) _tile_stored(1, &out[0][1], 64);
    if constexpr (kA > 1) _tile_stored(2, &out[1][0], 64);
    if constexpr (kA > 1 && kB > 1) _tile_stored(3, &out[1][1], 64);
  }
};
#endif

// Computes sixteen columns of a row of C at a time, for as many rows as the registers hold: a pair
// of A, the same for all columns, times sixteen pairs of B. Step has `Columns`, its form of sixteen
// pairs of B, `load` and `add(sum, pair of A, columns)`.
template <typename Step, int kRowsAtOnce>
struct Vectors {
  static void begin() {}
  static void end() {}

  template <int kA, int kB>
  static void product(const Rows (&a)[2], Columns b, int64_t depth, Ahead ahead,
                      Tile (&out)[2][2]) {
    for (int side = 0; side < kA; ++side)
      for (int64_t row = 0; row < kSide; row += kRowsAtOnce) {
        Vec sums[kRowsAtOnce][kB] = {};
        const int64_t turn = (side * kSide + row) / kRowsAtOnce, turns = kA * kSide / kRowsAtOnce;
        for (int64_t c = 0; c < depth; ++c) {
          ahead.fetch(turn * depth + c, turns * depth);
          const char* rows = a[side].at(c) + row * a[side].row_bytes;
          for (int64_t k = 0; k < kSide; ++k) {
            typename Step::Columns columns[kB];
            for (int j = 0; j < kB; ++j) columns[j] = Step::load(b.at(c, j).at[k]);
            for (int i = 0; i < kRowsAtOnce; ++i) {
              Pair pair;
              std::memcpy(&pair, rows + i * a[side].row_bytes + k * sizeof pair, sizeof pair);
              for (int j = 0; j < kB; ++j) Step::add(sums[i][j], pair, columns[j]);
            }
          }
        }
        for (int i = 0; i < kRowsAtOnce; ++i)
          for (int j = 0; j < kB; ++j)
            store(reinterpret_cast<float*>(out[side][j].at[row + i]), sums[i][j]);
      }
  }
};

#if WEAVER_DOT
// vdpbf16ps of AVX512-BF16: two products for each of sixteen sums.
struct DotStep {
  using Columns = __m512bh;

  static Columns load(const Pair* pairs) {
    return (__m512bh)_mm512_load_si512(pairs);
  }

  static void add(Vec& sum, Pair pair, Columns columns) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, columns, (__m512bh)_mm512_set1_epi32(pair));
  }
};
using Dot = Vectors<DotStep, 8>;
#endif

// Pairs taken apart into floats, for every other processor.
struct FloatStep {
  using Columns = Two;

  static Columns load(const Pair* pairs) {
    return load_two(reinterpret_cast<const c10::BFloat16*>(pairs));
  }

  static void add(Vec& sum, Pair pair, const Columns& columns) {
    const Pair words[2] = {pair << 16, pair & 0xffff0000u};
    float values[2];
    std::memcpy(values, words, sizeof words);
    sum += columns.first * values[0];
    sum += columns.second * values[1];
  }
};
#ifdef __AVX512F__
using Floats = Vectors<FloatStep, 8>;
#else
using Floats = Vectors<FloatStep, 2>;
#endif

}  // namespace weaver::tiles
