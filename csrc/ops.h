// The compiled ops, one declaration per schema of cppo.cpp and device.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace cppo {

using torch::stable::Tensor;

using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

namespace cpu {
Tensor group_advantages(Tensor rewards, int64_t group_size, std::string scale, double eps);
Tensor prune_completions(Tensor advantages, int64_t unit_size, int64_t keep, std::string prune,
                         bool drop_zero, std::optional<Tensor> noise);
std::tuple<Tensor, Tensor> advantages_and_prune(Tensor rewards, int64_t group_size,
                                                int64_t unit_size, int64_t keep, std::string scale,
                                                double eps, std::string prune, bool drop_zero,
                                                std::optional<Tensor> noise);
Packed pack_completions(Tensor input_ids, Tensor attention_mask, Tensor completion_mask,
                        Tensor kept);
}  // namespace cpu

namespace cuda {
Tensor group_advantages(Tensor rewards, int64_t group_size, std::string scale, double eps);
Tensor prune_completions(Tensor advantages, int64_t unit_size, int64_t keep, std::string prune,
                         bool drop_zero, std::optional<Tensor> noise);
std::tuple<Tensor, Tensor> advantages_and_prune(Tensor rewards, int64_t group_size,
                                                int64_t unit_size, int64_t keep, std::string scale,
                                                double eps, std::string prune, bool drop_zero,
                                                std::optional<Tensor> noise);
}  // namespace cuda

}  // namespace cppo
