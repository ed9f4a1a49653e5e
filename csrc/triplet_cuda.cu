// Softmax triplet, CUDA kernels: forward, backward, the fused in-place forward and backward, and the scaling
// of what it leaves.
//
// A row belongs to a block, or to a cluster of blocks that take a slice each. Threads walk their slice in
// batches of four 16-byte vectors. Two functions do the work: reduce_row() reads a row once and gives its
// three numbers, write_gradient() reads it again (from shared memory, where the fused kernels keep it) and
// writes the gradient.
//
// The reduction. With x the row's entries, the target's aside, `first` and `second` the largest two, the
// rest is the sum over all but one `first` of exp(x). A thread keeps both, and the sum relative to
// `second`. In a sum over *all* entries of exp(min(x, second) - second) the term of `first` is exactly
// that of `second`: so it can be subtracted, costs the rest no digits however much it leads, and nobody
// has to look for it. min and max work on two 16-bit entries at once; only the exponentials are in float32.
//
// Exponentials are powers of two, 2^(unit * (x - reference)), where unit is log2(e), times the softcap if
// there is one, and the reference is an entry. A fused multiply-add, unit * x - unit * reference, would save
// an instruction and be off by the rounding of the last product, which beyond 1e9 is more than an exponent
// holds: masks of -1e10 and lower are in use.
//
// Beside each kernel are its two floors, bytes and instructions, and a time. All are predictions for an H100:
// memory moves 3.35 TB/s, of which copies reach 3.0; 132 multiprocessors at 1.83 GHz issue 30.9e12
// instructions a second, counted by lanes, and an eighth as many exponentials. Instructions are, roughly,
// those that nvcc makes of the loop for bfloat16. None of the times has been measured.
#include "triplet_cuda.h"

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>

#include "gpu.h"

namespace loku {
namespace {

constexpr int kBatch = 4;  // vectors that a thread loads before it uses the first
// Threads of a block. Four blocks of 256, or two of 512, fill the registers of a multiprocessor and hide each
// other's latencies.
constexpr int kThreads = 256;
constexpr int kKeepingThreads = 512;    // at most, of the fused kernel with rows in shared memory
constexpr int kRereadingThreads = 768;  // of the fused kernel without
constexpr int kMaxCluster = 8;          // the portable limit
constexpr int kMaxWarps = 128;          // of a cluster
constexpr double kLog2E = 1.4426950408889634;
constexpr double kDoubleInfinity = HUGE_VAL;

__device__ __forceinline__ Vector filled(uint32_t word) { return {{word, word, word, word}}; }

// --- rows, in vectors -----------------------------------------------------------------------------

// Where a kernel finds its row, and what all kernels need to know of it.
struct RowLayout {
  unsigned char* data;
  unsigned inner;
  int64_t outer_stride, inner_stride;  // in entries

  template <typename Word>
  __device__ __forceinline__ typename Word::Storage* row(unsigned n) const {
    const unsigned outer = n / inner;
    return reinterpret_cast<typename Word::Storage*>(data) + outer * outer_stride +
           (n - outer * inner) * inner_stride;
  }
};

// The vectors of a row lie on 16-byte boundaries: the first begins up to kWidth - 1 entries before the row,
// the last ends as many after it. Only these two are ever partly outside.
template <typename Word>
struct RowVectors {
  using Storage = typename Word::Storage;
  static constexpr int kWidth = 16 / sizeof(Storage);
  static constexpr int kPerWord = 4 / sizeof(Storage);

  Storage* row;
  int columns;
  int head;        // entries of the first vector that precede the row
  int begin, end;  // the vectors of this block's slice

  __device__ __forceinline__ RowVectors(Storage* row, int columns, int cluster, int rank)
      : row(row),
        columns(columns),
        head(static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Storage))) {
    const int count = (head + columns + kWidth - 1) / kWidth;
    const int share = (count + cluster - 1) / cluster;
    begin = min(rank * share, count);
    end = min(begin + share, count);
  }

