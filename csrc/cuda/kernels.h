// The kernels, and what each launch of them is. A row's logits come in, its token goes out, or log p of all its tokens.
//
// On GPUs with clusters (from sm_90 on) it is one launch: a cluster reads a row and finishes it on chip. It reads
// (1 + N) V elements of logits once, and one tile of them again. Elsewhere, and where z of a row does not fit, there
// are two launches: the tile pass writes the boards to the workspace (28 bytes per tile with N = 1, and 40 more with
// filters), and the row pass takes one block per row, which reads those tiles again that filters cannot rule out.
#ifndef GENARM_CUDA_KERNELS_H_
#define GENARM_CUDA_KERNELS_H_

#include "cuda/draw.h"
#include "cuda/whole.h"

namespace genarm {

// With scratch of this size, two blocks on a multiprocessor have room for 90 KB of z each. These are 22 tiles: clusters
// of 8 blocks hold rows up to V = 180,000.
static_assert(sizeof(Shared) <= 20 * 1024, "Shared has grown");

// Shared memory of a block of a cluster: Shared, the board, the tops of its tiles, their z.
struct Layout {
  int64_t board, tops, kept, bytes;

  GENARM_HD Layout(int tiles, int tiles_per_block, int pairs, bool filtered, bool keep) {
    board = (static_cast<int64_t>(sizeof(Shared)) + 15) / 16 * 16;
    tops = board + Board::bytes(tiles, pairs, filtered);
    kept = tops + (static_cast<int64_t>(tiles_per_block) * 4 + 15) / 16 * 16;
    bytes = kept + (keep ? static_cast<int64_t>(tiles_per_block) * kTile * 4 : 0);
  }
};

GENARM_HD int pairs_of(const Arguments& a) { return 1 + (a.logprobs ? a.operands : 0); }

template <class Row>
__device__ Row row_of(const Arguments& a, int row, int rank, Shared* lead, const Board& board) {
  Shared& mine = *reinterpret_cast<Shared*>(shared_memory());
  const int first = rank * a.tiles_per_block;
  const int last = first + a.tiles_per_block < a.tiles ? first + a.tiles_per_block : a.tiles;
  return {a, row, rank, first, last, mine, *lead, board, nullptr, nullptr, scale_of(a.temperature.of(row))};
}

// ---- One launch: grid (B blocks), clusters of `blocks` -------------------------------------------------------------

template <class T, bool kKept>
__device__ Row<T, true, kKept> row_of_cluster(const Arguments& a) {
  char* memory = shared_memory();
  const Layout layout(a.tiles, a.tiles_per_block, pairs_of(a), a.filtered, kKept);
  const Board board(in_block(memory + layout.board, 0), a.tiles, pairs_of(a), a.filtered);
  Shared* lead = in_block(reinterpret_cast<Shared*>(memory), 0);
  const int row = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.blocks));
  auto r = row_of<Row<T, true, kKept>>(a, row, cluster_rank(), lead, board);
  r.tops = reinterpret_cast<float*>(memory + layout.tops);
  r.kept = reinterpret_cast<float4*>(memory + layout.kept);
  return r;
}

// Pass 1, between the cluster's first barrier (a block's memory is not there to be written to before the block runs)
// and its arrival at the second.
template <class T, bool kKept>
__device__ Row<T, true, kKept> read_row(const Arguments& a) {
  cluster_arrive_relaxed();
  const auto r = row_of_cluster<T, kKept>(a);
  cluster_wait();
  for (int tile = r.first + warp_of_thread(); tile < r.last; tile += kWarps) {
    const int own = tile - r.first;
    summarise_tile<T>(a, r.row, r.scale, tile, r.board, kKept ? kept_tile(r.kept, own) : nullptr,
                      kKept ? r.tops + own : nullptr);
  }
  cluster_arrive();
  return r;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) cluster_step(const __grid_constant__ Arguments a) {
  if constexpr (kClusters) {
    const auto r = read_row<T, false>(a);
    if (r.rank != 0) return;
    cluster_wait();
    total(r);
    draw(r);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) cluster_filtered_step(const __grid_constant__ Arguments a) {
  if constexpr (kClusters) {
    const auto r = read_row<T, true>(a);
    cluster_wait();
    if (r.rank == 0) total(r);
    if (r.filtered()) filter(r);
    if (r.rank == 0) draw(r);
    r.sync();  // the other blocks' memory has been read
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) cluster_whole(const __grid_constant__ Arguments a) {
  if constexpr (kClusters) {
    const auto r = read_row<T, true>(a);
    cluster_wait();
    if (r.rank == 0) total(r);
    r.sync();
    write_whole(r);
    r.sync();  // the first block's memory has been read
  }
}

// ---- Two launches --------------------------------------------------------------------------------------------------

__device__ inline Board board_of(const Arguments& a, int64_t row) {
  return {a.workspace + row * a.board_bytes, a.tiles, pairs_of(a), a.filtered};
}

template <class T>
__device__ Row<T, false, false> row_of_block(const Arguments& a, int row, int rank) {
  auto r = row_of<Row<T, false, false>>(a, row, rank, reinterpret_cast<Shared*>(shared_memory()), board_of(a, row));
  r.tops = r.board.top(0) + r.first;
  return r;
}

// Grid (B blocks): one warp per tile.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) tile_pass(const __grid_constant__ Arguments a) {
  const int row = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.blocks));
  const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.blocks)) * kWarps + warp_of_thread();
  if (tile >= a.tiles) return;
  summarise_tile<T>(a, row, scale_of(a.temperature.of(row)), tile, board_of(a, row), nullptr, nullptr);
}

// Grid (B): one block per row.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) row_pass(const __grid_constant__ Arguments a) {
  const auto r = row_of_block<T>(a, static_cast<int>(blockIdx.x), 0);
  total(r);
  if (r.filtered()) filter(r);
  draw(r);
}

// Grid (B blocks), as the tile pass; each block makes the row's total for itself.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) whole_pass(const __grid_constant__ Arguments a) {
  const int row = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.blocks));
  const auto r = row_of_block<T>(a, row, static_cast<int>(blockIdx.x % static_cast<unsigned>(a.blocks)));
  total(r);
  write_whole(r);
}

}  // namespace genarm

#endif  // GENARM_CUDA_KERNELS_H_
