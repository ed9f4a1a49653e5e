// What the row loops are made of: loads and stores of the three logit types as float, and an
// exponential that the compiler vectorises. Everything here is inlined into functions that are
// compiled once per instruction set (LOKU_TARGET_CLONES), so it must stay free of calls.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__) && \
    !defined(LOKU_NO_TARGET_CLONES)
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

// `x`, or `maximum` where x is not above it (or is NaN).
LOKU_INLINE float larger(float x, float maximum) { return x > maximum ? x : maximum; }

LOKU_INLINE float to_float(float x) { return x; }

LOKU_INLINE float to_float(BFloat16 x) { return as_float(uint32_t{x.bits} << 16); }

LOKU_INLINE float to_float(Float16 x) {
  // Shift exponent and mantissa into place and let one multiplication rebias the exponent: that is
  // right for subnormals too. Inf and NaN need their exponent filled up by hand.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const float scaled = as_float(magnitude) * as_float((254u - 15u) << 23);
  const uint32_t special = magnitude >= (31u << 23) ? 0xffu << 23 : 0u;
  return as_float(as_bits(scaled) | special | sign);
}

template <typename T>
T from_float(float x);

template <>
LOKU_INLINE float from_float<float>(float x) {
  return x;
}

template <>
LOKU_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

template <>
LOKU_INLINE Float16 from_float<Float16>(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 aligns the float's last bit with 2^-24 and rounds.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Masks, not branches, or the compiler gives up on vectors.
  const uint32_t is_subnormal = 0u - uint32_t{magnitude < (113u << 23)};
  const uint32_t finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  const uint32_t overflows = 0u - uint32_t{finite > 0x7c00u};
  const uint32_t is_nan = 0u - uint32_t{magnitude > 0x7f800000u};
  const uint32_t half = (finite & ~overflows) | (0x7c00u & overflows) | (0x0200u & is_nan);
  return {static_cast<uint16_t>(half | sign)};
}

// exp(x) for x <= 0 (or a little above) within 2 ulp; 0 below -87, where float has no normal result;
// NaN for NaN. x = (n + r) ln 2, and 2^r by the polynomial of degree 5 with the least relative error
// (1e-7) on |r| <= 1/2 among those that begin with 1.
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

}  // namespace loku
