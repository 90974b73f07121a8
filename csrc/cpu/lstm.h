// What the CPU's LSTM kernels are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

namespace fastseq {

template <typename T>
struct LstmWeights {
  const T *w_ih, *w_hh;  // [4H, I], [4H, H], contiguous, gates i, f, g, o
  const T *b_ih, *b_hh;  // [4H] or null
};

template <typename T>
struct LstmShape {
  int64_t T_, B, I, H, D;
  const T* x;  // [T, B, I], contiguous in I only
  int64_t x_t, x_b;
  const T *h0, *c0;  // [D, B, H] contiguous, or null for zeros
  LstmWeights<T> weights[2];
};

template <typename T>
struct LstmForward : LstmShape<T> {
  T* y;           // [T, B, D*H] contiguous, like all that follows
  T *h_n, *c_n;   // [D, B, H]
  T *gates;       // the tape: [D, T, B, 4H] activated gates, or null
  T *cells;       // [D, T, B, H], or null
};

template <typename T>
struct LstmBackward : LstmShape<T> {
  const T* dy;  // [T, B, D*H], contiguous in its last dimension only
  int64_t dy_t, dy_b;
  const T *dh_n, *dc_n;         // [D, B, H] contiguous, like all that follows
  const T *y, *gates, *cells;   // what forward gave
  T* dx;                        // [T, B, I] or null
  T *dh0, *dc0;                 // [D, B, H], both or none
  struct {
    T *w_ih, *w_hh, *b_ih, *b_hh;  // like the weights, each may be null
  } dweights[2];
};

// Runs body(context, calls) on up to `threads` threads at once, and returns when all are done. Whether it gets as many is
// open; `calls` is how many calls of body there are to be.
struct Threads {
  int count;
  void (*run)(int threads, void (*body)(void*, int), void* context);
};

// The kernels of one instruction set.
struct LstmKernels {
  void (*forward_float)(const LstmForward<float>&, Threads);
  void (*forward_double)(const LstmForward<double>&, Threads);
  void (*backward_float)(const LstmBackward<float>&, Threads);
  void (*backward_double)(const LstmBackward<double>&, Threads);
};

}  // namespace fastseq
