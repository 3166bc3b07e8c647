// The sums of a row, or of three at once, in lanes of CPPO_LANE_BYTES.
//
// A row is read once, in blocks. Its terms are measured from a reference, at first the largest
// logit of the first block. A block is summed as if no logit were far above the reference or far
// below it; where one is, it is summed again, out of the L1 cache, with a look at the largest logit
// and the terms of the smallest lifted. A block's sums, in lanes of A, are added in double.
#pragma once

#include "lanes.h"
#include "row_kernels.h"

namespace cppo::cpu::CPPO_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr int64_t kBlock = 2048;  // elements: three rows of fp32 are 24 KiB
constexpr int64_t kAhead = 1024;  // elements from what is read to what is asked for
constexpr double kSlack = 4.0;    // terms up to kBase^4: as exact in A as terms up to 1

// From logits to the depths d of the terms kBase^-d, and from d to nats.
template <class A>
struct Scale {
  double inv_temperature;
  A per_logit;      // d = (reference - logit) * per_logit
  double nats;      // (reference - logit) / temperature = d * nats
  double rounding;  // nats = kLogBase (1 + rounding): per_logit is rounded, which moves lse by
                    // rounding * E[x]
  explicit Scale(double inv_temperature)
      : inv_temperature(inv_temperature),
        per_logit(static_cast<A>(inv_temperature / kLogBase<A>)),
        nats(inv_temperature / static_cast<double>(per_logit)),
        rounding(nats / kLogBase<A> - 1.0) {}
};

// Where depths that one FMA computes, offset - logit * per_logit, are measured from: `above` the
// reference, which is kSlack but for the rounding of the offset. Their terms times `factor` are the
// terms measured from the reference.
struct Origin {
  float offset;
  double above, factor;
  Origin(double reference, float per_logit) {
    const double exact = reference * static_cast<double>(per_logit);
    offset = static_cast<float>(exact + kSlack);
    above = static_cast<double>(offset) - exact;
    factor = __builtin_exp2(above);
  }
};

// The sums of one row so far, relative to its reference.
template <class A>
struct Online {
  double reference = -kInfinity, sum = 0.0, weighted = 0.0;
  Origin in_range{0.0, 1.0f};  // moves with the reference

  // A row that is -inf so far has only terms e^-inf, whatever they are measured from.
  double origin() const { return reference == -kInfinity ? 0.0 : reference; }

  // Moves the reference; returns what the sums were multiplied by.
  double raise(double to, const Scale<A>& scale) {
    const double shift = (reference - to) * scale.inv_temperature;
    const double factor = reference == -kInfinity ? 0.0 : __builtin_exp(shift);
    weighted = reference == -kInfinity ? 0.0 : factor * (weighted + shift * sum);
    sum *= factor;
    reference = to;
    in_range = Origin(to, static_cast<float>(scale.per_logit));
    return factor;
  }

  RowStats stats(double rounding) const {
    // Not one finite logit: there is no distribution. One NaN: neither.
    const double nan = __builtin_nan("");
    if (reference == -kInfinity || weighted != weighted) return {reference, nan, nan};
    return {reference, sum + rounding * weighted, weighted / sum};
  }
};

template <class E>
struct Row {
  using A = typename E::A;
  using Stored = typename E::Stored;
  static constexpr int kStep = 2 * Vector<A>::kSize;
  const Stored* data;
  int64_t size;

  // A step at i that lies in the row. The step after the row's last whole one is `rest`: past the
  // end there are logits of -inf.
  Pair<A> at(int64_t i) const { return E::load(data + i); }
  // The same, where i > 0.
  Pair<A> inside(int64_t i) const {
    if constexpr (requires { E::load_inside(data); }) return E::load_inside(data + i);
    return E::load(data + i);
  }
  Pair<A> rest(int64_t i) const {
    Stored some[kStep];
    for (int k = 0; k < kStep; ++k) some[k] = i + k < size ? data[i + k] : E::kMinusInfinity;
    return E::load(some);
  }

