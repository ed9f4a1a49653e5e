// Squared per-sample gradients on CUDA devices. See fisher_cuda.cu.
#pragma once

#include <cstdint>

#include "fisher_cpu.h"
#include "triplet_cuda.h"

namespace loku {

// Entries of a tile's side: `partials` has one row for each kFisherTile inputs.
constexpr int kFisherTile = 128;

// Addresses and strides of the features are multiples of 16 bytes, and so is a token's row of them, which may
// run into padding.
void cuda_accumulate_squared_grad_(int64_t samples, int64_t tokens, DType dtype, const Features& inputs,
                                   const Features& grad_outputs, const Matrix& fisher, const Matrix& divisor,
                                   float* partials, Stream stream);

}  // namespace loku
