// The row kernels for AVX-512 F, BW, VL and DQ (flags: setup.py).

#if defined(__x86_64__)
#define CPPO_ISA avx512
#define CPPO_LANE_BYTES 64

#include "row_kernels_impl.h"
#endif
