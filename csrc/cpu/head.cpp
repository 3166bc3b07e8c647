// What the LM head does between vendor GEMMs (cppo/ops/head.py).

#include <algorithm>
#include <numeric>
#include <vector>

#include "ops.h"
#include "rows.h"

namespace cppo::cpu {
namespace {

constexpr const char* kOp = "place_transposed_";
constexpr int64_t kSide = 16;  // a cache line of floats

// out[r, c] = in[c, r]. Whole blocks are turned around in a buffer, so that both sides are read and
// written by the cache line.
template <class T>
void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows,
               int64_t columns) {
  T block[kSide][kSide];
  int64_t c = 0;
  if (rows == kSide) {
    for (; c + kSide <= columns; c += kSide) {
      for (int64_t j = 0; j < kSide; ++j) {
        for (int64_t i = 0; i < kSide; ++i) block[i][j] = in[(c + j) * in_stride + i];
      }
      for (int64_t i = 0; i < kSide; ++i) {
        std::copy_n(block[i], kSide, out + i * out_stride + c);
      }
    }
  }
  for (; c < columns; ++c) {
    for (int64_t i = 0; i < rows; ++i) out[i * out_stride + c] = in[c * in_stride + i];
  }
}

template <class T>
void place(const Tensor& tile, const Tensor& product, int64_t first) {
  const int64_t rows = tile.size(0), stride = tile.stride(0);
  T* out = static_cast<T*>(tile.mutable_data_ptr()) + first;
  const T* in = static_cast<const T*>(product.const_data_ptr());
  std::vector<int64_t> blocks((rows + kSide - 1) / kSide);
  std::iota(blocks.begin(), blocks.end(), int64_t{0});
  for_each(blocks, [&](int64_t b) {
    const int64_t row = b * kSide;
    transpose(in + row, product.stride(0), out + row * stride, stride,
              std::min(kSide, rows - row), product.size(0));
  });
}

}  // namespace

void place_transposed_(Tensor tile, Tensor product, int64_t first) {
  check_cpu(kOp, "tile", tile);
  check_cpu(kOp, "product", product);
  check_dim(kOp, "tile", tile, 2);
  check_dim(kOp, "product", product, 2);
  const ScalarType type = tile.scalar_type();
  const bool wide = type == ScalarType::Double;
  CPPO_CHECK(product.scalar_type() == type && (wide || type == ScalarType::Float), kOp,
             "tile and product must both be fp32 or both fp64");
  CPPO_CHECK(tile.stride(1) == 1 && product.stride(1) == 1, kOp,
             "tile and product must be dense in their last dimension");
  const bool fits = first >= 0 && first <= tile.size(1) - product.size(0);
  CPPO_CHECK(fits && tile.size(0) <= product.size(1), kOp, "product ", shape_of(product),
             ", turned around, must fit tile ", shape_of(tile), " from column ", first);
  wide ? place<double>(tile, product, first) : place<float>(tile, product, first);
}

}  // namespace cppo::cpu
