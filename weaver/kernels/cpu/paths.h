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

// Products in bfloat16 take the first of these that the processor has, unless a test asks for
// another one: instructions of AMX, those of AVX512-BF16, the same tiles with bfloat16 widened, and
// ATen's products, which also take sizes that do not fit into tiles and the other dtypes.
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

// Computes products in bfloat16 by a path from now on, in this process; returns the one before.
inline std::string use_path(const std::string& name) {
  TORCH_CHECK(has_path(name), "this processor has no path ", name, " for products in bfloat16");
  return std::exchange(chosen_path(), name);
}

// Up to this many tokens the rows of a slice are read once for all of them; above, products are
// faster: in bfloat16 from 5 tokens on with AMX, where a tile of sixteen costs as much as a token;
// in float32 where the registers hold few sums, or x and y of the tokens leave the second cache.
inline int64_t streamed(at::ScalarType dtype, int64_t hidden) {
#ifdef __AVX512F__
  constexpr int64_t kCached = 1 << 17, kMost = 192;
  if (dtype == at::kFloat) return std::clamp<int64_t>(kCached / hidden, 32, kMost);
#endif
  if (dtype == at::kFloat) return 32;
  return dtype == at::kBFloat16 && chosen_path() == "amx" ? 4 : 12;
}

inline void add_products(const Tensor& x, const Ffn& ffn, const std::vector<Slice>& slices,
                         float* y) {
  if (x.scalar_type() == at::kBFloat16 && x.size(1) % tiles::kDepth == 0) {
    const std::string& path = chosen_path();
#if WEAVER_AMX
    if (path == "amx") return tiles::add_slices<tiles::Amx>(x, ffn, slices, y);
#endif
#if WEAVER_DOT
    if (path == "dot") return tiles::add_slices<tiles::Dot>(x, ffn, slices, y);
#endif
    if (path == "floats") return tiles::add_slices<tiles::Floats>(x, ffn, slices, y);
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
