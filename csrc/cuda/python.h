// What Python's module needs beside the C interface.
#ifndef GENARM_CUDA_PYTHON_H_
#define GENARM_CUDA_PYTHON_H_

namespace genarm {

bool is_current(int device);  // of the calling thread
const char* make_ready();     // what the first call on a device does; NULL, or what the CUDA runtime says is wrong

extern int forced_cluster;  // for tests: blocks that share a row; 0: two launches, -1: as planned

}  // namespace genarm

#endif  // GENARM_CUDA_PYTHON_H_
