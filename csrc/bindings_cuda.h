// The CUDA kernels as functions of a Python module: the compiled core's, or the emulation's in
// tests/loku_kernels/cuda.
#pragma once

#include "bindings.h"
#include "fused_rows_cuda.h"

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
      method<cuda_longest_row>("cuda_longest_row"),
      method<cuda_inverted_hinge_>("cuda_inverted_hinge_"),
      method<cuda_rest_probabilities_>("cuda_rest_probabilities_"),
      kLastMethod,
  };
  return PyModule_AddFunctions(module, methods);
}

}  // namespace loku
