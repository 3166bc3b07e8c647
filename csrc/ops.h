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

// loss, logps, entropy, perception mask, metrics, number selected, saved statistics, coefficients
using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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
std::tuple<Tensor, Tensor, Tensor> token_stats(Tensor logits, Tensor targets,
                                               std::optional<Tensor> mask, double temperature,
                                               bool inplace);
Tensor token_stats_backward(std::optional<Tensor> grad_logps, std::optional<Tensor> grad_entropy,
                            Tensor logits, Tensor targets, std::optional<Tensor> mask,
                            Tensor saved, double temperature);
void token_stats_backward_(std::optional<Tensor> grad_logps, std::optional<Tensor> grad_entropy,
                           Tensor logits, Tensor targets, std::optional<Tensor> mask, Tensor saved,
                           double temperature);
Tensor perception_mask(Tensor anchor_entropy, Tensor negative_entropy, double fraction,
                       std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens);
LossOutputs cppo_loss(Tensor anchor, std::optional<Tensor> positive, std::optional<Tensor> negative,
                      Tensor targets, Tensor advantages, std::optional<Tensor> old_logps,
                      std::optional<Tensor> ref_logps, std::optional<Tensor> mask,
                      std::optional<Tensor> cu_seqlens, std::optional<Tensor> num_items,
                      double temperature, double clip_low, double clip_high,
                      std::optional<double> dual_clip, std::string importance,
                      std::string reduction, std::optional<int64_t> max_length, double kl_coef,
                      std::optional<double> kl_clamp, double entropy_coef, double cpl_coef,
                      std::string divergence, double tau, double fraction, bool gating,
                      bool detach_anchor, std::string cpl_reduction,
                      bool inplace);
std::tuple<Tensor, Tensor, Tensor> loss_terms(
    Tensor logps, Tensor entropy, std::optional<Tensor> positive_logps,
    std::optional<Tensor> negative_logps, std::optional<Tensor> margin, Tensor selected,
    Tensor advantages, std::optional<Tensor> old_logps, std::optional<Tensor> ref_logps,
    Tensor cu_seqlens, double policy_denominator, double contrast_denominator, double temperature,
    double clip_low, double clip_high, std::optional<double> dual_clip, std::string importance,
    std::string reduction, std::optional<int64_t> max_length, double kl_coef,
    std::optional<double> kl_clamp, double entropy_coef, double cpl_coef, std::string divergence,
    double tau, double fraction, bool gating, bool detach_anchor, std::string cpl_reduction);
std::tuple<Tensor, Tensor, Tensor> cppo_loss_backward(
    Tensor grad_loss, Tensor anchor, std::optional<Tensor> positive, std::optional<Tensor> negative,
    Tensor targets, Tensor advantages, std::optional<Tensor> cu_seqlens, Tensor saved,
    Tensor coefficients, double temperature, std::string divergence, bool gating,
    bool detach_anchor);
void cppo_loss_backward_(Tensor grad_loss, Tensor anchor, std::optional<Tensor> positive,
                         std::optional<Tensor> negative, Tensor targets, Tensor advantages,
                         std::optional<Tensor> cu_seqlens, Tensor saved, Tensor coefficients,
                         double temperature, std::string divergence, bool gating,
                         bool detach_anchor);
// Of the LM head: writes the transpose of a product into a tile.
void place_transposed_(Tensor tile, Tensor product, int64_t first);
// Of the row kernels: their instruction set, and their powers for the error bound.
std::string row_capability();
Tensor row_power(Tensor t);
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
