// A loop shared among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

#if defined(LOKU_STD_THREADS)  // for ThreadSanitizer, which does not know OpenMP's threads
#include <thread>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace loku {

constexpr int64_t kCacheLine = 64;

// Call body(i, scratch) for i in [0, count). Each thread has a scratch of its own, which make_scratch()
// returns. The scratches are made before the first call of `body`, and `body` must not allocate memory. So a
// lack of memory is an exception that leaves all operands as they were. If `body` throws nevertheless, all
// threads stop, and the first exception is thrown again after their end: an exception that left a thread
// would end the process. A single thread does not use OpenMP, because a forked child lacks its parent's
// threads.
template <typename MakeScratch, typename Body>
void parallel_for(int64_t count, int threads, const MakeScratch& make_scratch, const Body& body) {
  using Scratch = decltype(make_scratch());
  struct alignas(kCacheLine) Own {  // no thread writes to the cache line of another
    Scratch scratch;
  };
  if (threads <= 1 || count <= 1) {
    Scratch scratch = make_scratch();
    for (int64_t i = 0; i < count; ++i) body(i, scratch);
    return;
  }
  const int64_t most = std::min<int64_t>(threads, count);
  std::vector<Own> own;
  own.reserve(most);
  for (int64_t part = 0; part < most; ++part) own.push_back({make_scratch()});
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  // The part of one thread are neighbours.
  const auto run_part = [&](int64_t part, int64_t team) {
    const int64_t parts = std::min(most, team);
    if (part >= parts) return;
    const int64_t share = count / parts, longer = count % parts;
    const int64_t begin = part * share + std::min(part, longer);
    const int64_t end = begin + share + (part < longer ? 1 : 0);
    try {
      for (int64_t i = begin; i < end && !failed.load(std::memory_order_relaxed); ++i) {
        body(i, own[part].scratch);
      }
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
#if defined(LOKU_STD_THREADS)
  std::vector<std::thread> team;
  for (int64_t part = 1; part < most; ++part) team.emplace_back(run_part, part, most);
  run_part(0, most);
  for (std::thread& thread : team) thread.join();
#elif defined(_OPENMP)
  // Always as many as there are: OpenMP would end the others and start them again later.
#pragma omp parallel num_threads(threads)
  run_part(omp_get_thread_num(), omp_get_num_threads());
#else
  for (int64_t part = 0; part < most; ++part) run_part(part, most);
#endif
  if (failure) std::rethrow_exception(failure);
}

// Call body(i) for i in [0, count), as above.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  struct Nothing {};
  parallel_for(count, threads, [] { return Nothing{}; }, [&](int64_t i, Nothing&) { body(i); });
}

}  // namespace loku
