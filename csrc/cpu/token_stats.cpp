// Log-probability and entropy on the CPU (specification: cppo/reference.py).

#include <vector>

#include "ops.h"
#include "rows.h"

namespace cppo::cpu {
namespace {

constexpr const char* kOp = "token_stats";

struct StatsGradient {
  std::optional<Values> logps, entropy;
  StatsGradient(const std::optional<Tensor>& grad_logps, const std::optional<Tensor>& grad_entropy,
                ScalarType type, int64_t rows) {
    if (grad_logps.has_value()) logps = read(kOp, "grad_logps", *grad_logps, type, rows);
    if (grad_entropy.has_value()) entropy = read(kOp, "grad_entropy", *grad_entropy, type, rows);
  }
};

void backward(const StatsGradient& gradient, const LogitRows& logits, const LogitRows& out,
              const Tensor& targets, const std::optional<Tensor>& mask, const Tensor& saved,
              double temperature) {
  const int64_t rows = logits.count();
  const Targets target(kOp, targets, rows);
  const Mask valid(kOp, "mask", mask, rows);
  check_targets(kOp, target, valid, rows, logits.size());
  const Values stats = kept(kOp, "saved", saved, accumulator(logits.tensor()), 3, rows);
  const auto d_logp = [&](int64_t i) { return gradient.logps ? (*gradient.logps)[i] : 0.0; };
  const auto d_entropy = [&](int64_t i) { return gradient.entropy ? (*gradient.entropy)[i] : 0.0; };
  std::vector<int64_t> active, zero;
  for (int64_t i = 0; i < rows; ++i) {
    const bool counts = valid[i] && (d_logp(i) != 0.0 || d_entropy(i) != 0.0);
    (counts ? active : zero).push_back(i);
  }
  for_each(zero, [&](int64_t i) { out.clear(i); });
  for_each(active, [&](int64_t i) {
    const RowStats row = {stats[i], stats[rows + i], stats[2 * rows + i]};
    write_gradient(logits, i, out, i, target[i], row, d_logp(i), d_entropy(i), 1.0 / temperature);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_stats(Tensor logits, Tensor targets,
                                               std::optional<Tensor> mask, double temperature,
                                               bool /*inplace: for the backward*/) {
  const LogitRows source(kOp, "logits", logits);
  const int64_t rows = source.count();
  const Targets target(kOp, targets, rows);
  const Mask valid(kOp, "mask", mask, rows);
  check_targets(kOp, target, valid, rows, source.size());
  const ScalarType type = accumulator(logits);
  const Values logps = new_zeros(logits, targets.sizes(), type);
  const Values entropy = new_zeros(logits, targets.sizes(), type);
  const Values saved = new_zeros(logits, {3, rows}, type);
  std::vector<int64_t> active;
  for (int64_t i = 0; i < rows; ++i) {
    if (valid[i]) active.push_back(i);
  }
  for_each(active, [&](int64_t i) {
    const double inverse = 1.0 / temperature;
    const RowStats stats = source.kernels().stats(source.row(i), source.size(), inverse);
    logps.set(i, logp_of(stats, source.at(i, target[i]), inverse));
    entropy.set(i, entropy_of(stats));
    saved.set(i, stats.reference);
    saved.set(rows + i, stats.sum);
    saved.set(2 * rows + i, stats.mean);
  });
  return {logps.tensor(), entropy.tensor(), saved.tensor()};
}

Tensor token_stats_backward(std::optional<Tensor> grad_logps, std::optional<Tensor> grad_entropy,
                            Tensor logits, Tensor targets, std::optional<Tensor> mask,
                            Tensor saved, double temperature) {
  const LogitRows source(kOp, "logits", logits);
  const LogitRows out = LogitRows::new_like(kOp, source);
  backward({grad_logps, grad_entropy, accumulator(logits), source.count()}, source, out, targets,
           mask, saved, temperature);
  return out.tensor();
}

void token_stats_backward_(std::optional<Tensor> grad_logps, std::optional<Tensor> grad_entropy,
                           Tensor logits, Tensor targets, std::optional<Tensor> mask, Tensor saved,
                           double temperature) {
  check_cpu(kOp, "logits", logits);
  logits.mutable_data_ptr();  // a lazy copy becomes a real one
  // Where the last dimension is not dense, these rows are those of a copy.
  const LogitRows rows(kOp, "logits", logits);
  backward({grad_logps, grad_entropy, accumulator(logits), rows.count()}, rows, rows, targets, mask,
           saved, temperature);
  if (rows.tensor().data_ptr() != logits.data_ptr()) torch::stable::copy_(logits, rows.tensor());
}

}  // namespace cppo::cpu
