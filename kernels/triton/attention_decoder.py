"""The attention decoder on NVIDIA's GPUs: `fastseq::attention_decoder`, a few launches a step.

Formulas are in `fastseq.reference.attention_decoder`. The cell is the recurrent ops' own kernel in its stepwise form,
forward and back; what is fed to it, W_feed f, and all products with a weight are one more kernel, `linear_kernel`.
Looking is two launches, one of scores and one of weights and context, each of programs for parts of each row's memory,
so that a small batch keeps a GPU busy, too. A long series of steps is a CUDA graph (`fastseq.kernels.triton.graphs`).

Backward keeps out of the steps all that no other step waits for: the gradients of keys, values and v are sums over
steps, made after the last. Nothing is added up by atomics, and results are the same to the bit from run to run.
Pre-activations, cell states, scores and sums are float32 whatever the tensors' dtype.

Every kernel leaves alone the rows that do not run at its step: their places hold zeros from the start.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.triton import gru, lstm, rnn_tanh
from fastseq.kernels.triton.attention import precision_of_float32
from fastseq.kernels.triton.graphs import Launch
from fastseq.kernels.triton.recurrent import (
    CHIPS,
    Launcher,
    Runtime,
    backward_kernel,
    forward_kernel,
    once,
    product,
    tanh,
)
from fastseq.kernels.triton.recurrent_plan import stepwise
from fastseq.kernels.triton.rows import load_columns, load_tile
from fastseq.ops.recurrent_steps import Cell, Layer
from fastseq.reference.attention_decoder import GRU, LSTM, RNN_TANH

STEPS = {LSTM: lstm.STEPS, GRU: gru.STEPS, RNN_TANH: rnn_tanh.STEPS}
# What changes from call to call and must not be compiled in.
SIZES = ["S", "T", "B", "first"]


@triton.jit
def _running(p_lengths, rows, row_ok, first, T, BACK: tl.constexpr):
    """The step, and which rows run at it; none do at step -1, where the cell's kernel takes gradients to its state."""
    t = T - 1 - first if BACK else first
    runs = row_ok & (t >= 0)
    if p_lengths is not None:
        runs = runs & (t < tl.load(p_lengths + rows, mask=row_ok, other=0))
    return t.to(tl.int64), runs


