// Packing on the CPU (specification: cppo/reference.py).
//
// Masks are runs in practice: padding, prompt, response, padding. A row is read as runs, so that
// everything but its bounds is copied by memcpy; holes make the runs shorter, nothing else.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "pack.h"

namespace cppo::cpu {
namespace {

constexpr const char* kOp = "pack_completions";
constexpr int64_t kRowsPerThread = 8;

bool is_mask(ScalarType type) {
  return type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Char ||
         type == ScalarType::Int || type == ScalarType::Long;
}

// A mask of 1, 4 or 8 byte integers, read row by row as "is it nonzero".
struct Mask {
  Tensor tensor;
  const char* data;
  size_t bytes;
  int64_t length;

  Mask(const char* argument, const Tensor& source, const char* like, const Tensor& other)
      : tensor(torch::stable::contiguous(source)), bytes(source.element_size()) {
    check_cpu(kOp, argument, source);
    check_same_shape(kOp, argument, source, like, other);
    CPPO_CHECK(is_mask(source.scalar_type()), kOp, argument, " must be bool, int32 or int64");
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

// One row of both masks: where it is attended, and where a response token stands.
struct Row {
  std::vector<uint8_t> attended, response;
  bool is_orphan = false;  // the first attended token is marked: nothing predicts it

  explicit Row(int64_t length) : attended(length), response(length) {}

  void read(const Mask& attention, const Mask& completion, int64_t row) {
    attention.row(row, attended.data());
    completion.row(row, response.data());
    const int64_t length = attention.length;
    for (int64_t i = 0; i < length; ++i) response[i] &= attended[i];
    const int64_t first = find(attended, 0, length, 1);
    is_orphan = first < length && response[first];
    if (is_orphan) response[first] = 0;
  }

  // The first place in [begin, end) that holds `value`, or end.
  static int64_t find(const std::vector<uint8_t>& mask, int64_t begin, int64_t end, int value) {
    if (begin >= end) return end;
    const void* at = std::memchr(mask.data() + begin, value, end - begin);
    return at == nullptr ? end : static_cast<const uint8_t*>(at) - mask.data();
  }

  // Calls visit(begin, end) for every run of ones in [from, to).
  template <class F>
  static void runs(const std::vector<uint8_t>& mask, int64_t from, int64_t to, const F& visit) {
    for (int64_t begin = find(mask, from, to, 1); begin < to;) {
      const int64_t end = find(mask, begin, to, 0);
      visit(begin, end);
      begin = find(mask, end, to, 1);
    }
  }

  static int32_t count(const std::vector<uint8_t>& mask) {
    int32_t total = 0;
    for (const uint8_t bit : mask) total += bit;
    return total;
  }
};

void iota(int64_t* out, int64_t count, int64_t first) {
  for (int64_t i = 0; i < count; ++i) out[i] = first + i;
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

Tensor checked_kept(const Tensor& kept, int64_t num_completions) {
  check_dim(kOp, "kept", kept, 1);
  check_cpu(kOp, "kept", kept);
  CPPO_CHECK(kept.scalar_type() == ScalarType::Long, kOp, "kept must be int64");
  const Tensor rows = torch::stable::contiguous(kept);
  const int64_t* row_of = static_cast<const int64_t*>(rows.const_data_ptr());
  for (int64_t k = 0; k < kept.size(0); ++k) {
    CPPO_CHECK(row_of[k] >= 0 && row_of[k] < num_completions, kOp, "kept must be in [0, B = ",
               num_completions, "), got ", row_of[k], " at ", k);
  }
  return rows;
}

const int32_t* checked_bounds(const char* argument, const Tensor& bounds, int64_t num_kept,
                              int64_t total) {
  check_cpu(kOp, argument, bounds);
  CPPO_CHECK(bounds.scalar_type() == ScalarType::Int && bounds.dim() == 1 &&
                 bounds.size(0) == num_kept + 1 && bounds.is_contiguous(),
             kOp, argument, " must be (K+1,) = (", num_kept + 1, ",) int32, contiguous");
  const int32_t* data = static_cast<const int32_t*>(bounds.const_data_ptr());
  bool rises = data[0] == 0 && data[num_kept] == total;
  for (int64_t k = 0; k < num_kept; ++k) rises = rises && data[k] <= data[k + 1];
  CPPO_CHECK(rises, kOp, argument, " must rise from 0 to ", total);
  return data;
}

std::tuple<Tensor, Tensor, Tensor> pack_sizes(Tensor attention_mask, Tensor completion_mask,
                                              Tensor kept) {
  check_dim(kOp, "attention_mask", attention_mask, 2);
  const Mask attention("attention_mask", attention_mask, "attention_mask", attention_mask);
  const Mask completion("completion_mask", completion_mask, "attention_mask", attention_mask);
  const Tensor kept_rows = checked_kept(kept, attention_mask.size(0));
  const int64_t* row_of = static_cast<const int64_t*>(kept_rows.const_data_ptr());
  const int64_t num_kept = kept.size(0), length = attention.length;

  const Tensor cu_seqlens = like(attention_mask, {num_kept + 1}, ScalarType::Int);
  const Tensor row_cu_seqlens = like(attention_mask, {num_kept + 1}, ScalarType::Int);
  const Tensor sizes = like(attention_mask, {4}, ScalarType::Long);
  int32_t* seqlens = data_of<int32_t>(cu_seqlens);
  int32_t* row_seqlens = data_of<int32_t>(row_cu_seqlens);
  std::vector<uint8_t> orphans(num_kept);
  torch::stable::parallel_for(0, num_kept, kRowsPerThread, [&](int64_t begin, int64_t end) {
    Row row(length);
    for (int64_t k = begin; k < end; ++k) {
      row.read(attention, completion, row_of[k]);
      orphans[k] = row.is_orphan;
      seqlens[k + 1] = Row::count(row.attended);
      row_seqlens[k + 1] = Row::count(row.response);
    }
  });
  int64_t* totals = data_of<int64_t>(sizes);
  totals[2] = num_kept ? *std::max_element(seqlens + 1, seqlens + 1 + num_kept) : 0;
  const int64_t orphan = Row::find(orphans, 0, num_kept, 1);
  totals[3] = orphan < num_kept ? orphan : -1;
  totals[0] = accumulate(seqlens, num_kept);
  totals[1] = accumulate(row_seqlens, num_kept);
  return {cu_seqlens, row_cu_seqlens, sizes};
}

// The streams of a batch, and the per-token tensors at its response tokens.
struct Streams {
  Tensor input_ids, position_ids, rows, token_index, target_index;
  Column ids;
  std::vector<Column> columns;  // targets, and what is taken along

  Streams(const Tensor& source, const std::vector<Tensor>& per_token, int64_t num_tokens,
          int64_t num_rows)
      : input_ids(like(source, {num_tokens}, source.scalar_type())),
        position_ids(like(source, {num_tokens}, ScalarType::Long)),
        rows(like(source, {num_rows}, ScalarType::Long)),
        token_index(like(source, {num_tokens}, ScalarType::Long)),
        target_index(like(source, {num_rows}, ScalarType::Long)),
        ids(kOp, "input_ids", source, input_ids) {
    // Targets are input ids taken at the response tokens, like every other per-token tensor.
    columns.emplace_back(kOp, "input_ids", source, like(source, {num_rows}, source.scalar_type()));
    for (const Tensor& values : per_token) {
      check_same_shape(kOp, "per_token", values, "input_ids", source);
      columns.emplace_back(kOp, "per_token", values,
                           like(values, {num_rows}, values.scalar_type()));
    }
  }

  // Writes one completion from its first token and response token on. It starts at `base` of the
  // padded tensors.
  void write(const Row& row, int64_t base, int64_t start, int64_t target) const {
    int64_t token = start;
    const int64_t length = static_cast<int64_t>(row.attended.size());
    Row::runs(row.attended, 0, length, [&](int64_t first, int64_t last) {
      const int64_t count = last - first;
      iota(data_of<int64_t>(position_ids) + token, count, token - start);
      iota(data_of<int64_t>(token_index) + token, count, base + first);
      ids.copy(token, base + first, count);
      Row::runs(row.response, first, last, [&](int64_t from, int64_t to) {
        iota(data_of<int64_t>(rows) + target, to - from, token + from - first - 1);
        iota(data_of<int64_t>(target_index) + target, to - from, base + from);
        for (const Column& column : columns) column.copy(target, base + from, to - from);
        target += to - from;
      });
      token += count;
    });
  }
};

using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

Packed pack_completions(Tensor input_ids, Tensor attention_mask, Tensor completion_mask,
                        Tensor kept, Tensor cu_seqlens, Tensor row_cu_seqlens,
                        std::vector<Tensor> per_token, int64_t num_tokens, int64_t num_rows) {
  check_dim(kOp, "input_ids", input_ids, 2);
  check_cpu(kOp, "input_ids", input_ids);
  const ScalarType id_type = input_ids.scalar_type();
  CPPO_CHECK(id_type == ScalarType::Int || id_type == ScalarType::Long, kOp,
             "input_ids must be int32 or int64");
  const Mask attention("attention_mask", attention_mask, "input_ids", input_ids);
  const Mask completion("completion_mask", completion_mask, "input_ids", input_ids);
  const Tensor kept_rows = checked_kept(kept, input_ids.size(0));
  const int64_t* row_of = static_cast<const int64_t*>(kept_rows.const_data_ptr());
  const int64_t num_kept = kept.size(0), length = input_ids.size(1);
  const int32_t* seqlens = checked_bounds("cu_seqlens", cu_seqlens, num_kept, num_tokens);
  const int32_t* row_seqlens =
      checked_bounds("row_cu_seqlens", row_cu_seqlens, num_kept, num_rows);

  const Streams streams(input_ids, per_token, num_tokens, num_rows);
  std::atomic<bool> fits = true;
  torch::stable::parallel_for(0, num_kept, kRowsPerThread, [&](int64_t begin, int64_t end) {
    Row row(length);
    for (int64_t k = begin; k < end; ++k) {
      row.read(attention, completion, row_of[k]);
      if (Row::count(row.attended) != seqlens[k + 1] - seqlens[k] ||
          Row::count(row.response) != row_seqlens[k + 1] - row_seqlens[k]) {
        fits = false;
        return;
      }
      streams.write(row, row_of[k] * length, seqlens[k], row_seqlens[k]);
    }
  });
  CPPO_CHECK(fits, kOp, "cu_seqlens and row_cu_seqlens must be those of the masks");
  std::vector<Tensor> gathered;
  for (const Column& column : streams.columns) gathered.push_back(column.out);
  const Tensor targets = gathered.front();
  gathered.erase(gathered.begin());
  return {streams.input_ids, streams.position_ids, streams.rows, targets,
          streams.token_index, streams.target_index, gathered};
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) {
  m.impl("pack_sizes", TORCH_BOX(&pack_sizes));
  m.impl("pack_completions", TORCH_BOX(&pack_completions));
}

}  // namespace
}  // namespace cppo::cpu
