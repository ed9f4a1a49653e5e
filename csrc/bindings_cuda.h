// The CUDA kernels as functions of a Python module: the compiled core, or the emulation in
// tests/loku_kernels/cuda.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "fisher_cuda.h"
#include "triplet_cuda.h"

namespace loku {

inline void bind_cuda(pybind11::module_& m) {
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  // (address, rows, inner, outer stride, inner stride, columns, dtype tag): see DeviceRows
  using RowsArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int>;
  // (device, cudaStream_t)
  using StreamArgument = std::tuple<int, uintptr_t>;

  const auto rows_of = [](const RowsArgument& argument) {
    const auto& [data, count, inner, outer_stride, inner_stride, columns, dtype] = argument;
    return DeviceRows{reinterpret_cast<void*>(data), count, inner, outer_stride, inner_stride, columns,
                      static_cast<DType>(dtype)};
  };
  const auto stream_of = [](const StreamArgument& argument) {
    return Stream{std::get<0>(argument), std::get<1>(argument)};
  };

  m.def("cuda_error", cuda_error);
  m.def(
      "cuda_triplet_forward",
      [=](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, uintptr_t triplet,
          uintptr_t runner_up_id, const StreamArgument& stream) {
        cuda_triplet_forward(rows_of(logits), labels_from(labels), ignore_index,
                             triplets_from(triplet, runner_up_id), stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_triplet_backward",
      [=](const RowsArgument& logits, int64_t first_column, uintptr_t labels, int64_t ignore_index,
          uintptr_t triplet, uintptr_t runner_up_id, uintptr_t grad_triplet, double softcap,
          const RowsArgument& grad_logits, const StreamArgument& stream) {
        cuda_triplet_backward(rows_of(logits), first_column, labels_from(labels), ignore_index,
                              triplets_from(triplet, runner_up_id), doubles_from(grad_triplet), softcap,
                              rows_of(grad_logits), stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_inverted_hinge_",
      [=](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, uintptr_t scale,
          uintptr_t triplet, uintptr_t runner_up_id, const StreamArgument& stream) {
        cuda_inverted_hinge_(rows_of(logits), labels_from(labels), ignore_index, doubles_from(scale),
                             triplets_from(triplet, runner_up_id), stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_triplet_columns_",
      [=](const RowsArgument& logits, int64_t first_column, uintptr_t labels, double softcap, bool store,
          uintptr_t state, uintptr_t runner_up_id, uintptr_t rescale, uintptr_t demoted_id,
          uintptr_t demoted_share, const StreamArgument& stream) {
        cuda_triplet_columns_(rows_of(logits), first_column, labels_from(labels), softcap, store,
                              states_from(state, runner_up_id, rescale, demoted_id, demoted_share),
                              stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_scale_rows_",
      [=](const RowsArgument& rows, uintptr_t factors, const StreamArgument& stream) {
        cuda_scale_rows_(rows_of(rows), reinterpret_cast<const float*>(factors), stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_accumulate_squared_grad_",
      [=](int64_t samples, int64_t tokens, int dtype, const FeaturesArgument& inputs,
          const FeaturesArgument& grad_outputs, const MatrixArgument& fisher, const MatrixArgument& divisor,
          uintptr_t partials, const StreamArgument& stream) {
        cuda_accumulate_squared_grad_(samples, tokens, static_cast<DType>(dtype), features_from(inputs),
                                      features_from(grad_outputs), matrix_from(fisher), matrix_from(divisor),
                                      reinterpret_cast<float*>(partials), stream_of(stream));
      },
      Unlocked());
  m.attr("FISHER_TILE") = kFisherTile;
}

}  // namespace loku
