// Few tokens: reading the rows is all that costs, so every row is read once, for all tokens that
// use it. One parallel region takes all slices of a call; while four rows are computed, those that
// come after them are fetched, also where they belong to the next expert.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "engines.h"
#include "ffn.h"
#include "vector.h"

namespace weaver {

constexpr int64_t kRows = 4;            // rows of a block
constexpr int64_t kBlocksAhead = 4;     // blocks from the one computed to the one fetched
constexpr int64_t kBlocksPerTask = 16;  // fewer cost more to hand out than to compute

// Rows [row, row + count) of the matrices, for the tokens of a slice.
struct Block {
  int64_t row, count;
  const Slice* slice;
};

// How 32 columns of a row meet those of a token's x: as floats, or in bfloat16 as they are.
template <typename T>
struct Meeting {
  using Stored = float;
  using Columns = Two;

  static Columns of_row(const T* row) { return load_two(row); }
  static Columns of_token(const float* x) { return {load(x), load(x + kLanes)}; }
  static void keep(float* x, const T* from) {
    const Two two = load_two(from);
    store(x, two.first);
    store(x + kLanes, two.second);
  }
  static void add(Vec& sum, const Columns& row, const Columns& x) {
    sum += row.first * x.first;
    sum += row.second * x.second;
  }
};

#if WEAVER_DOT
template <>
struct Meeting<c10::BFloat16> {
  using Stored = c10::BFloat16;
  using Columns = __m512bh;

  static Columns of_row(const c10::BFloat16* row) { return (__m512bh)_mm512_loadu_si512(row); }
  static Columns of_token(const c10::BFloat16* x) { return of_row(x); }
  static void keep(c10::BFloat16* x, const c10::BFloat16* from) {
    std::memcpy(x, from, 2 * kLanes * sizeof *x);
  }
  static void add(Vec& sum, Columns row, Columns x) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, row, x);
  }
};
#endif

// x of one token, as it meets rows, and its y in the order of load_two; zeros behind the last
// column.
template <typename T>
struct StreamedToken {
  const typename Meeting<T>::Stored* x;
  float* y;
};

template <typename T>
struct Matrices {
  const T *gate, *up, *down;
  int64_t gate_stride, up_stride, down_stride;

  explicit Matrices(const Ffn& ffn)
      : gate(ffn.gate.const_data_ptr<T>()),
        up(ffn.up.const_data_ptr<T>()),
        down(ffn.down.const_data_ptr<T>()),
        gate_stride(ffn.gate.stride(0)),
        up_stride(ffn.up.stride(0)),
        down_stride(ffn.down.stride(0)) {}
};

// body(first column, see) for every 32 columns of a row; see(row, read) reads these of a row with
// zeros behind the last column.
template <typename Body>
inline void over_columns(int64_t hidden, Body body) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= hidden; d += 2 * kLanes)
    body(d, [d](const auto* row, auto read) { return read(row + d); });
  if (const int64_t left = hidden - d)
    body(d, [d, left](const auto* row, auto read) {
      std::remove_const_t<std::remove_pointer_t<decltype(row)>> all[2 * kLanes] = {};
      std::memcpy(all, row + d, left * sizeof *row);
      return read(all);
    });
}

// Length of a row with zeros behind its last column.
inline int64_t padded(int64_t hidden) {
  return (hidden + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes;
}

// A token's row as it meets those of matrices, padded.
template <typename T>
void keep_row(const T* row, int64_t hidden, typename Meeting<T>::Stored* to) {
  over_columns(hidden, [&](int64_t d, auto see) {
    see(row, [to = to + d](const T* from) { Meeting<T>::keep(to, from); });
  });
}

// Where the same rows of a matrix lie in the next block; nullptr where nothing is fetched.
template <typename T>
struct Upcoming {
  const T* rows;
  int64_t stride, count;

  void fetch(int64_t column) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t at = 0; at < 2 * kLanes; at += kLine / int64_t(sizeof(T)))
        __builtin_prefetch(rows + r * stride + column + at, 0, 2);
  }
};

