// Squared per-sample gradients of a linear layer's weight, CUDA kernel.
//
// G_n = sum over tokens t of delta[n, t]^T x[n, t] is an (outputs, inputs) matrix. The Fisher gains the sum
// over n of G_n^2. A block owns a tile of the Fisher and walks the samples' tokens. The tile of G_n and the
// sum of squares stay in registers. The Fisher is read and written once a call. Shared memory holds (token,
// feature) tiles as they lie in memory. The matrix instructions need the token as the inner index, so
// ldmatrix transposes their operands.
#include "fisher_cuda.h"

#include "gpu.h"

namespace loku {
namespace {

constexpr int kTile = kFisherTile;
constexpr int kThreads = 256;
constexpr int kStages = 4;  // steps whose tiles are in shared memory or under way
constexpr int kSide = 8;    // a thread holds kSide x kSide entries of the tile
constexpr int kSlots = 16;  // threads that hold entries of one row

// The index of entry (r, q) of a thread among its kSide * kSide numbers, in the order of the matrix
// instruction.
__device__ __forceinline__ constexpr int index_of(int r, int q) {
  return (r / 2 * (kSide / 2) + q / 2) * 4 + r % 2 * 2 + q % 2;
}

// The tile's product of one step, and the rows and columns of the tile that a thread holds. 16-bit types use
// tensor cores, and eight warps have 64 x 32 entries each.
template <typename Word>
struct Tile {
  static constexpr int kTokens = 32;              // tokens of a step
  static constexpr int kWidth = 8;                // entries in 16 bytes
  static constexpr int kStride = kTile + kWidth;  // 4 banks beyond a multiple of 32, so no conflicts
  using Storage = typename Word::Storage;

  int lane, row_begin, column_begin, slot;

  __device__ __forceinline__ explicit Tile(int thread)
      : lane(thread % 32),
        row_begin(thread / 128 * 64),
        column_begin(thread / 32 % 4 * 32),
        slot(thread / 32 % 4 * 4 + thread % 4) {}

  __device__ __forceinline__ int row(int r) const { return row_begin + r / 2 * 16 + r % 2 * 8 + lane / 4; }
  __device__ __forceinline__ int column(int q) const {
    return column_begin + q / 2 * 8 + lane % 4 * 2 + q % 2;
  }

  __device__ __forceinline__ void multiply(float (&product)[kSide * kSide], const Storage* delta,
                                           const Storage* x) const {
#pragma unroll
    for (int token = 0; token < kTokens; token += 16) {
      uint32_t a[4][4], b[2][4];
      // 16 rows: matrices in the order (outputs 0-7, tokens 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_matrices_transposed(a[i], delta + (token + lane % 8 + lane / 16 * 8) * kStride + row_begin +
                                           i * 16 + lane / 8 % 2 * 8);
      }
      // 2 x 8 columns: matrices in the order (tokens 0-7, inputs 0-7), (8-15, 0-7), (0-7, 8-15), (8-15,
      // 8-15).
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_matrices_transposed(b[j], x + (token + lane % 8 + lane / 8 % 2 * 8) * kStride + column_begin +
                                           j * 16 + lane / 16 * 8);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_add_16x8x16<Word>(product + index_of(2 * i, 2 * j), a[i], b[j / 2] + j % 2 * 2);
        }
      }
    }
  }
};

// float32 uses ordinary multiply-adds, because tensor cores would not keep its digits. There are 16 x 16
// threads. Each has two groups of four rows and of four columns, so that a warp reads shared memory without
// conflicts.
template <>
struct Tile<Float32Word> {
  static constexpr int kTokens = 16;
  static constexpr int kWidth = 4;
  static constexpr int kStride = kTile + kWidth;
  using Storage = uint32_t;

  int thread_row, slot;

  __device__ __forceinline__ explicit Tile(int thread) : thread_row(thread / 16), slot(thread % 16) {}

  __device__ __forceinline__ int row(int r) const { return r / 4 * 64 + thread_row * 4 + r % 4; }
  __device__ __forceinline__ int column(int q) const { return q / 4 * 64 + slot * 4 + q % 4; }

