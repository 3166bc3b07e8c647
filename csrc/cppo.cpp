// Table of contents of the compiled ops: every schema, and who implements it on the CPU.
// The CUDA implementations are listed in cuda/cuda.cpp, in a library of their own, because the
// CPU build of torch lacks the symbols that a CUDA library needs.
//
// B completions in blocks of group_size (a question) and of unit_size (what is pruned together:
// a question, or the whole batch); `keep` completions of each unit stay.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(cppo, m) {
  m.def("group_advantages(Tensor rewards, int group_size, str scale, float eps) -> Tensor");
  m.def(
      "prune_completions(Tensor advantages, int unit_size, int keep, str prune, bool drop_zero, "
      "Tensor? noise) -> Tensor");
  m.def(
      "advantages_and_prune(Tensor rewards, int group_size, int unit_size, int keep, str scale, "
      "float eps, str prune, bool drop_zero, Tensor? noise) -> (Tensor, Tensor)");
  // Sizes first, so that the streams are allocated once: cu_seqlens, row_cu_seqlens, and [tokens,
  // rows, longest, first kept completion whose response has no prompt or -1]. Where the host knows
  // the lengths it needs no pack_sizes.
  m.def(
      "pack_sizes(Tensor attention_mask, Tensor completion_mask, Tensor kept) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "pack_completions(Tensor input_ids, Tensor attention_mask, Tensor completion_mask, "
      "Tensor kept, Tensor cu_seqlens, Tensor row_cu_seqlens, Tensor[] per_token, "
      "SymInt num_tokens, SymInt num_rows) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "unpack(Tensor[] values, Tensor target_index, SymInt num_completions, SymInt length) "
      "-> Tensor[]");
  m.def("gather_tokens(Tensor[] values, Tensor target_index) -> Tensor[]");
  // The same schemas as cppo.ops.library.SCHEMAS, which registers their fakes and autograd.
  m.def(
      "token_stats(Tensor logits, Tensor targets, Tensor? mask, float temperature, bool inplace) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "token_stats_backward(Tensor? grad_logps, Tensor? grad_entropy, Tensor logits, "
      "Tensor targets, Tensor? mask, Tensor saved, float temperature) -> Tensor");
  m.def(
      "token_stats_backward_(Tensor? grad_logps, Tensor? grad_entropy, Tensor(a!) logits, "
      "Tensor targets, Tensor? mask, Tensor saved, float temperature) -> ()");
  m.def(
      "perception_mask(Tensor anchor_entropy, Tensor negative_entropy, float fraction, "
      "Tensor? mask, Tensor? cu_seqlens) -> Tensor");
  m.def(
      "cppo_loss(Tensor anchor, Tensor? positive, Tensor? negative, Tensor targets, "
      "Tensor advantages, Tensor? old_logps, Tensor? ref_logps, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? num_items, float temperature, float clip_low, float clip_high, float? dual_clip, "
      "str importance, str reduction, int? max_length, float kl_coef, float? kl_clamp, "
      "float entropy_coef, float cpl_coef, str divergence, float tau, float fraction, bool gating, "
      "bool detach_anchor, str cpl_reduction, bool inplace) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cppo_loss_backward(Tensor grad_loss, Tensor anchor, Tensor? positive, Tensor? negative, "
      "Tensor targets, Tensor advantages, Tensor? cu_seqlens, Tensor saved, Tensor coefficients, "
      "float temperature, str divergence, bool gating, bool detach_anchor) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "cppo_loss_backward_(Tensor grad_loss, Tensor(a!) anchor, Tensor(b!)? positive, "
      "Tensor(c!)? negative, Tensor targets, Tensor advantages, Tensor? cu_seqlens, Tensor saved, "
      "Tensor coefficients, float temperature, str divergence, bool gating, bool detach_anchor) "
      "-> ()");
  // The loss and its derivatives from statistics that are there already: loss, the metrics of
  // cppo_loss, coefficients. Rows are packed, and all of them count.
  m.def(
      "loss_terms(Tensor logps, Tensor entropy, Tensor? positive_logps, Tensor? negative_logps, "
      "Tensor? margin, Tensor selected, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, "
      "Tensor cu_seqlens, float policy_denominator, float contrast_denominator, "
      "float temperature, float clip_low, float clip_high, float? dual_clip, str importance, "
      "str reduction, int? max_length, float kl_coef, float? kl_clamp, float entropy_coef, "
      "float cpl_coef, "
      "str divergence, float tau, float fraction, bool gating, bool detach_anchor, "
      "str cpl_reduction) -> (Tensor, Tensor, Tensor)");
  // Of the LM head: tile[:, first + j] = product[j, :rows].
  m.def("place_transposed_(Tensor(a!) tile, Tensor product, int first) -> ()");
  m.def("row_capability() -> str");
  m.def("row_power(Tensor t) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CompositeExplicitAutograd, m) {
  m.impl("row_capability", TORCH_BOX(&cppo::cpu::row_capability));
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CPU, m) {
  m.impl("group_advantages", TORCH_BOX(&cppo::cpu::group_advantages));
  m.impl("prune_completions", TORCH_BOX(&cppo::cpu::prune_completions));
  m.impl("advantages_and_prune", TORCH_BOX(&cppo::cpu::advantages_and_prune));
  m.impl("pack_sizes", TORCH_BOX(&cppo::cpu::pack_sizes));
  m.impl("pack_completions", TORCH_BOX(&cppo::cpu::pack_completions));
  m.impl("token_stats", TORCH_BOX(&cppo::cpu::token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&cppo::cpu::token_stats_backward));
  m.impl("token_stats_backward_", TORCH_BOX(&cppo::cpu::token_stats_backward_));
  m.impl("perception_mask", TORCH_BOX(&cppo::cpu::perception_mask));
  m.impl("cppo_loss", TORCH_BOX(&cppo::cpu::cppo_loss));
  m.impl("cppo_loss_backward", TORCH_BOX(&cppo::cpu::cppo_loss_backward));
  m.impl("cppo_loss_backward_", TORCH_BOX(&cppo::cpu::cppo_loss_backward_));
  m.impl("loss_terms", TORCH_BOX(&cppo::cpu::loss_terms));
  m.impl("place_transposed_", TORCH_BOX(&cppo::cpu::place_transposed_));
  m.impl("row_power", TORCH_BOX(&cppo::cpu::row_power));
  m.impl("unpack", TORCH_BOX(&cppo::cpu::unpack));
  m.impl("gather_tokens", TORCH_BOX(&cppo::cpu::gather_tokens));
}

// `import cppo._C` loads the library, which runs the registrations above; there is nothing else.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
