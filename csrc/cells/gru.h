// The GRU's cell. Formulas: fastseq/reference/gru.py.
#pragma once
#include "cells/back.h"

namespace fastseq::FASTSEQ_ISA {

// The new gate needs its part of W_hh h alone: slots are n from x, r, z, n from h.
struct Gru {
  static constexpr int kGates = 3, kSlots = 4, kFirstGate = 2, kUnitPanels = 1, kTape = 4;
  static constexpr bool kHasCell = false, kKeepsH = true;

  template <typename T, typename Slot, typename Keep>
  static FASTSEQ_INLINE Vec<T> step(const Slot& slot, Vec<T> h, Vec<T>&, const Keep& keep) {
    const Vec<T> r = sigmoid<T>(slot(1)), z = sigmoid<T>(slot(2)), from_h = slot(3), n = tanh<T>(slot(0) + r * from_h);
    keep(0, r), keep(1, z), keep(2, n), keep(3, from_h);
    return n + z * (h - n);
  }

  template <typename T, typename Tape, typename Put>
  static FASTSEQ_INLINE void step_back(const Tape& tape, Back<T>& at, const Put& put) {
    const Vec<T> r = tape(0), z = tape(1), n = tape(2), from_h = tape(3);
    const Vec<T> da_n = at.dh * (T(1) - z) * (T(1) - n * n);
    put(0, da_n);
    put(1, da_n * from_h * (r * (T(1) - r)));
    put(2, at.dh * (at.h_before - n) * (z * (T(1) - z)));
    put(3, da_n * r);
    at.dh = at.dh * z;
  }
};

}  // namespace fastseq::FASTSEQ_ISA
