// The arithmetic of the fused row kernel on CUDA devices: the largest entries of a row, the terms that
// replace its entries, and the numbers of its endings.
#pragma once

#include <type_traits>

#include "rows_cuda.h"

namespace loku {

constexpr float kMaskedLogit = 3000.0f;  // with a logit beyond it, masks of -1e10 are in use
constexpr double kLog2E = 1.44269504088896340736;
constexpr float kUnit = static_cast<float>(kLog2E);
constexpr float kUnitLow = static_cast<float>(kLog2E - static_cast<double>(kUnit));
constexpr double kLn2 = 0.69314718055994530942;

// --- the two largest entries ----------------------------------------------------------------------

__device__ __forceinline__ void merge_largest(float& first, float& second, float other_first,
                                              float other_second) {
  second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
  first = fmaxf(first, other_first);
}

// Map the bits of floats to integers in the same order. The function is its own inverse.
__device__ __forceinline__ int ordered(uint32_t bits) {
  const int x = static_cast<int>(bits);
  return x ^ ((x >> 31) & 0x7fffffff);
}

// Merge the two largest entries of each lane into those of the warp.
__device__ __forceinline__ void merge_largest_of_warp(float& first, float& second) {
  const int mine = ordered(as_bits(first)), top = warp_max(mine);
  const int leader = lowest_bit(warp_ballot(mine == top));
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int below = warp_max(lane == leader ? ordered(as_bits(second)) : mine);
  first = as_float(static_cast<uint32_t>(ordered(static_cast<uint32_t>(top))));
  second = as_float(static_cast<uint32_t>(ordered(static_cast<uint32_t>(below))));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Return the lowest index of an entry of the thread that is `first`.
template <typename Word>
__device__ __forceinline__ int lowest_index(const Vector (&x)[kVectors], float first, const Slice<Word>& s,
                                            int own) {
  int found = 0;
#pragma unroll
  for (int j = kVectors - 1; j >= 0; --j) {
    const uint32_t m =
        Word::max(Word::max(x[j].word[0], x[j].word[1]), Word::max(x[j].word[2], x[j].word[3]));
    found = Word::low(m) == first || Word::high(m) == first ? j : found;
  }
  const Vector v = pick(x, found);
  const int entry = s.entry_of(own + 32 * found);
  int index = INT_MAX;
#pragma unroll
  for (int w = 3; w >= 0; --w) {
    if (s.kPerWord == 2) index = Word::high(v.word[w]) == first ? entry + 2 * w + 1 : index;
    index = Word::low(v.word[w]) == first ? entry + s.kPerWord * w : index;
  }
  return index;
}

// --- exponentials ---------------------------------------------------------------------------------

// The function e of a row, in terms of 2: e(x) = 2^(unit (x - second) + shift).
struct Reference {
  float second, shift;
  float offset;  // unit * second - shift, an integer
  bool masked;   // `second` is a mask, so that rounding unit * second would change more than the exponent
};

// A term of float16 gets 15 more in its exponent. Its smallest number is then 2^-39 of the largest, and only
// the last rounding takes digits of a result.
template <typename Word>
__device__ __forceinline__ Reference reference_of(float second, float unit) {
  constexpr float kShift = std::is_same<Word, Float16Word>::value ? 15.0f : 0.0f;
  Reference r = {second, kShift, 0.0f, !(fabsf(unit * second) < kMaskedLogit)};
  if (!r.masked) {
    r.offset = rintf(unit * second) - kShift;
    r.shift = fmaf(unit, second, -r.offset);
  }
  return r;
}

// Replace the entries by their terms e(x), and return the sum of the terms. `clamped` becomes e(second). With
// a softcap the entries become e(u) (1 - u^2). NaN arises there only outside the row.
template <typename Word, bool kCapped, typename Exponential>
__device__ __forceinline__ float replace_by_terms(Vector (&x)[kVectors], const Exponential& exponential) {
  float parts[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto term = [&](float u, float& part) {
    const float e = exponential(u);
    part += e;
    return kCapped ? e * fmaf(-u, u, 1.0f) : e;
  };
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float low = term(Word::low(x[j].word[w]), parts[w]);
      float high = low;
      if (Slice<Word>::kPerWord == 2) high = term(Word::high(x[j].word[w]), parts[w]);
      x[j].word[w] = Word::pack(low, high);
    }
  }
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Compute exp(x - reference) to float32's full precision, also where x is far below the reference. The result
// is 0 for x = -inf.
template <bool kExactDifference>
__device__ __forceinline__ float exp_difference(float x, float reference) {
  const float d = x - reference;
  float low = kUnitLow * d;
  if (!kExactDifference) {  // of entries of float32: what rounding the difference left out
    const float b = d - x;
    low = fmaf(kUnit, (x - (d - b)) - (reference + b), low);
  }
  const float t = kUnit * d;
  low += fmaf(kUnit, d, -t);
  if (!(d > -200.0f)) low = 0.0f;
  const float e = exp2_approximate(t);
  return fmaf(e, low * static_cast<float>(kLn2), e);
}

// --- the endings ----------------------------------------------------------------------------------

struct Results {
  float target, runner_up;  // at these two
  float factor;             // of the terms e(x) elsewhere
};

// Compute scale times the gradient of IHL. `rest` is the sum of the terms. top is at least second.
template <bool kExactDifference>
__device__ __forceinline__ Results inverted_hinge_gradient(float target, float first, const Reference& r,
                                                           float rest, float scale) {
  const float top = fmaxf(target, first);
  const float a = exp_difference<kExactDifference>(target, top);
  const float b = exp_difference<kExactDifference>(first, top);
  const float unit = exp_difference<kExactDifference>(r.second, top) * exp2_approximate(-r.shift);
  const float c = unit * rest;
  const float inverse = reciprocal_approximate(a + b + c);
  const float p0 = a * inverse, p1 = b * inverse, p2 = c * inverse;
  return {scale * (p0 * (2.0f * p1 + p2)), -scale * (p1 * (2.0f * p0 + p2)),
          scale * (p1 - p0) * (unit * inverse)};
}

__device__ __forceinline__ Results rest_probabilities(float rest) {
  return {0.0f, 0.0f, rest == 0.0f ? 0.0f : reciprocal_approximate(rest)};
}

}  // namespace loku
