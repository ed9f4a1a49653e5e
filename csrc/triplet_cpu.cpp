// Softmax triplet, CPU kernels: forward, backward, and three fused kernels that overwrite the logits. One
// writes the gradient of IHL. The others write the softmax of the rest, one of whole rows and one of some
// columns at a time.
//
// One thread processes a row, in blocks that stay in the L1 cache. One pass converts the block to float and
// finds its maximum. A second pass takes the exponentials. Target and runner-up are replaced by -inf in the
// block, so that no loop has to skip them. The next block is on its way from main memory during the
// exponentials of a block. The fused kernels keep each exponential, relative to the maximum known at that
// block. They scale it by one number a block after the end of the row. The row is still in the L2 cache then,
// so main memory sees one read and one write.
#include "triplet_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "entries_cpu.h"
#include "losses_cpu.h"
#include "online_triplet.h"
#include "parallel.h"
#include "simd.h"

namespace loku {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The state of a row: the numbers that `states` holds between two calls, with the slope of the runner-up.
struct RowState {
  OnlineTriplet online;
  double target;          // logit; with a softcap, a product in double
  double runner_up;       // online.runner_up, computed in the same way
  float runner_up_slope;  // slope of the softcap at the runner-up
};

// The facts about passed blocks that the fused kernels need to finish the row.
struct RowScratch {
  struct Demoted {
    int64_t id;
    float logit, slope;
  };
  std::vector<float> block_max;    // the reference of each block's terms
  std::vector<Demoted> demoted;    // runner-ups that joined the rest after their block and have no term
  std::unique_ptr<float[]> terms;  // the terms, for rows of a 16-bit type

  RowScratch() = default;  // for kernels that store nothing

  // Take all the memory that rows of T need. With a cache line behind each piece no two threads write to one.
  template <typename T>
  static RowScratch of(const Rows& rows) {
    RowScratch scratch;
    constexpr int64_t kApart = kCacheLine / sizeof(float);
    const int64_t blocks = (rows.columns + kBlock - 1) / kBlock;
    scratch.block_max.reserve(blocks + kApart);
    scratch.demoted.reserve(blocks + kApart);
    if (!std::is_same<T, float>::value) scratch.terms.reset(new float[rows.columns + kApart]);
    return scratch;
  }
};

LOKU_INLINE RowState first_state(int64_t target) {
  RowState state = {{}, kMinusInfinity, kMinusInfinity, 1.0f};
  state.online.runner_up_id = target == 0 ? 1 : 0;  // if all others are -inf
  return state;
}

// Return the position of a column among those that begin at `first`. The position of an earlier column, and
// of an id that is none, is larger than any number of columns.
LOKU_INLINE uint64_t position_of(int64_t column, int64_t first) {
  return static_cast<uint64_t>(column) - static_cast<uint64_t>(first);
}

// Read the columns [first_column, first_column + columns) of a row once. Their entries begin at `row`. The
// function is inlined into the kernels below, so that only they are cloned.
template <bool kStore, bool kSoftcap, typename T>
LOKU_INLINE void reduce_columns(const T* row, int64_t columns, int64_t first_column, int64_t target,
                                Entry<kSoftcap> entry, float* terms, RowScratch& scratch, RowState& state) {
  alignas(kCacheLine) float buffer[kBlock];
  OnlineTriplet& online = state.online;
  constexpr bool kAhead = std::is_same<T, float>::value;  // others need a pass for conversion
  float ahead = kMinusInfinity;
  if constexpr (kAhead) ahead = max_of(row, std::min(kBlock, columns), entry);
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = std::min(kBlock, columns - begin);
    const T* further = row + begin + n;
    const int64_t further_n = std::min(kBlock, columns - begin - n);
    Block block;
    if constexpr (kAhead) {
      block = {row + begin, ahead};
    } else {
      block = converted_block(row + begin, n, entry, buffer);
    }
    // One unsigned comparison replaces two. GCC splits this loop at two and vectorises only one of the
    // halves.
    const uint64_t target_index = position_of(target, first_column + begin);
    if (target_index < static_cast<uint64_t>(n)) {
      state.target = entry.exact_logit(block.x[target_index]);
      leave_out(target_index, block, n, entry, buffer);
    }
    if (block.max > online.runner_up) {
      if (kStore && online.runner_up != kMinusInfinity) {
        scratch.demoted.push_back({online.runner_up_id, online.runner_up, state.runner_up_slope});
      }
      online.add_to_rest(online.runner_up);
      const int64_t index = first_index_of(block.max, block.x, n, entry);
      online.runner_up = block.max;
      online.runner_up_id = first_column + begin + index;
      state.runner_up = entry.exact_logit(block.x[index]);
      state.runner_up_slope = entry.slope(block.x[index]);
      leave_out(index, block, n, entry, buffer);
    }
    online.raise_rest_max(block.max);
    if (kStore) scratch.block_max.push_back(online.rest_max);

    float* block_terms = kStore ? terms + begin : nullptr;
    if (online.rest_max == kMinusInfinity) {  // all masked or NaN: no reference to subtract
      for (int64_t i = 0; i < n; ++i) {
        if (block.x[i] != block.x[i]) online.rest_sum = kNaN;
        if (kStore) block_terms[i] = 0.0f;
      }
      if constexpr (kAhead) ahead = max_of(further, further_n, entry);
    } else if constexpr (kAhead) {
      online.rest_sum +=
          sum_exp<kStore>(block.x, n, entry, online.rest_max, block_terms, further, further_n, ahead);
    } else {
      prefetch(further, further + further_n);
      online.rest_sum += sum_exp<kStore>(block.x, n, entry, online.rest_max, block_terms, nullptr, 0, ahead);
    }
  }
}

