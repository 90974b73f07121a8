"""The op `fastseq::attention`: scaled dot product attention with all that users add to it. Formulas are in
`fastseq.reference.attention`.
"""

import operator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from fastseq.ops.contract import (
    LIBRARY,
    as_dtype,
    autocast_dtype,
    below_autograd,
    computes_in,
    grads_through,
    implement,
    is_plain,
    is_small,
    is_transformed,
    needs_graph,
    new_seed,
    requested,
    rounding,
    why_torch,
    widened,
)
from fastseq.reference import attention as reference
from fastseq.registry import FLOATS, HALF, Impl, Kernel, Op, register

NO_WEIGHTS, EACH_HEAD, AVERAGE = range(3)
# Calls of torch's own options whose scores take fewer multiply-adds are torch's function's; those of one query also
# with a few more, without and with a graph. Measured on Zen 5 with two threads.
LEAST_WORK, LEAST_OF_ONE_QUERY = 2**19, (2**20, 2**21)
_SINGLE = torch.finfo(torch.float32)  # what half precision and float32 are computed in


class Arguments(NamedTuple):
    """What the op takes, beside which weights it shall return.

    Attributes:
        query: [N, H, L, E], any strides, any floating dtype, which key and value have too; with `cu_seqlens_q` it is
            [1, H, all queries, E].
        key: [N, Hk, S, E], where H is a multiple of Hk; with `cu_seqlens_k` [1, Hk, all keys, E].
        value: [N, Hk, S, Ev]
        mask: broadcastable to [N, H, L, S]; bool, true where a key takes part, or added to the scores, of query's dtype
            or, beside half precision, float32.
        key_padding: [N, S] bool, true where a key is left out.
        slopes: [H] of ALiBi, of query's dtype or, beside half precision, float32.
        cu_seqlens_q: [sequences + 1] int64 on the CPU, where each sequence begins among the queries, and its end.
        cu_seqlens_k: likewise among the keys.
        seed: int64 of one element on the CPU, what dropout draws from; there if dropout_p > 0.
        scale: what scores are multiplied by.
        softcap: the bound of scores, 0 for none.
        dropout_p: the probability of a weight to be dropped.
        left, right: how many keys before and after its own place a query sees; negative for all.
        bottom_right: whether the last query's own place is the last key, or the first query's the first key.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    key_padding: Tensor | None = None
    slopes: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    left: int = -1
    right: int = -1
    bottom_right: bool = False


class Outputs(NamedTuple):
    """What the op gives.

    Attributes:
        out: [N, H, L, Ev], query's dtype, 0 where every key is left out.
        lse: [N, H, L] log of the sum of exp(scores), before dropout; -inf where every key is left out. Query's dtype,
            or float32 if that is half precision.
        weights: what values are summed with, dropout included: [N, H, L, S], or their mean [N, L, S], or no elements.
            lse's dtype.
    """

    out: Tensor
    lse: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Case:
    """A shape and the options that every implementation is tested on."""

    N: int
    H: int
    L: int
    S: int
    E: int
    Ev: int = 0  # E unless given
    Hk: int = 0  # H unless given
    mask: str = ""  # "bool" or "float", then the dimensions that it has of n, h, l and s
    padding: bool = False
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    slopes: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    varlen: bool = False
    transposed: bool = False  # in memory [N, L, H, E]

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name in ("N", "H", "Hk", "L", "S", "E", "Ev") if (size := getattr(self, name))]
        flags = [
            f.name if f.type is bool else f"{f.name}_{getattr(self, f.name)}".replace(" ", "_")
            for f in fields(self)[7:]
            if getattr(self, f.name) != f.default
        ]
        return "-".join(["_".join(sizes), *flags])

    def arguments(self, device: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments."""
        generator = torch.Generator().manual_seed(seed)
        N, H, L, S = self.N, self.H, self.L, self.S

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        def heads(count: int, length: int, width: int) -> Tensor:
            return (
                normal(N, length, count, width).transpose(1, 2) if self.transposed else normal(N, count, length, width)
            )

        Hk = self.Hk or H
        query, key, value = heads(H, L, self.E), heads(Hk, S, self.E), heads(Hk, S, self.Ev or self.E)
        mask = None
        if self.mask:
            kind, _, dimensions = self.mask.partition(" ")
            shape = [size if name in dimensions else 1 for name, size in zip("nhls", (N, H, L, S), strict=True)]
            mask = normal(*shape)
            if kind == "bool":
                mask = mask > -0.5
        ends: Any = (None, None)
        if self.varlen:
            cuts = [torch.randint(0, size + 1, (3,), generator=generator).sort().values for size in (L, S)]
            ends = tuple(torch.tensor([0, *c.tolist(), size]) for c, size in zip(cuts, (L, S), strict=True))
        return Arguments(
            query,
            key,
            value,
            mask,
            (torch.rand(N, S, generator=generator) < 0.3).to(device) if self.padding else None,
            torch.linspace(0.1, 0.5, H, dtype=dtype, device=device) if self.slopes else None,
            ends[0],
            ends[1],
            torch.tensor(0x123456789ABCDEF) if self.dropout else None,
            self.E**-0.5,
            self.softcap,
            self.dropout,
            self.left,
            self.right,
            self.bottom_right,
        )