  __device__ __forceinline__ void multiply(float (&product)[kSide * kSide], const Storage* delta,
                                           const Storage* x) const {
#pragma unroll 4
    for (int token = 0; token < kTokens; ++token) {
      Vector a[2], b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[half] = load_16_bytes(delta + token * kStride + row(4 * half));
        b[half] = load_16_bytes(x + token * kStride + column(4 * half));
      }
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
#pragma unroll
        for (int q = 0; q < kSide; ++q) {
          float& sum = product[index_of(r, q)];
          sum = fmaf(as_float(a[r / 4].word[r % 4]), as_float(b[q / 4].word[q % 4]), sum);
        }
      }
    }
  }
};

// The steps through the tokens of one operand. A step loads kTokens tokens of a sample, with zeros after its
// last.
template <typename Word>
struct Loader {
  using Storage = typename Word::Storage;
  const Storage* data;
  int64_t sample_stride, token_stride;
  int tokens, features, first_feature;

  __device__ __forceinline__ void start(Storage* stage, int sample, int first_token, int thread) const {
    constexpr int kVectors = kTile / Tile<Word>::kWidth;  // in a token's part of the tile
#pragma unroll
    for (int i = 0; i < Tile<Word>::kTokens * kVectors / kThreads; ++i) {
      const int vector = thread + i * kThreads;
      const int row = vector / kVectors, column = vector % kVectors * Tile<Word>::kWidth;
      const int token = first_token + row, feature = first_feature + column;
      const bool valid = token < tokens && feature < features;
      const Storage* from = valid ? data + sample * sample_stride + token * token_stride + feature : data;
      copy_async_16(stage + row * Tile<Word>::kStride + column, from, valid);
    }
  }
};

template <typename Word>
constexpr int kStageEntries = Tile<Word>::kTokens * Tile<Word>::kStride;  // entries of one operand's tile

template <typename Word>
constexpr size_t kSharedBytes = 2 * kStages * kStageEntries<Word> * sizeof(typename Word::Storage);
static_assert(kSharedBytes<Float32Word> >= kTile * kSlots * sizeof(float), "room for the sums of rows");
static_assert(kSharedBytes<BFloat16Word> >= kTile * kSlots * sizeof(float), "room for the sums of rows");

