// The contrast over the whole vocabulary on the CPU, of three rows that are read together:
// KL(anchor || positive) - KL(anchor || negative) (specification: cppo/reference.py).

#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace cppo::cpu {
namespace {

// A perturbed view has the rows of the anchor, or those that its places name.
Places places_in(const char* op, const char* view, const char* argument, const LogitRows& rows,
                 const LogitRows& anchor, const std::optional<Tensor>& places) {
  rows.check_like(op, view, anchor);
  CPPO_CHECK(places.has_value() || rows.count() == anchor.count(), op, view,
             " must have the ", anchor.count(), " rows of the anchor without ", argument, ", got ",
             rows.count());
  return Places(op, argument, places, anchor.count(), rows);
}

Tensor contrast(Tensor anchor, Tensor positive, Tensor negative, Tensor mask,
                std::optional<Tensor> positive_places, std::optional<Tensor> negative_places,
                double temperature) {
  const char* op = "contrast";
  const LogitRows a(op, "anchor", anchor), p(op, "positive", positive), n(op, "negative", negative);
  const Places p_row = places_in(op, "positive", "positive_places", p, a, positive_places);
  const Places n_row = places_in(op, "negative", "negative_places", n, a, negative_places);
  const int64_t count = a.count();
  const Mask chosen(op, "mask", mask, count);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < count; ++i) {
    if (!chosen[i]) continue;
    p_row.check(op, i);
    n_row.check(op, i);
    rows.push_back(i);
  }
  const Values out = new_zeros(anchor, {5, count}, accumulator(anchor));
  for_each(rows, [&](int64_t i) {
    RowStats stats[3];
    double gap = 0.0;
    a.kernels().contrast_stats({a.row(i), p.row(p_row[i]), n.row(n_row[i])}, a.size(),
                               1.0 / temperature, stats, &gap);
    // E_a[z_n - z_p] + lse_p - lse_n, where the references cancel.
    const double margin = gap + std::log(stats[1].sum) - std::log(stats[2].sum);
    const double found[5] = {stats[1].reference, stats[1].sum, stats[2].reference, stats[2].sum,
                             margin};
    for (int64_t k = 0; k < 5; ++k) out.set(k * count + i, found[k]);
  });
  return out.tensor();
}

constexpr const char* kOp = "contrast_backward";

// The logits of the three views, or their gradients.
struct Three {
  LogitRows anchor, positive, negative;
};

// The other arguments, as they came.
struct Arguments {
  Tensor targets;
  std::optional<Tensor> positive_places, negative_places;
  Tensor saved, contrasts, coefficients;
  double temperature;
  bool detach_anchor;
};

class Backward {
 public:
  Backward(const Three& logits, const Three& out, const Arguments& given)
      : in_(logits),
        out_(out),
        count_(logits.anchor.count()),
        targets_(kOp, given.targets, count_),
        anchor_row_(kOp, "anchor", std::nullopt, count_, logits.anchor),
        p_row_(places_in(kOp, "positive", "positive_places", logits.positive, logits.anchor,
                         given.positive_places)),
        n_row_(places_in(kOp, "negative", "negative_places", logits.negative, logits.anchor,
                         given.negative_places)),
        saved_(kept(kOp, "saved", given.saved, type(), 3, count_)),
        contrasts_(kept(kOp, "contrasts", given.contrasts, type(), 5, count_)),
        coefficients_(kept(kOp, "coefficients", given.coefficients, type(), 4, count_)),
        inverse_(1.0 / given.temperature),
        detach_anchor_(given.detach_anchor) {}

  void write() const {
    // Rows of the margin, of the anchor's own statistics alone, and of the anchor's gradient.
    std::vector<int64_t> together, alone, written;
    for (int64_t i = 0; i < count_; ++i) {
      const bool own = !own_of(i).is_zero(), margin = by(2, i) != 0.0;
      if (own || margin) check_target(kOp, targets_, i, in_.anchor.size());
      if (margin) {
        p_row_.check(kOp, i);
        n_row_.check(kOp, i);
        together.push_back(i);
      }
      if (own && (!margin || detach_anchor_)) alone.push_back(i);
      if (own || (margin && !detach_anchor_)) written.push_back(i);
    }
    for_each(together, [&](int64_t i) { write_together(i); });
    // Only now: written in place, the anchor's row is still needed above.
    const bool in_place = out_.anchor.tensor().data_ptr() == in_.anchor.tensor().data_ptr();
    clear_others(out_.positive, together, p_row_, count_, in_place);
    clear_others(out_.negative, together, n_row_, count_, in_place);
    clear_others(out_.anchor, written, anchor_row_, count_, in_place);
    for_each(alone, [&](int64_t i) {
      write_gradient(in_.anchor, out_.anchor, i, targets_[i], anchor_stats(i), own_of(i), inverse_);
    });
  }

