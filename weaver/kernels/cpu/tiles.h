// Slices of the MoE FFN in bfloat16 or float32 on tiles of 16 by 16 words.
//
// A step adds A (16 x 32; in float32 16 x 16) times B (32 x 16) to C (16 x 16), on whatever the
// processor has for it (engines.h). A is read row by row as it lies in memory; B in bfloat16 wants
// two values of one column side by side ("pairs"). Hidden activations are therefore computed transposed, with rows of gate and up as
// A and the tokens, packed once per slice, as B; and the down projection with the hidden
// activations as A and rows of down, two of bfloat16 interleaved, as B (packing.h). No weight is transposed, as a
// GEMM library would do on every call: rows of gate and up are copied side by side, and only where
// many tokens read them.
//
// One parallel region takes all slices of a call: every thread gets an equal share of the products,
// cut between tokens or neurons, and adds to outputs of its own.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "engines.h"
#include "ffn.h"
#include "packing.h"
#include "vector.h"

namespace weaver::tiles {

constexpr int64_t kChunkTiles = 1536;    // tiles of tokens that stay in the second cache
constexpr int64_t kColumns = 2 * kSide;  // of outputs that are computed at once
constexpr int64_t kPanels = 4;           // times 32 columns of down that are packed at once
// Slices of at least this many blocks of tokens are cut between tokens, which packs weights twice.
constexpr int64_t kManyBlocks = 8;

// Sixteen rows of floats, as words of an A tile before it is transposed: two rows of bfloat16 share
// one row of words.
inline void store_hidden(const Vec (&rows)[kSide], const float*, Word (*to)[kSide]) {
  std::memcpy(to, rows, sizeof rows);
}

inline void store_hidden(const Vec (&rows)[kSide], const BFloat16*, Word (*to)[kSide]) {
  for (int64_t i = 0; i < kSide; i += 2)
    store(to[i / 2], rounded(rows[i]) | rounded(rows[i + 1]) << 16);
}

// Hidden activations of sixteen neurons for sixteen tokens. The part begins at neuron `offset` of
// its slice.
template <typename T>
void activate(const Part<T>& part, int64_t neuron, int64_t offset, int64_t block,
              const Users& users, const Tile& gate, const Tile& up, Word (*words)[kSide]) {
  Vec rows[kSide] = {};
  for (int64_t i = 0; i < kSide && neuron + i < part.neurons; ++i) {
    const int64_t n = neuron + i;
    const Vec g = load(reinterpret_cast<const float*>(gate.at[i])) +
                  (part.gate_bias ? part.gate_bias[n] : 0.0f);
    const Vec u = load(reinterpret_cast<const float*>(up.at[i])) +
                  (part.up_bias ? part.up_bias[n] : 0.0f);
    rows[i] = apply(part.activation, g) * u * users.factor(offset + n, block);
  }
  store_hidden(rows, part.gate, words);
}

// The share that pair `turn` of `turns` pairs of blocks fetches of the next sixteen neurons' rows:
// those of gate first, then those of up.
template <typename T>
Ahead next_rows(const Part<T>& part, int64_t neuron, int64_t turn, int64_t turns) {
  if (neuron + kSide > part.neurons) return {nullptr, 0};
  const int64_t bytes = kSide * part.hidden * sizeof(T), half = std::max<int64_t>(1, turns / 2);
  const bool is_gate = turn < half;
  const T* rows = is_gate ? part.gate + neuron * part.gate_stride
                          : part.up + neuron * part.up_stride;
  const int64_t count = is_gate ? half : turns - half, step = is_gate ? turn : turn - half;
  const int64_t begin = bytes * step / count / kLine * kLine;
  return {reinterpret_cast<const char*>(rows) + begin, bytes * (step + 1) / count - begin};
}

// Hidden activations of a tile's depth of neurons for all blocks, as A tiles: hidden[b * stride].
template <typename Engine, typename T = typename Engine::Value>
void hidden_tiles(const Part<T>& part, int64_t neuron, int64_t offset, const Tile* tokens,
                  int64_t first, int64_t blocks, const Users& users, Tile* scratch, Tile* hidden,
                  int64_t stride) {
  constexpr int64_t kGroups = kDepth<T> / kSide;  // of sixteen neurons in a tile
  const int64_t depth = part.hidden / kDepth<T>;
  Tile* words = scratch + 2 * depth;
  Tile out[2][2];
  for (int64_t group = 0; group < kGroups; ++group) {
    const int64_t n = neuron + group * kSide, rows = std::min(kSide, part.neurons - n);
    auto rows_of = [&](const T* matrix, int64_t stride, Tile* copy) -> Rows {
      const T* first_row = matrix + n * stride;
      // Tiles that are used once are read where they lie, if there are sixteen rows to read.
      if (blocks <= 2 && rows == kSide)
        return {first_row, stride * int64_t(sizeof(T)), kTileRow};
      pack_rows(first_row, stride, rows, part.hidden, copy);
      return {copy, kTileRow, sizeof *copy};
    };
    const Rows weights[2] = {rows_of(part.gate, part.gate_stride, scratch),
                             rows_of(part.up, part.up_stride, scratch + depth)};
    for (int64_t b = 0; b < blocks; b += 2) {
      const bool two = b + 1 < blocks;
      const Ahead ahead = next_rows(part, n + kSide, b / 2, (blocks + 1) / 2);
      const Columns inputs{tokens + b * depth, 1, depth};
      if (two)
        Engine::template product<2, 2>(weights, inputs, depth, ahead, out);
      else
        Engine::template product<2, 1>(weights, inputs, depth, ahead, out);
      for (int64_t t = 0; t < 1 + two; ++t)
        activate(part, n, offset, first + b + t, users, out[0][t], out[1][t],
                 words[b + t].at + group * kSide / kGroups);
    }
  }
  for (int64_t b = 0; b < blocks; ++b) transpose(words[b], hidden[b * stride]);
}

// y[row][column : column + 32] += hidden down for kBlocks blocks of tokens, one or two.
template <typename Engine, int kBlocks>
void add_outputs(const Tile* hidden, const Tile* down, int64_t depth, int64_t block,
                 const Users& users, float* y, int64_t width, int64_t column) {
  const int64_t token = block * kSide, here = std::min(kSide * kBlocks, users.count() - token);
  for (int64_t i = 0; i < here; ++i) {
    const float* to = y + users.row(token + i) * width + column;
    __builtin_prefetch(to, 1);
    __builtin_prefetch(to + kSide, 1);
  }
  const Rows rows[2] = {{hidden, kTileRow, sizeof *hidden},
                        {hidden + depth, kTileRow, sizeof *hidden}};
  Tile out[2][2];
  Engine::template product<kBlocks, 2>(rows, Columns{down, 2, 1}, depth, Ahead{nullptr, 0}, out);
  for (int64_t i = 0; i < here; ++i) {
    const Tile(&both)[2] = out[i / kSide];
    float* to = y + users.row(token + i) * width + column;
    const Two values = in_order<typename Engine::Value>(
        {load(reinterpret_cast<const float*>(both[0].at[i % kSide])),
         load(reinterpret_cast<const float*>(both[1].at[i % kSide]))});
    store(to, load(to) + values.first);
    store(to + kSide, load(to + kSide) + values.second);
  }
}

// y += factor * act(x gate^T) * (x up^T) down of a part, for the tokens of blocks [first, last).
template <typename Engine, typename T = typename Engine::Value>
void add_part(const T* x, const Part<T>& part, int64_t offset, const Users& users,
              int64_t first, int64_t last, float* y) {
  const int64_t in_depth = part.hidden / kDepth<T>, all_panels = part.hidden / kColumns;
  const int64_t depth = (part.neurons + kDepth<T> - 1) / kDepth<T>;
  // Chunks of equal size: every one of them packs the weights again.
  const int64_t all = last - first, most = std::max<int64_t>(2, kChunkTiles / in_depth);
  const int64_t chunks = (all + most - 1) / most, chunk = (all + chunks - 1) / chunks;
  const auto packed = tiles(chunk * in_depth), hidden = tiles(chunk * depth);
  const auto scratch = tiles(2 * in_depth + chunk), down = tiles(2 * depth * kPanels);
  for (; first < last; first += chunk) {
    const int64_t blocks = std::min(chunk, last - first);
    pack_tokens(x, part.hidden, users, first, blocks, packed.get());
    for (int64_t c = 0; c < depth; ++c)
      hidden_tiles<Engine>(part, c * kDepth<T>, offset, packed.get(), first, blocks, users,
                           scratch.get(), &hidden[c], depth);
    for (int64_t panel = 0; panel < all_panels; panel += kPanels) {
      const int64_t panels = std::min(kPanels, all_panels - panel);
      pack_down(part, panel * kColumns, panels, down.get());
      for (int64_t b = 0; b < blocks; b += 2)
        for (int64_t p = 0; p < panels; ++p) {
          auto add = b + 1 < blocks ? add_outputs<Engine, 2> : add_outputs<Engine, 1>;
          add(&hidden[b * depth], &down[2 * depth * p], depth, first + b, users, y, part.hidden,
              (panel + p) * kColumns);
        }
    }
  }
}

// y[token] += the outputs of slices. The same bits for the same number of threads.
template <typename Engine, typename T = typename Engine::Value>
void add_slices(const Tensor& x, const Ffn& ffn, const std::vector<Slice>& slices, float* y) {
  // Work is counted in products of a tile's depth of neurons and 16 tokens.
  std::vector<Users> users(slices.begin(), slices.end());
  std::vector<int64_t> depths, ends;
  int64_t total = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    depths.push_back((slices[i].end - slices[i].begin + kDepth<T> - 1) / kDepth<T>);
    ends.push_back(total += depths[i] * users[i].blocks());
  }
  if (!total) return;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), total), size = x.numel();
  std::vector<std::vector<float>> sums(threads);
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    Engine::begin();
    for (int64_t thread = from; thread < to; ++thread) {
      if (thread) sums[thread].resize(size);
      float* out = thread ? sums[thread].data() : y;
      const int64_t low = total * thread / threads, high = total * (thread + 1) / threads;
      for (size_t i = 0; i < slices.size(); ++i) {
        const int64_t begin = i ? ends[i - 1] : 0, blocks = users[i].blocks(), depth = depths[i];
        const int64_t here = std::clamp(low, begin, ends[i]) - begin;
        const int64_t past = std::clamp(high, begin, ends[i]) - begin;
        if (here == past) continue;
        const bool by_tokens = blocks >= kManyBlocks;
        // Pairs of blocks, or a tile's depth of neurons: what is computed at once.
        auto block = [&](int64_t at) { return std::min(blocks, (at / depth + 1) / 2 * 2); };
        auto neuron = [&](int64_t at) {
          return std::min(slices[i].begin + at / blocks * kDepth<T>, slices[i].end);
        };
        const int64_t first = by_tokens ? block(here) : 0, last = by_tokens ? block(past) : blocks;
        const int64_t row = by_tokens ? slices[i].begin : neuron(here);
        const int64_t end = by_tokens ? slices[i].end : neuron(past);
        if (first < last && row < end)
          add_part<Engine>(x.const_data_ptr<T>(), Part<T>(ffn, row, end), row - slices[i].begin,
                           users[i], first, last, out);
      }
    }
    Engine::end();
  });
  at::parallel_for(0, size, 1 << 14, [&](int64_t from, int64_t to) {
    for (int64_t thread = 1; thread < threads; ++thread)
      over_row(to - from, [&](int64_t i, auto get, auto put) {
        put(y + from + i, get(y + from + i) + get(&sums[thread][from + i]));
      });
  });
}

}  // namespace weaver::tiles
