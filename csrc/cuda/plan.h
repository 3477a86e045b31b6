// How a call is launched: one table, in this function.
#ifndef GENARM_CUDA_PLAN_H_
#define GENARM_CUDA_PLAN_H_

#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace genarm {

struct Plan {
  int cluster;          // blocks that share a row; 0: two launches
  int tiles_per_block;  // of a cluster
  int64_t shared_bytes, board_bytes;
};

// `forced`: -1, or what a test wants where there are clusters: so many blocks, or 0 for two launches.
inline Plan plan(const Device& device, const Arguments& a, bool keep, int forced) {
  Plan two{0, 0, 0, Board::bytes(a.tiles, pairs_of(a), a.filtered)};
  const auto with = [&](int cluster) {
    const int tiles = (a.tiles + cluster - 1) / cluster;
    return Plan{cluster, tiles, Layout(a.tiles, tiles, pairs_of(a), a.filtered, keep).bytes, 0};
  };
  if (device.largest_cluster == 0 || forced == 0) return two;
  if (forced > 0) return with(forced);
  // A warp takes a tile; rows that leave multiprocessors idle are spread wider. No GPU has measured this.
  int cluster = 1;
  const int wide = a.row_count * 16 <= device.multiprocessors ? 16 : 8;
  while (cluster < wide && cluster < device.largest_cluster && cluster * kWarps < a.tiles) cluster *= 2;
  // Two blocks at a time on a multiprocessor: one reads while the other one filters.
  while (cluster < device.largest_cluster && with(cluster).shared_bytes > device.shared_bytes / 2 - 1024) cluster *= 2;
  return with(cluster).shared_bytes <= device.shared_bytes ? with(cluster) : two;
}

}  // namespace genarm

#endif  // GENARM_CUDA_PLAN_H_
