// The softmax triplet of rows of logits on CUDA devices. The functions are described in triplet_cuda.cu.
//
// All addresses are addresses of the device. No function waits for the device or allocates memory.
#pragma once

#include <cstdint>
#include <string>

#include "triplet_cpu.h"

namespace loku {

// Row n starts (n / inner) * outer_stride + (n % inner) * inner_stride elements after `data`. Its `columns`
// entries are contiguous. With a softcap > 0 an entry is u and stands for the logit softcap * u.
struct DeviceRows {
  void* data;
  int64_t count, inner, outer_stride, inner_stride, columns;
  DType dtype;
};

struct Stream {
  int device;
  uintptr_t handle;  // a cudaStream_t of that device
};

// Return the reason why the kernels cannot run on this machine: no driver, too old a driver, no device. It is
// empty if they can.
std::string cuda_error();

void cuda_triplet_forward(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                          const Triplets& out, Stream stream);

void cuda_triplet_backward(const DeviceRows& logits, int64_t first_column, const int64_t* labels,
                           int64_t ignore_index, const Triplets& saved, const double* grad_triplet,
                           double softcap, const DeviceRows& grad_logits, Stream stream);

void cuda_inverted_hinge_(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                          const double* scale, const Triplets& out, Stream stream);

void cuda_triplet_columns_(const DeviceRows& logits, int64_t first_column, const int64_t* labels,
                           double softcap, bool store, const OnlineStates& states, Stream stream);

void cuda_scale_rows_(const DeviceRows& rows, const float* factors, Stream stream);

}  // namespace loku
