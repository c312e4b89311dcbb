// The MoE FFN on a CPU: y[t] = sum over slices s of act(x Wg_s^T) * (x Wu_s^T) * w_ts, times Wd_s.
//
// A slice is a range of stored neurons (rows of gate, up and down) with the tokens that use it: the
// shared neurons with all of them, an expert with those that selected it. With few tokens reading
// the rows is all that costs, so they are read once, row by row, for all tokens of the slice. With
// more tokens a slice is three products: in bfloat16 on AMX tiles (amx.h) where the processor has
// them, else ATen's GEMMs, with what lies between them here. Sums over neurons are float32. weaver/kernels/reference.py is the definition.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "amx.h"
#include "vector.h"

namespace {

using at::Tensor;
using std::optional;
using weaver::Activation;
using weaver::load;
using weaver::over_row;
using weaver::splat;
using weaver::store;
using weaver::Vec;

// Up to this many tokens the rows are read once for all of them; above, a GEMM is faster.
template <typename T>
constexpr int64_t kStreamed = std::is_same_v<T, float> ? 16 : 4;
// Up to this many tokens or experts a router's scores are not worth a GEMM.
constexpr int64_t kFew = 16;
// Rows that one thread takes at a time at least; fewer cost more to hand out than to compute.
constexpr int64_t kRowsPerTask = 64;

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK(false, "unknown activation ", name);
}

// body(zero of the element type) for the dtypes that are computed in.
template <typename Body>
auto with_type(at::ScalarType dtype, Body body) {
  switch (dtype) {
    case at::kFloat: return body(0.0f);
    case at::kBFloat16: return body(c10::BFloat16());
    case at::kHalf: return body(c10::Half());
    default: TORCH_CHECK(false, "weaver_cpu computes in float32, bfloat16 and float16");
  }
}

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

struct Ffn {
  Tensor gate, up, down;                // (F', D)
  optional<Tensor> gate_bias, up_bias;  // (F'), float32
  Activation activation;
};

// Tokens of a slice and the factor of its output for each. If `experts` is not 0, the slice is the
// whole FFN: factors are (tokens, experts), the first `shared` neurons have factor 1, and neuron j
// of the others that of expert (j - shared) / width.
struct Users {
  const int64_t* tokens;  // nullptr: token i is i
  const float* factors;   // nullptr: 1
  int64_t count;
  int64_t experts = 0, shared = 0, width = 0;

  int64_t token(int64_t i) const { return tokens ? tokens[i] : i; }
};

