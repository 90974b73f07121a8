// What the CPU's recurrent kernels are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/stored.h"
#include "cpu/threads.h"

namespace fastseq {

// Of one direction, contiguous: G gates (LSTM 4, GRU 3, RNN 1) in torch's order, H units, P outputs.
template <typename T>
struct RecurrentWeights {
  T *w_ih, *w_hh;  // [G*H, I], [G*H, P]
  T *b_ih, *b_hh;  // [G*H], or null
  T* w_hr;         // [P, H], or null: then P = H
};

// Rows of the batch are ordered by falling length inside of the kernels: at step t the first active(t) of them run. A
// row of x, y and the tape is found from its step t and its rank b in that order; N is how many rows y has.
template <typename T>
struct RecurrentShape {
  int64_t T_, B, I, H, P, D, N;
  const T* x;        // [T, B, I] by strides, or packed [N, I]; contiguous in I
  int64_t x_t, x_b;  // strides of steps and rows, without meaning for packed input
  bool packed;
  const int64_t* before;       // [T+1] how many rows run before step t; null if all rows run at all steps
  const int64_t* order;        // [B] the batch's row at each rank; null if rows are in order
  const int64_t* step_of;      // [before[T]] the step of each row that runs; null like `before`
  const bool* reset;           // [T, B] whether a state starts anew before that step, or null
  const T *reset_h, *reset_c;  // [D, B, P] and [D, B, H], what it starts from, or null for zeros
  const T *h0, *c0;            // [D, B, P] and [D, B, H], or null for zeros
  RecurrentWeights<const T> weights[2];
  Stored stored;  // what those pointers really point to
};

template <typename T>
struct RecurrentForward : RecurrentShape<T> {
  T* y;          // [N, D*P] contiguous, like all that follows
  T *h_n, *c_n;  // [D, B, P] and [D, B, H]
  T* gates;      // the tape: [D, N, cell's tape * H], or null
  T* cells;      // [D, N, H], or null
};

template <typename T>
struct RecurrentBackward : RecurrentShape<T> {
  const T*
      dy;  // [N, D*P] by strides, contiguous in its last dimension; the first stride is that of steps if not packed
  int64_t dy_t, dy_b;
  const T* dcells;                  // [D, N, H] contiguous, like all that follows, or null
  const T *dh_n, *dc_n;             // [D, B, P] and [D, B, H], or null for zeros
  const T *y, *gates, *cells;       // what forward gave
  T* dx;                            // like x in shape, contiguous, or null
  T *dh0, *dc0;                     // [D, B, P] and [D, B, H], or null
  T *dreset_h, *dreset_c;           // likewise
  RecurrentWeights<T> dweights[2];  // each may be null
};

// The kernels of one cell for one instruction set.
struct RecurrentKernels {
  void (*forward_float)(const RecurrentForward<float>&, Threads);
  void (*forward_double)(const RecurrentForward<double>&, Threads);
  void (*backward_float)(const RecurrentBackward<float>&, Threads);
  void (*backward_double)(const RecurrentBackward<double>&, Threads);
};

}  // namespace fastseq
