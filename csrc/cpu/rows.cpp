// Rows of logits on the CPU: see rows.h.

#include "rows.h"

#include <algorithm>
#include <cmath>

#include "ops.h"

namespace cppo::cpu {
namespace {

Element element_of(const char* op, const char* argument, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      fail("cppo.", op, ": ", argument, " must be fp16, bf16, fp32 or fp64");
  }
}

Tensor with_dense_rows(const char* op, const char* argument, const Tensor& logits) {
  check_cpu(op, argument, logits);
  CPPO_CHECK(logits.dim() == 2 || logits.dim() == 3, op, argument,
             " must be (T, V) or (B, L, V), got ", shape_of(logits));
  const int64_t last = logits.dim() - 1;
  const bool dense = logits.size(last) == 1 || logits.stride(last) == 1;
  return dense ? logits : torch::stable::contiguous(logits);
}

}  // namespace

LogitRows::LogitRows(const char* op, const char* argument, const Tensor& logits)
    : tensor_(with_dense_rows(op, argument, logits)) {
  const int64_t dim = logits.dim();
  const Element element = element_of(op, argument, logits);
  // Only the rows of a new tensor, or of one that is to be overwritten, are written.
  data_ = static_cast<char*>(const_cast<void*>(tensor_.const_data_ptr()));
  size_ = logits.size(dim - 1);
  inner_ = dim == 3 ? std::max<int64_t>(logits.size(1), 1) : 1;
  count_ = dim == 3 ? logits.size(0) * logits.size(1) : logits.size(0);
  outer_stride_ = tensor_.stride(0);
  inner_stride_ = dim == 3 ? tensor_.stride(1) : 0;
  element_bytes_ = kElementBytes[static_cast<int>(element)];
  kernels_ = &row_kernels(element);
  CPPO_CHECK(size_ > 0, op, argument, " must have V >= 1, got ", shape_of(logits));
}

LogitRows LogitRows::new_like(const char* op, const LogitRows& logits) {
  const Tensor& like = logits.tensor_;
  return LogitRows(op, "gradient",
                   torch::stable::new_empty(like, like.sizes(), like.scalar_type()));
}

void LogitRows::check_like(const char* op, const char* argument, const LogitRows& anchor) const {
  CPPO_CHECK(size_ == anchor.size_ && tensor_.scalar_type() == anchor.tensor_.scalar_type(), op,
             argument, " must have the V and dtype of the anchor ", shape_of(anchor.tensor_),
             ", got ", shape_of(tensor_));
}

void LogitRows::clear(int64_t i) const {
  if (past_caches()) {
    kernels_->clear(row(i), size_);
  } else {
    std::memset(row(i), 0, size_ * element_bytes_);
  }
}

double logp_of(const RowStats& stats, double logit, double inv_temperature) {
  return (logit - stats.reference) * inv_temperature - std::log(stats.sum);
}

double entropy_of(const RowStats& stats) { return std::log(stats.sum) - stats.mean; }

void write_gradient(const LogitRows& logits, int64_t row, const LogitRows& out, int64_t out_row,
                    int64_t target, const RowStats& stats, double d_logp, double d_entropy,
                    double inv_temperature) {
  // With pi = e^x / sum: d logp = 1[v = y] - pi, d H = -pi (x - mean).
  const double per_term = inv_temperature / stats.sum;
  const RowGradient gradient = {stats.reference, per_term * (d_entropy * stats.mean - d_logp),
                                -per_term * d_entropy};
  const double logit = logits.at(row, target);
  logits.kernels().gradient(logits.row(row), out.row(out_row), logits.size(), inv_temperature,
                            gradient, out.past_caches());
  if (d_logp == 0.0) return;
  // At the target 1 - pi may cancel: once more, in double.
  const double x = (logit - stats.reference) * inv_temperature, term = std::exp(x);
  const double weighted = term == 0.0 ? 0.0 : gradient.slope * x * term;
  out.set(out_row, target, inv_temperature * d_logp + gradient.scale * term + weighted);
}

void check_targets(const char* op, const Targets& targets, const Mask& mask, int64_t count,
                   int64_t vocabulary) {
  for (int64_t i = 0; i < count; ++i) {
    if (mask[i]) check_target(op, targets, i, vocabulary);
  }
}

void check_target(const char* op, const Targets& targets, int64_t row, int64_t vocabulary) {
  CPPO_CHECK(targets[row] >= 0 && targets[row] < vocabulary, op, "targets must be in [0, V) = [0, ",
             vocabulary, ") where not masked, got ", targets[row], " at row ", row);
}

std::string row_capability() { return cpu_capability(); }

Tensor row_power(Tensor t) {
  const bool wide = t.scalar_type() == ScalarType::Double;
  const Values from =
      read("row_power", "t", t, wide ? ScalarType::Double : ScalarType::Float, t.numel());
  Tensor out = torch::stable::new_empty(t, t.sizes(), from.tensor().scalar_type());
  row_kernels(wide ? Element::kDouble : Element::kFloat)
      .power(from.tensor().const_data_ptr(), out.mutable_data_ptr(), out.numel());
  return out;
}

}  // namespace cppo::cpu
