"""The step of Elman's RNN with tanh for the Triton kernels; the formulas are in `fastseq.reference.rnn_tanh`."""

import triton
import triton.language as tl

from fastseq.kernels.triton import recurrent
from fastseq.kernels.triton.recurrent import Steps, tanh
from fastseq.ops.recurrent_steps import CELLS, implementation


@triton.jit
def step(x0, x1, x2, x3, h0, h1, h2, h3, carry):
    h = tanh(x0 + h0)
    return h, h, h, h, h, h


@triton.jit
def step_back(dh, dc, g0, g1, g2, g3, before, h):
    da = dh * (1.0 - h * h)
    return da, da, da, da, tl.zeros_like(dh), tl.zeros_like(dc)


STEPS = Steps(CELLS["rnn_tanh"], step, step_back)
forward, backward = implementation(STEPS)
AOT = recurrent.ahead_of_time(STEPS)
