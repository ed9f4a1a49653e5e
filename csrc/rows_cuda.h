// Rows of logits in 16-byte vectors, on CUDA devices: their layout, and a slice of a row in registers.
#pragma once

#include <cstdint>

#include "gpu.h"

namespace loku {

constexpr int kVectors = 16;  // vectors of a slice that a thread holds in registers; a power of two

__device__ __forceinline__ Vector filled(uint32_t word) { return {{word, word, word, word}}; }

// The layout of the rows of a tensor.
struct RowLayout {
  unsigned char* data;
  unsigned inner;
  int64_t outer_bytes, inner_bytes;

  __device__ __forceinline__ unsigned char* row(int n) const {
    const unsigned outer = static_cast<unsigned>(n) / inner;
    return data + outer * outer_bytes + (static_cast<unsigned>(n) - outer * inner) * inner_bytes;
  }
};

// The vectors of a row lie on 16-byte boundaries. The first vector begins up to kWidth - 1 entries before the
// row. The last one ends up to as many after it. No other vector is partly outside. Each block of a cluster
// takes a slice of `count` vectors. Its vectors from `low` to `high` are wholly inside the row, so at most
// its first and its last are edges.
//
// Warp w holds the vectors from 32 kVectors w to 32 kVectors (w + 1). Its lane l holds every 32nd of them
// from the l-th on. So the distance of a thread's vectors is a constant.
template <typename Word>
struct Slice {
  static constexpr int kSize = sizeof(typename Word::Storage);
  static constexpr int kWidth = 16 / kSize;
  static constexpr int kPerWord = 4 / kSize;

  unsigned char* row;
  int first_entry;  // index in the row of the first entry of vector 0
  int count, low, high;

  __device__ __forceinline__ Slice(unsigned char* row, int columns, int log2_cluster, int rank) : row(row) {
    const int head = static_cast<int>(reinterpret_cast<uintptr_t>(row) & 15) / kSize;
    const int total = (head + columns + kWidth - 1) / kWidth;
    const int share = (total + (1 << log2_cluster) - 1) >> log2_cluster;
    const int begin = min(rank * share, total);
    count = min(share, total - begin);
    first_entry = begin * kWidth - head;
    low = first_entry < 0 ? 1 : 0;
    high = first_entry + count * kWidth > columns ? count - 1 : count;
    high = max(high, low);
  }

  __device__ __forceinline__ unsigned char* data() const {
    return row + static_cast<int64_t>(first_entry) * kSize;
  }
  __device__ __forceinline__ int entry_of(int vector) const { return first_entry + vector * kWidth; }

  // Return the vector with an entry of the row. It may lie outside the slice.
  __device__ __forceinline__ int vector_of(int entry) const {
    return (entry - first_entry) >> (kWidth == 8 ? 3 : 2);
  }
  __device__ __forceinline__ int place_of(int entry) const { return (entry - first_entry) & (kWidth - 1); }

  // Say whether the thread whose first vector is `own` holds a vector of the slice.
  __device__ __forceinline__ bool holds(int own, int vector) const {
    return static_cast<unsigned>(vector) < static_cast<unsigned>(count) &&
           (vector & ~(32 * (kVectors - 1))) == own;
  }
  // Say whether all vectors of the warp of the thread whose first vector is `own` are before `end`.
  __device__ __forceinline__ bool warp_ends_before(int own, int end) const {
    return (own & ~31) + 32 * kVectors <= end;
  }
};

// Return the place of a vector of the slice among those of its thread.
__device__ __forceinline__ int turn_of(int vector) { return (vector >> 5) & (kVectors - 1); }

// Registers have no addresses. So `pick` and `put` look at all of them and change one. They have no branches,
// with which the compiler would put the registers into memory.
__device__ __forceinline__ Vector pick(const Vector (&x)[kVectors], int j) {
  Vector v = x[0];
#pragma unroll
  for (int i = 1; i < kVectors; ++i) {
#pragma unroll
    for (int w = 0; w < 4; ++w) v.word[w] = i == j ? x[i].word[w] : v.word[w];
  }
  return v;
}

__device__ __forceinline__ void put(Vector (&x)[kVectors], int j, const Vector& v) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int w = 0; w < 4; ++w) x[i].word[w] = i == j ? v.word[w] : x[i].word[w];
  }
}

// Give entry e of a vector these bits. Do nothing if e is -1.
template <typename Word>
__device__ __forceinline__ void set_entry(Vector& v, int e, uint32_t bits) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t old = v.word[w];
    if (Slice<Word>::kPerWord == 1) {
      v.word[w] = e == w ? bits : old;
    } else {
      const uint32_t low = (old & 0xffff0000u) | (bits & 0xffffu), high = (old & 0xffffu) | (bits << 16);
      v.word[w] = e == 2 * w ? low : e == 2 * w + 1 ? high : old;
    }
  }
}

template <typename Word>
__device__ __forceinline__ uint32_t entry_bits(const Vector& v, int e) {
  constexpr int kPerWord = Slice<Word>::kPerWord;
  uint32_t word = v.word[0];
#pragma unroll
  for (int w = 1; w < 4; ++w) word = e / kPerWord == w ? v.word[w] : word;
  if (kPerWord == 1) return word;
  return e & 1 ? word >> 16 : word & 0xffffu;
}

// Set the entries of an edge that are outside the row to -inf. `entry` is the index of its first one.
template <typename Word>
__device__ __forceinline__ void mask_edge(Vector& v, int entry, int columns) {
#pragma unroll
  for (int e = 0; e < Slice<Word>::kWidth; ++e) {
    const bool outside = static_cast<unsigned>(entry + e) >= static_cast<unsigned>(columns);
    set_entry<Word>(v, outside ? e : -1, Word::kMinusInfinity);
  }
}

template <typename Word>
__device__ __forceinline__ void store_edge(unsigned char* address, int entry, int columns, const Vector& v) {
  typename Word::Storage* out = reinterpret_cast<typename Word::Storage*>(address);
#pragma unroll
  for (int e = 0; e < Slice<Word>::kWidth; ++e) {
    if (static_cast<unsigned>(entry + e) < static_cast<unsigned>(columns)) {
      out[e] = static_cast<typename Word::Storage>(entry_bits<Word>(v, e));
    }
  }
}

template <typename Word>
__device__ __forceinline__ void store_entry(unsigned char* row, int entry, float value) {
  reinterpret_cast<typename Word::Storage*>(row)[entry] =
      static_cast<typename Word::Storage>(Word::pack(value, value));
}

// Call finish(vector) on the thread's vectors x, of which the first is `own`, and store them in the row.
template <typename Word, typename Finish>
__device__ __forceinline__ void store_slice(const Slice<Word>& s, int columns, int own, Vector (&x)[kVectors],
                                            const Finish& finish) {
  unsigned char* const out = s.data() + own * 16;
  if ((own & ~31) >= s.low && s.warp_ends_before(own, s.high)) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      finish(x[j]);
      store_16_bytes(out + j * 512, x[j]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    finish(x[j]);
    if (own + 32 * j >= s.low && own + 32 * j < s.high) store_16_bytes(out + j * 512, x[j]);
  }
  if (s.low > 0 && own == 0) store_edge<Word>(s.data(), s.entry_of(0), columns, x[0]);
  const int last = s.count - 1;
  if (s.high < s.count && s.holds(own, last)) {
    store_edge<Word>(s.data() + last * 16, s.entry_of(last), columns, pick(x, turn_of(last)));
  }
}

}  // namespace loku
