// The loss from statistics, in double (specification: cppo/reference.py, `_cppo_loss`).

#include "loss_terms.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace cppo::cpu {
namespace {

double at_least_one(double count) { return std::max(count, 1.0); }

}  // namespace

Denominators denominators(const LossRows& rows, const LossConfig& config,
                          const std::optional<std::array<double, 4>>& num_items) {
  const double longest = static_cast<double>(config.max_length.value_or(rows.longest));
  const auto policy = [&](double completions, double tokens) {
    if (config.reduction == Reduction::kGrpo) return completions;
    return config.reduction == Reduction::kDapo ? tokens : completions * longest;
  };
  const bool per_sequence = config.cpl_reduction == CplReduction::kSequence;
  const double completions = static_cast<double>(rows.of_completion.size());
  const double own = at_least_one(policy(completions, static_cast<double>(rows.num_rows)));
  const double own_contrast =
      at_least_one(per_sequence ? completions : static_cast<double>(rows.num_selected));
  if (!num_items) return {own, own_contrast};
  const auto& [given, all_completions, all_tokens, all_selected] = *num_items;
  double whole = given;
  if (std::isnan(given)) {
    whole = at_least_one(policy(all_completions, all_tokens));
    if (per_sequence) return {whole, at_least_one(all_completions)};
    if (!std::isnan(all_selected)) return {whole, at_least_one(all_selected)};
  }
  // Only the share of the whole is known: the part's contrastive mean is weighted by it.
  return {whole, own_contrast * (whole / own)};
}

namespace {

struct Term {
  double value, slope;
};

// The k3 estimate from d = log of a ratio, at most `bound`, and its derivative by d; zero where
// either clamp binds.
Term k3(double d, double bound) {
  const double clamped = std::clamp(d, -20.0, 20.0);
  const double value = std::exp(clamped) - clamped - 1.0;
  const bool inside = d >= -20.0 && d <= 20.0 && value <= bound;
  return {std::min(value, bound), inside ? std::exp(d) - 1.0 : 0.0};
}

// Of two views: the authors' code bounds it, so that one token cannot carry the contrast.
Term divergence_k3(double d) { return k3(d, 10.0); }

// The clipped surrogate, its derivative by the log-ratio, and whether the clip stops it.
struct Surrogate {
  double value, slope;
  bool clipped;
};

Surrogate surrogate(double log_ratio, double advantage, const LossConfig& config) {
  const double ratio = std::exp(log_ratio);
  const double low = 1.0 - config.clip_low, high = 1.0 + config.clip_high;
  bool clipped = (ratio < low && advantage < 0.0) || (ratio > high && advantage > 0.0);
  double bound = std::clamp(ratio, low, high);
  if (config.dual_clip && ratio > *config.dual_clip && advantage < 0.0) {
    clipped = true;
    bound = *config.dual_clip;
  }
  if (clipped) return {-bound * advantage, 0.0, true};
  if (advantage == 0.0) return {0.0, 0.0, false};
  return {-ratio * advantage, -ratio * advantage, false};
}

double softplus(double x) { return x > 20.0 ? x : std::log1p(std::exp(x)); }
double sigmoid(double x) { return x > 20.0 ? 1.0 : 1.0 / (1.0 + std::exp(-x)); }

// One completion's share of every sum.
struct Sums {
  std::array<double, 4> policy{};  // policy loss, entropy, clip fraction, kl; weighted
  double contrast = 0.0;
};

class Completion {
 public:
  Completion(const RowTerms& terms, const LossRows& rows, int64_t index, const LossConfig& config,
             const Values& coefficients)
      : terms_(terms),
        all_(rows),
        rows_(rows.of_completion[index]),
        advantage_(rows.advantages[index]),
        config_(config),
        coefficients_(coefficients) {}

  Sums reduce(const Denominators& by) const {
    Sums sums;
    if (rows_.empty()) return sums;
    const double count = static_cast<double>(rows_.size());
    const double weight = config_.reduction == Reduction::kGrpo ? 1.0 / count : 1.0;
    const bool per_sequence = config_.importance == Importance::kSequence;
    const double mean_log_ratio = per_sequence ? mean_of_log_ratios() : 0.0;
    const double kl_bound = config_.kl_clamp.value_or(std::numeric_limits<double>::infinity());
    for (const int64_t i : rows_) {
      const Surrogate policy =
          surrogate(per_sequence ? mean_log_ratio : log_ratio(i), advantage_, config_);
      // A ratio per sequence: each row moves the mean by 1 / count, which moves `count` rows.
      double d_logp = policy.slope;
      sums.policy[0] += weight * policy.value;
      sums.policy[1] += weight * terms_.entropy[i];
      sums.policy[2] += policy.clipped ? weight : 0.0;
      if (!terms_.ref_logps.empty()) {
        const Term kl = k3(terms_.ref_logps[i] - terms_.logps[i], kl_bound);
        sums.policy[3] += weight * kl.value;
        if (config_.kl_coef != 0.0) d_logp -= config_.kl_coef * kl.slope;
      }
      add(0, i, d_logp * weight / by.policy);
      add(1, i, -config_.entropy_coef * weight / by.policy);
    }
    if (terms_.has_positive) sums.contrast = contrast(by.contrast);
    return sums;
  }

