// Vectors of LANE_BYTES bytes (GCC and Clang vector extensions), and how logits become them.
//
// Compiled once per instruction set, inside its own namespace and with internal linkage only: a
// function that the linker could share would carry AVX instructions to machines without them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace cppo::cpu::CPPO_ISA {
namespace {

constexpr int kLaneBytes = CPPO_LANE_BYTES;

template <class A>
struct Vector;
template <>
struct Vector<float> {
  static constexpr int kSize = kLaneBytes / 4;
  typedef float type __attribute__((vector_size(kLaneBytes)));
  typedef uint32_t bits __attribute__((vector_size(kLaneBytes)));
};
template <>
struct Vector<double> {
  static constexpr int kSize = kLaneBytes / 8;
  typedef double type __attribute__((vector_size(kLaneBytes)));
};
template <class A>
using Lanes = typename Vector<A>::type;

template <class A>
inline Lanes<A> fill(A value) {
  return Lanes<A>{} + value;
}

// NaN in `x` stays; it is what makes a row of NaN come out as NaN.
template <class A>
inline Lanes<A> at_most(Lanes<A> x, A high) {
  const Lanes<A> bound = fill(high);
#if defined(__x86_64__)
  // One instruction, whose second operand is the result where either is NaN.
  if constexpr (sizeof(A) == 4) {
#if CPPO_LANE_BYTES == 64
    return _mm512_min_ps(bound, x);
#elif CPPO_LANE_BYTES == 32
    return _mm256_min_ps(bound, x);
#else
    return _mm_min_ps(bound, x);
#endif
  }
#endif
  return bound < x ? bound : x;
}

// from - x * y, rounded once. By its instruction: the flags of a compiler only let it contract two
// operations into one (GCC does not below -O2), and what is computed with it would lose its digits
// where it does not. kFused: whether this machine has the instruction.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
inline Lanes<float> minus_product(Lanes<float> from, Lanes<float> x, Lanes<float> y) {
#if CPPO_LANE_BYTES == 64
  return _mm512_fnmadd_ps(x, y, from);
#elif CPPO_LANE_BYTES == 32
  return _mm256_fnmadd_ps(x, y, from);
#elif defined(__x86_64__) && defined(__FMA__)
  return _mm_fnmadd_ps(x, y, from);
#elif defined(__aarch64__)
  return (Lanes<float>)vfmsq_f32((float32x4_t)from, (float32x4_t)x, (float32x4_t)y);
#else
  for (int i = 0; i < Vector<float>::kSize; ++i) from[i] = __builtin_fmaf(-x[i], y[i], from[i]);
  return from;
#endif
}

template <class A>
inline A sum(Lanes<A> x) {
#if CPPO_LANE_BYTES == 64
  // By halves: one addition waits for the one before, at the end of every block.
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps(x);
#endif
  A total = 0;
  for (int i = 0; i < Vector<A>::kSize; ++i) total += x[i];
  return total;
}

template <class A>
inline A largest(Lanes<A> x) {
  A most = x[0];
  for (int i = 1; i < Vector<A>::kSize; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// The terms of a softmax are kBase^-d of depths d: how far a logit lies below what it is measured
// from, times a factor. kBase is 2 in fp32, whose exponents floats have, and log2(e) goes into the
// factor that 1 / temperature takes anyway; e in fp64.
template <class A>
constexpr double kLogBase = sizeof(A) == 4 ? 0.69314718055994531 : 1.0;

// There the term is 0. What is deeper, at infinity too, is lifted to it, so that term * d is 0 and
// not NaN.
template <class A>
inline Lanes<A> lift(Lanes<A> depth) {
  return at_most<A>(depth, sizeof(A) == 4 ? 127.0f : 746.0);
}

// Whether all of many depths are in [0, 127], where `term` takes them as they are. Just these have
// bits that, as unsigned integers, are at most those of 127.
struct Range {
  using Bits = typename Vector<float>::bits;
  Bits most{};

  // By name: with the instructions that GCC 12 chooses the loop around it takes 7 % longer.
  void add(Lanes<float> depth) {
#if CPPO_LANE_BYTES == 64
    most = reinterpret_cast<Bits>(
        _mm512_max_epu32(reinterpret_cast<__m512i>(most), reinterpret_cast<__m512i>(depth)));
#elif CPPO_LANE_BYTES == 32
    most = reinterpret_cast<Bits>(
        _mm256_max_epu32(reinterpret_cast<__m256i>(most), reinterpret_cast<__m256i>(depth)));
#else
    const Bits bits = reinterpret_cast<Bits>(depth);
    most = bits > most ? bits : most;
#endif
  }
  bool holds() const {
    constexpr uint32_t kLast = 0x42fe0000;  // 127.0f
#if CPPO_LANE_BYTES == 64
    return _mm512_reduce_max_epu32(reinterpret_cast<__m512i>(most)) <= kLast;
#else
    for (int i = 0; i < Vector<float>::kSize; ++i) {
      if (most[i] > kLast) return false;
    }
    return true;
#endif
  }
};

// The term of a lifted depth > -128: 2^-n 2^-f, where f is so small that a polynomial gives 2^-f.
// What is added to the depth to round it to n leaves n at the end of the mantissa; from there it
// goes into the exponent. 2^-n of a broken n is one of a few numbers, which a table holds: the finer
// n is, the shorter the polynomial.
#if CPPO_LANE_BYTES == 64
// n in parts of 32. At most 1.9 ulp.
inline Lanes<float> term(Lanes<float> depth) {
  using Bits = typename Vector<float>::bits;
  constexpr float kRound = 393216.0f;  // 1.5 * 2^18
  // The bits of 2^(-k / 32), and the k << 18 that n << 18 takes away too much.
  alignas(kLaneBytes) static constexpr uint32_t kRoots[32] = {
      0x3f800000, 0x3f7e83b3, 0x3f7d257d, 0x3f7be4ba, 0x3f7ac0c7, 0x3f79b907, 0x3f78ccdf, 0x3f77fbb8,
      0x3f7744fd, 0x3f76a81e, 0x3f76248c, 0x3f75b9be, 0x3f75672a, 0x3f752c4d, 0x3f7508a4, 0x3f74fbaf,
      0x3f7504f3, 0x3f7523f6, 0x3f75583f, 0x3f75a15b, 0x3f75fed7, 0x3f767043, 0x3f76f532, 0x3f778d3a,
      0x3f7837f0, 0x3f78f4f0, 0x3f79c3d3, 0x3f7aa43a, 0x3f7b95c2, 0x3f7c980f, 0x3f7daac3, 0x3f7ecd87};
  const Lanes<float> rounded = depth + kRound;
  const Lanes<float> f = depth - (rounded - kRound);
  const Bits n = reinterpret_cast<Bits>(rounded);
  const Bits root = reinterpret_cast<Bits>(_mm512_permutex2var_epi32(
      _mm512_load_si512(kRoots), reinterpret_cast<__m512i>(n), _mm512_load_si512(kRoots + 16)));
  const Lanes<float> power = reinterpret_cast<Lanes<float>>(root - (n << 18));
  const Lanes<float> p = f * -0.240186915f + 0.693157136f;
  return power - power * f * p;
}
#elif CPPO_LANE_BYTES == 32
// n in eighths. At most 1.5 ulp.
inline Lanes<float> term(Lanes<float> depth) {
  using Bits = typename Vector<float>::bits;
  constexpr float kRound = 1572864.0f;  // 1.5 * 2^20
  // The bits of 2^(-k / 8), and the k << 20 that n << 20 takes away too much.
  alignas(kLaneBytes) static constexpr uint32_t kRoots[8] = {
      0x3f800000, 0x3f7ac0c7, 0x3f7744fd, 0x3f75672a, 0x3f7504f3, 0x3f75fed7, 0x3f7837f0, 0x3f7b95c2};
  const Lanes<float> rounded = depth + kRound;
  const Lanes<float> f = depth - (rounded - kRound);
  const Bits n = reinterpret_cast<Bits>(rounded);
  const Bits root = reinterpret_cast<Bits>(_mm256_permutevar8x32_epi32(
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kRoots)), reinterpret_cast<__m256i>(n)));
  const Lanes<float> power = reinterpret_cast<Lanes<float>>(root - (n << 20));
  const Lanes<float> p = (f * 0.0555334501f - 0.240256861f) * f + 0.693147123f;
  return power - power * f * p;
}
#else
// Without an instruction that looks up a table: n is an integer. At most 1.3 ulp.
inline Lanes<float> term(Lanes<float> depth) {
  using Bits = typename Vector<float>::bits;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  const Lanes<float> rounded = depth + kRound;
  const Lanes<float> f = (rounded - kRound) - depth;
  Lanes<float> p = f * 0.00015353362f + 0.0013398875f;
  p = p * f + 0.00961843692f;
  p = p * f + 0.0555033237f;
  p = p * f + 0.240226477f;
  p = p * f + 0.693147182f;
  p = p * f + 1.0f;
  return reinterpret_cast<Lanes<float>>(reinterpret_cast<Bits>(p) -
                                        (reinterpret_cast<Bits>(rounded) << 23));
}
#endif

inline Lanes<double> term(Lanes<double> depth) {
  Lanes<double> out;
  for (int i = 0; i < Vector<double>::kSize; ++i) out[i] = __builtin_exp(-depth[i]);
  return out;
}

// A store. Past the caches, where the machine can, a line is written without being read before: a
// third of the traffic of a gradient. `to` is aligned then, and `settle` comes before another
// thread may read.
template <bool kPastCaches, class Lane>
inline void store(void* to, Lane x) {
#if defined(__SSE2__)
  if constexpr (kPastCaches && sizeof x == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(x));
  }
#endif
#if CPPO_LANE_BYTES >= 32
  if constexpr (kPastCaches && sizeof x == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(x));
  }
