// The CUDA kernels' interface to the machine: its instructions, barriers and copies, and the launch of a
// kernel.
//
// Kernels use only the names in this file and threadIdx, blockIdx, blockDim, gridDim and __syncthreads.
// tests/loku_kernels/cuda/emulated_gpu.h defines the same names for the CPU. It is included ahead of this
// file, and so the kernels run without a GPU.
#ifndef LOKU_GPU_H
#define LOKU_GPU_H

#include <cuda_runtime.h>

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "loku_kernels: the CUDA kernels need compute capability 9.0: set LOKU_CUDA_ARCHS to 90 or more"
#endif

#define LOKU_KERNEL_PARAMETER const __grid_constant__

namespace loku {

// 16 bytes of a tensor, which a thread loads and stores at once.
struct alignas(16) Vector {
  uint32_t word[4];
};

// Store to global memory. It is in assembly, because nvcc would merge it with scalar stores in another
// branch.
__device__ __forceinline__ void store_16_bytes(void* address, const Vector& v) {
  asm volatile(
      "st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
      "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
      : "memory");
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

// Compute 2^x within 2 ulp. Subnormal results become 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Compute 1 / x within 1 ulp. Subnormal results become 0.
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The types of a tensor's entries, as they lie in a 32-bit word: two of 16 bits, or one of 32 bits. max and
// min are IEEE 754's maxNum and minNum, lane by lane. They return the number for a number and a NaN.
// min_or_nan returns NaN.
template <typename Word>
struct Word16 {  // shared by the two 16-bit types; Word::kType is a type's name in PTX
  using Storage = uint16_t;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t w;
    asm("cvt.rn.%1x2.f32 %0, %2, %3;" : "=r"(w) : "C"(Word::kType), "f"(high), "f"(low));
    return w;
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    uint32_t w;
    asm("max.%1x2 %0, %2, %3;" : "=r"(w) : "C"(Word::kType), "r"(a), "r"(b));
    return w;
  }
  static __device__ __forceinline__ uint32_t min(uint32_t a, uint32_t b) {
    uint32_t w;
    asm("min.%1x2 %0, %2, %3;" : "=r"(w) : "C"(Word::kType), "r"(a), "r"(b));
    return w;
  }
  static __device__ __forceinline__ uint32_t min_or_nan(uint32_t a, uint32_t b) {
    uint32_t w;
    asm("min.NaN.%1x2 %0, %2, %3;" : "=r"(w) : "C"(Word::kType), "r"(a), "r"(b));
    return w;
  }
};

struct BFloat16Word : Word16<BFloat16Word> {
  static constexpr char kType[] = "bf16";
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static __device__ __forceinline__ float low(uint32_t w) { return as_float(w << 16); }
  static __device__ __forceinline__ float high(uint32_t w) { return as_float(w & 0xffff0000u); }
};

struct Float16Word : Word16<Float16Word> {
  static constexpr char kType[] = "f16";
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static __device__ __forceinline__ float low(uint32_t w) {
    float x;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(w));
    return x;
  }
  static __device__ __forceinline__ float high(uint32_t w) {
    float x;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(w));
    return x;
  }
};

struct Float32Word {  // the only entry is both the low and the high one
  using Storage = uint32_t;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static __device__ __forceinline__ float low(uint32_t w) { return as_float(w); }
  static __device__ __forceinline__ float high(uint32_t w) { return as_float(w); }
  static __device__ __forceinline__ uint32_t pack(float low, float) { return as_bits(low); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return as_bits(fmaxf(as_float(a), as_float(b)));
  }
  static __device__ __forceinline__ uint32_t min(uint32_t a, uint32_t b) {
    return as_bits(fminf(as_float(a), as_float(b)));
  }
  static __device__ __forceinline__ uint32_t min_or_nan(uint32_t a, uint32_t b) {
    float x;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(as_float(a)), "f"(as_float(b)));
    return as_bits(x);
  }
};

// --- threads of a warp, and blocks of a cluster ---------------------------------------------------

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
__device__ __forceinline__ int warp_max(int value) { return __reduce_max_sync(kAllLanes, value); }
__device__ __forceinline__ int warp_min(int value) { return __reduce_min_sync(kAllLanes, value); }
__device__ __forceinline__ uint32_t warp_or(uint32_t value) { return __reduce_or_sync(kAllLanes, value); }
__device__ __forceinline__ unsigned warp_ballot(bool value) { return __ballot_sync(kAllLanes, value); }
__device__ __forceinline__ int lowest_bit(unsigned mask) { return __ffs(static_cast<int>(mask)) - 1; }

