// A slice of the MoE FFN in bfloat16 on the matrix tiles of AMX.
//
// A tile instruction adds A (16 x 32) times B (32 x 16) to C (16 x 16). A is read row by row as it
// lies in memory; B wants two values of one column side by side ("pairs"). Hidden activations are
// therefore computed transposed, with rows of gate and up as A and the tokens, packed once per
// slice, as B; and the down projection with the hidden activations as A and two rows of down
// interleaved as B. No weight is transposed, as a GEMM library would do on every call: rows of gate
// and up are copied side by side, and that only where more than 32 tokens read them.
#pragma once

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define WEAVER_AMX 1
#else
#define WEAVER_AMX 0
#endif

#if WEAVER_AMX
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "vector.h"

namespace weaver::amx {

using c10::BFloat16;
using Pair = uint32_t;

constexpr int64_t kSide = 16;          // rows and columns of a tile of pairs or floats
constexpr int64_t kDepth = 32;         // bfloat16 values in a row of a tile
constexpr int64_t kChunkTiles = 1536;  // tiles of tokens that stay in the second cache
constexpr int64_t kLine = 64;          // bytes of a cache line
constexpr int64_t kRowsAhead = 16;     // rows of down that are fetched before they are read
constexpr int64_t kPanels = 4;         // times 32 columns of down that are read at once

struct alignas(64) Tile {
  Pair at[kSide][kSide];
};

// Linux lends the tiles to processes that ask for them.
inline bool permitted() {
  constexpr int64_t kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

inline void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// Exchanges the lanes of two vectors whose bit S is set with those where it is not.
template <size_t S, size_t... I>
inline void exchange(Bits& a, Bits& b, std::index_sequence<I...>) {
  const Bits low = __builtin_shufflevector(a, b, int(I & S ? 16 + I - S : I)...);
  b = __builtin_shufflevector(a, b, int(I & S ? 16 + I : I + S)...);
  a = low;
}

template <size_t S>
inline void exchange_all(Bits (&rows)[kSide]) {
  for (size_t i = 0; i < kSide; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<kSide>{});
}

inline void transpose(const Tile& from, Tile& to) {
  Bits rows[kSide];
  std::memcpy(rows, from.at, sizeof rows);
  exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
  std::memcpy(to.at, rows, sizeof rows);
}

inline Bits widen(const BFloat16* from) {
  Shorts s;
  std::memcpy(&s, from, sizeof s);
  return __builtin_convertvector(s, Bits);
}

inline void store_pairs(Pair* to, Bits low, Bits high) {
  const Bits pairs = low | high << 16;
  std::memcpy(to, &pairs, sizeof pairs);
}

struct Slice {
  const BFloat16 *gate, *up, *down;  // of the slice's first neuron
  int64_t gate_stride, up_stride, down_stride;
  const float *gate_bias, *up_bias;  // or nullptr
  int64_t neurons, hidden;           // hidden is a multiple of 32
  Activation activation;
};

// What the epilogues need to know of the tokens: where they lie, and factor(neuron, first token)
// for sixteen of them.
template <typename Row, typename Factor>
struct Tokens {
  int64_t count;
  Row row;
  Factor factor;
};

// B tiles of the tokens [first, first + 16 * blocks): (block, hidden / 32).
template <typename Row>
void pack_tokens(const BFloat16* x, int64_t hidden, int64_t count, int64_t first, int64_t blocks,
                 Row row, Tile* packed) {
  const int64_t depth = hidden / kDepth;
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      for (int64_t c = 0; c < depth; ++c) {
        Tile rows;
        const int64_t here = std::min(kSide, count - first - b * kSide);
        for (int64_t i = 0; i < here; ++i)
          std::memcpy(rows.at[i], x + row(first + b * kSide + i) * hidden + c * kDepth, 64);
        for (int64_t i = here; i < kSide; ++i) std::memset(rows.at[i], 0, 64);
        transpose(rows, packed[b * depth + c]);
      }
  });
}

inline std::unique_ptr<Tile[]> tiles(int64_t count) {
  // Not initialised; std::make_unique_for_overwrite is C++20, and torch before 2.12 asks for C++17.
  return std::unique_ptr<Tile[]>(new Tile[count]);
}

// Where A tiles are read: sixteen rows as they lie, or copied.
struct Rows {
  const void* tile;
  int64_t row_bytes, tile_bytes;

  const void* at(int64_t c) const { return static_cast<const char*>(tile) + c * tile_bytes; }
};

// A tiles of sixteen rows, zeros behind the last one: (hidden / 32). Read from tiles that lie side by
// side, because rows of a power of two in length share one set of the first cache.
inline void pack_rows(const BFloat16* rows, int64_t stride, int64_t count, int64_t hidden,
                      Tile* packed) {
  const int64_t depth = hidden / kDepth;
  for (int64_t i = 0; i < kSide; ++i)
    for (int64_t c = 0; c < depth; ++c) {
      if (i < count)
        std::memcpy(packed[c].at[i], rows + i * stride + c * kDepth, 64);
      else
        std::memset(packed[c].at[i], 0, 64);
    }
}

