// The CUDA kernels, compiled for the CPU, as a Python module with the compiled core's CUDA functions.
// tests/loku_kernels/test_cuda.py builds it from this file and the CUDA sources, with emulated_gpu.h ahead of
// each.
#include "../../../csrc/bindings_cuda.h"
#include "emulated_gpu.h"

namespace loku {
namespace {

// Bytes of shared memory, whether there are clusters, and the seed of the order of threads.
void set_machine(int shared_per_block, int shared_per_multiprocessor, bool clusters, unsigned seed) {
  machine.shared_per_block = shared_per_block;
  machine.shared_per_multiprocessor = shared_per_multiprocessor;
  machine.clusters = clusters;
  machine.random.seed(seed);
}

int fill(PyObject* module) {
  static PyMethodDef methods[] = {method<set_machine>("set_machine"), kLastMethod};
  if (PyModule_AddFunctions(module, methods) || PyModule_AddObjectRef(module, "has_cuda", Py_True)) return -1;
  return fill_cuda(module);
}

}  // namespace
}  // namespace loku

LOKU_MODULE(EMULATION, loku::fill)
