// Packing and unpacking on CUDA (specification: cppo/reference.py): two small launches for the
// sizes, and one that fills all streams and gathers every per-token tensor.

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "launch.h"
#include "pack_kernels.cuh"

namespace cppo::cuda {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "pack_completions";
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

void check_cuda(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  CPPO_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), op,
             argument, " must be on the device of the other arguments");
}

Tensor empty(const Tensor& like, std::vector<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor checked_mask(const char* argument, const Tensor& mask, const char* like,
                    const Tensor& other) {
  check_cuda(kOp, argument, mask, other);
  check_same_shape(kOp, argument, mask, like, other);
  const ScalarType type = mask.scalar_type();
  CPPO_CHECK(type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Char ||
                 type == ScalarType::Int || type == ScalarType::Long,
             kOp, argument, " must be bool, int32 or int64");
  return torch::stable::contiguous(mask);
}

Tensor checked_kept(const Tensor& kept, const Tensor& other) {
  check_dim(kOp, "kept", kept, 1);
  check_cuda(kOp, "kept", kept, other);
  CPPO_CHECK(kept.scalar_type() == ScalarType::Long, kOp, "kept must be int64");
  CPPO_CHECK(kept.size(0) <= INT32_MAX, kOp, "kept must have at most 2^31 - 1 entries");
  return torch::stable::contiguous(kept);
}

Masks masks_of(const Tensor& attention, const Tensor& completion, const Tensor& kept) {
  Masks masks = {};
  masks.attention = {attention.const_data_ptr(), static_cast<int>(attention.element_size())};
  masks.completion = {completion.const_data_ptr(), static_cast<int>(completion.element_size())};
  masks.kept = static_cast<const int64_t*>(kept.const_data_ptr());
  masks.num_completions = attention.size(0);
  masks.length = attention.size(1);
  masks.num_kept = kept.size(0);
  return masks;
}

void check_bounds(const char* argument, const Tensor& bounds, const Tensor& kept) {
  check_cuda(kOp, argument, bounds, kept);
  CPPO_CHECK(bounds.scalar_type() == ScalarType::Int && bounds.dim() == 1 &&
                 bounds.size(0) == kept.size(0) + 1 && bounds.is_contiguous(),
             kOp, argument, " must be (K+1,) = (", kept.size(0) + 1, ",) int32, contiguous");
}

// Pairs of source and destination, and the contiguous sources for as long as they are read.
struct Moves {
  std::vector<Tensor> sources, outputs;
  Columns columns = {};

  void add(const char* op, const Tensor& from, Tensor to) {
    CPPO_CHECK(columns.count < kMaxColumns, op, "at most ", kMaxColumns,
               " tensors fit one launch");
    sources.push_back(torch::stable::contiguous(from));
    columns.column[columns.count++] = {sources.back().const_data_ptr(), to.mutable_data_ptr(),
                                       static_cast<int>(from.element_size())};
    outputs.push_back(to);
  }
};

template <bool kUnpack>
std::vector<Tensor> moved(const char* op, const Moves& moves, const Tensor& target_index,
                          int64_t num_places) {
  check_dim(op, "target_index", target_index, 1);
  CPPO_CHECK(target_index.scalar_type() == ScalarType::Long, op, "target_index must be int64");
  const Tensor index = torch::stable::contiguous(target_index);
  const int64_t num_rows = index.size(0);
  if (num_rows > 0 && moves.columns.count > 0) {
    const Launch launch(index);
    const int64_t blocks = std::min((num_rows + kThreads - 1) / kThreads, kMaxBlocks);
    move_kernel<kUnpack><<<static_cast<unsigned>(blocks), kThreads, 0, launch.on()>>>(
        static_cast<const int64_t*>(index.const_data_ptr()), num_rows, num_places, moves.columns);
    Launch::check(op);
  }
  return moves.outputs;
}

std::tuple<Tensor, Tensor, Tensor> pack_sizes(Tensor attention_mask, Tensor completion_mask,
                                              Tensor kept) {
  check_dim(kOp, "attention_mask", attention_mask, 2);
  const Tensor attention =
      checked_mask("attention_mask", attention_mask, "attention_mask", attention_mask);
  const Tensor completion =
      checked_mask("completion_mask", completion_mask, "attention_mask", attention_mask);
  const Tensor kept_rows = checked_kept(kept, attention);
  const int64_t num_kept = kept.size(0);
  const Tensor cu_seqlens = empty(attention, {num_kept + 1}, ScalarType::Int);
  const Tensor row_cu_seqlens = empty(attention, {num_kept + 1}, ScalarType::Int);
  const Tensor orphans = empty(attention, {num_kept}, ScalarType::Byte);
  const Tensor sizes = empty(attention, {4}, ScalarType::Long);
  const Launch launch(attention);
  if (num_kept > 0) {
    count_kernel<<<static_cast<unsigned>(num_kept), kThreads, 0, launch.on()>>>(
        masks_of(attention, completion, kept_rows), data_of<int32_t>(cu_seqlens),
        data_of<int32_t>(row_cu_seqlens), data_of<uint8_t>(orphans));
    Launch::check(kOp);
  }
  sum_kernel<<<1, kThreads, 0, launch.on()>>>(num_kept, data_of<int32_t>(cu_seqlens),
                                              data_of<int32_t>(row_cu_seqlens),
                                              data_of<uint8_t>(orphans), data_of<int64_t>(sizes));
  Launch::check(kOp);
  return {cu_seqlens, row_cu_seqlens, sizes};
}

using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

Packed pack_completions(Tensor input_ids, Tensor attention_mask, Tensor completion_mask,
                        Tensor kept, Tensor cu_seqlens, Tensor row_cu_seqlens,
                        std::vector<Tensor> per_token, int64_t num_tokens, int64_t num_rows) {
  check_dim(kOp, "input_ids", input_ids, 2);
  const ScalarType id_type = input_ids.scalar_type();
  CPPO_CHECK(id_type == ScalarType::Int || id_type == ScalarType::Long, kOp,
             "input_ids must be int32 or int64");
  CPPO_CHECK(num_tokens >= 0 && num_tokens <= INT32_MAX && num_rows >= 0, kOp,
             "the packed batch must have fewer than 2^31 tokens, got ", num_tokens);
  const Tensor attention = checked_mask("attention_mask", attention_mask, "input_ids", input_ids);
  const Tensor completion =
      checked_mask("completion_mask", completion_mask, "input_ids", input_ids);
  const Tensor kept_rows = checked_kept(kept, input_ids);
  check_bounds("cu_seqlens", cu_seqlens, kept);
  check_bounds("row_cu_seqlens", row_cu_seqlens, kept);

  const Tensor ids = torch::stable::contiguous(input_ids);
  const Tensor packed_ids = empty(input_ids, {num_tokens}, id_type);
  const Tensor position_ids = empty(input_ids, {num_tokens}, ScalarType::Long);
  const Tensor token_index = empty(input_ids, {num_tokens}, ScalarType::Long);
  const Tensor rows = empty(input_ids, {num_rows}, ScalarType::Long);
  const Tensor target_index = empty(input_ids, {num_rows}, ScalarType::Long);
  const Tensor targets = empty(input_ids, {num_rows}, id_type);
  Moves moves;
  // Targets are input ids taken at the response tokens, like every other per-token tensor.
  moves.add(kOp, ids, targets);
  for (const Tensor& values : per_token) {
    check_cuda(kOp, "per_token", values, input_ids);
    check_same_shape(kOp, "per_token", values, "input_ids", input_ids);
    moves.add(kOp, values, empty(values, {num_rows}, values.scalar_type()));
  }
  if (kept.size(0) > 0) {
    const Launch launch(input_ids);
    const Streams streams = {
        static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
        static_cast<const int32_t*>(row_cu_seqlens.const_data_ptr()),
        data_of<int64_t>(position_ids),
        data_of<int64_t>(rows),
        data_of<int64_t>(token_index),
        data_of<int64_t>(target_index),
        {ids.const_data_ptr(), packed_ids.mutable_data_ptr(), static_cast<int>(ids.element_size())},
    };
    pack_kernel<<<static_cast<unsigned>(kept.size(0)), kThreads, 0, launch.on()>>>(
        masks_of(attention, completion, kept_rows), streams, moves.columns);
    Launch::check(kOp);
  }
  const std::vector<Tensor> gathered(moves.outputs.begin() + 1, moves.outputs.end());
  return {packed_ids, position_ids, rows, targets, token_index, target_index, gathered};
}

std::vector<Tensor> unpack(std::vector<Tensor> values, Tensor target_index,
                           int64_t num_completions, int64_t length) {
  const char* op = "unpack";
  Moves moves;
  for (const Tensor& value : values) {
    check_cuda(op, "values", value, target_index);
    check_same_shape(op, "values", value, "target_index", target_index);
    moves.add(op, value, torch::stable::new_zeros(value, {num_completions, length}));
  }
  return moved<true>(op, moves, target_index, num_completions * length);
}

std::vector<Tensor> gather_tokens(std::vector<Tensor> values, Tensor target_index) {
  const char* op = "gather_tokens";
  Moves moves;
  for (const Tensor& value : values) {
    check_cuda(op, "values", value, target_index);
    check_same_shape(op, "values", value, "the first of values", values.front());
    moves.add(op, value, empty(value, {target_index.size(0)}, value.scalar_type()));
  }
  return moved<false>(op, moves, target_index, values.empty() ? 0 : values.front().numel());
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CUDA, m) {
  m.impl("pack_sizes", TORCH_BOX(&pack_sizes));
  m.impl("pack_completions", TORCH_BOX(&pack_completions));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
}

}  // namespace
}  // namespace cppo::cuda