  // The index of the first entry of vector i.
  __device__ __forceinline__ int entry_of(int i) const { return i * kWidth - head; }

  // Vector i, with -inf outside the row.
  __device__ __forceinline__ Vector load(int i) const {
    const int entry = entry_of(i);
    if (entry >= 0 && entry + kWidth <= columns) return load_16_bytes(row + entry);
    Vector v = filled(Word::kMinusInfinity);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int lane = 0; lane < kPerWord; ++lane) {
        const int index = entry + w * kPerWord + lane;
        if (index >= 0 && index < columns) set(v.word[w], lane, row[index]);
      }
    }
    return v;
  }

  // This thread's vectors of the batch that starts at `first`: -inf beyond the slice. A batch inside the row
  // has no branch, so its loads are under way together.
  __device__ __forceinline__ void load_batch(Vector (&batch)[kBatch], int first) const {
    const int threads = blockDim.x, thread = threadIdx.x, last = first + kBatch * threads - 1;
    if (last < end && entry_of(first) >= 0 && entry_of(last) + kWidth <= columns) {
#pragma unroll
      for (int v = 0; v < kBatch; ++v) {
        batch[v] = load_16_bytes(row + entry_of(first + v * threads + thread));
      }
      return;
    }
#pragma unroll
    for (int v = 0; v < kBatch; ++v) {
      const int i = first + v * threads + thread;
      batch[v] = i < end ? load(i) : filled(Word::kMinusInfinity);
    }
  }

  // Store vector i to a row that has the same indices, and maybe other 16-byte boundaries.
  __device__ __forceinline__ void store(Storage* out, int i, const Vector& v) const {
    const int entry = entry_of(i);
    if (entry >= 0 && entry + kWidth <= columns && reinterpret_cast<uintptr_t>(out + entry) % 16 == 0) {
      store_16_bytes(out + entry, v);
      return;
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int index = entry + j;
      if (index >= 0 && index < columns) {
        out[index] = static_cast<Storage>(v.word[j / kPerWord] >> (j % kPerWord * 16));
      }
    }
  }

  // Put `bits` in the place of entry `index`, if vector i holds it.
  __device__ __forceinline__ void replace(Vector& v, int i, int index, uint32_t bits) const {
    const unsigned position = static_cast<unsigned>(index - entry_of(i));
    if (position >= static_cast<unsigned>(kWidth)) return;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (position == static_cast<unsigned>(j)) set(v.word[j / kPerWord], j % kPerWord, bits);
    }
  }

  static __device__ __forceinline__ void set(uint32_t& word, int lane, uint32_t bits) {
    if (kPerWord == 1) {
      word = bits;
    } else {
      word = lane == 0 ? (word & 0xffff0000u) | (bits & 0xffffu) : (word & 0xffffu) | (bits << 16);
    }
  }
};

// --- the reduction --------------------------------------------------------------------------------

// What the threads of a row tell each other; in the shared memory of each of its blocks, a stash after it.
struct alignas(16) Shared {
  double rest[kMaxWarps];
  float first[kMaxWarps];
  float second[kMaxWarps];
  int runner_up_id[kMaxWarps];
  double state[OnlineStates::kNumbers];
  float gradient[4];  // of target and runner-up; factor and reference of the others
  int runner_up;      // the index in these columns at which the gradient of the runner-up goes
};

struct Reduced {
  float first, second;  // entries; -inf where there are none
  double rest;          // sum over all but `first` of power(unit, x, second)
  int runner_up_id;
};

// 2^(unit * (x - reference)), where nothing is subtracted from -inf.
__device__ __forceinline__ float power(float unit, float x, float reference) {
  return exp2_approximate(unit * (x - fmaxf(reference, -FLT_MAX)));
}

// `first` and `second` of two sets from those of each.
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

// What a thread knows of the entries it has met.
struct Partial {
  float first = -HUGE_VALF;
  float second = -HUGE_VALF;
  double rest = 0.0;    // as in Reduced
  int first_batch = 0;  // where `first` was met, and if in several batches, the earliest
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

