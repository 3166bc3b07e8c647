// What the CPU computes on one row of V logits, in the instruction set of the machine.
//
// A row is z / temperature. Its reference m is a logit: the largest, or one at most 4 below it in x.
// With x = (z - m) / temperature and s = sum e^x it is described by (m, s, mean = sum e^x x / s),
// from which lse = m / temperature + ln s and H = ln s - mean follow. Sums are shifted by m and
// never by lse: nothing cancels.
#pragma once

#include <cstdint>

namespace cppo::cpu {

enum class Element { kFloat, kDouble, kBFloat16, kHalf };
constexpr int64_t kElementBytes[] = {4, 8, 2, 2};

struct RowStats {
  double reference, sum, mean;
};

// gradient_v = e^x_v (scale + slope x_v), with the row's reference
struct RowGradient {
  double reference, scale, slope;
};

// The gradients of the margin KL(a || p) - KL(a || n), on top of the anchor's own:
//   anchor_v   = e^xa_v (anchor.scale + anchor.slope xa_v + contrast (xn_v - xp_v))
//   positive_v = push (pi_p - pi_a),  negative_v = push (pi_a - pi_n),  pi = e^x / sum
struct ContrastGradient {
  RowGradient anchor;
  double contrast, push;
  RowStats stats[3];
};

// The three rows of the anchor, the positive and the negative view.
struct ConstRows {
  const void *anchor, *positive, *negative;
};
struct MutableRows {
  void *anchor, *positive, *negative;  // null where no gradient is wanted
};

struct RowKernels {
  RowStats (*stats)(const void* row, int64_t size, double inv_temperature);
  // Statistics of three rows in one pass, and E_a[x_n - x_p].
  void (*contrast_stats)(const ConstRows& rows, int64_t size, double inv_temperature,
                         RowStats out[3], double* gap);
  // Gradients may be written in place of the logits. Where they are not, `past_caches` spares
  // reading what is overwritten; who reads them next finds nothing in a cache.
  void (*gradient)(const void* row, void* out, int64_t size, double inv_temperature,
                   const RowGradient& gradient, bool past_caches);
  void (*contrast_gradient)(const ConstRows& rows, const MutableRows& out, int64_t size,
                            double inv_temperature, const ContrastGradient& gradient,
                            bool past_caches);
  // A row of zeros, past the caches.
  void (*clear)(void* row, int64_t size);
};

// Those of the instruction set that is chosen, once per process.
const RowKernels& row_kernels(Element element);

// One table per translation unit that compiles row_kernels_impl.h, indexed by Element.
namespace default_isa {
extern const RowKernels kRowKernels[4];
}
#if defined(__x86_64__)
namespace avx2 {
extern const RowKernels kRowKernels[4];
}
namespace avx512 {
extern const RowKernels kRowKernels[4];
}
#endif

}  // namespace cppo::cpu
