// The kernels of row_kernels.h, in lanes of CPPO_LANE_BYTES. Included by one file per instruction
// set, which defines CPPO_ISA and CPPO_LANE_BYTES.
//
// A row is read once, in blocks. Its terms are measured from a reference, at first the largest
// logit of the first block. Only when a block exceeds it by more than kSlack is the reference
// raised and that block summed again, out of the L1 cache: there is no pass for the maximum. A
// block's sums, in lanes of A, are added in double.
#pragma once

#include "lanes.h"
#include "row_kernels.h"

namespace cppo::cpu::CPPO_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr int64_t kBlock = 1024;  // elements: three rows of fp32 are 12 KiB
constexpr double kSlack = 8.0;    // terms up to e^8: as exact in fp32 as terms up to 1

// The sums of one row so far, relative to its reference.
struct Online {
  double reference = -kInfinity, sum = 0.0, weighted = 0.0;

  bool reaches(double max, double inv_temperature) const {
    return (max - reference) * inv_temperature <= kSlack;
  }

  // Moves the reference; returns what the sums were multiplied by.
  double raise(double to, double inv_temperature) {
    const double shift = (reference - to) * inv_temperature;
    const double factor = reference == -kInfinity ? 0.0 : __builtin_exp(shift);
    weighted = reference == -kInfinity ? 0.0 : factor * (weighted + shift * sum);
    sum *= factor;
    reference = to;
    return factor;
  }

  RowStats stats(double rounding) const {
    // Not one finite logit: there is no distribution. One NaN: neither.
    const double nan = __builtin_nan("");
    if (reference == -kInfinity || weighted != weighted) return {reference, nan, nan};
    return {reference, sum + rounding * weighted, weighted / sum};
  }
};

// From logits to the exponents t of the terms kBase^t, and from t to nats.
template <class A>
struct Scale {
  A per_logit;      // t = (logit - reference) * per_logit
  double nats;      // (logit - reference) / temperature = t * nats
  double rounding;  // nats = kLogBase (1 + rounding): per_logit is rounded, which moves lse by
                    // rounding * E[x]
  explicit Scale(double inv_temperature)
      : per_logit(static_cast<A>(inv_temperature / kLogBase<A>)),
        nats(inv_temperature / static_cast<double>(per_logit)),
        rounding(nats / kLogBase<A> - 1.0) {}
};

template <class E>
struct Row {
  using A = typename E::A;
  using Stored = typename E::Stored;
  static constexpr int kStep = 2 * Vector<A>::kSize;
  const Stored* data;
  int64_t size;

  // Past the end of the row there are logits of -inf.
  Pair<A> at(int64_t i) const {
    const int64_t left = size - i;
    if (left >= kStep) [[likely]] return E::load(data + i);
    Stored some[kStep];
    for (int k = 0; k < kStep; ++k) some[k] = k < left ? data[i + k] : E::from_one(-kInfinity);
    return E::load(some);
  }

  // The largest logit in [begin, end), where all are NaN or -inf the one or the other.
  double max(int64_t begin, int64_t end) const {
    Lanes<A> most = fill<A>(-kInfinity), other = most;
    for (int64_t i = begin; i < end; i += kStep) {
      const Pair<A> x = at(i);
      most = x.first > most ? x.first : most;
      other = x.second > other ? x.second : other;
    }
    const double found = largest<A>(other > most ? other : most);
    if (found == -kInfinity) {
      for (int64_t i = begin; i < end; ++i) {
        if (E::to_one(data[i]) != E::to_one(data[i])) return __builtin_nan("");
      }
    }
    return found;
  }

  void prefetch(int64_t i) const { __builtin_prefetch(data + i); }
};

template <class E>
struct MutableRow {
  typename E::Stored* data;
  int64_t size;