# Small ones for the self-check of a new machine first; then what exercises tiles, tails, splits and layouts.
SELF_CHECK_CASES = [
    Case(1, 1, 1, 1, 1),
    Case(2, 3, 13, 37, 20, Ev=9, transposed=True),
    Case(1, 2, 150, 150, 16, right=0),
    Case(2, 4, 33, 70, 24, Hk=2, mask="float hls", padding=True, right=0, bottom_right=True, dropout=0.2),
    Case(2, 2, 20, 140, 8, mask="bool nls", left=30, right=5, slopes=True, softcap=2.0),
    Case(1, 3, 60, 80, 12, varlen=True, right=0),
    Case(1, 4, 2, 300, 32, Hk=1, padding=True),
]
CASES = [
    *SELF_CHECK_CASES,
    Case(1, 1, 257, 259, 64),
    Case(2, 2, 64, 64, 64, transposed=True),
    Case(3, 2, 63, 65, 80, Ev=40, right=0),
    Case(1, 2, 300, 200, 17, right=0, bottom_right=True),  # whose first rows see nothing
    Case(1, 2, 200, 300, 17, right=0, bottom_right=True),
    Case(1, 2, 150, 150, 16, left=40, right=3, softcap=1.5),
    Case(1, 1, 140, 600, 128, left=64, right=0, bottom_right=True),
    Case(2, 6, 40, 50, 33, Hk=3),
    Case(2, 6, 5, 513, 33, Hk=2, right=0, bottom_right=True),
    Case(2, 3, 1, 1000, 64, slopes=True, bottom_right=True),
    Case(2, 3, 45, 131, 16, mask="bool nhls"),
    Case(2, 3, 45, 131, 16, mask="bool ns"),
    Case(2, 3, 45, 131, 16, mask="bool l"),
    Case(2, 3, 45, 131, 16, mask="float nhls"),
    Case(2, 3, 45, 131, 16, mask="float ns"),
    Case(2, 3, 45, 131, 16, mask="float hl"),
    Case(2, 3, 45, 131, 16, mask="float h"),
    Case(2, 3, 45, 131, 16, mask="float ls", right=0, slopes=True),
    Case(2, 4, 45, 131, 16, Hk=2, mask="float hls", softcap=1.5, dropout=0.1),
    Case(2, 2, 130, 140, 48, padding=True, right=0),
    Case(2, 2, 70, 270, 24, dropout=0.5),
    Case(1, 2, 30, 40, 24, dropout=1.0),
    Case(1, 2, 300, 300, 24, varlen=True, dropout=0.1, slopes=True),
    Case(1, 2, 400, 300, 24, varlen=True, left=20, right=3, bottom_right=True),
    Case(0, 2, 3, 4, 8),
    Case(2, 2, 0, 4, 8),
    Case(2, 2, 3, 0, 8),
]


