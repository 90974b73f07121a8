"""Elman's cell with ReLU. Formulas: fastseq/reference/rnn_relu.py."""

from fastseq.kernels.numba.jit import jit
from fastseq.kernels.numba.recurrent import Recurrent
from fastseq.kernels.numba.simd import relu, relu_back
from fastseq.ops.rnn import RNN_RELU


@jit
def step(x, u, h, c):
    return relu(x[0] + u[0]), c, (h,)


@jit
def step_back(tape, dh, dc, h, h_before, c, c_before):
    da = (relu_back(dh, h),)
    return da, da, dh, dc, h


_LAYER = Recurrent(RNN_RELU, step, step_back, keeps_h=False, splits_u=False)
forward, backward, warmup = _LAYER.forward, _LAYER.backward, _LAYER.warmup
