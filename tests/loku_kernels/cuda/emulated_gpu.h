// Runs the CUDA kernels on the CPU. It defines the names of csrc/gpu.h in plain C++.
//
// Every thread of a cluster is a fiber. Fibers change at barriers and shuffles only, in an order drawn anew
// each round. So a missing barrier shows as a wrong result in some order. An absent thread shows as a
// deadlock, which is reported. Shared memory starts with poison. An asynchronous copy arrives when it is
// waited for, and not before. The emulation cannot show speed, or races between barriers that a cooperative
// order hides.
#ifndef LOKU_GPU_H  // the guard of csrc/gpu.h, which is then left out
#define LOKU_GPU_H

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
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

namespace loku {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim;
using std::max;
using std::min;

// --- fibers ---------------------------------------------------------------------------------------

struct Barrier {
  int size = 0, arrived = 0;
  int64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;
};

struct Block {
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  Barrier barrier;
  dim3 index;
};

struct Warp {
  Barrier barrier;
  unsigned char slots[32][64];
};

struct Fiber {
  ucontext_t context;
  Block* block;
  Warp* warp;
  int thread;
  const Barrier* waiting = nullptr;
  int64_t generation = 0;
  bool finished = false;
  std::vector<Copy> copies;              // issued and not yet committed
  std::deque<std::vector<Copy>> groups;  // committed and not yet waited for
};

struct Machine {
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  std::vector<Block> blocks;  // blocks of the running cluster
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  Barrier cluster;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::mt19937 random{0};
  int64_t progress = 0;
  int shared_per_block = 227 << 10, shared_per_multiprocessor = 228 << 10;
  bool clusters = true;
};
inline Machine machine;

constexpr size_t kStackBytes = 128 << 10;

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
  swapcontext(&self.context, &machine.scheduler);
  self.waiting = nullptr;
}

inline void fiber_main() {
  machine.kernel();
  machine.current->finished = true;
  ++machine.progress;
  swapcontext(&machine.current->context, &machine.scheduler);
}

inline void run_cluster(const char* name, int threads) {
  std::vector<Fiber*> order;
  for (Fiber& fiber : machine.fibers) order.push_back(&fiber);
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), machine.random);
    const int64_t before = machine.progress;
    for (Fiber* fiber : order) {
      if (fiber->waiting != nullptr && fiber->waiting->generation == fiber->generation) continue;
      machine.current = fiber;
      threadIdx = dim3(fiber->thread);
      blockIdx = fiber->block->index;
      blockDim = dim3(threads);
      swapcontext(&machine.scheduler, &fiber->context);
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->finished; }),
                order.end());
    if (machine.progress == before && !order.empty()) {
      throw std::runtime_error(std::string(name) + ": a barrier that not all threads reach");
    }
  }
}

// --- csrc/gpu.h -----------------------------------------------------------------------------------

struct alignas(16) Vector {
  uint32_t word[4];
};

inline void require_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) std::abort();
}

inline Vector load_16_bytes(const void* address) {
  require_aligned(address);
  Vector v;
  std::memcpy(&v, address, sizeof v);
  return v;
}

inline void store_16_bytes(void* address, const Vector& v) {
  require_aligned(address);
  std::memcpy(address, &v, sizeof v);
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

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
  static float nan_or_min(float a, float b) { return a != a ? a : b != b ? b : std::fmin(a, b); }
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
  static uint32_t min_or_nan(uint32_t a, uint32_t b) {
    return as_bits(Word16<BFloat16>::nan_or_min(as_float(a), as_float(b)));
  }
};

inline void __syncthreads() { wait_at(machine.current->block->barrier); }

template <typename T>
T shuffle_xor(T value, int mask) {
  Warp& warp = *machine.current->warp;
  const int lane = machine.current->thread % 32;
  std::memcpy(warp.slots[lane], &value, sizeof value);
  wait_at(warp.barrier);
  std::memcpy(&value, warp.slots[lane ^ mask], sizeof value);
  wait_at(warp.barrier);
  return value;
}

inline unsigned char* dynamic_shared() { return machine.current->block->shared_begin; }

inline void cluster_barrier(int size) {
  if (size != static_cast<int>(machine.blocks.size())) std::abort();
  wait_at(machine.cluster);
}

