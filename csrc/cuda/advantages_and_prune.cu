// Advantages and pruning on CUDA (specification: cppo/reference.py), one launch for both.
//
// One block per unit (a question, or the whole batch). Means and deviations are summed in index
// order in fp64 by every thread that needs them: groups are small, and the result is the CPU's.
// A completion stays if fewer than `keep` completions of its unit rank before it; its place among
// the kept ones is the number of kept completions with a lower index. O(n^2) per unit, without
// a sort, atomics or a second launch, hence repeatable.

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "advantages.h"
#include "launch.h"

namespace cppo::cuda {
namespace {

using torch::headeronly::ScalarType;

constexpr int kMaxThreads = 1024;

struct Args {
  const double* rewards;  // (B,), or null where the advantages are given
  const double* given;    // (B,) those advantages, or null
  const double* noise;    // (B,), with Prune::kRandom only
  float* advantages;      // (B,), written where the rewards are given
  int32_t* rank;          // (B,) scratch
  int64_t* kept;          // (B / unit_size * keep,), or null where nothing is pruned
  int64_t total, group_size, unit_size, keep;
  double eps;
  Scale scale;
  Prune prune;
};

__device__ float advantage_of(const Args& args, int64_t i, double batch_std) {
  const int64_t size = args.group_size;
  const double* group = args.rewards + i / size * size;
  const double centred = args.rewards[i] - mean_of(group, size);
  if (fabs(centred) <= mean_error(group, size)) return 0.0f;
  double divisor = 1.0;
  if (args.scale == Scale::kGroup && size > 1) divisor = std_of(group, size) + args.eps;
  if (args.scale == Scale::kBatch && args.total > 1) divisor = batch_std + args.eps;
  return static_cast<float>(centred / divisor);
}

__device__ double score_of(const Args& args, int64_t i) {
  if (args.prune == Prune::kRandom) return args.noise[i];
  const double size = fabs(args.given != nullptr ? args.given[i] : args.advantages[i]);
  return args.prune == Prune::kSmallest ? size : -size;
}

__global__ void advantages_and_prune_kernel(Args args) {
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
  for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
    const double score = score_of(args, i);
    int32_t rank = 0;
    for (int64_t j = first; j < end; ++j) rank += stays_before(score_of(args, j), j, score, i);
    args.rank[i] = rank;
  }
  __syncthreads();
  for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
    if (args.rank[i] >= args.keep) continue;
    int64_t place = 0;
    for (int64_t j = first; j < i; ++j) place += args.rank[j] < args.keep;
    args.kept[blockIdx.x * args.keep + place] = i;
  }
}

void run(const char* op, const Tensor& like, const Args& args) {
  if (args.total == 0) return;
  const Launch launch(like);
  const int64_t units = args.total / args.unit_size;
  CPPO_CHECK(units <= INT32_MAX, op, "at most 2^31 - 1 units fit one launch, got ", units);
  int threads = 32;
  while (threads < args.unit_size && threads < kMaxThreads) threads *= 2;
  advantages_and_prune_kernel<<<static_cast<unsigned>(units), threads, 0, launch.on()>>>(args);
  Launch::check(op);
}

Tensor dense(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(tensor, type));
}

Tensor empty(const Tensor& like, int64_t size, ScalarType type) {
  return torch::stable::new_empty(like, {size}, type);
}

struct Pruning {
  int64_t unit_size, keep;
  Prune prune;
  std::optional<Tensor> noise;
};

// Fills the pruning half of `args` and runs the kernel; returns the kept indices.
Tensor prune_and_run(const char* op, const Tensor& like, Args args, const Pruning& pruning) {
  check_prune(op, args.total, pruning.unit_size, pruning.keep);
  std::optional<Tensor> noise;
  if (pruning.prune == Prune::kRandom) {
    CPPO_CHECK(pruning.noise.has_value(), op, "noise (B,) is needed for prune = 'random'");
    CPPO_CHECK(pruning.noise->is_cuda(), op, "noise must be on the device of the rewards");
    CPPO_CHECK(pruning.noise->dim() == 1 && pruning.noise->size(0) == args.total, op,
               "noise must be (B,) = (", args.total, ",), got ", shape_of(*pruning.noise));
    noise = dense(*pruning.noise, ScalarType::Double);
    args.noise = static_cast<const double*>(noise->const_data_ptr());
  }
  const Tensor rank = empty(like, args.total, ScalarType::Int);
  const Tensor kept = empty(like, args.total / pruning.unit_size * pruning.keep, ScalarType::Long);
  args.rank = static_cast<int32_t*>(rank.mutable_data_ptr());
  args.kept = static_cast<int64_t*>(kept.mutable_data_ptr());
  args.unit_size = pruning.unit_size;
  args.keep = pruning.keep;
  args.prune = pruning.prune;
  run(op, like, args);
  return kept;
}

Args advantage_args(const char* op, const Tensor& rewards, const Tensor& exact,
                    const Tensor& advantages, int64_t group_size, Scale scale, double eps) {
  check_dim(op, "rewards", rewards, 1);
  check_blocks(op, "group_size", rewards.size(0), group_size);
  Args args = {};
  args.rewards = static_cast<const double*>(exact.const_data_ptr());
  args.advantages = static_cast<float*>(advantages.mutable_data_ptr());
  args.total = rewards.size(0);
  args.group_size = args.unit_size = group_size;
  args.eps = eps;
  args.scale = scale;
  return args;
}

Tensor group_advantages(Tensor rewards, int64_t group_size, std::string scale, double eps) {
  const char* op = "group_advantages";
  const Tensor exact = dense(rewards, ScalarType::Double);
  Tensor advantages = empty(rewards, rewards.numel(), ScalarType::Float);
  run(op, rewards,
      advantage_args(op, rewards, exact, advantages, group_size, parse_scale(op, scale), eps));
  return advantages;
}

Tensor prune_completions(Tensor advantages, int64_t unit_size, int64_t keep, std::string prune,
                         std::optional<Tensor> noise) {
  const char* op = "prune_completions";
  check_dim(op, "advantages", advantages, 1);
  const Tensor exact = dense(advantages, ScalarType::Double);
  Args args = {};
  args.given = static_cast<const double*>(exact.const_data_ptr());
  args.total = advantages.size(0);
  return prune_and_run(op, advantages, args, {unit_size, keep, parse_prune(op, prune), noise});
}

std::tuple<Tensor, Tensor> advantages_and_prune(Tensor rewards, int64_t group_size,
                                                int64_t unit_size, int64_t keep, std::string scale,
                                                double eps, std::string prune,
                                                std::optional<Tensor> noise) {
  const char* op = "advantages_and_prune";
  CPPO_CHECK(unit_size % group_size == 0, op, "unit_size must be a multiple of group_size = ",
             group_size, ", got ", unit_size);
  const Tensor exact = dense(rewards, ScalarType::Double);
  Tensor advantages = empty(rewards, rewards.numel(), ScalarType::Float);
  const Args args =
      advantage_args(op, rewards, exact, advantages, group_size, parse_scale(op, scale), eps);
  Tensor kept =
      prune_and_run(op, rewards, args, {unit_size, keep, parse_prune(op, prune), noise});
  return {advantages, kept};
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CUDA, m) {
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
  m.impl("prune_completions", TORCH_BOX(&prune_completions));
  m.impl("advantages_and_prune", TORCH_BOX(&advantages_and_prune));
}

}  // namespace
}  // namespace cppo::cuda
