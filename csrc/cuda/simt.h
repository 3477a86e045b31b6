// What the kernels use of the machine, by CUDA's own names. Without nvcc an emulation stands in (tests/backends/simt).
#ifndef GENARM_CUDA_SIMT_H_
#define GENARM_CUDA_SIMT_H_

#if defined(__CUDACC__)

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "common/portability.h"

namespace genarm {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#define GENARM_CLUSTERS 1
#endif

// Blocks of a cluster: they run at the same time and reach each other's shared memory.
__device__ __forceinline__ int cluster_rank() {
#if defined(GENARM_CLUSTERS)
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}

// Everything written before `arrive` is seen after `wait`; not before the relaxed one, which spares a fence. Threads
// that have ended count as arrived.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if defined(GENARM_CLUSTERS) && defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#if defined(GENARM_CLUSTERS)
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(GENARM_CLUSTERS)
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// Where `x`, in this block's shared memory, lies in that of another block.
template <class T>
__device__ __forceinline__ T* in_block(T* x, int rank) {
#if defined(GENARM_CLUSTERS)
  return cooperative_groups::this_cluster().map_shared_rank(x, static_cast<unsigned>(rank));
#else
  return x;
#endif
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// 2^x: error 2 units in the last place, 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace genarm

#else
#include "emulation.h"
#endif

namespace genarm {

#if !defined(__CUDACC__)
constexpr bool kClusters = true;
#endif
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of every block: the order of sums depends on it
constexpr int kWarps = kThreads / kWarp;

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, step));
  return x;
}

__device__ inline float warp_min(float x) { return -warp_max(-x); }

// The sum over this lane and those before it.
template <class T>
__device__ inline T warp_scan(T x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_up_sync(kWholeWarp, x, step);
    if (lane_of_thread() >= step) x += before;
  }
  return x;
}

}  // namespace genarm

#endif  // GENARM_CUDA_SIMT_H_