// Products of kCount rows and kMany tokens: lane r * kMany + t. Fetches upcoming rows meanwhile.
template <int kCount, int kMany, typename T>
Vec products(const T* rows, int64_t stride, int64_t hidden, const StreamedToken<T>* tokens,
             Upcoming<T> first, Upcoming<T> second) {
  Vec sums[kCount * kMany] = {};
  over_columns(hidden, [&](int64_t d, auto see) {
    first.fetch(d);
    second.fetch(d);
    typename Meeting<T>::Columns x[kMany];
    for (int t = 0; t < kMany; ++t) x[t] = Meeting<T>::of_token(tokens[t].x + d);
    for (int r = 0; r < kCount; ++r) {
      const auto row = see(rows + r * stride, Meeting<T>::of_row);
      for (int t = 0; t < kMany; ++t) Meeting<T>::add(sums[r * kMany + t], row, x[t]);
    }
  });
  return each_sum<kCount * kMany>(sums);
}

// y += h down for kCount rows and kMany tokens; h of row r and token t is lane r * kMany + t.
template <int kCount, int kMany, typename T>
void add_down(const Matrices<T>& m, int64_t row, int64_t hidden, const StreamedToken<T>* tokens,
              const Vec& lanes) {
  const T* down = m.down + row * m.down_stride;
  float h[kLanes];
  store(h, lanes);
  auto read = [](const T* columns) { return load_two(columns); };
  over_columns(hidden, [&](int64_t d, auto see) {
    Two rows[kCount];
    for (int r = 0; r < kCount; ++r) rows[r] = see(down + r * m.down_stride, read);
    for (int t = 0; t < kMany; ++t) {
      float* y = tokens[t].y + d;
      Vec first = load(y), second = load(y + kLanes);
      for (int r = 0; r < kCount; ++r) {
        first += h[r * kMany + t] * rows[r].first;
        second += h[r * kMany + t] * rows[r].second;
      }
      store(y, first);
      store(y + kLanes, second);
    }
  });
}

template <int kCount, int kMany, typename T>
void add_rows_of(const Matrices<T>& m, const Ffn& ffn, int64_t row, int64_t hidden,
                 const StreamedToken<T>* tokens, const float* factors, const Block* next) {
  const int64_t count = next ? next->count : 0, at = next ? next->row : 0;
  auto upcoming = [&](const T* matrix, int64_t stride) {
    return Upcoming<T>{matrix + at * stride, stride, count};
  };
  const T *gate = m.gate + row * m.gate_stride, *up = m.up + row * m.up_stride;
  Vec gates = products<kCount, kMany>(gate, m.gate_stride, hidden, tokens,
                                      upcoming(m.gate, m.gate_stride), {nullptr, 0, 0});
  Vec ups = products<kCount, kMany>(up, m.up_stride, hidden, tokens, upcoming(m.up, m.up_stride),
                                    upcoming(m.down, m.down_stride));
  auto lanes = [](auto value) {
    float all[kLanes] = {};
    for (int i = 0; i < kCount * kMany; ++i) all[i] = value(i / kMany, i % kMany);
    return load(all);
  };
  auto of_row = [&](const Tensor& bias) {
    return lanes([from = bias.const_data_ptr<float>() + row](int r, int) { return from[r]; });
  };
  if (ffn.gate_bias) gates += of_row(*ffn.gate_bias);
  if (ffn.up_bias) ups += of_row(*ffn.up_bias);
  if (factors) ups *= lanes([&](int, int t) { return factors[t]; });
  add_down<kCount, kMany>(m, row, hidden, tokens, apply(ffn.activation, gates) * ups);
}

// Rows whose products with kMany tokens the registers hold.
#ifdef __AVX512F__
template <int kMany>
constexpr int kRowsAtOnce = 4;
#else
template <int kMany>
constexpr int kRowsAtOnce = 4 / kMany;
#endif

template <int kMany, typename T>
void add_block(const Matrices<T>& m, const Ffn& ffn, const Block& block, int64_t hidden,
               const StreamedToken<T>* tokens, const float* factors, const Block* next) {
  constexpr int kCount = kRowsAtOnce<kMany>;
  int64_t r = 0;
  for (; r + kCount <= block.count; r += kCount)
    add_rows_of<kCount, kMany>(m, ffn, block.row + r, hidden, tokens, factors, r ? nullptr : next);
  for (; r < block.count; ++r)
    add_rows_of<1, kMany>(m, ffn, block.row + r, hidden, tokens, factors, r ? nullptr : next);
}

