// What the kernels need of CUDA, or of its emulation on the CPU (emulate.h, with PGDFAST_EMULATE defined).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef PGDFAST_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>
#define PGDFAST_NOINLINE __noinline__   // where inlining would multiply code and compile time
#define PGDFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace pgdfast::cuda {

using Stream = void*;   // a cudaStream_t

#ifdef PGDFAST_EMULATE

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, Stream, const A&... args) {
  if (grid.x == 0 || grid.y == 0) return;
  emulate::machine().run(grid, block, shared, [&] { kernel(args...); });
}
inline void clear(void* to, std::size_t bytes, Stream) { std::memset(to, 0, bytes); }
inline void copy(void* to, const void* from, std::size_t bytes, Stream) { std::memcpy(to, from, bytes); }
template <class K>
void allow_shared(K, std::size_t) {}
inline int multiprocessors() { return 4; }
inline std::size_t shared_limit() { return 96 << 10; }

// 16 bytes to shared memory, no sooner there than waited for.
inline void copy_async(void* shared, const void* global) { emulate::machine().copy({shared, global, 16}); }
inline void commit_copies() { emulate::machine().commit(); }
template <int left>
void wait_copies() {
  emulate::machine().wait(left);
}
inline void threadfence_system() {}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, Stream stream, const A&... args) {
  if (grid.x == 0 || grid.y == 0) return;
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), "launching a kernel");
}
inline void clear(void* to, std::size_t bytes, Stream stream) {
  check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing memory");
}
inline void copy(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)), "copying memory");
}
// More than 48 KB of dynamic shared memory have to be asked for.
template <class K>
void allow_shared(K kernel, std::size_t bytes) {
  if (bytes > (48 << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "asking for shared memory");
}
inline int attribute(cudaDeviceAttr what) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&value, what, device), "asking the device");
  return value;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline std::size_t shared_limit() { return std::size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int left>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(left) : "memory");
}
__device__ __forceinline__ void threadfence_system() { __threadfence_system(); }

#endif

constexpr unsigned kThreads = 256;

inline unsigned blocks_for(std::int64_t items, std::int64_t per_block) {
  const std::int64_t blocks = (items + per_block - 1) / per_block;
  return unsigned(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

// The sum over a warp, the same in every lane, always in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// The sum over a block of whole warps, in every thread; `scratch` holds one number per warp. Always in the same order.
template <class T>
__device__ T block_sum(T x, T* scratch) {
  const unsigned thread = threadIdx.x, warps = blockDim.x / 32;
  x = warp_sum(x);
  __syncthreads();
  if (thread % 32 == 0) scratch[thread / 32] = x;
  __syncthreads();
  T sum = scratch[0];
  for (unsigned w = 1; w < warps; ++w) sum += scratch[w];
  return sum;
}

}  // namespace pgdfast::cuda