#endif
#if CPPO_LANE_BYTES == 64
  if constexpr (kPastCaches && sizeof x == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(x));
  }
#endif
  std::memcpy(to, &x, sizeof x);
}

inline void settle() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Elements: how a logit is stored, and the type A in which it is computed with. They come and go
// two vectors at a time: `Pair` says in which order, which is the same for loads and stores.

template <class A>
struct Pair {
  Lanes<A> first, second;
};

template <class T>
struct Dense {
  using Stored = T;
  using A = T;
  static constexpr T kMinusInfinity = -__builtin_inf();
  static Pair<T> load(const T* from) {
    Lanes<T> first, second;
    std::memcpy(&first, from, sizeof first);
    std::memcpy(&second, from + Vector<T>::kSize, sizeof second);
    return {first, second};
  }
  template <bool kPastCaches = false>
  static void put(T* to, const Pair<T>& x) {
    store<kPastCaches>(to, x.first);
    store<kPastCaches>(to + Vector<T>::kSize, x.second);
  }
};
using Float = Dense<float>;
using Double = Dense<double>;

// The elements with even indices, then those with odd ones: the halves of each 32-bit word.
struct BFloat16 {
  using Stored = uint16_t;
  using A = float;
  static constexpr uint16_t kMinusInfinity = 0xff80;
  typedef uint32_t Words __attribute__((vector_size(kLaneBytes)));

