#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastseq {
namespace {

bool has(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#else
  return false;
#endif
}

}  // namespace

const char* name_of(Isa isa) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512"};
  return kNames[int(isa)];
}

Isa cpu_isa() {
  const char* forced = std::getenv("FASTSEQ_CPU_ISA");
  if (forced && *forced) {
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
      if (std::string(forced) != name_of(isa)) continue;
      if (has(isa)) return isa;
      throw std::runtime_error("FASTSEQ_CPU_ISA=" + std::string(forced) + ", which this machine does not have");
    }
    throw std::runtime_error("FASTSEQ_CPU_ISA must be portable, avx2 or avx512, got " + std::string(forced));
  }
  return has(Isa::kAvx512) ? Isa::kAvx512 : has(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
}

}  // namespace fastseq
