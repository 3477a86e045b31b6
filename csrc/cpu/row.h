// What kernels and operations share: the state of a row, and the table of an instruction set's entry points.
#ifndef GENARM_CPU_ROW_H_
#define GENARM_CPU_ROW_H_

#include <cstdint>

#include "common/numbers.h"
#include "cpu/decoder.h"
#include "genarm_kernels.h"

namespace genarm {

constexpr int kTile = GENARM_TILE;
constexpr int kLanes = 16;  // numbers a vector holds on every instruction set: their sums have the same bits

// Which exponentials the tile pass adds up.
enum class Sums { kNone, kGuided, kGuidedAndOperands };

// One model's logits of the row.
struct Operand {
  const void* x;
  float weight;
  float reference;  // in log2 units: 2^(x log2(e) - reference) neither overflows nor vanishes in most tiles
};

struct TileSummary {
  Partial mass;     // of 2^(z scale)
  float top;        // the largest z; -inf when no token is allowed
  int32_t allowed;  // tokens that may be drawn; -1: the tile holds what makes the row bad
};

// A row on its way from logits to a token. Its arrays lie in the workspace.
struct Row {
  int64_t vocab, tiles;
  genarm_dtype dtype;
  const int32_t* token_mask;  // NULL: every token is allowed
  int64_t token_mask_stride;
  Sums sums;

  // Parameters, checked.
  bool greedy, filtered;
  float temperature;  // 1 for greedy rows
  float scale;        // log2(e) / temperature
  int64_t top_k;
  float top_p, min_p;
  uint64_t seed, position;

  Operand* operands;  // the base, then the ARMs
  int operand_count;
  int* used;  // indices of those whose weight is not 0
  int used_count;
  float reference;  // of z scale, in log2 units

  TileSummary* summaries;     // [tiles]
  Partial* operand_partials;  // [tiles, operand_count]; written with kGuidedAndOperands
  float* z;                   // NULL, or [vocab] (and 2 kLanes more with filters): where pass 1 leaves z
  float* lane_tops;           // with filters, [tiles, kLanes]: the largest of every 16th z of a tile
  int64_t* offsets;           // with filters, [tiles + 1]: where a tile's candidates begin
  double* weights;            // with filters, [tiles]: mass of the kept tokens
};

struct Drawn {
  int status;
  int64_t token;
  int32_t kept;
  double logprob, log_mass;
};

// Entry points of one instruction set.
struct RowKernels {
  // Fills the references of the row from some of its tokens.
  void (*set_references)(Row& row);
  // Pass 1, for tiles [first, last): z, its largest, and the sums of exponentials.
  void (*read_tiles)(const Row& row, int64_t first, int64_t last);
  // Pass 2: from the tiles' summaries to the token.
  Drawn (*draw)(const Row& row);
  // log p of tiles [first, last) in place: row.z holds z on entry. `log_largest` is that of the largest z, `top`.
  void (*normalise)(const Row& row, float top, double log_largest, int64_t first, int64_t last);
  LayerKernels layers;
};

const RowKernels& portable_kernels();
#if defined(__x86_64__) && defined(__GNUC__)
#define GENARM_X86_KERNELS 1
const RowKernels& avx2_kernels();
const RowKernels& avx512_kernels();
#endif

// The tiles' summaries together.
struct RowTotals {
  int status;
  float top;
  PartialSum mass;  // of 2^(z scale)
  int64_t allowed;
};
RowTotals total(const Row& row);               // operations.cpp
const RowKernels* kernels_of(genarm_isa isa);  // NULL when this machine cannot run it (isa.cpp)

}  // namespace genarm

#endif  // GENARM_CPU_ROW_H_
