// Vectors, and the gates' functions on them, for the instruction set that the including source was compiled for.
//
// One text serves every instruction set: the compiler's vector extensions and its contraction of a*b+c into FMA stand
// in for intrinsics. Each source in cpu/isa/ includes the kernels once, under its own namespace, so that the linker can
// never mix code of two instruction sets.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/stored.h"

#if !defined(FASTSEQ_ISA) || !defined(FASTSEQ_VECTOR_BYTES)
#error "include the kernels through one of the sources in cpu/isa/"
#endif

#define FASTSEQ_INLINE inline __attribute__((always_inline))

namespace fastseq::FASTSEQ_ISA {

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  using Int = int32_t;
  static constexpr int kLanes = FASTSEQ_VECTOR_BYTES / 4;
  typedef float Vec __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef int32_t IntVec __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  using Int = int64_t;
  static constexpr int kLanes = FASTSEQ_VECTOR_BYTES / 8;
  typedef double Vec __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef int64_t IntVec __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename Simd<T>::Vec;
template <typename T>
constexpr int kLanes = Simd<T>::kLanes;

template <typename T>
FASTSEQ_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
FASTSEQ_INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}

// The first n lanes; the others read as zero and are not touched in memory. Rows' ends only: a call costs less than
// code at every place.
template <typename T>
__attribute__((noinline)) Vec<T> load_part(const T* p, int n) {
  T lanes[kLanes<T>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <typename T>
__attribute__((noinline)) void store_part(T* p, Vec<T> v, int n) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

template <typename T>
FASTSEQ_INLINE Vec<T> load(const T* p, int n) {
  return n == kLanes<T> ? load(p) : load_part<T>(p, n);
}

template <typename T>
FASTSEQ_INLINE void store(T* p, Vec<T> v, int n) {
  if (n == kLanes<T>)
    store(p, v);
  else
    store_part<T>(p, v, n);
}

// Calls body(c, lanes) for each vector of the columns [first, end), the last of which may be short.
template <typename T, typename Body>
FASTSEQ_INLINE void each_vector(int64_t first, int64_t end, const Body& body) {
  int64_t c = first;
  for (; c + kLanes<T> <= end; c += kLanes<T>) body(c, kLanes<T>);
  if (c < end) body(c, int(end - c));
}

// As many bytes of 32-bit words.
typedef uint32_t Words __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A vector of what may be stored in half precision.
template <typename T, typename Element>
FASTSEQ_INLINE Vec<T> load_as(const Element* p) {
  if constexpr (sizeof(Element) == sizeof(T)) {
    return load(p);
  } else {
    typedef uint16_t Halves __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));
    Halves halves;
    memcpy(&halves, p, sizeof halves);
    Words words = __builtin_convertvector(halves, Words);
    Vec<T> values;
    if constexpr (std::is_same_v<Element, Bfloat16>) {
      words <<= 16;
      memcpy(&values, &words, sizeof values);
    } else {
      // Exponents differ by 112; denormals are whole numbers of 2^-24, and infinities and NaN are set by hand.
      const Words sign = (words & 0x8000u) << 16, magnitude = (words & 0x7fffu) << 13;
      const Vec<T> denormal = __builtin_convertvector(typename Simd<T>::IntVec(words & 0x3ffu), Vec<T>) * 0x1p-24f;
      Words tiny;
      memcpy(&tiny, &denormal, sizeof tiny);
      const Words is_tiny = Words(magnitude < 0x00800000u), special = Words(magnitude >= 0x0f800000u);
      words = (is_tiny & tiny) | (~is_tiny & (magnitude + 0x38000000u));
      words = (special & (magnitude | 0x7f800000u)) | (~special & words) | sign;
      memcpy(&values, &words, sizeof values);
    }
    return values;
  }
}

template <typename T, typename Element>
FASTSEQ_INLINE Vec<T> load_as(const Element* p, int n) {
  if constexpr (sizeof(Element) == sizeof(T)) {
    return load(p, n);
  } else {
    if (n == kLanes<T>) return load_as<T>(p);
    Element lanes[kLanes<T>] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load_as<T>(lanes);
  }
}

