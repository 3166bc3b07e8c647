// Log-probability and entropy on the CPU (specification: cppo/reference.py).

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace cppo::cpu {
namespace {

constexpr const char* kOp = "token_stats";

// The rows of a batch that count, all of whose targets and places are there.
struct Batch {
  Targets targets;
  Places places;
  int64_t count;
  std::vector<int64_t> rows;

  Batch(const LogitRows& logits, const Tensor& tokens, const std::optional<Tensor>& mask,
        const std::optional<Tensor>& places)
      : targets(kOp, tokens, places.has_value() ? tokens.numel() : logits.count()),
        places(kOp, "places", places, tokens.numel(), logits),
        count(tokens.numel()) {
    const Mask valid(kOp, "mask", mask, count);
    for (int64_t i = 0; i < count; ++i) {
      if (!valid[i]) continue;
      check_target(kOp, targets, i, logits.size());
      this->places.check(kOp, i);
      rows.push_back(i);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> token_stats(Tensor logits, Tensor targets,
                                               std::optional<Tensor> mask,
                                               std::optional<Tensor> places, double temperature,
                                               bool /*inplace: for the backward*/) {
  const LogitRows source(kOp, "logits", logits);
  const Batch batch(source, targets, mask, places);
  const ScalarType type = accumulator(logits);
  const Values logps = new_zeros(logits, targets.sizes(), type);
  const Values entropy = new_zeros(logits, targets.sizes(), type);
  const Values saved = new_zeros(logits, {3, batch.count}, type);
  const double inverse = 1.0 / temperature;
  for_each(batch.rows, [&](int64_t i) {
    const int64_t row = batch.places[i];
    const RowStats stats = source.kernels().stats(source.row(row), source.size(), inverse);
    logps.set(i, logp_of(stats, source.at(row, batch.targets[i]), inverse));
    entropy.set(i, entropy_of(stats));
    saved.set(i, stats.reference);
    saved.set(batch.count + i, stats.sum);
    saved.set(2 * batch.count + i, stats.mean);
  });
  return {logps.tensor(), entropy.tensor(), saved.tensor()};
}

// Derivatives of the loss by both statistics of every row; those that are not given are zero.
struct Gradients {
  std::optional<Values> logps, entropy;

  Gradients(const std::optional<Tensor>& of_logps, const std::optional<Tensor>& of_entropy,
            ScalarType type, int64_t rows) {
    if (of_logps) logps = read(kOp, "grad_logps", *of_logps, type, rows);
    if (of_entropy) entropy = read(kOp, "grad_entropy", *of_entropy, type, rows);
  }
  Upstream operator[](int64_t i) const {
    return {logps ? (*logps)[i] : 0.0, entropy ? (*entropy)[i] : 0.0};
  }
};

void backward(const LogitRows& logits, const LogitRows& out, const Batch& batch,
              const Gradients& gradients, const Tensor& saved, double temperature) {
  const int64_t count = batch.count;
  const Values stats = kept(kOp, "saved", saved, accumulator(logits.tensor()), 3, count);
  std::vector<int64_t> active;
  for (const int64_t i : batch.rows) {
    if (!gradients[i].is_zero()) active.push_back(i);
  }
  const bool in_place = out.tensor().data_ptr() == logits.tensor().data_ptr();
  clear_others(out, active, batch.places, count, in_place);
  for_each(active, [&](int64_t i) {
    const RowStats row = {stats[i], stats[count + i], stats[2 * count + i]};
    write_gradient(logits, out, batch.places[i], batch.targets[i], row, gradients[i],
                   1.0 / temperature);
  });
}

Tensor token_stats_backward(std::optional<Tensor> grad_logps, std::optional<Tensor> grad_entropy,
                            Tensor logits, Tensor targets, std::optional<Tensor> mask,
                            std::optional<Tensor> places, Tensor saved, double temperature) {
  const LogitRows source(kOp, "logits", logits);
  const LogitRows out = source.new_like(kOp);
  const Batch batch(source, targets, mask, places);
  backward(source, out, batch, {grad_logps, grad_entropy, accumulator(logits), batch.count}, saved,
           temperature);
  return out.tensor();
}

void token_stats_backward_(std::optional<Tensor> grad_logps, std::optional<Tensor> grad_entropy,
                           Tensor logits, Tensor targets, std::optional<Tensor> mask,
                           std::optional<Tensor> places, Tensor saved, double temperature) {
  const LogitRows rows = LogitRows::to_overwrite(kOp, "logits", logits);
  const Batch batch(rows, targets, mask, places);
  backward(rows, rows, batch, {grad_logps, grad_entropy, accumulator(logits), batch.count}, saved,
           temperature);
  rows.write_back(logits);
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) {
  m.impl("token_stats", TORCH_BOX(&token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&token_stats_backward));
  m.impl("token_stats_backward_", TORCH_BOX(&token_stats_backward_));
}

}  // namespace
}  // namespace cppo::cpu
