// What the CPU and the CUDA kernel of advantages and pruning share: options, and arithmetic in fp64
// that rounds alike on both.
#pragma once

#include <cmath>
#include <string>

#include "check.h"

#ifdef __CUDACC__
#define CPPO_EVERYWHERE __host__ __device__
#else
#define CPPO_EVERYWHERE
#endif

namespace cppo {

enum class Scale { kGroup, kBatch, kNone };
enum class Prune { kSmallest, kLargest, kRandom };

inline Scale parse_scale(const char* op, const std::string& scale) {
  if (scale == "group") return Scale::kGroup;
  if (scale == "batch") return Scale::kBatch;
  CPPO_CHECK(scale == "none", op, "scale must be 'group', 'batch' or 'none', got '", scale, "'");
  return Scale::kNone;
}

inline Prune parse_prune(const char* op, const std::string& prune) {
  if (prune == "smallest") return Prune::kSmallest;
  if (prune == "largest") return Prune::kLargest;
  CPPO_CHECK(prune == "random", op, "prune must be 'smallest', 'largest' or 'random', got '",
             prune, "'");
  return Prune::kRandom;
}

inline void check_prune(const char* op, int64_t total, int64_t unit_size, int64_t keep) {
  check_blocks(op, "unit_size", total, unit_size);
  CPPO_CHECK(keep >= 1 && keep <= unit_size, op, "keep must be in [1, unit_size = ", unit_size,
             "], got ", keep);
}

CPPO_EVERYWHERE inline double mean_of(const double* values, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum / static_cast<double>(count);
}

// With n - 1, as torch.std; two passes, because one pass cancels for large rewards.
CPPO_EVERYWHERE inline double std_of(const double* values, int64_t count) {
  const double mean = mean_of(values, count);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += (values[i] - mean) * (values[i] - mean);
  return std::sqrt(sum / static_cast<double>(count - 1));
}

// Within the rounding error of the mean a difference is zero, and no advantage (equal rewards).
CPPO_EVERYWHERE inline double mean_error(const double* values, int64_t count) {
  double largest = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    // As fmax: a NaN is passed over.
    const double size = std::fabs(values[i]);
    largest = size > largest ? size : largest;
  }
  return static_cast<double>(count) * 0x1p-52 * largest;
}

// Whether completion j stays before completion i. Larger score first; a NaN counts as the largest,
// as in torch.sort, so that the order is total; then the lower index.
CPPO_EVERYWHERE inline bool stays_before(double score_j, int64_t j, double score_i, int64_t i) {
  const bool nan_i = score_i != score_i, nan_j = score_j != score_j;
  if (nan_i != nan_j) return nan_j;
  if (nan_i || score_i == score_j) return j < i;
  return score_j > score_i;
}

}  // namespace cppo
