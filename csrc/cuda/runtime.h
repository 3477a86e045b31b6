// The host's side of the machine: the device, and launches. Without nvcc the emulation stands in (tests/backends/simt).
#ifndef GENARM_CUDA_RUNTIME_H_
#define GENARM_CUDA_RUNTIME_H_

#include "cuda/simt.h"

namespace genarm {

struct Device {
  int index;
  int multiprocessors;
  int shared_bytes;     // that a block may ask for
  int largest_cluster;  // 0: no clusters
};

struct Grid {
  int64_t blocks;
  int cluster;  // 0: none
  int64_t shared_bytes;
};

#if defined(__CUDACC__)

using CudaError = cudaError_t;
inline const char* words(CudaError error) { return cudaGetErrorString(error); }

inline CudaError get_device(int* device) { return cudaGetDevice(device); }

inline CudaError current_device(Device* device) {
  const auto get = [device](cudaDeviceAttr what, int* value) {
    return cudaDeviceGetAttribute(value, what, device->index);
  };
  int capability = 0;
  CudaError error = cudaGetDevice(&device->index);
  if (!error) error = get(cudaDevAttrMultiProcessorCount, &device->multiprocessors);
  if (!error) error = get(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes);
  if (!error) error = get(cudaDevAttrComputeCapabilityMajor, &capability);
  device->largest_cluster = capability >= 9 ? 8 : 0;
  return error;
}

// PTX of before sm_90, compiled by the driver for a later GPU, holds no clusters.
template <class Kernel>
CudaError leave_clusters_where_not_compiled(Kernel kernel, Device* device) {
  cudaFuncAttributes attributes;
  const CudaError error = cudaFuncGetAttributes(&attributes, kernel);
  if (!error && attributes.ptxVersion < 90) device->largest_cluster = 0;
  return error;
}

// Lets a kernel use all of a block's shared memory.
template <class Kernel>
CudaError prepare(Kernel kernel, const Device& device) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
}

// Whether the device runs clusters of 16, which are twice what every GPU with clusters must.
template <class Kernel>
CudaError allow_clusters_of_16(Kernel kernel, const Device& device, bool* allowed) {
  const CudaError error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {16, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(device.shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) cudaGetLastError();  // an answer, too: none
  *allowed = clusters > 0;
  return cudaSuccess;
}

template <class Kernel, class Arguments>
CudaError launch(Kernel kernel, const Grid& grid, void* stream, const Arguments& arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 0 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

#else

using CudaError = int;
inline const char* words(CudaError) { return "the emulation does not fail"; }

inline CudaError get_device(int* device) { return *device = 0; }

inline CudaError current_device(Device* device) {
  *device = {0, simt::kMultiprocessors, simt::kSharedBytes, 8};
  return 0;
}

template <class Kernel>
CudaError leave_clusters_where_not_compiled(Kernel, Device*) {
  return 0;
}

template <class Kernel>
CudaError prepare(Kernel, const Device&) {
  return 0;
}

template <class Kernel>
CudaError allow_clusters_of_16(Kernel, const Device&, bool* allowed) {
  *allowed = simt::kLargestCluster >= 16;
  return 0;
}

template <class Kernel, class Arguments>
CudaError launch(Kernel kernel, const Grid& grid, void*, const Arguments& arguments) {
  simt::run({grid.blocks, grid.cluster, kThreads, grid.shared_bytes}, [&] { kernel(arguments); });
  return 0;
}

#endif

}  // namespace genarm

#endif  // GENARM_CUDA_RUNTIME_H_
