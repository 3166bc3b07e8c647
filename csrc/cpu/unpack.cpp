// Unpacking on the CPU (specification: cppo/reference.py).

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "pack.h"

namespace cppo::cpu {
namespace {

constexpr int64_t kTokensPerThread = 16384;

// Rows [row, row + count) stand at the places [place, place + count).
struct Run {
  int64_t row, place, count;
};

// Where (T,) values stand in (B, L), as runs of neighbours: places rise by one within a response.
struct TargetPlaces {
  std::vector<Run> runs;
  int64_t num_rows, num_places;
  bool rises = true;  // from first to last, so that a stretch of places is a stretch of runs

  TargetPlaces(const char* op, const Tensor& target_index, int64_t num_places)
      : num_places(num_places) {
    check_dim(op, "target_index", target_index, 1);
    check_cpu(op, "target_index", target_index);
    CPPO_CHECK(target_index.scalar_type() == ScalarType::Long, op, "target_index must be int64");
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

// Zeros and values in one pass over the places [from, to).
void unpack_stretch(const Column& column, const TargetPlaces& places, int64_t from, int64_t to) {
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
    column.copy(begin, run->row + begin - run->place, end - begin);
    clean = end;
  }
  clear_until(to);
}

void unpack_columns(const std::vector<Column>& columns, const TargetPlaces& places) {
  if (!places.rises) {
    for (const Column& column : columns) {
      std::memset(column.to, 0, places.num_places * column.bytes);
      for (const Run& run : places.runs) column.copy(run.place, run.row, run.count);
    }
    return;
  }
  torch::stable::parallel_for(
      0, places.num_places, kTokensPerThread, [&](int64_t from, int64_t to) {
        for (const Column& column : columns) unpack_stretch(column, places, from, to);
      });
}

std::vector<Tensor> outputs_of(const std::vector<Column>& columns) {
  std::vector<Tensor> outputs;
  for (const Column& column : columns) outputs.push_back(column.out);
  return outputs;
}

std::vector<Tensor> unpack(std::vector<Tensor> values, Tensor target_index,
                           int64_t num_completions, int64_t length) {
  const char* op = "unpack";
  const int64_t most = std::numeric_limits<int64_t>::max() / std::max<int64_t>(length, 1);
  CPPO_CHECK(num_completions >= 0 && length >= 0 && num_completions <= most, op,
             "num_completions and length must be sizes, got ", num_completions, " and ", length);
  const TargetPlaces places(op, target_index, num_completions * length);
  std::vector<Column> columns;
  for (const Tensor& value : values) {
    check_same_shape(op, "values", value, "target_index", target_index);
    columns.emplace_back(op, "values", value,
                         like(value, {num_completions, length}, value.scalar_type()));
  }
  unpack_columns(columns, places);
  return outputs_of(columns);
}

std::vector<Tensor> gather_tokens(std::vector<Tensor> values, Tensor target_index) {
  const char* op = "gather_tokens";
  const TargetPlaces places(op, target_index, values.empty() ? 0 : values.front().numel());
  std::vector<Column> columns;
  for (const Tensor& value : values) {
    check_same_shape(op, "values", value, "the first of values", values.front());
    columns.emplace_back(op, "values", value,
                         like(value, {target_index.size(0)}, value.scalar_type()));
  }
  const int64_t average = places.num_rows / std::max<int64_t>(1, places.runs.size());
  const int64_t runs_per_thread = kTokensPerThread / std::max<int64_t>(1, average);
  torch::stable::parallel_for(
      0, places.runs.size(), std::max<int64_t>(1, runs_per_thread),
      [&](int64_t begin, int64_t end) {
        for (const Column& column : columns) {
          for (int64_t r = begin; r < end; ++r) {
            const Run& run = places.runs[r];
            column.copy(run.row, run.place, run.count);
          }
        }
      });
  return outputs_of(columns);
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) {
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
}

}  // namespace
}  // namespace cppo::cpu
