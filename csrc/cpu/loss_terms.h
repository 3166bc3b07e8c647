// The loss as a function of the statistics of every row: terms, reductions and derivatives.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "parse.h"
#include "selection.h"

namespace cppo::cpu {

// The fields of cppo.LossConfig.
struct LossConfig {
  double temperature, clip_low, clip_high;
  std::optional<double> dual_clip;
  Importance importance;
  Reduction reduction;
  std::optional<int64_t> max_length;
  double kl_coef;
  std::optional<double> kl_clamp;
  double entropy_coef, cpl_coef;
  Divergence divergence;
  double tau, fraction;
  bool gating, detach_anchor;
  CplReduction cpl_reduction;
};

// One entry per row; what a view does not have stays 0 and is not read.
struct RowTerms {
  std::vector<double> logps, entropy, positive_logps, negative_logps, margin;
  std::vector<double> old_logps, ref_logps;  // empty: not given
  bool has_positive = false;
  explicit RowTerms(int64_t rows)
      : logps(rows), entropy(rows), positive_logps(rows), negative_logps(rows), margin(rows) {}
};

// What counts: rows by completion, and among them the perception tokens.
struct LossRows {
  std::vector<std::vector<int64_t>> of_completion;  // unmasked rows
  std::vector<double> advantages;
  std::vector<bool> looks;         // completions that have perturbed views
  std::vector<uint8_t> selected;   // per row
  int64_t num_rows = 0, num_looking = 0, num_selected = 0;
  int64_t longest = 0;
};

struct LossResult {
  double loss = 0.0;
  // policy_loss, entropy, clip_fraction, kl, cpl_loss, perception_share
  std::array<double, 6> metrics{};
};

// What the policy terms and the contrastive term are divided by.
struct Denominators {
  double policy, contrast;
};

// num_items: whole, completions, tokens, selected; NaN where not given.
Denominators denominators(const LossRows& rows, const LossConfig& config,
                          const std::optional<std::array<double, 4>>& num_items);

// Derivatives go to `coefficients` (4, rows): by the anchor's logp and entropy, by the positive's
// logp (or by the margin, with the full divergence), by the negative's logp.
LossResult reduce_loss(const RowTerms& terms, const LossRows& rows, const Denominators& by,
                       const LossConfig& config, const Values& coefficients);

}  // namespace cppo::cpu