// Rounds the first n lanes to the nearest number that can be stored, to even ones in the middle.
template <typename T, typename Element>
FASTSEQ_INLINE void store_as(Element* p, Vec<T> v, int n) {
  if constexpr (sizeof(Element) == sizeof(T)) {
    store(p, v, n);
  } else {
    typedef uint16_t Halves __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));
    Words words;
    memcpy(&words, &v, sizeof words);
    const Words sign = (words >> 16) & 0x8000u, magnitude = words & 0x7fffffffu;
    const Words nan = Words(magnitude > 0x7f800000u);
    if constexpr (std::is_same_v<Element, Bfloat16>) {
      words = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
      words = (nan & 0x7fc0u) | (~nan & words) | sign;
    } else {
      // Adding 1/2 leaves a denormal's bits in the last places, rounded.
      Vec<T> small;
      memcpy(&small, &magnitude, sizeof small);
      small += 0.5f;
      Words tiny;
      memcpy(&tiny, &small, sizeof tiny);
      tiny -= 0x3f000000u;
      const Words rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
      const Words is_tiny = Words(magnitude < 0x38800000u), is_large = Words(magnitude >= 0x477ff000u);
      words = (is_tiny & tiny) | (~is_tiny & rounded);
      words = (is_large & 0x7c00u) | (~is_large & words);
      words = (nan & 0x7e00u) | (~nan & words) | sign;
    }
    const Halves halves = __builtin_convertvector(words, Halves);
    memcpy(p, &halves, n * sizeof(Element));
  }
}

// Calls body with a number of the kind that is stored.
template <typename T, typename Body>
FASTSEQ_INLINE void with_stored(Stored stored, const Body& body) {
  if constexpr (sizeof(T) == 4) {
    if (stored == Stored::kBfloat16) return body(Bfloat16{});
    if (stored == Stored::kFloat16) return body(Float16{});
  }
  body(T{});
}

template <typename T, typename Element>
FASTSEQ_INLINE T value_of(const Element* p) {
  if constexpr (sizeof(Element) == sizeof(T))
    return *p;
  else
    return load_as<T>(p, 1)[0];
}

// Adds halves to halves: a chain of few dependent additions.
template <typename T, int kCount>
FASTSEQ_INLINE T sum_of(const T (&lanes)[kCount]) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    T halves[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) halves[i] = lanes[i] + lanes[i + kCount / 2];
    return sum_of<T, kCount / 2>(halves);
  }
}

template <typename T>
FASTSEQ_INLINE T sum(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  return sum_of<T, kLanes<T>>(lanes);
}

// expm1(x) = 2^n expm1(r) + (2^n - 1) with x = n ln2 + r and |r| <= ln2/2. The polynomial for (expm1(r) - r) / r^2
// interpolates at Chebyshev nodes; its relative error in expm1(r) is in the comment.
template <typename T>
struct Expm1;

template <>
struct Expm1<float> {  // 2.4e-8
  static constexpr float kCoefficients[] = {0.5f, 0.166665768513f, 0.0416665544424f, 0.00836320297204f,
                                            0.00139262134718f};
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723212e-6f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLimit = 87.0f;  // exp stays finite and normal within +-kLimit
};

template <>
struct Expm1<double> {  // 4.1e-17
  static constexpr double kCoefficients[] = {
      0.50000000000000010262,   0.16666666666666667456,    0.041666666666623991516,    0.0083333333333300513464,
      0.0013888888917281793308, 0.00019841269863105968748, 0.000024801521190217727651, 2.7557268378684192873e-6,
      2.7620138719733995569e-7, 2.5100424157005066788e-8};
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLimit = 708.0;
};

