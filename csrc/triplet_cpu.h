// The softmax triplet of rows of logits on the CPU. The functions are described in triplet_cpu.cpp.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

namespace loku {

// Row n starts `offsets[n]` elements after `data`, or `n * stride` if there are no offsets. Its `columns`
// entries are contiguous.
//
// With a softcap > 0 an entry is u and stands for the logit y = softcap * u. A softcap of 0 means none.
struct Rows {
  void* data;
  const int64_t* offsets;
  int64_t stride;
  int64_t count;
  int64_t columns;
  DType dtype;
};

// Read the caller's memory once: another thread may write to it meanwhile, and the compiler may not read it a
// second time.
inline int64_t read_once(const int64_t* id) { return __atomic_load_n(id, __ATOMIC_RELAXED); }

// The labels of a call, or runner-ups that an earlier call has saved. They are a copy. So the ids that were
// checked are the ids that are used, whatever another thread does to the caller's.
using Ids = std::vector<int64_t>;

inline Ids copy_of(const int64_t* ids, int64_t count) {
  Ids copy(static_cast<size_t>(count));
  for (int64_t n = 0; n < count; ++n) copy[n] = read_once(ids + n);
  return copy;
}

inline void require_labels(const Ids& labels, int64_t rows) {
  if (static_cast<int64_t>(labels.size()) != rows) {
    throw std::invalid_argument("there must be a label for each row, got " + std::to_string(labels.size()) +
                                " labels of " + std::to_string(rows) + " rows");
  }
}

// A row of `triplet` is (target, runner_up, rest). An entry of `runner_up_id` is the runner-up's index. A row
// whose label is ignored gets zeros and -1.
struct Triplets {
  double* triplet;
  int64_t* runner_up_id;
};

// The factor of row n of a gradient is `each[n]`, or `all` if there is no `each`.
struct Factors {
  double all;
  const double* each;
  double of(int64_t n) const { return each ? each[n] : all; }
};

// The states of rows whose columns come in several calls. A row of `state` is (target, runner_up, rest_max,
// rest_sum), as in online_triplet.h. `rescale` is the factor of the terms that earlier calls stored.
// `demoted_id` is the runner-up of an earlier call that the last call moved into the rest, or -1.
// `demoted_share` is its term.
struct OnlineStates {
  static constexpr int64_t kNumbers = 4;
  double* state;
  int64_t* runner_up_id;
  float* rescale;
  int64_t* demoted_id;
  float* demoted_share;
};

// Each of the three returns the index of the first label that is neither in [0, V) nor ignored, and then has
// written nothing. It returns -1 if there is none.
int64_t triplet_forward(const Rows& logits, const Ids& labels, int64_t ignore_index, float softcap,
                        const Triplets& out, int threads);

int64_t inverted_hinge_(const Rows& logits, const Ids& labels, int64_t ignore_index, double scale,
                        const Triplets& out, int threads);

int64_t rest_probabilities_(const Rows& logits, const Ids& labels, int64_t ignore_index, float softcap,
                            const Triplets& out, int threads);

void triplet_backward(const Rows& logits, int64_t first_column, const Ids& labels, int64_t ignore_index,
                      const Triplets& saved, const double* grad_triplet, const Factors& factors,
                      float softcap, const Rows& grad_logits, int threads);

void triplet_columns_(const Rows& logits, int64_t first_column, const Ids& labels, float softcap, bool store,
                      const OnlineStates& states, int threads);

void scale_rows_(const Rows& rows, const Factors& factors, int threads);

}  // namespace loku
