// Pass 2 ends: the tile that wins, the token in it, and its log-probabilities. All of it by the first block.
#ifndef GENARM_CUDA_DRAW_H_
#define GENARM_CUDA_DRAW_H_

#include "common/random.h"
#include "cuda/filter.h"

namespace genarm {

// The tile that wins the race (random.h), and the mass of all tiles; `weight(tile)` is the mass of one. Only the first
// warp gets to know them.
template <class Weight>
__device__ TileRace race(Shared& shared, uint64_t seed, uint64_t position, int tiles, double* mass, Weight weight) {
  TileRace race{seed, position};
  double sum = 0;
  for (int tile = static_cast<int>(threadIdx.x); tile < tiles; tile += kThreads) {
    const double here = weight(tile);
    if (here > 0) race.enter(tile, here);
    sum += here;
  }
  const auto join = [&race](double best, int64_t winner) {
    if (winner < 0 || best > race.best || (best == race.best && winner > race.winner && race.winner >= 0)) return;
    race.best = best;
    race.winner = winner;
  };
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const double best = __shfl_xor_sync(kWholeWarp, race.best, step);
    const int64_t winner = __shfl_xor_sync(kWholeWarp, race.winner, step);
    join(best, winner);
  }
  sum = warp_sum(sum);
  if (lane_of_thread() == 0) {
    shared.best[warp_of_thread()] = race.best;
    shared.winner[warp_of_thread()] = race.winner;
    shared.weight[warp_of_thread()] = sum;
  }
  __syncthreads();
  if (warp_of_thread() != 0) return race;
  *mass = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    join(shared.best[warp], shared.winner[warp]);
    *mass += shared.weight[warp];
  }
  return race;
}

// By the first warp: draws by inverse CDF, in the tokens' order, among the tile's z from the threshold on, and returns
// the token's offset.
__device__ inline int draw_in_tile(const float (&z)[kPerLane], float threshold, float scale, double uniform) {
  constexpr int kRuns = kPerLane / kRun;
  float top = -kInfinity;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) top = fmaxf(top, z[e]);
  top = warp_max(top);
  const auto mass = [&](float x) { return x < threshold ? 0 : mass_of(x, top, scale, kTileBits); };
  uint64_t before[kRuns], all = 0;  // the mass before each of the lane's runs
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    uint64_t own = 0;
#pragma unroll
    for (int e = 0; e < kRun; ++e) own += mass(z[run * kRun + e]);
    const uint64_t through = warp_scan(own);
    before[run] = all + through - own;
    all += __shfl_sync(kWholeWarp, through, kWarp - 1);
  }
  uint64_t passed = static_cast<uint64_t>(uniform * static_cast<double>(all));
  if (passed >= all) passed = all - 1;
  int first = kTile;
#pragma unroll
  for (int run = kRuns - 1; run >= 0; --run) {
    uint64_t through = before[run];
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      const bool was_passed = through > passed;
      through += mass(z[run * kRun + e]);
      if (through > passed && !was_passed) first = offset_of(run * kRun + e);
    }
  }
  return __reduce_min_sync(kWholeWarp, first);
}

// By all threads of the first block: writes that nothing was drawn.
template <class Row>
__device__ void write_failure(const Row& r, int status) {
  const Arguments& a = r.a;
  if (threadIdx.x == 0) {
    a.token[r.row] = -1;
    a.kept[r.row] = 0;
    a.status[r.row] = status;
    if (a.logprobs) a.logprob[r.row] = a.log_mass[r.row] = a.base_logprob[r.row] = NAN;
  }
  for (int i = static_cast<int>(threadIdx.x); a.logprobs && i < a.operands - 1; i += kThreads) {
    a.arm_logprobs[int64_t{r.row} * (a.operands - 1) + i] = NAN;
  }
}

