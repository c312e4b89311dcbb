// The FFN, the parts of it that tokens use, and the dtypes that it is computed in.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "vector.h"

namespace weaver {

using at::Tensor;
using std::optional;

struct Ffn {
  Tensor gate, up, down;                // (F', D)
  optional<Tensor> gate_bias, up_bias;  // (F'), float32
  Activation activation;
};

inline const float* data_or_null(const optional<Tensor>& bias, int64_t begin) {
  return bias ? bias->const_data_ptr<float>() + begin : nullptr;
}

// Neurons [begin, end) with the tokens that use them and the factor of their output for each. If
// `experts` is not 0, the slice is the whole FFN: factors are (tokens, experts), the first `shared`
// neurons have factor 1, and neuron j of the others that of expert (j - shared) / width.
struct Slice {
  int64_t begin, end;
  const int64_t* tokens;  // nullptr: token i is i
  const float* factors;   // nullptr: 1
  int64_t count;
  int64_t experts = 0, shared = 0, width = 0;

  int64_t token(int64_t i) const { return tokens ? tokens[i] : i; }
};

inline Activation activation_of(const std::string& name) {
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

}  // namespace weaver
