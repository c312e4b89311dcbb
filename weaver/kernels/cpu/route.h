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

// Scores of four experts for one token: what is read of the token is used four times.
template <int kExperts, typename T>
void score_experts(const T* x, const T* weight, int64_t hidden, float* out) {
  Vec totals[kExperts] = {};
  over_row(hidden, [&](int64_t d, auto get, auto) {
    const Vec xd = get(x + d);
    for (int e = 0; e < kExperts; ++e) totals[e] += xd * get(weight + e * hidden + d);
  });
  for (int e = 0; e < kExperts; ++e) out[e] = sum(totals[e]);
}

// x weight^T in float32, (T, E).
inline Tensor scores(const Tensor& x, const Tensor& weight) {
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = weight.size(0);
  // A GEMM wants float32 copies of its operands, which cost more than so few products.
  if (std::min(tokens, experts) > kFew || x.scalar_type() != weight.scalar_type())
    return at::mm(x.to(at::kFloat), weight.to(at::kFloat).t());
  Tensor s = at::empty({tokens, experts}, x.options().dtype(at::kFloat));
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *rows = x.const_data_ptr<T>(), *columns = weight.const_data_ptr<T>();
    float* out = s.mutable_data_ptr<float>();
    at::parallel_for(0, tokens, 16, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        int64_t e = 0;
        for (; e + 4 <= experts; e += 4)
          score_experts<4>(rows + t * hidden, columns + e * hidden, hidden, out + t * experts + e);
        for (; e < experts; ++e)
          score_experts<1>(rows + t * hidden, columns + e * hidden, hidden, out + t * experts + e);
      }
    });
  });
  return s;
}

// The experts of every token and the factors of their outputs, as pairs of token and expert.
//
// up_weight makes it a glu router. top_k 0 selects by threshold: scores above lowest, 0 if that is
// left out. scaling is c of softmax weights, 0 stands for weights of 1 + p scale. See
// weaver.kernels.reference.route.
inline std::tuple<Tensor, Tensor, Tensor> route(
    const Tensor& x_, const Tensor& weight, const optional<Tensor>& up_weight,
    const optional<Tensor>& bias_, const Tensor& scale_, const Tensor& balance_,
    const std::string& activation, int64_t top_k, double scaling,
    const optional<Tensor>& lowest_) {
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
      put(score + i, v < 0.0f ? -v : v);
    });
  }
  const std::vector<float> scale = floats(scale_), add = floats(balance_);
  const std::vector<float> lowest = lowest_ ? floats(*lowest_) : std::vector<float>(tokens, 0.0f);
  TORCH_CHECK(int64_t(lowest.size()) == tokens, "lowest needs one value per token");
  const int64_t most = tokens * (top_k ? top_k : experts);
  Tensor token = at::empty({most}, x.options().dtype(at::kLong)), expert = at::empty_like(token);
  Tensor factor = at::empty({most}, x.options().dtype(at::kFloat));
  int64_t pairs = 0, *token_of = token.mutable_data_ptr<int64_t>(),
          *expert_of = expert.mutable_data_ptr<int64_t>();
  float* factor_of = factor.mutable_data_ptr<float>();
  std::vector<float> p(experts);
  std::vector<int64_t> order(experts);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = score + t * experts;
    const float highest = *std::max_element(row, row + experts);
    over_row(experts, [&](int64_t e, auto get, auto put) {
      put(p.data() + e, exp(get(row + e) - highest));
    });
    float total = 0.0f;
    for (const float value : p) total += value;
    for (float& value : p) value /= total;
    std::iota(order.begin(), order.end(), 0);
    int64_t chosen = top_k;
    if (top_k)
      std::partial_sort(order.begin(), order.begin() + top_k, order.end(),
                        [&](int64_t a, int64_t b) { return p[a] + add[a] > p[b] + add[b]; });
    else
      chosen = std::remove_if(order.begin(), order.end(),
                              [&](int64_t e) { return !(row[e] + add[e] > lowest[t]); }) -
               order.begin();
    // Relative to the likeliest of the chosen: all of them may have probabilities of 0.
    float best = -INFINITY, sum = 0.0f;
    if (scaling > 0.0) {
      for (int64_t k = 0; k < chosen; ++k) best = std::max(best, row[order[k]]);
      for (int64_t k = 0; k < chosen; ++k) sum += std::exp(row[order[k]] - best);
    }
    for (int64_t k = 0; k < chosen; ++k, ++pairs) {
      const int64_t e = order[k];
      token_of[pairs] = t;
      expert_of[pairs] = e;
      factor_of[pairs] = scaling > 0.0 ? float(scaling) * (std::exp(row[e] - best) / sum)
                                       : 1.0f + p[e] * scale[e];
    }
  }
  if (pairs == most) return {token, expert, factor};
  return {token.narrow(0, 0, pairs), expert.narrow(0, 0, pairs), factor.narrow(0, 0, pairs)};
}

}  // namespace weaver