// All threads of the first block, after `total` and, for a filtered row, `filter`.
template <class Row>
__device__ void draw(const Row& r) {
  const Arguments& a = r.a;
  const Total all = r.mine.total[0];
  if (r.mine.status != GENARM_DRAWN) {
    write_failure(r, r.mine.status);
    return;
  }
  const uint64_t seed =
      static_cast<uint64_t>(a.seed.of(r.row)) + static_cast<uint64_t>(r.row) * static_cast<uint64_t>(a.seed_step);
  const uint64_t position = static_cast<uint64_t>(a.position.of(r.row));
  const bool filtered = r.filtered();

  // 1. The tile.
  double kept_mass = 0;
  const auto scaled = [&](double sum, int tile) {
    return sum * exp2(reference_of(finite_or_zero(r.board.top(0)[tile]), r.scale) - all.reference);
  };
  int tile;
  if (r.greedy()) {
    int first = a.tiles;
    for (int t = static_cast<int>(threadIdx.x); t < a.tiles; t += kThreads) {
      if (r.board.top(0)[t] == all.top && t < first) first = t;
    }
    first = __reduce_min_sync(kWholeWarp, first);
    if (lane_of_thread() == 0) r.mine.winner[warp_of_thread()] = first;
    __syncthreads();
    if (warp_of_thread() != 0) return;
    for (int warp = 1; warp < kWarps; ++warp) first = min(first, static_cast<int>(r.mine.winner[warp]));
    tile = first;
  } else {
    const auto weight = [&](int t) {
      if (!filtered) return r.board.sum(0)[t] == 0 ? 0 : scaled(r.board.sum(0)[t], t);
      const uint64_t mass = r.board.weights()[t];
      return mass == 0 ? 0 : scaled(static_cast<double>(mass) * 0x1p-52, t);
    };
    tile = static_cast<int>(race(r.mine, seed, position, a.tiles, &kept_mass, weight).winner);
    if (warp_of_thread() != 0) return;
  }

  // 2. The token: one tile once more.
  float z[kPerLane];
  r.load(tile, z);
  int offset;
  if (r.greedy()) {
    int first = kTile;
#pragma unroll
    for (int e = kPerLane - 1; e >= 0; --e) first = z[e] == all.top ? offset_of(e) : first;
    offset = __reduce_min_sync(kWholeWarp, first);
  } else {
    offset = draw_in_tile(z, filtered ? r.mine.threshold : -kMaxFloat, r.scale, token_uniform(seed, position));
  }
  const int64_t token = static_cast<int64_t>(tile) * kTile + offset;
  const int kept = r.greedy() ? 1 : filtered ? static_cast<int>(r.mine.kept) : r.mine.allowed;
  if (lane_of_thread() == 0) {
    a.token[r.row] = token;
    a.kept[r.row] = kept;
    a.status[r.row] = GENARM_DRAWN;
  }
  if (!a.logprobs) return;

  // 3. Its log-probabilities, each operand's by a lane of its own.
  float drawn_z = -kInfinity;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) drawn_z = offset_of(e) == offset ? z[e] : drawn_z;
  drawn_z = warp_max(drawn_z);
  if (lane_of_thread() == 0) {
    const double top = all.top, temperature = r.greedy() ? 1 : r.temperature();
    const double log_sum = log(all.sum) + (all.reference - top * r.scale) * kLn2;
    const double logprob = log_probability((drawn_z - top) / temperature - log_sum);
    const double log_mass = kept < r.mine.allowed && kept_mass < all.sum ? log(kept_mass / all.sum) : 0;
    a.logprob[r.row] = static_cast<float>(logprob);
    a.log_mass[r.row] = static_cast<float>(kept == 1 ? logprob : fmax(log_mass, logprob));
  }
  for (int i = lane_of_thread(); i < a.operands; i += kWarp) {
    const Total& own = r.mine.total[1 + i];
    const double x = to_float(operand_row<typename Row::Element>(a, r.row, i)[token]);
    const double logprob = log_probability((x * kLog2E - own.reference) * kLn2 - log(own.sum));
    const float result = own.sum < kInfinity ? static_cast<float>(logprob) : NAN;
    *(i == 0 ? a.base_logprob + r.row : a.arm_logprobs + int64_t{r.row} * (a.operands - 1) + i - 1) = result;
  }
}

}  // namespace genarm

#endif  // GENARM_CUDA_DRAW_H_
