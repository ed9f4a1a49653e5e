// Softmax triplet, CPU kernels: forward, backward, and the fused in-place forward and backward.
//
// A row is processed by one thread, in blocks that stay in the L1 cache: one pass brings the block in as
// float and finds its maximum, one takes the exponentials. Target and runner-up are replaced by -inf there,
// so that no loop has to step around them. While the exponentials of a block are taken, the next block is
// on its way from main memory. The fused kernel keeps each exponential, relative to the maximum known at
// that block, and scales it by one number a block when the whole row has been seen. The row is still in
// the L2 cache then, so main memory sees one read and one write.
#include "triplet_cpu.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "online_triplet.h"
#include "simd.h"

namespace loku {
namespace {

// Entries that stay in the L1 cache between two passes, and whose sum is taken in float: in at least 4
// lanes, so that a term is rounded 256 times at most (equal terms would all be rounded the same way).
constexpr int64_t kBlock = 1024;
constexpr int64_t kCacheLine = 64;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What a stored entry x means. Usually it is the logit y. With a softcap it is u = tanh(z / softcap),
// y = softcap * u and dy/dz = 1 - u^2: kept so, neither y nor the slope is rounded to the entries' type.
template <bool kSoftcap>
struct Entry {
  float softcap;
  LOKU_INLINE float logit(float x) const { return kSoftcap ? softcap * x : x; }
  LOKU_INLINE float slope(float x) const { return kSoftcap ? 1.0f - x * x : 1.0f; }
};

// A block of entries as float: the entries themselves, or converted into `buffer`.
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

// Leave entry `index` out of the block, in `buffer`.
template <bool kSoftcap>
LOKU_INLINE void leave_out(int64_t index, Block& block, int64_t n, Entry<kSoftcap> entry, float* buffer) {
  if (block.x != buffer) std::copy_n(block.x, n, buffer);
  buffer[index] = kMinusInfinity;
  block = {buffer, max_of(buffer, n, entry)};
}

template <bool kSoftcap>
LOKU_INLINE int64_t first_index_of(float logit, const float* x, int64_t n, Entry<kSoftcap> entry) {
  constexpr int64_t kStep = 128;  // looked at together, in vectors
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

// Sum over x of exp(y - reference). With kStore each term, times the softcap's slope, goes to `terms`.
// `ahead` becomes the maximum of as many entries further on, which beside the exponentials costs nothing.
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

// What the fused kernel must know of the blocks it has passed, to finish the row.
struct RowScratch {
  struct Demoted {
    int64_t id;
    float logit, slope;
  };
  std::vector<float> block_max;  // the reference of each block's terms
  std::vector<Demoted> demoted;  // runner-ups of earlier blocks, which have no term yet
  std::vector<float> terms;      // the terms, where the row's own type cannot hold them
};

// What one read of a row gives. The entries at target and runner-up are kept, since terms may replace them.
struct ReducedRow {
  OnlineTriplet state;
  float target_entry, runner_up_entry;
};

// One read of the row. Always inlined into the kernels below, so that they alone are cloned.
template <bool kStore, bool kSoftcap, typename T>
LOKU_INLINE ReducedRow reduce_row(const T* row, int64_t vocab, int64_t target, Entry<kSoftcap> entry,
                                  float* terms, RowScratch& scratch) {
  alignas(kCacheLine) float buffer[kBlock];
  OnlineTriplet state;
  state.runner_up_id = target == 0 ? 1 : 0;  // unless something is above -inf
  const float target_entry = to_float(row[target]);
  float runner_up_entry = to_float(row[state.runner_up_id]);
  constexpr bool kAhead = std::is_same<T, float>::value;  // else conversion makes a pass of its own cheaper
  float ahead = kMinusInfinity;
  if constexpr (kAhead) ahead = max_of(row, std::min(kBlock, vocab), entry);
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = std::min(kBlock, vocab - begin);
    const T* further = row + begin + n;
    const int64_t further_n = std::min(kBlock, vocab - begin - n);
    Block block;
    if constexpr (kAhead) {
      block = {row + begin, ahead};
    } else {
      block = converted_block(row + begin, n, entry, buffer);
    }
    // As one unsigned comparison: GCC splits this loop at two, and vectorises only one of the halves.
    if (static_cast<uint64_t>(target - begin) < static_cast<uint64_t>(n)) {
      leave_out(target - begin, block, n, entry, buffer);
    }
    if (block.max > state.runner_up) {
      const int64_t previous = state.runner_up_id;
      if (kStore && previous < begin) {
        scratch.demoted.push_back({previous, state.runner_up, entry.slope(runner_up_entry)});
      }
      state.add_to_rest(state.runner_up);
      const int64_t index = first_index_of(block.max, block.x, n, entry);
      state.runner_up = block.max;
      state.runner_up_id = begin + index;
      runner_up_entry = block.x[index];
      leave_out(index, block, n, entry, buffer);
    }
    state.raise_rest_max(block.max);
    if (kStore) scratch.block_max.push_back(state.rest_max);

    float* block_terms = kStore ? terms + begin : nullptr;
    if (state.rest_max == kMinusInfinity) {  // masked words, or NaN, and no reference to subtract
      for (int64_t i = 0; i < n; ++i) {
        if (block.x[i] != block.x[i]) state.rest_sum = kNaN;
        if (kStore) block_terms[i] = 0.0f;
      }
      if constexpr (kAhead) ahead = max_of(further, further_n, entry);
    } else if constexpr (kAhead) {
      state.rest_sum +=
          sum_exp<kStore>(block.x, n, entry, state.rest_max, block_terms, further, further_n, ahead);
    } else {
      prefetch(further, further + further_n);
      state.rest_sum += sum_exp<kStore>(block.x, n, entry, state.rest_max, block_terms, nullptr, 0, ahead);
    }
  }
  return {state, target_entry, runner_up_entry};
}

// What a row's three numbers become: from the entries at target and runner-up, the product of each with the
// softcap in double.
template <bool kSoftcap>
LOKU_INLINE void write_triplet(const Triplets& out, int64_t n, const ReducedRow& row, Entry<kSoftcap> entry) {
  const double factor = kSoftcap ? entry.softcap : 1.0;
  out.triplet[3 * n] = factor * row.target_entry;
  out.triplet[3 * n + 1] = factor * row.runner_up_entry;
  out.triplet[3 * n + 2] = row.state.rest();
  out.runner_up_id[n] = row.state.runner_up_id;
}

LOKU_INLINE void write_ignored(const Triplets& out, int64_t n) {
  out.triplet[3 * n] = out.triplet[3 * n + 1] = out.triplet[3 * n + 2] = 0.0;
  out.runner_up_id[n] = -1;
}

template <bool kSoftcap, typename T>
LOKU_INLINE void forward_row(const T* row, int64_t vocab, int64_t target, float softcap, const Triplets& out,
                             int64_t n) {
  const Entry<kSoftcap> entry{softcap};
  RowScratch unused;
  write_triplet(out, n, reduce_row<false>(row, vocab, target, entry, nullptr, unused), entry);
}

struct TripletGradient {
  double target, runner_up, rest;
};

// Gradient of IHL = 1 + p_0 - p_1 with respect to the triplet, p its softmax. Written with sums of
// probabilities only, so nothing cancels where p_0 is near 1.
TripletGradient inverted_hinge_gradient(const double* triplet) {
  const double top = std::max(triplet[0], std::max(triplet[1], triplet[2]));
  const double e0 = std::exp(triplet[0] - top), e1 = std::exp(triplet[1] - top),
               e2 = std::exp(triplet[2] - top);
  const double sum = e0 + e1 + e2;
  const double p0 = e0 / sum, p1 = e1 / sum, p2 = e2 / sum;
  return {p0 * (2 * p1 + p2), -p1 * (2 * p0 + p2), p2 * (p1 - p0)};
}

float* terms_of(float* row, int64_t, RowScratch&) { return row; }

template <typename T>
float* terms_of(T*, int64_t vocab, RowScratch& scratch) {
  scratch.terms.resize(vocab);
  return scratch.terms.data();
}

template <bool kSoftcap, typename T>
LOKU_INLINE void fused_row(T* row, int64_t vocab, int64_t target, FusedGradient gradient, double scale,
                           float softcap, const Triplets& out, int64_t n, RowScratch& scratch) {
  const Entry<kSoftcap> entry{softcap};
  scratch.block_max.clear();
  scratch.demoted.clear();
  float* terms = terms_of(row, vocab, scratch);
  const ReducedRow reduced = reduce_row<true>(row, vocab, target, entry, terms, scratch);
  write_triplet(out, n, reduced, entry);
  const double target_slope = entry.slope(reduced.target_entry);
  const double runner_up_slope = entry.slope(reduced.runner_up_entry);

  TripletGradient g = {0.0, 0.0, 1.0};
  if (gradient == FusedGradient::kInvertedHinge) g = inverted_hinge_gradient(out.triplet + 3 * n);
  const double rest = out.triplet[3 * n + 2];
  const double rest_scale = scale * g.rest;
  float reference = kMinusInfinity;
  float factor = rest == rest ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  for (int64_t begin = 0, block = 0; begin < vocab; begin += kBlock, ++block) {
    const int64_t end = std::min(begin + kBlock, vocab);
    if (scratch.block_max[block] != reference) {  // it seldom changes after the first blocks
      reference = scratch.block_max[block];
      factor = static_cast<float>(rest_scale * std::exp(static_cast<double>(reference) - rest));
    }
    if (std::isfinite(factor)) {
#pragma omp simd
      for (int64_t v = begin; v < end; ++v) row[v] = from_number<T>(terms[v] * factor);
    } else {
      for (int64_t v = begin; v < end; ++v) row[v] = from_float<T>(terms[v] * factor);
    }
  }
  for (const RowScratch::Demoted& d : scratch.demoted) {
    const double share = d.logit == kMinusInfinity ? 0.0 : std::exp(d.logit - rest);
    row[d.id] = from_float<T>(static_cast<float>(rest_scale * share * d.slope));
  }
  row[target] = from_float<T>(static_cast<float>(scale * g.target * target_slope));
  row[reduced.state.runner_up_id] = from_float<T>(static_cast<float>(scale * g.runner_up * runner_up_slope));
}

template <bool kSoftcap, typename T>
LOKU_INLINE void backward_row(const T* row, int64_t vocab, int64_t target, float softcap,
                              const double* triplet, int64_t runner_up_id, const double* g, T* out) {
  const Entry<kSoftcap> entry{softcap};
  const float g_target = static_cast<float>(g[0] * entry.slope(to_float(row[target])));
  const float g_runner_up = static_cast<float>(g[1] * entry.slope(to_float(row[runner_up_id])));
  const float g_rest = static_cast<float>(g[2]);
  // `rest` as two floats: rounding it to one would cost exp() the digits of a large offset.
  const float rest_high = static_cast<float>(triplet[2]);
  const float rest_low = static_cast<float>(triplet[2] - rest_high);
  if (triplet[2] == kMinusInfinity) {  // no rest, so no gradient
    for (int64_t v = 0; v < vocab; ++v) out[v] = from_float<T>(0.0f);
  } else if (std::isfinite(g_rest) && std::isfinite(rest_high)) {
#pragma omp simd
    for (int64_t v = 0; v < vocab; ++v) {
      const float x = to_float(row[v]);
      const float share = exp_nonpositive((entry.logit(x) - rest_high) - rest_low);
      out[v] = from_number<T>(g_rest * share * entry.slope(x));
    }
  } else {
    for (int64_t v = 0; v < vocab; ++v) {
      const float x = to_float(row[v]);
      const float share = exp_nonpositive((entry.logit(x) - rest_high) - rest_low);
      out[v] = from_float<T>(g_rest * share * entry.slope(x));
    }
  }
  out[target] = from_float<T>(g_target);
  out[runner_up_id] = from_float<T>(g_runner_up);
}

// The functions that are compiled once per instruction set: one row each, one for each type.
#define LOKU_CALL(function, ...)  \
  if (softcap == 0.0f) {          \
    function<false>(__VA_ARGS__); \
  } else {                        \
    function<true>(__VA_ARGS__);  \
  }
#define LOKU_ROW_KERNELS(T)                                                                              \
  LOKU_TARGET_CLONES void forward_kernel(const T* row, int64_t vocab, int64_t target, float softcap,     \
                                         const Triplets& out, int64_t n){                                \
      LOKU_CALL(forward_row, row, vocab, target, softcap, out,                                           \
                n)} LOKU_TARGET_CLONES void fused_kernel(T* row, int64_t vocab, int64_t target,          \
                                                         FusedGradient gradient, double scale,           \
                                                         float softcap, const Triplets& out, int64_t n,  \
                                                         RowScratch& scratch){LOKU_CALL(                 \
      fused_row, row, vocab, target, gradient, scale, softcap, out, n,                                   \
      scratch)} LOKU_TARGET_CLONES void backward_kernel(const T* row, int64_t vocab, int64_t target,     \
                                                        float softcap, const double* triplet,            \
                                                        int64_t runner_up_id, const double* g, T* out) { \
    LOKU_CALL(backward_row, row, vocab, target, softcap, triplet, runner_up_id, g, out)                  \
  }
LOKU_ROW_KERNELS(float)
LOKU_ROW_KERNELS(BFloat16)
LOKU_ROW_KERNELS(Float16)
#undef LOKU_ROW_KERNELS
#undef LOKU_CALL

template <typename T>
T* row_of(const Rows& rows, int64_t n) {
  return static_cast<T*>(rows.data) + rows.offsets[n];
}

template <typename Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

// body(row, scratch) for every row; each thread has a scratch. A single thread stays out of OpenMP: a forked
// child must, since its parent's threads are not there.
template <typename Body>
void for_rows(int64_t count, int threads, const Body& body) {
  if (threads <= 1) {
    RowScratch scratch;
    for (int64_t n = 0; n < count; ++n) body(n, scratch);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    RowScratch scratch;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; ++n) body(n, scratch);
  }
}

}  // namespace

