// The fused row kernels on CUDA devices: each reads a row of logits once and writes it once, in place. The
// functions are described in fused_rows_cuda.cu.
//
// All addresses are addresses of the device. No function waits for the device or allocates memory there.
#pragma once

#include <cstdint>
#include <string>

#include "triplet_cpu.h"

namespace loku {

// Row n starts (n / inner) * outer_stride + (n % inner) * inner_stride elements after `data`. Its `columns`
// entries are contiguous.
struct DeviceRows {
  void* data;
  int64_t count, inner, outer_stride, inner_stride, columns;
  DType dtype;
};

struct Stream {
  int device;
  uintptr_t handle;  // a cudaStream_t of that device
};

std::string cuda_error();

int64_t cuda_longest_row(int device);

void cuda_inverted_hinge_(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                          const double* scale, const Triplets& out, Stream stream);

void cuda_rest_probabilities_(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                              double softcap, const Triplets& out, Stream stream);

}  // namespace loku
