// Table of contents of the CUDA kernels; the schemas are in ../cppo.cpp.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(cppo, CUDA, m) {
  m.impl("group_advantages", TORCH_BOX(&cppo::cuda::group_advantages));
  m.impl("prune_completions", TORCH_BOX(&cppo::cuda::prune_completions));
  m.impl("advantages_and_prune", TORCH_BOX(&cppo::cuda::advantages_and_prune));
  m.impl("pack_sizes", TORCH_BOX(&cppo::cuda::pack_sizes));
  m.impl("pack_completions", TORCH_BOX(&cppo::cuda::pack_completions));
  m.impl("unpack", TORCH_BOX(&cppo::cuda::unpack));
  m.impl("gather_tokens", TORCH_BOX(&cppo::cuda::gather_tokens));
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
