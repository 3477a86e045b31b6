// Which instruction set runs.
#include <cstdlib>
#include <cstring>

#include "cpu/row.h"

namespace genarm {
namespace {

constexpr const char* kNames[] = {"auto", "portable", "avx2", "avx512"};

bool machine_has(genarm_isa isa) {
  switch (isa) {
    case GENARM_ISA_PORTABLE:
      return true;
#ifdef GENARM_X86_KERNELS
    case GENARM_ISA_AVX2:  // F16C is on every processor that has AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case GENARM_ISA_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

// What AUTO stands for; AUTO itself when GENARM_CPU_ISA names what cannot run.
genarm_isa automatic() {
  static const genarm_isa chosen = [] {
    const char* wanted = std::getenv("GENARM_CPU_ISA");
    for (int isa = GENARM_ISA_AVX512; isa >= GENARM_ISA_PORTABLE; --isa) {
      if (wanted && *wanted && std::strcmp(wanted, kNames[isa]) != 0) continue;
      if (machine_has(static_cast<genarm_isa>(isa))) return static_cast<genarm_isa>(isa);
    }
    return GENARM_ISA_AUTO;
  }();
  return chosen;
}

}  // namespace

const RowKernels* kernels_of(genarm_isa isa) {
  if (isa == GENARM_ISA_AUTO) isa = automatic();
  if (!machine_has(isa)) return nullptr;
  switch (isa) {
#ifdef GENARM_X86_KERNELS
    case GENARM_ISA_AVX512:
      return &avx512_kernels();
    case GENARM_ISA_AVX2:
      return &avx2_kernels();
#endif
    default:
      return &portable_kernels();
  }
}

}  // namespace genarm

int genarm_abi_version(void) { return GENARM_ABI_VERSION; }

int genarm_isa_supported(genarm_isa isa) { return genarm::kernels_of(isa) != nullptr; }

const char* genarm_isa_name(genarm_isa isa) {
  if (isa == GENARM_ISA_AUTO) isa = genarm::automatic();
  return genarm::kernels_of(isa) && isa != GENARM_ISA_AUTO ? genarm::kNames[isa] : nullptr;
}
