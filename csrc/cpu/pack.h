// What packing and unpacking on the CPU share.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace cppo::cpu {

using torch::headeronly::ScalarType;

inline Tensor like(const Tensor& source, std::vector<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(source, size, type);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A tensor that is taken along: bytes copied from one layout into the other.
struct Column {
  Tensor source, out;
  const char* from;
  char* to;
  int64_t bytes;  // of an element

  Column(const char* op, const char* argument, const Tensor& values, const Tensor& out)
      : source(torch::stable::contiguous(values)), out(out), bytes(values.element_size()) {
    check_cpu(op, argument, values);
    from = static_cast<const char*>(source.const_data_ptr());
    to = data_of<char>(out);
  }
  void copy(int64_t to_row, int64_t from_row, int64_t count) const {
    std::memcpy(to + to_row * bytes, from + from_row * bytes, count * bytes);
  }
};

}  // namespace cppo::cpu
