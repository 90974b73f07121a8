// What the CPU's kernels of the attention decoder are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/threads.h"

namespace fastseq {

enum class DecoderCell { kLstm = 0, kGru = 1, kRnnTanh = 2 };

// As in fastseq/reference/attention_decoder.py; everything is contiguous but where strides are told. G gates of a cell.
template <typename T>
struct AttentionDecoderShape {
  int64_t T_, B, S, H, A, M, F;
  DecoderCell cell;
  // Inside of the kernels rows of the batch are ordered by falling length.
  const int64_t* order;      // [B] the batch's row at each rank; null if rows are in order
  const int64_t* running;    // [T] how many rows run at each step; null if all do
  const T *h0, *c0, *feed0;  // [B, H]; [B, H] of an LSTM; [B, F] with w_out
  const T *keys, *values;    // [B, S, A], [B, S, M]
  const bool* absent;        // [B, S] or null
  const T* w_feed;           // [G*H, F]
  int64_t w_feed_row;        // the stride of its rows
  const T *w_hh, *b_hh;      // [G*H, H], [G*H] or null
  const T *w_query, *v;      // [A, H] and [A], or null
  const T* w_out;            // [F, M + H] or null
};

template <typename T>
struct AttentionDecoderForward : AttentionDecoderShape<T> {
  const T* gates;  // [T, B, G*H] by strides, contiguous in its last dimension
  int64_t gates_t, gates_b;
  T *h, *feeds, *weights;  // [T, B, H], [T, B, F], [T, B, S]
  T *h_n, *c_n;            // [B, H]
  // The tape: [T, B, the cell's tape * H], [T, B, H], [T, B, M]; each may be null
  T *saved_gates, *cells, *contexts;
};

template <typename T>
struct AttentionDecoderBackward : AttentionDecoderShape<T> {
  const T *dh, *dfeeds, *dweights, *dh_n, *dc_n;       // of forward's outputs, or null for zeros
  const T *h, *feeds, *weights, *saved_gates, *cells;  // what forward gave
  T *dgates, *dgates_h, *dqueries, *douts;             // [T, B, G*H] twice, [T, B, A], [T, B, F]; but for the
  T *dh0, *dc0, *dfeed0;                               // first of each line they may be null
  T *dkeys, *dvalues, *dv;                             // any may be null
};

struct AttentionDecoderKernels {
  void (*forward_float)(const AttentionDecoderForward<float>&, Threads);
  void (*forward_double)(const AttentionDecoderForward<double>&, Threads);
  void (*backward_float)(const AttentionDecoderBackward<float>&, Threads);
  void (*backward_double)(const AttentionDecoderBackward<double>&, Threads);
};

}  // namespace fastseq
