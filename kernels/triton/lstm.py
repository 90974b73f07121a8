"""The LSTM's step for the Triton kernels; the formulas are in `fastseq.reference.lstm`."""

import triton
import triton.language as tl

from fastseq.kernels.triton import recurrent
from fastseq.kernels.triton.recurrent import Steps, sigmoid, tanh
from fastseq.ops.recurrent_steps import CELLS, implementation


@triton.jit
def step(x0, x1, x2, x3, h0, h1, h2, h3, c):
    i, f, g, o = sigmoid(x0 + h0), sigmoid(x1 + h1), tanh(x2 + h2), sigmoid(x3 + h3)
    c = f * c + i * g
    return o * tanh(c), c, i, f, g, o


@triton.jit
def step_back(dh, dc, i, f, g, o, c_before, c):
    s = tanh(c)
    dc = dc + dh * o * (1.0 - s * s)
    di, df = dc * g * i * (1.0 - i), dc * c_before * f * (1.0 - f)
    dg, do = dc * i * (1.0 - g * g), dh * s * o * (1.0 - o)
    return di, df, dg, do, tl.zeros_like(dh), dc * f


STEPS = Steps(CELLS["lstm"], step, step_back)
forward, backward = implementation(STEPS)
AOT = recurrent.ahead_of_time(STEPS)
