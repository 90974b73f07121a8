// All that the kernels in csrc/cuda ask of the machine, for device code: threads, memory that blocks share, tensor
// cores.
//
// The kernels name no CUDA intrinsic: tests/emulator/cuda/device.h has the same functions for a CPU, so that their text
// is tested where there is no GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FASTSEQ_DEVICE __device__ __forceinline__
#define FASTSEQ_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

namespace fastseq::gpu {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// 16 bytes.
struct alignas(16) Quad {
  uint32_t word[4];
};

FASTSEQ_DEVICE int thread() { return int(threadIdx.x); }
FASTSEQ_DEVICE int block() { return int(blockIdx.x); }

// The dynamic shared memory of this block, aligned to 16 bytes.
FASTSEQ_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

FASTSEQ_DEVICE void sync_block() { __syncthreads(); }
FASTSEQ_DEVICE void sync_warp() { __syncwarp(); }

// What the lane `delta` further on passes as `value`; all lanes of a warp call it.
FASTSEQ_DEVICE uint32_t from_lane_above(uint32_t value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}

FASTSEQ_DEVICE bool any_in_warp(bool value) { return __any_sync(0xffffffffu, value); }

// Words in global memory that other blocks write meanwhile: each word is seen as a whole, old or new.
FASTSEQ_DEVICE Quad load_relaxed(const Quad* p) {
  Quad q;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])
               : "l"(p)
               : "memory");
  return q;
}
FASTSEQ_DEVICE void store_relaxed(uint32_t* p, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(word) : "memory");
}

// A word in host memory that the host reads meanwhile.
FASTSEQ_DEVICE uint32_t load_from_host(const uint32_t* p) {
  uint32_t word;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(word) : "l"(p) : "memory");
  return word;
}
FASTSEQ_DEVICE void store_to_host(uint32_t* p, uint32_t word) {
  asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(p), "r"(word) : "memory");
}

FASTSEQ_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

FASTSEQ_DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
FASTSEQ_DEVICE float float_of(uint32_t word) { return __uint_as_float(word); }
FASTSEQ_DEVICE float exponential(float x) { return __expf(x); }
FASTSEQ_DEVICE float quotient(float x, float y) { return __fdividef(x, y); }  // 0 for y from 2^126 on
FASTSEQ_DEVICE float absolute(float x) { return fabsf(x); }

FASTSEQ_DEVICE float to_float(float x) { return x; }
FASTSEQ_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
FASTSEQ_DEVICE float to_float(float16 x) { return __half2float(x); }
FASTSEQ_DEVICE void from_float(float x, float& to) { to = x; }
FASTSEQ_DEVICE void from_float(float x, bfloat16& to) { to = __float2bfloat16_rn(x); }
FASTSEQ_DEVICE void from_float(float x, float16& to) { to = __float2half_rn(x); }

// The nearest TF32, as float32. Volatile, lest the compiler keeps what it made of all of a loop's weights in registers.
FASTSEQ_DEVICE uint32_t to_tf32(uint32_t word) {
  uint32_t rounded;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
  return rounded;
}

// sums += a b^T by one warp. Of an a [16, K], a b [8, K] and sums [16, 8], lane 4g+q holds in a0 to a3 the words at
// (g, q), (g+8, q), (g, q+4) and (g+8, q+4), in b0 and b1 those at (g, q) and (g, q+4), and in sums (g, 2q), (g, 2q+1),
// (g+8, 2q) and (g+8, 2q+1). A word is one float32, read as TF32, or two neighbours along K of half precision, the
// first in its lower half.
FASTSEQ_DEVICE void multiply(float, float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
FASTSEQ_DEVICE void multiply(bfloat16, float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                             uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
FASTSEQ_DEVICE void multiply(float16, float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace fastseq::gpu
