// Slices of the MoE FFN by ATen's matrix products, with what lies between them here.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "ffn.h"
#include "vector.h"

namespace weaver::gemm {

// h = act(g + bg) * (u + bu) * factor, written over g; g and u are (count, neurons).
template <typename T>
void activate(T* g, const T* u, const float* bg, const float* bu, int64_t neurons,
              const Slice& users, Activation activation) {
  at::parallel_for(0, users.count, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      auto run = [&](int64_t begin, int64_t end, float factor) {
        T* gi = g + i * neurons + begin;
        const T* ui = u + i * neurons + begin;
        over_row(end - begin, [&](int64_t j, auto get, auto put) {
          const Vec gate = get(gi + j) + (bg ? get(bg + begin + j) : Vec{});
          const Vec up = get(ui + j) + (bu ? get(bu + begin + j) : Vec{});
          put(gi + j, apply(activation, gate) * up * factor);
        });
      };
      if (!users.experts) {
        run(0, neurons, users.factors ? users.factors[i] : 1.0f);
        continue;
      }
      run(0, users.shared, 1.0f);
      for (int64_t e = 0; e < users.experts; ++e) {
        const int64_t begin = users.shared + e * users.width;
        run(begin, begin + users.width, users.factors[i * users.experts + e]);
      }
    }
  });
}

// y[token] += row, in float32.
template <typename T>
void add_rows(const T* rows, int64_t hidden, const Slice& users, float* y) {
  at::parallel_for(0, users.count, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* row = rows + i * hidden;
      float* out = y + users.token(i) * hidden;
      over_row(hidden, [&](int64_t d, auto get, auto put) {
        put(out + d, get(out + d) + get(row + d));
      });
    }
  });
}

// y[token] += the output of a slice.
template <typename scalar_t>
void add_slice(const Tensor& x, const Ffn& ffn, const Slice& users, float* y) {
  const int64_t begin = users.begin, end = users.end;
  const int64_t hidden = x.size(1);
  Tensor picked = x;
  if (users.tokens) {
    picked = at::empty({users.count, hidden}, x.options());
    const auto* from = x.const_data_ptr<scalar_t>();
    auto* to = picked.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < users.count; ++i)
      std::copy_n(from + users.tokens[i] * hidden, hidden, to + i * hidden);
  }
  Tensor g = at::mm(picked, ffn.gate.slice(0, begin, end).t());
  Tensor u = at::mm(picked, ffn.up.slice(0, begin, end).t());
  activate(g.mutable_data_ptr<scalar_t>(), u.const_data_ptr<scalar_t>(),
           data_or_null(ffn.gate_bias, begin), data_or_null(ffn.up_bias, begin), end - begin, users,
           ffn.activation);
  const Tensor out = at::mm(g, ffn.down.slice(0, begin, end));
  add_rows(out.const_data_ptr<scalar_t>(), hidden, users, y);
}

}  // namespace weaver::gemm
