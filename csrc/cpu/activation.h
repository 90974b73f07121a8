// What the CPU's activation kernels are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/dropout.h"
#include "cpu/stored.h"
#include "cpu/threads.h"

namespace fastseq {

enum class Activation { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

template <typename T>
struct ActivationShape {
  int64_t rows, F;
  Activation kind;
  Stored stored;  // what there is of Rows
  Rows x, up;     // [rows, F], as all there are
  const T* bias;  // [F] or null
  Dropout<T> dropout;
};

template <typename T>
struct ActivationForward : ActivationShape<T> {
  Rows y;
};

template <typename T>
struct ActivationBackward : ActivationShape<T> {
  Rows dy, dx, dup;
  T* dbias;  // [F] or null
};

struct ActivationKernels {
  void (*forward_float)(const ActivationForward<float>&, Threads);
  void (*forward_double)(const ActivationForward<double>&, Threads);
  void (*backward_float)(const ActivationBackward<float>&, Threads);
  void (*backward_double)(const ActivationBackward<double>&, Threads);
};

}  // namespace fastseq