def _self_check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the small cases against the reference in float64."""
    tf32 = device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    for case in SELF_CHECK_CASES:
        arguments = case.arguments(device, dtype)
        wide = widened(arguments)
        for weights in (NO_WEIGHTS, EACH_HEAD, AVERAGE) if not case.varlen else (NO_WEIGHTS,):
            outputs = kernel.forward(*arguments, weights)
            expected = reference.forward(*wide, weights)
            for got, want in zip(outputs, expected, strict=True):
                torch.testing.assert_close(got, want.to(got.dtype), **rounding(want, got.dtype, 2, tf32))
        grads = grads_like(Outputs(*expected))
        needs = [True, True, True, wide.mask is not None and wide.mask.is_floating_point()]
        sent = [g.to(o.dtype) for g, o in zip(grads, outputs[:2], strict=True)]
        ours = kernel.backward(*sent, *arguments, *outputs[:2], needs)
        given: Any = (*grads, *wide, *expected[:2], needs)
        theirs = reference.backward(*given)
        for got, want in zip(ours, theirs, strict=True):
            # A gradient sums up to N*H*L terms, which the kernels add in another order than the reference.
            tolerance = dict(rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-7)
            torch.testing.assert_close(got, want.to(got.dtype), **(rounding(want, got.dtype, 4, tf32) or tolerance))


def _needs_width(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> str | None:
    return None if query.shape[3] and value.shape[3] else "it needs at least one feature of a head"


def _needs_narrow_heads(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> str | None:
    widths = (query.shape[3], value.shape[3])
    return None if min(widths) >= 1 and max(widths) <= 256 else f"it takes heads of 1 to 256 features, not {widths}"


TABLE = register(
    Op(
        "attention",
        [
            Impl(
                "cpp",
                "fastseq_native::attention",
                devices=frozenset({"cpu"}),
                dtypes=FLOATS | HALF,
                needs=_needs_width,
                verified=frozenset({"avx2", "avx512", "portable"}),
            ),
            Impl(
                "numba",
                "fastseq.kernels.numba.attention",
                devices=frozenset({"cpu"}),
                dtypes=FLOATS,
                needs=_needs_width,
                verified=frozenset({"avx2", "avx512", "portable"}),
            ),
            Impl(
                "triton",
                "fastseq.kernels.triton.attention",
                devices=frozenset({"cuda"}),
                dtypes=HALF | {torch.float32},
                needs=_needs_narrow_heads,
            ),
            Impl("reference", reference.__name__),
        ],
        _self_check,
    )
)

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_padding, Tensor? slopes, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? seed, float scale, float softcap, float dropout_p, int left, int right,"
    " bool bottom_right"
)
LIBRARY.define(f"attention({_ARGUMENTS}, int return_weights) -> (Tensor out, Tensor lse, Tensor weights)")
LIBRARY.define(
    f"attention_backward(Tensor? dout, Tensor? dlse, {_ARGUMENTS}, Tensor out, Tensor lse, bool[] needs)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask)"
)

# The bodies of the ops have no annotations: torch.library would read schemas from them.


def _forward(*args):  # type: ignore[no-untyped-def]
    query = args[0]
    return TABLE.select(query.device.type, query.dtype, *args).forward(*args)


def _backward(*args):  # type: ignore[no-untyped-def]
    query = args[2]
    return TABLE.select(query.device.type, query.dtype, *args[2:]).backward(*args)


def empty_like_heads(t, *shape):  # type: ignore[no-untyped-def]
    """[N, H, L, width] in the order in memory that t has: heads before or after the places."""
    if t.stride(1) < t.stride(2):
        return t.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
    return t.new_empty(shape)


def _forward_fake(query, key, value, *rest):  # type: ignore[no-untyped-def]
    N, H, L = query.shape[:3]
    S, wanted = key.shape[2], rest[-1]
    shape = (0,) if wanted == NO_WEIGHTS else (N, H, L, S) if wanted == EACH_HEAD else (N, L, S)
    lse = query.new_empty(N, H, L, dtype=torch.float32 if query.dtype in HALF else query.dtype)
    return empty_like_heads(query, N, H, L, value.shape[3]), lse, lse.new_empty(shape)


def _backward_fake(_dout, _dlse, query, key, value, mask, *rest):  # type: ignore[no-untyped-def]
    needs = rest[-1]
    nothing = query.new_empty(0)
    grads = [
        empty_like_heads(t, *t.shape) if need else nothing
        for t, need in zip((query, key, value), needs[:3], strict=True)
    ]
    return *grads, mask.new_empty(mask.shape) if needs[3] else nothing


def _autograd(*args):  # type: ignore[no-untyped-def]
    if needs_graph(*args[:4]):
        return _Function.apply(False, *args)
    with below_autograd():
        return torch.ops.fastseq.attention(*args)


implement("attention", _forward, _backward, _autograd, _forward_fake, _backward_fake)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain, *args):  # type: ignore[no-untyped-def]
        with below_autograd():
            out, lse, weights = (_forward if plain else torch.ops.fastseq.attention)(*args)
        ctx.plain, ctx.options = plain, args[9:]
        ctx.save_for_backward(*args[:9], out, lse)
        ctx.set_materialize_grads(False)
        if args[-1] == NO_WEIGHTS:
            ctx.mark_non_differentiable(weights)
        return out, lse, weights

    @staticmethod
    def backward(ctx, dout, dlse, dweights):  # type: ignore[no-untyped-def]
        *tensors, out, lse = ctx.saved_tensors
        *options, return_weights = ctx.options
        needs = list(ctx.needs_input_grad[1:5])
        grads = [g for g in (dout, dlse, dweights) if g is not None]
        # Only the reference has a graph to give, takes batched gradients, and gradients of weights.
        if torch.is_grad_enabled() or dweights is not None or is_transformed(*grads):
            rest = (*tensors[4:], *options, return_weights)
            found = grads_through(reference.forward, tensors[:4], rest, needs, (dout, dlse, dweights))
        else:
            plain = ctx.plain and is_plain(*tensors[:4], *grads)
            compute = _backward if plain else torch.ops.fastseq.attention_backward
            ours = compute(dout, dlse, *tensors, *options, out, lse, needs)
            found = [g if need else None for g, need in zip(ours, needs, strict=True)]
        return None, *found, *[None] * 12


def attention(arguments: Arguments, return_weights: int = NO_WEIGHTS) -> Outputs:
    """The op, for arguments that have been checked."""
    tensors = arguments[:4]
    if is_plain(*tensors):
        if needs_graph(*tensors):
            return Outputs(*_Function.apply(True, *arguments, return_weights))
        return Outputs(*_forward(*arguments, return_weights))
    if is_transformed():
        return Outputs(*reference.forward(*arguments, return_weights))
    return Outputs(*torch.ops.fastseq.attention(*arguments, return_weights))


def compute_dtype(given: torch.dtype, query: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that query, key and value of this one shall have for the op.

    On CPUs half precision becomes float32 where a graph is recorded: gradients of scores are small differences from
    `out`, and what it loses when it is rounded would be most of them.
    """
    compute = computes_in(TABLE.name, query.device.type, given)
    if compute in HALF and query.device.type == "cpu" and needs_graph(query, *others):
        return torch.float32
    return compute


