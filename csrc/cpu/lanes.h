// Vectors of LANE_BYTES bytes (GCC and Clang vector extensions), and how logits become them.
//
// Compiled once per instruction set, inside its own namespace and with internal linkage only: a
// function that the linker could share would carry AVX instructions to machines without them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
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
inline Lanes<A> at_least(Lanes<A> x, A low) {
  const Lanes<A> bound = fill(low);
#if defined(__x86_64__)
  // One instruction, whose second operand is the result where either is NaN.
  if constexpr (sizeof(A) == 4) {
#if CPPO_LANE_BYTES == 64
    return _mm512_max_ps(bound, x);
#elif CPPO_LANE_BYTES == 32
    return _mm256_max_ps(bound, x);
#else
    return _mm_max_ps(bound, x);
#endif
  }
#endif
  return bound > x ? bound : x;
}

template <class A>
inline A sum(Lanes<A> x) {
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

// The terms of a softmax are powers of kBase: of 2 in fp32, whose exponents floats have, and log2(e)
// goes into the factor that 1 / temperature takes anyway; of e in fp64.
template <class A>
constexpr double kLogBase = sizeof(A) == 4 ? 0.69314718055994531 : 1.0;

// Here the power is 0. What is less, -inf too, is lifted to it, so that power * t is 0 and not NaN.
template <class A>
inline Lanes<A> lift(Lanes<A> t) {
  return at_least<A>(t, sizeof(A) == 4 ? -127.0f : -746.0);
}

// Whether all of many t are in [-127, 0), where `power` takes them as they are. Just these (and -0)
// have bits that, as signed integers, are at most those of -127; those of every NaN are more.
struct Range {
  typedef int32_t Bits __attribute__((vector_size(kLaneBytes)));
  Bits most = Bits{} + INT32_MIN;

  void add(Lanes<float> t) {
    const Bits bits = reinterpret_cast<Bits>(t);
    most = bits > most ? bits : most;
  }
  bool holds() const {
    constexpr int32_t kLast = static_cast<int32_t>(0xc2fe0000);  // -127.0f
    for (int i = 0; i < Vector<float>::kSize; ++i) {
      if (most[i] > kLast) return false;
    }
    return true;
  }
};

// 2^t for lifted t < 128: 2^n 2^f, where f is so small that a polynomial gives 2^f. What is added to
// t to round it to n leaves n at the end of the mantissa; from there it goes into the exponent.
#if CPPO_LANE_BYTES >= 32
// n in eighths: 2^(n mod 1) is one of eight numbers. At most 1.2 ulp.
inline Lanes<float> power(Lanes<float> t) {
  using Bits = typename Vector<float>::bits;
  constexpr float kRound = 1572864.0f;  // 1.5 * 2^20
  // The bits of 2^(k / 8), less the k << 20 that n << 20 brings along.
  alignas(kLaneBytes) static constexpr uint32_t kRoots[16] = {
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd,
      0x3f7ac0c7, 0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a,
      0x3f7744fd, 0x3f7ac0c7};
  const Lanes<float> rounded = t + kRound;
  const Lanes<float> f = t - (rounded - kRound);
  const Bits n = reinterpret_cast<Bits>(rounded);
#if CPPO_LANE_BYTES == 64
  const Bits root = reinterpret_cast<Bits>(_mm512_permutexvar_epi32(
      reinterpret_cast<__m512i>(n), _mm512_load_si512(kRoots)));
#else
  const Bits root = reinterpret_cast<Bits>(_mm256_permutevar8x32_epi32(
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kRoots)), reinterpret_cast<__m256i>(n)));
#endif
  const Lanes<float> power_of_n = reinterpret_cast<Lanes<float>>(root + (n << 20));
  const Lanes<float> p = (f * 0.0555334501f + 0.240256861f) * f + 0.693147123f;
  return power_of_n * f * p + power_of_n;
}
#else
// Without an instruction that looks up a table: n is an integer. At most 2 ulp.
inline Lanes<float> power(Lanes<float> t) {
  using Bits = typename Vector<float>::bits;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  const Lanes<float> rounded = t + kRound;
  const Lanes<float> f = t - (rounded - kRound);
  Lanes<float> p = f * 1.322570723e-3f + 9.671762586e-3f;
  p = p * f + 5.550892279e-2f;
  p = p * f + 2.402223647e-1f;
  p = p * f + 6.931468248e-1f;
  p = p * f + 1.0f;
  return reinterpret_cast<Lanes<float>>(reinterpret_cast<Bits>(p) +
                                        (reinterpret_cast<Bits>(rounded) << 23));
}
#endif

inline Lanes<double> power(Lanes<double> x) {
  Lanes<double> out;
  for (int i = 0; i < Vector<double>::kSize; ++i) out[i] = __builtin_exp(x[i]);
  return out;
}

// A store. Past the caches, where the machine can, a line is written without being read before: a
// third of the traffic of a gradient. `to` is aligned then, and `settle` comes before another thread
// may read.
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

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T>
struct Dense {
  using Stored = T;
  using A = T;
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
  static T to_one(T x) { return x; }
  static T from_one(double x) { return static_cast<T>(x); }
};
using Float = Dense<float>;
using Double = Dense<double>;

// The elements with even indices, then those with odd ones: the halves of each 32-bit word.
struct BFloat16 {
  using Stored = uint16_t;
  using A = float;
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
  static float to_one(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static uint16_t from_one(double x) {
    const uint32_t bits = as_bits(static_cast<float>(x));
    if (x != x) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Half {
  using Stored = uint16_t;
  using A = float;
  static constexpr int kSize = Vector<float>::kSize;

  static float to_one(uint16_t x) {
    const uint32_t sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // As an exponent of fp32 it is 112 too small; the product is right for subnormals too.
    return as_float(sign | as_bits(as_float(magnitude << 13) * as_float(0x77800000u)));
  }
  static uint16_t from_one(double exact) {
    const float x = static_cast<float>(exact);
    const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
      // A subnormal: adding 0.5 moves its bits to the end of the mantissa and rounds them.
      return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
  }

  static Lanes<float> load_lanes(const uint16_t* from) {
#if CPPO_LANE_BYTES == 64
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif CPPO_LANE_BYTES == 32
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Lanes<float> x;
    for (int i = 0; i < kSize; ++i) x[i] = to_one(from[i]);
    return x;
#endif
  }
  template <bool kPastCaches>
  static void put_lanes(uint16_t* to, Lanes<float> x) {
#if CPPO_LANE_BYTES == 64
    store<kPastCaches>(to, _mm512_cvtps_ph(x, 0));
#elif CPPO_LANE_BYTES == 32
    store<kPastCaches>(to, _mm256_cvtps_ph(x, 0));
#else
    for (int i = 0; i < kSize; ++i) to[i] = from_one(x[i]);
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
