// The softmax triplet of rows of logits on the CPU. See triplet_cpu.cpp for what each function does.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace loku {

// Row n starts `offsets[n]` elements after `data`; its `columns` entries are contiguous.
//
// With a softcap > 0 an entry is u, and the logit it stands for y = softcap * u; 0 means none.
struct Rows {
  void* data;
  const int64_t* offsets;
  int64_t count;
  int64_t columns;
  DType dtype;
};

// One row of `triplet` is (target, runner_up, rest), of `runner_up_id` the runner-up's index. A row
// whose label is ignored gets zeros and -1.
struct Triplets {
  double* triplet;
  int64_t* runner_up_id;
};

// Rows whose columns come in several calls: one row of `state` is (target, runner_up, rest_max, rest_sum),
// see online_triplet.h. What the terms that earlier calls stored must be multiplied by now is `rescale`;
// the runner-up of an earlier call that has joined the rest since (-1: none) has `demoted_share` in it.
struct OnlineStates {
  static constexpr int64_t kNumbers = 4;
  double* state;
  int64_t* runner_up_id;
  float* rescale;
  int64_t* demoted_id;
  float* demoted_share;
};

int64_t first_bad_label(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index);

void triplet_forward(const Rows& logits, const int64_t* labels, int64_t ignore_index, const Triplets& out,
                     int threads);

void triplet_backward(const Rows& logits, int64_t first_column, const int64_t* labels, int64_t ignore_index,
                      const Triplets& saved, const double* grad_triplet, float softcap,
                      const Rows& grad_logits, int threads);

void inverted_hinge_(const Rows& logits, const int64_t* labels, int64_t ignore_index, double scale,
                     const Triplets& out, int threads);

void triplet_columns_(const Rows& logits, int64_t first_column, const int64_t* labels, float softcap,
                      bool store, const OnlineStates& states, int threads);

void scale_rows_(const Rows& rows, const float* factors, int threads);

}  // namespace loku
