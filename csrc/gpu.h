// What the CUDA kernels use of the machine: a few instructions, barriers, and the launch of a kernel.
//
// Kernels name nothing of CUDA but what is here and threadIdx, blockIdx, blockDim, __syncthreads. So
// tests/loku_kernels/cuda/emulated_gpu.h, which gives the same names a meaning on the CPU and is included
// ahead of this file, can run them where there is no GPU.
#ifndef LOKU_GPU_H
#define LOKU_GPU_H

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace loku {

// 16 bytes of a tensor: what a thread loads and stores at once.
struct alignas(16) Vector {
  uint32_t word[4];
};

// load: of any memory; store: to global memory.
__device__ __forceinline__ Vector load_16_bytes(const void* address) {
  const uint4 x = *static_cast<const uint4*>(address);
  return {{x.x, x.y, x.z, x.w}};
}

// In assembly, because nvcc merges it with the scalar stores of the other branch where there are some.
__device__ __forceinline__ void store_16_bytes(void* address, const Vector& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

// 2^x within 2 ulp, subnormal results flushed to 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The types of a tensor's entries, as they lie in a 32-bit word: two of 16 bits, or one of 32.
// max and min are those of IEEE 754's maxNum, lane by lane: of a number and a NaN they give the number.
// min_or_nan gives NaN.
template <typename Word>
struct Word16 {  // what the two 16-bit types share; Word::kType is their name in PTX
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

struct Float32Word {  // its one entry is both the low and the high one
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

// A cluster is `size` consecutive blocks, whose shared memory each of them can reach. One of a single
// block is an ordinary block, and all there is before sm_90.
__device__ __forceinline__ void cluster_barrier(int size) {
#if __CUDA_ARCH__ >= 900
  if (size > 1) {
    __cluster_barrier_arrive();  // releases what this thread has written,
    __cluster_barrier_wait();    // acquires what the others have
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

// 16 bytes from global to shared memory, without waiting; zeros where not `valid`.
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

// Four 8 x 8 matrices of 16-bit entries, transposed: lanes 8 i to 8 i + 7 give the addresses of the rows of
// matrix i; lane l gets, of each, the entries (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], const void* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(from)
               : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8) of a 16-bit type, float32 accumulation.
template <typename Word>
__device__ __forceinline__ void multiply_add_16x8x16(float* c, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.%10.%10.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "C"(Word::kType));
}

// --- the host's side ------------------------------------------------------------------------------

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("loku_kernels, ") + what + ": " + cudaGetErrorString(status));
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

// The caller, loku_kernels/backends/native.py, has made this device torch's current one, and restores what
// was. This library has a CUDA runtime of its own, which must be told too.
inline void use_device(int device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

struct DeviceLimits {
  int shared_per_block;           // bytes that a block may ask for
  int shared_per_multiprocessor;  // bytes, of which each resident block takes 1 KiB more than it asks for
  bool clusters;
};

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* name) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), name);
  return value;
}

// What the current device, `device`, lets this kernel have. Clusters want both a device that launches them
// and code that is for such devices: code for older ones, which newer devices translate, knows of none.
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
  size_t shared_bytes;  // dynamic
  int cluster;          // blocks along x that form one; the grid is a multiple of it
};

// Launch on the stream of the current device. An error names the kernel.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, uintptr_t stream,
            const Arguments&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    // All there is, not what this launch takes: another thread may be about to launch the kernel with more.
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
