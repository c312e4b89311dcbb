// The router: scores of the experts, and the experts of every token.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "ffn.h"
#include "stream.h"
#include "vector.h"

namespace weaver {

// Up to this many tokens or experts a router's scores are not worth a GEMM.
constexpr int64_t kFew = 16;

// A short tensor as floats, without the overhead of an operator.
std::vector<float> floats(const Tensor& tensor) {
  const Tensor whole = tensor.contiguous();
  std::vector<float> values(whole.numel());
  with_type(whole.scalar_type(), [&](auto zero) {
    const auto* from = whole.const_data_ptr<decltype(zero)>();
    over_row(whole.numel(), [&](int64_t i, auto get, auto put) { put(&values[i], get(from + i)); });
  });
  return values;
}

// Scores of kMany tokens for every expert, (kMany, E).
template <int kMany, typename T>
void score_tokens(const StreamedToken<T>* tokens, const T* weight, int64_t hidden, int64_t experts,
                  float* out) {
  constexpr int kCount = kRowsAtOnce<kMany>;
  const Upcoming<T> none{nullptr, 0, 0};
  auto store_scores = [&](const Vec& sums, int64_t e, int count) {
    float lanes[kLanes];
    store(lanes, sums);
    for (int r = 0; r < count; ++r)
      for (int t = 0; t < kMany; ++t) out[t * experts + e + r] = lanes[r * kMany + t];
  };
  int64_t e = 0;
  for (; e + kCount <= experts; e += kCount)
    store_scores(
        products<kCount, kMany>(weight + e * hidden, hidden, hidden, tokens, none, none), e, kCount);
  for (; e < experts; ++e)
    store_scores(products<1, kMany>(weight + e * hidden, hidden, hidden, tokens, none, none), e, 1);
}

// x weight^T in float32, (T, E). A score has the same bits however many tokens are scored at once.
template <typename T>
void score_all(const T* x, const T* weight, int64_t tokens, int64_t hidden, int64_t experts,
               float* out) {
  at::parallel_for(0, (tokens + 3) / 4, 4, [&](int64_t first, int64_t last) {
    std::vector<typename Meeting<T>::Stored> kept(4 * padded(hidden));
    StreamedToken<T> some[4];
    for (int64_t t = 4 * first; t < std::min(4 * last, tokens); t += 4) {
      const int64_t here = std::min<int64_t>(4, tokens - t);
      for (int64_t i = 0; i < here; ++i) {
        keep_row(x + (t + i) * hidden, hidden, &kept[i * padded(hidden)]);
        some[i] = {&kept[i * padded(hidden)], nullptr};
      }
      float* to = out + t * experts;
      if (here == 4)
        score_tokens<4>(some, weight, hidden, experts, to);
      else
        for (int64_t i = 0; i < here; ++i)
          score_tokens<1>(some + i, weight, hidden, experts, to + i * experts);
    }
  });
}

inline Tensor scores(const Tensor& x, const Tensor& weight) {
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = weight.size(0);
  // A GEMM wants float32 copies of its operands, which cost more than so few products.
  if (std::min(tokens, experts) > kFew || x.scalar_type() != weight.scalar_type())
    return at::mm(x.to(at::kFloat), weight.to(at::kFloat).t());
  Tensor s = at::empty({tokens, experts}, x.options().dtype(at::kFloat));
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    score_all(x.const_data_ptr<T>(), weight.const_data_ptr<T>(), tokens, hidden, experts,
              s.mutable_data_ptr<float>());
  });
  return s;
}

// How experts are chosen and weighed; see route.
struct Rule {
  std::vector<float> scale, balance, lowest;
  int64_t top_k;
  float scaling;
};

