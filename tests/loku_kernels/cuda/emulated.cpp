// The CUDA kernels, compiled for the CPU, as a Python module with the compiled core's CUDA functions.
// tests/loku_kernels/test_cuda.py builds it from this file and the CUDA sources, with emulated_gpu.h ahead of
// each.
#include "../../../csrc/bindings_cuda.h"
#include "emulated_gpu.h"

namespace loku {
namespace {

// Bytes of shared memory of a block, clusters that the device holds at a time, and the seed of the order of
// threads, copies and messages.
void set_machine(int shared_per_block, int resident, unsigned seed) {
  machine.shared_per_block = shared_per_block;
  machine.resident = resident;
  machine.random.seed(seed);
}

// The shape of the last launch: clusters, blocks of a cluster, threads of a block, one in four digits each.
int64_t last_launch() {
  return (machine.clusters * int64_t{10000} + machine.cluster_size) * 10000 + machine.threads;
}

int fill(PyObject* module) {
  static PyMethodDef methods[] = {
      method<set_machine>("set_machine"),
      method<last_launch>("last_launch"),
      kLastMethod,
  };
  if (PyModule_AddFunctions(module, methods) || PyModule_AddObjectRef(module, "has_cuda", Py_True)) return -1;
  return fill_cuda(module);
}

}  // namespace
}  // namespace loku

LOKU_MODULE(EMULATION, loku::fill)
