// The kernels of row_kernels.h, in lanes of CPPO_LANE_BYTES. Included by one file per instruction
// set, which defines CPPO_ISA and CPPO_LANE_BYTES.
#pragma once

#include <initializer_list>

#include "row_kernels.h"
#include "row_sums.h"

namespace cppo::cpu::CPPO_ISA {
namespace {

template <class E>
RowStats stats(const void* data, int64_t size, double inv_temperature) {
  const Row<E> row[1] = {row_of<E>(data, size)};
  const Scale<typename E::A> scale(inv_temperature);
  return sum_rows(row, scale).views[0].stats(scale.rounding);
}

template <class E>
void contrast_stats(const ConstRows& rows, int64_t size, double inv_temperature, RowStats out[3],
                    double* gap_mean) {
  const Row<E> views[3] = {row_of<E>(rows.anchor, size), row_of<E>(rows.positive, size),
                           row_of<E>(rows.negative, size)};
  const Scale<typename E::A> scale(inv_temperature);
  const auto sums = sum_rows(views, scale);
  for (int v = 0; v < 3; ++v) out[v] = sums.views[v].stats(scale.rounding);
  *gap_mean = sums.gap / sums.views[0].sum;
}

template <class E>
struct MutableRow {
  typename E::Stored* data;
  int64_t size;

