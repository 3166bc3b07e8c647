// Packing on the CPU (specification: cppo/reference.py): one pass counts, one pass fills.

#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "ops.h"

namespace cppo::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "pack_completions";
constexpr int64_t kRowsPerThread = 8;

bool is_integer_of(const Tensor& tensor, size_t bytes) {
  const ScalarType type = tensor.scalar_type();
  if (bytes == 4) return type == ScalarType::Int;
  if (bytes == 8) return type == ScalarType::Long;
  return type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Char;
}

// A mask of 1, 4 or 8 byte integers, read row by row as "is it nonzero".
struct Mask {
  Tensor tensor;
  const char* data;
  size_t bytes;
  int64_t length;

  Mask(const char* argument, const Tensor& source, const Tensor& like)
      : tensor(torch::stable::contiguous(source)), bytes(source.element_size()) {
    check_cpu(kOp, argument, source);
    check_same_shape(kOp, argument, source, "input_ids", like);
    CPPO_CHECK(is_integer_of(source, bytes), kOp, argument, " must be bool, int32 or int64");
    data = static_cast<const char*>(tensor.const_data_ptr());
    length = source.size(1);
  }

  template <class T>
  void read(int64_t row, uint8_t* out) const {
    const T* source = reinterpret_cast<const T*>(data) + row * length;
    for (int64_t i = 0; i < length; ++i) out[i] = source[i] != 0;
  }

  void row(int64_t row, uint8_t* out) const {
    if (bytes == 1) return read<uint8_t>(row, out);
    if (bytes == 4) return read<int32_t>(row, out);
    return read<int64_t>(row, out);
  }
};

struct Streams {
  int64_t* position;
  int64_t* rows;
  int64_t* token_index;
  int64_t* target_index;
  char* input_ids;
  char* targets;
};

Tensor like(const Tensor& source, int64_t size, ScalarType type) {
  return torch::stable::new_empty(source, {size}, type);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls visit(column, position, is_response) for every attended token of one completion.
template <class F>
void walk(const Mask& attention, const Mask& completion, int64_t row, std::vector<uint8_t>& scratch,
          const F& visit) {
  const int64_t length = attention.length;
  uint8_t* attended = scratch.data();
  uint8_t* response = attended + length;
  attention.row(row, attended);
  completion.row(row, response);
  int64_t position = 0;
  for (int64_t column = 0; column < length; ++column) {
    if (!attended[column]) continue;
    // The first attended token has no row that predicts it.
    visit(column, position, response[column] && position > 0);
    ++position;
  }
}

template <class Id>
void fill_row(const Id* ids, int64_t base, int64_t token, int64_t target, const Streams& out,
              const Mask& attention, const Mask& completion, int64_t row,
              std::vector<uint8_t>& scratch) {
  walk(attention, completion, row, scratch, [&](int64_t column, int64_t position, bool response) {
    out.position[token] = position;
    out.token_index[token] = base + column;
    reinterpret_cast<Id*>(out.input_ids)[token] = ids[base + column];
    if (response) {
      out.rows[target] = token - 1;
      out.target_index[target] = base + column;
      reinterpret_cast<Id*>(out.targets)[target] = ids[base + column];
      ++target;
    }
    ++token;
  });
}

// Turns counts at [1, K] into running sums, and returns the total.
int64_t accumulate(int32_t* counts, int64_t size) {
  int64_t total = 0;
  counts[0] = 0;
  for (int64_t k = 1; k <= size; ++k) {
    total += counts[k];
    CPPO_CHECK(total <= std::numeric_limits<int32_t>::max(), kOp,
               "the packed batch must have fewer than 2^31 tokens, completion ", k - 1,
               " is past it");
    counts[k] = static_cast<int32_t>(total);
  }
  return total;
}

}  // namespace

Packed pack_completions(Tensor input_ids, Tensor attention_mask, Tensor completion_mask,
                        Tensor kept) {
  check_dim(kOp, "input_ids", input_ids, 2);
  check_dim(kOp, "kept", kept, 1);
  check_cpu(kOp, "input_ids", input_ids);
  check_cpu(kOp, "kept", kept);
  const size_t id_bytes = input_ids.element_size();
  CPPO_CHECK((id_bytes == 4 || id_bytes == 8) && is_integer_of(input_ids, id_bytes), kOp,
             "input_ids must be int32 or int64");
  CPPO_CHECK(is_integer_of(kept, 8), kOp, "kept must be int64");
  const Mask attention("attention_mask", attention_mask, input_ids);
  const Mask completion("completion_mask", completion_mask, input_ids);
  const Tensor ids = torch::stable::contiguous(input_ids);
  const Tensor kept_rows = torch::stable::contiguous(kept);
  const int64_t* row_of = static_cast<const int64_t*>(kept_rows.const_data_ptr());
  const int64_t num_kept = kept.size(0), length = input_ids.size(1);
  for (int64_t k = 0; k < num_kept; ++k) {
    CPPO_CHECK(row_of[k] >= 0 && row_of[k] < input_ids.size(0), kOp, "kept must be in [0, B = ",
               input_ids.size(0), "), got ", row_of[k], " at ", k);
  }

  const Tensor cu_seqlens = like(input_ids, num_kept + 1, ScalarType::Int);
  const Tensor row_cu_seqlens = like(input_ids, num_kept + 1, ScalarType::Int);
  int32_t* seqlens = data_of<int32_t>(cu_seqlens);
  int32_t* row_seqlens = data_of<int32_t>(row_cu_seqlens);
  torch::stable::parallel_for(0, num_kept, kRowsPerThread, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch(2 * length);
    for (int64_t k = begin; k < end; ++k) {
      int32_t tokens = 0, responses = 0;
      walk(attention, completion, row_of[k], scratch, [&](int64_t, int64_t, bool response) {
        ++tokens;
        responses += response;
      });
      seqlens[k + 1] = tokens;
      row_seqlens[k + 1] = responses;
    }
  });
  const int64_t num_tokens = accumulate(seqlens, num_kept);
  const int64_t num_rows = accumulate(row_seqlens, num_kept);

  const ScalarType id_type = input_ids.scalar_type();
  const Tensor packed_ids = like(input_ids, num_tokens, id_type);
  const Tensor targets = like(input_ids, num_rows, id_type);
  const Tensor position_ids = like(input_ids, num_tokens, ScalarType::Long);
  const Tensor token_index = like(input_ids, num_tokens, ScalarType::Long);
  const Tensor rows = like(input_ids, num_rows, ScalarType::Long);
  const Tensor target_index = like(input_ids, num_rows, ScalarType::Long);
  const Streams out = {data_of<int64_t>(position_ids), data_of<int64_t>(rows),
                       data_of<int64_t>(token_index),  data_of<int64_t>(target_index),
                       data_of<char>(packed_ids),      data_of<char>(targets)};
  torch::stable::parallel_for(0, num_kept, kRowsPerThread, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch(2 * length);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = row_of[k], base = row * length;
      if (id_bytes == 8) {
        fill_row(static_cast<const int64_t*>(ids.const_data_ptr()), base, seqlens[k],
                 row_seqlens[k], out, attention, completion, row, scratch);
      } else {
        fill_row(static_cast<const int32_t*>(ids.const_data_ptr()), base, seqlens[k],
                 row_seqlens[k], out, attention, completion, row, scratch);
      }
    }
  });
  return {packed_ids, position_ids,   cu_seqlens,  rows,
          targets,    row_cu_seqlens, token_index, target_index};
}

}  // namespace cppo::cpu
