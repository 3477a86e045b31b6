// What csrc/cuda uses of CUDA, for a C++ compiler and a CPU: the kernels' own sources run, thread by thread.
//
// A thread is a fiber with a stack of its own. It runs until it waits (for its warp in a shuffle or vote, for its block
// or its cluster at a barrier); which of those that can go on goes next is drawn at random, so that what is missing a
// barrier reads what is not there yet. Shared memory starts as garbage, is a heap block of exactly the size asked for,
// and is gone when the block's last thread has ended: AddressSanitizer sees what leaves it, or comes too late.
//
// Checked, each ending the process with a message: all threads wait and none can go on; the lanes of a warp meet in
// different operations, or under a mask that is not the whole warp; a launch beyond the device's limits.
//
// Not modelled: memory order (every write is seen at once, in program order: a missing fence is not found),
// asynchronous copies (the kernels use none), clusters that run at the same time (they run one after another), time,
// registers, banks; the 2 units in the last place by which ex2.approx is off. Under ThreadSanitizer every thread is one
// of its own and only barriers order them: then a missing barrier is a data race, whatever the order in which threads
// ran.
#ifndef GENARM_TESTS_SIMT_EMULATION_H_
#define GENARM_TESTS_SIMT_EMULATION_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
static_assert(sizeof(float4) == 16 && sizeof(uint4) == 16, "as CUDA's");

namespace simt {

struct Index {
  unsigned x;
};

// Of the thread that runs.
Index thread_index();
Index block_index();
char* shared_memory();
int cluster_rank();
void* in_block(void* x, int rank);

// A warp's operations: the value of the lane `source`, whether any is not 0, the least.
uint64_t shuffle(unsigned mask, uint64_t value, int source);
bool any(unsigned mask, bool value);
int64_t least(unsigned mask, int64_t value);
void sync_warp();
void sync_threads();
void cluster_arrive(bool ordering);
void cluster_wait();

struct Launch {
  int64_t blocks;
  int cluster, threads;
  int64_t shared_bytes;
};
// Runs kernel() for every thread, cluster after cluster; returns when all have ended.
void run(const Launch& launch, const std::function<void()>& kernel);

// The device that is emulated.
constexpr int kMultiprocessors = 132, kSharedBytes = 227 * 1024, kLargestCluster = 16;

template <class T>
T shuffle_as(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "what a shuffle carries");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return simt::shuffle_as(mask, value, lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return simt::shuffle_as(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int steps) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return simt::shuffle_as(mask, value, lane >= steps ? lane - steps : lane);
}
inline int __any_sync(unsigned mask, int predicate) { return simt::any(mask, predicate != 0); }
inline int __reduce_min_sync(unsigned mask, int value) { return static_cast<int>(simt::least(mask, value)); }
inline void __syncthreads() { simt::sync_threads(); }
inline void __syncwarp() { simt::sync_warp(); }

inline uint32_t atomicAdd(uint32_t* x, uint32_t value) { return __atomic_fetch_add(x, value, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* x, unsigned long long value) {
  return __atomic_fetch_add(x, value, __ATOMIC_RELAXED);
}

template <class T>
T __ldg(const T* x) {
  return *x;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

namespace genarm {

using std::min;

inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_arrive() { simt::cluster_arrive(true); }
inline void cluster_arrive_relaxed() { simt::cluster_arrive(false); }
inline void cluster_wait() { simt::cluster_wait(); }
template <class T>
T* in_block(T* x, int rank) {
  return static_cast<T*>(simt::in_block(x, rank));
}
inline char* shared_memory() { return simt::shared_memory(); }
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

}  // namespace genarm

#endif  // GENARM_TESTS_SIMT_EMULATION_H_