// All tokens of a block's slice, four, two or one at a time.
template <typename T>
void add_tokens(const Matrices<T>& m, const Ffn& ffn, const Block& block, int64_t hidden,
                const StreamedToken<T>* tokens, const Block* next) {
  const Slice& slice = *block.slice;
  for (int64_t i = 0; i < slice.count;) {
    const int64_t left = slice.count - i;
    const float* factors = slice.factors ? slice.factors + i : nullptr;
    if (left >= 4) {
      add_block<4>(m, ffn, block, hidden, tokens + i, factors, next);
      i += 4;
    } else if (left >= 2) {
      add_block<2>(m, ffn, block, hidden, tokens + i, factors, next);
      i += 2;
    } else {
      add_block<1>(m, ffn, block, hidden, tokens + i, factors, next);
      i += 1;
    }
    next = nullptr;
  }
}

// y[token] += the outputs of slices with few tokens each.
template <typename T>
void stream(const Tensor& x, const Ffn& ffn, const std::vector<Slice>& slices, float* y) {
  const int64_t hidden = x.size(1), row_size = padded(hidden);
  // The tokens that any slice uses, in their order, and the place of each.
  std::vector<int64_t> place(x.size(0), -1), used;
  for (const Slice& slice : slices)
    for (int64_t i = 0; i < slice.count; ++i) place[slice.token(i)] = 0;
  for (int64_t t = 0; t < x.size(0); ++t)
    if (place[t] == 0) {
      place[t] = used.size();
      used.push_back(t);
    }
  std::vector<Block> blocks;
  int64_t pairs = 0;
  for (const Slice& slice : slices) {
    pairs += slice.count;
    for (int64_t row = slice.begin; slice.count && row < slice.end; row += kRows)
      blocks.push_back({row, std::min(kRows, slice.end - row), &slice});
  }
  const int64_t tokens = used.size(), total = blocks.size();
  if (!total) return;
  std::vector<typename Meeting<T>::Stored> inputs(tokens * row_size);
  for (int64_t i = 0; i < tokens; ++i)
    keep_row(x.const_data_ptr<T>() + used[i] * hidden, hidden, &inputs[i * row_size]);
  // One sum per range of blocks, added up in order: the same bits for the same number of threads.
  const int64_t ranges =
      std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), total / kBlocksPerTask));
  std::vector<float> sums(ranges * tokens * row_size, 0.0f);
  at::parallel_for(0, ranges, 1, [&](int64_t first, int64_t last) {
    const Matrices<T> m(ffn);
    std::vector<StreamedToken<T>> shown(tokens);
    for (int64_t range = first; range < last; ++range) {
      float* out = sums.data() + range * tokens * row_size;
      const int64_t end = total * (range + 1) / ranges;
      const Slice* slice = nullptr;
      for (int64_t b = total * range / ranges; b < end; ++b) {
        if (blocks[b].slice != slice) {
          slice = blocks[b].slice;
          for (int64_t i = 0; i < slice->count; ++i) {
            const int64_t at = place[slice->token(i)] * row_size;
            shown[i] = {&inputs[at], out + at};
          }
        }
        const Block* next = b + kBlocksAhead < end ? &blocks[b + kBlocksAhead] : nullptr;
        add_tokens(m, ffn, blocks[b], hidden, shown.data(), next);
      }
    }
  });
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t d = 0; d < hidden; d += 2 * kLanes) {
      Two total{};
      for (int64_t range = 0; range < ranges; ++range) {
        const float* from = &sums[(range * tokens + i) * row_size + d];
        total.first += load(from);
        total.second += load(from + kLanes);
      }
      const Two values = in_order<T>(total);
      float all[2 * kLanes], *row = y + used[i] * hidden + d;
      store(all, values.first);
      store(all + kLanes, values.second);
      for (int64_t j = 0; j < std::min(2 * kLanes, hidden - d); ++j) row[j] += all[j];
    }
}

}  // namespace weaver