// The experts of a token, first in `order`, and the factors of their outputs; returns how many.
// p: room for a value per expert.
inline int64_t choose(const Rule& rule, const float* row, float lowest, std::vector<float>& p,
                      int64_t* order, float* factors) {
  const int64_t experts = p.size();
  const std::vector<float>& add = rule.balance;
  const float highest = *std::max_element(row, row + experts);
  over_row(experts, [&](int64_t e, auto get, auto put) {
    put(p.data() + e, exp(get(row + e) - highest));
  });
  float total = 0.0f;
  for (const float value : p) total += value;
  for (float& value : p) value /= total;
  std::iota(order, order + experts, 0);
  int64_t chosen = rule.top_k;
  if (rule.top_k)
    std::partial_sort(order, order + chosen, order + experts,
                      [&](int64_t a, int64_t b) { return p[a] + add[a] > p[b] + add[b]; });
  else
    chosen = std::remove_if(order, order + experts,
                            [&](int64_t e) { return !(row[e] + add[e] > lowest); }) -
             order;
  // Relative to the likeliest of the chosen: all of them may have probabilities of 0.
  float best = -INFINITY, sum = 0.0f;
  if (rule.scaling > 0.0f) {
    for (int64_t k = 0; k < chosen; ++k) best = std::max(best, row[order[k]]);
    for (int64_t k = 0; k < chosen; ++k) sum += std::exp(row[order[k]] - best);
  }
  for (int64_t k = 0; k < chosen; ++k) {
    const int64_t e = order[k];
    factors[k] = rule.scaling > 0.0f ? rule.scaling * (std::exp(row[e] - best) / sum)
                                     : 1.0f + p[e] * rule.scale[e];
  }
  return chosen;
}

// The experts of every token and the factors of their outputs, as pairs of token and expert.
//
// up_weight makes it a glu router. top_k 0 selects by threshold: scores above lowest, 0 if that is
// left out. scaling is c of softmax weights, 0 stands for weights of 1 + p scale. See
// weaver.kernels.reference.route.
inline std::tuple<Tensor, Tensor, Tensor> route(
    const Tensor& x_, const Tensor& weight, const optional<Tensor>& up_weight,
    const optional<Tensor>& bias_, const Tensor& scale, const Tensor& balance,
    const std::string& activation, int64_t top_k, double scaling,
    const optional<Tensor>& lowest) {
  const Tensor x = x_.contiguous();
  const int64_t tokens = x.size(0), experts = weight.size(0);
  Tensor s = scores(x, weight.contiguous());
  float* score = s.mutable_data_ptr<float>();
  if (bias_) {
    const std::vector<float> bias = floats(*bias_);
    for (int64_t i = 0; i < tokens * experts; ++i) score[i] += bias[i % experts];
  }
  if (up_weight) {
    const Tensor u = scores(x, up_weight->contiguous());
    const float* up = u.const_data_ptr<float>();
    const Activation act = activation_of(activation);
    over_row(tokens * experts, [&](int64_t i, auto get, auto put) {
      const Vec v = get(up + i) * apply(act, get(score + i));
      put(score + i, larger(v, -v));
    });
  }
  const Rule rule{floats(scale), floats(balance),
                  lowest ? floats(*lowest) : std::vector<float>(tokens, 0.0f), top_k,
                  float(scaling)};
  TORCH_CHECK(int64_t(rule.lowest.size()) == tokens, "lowest needs one value per token");
  std::vector<int64_t> order(tokens * experts), ends(tokens + 1, 0);
  std::vector<float> factors(tokens * experts);
  at::parallel_for(0, tokens, 32, [&](int64_t first, int64_t last) {
    std::vector<float> p(experts);
    for (int64_t t = first; t < last; ++t)
      ends[t + 1] = choose(rule, score + t * experts, rule.lowest[t], p, &order[t * experts],
                           &factors[t * experts]);
  });
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  Tensor token = at::empty({ends[tokens]}, x.options().dtype(at::kLong));
  Tensor expert = at::empty_like(token);
  Tensor factor = at::empty({ends[tokens]}, x.options().dtype(at::kFloat));
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t begin = ends[t], count = ends[t + 1] - begin;
    std::fill_n(token.mutable_data_ptr<int64_t>() + begin, count, t);
    std::copy_n(&order[t * experts], count, expert.mutable_data_ptr<int64_t>() + begin);
    std::copy_n(&factors[t * experts], count, factor.mutable_data_ptr<float>() + begin);
  }
  return {token, expert, factor};
}

}  // namespace weaver
