// Operands of a slice's products, packed into tiles of 16 by 16 as the engines (engines.h) read
// them.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "engines.h"
#include "ffn.h"
#include "vector.h"

namespace weaver::tiles {

constexpr int64_t kRowsAhead = 16;  // rows of down that are fetched before they are read

#ifdef WEAVER_SHUFFLES
template <size_t S, size_t... I>
inline void exchange(WordRegister& a, WordRegister& b, std::index_sequence<I...>) {
  const WordRegister low = __builtin_shufflevector(a, b, int(I & S ? kHeld + I - S : I)...);
  b = __builtin_shufflevector(a, b, int(I & S ? kHeld + I : I + S)...);
  a = low;
}

// Exchanges the lanes of a whose bit S is set with those of b where it is not.
template <size_t S, typename V>
inline void exchange(V& a, V& b) {
  if constexpr (!kTwin<V>) {
    exchange<S>(a, b, std::make_index_sequence<kHeld>{});
  } else if constexpr (S == sizeof a.low / sizeof(Word)) {
    std::swap(a.high, b.low);
  } else {
    exchange<S>(a.low, b.low);
    exchange<S>(a.high, b.high);
  }
}

template <size_t S>
inline void exchange_all(Bits (&rows)[kSide]) {
  for (size_t i = 0; i < kSide; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S]);
}

inline void transpose(const Tile& from, Tile& to) {
  Bits rows[kSide];
  for (int64_t i = 0; i < kSide; ++i) rows[i] = load_as<Bits>(from.at[i]);
  exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
  for (int64_t i = 0; i < kSide; ++i) store(to.at[i], rows[i]);
}
#else
inline void transpose(const Tile& from, Tile& to) {
  for (int64_t i = 0; i < kSide; ++i)
    for (int64_t j = 0; j < kSide; ++j) to.at[j][i] = from.at[i][j];
}
#endif

template <typename T>
Bits words(const T* from) {
  return load_as<Bits>(reinterpret_cast<const Word*>(from));
}

// Neurons of a slice that one thread computes.
template <typename T>
struct Part {
  const T *gate, *up, *down;         // of the first neuron
  int64_t gate_stride, up_stride, down_stride;
  const float *gate_bias, *up_bias;  // or nullptr
  int64_t neurons, hidden;           // hidden is a multiple of 32
  Activation activation;

  Part(const Ffn& ffn, int64_t begin, int64_t end)
      : gate(ffn.gate.const_data_ptr<T>() + begin * ffn.gate.stride(0)),
        up(ffn.up.const_data_ptr<T>() + begin * ffn.up.stride(0)),
        down(ffn.down.const_data_ptr<T>() + begin * ffn.down.stride(0)),
        gate_stride(ffn.gate.stride(0)),
        up_stride(ffn.up.stride(0)),
        down_stride(ffn.down.stride(0)),
        gate_bias(data_or_null(ffn.gate_bias, begin)),
        up_bias(data_or_null(ffn.up_bias, begin)),
        neurons(end - begin),
        hidden(ffn.gate.size(1)),
        activation(ffn.activation) {}
};

// The tokens of a slice and their factors, sixteen tokens to a vector: one row of factors, or one
// per expert where the slice is the whole FFN.
class Users {
 public:
  explicit Users(const Slice& slice)
      : slice_(slice), blocks_((slice.count + kSide - 1) / kSide) {
    const int64_t rows = std::max<int64_t>(slice.experts, 1);
    if (!slice.factors) return;
    factors_.resize(rows * blocks_ * kSide);
    for (int64_t i = 0; i < slice.count; ++i)
      for (int64_t e = 0; e < rows; ++e)
        factors_[e * blocks_ * kSide + i] = slice.factors[i * rows + e];
  }

  int64_t count() const { return slice_.count; }
  int64_t blocks() const { return blocks_; }
  int64_t row(int64_t i) const { return slice_.token(i); }

