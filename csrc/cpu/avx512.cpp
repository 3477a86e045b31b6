// AVX-512 (F, BW, DQ, VL): a vector is one register.
#include "cpu/row.h"

#ifdef GENARM_X86_KERNELS
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/random.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"        // GCC 12 finds both in its own immintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // (bug 105593)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace {

using F = __m512;
using M = __mmask16;

inline F set(float x) { return _mm512_set1_ps(x); }
inline F load(const float* x) { return _mm512_loadu_ps(x); }
inline F load(const genarm::BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline F load(const genarm::Float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline void store(float* out, F x) { _mm512_storeu_ps(out, x); }
inline void store(genarm::BFloat16* out, F x) {
  const __m512i bits = _mm512_castps_si512(x),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
inline void store(genarm::Float16* out, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma_of(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max_of(F a, F b) { return _mm512_max_ps(a, b); }
inline F min_of(F a, F b) { return _mm512_min_ps(a, b); }

inline M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline M is_finite(F x) { return static_cast<M>(~_mm512_fpclass_ps_mask(x, 0x99)); }  // not NaN, not infinite
inline M lanes_of(uint32_t bits) { return static_cast<M>(bits); }
inline M both(M a, M b) { return static_cast<M>(a & b); }
inline M either(M a, M b) { return static_cast<M>(a | b); }
inline M opposite(M a) { return static_cast<M>(~a); }
inline int count(M m) { return __builtin_popcount(m); }
inline F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
inline F add_where(F sum, M m, F x) { return _mm512_mask_add_ps(sum, m, sum, x); }

// Writes 16 numbers, the selected ones first; returns how many those are.
inline int compress(float* out, M m, F x) {
  store(out, _mm512_maskz_compress_ps(m, x));
  return count(m);
}

inline float total_of(F x) {
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

inline float highest(F x) {
  __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

// Exponents below -126 give 0 by a mask: results below the normal numbers take the processor a hundred times as long.
inline F exp2_of(F t) {
  const M normal = _mm512_cmp_ps_mask(t, set(-126.0f), _CMP_NLT_UQ);  // true of NaN
  const F n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F f = sub(t, n);
  F p = set(genarm::kExp2[6]);
  for (int i = 5; i >= 0; --i) p = fma_of(p, f, set(genarm::kExp2[i]));
  return _mm512_maskz_scalef_ps(normal, p, n);
}

// Of the linear layers: the sums of 4 x 4 rows stay in registers.
using V = __m512;
struct Pair {
  V first, second;
};
constexpr int kVector = 16, kRowsAtOnce = 4;
inline V zero() { return _mm512_setzero_ps(); }
inline V load_vector(const float* x) { return _mm512_loadu_ps(x); }
inline V multiply_add_of(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline Pair load_step(const float* w) { return {_mm512_loadu_ps(w), _mm512_loadu_ps(w + 16)}; }
inline Pair load_step(const genarm::BFloat16* w) {
  const __m512i bits = _mm512_loadu_si512(w);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
inline Pair load_step(const genarm::Float16* w) { return {load(w), load(w + 16)}; }
inline V widen_int8(const int8_t* w) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
}
inline Pair load_step(const int8_t* w) { return {widen_int8(w), widen_int8(w + 16)}; }
inline float total_of_vector(V x) { return total_of(x); }
inline void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }

}  // namespace

#include "cpu/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const genarm::RowKernels& genarm::avx512_kernels() { return kKernels; }

#endif
