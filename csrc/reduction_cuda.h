// The reduction of a row of logits to its three numbers, on CUDA devices.
//
// Threads walk their slice of the row in batches of four 16-byte vectors. x are the row's entries without the
// target, and `first` and `second` are the largest two. The rest is the sum of exp(x) over all entries but
// one `first`. A thread keeps `first`, `second`, and the sum relative to `second`. In a sum over *all*
// entries of exp(min(x, second) - second), the term of `first` is exactly that of `second`. So it can be
// subtracted. The rest loses no digits for any lead of `first`, and no thread has to search for it. min and
// max work on two 16-bit entries at once. Only the exponentials are in float32.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>

#include "rows_cuda.h"
#include "triplet_cpu.h"

namespace loku {

constexpr int kMaxWarps = 128;  // warps of a cluster
constexpr double kDoubleInfinity = HUGE_VAL;

// The data that the threads of a row exchange, in the shared memory of each block of the row. A stash follows
// it.
struct alignas(16) Shared {
  double rest[kMaxWarps];
  float first[kMaxWarps];
  float second[kMaxWarps];
  int runner_up_id[kMaxWarps];
  double state[OnlineStates::kNumbers];
  float gradient[4];  // gradients of target and runner-up; factor and reference of the others
  int runner_up;      // index of the runner-up's gradient in these columns
};

struct Reduced {
  float first, second;  // entries; -inf without one
  double rest;          // sum over all but `first` of power(unit, x, second)
  int runner_up_id;
};

// Compute 2^(unit * (x - reference)). A reference of -inf is not subtracted.
__device__ __forceinline__ float power(float unit, float x, float reference) {
  return exp2_approximate(unit * (x - fmaxf(reference, -FLT_MAX)));
}

// Merge `first` and `second` of two sets.
__device__ __forceinline__ void merge_largest(float& first, float& second, float other_first,
                                              float other_second) {
  second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
  first = fmaxf(first, other_first);
}

__device__ __forceinline__ void merge_largest_of_warp(float& first, float& second) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    merge_largest(first, second, shuffle_xor(first, mask), shuffle_xor(second, mask));
  }
}

// The numbers of the entries that a thread has met.
struct Partial {
  float first = -HUGE_VALF;
  float second = -HUGE_VALF;
  double rest = 0.0;    // as in Reduced
  int first_batch = 0;  // the earliest batch with `first`
};

template <typename Word>
__device__ __forceinline__ void add_batch(Partial& partial, const Vector (&batch)[kBatch], int batch_begin,
                                          float unit) {
  uint32_t top = Word::kMinusInfinity, next = Word::kMinusInfinity;
#pragma unroll
  for (int v = 0; v < kBatch; ++v) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      next = Word::max(next, Word::min(top, batch[v].word[w]));
      top = Word::max(top, batch[v].word[w]);
    }
  }
  float first = Word::low(top), second = Word::low(next);
  if (RowVectors<Word>::kPerWord == 2) merge_largest(first, second, Word::high(top), Word::high(next));

  const float old_first = partial.first, old_second = partial.second;
  if (first > old_first) partial.first_batch = batch_begin;
  merge_largest(partial.first, partial.second, first, second);
  const float limit = partial.second;

  const uint32_t limits = Word::pack(limit, limit);  // exact, because the limit is an entry
  float sums[kBatch];
#pragma unroll
  for (int v = 0; v < kBatch; ++v) {
    sums[v] = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t x = Word::min_or_nan(batch[v].word[w], limits);
      sums[v] += power(unit, Word::low(x), limit);
      if (RowVectors<Word>::kPerWord == 2) sums[v] += power(unit, Word::high(x), limit);
    }
  }
  // The sum so far omits the former `first`. The new sum must omit the new one. One of the two is among the
  // terms at least as often as it is subtracted, so the sum is never negative.
  const float terms = (sums[0] + sums[1]) + (sums[2] + sums[3]) + power(unit, fminf(old_first, limit), limit);
  partial.rest = partial.rest * power(unit, old_second, limit) + (terms - power(unit, limit, limit));
}

