// What the CPU's kernels of the causal convolution are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/stored.h"
#include "cpu/threads.h"

namespace fastseq {

// [B, C, T] with so many elements from one row, channel or time to the next; without data if there is none.
struct Sequences {
  void* data;
  int64_t b, c, t;
  template <typename Element>
  Element* at(int64_t row, int64_t channel, int64_t time) const {
    return static_cast<Element*>(data) + row * b + channel * c + time * t;
  }
};

template <typename T>
struct CausalConvShape {
  int64_t B, C, times, K;
  bool by_time;  // channels follow each other in memory, in all Sequences; otherwise times do
  bool silu;
  Stored stored;  // what there is of Sequences and states
  Sequences x;
  const T* weight;    // [C, K]
  const T* bias;      // [C] or null
  const void* state;  // [B, C, K - 1] or null
};

template <typename T>
struct CausalConvForward : CausalConvShape<T> {
  Sequences y;
  void* final;  // [B, C, K - 1]
};

template <typename T>
struct CausalConvBackward : CausalConvShape<T> {
  Sequences dy, dx;
  const void* dfinal;  // [B, C, K - 1] or null
  void* dstate;        // [B, C, K - 1] or null
  T* dweight;          // [C, K] or null
  T* dbias;            // [C] or null
};

struct CausalConvKernels {
  void (*forward_float)(const CausalConvForward<float>&, Threads);
  void (*forward_double)(const CausalConvForward<double>&, Threads);
  void (*backward_float)(const CausalConvBackward<float>&, Threads);
  void (*backward_double)(const CausalConvBackward<double>&, Threads);
};

}  // namespace fastseq
