// Runs the CUDA kernels on the CPU. It defines the names of csrc/gpu.h in plain C++.
//
// Every thread of a cluster is a fiber. Fibers change at barriers, shuffles and waits only, in an order drawn
// anew each round, and a warp may sleep for some rounds. So a missing barrier shows as a wrong result in some
// order. An absent thread shows as a deadlock, which is reported. Shared memory starts with poison. Bulk
// copies, and messages to other blocks, happen at some random moment between their start and the wait for
// them. A copy or a message that its barrier was not told to expect is reported. The emulation cannot show
// speed, the ordering of memory, or races between barriers that a cooperative order hides.
#ifndef LOKU_GPU_H  // the guard of csrc/gpu.h, which is then left out
#define LOKU_GPU_H

#include <ucontext.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/simd.h"  // conversions of the 16-bit types

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LOKU_KERNEL_PARAMETER const

namespace loku {

struct dim3 {
  unsigned x = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;

// --- fibers ---------------------------------------------------------------------------------------

struct Barrier {
  int size = 0, arrived = 0;
  int64_t generation = 0;
};

struct Block {
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  Barrier barrier;
  unsigned index = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32];
};

struct Fiber {
  ucontext_t context;
  Block* block;
  Warp* warp;
  unsigned thread;
  const Barrier* waiting = nullptr;
  int64_t generation = 0;
  bool finished = false;
};

struct Machine {
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  std::vector<Block> blocks;  // blocks of the running cluster
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<std::function<void()>> under_way;  // copies and messages
  Barrier cluster;
  Fiber* current = nullptr;  // none while the scheduler runs
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::mt19937 random{0};
  int64_t progress = 0;
  std::string failure;
  int shared_per_block = 227 << 10, resident = 3;
  int clusters = 0, cluster_size = 0, threads = 0;  // of the last launch
};
inline Machine machine;

constexpr size_t kStackBytes = 128 << 10;

inline void yield() {
  Fiber* const self = machine.current;
  machine.current = nullptr;
  swapcontext(&self->context, &machine.scheduler);
}

// Remember the failure, which the scheduler throws. A fiber ends here.
inline void stop(const char* why) {
  if (machine.failure.empty()) machine.failure = why;
  while (machine.current != nullptr) yield();
}

inline void wait_at(Barrier& barrier) {
  Fiber& self = *machine.current;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++machine.progress;
    return;
  }
  self.waiting = &barrier;
  self.generation = barrier.generation;
  yield();
  self.waiting = nullptr;
}

inline void fiber_main() {
  machine.kernel();
  machine.current->finished = true;
  ++machine.progress;
  yield();
}

// Let some of the copies and messages arrive.
inline void let_some_arrive() {
  auto& under_way = machine.under_way;
  std::shuffle(under_way.begin(), under_way.end(), machine.random);
  for (size_t count = under_way.empty() ? 0 : 1 + machine.random() % under_way.size(); count > 0; --count) {
    const auto deed = std::move(under_way.back());
    under_way.pop_back();
    deed();
    ++machine.progress;
  }
}

inline void run_cluster(const char* name, int threads) {
  std::vector<Fiber*> order;
  for (Fiber& fiber : machine.fibers) order.push_back(&fiber);
  machine.under_way.clear();
  machine.failure.clear();
  const Warp* asleep = nullptr;  // a warp that the others overtake, or none
  while (!order.empty() && machine.failure.empty()) {
    std::shuffle(order.begin(), order.end(), machine.random);
    const int64_t before = machine.progress;
    if (machine.random() % 8 == 0) {
      const size_t chosen = machine.random() % (machine.warps.size() + 1);
      asleep = chosen < machine.warps.size() ? &machine.warps[chosen] : nullptr;
    }
    for (Fiber* fiber : order) {
      if (fiber->warp == asleep) continue;
      if (fiber->waiting != nullptr && fiber->waiting->generation == fiber->generation) continue;
      machine.current = fiber;
      threadIdx = {fiber->thread};
      blockIdx = {fiber->block->index};
      blockDim = {static_cast<unsigned>(threads)};
      swapcontext(&machine.scheduler, &fiber->context);
      if (!machine.failure.empty()) break;
    }
    if (machine.random() % 2) let_some_arrive();
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->finished; }),
                order.end());
    if (machine.progress == before && !order.empty() && machine.under_way.empty() && asleep == nullptr) {
      stop("a barrier that not all threads reach, or a copy that never comes");
    }
  }
  if (!machine.under_way.empty()) stop("a block ended before its copies or messages arrived");
  if (!machine.failure.empty()) throw std::runtime_error(std::string(name) + ": " + machine.failure);
}

