// The statistics of one row of fp32 logits by each instruction set, without torch: what
// tests/test_row_kernels.py compiles with other flags than setup.py's.

#include "cpu/row_kernels.h"

extern "C" void row_stats(const char* capability, const float* row, int64_t size,
                          double inv_temperature, double out[3]) {
  const cppo::cpu::RowKernels* kernels = cppo::cpu::default_isa::kRowKernels;
#if defined(__x86_64__)
  if (capability[3] == '2') kernels = cppo::cpu::avx2::kRowKernels;
  if (capability[3] == '5') kernels = cppo::cpu::avx512::kRowKernels;
#endif
  const cppo::cpu::RowStats stats = kernels[0].stats(row, size, inv_temperature);
  out[0] = stats.reference;
  out[1] = stats.sum;
  out[2] = stats.mean;
}
