// Softmax triplet, CPU kernels of a few numbers a row: the losses with their gradients in the triplet, and
// the gradient of the hidden states of a linear operator.
#include "losses_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace loku {
namespace {

constexpr int64_t kRowsOfThread = 256;  // with fewer rows a thread costs more time than it saves

// out = g[0] W[t] + g[1] W[r] + g[2] O, rounded once.
#define LOKU_SUM_KERNEL(T)                                                                    \
  LOKU_TARGET_CLONES void sum_kernel(const T* target, const T* runner_up, const T* direction, \
                                     const float* g, int64_t width, T* out) {                 \
    for (int64_t i = 0; i < width; ++i) {                                                     \
      out[i] = from_float<T>(g[0] * to_float(target[i]) + g[1] * to_float(runner_up[i]) +     \
                             g[2] * to_float(direction[i]));                                  \
    }                                                                                         \
  }
LOKU_SUM_KERNEL(float)
LOKU_SUM_KERNEL(BFloat16)
LOKU_SUM_KERNEL(Float16)
#undef LOKU_SUM_KERNEL

// Compute token_losses. `losses` has room for each row. So nothing here allocates memory, and a caller may
// have overwritten its logits before.
void reduced_losses(Loss loss, const double* triplet, const Ids& labels, int64_t ignore_index,
                    Reduction reduction, bool wide, void* out, double* grad_triplet,
                    std::vector<double>& losses, int threads) {
  const int64_t count = static_cast<int64_t>(labels.size());
  const int64_t counted_rows = std::max<int64_t>(1, number_counted(labels.data(), count, ignore_index));
  const double share = reduction == Reduction::kMean ? 1.0 / static_cast<double>(counted_rows) : 1.0;
  const int useful = static_cast<int>(std::min<int64_t>(threads, 1 + count / kRowsOfThread));
  parallel_for(count, useful, [&](int64_t n) {
    const bool counted = labels[n] != ignore_index;
    const LossAndGradient row = counted ? loss_of(loss, triplet + 3 * n) : LossAndGradient{};
    losses[n] = row.loss;
    for (int i = 0; grad_triplet && i < 3; ++i) grad_triplet[3 * n + i] = share * row.gradient[i];
  });
  const auto write = [&](int64_t i, double value) {
    if (wide) {
      static_cast<double*>(out)[i] = value;
    } else {
      static_cast<float*>(out)[i] = static_cast<float>(value);
    }
  };
  if (reduction == Reduction::kNone) {
    for (int64_t n = 0; n < count; ++n) write(n, losses[n]);
  } else {
    double sum = 0;
    for (const double value : losses) sum += value;
    write(0, share * sum);
  }
}

}  // namespace

// Compute IHL = 1 + p_0 - p_1 or the cross entropy of a triplet, with p its softmax. Only sums of
// probabilities occur, so nothing cancels for a probability near 1.
LossAndGradient loss_of(Loss loss, const double* triplet) {
  const double top = std::max(triplet[0], std::max(triplet[1], triplet[2]));
  const double e0 = std::exp(triplet[0] - top), e1 = std::exp(triplet[1] - top),
               e2 = std::exp(triplet[2] - top);
  const double sum = e0 + e1 + e2;
  const double p0 = e0 / sum, p1 = e1 / sum, p2 = e2 / sum;
  if (loss == Loss::kInvertedHinge) {
    return {2 * p0 + p2, {p0 * (2 * p1 + p2), -p1 * (2 * p0 + p2), p2 * (p1 - p0)}};
  }
  const double others = triplet[0] == top ? std::log1p((e1 + e2) / e0) : top - triplet[0] + std::log(sum);
  return {others, {-(p1 + p2), p1, p2}};
}

// Return the number of labels that are not ignored.
int64_t number_counted(const int64_t* labels, int64_t count, int64_t ignore_index) {
  return count - std::count(labels, labels + count, ignore_index);
}

// Compute the losses of triplets, and their gradients in the triplets if `grad_triplet` is not null. A mean
// is over the counted rows and is 0 without one. `out` holds doubles if it is `wide`, else floats: one
// number, or one for each row without a reduction. An ignored row has the loss 0 and no gradient.
void token_losses(Loss loss, const double* triplet, const Ids& labels, int64_t ignore_index,
                  Reduction reduction, bool wide, void* out, double* grad_triplet, int threads) {
  std::vector<double> losses(labels.size());
  reduced_losses(loss, triplet, labels, ignore_index, reduction, wide, out, grad_triplet, losses, threads);
}

