// The row kernels for any machine: 16 bytes are what SSE2 and NEON have.

#define CPPO_ISA default_isa
#define CPPO_LANE_BYTES 16

#include "row_kernels_impl.h"