  static Pair<float> load(const uint16_t* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    const Words first = words << 16, second = words & 0xffff0000u;
    return {reinterpret_cast<Lanes<float>>(first), reinterpret_cast<Lanes<float>>(second)};
  }
  // The same where there is an element before `from`: read from there on, the even elements lie in
  // the upper halves of the words as they are, which spares the shift.
  static Pair<float> load_inside(const uint16_t* from) {
    Words before, words;
    std::memcpy(&before, from - 1, sizeof before);
    std::memcpy(&words, from, sizeof words);
    const Words first = before & 0xffff0000u, second = words & 0xffff0000u;
    return {reinterpret_cast<Lanes<float>>(first), reinterpret_cast<Lanes<float>>(second)};
  }
  // To the nearest, ties to even, in the upper half of each word. A NaN stays one if its lower half
  // is not more than that of a quiet NaN, zero.
  static Words rounded(Lanes<float> x) {
    const Words bits = reinterpret_cast<Words>(x);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  template <bool kPastCaches = false>
  static void put(uint16_t* to, const Pair<float>& x) {
    const Words words = (rounded(x.first) >> 16) | (rounded(x.second) & 0xffff0000u);
    store<kPastCaches>(to, words);
  }
};

struct Half {
  using Stored = uint16_t;
  using A = float;
  using Bits = Vector<float>::bits;
  static constexpr uint16_t kMinusInfinity = 0xfc00;
  static constexpr int kSize = Vector<float>::kSize;

  static Lanes<float> load_lanes(const uint16_t* from) {
#if CPPO_LANE_BYTES == 64
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif CPPO_LANE_BYTES == 32
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Bits bits;
    for (int i = 0; i < kSize; ++i) bits[i] = from[i];
    const Bits sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    // As an exponent of fp32 it is 112 too small; the product is right for subnormals too.
    const Lanes<float> exact = reinterpret_cast<Lanes<float>>(magnitude) * 0x1p112f;
    const Bits finite = reinterpret_cast<Bits>(exact);
    return reinterpret_cast<Lanes<float>>(
        sign | (magnitude < 0x0f800000u ? finite : magnitude | 0x7f800000u));
#endif
  }
  template <bool kPastCaches>
  static void put_lanes(uint16_t* to, Lanes<float> x) {
#if CPPO_LANE_BYTES == 64
    store<kPastCaches>(to, _mm512_cvtps_ph(x, 0));
#elif CPPO_LANE_BYTES == 32
    store<kPastCaches>(to, _mm256_cvtps_ph(x, 0));
#else
    const Bits bits = reinterpret_cast<Bits>(x), sign = (bits >> 16) & 0x8000u;
    const Bits magnitude = bits & 0x7fffffffu;
    // To the nearest, ties to even. A subnormal: adding 0.5 moves its bits to the end of the
    // mantissa and rounds them.
    const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits small =
        reinterpret_cast<Bits>(reinterpret_cast<Lanes<float>>(magnitude) + 0.5f) - 0x3f000000u;
    const Bits infinite = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
    const Bits finite = magnitude < 0x38800000u ? small : normal;
    const Bits half = sign | (magnitude < 0x47800000u ? finite : infinite);
    for (int i = 0; i < kSize; ++i) to[i] = static_cast<uint16_t>(half[i]);
#endif
  }
  static Pair<float> load(const uint16_t* from) {
    return {load_lanes(from), load_lanes(from + kSize)};
  }
  template <bool kPastCaches = false>
  static void put(uint16_t* to, const Pair<float>& x) {
    put_lanes<kPastCaches>(to, x.first);
    put_lanes<kPastCaches>(to + kSize, x.second);
  }
};

}  // namespace
}  // namespace cppo::cpu::CPPO_ISA
