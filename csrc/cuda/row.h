// Pass 2 begins: the row's parameters, the blocks that finish it, and the tiles' summaries together.
#ifndef GENARM_CUDA_ROW_H_
#define GENARM_CUDA_ROW_H_

#include "cuda/tile.h"

namespace genarm {

constexpr int kFew = kThreads;  // candidates that are compared each with each: one a thread
constexpr int kBins = 1024;

// The tiles' sums of one pair together.
struct Total {
  double sum, reference;
  float top;
};

// Tokens with low <= z <= high, and what lies above them; masses in units of 2^-mass_bits.
struct Interval {
  float low, high;
  uint32_t above, inside;
  uint64_t mass_above, mass_inside;
};

// A block's scratch; the first block's is where the team meets.
struct Shared {
  Total total[kMostOperands + 1];
  int status, allowed;
  double best[kWarps], weight[kWarps];
  int64_t winner[kWarps];
  uint64_t warp_mass[kWarps];
  uint32_t warp_count[kWarps];
  float warp_float[kWarps];

  // The filters' (filter.h).
  Interval interval;
  float threshold;  // no token below is kept
  uint64_t mass;    // of the tokens from the threshold on
  uint32_t kept;    // how many they are
  uint32_t found;   // candidates in the interval; those beyond kFew are counted only
  int boundary;     // the bin that holds the threshold
  float z[kFew];    // the candidates
  int token[kFew];
  uint64_t mass_of[kFew];
  uint32_t bin_count[kBins], bin_mass_low[kBins], bin_mass_high[kBins];
};

// A row and the blocks that finish it: a cluster, each with the tiles it read, or one block alone, with all of them.
// kKept: z of the tiles lie in shared memory; otherwise they are read and combined again.
template <class T, bool kCluster, bool kKept>
struct Row {
  using Element = T;
  static constexpr bool kTeam = kCluster;

  const Arguments& a;
  int row;
  int rank;         // of this block
  int first, last;  // this block's tiles
  Shared& mine;
  Shared& lead;  // the first block's
  Board board;   // likewise
  float* tops;   // the largest z of each of this block's tiles
  float4* kept;  // z of this block's tiles

  float scale;

  // Parameters; read where they are used, since pass 1 needs every register.
  __device__ float temperature() const { return a.temperature.of(row); }
  __device__ float top_p() const { return a.top_p.of(row); }
  __device__ float min_p() const { return a.min_p.of(row); }
  __device__ int64_t top_k() const {  // 0: off
    const int64_t k = a.top_k.of(row);
    return k > 0 && k < a.vocab ? k : 0;
  }
  __device__ bool greedy() const { return temperature() == 0; }
  __device__ bool filtered() const { return a.filtered && !greedy() && (top_k() > 0 || top_p() < 1 || min_p() > 0); }
  // False: the row cannot be drawn, whatever its logits.
  __device__ bool valid() const {
    const float t = temperature(), p = top_p(), m = min_p();
    bool valid = (a.whole ? t > 0 : t >= 0) && t < kInfinity && p >= 0 && p <= 1 && m >= 0 && m <= 1;
    for (int i = 0; i < a.operands; ++i) valid &= fabsf(a.weight(row, i)) < kInfinity;
    return valid;
  }
  // All blocks' threads; what they wrote before is seen after.
  __device__ void sync() const {
    if (kCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  // z of any tile of the row, for the whole warp.
  __device__ void load(int tile, float (&z)[kPerLane]) const {
    if constexpr (kKept) {
      const int owner = tile / a.tiles_per_block;
      const float4* from = kept_tile(in_block(kept, owner), tile - owner * a.tiles_per_block);
#pragma unroll
      for (int i = 0; i < kPerLane / 4; ++i) {
        const float4 four = from[i * kWarp];
        z[4 * i] = four.x, z[4 * i + 1] = four.y, z[4 * i + 2] = four.z, z[4 * i + 3] = four.w;
      }
    } else {
      allow<T>(a, row, tile, combine<T, false, false>(a, row, tile, z, board), z);
    }
  }
  // Calls visit(tile, z) for this block's tiles that hold a z of at least `low`, a warp each.
  template <class Visit>
  __device__ void each_tile(float low, Visit visit) const {
    for (int tile = first + warp_of_thread(); tile < last; tile += kWarps) {
      if (tops[tile - first] < low) continue;
      float z[kPerLane];
      load(tile, z);
      visit(tile, z);
    }
  }
};

// The tiles' summaries of a pair together, by a warp: in one order, however the tiles are shared out.
__device__ inline Total total_of(const Board& board, int pair, int tiles, float scale) {
  const float *tops = board.top(pair), *sums = board.sum(pair);
  float top = -kInfinity;
  for (int tile = lane_of_thread(); tile < tiles; tile += kWarp) {
    if (sums[tile] != 0) top = fmaxf(top, tops[tile]);  // a tile of -inf has no largest to speak of
  }
  top = warp_max(top);
  const double reference = reference_of(finite_or_zero(top), scale);
  double sum = 0;
  for (int tile = lane_of_thread(); tile < tiles; tile += kWarp) {
    if (sums[tile] != 0) sum += sums[tile] * exp2(reference_of(finite_or_zero(tops[tile]), scale) - reference);
  }
  return {warp_sum(sum), reference, top};
}

// All pairs and the row's status, by the first block; ends in a barrier.
template <class Row>
__device__ void total(const Row& r) {
  for (int pair = warp_of_thread(); pair < 1 + (r.a.logprobs ? r.a.operands : 0); pair += kWarps) {
    const Total all = total_of(r.board, pair, r.a.tiles, pair == 0 ? r.scale : kLog2E);
    if (lane_of_thread() == 0) r.mine.total[pair] = all;
  }
  if (warp_of_thread() == kWarps - 1) {
    int allowed = 0;
    bool spoilt = !r.valid();
    for (int tile = lane_of_thread(); tile < r.a.tiles; tile += kWarp) {
      const int here = r.board.allowed()[tile];
      spoilt |= here < 0;
      allowed += here;
    }
    allowed = warp_sum(allowed);
    spoilt = __any_sync(kWholeWarp, spoilt);
    if (lane_of_thread() == 0) {
      r.mine.allowed = allowed;
      r.mine.status = spoilt ? GENARM_BAD_ROW : allowed == 0 ? GENARM_NO_ALLOWED_TOKEN : GENARM_DRAWN;
    }
  }
  __syncthreads();
}

}  // namespace genarm

#endif  // GENARM_CUDA_ROW_H_
