// The softmax triplet of rows of logits on the CPU. See triplet_cpu.cpp for what each function does.
#pragma once

#include <cstdint>

namespace loku {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Row n starts `offsets[n]` elements after `data`; its `vocab` entries are contiguous.
//
// With a softcap > 0 an entry is u, and the logit it stands for y = softcap * u; 0 means none.
struct Rows {
  void* data;
  const int64_t* offsets;
  int64_t count;
  int64_t vocab;
  DType dtype;
};

// One row of `triplet` is (target, runner_up, rest), of `runner_up_id` the runner-up's index. A row
// whose label is ignored gets zeros and -1.
struct Triplets {
  double* triplet;
  int64_t* runner_up_id;
};

int64_t first_bad_label(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index);

void triplet_forward(const Rows& logits, const int64_t* labels, int64_t ignore_index, float softcap,
                     const Triplets& out, int threads);

void triplet_backward(const Rows& logits, const int64_t* labels, int64_t ignore_index, const Triplets& saved,
                      const double* grad_triplet, float softcap, const Rows& grad_logits, int threads);

enum class FusedGradient : int { kInvertedHinge = 0, kRest = 1 };

void triplet_fused_(const Rows& logits, const int64_t* labels, int64_t ignore_index, FusedGradient gradient,
                    double scale, float softcap, const Triplets& out, int threads);

}  // namespace loku
