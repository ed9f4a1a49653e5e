// The CUDA kernels as functions of a Python module: the compiled core's, or the emulation's in
// tests/loku_kernels/cuda.
#pragma once

#include "bindings.h"
#include "fisher_cuda.h"
#include "triplet_cuda.h"

namespace loku {

template <>
inline DeviceRows Arguments::read() {
  return read_tuple<DeviceRows, void*, int64_t, int64_t, int64_t, int64_t, int64_t, DType>();
}

template <>
inline Stream Arguments::read() {
  return read_tuple<Stream, int, uintptr_t>();
}

inline int fill_cuda(PyObject* module) {
  static PyMethodDef methods[] = {
      method<cuda_error>("cuda_error"),
      method<cuda_triplet_forward>("cuda_triplet_forward"),
      method<cuda_triplet_backward>("cuda_triplet_backward"),
      method<cuda_inverted_hinge_>("cuda_inverted_hinge_"),
      method<cuda_triplet_columns_>("cuda_triplet_columns_"),
      method<cuda_scale_rows_>("cuda_scale_rows_"),
      method<cuda_accumulate_squared_grad_>("cuda_accumulate_squared_grad_"),
      kLastMethod,
  };
  if (PyModule_AddFunctions(module, methods)) return -1;
  return PyModule_AddIntConstant(module, "FISHER_TILE", kFisherTile);
}

}  // namespace loku
