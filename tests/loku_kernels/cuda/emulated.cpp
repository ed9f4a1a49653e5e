// The CUDA kernels, compiled for the CPU, as a Python module with the compiled core's CUDA functions.
// tests/loku_kernels/test_cuda.py builds it from this file and the CUDA sources, with emulated_gpu.h ahead of
// each.
#include "../../csrc/bindings_cuda.h"
#include "emulated_gpu.h"

PYBIND11_MODULE(EMULATION, m) {
  loku::bind_cuda(m);
  m.attr("has_cuda") = true;
  m.def(
      "set_machine",
      [](int shared_per_block, int shared_per_multiprocessor, bool clusters, unsigned seed) {
        loku::machine.shared_per_block = shared_per_block;
        loku::machine.shared_per_multiprocessor = shared_per_multiprocessor;
        loku::machine.clusters = clusters;
        loku::machine.random.seed(seed);
      },
      "Bytes of shared memory, whether there are clusters, and the seed of the order of threads.");
}