  const uint32_t limits = Word::pack(limit, limit);  // exact: an entry
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
  // The former `first` was left out of the sum so far, the new one is to be. One of the two is among the
  // terms at least as often as it is subtracted, so this is never negative.
  const float terms = (sums[0] + sums[1]) + (sums[2] + sums[3]) + power(unit, fminf(old_first, limit), limit);
  partial.rest = partial.rest * power(unit, old_second, limit) + (terms - power(unit, limit, limit));
}

// The lowest index of an entry `value` in a thread's part of a batch, without the target.
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

// One read of the row by all threads of its cluster; each gets the result. With kKeep every thread leaves in
// the stash (as many vectors as the block's slice) those that it will itself take up again.
template <bool kKeep, typename Word>
__device__ __forceinline__ Reduced reduce_row(const RowVectors<Word>& vectors, int target, float unit,
                                              int cluster, int rank, Shared* shared, Vector* stash) {
  const int thread = threadIdx.x, threads = blockDim.x;
  cluster_barrier(cluster);  // all blocks of the cluster run: from here their shared memory can be reached
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

  // Each warp sends its two largest entries to all blocks, and finds the row's among those of all warps.
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

  // The same with the sums, now relative to the row's second largest, and with the index of the largest.
  // As in a batch, each thread's own largest is one term more, and the row's largest one term too many.
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

// log-sum-exp of the rest, the softcap in `factor`.
__device__ __forceinline__ double rest(const Reduced& reduced, double factor) {
  return reduced.rest == 0.0 ? -kDoubleInfinity : factor * reduced.second + log(reduced.rest);
}

// --- the gradient ---------------------------------------------------------------------------------

// An entry x that is neither target nor runner-up gets factor * power(unit, x, reference), which is
// g_rest * exp(y - rest): the reference is rounded, and the factor puts that right. Entries being floats, the
// rounding takes the rest no farther than to the largest of its terms.
struct RowGradient {
  float target, runner_up, factor, reference;
};

__device__ __forceinline__ RowGradient row_gradient(double g_target, double g_runner_up, double g_rest,
                                                    double rest, double factor, float unit) {
  RowGradient g = {static_cast<float>(g_target), static_cast<float>(g_runner_up), 0.0f, 0.0f};
  if (rest == -kDoubleInfinity) return g;
  const double exact = rest / factor;
  g.reference = static_cast<float>(exact);
  g.factor = static_cast<float>(g_rest) * exp2_approximate(unit * static_cast<float>(g.reference - exact));
  return g;
}

__device__ __forceinline__ float slope(float x, bool softcap) { return softcap ? fmaf(-x, x, 1.0f) : 1.0f; }

// Write of(x) for each entry x of the block's slice of a row, which is read again, or taken from the stash
// that reduce_row() filled; replace(v, i) may change vector i before it is stored.
template <bool kKept, typename Word, typename Of, typename Replace>
__device__ __forceinline__ void write_row(const RowVectors<Word>& vectors, typename Word::Storage* out,
                                          const Vector* stash, const Of& of, const Replace& replace) {
  const int thread = threadIdx.x, threads = blockDim.x;
#pragma unroll 1
  for (int begin = vectors.begin; begin < vectors.end; begin += kBatch * threads) {
    Vector batch[kBatch];
    if (!kKept) vectors.load_batch(batch, begin);
#pragma unroll
    for (int v = 0; v < kBatch; ++v) {
      const int i = begin + v * threads + thread;
      if (i >= vectors.end) break;
      if (kKept) batch[v] = stash[i - vectors.begin];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t word = batch[v].word[w];
        batch[v].word[w] = Word::pack(of(Word::low(word)), of(Word::high(word)));
      }
      replace(batch[v], i);
      vectors.store(out, i, batch[v]);
    }
  }
}

