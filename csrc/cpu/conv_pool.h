// What the CPU's kernels of a convolution that is pooled are told: shapes, layouts and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/threads.h"

namespace fastseq {

struct Extent {
  int64_t h, w;
};

template <typename T>
struct ConvPoolShape {
  int64_t B, C, O;  // members of the batch, channels in, channels out
  Extent in, kernel, stride, padding, window, out;
  bool channels_last;  // x, y and dx: [B][h][w][channels], else [B][channels][h][w]
  const T* x;
  const T* weight;  // [O][C][kernel.h][kernel.w]
};

template <typename T>
struct ConvPoolForward : ConvPoolShape<T> {
  const T* bias;  // [O] or null
  T* y;
  uint8_t* positions;  // [B][out.h][out.w][O] or null
};

template <typename T>
struct ConvPoolBackward : ConvPoolShape<T> {
  const T* dy;
  bool dy_channels_last;
  const uint8_t* positions;
  T *dx, *dweight, *dbias;  // each may be null
};

struct ConvPoolKernels {
  void (*forward_float)(const ConvPoolForward<float>&, Threads);
  void (*forward_double)(const ConvPoolForward<double>&, Threads);
  void (*backward_float)(const ConvPoolBackward<float>&, Threads);
  void (*backward_double)(const ConvPoolBackward<double>&, Threads);
};

}  // namespace fastseq