// End the kernel with an error.
__device__ __forceinline__ void fail() { __trap(); }

// The dynamic shared memory of the block, 128-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char buffer[];
  return buffer;
}

// Wait for all threads of all blocks of the cluster. This also waits for the thread's earlier stores to
// global memory, so it belongs outside loops.
__device__ __forceinline__ void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// --- mbarriers, and what completes their phases ---------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A phase of an mbarrier ends after one arrival and after the bytes that the arrival announced. Phase 0 has
// parity 0.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// Called after the inits, and before the barrier that lets others use them.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The one arrival of a phase. It announces the bytes of the phase.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Wait for the end of the phase of this parity. It must be the current phase or the one before.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t done = 0;
#pragma unroll 1
  for (int tries = 0; tries < (1 << 20); ++tries) {  // each suspends the thread for a while
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    if (done) return;
  }
  fail();  // a lost copy is an error rather than a hang
}

// Copy from global to shared memory without waiting. The size and both addresses are multiples of 16 bytes.
// The bytes complete a phase of the barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// An address in the shared memory of a block of the cluster.
using Remote = uint32_t;

__device__ __forceinline__ Remote remote_address(const void* shared, int rank) {
  Remote remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(shared)), "r"(rank));
  return remote;
}

// Called before a message that lets other blocks overwrite shared memory which this thread has read.
__device__ __forceinline__ void fence_messages() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Send a message to a block of the cluster without waiting. The bytes complete a phase of the barrier there.
// So neither side needs a fence of global memory.
__device__ __forceinline__ void send_16_bytes(Remote to, Remote barrier, const Vector& v) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void send_8_bytes(Remote to, Remote barrier, uint32_t a, uint32_t b) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "r"(a), "r"(b), "r"(barrier)
               : "memory");
}

// --- the host's side ------------------------------------------------------------------------------

inline void check_cuda(cudaError_t status, const char* name) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("loku_kernels, ") + name + ": " + cudaGetErrorString(status));
  }
}

inline std::string device_error() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return "";
  return std::string("no CUDA driver or device for a build with CUDA ") +
         std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + ": " +
         cudaGetErrorString(status);
}

// The caller, loku_kernels/backends/cuda.py, has made this device torch's current one, and restores the
// former one. This library has a CUDA runtime of its own, which must be told too.
inline void use_device(int device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* name) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), name);
  return value;
}

// Return the bytes of shared memory that a block may ask for. Return 0 for a device that cannot run the
// kernels.
inline int shared_per_block(int device) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device, "capability") < 9) return 0;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, "shared memory");
}

struct LaunchShape {
  int cluster;       // blocks of a cluster
  int threads;       // threads of a block
  int shared_bytes;  // dynamic shared memory of a block
};

inline cudaLaunchConfig_t launch_config(const LaunchShape& shape, int clusters,
                                        cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.cluster) * static_cast<unsigned>(clusters));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return config;
}

// Count the clusters of a kernel that the current device, `device`, holds at a time. The count is kept,
// because the driver takes longer for it than for a launch.
template <typename Parameter>
int resident_clusters(const char* name, void (*kernel)(Parameter), const LaunchShape& shape, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(Parameter), int, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& count = known[{kernel, device, shape.cluster, shape.threads, shape.shared_bytes}];
  if (count > 0) return count;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_per_block(device)),
      name);
  if (shape.shared_bytes > 16384) {  // room for as many blocks as the registers allow
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               name);
  }
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device, name);
  if (shape.cluster > 1) {
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = launch_config(shape, multiprocessors, attribute);
    check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &config), name);
  } else {
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, shape.threads,
                                                             static_cast<size_t>(shape.shared_bytes)),
               name);
    count *= multiprocessors;
  }
  if (count <= 0)
    throw std::runtime_error(std::string("loku_kernels, ") + name + ": no block fits the device");
  return count;
}

// Launch on a stream of the current device. An error names the kernel.
template <typename Parameter>
void launch(const char* name, void (*kernel)(Parameter), const LaunchShape& shape, int clusters,
            uintptr_t stream, const Parameter& parameter) {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = launch_config(shape, clusters, attribute);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, parameter), name);
}

}  // namespace loku

#endif