// Memory that is needed next, fetched bit by bit while the tiles compute.
struct Ahead {
  const char* from;
  int64_t bytes;

  void fetch(int64_t step, int64_t steps) const {
    for (int64_t at = bytes * step / steps; at < bytes * (step + 1) / steps; at += kLine)
      __builtin_prefetch(from + at, 0, 2);
  }
};

// Pre-activations of sixteen neurons for one or two blocks of tokens: gate and up of the first, then
// of the second.
template <bool kTwo>
void products(Rows gate, Rows up, const Tile* tokens, int64_t depth, Ahead ahead, Tile out[4]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < depth; ++c) {
    ahead.fetch(c, depth);
    _tile_loadd(4, gate.at(c), gate.row_bytes);
    _tile_loadd(5, up.at(c), up.row_bytes);
    _tile_loadd(6, tokens + c, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kTwo) {
      _tile_loadd(7, tokens + depth + c, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out + 0, 64);
  _tile_stored(1, out + 1, 64);
  if constexpr (kTwo) {
    _tile_stored(2, out + 2, 64);
    _tile_stored(3, out + 3, 64);
  }
}

// Eight rows of pairs: hidden activations of sixteen neurons for sixteen tokens.
template <typename Row, typename Factor>
void activate(const Slice& slice, int64_t neuron, int64_t token, const Tokens<Row, Factor>& users,
              const Tile& gate, const Tile& up, Pair (*pairs)[kSide]) {
  Bits rows[kSide] = {};
  for (int64_t i = 0; i < kSide && neuron + i < slice.neurons; ++i) {
    const int64_t n = neuron + i;
    const Vec g = load(reinterpret_cast<const float*>(gate.at[i])) +
                  (slice.gate_bias ? slice.gate_bias[n] : 0.0f);
    const Vec u = load(reinterpret_cast<const float*>(up.at[i])) +
                  (slice.up_bias ? slice.up_bias[n] : 0.0f);
    rows[i] = rounded(apply(slice.activation, g) * u * users.factor(n, token));
  }
  for (int64_t i = 0; i < kSide; i += 2) store_pairs(pairs[i / 2], rows[i], rows[i + 1]);
}

// What pair number `turn` of `turns` pairs of blocks fetches of the next sixteen neurons' rows: those
// of gate first, then those of up.
inline Ahead next_rows(const Slice& slice, int64_t neuron, int64_t turn, int64_t turns) {
  if (neuron + kSide > slice.neurons) return {nullptr, 0};
  const int64_t bytes = 2 * kSide * slice.hidden, half = std::max<int64_t>(1, turns / 2);
  const bool is_gate = turn < half;
  const BFloat16* rows = is_gate ? slice.gate + neuron * slice.gate_stride
                                 : slice.up + neuron * slice.up_stride;
  const int64_t count = is_gate ? half : turns - half, part = is_gate ? turn : turn - half;
  const int64_t begin = bytes * part / count / kLine * kLine;
  return {reinterpret_cast<const char*>(rows) + begin, bytes * (part + 1) / count - begin};
}

// Hidden activations of 32 neurons for all blocks, as A tiles: hidden[b * stride].
template <typename Row, typename Factor>
void hidden_tiles(const Slice& slice, int64_t neuron, const Tile* tokens, int64_t first,
                  int64_t blocks, const Tokens<Row, Factor>& users, Tile* scratch, Tile* hidden,
                  int64_t stride) {
  const int64_t depth = slice.hidden / kDepth;
  Tile* pairs = scratch + 2 * depth;
  Tile out[4];
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t n = neuron + half * kSide, rows = std::min(kSide, slice.neurons - n);
    auto rows_of = [&](const BFloat16* matrix, int64_t stride, Tile* copy) -> Rows {
      const BFloat16* first_row = matrix + n * stride;
      // Tiles that are used once are read where they lie, if there are sixteen rows to read.
      if (blocks <= 2 && rows == kSide) return {first_row, 2 * stride, 2 * kDepth};
      pack_rows(first_row, stride, rows, slice.hidden, copy);
      return {copy, sizeof *copy->at, sizeof *copy};
    };
    const Rows gate = rows_of(slice.gate, slice.gate_stride, scratch);
    const Rows up = rows_of(slice.up, slice.up_stride, scratch + depth);
    for (int64_t b = 0; b < blocks; b += 2) {
      const bool two = b + 1 < blocks;
      const Ahead ahead = next_rows(slice, n + kSide, b / 2, (blocks + 1) / 2);
      if (two)
        products<true>(gate, up, tokens + b * depth, depth, ahead, out);
      else
        products<false>(gate, up, tokens + b * depth, depth, ahead, out);
      for (int64_t t = 0; t < 1 + two; ++t)
        activate(slice, n, first + (b + t) * kSide, users, out[2 * t], out[2 * t + 1],
                 pairs[b + t].at + half * kSide / 2);
    }
  }
  for (int64_t b = 0; b < blocks; ++b) transpose(pairs[b], hidden[b * stride]);
}

