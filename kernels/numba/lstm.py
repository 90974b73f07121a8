"""The LSTM's cell. Formulas: fastseq/reference/lstm.py."""

from fastseq.kernels.numba.jit import jit
from fastseq.kernels.numba.recurrent import Recurrent
from fastseq.kernels.numba.simd import sigmoid, tanh
from fastseq.ops.lstm import LSTM


@jit
def step(x, u, h, c):
    i, f, g, o = sigmoid(x[0] + u[0]), sigmoid(x[1] + u[1]), tanh(x[2] + u[2]), sigmoid(x[3] + u[3])
    c = f * c + i * g
    return o * tanh(c), c, (i, f, g, o)


@jit
def step_back(tape, dh, dc, h, h_before, c, c_before):
    i, f, g, o = tape
    s = tanh(c)
    dc = dc + dh * o * (1.0 - s * s)
    da = (dc * g * (i * (1.0 - i)), dc * c_before * (f * (1.0 - f)), dc * i * (1.0 - g * g), dh * s * (o * (1.0 - o)))
    return da, da, dh, dc * f, o * s


_LAYER = Recurrent(LSTM, step, step_back, keeps_h=False, splits_u=False)
forward, backward, warmup = _LAYER.forward, _LAYER.backward, _LAYER.warmup
