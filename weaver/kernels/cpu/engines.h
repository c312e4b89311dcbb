// Engines that add A (16 x 32) times B (32 x 16) to C (16 x 16) in bfloat16: matrix tiles, dot
// products of pairs, and products of floats; and one that adds A (16 x 16) times B (16 x 16) in
// float32. All sums are float32.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
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

using c10::BFloat16;
using Word = uint32_t;  // two bfloat16 values, a "pair", or one float

constexpr int64_t kSide = 16;  // rows and columns of a tile of words
template <typename T>
constexpr int64_t kDepth = kSide * sizeof(Word) / sizeof(T);  // values in a row of a tile

struct alignas(64) Tile {
  Word at[kSide][kSide];
};
constexpr int64_t kTileRow = sizeof Tile::at[0];

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

// Memory that is needed next, fetched line by line while the tiles compute.
struct Ahead {
  const char* from;
  int64_t bytes;

  // Lines for each of so many steps: a division, which is not for inner loops.
  int64_t share(int64_t steps) const { return (bytes / kLine + steps - 1) / steps; }

  void fetch(int64_t step, int64_t share) const {
    const int64_t begin = step * share * kLine, end = std::min(bytes, begin + share * kLine);
    for (int64_t at = begin; at < end; at += kLine) __builtin_prefetch(from + at, 0, 2);
  }
};

#if WEAVER_AMX
// The matrix tiles of AMX.
struct Amx {
  using Value = BFloat16;

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
    const int64_t share = ahead.share(depth);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < depth; ++c) {
      ahead.fetch(c, share);
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

// Computes as many rows of C, sixteen columns each or twice as many, as the registers hold: a word
// of A, the same for all columns, times sixteen words of B. Step has `Value`, `Columns`, its form of
// sixteen words of B, `load` and `add(sum, word of A, columns)`.
template <typename Step, int kRows, int kMostTiles>
struct Vectors {
  using Value = typename Step::Value;

  static void begin() {}
  static void end() {}

  template <int kA, int kB>
  static void product(const Rows (&a)[2], Columns b, int64_t depth, Ahead ahead,
                      Tile (&out)[2][2]) {
    constexpr int kTiles = kB < kMostTiles ? kB : kMostTiles;  // of B at once
    constexpr int64_t kTurns = kA * kB / kTiles * kSide / kRows;
    const int64_t share = ahead.share(depth * kTurns);
    int64_t turn = 0;
    for (int side = 0; side < kA; ++side)
      for (int tile = 0; tile < kB; tile += kTiles)
        for (int64_t row = 0; row < kSide; row += kRows, ++turn) {
          const Turn<kTiles> here{a[side], row, {&b.at(0, tile), b.step, b.next}, depth,
                                  ahead, share, turn * depth};
          // Rows at a distance that the compiler knows need no registers for their addresses.
          if (a[side].row_bytes == kTileRow)
            here.template add<kTileRow>(&out[side][tile]);
          else
            here.template add<0>(&out[side][tile]);
        }
  }

 private:
  // Rows [row, row + kRows) of kTiles tiles of C.
  template <int kTiles>
  struct Turn {
    const Rows& a;
    int64_t row;
    Columns b;
    int64_t depth;
    Ahead ahead;
    int64_t share, step;  // of what is fetched

    // kRowBytes: distance of A's rows; 0 where it is a.row_bytes.
    template <int64_t kRowBytes>
    void add(Tile* out) const {
      const int64_t row_bytes = kRowBytes ? kRowBytes : a.row_bytes;
      Vec sums[kRows][kTiles] = {};
      for (int64_t c = 0; c < depth; ++c) {
        ahead.fetch(step + c, share);
        const char* rows = a.at(c) + row * row_bytes;
        for (int64_t k = 0; k < kSide; ++k) {
          typename Step::Columns columns[kTiles];
          for (int j = 0; j < kTiles; ++j) columns[j] = Step::load(b.at(c, j).at[k]);
          for (int i = 0; i < kRows; ++i) {
            Word word;
            std::memcpy(&word, rows + i * row_bytes + k * sizeof word, sizeof word);
            for (int j = 0; j < kTiles; ++j) Step::add(sums[i][j], word, columns[j]);
          }
        }
      }
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTiles; ++j)
          store(reinterpret_cast<float*>(out[j].at[row + i]), sums[i][j]);
    }
  };
};

#if WEAVER_DOT
// vdpbf16ps of AVX512-BF16: two products for each of sixteen sums.
struct DotStep {
  using Value = BFloat16;
  using Columns = __m512bh;

  static Columns load(const Word* pairs) {
    return (__m512bh)_mm512_load_si512(pairs);
  }

  static void add(Vec& sum, Word pair, Columns columns) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, columns, (__m512bh)_mm512_set1_epi32(pair));
  }
};
using Dot = Vectors<DotStep, 8, 2>;
#endif

// Pairs taken apart into floats, for every other processor.
struct WidenedStep {
  using Value = BFloat16;
  using Columns = Two;

  static Columns load(const Word* pairs) {
    return load_two(reinterpret_cast<const BFloat16*>(pairs));
  }

  static void add(Vec& sum, Word pair, const Columns& columns) {
    const Word words[2] = {pair << 16, pair & 0xffff0000u};
    float values[2];
    std::memcpy(values, words, sizeof words);
    sum += columns.first * values[0];
    sum += columns.second * values[1];
  }
};

struct FloatStep {
  using Value = float;
  using Columns = Vec;

  static Columns load(const Word* words) {
    return weaver::load(reinterpret_cast<const float*>(words));
  }

  static void add(Vec& sum, Word word, const Columns& columns) {
    float value;
    std::memcpy(&value, &word, sizeof value);
    sum += columns * value;
  }
};
// Thirty-two registers of sixteen lanes hold eight rows of two tiles, sixteen shorter ones four rows
// of one.
template <typename Step>
using Floating = Vectors<Step, kHeld == kLanes ? 8 : 4, kHeld == kLanes ? 2 : 1>;
using Widened = Floating<WidenedStep>;
using Floats = Floating<FloatStep>;

}  // namespace weaver::tiles
