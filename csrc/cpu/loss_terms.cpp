// The loss from the statistics of every row, and its derivative by each of them; in double
// (specification: cppo/reference.py, `_cppo_loss`).

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "loss_config.h"
#include "rows.h"

namespace cppo::cpu {
namespace {

constexpr const char* kOp = "loss_terms";

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

// Of two views: the authors' code bounds it, so that one token cannot carry the contrast (nor, of
// PAPO, all of the dependence on the image).
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

// 0 of a weight of 0, whatever it weighs: a ratio may have overflowed.
double weighted(double value, double weight) { return weight == 0.0 ? 0.0 : value * weight; }

double softplus(double x) { return x > 20.0 ? x : std::log1p(std::exp(x)); }
double sigmoid(double x) { return x > 20.0 ? 1.0 : 1.0 / (1.0 + std::exp(-x)); }

// One number per row, for every statistic that is given.
struct Statistics {
  Values logps, entropy;
  std::optional<Values> positive_logps, negative_logps, margin, old_logps, ref_logps, weights,
      removed_logps;
  Mask selected;
  bool has_contrast;

  void check(Divergence divergence) const {
    if (!has_contrast) return;
    CPPO_CHECK(selected.values.has_value(), kOp, "selected must be given with perturbed views");
    if (divergence == Divergence::kFull) {
      CPPO_CHECK(margin.has_value(), kOp, "margin must be given with divergence = 'full'");
    } else {
      CPPO_CHECK(positive_logps && negative_logps, kOp,
                 "positive_logps and negative_logps must be given without margin");
    }
  }
};

// What the sums of the policy terms and of the contrastive term are divided by.
struct Denominators {
  double policy, contrast;
};

// Sums of the terms, or one completion's share of them: TERMS of cppo/fused/schema.py.
constexpr size_t kContrast = 5;
using Terms = std::array<double, kContrast + 1>;

// The terms of one completion. Derivatives go to `coefficients` (4, T).
class Completion {
 public:
  Completion(const Statistics& of, std::vector<int64_t> rows, double advantage,
             const LossConfig& config, const Denominators& by, const Values& coefficients)
      : of_(of),
        rows_(std::move(rows)),
        advantage_(advantage),
        config_(config),
        by_(by),
        coefficients_(coefficients) {}

  Terms sum() const {
    Terms sums{};
    if (rows_.empty()) return sums;
    const double weight = config_.mean_of_tokens ? 1.0 / static_cast<double>(rows_.size()) : 1.0;
    const bool per_sequence = config_.sequence_importance;
    const double mean_log_ratio = per_sequence ? mean_of(&Completion::log_ratio) : 0.0;
    const double mean_weight = per_sequence ? mean_of(&Completion::weight_of) : 0.0;
    const double kl_bound = config_.kl_clamp.value_or(std::numeric_limits<double>::infinity());
    for (const int64_t i : rows_) {
      const Surrogate policy =
          surrogate(per_sequence ? mean_log_ratio : log_ratio(i), advantage_, config_);
      // A ratio per sequence: each row moves the mean by 1 / count, which moves every row.
      double d_logp = weighted(policy.slope, per_sequence ? mean_weight : weight_of(i));
      sums[0] += weight * weighted(policy.value, weight_of(i));
      sums[1] += weight * of_.entropy[i];
      sums[2] += policy.clipped ? weight : 0.0;
      if (of_.ref_logps) {
        const Term kl = k3((*of_.ref_logps)[i] - of_.logps[i], kl_bound);
        sums[3] += weight * kl.value;
        if (config_.kl_coef != 0.0) d_logp -= config_.kl_coef * kl.slope;
      }
      if (of_.removed_logps) {
        const Term depends = divergence_k3((*of_.removed_logps)[i] - of_.logps[i]);
        sums[4] += weight * depends.value;
        d_logp += config_.papo_coef * depends.slope;
      }
      add(0, i, d_logp * weight / by_.policy);
      add(1, i, -config_.entropy_coef * weight / by_.policy);
    }
    if (of_.has_contrast) sums[kContrast] = contrast();
    return sums;
  }

 private:
  double log_ratio(int64_t i) const {
    const Values& old = of_.old_logps ? *of_.old_logps : of_.logps;
    return of_.logps[i] - old[i];
  }

  double weight_of(int64_t i) const { return of_.weights ? (*of_.weights)[i] : 1.0; }

  double mean_of(double (Completion::*of_row)(int64_t) const) const {
    double sum = 0.0;
    for (const int64_t i : rows_) sum += (this->*of_row)(i);
    return sum / static_cast<double>(rows_.size());
  }

  void add(int64_t which, int64_t i, double value) const {
    const int64_t at = which * static_cast<int64_t>(of_.logps.tensor().numel()) + i;
    coefficients_.set(at, coefficients_[at] + value);
  }

