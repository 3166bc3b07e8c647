// The compiled ops, one declaration per schema of cppo.cpp and device.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace cppo {

using torch::stable::Tensor;

// input_ids, position_ids, rows, targets, token_index, target_index, the per-token tensors
using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

namespace cpu {
Tensor group_advantages(Tensor rewards, int64_t group_size, std::string scale, double eps);
Tensor prune_completions(Tensor advantages, int64_t unit_size, int64_t keep, std::string prune,
                         bool drop_zero, std::optional<Tensor> noise);
std::tuple<Tensor, Tensor> advantages_and_prune(Tensor rewards, int64_t group_size,
                                                int64_t unit_size, int64_t keep, std::string scale,
                                                double eps, std::string prune, bool drop_zero,
                                                std::optional<Tensor> noise);
std::tuple<Tensor, Tensor, Tensor> pack_sizes(Tensor attention_mask, Tensor completion_mask,
                                              Tensor kept);
Packed pack_completions(Tensor input_ids, Tensor attention_mask, Tensor completion_mask,
                        Tensor kept, Tensor cu_seqlens, Tensor row_cu_seqlens,
                        std::vector<Tensor> per_token, int64_t num_tokens, int64_t num_rows);
std::vector<Tensor> unpack(std::vector<Tensor> values, Tensor target_index,
                           int64_t num_completions, int64_t length);
std::vector<Tensor> gather_tokens(std::vector<Tensor> values, Tensor target_index);
}  // namespace cpu

namespace cuda {
Tensor group_advantages(Tensor rewards, int64_t group_size, std::string scale, double eps);
Tensor prune_completions(Tensor advantages, int64_t unit_size, int64_t keep, std::string prune,
                         bool drop_zero, std::optional<Tensor> noise);
std::tuple<Tensor, Tensor> advantages_and_prune(Tensor rewards, int64_t group_size,
                                                int64_t unit_size, int64_t keep, std::string scale,
                                                double eps, std::string prune, bool drop_zero,
                                                std::optional<Tensor> noise);
std::tuple<Tensor, Tensor, Tensor> pack_sizes(Tensor attention_mask, Tensor completion_mask,
                                              Tensor kept);
Packed pack_completions(Tensor input_ids, Tensor attention_mask, Tensor completion_mask,
                        Tensor kept, Tensor cu_seqlens, Tensor row_cu_seqlens,
                        std::vector<Tensor> per_token, int64_t num_tokens, int64_t num_rows);
std::vector<Tensor> unpack(std::vector<Tensor> values, Tensor target_index,
                           int64_t num_completions, int64_t length);
std::vector<Tensor> gather_tokens(std::vector<Tensor> values, Tensor target_index);
}  // namespace cuda

}  // namespace cppo
