// The losses of softmax triplets and the gradient of hidden states, on the CPU. The functions are described
// in losses_cpu.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "triplet_cpu.h"

namespace loku {

// The tags of loku_kernels/backends/native.py.
enum class Loss : int { kInvertedHinge = 0, kCrossEntropy = 1 };
enum class Reduction : int { kMean = 0, kSum = 1, kNone = 2 };

// A loss and its gradient in the triplet.
struct LossAndGradient {
  double loss;
  double gradient[3];
};

// Row n starts `n * stride` elements after `data`.
struct MatrixRows {
  const void* data;
  int64_t stride;
};

LossAndGradient loss_of(Loss loss, const double* triplet);

void token_losses(Loss loss, const double* triplet, const Ids& labels, int64_t ignore_index,
                  Reduction reduction, bool wide, void* out, double* grad_triplet, int threads);

int64_t number_counted(const int64_t* labels, int64_t count, int64_t ignore_index);

// The triplets, the gradients of a loss in them and the runner-ups of `count` rows in one piece of memory
// of kNumbers numbers a row.
struct Saved {
  static constexpr int64_t kNumbers = 7;
  double* numbers;
  int64_t count;
  Triplets triplets() const { return {numbers, reinterpret_cast<int64_t*>(numbers + 6 * count)}; }
  double* gradient() const { return numbers + 3 * count; }
};

// Returns a bad label's index, as triplet_forward does.
int64_t logits_loss(const Rows& logits, const Ids& labels, int64_t ignore_index, float softcap,
                    bool overwrite, Loss loss, Reduction reduction, bool wide, void* out, double* saved,
                    int threads);

int64_t inverted_hinge_loss_(const Rows& logits, const Ids& labels, int64_t ignore_index, double scale,
                             Reduction reduction, bool wide, void* out, int threads);

void logits_loss_backward(const Rows& logits, const Ids& labels, int64_t ignore_index, double* saved,
                          const Factors& factors, const Rows& grad_logits, int threads);

// Returns the first counted row whose label or runner-up is not in [0, vocab), and then has written nothing.
// It returns -1 if there is none.
int64_t hidden_gradient(const double* grad_triplet, const Factors& factors, const MatrixRows& weight,
                        int64_t vocab, const Ids& labels, const Triplets& saved, const MatrixRows& direction,
                        float softcap, double logit_scale, int64_t width, DType dtype, void* out,
                        int threads);

int64_t hidden_loss_backward(double* saved, const Factors& factors, const MatrixRows& weight, int64_t vocab,
                             const Ids& labels, const MatrixRows& direction, float softcap,
                             double logit_scale, int64_t width, DType dtype, void* out, int threads);

}  // namespace loku
