// The compiled core as a Python module. It takes addresses, sizes and dtype tags, and nothing of torch.
// loku_kernels/backends/native.py is its only caller and checks the arguments.
#include "bindings.h"

#include "simd.h"

#if LOKU_WITH_CUDA  // defined by setup.py
#include "bindings_cuda.h"
#endif

namespace loku {
namespace {

// The instruction set that LOKU_TARGET_CLONES chooses on this machine.
const char* instruction_set() {
#ifdef LOKU_HAS_TARGET_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "the compiler's baseline";
}

#ifdef _OPENMP
constexpr bool kHasOpenMP = true;
#else
constexpr bool kHasOpenMP = false;
#endif

int fill(PyObject* module) {
  static PyMethodDef methods[] = {
      method<triplet_forward>("triplet_forward"),
      method<triplet_backward>("triplet_backward"),
      method<inverted_hinge_>("inverted_hinge_"),
      method<rest_probabilities_>("rest_probabilities_"),
      method<triplet_columns_>("triplet_columns_"),
      method<scale_rows_>("scale_rows_"),
      method<token_losses>("token_losses"),
      method<logits_loss>("logits_loss"),
      method<logits_loss_backward>("logits_loss_backward"),
      method<inverted_hinge_loss_>("inverted_hinge_loss_"),
      method<number_counted>("number_counted"),
      method<hidden_gradient>("hidden_gradient"),
      method<hidden_loss_backward>("hidden_loss_backward"),
      method<accumulate_squared_grad_>("accumulate_squared_grad_"),
      method<add_squares_>("add_squares_"),
      kLastMethod,
  };
  const char* doc =
      "Compiled kernels of loku_kernels. Call them through loku_kernels, which checks the arguments.";
  if (PyModule_SetDocString(module, doc) || PyModule_AddFunctions(module, methods) ||
      PyModule_AddStringConstant(module, "instruction_set", instruction_set()) ||
      PyModule_AddObjectRef(module, "has_openmp", kHasOpenMP ? Py_True : Py_False) ||
      PyModule_AddObjectRef(module, "has_cuda", LOKU_WITH_CUDA ? Py_True : Py_False)) {
    return -1;
  }
#if LOKU_WITH_CUDA
  return fill_cuda(module);
#else
  return 0;
#endif
}

}  // namespace
}  // namespace loku

LOKU_MODULE(_core, loku::fill)
