// Rows of logits on the CPU: see rows.h.

#include "rows.h"

#include <algorithm>
#include <cmath>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace cppo::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

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

LogitRows LogitRows::new_like(const char* op) const {
  return LogitRows(op, "gradient",
                   torch::stable::new_empty(tensor_, tensor_.sizes(), tensor_.scalar_type()));
}

LogitRows LogitRows::to_overwrite(const char* op, const char* argument, const Tensor& logits) {
  check_cpu(op, argument, logits);
  logits.mutable_data_ptr();  // a lazy copy becomes a real one
  // Where the last dimension is not dense, these rows are those of a copy.
  return LogitRows(op, argument, logits);
}

void LogitRows::write_back(const Tensor& logits) const {
  if (tensor_.data_ptr() == logits.data_ptr()) return;
  Tensor target = logits;
  torch::stable::copy_(target, tensor_);
}

void LogitRows::check_like(const char* op, const char* argument, const LogitRows& anchor) const {
  CPPO_CHECK(size_ == anchor.size_ && tensor_.scalar_type() == anchor.tensor_.scalar_type(), op,
             argument, " must have the V and dtype of the anchor ", shape_of(anchor.tensor_),
             ", got ", shape_of(tensor_));
}

double LogitRows::at(int64_t i, int64_t v) const {
  const void* from = row(i);
  switch (tensor_.scalar_type()) {
    case ScalarType::Float:
      return static_cast<const float*>(from)[v];
    case ScalarType::Double:
      return static_cast<const double*>(from)[v];
    case ScalarType::BFloat16:
      return static_cast<const BFloat16*>(from)[v];
    default:
      return static_cast<const Half*>(from)[v];
  }
}

void LogitRows::set(int64_t i, int64_t v, double value) const {
  void* to = row(i);
  switch (tensor_.scalar_type()) {
    case ScalarType::Float:
      static_cast<float*>(to)[v] = static_cast<float>(value);
      break;
    case ScalarType::Double:
      static_cast<double*>(to)[v] = value;
      break;
    case ScalarType::BFloat16:
      static_cast<BFloat16*>(to)[v] = static_cast<float>(value);
      break;
    default:
      static_cast<Half*>(to)[v] = static_cast<float>(value);
  }
}

void LogitRows::clear(int64_t i) const {
  if (past_caches()) {
    kernels_->clear(row(i), size_);
  } else {
    std::memset(row(i), 0, size_ * element_bytes_);
  }
}

Places::Places(const char* op, const char* argument, const std::optional<Tensor>& places,
               int64_t rows, const LogitRows& logits)
    : argument_(argument), count_(logits.count()) {
  if (!places.has_value()) return;
  check_numel(op, argument, *places, rows);
  values_.emplace(op, argument, *places, ScalarType::Long);
}

void Places::check(const char* op, int64_t i) const {
  CPPO_CHECK(has(i), op, argument_, " must be in [0, rows of the logits) = [0, ", count_,
             ") where not masked, got ", (*this)[i], " at row ", i);
}

Completions::Completions(const char* op, const Tensor& rows,
                         const std::optional<Tensor>& cu_seqlens) {
  const int64_t total = rows.numel();
  if (!cu_seqlens.has_value()) {
    CPPO_CHECK(rows.dim() == 2, op, "rows must be (B, L) without cu_seqlens, got ", shape_of(rows));
    for (int64_t b = 0; b <= rows.size(0); ++b) bounds_.push_back(b * rows.size(1));
    return;
  }
  check_dim(op, "cu_seqlens", *cu_seqlens, 1);
  const Integers<int64_t> bounds(op, "cu_seqlens", *cu_seqlens, ScalarType::Long);
  bounds_.assign(bounds.data, bounds.data + cu_seqlens->size(0));
  CPPO_CHECK(!bounds_.empty() && bounds_.front() == 0 && bounds_.back() == total &&
                 std::is_sorted(bounds_.begin(), bounds_.end()),
             op, "cu_seqlens must go from 0 to T = ", total, " without decreasing");
}

std::vector<int64_t> Completions::rows(int64_t completion, const Mask& mask) const {
  std::vector<int64_t> found;
  for (int64_t i = bounds_[completion]; i < bounds_[completion + 1]; ++i) {
    if (mask[i]) found.push_back(i);
  }
  return found;
}

double logp_of(const RowStats& stats, double logit, double inv_temperature) {
  return (logit - stats.reference) * inv_temperature - std::log(stats.sum);
}

double entropy_of(const RowStats& stats) { return std::log(stats.sum) - stats.mean; }

void write_gradient(const LogitRows& logits, const LogitRows& out, int64_t row, int64_t target,
                    const RowStats& stats, const Upstream& upstream, double inv_temperature) {
  // With pi = e^x / sum: d logp = 1[v = y] - pi, d H = -pi (x - mean).
  const double per_term = inv_temperature / stats.sum;
  const RowGradient gradient = {stats.reference,
                                per_term * (upstream.entropy * stats.mean - upstream.logp),
                                -per_term * upstream.entropy};
  const double logit = logits.at(row, target);
  logits.kernels().gradient(logits.row(row), out.row(row), logits.size(), inv_temperature,
                            gradient, out.past_caches());
  if (upstream.logp == 0.0) return;
  // At the target 1 - pi may cancel: once more, in double.
  const double x = (logit - stats.reference) * inv_temperature, term = std::exp(x);
  const double weighted = term == 0.0 ? 0.0 : gradient.slope * x * term;
  out.set(row, target, inv_temperature * upstream.logp + gradient.scale * term + weighted);
}

void clear_others(const LogitRows& out, const std::vector<int64_t>& written, const Places& places,
                  int64_t rows, bool in_place) {
  std::vector<bool> clears(out.count(), !in_place);
  for (int64_t i = 0; in_place && i < rows; ++i) {
    if (places.has(i)) clears[places[i]] = true;
  }
  for (const int64_t i : written) clears[places[i]] = false;
  std::vector<int64_t> zero;
  for (int64_t row = 0; row < out.count(); ++row) {
    if (clears[row]) zero.push_back(row);
  }
  for_each(zero, [&](int64_t row) { out.clear(row); });
}

void check_target(const char* op, const Targets& targets, int64_t row, int64_t vocabulary) {
  CPPO_CHECK(targets[row] >= 0 && targets[row] < vocabulary, op, "targets must be in [0, V) = [0, ",
             vocabulary, ") where not masked, got ", targets[row], " at row ", row);
}

}  // namespace cppo::cpu
