// The training loss from logits on the CPU (specification: cppo/reference.py).
//
//   statistics of the anchor and, where A > 0, the negative  ->  perception tokens
//   statistics of the positive at those                      ->  loss and its derivatives by them
//
// With the full divergence the three views are read together. The backward reads a row of a view
// only where its derivative is not zero.

#include <array>
#include <vector>

#include "loss_terms.h"
#include "ops.h"
#include "rows.h"

namespace cppo::cpu {
namespace {

constexpr const char* kOp = "cppo_loss";
constexpr int64_t kSaved = 8, kCoefficients = 4;

// The statistics of every row that the backward needs, as in cppo.ops.library.LOSS_SAVED.
struct Saved {
  Values values;
  int64_t rows;

  RowStats anchor(int64_t i) const { return {at(0, i), at(1, i), at(2, i)}; }
  RowStats positive(int64_t i) const { return {at(3, i), at(4, i), 0.0}; }
  RowStats negative(int64_t i) const { return {at(5, i), at(6, i), 0.0}; }
  double margin(int64_t i) const { return at(7, i); }

  void set_anchor(int64_t i, const RowStats& stats) const {
    put(0, i, stats);
    values.set(2 * rows + i, stats.mean);
  }
  void set_positive(int64_t i, const RowStats& stats) const { put(3, i, stats); }
  void set_negative(int64_t i, const RowStats& stats) const { put(5, i, stats); }
  void set_margin(int64_t i, double margin) const { values.set(7 * rows + i, margin); }

 private:
  double at(int64_t which, int64_t i) const { return values[which * rows + i]; }
  void put(int64_t first, int64_t i, const RowStats& stats) const {
    values.set(first * rows + i, stats.reference);
    values.set((first + 1) * rows + i, stats.sum);
  }
};

// Which row of a perturbed view belongs to which row of the anchor.
struct ViewRows {
  std::vector<int64_t> of_anchor;  // -1: the row's completion has no perturbed views
  std::vector<int64_t> compact;    // the same where a view holds only completions that have them

  ViewRows(const Completions& completions, const std::vector<bool>& looks, int64_t rows)
      : of_anchor(rows, -1), compact(rows, -1) {
    int64_t next = 0;
    for (int64_t c = 0; c < completions.count(); ++c) {
      if (!looks[c]) continue;
      for (int64_t i = completions.begin(c); i < completions.end(c); ++i) {
        of_anchor[i] = i;
        compact[i] = next++;
      }
    }
    num_compact_ = next;
  }

  const std::vector<int64_t>& in(const char* argument, const LogitRows& view) const {
    const auto whole = static_cast<int64_t>(of_anchor.size());
    CPPO_CHECK(view.count() == whole || view.count() == num_compact_, kOp, argument,
               " must have all ", whole, " rows or the ", num_compact_,
               " of completions with A > 0, got ", view.count());
    return view.count() == whole ? of_anchor : compact;
  }

 private:
  int64_t num_compact_ = 0;
};

std::vector<bool> looking(const Values& advantages, int64_t count, bool gating) {
  std::vector<bool> looks(count);
  for (int64_t c = 0; c < count; ++c) looks[c] = !gating || advantages[c] > 0.0;
  return looks;
}

std::optional<LogitRows> optional_rows(const char* argument, const std::optional<Tensor>& view,
                                       const LogitRows& anchor) {
  if (!view.has_value()) return std::nullopt;
  LogitRows rows(kOp, argument, *view);
  rows.check_like(kOp, argument, anchor);
  return rows;
}

// One number per row, or none.
std::vector<double> to_doubles(const char* op, const char* argument,
                               const std::optional<Tensor>& values, ScalarType type,
                               int64_t rows) {
  if (!values.has_value()) return {};
  const Values source = read(op, argument, *values, type, rows);
  std::vector<double> out(rows);
  for (size_t i = 0; i < out.size(); ++i) out[i] = source[static_cast<int64_t>(i)];
  return out;
}

// The forward pass over the logits: fills the terms and what the backward needs.
class Statistics {
 public:
  Statistics(const LogitRows& anchor, const Targets& targets, const LossConfig& config,
             RowTerms& terms, const Saved& saved)
      : anchor_(anchor),
        targets_(targets),
        inverse_(1.0 / config.temperature),
        terms_(terms),
        saved_(saved) {}

