// What host and device compilers call by different names.
#ifndef GENARM_COMMON_PORTABILITY_H_
#define GENARM_COMMON_PORTABILITY_H_

#if defined(__CUDACC__)
#define GENARM_HD __host__ __device__ __forceinline__
#else
#define GENARM_HD inline
#endif

#include <cstddef>
#include <cstdint>

namespace genarm {

// Asks for what lies `ahead` bytes after x, which need not exist.
inline void prefetch(const void* x, size_t ahead) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(x) + ahead));
#else
  (void)x, (void)ahead;
#endif
}

}  // namespace genarm

#endif  // GENARM_COMMON_PORTABILITY_H_