// Compute the loss of logits: triplet_forward, or rest_probabilities_ to overwrite them, and token_losses.
int64_t logits_loss(const Rows& logits, const Ids& labels, int64_t ignore_index, float softcap,
                    bool overwrite, Loss loss, Reduction reduction, bool wide, void* out, double* saved,
                    int threads) {
  std::vector<double> losses(labels.size());  // before the logits are overwritten
  const Saved kept{saved, logits.count};
  const auto compute = overwrite ? rest_probabilities_ : triplet_forward;
  const int64_t bad = compute(logits, labels, ignore_index, softcap, kept.triplets(), threads);
  if (bad >= 0) return bad;
  reduced_losses(loss, saved, labels, ignore_index, reduction, wide, out, kept.gradient(), losses, threads);
  return -1;
}

// Compute IHL, and overwrite the logits with `scale` times the gradient of the rows' sum.
int64_t inverted_hinge_loss_(const Rows& logits, const Ids& labels, int64_t ignore_index, double scale,
                             Reduction reduction, bool wide, void* out, int threads) {
  std::vector<double> triplet(3 * labels.size()), losses(labels.size());  // before the logits are overwritten
  Ids runner_up_id(labels.size());
  const Triplets triplets = {triplet.data(), runner_up_id.data()};
  const int64_t bad = inverted_hinge_(logits, labels, ignore_index, scale, triplets, threads);
  if (bad >= 0) return bad;
  reduced_losses(Loss::kInvertedHinge, triplet.data(), labels, ignore_index, reduction, wide, out, nullptr,
                 losses, threads);
  return -1;
}

// Compute the gradient of the logits from the numbers that logits_loss has saved.
void logits_loss_backward(const Rows& logits, const Ids& labels, int64_t ignore_index, double* saved,
                          const Factors& factors, const Rows& grad_logits, int threads) {
  const Saved kept{saved, logits.count};
  triplet_backward(logits, 0, labels, ignore_index, kept.triplets(), kept.gradient(), factors, 0.0f,
                   grad_logits, threads);
}

// Compute factor * (g_0 y'_t W[t] + g_1 y'_r W[r] + g_2 logit_scale O) of each row, where y' is the slope of
// the logits. An ignored row gets zeros.
int64_t hidden_gradient(const double* grad_triplet, const Factors& factors, const MatrixRows& weight,
                        int64_t vocab, const Ids& labels, const Triplets& saved, const MatrixRows& direction,
                        float softcap, double logit_scale, int64_t width, DType dtype, void* out,
                        int threads) {
  const int64_t count = static_cast<int64_t>(labels.size());
  const Ids runner_ups = copy_of(saved.runner_up_id, count);
  for (int64_t n = 0; n < count; ++n) {
    if (runner_ups[n] >= 0 && (runner_ups[n] >= vocab || labels[n] < 0 || labels[n] >= vocab)) return n;
  }
  const auto slope = [&](double logit) {
    const double u = softcap == 0.0f ? 0.0 : logit / softcap;
    return logit_scale * (1 - u * u);
  };
  for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto row_of = [](const MatrixRows& entries, int64_t n) {
      return static_cast<const T*>(entries.data) + n * entries.stride;
    };
    parallel_for(count, threads, [&](int64_t n) {
      T* row = static_cast<T*>(out) + n * width;
      if (runner_ups[n] < 0) {
        std::fill_n(row, width, T{});
        return;
      }
      const double* g = grad_triplet + 3 * n;
      const double* triplet = saved.triplet + 3 * n;
      const double factor = factors.of(n);
      const bool has_rest = triplet[2] != -std::numeric_limits<double>::infinity();
      const float numbers[3] = {static_cast<float>(factor * g[0] * slope(triplet[0])),
                                static_cast<float>(factor * g[1] * slope(triplet[1])),
                                has_rest ? static_cast<float>(factor * g[2] * logit_scale) : 0.0f};
      sum_kernel(row_of(weight, labels[n]), row_of(weight, runner_ups[n]), row_of(direction, n), numbers,
                 width, row);
    });
  });
  return -1;
}

// Compute hidden_gradient from the numbers that logits_loss has saved.
int64_t hidden_loss_backward(double* saved, const Factors& factors, const MatrixRows& weight, int64_t vocab,
                             const Ids& labels, const MatrixRows& direction, float softcap,
                             double logit_scale, int64_t width, DType dtype, void* out, int threads) {
  const Saved kept{saved, static_cast<int64_t>(labels.size())};
  return hidden_gradient(kept.gradient(), factors, weight, vocab, labels, kept.triplets(), direction, softcap,
                         logit_scale, width, dtype, out, threads);
}

}  // namespace loku
