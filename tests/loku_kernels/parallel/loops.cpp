// Loops of csrc/parallel.h whose body throws. With the argument "planted", a loop whose threads add to one
// number without a lock: a race that ThreadSanitizer must report. tests/loku_kernels/test_parallel.py builds
// this file with OpenMP, and scripts/thread_sanitizer.sh with std::thread.
#include <atomic>
#include <cstdio>
#include <new>
#include <vector>

#include "../../../csrc/parallel.h"

namespace {

constexpr int kThreads = 4;
constexpr int64_t kCount = 40;

struct Thrown {
  int64_t number;
};

// Every tenth number throws. The exception arrives when no thread is at work any more, and it is one of
// those.
int lost_exceptions() {
  int lost = 0;
  for (int64_t at = 0; at < 10; ++at) {
    std::atomic<int> at_work{0}, finished{0};
    int64_t caught = -1;
    try {
      loku::parallel_for(kCount, kThreads, [&](int64_t i) {
        ++at_work;
        --at_work;
        if (i % 10 == at) throw Thrown{i};
        ++finished;
      });
    } catch (const Thrown& thrown) {
      caught = thrown.number;
    }
    lost += caught < 0 || caught % 10 != at || at_work != 0 || finished > kCount - kThreads;
  }
  return lost;
}

// A scratch that cannot be made: no body is called.
int called_without_scratch() {
  int calls = 0, made = 0;
  const auto make_scratch = [&] {
    if (++made == kThreads) throw std::bad_alloc();
    return 0;
  };
  try {
    loku::parallel_for(kCount, kThreads, make_scratch, [&](int64_t, int&) { ++calls; });
  } catch (const std::bad_alloc&) {
    return calls;
  }
  return 1;
}

// Each number is in one part, and the numbers of threads that differ do not change it.
int wrong_shares() {
  int wrong = 0;
  for (int64_t count = 0; count < kCount; ++count) {
    for (int threads = 1; threads < 7; ++threads) {
      std::vector<int> times(kCount);
      loku::parallel_for(count, threads, [&](int64_t i) { ++times[i]; });
      for (int64_t i = 0; i < kCount; ++i) wrong += times[i] != (i < count ? 1 : 0);
    }
  }
  return wrong;
}

void planted_race() {
  int64_t sum = 0;
  loku::parallel_for(1000, kThreads, [&](int64_t i) { sum += i; });
  std::printf("the sum of a race is %lld\n", static_cast<long long>(sum));
}

}  // namespace

int main(int count, char**) {
  if (count > 1) {
    planted_race();
    return 0;
  }
  const int lost = lost_exceptions(), called = called_without_scratch(), wrong = wrong_shares();
  std::printf("loops: %d lost exceptions, %d calls without scratch, %d wrong shares\n", lost, called, wrong);
  return lost + called + wrong == 0 ? 0 : 1;
}