// The parts of expm1(x): `scale` = 2^n and `part` = expm1(r). NaN stays NaN in `part`; |x| must be within kLimit.
template <typename T>
FASTSEQ_INLINE void expm1_parts(Vec<T> x, Vec<T>& scale, Vec<T>& part) {
  using C = Expm1<T>;
  using IntVec = typename Simd<T>::IntVec;
  constexpr T kLog2E = T(1.44269504088896340736);
  constexpr int kDegree = sizeof(C::kCoefficients) / sizeof(T) - 1;
  const Vec<T> shifted = x * kLog2E + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  Vec<T> q = C::kCoefficients[kDegree] - Vec<T>{};
  for (int i = kDegree - 1; i >= 0; --i) q = q * r + C::kCoefficients[i];
  part = (r * r) * q + r;
  IntVec bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + typename Simd<T>::Int(C::kBias)) << C::kMantissa;
  memcpy(&scale, &bits, sizeof scale);
}

// The smaller and the larger of two; b where one is NaN. AVX2 has an instruction for each that compilers do not find.
template <typename T>
FASTSEQ_INLINE Vec<T> smaller(Vec<T> a, Vec<T> b) {
#if FASTSEQ_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return _mm256_min_ps(a, b);
  else
    return _mm256_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename T>
FASTSEQ_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#if FASTSEQ_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return _mm256_max_ps(a, b);
  else
    return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

template <typename T>
FASTSEQ_INLINE Vec<T> clamp(Vec<T> x, T limit) {  // NaN passes through
  const Vec<T> high = limit - Vec<T>{};
  return larger<T>(-high, smaller<T>(high, x));
}

// exp(x) for x up to kLimit, within 2 ulp; 0 below -kLimit.
template <typename T>
FASTSEQ_INLINE Vec<T> exp(Vec<T> x) {
  const Vec<T> low = -Expm1<T>::kLimit - Vec<T>{};
  Vec<T> scale, part;
  expm1_parts<T>(larger<T>(low, x), scale, part);
  return x < low ? Vec<T>{} : scale * part + scale;
}

// 2^x = 2^n 2^r with n whole and |r| <= 1/2. The polynomial for (2^r - 1) / r interpolates at Chebyshev nodes, so that
// 2^0 is 1; its relative error in 2^r is in the comment.
template <typename T>
struct Exp2;

template <>
struct Exp2<float> {  // 2.03e-7
  static constexpr float kCoefficients[] = {
      1.0f, 0.69314718056f, 0.24022349038f, 0.055503810138f, 0.00966636851539f, 0.00133813025373f};
  static constexpr float kRound = 12582912.0f + 127.0f;  // leaves n and the exponent's bias in the low bits
  static constexpr float kLeast = -126.0f;
};

template <>
struct Exp2<double> {  // 8.45e-18
  static constexpr double kCoefficients[] = {1.0,
                                             0.69314718055994530942,
                                             0.2402265069591009822,
                                             0.055504108664821594339,
                                             0.0096181291076068885273,
                                             0.001333355814641693531,
                                             0.00015403530441736050155,
                                             0.000015252733829836118394,
                                             1.3215442587921689653e-6,
                                             1.0178062445845773521e-7,
                                             7.0725859492692236999e-9,
                                             4.4549605981865183938e-10};
  static constexpr double kRound = 6755399441055744.0 + 1023.0;
  static constexpr double kLeast = -1022.0;
};

// 2^x for x <= 0, within 3 ulp; below kLeast it is 0, or 2^kLeast where nobody minds.
template <typename T, bool kMayVanish>
FASTSEQ_INLINE Vec<T> exp2(Vec<T> x) {
  using C = Exp2<T>;
  using IntVec = typename Simd<T>::IntVec;
  constexpr int kDegree = sizeof(C::kCoefficients) / sizeof(T) - 1;
  const Vec<T> least = C::kLeast - Vec<T>{}, bounded = larger<T>(least, x);
  const Vec<T> shifted = bounded + C::kRound;
  const Vec<T> r = bounded - (shifted - C::kRound);
  Vec<T> q = C::kCoefficients[kDegree] - Vec<T>{};
  for (int i = kDegree - 1; i >= 0; --i) q = q * r + C::kCoefficients[i];
  IntVec bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits <<= Expm1<T>::kMantissa;
  Vec<T> scale;
  memcpy(&scale, &bits, sizeof scale);
  q *= scale;
  if constexpr (kMayVanish) return x < least ? Vec<T>{} : q;
  return q;
}

// Within 3 ulp of the exact value where that is at least exp(-kLimit).
template <typename T>
FASTSEQ_INLINE Vec<T> sigmoid(Vec<T> x) {
  Vec<T> scale, part;
  expm1_parts<T>(clamp<T>(-x, Expm1<T>::kLimit), scale, part);
  return T(1) / (scale * part + (scale + T(1)));
}

// Within 4 ulp of the exact value, small arguments included: nothing cancels.
template <typename T>
FASTSEQ_INLINE Vec<T> tanh(Vec<T> x) {
  Vec<T> scale, part;
  expm1_parts<T>(clamp<T>(x + x, T(sizeof(T) == 4 ? 20 : 40)), scale, part);
  const Vec<T> e = scale * part + (scale - T(1));
  return e / (e + T(2));
}

// The halves of each word's product with a number.
FASTSEQ_INLINE void multiply_words(Words words, uint32_t by, Words& high, Words& low) {
  typedef uint64_t Pairs __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  // Compilers do not find the instruction that multiplies every other word.
  const auto multiply_even = [by](Pairs pairs) __attribute__((always_inline)) {
#if FASTSEQ_VECTOR_BYTES == 64
    // By the mask, all of them: what GCC has for this without one reads an uninitialised vector, and warns.
    return Pairs(_mm512_maskz_mul_epu32(0xff, __m512i(pairs), _mm512_set1_epi32(int(by))));
#elif FASTSEQ_VECTOR_BYTES == 32
    return Pairs(_mm256_mul_epu32(__m256i(pairs), _mm256_set1_epi32(int(by))));
#else
    return (pairs & 0xffffffffu) * uint64_t(by);
#endif
  };
  constexpr uint64_t kLow = 0xffffffffu;
  const Pairs even = multiply_even(Pairs(words)), odd = multiply_even(Pairs(words) >> 32);
  low = Words((even & kLow) | (odd << 32));
  high = Words((even >> 32) | (odd & ~kLow));
}

// Alternates the lanes of a and b, taken from their first halves or from their second ones.
template <typename T, bool kHigh, std::size_t... I>
FASTSEQ_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (kHigh * kLanes<T> / 2 + I / 2 + I % 2 * kLanes<T>)...);
#else  // GCC before 12
  return Vec<T>{(I % 2 ? b : a)[kHigh * kLanes<T> / 2 + I / 2]...};