// h = act(g + bg) * (u + bu) * factor, written over g; g and u are (count, neurons).
template <typename T>
void activate(T* g, const T* u, const float* bg, const float* bu, int64_t neurons,
              const Users& users, Activation activation) {
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
void add_rows(const T* rows, int64_t hidden, const Users& users, float* y) {
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

const float* data_or_null(const optional<Tensor>& bias, int64_t begin) {
  return bias ? bias->const_data_ptr<float>() + begin : nullptr;
}

template <typename scalar_t>
void multiply(const Tensor& x, const Ffn& ffn, int64_t begin, int64_t end, const Users& users,
              float* y) {
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

#if WEAVER_AMX
void multiply_tiles(const Tensor& x, const Ffn& ffn, int64_t begin, int64_t end,
                    const Users& users, float* y) {
  using c10::BFloat16;
  const weaver::amx::Slice slice{
      ffn.gate.const_data_ptr<BFloat16>() + begin * ffn.gate.stride(0),
      ffn.up.const_data_ptr<BFloat16>() + begin * ffn.up.stride(0),
      ffn.down.const_data_ptr<BFloat16>() + begin * ffn.down.stride(0),
      ffn.gate.stride(0), ffn.up.stride(0), ffn.down.stride(0),
      data_or_null(ffn.gate_bias, begin), data_or_null(ffn.up_bias, begin),
      end - begin, x.size(1), ffn.activation};
  // Factors by column, sixteen tokens to a vector: one column, or one per expert.
  const int64_t columns = std::max<int64_t>(users.experts, 1);
  const int64_t padded = (users.count + weaver::kLanes - 1) / weaver::kLanes * weaver::kLanes;
  std::vector<float> factors(users.factors ? columns * padded : 0);
  if (users.factors)
    for (int64_t i = 0; i < users.count; ++i)
      for (int64_t e = 0; e < columns; ++e)
        factors[e * padded + i] = users.factors[i * columns + e];
  auto factor = [&](int64_t neuron, int64_t token) {
    if (factors.empty() || neuron < users.shared) return splat(1.0f);
    const int64_t e = users.experts ? (neuron - users.shared) / users.width : 0;
    return load(&factors[e * padded + token]);
  };
  auto row = [&](int64_t i) { return users.token(i); };
  const weaver::amx::Tokens<decltype(row), decltype(factor)> tokens{users.count, row, factor};
  weaver::amx::add_slice(x.const_data_ptr<BFloat16>(), slice, tokens, y);
}
#endif

// kRows neurons for kTokens tokens: what is read of a neuron is used for all tokens at once.
template <int kRows, int kTokens, typename T>
void stream_block(const float* x, const Ffn& ffn, int64_t row, int64_t hidden,
                  const float* factors, float* y) {
  const T* gate = ffn.gate.const_data_ptr<T>() + row * ffn.gate.stride(0);
  const T* up = ffn.up.const_data_ptr<T>() + row * ffn.up.stride(0);
  const T* down = ffn.down.const_data_ptr<T>() + row * ffn.down.stride(0);
  const int64_t gs = ffn.gate.stride(0), us = ffn.up.stride(0), ds = ffn.down.stride(0);
  Vec g[kRows][kTokens] = {}, u[kRows][kTokens] = {};
  over_row(hidden, [&](int64_t d, auto get, auto) {
    Vec xs[kTokens];
    for (int t = 0; t < kTokens; ++t) xs[t] = get(x + t * hidden + d);
    for (int r = 0; r < kRows; ++r) {
      const Vec gr = get(gate + r * gs + d), ur = get(up + r * us + d);
      for (int t = 0; t < kTokens; ++t) {
        g[r][t] += gr * xs[t];
        u[r][t] += ur * xs[t];
      }
    }
  });
  const float* bg = data_or_null(ffn.gate_bias, row);
  const float* bu = data_or_null(ffn.up_bias, row);
  Vec gates{}, ups{};
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) {
      gates[r * kTokens + t] = weaver::sum(g[r][t]) + (bg ? bg[r] : 0.0f);
      ups[r * kTokens + t] = (weaver::sum(u[r][t]) + (bu ? bu[r] : 0.0f)) * factors[t];
    }
  const Vec h = apply(ffn.activation, gates) * ups;
  over_row(hidden, [&](int64_t d, auto get, auto put) {
    Vec out[kTokens];
    for (int t = 0; t < kTokens; ++t) out[t] = get(y + t * hidden + d);
    for (int r = 0; r < kRows; ++r) {
      const Vec dr = get(down + r * ds + d);
      for (int t = 0; t < kTokens; ++t) out[t] += h[r * kTokens + t] * dr;
    }
    for (int t = 0; t < kTokens; ++t) put(y + t * hidden + d, out[t]);
  });
}

// Four tokens at a time: 2 * 2 * 4 sums for gate and up are what the registers hold.
template <int kRows, typename T>
void stream_tokens(const float* x, const Ffn& ffn, int64_t row, int64_t hidden, int64_t count,
                   const float* factors, float* y) {
  for (int64_t i = 0; i < count; i += 4) {
    const float *xi = x + i * hidden, *fi = factors + i;
    float* yi = y + i * hidden;
    switch (count - i) {
      case 1: stream_block<kRows, 1, T>(xi, ffn, row, hidden, fi, yi); break;
      case 2: stream_block<kRows, 2, T>(xi, ffn, row, hidden, fi, yi); break;
      case 3: stream_block<kRows, 3, T>(xi, ffn, row, hidden, fi, yi); break;
      default: stream_block<kRows, 4, T>(xi, ffn, row, hidden, fi, yi);
    }
  }
}

template <int kRows, typename T>
void stream_rows(const float* x, const Ffn& ffn, int64_t begin, int64_t end, int64_t hidden,
                 int64_t count, const float* factors, float* y) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows)
    stream_tokens<kRows, T>(x, ffn, row, hidden, count, factors, y);
  for (; row < end; ++row) stream_tokens<1, T>(x, ffn, row, hidden, count, factors, y);
}