// Compute exp(logit - reference), and 0 for a masked word.
LOKU_INLINE double share_of(float logit, double reference) {
  return logit == kMinusInfinity ? 0.0 : std::exp(logit - reference);
}

// Compute row = scale * exp(y - reference) from the terms. Demoted runner-ups of these columns are included.
template <typename T>
LOKU_INLINE void finish_columns(T* row, int64_t columns, int64_t first_column, const float* terms,
                                double reference, double scale, const RowScratch& scratch) {
  float block_max = kMinusInfinity;
  float factor = reference == reference ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  for (int64_t begin = 0, block = 0; begin < columns; begin += kBlock, ++block) {
    const int64_t end = std::min(begin + kBlock, columns);
    if (scratch.block_max[block] != block_max) {  // it seldom changes after the first blocks
      block_max = scratch.block_max[block];
      factor = static_cast<float>(scale * std::exp(block_max - reference));
    }
    if (std::isfinite(factor)) {
#pragma omp simd
      for (int64_t v = begin; v < end; ++v) row[v] = from_number<T>(terms[v] * factor);
    } else {
      for (int64_t v = begin; v < end; ++v) row[v] = from_float<T>(terms[v] * factor);
    }
  }
  for (const RowScratch::Demoted& d : scratch.demoted) {
    const uint64_t position = position_of(d.id, first_column);
    if (position >= static_cast<uint64_t>(columns)) continue;
    row[position] = from_float<T>(static_cast<float>(scale * share_of(d.logit, reference) * d.slope));
  }
}

float* terms_of(float* row, RowScratch&) { return row; }

template <typename T>
float* terms_of(T*, RowScratch& scratch) {
  return scratch.terms.get();
}

LOKU_INLINE void write_triplet(const Triplets& out, int64_t n, const RowState& state) {
  out.triplet[3 * n] = state.target;
  out.triplet[3 * n + 1] = state.runner_up;
  out.triplet[3 * n + 2] = state.online.rest();
  out.runner_up_id[n] = state.online.runner_up_id;
}

