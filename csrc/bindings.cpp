// The compiled core as a Python module: addresses, sizes and dtype tags in, nothing of torch.
// loku_kernels/native.py is its only caller and does the checking.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "fisher_cpu.h"
#include "triplet_cpu.h"

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

const int64_t* labels_from(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

Triplets triplets_from(uintptr_t triplet, uintptr_t runner_up_id) {
  return {reinterpret_cast<double*>(triplet), reinterpret_cast<int64_t*>(runner_up_id)};
}

// (address, width, sample stride, token stride)
using FeaturesArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

Features features_from(const FeaturesArgument& argument) {
  const auto& [data, width, sample_stride, token_stride] = argument;
  return {reinterpret_cast<const void*>(data), width, sample_stride, token_stride};
}

// (address or 0, row stride)
using MatrixArgument = std::tuple<uintptr_t, int64_t>;

Matrix matrix_from(const MatrixArgument& argument) {
  return {reinterpret_cast<float*>(std::get<0>(argument)), std::get<1>(argument)};
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
      [](const RowsArgument& logits, int64_t first, uintptr_t labels, int64_t ignore_index, uintptr_t triplet,
         uintptr_t runner_up_id, uintptr_t grad_triplet, float softcap, const RowsArgument& grad_logits,
         int threads) {
        triplet_backward(rows_from(logits), first, labels_from(labels), ignore_index,
                         triplets_from(triplet, runner_up_id), reinterpret_cast<const double*>(grad_triplet),
                         softcap, rows_from(grad_logits), threads);
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
      [](const RowsArgument& logits, int64_t first, uintptr_t labels, float softcap, bool store,
         uintptr_t state, uintptr_t runner_up_id, uintptr_t rescale, uintptr_t demoted_id,
         uintptr_t demoted_share, int threads) {
        triplet_columns_(rows_from(logits), first, labels_from(labels), softcap, store,
                         {reinterpret_cast<double*>(state), reinterpret_cast<int64_t*>(runner_up_id),
                          reinterpret_cast<float*>(rescale), reinterpret_cast<int64_t*>(demoted_id),
                          reinterpret_cast<float*>(demoted_share)},
                         threads);
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

  m.attr("has_cuda") = static_cast<bool>(LOKU_WITH_CUDA);
#if LOKU_WITH_CUDA
  bind_cuda(m);
#endif
}
