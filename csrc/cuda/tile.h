// Pass 1, which reads all the logits: a warp reads a tile, combines it, and leaves its summary on the board.
//
// A lane holds 4 times 8 tokens side by side: one 16-byte load of 16-bit logits, one byte of the mask. The layout is
// the same however rows are aligned and whoever reads the tile, and so are the bits of every sum.
#ifndef GENARM_CUDA_TILE_H_
#define GENARM_CUDA_TILE_H_

#include <type_traits>

#include "cuda/board.h"

namespace genarm {

constexpr int kPerLane = kTile / kWarp;
constexpr int kRun = 8;  // tokens side by side in a lane

// Where a lane's element stands in its tile.
__device__ inline int offset_of(int element) {
  return element / kRun * (kRun * kWarp) + lane_of_thread() * kRun + element % kRun;
}

// One operand's logits of a tile, as they come.
template <class T>
struct Logits {
  static constexpr int kWords = kPerLane * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[kWords];

  // The element; `e` is known when this is compiled, as loops over it are unrolled.
  __device__ float operator[](int e) const {
    if constexpr (sizeof(T) == 4) {
      return float_of(word[e]);
    } else {
      return to_float(T{static_cast<uint16_t>(e % 2 ? word[e / 2] >> 16 : word[e / 2] & 0xFFFFu)});
    }
  }

  __device__ void load(const T* row, int tile, int vocab) {
    const T* x = row + static_cast<int64_t>(tile) * kTile + lane_of_thread() * kRun;
    if (tile < vocab / kTile && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
      constexpr int kVectors = kRun * static_cast<int>(sizeof(T)) / 16;
#pragma unroll
      for (int run = 0; run < kPerLane / kRun; ++run) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const uint4 four = __ldg(reinterpret_cast<const uint4*>(x + run * kRun * kWarp) + i);
          uint32_t* to = word + (run * kVectors + i) * 4;
          to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
      }
      return;
    }
    // Ragged or not aligned: token by token, and -inf past the vocabulary.
    const int inside = vocab - tile * kTile;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const bool there = offset_of(e) < inside;
      const T* from = x + e / kRun * (kRun * kWarp) + e % kRun;
      if constexpr (sizeof(T) == 4) {
        word[e] = there ? bits_of(*from) : bits_of(-kInfinity);
      } else {
        const uint32_t bits = there ? from->bits : T::kMinusInfinity;
        word[e / 2] = e % 2 ? word[e / 2] | bits << 16 : bits;
      }
    }
  }
};

template <class T>
__device__ const T* operand_row(const Arguments& a, int64_t row, int i) {
  return static_cast<const T*>(a.operand[i].x) + row * a.operand[i].stride;
}

// The lane's terms, one element after the other, then the lanes'.
class SumOfTile {
 public:
  __device__ void add(int e, float term) { part_[e % 4] += term; }
  __device__ float of_warp() const { return warp_sum((part_[0] + part_[1]) + (part_[2] + part_[3])); }

 private:
  float part_[4] = {};
};

template <class Values>
__device__ float largest_of(const Values& x, int elements) {
  float top = -kInfinity;
#pragma unroll
  for (int e = 0; e < elements; ++e) top = fmaxf(top, x[e]);
  return warp_max(top);
}

// z of a tile's tokens, the operands in their order. kPairs: two are on their way at once. kOwn: with log-probabilities
// each operand's own sum of exponentials goes to the board. Its reference is the largest of a quarter of the tokens,
// which spares the search for the largest of all but where that is far above: an exponent of 14 is rounded by 5e-7.
// Returns the least of the lane's logits that have a share in z.
template <class T, bool kPairs, bool kOwn>
__device__ float combine(const Arguments& a, int64_t row, int tile, float (&z)[kPerLane], const Board& board) {
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) z[e] = 0;
  float least = 0;
  // In a loop of its own with and without a share in z: a predicate would cost a move a token.
  const auto add = [&](float weight, const Logits<T>& x) {
    if (weight == 0) return;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      z[e] = fmaf(weight, x[e], z[e]);
      least = fminf(least, x[e]);
    }
  };
  const auto add_and_sum = [&](auto share, float weight, const Logits<T>& x, float reference) {
    SumOfTile own;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      if (decltype(share)::value) {
        z[e] = fmaf(weight, x[e], z[e]);
        least = fminf(least, x[e]);
      }
      own.add(e, power_near(x[e], reference, kLog2E));
    }
    return own.of_warp();
  };
  const auto use = [&](int i, const Logits<T>& x) {
    const float weight = a.weight(row, i);
    if (!kOwn || !a.logprobs) return add(weight, x);
    float top = finite_or_zero(largest_of(x, kRun));
    float sum =
        weight == 0 ? add_and_sum(std::false_type(), weight, x, top) : add_and_sum(std::true_type(), weight, x, top);
    if (!(is_near(top, kLog2E) && sum >= 0.5f && sum < 16384.0f)) {
      top = finite_or_zero(largest_of(x, kPerLane));
      SumOfTile own;
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) own.add(e, power(x[e], top, kLog2E));
      sum = own.of_warp();
    }
    if (lane_of_thread() == 0) board.top(1 + i)[tile] = top, board.sum(1 + i)[tile] = sum;
  };
  for (int i = 0; i < a.operands; i += kPairs ? 2 : 1) {
    Logits<T> first, second;
    first.load(operand_row<T>(a, row, i), tile, a.vocab);
    const bool both = kPairs && i + 1 < a.operands;
    if (both) second.load(operand_row<T>(a, row, i + 1), tile, a.vocab);
    use(i, first);
    if (both) use(i + 1, second);
  }
  return least;
}

