// What the cells in this folder share. They are one text for vectors of every instruction set and for a GPU's threads:
// whoever includes them has FASTSEQ_ISA, a namespace with Vec<T>, sigmoid<T> and tanh<T>, and FASTSEQ_INLINE.
//
// A cell is a struct like Lstm in lstm.h:
//   kGates       gates in W_ih and W_hh
//   kSlots       pre-activations of a unit; W_ih gives the first kGates of them, W_hh adds to the last kGates
//   kFirstGate   the gate in slot 0, the others following in torch's order and round
//   kUnitPanels  panels of units in a block of the CPU's kernels, so that a block's slots fill about 64 columns
//   kTape        gates on the tape
//   kHasCell     whether there is c beside h
//   kKeepsH      whether h_{t-1} goes into h_t past W_hh, and dh_t into dh_{t-1}
//   step(...)    one step of a vector of units; step_back(...) its gradient
#pragma once

namespace fastseq::FASTSEQ_ISA {

// What a cell's step_back gets: gradients of h_t and c_t, h or c at t and before. It leaves dh and dc for what of them
// goes on to t-1 past W_hh, and in h, if there is a cell, o * tanh(c).
template <typename T>
struct Back {
  Vec<T> dh, dc, h, h_before, c, c_before;
};

}  // namespace fastseq::FASTSEQ_ISA
