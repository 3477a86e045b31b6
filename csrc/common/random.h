// The library's random numbers: pure functions of (seed, position, tile, purpose). genarm_kernels/rng.py is their law.
#ifndef GENARM_COMMON_RANDOM_H_
#define GENARM_COMMON_RANDOM_H_

#include <cmath>
#include <cstdint>

#include "common/portability.h"

namespace genarm {

// The last word of the counter: what a number is drawn for.
constexpr uint32_t kPurposeTile = 0;
constexpr uint32_t kPurposeToken = 1;

// 64 random bits: the first two words of Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = (position, tile,
// purpose).
GENARM_HD uint64_t random_bits(uint64_t seed, uint64_t position, uint32_t tile, uint32_t purpose) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = tile, c3 = purpose;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<uint64_t>(c0) << 32 | c1;
}

// The row's uniform inside the winning tile: 53 bits, in (0, 1).
GENARM_HD double token_uniform(uint64_t seed, uint64_t position) {
  const uint64_t bits = random_bits(seed, position, 0, kPurposeToken) >> 11;
  return bits == 0 ? 0x1p-54 : static_cast<double>(bits) * 0x1p-53;
}

// The Gumbel-max over tiles, as a race: argmax(log W + G) = argmin(E / W) with E = exp(-G) a standard exponential,
// which spares two logarithms a tile. The first of equals wins.
struct TileRace {
  uint64_t seed, position;
  double best = INFINITY;
  int64_t winner = -1;

  GENARM_HD void enter(int64_t tile, double weight) {
    const uint64_t bits = random_bits(seed, position, static_cast<uint32_t>(tile), kPurposeTile);
    // c = (bits + 1/2) / 2^64; E = -log(1 - c) >= c, so most tiles are out before their logarithm is due. Where c is
    // large its complement is the number that is represented in full.
    const double high = static_cast<double>(bits >> 32), low = static_cast<double>(bits & 0xFFFFFFFFu);
    const double c = high * 0x1p-32 + (low + 0.5) * 0x1p-64;
    if (c >= best * weight) return;
    const double complement = (4294967295.0 - high) * 0x1p-32 + (4294967295.0 - low + 0.5) * 0x1p-64;
    const double time = (c < 0.5 ? -log1p(-c) : -log(complement)) / weight;
    if (time < best) {
      best = time;
      winner = tile;
    }
  }
};

}  // namespace genarm

#endif  // GENARM_COMMON_RANDOM_H_
