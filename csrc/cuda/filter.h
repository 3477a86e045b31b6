// Pass 2 with filters: the threshold from which on tokens are kept, and the tiles' masses of the kept tokens. The
// threshold is exact, given the tokens' masses, which are float32: they are added up as whole numbers, whose sums do
// not depend on their order. Nothing is sorted.
//
// Of nearly every row only a few tokens can be kept: those above a bound that the tiles' summaries give. The first
// block compares them each with each. Where they are many, a histogram of z (count and mass per bin) finds the bin that
// holds the threshold, and the tokens of that bin are compared. Every block of the team searches the tiles that it
// holds.
#ifndef GENARM_CUDA_FILTER_H_
#define GENARM_CUDA_FILTER_H_

#include "cuda/row.h"

namespace genarm {

constexpr int kTileBits = 52;  // of a mass relative to its tile's largest: 1024 of them fit

// Likewise relative to the row's largest.
__device__ inline int mass_bits(int vocab) { return 30 + __clz(vocab); }

__device__ inline uint64_t mass_of(float z, float top, float scale, int bits) {
  return static_cast<uint64_t>(power(z, top, scale) * float_of(static_cast<uint32_t>(127 + bits) << 23));
}

// The smallest float32 that is not below x.
__device__ inline float round_up(double x) {
  const float y = static_cast<float>(x);
  return y < x ? nextafterf(y, kInfinity) : y;
}

// ---- Bins of an interval of z, in its order ------------------------------------------------------------------------

class Bins {
 public:
  // Of equal width; with `by_key`, or where the interval is too narrow for that, of equally many floats.
  __device__ Bins(float low, float high, bool by_key) : low_(low * 0.5f), key_(ordered_key(low)) {
    const float width = high * 0.5f - low_;
    inverse_ = !by_key && width > 1e-30f ? kBins / width : 0;
    const int digits = kWarp - __clz(static_cast<int>(ordered_key(high) - key_));
    shift_ = digits > 10 ? digits - 10 : 0;
  }
  __device__ int of(float z) const {
    if (inverse_ == 0) return static_cast<int>((ordered_key(z) - key_) >> shift_);
    const int bin = static_cast<int>((z * 0.5f - low_) * inverse_);
    return bin < kBins ? bin : kBins - 1;
  }
  // The key of the smallest z, from that of `low` to one past `end`, in this bin or above it.
  __device__ uint32_t first_key(int bin, uint32_t end) const {
    uint32_t begin = key_;
    while (begin < end) {
      const uint32_t middle = begin + (end - begin) / 2;
      if (of(from_ordered_key(middle)) < bin) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }

 private:
  float low_, inverse_;
  uint32_t key_;
  int shift_;
};
static_assert(kBins == 1 << 10, "Bins keeps 10 digits of a key");

__device__ inline void clear_bins(Shared& shared) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) {
    shared.bin_count[bin] = shared.bin_mass_low[bin] = shared.bin_mass_high[bin] = 0;
  }
}

__device__ inline void add_to_bin(Shared& shared, int bin, uint64_t mass) {
  atomicAdd(&shared.bin_count[bin], 1u);
  // 64 bits by two sums of 32 with the carries: adding 64 at once is a loop in shared memory.
  const uint32_t low = static_cast<uint32_t>(mass);
  const uint32_t before = atomicAdd(&shared.bin_mass_low[bin], low);
  const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before ? 1 : 0);
  if (high != 0) atomicAdd(&shared.bin_mass_high[bin], high);
}

// What is sought: the first z, from the largest on, where the count or the mass of the tokens reaches the target.
struct Target {
  bool by_mass;
  double least;

  __device__ bool reached(uint32_t count, uint64_t mass) const {
    return (by_mass ? static_cast<double>(mass) : static_cast<double>(count)) >= least;
  }
};

