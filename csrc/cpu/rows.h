// Rows of logits and the per-row values beside them, whatever their layout and dtype.
#pragma once

#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "row_kernels.h"

namespace cppo::cpu {

using torch::headeronly::ScalarType;

// The dtype of every statistic: fp32, or fp64 for fp64 logits.
inline ScalarType accumulator(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself where dtype and strides fit, else a copy. Each question to PyTorch takes a
// microsecond or more even where it changes nothing.
inline Tensor dense(const Tensor& tensor, ScalarType type) {
  const Tensor typed = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

// A dense fp32 or fp64 tensor on the CPU, read and written as double.
class Values {
 public:
  explicit Values(const Tensor& dense)
      : tensor_(dense),
        wide_(dense.scalar_type() == ScalarType::Double),
        data_(dense.mutable_data_ptr()) {}

  double operator[](int64_t i) const {
    return wide_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }
  void set(int64_t i, double value) const {
    if (wide_) {
      static_cast<double*>(data_)[i] = value;
    } else {
      static_cast<float*>(data_)[i] = static_cast<float>(value);
    }
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
  bool wide_;
  void* data_;
};

inline Values new_zeros(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                        ScalarType type) {
  Tensor out = torch::stable::new_empty(like, shape, type);
  if (out.numel()) std::memset(out.mutable_data_ptr(), 0, out.numel() * out.element_size());
  return Values(out);
}

// Any tensor of `numel` numbers as Values of `type`; copied where dtype or strides ask for it.
inline Values read(const char* op, const char* argument, const Tensor& tensor, ScalarType type,
                   int64_t numel) {
  check_cpu(op, argument, tensor);
  check_numel(op, argument, tensor, numel);
  return Values(dense(tensor, type));
}

// What a forward left to its backward: (count, rows) of the accumulator's dtype.
inline Values kept(const char* op, const char* argument, const Tensor& tensor, ScalarType type,
                   int64_t count, int64_t rows) {
  CPPO_CHECK(tensor.dim() == 2 && tensor.size(0) == count && tensor.size(1) == rows &&
                 tensor.scalar_type() == type,
             op, argument, " must be that of the forward, (", count, ", ", rows, "), got shape ",
             shape_of(tensor), tensor.scalar_type() == type ? "" : " of another dtype");
  return read(op, argument, tensor, type, count * rows);
}

// A dense tensor of integers or booleans, copied where dtype or strides ask for it.
template <class T>
struct Integers {
  Tensor tensor;
  const T* data;
  Integers(const char* op, const char* argument, const Tensor& source, ScalarType type)
      : tensor(dense(source, type)),
        data(static_cast<const T*>(tensor.const_data_ptr())) {
    check_cpu(op, argument, source);
  }
  T operator[](int64_t i) const { return data[i]; }
};

// One per row of logits.
struct Targets : Integers<int64_t> {
  Targets(const char* op, const Tensor& targets, int64_t rows)
      : Integers(op, "targets", targets, ScalarType::Long) {
    check_numel(op, "targets", targets, rows);
  }
};

// One per row of logits, or all.
struct Mask {
  std::optional<Integers<bool>> values;
  Mask(const char* op, const char* argument, const std::optional<Tensor>& mask, int64_t rows) {
    if (!mask.has_value()) return;
    check_numel(op, argument, *mask, rows);
    values.emplace(op, argument, *mask, ScalarType::Bool);
  }
  bool operator[](int64_t i) const { return !values || (*values)[i]; }
};

// The rows of (B, L, V) or (T, V) logits with any strides but a dense last dimension.
class LogitRows {
 public:
  LogitRows(const char* op, const char* argument, const Tensor& logits);
  // A new tensor like these, to be written.
  LogitRows new_like(const char* op) const;
  // Those of a tensor that is to be written over, and the end of that.
  static LogitRows to_overwrite(const char* op, const char* argument, const Tensor& logits);
  void write_back(const Tensor& logits) const;
  // A view is read together with the anchor: both have the same V and dtype.
  void check_like(const char* op, const char* argument, const LogitRows& anchor) const;

  void* row(int64_t i) const {
    return data_ + (i / inner_ * outer_stride_ + i % inner_ * inner_stride_) * element_bytes_;
  }
  double at(int64_t i, int64_t v) const;
  void set(int64_t i, int64_t v, double value) const;
  void clear(int64_t i) const;
  // Whether the rows are too large to be found in a cache by who reads them next.
  bool past_caches() const { return count_ * size_ * element_bytes_ > kCacheBytes; }

  const RowKernels& kernels() const { return *kernels_; }
  const Tensor& tensor() const { return tensor_; }
  int64_t count() const { return count_; }  // rows
  int64_t size() const { return size_; }    // V

 private:
  static constexpr int64_t kCacheBytes = 32 << 20;

  Tensor tensor_;
  char* data_;
  int64_t count_, size_, inner_, outer_stride_, inner_stride_, element_bytes_;
  const RowKernels* kernels_;
};

// Where row i of a batch lies among the rows of logits: at places[i], or at i.
class Places {
 public:
  Places(const char* op, const char* argument, const std::optional<Tensor>& places, int64_t rows,
         const LogitRows& logits);
  int64_t operator[](int64_t i) const { return values_ ? (*values_)[i] : i; }
  // Whether the logits have the row; of one that counts it is checked.
  bool has(int64_t i) const { return (*this)[i] >= 0 && (*this)[i] < count_; }
  void check(const char* op, int64_t i) const;

 private:
  const char* argument_;
  std::optional<Integers<int64_t>> values_;
  int64_t count_;
};

// Which rows belong to which completion, padded or packed.
class Completions {
 public:
  // Rows (B, L), or (T,) with cu_seqlens (B + 1,).
  Completions(const char* op, const Tensor& rows, const std::optional<Tensor>& cu_seqlens);

  int64_t count() const { return static_cast<int64_t>(bounds_.size()) - 1; }
  // Those that a mask names.
  std::vector<int64_t> rows(int64_t completion, const Mask& mask) const;

 private:
  std::vector<int64_t> bounds_;
};

// Log-probability of a target and entropy of its row, from the statistics.
double logp_of(const RowStats& stats, double logit, double inv_temperature);
double entropy_of(const RowStats& stats);

// d/dlogit of logp * (the target's log-probability) + entropy * H.
struct Upstream {
  double logp, entropy;
  bool is_zero() const { return logp == 0.0 && entropy == 0.0; }
};

// Writes it over a row; `out` may hold the logits themselves.
void write_gradient(const LogitRows& logits, const LogitRows& out, int64_t row, int64_t target,
                    const RowStats& stats, const Upstream& upstream, double inv_temperature);

// Clears the rows of a gradient that are not written: of a new tensor all of them, of logits that
// are written over those that the batch names.
void clear_others(const LogitRows& out, const std::vector<int64_t>& written, const Places& places,
                  int64_t rows, bool in_place);

// The target of a row that counts must name a token.
void check_target(const char* op, const Targets& targets, int64_t row, int64_t vocabulary);

// Calls f(item) for each of the items, in parallel. A thread takes the next item when it has done
// one: cores are not equally fast when other programs use them too.
template <class Item, class F>
void for_each(const std::vector<Item>& items, const F& f) {
  const int64_t count = static_cast<int64_t>(items.size());
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t k = next++; k < count; k = next++) f(items[k]);
  });
}

}  // namespace cppo::cpu
