// Squared per-sample gradients on the CPU. The functions are described in fisher_cpu.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace loku {

// Features (samples, tokens, width) of one type. Those of a token are contiguous. Strides are in elements.
struct Features {
  const void* data;
  int64_t width;
  int64_t sample_stride;
  int64_t token_stride;
};

// A matrix of floats with contiguous rows. `data` is null without a matrix.
struct Matrix {
  float* data;
  int64_t row_stride;
};

void accumulate_squared_grad_(int64_t samples, int64_t tokens, DType dtype, const Features& inputs,
                              const Features& grad_outputs, const Matrix& fisher, const Matrix& divisor,
                              int threads);

void add_squares_(const void* product, int64_t rows, int64_t columns, const Matrix& fisher, int threads);

}  // namespace loku
