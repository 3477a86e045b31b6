// The whole distribution, in place of what draw.h does: log p of every token.
#ifndef GENARM_CUDA_WHOLE_H_
#define GENARM_CUDA_WHOLE_H_

#include "cuda/row.h"

namespace genarm {

// log p of this block's tiles, to their places in [B, V].
template <class Row>
__device__ void write_whole(const Row& r) {
  const int status = r.lead.status;
  const Total all = r.lead.total[0];
  const double rate = 1 / static_cast<double>(r.temperature()), top = all.top;
  const double log_largest = log_probability((top * r.scale - all.reference) * kLn2 - log(all.sum));
  float* out = r.a.whole + int64_t{r.row} * r.a.whole_stride;
  for (int tile = r.first + warp_of_thread(); tile < r.last; tile += kWarps) {
    float z[kPerLane];
    r.load(tile, z);
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const int64_t v = static_cast<int64_t>(tile) * kTile + offset_of(e);
      float logp = z[e] == -kInfinity ? -kInfinity : static_cast<float>((z[e] - top) * rate + log_largest);
      if (status != GENARM_DRAWN) logp = status == GENARM_BAD_ROW ? NAN : -kInfinity;
      if (v < r.a.vocab) out[v] = logp;
    }
  }
}

}  // namespace genarm

#endif  // GENARM_CUDA_WHOLE_H_