template <bool kKept, typename Word>
__device__ __forceinline__ void write_gradient(const RowVectors<Word>& vectors, typename Word::Storage* out,
                                               const Vector* stash, const RowGradient& g, int target,
                                               int runner_up_id, float unit, bool softcap) {
  const uint32_t target_bits = Word::pack(g.target, g.target);
  const uint32_t runner_up_bits = Word::pack(g.runner_up, g.runner_up);
  write_row<kKept>(
      vectors, out, stash,
      [&](float x) { return g.factor * power(unit, x, g.reference) * slope(x, softcap); },
      [&](Vector& v, int i) {
        vectors.replace(v, i, target, target_bits);
        vectors.replace(v, i, runner_up_id, runner_up_bits);
      });
}

template <typename Word>
__device__ __forceinline__ void write_zeros(const RowVectors<Word>& vectors, typename Word::Storage* out) {
  for (int i = vectors.begin + static_cast<int>(threadIdx.x); i < vectors.end;
       i += static_cast<int>(blockDim.x)) {
    vectors.store(out, i, filled(0));
  }
}

// Gradient of IHL = 1 + p_0 - p_1 with respect to the triplet, p its softmax, as sums of probabilities:
// nothing cancels where p_0 is near 1.
__device__ __forceinline__ void inverted_hinge_gradient(const double (&triplet)[3], double (&g)[3]) {
  const double top = fmax(triplet[0], fmax(triplet[1], triplet[2]));
  double p[3];
  for (int i = 0; i < 3; ++i) p[i] = exp(triplet[i] - top);
  const double sum = p[0] + p[1] + p[2];
  for (int i = 0; i < 3; ++i) p[i] /= sum;
  g[0] = p[0] * (2 * p[1] + p[2]);
  g[1] = -p[1] * (2 * p[0] + p[2]);
  g[2] = p[2] * (p[1] - p[0]);
}

// --- kernels --------------------------------------------------------------------------------------

__device__ __forceinline__ void write_triplet(const Triplets& out, unsigned n, double target,
                                              double runner_up, double rest, int64_t runner_up_id) {
  double* triplet = out.triplet + 3 * static_cast<int64_t>(n);
  triplet[0] = target;
  triplet[1] = runner_up;
  triplet[2] = rest;
  out.runner_up_id[n] = runner_up_id;
}

// Entry `index` of a row; 0 if it is not among its columns.
template <typename Word>
__device__ __forceinline__ float entry_at(const RowVectors<Word>& vectors, int index) {
  return index >= 0 && index < vectors.columns ? Word::low(vectors.row[index]) : 0.0f;
}

// Where a label of the whole vocabulary lies in columns that begin at `first_column`; -1 if it does not.
__device__ __forceinline__ int index_in(int64_t label, int64_t first_column, int columns) {
  return label >= first_column && label - first_column < columns ? static_cast<int>(label - first_column)
                                                                 : -1;
}

// What one thread found out for all, to all; no thread reads an entry after it that another overwrites.
__device__ __forceinline__ void share_gradient(Shared* shared, const RowGradient& g, int runner_up) {
  shared->gradient[0] = g.target;
  shared->gradient[1] = g.runner_up;
  shared->gradient[2] = g.factor;
  shared->gradient[3] = g.reference;
  shared->runner_up = runner_up;
}

__device__ __forceinline__ RowGradient shared_gradient(const Shared* shared) {
  return {shared->gradient[0], shared->gradient[1], shared->gradient[2], shared->gradient[3]};
}

// Floors: each logit once; 10 instructions a logit, one of them an exponential. 8192 x 128256 bfloat16: 2.10
// GB, 0.63 ms; 10.5e9 instructions, 0.34 ms, and 1.05e9 exponentials, 0.27 ms. Predicted: 0.72 ms.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    triplet_forward_kernel(RowLayout logits, int vocab, const int64_t* labels, int64_t ignore_index,
                           float unit, Triplets out) {
  const unsigned n = blockIdx.x;
  const int64_t label = labels[n];
  if (label == ignore_index) {
    if (threadIdx.x == 0) write_triplet(out, n, 0.0, 0.0, 0.0, -1);
    return;
  }
  assert(label >= 0 && label < vocab && "loku_kernels: a label is outside the vocabulary");
  const RowVectors<Word> vectors(logits.row<Word>(n), vocab, 1, 0);
  const int target = static_cast<int>(label);
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  const Reduced reduced = reduce_row<false>(vectors, target, unit, 1, 0, shared, nullptr);
  if (threadIdx.x == 0) {
    write_triplet(out, n, entry_at(vectors, target), entry_at(vectors, reduced.runner_up_id),
                  rest(reduced, 1.0), reduced.runner_up_id);
  }
}