// --- csrc/gpu.h -----------------------------------------------------------------------------------

struct alignas(16) Vector {
  uint32_t word[4];
};

inline void require_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) stop("an address that is no multiple of 16");
}

inline void require_shared(const void* address, size_t bytes) {
  const Block& block = *machine.current->block;
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < block.shared_begin || p + bytes > block.shared.data() + block.shared.size()) {
    stop("an address outside shared memory");
  }
}

inline void store_16_bytes(void* address, const Vector& v) {
  require_aligned(address);
  std::memcpy(address, &v, sizeof v);
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}

inline float reciprocal_approximate(float x) { return 1.0f / x; }

inline float nan_or_min(float a, float b) { return a != a ? a : b != b ? b : std::fmin(a, b); }

template <typename Type>
struct Word16 {
  using Storage = uint16_t;
  static float low(uint32_t w) { return to_float(Type{static_cast<uint16_t>(w)}); }
  static float high(uint32_t w) { return to_float(Type{static_cast<uint16_t>(w >> 16)}); }
  static uint32_t pack(float low, float high) {
    return from_float<Type>(low).bits | static_cast<uint32_t>(from_float<Type>(high).bits) << 16;
  }
  static uint32_t max(uint32_t a, uint32_t b) {
    return pack(std::fmax(low(a), low(b)), std::fmax(high(a), high(b)));
  }
  static uint32_t min(uint32_t a, uint32_t b) {
    return pack(std::fmin(low(a), low(b)), std::fmin(high(a), high(b)));
  }
  static uint32_t min_or_nan(uint32_t a, uint32_t b) {
    return pack(nan_or_min(low(a), low(b)), nan_or_min(high(a), high(b)));
  }
};
struct BFloat16Word : Word16<BFloat16> {
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
};
struct Float16Word : Word16<Float16> {
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
};
struct Float32Word {
  using Storage = uint32_t;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static float low(uint32_t w) { return as_float(w); }
  static float high(uint32_t w) { return as_float(w); }
  static uint32_t pack(float low, float) { return as_bits(low); }
  static uint32_t max(uint32_t a, uint32_t b) { return as_bits(std::fmax(as_float(a), as_float(b))); }
  static uint32_t min(uint32_t a, uint32_t b) { return as_bits(std::fmin(as_float(a), as_float(b))); }
  static uint32_t min_or_nan(uint32_t a, uint32_t b) { return as_bits(nan_or_min(as_float(a), as_float(b))); }
};

inline void __syncthreads() { wait_at(machine.current->block->barrier); }
inline void cluster_barrier() { wait_at(machine.cluster); }

// Return combine(values of all lanes).
template <typename T, typename Combine>
T collect(T value, const Combine& combine) {
  Warp& warp = *machine.current->warp;
  std::memcpy(&warp.slots[machine.current->thread % 32], &value, sizeof value);
  wait_at(warp.barrier);
  T all[32];
  for (int i = 0; i < 32; ++i) std::memcpy(&all[i], &warp.slots[i], sizeof value);
  wait_at(warp.barrier);
  return combine(all);
}
inline float shuffle_xor(float value, int mask) {
  const unsigned lane = machine.current->thread % 32;
  return collect(value, [&](const float* all) { return all[lane ^ static_cast<unsigned>(mask)]; });
}
inline int warp_max(int value) {
  return collect(value, [](const int* all) { return *std::max_element(all, all + 32); });
}
inline int warp_min(int value) {
  return collect(value, [](const int* all) { return *std::min_element(all, all + 32); });
}
inline uint32_t warp_or(uint32_t value) {
  return collect(value, [](const uint32_t* all) {
    uint32_t result = 0;
    for (int i = 0; i < 32; ++i) result |= all[i];
    return result;
  });
}
inline unsigned warp_ballot(bool value) {
  return collect(unsigned{value}, [](const unsigned* all) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= all[i] << i;
    return result;
  });
}
inline int lowest_bit(unsigned mask) { return __builtin_ffs(static_cast<int>(mask)) - 1; }
inline void fail() { stop("the kernel failed"); }

inline unsigned char* dynamic_shared() { return machine.current->block->shared_begin; }

struct Mbarrier {
  int16_t pending;
  uint16_t phase;
  int32_t bytes;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));
