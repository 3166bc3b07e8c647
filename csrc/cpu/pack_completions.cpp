// Packing and unpacking on the CPU (specification: cppo/reference.py).
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

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "ops.h"

namespace cppo::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "pack_completions";
constexpr int64_t kRowsPerThread = 8;
constexpr int64_t kTokensPerThread = 16384;

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

  Mask(const char* argument, const Tensor& source, const char* like, const Tensor& other)
      : tensor(torch::stable::contiguous(source)), bytes(source.element_size()) {
    check_cpu(kOp, argument, source);
    check_same_shape(kOp, argument, source, like, other);
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

Tensor like(const Tensor& source, std::vector<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(source, size, type);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void iota(int64_t* out, int64_t count, int64_t first) {
  for (int64_t i = 0; i < count; ++i) out[i] = first + i;
}

// A tensor that is taken along: bytes copied from one layout into the other.
struct Column {
  Tensor tensor;
  const char* from;
  char* to;
  int64_t bytes;
};

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
  CPPO_CHECK(is_integer_of(kept, 8), kOp, "kept must be int64");
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
  CPPO_CHECK(is_integer_of(bounds, 4) && bounds.dim() == 1 && bounds.size(0) == num_kept + 1 &&
                 bounds.is_contiguous(),
             kOp, argument, " must be (K+1,) = (", num_kept + 1, ",) int32, contiguous");
  const int32_t* data = static_cast<const int32_t*>(bounds.const_data_ptr());
  bool rises = data[0] == 0 && data[num_kept] == total;
  for (int64_t k = 0; k < num_kept; ++k) rises = rises && data[k] <= data[k + 1];
  CPPO_CHECK(rises, kOp, argument, " must rise from 0 to ", total);
  return data;
}

}  // namespace

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

Packed pack_completions(Tensor input_ids, Tensor attention_mask, Tensor completion_mask,
                        Tensor kept, Tensor cu_seqlens, Tensor row_cu_seqlens,
                        std::vector<Tensor> per_token, int64_t num_tokens, int64_t num_rows) {
  check_dim(kOp, "input_ids", input_ids, 2);
  check_cpu(kOp, "input_ids", input_ids);
  const int64_t id_bytes = input_ids.element_size();
  CPPO_CHECK((id_bytes == 4 || id_bytes == 8) && is_integer_of(input_ids, id_bytes), kOp,
             "input_ids must be int32 or int64");
  const Mask attention("attention_mask", attention_mask, "input_ids", input_ids);
  const Mask completion("completion_mask", completion_mask, "input_ids", input_ids);
  const Tensor kept_rows = checked_kept(kept, input_ids.size(0));
  const int64_t* row_of = static_cast<const int64_t*>(kept_rows.const_data_ptr());
  const int64_t num_kept = kept.size(0), length = input_ids.size(1);
  const int32_t* seqlens = checked_bounds("cu_seqlens", cu_seqlens, num_kept, num_tokens);
  const int32_t* row_seqlens =
      checked_bounds("row_cu_seqlens", row_cu_seqlens, num_kept, num_rows);

  const ScalarType id_type = input_ids.scalar_type();
  const Tensor packed_ids = like(input_ids, {num_tokens}, id_type);
  const Tensor position_ids = like(input_ids, {num_tokens}, ScalarType::Long);
  const Tensor token_index = like(input_ids, {num_tokens}, ScalarType::Long);
  const Tensor rows = like(input_ids, {num_rows}, ScalarType::Long);
  const Tensor target_index = like(input_ids, {num_rows}, ScalarType::Long);
  const Tensor targets = like(input_ids, {num_rows}, id_type);
  // Targets are input ids taken at the response tokens, like every other per-token tensor.
  per_token.insert(per_token.begin(), input_ids);
  std::vector<Column> columns;
  std::vector<Tensor> gathered;
  for (const Tensor& values : per_token) {
    check_cpu(kOp, "per_token", values);
    check_same_shape(kOp, "per_token", values, "input_ids", input_ids);
    const Tensor out =
        columns.empty() ? targets : like(values, {num_rows}, values.scalar_type());
    const Tensor source = torch::stable::contiguous(values);
    columns.push_back({source, static_cast<const char*>(source.const_data_ptr()),
                       data_of<char>(out), static_cast<int64_t>(values.element_size())});
    if (columns.size() > 1) gathered.push_back(out);
  }

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
      const int64_t base = row_of[k] * length, start = seqlens[k];
      int64_t token = start, target = row_seqlens[k];
      Row::runs(row.attended, 0, length, [&](int64_t first, int64_t last) {
        const int64_t count = last - first;
        iota(data_of<int64_t>(position_ids) + token, count, token - start);
        iota(data_of<int64_t>(token_index) + token, count, base + first);
        std::memcpy(data_of<char>(packed_ids) + token * id_bytes,
                    columns[0].from + (base + first) * id_bytes, count * id_bytes);
        Row::runs(row.response, first, last, [&](int64_t from, int64_t to) {
          iota(data_of<int64_t>(rows) + target, to - from, token + from - first - 1);
          iota(data_of<int64_t>(target_index) + target, to - from, base + from);
          for (const Column& column : columns) {
            std::memcpy(column.to + target * column.bytes,
                        column.from + (base + from) * column.bytes, (to - from) * column.bytes);
          }
          target += to - from;
        });
        token += count;
      });
    }
  });
  CPPO_CHECK(fits, kOp, "cu_seqlens and row_cu_seqlens must be those of the masks");
  return {packed_ids, position_ids, rows, targets, token_index, target_index, gathered};
}

