// Chooses how slices are computed: few tokens row by row, more by products, on the instructions
// that the processor has.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "engines.h"
#include "ffn.h"
#include "gemm.h"
#include "stream.h"
#include "tiles.h"

namespace weaver {

// Products take the first of these that the processor has, unless a test asks for another one. In
// bfloat16: instructions of AMX, those of AVX512-BF16, or the same tiles with bfloat16 widened; in
// float32 tiles of floats, whichever of the three is asked for. ATen's products take the sizes that
// do not fit into tiles, and float16.
constexpr const char* kPaths[] = {"amx", "dot", "floats", "gemm"};

inline bool has_path(const std::string& name) {
#if WEAVER_AMX
  if (name == "amx") return tiles::Amx::permitted();
#endif
  return (name == "dot" && WEAVER_DOT) || name == "floats" || name == "gemm";
}

inline std::string& chosen_path() {
  static std::string name = *std::find_if(std::begin(kPaths), std::end(kPaths), has_path);
  return name;
}

// Whether products of a dtype are computed on tiles.
inline bool has_tiles(at::ScalarType dtype, int64_t hidden) {
  return dtype != at::kHalf && hidden % tiles::kColumns == 0 && chosen_path() != "gemm";
}

// Computes products by a path from now on, in this process; returns the one before.
inline std::string use_path(const std::string& name) {
  TORCH_CHECK(has_path(name), "this processor has no path ", name, " for products");
  return std::exchange(chosen_path(), name);
}

// Up to this many tokens the rows of a slice are read once for all of them; above, products are
// faster: in bfloat16 from 5 tokens on with AMX, where a tile of sixteen costs as much as a token;
// in float32 without tiles, where a product begins with a copy of its tokens, from 33 on.
inline int64_t streamed(at::ScalarType dtype, int64_t hidden) {
  if (dtype == at::kFloat && !has_tiles(dtype, hidden)) return 32;
  return dtype == at::kBFloat16 && chosen_path() == "amx" ? 4 : 12;
}

inline void add_products(const Tensor& x, const Ffn& ffn, const std::vector<Slice>& slices,
                         float* y) {
  if (has_tiles(x.scalar_type(), x.size(1))) {
    if (x.scalar_type() == at::kFloat) return tiles::add_slices<tiles::Floats>(x, ffn, slices, y);
#if WEAVER_AMX
    if (chosen_path() == "amx") return tiles::add_slices<tiles::Amx>(x, ffn, slices, y);
#endif
#if WEAVER_DOT
    if (chosen_path() == "dot") return tiles::add_slices<tiles::Dot>(x, ffn, slices, y);
#endif
    return tiles::add_slices<tiles::Widened>(x, ffn, slices, y);
  }
  with_type(x.scalar_type(), [&](auto zero) {
    for (const Slice& slice : slices) gemm::add_slice<decltype(zero)>(x, ffn, slice, y);
  });
}

// y[token] += the outputs of slices.
inline void add_slices(const Tensor& x, const Ffn& ffn, const std::vector<Slice>& slices,
                       float* y) {
  std::vector<Slice> few, many;
  for (const Slice& slice : slices)
    if (slice.count && slice.begin < slice.end)
      (slice.count <= streamed(x.scalar_type(), x.size(1)) ? few : many).push_back(slice);
  with_type(x.scalar_type(), [&](auto zero) { stream<decltype(zero)>(x, ffn, few, y); });
  if (!many.empty()) add_products(x, ffn, many, y);
}

}  // namespace weaver