// B tiles of `panels` times 32 columns of down: (panel, neurons / 32, 2).
inline void pack_down(const Slice& slice, int64_t column, int64_t panels, Tile* packed) {
  const int64_t depth = (slice.neurons + kDepth - 1) / kDepth;
  for (int64_t n = 0; n < depth * kDepth; n += 2) {
    const BFloat16* row = slice.down + n * slice.down_stride + column;
    for (int64_t side = 0; side < 2 * panels; ++side)
      __builtin_prefetch(row + (kRowsAhead + side % 2) * slice.down_stride + side / 2 * kDepth);
    for (int64_t side = 0; side < 2 * panels; ++side, row += kSide) {
      const Bits low = n < slice.neurons ? widen(row) : Bits{};
      const Bits high = n + 1 < slice.neurons ? widen(row + slice.down_stride) : Bits{};
      Tile& tile = packed[(side / 2 * depth + n / kDepth) * 2 + side % 2];
      store_pairs(tile.at[n % kDepth / 2], low, high);
    }
  }
}

// y[row(token)][column : column + 32] += hidden down for one or two blocks of tokens.
template <bool kTwo, typename Row, typename Factor>
void add_outputs(const Tile* hidden, const Tile* down, int64_t depth, int64_t token,
                 const Tokens<Row, Factor>& users, float* y, int64_t width, int64_t column) {
  for (int64_t i = 0; i < kSide * (1 + kTwo) && token + i < users.count; ++i) {
    const float* to = y + users.row(token + i) * width + column;
    __builtin_prefetch(to, 1);
    __builtin_prefetch(to + kSide, 1);
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < depth; ++c) {
    _tile_loadd(4, hidden + c, 64);
    _tile_loadd(6, down + 2 * c, 64);
    _tile_loadd(7, down + 2 * c + 1, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, hidden + depth + c, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  Tile out[4];
  _tile_stored(0, out + 0, 64);
  _tile_stored(1, out + 1, 64);
  if constexpr (kTwo) {
    _tile_stored(2, out + 2, 64);
    _tile_stored(3, out + 3, 64);
  }
  for (int64_t t = 0; t < 1 + kTwo; ++t)
    for (int64_t i = 0; i < kSide && token + t * kSide + i < users.count; ++i) {
      float* to = y + users.row(token + t * kSide + i) * width + column;
      const auto* left = reinterpret_cast<const float*>(out[2 * t].at[i]);
      const auto* right = reinterpret_cast<const float*>(out[2 * t + 1].at[i]);
      store(to, load(to) + load(left));
      store(to + kSide, load(to + kSide) + load(right));
    }
}

// y[row(i)] += factor * act(x gate^T) * (x up^T) down for the slice's tokens i.
template <typename Row, typename Factor>
void add_slice(const BFloat16* x, const Slice& slice, const Tokens<Row, Factor>& users, float* y) {
  const int64_t in_depth = slice.hidden / kDepth;
  const int64_t depth = (slice.neurons + kDepth - 1) / kDepth;
  // Chunks of equal size: every one of them packs the weights again.
  const int64_t all = (users.count + kSide - 1) / kSide;
  const int64_t most = std::max<int64_t>(2, kChunkTiles / in_depth);
  const int64_t chunks = (all + most - 1) / most, chunk = (all + chunks - 1) / chunks;
  const auto packed = tiles(chunk * in_depth), hidden = tiles(chunk * depth);
  for (int64_t first = 0; first < users.count; first += chunk * kSide) {
    const int64_t blocks = std::min(chunk, (users.count - first + kSide - 1) / kSide);
    pack_tokens(x, slice.hidden, users.count, first, blocks, users.row, packed.get());
    at::parallel_for(0, depth, 1, [&](int64_t from, int64_t to) {
      configure();
      const auto scratch = tiles(2 * in_depth + chunk);
      for (int64_t c = from; c < to; ++c)
        hidden_tiles(slice, c * kDepth, packed.get(), first, blocks, users, scratch.get(),
                     &hidden[c], depth);
    });
    const int64_t wide = (in_depth + kPanels - 1) / kPanels;
    at::parallel_for(0, wide, 1, [&](int64_t from, int64_t to) {
      configure();
      const auto down = tiles(2 * depth * kPanels);
      for (int64_t w = from; w < to; ++w) {
        const int64_t panel = w * kPanels, panels = std::min(kPanels, in_depth - panel);
        pack_down(slice, panel * kDepth, panels, down.get());
        for (int64_t b = 0; b < blocks; b += 2)
          for (int64_t p = 0; p < panels; ++p) {
            auto add = b + 1 < blocks ? add_outputs<true, Row, Factor>
                                      : add_outputs<false, Row, Factor>;
            add(&hidden[b * depth], &down[2 * depth * p], depth, first + b * kSide, users, y,
                slice.hidden, (panel + p) * kDepth);
          }
      }
    });
  }
  _tile_release();
}

}  // namespace weaver::amx
#endif