template <typename scalar_t>
void stream(const Tensor& x, const Ffn& ffn, int64_t begin, int64_t end, const Users& users,
            float* y) {
  const int64_t hidden = x.size(1), count = users.count;
  std::vector<float> inputs(count * hidden), factors(count, 1.0f);
  for (int64_t i = 0; i < count; ++i) {
    const scalar_t* row = x.const_data_ptr<scalar_t>() + users.token(i) * hidden;
    std::copy_n(row, hidden, inputs.data() + i * hidden);
    if (users.factors) factors[i] = users.factors[i];
  }
  // One sum per range of rows, added up in order: the same bits for the same number of threads.
  const int64_t rows = end - begin;
  const int64_t ranges =
      std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows / kRowsPerTask));
  std::vector<float> sums(ranges * count * hidden, 0.0f);
  at::parallel_for(0, ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t low = begin + rows * r / ranges, high = begin + rows * (r + 1) / ranges;
      float* out = sums.data() + r * count * hidden;
      auto run = count <= 2 ? stream_rows<4, scalar_t> : stream_rows<2, scalar_t>;
      run(inputs.data(), ffn, low, high, hidden, count, factors.data(), out);
    }
  });
  const Users direct{users.tokens, nullptr, count};
  for (int64_t r = 0; r < ranges; ++r)
    add_rows(sums.data() + r * count * hidden, hidden, direct, y);
}

// All experts for all tokens, each with its own column of factors.
template <typename scalar_t>
void stream_experts(const Tensor& x, const Ffn& ffn, const Users& users, float* y) {
  stream<scalar_t>(x, ffn, 0, users.shared, Users{nullptr, nullptr, users.count}, y);
  std::vector<float> factors(users.count);
  for (int64_t e = 0; e < users.experts; ++e) {
    for (int64_t i = 0; i < users.count; ++i) factors[i] = users.factors[i * users.experts + e];
    const int64_t begin = users.shared + e * users.width;
    stream<scalar_t>(x, ffn, begin, begin + users.width,
                     Users{nullptr, factors.data(), users.count}, y);
  }
}

void add_slice(const Tensor& x, const Ffn& ffn, int64_t begin, int64_t end, const Users& users,
               float* y) {
  if (!users.count || begin == end) return;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    if (users.count <= kStreamed<T>)
      users.experts ? stream_experts<T>(x, ffn, users, y) : stream<T>(x, ffn, begin, end, users, y);
#if WEAVER_AMX
    else if (std::is_same_v<T, c10::BFloat16> && x.size(1) % weaver::amx::kDepth == 0 &&
             weaver::amx::permitted())
      multiply_tiles(x, ffn, begin, end, users, y);
#endif
    else
      multiply<T>(x, ffn, begin, end, users, y);
  };
  with_type(x.scalar_type(), run);
}

optional<Tensor> as_float(const optional<Tensor>& tensor) {
  return tensor ? optional<Tensor>(tensor->to(at::kFloat).contiguous()) : std::nullopt;
}

// What the loops rely on: they read rows by pointer.
Ffn checked(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down,
            const optional<Tensor>& gate_bias, const optional<Tensor>& up_bias,
            const std::string& activation) {
  for (const Tensor* matrix : {&gate, &up, &down}) {
    TORCH_CHECK(matrix->dim() == 2 && matrix->size(0) == gate.size(0) &&
                    matrix->size(1) == x.size(1) && matrix->stride(1) == 1,
                "weaver_cpu wants matrices (F', D) with rows in one piece, not ", matrix->sizes(),
                " with strides ", matrix->strides(), " for inputs ", x.sizes());
    TORCH_CHECK(matrix->scalar_type() == x.scalar_type(), "weaver_cpu wants weights and inputs of ",
                "one dtype, not ", matrix->scalar_type(), " and ", x.scalar_type());
  }
  return {gate, up, down, as_float(gate_bias), as_float(up_bias), activation_of(activation)};
}