// By the first block: sets `boundary` to the bin that holds the threshold, or to -1 where none reaches the target, and
// fills in what is above that bin and in it. `blocks`: how many blocks' bins are to be added up. Ends in a barrier.
__device__ inline void find_boundary(Shared& shared, int blocks, const Target& target) {
  constexpr int kEach = kBins / kThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread(), warp = warp_of_thread();
  uint32_t count[kEach] = {}, all = 0;
  uint64_t mass[kEach] = {}, all_mass = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int bin = kBins - 1 - (thread * kEach + i);  // from the largest z on
    for (int block = 0; block < blocks; ++block) {
      const Shared& theirs = *in_block(&shared, block);
      count[i] += theirs.bin_count[bin];
      mass[i] += static_cast<uint64_t>(theirs.bin_mass_high[bin]) << 32;
      mass[i] += theirs.bin_mass_low[bin];
    }
    all += count[i];
    all_mass += mass[i];
  }
  const uint32_t through = warp_scan(all);
  const uint64_t mass_through = warp_scan(all_mass);
  if (lane == kWarp - 1) shared.warp_count[warp] = through, shared.warp_mass[warp] = mass_through;
  if (thread == 0) shared.boundary = -1;
  __syncthreads();
  uint32_t above = shared.interval.above;
  uint64_t mass_above = shared.interval.mass_above;
  const uint32_t outside = above;
  for (int w = 0; w < warp; ++w) above += shared.warp_count[w], mass_above += shared.warp_mass[w];
  above += through - all;
  mass_above += mass_through - all_mass;
  __syncthreads();  // the interval has been read
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool before = above > outside && target.reached(above, mass_above);
    if (count[i] != 0 && !before && target.reached(above + count[i], mass_above + mass[i])) {
      shared.boundary = kBins - 1 - (thread * kEach + i);
      shared.interval.above = above, shared.interval.inside = count[i];
      shared.interval.mass_above = mass_above, shared.interval.mass_inside = mass[i];
    }
    above += count[i];
    mass_above += mass[i];
  }
  if (thread == kThreads - 1) shared.mass = mass_above;  // for where nothing was reached
  __syncthreads();
}

// ---- The first block's own steps -----------------------------------------------------------------------------------

// Each ends in a barrier.
__device__ inline float block_min(Shared& shared, float x) {
  x = warp_min(x);
  if (lane_of_thread() == 0) shared.warp_float[warp_of_thread()] = x;
  __syncthreads();
  x = shared.warp_float[0];
  for (int warp = 1; warp < kWarps; ++warp) x = fminf(x, shared.warp_float[warp]);
  __syncthreads();
  return x;
}

__device__ inline uint64_t block_sum(Shared& shared, uint64_t x) {
  x = warp_sum(x);
  if (lane_of_thread() == 0) shared.warp_mass[warp_of_thread()] = x;
  __syncthreads();
  x = 0;
  for (int warp = 0; warp < kWarps; ++warp) x += shared.warp_mass[warp];
  __syncthreads();
  return x;
}

// A bound from below of the k-th largest z: at least k groups have a token, their largest, from it on.
template <class Row>
__device__ float bound_of_top_k(const Row& r, float top) {
  const float* tops = r.board.group_tops();
  const int groups = r.a.tiles * kGroups, thread = static_cast<int>(threadIdx.x);
  float lowest = top;
  uint64_t finite = 0;
  for (int group = thread; group < groups; group += kThreads) {
    if (tops[group] == -kInfinity) continue;
    lowest = fminf(lowest, tops[group]);
    ++finite;
  }
  lowest = block_min(r.mine, lowest);
  if (block_sum(r.mine, finite) < static_cast<uint64_t>(r.top_k())) return -kMaxFloat;
  const Bins bins(lowest, top, false);
  clear_bins(r.mine);
  __syncthreads();
  for (int group = thread; group < groups; group += kThreads) {
    if (tops[group] > -kInfinity) atomicAdd(&r.mine.bin_count[bins.of(tops[group])], 1u);
  }
  __syncthreads();
  find_boundary(r.mine, 1, {false, static_cast<double>(r.top_k())});
  float bound = top;
  for (int group = thread; group < groups; group += kThreads) {
    if (tops[group] > -kInfinity && bins.of(tops[group]) >= r.mine.boundary) bound = fminf(bound, tops[group]);
  }
  return block_min(r.mine, bound);
}

// The thread's candidate against all others: how many are larger, and their mass.
__device__ inline void compare(const Shared& shared, int count, uint32_t* above, uint64_t* mass_above) {
  const float z = shared.z[threadIdx.x];
#pragma unroll 4
  for (int other = 0; other < count; ++other) {
    if (shared.z[other] > z) {
      *above += 1;
      *mass_above += shared.mass_of[other];
    }
  }
}

// Fills the masses of the candidates; ends in a barrier.
template <class Row>
__device__ uint64_t weigh_candidate(const Row& r, int count) {
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t mass = 0;
  if (thread < count) {
    mass = mass_of(r.mine.z[thread], r.mine.total[0].top, r.scale, mass_bits(r.a.vocab));
    r.mine.mass_of[thread] = mass;
  }
  __syncthreads();
  return mass;
}

