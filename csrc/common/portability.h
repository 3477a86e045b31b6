// What host and device compilers call by different names.
#ifndef GENARM_COMMON_PORTABILITY_H_
#define GENARM_COMMON_PORTABILITY_H_

#if defined(__CUDACC__)
#define GENARM_HD __host__ __device__ __forceinline__
#else
#define GENARM_HD inline
#endif

#endif  // GENARM_COMMON_PORTABILITY_H_