LOKU_INLINE void write_ignored(const Triplets& out, int64_t n) {
  out.triplet[3 * n] = out.triplet[3 * n + 1] = out.triplet[3 * n + 2] = 0.0;
  out.runner_up_id[n] = -1;
}

template <bool kSoftcap, typename T>
LOKU_INLINE void forward_row(const T* row, int64_t vocab, int64_t target, float softcap, const Triplets& out,
                             int64_t n) {
  RowState state = first_state(target);
  RowScratch unused;
  reduce_columns<false>(row, vocab, 0, target, Entry<kSoftcap>{softcap}, nullptr, unused, state);
  write_triplet(out, n, state);
}

template <bool kStore, bool kSoftcap, typename T>
LOKU_INLINE void columns_of_row(T* row, int64_t columns, int64_t first_column, int64_t target, float softcap,
                                const OnlineStates& states, int64_t n, RowScratch& scratch) {
  double* saved = states.state + OnlineStates::kNumbers * n;
  RowState state = first_state(target);
  state.target = saved[0];
  state.runner_up = saved[1];
  const float u = kSoftcap ? static_cast<float>(saved[1] / softcap) : 0.0f;
  state.runner_up_slope = Entry<kSoftcap>{softcap}.slope(u);
  state.online = {static_cast<float>(saved[1]), states.runner_up_id[n], static_cast<float>(saved[2]),
                  saved[3]};
  const float rest_max_before = state.online.rest_max;
  scratch.block_max.clear();
  scratch.demoted.clear();
  float* terms = kStore ? terms_of(row, scratch) : nullptr;
  reduce_columns<kStore>(row, columns, first_column, target, Entry<kSoftcap>{softcap}, terms, scratch, state);
  const OnlineTriplet& online = state.online;
  saved[0] = state.target;
  saved[1] = state.runner_up;
  saved[2] = online.rest_max;
  saved[3] = online.rest_sum;
  states.runner_up_id[n] = online.runner_up_id;
  if (!kStore) return;

  finish_columns(row, columns, first_column, terms, online.rest_max, 1.0, scratch);
  for (const int64_t id : {target, online.runner_up_id}) {
    const uint64_t position = position_of(id, first_column);
    if (position < static_cast<uint64_t>(columns)) row[position] = from_float<T>(0.0f);
  }
  states.rescale[n] = static_cast<float>(share_of(rest_max_before, online.rest_max));
  states.demoted_id[n] = -1;
  states.demoted_share[n] = 0.0f;
  for (const RowScratch::Demoted& d : scratch.demoted) {
    if (d.id >= first_column) continue;
    states.demoted_id[n] = d.id;
    states.demoted_share[n] = static_cast<float>(share_of(d.logit, online.rest_max) * d.slope);
  }
}

// Write the triplet of a row, and overwrite the row with `scale` exp(y - rest) times the softcap's slope. The
// caller overwrites the entries of target and runner-up.
template <bool kSoftcap, typename T, typename Scale>
LOKU_INLINE int64_t overwrite_row(T* row, int64_t vocab, int64_t target, float softcap, const Scale& scale,
                                  const Triplets& out, int64_t n, RowScratch& scratch) {
  RowState state = first_state(target);
  scratch.block_max.clear();
  scratch.demoted.clear();
  float* terms = terms_of(row, scratch);
  reduce_columns<true>(row, vocab, 0, target, Entry<kSoftcap>{softcap}, terms, scratch, state);
  write_triplet(out, n, state);
  finish_columns(row, vocab, 0, terms, state.online.rest(), scale(out.triplet + 3 * n), scratch);
  return state.online.runner_up_id;
}

template <typename T>
LOKU_INLINE void inverted_hinge_row(T* row, int64_t vocab, int64_t target, double scale, const Triplets& out,
                                    int64_t n, RowScratch& scratch) {
  LossAndGradient g;
  const auto rest_scale = [&](const double* triplet) {
    g = loss_of(Loss::kInvertedHinge, triplet);
    return scale * g.gradient[2];
  };
  const int64_t runner_up_id = overwrite_row<false>(row, vocab, target, 0.0f, rest_scale, out, n, scratch);
  row[target] = from_float<T>(static_cast<float>(scale * g.gradient[0]));
  row[runner_up_id] = from_float<T>(static_cast<float>(scale * g.gradient[1]));
}

