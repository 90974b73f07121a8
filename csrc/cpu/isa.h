// Which of the instruction sets compiled in serves this machine.
#pragma once

namespace fastseq {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* name_of(Isa isa);

// The best one that the machine has, or the one that FASTSEQ_CPU_ISA names. Throws if the machine lacks that one.
Isa cpu_isa();

// The kernels of the chosen instruction set, given those of each.
template <typename Kernels>
const Kernels& chosen(const Kernels& portable, const Kernels& avx2, const Kernels& avx512) {
  static const Isa isa = cpu_isa();
  return isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : portable;
}

}  // namespace fastseq
