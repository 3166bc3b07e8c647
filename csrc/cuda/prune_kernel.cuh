// The kernel of advantages and pruning (specification: cppo/reference.py), one launch for both.
//
// One block per unit (a question, or the whole batch). Means and deviations are summed in index
// order in fp64 by every thread that needs them: groups are small, and the result is the CPU's.
// A completion stays if fewer than `keep` completions of its unit rank before it; its place among
// the kept ones is the number of kept completions with a lower index. O(n^2) per unit, without
// a sort, atomics or a second launch, hence repeatable. What cannot be split, the walks over the
// ranked rewards and over the probabilities, one thread does for its unit.
//
// Nothing of torch is here: tests/cuda_on_cpu.cpp runs it where there is no GPU.
#pragma once

#include <cstdint>

#include "prune_rules.h"

namespace cppo::cuda {

struct PruneArgs {
  const double* rewards;  // (B,), or null where the advantages are given
  const double* given;    // (B,) those advantages, or null
  const double* score;    // (B,), for the rules that need one
  float* advantages;      // (B,), written where the rewards are given
  double* ranked;         // (B,) scratch, with Prune::kVariance only
  int32_t* rank;          // (B,) scratch
  int64_t* kept;          // (B / unit_size * keep,), or null where nothing is pruned
  int64_t total, group_size, unit_size, keep;
  double eps;
  Scale scale;
  Prune prune;
};

__device__ inline float advantage_of(const PruneArgs& args, int64_t i, double batch_std) {
  const int64_t size = args.group_size;
  const double* group = args.rewards + i / size * size;
  const double centred = args.rewards[i] - mean_of(group, size);
  if (std::fabs(centred) <= mean_error(group, size)) return 0.0f;
  double divisor = 1.0;
  if (args.scale == Scale::kGroup && size > 1) divisor = std_of(group, size) + args.eps;
  if (args.scale == Scale::kBatch && args.total > 1) divisor = batch_std + args.eps;
  return static_cast<float>(centred / divisor);
}

__device__ inline double size_of(const PruneArgs& args, int64_t i) {
  return std::fabs(args.given != nullptr ? args.given[i] : args.advantages[i]);
}

__device__ inline double score_of(const PruneArgs& args, int64_t i) {
  if (args.prune == Prune::kSmallest) return size_of(args, i);
  if (args.prune == Prune::kLargest) return -size_of(args, i);
  return args.score[i];
}

// Of the completions of a unit, those with a larger score than i, an equal one, and an equal one
// and a lower index.
struct Standing {
  int64_t above, equal, before;
};

__device__ inline Standing standing_of(const PruneArgs& args, int64_t first, int64_t i) {
  const double score = score_of(args, i);
  Standing found{0, 0, 0};
  for (int64_t j = first; j < first + args.unit_size; ++j) {
    const double other = score_of(args, j);
    const bool above = is_larger(other, score), equal = !above && !is_larger(score, other);
    found.above += above;
    found.equal += equal;
    found.before += equal && j < i;
  }
  return found;
}

// Turns the ranks of a unit into those of the rule of the largest variance: 0 for what stays.
__device__ inline void rank_by_variance(const PruneArgs& args, int64_t first) {
  const int64_t n = args.unit_size;
  for (int64_t i = first + threadIdx.x; i < first + n; i += blockDim.x) {
    args.ranked[first + args.rank[i]] = args.score[i];
  }
  __shared__ int64_t split;
  __syncthreads();
  if (threadIdx.x == 0) split = variance_split(args.ranked + first, n, args.keep);
  __syncthreads();
  for (int64_t i = first + threadIdx.x; i < first + n; i += blockDim.x) {
    const Standing own = standing_of(args, first, i);
    const int64_t taken = taken_of_equals(own.above, own.equal, n, args.keep, split);
    args.rank[i] = own.before < taken ? 0 : args.keep;
  }
}

__global__ void advantages_and_prune_kernel(PruneArgs args) {
  const int64_t first = blockIdx.x * args.unit_size;
  const int64_t end = first + args.unit_size;
  if (args.rewards != nullptr) {
    __shared__ double batch_std;
    if (args.scale == Scale::kBatch) {
      if (threadIdx.x == 0) batch_std = args.total > 1 ? std_of(args.rewards, args.total) : 0.0;
      __syncthreads();
    }
    const double divisor = args.scale == Scale::kBatch ? batch_std : 0.0;
    for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
      args.advantages[i] = advantage_of(args, i, divisor);
    }
    __syncthreads();
  }
  if (args.kept == nullptr) return;
  int64_t* kept = args.kept + blockIdx.x * args.keep;
  if (args.prune == Prune::kUnbiased) {
    if (threadIdx.x > 0) return;
    draw([&](int64_t i) { return size_of(args, first + i); }, args.unit_size, args.keep,
         args.score[first], [&](int64_t i) { *kept++ = first + i; });
    return;
  }
  for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
    const Standing own = standing_of(args, first, i);
    args.rank[i] = static_cast<int32_t>(own.above + own.before);
  }
  __syncthreads();
  if (args.prune == Prune::kVariance) {
    rank_by_variance(args, first);
    __syncthreads();
  }
  for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
    if (args.rank[i] >= args.keep) continue;
    int64_t place = 0;
    for (int64_t j = first; j < i; ++j) place += args.rank[j] < args.keep;
    kept[place] = i;
  }
}

}  // namespace cppo::cuda
