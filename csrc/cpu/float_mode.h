// The thread's floating-point mode while the core works, whatever its host has set.
#ifndef GENARM_CPU_FLOAT_MODE_H_
#define GENARM_CPU_FLOAT_MODE_H_

#include <cstdint>
#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#endif

namespace genarm {

// kDefaultFloatMode: denormal numbers count, sums are rounded to the nearest, nothing traps.
#if defined(__SSE2__) || defined(_M_X64)
constexpr unsigned kDefaultFloatMode = 0x1F80;
inline unsigned float_mode() { return _mm_getcsr(); }
inline void set_float_mode(unsigned mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__) && defined(__GNUC__)
constexpr uint64_t kDefaultFloatMode = 0;
inline uint64_t float_mode() {
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else  // a machine whose mode is left as it is
constexpr int kDefaultFloatMode = 0;
inline int float_mode() { return 0; }
inline void set_float_mode(int) {}
#endif

// The default mode while one lives, then the one before.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : saved_(float_mode()) { set_float_mode(kDefaultFloatMode); }
  ~DefaultFloatMode() { set_float_mode(saved_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;

 private:
  const decltype(float_mode()) saved_;
};

}  // namespace genarm

#endif  // GENARM_CPU_FLOAT_MODE_H_
