// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
#include "cpu/isa/standard.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FASTSEQ_ISA avx2
#define FASTSEQ_VECTOR_BYTES 32
#include "cpu/isa/kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
