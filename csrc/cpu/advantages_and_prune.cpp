// Advantages and pruning on the CPU (specification: cppo/reference.py). Rewards are read in fp64.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "advantages.h"

namespace cppo::cpu {
namespace {

using torch::headeronly::ScalarType;

void advantages_into(const double* rewards, float* out, int64_t total, int64_t group_size,
                     Scale scale, double eps) {
  const double batch_std = scale == Scale::kBatch && total > 1 ? std_of(rewards, total) : 0.0;
  for (int64_t first = 0; first < total; first += group_size) {
    const double* group = rewards + first;
    const double mean = mean_of(group, group_size), error = mean_error(group, group_size);
    double divisor = 1.0;
    if (scale == Scale::kGroup && group_size > 1) divisor = std_of(group, group_size) + eps;
    if (scale == Scale::kBatch && total > 1) divisor = batch_std + eps;
    for (int64_t i = 0; i < group_size; ++i) {
      const double centred = group[i] - mean;
      out[first + i] =
          std::fabs(centred) <= error ? 0.0f : static_cast<float>(centred / divisor);
    }
  }
}

struct PruneArgs {
  const char* op;
  int64_t unit_size, keep;
  Prune prune;
  std::optional<Tensor> noise;
};

template <class T>
std::vector<double> scores(const T* advantages, int64_t total, const PruneArgs& args) {
  std::vector<double> score(total);
  if (args.prune == Prune::kRandom) {
    CPPO_CHECK(args.noise.has_value(), args.op, "noise (B,) is needed for prune = 'random'");
    check_cpu(args.op, "noise", *args.noise);
    CPPO_CHECK(args.noise->dim() == 1 && args.noise->size(0) == total, args.op,
               "noise must be (B,) = (", total, ",), got ", shape_of(*args.noise));
    const Tensor noise =
        torch::stable::contiguous(torch::stable::to(*args.noise, ScalarType::Double));
    std::copy_n(static_cast<const double*>(noise.const_data_ptr()), total, score.begin());
    return score;
  }
  const double sign = args.prune == Prune::kSmallest ? 1.0 : -1.0;
  for (int64_t i = 0; i < total; ++i) {
    score[i] = sign * std::fabs(static_cast<double>(advantages[i]));
  }
  return score;
}

template <class T>
Tensor prune(const Tensor& like, const T* advantages, int64_t total, const PruneArgs& args) {
  check_prune(args.op, total, args.unit_size, args.keep);
  const std::vector<double> score = scores(advantages, total, args);
  // Of nothing, a unit may have any size.
  std::vector<int64_t> kept, unit(std::min(total, args.unit_size));
  kept.reserve(total / args.unit_size * args.keep);
  for (int64_t first = 0; first < total; first += args.unit_size) {
    std::iota(unit.begin(), unit.end(), first);
    std::nth_element(
        unit.begin(), unit.begin() + (args.keep - 1), unit.end(),
        [&](int64_t a, int64_t b) { return stays_before(score[a], a, score[b], b); });
    std::sort(unit.begin(), unit.begin() + args.keep);
    std::copy_n(unit.begin(), args.keep, std::back_inserter(kept));
  }
  Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(kept.size())},
                                        ScalarType::Long);
  std::copy(kept.begin(), kept.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor advantages_of(const char* op, const Tensor& rewards, int64_t group_size,
                     const std::string& scale, double eps) {
  check_dim(op, "rewards", rewards, 1);
  check_blocks(op, "group_size", rewards.size(0), group_size);
  const Tensor exact = torch::stable::contiguous(torch::stable::to(rewards, ScalarType::Double));
  Tensor out = torch::stable::new_empty(rewards, {rewards.size(0)}, ScalarType::Float);
  advantages_into(static_cast<const double*>(exact.const_data_ptr()),
                  static_cast<float*>(out.mutable_data_ptr()), rewards.size(0), group_size,
                  parse_scale(op, scale), eps);
  return out;
}

Tensor group_advantages(Tensor rewards, int64_t group_size, std::string scale, double eps) {
  return advantages_of("group_advantages", rewards, group_size, scale, eps);
}

Tensor prune_completions(Tensor advantages, int64_t unit_size, int64_t keep, std::string prune_side,
                         std::optional<Tensor> noise) {
  const char* op = "prune_completions";
  check_dim(op, "advantages", advantages, 1);
  const Tensor exact = torch::stable::contiguous(torch::stable::to(advantages, ScalarType::Double));
  return prune(advantages, static_cast<const double*>(exact.const_data_ptr()), advantages.size(0),
               {op, unit_size, keep, parse_prune(op, prune_side), noise});
}

std::tuple<Tensor, Tensor> advantages_and_prune(Tensor rewards, int64_t group_size,
                                                int64_t unit_size, int64_t keep, std::string scale,
                                                double eps, std::string prune_side,
                                                std::optional<Tensor> noise) {
  const char* op = "advantages_and_prune";
  Tensor advantages = advantages_of(op, rewards, group_size, scale, eps);
  Tensor kept = prune(advantages, static_cast<const float*>(advantages.const_data_ptr()),
                      advantages.size(0),
                      {op, unit_size, keep, parse_prune(op, prune_side), noise});
  return {advantages, kept};
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) {
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
  m.impl("prune_completions", TORCH_BOX(&prune_completions));
  m.impl("advantages_and_prune", TORCH_BOX(&advantages_and_prune));
}

}  // namespace
}  // namespace cppo::cpu
