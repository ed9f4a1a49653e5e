// The CUDA kernels as functions of a Python module: the compiled core's, or the emulation's in tests/cuda.
#pragma once

#include <pybind11/pybind11.h>

#include "fisher_cuda.h"
#include "triplet_cuda.h"

namespace loku {

inline void bind_cuda(pybind11::module_& m) {
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  // (address, rows, inner, outer stride, inner stride, columns, dtype tag): see DeviceRows
  using RowsArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int>;
  // (address, width, sample stride, token stride); (address or 0, row stride); (device, cudaStream_t)
  using FeaturesArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
  using MatrixArgument = std::tuple<uintptr_t, int64_t>;
  using StreamArgument = std::tuple<int, uintptr_t>;

  const auto rows_of = [](const RowsArgument& argument) {
    const auto& [data, count, inner, outer_stride, inner_stride, columns, dtype] = argument;
    return DeviceRows{reinterpret_cast<void*>(data), count, inner, outer_stride, inner_stride, columns,
                      static_cast<DType>(dtype)};
  };
  const auto labels_of = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
  const auto triplets_of = [](uintptr_t triplet, uintptr_t runner_up_id) {
    return Triplets{reinterpret_cast<double*>(triplet), reinterpret_cast<int64_t*>(runner_up_id)};
  };
  const auto features_of = [](const FeaturesArgument& argument) {
    const auto& [data, width, sample_stride, token_stride] = argument;
    return Features{reinterpret_cast<const void*>(data), width, sample_stride, token_stride};
  };
  const auto matrix_of = [](const MatrixArgument& argument) {
    return Matrix{reinterpret_cast<float*>(std::get<0>(argument)), std::get<1>(argument)};
  };
  const auto stream_of = [](const StreamArgument& argument) {
    return Stream{std::get<0>(argument), std::get<1>(argument)};
  };

  m.def("cuda_error", cuda_error);
  m.def(
      "cuda_triplet_forward",
      [=](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, uintptr_t triplet,
          uintptr_t runner_up_id, const StreamArgument& stream) {
        cuda_triplet_forward(rows_of(logits), labels_of(labels), ignore_index,
                             triplets_of(triplet, runner_up_id), stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_triplet_backward",
      [=](const RowsArgument& logits, int64_t first, uintptr_t labels, int64_t ignore_index,
          uintptr_t triplet, uintptr_t runner_up_id, uintptr_t grad_triplet, double softcap,
          const RowsArgument& grad_logits, const StreamArgument& stream) {
        cuda_triplet_backward(
            rows_of(logits), first, labels_of(labels), ignore_index, triplets_of(triplet, runner_up_id),
            reinterpret_cast<const double*>(grad_triplet), softcap, rows_of(grad_logits), stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_inverted_hinge_",
      [=](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, uintptr_t scale,
          uintptr_t triplet, uintptr_t runner_up_id, const StreamArgument& stream) {
        cuda_inverted_hinge_(rows_of(logits), labels_of(labels), ignore_index,
                             reinterpret_cast<const double*>(scale), triplets_of(triplet, runner_up_id),
                             stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_triplet_columns_",
      [=](const RowsArgument& logits, int64_t first, uintptr_t labels, double softcap, bool store,
          uintptr_t state, uintptr_t runner_up_id, uintptr_t rescale, uintptr_t demoted_id,
          uintptr_t demoted_share, const StreamArgument& stream) {
        cuda_triplet_columns_(rows_of(logits), first, labels_of(labels), softcap, store,
                              {reinterpret_cast<double*>(state), reinterpret_cast<int64_t*>(runner_up_id),
                               reinterpret_cast<float*>(rescale), reinterpret_cast<int64_t*>(demoted_id),
                               reinterpret_cast<float*>(demoted_share)},
                              stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_accumulate_squared_grad_",
      [=](int64_t samples, int64_t tokens, int dtype, const FeaturesArgument& inputs,
          const FeaturesArgument& grad_outputs, const MatrixArgument& fisher, const MatrixArgument& divisor,
          uintptr_t partials, const StreamArgument& stream) {
        cuda_accumulate_squared_grad_(samples, tokens, static_cast<DType>(dtype), features_of(inputs),
                                      features_of(grad_outputs), matrix_of(fisher), matrix_of(divisor),
                                      reinterpret_cast<float*>(partials), stream_of(stream));
      },
      Unlocked());
  m.attr("FISHER_TILE") = kFisherTile;
}

}  // namespace loku
