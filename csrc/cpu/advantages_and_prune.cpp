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
  std::optional<Tensor> score;
};

// (B,) what a rule reads beside the advantages.
std::vector<double> given_scores(int64_t total, const PruneArgs& args) {
  CPPO_CHECK(args.score.has_value(), args.op, "score (B,) is needed for this rule");
  check_cpu(args.op, "score", *args.score);
  CPPO_CHECK(args.score->dim() == 1 && args.score->size(0) == total, args.op,
             "score must be (B,) = (", total, ",), got ", shape_of(*args.score));
  const Tensor exact =
      torch::stable::contiguous(torch::stable::to(*args.score, ScalarType::Double));
  const double* values = static_cast<const double*>(exact.const_data_ptr());
  return std::vector<double>(values, values + total);
}

using Indices = std::vector<int64_t>;

// Puts what stays of the unit [first, first + n) behind `kept`, ascending; `order` is scratch.
void keep_by_rank(const double* score, int64_t n, int64_t keep, int64_t first, Indices& order,
                  Indices& kept) {
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + (keep - 1), order.end(), [&](int64_t a, int64_t b) {
    return stays_before(score[a], a, score[b], b);
  });
  std::sort(order.begin(), order.begin() + keep);
  for (int64_t i = 0; i < keep; ++i) kept.push_back(first + order[i]);
}

void keep_by_variance(const double* score, int64_t n, int64_t keep, int64_t first, Indices& order,
                      Indices& kept) {
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return stays_before(score[a], a, score[b], b); });
  std::vector<double> ranked(n);
  for (int64_t i = 0; i < n; ++i) ranked[i] = score[order[i]];
  const int64_t split = variance_split(ranked.data(), n, keep);
  const size_t begin = kept.size();
  for (int64_t above = 0, end = 0; above < n; above = end) {
    while (end < n && !is_larger(ranked[above], ranked[end])) ++end;
    const int64_t taken = taken_of_equals(above, end - above, n, keep, split);
    for (int64_t i = 0; i < taken; ++i) kept.push_back(first + order[above + i]);
  }
  std::sort(kept.begin() + begin, kept.end());
}

template <class T>
Tensor prune(const Tensor& like, const T* advantages, int64_t total, const PruneArgs& args) {
  check_prune(args.op, total, args.unit_size, args.keep);
  const int64_t n = args.unit_size, keep = args.keep;
  std::vector<double> score(total);
  if (needs_score(args.prune)) {
    score = given_scores(total, args);
  } else {
    const double sign = args.prune == Prune::kSmallest ? 1.0 : -1.0;
    for (int64_t i = 0; i < total; ++i) {
      score[i] = sign * std::fabs(static_cast<double>(advantages[i]));
    }
  }
  // Of nothing, a unit may have any size.
  Indices kept, order(std::min(total, n));
  kept.reserve(total / n * keep);
  for (int64_t first = 0; first < total; first += n) {
    if (args.prune == Prune::kUnbiased) {
      const auto size = [&](int64_t i) {
        return std::fabs(static_cast<double>(advantages[first + i]));
      };
      draw(size, n, keep, score[first], [&](int64_t i) { kept.push_back(first + i); });
    } else if (args.prune == Prune::kVariance) {
      keep_by_variance(&score[first], n, keep, first, order, kept);
    } else {
      keep_by_rank(&score[first], n, keep, first, order, kept);
    }
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

Tensor prune_completions(Tensor advantages, int64_t unit_size, int64_t keep, std::string rule,
                         std::optional<Tensor> score) {
  const char* op = "prune_completions";
  check_dim(op, "advantages", advantages, 1);
  const Tensor exact = torch::stable::contiguous(torch::stable::to(advantages, ScalarType::Double));
  return prune(advantages, static_cast<const double*>(exact.const_data_ptr()), advantages.size(0),
               {op, unit_size, keep, parse_prune(op, rule), score});
}

std::tuple<Tensor, Tensor> advantages_and_prune(Tensor rewards, int64_t group_size,
                                                int64_t unit_size, int64_t keep, std::string scale,
                                                double eps, std::string rule,
                                                std::optional<Tensor> score) {
  const char* op = "advantages_and_prune";
  Tensor advantages = advantages_of(op, rewards, group_size, scale, eps);
  Tensor kept = prune(advantages, static_cast<const float*>(advantages.const_data_ptr()),
                      advantages.size(0),
                      {op, unit_size, keep, parse_prune(op, rule), score});
  return {advantages, kept};
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) {
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
  m.impl("prune_completions", TORCH_BOX(&prune_completions));
  m.impl("advantages_and_prune", TORCH_BOX(&advantages_and_prune));
}

}  // namespace
}  // namespace cppo::cpu