  bool has_nan(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kStep) {
      const Pair<A> x = i + kStep <= size ? at(i) : rest(i);
      for (int k = 0; k < kStep / 2; ++k) {
        if (x.first[k] != x.first[k] || x.second[k] != x.second[k]) return true;
      }
    }
    return false;
  }

  // The largest logit in [begin, end), where all are NaN or -inf the one or the other.
  double max(int64_t begin, int64_t end) const {
    Lanes<A> most = fill<A>(-kInfinity), other = most;
    for (int64_t i = begin; i < end; i += kStep) {
      const Pair<A> x = i + kStep <= size ? at(i) : rest(i);
      most = x.first > most ? x.first : most;
      other = x.second > other ? x.second : other;
    }
    const double found = largest<A>(other > most ? other : most);
    return found > -kInfinity || !has_nan(begin, end) ? found : __builtin_nan("");
  }

  // Asks for what lies ahead. It may lie past the end: a prefetch does not fault.
  void prefetch(int64_t i, int count) const {
    constexpr int kLine = 64 / sizeof(Stored);
    for (int k = 0; k < count; k += kLine) __builtin_prefetch(data + i + kAhead + k);
  }
};

template <class E>
Row<E> row_of(const void* data, int64_t size) {
  return {static_cast<const typename E::Stored*>(data), size};
}

// The terms of a row in one vector: how far below the origin its logits are (the logit is what is
// subtracted, so an instruction may take it from memory), their lifted depths, and
// e = kBase^-depth.
template <class A>
struct Terms {
  Lanes<A> below, depth, e;
  Terms(Lanes<A> logits, Lanes<A> origin, A per_logit)
      : below(origin - logits), depth(lift<A>(below * per_logit)), e(term(depth)) {}
};

// Of one block, for each view: its largest logit and the sums of e and of e d. Of three views, the
// anchor's, the positive's and the negative's, also the sum of e_a (d_p - d_n).
template <int kViews>
struct BlockSums {
  double max[kViews], sum[kViews], deep[kViews], gap = 0.0;
};

template <class E, int kViews>
BlockSums<kViews> sum_block(const Row<E> (&views)[kViews], int64_t begin, int64_t end,
                            const Online<typename E::A> (&online)[kViews],
                            typename E::A per_logit) {
  using A = typename E::A;
  Lanes<A> origin[kViews], total[kViews] = {}, deep[kViews] = {}, most[kViews], gaps{};
  for (int v = 0; v < kViews; ++v) {
    most[v] = fill<A>(-kInfinity);
    origin[v] = fill(static_cast<A>(online[v].origin()));
  }
  for (int64_t i = begin; i < end; i += Row<E>::kStep) {
    Lanes<A> first[kViews], second[kViews];
    for (int v = 0; v < kViews; ++v) {
      const Pair<A> logits = i + Row<E>::kStep <= end ? views[v].at(i) : views[v].rest(i);
      first[v] = logits.first;
      second[v] = logits.second;
    }
    const auto add = [&](const Lanes<A>(&logits)[kViews]) {
      Lanes<A> below[kViews], e[kViews];
      for (int v = 0; v < kViews; ++v) {
        const Terms<A> terms(logits[v], origin[v], per_logit);
        below[v] = terms.below;
        e[v] = terms.e;
        most[v] = logits[v] > most[v] ? logits[v] : most[v];
        total[v] += terms.e;
        deep[v] += terms.e * terms.depth;
      }
      if constexpr (kViews == 3) {
        // Where the anchor excludes a token, the other views may too: inf - inf counts nothing.
        const Lanes<A> none{};
        gaps += e[0] == none ? none : e[0] * (below[1] - below[2]);
      }
    };
    add(first);
    add(second);
  }
  BlockSums<kViews> block;
  for (int v = 0; v < kViews; ++v) {
    block.max[v] = largest<A>(most[v]);
    block.sum[v] = sum<A>(total[v]);
    block.deep[v] = sum<A>(deep[v]);
  }
  block.gap = sum<A>(gaps) * static_cast<double>(per_logit);
  return block;
}