// Floors: each logit read and written once; 8 instructions a logit, one an exponential. 8192 x 128256
// bfloat16: 4.20 GB, 1.25 ms; 8.4e9 instructions, 0.27 ms, and 1.05e9 exponentials, 0.27 ms. Predicted: 1.42
// ms.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    triplet_backward_kernel(RowLayout logits, int columns, int64_t first_column, const int64_t* labels,
                            int64_t ignore_index, double softcap, float unit, Triplets saved,
                            const double* grad_triplet, RowLayout grad_logits) {
  const unsigned n = blockIdx.x;
  const int64_t label = labels[n];
  const RowVectors<Word> vectors(logits.row<Word>(n), columns, 1, 0);
  typename Word::Storage* out = grad_logits.row<Word>(n);
  if (label == ignore_index) {
    write_zeros<Word>(vectors, out);
    return;
  }
  const int target = index_in(label, first_column, columns);
  const int runner_up = index_in(saved.runner_up_id[n], first_column, columns);
  const double* g = grad_triplet + 3 * static_cast<int64_t>(n);
  const bool capped = softcap != 0.0;
  RowGradient gradient = row_gradient(g[0], g[1], g[2], saved.triplet[3 * static_cast<int64_t>(n) + 2],
                                      capped ? softcap : 1.0, unit);
  gradient.target *= slope(entry_at(vectors, target), capped);
  gradient.runner_up *= slope(entry_at(vectors, runner_up), capped);
  __syncthreads();  // `out` may be the row: both entries are read before any thread writes
  write_gradient<false>(vectors, out, nullptr, gradient, target, runner_up, unit, capped);
}

// Forward and backward of IHL in one, in place. `cluster` blocks share a row. With kKeep each holds its slice
// in shared memory, after the Shared; else the row is read again, from the L2 cache while rows in flight fit.
// Floors: each logit read and written once; 18 instructions a logit, two of them exponentials. 8192 x 128256
// bfloat16 (clusters of 4, 66 KB a block): 4.20 GB, 1.25 ms; 18.9e9 instructions, 0.61 ms, and 2.1e9
// exponentials, 0.54 ms. Predicted: 1.50 ms. 8192 x 50257 bfloat16 (one block a row, 101 KB, two resident):
// 1.65 GB, 0.49 ms; 7.4e9 instructions, 0.24 ms. Predicted: 0.59 ms.
template <typename Word, bool kKeep>
__global__ void __launch_bounds__(kKeep ? kKeepingThreads : kRereadingThreads, kKeep ? 2 : 1)
    inverted_hinge_kernel(RowLayout logits, int vocab, int cluster, const int64_t* labels,
                          int64_t ignore_index, float unit, const double* scale, Triplets out) {
  const unsigned n = blockIdx.x / static_cast<unsigned>(cluster);
  const int rank = static_cast<int>(blockIdx.x % static_cast<unsigned>(cluster));
  const int64_t label = labels[n];
  const RowVectors<Word> vectors(logits.row<Word>(n), vocab, cluster, rank);
  if (label == ignore_index) {  // the same in all blocks of the cluster
    if (rank == 0 && threadIdx.x == 0) write_triplet(out, n, 0.0, 0.0, 0.0, -1);
    write_zeros<Word>(vectors, vectors.row);
    return;
  }
  assert(label >= 0 && label < vocab && "loku_kernels: a label is outside the vocabulary");
  const int target = static_cast<int>(label);
  // Read here, before any block of the cluster overwrites it: two cluster barriers lie between.
  const float target_entry = entry_at(vectors, target);
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  Vector* stash = reinterpret_cast<Vector*>(shared + 1);
  const Reduced reduced = reduce_row<kKeep>(vectors, target, unit, cluster, rank, shared, stash);
  if (threadIdx.x == 0) {
    const double triplet[3] = {target_entry, reduced.first, rest(reduced, 1.0)};
    if (rank == 0) write_triplet(out, n, triplet[0], triplet[1], triplet[2], reduced.runner_up_id);
    double g[3];
    inverted_hinge_gradient(triplet, g);
    const RowGradient row = row_gradient(*scale * g[0], *scale * g[1], *scale * g[2], triplet[2], 1.0, unit);
    share_gradient(shared, row, reduced.runner_up_id);
  }
  __syncthreads();
  write_gradient<kKeep>(vectors, vectors.row, stash, shared_gradient(shared), target, shared->runner_up, unit,
                        false);
}

