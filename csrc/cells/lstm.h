// The LSTM's cell. Formulas: fastseq/reference/lstm.py.
#pragma once
#include "cells/back.h"

namespace fastseq::FASTSEQ_ISA {

struct Lstm {
  static constexpr int kGates = 4, kSlots = 4, kFirstGate = 0, kUnitPanels = 1, kTape = 4;
  static constexpr bool kHasCell = true, kKeepsH = false;

  template <typename T, typename Slot, typename Keep>
  static FASTSEQ_INLINE Vec<T> step(const Slot& slot, Vec<T>, Vec<T>& c, const Keep& keep) {
    const Vec<T> i = sigmoid<T>(slot(0)), f = sigmoid<T>(slot(1)), g = tanh<T>(slot(2)), o = sigmoid<T>(slot(3));
    keep(0, i), keep(1, f), keep(2, g), keep(3, o);
    c = f * c + i * g;
    return o * tanh<T>(c);
  }

  template <typename T, typename Tape, typename Put>
  static FASTSEQ_INLINE void step_back(const Tape& tape, Back<T>& at, const Put& put) {
    const Vec<T> i = tape(0), f = tape(1), g = tape(2), o = tape(3), s = tanh<T>(at.c);
    const Vec<T> dc = at.dc + at.dh * o * (T(1) - s * s);
    put(0, dc * g * (i * (T(1) - i)));
    put(1, dc * at.c_before * (f * (T(1) - f)));
    put(2, dc * i * (T(1) - g * g));
    put(3, at.dh * s * (o * (T(1) - o)));
    at.dc = dc * f;
    at.h = o * s;
  }
};

}  // namespace fastseq::FASTSEQ_ISA
