// The elements of the row loops: loads and stores of the three logit types as float, and an exponential that
// the compiler vectorises. All functions are inlined into functions that are compiled once per instruction
// set (LOKU_TARGET_CLONES), so they must contain no calls.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

// GCC 12 is the first that knows these names of instruction sets. An older one compiles the baseline alone.
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__) && \
    defined(__gnu_linux__) && !defined(LOKU_NO_TARGET_CLONES)
#define LOKU_HAS_TARGET_CLONES 1
#define LOKU_TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LOKU_TARGET_CLONES
#endif
#define LOKU_INLINE inline __attribute__((always_inline))
#define LOKU_PREFETCH(address) __builtin_prefetch(address, 0, 2)

namespace loku {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LOKU_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

LOKU_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Return x if it is above `maximum`. Else, and for NaN, return `maximum`.
LOKU_INLINE float larger(float x, float maximum) { return x > maximum ? x : maximum; }

LOKU_INLINE float to_float(float x) { return x; }

LOKU_INLINE float to_float(BFloat16 x) { return as_float(uint32_t{x.bits} << 16); }

LOKU_INLINE float to_float(Float16 x) {
  // Shift exponent and mantissa into place and add the difference of the exponents' biases. A subnormal
  // becomes 2^-14 + itself and loses the 2^-14 again. So no float operand is subnormal, which would be slow.
  // Inf and NaN need their exponent filled with ones.
  constexpr uint32_t kSmallest = 113u << 23;  // 2^-14, the smallest normal number
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const bool subnormal = magnitude < (1u << 23);
  const float shifted = as_float(magnitude + (subnormal ? kSmallest : 112u << 23));
  const float value = shifted - (subnormal ? as_float(kSmallest) : 0.0f);
  const uint32_t special = magnitude >= (31u << 23) ? 0xffu << 23 : 0u;
  return as_float(as_bits(value) | special | sign);
}

// Round to the nearest, ties to even. x must not be NaN, because the check would cost a vector loop a third
// of its time.
template <typename T>
T from_number(float x);

template <>
LOKU_INLINE float from_number<float>(float x) {
  return x;
}

template <>
LOKU_INLINE BFloat16 from_number<BFloat16>(float x) {
  const uint32_t bits = as_bits(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
LOKU_INLINE Float16 from_number<Float16>(float x) {
  const uint32_t bits = as_bits(x);
  // The sum of |x| and 2^13 times the power of two below |x| ends with the ten bits of the mantissa, rounded.
  // That power stays the same from 2^-14 down, so the sum is right for subnormals. Overflow becomes infinity
  // in the first product.
  const float magnitude = as_float(bits & 0x7fffffffu) * as_float((127u + 112u) << 23);
  const uint32_t exponent = bits & 0x7f800000u;
  const uint32_t power = exponent > (113u << 23) ? exponent : 113u << 23;
  const float sum = magnitude * as_float((127u - 110u) << 23) + as_float(power + (15u << 23));
  const uint32_t rounded = as_bits(sum);
  const uint32_t half = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
  return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
}

template <typename T>
LOKU_INLINE T from_float(float x) {
  return x == x ? from_number<T>(x) : T{0x7fff};
}

template <>
LOKU_INLINE float from_float<float>(float x) {
  return x;
}

// Compute exp(x) within 2 ulp, for x <= 0 or a little above. The result is 0 below -87, where float has no
// normal one, and NaN for NaN. With x = (n + r) ln 2, the polynomial of degree 5 approximates 2^r. It has the
// least relative error (1e-7) on |r| <= 1/2 among those that begin with 1.
LOKU_INLINE float exp_nonpositive(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kRound = 12582912.0f + 127.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const float shifted = x * kLog2E + kRound;
  const float r = x * kLog2E - (shifted - kRound);
  float p = 0.00132647272f;
  p = p * r + 0.00967151267f;
  p = p * r + 0.0555073374f;
  p = p * r + 0.240222421f;
  p = p * r + 0.693146978f;
  p = p * r + 1.0f;
  const float power = as_float(as_bits(shifted) << 23);  // 2^n: the last bits of `shifted` are n + 127
  return x < -87.0f ? 0.0f : p * power;
}

// Call body(T{}) for the type T of `dtype`.
template <typename Body>
void for_dtype(DType dtype, const Body& body) {
  for_type_of<float, BFloat16, Float16>(dtype, body);
}

}  // namespace loku