template <bool kSoftcap, typename T>
LOKU_INLINE void rest_row(T* row, int64_t vocab, int64_t target, float softcap, const Triplets& out,
                          int64_t n, RowScratch& scratch) {
  const auto one = [](const double*) { return 1.0; };
  const int64_t runner_up_id = overwrite_row<kSoftcap>(row, vocab, target, softcap, one, out, n, scratch);
  row[target] = row[runner_up_id] = from_float<T>(0.0f);
}

template <bool kSoftcap, typename T>
LOKU_INLINE void backward_row(const T* row, int64_t columns, int64_t first_column, int64_t target,
                              float softcap, const double* triplet, int64_t runner_up_id,
                              const std::array<double, 3>& g, T* out) {
  const Entry<kSoftcap> entry{softcap};
  // Target and runner-up have gradients of their own. Their entries are read before they may be overwritten.
  const uint64_t position[2] = {position_of(target, first_column), position_of(runner_up_id, first_column)};
  bool here[2];
  float own[2];
  for (int i = 0; i < 2; ++i) {
    here[i] = position[i] < static_cast<uint64_t>(columns);
    own[i] = here[i] ? static_cast<float>(g[i] * entry.slope(to_float(row[position[i]]))) : 0.0f;
  }
  const float g_rest = static_cast<float>(g[2]);
  // `rest` is split into two floats. One float would lose the digits that exp() needs at a large offset.
  const float rest_high = static_cast<float>(triplet[2]);
  const float rest_low = static_cast<float>(triplet[2] - rest_high);
  if (triplet[2] == kMinusInfinity) {  // no rest, so no gradient
    std::fill_n(out, columns, T{});
  } else if (std::isfinite(g_rest) && std::isfinite(rest_high)) {
#pragma omp simd
    for (int64_t v = 0; v < columns; ++v) {
      const float x = to_float(row[v]);
      const float share = exp_nonpositive((entry.logit(x) - rest_high) - rest_low);
      out[v] = from_number<T>(g_rest * share * entry.slope(x));
    }
  } else {
    for (int64_t v = 0; v < columns; ++v) {
      const float x = to_float(row[v]);
      const float share = exp_nonpositive((entry.logit(x) - rest_high) - rest_low);
      out[v] = from_float<T>(g_rest * share * entry.slope(x));
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (here[i]) out[position[i]] = from_float<T>(own[i]);
  }
}

// The kernels of one row, for each type. They are compiled once per instruction set.
#define LOKU_ROW_KERNELS(T)                                                                                \
  LOKU_TARGET_CLONES void forward_kernel(const T* row, int64_t vocab, int64_t target, float softcap,       \
                                         const Triplets& out, int64_t n) {                                 \
    if (softcap == 0.0f) {                                                                                 \
      forward_row<false>(row, vocab, target, softcap, out, n);                                             \
    } else {                                                                                               \
      forward_row<true>(row, vocab, target, softcap, out, n);                                              \
    }                                                                                                      \
  }                                                                                                        \
  LOKU_TARGET_CLONES void columns_kernel(T* row, int64_t columns, int64_t first_column, int64_t target,    \
                                         float softcap, bool store, const OnlineStates& states, int64_t n, \
                                         RowScratch& scratch) {                                            \
    if (softcap == 0.0f) {                                                                                 \
      if (store) {                                                                                         \
        columns_of_row<true, false>(row, columns, first_column, target, softcap, states, n, scratch);      \
      } else {                                                                                             \
        columns_of_row<false, false>(row, columns, first_column, target, softcap, states, n, scratch);     \
      }                                                                                                    \
    } else if (store) {                                                                                    \
      columns_of_row<true, true>(row, columns, first_column, target, softcap, states, n, scratch);         \
    } else {                                                                                               \
      columns_of_row<false, true>(row, columns, first_column, target, softcap, states, n, scratch);        \
    }                                                                                                      \
  }                                                                                                        \
  LOKU_TARGET_CLONES void inverted_hinge_kernel(T* row, int64_t vocab, int64_t target, double scale,       \
                                                const Triplets& out, int64_t n, RowScratch& scratch) {     \
    inverted_hinge_row(row, vocab, target, scale, out, n, scratch);                                        \
  }                                                                                                        \
  LOKU_TARGET_CLONES void rest_kernel(T* row, int64_t vocab, int64_t target, float softcap,                \
                                      const Triplets& out, int64_t n, RowScratch& scratch) {               \
    if (softcap == 0.0f) {                                                                                 \
      rest_row<false>(row, vocab, target, softcap, out, n, scratch);                                       \
    } else {                                                                                               \
      rest_row<true>(row, vocab, target, softcap, out, n, scratch);                                        \
    }                                                                                                      \
  }                                                                                                        \
  LOKU_TARGET_CLONES void backward_kernel(const T* row, int64_t columns, int64_t first_column,             \
                                          int64_t target, float softcap, const double* triplet,            \
                                          int64_t runner_up_id, const std::array<double, 3>& g, T* out) {  \
    if (softcap == 0.0f) {                                                                                 \
      backward_row<false>(row, columns, first_column, target, softcap, triplet, runner_up_id, g, out);     \
    } else {                                                                                               \
      backward_row<true>(row, columns, first_column, target, softcap, triplet, runner_up_id, g, out);      \
    }                                                                                                      \
  }
LOKU_ROW_KERNELS(float)
LOKU_ROW_KERNELS(BFloat16)
LOKU_ROW_KERNELS(Float16)
#undef LOKU_ROW_KERNELS

#define LOKU_SCALE_KERNEL(T)                                                                 \
  LOKU_TARGET_CLONES void scale_kernel(T* row, int64_t columns, float factor) {              \
    for (int64_t v = 0; v < columns; ++v) row[v] = from_float<T>(to_float(row[v]) * factor); \
  }
LOKU_SCALE_KERNEL(float)
LOKU_SCALE_KERNEL(BFloat16)
LOKU_SCALE_KERNEL(Float16)
#undef LOKU_SCALE_KERNEL

template <typename T>
T* row_of(const Rows& rows, int64_t n) {
  return static_cast<T*>(rows.data) + (rows.offsets ? rows.offsets[n] : n * rows.stride);
}

int64_t first_bad_label(const Ids& labels, const Rows& logits, int64_t ignore_index) {
  require_labels(labels, logits.count);
  for (int64_t n = 0; n < logits.count; ++n) {
    if (labels[n] != ignore_index && (labels[n] < 0 || labels[n] >= logits.columns)) return n;
  }
  return -1;
}

// Overwrite the rows by kernel(row, label, n, scratch). An ignored row becomes zeros.
template <typename T, typename Kernel>
int64_t overwrite_rows(const Rows& logits, const Ids& labels, int64_t ignore_index, const Triplets& out,
                       int threads, const Kernel& kernel) {
  const int64_t bad = first_bad_label(labels, logits, ignore_index);
  if (bad >= 0) return bad;
  const auto make_scratch = [&] { return RowScratch::of<T>(logits); };
  parallel_for(logits.count, threads, make_scratch, [&](int64_t n, RowScratch& scratch) {
    T* row = row_of<T>(logits, n);
    if (labels[n] == ignore_index) {
      write_ignored(out, n);
      std::fill_n(row, logits.columns, T{});
    } else {
      kernel(row, labels[n], n, scratch);
    }
  });
  return -1;
}

}  // namespace