  void anchor(const std::vector<int64_t>& rows) const {
    for_each(rows, [&](int64_t i) { set_anchor(i, stats_of(anchor_, i)); });
  }

  void negative(const std::vector<int64_t>& rows, const LogitRows& view,
                const std::vector<int64_t>& row_of, std::vector<double>& entropy) const {
    for_each(rows, [&](int64_t i) {
      const RowStats stats = stats_of(view, row_of[i]);
      saved_.set_negative(i, stats);
      terms_.negative_logps[i] = logp(view, row_of[i], i, stats);
      entropy[i] = entropy_of(stats);
    });
  }

  void positive(const std::vector<int64_t>& rows, const LogitRows& view,
                const std::vector<int64_t>& row_of) const {
    for_each(rows, [&](int64_t i) {
      const RowStats stats = stats_of(view, row_of[i]);
      saved_.set_positive(i, stats);
      terms_.positive_logps[i] = logp(view, row_of[i], i, stats);
    });
  }

  // All three in one pass, with KL(anchor || positive) - KL(anchor || negative).
  void contrast(const std::vector<int64_t>& rows, const LogitRows& positive,
                const std::vector<int64_t>& positive_row, const LogitRows& negative,
                const std::vector<int64_t>& negative_row, std::vector<double>& entropy) const {
    for_each(rows, [&](int64_t i) {
      RowStats stats[3];
      double gap = 0.0;
      anchor_.kernels().contrast_stats(
          {anchor_.row(i), positive.row(positive_row[i]), negative.row(negative_row[i])},
          anchor_.size(), inverse_, stats, &gap);
      set_anchor(i, stats[0]);
      saved_.set_positive(i, stats[1]);
      saved_.set_negative(i, stats[2]);
      entropy[i] = entropy_of(stats[2]);
      // E_a[z_n - z_p] + lse_p - lse_n, where the references cancel.
      terms_.margin[i] = gap + std::log(stats[1].sum) - std::log(stats[2].sum);
      saved_.set_margin(i, terms_.margin[i]);
    });
  }

 private:
  RowStats stats_of(const LogitRows& view, int64_t row) const {
    return view.kernels().stats(view.row(row), view.size(), inverse_);
  }
  double logp(const LogitRows& view, int64_t row, int64_t i, const RowStats& stats) const {
    return logp_of(stats, view.at(row, targets_[i]), inverse_);
  }
  void set_anchor(int64_t i, const RowStats& stats) const {
    saved_.set_anchor(i, stats);
    terms_.logps[i] = logp(anchor_, i, i, stats);
    terms_.entropy[i] = entropy_of(stats);
  }

