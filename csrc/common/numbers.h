// Element types, ordered keys and partial sums of exponentials.
#ifndef GENARM_COMMON_NUMBERS_H_
#define GENARM_COMMON_NUMBERS_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/portability.h"

namespace genarm {

constexpr float kInfinity = INFINITY;
constexpr float kMaxFloat = 3.40282347e+38f;
constexpr float kLog2E = 1.44269504f;
// 2^f on [-1/2, 1/2]: relative error 2e-9 before rounding, least maximum with the first coefficient held at 1.
constexpr float kExp2[7] = {1.0f,           0.693147182f,   0.240226477f,   0.0555033237f,
                            0.00961843692f, 0.00133988739f, 0.000153533634f};
// Adding 1.5 * 2^23 to a float rounds it to an integer, which stands in the low bits of the sum.
constexpr float kRound = 12582912.0f;
constexpr double kLn2 = 0.69314718055994530942;

struct BFloat16 {
  static constexpr uint16_t kMinusInfinity = 0xFF80;
  uint16_t bits;
};
struct Float16 {
  static constexpr uint16_t kMinusInfinity = 0xFC00;
  uint16_t bits;
};

// The lowest finite number of a type. Many models write it where a token is not allowed: it is taken for -inf.
template <class T>
constexpr float kLowest = -kMaxFloat;
template <>
inline constexpr float kLowest<BFloat16> = -0x1.FEp127f;
template <>
inline constexpr float kLowest<Float16> = -65504.0f;

GENARM_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

GENARM_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

GENARM_HD float to_float(float x) { return x; }
GENARM_HD float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
GENARM_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return float_of(sign | 0x7F800000u | rest << 13);  // infinity, NaN
  // Subnormals come out right too: the exponent is moved by an exact multiplication.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
#endif
}

// To the nearest, ties to even; a CPU's alone.
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = bits_of(x), rounded = x != x ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u);
  out->bits = static_cast<uint16_t>(rounded >> 16);
}
inline void from_float(float x, Float16* out) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, size = bits_of(x) & 0x7FFFFFFFu;
  uint32_t bits;
  if (size > 0x7F800000u) {
    bits = 0x7E00u | (size >> 13 & 0x1FFu);
  } else if (size >= 0x477FF000u) {  // 65520, from where the nearest is infinity
    bits = 0x7C00u;
  } else if (size < 0x38800000u) {  // 2^-14: of what is below, adding 1/2 leaves multiples of 2^-24
    bits = bits_of(float_of(size) + 0.5f) - 0x3F000000u;
  } else {
    bits = (size - 0x38000000u + 0xFFFu + (size >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | bits);
}

// Unsigned integers in the order of floats; -0 and +0 are one key. No NaN.
GENARM_HD uint32_t ordered_key(float x) {
  const uint32_t bits = bits_of(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

GENARM_HD float from_ordered_key(uint32_t key) { return float_of(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

// sum * 2^reference: a part of a sum of exponentials.
struct Partial {
  double sum;
  double reference;
};

// What is said of a sum of powers as a log-probability. Sums in float32 are off by up to 6e-7, and cannot tell what is
// nearer to 0 than that, or above it, from 0.
GENARM_HD double log_probability(double x) { return x > -6e-7 ? 0 : x; }

// Adds up partials in the order in which they come.
struct PartialSum {
  double sum = 0, reference = 0;

  GENARM_HD void add(Partial part) {
    if (part.sum == 0) return;
    if (sum == 0) {
      sum = part.sum;
      reference = part.reference;
    } else if (part.reference == reference) {
      sum += part.sum;
    } else if (part.reference > reference) {
      sum = sum * exp2(reference - part.reference) + part.sum;
      reference = part.reference;
    } else {
      sum += part.sum * exp2(part.reference - reference);
    }
  }
  // log of the sum of e^(x - origin), for terms 2^(x scale) with scale = log2(e) in float32: the difference is taken in
  // units of that scale, whose own rounding would count in a logarithm of the sum alone.
  GENARM_HD double log_from(double origin, float scale) const {
    return std::isfinite(sum) ? (reference - origin * scale) * kLn2 + std::log(sum) : NAN;
  }
};

}  // namespace genarm

#endif  // GENARM_COMMON_NUMBERS_H_
