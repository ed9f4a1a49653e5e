// Squared per-sample gradients of a linear layer's weight on CUDA devices. See fisher_cuda.cu.
#pragma once

#include <cstdint>

#include "triplet_cuda.h"

namespace loku {

// (samples, tokens, features): features contiguous, strides in elements. Data and strides are multiples of 16
// bytes, and so is a row of features, which may run into padding.
struct SampleTokens {
  const void* data;
  int64_t sample_stride, token_stride;
};

struct FisherShape {
  int64_t samples, tokens, outputs, inputs;
  DType dtype;  // of inputs and grad_outputs
};

// Entries of a tile's side: `partials` has one row for each kFisherTile inputs.
constexpr int kFisherTile = 128;

void cuda_accumulate_squared_grad_(const FisherShape& shape, const SampleTokens& inputs,
                                   const SampleTokens& grad_outputs, float* fisher, int64_t fisher_stride,
                                   const float* divisor, float* partials, Stream stream);

}  // namespace loku
