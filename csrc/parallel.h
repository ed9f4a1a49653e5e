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

// Call body(i, part) for i in [0, count). The numbers are in parts of neighbours, one for each thread, and
// part < max(1, threads) is the number of the part.
//
// An exception that left a thread would end the process. So all threads stop, and the first exception is
// thrown again after their end. A `body` should allocate no memory all the same, because it leaves a part of
// its results behind if it throws. A single thread does not use OpenMP, because a forked child lacks its
// parent's threads. With more, OpenMP ends the process if the system does not let it start them.
template <typename Body>
void for_each_in_parts(int64_t count, int threads, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  const auto run_part = [&](int64_t part, int64_t team) {
    const int64_t parts = std::min(count, team);
    if (part >= parts) return;
    const int64_t share = count / parts, longer = count % parts;
    const int64_t begin = part * share + std::min(part, longer);
    const int64_t end = begin + share + (part < longer ? 1 : 0);
    try {
      for (int64_t i = begin; i < end && !failed.load(std::memory_order_relaxed); ++i) body(i, part);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
#if defined(LOKU_STD_THREADS)
  std::vector<std::thread> team;
  for (int64_t part = 1; part < threads; ++part) team.emplace_back(run_part, part, threads);
  run_part(0, threads);
  for (std::thread& thread : team) thread.join();
#elif defined(_OPENMP)
  // All of the threads, however few the numbers are: OpenMP would end the others and start them again later.
#pragma omp parallel num_threads(threads)
  run_part(omp_get_thread_num(), omp_get_num_threads());
#else
  run_part(0, 1);
#endif
  if (failure) std::rethrow_exception(failure);
}

// Call body(i) for i in [0, count). The call allocates no memory.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  for_each_in_parts(count, threads, [&](int64_t i, int64_t) { body(i); });
}

// Call body(i, scratch) for i in [0, count). Each thread has a scratch of its own, which make_scratch()
// returns. All are made before the first call of `body`. So a lack of memory leaves the operands as they
// were.
template <typename MakeScratch, typename Body>
void parallel_for(int64_t count, int threads, const MakeScratch& make_scratch, const Body& body) {
  struct alignas(kCacheLine) Own {  // no thread writes to the cache line of another
    decltype(make_scratch()) scratch;
  };
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  std::vector<Own> own;
  own.reserve(parts);
  for (int64_t part = 0; part < parts; ++part) own.push_back({make_scratch()});
  for_each_in_parts(count, threads, [&](int64_t i, int64_t part) { body(i, own[part].scratch); });
}

}  // namespace loku
