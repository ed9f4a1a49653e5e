// The CUDA sources, compiled for the CPU with emulated_gpu.h, and what tests/test_cuda.py calls of them.
#include "emulated_gpu.h"
// clang-format off: csrc/gpu.h, which the sources include, must find itself replaced
#include "../../csrc/triplet_cuda.cu"
// clang-format on

using namespace loku;

namespace {

DeviceRows rows_from(const int64_t* r) {  // address, count, inner, outer and inner stride, vocabulary, dtype
  return {reinterpret_cast<void*>(r[0]), r[1], r[2], r[3], r[4], r[5], static_cast<DType>(r[6])};
}

template <typename Body>
const char* message_of(const Body& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

void emulate_machine(int shared_per_block, int shared_per_multiprocessor, int clusters, unsigned seed) {
  machine.shared_per_block = shared_per_block;
  machine.shared_per_multiprocessor = shared_per_multiprocessor;
  machine.clusters = clusters != 0;
  machine.random.seed(seed);
}

const char* emulated_triplet_forward(const int64_t* logits, const int64_t* labels, int64_t ignore_index,
                                     double softcap, double* triplet, int64_t* runner_up_id) {
  return message_of([&] {
    cuda_triplet_forward(rows_from(logits), labels, ignore_index, softcap, {triplet, runner_up_id}, {0, 0});
  });
}

const char* emulated_triplet_backward(const int64_t* logits, const int64_t* labels, int64_t ignore_index,
                                      double* triplet, int64_t* runner_up_id, const double* grad_triplet,
                                      double softcap, const int64_t* grad_logits) {
  return message_of([&] {
    cuda_triplet_backward(rows_from(logits), labels, ignore_index, {triplet, runner_up_id}, grad_triplet,
                          softcap, rows_from(grad_logits), {0, 0});
  });
}

const char* emulated_triplet_fused_(const int64_t* logits, const int64_t* labels, int64_t ignore_index,
                                    int gradient, double scale, double softcap, double* triplet,
                                    int64_t* runner_up_id) {
  return message_of([&] {
    cuda_triplet_fused_(rows_from(logits), labels, ignore_index, static_cast<FusedGradient>(gradient), scale,
                        softcap, {triplet, runner_up_id}, {0, 0});
  });
}

}  // extern "C"