// The same of a whole block but the first, whose depths `term` takes as they are: nothing is
// lifted, and no maximum is looked for. False, and nothing written, where a logit is too far from
// its reference.
//
// Depths are measured from about kSlack above it, which makes one test of the two. They are rounded
// once: rounded twice, logits far from zero would lose their digits.
template <class E, int kViews>
bool sum_block_in_range(const Row<E> (&views)[kViews], int64_t begin,
                        const Online<float> (&online)[kViews], float per_logit,
                        BlockSums<kViews>* block) {
  using Vectors = Lanes<float>;
  Vectors offset[kViews], total[kViews] = {}, deep[kViews] = {}, gaps{};
  for (int v = 0; v < kViews; ++v) offset[v] = fill(online[v].in_range.offset);
  const Vectors factor = fill(per_logit);
  Range range;
  constexpr int kSteps = 4;  // at a time
  for (int64_t i = begin; i < begin + kBlock; i += kSteps * Row<E>::kStep) {
    for (const Row<E>& view : views) view.prefetch(i, kSteps * Row<E>::kStep);
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      Vectors first[kViews], second[kViews];
      for (int v = 0; v < kViews; ++v) {
        const Pair<float> logits = views[v].inside(i + step * Row<E>::kStep);
        first[v] = minus_product(offset[v], logits.first, factor);
        second[v] = minus_product(offset[v], logits.second, factor);
        range.add(first[v]);
        range.add(second[v]);
      }
      const auto add = [&](const Vectors(&depth)[kViews]) {
        Vectors e[kViews];
        for (int v = 0; v < kViews; ++v) {
          e[v] = term(depth[v]);
          total[v] += e[v];
          deep[v] += e[v] * depth[v];
        }
        if constexpr (kViews == 3) gaps += e[0] * (depth[1] - depth[2]);
      };
      add(first);
      add(second);
    }
  }
  if (!range.holds()) return false;
  for (int v = 0; v < kViews; ++v) {
    const Origin& from = online[v].in_range;
    const double of_e = sum<float>(total[v]);
    block->sum[v] = from.factor * of_e;
    block->deep[v] = from.factor * (sum<float>(deep[v]) - from.above * of_e);
  }
  if constexpr (kViews == 3) {
    block->gap = online[0].in_range.factor * sum<float>(gaps) +
                 (online[2].in_range.above - online[1].in_range.above) * block->sum[0];
  }
  return true;
}

// One row, or three at once. The gap is measured from the references too: where all logits are far
// from zero, xn - xp keeps the digits that n - p has lost.
template <class A, int kViews>
struct OnlineViews {
  Online<A> views[kViews];
  double gap = 0.0;

  void raise(int v, double to, const Scale<A>& scale) {
    const double moved = (to - views[v].origin()) * scale.inv_temperature;
    const double factor = views[v].raise(to, scale);
    if (v == 0) gap *= factor;
    if (v == 1) gap += moved * views[0].sum;
    if (v == 2) gap -= moved * views[0].sum;
  }
};

template <class E, int kViews>
OnlineViews<typename E::A, kViews> sum_rows(const Row<E> (&views)[kViews],
                                            const Scale<typename E::A>& scale) {
  const int64_t size = views[0].size;
  OnlineViews<typename E::A, kViews> so_far;
  Online<typename E::A>(&online)[kViews] = so_far.views;
  // Until one block has terms to lift: its row is likely to have more of them.
  [[maybe_unused]] bool in_range = true;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    for (int v = 0; v < kViews; ++v) {
      if (online[v].reference != -kInfinity) continue;
      const double max = views[v].max(begin, end);
      if (max != max) online[v].sum = max;  // a NaN, which stays
      if (max > -kInfinity) so_far.raise(v, max, scale);
    }
    BlockSums<kViews> block;
    bool summed = false, tried = false;
    if constexpr (sizeof(typename E::A) == 4 && kFused) {
      tried = in_range && begin > 0 && end - begin == kBlock;
      summed = tried && sum_block_in_range(views, begin, online, scale.per_logit, &block);
    }
    if (!summed) {
      block = sum_block(views, begin, end, online, scale.per_logit);
      bool raised = false;
      for (int v = 0; v < kViews; ++v) {
        if (online[v].reference == -kInfinity) continue;
        const double above = block.max[v] - online[v].reference;
        if (above * static_cast<double>(scale.per_logit) <= kSlack) continue;
        so_far.raise(v, block.max[v], scale);
        raised = true;
      }
      if (raised) block = sum_block(views, begin, end, online, scale.per_logit);
      if (tried && !raised) in_range = false;
    }
    for (int v = 0; v < kViews; ++v) {
      online[v].sum += block.sum[v];
      online[v].weighted -= block.deep[v] * scale.nats;
    }
    so_far.gap += block.gap * scale.nats;
  }
  return so_far;
}

}  // namespace
}  // namespace cppo::cpu::CPPO_ISA
