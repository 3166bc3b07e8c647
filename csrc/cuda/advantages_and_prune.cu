// Advantages and pruning on CUDA: the launch of prune_kernel.cuh.

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "advantages.h"
#include "launch.h"
#include "prune_kernel.cuh"

namespace cppo::cuda {
namespace {

using torch::headeronly::ScalarType;

constexpr int kMaxThreads = 1024;

void run(const char* op, const Tensor& like, const PruneArgs& args) {
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
  std::optional<Tensor> score;
};

// Fills the pruning half of `args` and runs the kernel; returns the kept indices.
Tensor prune_and_run(const char* op, const Tensor& like, PruneArgs args, const Pruning& pruning) {
  check_prune(op, args.total, pruning.unit_size, pruning.keep);
  std::optional<Tensor> score, ranked;
  if (needs_score(pruning.prune)) {
    CPPO_CHECK(pruning.score.has_value(), op, "score (B,) is needed for this rule");
    CPPO_CHECK(pruning.score->is_cuda(), op, "score must be on the device of the rewards");
    CPPO_CHECK(pruning.score->dim() == 1 && pruning.score->size(0) == args.total, op,
               "score must be (B,) = (", args.total, ",), got ", shape_of(*pruning.score));
    score = dense(*pruning.score, ScalarType::Double);
    args.score = static_cast<const double*>(score->const_data_ptr());
  }
  if (pruning.prune == Prune::kVariance) {
    ranked = empty(like, args.total, ScalarType::Double);
    args.ranked = static_cast<double*>(ranked->mutable_data_ptr());
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

PruneArgs advantage_args(const char* op, const Tensor& rewards, const Tensor& exact,
                    const Tensor& advantages, int64_t group_size, Scale scale, double eps) {
  check_dim(op, "rewards", rewards, 1);
  check_blocks(op, "group_size", rewards.size(0), group_size);
  PruneArgs args = {};
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

Tensor prune_completions(Tensor advantages, int64_t unit_size, int64_t keep, std::string rule,
                         std::optional<Tensor> score) {
  const char* op = "prune_completions";
  check_dim(op, "advantages", advantages, 1);
  const Tensor exact = dense(advantages, ScalarType::Double);
  PruneArgs args = {};
  args.given = static_cast<const double*>(exact.const_data_ptr());
  args.total = advantages.size(0);
  return prune_and_run(op, advantages, args, {unit_size, keep, parse_prune(op, rule), score});
}

std::tuple<Tensor, Tensor> advantages_and_prune(Tensor rewards, int64_t group_size,
                                                int64_t unit_size, int64_t keep, std::string scale,
                                                double eps, std::string rule,
                                                std::optional<Tensor> score) {
  const char* op = "advantages_and_prune";
  CPPO_CHECK(unit_size % group_size == 0, op, "unit_size must be a multiple of group_size = ",
             group_size, ", got ", unit_size);
  const Tensor exact = dense(rewards, ScalarType::Double);
  Tensor advantages = empty(rewards, rewards.numel(), ScalarType::Float);
  const PruneArgs args =
      advantage_args(op, rewards, exact, advantages, group_size, parse_scale(op, scale), eps);
  Tensor kept =
      prune_and_run(op, rewards, args, {unit_size, keep, parse_prune(op, rule), score});
  return {advantages, kept};
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CUDA, m) {
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
  m.impl("prune_completions", TORCH_BOX(&prune_completions));
  m.impl("advantages_and_prune", TORCH_BOX(&advantages_and_prune));
}

}  // namespace
}  // namespace cppo::cuda