// Floors: 2 * samples * tokens * outputs * inputs operations, one read of the operands, and one read and
// write of the Fisher. For 16 x 128 tokens and 4096 x 4096 in bfloat16 these are 69 GFLOP and 0.17 GB. But
// tiles of 128 x 128 read 1.07 GB of operands from the L2 cache, and no other block of a multiprocessor
// computes while one adds to the Fisher. Measured on one H200: 0.48 ms, where the weight-gradient GEMM alone
// takes 0.096 ms (benchmarks/results/gpu_h200.json).
template <typename Word>
__global__ void __launch_bounds__(kThreads, 1)
    squared_grad_kernel(Loader<Word> grad_outputs, Loader<Word> inputs, int samples, Matrix fisher,
                        Matrix divisor, float* partials) {
  using Storage = typename Word::Storage;
  constexpr int kTokens = Tile<Word>::kTokens, kEntries = kStageEntries<Word>;
  const int thread = threadIdx.x;
  const int outputs = grad_outputs.features, columns = inputs.features;
  grad_outputs.first_feature = static_cast<int>(blockIdx.y) * kTile;
  inputs.first_feature = static_cast<int>(blockIdx.x) * kTile;
  Storage* stages = reinterpret_cast<Storage*>(dynamic_shared());  // kStages pairs of delta and x
  const Tile<Word> tile(thread);

  // The loads run kStages - 1 steps ahead of the products, across samples.
  int load_sample = 0, load_token = 0, load_stage = 0;
  auto load_next = [&] {
    if (load_sample < samples) {
      Storage* stage = stages + load_stage * 2 * kEntries;
      grad_outputs.start(stage, load_sample, load_token, thread);
      inputs.start(stage + kEntries, load_sample, load_token, thread);
      load_token += kTokens;
      if (load_token >= inputs.tokens) {
        load_token = 0;
        ++load_sample;
      }
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
    copy_async_commit();  // an empty group too, so that the wait counts steps
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load_next();

  float product[kSide * kSide], total[kSide * kSide];
#pragma unroll
  for (int i = 0; i < kSide * kSide; ++i) product[i] = total[i] = 0.0f;
  int stage = 0;
  for (int sample = 0; sample < samples; ++sample) {
    for (int token = 0; token < inputs.tokens; token += kTokens) {
      copy_async_wait<kStages - 2>();  // this thread's part of the step's tiles has arrived
      __syncthreads();                 // all parts have arrived, and the last step's stage is free
      load_next();                     // fills that stage
      tile.multiply(product, stages + stage * 2 * kEntries, stages + stage * 2 * kEntries + kEntries);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int i = 0; i < kSide * kSide; ++i) {
      total[i] = fmaf(product[i], product[i], total[i]);
      product[i] = 0.0f;
    }
  }

  const int first_row = grad_outputs.first_feature, first_column = inputs.first_feature;
  if (divisor.data == nullptr) {
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      const int row = first_row + tile.row(r);
      if (row >= outputs) continue;
#pragma unroll
      for (int q = 0; q < kSide; ++q) {
        const int column = first_column + tile.column(q);
        if (column < columns) fisher.data[row * fisher.row_stride + column] += total[index_of(r, q)];
      }
    }
    return;
  }
  // Row sums of total / divisor. Each thread stores its part of each row in shared memory. The parts are
  // added in a fixed order.
  __syncthreads();  // no thread still reads the last step's tiles
  float* sums = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    const int row = first_row + tile.row(r);
    float sum = 0.0f;
#pragma unroll
    for (int q = 0; q < kSide; ++q) {
      const int column = first_column + tile.column(q);
      if (row < outputs && column < columns) {
        sum += total[index_of(r, q)] / divisor.data[row * divisor.row_stride + column];
      }
    }
    sums[tile.row(r) * kSlots + tile.slot] = sum;
  }
  __syncthreads();
  if (thread < kTile && first_row + thread < outputs) {
    float sum = 0.0f;
    for (int slot = 0; slot < kSlots; ++slot) sum += sums[thread * kSlots + slot];
    partials[blockIdx.x * static_cast<int64_t>(outputs) + first_row + thread] = sum;
  }
}

}  // namespace

// Add the sum over samples of G_n^2 to fisher (outputs, inputs). With a divisor (outputs, inputs), compute
// the sums over each tile's columns of that sum over the divisor instead, in partials (ceil(inputs /
// kFisherTile), outputs). The caller adds them up, so that the result does not depend on the order in which
// blocks run.
void cuda_accumulate_squared_grad_(int64_t samples, int64_t tokens, DType dtype, const Features& inputs,
                                   const Features& grad_outputs, const Matrix& fisher, const Matrix& divisor,
                                   float* partials, Stream stream) {
  constexpr int64_t kMax = 65535 * int64_t{kTile};  // limit of the grid's y; int would hold more
  if (samples > kMax || tokens > kMax || grad_outputs.width > kMax || inputs.width > kMax) {
    throw std::invalid_argument("loku_kernels: accumulate_squared_grad_ takes sizes up to 8388480 on CUDA");
  }
  use_device(stream.device);
  for_type_of<Float32Word, BFloat16Word, Float16Word>(dtype, [&](auto word) {
    using Word = decltype(word);
    const auto loader = [&](const Features& x) {
      return Loader<Word>{static_cast<const typename Word::Storage*>(x.data),
                          x.sample_stride,
                          x.token_stride,
                          static_cast<int>(tokens),
                          static_cast<int>(x.width),
                          0};
    };
    const auto tiles = [](const Features& x) { return static_cast<unsigned>((x.width + kTile - 1) / kTile); };
    launch("accumulate_squared_grad_", squared_grad_kernel<Word>,
           {dim3(tiles(inputs), tiles(grad_outputs)), kThreads, kSharedBytes<Word>, 1}, stream.handle,
           loader(grad_outputs), loader(inputs), static_cast<int>(samples), fisher, divisor, partials);
  });
}

}  // namespace loku
