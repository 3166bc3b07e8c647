// Perception tokens on the CPU (specification: cppo/reference.py).

#include <algorithm>
#include <cmath>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace cppo::cpu {
namespace {

// The rounding error of an entropy H in fp32, times 1 + H (cppo.reference.ENTROPY_ERROR).
constexpr double kEntropyError = 0x1p-17;

// Larger first; a NaN counts as the largest, as in torch.sort, so that the order is total.
template <class A>
bool larger(A a, A b) {
  const bool nan_a = std::isnan(a), nan_b = std::isnan(b);
  return nan_a != nan_b ? nan_a : a > b;
}

// Marks, of the `rows` of one completion, those whose score reaches the k-th largest. A is the
// dtype of the entropies: the arithmetic is the reference's, bit for bit.
template <class A>
void select(const std::vector<int64_t>& rows, const Values& anchor, const Values& negative,
            double fraction, bool* selected) {
  struct Scored {
    int64_t row;
    A score;
  };
  std::vector<Scored> rising;
  for (const int64_t row : rows) {
    const A before = static_cast<A>(anchor[row]), after = static_cast<A>(negative[row]);
    const A rise = after - before;
    if (rise > static_cast<A>(kEntropyError) * (1 + after)) {
      rising.push_back({row, rise / (after + static_cast<A>(1e-6))});
    }
  }
  if (rising.empty()) return;
  const auto wanted = static_cast<int64_t>(static_cast<double>(rising.size()) * fraction);
  const int64_t k = std::max<int64_t>(1, wanted);
  std::vector<A> scores;
  for (const Scored& item : rising) scores.push_back(item.score);
  std::nth_element(scores.begin(), scores.begin() + (k - 1), scores.end(), larger<A>);
  const A threshold = scores[k - 1];
  for (const Scored& item : rising) selected[item.row] = item.score >= threshold;
}

Tensor perception_mask(Tensor anchor_entropy, Tensor negative_entropy, double fraction,
                       std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens) {
  const char* op = "perception_mask";
  check_same_shape(op, "negative_entropy", negative_entropy, "anchor_entropy", anchor_entropy);
  const bool wide = anchor_entropy.scalar_type() == ScalarType::Double ||
                    negative_entropy.scalar_type() == ScalarType::Double;
  const Completions completions(op, anchor_entropy, cu_seqlens);
  CPPO_CHECK(fraction >= 0.0 && fraction <= 1.0, op, "fraction must be in [0, 1], got ", fraction);
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t count = anchor_entropy.numel();
  const Values anchor = read(op, "anchor_entropy", anchor_entropy, type, count);
  const Values negative = read(op, "negative_entropy", negative_entropy, type, count);
  const Mask valid(op, "mask", mask, count);
  Tensor out = torch::stable::new_empty(anchor_entropy, anchor_entropy.sizes(), ScalarType::Bool);
  bool* selected = static_cast<bool*>(out.mutable_data_ptr());
  std::fill(selected, selected + count, false);
  const auto choose = wide ? select<double> : select<float>;
  torch::stable::parallel_for(0, completions.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      choose(completions.rows(c, valid), anchor, negative, fraction, selected);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) {
  m.impl("perception_mask", TORCH_BOX(&perception_mask));
}

}  // namespace
}  // namespace cppo::cpu