namespace {

// Rows [row, row + count) stand at the places [place, place + count).
struct Run {
  int64_t row, place, count;
};

// Where (T,) values stand in (B, L), as runs of neighbours: places rise by one within a response.
struct Places {
  std::vector<Run> runs;
  int64_t num_rows, num_places;
  bool rises = true;  // from first to last, so that a stretch of places is a stretch of runs

  Places(const char* op, const Tensor& target_index, int64_t num_places)
      : num_places(num_places) {
    check_dim(op, "target_index", target_index, 1);
    check_cpu(op, "target_index", target_index);
    CPPO_CHECK(is_integer_of(target_index, 8), op, "target_index must be int64");
    const Tensor contiguous = torch::stable::contiguous(target_index);
    const int64_t* index = static_cast<const int64_t*>(contiguous.const_data_ptr());
    num_rows = target_index.size(0);
    for (int64_t i = 0; i < num_rows; ++i) {
      CPPO_CHECK(index[i] >= 0 && index[i] < num_places, op, "target_index must be in [0, ",
                 num_places, "), got ", index[i], " at ", i);
    }
    for (int64_t first = 0; first < num_rows;) {
      int64_t last = first + 1;
      while (last < num_rows && index[last] == index[last - 1] + 1) ++last;
      const Run run = {first, index[first], last - first};
      rises &= runs.empty() || run.place >= runs.back().place + runs.back().count;
      runs.push_back(run);
      first = last;
    }
  }
};

void copy(const Column& column, int64_t to, int64_t from, int64_t count) {
  std::memcpy(column.to + to * column.bytes, column.from + from * column.bytes,
              count * column.bytes);
}

// Zeros and values in one pass over the places [from, to).
void unpack_stretch(const Column& column, const Places& places, int64_t from, int64_t to) {
  int64_t clean = from;  // everything before it is written
  const auto clear_until = [&](int64_t place) {
    std::memset(column.to + clean * column.bytes, 0, (place - clean) * column.bytes);
  };
  const auto ends_before = [](const Run& run, int64_t place) {
    return run.place + run.count <= place;
  };
  auto run = std::lower_bound(places.runs.begin(), places.runs.end(), from, ends_before);
  for (; run != places.runs.end() && run->place < to; ++run) {
    const int64_t begin = std::max(run->place, from);
    const int64_t end = std::min(run->place + run->count, to);
    clear_until(begin);
    copy(column, begin, run->row + begin - run->place, end - begin);
    clean = end;
  }
  clear_until(to);
}

void unpack_columns(const std::vector<Column>& columns, const Places& places) {
  if (!places.rises) {
    for (const Column& column : columns) {
      std::memset(column.to, 0, places.num_places * column.bytes);
      for (const Run& run : places.runs) copy(column, run.place, run.row, run.count);
    }
    return;
  }
  torch::stable::parallel_for(
      0, places.num_places, kTokensPerThread, [&](int64_t from, int64_t to) {
        for (const Column& column : columns) unpack_stretch(column, places, from, to);
      });
}

Column column_of(const char* op, const Tensor& value, const Tensor& out) {
  check_cpu(op, "values", value);
  const Tensor source = torch::stable::contiguous(value);
  return {source, static_cast<const char*>(source.const_data_ptr()), data_of<char>(out),
          static_cast<int64_t>(value.element_size())};
}

}  // namespace

std::vector<Tensor> unpack(std::vector<Tensor> values, Tensor target_index,
                           int64_t num_completions, int64_t length) {
  const char* op = "unpack";
  const int64_t most = std::numeric_limits<int64_t>::max() / std::max<int64_t>(length, 1);
  CPPO_CHECK(num_completions >= 0 && length >= 0 && num_completions <= most, op,
             "num_completions and length must be sizes, got ", num_completions, " and ", length);
  const Places places(op, target_index, num_completions * length);
  std::vector<Tensor> outputs;
  std::vector<Column> columns;
  for (const Tensor& value : values) {
    check_same_shape(op, "values", value, "target_index", target_index);
    outputs.push_back(like(value, {num_completions, length}, value.scalar_type()));
    columns.push_back(column_of(op, value, outputs.back()));
  }
  unpack_columns(columns, places);
  return outputs;
}

std::vector<Tensor> gather_tokens(std::vector<Tensor> values, Tensor target_index) {
  const char* op = "gather_tokens";
  const Places places(op, target_index, values.empty() ? 0 : values.front().numel());
  std::vector<Tensor> outputs;
  std::vector<Column> columns;
  for (const Tensor& value : values) {
    check_same_shape(op, "values", value, "the first of values", values.front());
    outputs.push_back(like(value, {target_index.size(0)}, value.scalar_type()));
    columns.push_back(column_of(op, value, outputs.back()));
  }
  const int64_t average = places.num_rows / std::max<int64_t>(1, places.runs.size());
  const int64_t runs_per_thread = kTokensPerThread / std::max<int64_t>(1, average);
  torch::stable::parallel_for(
      0, places.runs.size(), std::max<int64_t>(1, runs_per_thread),
      [&](int64_t begin, int64_t end) {
        for (const Column& column : columns) {
          for (int64_t r = begin; r < end; ++r) {
            const Run& run = places.runs[r];
            copy(column, run.row, run.place, run.count);
          }
        }
      });
  return outputs;
}

}  // namespace cppo::cpu
