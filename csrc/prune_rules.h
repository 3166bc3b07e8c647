// The arithmetic of advantages and of pruning, in fp64, that the CPU and the CUDA kernel share: it
// rounds alike on both, and what the CPU's tests cover the GPU runs.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define CPPO_EVERYWHERE __host__ __device__
#else
#define CPPO_EVERYWHERE
#endif

namespace cppo {

enum class Scale { kGroup, kBatch, kNone };

// What stays: by |A|, by a score that is given, of the largest variance, or by chance.
enum class Prune { kSmallest, kLargest, kScore, kVariance, kUnbiased };

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

// A NaN counts as the largest, as in torch.sort, so that the order is total.
CPPO_EVERYWHERE inline bool is_larger(double a, double b) {
  return b == b && (a != a || a > b);
}

// Whether completion j stays before completion i: larger score first, then the lower index.
CPPO_EVERYWHERE inline bool stays_before(double score_j, int64_t j, double score_i, int64_t i) {
  return is_larger(score_j, score_i) || (j < i && !is_larger(score_i, score_j));
}

// Of the i highest and keep - i lowest of n rewards: the i with the largest variance, of equal ones
// the smaller i >= 1. A step to i + 1 trades `low` for `high`; it gains until one does not, as
// cppo.reference._by_variance shows. `ranked` has the highest first.
CPPO_EVERYWHERE inline int64_t variance_split(const double* ranked, int64_t n, int64_t keep) {
  const double* lowest = ranked + (n - keep);
  const double error = 4.0 * static_cast<double>(keep) * mean_error(ranked, n);
  double sum = 0.0;
  for (int64_t i = 0; i < keep; ++i) sum += lowest[i];
  int64_t split = 0;
  for (; split < keep; ++split) {
    const double high = ranked[split], low = lowest[split], after = sum + (high - low);
    const double gain = static_cast<double>(keep) * (high + low) - (sum + after);
    if (split > 0 && !(gain > error)) break;
    sum = after;
  }
  return split;
}

// How many of `equal` rewards, with `above` larger ones, are among the `split` highest or the
// keep - split lowest of n. These are the ones with the lowest indices.
CPPO_EVERYWHERE inline int64_t taken_of_equals(int64_t above, int64_t equal, int64_t n,
                                               int64_t keep, int64_t split) {
  int64_t first = split - above, last = above + equal - (n - keep + split);
  first = first < 0 ? 0 : first < equal ? first : equal;
  last = last < 0 ? 0 : last < equal ? last : equal;
  return first + last;
}

// With which probability a completion stays: min(1, scale * max(|A|, floor)).
struct Inclusion {
  double floor, scale;

  CPPO_EVERYWHERE double weight(double size) const { return size > floor ? size : floor; }
  CPPO_EVERYWHERE double operator()(double size) const {
    const double p = scale * weight(size);
    return p < 1.0 ? p : 1.0;
  }
};

// The probabilities of n completions sum up to `keep`; size(i) is |A_i|. The floor is that of
// cppo.reference.INCLUSION_FLOOR; where all advantages are 0 the probabilities are equal.
template <class Size>
CPPO_EVERYWHERE inline Inclusion inclusion(const Size& size, int64_t n, int64_t keep) {
  double total = 0.0, rest = 0.0;
  for (int64_t i = 0; i < n; ++i) total += size(i);
  Inclusion p{total == 0.0 ? 1.0 : 0.1 * total / static_cast<double>(n), HUGE_VAL};
  if (keep == n) return p;
  for (int64_t i = 0; i < n; ++i) rest += p.weight(size(i));
  // Those that reach 1 stay for certain, and the scale is of the others; then more may reach 1.
  for (int64_t certain = 0;;) {
    p.scale = static_cast<double>(keep - certain) / rest;
    int64_t found = 0;
    rest = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double weight = p.weight(size(i));
      if (p.scale * weight >= 1.0) {
        ++found;
      } else {
        rest += weight;
      }
    }
    if (found <= certain) return p;
    certain = found;
  }
}

// Systematic sampling with one number u in [0, 1): completion i stays where u, u + 1, u + 2, ...
// hit its part of the line from 0 to the sum of all probabilities. take(i) is called `keep` times,
// whatever rounding does at the ends of the parts.
template <class Size, class Take>
CPPO_EVERYWHERE inline void draw(const Size& size, int64_t n, int64_t keep, double u,
                                 const Take& take) {
  const Inclusion p = inclusion(size, n, keep);
  double sum = 0.0;
  int64_t taken = 0;
  for (int64_t i = 0; i < n && taken < keep; ++i) {
    sum += p(size(i));
    if (sum > u + static_cast<double>(taken) || n - i == keep - taken) {
      take(i);
      ++taken;
    }
  }
}

}  // namespace cppo