  const LogitRows& anchor_;
  const Targets& targets_;
  double inverse_;
  RowTerms& terms_;
  const Saved& saved_;
};

std::optional<std::array<double, 4>> read_num_items(const std::optional<Tensor>& num_items) {
  if (!num_items.has_value()) return std::nullopt;
  const Values values = read(kOp, "num_items", *num_items, ScalarType::Double, 4);
  return std::array<double, 4>{values[0], values[1], values[2], values[3]};
}

Values rounded(const Tensor& like, const std::vector<double>& values, ScalarType type) {
  const Values out = new_zeros(like, like.sizes(), type);
  for (size_t i = 0; i < values.size(); ++i) out.set(static_cast<int64_t>(i), values[i]);
  return out;
}

std::pair<Tensor, Tensor> tensors_of(const Tensor& like, const LossResult& result,
                                     ScalarType type) {
  const Values loss = new_zeros(like, {}, type), metrics = new_zeros(like, {6}, type);
  loss.set(0, result.loss);
  for (int64_t k = 0; k < 6; ++k) metrics.set(k, result.metrics[k]);
  return {loss.tensor(), metrics.tensor()};
}

}  // namespace

LossOutputs cppo_loss(Tensor anchor, std::optional<Tensor> positive, std::optional<Tensor> negative,
                      Tensor targets, Tensor advantages, std::optional<Tensor> old_logps,
                      std::optional<Tensor> ref_logps, std::optional<Tensor> mask,
                      std::optional<Tensor> cu_seqlens, std::optional<Tensor> num_items,
                      double temperature, double clip_low, double clip_high,
                      std::optional<double> dual_clip, std::string importance,
                      std::string reduction, std::optional<int64_t> max_length, double kl_coef,
                      std::optional<double> kl_clamp, double entropy_coef, double cpl_coef,
                      std::string divergence, double tau, double fraction, bool gating,
                      bool detach_anchor, std::string cpl_reduction,
                      bool /*inplace: for the backward*/) {
  const LossConfig config = {
      temperature,
      clip_low,
      clip_high,
      dual_clip,
      parse_importance(kOp, importance),
      parse_reduction(kOp, reduction),
      max_length,
      kl_coef,
      kl_clamp,
      entropy_coef,
      cpl_coef,
      parse_divergence(kOp, divergence),
      tau,
      fraction,
      gating,
      detach_anchor,
      parse_cpl_reduction(kOp, cpl_reduction),
  };
  const ScalarType type = accumulator(anchor);
  const LogitRows logits(kOp, "anchor", anchor);
  const std::optional<LogitRows> positive_rows = optional_rows("positive", positive, logits);
  const std::optional<LogitRows> negative_rows = optional_rows("negative", negative, logits);
  const int64_t count = logits.count();
  const Targets target(kOp, targets, count);
  const Completions completions(kOp, targets, cu_seqlens);
  const Mask valid(kOp, "mask", mask, count);
  check_targets(kOp, target, valid, count, logits.size());
  check_fraction(kOp, fraction);

  const Values advantage =
      read(kOp, "advantages", advantages, ScalarType::Double, completions.count());
  LossRows rows;
  rows.looks = looking(advantage, completions.count(), gating);
  rows.longest = completions.longest();
  rows.selected.assign(count, 0);
  std::vector<int64_t> plain, contrasted, seen;  // without a view, read with both, with a view
  const bool full = config.divergence == Divergence::kFull && positive_rows && negative_rows;
  for (int64_t c = 0; c < completions.count(); ++c) {
    rows.advantages.push_back(advantage[c]);
    std::vector<int64_t>& own = rows.of_completion.emplace_back();
    for (int64_t i = completions.begin(c); i < completions.end(c); ++i) {
      if (!valid[i]) continue;
      own.push_back(i);
      const bool sees = negative_rows && rows.looks[c];
      if (sees) seen.push_back(i);
      (full && sees ? contrasted : plain).push_back(i);
    }
    rows.num_rows += static_cast<int64_t>(own.size());
  }
  rows.num_looking = static_cast<int64_t>(seen.size());

  RowTerms terms(count);
  terms.has_positive = positive_rows.has_value();
  terms.old_logps = to_doubles(kOp, "old_logps", old_logps, type, count);
  terms.ref_logps = to_doubles(kOp, "ref_logps", ref_logps, type, count);
  const Saved saved = {new_zeros(anchor, {kSaved, count}, type), count};
  const Statistics statistics(logits, target, config, terms, saved);
  const ViewRows views(completions, rows.looks, count);
  std::vector<double> negative_entropy(count);
  statistics.anchor(plain);
  if (full) {
    statistics.contrast(contrasted, *positive_rows, views.in("positive", *positive_rows),
                        *negative_rows, views.in("negative", *negative_rows), negative_entropy);
  } else if (negative_rows) {
    statistics.negative(seen, *negative_rows, views.in("negative", *negative_rows),
                        negative_entropy);
  }

  Tensor selected = torch::stable::new_empty(targets, targets.sizes(), ScalarType::Bool);
  bool* chosen = static_cast<bool*>(selected.mutable_data_ptr());
  std::fill(chosen, chosen + count, false);
  const Values entropies = rounded(targets, terms.entropy, type);
  if (negative_rows) {
    // Rounded as they are returned: `perception_mask` of the returned entropies selects the same.
    const Values after = rounded(targets, negative_entropy, type);
    const auto choose = type == ScalarType::Double ? select<double> : select<float>;
    torch::stable::parallel_for(0, completions.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        if (rows.looks[c]) choose(rows.of_completion[c], entropies, after, fraction, chosen);
      }
    });
  }
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    rows.selected[i] = chosen[i];
    if (chosen[i]) tokens.push_back(i);
  }
  rows.num_selected = static_cast<int64_t>(tokens.size());
  if (positive_rows && !full) {
    statistics.positive(tokens, *positive_rows, views.in("positive", *positive_rows));
  }

  const Values coefficients = new_zeros(anchor, {kCoefficients, count}, type);
  const Denominators by = denominators(rows, config, read_num_items(num_items));
  const auto [loss, metrics] =
      tensors_of(anchor, reduce_loss(terms, rows, by, config, coefficients), type);
  Tensor num_selected = torch::stable::new_empty(targets, {}, ScalarType::Long);
  *static_cast<int64_t*>(num_selected.mutable_data_ptr()) = rows.num_selected;
  return {loss,
          rounded(targets, terms.logps, type).tensor(),
          entropies.tensor(),
          selected,
          metrics,
          num_selected,
          saved.values.tensor(),
          coefficients.tensor()};
}

