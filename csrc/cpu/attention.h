// What the CPU's attention kernels are told: shapes, strides and pointers. No torch in here.
#pragma once
#include <cstdint>

#include "cpu/dropout.h"
#include "cpu/stored.h"
#include "cpu/threads.h"

namespace fastseq {

// [N, heads, places, width] by strides, contiguous in its last dimension.
struct Heads {
  void* data;
  int64_t n, h, l;
  template <typename Element>
  Element* row(int64_t sample, int64_t head, int64_t place) const {
    return static_cast<Element*>(data) + sample * n + head * h + place * l;
  }
};

template <typename T>
struct AttentionShape {
  int64_t N, H, Hk, L, S, E, Ev;  // as in fastseq/ops/attention.py
  Stored stored;                  // what there is of Heads
  Heads q, k, v;
  const bool* allowed;         // a boolean mask or null, and
  const T* bias;               // one that is added or null, both
  int64_t m_n, m_h, m_l, m_s;  // by strides; m_s is 0 or 1
  const bool* padding;         // [N, S] or null
  const T* slopes;             // [H] or null
  int64_t sequences;           // N, or with `ends` [sequences + 1] as many as there are one after the other
  const int64_t *ends_q, *ends_k;
  Dropout<T> dropout;
  T scale, softcap;
  int64_t left, right;  // bounds, negative for none
  bool bottom_right;
};

enum class Weights { kNone = 0, kEachHead = 1, kAverage = 2 };

template <typename T>
struct AttentionForward : AttentionShape<T> {
  Heads out;
  T* lse;      // [N, H, L]
  T* weights;  // [N, H, L, S] or averaged [N, L, S], or null
  Weights wanted;
};

template <typename T>
struct AttentionBackward : AttentionShape<T> {
  Heads dout, out;             // dout without data for zeros
  const T *dlse, *lse;         // [N, H, L]; dlse may be null
  Heads dq, dk, dv;            // each without data if it is not wanted
  T* dbias;                    // zeros to begin with, or null
  int64_t d_n, d_h, d_l, d_s;  // its strides, 0 for what it does not tell apart
};

struct AttentionKernels {
  void (*forward_float)(const AttentionForward<float>&, Threads);
  void (*forward_double)(const AttentionForward<double>&, Threads);
  void (*backward_float)(const AttentionBackward<float>&, Threads);
  void (*backward_double)(const AttentionBackward<double>&, Threads);
};

}  // namespace fastseq
