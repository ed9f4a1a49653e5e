// Squared per-sample gradients of a linear layer's weight, CPU. The products G_n = grad_outputs_n^T inputs_n
// are squared and added while a tile of them is in registers.
//
// A block of the Fisher stays in the L2 cache during all samples. For each sample the inputs of its columns
// are packed as float. Then the gradients are packed for a few rows at a time. A tile takes one multiply-add
// for each entry and token, and one more for the square.
#include "fisher_cpu.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace loku {
namespace {

constexpr int64_t kTileRows = 8, kTileColumns = 32;       // 256 sums, in 16 of AVX-512's 32 registers
constexpr int64_t kBlockRows = 128, kBlockColumns = 256;  // a block of the Fisher that fits into the L2 cache
constexpr int64_t kPanel = 1 << 18;                       // most floats of a sample's packed inputs

struct Scratch {
  std::unique_ptr<float[]> inputs;        // (tokens, columns of the block, padded)
  std::unique_ptr<float[]> grad_outputs;  // (tokens, kTileRows)
};

struct Block {
  int64_t top, rows, left, columns;
};

int64_t padded(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns * kTileColumns; }

template <typename T>
LOKU_INLINE const T* first_token(const Features& features, int64_t sample, int64_t feature) {
  return static_cast<const T*>(features.data) + sample * features.sample_stride + feature;
}

// Convert (tokens, width) to float (tokens, width_out), with zeros behind.
template <typename T>
LOKU_INLINE void pack(const T* from, int64_t stride, int64_t tokens, int64_t width, float* to,
                      int64_t width_out) {
  for (int64_t t = 0; t < tokens; ++t, from += stride, to += width_out) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) to[j] = to_float(from[j]);
    for (int64_t j = width; j < width_out; ++j) to[j] = 0.0f;
  }
}

// Add the squares of all samples in one block to `fisher`, or with a divisor to `row_sums`.
template <typename T>
LOKU_INLINE void accumulate_block(int64_t samples, int64_t tokens, const Features& inputs,
                                  const Features& grad_outputs, const Block& block, const Matrix& fisher,
                                  const Matrix& divisor, double* row_sums, Scratch& scratch) {
  const int64_t width = padded(block.columns);
  for (int64_t n = 0; n < samples; ++n) {
    pack(first_token<T>(inputs, n, block.left), inputs.token_stride, tokens, block.columns,
         scratch.inputs.get(), width);
    for (int64_t i0 = 0; i0 < block.rows; i0 += kTileRows) {
      const int64_t rows = std::min(kTileRows, block.rows - i0);
      pack(first_token<T>(grad_outputs, n, block.top + i0), grad_outputs.token_stride, tokens, rows,
           scratch.grad_outputs.get(), kTileRows);
      for (int64_t j0 = 0; j0 < block.columns; j0 += kTileColumns) {
        float g[kTileRows][kTileColumns] = {};
        const float* delta = scratch.grad_outputs.get();
        const float* x = scratch.inputs.get() + j0;
        for (int64_t t = 0; t < tokens; ++t, delta += kTileRows, x += width) {
#pragma GCC unroll 8
          for (int64_t i = 0; i < kTileRows; ++i) {
#pragma omp simd
            for (int64_t j = 0; j < kTileColumns; ++j) g[i][j] += delta[i] * x[j];
          }
        }
        const int64_t columns = std::min(kTileColumns, block.columns - j0);
        for (int64_t i = 0; i < rows; ++i) {
          if (divisor.data) {
            const float* d = divisor.data + (block.top + i0 + i) * divisor.row_stride + block.left + j0;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < columns; ++j) sum += g[i][j] * g[i][j] / d[j];
            row_sums[i0 + i] += sum;
          } else {
            float* f = fisher.data + (block.top + i0 + i) * fisher.row_stride + block.left + j0;
#pragma omp simd
            for (int64_t j = 0; j < columns; ++j) f[j] += g[i][j] * g[i][j];
          }
        }
      }
    }
  }
}

#define LOKU_FISHER_KERNEL(T)                                                                                \
  LOKU_TARGET_CLONES void fisher_kernel(                                                                     \
      T, int64_t samples, int64_t tokens, const Features& inputs, const Features& grad_outputs,              \
      const Block& block, const Matrix& fisher, const Matrix& divisor, double* row_sums, Scratch& scratch) { \
    accumulate_block<T>(samples, tokens, inputs, grad_outputs, block, fisher, divisor, row_sums, scratch);   \
  }
LOKU_FISHER_KERNEL(float)
LOKU_FISHER_KERNEL(BFloat16)
LOKU_FISHER_KERNEL(Float16)
#undef LOKU_FISHER_KERNEL

LOKU_TARGET_CLONES void add_squares_kernel(const BFloat16* g, int64_t columns, float* f) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) f[j] += to_float(g[j]) * to_float(g[j]);
}

}  // namespace

// Add the squares of a contiguous bfloat16 product (rows, columns) to `fisher`.
void add_squares_(const void* product, int64_t rows, int64_t columns, const Matrix& fisher, int threads) {
  parallel_for(rows, threads, [&](int64_t i) {
    const BFloat16* g = static_cast<const BFloat16*>(product) + i * columns;
    add_squares_kernel(g, columns, fisher.data + i * fisher.row_stride);
  });
}

// Add the sum over samples of G_n^2 to fisher (d, k). With a divisor (d, k), add the sums over samples and
// columns of G_n^2 / divisor to fisher (d, 1).
void accumulate_squared_grad_(int64_t samples, int64_t tokens, DType dtype, const Features& inputs,
                              const Features& grad_outputs, const Matrix& fisher, const Matrix& divisor,
                              int threads) {
  const int64_t d = grad_outputs.width, k = inputs.width;
  const int64_t most = std::max(kTileColumns, kPanel / tokens / kTileColumns * kTileColumns);
  const int64_t block_columns = std::min(kBlockColumns, most);
  const int64_t down = (d + kBlockRows - 1) / kBlockRows;
  const int64_t across = (k + block_columns - 1) / block_columns;
  // The row sums of each column of blocks are added up in order, so the result does not depend on the
  // threads.
  std::vector<double> row_sums(divisor.data ? across * d : 0);

  const auto make_scratch = [&] {
    const int64_t width = padded(block_columns);
    if (tokens > std::numeric_limits<int64_t>::max() / width) throw std::bad_alloc();
    return Scratch{std::unique_ptr<float[]>(new float[tokens * width]),
                   std::unique_ptr<float[]>(new float[tokens * kTileRows])};
  };
  const auto run = [&](int64_t index, Scratch& scratch) {
    const int64_t column = index / down;
    const int64_t top = index % down * kBlockRows, left = column * block_columns;
    const Block block = {top, std::min(kBlockRows, d - top), left, std::min(block_columns, k - left)};
    double* sums = divisor.data ? row_sums.data() + column * d + top : nullptr;
    for_dtype(dtype, [&](auto type) {
      fisher_kernel(type, samples, tokens, inputs, grad_outputs, block, fisher, divisor, sums, scratch);
    });
  };
  parallel_for(down * across, threads, make_scratch, run);
  for (int64_t i = 0; divisor.data && i < d; ++i) {
    double sum = 0.0;
    for (int64_t column = 0; column < across; ++column) sum += row_sums[column * d + i];
    fisher.data[i * fisher.row_stride] += static_cast<float>(sum);
  }
}

}  // namespace loku