  void put(int64_t i, const Pair<typename E::A>& x) const { E::put(data + i, x); }
  // Past the caches: the address is aligned.
  void stream(int64_t i, const Pair<typename E::A>& x) const {
    E::template put<true>(data + i, x);
  }
  void put_rest(int64_t i, const Pair<typename E::A>& x) const {
    typename E::Stored some[Row<E>::kStep];
    E::put(some, x);
    for (int64_t k = i; k < size; ++k) data[k] = some[k - i];
  }
};

template <class E>
MutableRow<E> row_of(void* data, int64_t size) {
  return {static_cast<typename E::Stored*>(data), size};
}

constexpr int64_t kNever = -1;

// The first element of a row, or of each of three, whose address is aligned; kNever where they are
// not aligned alike.
template <class E>
int64_t aligned(std::initializer_list<void*> rows) {
  int64_t first = kNever;
  for (void* row : rows) {
    if (row == nullptr) continue;
    const uintptr_t to_next = -reinterpret_cast<uintptr_t>(row) % kLaneBytes;
    const int64_t i = to_next / sizeof(typename E::Stored);
    if (first != kNever && first != i) return kNever;
    first = i;
  }
  return first;
}

// Calls step(i, load, put) at each step of a row; the two are functions of (row, i) and of
// (row, i, pair), others for the step that the end of the row cuts. From `streamed` on, unless it
// is kNever, `put` goes past the caches; what lies before it is part of a step of its own, which
// the next one overlaps.
template <class E, class Step>
void for_each_step(int64_t size, int64_t streamed, const Step& step) {
  constexpr int kStep = Row<E>::kStep;
  const auto load = [](const Row<E>& row, int64_t i) { return row.at(i); };
  const auto put = [](const MutableRow<E>& row, int64_t i, const Pair<typename E::A>& x) {
    row.put(i, x);
  };
  int64_t i = 0;
  if (streamed != kNever && streamed + kStep <= size) {
    const auto stream = [](const MutableRow<E>& row, int64_t i, const Pair<typename E::A>& x) {
      row.stream(i, x);
    };
    if (streamed > 0) step(0, load, put);
    for (i = streamed; i + kStep <= size; i += kStep) step(i, load, stream);
    settle();
  }
  for (; i + kStep <= size; i += kStep) step(i, load, put);
  if (i == size) return;
  step(
      i, [](const Row<E>& row, int64_t i) { return row.rest(i); },
      [](const MutableRow<E>& row, int64_t i, const Pair<typename E::A>& x) {
        row.put_rest(i, x);
      });
}

// Every NaN becomes the one whose bits bf16 keeps when it is rounded.
template <class A>
Lanes<A> coefficient(double x) {
  return fill(static_cast<A>(x == x ? x : __builtin_nan("")));
}

template <class E>
void gradient(const void* data, void* out, int64_t size, double inv_temperature,
              const RowGradient& gradient, bool past_caches) {
  using A = typename E::A;
  const Row<E> row = row_of<E>(data, size);
  const MutableRow<E> to = row_of<E>(out, size);
  const Scale<A> units(inv_temperature);
  const Lanes<A> origin = fill(static_cast<A>(gradient.reference));
  const Lanes<A> scale = coefficient<A>(gradient.scale);
  const Lanes<A> slope = coefficient<A>(-gradient.slope * units.nats);
  const auto write = [&](const auto& factor) {
    const int64_t streamed = past_caches && out != data ? aligned<E>({out}) : kNever;
    for_each_step<E>(size, streamed, [&](int64_t i, const auto& load, const auto& put) {
      row.prefetch(i, Row<E>::kStep);
      const Pair<A> logits = load(row, i);
      const Terms<A> one(logits.first, origin, units.per_logit),
          two(logits.second, origin, units.per_logit);
      put(to, i, {one.e * factor(one.depth), two.e * factor(two.depth)});
    });
  };
  if (gradient.slope == 0.0) {
    write([&](Lanes<A>) { return scale; });
  } else {
    write([&](Lanes<A> depth) { return slope * depth + scale; });
  }
}

template <class E>
void contrast_gradient(const ConstRows& rows, const MutableRows& out, int64_t size,
                       double inv_temperature, const ContrastGradient& gradient, bool past_caches) {
  using A = typename E::A;
  const Row<E> views[3] = {row_of<E>(rows.anchor, size), row_of<E>(rows.positive, size),
                           row_of<E>(rows.negative, size)};
  const Lanes<A> origin[3] = {fill(static_cast<A>(gradient.anchor.reference)),
                              fill(static_cast<A>(gradient.stats[1].reference)),
                              fill(static_cast<A>(gradient.stats[2].reference))};
  const Lanes<A> push[3] = {coefficient<A>(gradient.push / gradient.stats[0].sum),
                            coefficient<A>(gradient.push / gradient.stats[1].sum),
                            coefficient<A>(gradient.push / gradient.stats[2].sum)};
  const Scale<A> units(inv_temperature);
  const A per_logit = units.per_logit;
  const Lanes<A> scale = coefficient<A>(gradient.anchor.scale);
  const Lanes<A> slope = coefficient<A>(-gradient.anchor.slope * units.nats);
  const Lanes<A> contrast = coefficient<A>(gradient.contrast * inv_temperature);
  const bool in_place = out.anchor == rows.anchor || out.positive == rows.positive ||
                        out.negative == rows.negative;
  const int64_t streamed = past_caches && !in_place
                               ? aligned<E>({out.anchor, out.positive, out.negative})
                               : kNever;
  for_each_step<E>(size, streamed, [&](int64_t i, const auto& load, const auto& put) {
    for (int v = 0; v < 3; ++v) views[v].prefetch(i, Row<E>::kStep);
    const Pair<A> anchor = load(views[0], i), positive = load(views[1], i),
                  negative = load(views[2], i);
    struct Result {
      Lanes<A> anchor, positive, negative;
    };
    const auto differentiate = [&](Lanes<A> a, Lanes<A> p, Lanes<A> n) -> Result {
      const Terms<A> of_a(a, origin[0], per_logit), of_p(p, origin[1], per_logit),
          of_n(n, origin[2], per_logit);
      const Lanes<A> apart = of_p.below - of_n.below;
      const Lanes<A> own = of_a.e * (slope * of_a.depth + contrast * apart + scale);
      const Lanes<A> away = of_a.e * push[0], none{};
      return {of_a.e == none ? none : own, of_p.e * push[1] - away, away - of_n.e * push[2]};
    };
    const Result one = differentiate(anchor.first, positive.first, negative.first);
    const Result two = differentiate(anchor.second, positive.second, negative.second);
    if (out.anchor) put(row_of<E>(out.anchor, size), i, {one.anchor, two.anchor});
    if (out.positive) put(row_of<E>(out.positive, size), i, {one.positive, two.positive});
    if (out.negative) put(row_of<E>(out.negative, size), i, {one.negative, two.negative});
  });
}

template <class E>
void clear(void* row, int64_t size) {
  const MutableRow<E> to = row_of<E>(row, size);
  for_each_step<E>(size, aligned<E>({row}), [&](int64_t i, const auto&, const auto& put) {
    put(to, i, Pair<typename E::A>{});
  });
}

template <class E>
constexpr RowKernels table() {
  return {stats<E>, contrast_stats<E>, gradient<E>, contrast_gradient<E>, clear<E>};
}

}  // namespace

// In the order of Element.
extern const RowKernels kRowKernels[4] = {table<Float>(), table<Double>(), table<BFloat16>(),
                                          table<Half>()};

}  // namespace cppo::cpu::CPPO_ISA