// Compute triplet and runner_up_id of logits and labels. Each logit is read once.
int64_t triplet_forward(const Rows& logits, const Ids& labels, int64_t ignore_index, float softcap,
                        const Triplets& out, int threads) {
  const int64_t bad = first_bad_label(labels, logits, ignore_index);
  if (bad >= 0) return bad;
  for_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(logits.count, threads, [&](int64_t n) {
      if (labels[n] == ignore_index) {
        write_ignored(out, n);
      } else {
        forward_kernel(row_of<T>(logits, n), logits.columns, labels[n], softcap, out, n);
      }
    });
  });
  return -1;
}

// Compute the gradient of the logits from that of the triplet, which is a factor times `grad_triplet`. It is
// g_target at the label, g_runner_up at the runner-up and g_rest * exp(y - rest) elsewhere, each times the
// softcap's slope. `grad_logits` may be `logits`.
void triplet_backward(const Rows& logits, int64_t first_column, const Ids& labels, int64_t ignore_index,
                      const Triplets& saved, const double* grad_triplet, const Factors& factors,
                      float softcap, const Rows& grad_logits, int threads) {
  require_labels(labels, logits.count);
  for_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(logits.count, threads, [&](int64_t n) {
      T* row = row_of<T>(grad_logits, n);
      if (labels[n] == ignore_index) {
        std::fill_n(row, logits.columns, T{});
        return;
      }
      const double factor = factors.of(n);
      const double* g = grad_triplet + 3 * n;
      backward_kernel(row_of<T>(logits, n), logits.columns, first_column, labels[n], softcap,
                      saved.triplet + 3 * n, read_once(saved.runner_up_id + n),
                      {factor * g[0], factor * g[1], factor * g[2]}, row);
    });
  });
}