// The next columns of rows that come in blocks of columns, see blocks.OnlineState: numbers, and with `store`
// exp(y - rest_max), zero at target and runner-up, times the softcap's slope. Blocks as in the kernel above.
// Floors: as above. 1024 x 64128 float32, a block of the linear op on a Llama 3 head: 0.53 GB, 0.16 ms; 1.3e9
// instructions, 0.04 ms. Predicted: 0.19 ms, between two matrix products that take 0.54 ms each with 4096
// features. Without `store`: 0.26 GB, 0.08 ms; 0.8e9 instructions, 0.03 ms. Predicted: 0.10 ms.
template <typename Word, bool kKeep>
__global__ void __launch_bounds__(kKeep ? kKeepingThreads : kRereadingThreads, kKeep ? 2 : 1)
    triplet_columns_kernel(RowLayout logits, int columns, int cluster, int64_t first_column,
                           const int64_t* labels, double softcap, float unit, bool store,
                           OnlineStates states) {
  const unsigned n = blockIdx.x / static_cast<unsigned>(cluster);
  const int rank = static_cast<int>(blockIdx.x % static_cast<unsigned>(cluster));
  const RowVectors<Word> vectors(logits.row<Word>(n), columns, cluster, rank);
  const int target = index_in(labels[n], first_column, columns);
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  Vector* stash = reinterpret_cast<Vector*>(shared + 1);
  double* state = states.state + OnlineStates::kNumbers * static_cast<int64_t>(n);
  const bool capped = softcap != 0.0;
  const double factor = capped ? softcap : 1.0;
  // All that rank 0 changes, and all entries that a gradient replaces, are read before two cluster barriers.
  if (threadIdx.x == 0) {
    for (int i = 0; i < OnlineStates::kNumbers; ++i) shared->state[i] = state[i];
    if (target >= 0) shared->state[0] = factor * entry_at(vectors, target);
    const int64_t old_id = states.runner_up_id[n];
    shared->runner_up = index_in(old_id, first_column, columns);
  }
  const Reduced reduced = reduce_row<kKeep>(vectors, target, unit, cluster, rank, shared, stash);
  if (threadIdx.x == 0) {
    const double runner_up = shared->state[1], rest_max = shared->state[2], rest_sum = shared->state[3];
    const double top = factor * reduced.first, largest = factor * reduced.second;
    const bool better = top > runner_up;  // on a tie the earlier column stays
    const double demoted = better ? runner_up : -kDoubleInfinity;
    const double joining = better ? -kDoubleInfinity : top;  // the largest of these columns joins the rest
    const double new_max = fmax(fmax(rest_max, largest), fmax(demoted, joining));
    const double reference = new_max == -kDoubleInfinity ? 0.0 : new_max;
    const double share = exp(demoted - reference);
    const RowGradient row = row_gradient(0.0, 0.0, 1.0, new_max, factor, unit);
    share_gradient(shared, row, better ? reduced.runner_up_id : shared->runner_up);
    if (rank == 0) {
      const float u = better && runner_up > -kDoubleInfinity ? static_cast<float>(runner_up / factor) : 0.0f;
      states.rescale[n] = static_cast<float>(exp(rest_max - reference));
      states.demoted_id[n] = demoted > -kDoubleInfinity ? states.runner_up_id[n] : -1;
      states.demoted_share[n] = static_cast<float>(share) * slope(u, capped);
      state[0] = shared->state[0];
      state[1] = better ? top : runner_up;
      state[2] = new_max;
      state[3] = rest_sum * exp(rest_max - reference) + exp(rest(reduced, factor) - reference) + share +
                 exp(joining - reference);
      if (better) states.runner_up_id[n] = first_column + reduced.runner_up_id;
    }
  }
  if (!store) return;
  __syncthreads();
  write_gradient<kKeep>(vectors, vectors.row, stash, shared_gradient(shared), target, shared->runner_up, unit,
                        capped);
}

