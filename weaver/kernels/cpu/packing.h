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

using c10::BFloat16;
constexpr int64_t kRowsAhead = 16;     // rows of down that are fetched before they are read

#ifdef WEAVER_SHUFFLES
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
#else
inline void transpose(const Tile& from, Tile& to) {
  for (int64_t i = 0; i < kSide; ++i)
    for (int64_t j = 0; j < kSide; ++j) to.at[j][i] = from.at[i][j];
}
#endif

inline Bits words(const BFloat16* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

inline void store_words(Pair* to, Bits bits) { std::memcpy(to, &bits, sizeof bits); }

// Neurons of a slice that one thread computes.
struct Part {
  const BFloat16 *gate, *up, *down;  // of the first neuron
  int64_t gate_stride, up_stride, down_stride;
  const float *gate_bias, *up_bias;  // or nullptr
  int64_t neurons, hidden;           // hidden is a multiple of 32
  Activation activation;

  Part(const Ffn& ffn, int64_t begin, int64_t end)
      : gate(ffn.gate.const_data_ptr<BFloat16>() + begin * ffn.gate.stride(0)),
        up(ffn.up.const_data_ptr<BFloat16>() + begin * ffn.up.stride(0)),
        down(ffn.down.const_data_ptr<BFloat16>() + begin * ffn.down.stride(0)),
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

// B tiles of the tokens of blocks [first, first + blocks): (block, hidden / 32).
inline void pack_tokens(const BFloat16* x, int64_t hidden, const Users& users, int64_t first,
                        int64_t blocks, Tile* packed) {
  const int64_t depth = hidden / kDepth;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < depth; ++c) {
      Tile rows;
      const int64_t token = (first + b) * kSide, here = std::min(kSide, users.count() - token);
      for (int64_t i = 0; i < here; ++i)
        std::memcpy(rows.at[i], x + users.row(token + i) * hidden + c * kDepth, 64);
      for (int64_t i = here; i < kSide; ++i) std::memset(rows.at[i], 0, 64);
      transpose(rows, packed[b * depth + c]);
    }
}

inline std::unique_ptr<Tile[]> tiles(int64_t count) {
  // Not initialised; std::make_unique_for_overwrite is C++20, and torch before 2.12 asks for C++17.
  return std::unique_ptr<Tile[]>(new Tile[count]);
}

// A tiles of sixteen rows, zeros behind the last one: (hidden / 32). Tiles lie side by side because
// rows of a power of two in length share one set of the first cache.
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

// B tiles of `panels` times 32 columns of down, those of even columns and those of odd ones apart:
// (panel, neurons / 32, 2).
inline void pack_down(const Part& part, int64_t column, int64_t panels, Tile* packed) {
  const int64_t depth = (part.neurons + kDepth - 1) / kDepth;
  for (int64_t n = 0; n < depth * kDepth; n += 2) {
    const BFloat16* row = part.down + n * part.down_stride + column;
    for (int64_t panel = 0; panel < panels; ++panel) {
      __builtin_prefetch(row + kRowsAhead * part.down_stride + panel * kDepth);
      __builtin_prefetch(row + (kRowsAhead + 1) * part.down_stride + panel * kDepth);
    }
    for (int64_t panel = 0; panel < panels; ++panel, row += kDepth) {
      const Bits low = n < part.neurons ? words(row) : Bits{};
      const Bits high = n + 1 < part.neurons ? words(row + part.down_stride) : Bits{};
      Tile* tile = &packed[(panel * depth + n / kDepth) * 2];
      store_words(tile[0].at[n % kDepth / 2], (low & 0xffff) | high << 16);
      store_words(tile[1].at[n % kDepth / 2], low >> 16 | (high & 0xffff0000u));
    }
  }
}

}  // namespace weaver::tiles