// Return the lowest index of an entry `value` other than the target, in a thread's part of a batch.
template <typename Word>
__device__ __forceinline__ int find_in_batch(const RowVectors<Word>& vectors, int batch_begin, float value,
                                             int target) {
  for (int v = 0; v < kBatch; ++v) {
    const int i = batch_begin + v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (i >= vectors.end) break;
    const Vector vector = vectors.load(i);
#pragma unroll
    for (int j = 0; j < RowVectors<Word>::kWidth; ++j) {
      const uint32_t word = vector.word[j / RowVectors<Word>::kPerWord];
      const float x = j % RowVectors<Word>::kPerWord == 0 ? Word::low(word) : Word::high(word);
      const int index = vectors.entry_of(i) + j;
      if (x == value && index != target) return index;
    }
  }
  return INT_MAX;
}

// Read the row once, by all threads of its cluster, and return the result to each. With kKeep every thread
// stores its vectors in the stash, which has as many vectors as the block's slice. The same thread will take
// them up again.
template <bool kKeep, typename Word>
__device__ __forceinline__ Reduced reduce_row(const RowVectors<Word>& vectors, int target, float unit,
                                              int cluster, int rank, Shared* shared, Vector* stash) {
  const int thread = threadIdx.x, threads = blockDim.x;
  cluster_barrier(cluster);  // after it all blocks of the cluster run, so their shared memory can be reached
  Partial partial;
#pragma unroll 1
  for (int begin = vectors.begin; begin < vectors.end; begin += kBatch * threads) {
    Vector batch[kBatch];
    vectors.load_batch(batch, begin);
#pragma unroll
    for (int v = 0; v < kBatch; ++v) {
      const int i = begin + v * threads + thread;
      if (kKeep && i < vectors.end) stash[i - vectors.begin] = batch[v];
      vectors.replace(batch[v], i, target, Word::kMinusInfinity);
    }
    add_batch<Word>(partial, batch, begin, unit);
  }

  // Each warp sends its two largest entries to all blocks. Then it finds the row's among those of all warps.
  const int lane = thread % 32, warps = threads / 32, all_warps = warps * cluster;
  const int own = rank * warps + thread / 32;
  float first = partial.first, second = partial.second;
  merge_largest_of_warp(first, second);
  if (lane < cluster) {
    Shared* peer = shared_of_block(shared, cluster, lane);
    peer->first[own] = first;
    peer->second[own] = second;
  }
  cluster_barrier(cluster);
  first = second = -HUGE_VALF;
  for (int i = lane; i < all_warps; i += 32) {
    merge_largest(first, second, shared->first[i], shared->second[i]);
  }
  merge_largest_of_warp(first, second);

  // The sums, now relative to the row's second largest, and the index of the largest take the same way. As in
  // a batch, each thread's own largest is an additional term, and the row's largest is subtracted at the end.
  double rest =
      partial.rest * power(unit, partial.second, second) + power(unit, fminf(partial.first, second), second);
  int runner_up_id = INT_MAX;
  if (partial.first == first && first > -HUGE_VALF) {
    runner_up_id = find_in_batch(vectors, partial.first_batch, first, target);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    rest += shuffle_xor(rest, mask);
    runner_up_id = min(runner_up_id, shuffle_xor(runner_up_id, mask));
  }
  if (lane < cluster) {
    Shared* peer = shared_of_block(shared, cluster, lane);
    peer->rest[own] = rest;
    peer->runner_up_id[own] = runner_up_id;
  }
  cluster_barrier(cluster);  // the last access to another block's memory lies before it
  rest = 0.0;
  runner_up_id = INT_MAX;
  for (int i = lane; i < all_warps; i += 32) {
    rest += shared->rest[i];
    runner_up_id = min(runner_up_id, shared->runner_up_id[i]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    rest += shuffle_xor(rest, mask);
    runner_up_id = min(runner_up_id, shuffle_xor(runner_up_id, mask));
  }
  if (runner_up_id == INT_MAX) runner_up_id = target == 0 ? 1 : 0;  // all others are -inf or NaN
  return {first, second, rest - power(unit, second, second), runner_up_id};
}

// Compute the log-sum-exp of the rest. `factor` is the softcap, or 1.
__device__ __forceinline__ double log_of_rest(const Reduced& reduced, double factor) {
  return reduced.rest == 0.0 ? -kDoubleInfinity : factor * reduced.second + log(reduced.rest);
}

}  // namespace loku
