// The C interface on an NVIDIA GPU (compute capability 8.0 on): the operations of genarm_kernels.h, put on a stream.
//
// The same structs, with these differences. Logits, masks, outputs and the workspace are device memory. A parameter of
// the rows is device memory, read when the kernels run, so that a captured graph sees new values at each replay; one
// of stride 0 is a number, in host memory, read during the call. Likewise the weights, by their row stride. `isa` and
// `executor` are not looked at. At most GENARM_CUDA_MOST_ARMS ARMs.
//
// A call launches one or two kernels on the current device and returns: it allocates nothing, waits for nothing and may
// be captured. The first call on a device, to a `_workspace` function or another, loads the kernels: not to be
// captured. The workspace lies at a multiple of 16 bytes; two calls at a time must not share one.
#ifndef GENARM_KERNELS_CUDA_H_
#define GENARM_KERNELS_CUDA_H_

#include "genarm_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GENARM_CUDA_MOST_ARMS 63

// A cudaStream_t (or CUstream); NULL is the default stream.
typedef void* genarm_cuda_stream;

// Bytes of device memory that a call with these arguments wants, for the current device; 0 for most calls on GPUs with
// clusters. It depends on rows, vocab_size, arms, on whether there are filters (a top_p below 1, or any that is device
// memory, stands for all) and on whether log-probabilities are wanted, and grows with each of them.
GENARM_API genarm_result genarm_cuda_guided_step_workspace(const genarm_guided_step_args* args, size_t* bytes,
                                                           genarm_error* error);
GENARM_API genarm_result genarm_cuda_guided_step(const genarm_guided_step_args* args, genarm_cuda_stream stream,
                                                 genarm_error* error);

GENARM_API genarm_result genarm_cuda_guided_log_softmax_workspace(const genarm_guided_log_softmax_args* args,
                                                                  size_t* bytes, genarm_error* error);
GENARM_API genarm_result genarm_cuda_guided_log_softmax(const genarm_guided_log_softmax_args* args,
                                                        genarm_cuda_stream stream, genarm_error* error);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // GENARM_KERNELS_CUDA_H_
