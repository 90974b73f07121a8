"""The step of Elman's RNN with tanh for the Triton kernels; the formulas are in `fastseq.reference.rnn_tanh`."""

import triton
import triton.language as tl

from fastseq.kernels.triton import recurrent
from fastseq.kernels.triton.recurrent import Cell, tanh


@triton.jit
def step(x0, x1, x2, x3, h0, h1, h2, h3, carry):
    h = tanh(x0 + h0)
    return h, h, h, h, h, h


@triton.jit
def step_back(dh, dc, g0, g1, g2, g3, before, h):
    da = dh * (1.0 - h * h)
    return da, da, da, da, tl.zeros_like(dh), tl.zeros_like(dc)


CELL = Cell(
    "rnn_tanh", gates=1, tape=0, has_cell=False, carries=False, inner_bias=False, step=step, step_back=step_back
)
forward, backward = recurrent.implementation(CELL)
AOT = recurrent.ahead_of_time(CELL)
