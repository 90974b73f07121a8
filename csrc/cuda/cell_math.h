// What the cells in csrc/cells ask of their surroundings, for one thread of a GPU.
#pragma once
#include "cuda/device.h"

#define FASTSEQ_ISA gpu
#define FASTSEQ_INLINE FASTSEQ_DEVICE

namespace fastseq::gpu {

template <typename T>
using Vec = T;

template <typename T>
FASTSEQ_DEVICE T sigmoid(T x) {
  return quotient(T(1), T(1) + exponential(-x));
}

template <typename T>
FASTSEQ_DEVICE T tanh(T x) {
  // Near 0 a polynomial that interpolates (tanh(x) / x - 1) / x^2 at Chebyshev nodes of [0, 1/4], within 1.4e-9; the
  // quotient would lose the digits there.
  const T z = x * x;
  const T near = T(-0.33333331346511841) +
                 z * (T(0.13333225250244141) +
                      z * (T(-0.05393346771597862) + z * (T(0.021470682695508003) - z * T(0.006942941807210445))));
  const T e = exponential(T(-2) * absolute(x)), far = quotient(T(1) - e, T(1) + e);
  return z < T(0.25) ? x + x * z * near : x < T(0) ? -far : far;
}

}  // namespace fastseq::gpu