// The chosen experts only.
//
// tokens, experts (P) int64 and factors (P) float32: the selected pairs. shared: S. Rows of gate, up
// and down may be strided, their columns may not.
Tensor moe(const Tensor& x_, const Tensor& gate, const Tensor& up, const Tensor& down,
           const optional<Tensor>& gate_bias, const optional<Tensor>& up_bias,
           const optional<Tensor>& output_bias, const optional<Tensor>& expert_bias,
           const std::string& activation, int64_t shared, int64_t num_experts,
           const Tensor& tokens_, const Tensor& experts_, const Tensor& factors_) {
  const Tensor x = x_.contiguous();
  const int64_t tokens = x.size(0), hidden = x.size(1), pairs = experts_.size(0);
  const Ffn ffn = checked(x, gate, up, down, gate_bias, up_bias, activation);
  const Tensor token = tokens_.contiguous(), expert = experts_.contiguous();
  const Tensor factor = factors_.to(at::kFloat).contiguous();
  Tensor y = at::zeros({tokens, hidden}, x.options().dtype(at::kFloat));
  float* out = y.mutable_data_ptr<float>();
  add_slice(x, ffn, 0, shared, Users{nullptr, nullptr, tokens}, out);

  const auto* token_of = token.const_data_ptr<int64_t>();
  const auto* expert_of = expert.const_data_ptr<int64_t>();
  const auto* factor_of = factor.const_data_ptr<float>();
  std::vector<int64_t> start(num_experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) ++start[expert_of[p] + 1];
  for (int64_t e = 0; e < num_experts; ++e) start[e + 1] += start[e];
  std::vector<int64_t> place(start.begin(), start.end() - 1), tokens_by(pairs);
  std::vector<float> factors_by(pairs);
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t to = place[expert_of[p]]++;
    tokens_by[to] = token_of[p];
    factors_by[to] = factor_of[p];
  }
  const int64_t width = num_experts ? (gate.size(0) - shared) / num_experts : 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const Users users{tokens_by.data() + start[e], factors_by.data() + start[e],
                      start[e + 1] - start[e]};
    add_slice(x, ffn, shared + e * width, shared + (e + 1) * width, users, out);
  }
  if (expert_bias) {
    const Tensor bias = *as_float(expert_bias);
    const float* b = bias.const_data_ptr<float>();
    for (int64_t p = 0; p < pairs; ++p) {
      float* row = out + token_of[p] * hidden;
      const float* from = b + expert_of[p] * hidden;
      const float w = factor_of[p];
      over_row(hidden, [&](int64_t d, auto get, auto put) {
        put(row + d, get(row + d) + w * get(from + d));
      });
    }
  }
  if (output_bias) y.add_(*as_float(output_bias));
  return y.to(x.scalar_type());
}

// Every neuron, each multiplied by its expert's factor in factors (T, E).
Tensor masked(const Tensor& x_, const Tensor& gate, const Tensor& up, const Tensor& down,
              const optional<Tensor>& gate_bias, const optional<Tensor>& up_bias,
              const optional<Tensor>& output_bias, const optional<Tensor>& expert_bias,
              const std::string& activation, int64_t shared, const optional<Tensor>& factors_) {
  const Tensor x = x_.contiguous();
  const Ffn ffn = checked(x, gate, up, down, gate_bias, up_bias, activation);
  const optional<Tensor> factors = as_float(factors_);
  Tensor y = at::zeros({x.size(0), x.size(1)}, x.options().dtype(at::kFloat));
  float* out = y.mutable_data_ptr<float>();
  Users users{nullptr, nullptr, x.size(0)};
  if (factors) {
    users.factors = factors->const_data_ptr<float>();
    users.experts = factors->size(1);
    users.shared = shared;
    users.width = (gate.size(0) - shared) / users.experts;
  }
  add_slice(x, ffn, 0, gate.size(0), users, out);
  if (factors && expert_bias) y.addmm_(*factors, *as_float(expert_bias));
  if (output_bias) y.add_(*as_float(output_bias));
  return y.to(x.scalar_type());
}