std::tuple<Tensor, Tensor, Tensor> loss_terms(
    Tensor logps, Tensor entropy, std::optional<Tensor> positive_logps,
    std::optional<Tensor> negative_logps, std::optional<Tensor> margin, Tensor selected,
    Tensor advantages, std::optional<Tensor> old_logps, std::optional<Tensor> ref_logps,
    Tensor cu_seqlens, double policy_denominator, double contrast_denominator, double temperature,
    double clip_low, double clip_high, std::optional<double> dual_clip, std::string importance,
    std::string reduction, std::optional<int64_t> max_length, double kl_coef,
    std::optional<double> kl_clamp, double entropy_coef, double cpl_coef, std::string divergence,
    double tau, double fraction, bool gating, bool detach_anchor, std::string cpl_reduction) {
  const char* op = "loss_terms";
  const LossConfig config = {
      temperature,
      clip_low,
      clip_high,
      dual_clip,
      parse_importance(op, importance),
      parse_reduction(op, reduction),
      max_length,
      kl_coef,
      kl_clamp,
      entropy_coef,
      cpl_coef,
      parse_divergence(op, divergence),
      tau,
      fraction,
      gating,
      detach_anchor,
      parse_cpl_reduction(op, cpl_reduction),
  };
  const ScalarType type = accumulator(logps);
  const int64_t count = logps.numel();
  const Completions completions(op, logps, cu_seqlens);
  const Values advantage =
      read(op, "advantages", advantages, ScalarType::Double, completions.count());
  const Mask chosen(op, "selected", selected, count);
  LossRows rows;
  rows.selected.assign(count, 0);
  for (int64_t i = 0; i < count; ++i) rows.selected[i] = chosen[i];
  for (int64_t c = 0; c < completions.count(); ++c) {
    rows.advantages.push_back(advantage[c]);
    std::vector<int64_t>& own = rows.of_completion.emplace_back();
    for (int64_t i = completions.begin(c); i < completions.end(c); ++i) own.push_back(i);
  }
  RowTerms terms(count);
  const auto assign = [&](std::vector<double>& to, const char* argument,
                          const std::optional<Tensor>& from) {
    if (from.has_value()) to = to_doubles(op, argument, from, type, count);
  };
  assign(terms.logps, "logps", logps);
  assign(terms.entropy, "entropy", entropy);
  assign(terms.positive_logps, "positive_logps", positive_logps);
  assign(terms.negative_logps, "negative_logps", negative_logps);
  assign(terms.margin, "margin", margin);
  assign(terms.old_logps, "old_logps", old_logps);
  assign(terms.ref_logps, "ref_logps", ref_logps);
  terms.has_positive = positive_logps.has_value() || margin.has_value();
  const Values coefficients = new_zeros(logps, {kCoefficients, count}, type);
  const auto [loss, metrics] = tensors_of(
      logps,
      reduce_loss(terms, rows, {policy_denominator, contrast_denominator}, config, coefficients),
      type);
  return {loss, metrics, coefficients.tensor()};
}

