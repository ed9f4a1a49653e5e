// A library for LD_PRELOAD in which one `operator new` of a caller fails. The caller is whatever code lies
// between two addresses: tests/loku_kernels/test_parallel.py gives those of the compiled core.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

std::atomic<uintptr_t> begin{0}, end{0};
std::atomic<int64_t> remaining{0};  // allocations up to the one that fails

void* allocate(std::size_t bytes, std::size_t alignment, void* caller) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(caller);
  if (from >= begin && from < end && --remaining == 0) throw std::bad_alloc();
  const std::size_t rounded = (bytes + alignment) / alignment * alignment;  // no 0 bytes
  void* const memory = alignment > 16 ? std::aligned_alloc(alignment, rounded) : std::malloc(rounded);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

// Make the nth allocation from now on fail. Return the number of allocations that were left before it, so 0
// or less if it failed.
extern "C" int64_t fail_allocation(uintptr_t caller_begin, uintptr_t caller_end, int64_t nth) {
  begin = caller_begin;
  end = caller_end;
  return remaining.exchange(nth);
}

void* operator new(std::size_t bytes) { return allocate(bytes, 16, __builtin_return_address(0)); }
void* operator new[](std::size_t bytes) { return allocate(bytes, 16, __builtin_return_address(0)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
