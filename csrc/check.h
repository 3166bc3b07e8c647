// Checks with one wording: op, argument, what was expected, what came.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

// Like STD_TORCH_CHECK, without the C++ file and line that mean nothing to a Python user.
#define CPPO_CHECK(condition, op, ...) \
  if (!(condition)) cppo::fail("cppo.", op, ": ", __VA_ARGS__)

namespace cppo {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

inline void check_dim(const char* op, const char* argument, const Tensor& tensor, int64_t dim) {
  CPPO_CHECK(tensor.dim() == dim, op, argument, " must have ", dim, " dimension(s), got shape ",
             shape_of(tensor));
}

inline void check_same_shape(const char* op, const char* argument, const Tensor& tensor,
                             const char* like, const Tensor& other) {
  bool same = tensor.dim() == other.dim();
  for (int64_t i = 0; same && i < other.dim(); ++i) same = tensor.size(i) == other.size(i);
  CPPO_CHECK(same, op, argument, " must have the shape ", shape_of(other), " of ", like, ", got ",
             shape_of(tensor));
}

inline void check_numel(const char* op, const char* argument, const Tensor& tensor,
                        int64_t numel) {
  CPPO_CHECK(static_cast<int64_t>(tensor.numel()) == numel, op, argument, " must have ", numel,
             " entries, got shape ", shape_of(tensor));
}

inline void check_cpu(const char* op, const char* argument, const Tensor& tensor) {
  CPPO_CHECK(tensor.is_cpu(), op, argument, " must be on the CPU like the other arguments");
}

// Completions come in contiguous blocks: of a question (group_size), of a pruning unit.
inline void check_blocks(const char* op, const char* argument, int64_t total, int64_t block) {
  CPPO_CHECK(block > 0 && total % block == 0, op, argument, " must divide B = ", total, ", got ",
             block);
}

}  // namespace cppo
