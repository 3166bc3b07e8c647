// The row kernels for AVX2, FMA and F16C (flags: setup.py).

#if defined(__x86_64__)
#define CPPO_ISA avx2
#define CPPO_LANE_BYTES 32

#include "row_kernels_impl.h"
#endif