namespace {

// The backward: every row of every view that gets a gradient, in one pass over it.
class Gradients {
 public:
  Gradients(const Tensor& grad_loss, const LogitRows& anchor, const Targets& targets,
            const Saved& saved, const Values& coefficients, double temperature)
      : upstream_(read(kOp, "grad_loss", grad_loss, ScalarType::Double, 1)[0]),
        anchor_(anchor),
        targets_(targets),
        saved_(saved),
        coefficients_(coefficients),
        inverse_(1.0 / temperature) {}

  // A view by itself: of log-probability `which`, and for the anchor of the entropy.
  void alone(const LogitRows& view, const LogitRows& out, const std::vector<int64_t>& row_of,
             int64_t which) const {
    std::vector<int64_t> active;
    std::vector<bool> written(out.count());
    for (int64_t i = 0; i < saved_.rows; ++i) {
      const bool counts = by(which, i) != 0.0 || (which == 0 && by(1, i) != 0.0);
      if (!counts || row_of[i] < 0) continue;
      check_target(kOp, targets_, i, view.size());
      active.push_back(i);
      written[row_of[i]] = true;
    }
    clear_rest(out, written);
    for_each(active, [&](int64_t i) {
      const RowStats stats = which == 0   ? saved_.anchor(i)
                             : which == 2 ? saved_.positive(i)
                                          : saved_.negative(i);
      write_gradient(view, row_of[i], out, row_of[i], targets_[i], stats, by(which, i),
                     which == 0 ? by(1, i) : 0.0, inverse_);
    });
  }

  struct View {
    const LogitRows &logits, &out;
    const std::vector<int64_t>& row_of;
  };

  // The three views together, with the full divergence.
  void contrast(const LogitRows& anchor_out, const View& positive, const View& negative,
                bool detach_anchor) const {
    std::vector<int64_t> contrasted, plain;
    std::vector<bool> anchor_written(anchor_out.count());
    std::vector<bool> positive_written(positive.out.count());
    std::vector<bool> negative_written(negative.out.count());
    for (int64_t i = 0; i < saved_.rows; ++i) {
      const bool own = by(0, i) != 0.0 || by(1, i) != 0.0, together = by(2, i) != 0.0;
      if (own || together) check_target(kOp, targets_, i, anchor_.size());
      if (together) {
        CPPO_CHECK(positive.row_of[i] >= 0 && negative.row_of[i] >= 0, kOp,
                   "coefficients must be 0 where a completion has no views, got row ", i);
        contrasted.push_back(i);
        positive_written[positive.row_of[i]] = negative_written[negative.row_of[i]] = true;
      }
      if (own && (!together || detach_anchor)) plain.push_back(i);
      anchor_written[i] = own || (together && !detach_anchor);
    }
    for_each(contrasted, [&](int64_t i) {
      write_contrast(i, detach_anchor ? nullptr : &anchor_out, positive, negative);
    });
    // Only now: written in place, the anchor's row is still needed above.
    clear_rest(positive.out, positive_written);
    clear_rest(negative.out, negative_written);
    clear_rest(anchor_out, anchor_written);
    for_each(plain, [&](int64_t i) {
      write_gradient(anchor_, i, anchor_out, i, targets_[i], saved_.anchor(i), by(0, i), by(1, i),
                     inverse_);
    });
  }