// Floors: each logit of a row whose factor is not 1 read and written once; 5 instructions a logit. 8192 x
// 128256 bfloat16: 4.20 GB, 1.25 ms; 5.3e9 instructions, 0.17 ms. Predicted: 1.42 ms; 5 us where all factors
// are 1.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    scale_rows_kernel(RowLayout rows, int columns, const float* factors) {
  const float factor = factors[blockIdx.x];
  if (factor == 1.0f) return;
  const RowVectors<Word> vectors(rows.row<Word>(blockIdx.x), columns, 1, 0);
  write_row<false>(vectors, vectors.row, nullptr, [=](float x) { return x * factor; }, [](Vector&, int) {});
}

// --- launchers ------------------------------------------------------------------------------------

constexpr int64_t kMaxColumns = 1 << 30;  // indices in a row are int
constexpr int64_t kMaxBlocks = INT_MAX;

// body(Word{}) for the type of the rows, on the stream's device; not at all where there are no rows.
template <typename Body>
void for_rows(const DeviceRows& rows, Stream stream, const Body& body) {
  if (rows.count == 0) return;
  if (rows.columns > kMaxColumns || rows.count > kMaxBlocks / kMaxCluster) {
    throw std::invalid_argument("loku_kernels: at most 2^30 words and 2^28 - 1 rows a call on CUDA, got " +
                                std::to_string(rows.columns) + " and " + std::to_string(rows.count));
  }
  use_device(stream.device);
  for_type_of<Float32Word, BFloat16Word, Float16Word>(rows.dtype, body);
}

RowLayout layout_of(const DeviceRows& rows) {
  return {static_cast<unsigned char*>(rows.data), static_cast<unsigned>(rows.inner), rows.outer_stride,
          rows.inner_stride};
}

float unit_of(double softcap) { return static_cast<float>(kLog2E * (softcap == 0.0 ? 1.0 : softcap)); }

struct FusedPlan {
  int threads, cluster;
  bool keep;
  size_t shared_bytes;
};

// The smallest cluster whose slices let two blocks stay on a multiprocessor, so that one can load while the
// other computes. If there is none, the largest that fits; else no shared memory, and one large block a
// multiprocessor, because fewer rows in flight are likelier to be still in the L2 cache.
FusedPlan plan_fused(const DeviceLimits& limits, int64_t columns, int width) {
  const int64_t vectors = (columns + 2 * width - 2) / width;  // a head as long as can be
  FusedPlan plan = {kRereadingThreads, 1, false, sizeof(Shared)};
  for (int cluster = 1; cluster <= (limits.clusters ? kMaxCluster : 1); cluster *= 2) {
    const int64_t bytes =
        static_cast<int64_t>(sizeof(Shared)) + (vectors + cluster - 1) / cluster * static_cast<int64_t>(16);
    if (bytes > limits.shared_per_block) continue;
    const int64_t blocks = limits.shared_per_multiprocessor / (bytes + 1024);  // that stay
    plan = {blocks >= 4 ? kThreads : kKeepingThreads, cluster, true, static_cast<size_t>(bytes)};
    if (blocks >= 2) break;
  }
  return plan;
}