  void put(int64_t i, const Pair<typename E::A>& x) const {
    constexpr int kStep = Row<E>::kStep;
    const int64_t left = size - i;
    if (left >= kStep) [[likely]] {
      E::store(data + i, x);
    } else {
      typename E::Stored some[kStep];
      E::store(some, x);
      for (int k = 0; k < left; ++k) data[i + k] = some[k];
    }
  }
};

template <class E>
Row<E> row_of(const void* data, int64_t size) {
  return {static_cast<const typename E::Stored*>(data), size};
}

template <class E>
MutableRow<E> row_of(void* data, int64_t size) {
  return {static_cast<typename E::Stored*>(data), size};
}

// The terms of a row in one vector: their exponents as they are and lifted, and e = kBase^t.
template <class A>
struct Terms {
  Lanes<A> shifted, t, e;
  Terms(Lanes<A> logits, Lanes<A> reference, A per_logit)
      : shifted((logits - reference) * per_logit), t(lift<A>(shifted)), e(power(t)) {}
};

// The sums of e and e t over one block, and its largest logit.
struct BlockSums {
  double max, sum, weighted;
};

template <class E>
BlockSums sum_block(const Row<E>& row, int64_t begin, int64_t end, double reference,
                    typename E::A per_logit) {
  using A = typename E::A;
  const Lanes<A> origin = fill(static_cast<A>(reference));
  Lanes<A> total{}, weighted{}, most = fill<A>(-kInfinity), other = most;
  for (int64_t i = begin; i < end; i += Row<E>::kStep) {
    row.prefetch(i + kBlock);
    const Pair<A> logits = row.at(i);
    most = logits.first > most ? logits.first : most;
    other = logits.second > other ? logits.second : other;
    const Terms<A> one(logits.first, origin, per_logit), two(logits.second, origin, per_logit);
    total += one.e + two.e;
    weighted += one.e * one.t + two.e * two.t;
  }
  return {largest<A>(other > most ? other : most), sum<A>(total), sum<A>(weighted)};
}

template <class E>
RowStats stats(const void* data, int64_t size, double inv_temperature) {
  using A = typename E::A;
  const Row<E> row = row_of<E>(data, size);
  const Scale<A> scale(inv_temperature);
  Online online;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    if (online.reference == -kInfinity) {
      const double max = row.max(begin, end);
      if (max != max) return {max, max, max};
      if (max == -kInfinity) continue;
      online.reference = max;
    }
    auto block = sum_block(row, begin, end, online.reference, scale.per_logit);
    if (!online.reaches(block.max, inv_temperature)) {
      online.raise(block.max, inv_temperature);
      block = sum_block(row, begin, end, online.reference, scale.per_logit);
    }
    online.sum += block.sum;
    online.weighted += block.weighted * scale.nats;
  }
  return online.stats(scale.rounding);
}

struct ContrastBlock {
  BlockSums views[3];
  double gap;  // sum of e_a (t_n - t_p)
};

// A row that is -inf so far has only terms e^-inf, whatever they are measured from.
double origin_of(const Online& online) {
  return online.reference == -kInfinity ? 0.0 : online.reference;
}

