// What the CPU's normalisation kernels are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/dropout.h"
#include "cpu/stored.h"
#include "cpu/threads.h"

namespace fastseq {

enum class NormKind { kNone = 0, kLayer = 1, kRms = 2 };

template <typename T>
struct NormShape {
  int64_t rows, E;
  NormKind kind;
  Stored stored;  // what there is of Rows
  Dropout<T> dropout;
  const T* weight;  // [E] or null
};

template <typename T>
struct NormForward : NormShape<T> {
  Rows x, residual;  // [rows, E], as all there are
  const T* bias;     // [E] or null
  T eps;
  Rows y, total;
  T *mean, *rstd;  // [rows]; read by backward, null where the kind has none
};

template <typename T>
struct NormBackward : NormShape<T> {
  Rows dy, dtotal, total;
  const T *mean, *rstd;
  Rows dx, dresidual;
  T *dweight, *dbias;  // [E] or null
};

struct NormKernels {
  void (*forward_float)(const NormForward<float>&, Threads);
  void (*forward_double)(const NormForward<double>&, Threads);
  void (*backward_float)(const NormBackward<float>&, Threads);
  void (*backward_double)(const NormBackward<double>&, Threads);
};

}  // namespace fastseq
