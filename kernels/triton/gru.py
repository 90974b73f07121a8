"""The GRU's step for the Triton kernels; the formulas are in `fastseq.reference.gru`."""

import triton
import triton.language as tl

from fastseq.kernels.triton import recurrent
from fastseq.kernels.triton.recurrent import Steps, sigmoid, tanh
from fastseq.ops.recurrent_steps import CELLS, implementation


@triton.jit
def step(x0, x1, x2, x3, h0, h1, h2, h3, h):
    r, z = sigmoid(x0 + h0), sigmoid(x1 + h1)
    n = tanh(x2 + r * h2)
    h = (1.0 - z) * n + z * h
    return h, h, r, z, n, h2


@triton.jit
def step_back(dh, dc, r, z, n, u, h_before, after):
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dr, dz = dn * u * r * (1.0 - r), dh * (h_before - n) * z * (1.0 - z)
    return dr, dz, dn * r, dn, dh * z, tl.zeros_like(dc)


STEPS = Steps(CELLS["gru"], step, step_back)
forward, backward = implementation(STEPS)
AOT = recurrent.ahead_of_time(STEPS)
