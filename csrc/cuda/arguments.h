// What a launch passes to its kernels, by value: the arguments of the C interface with the numbers filled in.
#ifndef GENARM_CUDA_ARGUMENTS_H_
#define GENARM_CUDA_ARGUMENTS_H_

#include "common/numbers.h"
#include "cuda/simt.h"
#include "genarm_kernels.h"

namespace genarm {

constexpr int kTile = GENARM_TILE;
constexpr int kMostOperands = 64;  // a kernel's parameters are 4 KB at most

// A parameter: one value a row in device memory, or a number.
template <class T>
struct Parameter {
  const T* rows;  // NULL: the number
  int64_t stride;
  T number;

  __device__ T of(int64_t row) const { return rows ? rows[row * stride] : number; }
};

struct OperandRows {
  const void* x;
  int64_t stride;
  float weight;
};

struct Arguments {
  int64_t row_count;
  int vocab, tiles, operands;
  int blocks;           // that share a row: a cluster's, or those of the tile pass
  int tiles_per_block;  // of the row's tiles, in order
  bool filtered;        // false: no row has a filter on
  bool logprobs;

  OperandRows operand[kMostOperands];
  const float* weights;  // NULL: the operands' numbers
  int64_t weights_row_stride, weights_arm_stride;
  Parameter<float> base_weight, temperature, top_p, min_p;
  Parameter<int64_t> top_k, seed, position;
  int64_t seed_step;
  const int32_t* mask;
  int64_t mask_row_stride, mask_word_stride;

  int64_t* token;
  float *logprob, *log_mass, *base_logprob, *arm_logprobs;
  int32_t *kept, *status;
  float* whole;  // guided_log_softmax: [B, V]
  int64_t whole_stride;

  char* workspace;  // the boards (board.h) of the rows, where no cluster's shared memory holds them
  int64_t board_bytes;

  __device__ float weight(int64_t row, int i) const {
    if (i == 0) return base_weight.of(row);
    return weights ? weights[row * weights_row_stride + (i - 1) * weights_arm_stride] : operand[i].weight;
  }
};

// p is 2^(scale (z - top)); temperature 0 has the log-probabilities of temperature 1. The bound is felt below a
// temperature of 4e-39 alone, by logits that are subnormal themselves.
__device__ inline float scale_of(float temperature) {
  const float scale = kLog2E / (temperature == 0 ? 1 : temperature);
  return scale < kMaxFloat ? scale : kMaxFloat;
}

}  // namespace genarm

#endif  // GENARM_CUDA_ARGUMENTS_H_
