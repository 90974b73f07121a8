r"""The layer of Elman's RNN with ReLU, as `torch.nn.RNN` defines it with nonlinearity="relu".

    h_t = max(0, W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        da_t = 0 where h_t <= 0, else dh_t

There is no tape beside y. `fastseq.reference.recurrent` has what surrounds a step.
"""

from functools import partial

import torch
from torch import Tensor

from fastseq.reference import recurrent
from fastseq.reference.recurrent import State


class RnnRelu:
    gates, tape, has_cell = 1, 0, False

    @staticmethod
    def step(from_x: Tensor, from_h: Tensor, state: State) -> tuple[State, list[Tensor]]:
        return ((from_x + from_h).relu(),), []

    @staticmethod
    def step_back(grads: State, tape: list[Tensor], before: State, after: State) -> tuple[Tensor, Tensor, State]:
        da = torch.where(after[0] <= 0, torch.zeros_like(grads[0]), grads[0])
        return da, da, (torch.zeros_like(da),)


forward = partial(recurrent.forward, RnnRelu())
backward = partial(recurrent.backward, RnnRelu())
