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

// Declares `name`, kernels of a type, in the namespace of each instruction set that they are compiled for, and `get()`,
// which gives those of the chosen one.
#define FASTSEQ_DECLARE_KERNELS(type, name, isa) \
  namespace isa {                                \
  extern const type name;                        \
  }
#if defined(__x86_64__)
#define FASTSEQ_CHOSEN_KERNELS(type, name, get) \
  FASTSEQ_DECLARE_KERNELS(type, name, portable) \
  FASTSEQ_DECLARE_KERNELS(type, name, avx2)     \
  FASTSEQ_DECLARE_KERNELS(type, name, avx512)   \
  static const type& get() { return chosen(portable::name, avx2::name, avx512::name); }
#else
#define FASTSEQ_CHOSEN_KERNELS(type, name, get) \
  FASTSEQ_DECLARE_KERNELS(type, name, portable) \
  static const type& get() { return portable::name; }
#endif
