// csrc/cuda/device.h for the emulator.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda/machine.h"

#define FASTSEQ_DEVICE inline
#define FASTSEQ_KERNEL(threads) inline void

namespace fastseq::gpu {

struct bfloat16 {
  uint16_t stored;
};
struct float16 {
  uint16_t stored;
};

// 16 bytes.
struct alignas(16) Quad {
  uint32_t word[4];
};

FASTSEQ_DEVICE int thread() { return emulator::machine.current().thread; }
FASTSEQ_DEVICE int block() { return emulator::machine.current().block; }
FASTSEQ_DEVICE unsigned char* shared_memory() { return emulator::machine.shared_memory(); }

FASTSEQ_DEVICE uint32_t bits(float x) { return std::bit_cast<uint32_t>(x); }
FASTSEQ_DEVICE float float_of(uint32_t word) { return std::bit_cast<float>(word); }
FASTSEQ_DEVICE float exponential(float x) { return std::exp(x); }
FASTSEQ_DEVICE float quotient(float x, float y) { return std::fabs(y) >= 0x1p126f ? x * 0.0f : x / y; }
FASTSEQ_DEVICE float absolute(float x) { return std::fabs(x); }

FASTSEQ_DEVICE float to_float(float x) { return x; }
FASTSEQ_DEVICE float to_float(bfloat16 x) { return float_of(uint32_t(x.stored) << 16); }
FASTSEQ_DEVICE float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.stored & 0x8000) << 16, rest = uint32_t(x.stored & 0x7fff) << 13;
  const float magnitude = rest < 0x0f800000 ? float_of(rest) * 0x1p112f : float_of(rest | 0x7f800000);
  return float_of(bits(magnitude) | sign);
}

// To the nearest, to the even one of two; a NaN is that with all bits set but the sign, as on the GPU.
FASTSEQ_DEVICE void from_float(float x, float& to) { to = x; }
FASTSEQ_DEVICE void from_float(float x, bfloat16& to) {
  const uint32_t word = bits(x);
  to.stored = x != x ? 0x7fff : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
FASTSEQ_DEVICE void from_float(float x, float16& to) {
  const float magnitude = std::fabs(x);
  const uint32_t word = bits(magnitude);
  uint32_t stored;
  if (x != x) {
    to.stored = 0x7fff;
    return;
  }
  if (magnitude >= 65520.0f) {
    stored = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    stored = bits(magnitude + 0.5f) - bits(0.5f);  // whose last place is float16's smallest number
  } else {
    stored = ((word + 0xfff + (word >> 13 & 1)) >> 13) - (112 << 10);
  }
  to.stored = uint16_t(stored | (bits(x) >> 16 & 0x8000));
}

// The nearest TF32, of two the one away from zero.
FASTSEQ_DEVICE uint32_t to_tf32(uint32_t word) {
  const bool nan = (word & 0x7fffffff) > 0x7f800000;
  return nan ? 0x7fffffff : (word + 0x1000) & ~0x1fffu;
}

FASTSEQ_DEVICE Quad load_relaxed(const Quad* p) {
  emulator::machine.before_load(p->word, 4);
  return *p;
}
FASTSEQ_DEVICE void store_relaxed(uint32_t* p, uint32_t word) { emulator::machine.store(p, word); }
FASTSEQ_DEVICE uint32_t load_from_host(const uint32_t* p) { return *p; }
FASTSEQ_DEVICE void store_to_host(uint32_t* p, uint32_t word) { *p = word; }
FASTSEQ_DEVICE uint64_t nanoseconds() { return emulator::machine.nanoseconds(); }

namespace emulator {

inline void meet(Fibre* lanes) { machine.publish_block(lanes[0].block); }

inline void shift_down(Fibre* lanes) {
  for (int i = 0; i < kLanes; ++i) {  // upwards: a lane takes what the one above has brought
    const int from = i + lanes[i].delta;
    lanes[i].word[0] = lanes[from < kLanes ? from : i].word[0];
  }
}

inline void any(Fibre* lanes) {
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= lanes[i].word[0];
  for (int i = 0; i < kLanes; ++i) lanes[i].word[0] = found;
}

// Number n of a word.
template <typename T>
float element(uint32_t word, int n) {
  if constexpr (sizeof(T) == 4)
    return float_of(word & ~0x1fffu);  // tensor cores do not look at the rest
  else
    return to_float(T{uint16_t(word >> 16 * n)});
}

// a [16, 8 words], b [8, 8 words], sums [16, 8].
template <typename T>
void multiply_accumulate(Fibre* lanes) {
  typedef float Columns __attribute__((vector_size(16)));  // 4 of the 8
  constexpr int kPerWord = 4 / sizeof(T), K = 8 * kPerWord;
  float a[16][K];
  Columns b[2][K];
  for (int i = 0; i < kLanes; ++i) {
    const int g = i / 4, q = i % 4;
    for (int n = 0; n < kPerWord; ++n) {
      for (int w = 0; w < 4; ++w) a[g + w % 2 * 8][(q + w / 2 * 4) * kPerWord + n] = element<T>(lanes[i].word[w], n);
      for (int w = 0; w < 2; ++w) b[g / 4][(q + w * 4) * kPerWord + n][g % 4] = element<T>(lanes[i].word[4 + w], n);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int half = 0; half < 2; ++half) {
      Columns sums = {};
      for (int k = 0; k < K; ++k) sums += a[row][k] * b[half][k];
      for (int column = 0; column < 4; ++column)
        lanes[row % 8 * 4 + half * 2 + column / 2].sums[row / 8 * 2 + column % 2] += sums[column];
    }
}

inline constexpr Wait kSyncWarp{"waits in sync_warp", meet}, kShiftDown{"waits in from_lane_above", shift_down},
    kAny{"waits in any_in_warp", any};
template <typename T>
inline constexpr Wait kMultiply{"waits in multiply", multiply_accumulate<T>};

}  // namespace emulator

FASTSEQ_DEVICE void sync_block() { emulator::machine.wait(emulator::kSyncBlock); }
FASTSEQ_DEVICE void sync_warp() { emulator::machine.together(emulator::kSyncWarp); }
FASTSEQ_DEVICE uint32_t from_lane_above(uint32_t value, int delta) {
  return emulator::machine.together(emulator::kShiftDown, {value}, delta);
}
FASTSEQ_DEVICE bool any_in_warp(bool value) { return emulator::machine.together(emulator::kAny, {value}) != 0; }

// Of lane 4g+q, as in PTX ("Matrix Fragments for mma.m16n8k8" and "m16n8k16"): a0 to a3 are the words of a at (g, q),
// (g+8, q), (g, q+4) and (g+8, q+4), b0 and b1 those of b at (g, q) and (g, q+4), the sums those at (g, 2q), (g, 2q+1),
// (g+8, 2q) and (g+8, 2q+1). The lower half of a word comes first along K.
template <typename T>
void multiply(T, float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulator::machine.together(emulator::kMultiply<T>, {a0, a1, a2, a3, b0, b1}, 0, sums);
}

}  // namespace fastseq::gpu