inline Mbarrier* mbarrier_at(void* barrier) { return static_cast<Mbarrier*>(barrier); }
inline void mbarrier_complete(void* barrier, int arrivals, int bytes) {
  Mbarrier* const b = mbarrier_at(barrier);
  b->pending = static_cast<int16_t>(b->pending - arrivals);
  b->bytes += bytes;
  if (b->pending < 0 || b->bytes < 0) stop("an mbarrier that was not told to expect this");
  if (b->pending == 0 && b->bytes == 0) {
    b->pending = 1;
    ++b->phase;
    ++machine.progress;
  }
}
inline void mbarrier_init(uint64_t* barrier) {
  require_shared(barrier, sizeof *barrier);
  *mbarrier_at(barrier) = {1, 0, 0};
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(uint64_t* barrier, uint32_t bytes) {
  mbarrier_complete(barrier, 1, static_cast<int>(bytes));
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while ((mbarrier_at(barrier)->phase & 1u) == parity) {
    if (machine.random() % 4 == 0) let_some_arrive();
    yield();
  }
}

inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  require_aligned(shared);
  require_aligned(global);
  require_shared(shared, bytes);
  if (bytes % 16 != 0 || bytes == 0) stop("a bulk copy of no multiple of 16 bytes");
  machine.under_way.push_back([=] {
    std::memcpy(shared, global, bytes);
    mbarrier_complete(barrier, 0, -static_cast<int>(bytes));
  });
}

using Remote = unsigned char*;
inline Remote remote_address(const void* shared, int rank) {
  if (rank < 0 || rank >= static_cast<int>(machine.blocks.size())) stop("no such block in the cluster");
  return machine.blocks[rank].shared_begin + (static_cast<const unsigned char*>(shared) - dynamic_shared());
}
inline void fence_messages() {}
inline void send(Remote to, Remote barrier, const Vector& v, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) stop("a message to an odd address");
  machine.under_way.push_back([=] {
    std::memcpy(to, &v, bytes);
    mbarrier_complete(barrier, 0, -bytes);
  });
}
inline void send_16_bytes(Remote to, Remote barrier, const Vector& v) { send(to, barrier, v, 16); }
inline void send_8_bytes(Remote to, Remote barrier, uint32_t a, uint32_t b) {
  send(to, barrier, Vector{{a, b, 0, 0}}, 8);
}

inline std::string device_error() { return ""; }
inline void use_device(int) {}
inline int shared_per_block(int) { return machine.shared_per_block; }

struct LaunchShape {
  int cluster, threads, shared_bytes;
};
template <typename Parameter>
int resident_clusters(const char*, void (*)(Parameter), const LaunchShape&, int) {
  return machine.resident;
}

template <typename Parameter>
void launch(const char* name, void (*kernel)(Parameter), const LaunchShape& shape, int clusters, uintptr_t,
            const Parameter& parameter) {
  const int blocks = shape.cluster, threads = shape.threads;
  if (shape.shared_bytes > machine.shared_per_block || threads % 32 != 0 || clusters < 1) {
    throw std::runtime_error(std::string(name) + ": a launch that no device takes");
  }
  machine.clusters = clusters;
  machine.cluster_size = blocks;
  machine.threads = threads;
  machine.kernel = [&] { kernel(parameter); };
  gridDim = {static_cast<unsigned>(clusters * blocks)};
  while (machine.stacks.size() < static_cast<size_t>(blocks) * threads) {
    machine.stacks.emplace_back(new unsigned char[kStackBytes]);
  }
  for (int first = 0; first < clusters * blocks; first += blocks) {
    machine.blocks = std::vector<Block>(blocks);
    machine.warps = std::vector<Warp>(blocks * threads / 32);
    machine.fibers = std::vector<Fiber>(blocks * threads);
    machine.cluster = Barrier{blocks * threads, 0, 0};
    for (int b = 0; b < blocks; ++b) {
      Block& block = machine.blocks[b];
      block.shared.assign(shape.shared_bytes + 127, 0xff);
      const auto start = reinterpret_cast<uintptr_t>(block.shared.data());
      const size_t padding = (start + 127) / 128 * 128 - start;
      block.shared.resize(padding + shape.shared_bytes);  // shrinks, so the address stays
      block.shared_begin = block.shared.data() + padding;
      block.barrier.size = threads;
      block.index = static_cast<unsigned>(first + b);
      for (int t = 0; t < threads; ++t) {
        const int i = b * threads + t;
        Fiber& fiber = machine.fibers[i];
        fiber.block = &block;
        fiber.warp = &machine.warps[i / 32];
        fiber.warp->barrier.size = 32;
        fiber.thread = static_cast<unsigned>(t);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = machine.stacks[i].get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
      }
    }
    run_cluster(name, threads);
  }
}

}  // namespace loku

#endif
