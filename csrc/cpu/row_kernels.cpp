// Which instruction set the row kernels run in: what this machine has, at most what
// ATEN_CPU_CAPABILITY names.

#include "row_kernels.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include <torch/csrc/stable/library.h>

namespace cppo::cpu {
namespace {

enum class Capability { kDefault, kAvx2, kAvx512 };

Capability machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) return avx512 ? Capability::kAvx512 : Capability::kAvx2;
#endif
  return Capability::kDefault;
}

// PyTorch's own variable limits its kernels; what it is set for holds for these too.
Capability allowed() {
  const char* name = std::getenv("ATEN_CPU_CAPABILITY");
  if (name != nullptr && std::strcmp(name, "default") == 0) return Capability::kDefault;
  if (name != nullptr && std::strcmp(name, "avx2") == 0) return Capability::kAvx2;
  return Capability::kAvx512;
}

Capability capability() {
  static const Capability chosen = machine() < allowed() ? machine() : allowed();
  return chosen;
}

std::string row_capability() {
  static const char* const names[] = {"default", "avx2", "avx512"};
  return names[static_cast<int>(capability())];
}

STABLE_TORCH_LIBRARY_IMPL(cppo, CompositeExplicitAutograd, m) {
  m.impl("row_capability", TORCH_BOX(&row_capability));
}

}  // namespace

const RowKernels& row_kernels(Element element) {
  const int index = static_cast<int>(element);
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) return avx512::kRowKernels[index];
  if (capability() == Capability::kAvx2) return avx2::kRowKernels[index];
#endif
  return default_isa::kRowKernels[index];
}

}  // namespace cppo::cpu
