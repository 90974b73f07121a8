// The cells of Elman's RNN, with tanh and with ReLU. Formulas: fastseq/reference/rnn_tanh.py and rnn_relu.py.
#pragma once
#include "cells/back.h"

namespace fastseq::FASTSEQ_ISA {

template <bool kRelu>
struct Rnn {
  static constexpr int kGates = 1, kSlots = 1, kFirstGate = 0, kUnitPanels = 4, kTape = 0;
  static constexpr bool kHasCell = false, kKeepsH = false;

  template <typename T, typename Slot, typename Keep>
  static FASTSEQ_INLINE Vec<T> step(const Slot& slot, Vec<T>, Vec<T>&, const Keep&) {
    const Vec<T> a = slot(0);
    if constexpr (kRelu) return a < Vec<T>{} ? Vec<T>{} : a;  // NaN stays NaN, as in torch
    return tanh<T>(a);
  }

  template <typename T, typename Tape, typename Put>
  static FASTSEQ_INLINE void step_back(const Tape&, Back<T>& at, const Put& put) {
    if constexpr (kRelu)
      put(0, at.h <= Vec<T>{} ? Vec<T>{} : at.dh);
    else
      put(0, at.dh * (T(1) - at.h * at.h));
  }
};

}  // namespace fastseq::FASTSEQ_ISA
