// The CUDA kernels as functions of a Python module: the compiled core's, or the emulation's in tests/cuda.
#pragma once

#include <pybind11/pybind11.h>

#include "fisher_cuda.h"
#include "triplet_cuda.h"

namespace loku {

inline void bind_cuda(pybind11::module_& m) {
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  // (address, rows, inner, outer stride, inner stride, vocabulary size, dtype tag): see DeviceRows
  using RowsArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int>;
  using TokensArgument = std::tuple<uintptr_t, int64_t, int64_t>;  // address, sample and token stride
  using StreamArgument = std::tuple<int, uintptr_t>;               // device, cudaStream_t

  const auto rows = [](const RowsArgument& argument) {
    const auto& [data, count, inner, outer_stride, inner_stride, vocab, dtype] = argument;
    return DeviceRows{reinterpret_cast<void*>(data), count, inner, outer_stride, inner_stride, vocab,
                      static_cast<DType>(dtype)};
  };
  const auto labels_at = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
  const auto triplets = [](uintptr_t triplet, uintptr_t runner_up_id) {
    return Triplets{reinterpret_cast<double*>(triplet), reinterpret_cast<int64_t*>(runner_up_id)};
  };
  const auto tokens_of = [](const TokensArgument& argument) {
    const auto& [data, sample_stride, token_stride] = argument;
    return SampleTokens{reinterpret_cast<const void*>(data), sample_stride, token_stride};
  };
  const auto stream_of = [](const StreamArgument& argument) {
    return Stream{std::get<0>(argument), std::get<1>(argument)};
  };

  m.def("cuda_error", cuda_error);
  m.def(
      "cuda_triplet_forward",
      [=](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, double softcap,
          uintptr_t triplet, uintptr_t runner_up_id, const StreamArgument& stream) {
        cuda_triplet_forward(rows(logits), labels_at(labels), ignore_index, softcap,
                             triplets(triplet, runner_up_id), stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_triplet_backward",
      [=](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, uintptr_t triplet,
          uintptr_t runner_up_id, uintptr_t grad_triplet, double softcap, const RowsArgument& grad_logits,
          const StreamArgument& stream) {
        cuda_triplet_backward(rows(logits), labels_at(labels), ignore_index, triplets(triplet, runner_up_id),
                              reinterpret_cast<const double*>(grad_triplet), softcap, rows(grad_logits),
                              stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_triplet_fused_",
      [=](const RowsArgument& logits, uintptr_t labels, int64_t ignore_index, int gradient, double scale,
          double softcap, uintptr_t triplet, uintptr_t runner_up_id, const StreamArgument& stream) {
        cuda_triplet_fused_(rows(logits), labels_at(labels), ignore_index,
                            static_cast<FusedGradient>(gradient), scale, softcap,
                            triplets(triplet, runner_up_id), stream_of(stream));
      },
      Unlocked());
  m.def(
      "cuda_accumulate_squared_grad_",
      [=](int64_t samples, int64_t tokens, int64_t outputs, int64_t inputs, int dtype,
          const TokensArgument& input, const TokensArgument& grad_output, uintptr_t fisher,
          int64_t fisher_stride, uintptr_t divisor, uintptr_t partials, const StreamArgument& stream) {
        cuda_accumulate_squared_grad_(
            {samples, tokens, outputs, inputs, static_cast<DType>(dtype)}, tokens_of(input),
            tokens_of(grad_output), reinterpret_cast<float*>(fisher), fisher_stride,
            reinterpret_cast<const float*>(divisor), reinterpret_cast<float*>(partials), stream_of(stream));
      },
      Unlocked());
  m.attr("FISHER_TILE") = kFisherTile;
}

}  // namespace loku
