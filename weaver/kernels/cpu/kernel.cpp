// The MoE FFN on a CPU: y[t] = sum over slices s of act(x Wg_s^T) * (x Wu_s^T) * w_ts, times Wd_s.
//
// A slice is a range of stored neurons (rows of gate, up and down) with the tokens that use it: the
// shared neurons with all of them, an expert with those that selected it. With few tokens reading
// the rows is all that costs, so they are read once, row by row, for all tokens of the slice
// (stream.h). With more tokens a slice is three products: in bfloat16 and float32 on tiles (tiles.h),
// else by ATen's GEMMs (gemm.h). Sums over neurons are float32. weaver/kernels/reference.py is the
// definition.

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ffn.h"
#include "paths.h"
#include "route.h"
#include "vector.h"

namespace {

using at::Tensor;
using std::optional;
using weaver::activation_of;
using weaver::Ffn;
using weaver::over_row;
using weaver::Slice;

constexpr int64_t kFewPairs = 64;

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

// y[token] += factor * bias[expert] for every pair.
void add_constants(const Tensor& bias, const int64_t* token_of, const int64_t* expert_of,
                   const float* factor_of, int64_t pairs, Tensor& y) {
  const int64_t hidden = y.size(1), experts = bias.size(0);
  // With few pairs a product's call costs more than the sums.
  if (pairs > kFewPairs) {
    Tensor factors = at::zeros({y.size(0), experts}, y.options());
    float* factor = factors.mutable_data_ptr<float>();
    for (int64_t p = 0; p < pairs; ++p) factor[token_of[p] * experts + expert_of[p]] = factor_of[p];
    y.addmm_(factors, bias);
    return;
  }
  for (int64_t p = 0; p < pairs; ++p) {
    float* row = y.mutable_data_ptr<float>() + token_of[p] * hidden;
    const float* from = bias.const_data_ptr<float>() + expert_of[p] * hidden;
    over_row(hidden, [&](int64_t d, auto get, auto put) {
      put(row + d, get(row + d) + factor_of[p] * get(from + d));
    });
  }
}

// The chosen experts only.
//
// tokens, experts (P) int64 and factors (P) float32: the selected pairs. shared: S. Rows of gate,
// up and down may be strided, their columns may not.
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
  std::vector<Slice> slices{{0, shared, nullptr, nullptr, tokens}};
  for (int64_t e = 0; e < num_experts; ++e)
    slices.push_back({shared + e * width, shared + (e + 1) * width, tokens_by.data() + start[e],
                      factors_by.data() + start[e], start[e + 1] - start[e]});
  weaver::add_slices(x, ffn, slices, out);
  if (expert_bias) add_constants(*as_float(expert_bias), token_of, expert_of, factor_of, pairs, y);
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
  const int64_t tokens = x.size(0), neurons = gate.size(0);
  const int64_t experts = factors ? factors->size(1) : 0;
  const float* factor_of = factors ? factors->const_data_ptr<float>() : nullptr;
  const int64_t width = experts ? (neurons - shared) / experts : 0;
  if (tokens > weaver::streamed(x.scalar_type(), x.size(1))) {
    weaver::add_slices(
        x, ffn, {{0, neurons, nullptr, factor_of, tokens, experts, shared, width}}, out);
  } else {
    // Every expert with its own column of factors.
    const Tensor columns = factors ? factors->t().contiguous() : Tensor();
    std::vector<Slice> slices{{0, factors ? shared : neurons, nullptr, nullptr, tokens}};
    for (int64_t e = 0; e < experts; ++e)
      slices.push_back({shared + e * width, shared + (e + 1) * width, nullptr,
                        columns.const_data_ptr<float>() + e * tokens, tokens});
    weaver::add_slices(x, ffn, slices, out);
  }
  if (factors && expert_bias) y.addmm_(*factors, *as_float(expert_bias));
  if (output_bias) y.add_(*as_float(output_bias));
  return y.to(x.scalar_type());
}

// route and moe in one call: while decoding, what lies between two calls is a large part of the
// time. The second result is the number of experts of every token.
std::tuple<Tensor, Tensor> decode(
    const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down,
    const optional<Tensor>& gate_bias, const optional<Tensor>& up_bias,
    const optional<Tensor>& output_bias, const optional<Tensor>& expert_bias,
    const std::string& activation, int64_t shared, const Tensor& router,
    const optional<Tensor>& up_router, const optional<Tensor>& bias, const Tensor& scale,
    const Tensor& balance, int64_t top_k, double scaling, const optional<Tensor>& lowest) {
  const auto [tokens, experts, factors] =
      weaver::route(x, router, up_router, bias, scale, balance, activation, top_k, scaling, lowest);
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
  m.def("use_path(str name) -> str", &weaver::use_path);
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
  m.impl("route", &weaver::route);
  m.impl("decode", &decode);
}
