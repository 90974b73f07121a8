// The kernels for AVX-512.
#if defined(__x86_64__)
#include "cpu/isa/standard.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#define FASTSEQ_ISA avx512
#define FASTSEQ_VECTOR_BYTES 64
#include "cpu/isa/kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
