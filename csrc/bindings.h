// Conversions of Python's addresses and tuples to the kernels' arguments, for any device.
#pragma once

#include <cstdint>
#include <tuple>

#include "fisher_cpu.h"
#include "triplet_cpu.h"

namespace loku {

// (address, width, sample stride, token stride); (address or 0, row stride)
using FeaturesArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
using MatrixArgument = std::tuple<uintptr_t, int64_t>;

inline const int64_t* labels_from(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

inline const double* doubles_from(uintptr_t address) { return reinterpret_cast<const double*>(address); }

inline Triplets triplets_from(uintptr_t triplet, uintptr_t runner_up_id) {
  return {reinterpret_cast<double*>(triplet), reinterpret_cast<int64_t*>(runner_up_id)};
}

inline OnlineStates states_from(uintptr_t state, uintptr_t runner_up_id, uintptr_t rescale,
                                uintptr_t demoted_id, uintptr_t demoted_share) {
  return {reinterpret_cast<double*>(state), reinterpret_cast<int64_t*>(runner_up_id),
          reinterpret_cast<float*>(rescale), reinterpret_cast<int64_t*>(demoted_id),
          reinterpret_cast<float*>(demoted_share)};
}

inline Features features_from(const FeaturesArgument& argument) {
  const auto& [data, width, sample_stride, token_stride] = argument;
  return {reinterpret_cast<const void*>(data), width, sample_stride, token_stride};
}

inline Matrix matrix_from(const MatrixArgument& argument) {
  return {reinterpret_cast<float*>(std::get<0>(argument)), std::get<1>(argument)};
}

}  // namespace loku
