// AVX2, FMA and F16C: a vector is two registers.
#include "cpu/row.h"

#ifdef GENARM_X86_KERNELS
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/random.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

struct F {
  __m256 low, high;
};
struct M {  // all bits of a lane, or none
  __m256 low, high;
};

inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline __m256 widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
inline F load(const genarm::BFloat16* x) {
  const __m128i* bits = reinterpret_cast<const __m128i*>(x);
  return {widen(_mm_loadu_si128(bits)), widen(_mm_loadu_si128(bits + 1))};
}
inline F load(const genarm::Float16* x) {
  const __m128i* bits = reinterpret_cast<const __m128i*>(x);
  return {_mm256_cvtph_ps(_mm_loadu_si128(bits)), _mm256_cvtph_ps(_mm_loadu_si128(bits + 1))};
}
inline void store(float* out, F x) {
  _mm256_storeu_ps(out, x.low);
  _mm256_storeu_ps(out + 8, x.high);
}
inline __m256i rounded_to_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q),
               quiet = _mm256_or_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan)), 16);
}
inline void store(genarm::BFloat16* out, F x) {
  const __m256i packed = _mm256_packus_epi32(rounded_to_bfloat16(x.low), rounded_to_bfloat16(x.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline void store(genarm::Float16* out, F x) {
  __m128i* halves = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(halves, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}

inline F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F fma_of(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F max_of(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F min_of(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

inline M less(F a, F b) { return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)}; }
inline M at_least(F a, F b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ)};
}
inline M both(M a, M b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
inline M either(M a, M b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline M opposite(M a) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(a.low, ones), _mm256_xor_ps(a.high, ones)};
}
inline M is_finite(F x) { return both(less(x, set(genarm::kInfinity)), less(set(-genarm::kInfinity), x)); }
inline __m256 bits_to_lanes(__m256i of_lane, uint32_t bits) {
  const __m256i set_bits = _mm256_and_si256(of_lane, _mm256_set1_epi32(static_cast<int>(bits)));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set_bits, of_lane));
}
inline M lanes_of(uint32_t bits) {
  const __m256i of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {bits_to_lanes(of_lane, bits), bits_to_lanes(of_lane, bits >> 8)};
}
inline int count(M m) {
  return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m.low)) |
                            static_cast<unsigned>(_mm256_movemask_ps(m.high)) << 8);
}
inline F select(M m, F a, F b) {
  return {_mm256_blendv_ps(b.low, a.low, m.low), _mm256_blendv_ps(b.high, a.high, m.high)};
}
// x + 0 leaves the sum as it is: sums of exponentials are never -0.
inline F add_where(F sum, M m, F x) { return add(sum, {_mm256_and_ps(m.low, x.low), _mm256_and_ps(m.high, x.high)}); }

// Writes the selected numbers; returns how many they are.
inline int compress(float* out, M m, F x) {
  float lanes[16];
  store(lanes, x);
  unsigned bits = static_cast<unsigned>(_mm256_movemask_ps(m.low)) | static_cast<unsigned>(_mm256_movemask_ps(m.high))
                                                                         << 8;
  int moved = 0;
  for (; bits; bits &= bits - 1) out[moved++] = lanes[__builtin_ctz(bits)];
  return moved;
}

inline float total_of(F x) {
  const __m256 a = _mm256_add_ps(x.low, x.high);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

inline float highest(F x) {
  const __m256 a = _mm256_max_ps(x.low, x.high);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

// Adding kRound leaves the nearest integer in the low bits of the sum, from where a shift makes it an exponent.
inline __m256 power_of_two(__m256 rounded) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23)));
}
inline F exp2_of(F t) {
  const M vanishing = less(t, set(-126.0f));
  t = min_of(set(128.0f), max_of(set(-126.0f), t));
  const F rounded = add(t, set(genarm::kRound));
  const F f = sub(t, sub(rounded, set(genarm::kRound)));
  F p = set(genarm::kExp2[6]);
  for (int i = 5; i >= 0; --i) p = fma_of(p, f, set(genarm::kExp2[i]));
  p = mul(p, {power_of_two(rounded.low), power_of_two(rounded.high)});
  return {_mm256_andnot_ps(vanishing.low, p.low), _mm256_andnot_ps(vanishing.high, p.high)};
}

// Of the linear layers: one register, so that the sums of 4 x 2 rows stay in registers.
using V = __m256;
struct Pair {
  V first, second;
};
constexpr int kVector = 8, kRowsAtOnce = 2;
inline V zero() { return _mm256_setzero_ps(); }
inline V load_vector(const float* x) { return _mm256_loadu_ps(x); }
inline V multiply_add_of(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline Pair load_step(const float* w) { return {_mm256_loadu_ps(w), _mm256_loadu_ps(w + 8)}; }
inline Pair load_step(const genarm::BFloat16* w) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
inline Pair load_step(const genarm::Float16* w) {
  const __m128i* bits = reinterpret_cast<const __m128i*>(w);
  return {_mm256_cvtph_ps(_mm_loadu_si128(bits)), _mm256_cvtph_ps(_mm_loadu_si128(bits + 1))};
}
inline V widen_int8(const int8_t* w) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}
inline Pair load_step(const int8_t* w) { return {widen_int8(w), widen_int8(w + 8)}; }
inline float total_of_vector(V x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }

}  // namespace

#include "cpu/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const genarm::RowKernels& genarm::avx2_kernels() { return kKernels; }

#endif
