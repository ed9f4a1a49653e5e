// A loop shared among threads.
#pragma once

#include <cstdint>

namespace loku {

// Call body(i, scratch) for i in [0, count). Each thread has a scratch. A single thread does not use OpenMP,
// because a forked child lacks its parent's threads.
template <typename Scratch, typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads <= 1) {
    Scratch scratch;
    for (int64_t i = 0; i < count; ++i) body(i, scratch);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) body(i, scratch);
  }
}

}  // namespace loku
