r"""The LSTM layer, as `torch.nn.LSTM` defines it (Hochreiter & Schmidhuber 1997, with forget gates: Gers et al. 2000).

One layer in D directions. For direction d and step t, with a_t the pre-activations split in gate order i, f, g, o:

    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    i_t, f_t, o_t = sigmoid(a_t^i), sigmoid(a_t^f), sigmoid(a_t^o)        g_t = tanh(a_t^g)
    c_t = f_t * c_{t-1} + i_t * g_t                                       h_t = o_t * tanh(c_t)

Direction 1 runs t from T-1 down to 0. The tape that forward saves for backward is `gates` (i, f, g, o after their
activations) and `cells` (c_t). Backward, with dh_t and dc_t all that reaches h_t and c_t and s_t = tanh(c_t):

    dc_t  += dh_t * o_t * (1 - s_t^2)
    da^i_t = dc_t * g_t * i_t (1 - i_t)       da^f_t = dc_t * c_{t-1} * f_t (1 - f_t)
    da^g_t = dc_t * i_t * (1 - g_t^2)         da^o_t = dh_t * s_t * o_t (1 - o_t)
    dh_{t-1} += W_hh^T da_t                   dc_{t-1} = dc_t * f_t
    dx_t = W_ih^T da_t      dW_ih = sum_t da_t x_t^T      dW_hh = sum_t da_t h_{t-1}^T      db_ih = db_hh = sum_t da_t
"""

import torch
from torch import Tensor


def _steps(length: int, direction: int) -> range:
    return range(length) if direction == 0 else range(length - 1, -1, -1)


def _split_weights(weights: list[Tensor], directions: int) -> list[list[Tensor]]:
    count = len(weights) // directions
    return [weights[d * count : (d + 1) * count] for d in range(directions)]


def forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bidirectional: bool,
    save_tape: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastseq.ops.lstm`. Differentiable by autograd, any floating dtype, any device.

    Returns:
        y [T, B, D*H], h_n [D, B, H], c_n [D, B, H], gates [D, T, B, 4H], cells [D, T, B, H]; the tape is empty
        unless `save_tape`.
    """
    T, B, _ = x.shape
    D = 2 if bidirectional else 1
    H = weights[1].shape[1]
    zeros = x.new_zeros(D, B, H)
    h0 = zeros if h0 is None else h0
    c0 = zeros if c0 is None else c0

    outputs, h_n, c_n, gates, cells = [], [], [], [], []
    for d, (w_ih, w_hh, *biases) in enumerate(_split_weights(weights, D)):
        h, c = h0[d], c0[d]
        projected = x @ w_ih.t() + sum(biases)
        y_d, gates_d, cells_d = [x] * T, [x] * T, [x] * T  # filled in the direction's order
        for t in _steps(T, d):
            i, f, g, o = (projected[t] + h @ w_hh.t()).chunk(4, dim=-1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            y_d[t], gates_d[t], cells_d[t] = h, torch.cat([i, f, g, o], -1), c
        outputs.append(torch.stack(y_d))
        h_n.append(h)
        c_n.append(c)
        if save_tape:
            gates.append(torch.stack(gates_d))
            cells.append(torch.stack(cells_d))

    tape = (torch.stack(gates), torch.stack(cells)) if save_tape else (x.new_empty(0), x.new_empty(0))
    return torch.cat(outputs, -1), torch.stack(h_n), torch.stack(c_n), *tape


def backward(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bidirectional: bool,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """See `fastseq.ops.lstm_backward`.

    Returns:
        dx, dh0, dc0 and the weights' gradients in the weights' order; empty tensors for what is not needed.
    """
    T, B, _ = x.shape
    D = 2 if bidirectional else 1
    H = weights[1].shape[1]
    zeros = x.new_zeros(D, B, H)
    h0 = zeros if h0 is None else h0
    c0 = zeros if c0 is None else c0

    dx, dh0, dc0, dweights = torch.zeros_like(x, memory_format=torch.contiguous_format), [], [], []
    for d, (w_ih, w_hh, *biases) in enumerate(_split_weights(weights, D)):
        y_d, dy_d = y[..., d * H : (d + 1) * H], dy[..., d * H : (d + 1) * H]
        dh, dc = dh_n[d], dc_n[d]
        da = x.new_empty(T, B, 4 * H)
        steps = list(_steps(T, d))
        before = [None, *steps[:-1]]
        for t, t_before in zip(reversed(steps), reversed(before), strict=True):
            i, f, g, o = gates[d, t].chunk(4, dim=-1)
            c_before = c0[d] if t_before is None else cells[d, t_before]
            s = cells[d, t].tanh()
            dh = dh + dy_d[t]
            dc = dc + dh * o * (1 - s * s)
            da[t] = torch.cat(
                [
                    dc * g * i * (1 - i),
                    dc * c_before * f * (1 - f),
                    dc * i * (1 - g * g),
                    dh * s * o * (1 - o),
                ],
                dim=-1,
            )
            dh = da[t] @ w_hh
            dc = dc * f
        h_before = torch.stack([h0[d] if t is None else y_d[t] for t in before])
        da_in_order = da[steps]
        dx += da @ w_ih
        dh0.append(dh)
        dc0.append(dc)
        dweights.append(da.flatten(0, 1).t() @ x.flatten(0, 1))
        dweights.append(da_in_order.flatten(0, 1).t() @ h_before.flatten(0, 1))
        dweights.extend(da.sum((0, 1)) for _ in biases)
    state_needed = needs[1] or needs[2]
    all_grads = [dx, torch.stack(dh0), torch.stack(dc0), *dweights]
    needed = [needs[0], state_needed, state_needed, *needs[3:]]
    dx, dh_0, dc_0, *dweights = [g if n else g.new_empty(0) for g, n in zip(all_grads, needed, strict=True)]
    return dx, dh_0, dc_0, dweights