 private:
  double by(int64_t which, int64_t i) const {
    return upstream_ * coefficients_[which * saved_.rows + i];
  }

  static void clear_rest(const LogitRows& out, const std::vector<bool>& written) {
    std::vector<int64_t> zero;
    for (int64_t i = 0; i < out.count(); ++i) {
      if (!written[i]) zero.push_back(i);
    }
    for_each(zero, [&](int64_t i) { out.clear(i); });
  }

  void write_contrast(int64_t i, const LogitRows* anchor_out, const View& positive,
                      const View& negative) const {
    const RowStats a = saved_.anchor(i), p = saved_.positive(i), n = saved_.negative(i);
    const double d_logp = by(0, i), d_entropy = by(1, i), d_margin = by(2, i);
    const double per_term = inverse_ / a.sum;
    // ln pi_n - ln pi_p = (x_n - x_p) + ln s_p - ln s_n
    const double constant = std::log(p.sum) - std::log(n.sum) - saved_.margin(i);
    ContrastGradient gradient;
    gradient.anchor = {
        a.reference, per_term * (d_entropy * a.mean - d_logp + d_margin * constant),
        -per_term * d_entropy};
    gradient.contrast = per_term * d_margin;
    gradient.push = inverse_ * d_margin;
    gradient.stats[0] = a;
    gradient.stats[1] = p;
    gradient.stats[2] = n;
    const int64_t p_row = positive.row_of[i], n_row = negative.row_of[i], target = targets_[i];
    const double at_target = anchor_.at(i, target), p_logit = positive.logits.at(p_row, target);
    const double ratio = negative.logits.at(n_row, target) - n.reference - (p_logit - p.reference);
    anchor_.kernels().contrast_gradient(
        {anchor_.row(i), positive.logits.row(p_row), negative.logits.row(n_row)},
        {anchor_out ? anchor_out->row(i) : nullptr, positive.out.row(p_row),
         negative.out.row(n_row)},
        anchor_.size(), inverse_, gradient, positive.out.past_caches());
    if (anchor_out == nullptr || d_logp == 0.0) return;
    // As in write_gradient: at the target once more, in double.
    const double x = (at_target - a.reference) * inverse_, term = std::exp(x);
    const double slopes = gradient.anchor.slope * x + gradient.contrast * ratio * inverse_;
    const double own = term == 0.0 ? 0.0 : term * (gradient.anchor.scale + slopes);
    anchor_out->set(i, target, inverse_ * d_logp + own);
  }

