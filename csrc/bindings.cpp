// The compiled core as a Python module. It takes addresses, sizes and dtype tags, and nothing of torch.
// loku_kernels/backends/native.py is its only caller and checks the arguments.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "simd.h"

#if LOKU_WITH_CUDA  // defined by setup.py
#include "bindings_cuda.h"
#endif

namespace py = pybind11;
using namespace loku;

namespace {

// (address, address of the int64 row offsets, rows, columns, dtype tag)
using RowsArgument = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int>;

Rows rows_from(const RowsArgument& argument) {
  const auto& [data, offsets, count, columns, dtype] = argument;
  return {reinterpret_cast<void*>(data), reinterpret_cast<const int64_t*>(offsets), count, columns,
          static_cast<DType>(dtype)};
}

// The instruction set that LOKU_TARGET_CLONES chooses on this machine.
const char* instruction_set() {
#ifdef LOKU_HAS_TARGET_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "the compiler's baseline";
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Compiled kernels of loku_kernels. Call them through loku_kernels, which checks the arguments.";

  m.def(
      "first_bad_label",
      [](uintptr_t labels, int64_t count, int64_t vocab, int64_t ignore_index) {
        return first_bad_label(labels_from(labels), count, vocab, ignore_index);
      },
      Unlocked());
  m.def(
      "triplet_forward",
      [](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, uintptr_t triplet,
         uintptr_t runner_up_id, int threads) {
        triplet_forward(rows_from(logits), labels_from(labels), ignore_index,
                        triplets_from(triplet, runner_up_id), threads);
      },
      Unlocked());
  m.def(
      "triplet_backward",
      [](const RowsArgument& logits, int64_t first_column, uintptr_t labels, int64_t ignore_index,
         uintptr_t triplet, uintptr_t runner_up_id, uintptr_t grad_triplet, float softcap,
         const RowsArgument& grad_logits, int threads) {
        triplet_backward(rows_from(logits), first_column, labels_from(labels), ignore_index,
                         triplets_from(triplet, runner_up_id), doubles_from(grad_triplet), softcap,
                         rows_from(grad_logits), threads);
      },
      Unlocked());
  m.def(
      "inverted_hinge_",
      [](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, double scale, uintptr_t triplet,
         uintptr_t runner_up_id, int threads) {
        inverted_hinge_(rows_from(logits), labels_from(labels), ignore_index, scale,
                        triplets_from(triplet, runner_up_id), threads);
      },
      Unlocked());
  m.def(
      "triplet_columns_",
      [](const RowsArgument& logits, int64_t first_column, uintptr_t labels, float softcap, bool store,
         uintptr_t state, uintptr_t runner_up_id, uintptr_t rescale, uintptr_t demoted_id,
         uintptr_t demoted_share, int threads) {
        triplet_columns_(rows_from(logits), first_column, labels_from(labels), softcap, store,
                         states_from(state, runner_up_id, rescale, demoted_id, demoted_share), threads);
      },
      Unlocked());
  m.def(
      "scale_rows_",
      [](const RowsArgument& rows, uintptr_t factors, int threads) {
        scale_rows_(rows_from(rows), reinterpret_cast<const float*>(factors), threads);
      },
      Unlocked());
  m.def(
      "accumulate_squared_grad_",
      [](int64_t samples, int64_t tokens, int dtype, const FeaturesArgument& inputs,
         const FeaturesArgument& grad_outputs, const MatrixArgument& fisher, const MatrixArgument& divisor,
         int threads) {
        accumulate_squared_grad_(samples, tokens, static_cast<DType>(dtype), features_from(inputs),
                                 features_from(grad_outputs), matrix_from(fisher), matrix_from(divisor),
                                 threads);
      },
      Unlocked());
  m.def(
      "add_squares_",
      [](uintptr_t product, int64_t rows, int64_t columns, const MatrixArgument& fisher, int threads) {
        add_squares_(reinterpret_cast<const void*>(product), rows, columns, matrix_from(fisher), threads);
      },
      Unlocked());

  m.attr("instruction_set") = instruction_set();
#ifdef _OPENMP
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
  m.attr("has_cuda") = static_cast<bool>(LOKU_WITH_CUDA);
#if LOKU_WITH_CUDA
  bind_cuda(m);
#endif
}
