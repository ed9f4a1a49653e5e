// A loop shared among threads.
#pragma once

#include <cstdint>

namespace loku {

// body(i, scratch) for i in [0, count); each thread has a scratch. A single thread stays out of OpenMP: a
// forked child must, since its parent's threads are not there.
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
