// z of one token: the weighted sum of the operands in use, and whether the token may be drawn.
#ifndef GENARM_COMMON_COMBINE_H_
#define GENARM_COMMON_COMBINE_H_

#include <cmath>

#include "common/numbers.h"

namespace genarm {

// One fused multiply-add an operand, in order, from 0: the same float32 bits on every backend. Operands of weight 0 are
// not to be added at all.
struct Combination {
  float z = 0;
  bool blocked = false;  // an operand is -inf: the token is not allowed
  bool bad = false;      // an operand is NaN or +inf: the row is not drawn

  GENARM_HD void add(float weight, float x) {
    z = fmaf(weight, x, z);
    blocked |= x == -kInfinity;
    bad |= !(x < kInfinity);
  }
  // To be asked of tokens that the mask allows. A z beyond float32 makes the row bad as an infinite operand does.
  GENARM_HD bool spoils_row() const { return bad || (!blocked && !std::isfinite(z)); }
};

}  // namespace genarm

#endif  // GENARM_COMMON_COMBINE_H_
