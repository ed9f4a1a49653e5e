// The CUDA kernels' interface to the machine: a few instructions, barriers, and the launch of a kernel.
//
// Kernels use only the names in this file and threadIdx, blockIdx, blockDim and __syncthreads.
// tests/loku_kernels/cuda/emulated_gpu.h defines the same names for the CPU. It is included ahead of this
// file, and so the kernels run without a GPU.
#ifndef LOKU_GPU_H
#define LOKU_GPU_H

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace loku {

// 16 bytes of a tensor, which a thread loads and stores at once.
struct alignas(16) Vector {
  uint32_t word[4];
};

// Loads are from any memory. Stores are to global memory.
__device__ __forceinline__ Vector load_16_bytes(const void* address) {
  const uint4 x = *static_cast<const uint4*>(address);
  return {{x.x, x.y, x.z, x.w}};
}

// The store is in assembly, because nvcc would merge it with scalar stores in another branch.
__device__ __forceinline__ void store_16_bytes(void* address, const Vector& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
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

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The dynamic shared memory of the block, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char buffer[];
  return buffer;
}

// A cluster is `size` consecutive blocks. Each of them can reach the shared memory of all. A cluster of one
// block is an ordinary block. Devices before sm_90 have no others.
__device__ __forceinline__ void cluster_barrier(int size) {
#if __CUDA_ARCH__ >= 900
  if (size > 1) {
    __cluster_barrier_arrive();  // releases this thread's writes
    __cluster_barrier_wait();    // acquires the others' writes
    return;
  }
#endif
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ T* shared_of_block(T* shared, int size, int rank) {
#if __CUDA_ARCH__ >= 900
  if (size > 1) return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
#endif
  return shared;
}

// --- copies to shared memory, and tensor cores ----------------------------------------------------

// Copy 16 bytes from global to shared memory, without waiting. Copy zeros if not `valid`.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Load four 8 x 8 matrices of 16-bit entries, transposed. Lanes 8 i to 8 i + 7 pass the addresses of the rows
// of matrix i. Lane l gets the entries (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of each matrix.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], const void* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(from)
               : "memory");
}

// Compute c (16 x 8) += a (16 x 16) b (16 x 8) of a 16-bit type, with float32 sums.
template <typename Word>
__device__ __forceinline__ void multiply_add_16x8x16(float* c, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.%10.%10.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "C"(Word::kType));
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

// The caller, loku_kernels/backends/native.py, has made this device torch's current one, and restores the
// former one. This library has a CUDA runtime of its own, which must be told too.
inline void use_device(int device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

struct DeviceLimits {
  int shared_per_block;           // bytes that a block may ask for
  int shared_per_multiprocessor;  // bytes; each resident block takes 1 KiB more than it asks for
  bool clusters;
};

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* name) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), name);
  return value;
}

// Return the limits of a kernel on the current device, `device`. Clusters need a device that launches them,
// and code for such devices. Newer devices can translate code for older ones, but that code knows no
// clusters.
template <typename... Parameters>
DeviceLimits device_limits(const char* name, void (*kernel)(Parameters...), int device) {
  cudaFuncAttributes code = {};
  check_cuda(cudaFuncGetAttributes(&code, kernel), name);
  return {device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, name),
          device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, name),
          code.ptxVersion >= 90 && device_attribute(cudaDevAttrClusterLaunch, device, name) != 0};
}

struct LaunchShape {
  dim3 grid;
  int threads;
  size_t shared_bytes;  // dynamic shared memory
  int cluster;          // blocks along x that form a cluster; the grid is a multiple of it
};

// Launch on the stream of the current device. An error names the kernel.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, uintptr_t stream,
            const Arguments&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    // The limit is set to the device's maximum, because another thread may be about to launch with more
    // memory.
    int device = 0;
    check_cuda(cudaGetDevice(&device), name);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, name)),
               name);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace loku

#endif