// The threshold among the candidates of the interval, and the mass from it on.
template <class Row>
__device__ void pick(const Row& r, const Target& target) {
  const int count = static_cast<int>(r.mine.found), thread = static_cast<int>(threadIdx.x);
  const uint64_t mass = weigh_candidate(r, count);
  const bool is_one = thread < count;
  uint32_t above = r.mine.interval.above;
  uint64_t mass_above = r.mine.interval.mass_above;
  if (is_one) compare(r.mine, count, &above, &mass_above);
  const bool keep = is_one && !target.reached(above, mass_above);
  const float threshold = block_min(r.mine, keep ? r.mine.z[thread] : r.mine.interval.high);
  const uint64_t inside = block_sum(r.mine, is_one && r.mine.z[thread] >= threshold ? mass : 0);
  if (thread == 0) {
    r.mine.threshold = threshold;
    r.mine.mass = r.mine.interval.mass_above + inside;
  }
}

// Everything about the kept tokens where all that can be are candidates.
template <class Row>
__device__ void keep_few(const Row& r, double row_mass, float min_z) {
  const int count = static_cast<int>(r.mine.found), thread = static_cast<int>(threadIdx.x);
  const float top = r.mine.total[0].top;
  const uint64_t mass = weigh_candidate(r, count);
  const bool is_one = thread < count;
  uint32_t above = 0;
  uint64_t mass_above = 0;
  if (is_one) compare(r.mine, count, &above, &mass_above);
  bool keep = is_one && (r.top_k() == 0 || above < static_cast<uint64_t>(r.top_k()));
  if (r.top_p() < 1) {
    if (r.top_k() > 0) row_mass = static_cast<double>(block_sum(r.mine, keep ? mass : 0));
    keep = keep && static_cast<double>(mass_above) < r.top_p() * row_mass;
  }
  keep = is_one && ((keep && r.mine.z[thread] >= min_z) || r.mine.z[thread] == top);
  const float threshold = block_min(r.mine, keep ? r.mine.z[thread] : top);
  const uint64_t kept = block_sum(r.mine, keep ? 1 : 0);
  if (keep) {
    const int tile = r.mine.token[thread] / kTile;
    atomicAdd(reinterpret_cast<unsigned long long*>(&r.board.weights()[tile]),
              static_cast<unsigned long long>(mass_of(r.mine.z[thread], r.board.top(0)[tile], r.scale, kTileBits)));
  }
  if (thread == 0) {
    r.mine.threshold = threshold;
    r.mine.kept = static_cast<uint32_t>(kept);
  }
  __syncthreads();
}

// ---- The team's steps ----------------------------------------------------------------------------------------------

// The tokens of the interval become the first block's candidates; more than kFew are only counted.
template <class Row>
__device__ void collect(const Row& r, float low, float high) {
  r.each_tile(low, [&](int tile, const float (&z)[kPerLane]) {
    uint32_t hits = 0;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) hits |= (z[e] >= low && z[e] <= high ? 1u : 0u) << e;
    const uint32_t own = static_cast<uint32_t>(__popc(hits)), through = warp_scan(own);
    const uint32_t all = __shfl_sync(kWholeWarp, through, kWarp - 1);
    if (all == 0) return;
    uint32_t begin = 0;
    if (lane_of_thread() == 0) begin = atomicAdd(&r.lead.found, all);
    uint32_t slot = __shfl_sync(kWholeWarp, begin, 0) + through - own;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      if (hits >> e & 1) {
        if (slot < kFew) {
          r.lead.z[slot] = z[e];
          r.lead.token[slot] = tile * kTile + offset_of(e);
        }
        ++slot;
      }
    }
  });
}

// The threshold for the target among many tokens: leaves it, and the mass from it on, with the first block. All blocks
// come from a sync after which the interval is theirs to read.
template <class Row>
__device__ void narrow(const Row& r, const Target& target, float top) {
  for (bool by_key = false;; by_key = true) {
    const Interval in = r.lead.interval;
    const Bins bins(in.low, in.high, by_key);
    clear_bins(r.mine);
    __syncthreads();
    r.each_tile(in.low, [&](int, const float (&z)[kPerLane]) {
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        if (z[e] < in.low || z[e] > in.high) continue;
        add_to_bin(r.mine, bins.of(z[e]), mass_of(z[e], top, r.scale, mass_bits(r.a.vocab)));
      }
    });
    r.sync();
    if (r.rank == 0) {
      find_boundary(r.mine, Row::kTeam ? r.a.blocks : 1, target);
      const int boundary = r.mine.boundary;
      if (boundary >= 0 && lane_of_thread() == 0 && warp_of_thread() < 2) {
        const uint32_t edge = bins.first_key(boundary + warp_of_thread(), ordered_key(in.high) + 1);
        if (warp_of_thread() == 0) r.mine.interval.low = from_ordered_key(edge);
        if (warp_of_thread() == 1) r.mine.interval.high = from_ordered_key(edge - 1);
      }
      if (threadIdx.x == 0) {
        r.mine.found = 0;
        if (boundary < 0) {  // all of them, then
          r.mine.interval.inside = 0;
          r.mine.threshold = in.low;
        }
      }
    }
    r.sync();
    const Interval out = r.lead.interval;
    if (out.inside == 0) return;
    if (out.low == out.high) {  // all equal
      if (r.rank == 0 && threadIdx.x == 0) {
        r.mine.threshold = out.low;
        r.mine.mass = out.mass_above + out.mass_inside;
      }
      return;
    }
    if (out.inside > kFew) continue;
    collect(r, out.low, out.high);
    r.sync();
    if (r.rank == 0) pick(r, target);
    return;
  }
}

