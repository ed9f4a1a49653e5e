// Blocks of the entries of a row of logits, on the CPU: conversion to float, maximum, search, exponentials.
#pragma once

#include <algorithm>
#include <cstdint>

#include "online_triplet.h"
#include "parallel.h"
#include "simd.h"

namespace loku {

// The entries of a block. They stay in the L1 cache between two passes, and their sum is taken in float. The
// sum has at least 4 lanes, so a term is rounded 256 times at most. (Equal terms would all be rounded the
// same way.) Without vectors, that is without OpenMP or with sanitizers, the sum has one lane, and the block
// is shorter.
#if defined(_OPENMP) && !defined(LOKU_NO_TARGET_CLONES)
constexpr int64_t kBlock = 1024;
#else
constexpr int64_t kBlock = 128;
#endif

// The meaning of a stored entry x. Without a softcap it is the logit y. With one it is u = tanh(z / softcap),
// so y = softcap * u and dy/dz = 1 - u^2. Then neither y nor the slope is rounded to the entries' type.
template <bool kSoftcap>
struct Entry {
  float softcap;
  LOKU_INLINE float logit(float x) const { return kSoftcap ? softcap * x : x; }
  LOKU_INLINE double exact_logit(float x) const { return kSoftcap ? double{softcap} * double{x} : x; }
  LOKU_INLINE float slope(float x) const { return kSoftcap ? 1.0f - x * x : 1.0f; }
};

// A block of entries as float. `x` points to the entries themselves, or to their conversion in a buffer.
struct Block {
  const float* x;
  float max;  // the largest logit
};

template <bool kSoftcap>
LOKU_INLINE float max_of(const float* x, int64_t n, Entry<kSoftcap> entry) {
  float maximum = kMinusInfinity;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < n; ++i) maximum = larger(entry.logit(x[i]), maximum);
  return maximum;
}

template <bool kSoftcap, typename T>
LOKU_INLINE Block converted_block(const T* entries, int64_t n, Entry<kSoftcap> entry, float* buffer) {
  float maximum = kMinusInfinity;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < n; ++i) {
    const float x = to_float(entries[i]);
    buffer[i] = x;
    maximum = larger(entry.logit(x), maximum);
  }
  return {buffer, maximum};
}

// Replace entry `index` of the block by -inf, in `buffer`.
template <bool kSoftcap>
LOKU_INLINE void leave_out(int64_t index, Block& block, int64_t n, Entry<kSoftcap> entry, float* buffer) {
  if (block.x != buffer) std::copy_n(block.x, n, buffer);
  buffer[index] = kMinusInfinity;
  block = {buffer, max_of(buffer, n, entry)};
}

template <bool kSoftcap>
LOKU_INLINE int64_t first_index_of(float logit, const float* x, int64_t n, Entry<kSoftcap> entry) {
  constexpr int64_t kStep = 128;  // entries that vectors compare together
  int64_t begin = 0;
  for (; begin + kStep <= n; begin += kStep) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = begin; i < begin + kStep; ++i) found |= entry.logit(x[i]) == logit;
    if (found) break;
  }
  while (entry.logit(x[begin]) != logit) ++begin;
  return begin;
}

// Compute the sum over x of exp(y - reference). With kStore each term, times the softcap's slope, goes to
// `terms`. `ahead` becomes the maximum of the next block's entries, `further`. Beside the exponentials it
// costs nothing.
template <bool kStore, bool kSoftcap>
LOKU_INLINE double sum_exp(const float* x, int64_t n, Entry<kSoftcap> entry, float reference, float* terms,
                           const float* further, int64_t further_n, float& ahead) {
  float sum = 0.0f;
  float maximum = kMinusInfinity;
  const int64_t both = std::min(n, further_n);
#pragma omp simd reduction(+ : sum) reduction(max : maximum)
  for (int64_t i = 0; i < both; ++i) {
    const float term = exp_nonpositive(entry.logit(x[i]) - reference);
    if (kStore) terms[i] = term * entry.slope(x[i]);
    sum += term;
    maximum = larger(entry.logit(further[i]), maximum);
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = both; i < n; ++i) {
    const float term = exp_nonpositive(entry.logit(x[i]) - reference);
    if (kStore) terms[i] = term * entry.slope(x[i]);
    sum += term;
  }
  ahead = maximum;
  return sum;
}

LOKU_INLINE void prefetch(const void* begin, const void* end) {
  for (const char* p = static_cast<const char*>(begin); p < end; p += kCacheLine) LOKU_PREFETCH(p);
}

}  // namespace loku
