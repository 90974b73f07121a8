r"""The LSTM layer, as `torch.nn.LSTM` defines it (Hochreiter & Schmidhuber 1997, with forget gates: Gers et al. 2000;
with a projection: Sak et al. 2014).

One layer in D directions, of H units. For step t, with a_t the pre-activations split in gate order i, f, g, o:

    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    i_t, f_t, o_t = sigmoid(a_t^i), sigmoid(a_t^f), sigmoid(a_t^o)        g_t = tanh(a_t^g)
    c_t = f_t * c_{t-1} + i_t * g_t                                       h_t = o_t * tanh(c_t)

and with a projection to P outputs h_t = W_hr (o_t * tanh(c_t)). The tape that forward saves for backward is `gates`
(i, f, g, o
after their activations) and `cells` (c_t). Backward, with dh_t and dc_t all that reaches o_t * tanh(c_t) and c_t, and
s_t = tanh(c_t):

    dc_t  += dh_t * o_t * (1 - s_t^2)
    da^i_t = dc_t * g_t * i_t (1 - i_t)       da^f_t = dc_t * c_{t-1} * f_t (1 - f_t)
    da^g_t = dc_t * i_t * (1 - g_t^2)         da^o_t = dh_t * s_t * o_t (1 - o_t)
    dh_{t-1} += W_hh^T da_t                   dc_{t-1} = dc_t * f_t
    dx_t = W_ih^T da_t      dW_ih = sum_t da_t x_t^T      dW_hh = sum_t da_t h_{t-1}^T      db_ih = db_hh = sum_t da_t

`fastseq.reference.recurrent` has what surrounds a step.
"""

from functools import partial

import torch
from torch import Tensor

from fastseq.reference import recurrent
from fastseq.reference.recurrent import State


class Lstm:
    gates, tape, has_cell = 4, 4, True

    @staticmethod
    def step(from_x: Tensor, from_h: Tensor, state: State) -> tuple[State, list[Tensor]]:
        i, f, g, o = (from_x + from_h).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * state[1] + i * g
        return (o * c.tanh(), c), [i, f, g, o]

    @staticmethod
    def step_back(grads: State, tape: list[Tensor], before: State, after: State) -> tuple[Tensor, Tensor, State]:
        (dh, dc), (i, f, g, o), s = grads, tape, after[1].tanh()
        dc = dc + dh * o * (1 - s * s)
        da = torch.cat(
            [dc * g * i * (1 - i), dc * before[1] * f * (1 - f), dc * i * (1 - g * g), dh * s * o * (1 - o)], dim=-1
        )
        return da, da, (torch.zeros_like(dh), dc * f)


forward = partial(recurrent.forward, Lstm())
backward = partial(recurrent.backward, Lstm())
