// Plain C++ for any machine: a vector is 16 floats, which compilers turn into what the target has (NEON on arm64).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/random.h"
#include "cpu/row.h"

namespace {

constexpr int kWidth = genarm::kLanes;

struct F {
  float lane[kWidth];
};
struct M {
  int32_t lane[kWidth];  // -1 or 0
};

// One operation on each lane.
#define GENARM_LANES(type, expression) \
  type result;                         \
  for (int i = 0; i < kWidth; ++i) {   \
    result.lane[i] = expression;       \
  }                                    \
  return result

inline F set(float x) { GENARM_LANES(F, x); }
template <class T>
inline F load(const T* x) {
  GENARM_LANES(F, genarm::to_float(x[i]));
}
template <class T>
inline void store(T* out, F x) {
  for (int i = 0; i < kWidth; ++i) genarm::from_float(x.lane[i], out + i);
}

inline F add(F a, F b) { GENARM_LANES(F, a.lane[i] + b.lane[i]); }
inline F sub(F a, F b) { GENARM_LANES(F, a.lane[i] - b.lane[i]); }
inline F mul(F a, F b) { GENARM_LANES(F, a.lane[i] * b.lane[i]); }
inline F div(F a, F b) { GENARM_LANES(F, a.lane[i] / b.lane[i]); }
inline F fma_of(F a, F b, F c) { GENARM_LANES(F, std::fma(a.lane[i], b.lane[i], c.lane[i])); }
inline F max_of(F a, F b) { GENARM_LANES(F, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
inline F min_of(F a, F b) { GENARM_LANES(F, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }

inline M less(F a, F b) { GENARM_LANES(M, -(a.lane[i] < b.lane[i])); }
inline M at_least(F a, F b) { GENARM_LANES(M, -(a.lane[i] >= b.lane[i])); }
inline M is_finite(F x) { GENARM_LANES(M, -(x.lane[i] < genarm::kInfinity && x.lane[i] > -genarm::kInfinity)); }
inline M lanes_of(uint32_t bits) { GENARM_LANES(M, -static_cast<int32_t>(bits >> i & 1)); }
inline M both(M a, M b) { GENARM_LANES(M, a.lane[i] & b.lane[i]); }
inline M either(M a, M b) { GENARM_LANES(M, a.lane[i] | b.lane[i]); }
inline M opposite(M a) { GENARM_LANES(M, ~a.lane[i]); }
inline int count(M m) {
  int n = 0;
  for (int i = 0; i < kWidth; ++i) n -= m.lane[i];
  return n;
}
inline F select(M m, F a, F b) { GENARM_LANES(F, m.lane[i] ? a.lane[i] : b.lane[i]); }
inline F add_where(F sum, M m, F x) { GENARM_LANES(F, sum.lane[i] + (m.lane[i] ? x.lane[i] : 0.0f)); }

// Writes the selected numbers; returns how many they are.
inline int compress(float* out, M m, F x) {
  int moved = 0;
  for (int i = 0; i < kWidth; ++i) {
    if (m.lane[i]) out[moved++] = x.lane[i];
  }
  return moved;
}

// Halves onto halves: the order in which the other instruction sets add.
inline float total_of(F x) {
  for (int width = kWidth / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.lane[i] += x.lane[i + width];
  }
  return x.lane[0];
}

inline float highest(F x) {
  float top = x.lane[0];
  for (int i = 1; i < kWidth; ++i) top = x.lane[i] > top ? x.lane[i] : top;
  return top;
}

inline F power_of_two(F rounded) {
  GENARM_LANES(F, genarm::float_of((genarm::bits_of(rounded.lane[i]) << 23) + (127u << 23)));
}
inline F exp2_of(F t) {
  const M vanishing = less(t, set(-126.0f));
  t = min_of(set(128.0f), max_of(set(-126.0f), t));
  const F rounded = add(t, set(genarm::kRound));
  const F f = sub(t, sub(rounded, set(genarm::kRound)));
  F p = set(genarm::kExp2[6]);
  for (int i = 5; i >= 0; --i) p = fma_of(p, f, set(genarm::kExp2[i]));
  return select(vanishing, set(0.0f), mul(p, power_of_two(rounded)));
}

// Of the linear layers.
constexpr int kVector = 8, kRowsAtOnce = 2;
struct V {
  float lane[kVector];
};
struct Pair {
  V first, second;
};
inline V zero() { return {}; }
inline V load_vector(const float* x) {
  V v;
  for (int i = 0; i < kVector; ++i) v.lane[i] = x[i];
  return v;
}
inline V multiply_add_of(V a, V b, V c) {
  for (int i = 0; i < kVector; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
template <class W>
inline float number(const W* w) {
  if constexpr (std::is_same<W, int8_t>::value) {
    return static_cast<float>(*w);
  } else {
    return genarm::to_float(*w);
  }
}
template <class W>
inline Pair load_step(const W* w) {
  constexpr bool kInterleaved = std::is_same<W, genarm::BFloat16>::value;  // as `arrange` has it
  Pair pair;
  for (int i = 0; i < kVector; ++i) {
    pair.first.lane[i] = number(w + (kInterleaved ? 2 * i : i));
    pair.second.lane[i] = number(w + (kInterleaved ? 2 * i + 1 : kVector + i));
  }
  return pair;
}
inline float total_of_vector(V x) {
  for (int width = kVector / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.lane[i] += x.lane[i + width];
  }
  return x.lane[0];
}
inline void prefetch(const void*) {}

}  // namespace

#include "cpu/kernels.inc"

const genarm::RowKernels& genarm::portable_kernels() { return kKernels; }
