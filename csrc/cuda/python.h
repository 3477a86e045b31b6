// What Python's module needs beside the C interface.
#ifndef GENARM_CUDA_PYTHON_H_
#define GENARM_CUDA_PYTHON_H_

namespace genarm {

// Each returns NULL, or what the CUDA runtime says is wrong.
const char* use_device(int device, int* before);  // of the calling thread, from now on
const char* make_ready();                         // what the first call on a device does

extern int forced_cluster;  // for tests: blocks that share a row; 0: two launches, -1: as planned

}  // namespace genarm

#endif  // GENARM_CUDA_PYTHON_H_