// Scores of four experts for one token: what is read of the token is used four times.
template <int kExperts, typename T>
void score_experts(const T* x, const T* weight, int64_t hidden, float* out) {
  Vec totals[kExperts] = {};
  over_row(hidden, [&](int64_t d, auto get, auto) {
    const Vec xd = get(x + d);
    for (int e = 0; e < kExperts; ++e) totals[e] += xd * get(weight + e * hidden + d);
  });
  for (int e = 0; e < kExperts; ++e) out[e] = weaver::sum(totals[e]);
}

// x weight^T in float32, (T, E).
Tensor scores(const Tensor& x, const Tensor& weight) {
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
// up_weight makes it a glu router. top_k 0 selects by threshold: what exceeds lowest, 0 if that is
// left out. scaling is c of softmax weights, 0
// stands for weights of 1 + p scale. See weaver.kernels.reference.route.
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& x_, const Tensor& weight,
                                         const optional<Tensor>& up_weight,
                                         const optional<Tensor>& bias_, const Tensor& scale_,
                                         const Tensor& balance_, const std::string& activation,
                                         int64_t top_k, double scaling,
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
      put(p.data() + e, weaver::exp(get(row + e) - highest));
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

// route and moe in one call: while decoding, what lies between two calls is a large part of the time.
// The second result is the number of experts of every token.
std::tuple<Tensor, Tensor> decode(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down,
              const optional<Tensor>& gate_bias, const optional<Tensor>& up_bias,
              const optional<Tensor>& output_bias, const optional<Tensor>& expert_bias,
              const std::string& activation, int64_t shared, const Tensor& router,
              const optional<Tensor>& up_router, const optional<Tensor>& bias, const Tensor& scale,
              const Tensor& balance, int64_t top_k, double scaling,
              const optional<Tensor>& lowest) {
  const auto [tokens, experts, factors] =
      route(x, router, up_router, bias, scale, balance, activation, top_k, scaling, lowest);
  Tensor counts = at::zeros({x.size(0)}, tokens.options().dtype(at::kInt));
  for (int64_t i = 0; i < tokens.numel(); ++i)
    ++counts.mutable_data_ptr<int32_t>()[tokens.const_data_ptr<int64_t>()[i]];
  Tensor y = moe(x, gate, up, down, gate_bias, up_bias, output_bias, expert_bias, activation,
                 shared, router.size(0), tokens, experts, factors);
  return {y, counts};
}

}  // namespace

TORCH_LIBRARY(weaver_cpu, m) {
  m.def(
      "moe(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias, Tensor? up_bias, "
      "Tensor? output_bias, Tensor? expert_bias, str activation, int shared, int num_experts, "
      "Tensor tokens, Tensor experts, Tensor factors) -> Tensor");
  m.def(
      "masked(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias, Tensor? up_bias, "
      "Tensor? output_bias, Tensor? expert_bias, str activation, int shared, Tensor? factors) "
      "-> Tensor");
  m.def(
      "decode(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias, Tensor? up_bias, "
      "Tensor? output_bias, Tensor? expert_bias, str activation, int shared, Tensor router, "
      "Tensor? up_router, Tensor? bias, Tensor scale, Tensor balance, int top_k, float scaling, "
      "Tensor? lowest) -> (Tensor, Tensor)");
  m.def(
      "route(Tensor x, Tensor weight, Tensor? up_weight, Tensor? bias, Tensor scale, "
      "Tensor balance, str activation, int top_k, float scaling, Tensor? lowest) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(weaver_cpu, CPU, m) {
  m.impl("moe", &moe);
  m.impl("masked", &masked);
  m.impl("route", &route);
  m.impl("decode", &decode);
}
