// The tiles' summaries of a row: in the first block's shared memory of a cluster, or in the workspace.
#ifndef GENARM_CUDA_BOARD_H_
#define GENARM_CUDA_BOARD_H_

#include "cuda/arguments.h"

namespace genarm {

constexpr int kGroups = 8;  // of a tile: four lanes' tokens each

// Pair 0 is of z, pair 1 + i of operand i by itself (with log-probabilities).
class Board {
 public:
  static GENARM_HD int64_t bytes(int64_t tiles, int pairs, bool filtered) {
    return (tiles * (2 * pairs + 1 + (filtered ? 2 + kGroups : 0)) * 4 + 15) / 16 * 16;
  }
  GENARM_HD Board(char* memory, int tiles, int pairs, bool filtered)
      : weights_(reinterpret_cast<uint64_t*>(memory)),
        words_(reinterpret_cast<float*>(memory) + (filtered ? 2 * int64_t{tiles} : 0)),
        tiles_(tiles),
        pairs_(pairs) {}

  // The largest; -inf of a z where nothing is allowed. Of an operand, any number its exponentials do not overflow by.
  GENARM_HD float* top(int pair) const { return words_ + 2 * pair * tiles_; }
  // Sum of 2^(scale x), relative to reference_of(top, scale).
  GENARM_HD float* sum(int pair) const { return words_ + (2 * pair + 1) * tiles_; }
  // How many tokens are allowed; -1: one spoils the row.
  GENARM_HD int* allowed() const { return reinterpret_cast<int*>(words_ + 2 * pairs_ * tiles_); }
  // With filters: the largest z of each group, [tiles, kGroups].
  GENARM_HD float* group_tops() const { return words_ + (2 * pairs_ + 1) * tiles_; }
  // With filters: mass of the kept tokens, in units of 2^-kTileBits relative to reference_of(top, scale).
  GENARM_HD uint64_t* weights() const { return weights_; }

 private:
  uint64_t* weights_;
  float* words_;
  int64_t tiles_, pairs_;
};

// ---- Sums of 2^(scale x), relative to about the largest -----------------------------------------------------------

// Whether scale * top, rounded, serves as what the exponents are relative to: one multiply-add and one exponential.
GENARM_HD bool is_near(float top, float scale) { return fabsf(top * scale) < 1048576.0f; }

__device__ inline float power_near(float x, float top, float scale) {
  return exp2_fast(fmaf(x, scale, -(top * scale)));
}

// For any x up to top and any finite top.
__device__ inline float power(float x, float top, float scale) {
  if (is_near(top, scale)) return power_near(x, top, scale);
  // In halves: the difference of two float32 may be twice the largest.
  return exp2_fast((x * 0.5f - top * 0.5f) * fminf(2 * scale, kMaxFloat));
}

// log2 of what these are relative to.
GENARM_HD double reference_of(float top, float scale) {
  return is_near(top, scale) ? static_cast<double>(top * scale) : static_cast<double>(top) * scale;
}

GENARM_HD float finite_or_zero(float x) { return fabsf(x) < kInfinity ? x : 0; }

}  // namespace genarm

#endif  // GENARM_CUDA_BOARD_H_