 private:
  ScalarType type() const { return accumulator(in_.anchor.tensor()); }
  double by(int64_t which, int64_t i) const { return coefficients_[which * count_ + i]; }
  Upstream own_of(int64_t i) const { return {by(0, i), by(1, i)}; }
  RowStats anchor_stats(int64_t i) const {
    return {saved_[i], saved_[count_ + i], saved_[2 * count_ + i]};
  }

  void write_together(int64_t i) const {
    const auto of_view = [&](int64_t k) { return contrasts_[k * count_ + i]; };
    const RowStats a = anchor_stats(i), p = {of_view(0), of_view(1), 0.0},
                   n = {of_view(2), of_view(3), 0.0};
    const double d_logp = by(0, i), d_entropy = by(1, i), d_margin = by(2, i);
    const double per_term = inverse_ / a.sum;
    // ln pi_n - ln pi_p = (x_n - x_p) + ln s_p - ln s_n
    const double constant = std::log(p.sum) - std::log(n.sum) - of_view(4);
    ContrastGradient gradient;
    gradient.anchor = {a.reference,
                       per_term * (d_entropy * a.mean - d_logp + d_margin * constant),
                       -per_term * d_entropy};
    gradient.contrast = per_term * d_margin;
    gradient.push = inverse_ * d_margin;
    gradient.stats[0] = a;
    gradient.stats[1] = p;
    gradient.stats[2] = n;
    const int64_t target = targets_[i];
    const double x = (in_.anchor.at(i, target) - a.reference) * inverse_;
    const double p_below = in_.positive.at(p_row_[i], target) - p.reference;
    const double ratio = in_.negative.at(n_row_[i], target) - n.reference - p_below;
    in_.anchor.kernels().contrast_gradient(
        {in_.anchor.row(i), in_.positive.row(p_row_[i]), in_.negative.row(n_row_[i])},
        {detach_anchor_ ? nullptr : out_.anchor.row(i), out_.positive.row(p_row_[i]),
         out_.negative.row(n_row_[i])},
        in_.anchor.size(), inverse_, gradient, out_.positive.past_caches());
    if (detach_anchor_ || d_logp == 0.0) return;
    // As in write_gradient: at the target once more, in double.
    const double term = std::exp(x);
    const double slopes = gradient.anchor.slope * x + gradient.contrast * ratio * inverse_;
    const double own = term == 0.0 ? 0.0 : term * (gradient.anchor.scale + slopes);
    out_.anchor.set(i, target, inverse_ * d_logp + own);
  }

  const Three &in_, &out_;
  int64_t count_;
  Targets targets_;
  Places anchor_row_, p_row_, n_row_;
  Values saved_, contrasts_, coefficients_;
  double inverse_;
  bool detach_anchor_;
};

std::tuple<Tensor, Tensor, Tensor> contrast_backward(
    Tensor anchor, Tensor positive, Tensor negative, Tensor targets,
    std::optional<Tensor> positive_places, std::optional<Tensor> negative_places, Tensor saved,
    Tensor contrasts, Tensor coefficients, double temperature, bool detach_anchor) {
  const Three in = {LogitRows(kOp, "anchor", anchor), LogitRows(kOp, "positive", positive),
                    LogitRows(kOp, "negative", negative)};
  const Three out = {in.anchor.new_like(kOp), in.positive.new_like(kOp), in.negative.new_like(kOp)};
  Backward(in, out,
           {targets, positive_places, negative_places, saved, contrasts, coefficients, temperature,
            detach_anchor})
      .write();
  return {out.anchor.tensor(), out.positive.tensor(), out.negative.tensor()};
}

void contrast_backward_(Tensor anchor, Tensor positive, Tensor negative, Tensor targets,
                        std::optional<Tensor> positive_places,
                        std::optional<Tensor> negative_places, Tensor saved, Tensor contrasts,
                        Tensor coefficients, double temperature, bool detach_anchor) {
  const Three views = {LogitRows::to_overwrite(kOp, "anchor", anchor),
                       LogitRows::to_overwrite(kOp, "positive", positive),
                       LogitRows::to_overwrite(kOp, "negative", negative)};
  Backward(views, views,
           {targets, positive_places, negative_places, saved, contrasts, coefficients, temperature,
            detach_anchor})
      .write();
  views.anchor.write_back(anchor);
  views.positive.write_back(positive);
  views.negative.write_back(negative);
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) {
  m.impl("contrast", TORCH_BOX(&contrast));
  m.impl("contrast_backward", TORCH_BOX(&contrast_backward));
  m.impl("contrast_backward_", TORCH_BOX(&contrast_backward_));
}

}  // namespace
}  // namespace cppo::cpu