  // Of a neuron of the slice for the sixteen tokens of a block.
  Vec factor(int64_t neuron, int64_t block) const {
    if (factors_.empty() || neuron < slice_.shared) return splat(1.0f);
    const int64_t e = slice_.experts ? (neuron - slice_.shared) / slice_.width : 0;
    return load(&factors_[(e * blocks_ + block) * kSide]);
  }

 private:
  const Slice& slice_;
  int64_t blocks_;
  std::vector<float> factors_;
};

// B tiles of the tokens of blocks [first, first + blocks): (block, hidden / depth of a tile).
template <typename T>
void pack_tokens(const T* x, int64_t hidden, const Users& users, int64_t first,
                        int64_t blocks, Tile* packed) {
  const int64_t depth = hidden / kDepth<T>;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < depth; ++c) {
      Tile rows;
      const int64_t token = (first + b) * kSide, here = std::min(kSide, users.count() - token);
      for (int64_t i = 0; i < here; ++i)
        std::memcpy(rows.at[i], x + users.row(token + i) * hidden + c * kDepth<T>, kTileRow);
      for (int64_t i = here; i < kSide; ++i) std::memset(rows.at[i], 0, kTileRow);
      transpose(rows, packed[b * depth + c]);
    }
}

inline std::unique_ptr<Tile[]> tiles(int64_t count) {
  // Not initialised; std::make_unique_for_overwrite is C++20, and torch before 2.12 asks for C++17.
  return std::unique_ptr<Tile[]>(new Tile[count]);
}

// A tiles of sixteen rows, zeros behind the last one: (hidden / depth of a tile). Tiles lie side by
// side because rows of a power of two in length share one set of the first cache.
template <typename T>
void pack_rows(const T* rows, int64_t stride, int64_t count, int64_t hidden, Tile* packed) {
  const int64_t depth = hidden / kDepth<T>;
  for (int64_t i = 0; i < kSide; ++i)
    for (int64_t c = 0; c < depth; ++c) {
      if (i < count)
        std::memcpy(packed[c].at[i], rows + i * stride + c * kDepth<T>, kTileRow);
      else
        std::memset(packed[c].at[i], 0, kTileRow);
    }
}

// The words of 32 columns of one row of floats, or of two rows of bfloat16, for two B tiles: of
// bfloat16 the even columns and the odd ones.
inline void store_columns(const float* row, const float*, Word* first, Word* second) {
  store(first, words(row));
  store(second, words(row + kSide));
}

inline void store_columns(const BFloat16* row, const BFloat16* next, Word* even, Word* odd) {
  const Bits low = words(row), high = next ? words(next) : Bits{};
  store(even, (low & 0xffff) | high << 16);
  store(odd, low >> 16 | (high & 0xffff0000u));
}

// B tiles of `panels` times 32 columns of down, zeros behind the last row:
// (panel, neurons / depth of a tile, 2).
template <typename T>
void pack_down(const Part<T>& part, int64_t column, int64_t panels, Tile* packed) {
  constexpr int64_t kRows = kDepth<T> / kSide;  // that share a word
  const int64_t depth = (part.neurons + kDepth<T> - 1) / kDepth<T>;
  for (int64_t n = 0; n < depth * kDepth<T>; n += kRows) {
    const T* row = part.down + n * part.down_stride + column;
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t at = 0; at < 2 * kSide; at += kDepth<T>)
          __builtin_prefetch(row + (kRowsAhead + r) * part.down_stride + panel * 2 * kSide + at);
    for (int64_t panel = 0; panel < panels; ++panel, row += 2 * kSide) {
      Tile* tile = &packed[(panel * depth + n / kDepth<T>) * 2];
      const int64_t at = n % kDepth<T> / kRows;
      if (n < part.neurons) {
        const T* next = n + 1 < part.neurons ? row + part.down_stride : nullptr;
        store_columns(row, next, tile[0].at[at], tile[1].at[at]);
      } else {
        store(tile[0].at[at], Bits{});
        store(tile[1].at[at], Bits{});
      }
    }
  }
}

}  // namespace weaver::tiles