def wanted_weights(wanted: bool, average: bool) -> int:
    """What the op calls the weights that a user asks for."""
    return NO_WEIGHTS if not wanted else AVERAGE if average else EACH_HEAD


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    bottom_right: bool = False,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    average_weights: bool = False,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, and what one has to do without there.

    All arguments go together, but for those that are said to exclude each other. Where no kernel of ours serves (see
    `fastseq info`), torch's own function takes the calls that it can take; the reference takes the others. Calls that
    are too small for a kernel to pay are torch's function's, too, if it can take them.

    Args:
        query: [N, ..., H, L, E], or [H, L, E], or [L, E]; with `cu_seqlens_q` [H, all queries, E]. All three may be
            nested tensors of the jagged layout, [N, H, places, E], as `nested.transpose(1, 2)` makes them of
            [N, places, H, E]: each sequence by itself, without padding. Excludes what `cu_seqlens_q` excludes.
        key: [N, ..., H, S, E]; with `enable_gqa` it may have fewer heads, which divide H.
        value: [N, ..., H, S, Ev]
        attn_mask: broadcastable to [N, ..., H, L, S]. A boolean one is true where a key takes part; one of query's
            dtype is added to the scores, and gets a gradient if it asks for one. One of `torch.nn.attention.bias` is
            taken as the bound that it stands for.
        dropout_p: the probability of a weight to be dropped, to the next 1/65536. What is dropped follows torch's
            default generator of the CPU, with other draws than torch's.
        is_causal: whether a query sees only keys up to its own place.
        scale: of the scores; 1/sqrt(E) by default.
        enable_gqa: whether groups of query's heads share a head of key and value.
        key_padding_mask: [N, S] bool, true where a key is left out, as in `torch.nn.MultiheadAttention`.
        window_size: (left, right), how many keys before and after its own place a query sees; -1 for all. With
            is_causal, right is 0.
        bottom_right: whether the last query's own place is the last key, as in decoding, or the first query's the
            first key, as in torch. It counts for is_causal, window_size and alibi_slopes.
        alibi_slopes: [H], slope * distance is taken from the scores (Press et al., arXiv:2108.12409). No gradient.
        softcap: scores become softcap * tanh(scores / softcap), before biases and masks; 0 for not, else a number that
            float32 has.
        cu_seqlens_q: [sequences + 1] integers, sequences of various lengths one after the other, as in FlashAttention:
            sequence i has queries cu_seqlens_q[i] to cu_seqlens_q[i+1]. Excludes attn_mask, key_padding_mask, weights.
        cu_seqlens_k: the same for the keys; by default cu_seqlens_q.
        return_lse: whether to return log(sum(exp(scores))), [N, ..., H, L], too.
        return_weights: whether to return what values were summed with, dropout included, [N, ..., H, L, S], too.
        average_weights: whether those shall be averaged over the heads, [N, ..., L, S].

    Returns:
        [N, ..., H, L, Ev], and lse and weights in this order if asked for. A query whose keys are all left out gets
        zeros, its lse is -inf, and its gradients are zeros. What stands in keys and values that are left out has no
        effect on results. (Where torch's function serves, it is as torch has it.) Of nested tensors, out and lse are
        nested, with query's ragged structure.

    Raises:
        RuntimeError: with torch's own message, for what torch's function refuses.
        ValueError, TypeError: for the arguments by keyword, with the argument's name.
    """
    left, right = _window(window_size)
    _check_options(dropout_p, softcap, bottom_right, return_lse, return_weights, average_weights)
    bias: Any = attn_mask if is_causal_bias(attn_mask) else None
    mask = attn_mask if bias is None else None
    torchs_own = (
        (mask is None or not is_causal)
        and key_padding_mask is None
        and (left, right) == (-1, -1)
        and not bottom_right
        and alibi_slopes is None
        and softcap == 0
        and cu_seqlens_q is None
        and cu_seqlens_k is None
        and not (return_lse or return_weights or average_weights)
    )
    tensors: Any = (query, key, value)
    if torchs_own and attn_mask is None and not dropout_p and _is_small(*tensors):
        return torchs_attention(*tensors, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    nested = isinstance(query, Tensor) and query.is_nested
    varlen = "nested tensors" if nested else "cu_seqlens_q"
    if nested:
        for name, other in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if other is not None:
                raise ValueError(f"{name} cannot be given with nested tensors")
        if (rows := _rows(*tensors)) is not None:
            query, key, value, cu_seqlens_q, cu_seqlens_k = rows
    low = autocast_dtype(query) if isinstance(query, Tensor) else None
    sound = not (nested and attn_mask is not None) and _is_sound(query, key, value, mask, enable_gqa, low is not None)
    if sound and bias is not None:
        sound = not is_causal and (bias.seq_len_q, bias.seq_len_kv) == (query.shape[-2], key.shape[-2])
    good = sound and are_options(dropout_p, is_causal, scale, enable_gqa)
    if not good or (
        torchs_own
        and not (nested and query.device.type == "cpu")  # for which torch has next to nothing
        and why_torch(TABLE, query.device.type, query.dtype) is not None
    ):
        # torch's own checks say what is wrong, if something is, in torch's own words.
        result = torchs_attention(
            *tensors,
            attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal if mask is None else False,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        if good or (torchs_own and not sound and requested(TABLE.name) is None):
            return result
        if not sound:
            shapes = ", ".join(
                f"{name} {'nested' if t.is_nested else list(t.shape)}"
                for name, t in zip(("query", "key", "value", "attn_mask"), (*tensors, attn_mask), strict=True)
                if t is not None
            )
            raise ValueError(
                f"query, key, value and attn_mask must be plain floating tensors that fit together: {shapes}"
            )
    lead, (q, k, v) = _four_dimensional(query, key, value)
    N, H, L, S = *q.shape[:3], k.shape[2]
    if bias is not None:
        is_causal, from_last = True, bias.variant.name == "LOWER_RIGHT"
        placed = bottom_right or (left, right) != (-1, -1) or alibi_slopes is not None
        if placed and from_last != bottom_right and L != S:
            raise ValueError(f"bottom_right must be {from_last} with an attn_mask of variant {bias.variant.name}")
        bottom_right = from_last
    right = 0 if is_causal else right
    for name, given in (
        ("alibi_slopes", alibi_slopes),
        ("key_padding_mask", key_padding_mask),
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k),
    ):
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {_kind(given)}")
        if given.device != query.device and not name.startswith("cu_"):
            raise ValueError(f"{name} must be on query's device, {query.device}, got {given.device}")
        if given.is_meta and not query.is_meta:
            raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
    if alibi_slopes is not None and not (alibi_slopes.shape == (H,) and alibi_slopes.is_floating_point()):
        got = f"{alibi_slopes.dtype} {list(alibi_slopes.shape)}"
        raise ValueError(f"alibi_slopes must be floating, [{H}], one for each head of query, got {got}")
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    if cu_seqlens_k is not None:
        if cu_seqlens_q is None:
            raise ValueError("cu_seqlens_k needs cu_seqlens_q")
        for name, other in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if other is not None:
                raise ValueError(f"{name} cannot be given with {varlen}")
        if return_weights:
            raise ValueError(f"return_weights cannot be given with {varlen}")
        if N != 1:
            raise ValueError(f"with cu_seqlens_q, query must be [H, all queries, E], got {list(query.shape)}")
        names = ("query's offsets", "key's offsets") if nested else ("cu_seqlens_q", "cu_seqlens_k")
        cu_seqlens_q = _checked_ends(names[0], cu_seqlens_q, L)
        cu_seqlens_k = _checked_ends(names[1], cu_seqlens_k, S)
        if len(cu_seqlens_q) != len(cu_seqlens_k):
            got = f"{len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have as many entries as one another, got {got}")
    if key_padding_mask is not None:
        batch = lead[:-1] if len(lead) > 1 else ()
        expected = (*batch, S)
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != expected:
            got = f"{key_padding_mask.dtype} {list(key_padding_mask.shape)}"
            raise ValueError(f"key_padding_mask must be torch.bool {list(expected)}, got {got}")
        key_padding_mask = key_padding_mask.reshape(N, S)

    wanted = low or query.dtype
    # To round what autocast would lower gains nothing on CPUs, whose kernels compute in float32.
    exact = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype
    compute = compute_dtype(query.dtype if exact else wanted, query, key, value, mask)
    single = torch.float32 if compute in HALF else compute
    arguments = Arguments(
        as_dtype(q, compute),
        as_dtype(k, compute),
        as_dtype(v, compute),
        _mask(mask, lead, compute, single),
        key_padding_mask,
        None if alibi_slopes is None else alibi_slopes.detach().to(single),
        cu_seqlens_q,
        cu_seqlens_k,
        new_seed(dropout_p),
        (query.shape[-1] ** -0.5 if query.shape[-1] else 0.0) if scale is None else float(scale),
        float(softcap),
        float(dropout_p),
        left,
        right,
        bottom_right,
    )
    out, lse, weights = attention(arguments, wanted_weights(return_weights, average_weights))
    out = as_dtype(out, wanted)
    results = [out if len(lead) == 2 else out.reshape(*lead, L, v.shape[3])]
    if return_lse:
        results.append(lse.reshape(*lead, L))
    if return_weights:
        results.append(weights.to(wanted).reshape(*(lead[:-1] if average_weights else lead), L, S))
    if nested:
        results = [torch.nested.nested_tensor_from_jagged(t, tensors[0].offsets(), jagged_dim=2) for t in results]
    return results[0] if len(results) == 1 else tuple(results)


def torchs_attention(*args: Any, **kwargs: Any) -> Tensor:
    """torch's own function, whatever stands in its place in torch.nn.functional."""
    mask: Any = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if is_causal_bias(mask):  # which knows torch's function by that place only
        return mask._dispatch(*args, **kwargs)
    return torch._C._nn.scaled_dot_product_attention(*args, **kwargs)


def is_causal_bias(mask: Any) -> bool:
    """Whether it is one of torch.nn.attention.bias; to import that would import torch._dynamo (over a second)."""
    return type(mask).__module__ == "torch.nn.attention.bias"


def _rows(query: Any, key: Any, value: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Nested tensors [N, H, places, E] as [H, all places, E], and where sequences begin; None if they are others."""
    for t in (query, key, value):
        if not isinstance(t, Tensor) or t.layout != torch.jagged or t.dim() != 4:
            return None
    # Nor with places elsewhere, or holes between sequences.
    if any(t._ragged_idx != 2 or t.lengths() is not None for t in (query, key, value)):
        return None
    ends, keys, values = (t.offsets() for t in (query, key, value))
    if len(ends) != len(keys) or not (keys is values or torch.equal(keys, values)):
        return None
    return query.values(), key.values(), value.values(), ends, keys


def _is_sound(query: Any, key: Any, value: Any, mask: Any, enable_gqa: bool, autocast: bool) -> bool:
    """Whether torch's function would take these."""
    for t in (query, key, value) if mask is None else (query, key, value, mask):
        if not isinstance(t, Tensor) or t.device != query.device or t.layout != torch.strided or t.is_nested:
            return False
    if min(query.dim(), key.dim(), value.dim()) < 2 or not query.dtype.is_floating_point:
        return False
    tensors = (query, key, value)
    if not (all(map(_is_lowered, tensors)) if autocast else query.dtype == key.dtype == value.dtype):
        return False
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return False
    leads = [t.shape[:-2] for t in tensors]
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            return False
        heads = [lead[-1] for lead in leads]
        if heads != [0, 0, 0] and (0 in heads or heads[0] % heads[1] or heads[0] % heads[2]):
            return False
        leads = [lead[:-1] for lead in leads]
    lead = _broadcast(*leads)
    if lead is None or mask is None:
        return lead is not None
    if enable_gqa:
        lead = (*lead, query.shape[-3])
    if not (mask.dtype in (torch.bool, torch.float32, query.dtype) or (autocast and _is_lowered(mask))):
        return False
    shape = (*lead, query.shape[-2], key.shape[-2])
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    return mask.dim() <= len(shape) and all(size == 1 or size == whole for size, whole in sizes)


def _is_small(query: Any, key: Any, value: Any) -> bool:
    """Whether torch's function is ahead: what stands around our kernel takes longer than its own."""
    if query is None or key is None or value is None or not is_plain(query, key, value):
        return False
    if query.is_nested or key.is_nested or min(query.dim(), key.dim()) < 2 or 0 in (query.numel(), key.numel()):
        return False
    least = LEAST_OF_ONE_QUERY[needs_graph(query, key, value)] if query.shape[-2] == 1 else LEAST_WORK
    return is_small(TABLE.name, query.numel() * key.shape[-2], least, query)


def _kind(given: Any) -> str:
    return str(given.layout) if isinstance(given, Tensor) else type(given).__name__


def _is_lowered(t: Tensor) -> bool:
    """Whether autocast changes its dtype."""
    return t.dtype.is_floating_point and t.dtype != torch.float64


def are_options(dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> bool:
    """Whether torch's function surely takes these."""
    return (
        isinstance(dropout_p, (int, float))
        and 0 <= dropout_p <= 1
        and isinstance(is_causal, bool)
        and (scale is None or isinstance(scale, (int, float)))
        and isinstance(enable_gqa, bool)
    )


def _broadcast(shape: tuple[int, ...], *others: tuple[int, ...]) -> tuple[int, ...] | None:
    """What the shapes broadcast to, or None. Mostly they are alike, and torch's function is long-winded."""
    if all(other == shape for other in others):
        return tuple(shape)
    try:
        return tuple(torch.broadcast_shapes(shape, *others))
    except RuntimeError:
        return None


def _four_dimensional(*tensors: Tensor) -> tuple[tuple[int, ...], list[Tensor]]:
    """Query, key and value as [N, heads, ., .], and the dimensions that N and heads of query stand for."""
    query, key, value = tensors
    if query.dim() == 4 and query.shape[:2] == key.shape[:-2] == value.shape[:-2]:
        return tuple(query.shape[:2]), [query, key, value]
    rank = max(t.dim() for t in tensors)
    batch = _broadcast(*(t.shape[:-3] for t in tensors))
    assert batch is not None
    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in tensors]
    H = max(heads) if 0 not in heads else 0
    # Those of key and value may be fewer, if they are as many.
    shared = heads[1] if heads[1] == heads[2] and H and H % heads[1] == 0 else H
    shaped = []
    for t, count, wanted in zip(tensors, heads, (H, shared, shared), strict=True):
        if t.dim() == 2:
            t = t.unsqueeze(0)
        if count != wanted:
            t = t.repeat_interleave(wanted // count, -3)
        t = t.expand(*batch, *t.shape[-3:])
        shaped.append(t.unsqueeze(0) if t.dim() == 3 else t if t.dim() == 4 else t.flatten(0, -4))
    return (*batch, H) if rank > 2 else (), shaped


def _mask(mask: Tensor | None, lead: tuple[int, ...], *dtypes: torch.dtype) -> Tensor | None:
    """The mask, boolean or of one of the dtypes, with four dimensions; those that it does not tell apart are 1."""
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, *dtypes):
        mask = mask.to(dtypes[0])
    mask = mask[(None,) * max(0, 4 - mask.dim())]
    batch, own = lead[:-1], mask.shape[:-3]
    if len(batch) > 1:
        mask = mask.expand(*(batch if any(size != 1 for size in own) else own), *mask.shape[-3:]).flatten(0, -4)
    return mask


def _window(window_size: Any) -> tuple[int, int]:
    """window_size as two integers."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be (left, right), two integers, got {window_size!r}")
    left, right = window_size
    if type(left) is not int or type(right) is not int:
        if not all(isinstance(w, SupportsIndex) and not isinstance(w, bool) for w in window_size):
            raise TypeError(f"window_size must be (left, right), two integers, got {window_size!r}")
        left, right = (w if isinstance(w, torch.SymInt) else operator.index(w) for w in window_size)
    if left < -1 or right < -1:
        raise ValueError(f"window_size must be (left, right), each at least -1, got {tuple(window_size)}")
    # Nothing is farther away, and sums with places do not overflow.
    return min(left, 2**62), min(right, 2**62)


def _check_options(
    dropout_p: Any, softcap: Any, bottom_right: Any, return_lse: Any, return_weights: Any, average_weights: Any
) -> None:
    if isinstance(dropout_p, (int, float)) and not dropout_p >= 0:  # of which torch says something else, or nothing
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a number, got {softcap!r}")
    if softcap != 0 and not _SINGLE.tiny <= softcap <= _SINGLE.max:
        raise ValueError(f"softcap must be 0 or within [{_SINGLE.tiny:.2g}, {_SINGLE.max:.2g}], got {softcap}")
    flags = (bottom_right, return_lse, return_weights, average_weights)
    for name, flag in zip(("bottom_right", "return_lse", "return_weights", "average_weights"), flags, strict=True):
        if type(flag) is not bool:
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    if average_weights and not return_weights:
        raise ValueError("average_weights says which weights to return: it needs return_weights")


def _checked_ends(name: str, ends: Tensor, count: int) -> Tensor:
    """cu_seqlens as the op wants them."""
    if ends.dim() != 1 or ends.dtype not in (torch.int32, torch.int64) or len(ends) == 0:
        raise ValueError(f"{name} must be int32 or int64 [sequences + 1], got {ends.dtype} {list(ends.shape)}")
    ends = ends.to("cpu", torch.int64)
    if not torch.compiler.is_compiling():  # when compiled, the kernel checks it
        values = ends.tolist()
        if values != sorted(values) or values[0] != 0 or values[-1] != count:
            raise ValueError(f"{name} must rise from 0 to {count}, the number of rows, got {values}")
    return ends


def grads_like(outputs: Outputs) -> list[Any]:
    """Some gradient for each of out and lse."""
    return [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in outputs[:2]]
