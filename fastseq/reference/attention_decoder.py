r"""An attention decoder, teacher-forced: a recurrent cell that looks at a memory at every step.

With q the state that looks, and for every place s of the memory its key k_s and its value m_s:

    e_s = v . tanh(W_q q + k_s)    additive (Bahdanau et al. 2015, arXiv:1409.0473); without v it is e_s = q . k_s
    a = softmax(e)                 over the places that are not padding; zeros where all are
    z = sum_s a_s m_s              the context

A cell gets gates_t, what its gates get from the step's own input (W_x x_t and the biases), and a feed f:

    h_t, c_t = cell(gates_t + W_feed f, W_hh h_{t-1} + b_hh; h_{t-1}, c_{t-1})

Where there is no W_out, the state looks before its step (Bahdanau): z_t comes from q = h_{t-1}, and f = z_t is fed at
step t. Where there is, it looks after it, and is fed what it saw at the next one (Luong et al. 2015, arXiv:1508.04025,
with input feeding): z_t comes from q = h_t, f_t = tanh(W_out [z_t; h_t]), and f_{t-1} is fed at step t, `feed0` at the
first.

What is padding takes no part, whatever stands there: absent places of the memory, and the steps past a row's length,
whose outputs are zeros and which leave the state and the feed as they are.

The tape that forward saves is the cell's gates and c_t (`fastseq.reference.lstm`, `gru`), and z_t where it is not the
feed. Backward, step by step from the last, with df_t, dh_t and dc_t all that reaches f_t, h_t and c_t:

    looking after:   do_t = df_t * (1 - f_t^2)        [dz_t; dh_t] += W_out^T do_t
    looking:         da_s = dz . m_s, plus what reaches a itself         de = a * (da - sum_s a_s da_s)
                     dm_s += a_s dz
                     additive, with u_s = tanh(p + k_s), p = W_q q:
                     dk_s += du_s, dp += du_s with du_s = de_s v (1 - u_s^2)    dv += sum_s de_s u_s    dq = W_q^T dp
                     by product:    dk_s += de_s q              dq = sum_s de_s k_s
    cell:            from dh_t and dc_t the gradients dgates_t and dgates_h_t of what its gates get from its input and
                     from h (one and the same but for the GRU, whose reset gate scales the latter), and
                     df = W_feed^T dgates_t           dh_{t-1} += W_hh^T dgates_h_t

A weight's gradient is one product over all steps afterwards: dW_feed = sum_t dgates_t f^T, dW_hh = sum_t dgates_h_t
h_{t-1}^T, dW_q = sum_t dp_t q^T, dW_out = sum_t do_t [z_t; h_t]^T. It is not the kernels' business.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastseq.reference.gru import Gru
from fastseq.reference.lstm import Lstm
from fastseq.reference.recurrent import Cell, State
from fastseq.reference.rnn_tanh import RnnTanh

LSTM, GRU, RNN_TANH = range(3)
CELLS: list[Cell] = [Lstm(), Gru(), RnnTanh()]


def look(
    q: Tensor, keys: Tensor, values: Tensor, absent: Tensor | None, w_query: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The context [B, M] of states [B, H], and the weights [B, S]."""
    if w_query is not None and v is not None:
        scores = (linear(q, w_query).unsqueeze(1) + keys).tanh() @ v
    else:
        scores = (keys @ q.unsqueeze(-1)).squeeze(-1)
    if absent is None:
        weights = scores.softmax(-1)
    else:
        seen = scores.masked_fill(absent & ~absent.all(-1, keepdim=True), -torch.inf)  # of no place there is no softmax
        weights = seen.softmax(-1).masked_fill(absent, 0)
    return (weights.unsqueeze(1) @ values).squeeze(1), weights