template <typename T>
T* shared_of_block(T* shared, int size, int rank) {
  if (rank < 0 || rank >= size) std::abort();
  const auto offset = reinterpret_cast<unsigned char*>(shared) - dynamic_shared();
  return reinterpret_cast<T*>(machine.blocks[rank].shared_begin + offset);
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
  require_aligned(shared);
  require_aligned(global);
  machine.current->copies.push_back({shared, valid ? global : nullptr});
}
inline void copy_async_commit() {
  machine.current->groups.push_back(std::move(machine.current->copies));
  machine.current->copies.clear();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = machine.current->groups;
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, 16);
      } else {
        std::memcpy(copy.to, copy.from, 16);
      }
    }
  }
}

inline void load_matrices_transposed(uint32_t (&fragment)[4], const void* shared) {
  require_aligned(shared);
  Warp& warp = *machine.current->warp;
  const int lane = machine.current->thread % 32;
  std::memcpy(warp.slots[lane], shared, 16);  // a row of a matrix
  wait_at(warp.barrier);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      std::memcpy(&pair[i], warp.slots[8 * matrix + 2 * (lane % 4) + i] + 2 * (lane / 4), 2);
    }
    fragment[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  wait_at(warp.barrier);
}

// The layouts of the instruction's operands are from the PTX manual, with g = lane / 4 and t = lane % 4:
// - a[0..3] hold (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) and the entries right of them.
// - b[0..1] hold (2t, g), (2t + 8, g) and the entries below them.
// - c[0..3] hold (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename Word>
void multiply_add_16x8x16(float* c, const uint32_t* a, const uint32_t* b) {
  Warp& warp = *machine.current->warp;
  const int lane = machine.current->thread % 32;
  std::memcpy(warp.slots[lane], a, 16);
  std::memcpy(warp.slots[lane] + 16, b, 8);
  wait_at(warp.barrier);
  float left[16][16], right[16][8];
  for (int other = 0; other < 32; ++other) {
    uint32_t words[6];
    std::memcpy(words, warp.slots[other], sizeof words);
    const int g = other / 4, t = other % 4;
    for (int i = 0; i < 4; ++i) {
      left[g + i % 2 * 8][2 * t + i / 2 * 8] = Word::low(words[i]);
      left[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = Word::high(words[i]);
    }
    for (int i = 0; i < 2; ++i) {
      right[2 * t + 8 * i][g] = Word::low(words[4 + i]);
      right[2 * t + 8 * i + 1][g] = Word::high(words[4 + i]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += left[row][k] * right[k][column];
  }
  wait_at(warp.barrier);
}

inline std::string device_error() { return ""; }

inline void use_device(int) {}

struct DeviceLimits {
  int shared_per_block, shared_per_multiprocessor;
  bool clusters;
};
template <typename... Parameters>
DeviceLimits device_limits(const char*, void (*)(Parameters...), int) {
  return {machine.shared_per_block, machine.shared_per_multiprocessor, machine.clusters};
}

struct LaunchShape {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  int cluster;
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, uintptr_t,
            const Arguments&... arguments) {
  if (shape.shared_bytes > static_cast<size_t>(machine.shared_per_block) || shape.threads % 32 != 0 ||
      shape.grid.x % shape.cluster != 0 || (shape.cluster > 1 && !machine.clusters)) {
    throw std::runtime_error(std::string(name) + ": a launch that no device takes");
  }
  machine.kernel = [&] { kernel(static_cast<Parameters>(arguments)...); };
  const int blocks = shape.cluster, threads = shape.threads;
  while (machine.stacks.size() < static_cast<size_t>(blocks) * threads) {
    machine.stacks.emplace_back(new unsigned char[kStackBytes]);
  }
  for (unsigned y = 0; y < shape.grid.y; ++y) {
    for (unsigned x = 0; x < shape.grid.x; x += shape.cluster) {
      machine.blocks = std::vector<Block>(blocks);
      machine.warps = std::vector<Warp>(blocks * threads / 32);
      machine.fibers = std::vector<Fiber>(blocks * threads);
      machine.cluster = Barrier{blocks * threads, 0, 0};
      for (int b = 0; b < blocks; ++b) {
        Block& block = machine.blocks[b];
        block.shared.assign(shape.shared_bytes + 16, 0xff);
        block.shared_begin = reinterpret_cast<unsigned char*>(
            (reinterpret_cast<uintptr_t>(block.shared.data()) + 15) / 16 * 16);
        block.barrier.size = threads;
        block.index = dim3(x + b, y);
        for (int t = 0; t < threads; ++t) {
          const int i = b * threads + t;
          Fiber& fiber = machine.fibers[i];
          fiber.block = &block;
          fiber.warp = &machine.warps[i / 32];
          fiber.warp->barrier.size = 32;
          fiber.thread = t;
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
}

}  // namespace loku

#endif