template <class E>
ContrastBlock sum_block(const Row<E> (&views)[3], int64_t begin, int64_t end,
                        const Online (&online)[3], typename E::A per_logit) {
  using A = typename E::A;
  Lanes<A> origin[3], total[3] = {}, weighted[3] = {}, most[3], gaps{};
  for (int v = 0; v < 3; ++v) {
    most[v] = fill<A>(-kInfinity);
    origin[v] = fill(static_cast<A>(origin_of(online[v])));
  }
  for (int64_t i = begin; i < end; i += Row<E>::kStep) {
    const Pair<A> anchor = views[0].at(i), positive = views[1].at(i), negative = views[2].at(i);
    for (int v = 0; v < 3; ++v) views[v].prefetch(i + kBlock);
    const auto add = [&](Lanes<A> a, Lanes<A> p, Lanes<A> n) {
      const Terms<A> of_a(a, origin[0], per_logit), of_p(p, origin[1], per_logit),
          of_n(n, origin[2], per_logit);
      most[0] = a > most[0] ? a : most[0];
      most[1] = p > most[1] ? p : most[1];
      most[2] = n > most[2] ? n : most[2];
      total[0] += of_a.e;
      total[1] += of_p.e;
      total[2] += of_n.e;
      weighted[0] += of_a.e * of_a.t;
      weighted[1] += of_p.e * of_p.t;
      weighted[2] += of_n.e * of_n.t;
      // Where the anchor excludes a token, the other views may too: inf - inf counts nothing.
      gaps += a == -kInfinity ? Lanes<A>{} : of_a.e * (of_n.shifted - of_p.shifted);
    };
    add(anchor.first, positive.first, negative.first);
    add(anchor.second, positive.second, negative.second);
  }
  ContrastBlock block;
  for (int v = 0; v < 3; ++v) {
    block.views[v] = {largest<A>(most[v]), sum<A>(total[v]), sum<A>(weighted[v])};
  }
  block.gap = sum<A>(gaps);
  return block;
}

// Three rows at once. The gap is measured from the references too: where all logits are far from
// zero, xn - xp keeps the digits that n - p has lost.
struct OnlineContrast {
  Online online[3];
  double gap = 0.0;

  void raise(int v, double to, double inv_temperature) {
    const double moved = (to - origin_of(online[v])) * inv_temperature;
    const double factor = online[v].raise(to, inv_temperature);
    if (v == 0) gap *= factor;
    if (v == 1) gap += moved * online[0].sum;
    if (v == 2) gap -= moved * online[0].sum;
  }
};

template <class E>
void contrast_stats(const ConstRows& rows, int64_t size, double inv_temperature, RowStats out[3],
                    double* gap_mean) {
  using A = typename E::A;
  const Row<E> views[3] = {row_of<E>(rows.anchor, size), row_of<E>(rows.positive, size),
                           row_of<E>(rows.negative, size)};
  const Scale<A> scale(inv_temperature);
  OnlineContrast so_far;
  Online(&online)[3] = so_far.online;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    for (int v = 0; v < 3; ++v) {
      if (online[v].reference != -kInfinity) continue;
      const double max = views[v].max(begin, end);
      if (max != max) online[v].sum = max;  // a NaN, which stays
      if (max > -kInfinity) so_far.raise(v, max, inv_temperature);
    }
    auto block = sum_block(views, begin, end, online, scale.per_logit);
    bool again = false;
    for (int v = 0; v < 3; ++v) {
      if (online[v].reference == -kInfinity) continue;
      if (online[v].reaches(block.views[v].max, inv_temperature)) continue;
      so_far.raise(v, block.views[v].max, inv_temperature);
      again = true;
    }
    if (again) block = sum_block(views, begin, end, online, scale.per_logit);
    for (int v = 0; v < 3; ++v) {
      online[v].sum += block.views[v].sum;
      online[v].weighted += block.views[v].weighted * scale.nats;
    }
    so_far.gap += block.gap * scale.nats;
  }
  for (int v = 0; v < 3; ++v) out[v] = online[v].stats(scale.rounding);
  *gap_mean = so_far.gap / online[0].sum;
}

template <class E>
void gradient(const void* data, void* out, int64_t size, double inv_temperature,
              const RowGradient& gradient) {
  using A = typename E::A;
  const Row<E> row = row_of<E>(data, size);
  const MutableRow<E> to = row_of<E>(out, size);
  const Lanes<A> origin = fill(static_cast<A>(gradient.reference));
  const Scale<A> units(inv_temperature);
  const Lanes<A> scale = fill(static_cast<A>(gradient.scale));
  const Lanes<A> slope = fill(static_cast<A>(gradient.slope * units.nats));
  for (int64_t i = 0; i < size; i += Row<E>::kStep) {
    row.prefetch(i + kBlock);
    const Pair<A> logits = row.at(i);
    const Terms<A> one(logits.first, origin, units.per_logit),
        two(logits.second, origin, units.per_logit);
    to.put(i, {one.e * (slope * one.t + scale), two.e * (slope * two.t + scale)});
  }
}

