// What the CPU's normalisation kernels are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/dropout.h"
#include "cpu/stored.h"
#include "cpu/threads.h"

namespace fastseq {

enum class NormKind { kNone = 0, kLayer = 1, kRms = 2 };

// [rows, E] by the stride of its rows, contiguous in its last dimension; without data if there is none.
struct Rows {
  void* data;
  int64_t stride;
  template <typename Element>
  Element* row(int64_t r) const {
    return data ? static_cast<Element*>(data) + r * stride : nullptr;
  }
};

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
  Rows x, residual;
  const T* bias;  // [E] or null
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
