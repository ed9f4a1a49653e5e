// Rows of logits in 16-byte vectors, on CUDA devices: their layout, their loads and their stores.
#pragma once

#include <cstdint>

#include "gpu.h"

namespace loku {

constexpr int kBatch = 4;  // vectors that a thread loads before it uses the first one

__device__ __forceinline__ Vector filled(uint32_t word) { return {{word, word, word, word}}; }

// The layout of the rows of a tensor, as all kernels take it.
struct RowLayout {
  unsigned char* data;
  unsigned inner;
  int64_t outer_stride, inner_stride;  // in entries

  template <typename Word>
  __device__ __forceinline__ typename Word::Storage* row(unsigned n) const {
    const unsigned outer = n / inner;
    return reinterpret_cast<typename Word::Storage*>(data) + outer * outer_stride +
           (n - outer * inner) * inner_stride;
  }
};

// The vectors of a row lie on 16-byte boundaries. The first vector begins up to kWidth - 1 entries before the
// row. The last one ends up to as many after it. No other vector is partly outside.
template <typename Word>
struct RowVectors {
  using Storage = typename Word::Storage;
  static constexpr int kWidth = 16 / sizeof(Storage);
  static constexpr int kPerWord = 4 / sizeof(Storage);

  Storage* row;
  int columns;
  int head;        // entries of the first vector that precede the row
  int begin, end;  // the vectors of this block's slice

  __device__ __forceinline__ RowVectors(Storage* row, int columns, int cluster, int rank)
      : row(row),
        columns(columns),
        head(static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Storage))) {
    const int count = (head + columns + kWidth - 1) / kWidth;
    const int share = (count + cluster - 1) / cluster;
    begin = min(rank * share, count);
    end = min(begin + share, count);
  }

  // Return the index of the first entry of vector i.
  __device__ __forceinline__ int entry_of(int i) const { return i * kWidth - head; }

  // Load vector i, with -inf outside the row.
  __device__ __forceinline__ Vector load(int i) const {
    const int entry = entry_of(i);
    if (entry >= 0 && entry + kWidth <= columns) return load_16_bytes(row + entry);
    Vector v = filled(Word::kMinusInfinity);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int lane = 0; lane < kPerWord; ++lane) {
        const int index = entry + w * kPerWord + lane;
        if (index >= 0 && index < columns) set(v.word[w], lane, row[index]);
      }
    }
    return v;
  }

  // Load this thread's vectors of the batch that starts at vector `batch_begin`, with -inf beyond the slice.
  // A batch inside the row has no branch, so its loads are under way together.
  __device__ __forceinline__ void load_batch(Vector (&batch)[kBatch], int batch_begin) const {
    const int threads = blockDim.x, thread = threadIdx.x, last = batch_begin + kBatch * threads - 1;
    if (last < end && entry_of(batch_begin) >= 0 && entry_of(last) + kWidth <= columns) {
#pragma unroll
      for (int v = 0; v < kBatch; ++v) {
        batch[v] = load_16_bytes(row + entry_of(batch_begin + v * threads + thread));
      }
      return;
    }
#pragma unroll
    for (int v = 0; v < kBatch; ++v) {
      const int i = batch_begin + v * threads + thread;
      batch[v] = i < end ? load(i) : filled(Word::kMinusInfinity);
    }
  }

  // Store vector i to a row with the same indices, which may have other 16-byte boundaries.
  __device__ __forceinline__ void store(Storage* out, int i, const Vector& v) const {
    const int entry = entry_of(i);
    if (entry >= 0 && entry + kWidth <= columns && reinterpret_cast<uintptr_t>(out + entry) % 16 == 0) {
      store_16_bytes(out + entry, v);
      return;
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int index = entry + j;
      if (index >= 0 && index < columns) {
        out[index] = static_cast<Storage>(v.word[j / kPerWord] >> (j % kPerWord * 16));
      }
    }
  }

  // Replace entry `index` by `bits`, if vector i holds it.
  __device__ __forceinline__ void replace(Vector& v, int i, int index, uint32_t bits) const {
    const unsigned position = static_cast<unsigned>(index - entry_of(i));
    if (position >= static_cast<unsigned>(kWidth)) return;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (position == static_cast<unsigned>(j)) set(v.word[j / kPerWord], j % kPerWord, bits);
    }
  }

  static __device__ __forceinline__ void set(uint32_t& word, int lane, uint32_t bits) {
    if (kPerWord == 1) {
      word = bits;
    } else {
      word = lane == 0 ? (word & 0xffff0000u) | (bits & 0xffffu) : (word & 0xffffu) | (bits << 16);
    }
  }
};

// Write of(x) for each entry x of the block's slice of a row. The slice is read again, or taken from the
// stash that reduce_row() filled. replace(v, i) may change vector i before it is stored.
template <bool kKept, typename Word, typename Of, typename Replace>
__device__ __forceinline__ void write_row(const RowVectors<Word>& vectors, typename Word::Storage* out,
                                          const Vector* stash, const Of& of, const Replace& replace) {
  const int thread = threadIdx.x, threads = blockDim.x;
#pragma unroll 1
  for (int begin = vectors.begin; begin < vectors.end; begin += kBatch * threads) {
    Vector batch[kBatch];
    if (!kKept) vectors.load_batch(batch, begin);
#pragma unroll
    for (int v = 0; v < kBatch; ++v) {
      const int i = begin + v * threads + thread;
      if (i >= vectors.end) break;
      if (kKept) batch[v] = stash[i - vectors.begin];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t word = batch[v].word[w];
        batch[v].word[w] = Word::pack(of(Word::low(word)), of(Word::high(word)));
      }
      replace(batch[v], i);
      vectors.store(out, i, batch[v]);
    }
  }
}

template <typename Word>
__device__ __forceinline__ void write_zeros(const RowVectors<Word>& vectors, typename Word::Storage* out) {
  for (int i = vectors.begin + static_cast<int>(threadIdx.x); i < vectors.end;
       i += static_cast<int>(blockDim.x)) {
    vectors.store(out, i, filled(0));
  }
}

}  // namespace loku
