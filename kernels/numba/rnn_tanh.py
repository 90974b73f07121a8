"""Elman's cell with tanh. Formulas: fastseq/reference/rnn_tanh.py."""

from fastseq.kernels.numba.jit import jit
from fastseq.kernels.numba.recurrent import Recurrent
from fastseq.kernels.numba.simd import tanh
from fastseq.ops.rnn import RNN_TANH


@jit
def step(x, u, h, c):
    return tanh(x[0] + u[0]), c, (h,)


@jit
def step_back(tape, dh, dc, h, h_before, c, c_before):
    da = (dh * (1.0 - h * h),)
    return da, da, dh, dc, h


_LAYER = Recurrent(RNN_TANH, step, step_back, keeps_h=False, splits_u=False)
forward, backward, warmup = _LAYER.forward, _LAYER.backward, _LAYER.warmup