// Index of the first label that is neither in [0, vocab) nor ignored; -1 if there is none.
int64_t first_bad_label(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index) {
  for (int64_t n = 0; n < count; ++n) {
    if (labels[n] != ignore_index && (labels[n] < 0 || labels[n] >= vocab)) return n;
  }
  return -1;
}

// logits, labels -> triplet, runner_up_id. Reads each logit once.
void triplet_forward(const Rows& logits, const int64_t* labels, int64_t ignore_index, float softcap,
                     const Triplets& out, int threads) {
  for_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(logits.count, threads, [&](int64_t n, RowScratch&) {
      if (labels[n] == ignore_index) {
        write_ignored(out, n);
      } else {
        forward_kernel(row_of<T>(logits, n), logits.vocab, labels[n], softcap, out, n);
      }
    });
  });
}

// Gradient of the logits from that of the triplet, times the softcap's slope: g_target at the label,
// g_runner_up at the runner-up, g_rest * exp(y - rest) elsewhere. `grad_logits` may be `logits`.
void triplet_backward(const Rows& logits, const int64_t* labels, int64_t ignore_index, const Triplets& saved,
                      const double* grad_triplet, float softcap, const Rows& grad_logits, int threads) {
  for_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(logits.count, threads, [&](int64_t n, RowScratch&) {
      T* row = row_of<T>(grad_logits, n);
      if (labels[n] == ignore_index) {
        std::fill_n(row, logits.vocab, T{});
      } else {
        backward_kernel(row_of<T>(logits, n), logits.vocab, labels[n], softcap, saved.triplet + 3 * n,
                        saved.runner_up_id[n], grad_triplet + 3 * n, row);
      }
    });
  });
}

// Forward and backward in one: the logits become `scale` times
//   kInvertedHinge: the gradient of the row's IHL;
//   kRest:          the gradient of the row's `rest`, that is exp(y - rest), zero at target and runner-up;
// each times the softcap's slope. One read and one write of main memory.
void triplet_fused_(const Rows& logits, const int64_t* labels, int64_t ignore_index, FusedGradient gradient,
                    double scale, float softcap, const Triplets& out, int threads) {
  for_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(logits.count, threads, [&](int64_t n, RowScratch& scratch) {
      T* row = row_of<T>(logits, n);
      if (labels[n] == ignore_index) {
        write_ignored(out, n);
        std::fill_n(row, logits.vocab, T{});
      } else {
        fused_kernel(row, logits.vocab, labels[n], gradient, scale, softcap, out, n, scratch);
      }
    });
  });
}

}  // namespace loku
