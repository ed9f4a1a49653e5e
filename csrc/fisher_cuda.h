// Squared per-sample gradients on CUDA devices. The function is described in fisher_cuda.cu.
#pragma once

#include <cstdint>

#include "fisher_cpu.h"
#include "triplet_cuda.h"

namespace loku {

// The side of a tile. `partials` has one row for each kFisherTile inputs.
constexpr int kFisherTile = 128;

// Addresses and strides of the features are multiples of 16 bytes. So is the row of a token's features, which
// may run into padding.
void cuda_accumulate_squared_grad_(int64_t samples, int64_t tokens, DType dtype, const Features& inputs,
                                   const Features& grad_outputs, const Matrix& fisher, const Matrix& divisor,
                                   float* partials, Stream stream);

}  // namespace loku
