// The compiled core as a Python module: addresses, sizes and dtype tags in, nothing of torch.
// loku_kernels/native.py is its only caller and does the checking.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "triplet_cpu.h"

#if LOKU_WITH_CUDA  // defined by setup.py
#include "bindings_cuda.h"
#endif

namespace py = pybind11;
using namespace loku;

namespace {

// (address, address of the int64 row offsets, rows, vocabulary size, dtype tag)
using RowsArgument = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int>;

Rows rows_from(const RowsArgument& argument) {
  const auto& [data, offsets, count, vocab, dtype] = argument;
  return {reinterpret_cast<void*>(data), reinterpret_cast<const int64_t*>(offsets), count, vocab,
          static_cast<DType>(dtype)};
}

const int64_t* labels_from(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

Triplets triplets_from(uintptr_t triplet, uintptr_t runner_up_id) {
  return {reinterpret_cast<double*>(triplet), reinterpret_cast<int64_t*>(runner_up_id)};
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
      [](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, float softcap, uintptr_t triplet,
         uintptr_t runner_up_id, int threads) {
        triplet_forward(rows_from(logits), labels_from(labels), ignore_index, softcap,
                        triplets_from(triplet, runner_up_id), threads);
      },
      Unlocked());
  m.def(
      "triplet_backward",
      [](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, uintptr_t triplet,
         uintptr_t runner_up_id, uintptr_t grad_triplet, float softcap, const RowsArgument& grad_logits,
         int threads) {
        triplet_backward(rows_from(logits), labels_from(labels), ignore_index,
                         triplets_from(triplet, runner_up_id), reinterpret_cast<const double*>(grad_triplet),
                         softcap, rows_from(grad_logits), threads);
      },
      Unlocked());
  m.def(
      "triplet_fused_",
      [](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, int gradient, double scale,
         float softcap, uintptr_t triplet, uintptr_t runner_up_id, int threads) {
        triplet_fused_(rows_from(logits), labels_from(labels), ignore_index,
                       static_cast<FusedGradient>(gradient), scale, softcap,
                       triplets_from(triplet, runner_up_id), threads);
      },
      Unlocked());

  m.attr("has_cuda") = static_cast<bool>(LOKU_WITH_CUDA);
#if LOKU_WITH_CUDA
  bind_cuda(m);
#endif
}