template <class E>
void contrast_gradient(const ConstRows& rows, const MutableRows& out, int64_t size,
                       double inv_temperature, const ContrastGradient& gradient) {
  using A = typename E::A;
  const Row<E> views[3] = {row_of<E>(rows.anchor, size), row_of<E>(rows.positive, size),
                           row_of<E>(rows.negative, size)};
  const Lanes<A> origin[3] = {fill(static_cast<A>(gradient.anchor.reference)),
                              fill(static_cast<A>(gradient.stats[1].reference)),
                              fill(static_cast<A>(gradient.stats[2].reference))};
  const Lanes<A> push[3] = {fill(static_cast<A>(gradient.push / gradient.stats[0].sum)),
                            fill(static_cast<A>(gradient.push / gradient.stats[1].sum)),
                            fill(static_cast<A>(gradient.push / gradient.stats[2].sum))};
  const Scale<A> units(inv_temperature);
  const A per_logit = units.per_logit;
  const Lanes<A> scale = fill(static_cast<A>(gradient.anchor.scale));
  const Lanes<A> slope = fill(static_cast<A>(gradient.anchor.slope * units.nats));
  const Lanes<A> contrast = fill(static_cast<A>(gradient.contrast * units.nats));
  for (int64_t i = 0; i < size; i += Row<E>::kStep) {
    const Pair<A> anchor = views[0].at(i), positive = views[1].at(i), negative = views[2].at(i);
    for (int v = 0; v < 3; ++v) views[v].prefetch(i + kBlock);
    struct Result {
      Lanes<A> anchor, positive, negative;
    };
    const auto differentiate = [&](Lanes<A> a, Lanes<A> p, Lanes<A> n) -> Result {
      const Terms<A> of_a(a, origin[0], per_logit), of_p(p, origin[1], per_logit),
          of_n(n, origin[2], per_logit);
      const Lanes<A> ratio = of_n.shifted - of_p.shifted;
      const Lanes<A> own = of_a.e * (slope * of_a.t + contrast * ratio + scale);
      const Lanes<A> away = of_a.e * push[0];
      return {a == -kInfinity ? Lanes<A>{} : own, of_p.e * push[1] - away, away - of_n.e * push[2]};
    };
    const Result one = differentiate(anchor.first, positive.first, negative.first);
    const Result two = differentiate(anchor.second, positive.second, negative.second);
    if (out.anchor) row_of<E>(out.anchor, size).put(i, {one.anchor, two.anchor});
    if (out.positive) row_of<E>(out.positive, size).put(i, {one.positive, two.positive});
    if (out.negative) row_of<E>(out.negative, size).put(i, {one.negative, two.negative});
  }
}

template <class E>
double load_one(const void* row, int64_t index) {
  return E::to_one(static_cast<const typename E::Stored*>(row)[index]);
}

template <class E>
void store_one(void* row, int64_t index, double value) {
  static_cast<typename E::Stored*>(row)[index] = E::from_one(value);
}

template <class A>
void power_all(const void* from, void* to, int64_t size) {
  using E = Dense<A>;
  const Row<E> row = row_of<E>(from, size);
  for (int64_t i = 0; i < size; i += Row<E>::kStep) {
    const Pair<A> x = row.at(i);
    row_of<E>(to, size).put(i, {power(lift<A>(x.first)), power(lift<A>(x.second))});
  }
}

template <class E>
constexpr RowKernels table() {
  return {stats<E>,    contrast_stats<E>, gradient<E>, contrast_gradient<E>,
          load_one<E>, store_one<E>,      power_all<typename E::A>};
}

}  // namespace

// In the order of Element.
extern const RowKernels kRowKernels[4] = {table<Float>(), table<Double>(), table<BFloat16>(),
                                          table<Half>()};

}  // namespace cppo::cpu::CPPO_ISA