  double upstream_;
  const LogitRows& anchor_;
  const Targets& targets_;
  const Saved& saved_;
  const Values& coefficients_;
  double inverse_;
};

struct ViewsOf {
  LogitRows anchor;
  std::optional<LogitRows> positive, negative;
};

ViewsOf views_of(const Tensor& anchor, const std::optional<Tensor>& positive,
                 const std::optional<Tensor>& negative) {
  const LogitRows rows(kOp, "anchor", anchor);
  return {rows, optional_rows("positive", positive, rows),
          optional_rows("negative", negative, rows)};
}

void backward(const Tensor& grad_loss, const ViewsOf& logits, const ViewsOf& out,
              const Tensor& targets, const Tensor& advantages,
              const std::optional<Tensor>& cu_seqlens, const Tensor& saved_values,
              const Tensor& coefficient_values, double temperature, Divergence divergence,
              bool gating, bool detach_anchor) {
  const int64_t count = logits.anchor.count();
  const ScalarType type = accumulator(logits.anchor.tensor());
  const Targets target(kOp, targets, count);
  const Completions completions(kOp, targets, cu_seqlens);
  const Values advantage =
      read(kOp, "advantages", advantages, ScalarType::Double, completions.count());
  const Saved saved = {kept(kOp, "saved", saved_values, type, kSaved, count), count};
  const Values coefficients =
      kept(kOp, "coefficients", coefficient_values, type, kCoefficients, count);
  const ViewRows views(completions, looking(advantage, completions.count(), gating), count);
  const Gradients gradients(grad_loss, logits.anchor, target, saved, coefficients, temperature);
  if (divergence == Divergence::kFull && logits.positive && logits.negative) {
    gradients.contrast(
        out.anchor,
        {*logits.positive, *out.positive, views.in("positive", *logits.positive)},
        {*logits.negative, *out.negative, views.in("negative", *logits.negative)}, detach_anchor);
    return;
  }
  std::vector<int64_t> every_row(count);
  for (int64_t i = 0; i < count; ++i) every_row[i] = i;
  gradients.alone(logits.anchor, out.anchor, every_row, 0);
  if (logits.positive) {
    gradients.alone(*logits.positive, *out.positive, views.in("positive", *logits.positive), 2);
  }
  if (logits.negative) {
    gradients.alone(*logits.negative, *out.negative, views.in("negative", *logits.negative), 3);
  }
}

std::optional<LogitRows> new_like(const std::optional<LogitRows>& logits) {
  if (!logits) return std::nullopt;
  return LogitRows::new_like(kOp, *logits);
}

void write_back(const std::optional<LogitRows>& rows, const std::optional<Tensor>& logits) {
  if (!rows || rows->tensor().data_ptr() == logits->data_ptr()) return;
  Tensor target = *logits;
  torch::stable::copy_(target, rows->tensor());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cppo_loss_backward(
    Tensor grad_loss, Tensor anchor, std::optional<Tensor> positive, std::optional<Tensor> negative,
    Tensor targets, Tensor advantages, std::optional<Tensor> cu_seqlens, Tensor saved,
    Tensor coefficients, double temperature, std::string divergence, bool gating,
    bool detach_anchor) {
  const ViewsOf logits = views_of(anchor, positive, negative);
  const ViewsOf out = {LogitRows::new_like(kOp, logits.anchor), new_like(logits.positive),
                       new_like(logits.negative)};
  backward(grad_loss, logits, out, targets, advantages, cu_seqlens, saved, coefficients,
           temperature, parse_divergence(kOp, divergence), gating, detach_anchor);
  const auto tensor_of = [&](const std::optional<LogitRows>& rows) {
    if (rows) return rows->tensor();
    return torch::stable::new_empty(anchor, {0}, anchor.scalar_type());
  };
  return {out.anchor.tensor(), tensor_of(out.positive), tensor_of(out.negative)};
}

void cppo_loss_backward_(Tensor grad_loss, Tensor anchor, std::optional<Tensor> positive,
                         std::optional<Tensor> negative, Tensor targets, Tensor advantages,
                         std::optional<Tensor> cu_seqlens, Tensor saved, Tensor coefficients,
                         double temperature, std::string divergence, bool gating,
                         bool detach_anchor) {
  // A lazy copy becomes a real one.
  for (const std::optional<Tensor>& view : {std::optional(anchor), positive, negative}) {
    if (!view) continue;
    check_cpu(kOp, "views", *view);
    view->mutable_data_ptr();
  }
  const ViewsOf logits = views_of(anchor, positive, negative);
  backward(grad_loss, logits, logits, targets, advantages, cu_seqlens, saved, coefficients,
           temperature, parse_divergence(kOp, divergence), gating, detach_anchor);
  write_back(logits.anchor, anchor);
  write_back(logits.positive, positive);
  write_back(logits.negative, negative);
}

}  // namespace cppo::cpu