// Launch a kernel that takes each row up twice, or with `twice` false once, in the form that suits the
// device.
template <typename Word, typename... Parameters, typename... Arguments>
void launch_fused(const char* name, void (*keeping)(Parameters...), void (*rereading)(Parameters...),
                  const DeviceRows& logits, bool twice, Stream stream, const Arguments&... arguments) {
  FusedPlan plan = {kThreads, 1, false, sizeof(Shared)};
  if (twice) {
    plan = plan_fused(device_limits(name, keeping, stream.device), logits.columns, RowVectors<Word>::kWidth);
  }
  launch(name, plan.keep ? keeping : rereading,
         {dim3(static_cast<unsigned>(logits.count * plan.cluster)), plan.threads, plan.shared_bytes,
          plan.cluster},
         stream.handle, layout_of(logits), static_cast<int>(logits.columns), plan.cluster, arguments...);
}

}  // namespace

std::string cuda_error() { return device_error(); }

// logits, labels -> triplet, runner_up_id. Reads each logit once.
void cuda_triplet_forward(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                          const Triplets& out, Stream stream) {
  for_rows(logits, stream, [&](auto word) {
    using Word = decltype(word);
    launch("triplet_forward", triplet_forward_kernel<Word>,
           {dim3(static_cast<unsigned>(logits.count)), kThreads, sizeof(Shared), 1}, stream.handle,
           layout_of(logits), static_cast<int>(logits.columns), labels, ignore_index, unit_of(0.0), out);
  });
}

// Gradient of the logits of the columns from `first_column` on from that of the triplet, times the softcap's
// slope: g_target at the label, g_runner_up at the runner-up, g_rest * exp(y - rest) elsewhere. `grad_logits`
// may be `logits`.
void cuda_triplet_backward(const DeviceRows& logits, int64_t first_column, const int64_t* labels,
                           int64_t ignore_index, const Triplets& saved, const double* grad_triplet,
                           double softcap, const DeviceRows& grad_logits, Stream stream) {
  for_rows(logits, stream, [&](auto word) {
    using Word = decltype(word);
    launch("triplet_backward", triplet_backward_kernel<Word>,
           {dim3(static_cast<unsigned>(logits.count)), kThreads, 0, 1}, stream.handle, layout_of(logits),
           static_cast<int>(logits.columns), first_column, labels, ignore_index, softcap, unit_of(softcap),
           saved, grad_triplet, layout_of(grad_logits));
  });
}

// Forward and backward of IHL in one: the logits become *scale (on the device) times its gradient.
void cuda_inverted_hinge_(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                          const double* scale, const Triplets& out, Stream stream) {
  for_rows(logits, stream, [&](auto word) {
    using Word = decltype(word);
    launch_fused<Word>("inverted_hinge_", inverted_hinge_kernel<Word, true>,
                       inverted_hinge_kernel<Word, false>, logits, true, stream, labels, ignore_index,
                       unit_of(0.0), scale, out);
  });
}

// The logits of the columns from `first_column` on go into the rows' states; with `store` they become
// exp(y - rest_max), zero at target and runner-up, times the softcap's slope. No label is ignored.
void cuda_triplet_columns_(const DeviceRows& logits, int64_t first_column, const int64_t* labels,
                           double softcap, bool store, const OnlineStates& states, Stream stream) {
  for_rows(logits, stream, [&](auto word) {
    using Word = decltype(word);
    launch_fused<Word>("triplet_columns_", triplet_columns_kernel<Word, true>,
                       triplet_columns_kernel<Word, false>, logits, store, stream, first_column, labels,
                       softcap, unit_of(softcap), store, states);
  });
}

// rows *= factors, a float each; rows whose factor is 1 are left alone.
void cuda_scale_rows_(const DeviceRows& rows, const float* factors, Stream stream) {
  for_rows(rows, stream, [&](auto word) {
    launch("scale_rows_", scale_rows_kernel<decltype(word)>,
           {dim3(static_cast<unsigned>(rows.count)), kThreads, 0, 1}, stream.handle, layout_of(rows),
           static_cast<int>(rows.columns), factors);
  });
}

}  // namespace loku
