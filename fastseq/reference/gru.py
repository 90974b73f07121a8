r"""The GRU layer, as `torch.nn.GRU` defines it (Cho et al. 2014, with the reset gate after the product as in cuDNN).

One layer in D directions, of H units. For step t, with the gates in the order r, z, n:

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
    u_t = W_hn h_{t-1} + b_hn
    n_t = tanh(W_in x_t + b_in + r_t * u_t)
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

The tape that forward saves for backward is `gates`: r, z, n and u. Backward, with dh_t all that reaches h_t:

    da^n_t = dh_t * (1 - z_t) * (1 - n_t^2)       da^r_t = da^n_t * u_t * r_t (1 - r_t)
    da^z_t = dh_t * (h_{t-1} - n_t) * z_t (1 - z_t)
    dx_t = W_ih^T (da^r, da^z, da^n)_t            dh_{t-1} += dh_t * z_t + W_hh^T (da^r, da^z, da^n * r)_t

and the weights' gradients are the sums over t of the same vectors times x_t and h_{t-1}.
`fastseq.reference.recurrent` has what surrounds a step.
"""

from functools import partial

import torch
from torch import Tensor

from fastseq.reference import recurrent
from fastseq.reference.recurrent import State


class Gru:
    gates, tape, has_cell = 3, 4, False

    @staticmethod
    def step(from_x: Tensor, from_h: Tensor, state: State) -> tuple[State, list[Tensor]]:
        (x_r, x_z, x_n), (h_r, h_z, u) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * u).tanh()
        return ((1 - z) * n + z * state[0],), [r, z, n, u]

    @staticmethod
    def step_back(grads: State, tape: list[Tensor], before: State, after: State) -> tuple[Tensor, Tensor, State]:
        (dh,), (r, z, n, u) = grads, tape
        da_n = dh * (1 - z) * (1 - n * n)
        da_r = da_n * u * r * (1 - r)
        da_z = dh * (before[0] - n) * z * (1 - z)
        return torch.cat([da_r, da_z, da_n], dim=-1), torch.cat([da_r, da_z, da_n * r], dim=-1), (dh * z,)


forward = partial(recurrent.forward, Gru())
backward = partial(recurrent.backward, Gru())
