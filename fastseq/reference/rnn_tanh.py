r"""The layer of Elman's RNN with tanh, as `torch.nn.RNN` defines it (Elman 1990).

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)          da_t = dh_t * (1 - h_t^2)

There is no tape beside y. `fastseq.reference.recurrent` has what surrounds a step.
"""

from functools import partial

import torch
from torch import Tensor

from fastseq.reference import recurrent
from fastseq.reference.recurrent import State


class RnnTanh:
    gates, tape, has_cell = 1, 0, False

    @staticmethod
    def step(from_x: Tensor, from_h: Tensor, state: State) -> tuple[State, list[Tensor]]:
        return ((from_x + from_h).tanh(),), []

    @staticmethod
    def step_back(grads: State, tape: list[Tensor], before: State, after: State) -> tuple[Tensor, Tensor, State]:
        da = grads[0] * (1 - after[0] * after[0])
        return da, da, (torch.zeros_like(da),)


forward = partial(recurrent.forward, RnnTanh())
backward = partial(recurrent.backward, RnnTanh())
