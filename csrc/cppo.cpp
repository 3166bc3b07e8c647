// Table of contents of the compiled ops: every schema. Each file registers what it implements.
// The CUDA kernels are in a library of their own, because the CPU build of torch lacks the symbols
// that it needs.
//
// B completions in blocks of group_size (a question) and of unit_size (what is pruned together:
// a question, or the whole batch); `keep` completions of each unit stay.

#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cppo, m) {
  // SCHEMAS of cppo/fused/prune.py, word by word.
  m.def("group_advantages(Tensor rewards, int group_size, str scale, float eps) -> Tensor");
  m.def(
      "prune_completions(Tensor advantages, int unit_size, int keep, str prune, Tensor? score) "
      "-> Tensor");
  m.def(
      "advantages_and_prune(Tensor rewards, int group_size, int unit_size, int keep, str scale, "
      "float eps, str prune, Tensor? score) -> (Tensor, Tensor)");
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
  // What the fused ops are composed of: PRIMITIVES of cppo/fused/schema.py, word by word.
  m.def(
      "token_stats(Tensor logits, Tensor targets, Tensor? mask, Tensor? places, "
      "float temperature, bool inplace) -> (Tensor, Tensor, Tensor)");
  m.def(
      "token_stats_backward(Tensor? grad_logps, Tensor? grad_entropy, Tensor logits, "
      "Tensor targets, Tensor? mask, Tensor? places, Tensor saved, float temperature) -> Tensor");
  m.def(
      "token_stats_backward_(Tensor? grad_logps, Tensor? grad_entropy, Tensor(a!) logits, "
      "Tensor targets, Tensor? mask, Tensor? places, Tensor saved, float temperature) -> ()");
  m.def(
      "perception_mask(Tensor anchor_entropy, Tensor negative_entropy, float fraction, "
      "Tensor? mask, Tensor? cu_seqlens) -> Tensor");
  m.def(
      "contrast(Tensor anchor, Tensor positive, Tensor negative, Tensor mask, "
      "Tensor? positive_places, Tensor? negative_places, float temperature) -> Tensor");
  m.def(
      "contrast_backward(Tensor anchor, Tensor positive, Tensor negative, Tensor targets, "
      "Tensor? positive_places, Tensor? negative_places, Tensor saved, Tensor contrasts, "
      "Tensor coefficients, float temperature, bool detach_anchor) -> (Tensor, Tensor, Tensor)");
  m.def(
      "contrast_backward_(Tensor(a!) anchor, Tensor(b!) positive, Tensor(c!) negative, "
      "Tensor targets, Tensor? positive_places, Tensor? negative_places, Tensor saved, "
      "Tensor contrasts, Tensor coefficients, float temperature, bool detach_anchor) -> ()");
  m.def(
      "loss_terms(Tensor logps, Tensor entropy, Tensor? positive_logps, Tensor? negative_logps, "
      "Tensor? margin, Tensor? selected, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, "
      "Tensor? weights, Tensor? removed_logps, Tensor? mask, Tensor cu_seqlens, "
      "Tensor denominators, str config) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("row_capability() -> str");
}

// `import cppo._C` loads the library, which runs the registrations; there is nothing else.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