@triton.jit(do_not_specialize=SIZES)
def linear_kernel(
    p_w, w_apart,  # [U, K], rows so far apart
    p_v, v_step, v_apart,  # [T, B, K] what it multiplies; steps are 0 apart where there is but one for all
    p_w2, w2_apart, p_v2, v2_step, v2_apart,  # [U, K2] and [T, B, K2], another product to be added, or None
    p_bias,  # [U] or None
    p_add, add_step, add_apart,  # [T, B, U] or None
    p_tanh, tanh_step, tanh_apart,  # [T, B, U] tanh of what the sum is the gradient of, or None
    p_out, out_step, out_apart,  # [T, B, U]
    p_lengths,  # [B] int32 or None
    T, B, first,
    U: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, TANH: tl.constexpr, BACK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """W v of one step, with whatever is added. Grid: tiles of U, tiles of the batch."""
    units, rows = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit_ok = units < U
    t, runs = _running(p_lengths, rows, rows < B, first, T, BACK)
    ok = unit_ok[:, None] & runs[None, :]
    unit, row = units.to(tl.int64), rows.to(tl.int64)
    sums = product(
        None, p_w + unit * w_apart, unit_ok, p_v + t * v_step + row * v_apart, runs,
        BLOCK_U, BLOCK_B, K, BLOCK_K, SPLIT, 1, PRECISION,
    )  # fmt: skip
    if p_w2 is not None:
        sums += product(
            None, p_w2 + unit * w2_apart, unit_ok, p_v2 + t * v2_step + row * v2_apart, runs,
            BLOCK_U, BLOCK_B, K2, BLOCK_K, SPLIT, 1, PRECISION,
        )  # fmt: skip
    if p_bias is not None:
        sums += tl.load(p_bias + units, mask=unit_ok, other=0.0).to(tl.float32)[:, None]
    if p_add is not None:
        p_tile = p_add + t * add_step + row[None, :] * add_apart + units[:, None]
        sums += tl.load(p_tile, mask=ok, other=0.0).to(tl.float32)
    if p_tanh is not None:
        p_tile = p_tanh + t * tanh_step + row[None, :] * tanh_apart + units[:, None]
        f = tl.load(p_tile, mask=ok, other=0.0).to(tl.float32)
        sums *= 1.0 - f * f
    if TANH:
        sums = tanh(sums)
    p_tile = p_out + t * out_step + row[None, :] * out_apart + units[:, None]
    tl.store(p_tile, sums.to(p_out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def score_kernel(
    p_q, q_step,  # [T, B, A]
    p_keys,  # [B, S, A]
    p_v,  # [A], or None: then a score is a product
    p_absent,  # [B, S] or None
    p_add,  # [T, B, S] or None
    p_scores,  # [B, S] float32
    p_lengths, S, T, first,
    A: tl.constexpr, BACK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_S places; -inf where they are absent. Grid: rows of the batch, blocks of S."""
    b = tl.program_id(0)
    t, runs = _running(p_lengths, b, b >= 0, first, T, BACK)
    if not runs:
        return
    place = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    present = place < S
    row = b.to(tl.int64) * S + place
    if p_absent is not None:
        present = present & (tl.load(p_absent + row, mask=present, other=1) == 0)
    p_q += t * q_step + b.to(tl.int64) * A
    sums = tl.zeros((BLOCK_S, BLOCK_A), tl.float32)
    for start in range(0, A, BLOCK_A):
        column = start + tl.arange(0, BLOCK_A)
        key = load_tile(p_keys, A, row, column, present[:, None] & (column < A)[None, :])
        q = load_columns(p_q, column, A)
        if p_v is None:
            sums += q * key
        else:
            sums += load_columns(p_v, column, A) * tanh(q + key)
    score = tl.sum(sums, 1)
    if p_add is not None:
        p_add += t * tl.num_programs(0) * S
        score += tl.load(p_add + row, mask=place < S, other=0.0).to(tl.float32)
    if p_absent is not None:
        score = tl.where(present, score, float("-inf"))
    tl.store(p_scores + row, score, mask=place < S)


@triton.jit(do_not_specialize=SIZES)
def context_kernel(
    p_scores,  # [B, S] float32
    p_values,  # [B, S, M]
    p_weights,  # [T, B, S]
    p_context, context_step,  # [T, B, M]
    p_lengths, S, T, first,
    M: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The softmax of a row, and BLOCK_M columns of the context. Grid: rows of the batch, blocks of M."""
    b, block = tl.program_id(0), tl.program_id(1)
    t, runs = _running(p_lengths, b, b >= 0, first, T, False)
    if not runs:
        return
    row = b.to(tl.int64)
    p_scores += row * S
    most = tl.full((CHUNK,), float("-inf"), tl.float32)
    for start in range(0, S, CHUNK):
        place = start + tl.arange(0, CHUNK)
        most = tl.maximum(most, tl.load(p_scores + place, mask=place < S, other=float("-inf")))
    largest = tl.max(most, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # all are absent
    sums = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, S, CHUNK):
        place = start + tl.arange(0, CHUNK)
        sums += tl.exp(tl.load(p_scores + place, mask=place < S, other=float("-inf")) - largest)
    total = tl.sum(sums, 0)
    total = tl.where(total == 0.0, 1.0, total)

    p_weights += (t * tl.num_programs(0) + row) * S
    column = block * BLOCK_M + tl.arange(0, BLOCK_M)
    context = tl.zeros((BLOCK_S, BLOCK_M), tl.float32)
    for start in range(0, S, BLOCK_S):
        place = start + tl.arange(0, BLOCK_S)
        score = tl.load(p_scores + place, mask=place < S, other=float("-inf"))
        weight = tl.exp(score - largest) / total
        there = (score != float("-inf"))[:, None] & (column < M)[None, :]
        context += weight[:, None] * load_tile(p_values, M, row * S + place, column, there)
        tl.store(p_weights + place, weight, mask=(place < S) & (block == 0))
    tl.store(p_context + t * context_step + row * M + column, tl.sum(context, 0), mask=column < M)


@triton.jit(do_not_specialize=SIZES)
def score_back_kernel(
    p_reach,  # [B, S] float32, all that reaches the weights
    p_weights,  # [T, B, S]
    p_q, q_step,  # [T, B, A], where there is v
    p_keys,  # [B, S, A]
    p_v,  # [A] or None
    p_dscores,  # [T, B, S] or None
    p_dq,  # with v [T, B, A], else [B, H] float32, to be added to: q is h
    p_lengths, S, T, first,
    A: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores and of BLOCK_A columns of q. Grid: rows of the batch, blocks of A."""
    b, block = tl.program_id(0), tl.program_id(1)
    t, runs = _running(p_lengths, b, b >= 0, first, T, True)
    if not runs:
        return
    row, step = b.to(tl.int64), t * tl.num_programs(0) + b
    p_reach += row * S
    p_weights += step * S
    sums = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, S, CHUNK):
        place = start + tl.arange(0, CHUNK)
        weight = tl.load(p_weights + place, mask=place < S, other=0.0).to(tl.float32)
        # Whatever is at absent places takes no part.
        sums += tl.where(weight == 0.0, 0.0, weight * tl.load(p_reach + place, mask=place < S, other=0.0))
    mean = tl.sum(sums, 0)

    column = block * BLOCK_A + tl.arange(0, BLOCK_A)
    if p_v is not None:
        q = load_columns(p_q + t * q_step + row * A, column, A)
    grad = tl.zeros((BLOCK_S, BLOCK_A), tl.float32)
    for start in range(0, S, BLOCK_S):
        place = start + tl.arange(0, BLOCK_S)
        weight = tl.load(p_weights + place, mask=place < S, other=0.0).to(tl.float32)
        reach = tl.load(p_reach + place, mask=place < S, other=0.0)
        dscore = tl.where(weight == 0.0, 0.0, weight * (reach - mean))
        there = (weight != 0.0)[:, None] & (column < A)[None, :]
        key = load_tile(p_keys, A, row * S + place, column, there)
        if p_v is None:
            grad += dscore[:, None] * key
        else:
            u = tanh(q + key)
            grad += dscore[:, None] * (1.0 - u * u)
        if p_dscores is not None:
            tl.store(p_dscores + step * S + place, dscore, mask=(place < S) & (block == 0))
    dq, ok = tl.sum(grad, 0), column < A
    if p_v is None:
        p_dq += row * A + column
        tl.store(p_dq, tl.load(p_dq, mask=ok, other=0.0) + dq, mask=ok)
    else:
        tl.store(p_dq + step * A + column, dq * tl.load(p_v + column, mask=ok, other=0.0).to(tl.float32), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def keys_back_kernel(
    p_q,  # [T, B, A]
    p_keys,  # [B, S, A]
    p_v,  # [A]
    p_absent,  # [B, S] or None
    p_dscores,  # [T, B, S]
    p_dkeys,  # [B, S, A] or None
    p_dv,  # [B, blocks of S, A] float32, to be added up; or None
    p_lengths, S, T,
    A: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """What all steps add to the gradients of the keys and of v. Grid: rows of the batch, blocks of S, blocks of A."""
    row, B = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    column = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    present = place < S
    there = present[:, None] & (column < A)[None, :]
    if p_absent is not None:
        there = there & (tl.load(p_absent + row * S + place, mask=present, other=1) == 0)[:, None]
    key = load_tile(p_keys, A, row * S + place, column, there)
    v = load_columns(p_v, column, A)
    p_q += row * A
    p_dscores += row * S + place
    dkeys = tl.zeros((BLOCK_S, BLOCK_A), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_A), tl.float32)
    steps = T
    if p_lengths is not None:
        steps = tl.load(p_lengths + row)
    for _ in range(steps):
        dscore = tl.load(p_dscores, mask=present, other=0.0).to(tl.float32)[:, None]
        u = tanh(load_columns(p_q, column, A) + key)
        dkeys += dscore * (1.0 - u * u)
        dv += dscore * u
        p_q += B * A
        p_dscores += B * S
    if p_dkeys is not None:
        # What is absent has no gradient, and is written, too.
        p_tile = p_dkeys + (row * S + place)[:, None] * A + column[None, :]
        tl.store(p_tile, dkeys * v, mask=present[:, None] & (column < A)[None, :])
    if p_dv is not None:
        p_part = p_dv + (row * tl.num_programs(1) + tl.program_id(1)) * A + column
        tl.store(p_part, tl.sum(dv, 0), mask=column < A)


# 16 bytes of half precision a load of a thread, and programs enough for a small batch. From what `make gpu-aot` shows;
# not tuned on any GPU.
SCORE_TILE = dict(BLOCK_S=16, BLOCK_A=128, num_warps=4)
CONTEXT_TILE = dict(CHUNK=256, BLOCK_S=32, num_warps=4)
# Twice as many places would be more than the registers hold beside tanh.
SCORE_BACK_TILE = dict(CHUNK=256, BLOCK_S=16, num_warps=4)
KEYS_TILE = dict(BLOCK_S=16, BLOCK_A=64, num_warps=4)
COLUMNS = 64


def _vectors(name: str, of: Tensor | None) -> dict[str, Any]:
    """Vectors of every step [T, B, *], or of one for all [B, *], as linear_kernel takes them."""
    if of is None:
        return {f"p_{name}": None, f"{name}_step": 0, f"{name}_apart": 0}
    return {f"p_{name}": of, f"{name}_step": _step(of), f"{name}_apart": of.stride(-2)}


def _step(of: Tensor) -> int:
    """How far apart steps are."""
    return of.stride(0) if of.dim() == 3 else 0


class _Decoder:
    """A call's sizes, and launches on its tensors.

    Attributes:
        layer, launcher: what the recurrent kernels are launched with.
        after: whether the state looks after its step.
        absent: [B, S] uint8 or None.
    """

    def __init__(
        self,
        cell: Cell,
        runtime: Runtime,
        h: Tensor,
        keys: Tensor,
        values: Tensor,
        absent: Tensor | None,
        lengths: Tensor | None,
        w_feed: Tensor,
        w_hh: Tensor,
        v: Tensor | None,
        w_out: Tensor | None,
    ) -> None:
        self.layer = Layer(cell, h, [w_feed, w_hh], False, None, lengths, None)
        self.launcher = Launcher(self.layer, runtime)
        self.keys, self.values, self.v = keys, values, v
        self.absent = None if absent is None else absent.view(torch.uint8)
        self.after = w_out is not None
        self.S, self.A, self.M, self.F = *keys.shape[1:], values.shape[-1], w_feed.shape[-1]
        self.options = dict(p_lengths=self.layer.lengths, S=self.S, T=self.layer.T)

    def fresh(self, *shape: int) -> Tensor:
        """For what steps write: with zeros where no row may come by."""
        return self.keys.new_empty(shape) if self.layer.lengths is None else self.keys.new_zeros(shape)

    def linear(
        self,
        w: Tensor,
        v: Tensor,
        out: Tensor,
        w2: Tensor | None = None,
        v2: Tensor | None = None,
        add: Tensor | None = None,
        of_tanh: Tensor | None = None,
        bias: Tensor | None = None,
        tanh: bool = False,
        back: bool = False,
    ) -> Launch:
        layer, (U, K), K2 = self.layer, w.shape, 0 if w2 is None else w2.shape[1]
        chosen = stepwise(self.launcher.product(U, max(K, K2)), self.launcher.chip)
        arguments = dict(
            p_w=w,
            w_apart=w.stride(0),
            **_vectors("v", v),
            p_w2=w2,
            w2_apart=0 if w2 is None else w2.stride(0),
            **_vectors("v2", v2),
            p_bias=bias,
            **_vectors("add", add),
            **_vectors("tanh", of_tanh),
            **_vectors("out", out),
            p_lengths=layer.lengths,
            T=layer.T,
            B=layer.B,
            U=U,
            K=K,
            K2=K2,
            TANH=tanh,
            BACK=back,
            PRECISION=self.launcher.precision,
            **chosen.options,
        )
        return Launch(linear_kernel, chosen.grid(U, layer.B, 1), arguments)

    def score(self, q: Tensor, keys: Tensor, scores: Tensor, back: bool = False, add: Tensor | None = None) -> Launch:
        """Forward the scores of the keys; back what reaches the weights, to which the values are as keys."""
        arguments = dict(
            p_q=q,
            q_step=_step(q),
            p_keys=keys,
            p_v=None if back else self.v,
            p_absent=None if back else self.absent,
            p_add=add,
            p_scores=scores,
            A=keys.shape[-1],
            BACK=back,
            **self.options,
            **SCORE_TILE,
        )
        grid = self.layer.B, triton.cdiv(self.S, SCORE_TILE["BLOCK_S"]), 1
        return Launch(score_kernel, grid, arguments)

    def context(self, scores: Tensor, weights: Tensor, context: Tensor) -> Launch:
        arguments = dict(
            p_scores=scores,
            p_values=self.values,
            p_weights=weights,
            p_context=context,
            context_step=_step(context),
            M=self.M,
            BLOCK_M=COLUMNS,
            **self.options,
            **CONTEXT_TILE,
        )
        return Launch(context_kernel, (self.layer.B, triton.cdiv(self.M, COLUMNS), 1), arguments)

    def score_back(
        self, reach: Tensor, weights: Tensor, q: Tensor | None, dq: Tensor, dscores: Tensor | None
    ) -> Launch:
        arguments = dict(
            p_reach=reach,
            p_weights=weights,
            p_q=q,
            q_step=0 if q is None else _step(q),
            p_keys=self.keys,
            p_v=self.v,
            p_dscores=dscores,
            p_dq=dq,
            A=self.A,
            BLOCK_A=COLUMNS,
            **self.options,
            **SCORE_BACK_TILE,
        )
        return Launch(score_back_kernel, (self.layer.B, triton.cdiv(self.A, COLUMNS), 1), arguments)

    def keys_back(self, q: Tensor, dscores: Tensor, dkeys: Tensor | None, with_v: bool) -> Tensor | None:
        """Writes the keys' gradient and gives that of v, as far as they are wanted."""
        B, blocks = self.layer.B, triton.cdiv(self.S, KEYS_TILE["BLOCK_S"])
        parts = q.new_empty((B, blocks, self.A), dtype=torch.float32) if with_v else None
        if B > 0:
            keys_back_kernel[(B, blocks, triton.cdiv(self.A, KEYS_TILE["BLOCK_A"]))](
                q, self.keys, self.v, self.absent, dscores, dkeys, parts, **self.options, A=self.A, **KEYS_TILE
            )
        return None if parts is None else parts.sum((0, 1)).to(q.dtype)


@torch.no_grad()
def _forward(
    runtime: Runtime,
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
) -> tuple[Tensor, ...]:
    """See `fastseq.ops.attention_decoder`."""
    steps = STEPS[cell]
    kind = steps.cell
    T, (B, H), G = gates.shape[0], h0.shape, kind.gates
    w_feed = w_feed.contiguous()  # rows of a slice may start anywhere, and are read at every step
    states = h0.new_empty(T + 1, B, H)  # what the first step starts from comes first, here and in feeds
    states[0] = h0
    decoder = _Decoder(kind, runtime, states[1:], keys, values, absent, lengths, w_feed, w_hh, v, w_out)
    layer, to, after = decoder.layer, decoder.launcher, decoder.after
    feeds = decoder.fresh(T + 1, B, decoder.F)
    if feed0 is not None:
        feeds[0] = feed0
    weights = decoder.fresh(T, B, decoder.S)
    save_gates = save_tape and kind.tape > 0
    pre = decoder.fresh(T, B, (kind.tape if save_gates else G) * H)
    cells = decoder.fresh(T, B, H) if save_tape and kind.has_cell else None
    contexts = feeds[1:]
    if after:
        contexts = decoder.fresh(T, B, decoder.M) if save_tape else h0.new_empty(B, decoder.M)
    h = h0.new_empty(2, B, H)
    h[0] = h0
    own = c0 if kind.has_cell else h0
    carry = None if own is None or not kind.carries else own.to(torch.float32, copy=True)
    if B > 0:
        scores = h0.new_empty((B, decoder.S), dtype=torch.float32)
        q = states[1:] if after else states[:-1]
        looking = []
        if w_query is not None:
            queries = h0.new_empty((B, decoder.A), dtype=torch.float32)
            looking, q = [decoder.linear(w_query, q, queries)], queries
        looking += [decoder.score(q, keys, scores), decoder.context(scores, weights, contexts)]
        inner = bias = b_hh
        if b_hh is not None and kind.inner_bias:
            inner, bias = b_hh[-H:].clone(), b_hh.clone()
            bias[-H:] = 0
        stepping = [
            decoder.linear(w_feed, feeds[:-1] if after else feeds[1:], pre[..., : G * H], add=gates, bias=bias),
            to.launch_gates(
                forward_kernel, stepwise(to.product(H, H, steps.stack), to.chip), 1,
                p_pre=pre, p_w=w_hh, p_b=inner if kind.inner_bias else None, p_h=h, p_carry=carry, p_m=None,
                p_y=states[1:], p_cells=cells, p_reset_h=None, p_reset_carry=None,
                STEP=steps.step, G=G, K=H, PRE=pre.shape[-1], SAVE=save_gates,
            ),
        ]  # fmt: skip
        if w_out is None:
            launches = [*looking, *stepping]
        else:
            M = decoder.M
            out = decoder.linear(w_out[:, :M], contexts, feeds[1:], w_out[:, M:], states[1:], tanh=True)
            launches = [*stepping, *looking, out]
        runtime.run(launches, T, layer.device)
    outputs = (
        states[1:],
        feeds[1:],
        weights,
        h[T % 2],
        carry.to(h0.dtype) if kind.has_cell and carry is not None else None,
        pre if save_gates else None,
        cells,
        contexts if after and save_tape else None,
    )
    return tuple(h0.new_empty(0) if t is None else t for t in outputs)


@torch.no_grad()
def _backward(
    runtime: Runtime,
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
) -> tuple[Tensor, ...]:
    """See `fastseq.ops.attention_decoder`."""
    steps = STEPS[cell]
    kind = steps.cell
    decoder = _Decoder(kind, runtime, h, keys, values, absent, lengths, w_feed, w_hh, v, w_out)
    layer, to, after = decoder.layer, decoder.launcher, decoder.after
    T, B, H, G = layer.T, layer.B, layer.H, kind.gates
    P = kind.slots
    h_before = torch.cat([h0.unsqueeze(0), h[:-1]])
    dstate = layer.states(None if dh_n is None else dh_n.unsqueeze(0), H, torch.float32)
    dcell = layer.states(None if dc_n is None else dc_n.unsqueeze(0), H, torch.float32) if kind.has_cell else None
    da = h.new_empty(T + 1, B, P * H)
    da[T] = 0  # what the last step's feed is told
    dcontexts = decoder.fresh(T, B, decoder.M)
    q = h if after else h_before
    queries = dqueries = None
    if w_query is not None:
        queries, dqueries = q @ w_query.t(), decoder.fresh(T, B, decoder.A)
    douts = decoder.fresh(T, B, decoder.F) if after else None
    dscores = decoder.fresh(T, B, decoder.S) if needs[0] or needs[2] else None
    # Where the last gate's share of W_hh h is multiplied, its gradient stands before the pre-activation's own.
    near = (G - 1 if kind.inner_bias else G) * H
    if B > 0:
        w_feed_t = w_feed.t().contiguous()

        def through_feed(out: Tensor, of_tanh: Tensor | None, dgates: Tensor) -> Launch:
            """All that reaches the feed that dgates come from, or through its tanh."""
            rest = (w_feed_t[:, near:], dgates[..., G * H :]) if kind.inner_bias else (None, None)
            return decoder.linear(
                w_feed_t[:, :near], dgates[..., :near], out, *rest, add=dfeeds, of_tanh=of_tanh, back=True
            )

        reach = h.new_empty((B, decoder.S), dtype=torch.float32)
        dq = dstate[0] if dqueries is None else dqueries
        looking = [
            decoder.score(dcontexts, values, reach, back=True, add=dweights),
            decoder.score_back(reach, weights, queries, dq, dscores),
        ]
        if w_query is not None and dqueries is not None:
            looking += [decoder.linear(w_query.t().contiguous(), dqueries, dstate[0], add=dstate[0], back=True)]
        if kind.has_cell and c0 is not None:
            before, behind = torch.cat([c0.unsqueeze(0), cells[:-1]]), cells
        else:
            before, behind = (h_before, None) if kind.carries else (None, h)
        stepping = to.launch_gates(
            backward_kernel, stepwise(to.product(H, G * H), to.chip), 1,
            p_w=w_hh.t().contiguous(), p_v=da, p_dy=dh, p_dcells=None, p_gates=saved_gates if kind.tape else None,
            p_before=before, p_after=behind, p_da=da, p_dh=dstate, p_dc=dcell, p_dreset_h=None, p_dreset_c=None,
            STEP_BACK=steps.step_back, AFTER_IS_Y=not kind.has_cell, PROJECTED=False, K=G * H, V=P * H, A=P,
        )  # fmt: skip
        if w_out is None or douts is None:
            launches = [stepping, through_feed(dcontexts, None, da[:-1]), *looking]
        else:
            w_out_t, M = w_out.t().contiguous(), decoder.M
            launches = [
                through_feed(douts, feeds, da[1:]),
                decoder.linear(w_out_t[:M], douts, dcontexts, back=True),
                decoder.linear(w_out_t[M:], douts, dstate[0], add=dstate[0], back=True),
                *looking,
                stepping,
            ]
        runtime.run(launches, T + 1, layer.device)

    dgates, dgates_h, dkeys, dv = da[:-1], None, None, None
    if kind.inner_bias:
        dgates, dgates_h = torch.cat([dgates[..., :near], dgates[..., G * H :]], -1), dgates[..., : G * H].contiguous()
    if dscores is not None and queries is not None:
        dkeys = torch.empty_like(keys) if needs[0] else None
        dv = decoder.keys_back(queries, dscores, dkeys, needs[2])
    elif dscores is not None and needs[0]:
        dkeys = torch.bmm(dscores.permute(1, 2, 0), q.transpose(0, 1))
    grads = (
        dgates,
        dgates_h,
        dqueries,
        douts,
        dstate[0].to(h.dtype),
        None if dcell is None else dcell[0].to(h.dtype),
        dgates[0] @ w_feed if after else None,
        dkeys,
        torch.bmm(weights.permute(1, 2, 0), dcontexts.transpose(0, 1)) if needs[1] else None,
        dv,
    )
    return tuple(h.new_empty(0) if t is None else t for t in grads)


def _precision(dtype: torch.dtype) -> str:
    """As torch multiplies in a loop over cells, whose products are no layer of cuDNN's."""
    return precision_of_float32() if dtype == torch.float32 else "tf32"


RUNTIME = Runtime(precision=_precision)
forward, backward = functools.partial(_forward, RUNTIME), functools.partial(_backward, RUNTIME)


def _training(
    cell: int, after: bool, additive: bool, H: int = 512, B: int = 64, options: bool = True, precision: str = "tf32"
) -> Callable[[torch.dtype, int], None]:
    """Launches each kernel of a training step once, on tensors without memory, for whoever catches the launches."""

    def run(dtype: torch.dtype, capability: int) -> None:
        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        runtime = Runtime(lambda _: CHIPS[capability], lambda _: precision, once)
        T, S, G, kind = 50, 60, STEPS[cell].cell.gates, STEPS[cell].cell
        state = empty(B, H)
        F = H if after else 2 * H
        arguments = (
            empty(T, B, G * H), state, state if kind.has_cell else None, empty(B, F) if after else None,
            empty(B, S, H), empty(B, S, 2 * H), empty(B, S, of=torch.bool) if options else None,
            empty(B, of=torch.int64) if options else None, empty(G * H, F), empty(G * H, H), empty(G * H),
            empty(H, H) if additive else None, empty(H) if additive else None, empty(F, 3 * H) if after else None, cell,
        )  # fmt: skip
        h, feeds, weights, h_n, _, *tape = _forward(runtime, *arguments, True)
        dc_n = h_n if kind.has_cell else None
        _backward(runtime, h, feeds, weights, h_n, dc_n, *arguments, h, feeds, weights, *tape, [True, True, additive])

    return run


# What is compiled ahead of time and looked at without a GPU (tests/aot.py): the main configurations first, Bahdanau's
# and Luong's, then one of each feature.
AOT = {
    "additive, GRU, H=512, B=64": _training(GRU, after=False, additive=True),
    "product, feeding, LSTM, H=512, B=64": _training(LSTM, after=True, additive=False),
    "additive, feeding, LSTM, H=1024, B=16": _training(LSTM, after=True, additive=True, H=1024, B=16),
    "product, RNN, H=256, B=1, all places": _training(RNN_TANH, False, False, H=256, B=1, options=False),
    "additive, feeding, GRU, H=200, B=3": _training(GRU, True, True, H=200, B=3),
    "additive, LSTM, H=512, B=16, float32 without TF32": _training(LSTM, False, True, B=16, precision="ieee"),
}