// Compute forward and backward of IHL in one. The logits become `scale` times the gradient of the row's IHL.
int64_t inverted_hinge_(const Rows& logits, const Ids& labels, int64_t ignore_index, double scale,
                        const Triplets& out, int threads) {
  int64_t bad = -1;
  for_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    bad = overwrite_rows<T>(logits, labels, ignore_index, out, threads,
                            [&](T* row, int64_t label, int64_t n, RowScratch& scratch) {
                              inverted_hinge_kernel(row, logits.columns, label, scale, out, n, scratch);
                            });
  });
  return bad;
}

// Compute the triplets. The logits become exp(y - rest) times the softcap's slope, and 0 at target and
// runner-up.
int64_t rest_probabilities_(const Rows& logits, const Ids& labels, int64_t ignore_index, float softcap,
                            const Triplets& out, int threads) {
  int64_t bad = -1;
  for_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    bad = overwrite_rows<T>(logits, labels, ignore_index, out, threads,
                            [&](T* row, int64_t label, int64_t n, RowScratch& scratch) {
                              rest_kernel(row, logits.columns, label, softcap, out, n, scratch);
                            });
  });
  return bad;
}

// Take the next columns of rows into `states`, which hold the earlier ones. With `store` the logits become
// exp(y - rest_max) times the softcap's slope, and 0 at target and runner-up.
void triplet_columns_(const Rows& logits, int64_t first_column, const Ids& labels, float softcap, bool store,
                      const OnlineStates& states, int threads) {
  require_labels(labels, logits.count);
  for_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    const auto make_scratch = [&] { return store ? RowScratch::of<T>(logits) : RowScratch(); };
    parallel_for(logits.count, threads, make_scratch, [&](int64_t n, RowScratch& scratch) {
      columns_kernel(row_of<T>(logits, n), logits.columns, first_column, labels[n], softcap, store, states, n,
                     scratch);
    });
  });
}

// Multiply each row by its factor. A row whose factor is 1 is left alone.
void scale_rows_(const Rows& rows, const Factors& factors, int threads) {
  for_dtype(rows.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(rows.count, threads, [&](int64_t n) {
      const float factor = static_cast<float>(factors.of(n));
      if (factor != 1.0f) scale_kernel(row_of<T>(rows, n), rows.columns, factor);
    });
  });
}

}  // namespace loku