#endif
}

// Transposes a square of kLanes x kLanes: as many perfect shuffles of its rows as halvings lead to one row.
template <typename T>
FASTSEQ_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
#if FASTSEQ_VECTOR_BYTES == 32 && __has_builtin(__builtin_shufflevector)
  // AVX2 interleaves within 16 bytes by one instruction, and across them by two more.
  if constexpr (n == 8) {
    Vec<T> pairs[n], fours[n];
    for (int i = 0; i < n; i += 2) {
      pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
      pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < n; i += 4)
      for (int j = 0; j < 2; ++j) {
        fours[i + 2 * j] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        fours[i + 2 * j + 1] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
    for (int i = 0; i < 4; ++i) {
      rows[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      rows[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    return;
  }
#endif
  constexpr auto lanes = std::make_index_sequence<n>{};
  for (int width = n; width > 1; width /= 2) {
    Vec<T> shuffled[n];
    for (int i = 0; i < n / 2; ++i) {
      shuffled[2 * i] = interleave<T, false>(rows[i], rows[i + n / 2], lanes);
      shuffled[2 * i + 1] = interleave<T, true>(rows[i], rows[i + n / 2], lanes);
    }
    for (int i = 0; i < n; ++i) rows[i] = shuffled[i];
  }
}

}  // namespace fastseq::FASTSEQ_ISA