def look_back(
    dz: Tensor, da: Tensor, q: Tensor, keys: Tensor, values: Tensor, a: Tensor, w_query: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of q, of W_q q, and what is to be added to those of keys, values and v, from those of z and a."""
    da = da + (values @ dz.unsqueeze(-1)).squeeze(-1)
    de = a * (da - (a * da).sum(-1, keepdim=True))
    dvalues = a.unsqueeze(-1) * dz.unsqueeze(1)
    if w_query is None or v is None:
        return (de.unsqueeze(1) @ keys).squeeze(1), None, de.unsqueeze(-1) * q.unsqueeze(1), dvalues, None
    u = (linear(q, w_query).unsqueeze(1) + keys).tanh()
    du = de.unsqueeze(-1) * v * (1 - u * u)
    dp = du.sum(1)
    return dp @ w_query, dp, du, dvalues, (de.unsqueeze(-1) * u).sum((0, 1))


def forward(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    feed0: Tensor | None,
    keys: Tensor,
    values: Tensor,
    absent: Tensor | None,
    lengths: Tensor | None,
    w_feed: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_query: Tensor | None,
    v: Tensor | None,
    w_out: Tensor | None,
    cell: int,
    save_tape: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastseq.ops.attention_decoder`. Differentiable by autograd, any floating dtype, any device.

    Returns:
        h, feeds, weights, h_n, c_n and the tape: the cell's gates, its c_t and the contexts. What there is not is
        empty, as is the tape unless `save_tape`.
    """
    formulas = CELLS[cell]
    nothing = partial(gates.new_empty, 0)
    runs = _running(gates, lengths)
    keys, values = _present(keys, absent), _present(values, absent)
    state: State = (h0,) if c0 is None else (h0, c0)
    feed = feed0
    steps = []
    for from_input, mine in zip(torch.where(runs, gates, 0), runs, strict=True):
        if w_out is None:
            feed, weights = look(state[0], keys, values, absent, w_query, v)
            context = feed
        assert feed is not None  # looking after its step, a decoder has feed0
        after, tape = formulas.step(from_input + linear(feed, w_feed), linear(state[0], w_hh, b_hh), state)
        if w_out is not None:
            context, weights = look(after[0], keys, values, absent, w_query, v)
            feed = torch.where(mine, linear(torch.cat([context, after[0]], -1), w_out).tanh(), feed)
        state = tuple(torch.where(mine, new, old) for new, old in zip(after, state, strict=True))
        saved_gates = torch.cat(tape, -1) if tape else from_input[:, :0]
        steps.append([torch.where(mine, t, 0) for t in (after[0], feed, weights, saved_gates, after[-1], context)])

    h, feeds, all_weights, gates_tape, cells, contexts = (
        torch.stack(of_steps) for of_steps in zip(*steps, strict=True)
    )
    return (
        h,
        feeds,
        all_weights,
        state[0],
        state[1] if formulas.has_cell else nothing(),
        gates_tape if save_tape and formulas.tape else nothing(),
        cells if save_tape and formulas.has_cell else nothing(),
        contexts if save_tape and w_out is not None else nothing(),
    )


def backward(
    dh: Tensor | None,
    dfeeds: Tensor | None,
    dweights: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    feed0: Tensor | None,
    keys: Tensor,
    values: Tensor,
    absent: Tensor | None,
    lengths: Tensor | None,
    w_feed: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_query: Tensor | None,
    v: Tensor | None,
    w_out: Tensor | None,
    cell: int,
    h: Tensor,
    feeds: Tensor,
    weights: Tensor,
    saved_gates: Tensor,
    cells: Tensor,
    contexts: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastseq.ops.attention_decoder`.

    Returns:
        dgates, dgates_h, dqueries, douts, dh0, dc0, dfeed0, dkeys, dvalues and dv; empty tensors for what there is not,
        or is not needed.
    """
    formulas = CELLS[cell]
    nothing = partial(gates.new_empty, 0)
    runs = _running(gates, lengths)
    keys, values = _present(keys, absent), _present(values, absent)
    # Zeros past a row's length, where nothing may have been written, nor may gradients arrive.
    sequences = [(h, h), (feeds, feeds), (weights, weights), (dh, h), (dfeeds, feeds), (dweights, weights)]
    h, feeds, weights, dh, dfeeds, dweights = (
        torch.zeros_like(like) if t is None else torch.where(runs, t, 0) for t, like in sequences
    )
    tape = torch.where(runs, saved_gates, 0).chunk(formulas.tape, -1) if formulas.tape else ()
    states = (h, torch.where(runs, cells, 0)) if formulas.has_cell else (h,)
    initial = (h0,) if c0 is None else (h0, c0)
    dstate = [torch.zeros_like(s) if d is None else d for d, s in zip((dh_n, dc_n), initial, strict=False)]
    dfeed = torch.zeros_like(feeds[0])
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dv = nothing() if v is None else torch.zeros_like(v)
    steps = []
    for t in reversed(range(len(gates))):
        before = tuple(s[t - 1] for s in states) if t > 0 else initial
        after = tuple(s[t] for s in states)
        # A row that does not run hands on what has reached its state, and takes part with zeros.
        handed_on = [torch.where(runs[t], 0, d) for d in (*dstate, dfeed)]
        *grads, df = (torch.where(runs[t], d, 0) for d in (*dstate, dfeed))
        grads[0] = grads[0] + dh[t]
        df = df + dfeeds[t]
        do = dp = None
        if w_out is not None:
            do = df * (1 - feeds[t] * feeds[t])
            dz, dh_out = (do @ w_out).split([values.shape[-1], h.shape[-1]], -1)
            dq, dp, *shares = look_back(dz, dweights[t], after[0], keys, values, weights[t], w_query, v)
            grads[0] = grads[0] + dh_out + dq
        da_x, da_h, passed_on = formulas.step_back(tuple(grads), [part[t] for part in tape], before, after)
        grads = [passed_on[0] + da_h @ w_hh, *passed_on[1:]]
        df_before = da_x @ w_feed
        if w_out is None:
            dq, dp, *shares = look_back(df + df_before, dweights[t], before[0], keys, values, weights[t], w_query, v)
            grads[0] = grads[0] + dq
            df_before = torch.zeros_like(df_before)  # its feed was this step's context
        *dstate, dfeed = (g + d for g, d in zip((*grads, df_before), handed_on, strict=True))
        for total, share in zip((dkeys, dvalues, dv), shares, strict=True):
            if share is not None:
                total += share
        steps.append((da_x, None if da_h is da_x else da_h, dp, do))

    dgates, dgates_h, dqueries, douts = (
        nothing() if parts[0] is None else torch.stack(parts[::-1]) for parts in zip(*steps, strict=True)
    )
    dkeys, dvalues, dv = (total if need else nothing() for total, need in zip((dkeys, dvalues, dv), needs, strict=True))
    dc0 = dstate[1] if formulas.has_cell else nothing()
    return dgates, dgates_h, dqueries, douts, dstate[0], dc0, nothing() if w_out is None else dfeed, dkeys, dvalues, dv


def _running(gates: Tensor, lengths: Tensor | None) -> Tensor:
    """[T, B, 1], or [T, 1, 1] where all rows run at every step: whether a row does."""
    steps = torch.arange(len(gates), device=gates.device).view(-1, 1, 1)
    return steps >= 0 if lengths is None else steps < lengths.to(gates.device).view(-1, 1)


def _present(memory: Tensor, absent: Tensor | None) -> Tensor:
    """Keys or values with zeros at the places that are absent."""
    return memory if absent is None else memory.masked_fill(absent.unsqueeze(-1), 0)