  double contrast() const {
    std::vector<int64_t> chosen;
    for (const int64_t i : rows_) {
      if (of_.selected[i]) chosen.push_back(i);
    }
    const double weight =
        config_.mean_of_selected ? 1.0 / static_cast<double>(chosen.size()) : 1.0;
    double sum = 0.0;
    for (const int64_t i : chosen) {
      const double margin = margin_of(i) / config_.tau;
      sum += weight * softplus(margin);
      if (config_.cpl_coef == 0.0) continue;
      differentiate(i, config_.cpl_coef * sigmoid(margin) / config_.tau * weight / by_.contrast);
    }
    return sum;
  }

  double margin_of(int64_t i) const {
    if (config_.divergence == Divergence::kFull) return (*of_.margin)[i];
    const double anchor = of_.logps[i];
    const double positive = (*of_.positive_logps)[i], negative = (*of_.negative_logps)[i];
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
    const double positive = divergence_k3((*of_.positive_logps)[i] - of_.logps[i]).slope;
    const double negative = divergence_k3((*of_.negative_logps)[i] - of_.logps[i]).slope;
    add(2, i, step * positive);
    add(3, i, -step * negative);
    if (!config_.detach_anchor) add(0, i, step * (negative - positive));
  }

  const Statistics& of_;
  std::vector<int64_t> rows_;
  double advantage_;
  const LossConfig& config_;
  const Denominators& by_;
  const Values& coefficients_;
};

double loss_of(const Terms& terms, const Statistics& of, const LossConfig& config) {
  double loss = terms[0];
  if (config.entropy_coef != 0.0) loss -= config.entropy_coef * terms[1];
  if (of.ref_logps) loss += config.kl_coef * terms[3];
  if (of.removed_logps) loss -= config.papo_coef * terms[4];
  if (of.has_contrast) loss += config.cpl_coef * terms[kContrast];
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> loss_terms(
    Tensor logps, Tensor entropy, std::optional<Tensor> positive_logps,
    std::optional<Tensor> negative_logps, std::optional<Tensor> margin,
    std::optional<Tensor> selected, Tensor advantages, std::optional<Tensor> old_logps,
    std::optional<Tensor> ref_logps, std::optional<Tensor> weights,
    std::optional<Tensor> removed_logps, std::optional<Tensor> mask, Tensor cu_seqlens,
    Tensor denominators, std::string config_text) {
  const LossConfig config(ConfigText(kOp, config_text));
  const ScalarType type = accumulator(logps);
  const int64_t count = logps.numel();
  const auto of_rows = [&](const char* name, const std::optional<Tensor>& values) {
    return values ? std::optional(read(kOp, name, *values, type, count)) : std::nullopt;
  };
  const Statistics statistics = {read(kOp, "logps", logps, type, count),
                                 read(kOp, "entropy", entropy, type, count),
                                 of_rows("positive_logps", positive_logps),
                                 of_rows("negative_logps", negative_logps),
                                 of_rows("margin", margin),
                                 of_rows("old_logps", old_logps),
                                 of_rows("ref_logps", ref_logps),
                                 of_rows("weights", weights),
                                 of_rows("removed_logps", removed_logps),
                                 Mask(kOp, "selected", selected, count),
                                 positive_logps.has_value() || margin.has_value()};
  statistics.check(config.divergence);
  const Mask valid(kOp, "mask", mask, count);
  const Completions completions(kOp, logps, cu_seqlens);
  const Values advantage =
      read(kOp, "advantages", advantages, ScalarType::Double, completions.count());
  const Values divisors = read(kOp, "denominators", denominators, ScalarType::Double, 2);
  const Denominators by = {divisors[0], divisors[1]};

  const Values coefficients = new_zeros(logps, {4, count}, type);
  std::vector<Terms> shares(completions.count());
  torch::stable::parallel_for(0, completions.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      shares[c] = Completion(statistics, completions.rows(c, valid), advantage[c], config, by,
                             coefficients)
                      .sum();
    }
  });
  Terms terms{};
  for (const Terms& share : shares) {
    for (size_t k = 0; k < kContrast; ++k) terms[k] += share[k] / by.policy;
    terms[kContrast] += share[kContrast] / by.contrast;
  }
  const Values loss = new_zeros(logps, {}, type), metrics = new_zeros(logps, {kContrast + 1}, type);
  loss.set(0, loss_of(terms, statistics, config));
  for (size_t k = 0; k < terms.size(); ++k) metrics.set(k, terms[k]);
  return {loss.tensor(), metrics.tensor(), coefficients.tensor()};
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) { m.impl("loss_terms", TORCH_BOX(&loss_terms)); }

}  // namespace
}  // namespace cppo::cpu