 private:
  double log_ratio(int64_t i) const {
    const double old = terms_.old_logps.empty() ? terms_.logps[i] : terms_.old_logps[i];
    return terms_.logps[i] - old;
  }

  double mean_of_log_ratios() const {
    double sum = 0.0;
    for (const int64_t i : rows_) sum += log_ratio(i);
    return sum / static_cast<double>(rows_.size());
  }

  void add(int64_t which, int64_t i, double value) const {
    const int64_t at = which * static_cast<int64_t>(terms_.logps.size()) + i;
    coefficients_.set(at, coefficients_[at] + value);
  }

  double contrast(double denominator) const {
    int64_t count = 0;
    for (const int64_t i : rows_) count += all_.selected[i];
    const bool per_sequence = config_.cpl_reduction == CplReduction::kSequence;
    const double weight = per_sequence && count > 0 ? 1.0 / static_cast<double>(count) : 1.0;
    double sum = 0.0;
    for (const int64_t i : rows_) {
      if (!all_.selected[i]) continue;
      const double margin = margin_of(i) / config_.tau;
      sum += weight * softplus(margin);
      if (config_.cpl_coef == 0.0) continue;
      const double step =
          config_.cpl_coef * sigmoid(margin) / config_.tau * weight / denominator;
      differentiate(i, step);
    }
    return sum;
  }

  double margin_of(int64_t i) const {
    const double anchor = terms_.logps[i], positive = terms_.positive_logps[i];
    const double negative = terms_.negative_logps[i];
    if (config_.divergence == Divergence::kFull) return terms_.margin[i];
    if (config_.divergence == Divergence::kK1) return (anchor - positive) - (anchor - negative);
    return divergence_k3(positive - anchor).value - divergence_k3(negative - anchor).value;
  }

  // Adds step * d margin / d (each view's statistic).
  void differentiate(int64_t i, double step) const {
    if (config_.divergence == Divergence::kFull) return add(2, i, step);
    if (config_.divergence == Divergence::kK1) {
      add(2, i, -step);
      return add(3, i, step);
    }
    const double positive = divergence_k3(terms_.positive_logps[i] - terms_.logps[i]).slope;
    const double negative = divergence_k3(terms_.negative_logps[i] - terms_.logps[i]).slope;
    add(2, i, step * positive);
    add(3, i, -step * negative);
    if (!config_.detach_anchor) add(0, i, step * (negative - positive));
  }

  const RowTerms& terms_;
  const LossRows& all_;
  const std::vector<int64_t>& rows_;
  double advantage_;
  const LossConfig& config_;
  const Values& coefficients_;
};

}  // namespace

LossResult reduce_loss(const RowTerms& terms, const LossRows& rows, const Denominators& by,
                       const LossConfig& config, const Values& coefficients) {
  const int64_t completions = static_cast<int64_t>(rows.of_completion.size());
  std::vector<Sums> sums(completions);
  torch::stable::parallel_for(0, completions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      sums[c] = Completion(terms, rows, c, config, coefficients).reduce(by);
    }
  });
  LossResult result;
  for (const Sums& part : sums) {
    for (int k = 0; k < 4; ++k) result.metrics[k] += part.policy[k] / by.policy;
    result.metrics[4] += part.contrast / by.contrast;
  }
  const double looking = at_least_one(static_cast<double>(rows.num_looking));
  result.metrics[5] = static_cast<double>(rows.num_selected) / looking;
  const auto& [policy, entropy, clip_fraction, kl, cpl, share] = result.metrics;
  result.loss = policy;
  if (config.entropy_coef != 0.0) result.loss -= config.entropy_coef * entropy;
  if (!terms.ref_logps.empty()) result.loss += config.kl_coef * kl;
  if (terms.has_positive) result.loss += config.cpl_coef * cpl;
  return result;
}

}  // namespace cppo::cpu
