"""The GRU's cell. Formulas: fastseq/reference/gru.py."""

from fastseq.kernels.numba.jit import jit
from fastseq.kernels.numba.recurrent import Recurrent
from fastseq.kernels.numba.simd import sigmoid, tanh
from fastseq.ops.gru import GRU


@jit
def step(x, u, h, c):
    r, z = sigmoid(x[0] + u[0]), sigmoid(x[1] + u[1])
    n = tanh(x[2] + r * u[2])
    return n + z * (h - n), c, (r, z, n, u[2])


@jit
def step_back(tape, dh, dc, h, h_before, c, c_before):
    r, z, n, u = tape
    da_n = dh * (1.0 - z) * (1.0 - n * n)
    da_r = da_n * u * (r * (1.0 - r))
    da_z = dh * (h_before - n) * (z * (1.0 - z))
    return (da_r, da_z, da_n), (da_r, da_z, da_n * r), dh * z, dc, h


_LAYER = Recurrent(GRU, step, step_back, keeps_h=True, splits_u=True)
forward, backward, warmup = _LAYER.forward, _LAYER.backward, _LAYER.warmup