// Which of the lane's tokens the vocabulary and the mask allow, a bit each.
__device__ inline uint32_t may_be_drawn(const Arguments& a, int64_t row, int tile) {
  uint32_t may = ~0u;
  if (tile >= a.vocab / kTile) {
    may = 0;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) may |= (offset_of(e) < a.vocab - tile * kTile ? 1u : 0u) << e;
  }
  if (a.mask) {
    uint32_t mask = 0;
#pragma unroll
    for (int run = 0; run < kPerLane / kRun; ++run) {
      const int v = tile * kTile + offset_of(run * kRun);
      if (v < a.vocab) {
        const int32_t word = __ldg(a.mask + row * a.mask_row_stride + (v / 32) * a.mask_word_stride);
        mask |= (static_cast<uint32_t>(word) >> v % 32 & 0xFFu) << run * kRun;
      }
    }
    may &= mask;
  }
  return may;
}

// Sets z to -inf where a token is not allowed; z and `least` come from `combine`. Returns how many of the tile's tokens
// are allowed, or -1 where one of them spoils the row.
template <class T>
__device__ int allow(const Arguments& a, int64_t row, int tile, float least, float (&z)[kPerLane]) {
  uint32_t may = may_be_drawn(a, row, tile), bad = 0;
  // An operand in use that is not finite makes z not finite, and few tiles hold one, or a lowest number.
  float not_finite = 0;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) not_finite = fmaf(z[e], 0.0f, not_finite);
  if (__any_sync(kWholeWarp, not_finite != 0 || least <= kLowest<T>)) {
    uint32_t blocked = 0;
    for (int i = 0; i < a.operands; ++i) {
      if (a.weight(row, i) == 0) continue;
      Logits<T> x;
      x.load(operand_row<T>(a, row, i), tile, a.vocab);
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        blocked |= (x[e] <= kLowest<T> ? 1u : 0u) << e;
        bad |= (x[e] < kInfinity ? 0u : 1u) << e;
      }
    }
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      blocked |= (z[e] == -kInfinity ? 1u : 0u) << e;
      bad |= (z[e] < kInfinity ? 0u : ~blocked >> e & 1u) << e;
    }
    bad &= may;
    may &= ~blocked;
  }
  if (__any_sync(kWholeWarp, may != ~0u)) {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) z[e] = may >> e & 1 ? z[e] : -kInfinity;
  }
  const int allowed = warp_sum(__popc(may));
  return __any_sync(kWholeWarp, bad != 0) ? -1 : allowed;
}

// z of a tile that is kept in shared memory, so that a warp's accesses fill all banks: [tile, kPerLane / 4, lane].
__device__ inline float4* kept_tile(float4* kept, int tile_in_block) {
  return kept + tile_in_block * (kTile / 4) + lane_of_thread();
}

// One tile. `kept`: NULL, or where its z go; `top_kept`: likewise its largest.
template <class T>
__device__ void summarise_tile(const Arguments& a, int64_t row, float scale, int tile, const Board& board, float4* kept,
                               float* top_kept) {
  const int lane = lane_of_thread();
  float z[kPerLane];
  const float least = combine<T, sizeof(T) == 2, true>(a, row, tile, z, board);
  const int allowed = allow<T>(a, row, tile, least, z);
  float top = -kInfinity;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) top = fmaxf(top, z[e]);
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, step));
    if (a.filtered && step == kWarp / kGroups / 2 && lane % (kWarp / kGroups) == 0) {
      board.group_tops()[tile * kGroups + lane / (kWarp / kGroups)] = top;
    }
  }
  const float reference = finite_or_zero(top);
  SumOfTile sum;
  if (is_near(reference, scale)) {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) sum.add(e, power_near(z[e], reference, scale));
  } else {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) sum.add(e, power(z[e], reference, scale));
  }
  const float mass = sum.of_warp();
  if (lane == 0) {
    board.top(0)[tile] = top;
    board.sum(0)[tile] = mass;
    board.allowed()[tile] = allowed;
    if (top_kept) *top_kept = top;
  }
  if (kept) {
#pragma unroll
    for (int i = 0; i < kPerLane / 4; ++i) kept[i * kWarp] = {z[4 * i], z[4 * i + 1], z[4 * i + 2], z[4 * i + 3]};
  }
}

}  // namespace genarm

#endif  // GENARM_CUDA_TILE_H_