// Everything about the kept tokens, however many they are: a pass over all tiles.
template <class Row>
__device__ void keep_many(const Row& r, float threshold) {
  r.each_tile(threshold, [&](int tile, const float (&z)[kPerLane]) {
    const float top = r.tops[tile - r.first];
    uint64_t weight = 0;
    uint32_t kept = 0;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      if (z[e] < threshold) continue;
      weight += mass_of(z[e], top, r.scale, kTileBits);
      ++kept;
    }
    weight = warp_sum(weight);
    kept = warp_sum(kept);
    if (lane_of_thread() == 0) {
      r.board.weights()[tile] = weight;
      atomicAdd(&r.lead.kept, kept);
    }
  });
}

// All of it, by all blocks of the team, after the first one's `total`. Leaves the threshold, the number of the kept
// tokens and the tiles' weights with the first block.
template <class Row>
__device__ void filter(const Row& r) {
  const int thread = static_cast<int>(threadIdx.x);
  // 1. Below this no token is kept.
  float min_z = -kMaxFloat;
  double row_mass = 0;
  if (r.rank == 0 && r.mine.status == GENARM_DRAWN) {
    const float top = r.mine.total[0].top;
    if (r.min_p() > 0)
      min_z = fminf(round_up(top + r.temperature() * fmin(log(static_cast<double>(r.min_p())), -0x1p-54)), top);
    row_mass = ldexp(r.mine.total[0].sum, mass_bits(r.a.vocab));
    if (thread == 0) r.mine.interval = {-kMaxFloat, top, 0, 0, 0, 0};
    for (int tile = thread; tile < r.a.tiles; tile += kThreads) r.board.weights()[tile] = 0;
    __syncthreads();
    float low = -kMaxFloat;
    if (r.top_k() > 0) {
      low = bound_of_top_k(r, top);
    } else if (r.top_p() < 1) {
      // Tokens of less than (1 - top_p) / V each are lighter together than what top-p drops.
      const double least = 0.9 * (1 - static_cast<double>(r.top_p())) * r.mine.total[0].sum / r.a.vocab;
      low = fminf(round_up(top + r.temperature() * log(least)), top);
    }
    if (r.top_k() == 0 || r.top_p() >= 1) low = fmaxf(low, min_z);
    if (thread == 0) {
      r.mine.interval = {fmaxf(low, -kMaxFloat), top, 0, 0, 0, 0};
      r.mine.found = r.mine.kept = 0;
    }
  }
  r.sync();
  if (r.lead.status != GENARM_DRAWN) return;
  // 2. What is above it.
  const Interval all = r.lead.interval;
  const float top = all.high;
  collect(r, all.low, top);
  r.sync();
  if (r.lead.found <= kFew) {
    if (r.rank == 0) keep_few(r, row_mass, min_z);
    return;
  }
  // 3. Too many: one filter after the other.
  float threshold = all.low;
  if (r.top_k() > 0) {
    narrow(r, {false, static_cast<double>(r.top_k())}, top);
    r.sync();
    threshold = r.lead.threshold;
  }
  if (r.top_p() < 1) {
    if (r.rank == 0) {
      if (r.top_k() > 0) row_mass = static_cast<double>(r.mine.mass);
      if (thread == 0) r.mine.interval = {threshold, top, 0, 0, 0, 0};
    }
    r.sync();  // by now all have read that threshold, too
    narrow(r, {true, r.top_p() * row_mass}, top);
    r.sync();
    threshold = fmaxf(threshold, r.lead.threshold);
  }
  r.sync();
  if (r.rank == 0 && thread == 0) r.mine.threshold = fminf(fmaxf(threshold, min_z), top);
  r.sync();
  keep_many(r, r.lead.threshold);
  r.sync();
}

}  // namespace genarm

#endif  // GENARM_CUDA_FILTER_H_
