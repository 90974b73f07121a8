// What the CPU's cross entropy kernels are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/stored.h"
#include "cpu/threads.h"

namespace fastseq {

template <typename T>
struct CrossEntropyShape {
  int64_t rows, V;  // as in fastseq/ops/cross_entropy.py
  Stored stored;    // what there is of logits
  const void* logits;
  int64_t stride;         // from row to row
  const int64_t* target;  // [rows], each ignore_index or in [0, V)
  const T* weight;        // [V] or null
  double label_smoothing;
  int64_t ignore_index;
};

template <typename T>
struct CrossEntropyForward : CrossEntropyShape<T> {
  T *loss, *lse;  // [rows]
};

template <typename T>
struct CrossEntropyBackward : CrossEntropyShape<T> {
  const T *dloss, *lse;  // [rows]
  void* dlogits;         // [rows, V], stored as logits are
};

struct CrossEntropyKernels {
  void (*forward_float)(const CrossEntropyForward<float>&, Threads);
  void (*forward_double)(const CrossEntropyForward<double>&, Threads);
  void (*backward_float)(const CrossEntropyBackward<float>&, Threads);
  void (*backward_double)(const CrossEntropyBackward<double>&, Threads);
};

}  // namespace fastseq
