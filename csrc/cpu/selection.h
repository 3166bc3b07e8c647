// The completions of a batch, and which of their tokens are perception tokens.
#pragma once

#include <vector>

#include "rows.h"

namespace cppo::cpu {

// Where each completion starts and ends among the rows, padded or packed.
class Completions {
 public:
  // Rows (B, L), or (T,) with cu_seqlens (B + 1,).
  Completions(const char* op, const Tensor& rows, const std::optional<Tensor>& cu_seqlens);

  int64_t count() const { return static_cast<int64_t>(bounds_.size()) - 1; }
  int64_t begin(int64_t completion) const { return bounds_[completion]; }
  int64_t end(int64_t completion) const { return bounds_[completion + 1]; }
  int64_t length(int64_t completion) const { return end(completion) - begin(completion); }
  // L if padded, the longest if packed.
  int64_t longest() const { return longest_; }

 private:
  std::vector<int64_t> bounds_;
  int64_t longest_ = 0;
};

// Of it a share of the rows is counted: of NaN, or past 1, there is none.
void check_fraction(const char* op, double fraction);

// Marks, of the `rows` of one completion, those whose score reaches the k-th largest. A is the
// dtype of the entropies: the arithmetic is the reference's, bit for bit.
template <class A>
void select(const std::vector<int64_t>& rows, const Values& anchor, const Values& negative,
            double fraction, bool* selected);

}  // namespace cppo::cpu
