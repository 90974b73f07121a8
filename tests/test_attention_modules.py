"""fastseq.nn.MultiheadAttention beside torch.nn's: the same results, gradients, errors and life cycle."""

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import require_kernel
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves, tree_map_only

import fastseq
from fastseq.ops.attention import TABLE, Arguments

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched",  # torch's, about masks of two kinds, which the op takes
    "ignore:The PyTorch API of nested tensors",
)

OPTIONS = [
    dict(),
    dict(bias=False),
    dict(kdim=5, vdim=7),
    dict(add_bias_kv=True),
    dict(add_zero_attn=True),
    dict(kdim=12, vdim=7, bias=False, add_bias_kv=True, add_zero_attn=True),
]
N, L, S, E, H = 2, 4, 5, 12, 3
FUNCTIONS = (fastseq.functional.multi_head_attention_forward, F.multi_head_attention_forward)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture
def ours_serves() -> None:
    """Skips where torch's path would be compared with itself."""
    require_kernel(TABLE, "cpu", torch.float32)


def pair(E: int = E, H: int = H, **options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    theirs, ours = nn.MultiheadAttention(E, H, **options), fastseq.nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases are zeros at first
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module: nn.MultiheadAttention, same: str = "", batch: int | None = N, dtype: Any = None) -> list[Tensor]:
    """Query, key and value: one tensor ("qkv"), two ("kv"), or three."""
    dtype = dtype or module.out_proj.weight.dtype

    def normal(places: int, features: int) -> Tensor:
        x = torch.randn(places, *(() if batch is None else (batch,)), features).to(dtype)
        return x.transpose(0, 1).contiguous() if module.batch_first and batch is not None else x

    query = normal(L, E)
    key = query if same == "qkv" else normal(S, module.kdim)
    return [query, key, key if same else normal(S, module.vdim)]


def boolean(*shape: int) -> Tensor:
    """What is left out, never everything."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def masks(kind: str, padding: str, places: tuple[int, int], batch: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Masks by the names of torch's arguments: kind is "" or "bool" or "float" and its number of dimensions."""
    found = {}
    for name, what, shape in (
        ("attn_mask", kind, ((batch or 1) * H, *places) if "3" in kind else places),
        ("key_padding_mask", padding, (places[1],) if batch is None else (batch, places[1])),
    ):
        if what:
            found[name] = boolean(*shape) if what.startswith("bool") else torch.randn(shape, dtype=dtype)
    return found


def leaves(value: Any) -> Any:
    """The same with tensors that gradients can be asked for, one for each."""
    made: dict[int, Tensor] = {}
    return tree_map_only(
        Tensor,
        lambda t: made.setdefault(id(t), t.detach().clone().requires_grad_(t.is_floating_point())),
        value,
    )


def run(call: Callable, parameters: list[Tensor], args: list, kwargs: dict) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of everything that can have one."""
    args, kwargs = leaves((args, kwargs))
    outputs = tree_leaves(call(*args, **kwargs))
    given = [t for t in outputs if t is not None]
    grads = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in given]
    tensors = [t for t in [*tree_leaves((args, kwargs)), *parameters] if isinstance(t, Tensor) and t.requires_grad]
    once = list({id(t): t for t in tensors}.values())
    return outputs, list(torch.autograd.grad(given, once, grads, allow_unused=True))


def assert_same(got: tuple[list[Tensor], list[Tensor]], want: tuple[list[Tensor], list[Tensor]]) -> None:
    torch.testing.assert_close(got[0], want[0])
    for mine, its in zip(got[1], want[1], strict=True):
        # Sums over rows and places in another order than torch's; torch has zeros for what has no effect, or nothing.
        if mine is None or its is None:
            assert mine is its or not (its if mine is None else mine).any()
        else:
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=2e-5)


WAYS = list(
    itertools.product(
        [dict(need_weights=False), dict(), dict(average_attn_weights=False)],
        ["", "bool 2", "bool 3", "float 2", "float 3"],
        ["", "bool", "float"],
        ["", "kv", "qkv"],
        [(True, N), (False, N), (True, None)],
    )
)


@each_options
@each_dtype
def test_results_and_gradients(ours_serves: None, options: dict, dtype: torch.dtype) -> None:
    first = OPTIONS.index(options) + 3 * (dtype == torch.float64)
    for wanted, kind, padding, same, (batch_first, batch) in WAYS[first::19]:
        theirs, ours = pair(batch_first=batch_first, dtype=dtype, **options)
        if theirs.kdim != E or theirs.vdim != E:
            same = ""
        args = inputs(theirs, same, batch)
        kwargs = {**wanted, **masks(kind, padding, (L, L if same == "qkv" else S), batch, dtype)}
        want = run(theirs, list(theirs.parameters()), args, kwargs)
        assert_same(run(ours, list(ours.parameters()), args, kwargs), want)
        with torch.no_grad():
            for mode in (True, False):
                torch.testing.assert_close(ours.train(mode)(*args, **kwargs), theirs.train(mode)(*args, **kwargs))


@each_options
@each_dtype
def test_function(ours_serves: None, options: dict, dtype: torch.dtype) -> None:
    module, _ = pair(dtype=dtype, **options)
    separate = module.in_proj_weight is None
    for wanted, kind, padding, same, (_, batch) in WAYS[OPTIONS.index(options) :: 37]:
        args = inputs(module, "" if separate else same, batch)
        places = (L, L if args[0] is args[1] else S)

        def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
            return function(
                *args,
                E,
                H,
                module.in_proj_weight,
                module.in_proj_bias,
                module.bias_k,
                module.bias_v,
                module.add_zero_attn,
                0.0,
                module.out_proj.weight,
                module.out_proj.bias,
                use_separate_proj_weight=separate,
                q_proj_weight=module.q_proj_weight,
                k_proj_weight=module.k_proj_weight,
                v_proj_weight=module.v_proj_weight,
                **kwargs,
            )

        given = (list(module.parameters()), args, {**wanted, **masks(kind, padding, places, batch, dtype)})
        assert_same(*(run(partial(call, function), *given) for function in FUNCTIONS))


def test_function_with_static_keys_takes_torchs_path() -> None:
    module, _ = pair()
    args = [*inputs(module), E, H, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0]
    args += [module.out_proj.weight, module.out_proj.bias]
    static = torch.randn(N * H, 6, E // H)
    torch.testing.assert_close(*(function(*args, static_k=static, static_v=static) for function in FUNCTIONS))


def test_signatures_are_torchs() -> None:
    for mine, its in (FUNCTIONS, (fastseq.nn.MultiheadAttention.forward, nn.MultiheadAttention.forward)):
        ours, theirs = (inspect.signature(f).parameters.values() for f in (mine, its))
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@each_dtype
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_causal_hint(ours_serves: None, dtype: torch.dtype, kind: str) -> None:
    for batch_first, wanted, padding, places in itertools.product(
        (True, False), (dict(need_weights=False), dict()), ("", "bool"), ((L, L), (L, S), (S, L))
    ):
        theirs, ours = pair(batch_first=batch_first, dtype=dtype)
        query, key = (torch.randn((N, n, E) if batch_first else (n, N, E), dtype=dtype) for n in places)
        mask = torch.ones(places, dtype=torch.bool).triu(1)
        if kind == "float":
            mask = torch.zeros(places, dtype=dtype).masked_fill(mask, -float("inf"))
        given = dict(attn_mask=mask, is_causal=True, **wanted, **masks("", padding, places, N, dtype))
        want = run(theirs, list(theirs.parameters()), [query, key, key], given)
        assert_same(run(ours, list(ours.parameters()), [query, key, key], given), want)
        torch.testing.assert_close(want[0], tree_leaves(theirs(query, key, key, **{**given, "is_causal": False})))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, ours_serves: None) -> list[Arguments]:
    """What has reached the op."""
    calls: list[Arguments] = []
    attention = fastseq.nn.attention.attention
    monkeypatch.setattr("fastseq.nn.attention.attention", lambda a, w: (calls.append(a), attention(a, w))[1])
    return calls


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_and_masks_are_views(seen: list[Arguments], batch_first: bool) -> None:
    _, ours = pair(batch_first=batch_first)
    (x, *_), (query, key, value) = inputs(ours, "qkv"), inputs(ours, "kv")
    pads = boolean(N, L)
    ours(x, x, x, attn_mask=boolean(L, L), key_padding_mask=pads)
    ours(query, key, value, attn_mask=torch.randn(L, S))
    three = torch.randn(N * H, L, S)
    ours(query, key, value, attn_mask=three)
    floats = torch.randn(N, S)
    ours(query, key, value, key_padding_mask=floats)
    ours(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(L), is_causal=True, need_weights=False)
    own, cross, each_head, padded, causal = seen
    for t, count in ((own.query, 3), (own.key, 3), (own.value, 3), (cross.key, 2), (cross.value, 2)):
        assert t.shape[:2] == (N, H) and t.untyped_storage().nbytes() == count * t.numel() * t.element_size()
    assert own.query.untyped_storage().data_ptr() == own.value.untyped_storage().data_ptr()
    assert own.mask.shape == (1, 1, L, L) and own.key_padding.data_ptr() == pads.data_ptr()
    assert cross.mask.shape == (1, 1, L, S) and cross.key_padding is None
    assert each_head.mask.shape == (N, H, L, S) and each_head.mask.data_ptr() == three.data_ptr()
    assert padded.mask.shape == (N, 1, 1, S) and padded.mask.data_ptr() == floats.data_ptr()
    assert causal.mask is None and causal.right == 0


def test_output_is_contiguous(ours_serves: None) -> None:
    for batch_first, same in itertools.product((True, False), ("", "qkv")):
        _, ours = pair(batch_first=batch_first)
        assert all(t.is_contiguous() for t in ours(*inputs(ours, same)))


# Where torch contradicts itself: the table of the class.


@pytest.mark.parametrize("how", ["bool 2", "bool 3", "float 2", "float 3", "bool padding", "float padding"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_that_sees_nothing_gets_zeros(ours_serves: None, how: str, need_weights: bool) -> None:
    theirs, ours = pair(batch_first=True, dtype=torch.float64)
    query, key, value = inputs(ours)
    kind, where = how.split()
    left_out = boolean(N * H, L, S) if where == "3" else boolean(L, S) if where == "2" else boolean(N, S)
    left_out[(0, slice(None)) if where == "padding" else (..., 1, slice(None))] = True
    bias = torch.zeros(left_out.shape, dtype=torch.float64).masked_fill(left_out, -float("inf"))
    name = "key_padding_mask" if where == "padding" else "attn_mask"
    given = {name: left_out if kind == "bool" else bias, "need_weights": need_weights}
    blind = (0, slice(None)) if where == "padding" else (slice(None), 1)
    weighed = run(ours, list(ours.parameters()), [query, key, value], given)
    for mode, grad in ((True, True), (False, False)):
        with torch.set_grad_enabled(grad):
            out, weights = ours.train(mode)(query, key, value, **given)
        torch.testing.assert_close(out[blind], ours.out_proj.bias.expand_as(out[blind]))
        assert weights is None or not weights[blind].any()
    assert not any(g.isnan().any() for g in weighed[1] if g is not None)
    # The other queries are as if there were no such row: torch's, where it is finite.
    sees = torch.ones(N, L, dtype=torch.bool)
    sees[blind] = False
    torch.testing.assert_close(out[sees], theirs(query, key, value, **given)[0][sees])
    # Gradients are those of the queries that see something.
    query = query.clone().requires_grad_()
    ours(query, key, value, **given)[0].sum().backward()
    assert not query.grad[blind].any() and query.grad[sees].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_left_out_has_no_effect(ours_serves: None, bad: float) -> None:
    theirs, ours = pair(batch_first=True)
    query, key, value = inputs(ours)
    left_out = boolean(N, S)
    left_out[:, 2] = True
    want = theirs(query, key, value, key_padding_mask=left_out)
    key[:, 2], value[:, 2] = bad, bad
    got = ours(query, key, value, key_padding_mask=left_out)
    torch.testing.assert_close(got, want)
    assert theirs(query, key, value, key_padding_mask=left_out)[0].isnan().any()


@pytest.mark.parametrize("training", [True, False])
def test_causal_hint_without_a_mask_is_never_dropped(training: bool) -> None:
    theirs, ours = pair(batch_first=True, E=12, H=2)
    x = torch.randn(N, L, E)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint") as theirs_error:
        theirs(x, x, x, is_causal=True)
    with torch.no_grad():
        for wanted, padding in itertools.product((dict(), dict(need_weights=False)), (None, boolean(N, L))):
            with pytest.raises(RuntimeError) as ours_error:
                ours.train(training)(x, x, x, is_causal=True, key_padding_mask=padding, **wanted)
            assert str(ours_error.value) == str(theirs_error.value)


def test_causal_hint_hides_no_added_keys(ours_serves: None) -> None:
    for options in (dict(add_bias_kv=True), dict(add_zero_attn=True)):
        theirs, ours = pair(**options)
        x, mask = inputs(ours, "qkv")[0], torch.ones(L, L, dtype=torch.bool).triu(1)
        want, weights = theirs(x, x, x, attn_mask=mask, is_causal=True)
        assert weights[..., -1].all()
        for need_weights in (True, False):
            got, _ = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
            torch.testing.assert_close(got, want)


# Dropout


def test_dropout(ours_serves: None) -> None:
    theirs, ours = pair(E=16, H=4, dropout=0.25, batch_first=True)
    x = torch.randn(3, 64, 16)
    exact = ours.eval()(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(exact, theirs.eval()(x, x, x, average_attn_weights=False)[1])
    ours.train()
    out, weights = ours(x, x, x, average_attn_weights=False)
    dropped = weights == 0
    count = weights.numel()
    assert abs(dropped.float().mean() - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5
    torch.testing.assert_close(weights[~dropped], exact[~dropped] / 0.75, rtol=1e-4, atol=1e-6)
    # The output is of these very weights.
    value = F.linear(x, ours.in_proj_weight[32:], ours.in_proj_bias[32:]).view(3, 64, 4, 4).transpose(1, 2)
    want = ours.out_proj((weights @ value).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(out, want)
    _, average = ours(x, x, x)
    assert abs(average.mean() * 64 - 1) < 0.05
    ours.dropout = theirs.dropout = 1.0
    for need_weights in (True, False):
        out = ours(x, x, x, need_weights=need_weights)[0]
        torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))


def test_dropout_follows_the_seed(ours_serves: None) -> None:
    _, ours = pair(dropout=0.5)
    args = inputs(ours)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append([ours(*args, need_weights=n)[0] for n in (True, False)])
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not torch.equal(results[0][0], results[2][0]) and not torch.equal(*results[0])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ours.eval()(*args)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_of_dropout_are_of_the_same_draw(ours_serves: None) -> None:
    _, ours = pair(dropout=0.5, dtype=torch.float64)

    def call(*args: Tensor) -> Any:
        torch.manual_seed(1)
        return ours(*args)

    args = leaves(inputs(ours))
    assert torch.autograd.gradcheck(call, args, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *args: call(*args)[0], [*args], fast_mode=True)


# Dtypes


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_half_precision_errs_at_most_twice_as_much_as_torch(
    ours_serves: None, dtype: torch.dtype, need_weights: bool
) -> None:
    for same, batch_first in itertools.product(("", "kv", "qkv"), (True, False)):
        theirs, ours = pair(E=64, H=4, dtype=dtype, batch_first=batch_first)
        exact = nn.MultiheadAttention(64, 4, dtype=torch.float64, batch_first=batch_first)
        exact.load_state_dict(theirs.state_dict())
        query, key, value = (torch.randn((3, 40, 64) if batch_first else (40, 3, 64)).to(dtype) for _ in range(3))
        key = query if same == "qkv" else key
        args = [query, key, key if same else value]
        wide = [t.double() for t in args]
        given = dict(attn_mask=boolean(40, 40), need_weights=need_weights)
        (got, grads), (its, its_grads), (right, right_grads) = (
            run(m, list(m.parameters()), a, given) for m, a in ((ours, args), (theirs, args), (exact, wide))
        )
        if same == "qkv":  # the exact run sees three tensors
            right_grads = [sum(right_grads[:3]), *right_grads[3:]]
        elif same == "kv":
            right_grads = [right_grads[0], sum(right_grads[1:3]), *right_grads[3:]]
        for mine, other, want in zip(got, its, right, strict=True):
            if mine is not None:
                assert mine.dtype == other.dtype == dtype
                assert error(mine, want) <= 2 * error(other, want)
        # All together, since of some the exact value is 0.
        mine, other = (
            sum(((g.double() - want) ** 2).sum() for g, want in zip(of, right_grads, strict=True))
            for of in (grads, its_grads)
        )
        assert mine**0.5 <= 2 * other**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(ours_serves: None, dtype: torch.dtype) -> None:
    for need_weights, given in itertools.product((True, False), (torch.float32, dtype)):
        theirs, ours = pair(E=64, H=4, batch_first=True)
        x = torch.randn(3, 40, 64).to(given)
        exact = copy.deepcopy(theirs).double()
        options = dict(need_weights=need_weights, attn_mask=torch.randn(40, 40))
        right = exact(*[x.double()] * 3, **{**options, "attn_mask": options["attn_mask"].double()})
        with torch.autocast("cpu", dtype=dtype):
            got, its = ours(x, x, x, **options), theirs(x, x, x, **options)
        for mine, other, want in zip(got, its, right, strict=True):
            if mine is not None:
                assert mine.dtype == other.dtype
                assert error(mine, want) <= 2 * error(other, want)
        got[0].float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())
    with torch.autocast("cpu"):  # leaves float64 alone
        assert ours.double()(*[x.double()] * 3)[0].dtype == torch.float64


def test_float32_mask_beside_other_dtypes(ours_serves: None) -> None:
    """torch takes it where its fused attention serves, and nowhere else."""
    for dtype in (torch.float64, torch.bfloat16):
        theirs, ours = pair(dtype=dtype)
        args, mask = inputs(ours), torch.randn(L, S)
        got, want = (m(*args, attn_mask=mask, need_weights=False)[0] for m in (ours, theirs))
        torch.testing.assert_close(got, want, atol=2e-2 if dtype == torch.bfloat16 else 1e-7, rtol=1e-7)
        errors = []
        for module in (theirs, ours):
            with pytest.raises(RuntimeError) as raised:
                module(*args, attn_mask=mask)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]


# Errors


def x(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


GOOD = (x(4, 2, 12), x(5, 2, 12), x(5, 2, 12))
BAD_CALLS = {
    "1-D": lambda m: m(x(12), x(12), x(12)),
    "4-D": lambda m: m(x(2, 2, 2, 12), x(2, 2, 2, 12), x(2, 2, 2, 12)),
    "ranks": lambda m: m(x(4, 2, 12), x(5, 12), x(5, 12)),
    "ranks the other way": lambda m: m(x(4, 12), x(5, 2, 12), x(5, 2, 12)),
    "features of query": lambda m: m(x(4, 2, 11), *GOOD[1:]),
    "features of key": lambda m: m(x(4, 2, 12), x(5, 2, 11), x(5, 2, 11)),
    "features of all": lambda m: m(*[x(4, 2, 6)] * 3),
    "lengths of key and value": lambda m: m(x(4, 2, 12), x(5, 2, 12), x(6, 2, 12)),
    "batches": lambda m: m(x(4, 2, 12), x(5, 3, 12), x(5, 3, 12)),
    "dtype": lambda m: m(*(t.double() for t in GOOD)),
    "dtypes": lambda m: m(GOOD[0], GOOD[1].double(), GOOD[2]),
    "integers": lambda m: m(*(t.long() for t in GOOD)),
    "complex": lambda m: m(*(t * 1j for t in GOOD)),
    "sparse": lambda m: m(*[x(4, 12).to_sparse()] * 3),
    "nothing": lambda m: m(None, None, None),
    "a list": lambda m: m([1.0], [1.0], [1.0]),
    "no key": lambda m: m(x(4, 2, 12), None, None),
    "meta": lambda m: m(*(t.to("meta") for t in GOOD)),
    "padding, shape": lambda m: m(*GOOD, key_padding_mask=x(2, 4).bool()),
    "padding, batch": lambda m: m(*GOOD, key_padding_mask=x(3, 5).bool()),
    "padding, rank": lambda m: m(*GOOD, key_padding_mask=x(5).bool()),
    "padding, transposed": lambda m: m(*GOOD, key_padding_mask=x(5, 2).bool()),
    "padding, integers": lambda m: m(*GOOD, key_padding_mask=x(2, 5).long()),
    "padding, dtype": lambda m: m(*GOOD, key_padding_mask=x(2, 5).double()),
    "padding, a list": lambda m: m(*GOOD, key_padding_mask=[[False] * 5] * 2),
    "padding, unbatched": lambda m: m(x(4, 12), x(5, 12), x(5, 12), key_padding_mask=x(1, 5).bool()),
    "mask, shape": lambda m: m(*GOOD, attn_mask=x(5, 4)),
    "mask, heads": lambda m: m(*GOOD, attn_mask=x(3, 4, 5)),
    "mask, heads of all": lambda m: m(*GOOD, attn_mask=x(1, 4, 5)),
    "mask, rank": lambda m: m(*GOOD, attn_mask=x(2, 3, 4, 5)),
    "mask, 1-D": lambda m: m(*GOOD, attn_mask=x(5)),
    "mask, integers": lambda m: m(*GOOD, attn_mask=x(4, 5).int()),
    "mask, dtype": lambda m: m(*GOOD, attn_mask=x(4, 5).double()),
    "mask, half": lambda m: m(*GOOD, attn_mask=x(4, 5).half()),
    "mask, dtype, no weights": lambda m: m(*GOOD, attn_mask=x(4, 5).double(), need_weights=False),
    "mask, half, no weights": lambda m: m(*GOOD, attn_mask=x(4, 5).half(), need_weights=False),
    "mask, unbatched": lambda m: m(x(4, 12), x(5, 12), x(5, 12), attn_mask=x(2, 4, 5)),
    "mask, meta": lambda m: m(*GOOD, attn_mask=x(4, 5, device="meta")),
    "mask, sparse": lambda m: m(*GOOD, attn_mask=x(4, 5).to_sparse()),
    "masks of two dtypes": lambda m: m(*GOOD, attn_mask=x(4, 5), key_padding_mask=x(2, 5).half()),
    "hint": lambda m: m(*GOOD, is_causal=True),
    "hint and padding": lambda m: m(*GOOD, is_causal=True, key_padding_mask=x(2, 5).bool(), need_weights=False),
    "hint and a wrong mask": lambda m: m(*GOOD, is_causal=True, attn_mask=x(5, 4), need_weights=False),
    "no rows": lambda m: m(x(4, 0, 12), x(5, 0, 12), x(5, 0, 12)),
    "no queries": lambda m: m(x(0, 2, 12), *GOOD[1:]),
    "no keys": lambda m: m(x(4, 2, 12), x(0, 2, 12), x(0, 2, 12)),
    "no keys, no weights": lambda m: m(x(4, 2, 12), x(0, 2, 12), x(0, 2, 12), need_weights=False),
    "nothing at all": lambda m: m(),
    "an unknown argument": lambda m: m(*GOOD, mask=None),
}


def outcome(call: Callable) -> Any:
    try:
        return [None if t is None else t.shape for t in call()]
    except Exception as error:
        # It names the class whose forward was called.
        return type(error), str(error)


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.parametrize("options", [dict(), dict(kdim=12, vdim=12, add_bias_kv=True)], ids=str)
def test_errors_are_torchs(call: Callable, options: dict) -> None:
    theirs, ours = pair(**options)
    assert outcome(lambda: call(ours)) == outcome(lambda: call(theirs))
    torch.testing.assert_close(ours(*GOOD), theirs(*GOOD))  # and the next call works


# Hints without a mask are where torch contradicts itself.
WITHOUT_HINTS = {name: call for name, call in BAD_CALLS.items() if not name.startswith("hint")}


@pytest.mark.parametrize("call", WITHOUT_HINTS.values(), ids=WITHOUT_HINTS)
def test_errors_are_torchs_in_evaluation(call: Callable) -> None:
    theirs, ours = pair(H=2)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        assert outcome(lambda: call(ours)) == outcome(lambda: call(theirs))


@pytest.mark.parametrize("p", [-0.5, 1.5])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_out_of_range_is_torchs_error(p: float, need_weights: bool) -> None:
    theirs, ours = pair(dropout=p)
    assert outcome(lambda: ours(*GOOD, need_weights=need_weights)) == outcome(
        lambda: theirs(*GOOD, need_weights=need_weights)
    )


def test_errors_of_the_function_are_torchs() -> None:
    module, _ = pair()
    right = dict(
        embed_dim_to_check=E,
        num_heads=H,
        in_proj_weight=module.in_proj_weight,
        in_proj_bias=module.in_proj_bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=module.out_proj.weight,
        out_proj_bias=module.out_proj.bias,
    )
    weight, row = torch.zeros(E, E), torch.zeros(1, 1, E)
    for wrong in (
        dict(embed_dim_to_check=11),
        dict(num_heads=5),
        dict(num_heads=0),
        dict(in_proj_weight=None),
        dict(in_proj_weight=weight),
        dict(in_proj_bias=torch.zeros(E)),
        dict(bias_k=row),
        dict(bias_v=row),
        dict(bias_k=torch.zeros(1, 1, 5), bias_v=row),
        dict(out_proj_weight=torch.zeros(E, 5)),
        dict(out_proj_weight=torch.zeros(7, E), out_proj_bias=None),  # which is none
        dict(out_proj_weight=None),
        dict(use_separate_proj_weight=True),
        dict(use_separate_proj_weight=True, q_proj_weight=weight, k_proj_weight=weight),
        dict(use_separate_proj_weight=True, q_proj_weight=weight, k_proj_weight=weight[:, 1:], v_proj_weight=weight),
        dict(static_k=torch.zeros(1, 5, 4)),
        dict(is_causal=True),
        dict(dropout_p=2.0),
    ):
        given = {**right, **wrong}
        got, want = (outcome(partial(function, *GOOD, **given)) for function in FUNCTIONS)
        assert got == want, wrong


# Life cycle


def test_copy_pickle_and_state_dict() -> None:
    theirs, ours = pair(add_bias_kv=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    args = inputs(ours)
    want = ours(*args)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is fastseq.nn.MultiheadAttention
        torch.testing.assert_close(other(*args), want, rtol=0, atol=0)
    back = nn.MultiheadAttention(E, H, add_bias_kv=True)
    back.load_state_dict(ours.state_dict())
    torch.testing.assert_close(back(*args), want)


@each_options
@pytest.mark.usefixtures("nothing_asked_for")
def test_other_ways_to_hold_weights(options: dict) -> None:
    theirs, ours = pair(**options)
    args = inputs(theirs)
    want = theirs(*args)
    other = {name: 0.3 * torch.randn_like(p) for name, p in ours.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, other, tuple(args)), torch.func.functional_call(theirs, other, tuple(args))
    )
    replica = ours._replicate_for_data_parallel()  # as DataParallel does it
    replica._modules["out_proj"] = ours.out_proj._replicate_for_data_parallel()
    for module, original in ((replica, ours), (replica.out_proj, ours.out_proj)):
        module._parameters = {name: None for name, p in original._parameters.items() if p is None}
    for name, p in ours.named_parameters():
        setattr(replica.get_submodule("out_proj" if "out_proj" in name else ""), name.split(".")[-1], p.detach())
    torch.testing.assert_close(replica(*args), want)
    empty = fastseq.nn.MultiheadAttention(E, H, device="meta", **options)
    assert empty(*(t.to("meta") for t in args))[0].shape == want[0].shape
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(empty(*args), want)

    def weight_norm(m: nn.Module) -> None:
        torch.nn.utils.parametrizations.weight_norm(
            m, "in_proj_weight" if m.in_proj_weight is not None else "k_proj_weight"
        )
        torch.nn.utils.parametrizations.weight_norm(m.out_proj, "weight")

    def pruned(m: nn.Module) -> None:
        prune.l1_unstructured(m, "in_proj_weight" if m.in_proj_weight is not None else "v_proj_weight", amount=0.5)

    def frozen(m: nn.Module) -> None:
        m.out_proj.weight.requires_grad_(False)

    def changed(m: nn.Module) -> None:
        m(*args)
        m.out_proj.weight.data.mul_(0.5)
        for p in m.parameters():
            p.data.add_(0.25)

    for change in (weight_norm, pruned, frozen, changed):
        modules = theirs, ours = pair(**options)
        for module in modules:
            change(module)
        parameters = ([p for p in m.parameters() if p.requires_grad] for m in modules)
        want, got = (run(m, p, args, {}) for m, p in zip(modules, parameters, strict=True))
        assert_same(got, want)


def test_outputs_may_be_changed_in_place(ours_serves: None) -> None:
    results = []
    modules = pair()
    args = inputs(modules[0])
    for module in modules:
        out, weights = module(*args)
        out.relu_(), weights.mul_(2)
        results.append(torch.autograd.grad(out.sum() + weights.square().sum(), module.parameters()))
    assert_same(([], results[1]), ([], results[0]))


def test_gradient_of_weights_alone(ours_serves: None) -> None:
    theirs, ours = pair(batch_first=True)
    args = inputs(ours)
    for average in (True, False):
        got, want = (
            torch.autograd.grad(m(*args, average_attn_weights=average)[1].square().sum(), m.in_proj_weight)
            for m in (ours, theirs)
        )
        torch.testing.assert_close(got, want)


def test_a_class_of_tensors_with_a_torch_function_sees_the_function() -> None:
    called = []

    class Mine(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            called.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    theirs, ours = pair()
    args = [t.as_subclass(Mine) for t in inputs(ours)]
    got = ours(*args)
    assert isinstance(got[0], Mine) and F.multi_head_attention_forward in called
    torch.testing.assert_close(got, theirs(*args))


@pytest.mark.parametrize("grad", [False, True])
def test_nested_tensors_take_torchs_path(grad: bool) -> None:
    theirs, ours = pair(H=2, batch_first=True)
    rows = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    theirs.eval(), ours.eval()

    def call(module: nn.Module) -> list[Tensor]:
        return [module(rows, rows, rows, need_weights=False)[0].to_padded_tensor(0.0)]

    with torch.set_grad_enabled(grad):
        got, want = outcome(partial(call, ours)), outcome(partial(call, theirs))
    assert got == want and isinstance(want, tuple) == grad


def test_small_and_odd_sizes(ours_serves: None) -> None:
    for heads, width, n, queries, keys in itertools.product((1, 3), (1, 5, 17), (1, 3), (1, 33), (1, 65)):
        theirs, ours = pair(E=heads * width, H=heads, batch_first=n == 1)
        query, key = torch.randn(n, queries, heads * width), torch.randn(n, keys, heads * width)
        if not ours.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)  # not contiguous
        torch.testing.assert_close(ours(query, key, key), theirs(query, key, key))


# Compilers and transforms


@pytest.mark.parametrize(
    "given",
    [
        dict(),
        dict(need_weights=False, key_padding_mask=boolean(N, S)),
        dict(attn_mask=torch.randn(N * H, L, S), average_attn_weights=False),
        dict(need_weights=False, is_causal=True, attn_mask=torch.ones(L, S, dtype=torch.bool).triu(1)),
    ],
    ids=["plain", "padding", "mask", "causal"],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_compiles_into_one_graph(given: dict, batch_first: bool) -> None:
    torch._dynamo.reset()
    _, ours = pair(batch_first=batch_first)
    args = inputs(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    want = run(ours, list(ours.parameters()), args, given)
    assert_same(run(compiled, list(ours.parameters()), args, given), want)
    with torch.no_grad():
        torch.testing.assert_close(tree_leaves(compiled(*args, **given)), want[0])


def test_compiles_with_dropout(ours_serves: None) -> None:
    torch._dynamo.reset()
    _, ours = pair(dropout=0.5)
    args = inputs(ours, "qkv")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    first, second = compiled(*args)[0], compiled(*args)[0]
    assert first.isfinite().all() and not torch.equal(first, second)
    first.sum().backward()


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    theirs, ours = pair(batch_first=True)
    args = inputs(ours, "qkv")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, fullgraph=True)(*args), theirs(*args))


def test_dynamic_sizes_compile_once() -> None:
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    _, ours = pair(batch_first=True)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n, places in ((3, 6), (3, 9), (5, 13), (2, 21)):
        x = torch.randn(n, places, E)
        pads = boolean(n, places)
        torch.testing.assert_close(compiled(x, x, x, key_padding_mask=pads), ours(x, x, x, key_padding_mask=pads))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4  # nothing was compiled after the first call


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_length(strict: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = pair(batch_first=True)[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    block = Block()
    dynamic = {1: torch.export.Dim("L", min=2, max=500)}
    exported = torch.export.export(block, (torch.randn(N, 7, E),), dynamic_shapes=(dynamic,), strict=strict)
    for places in (2, 7, 30):
        x = torch.randn(N, places, E)
        torch.testing.assert_close(exported.module()(x), block(x))


@pytest.mark.parametrize("options", [dict(), dict(kdim=E, vdim=7, add_bias_kv=True)], ids=str)
def test_scripting_takes_torchs_module(options: dict) -> None:
    class Block(nn.Module):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, key, value)[0]

    theirs, ours = pair(**options)
    block = Block(ours)
    args = inputs(ours)
    scripted = torch.jit.script(block)
    torch.testing.assert_close(scripted(*args), theirs(*args)[0])
    assert type(fastseq.accelerate(block).attention) is fastseq.nn.MultiheadAttention


@pytest.mark.parametrize("options", [dict(batch_first=True), dict(add_bias_kv=True, add_zero_attn=True)], ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing(options: dict) -> None:
    _, ours = pair(**options)

    class Block(nn.ModuleList):
        def forward(self, x: Tensor, pads: Tensor) -> tuple[Tensor, Tensor]:
            return self[0](x, x, x, key_padding_mask=pads)

    def given(places: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(N, places, E)
        return x if ours.batch_first else x.transpose(0, 1), boolean(N, places)

    traced = torch.jit.trace(Block([ours]), given(L), check_trace=False)
    for places in (L, 9):
        x, pads = given(places)
        torch.testing.assert_close(traced(x, pads), ours(x, x, x, key_padding_mask=pads))


def test_double_backward(ours_serves: None) -> None:
    _, ours = pair(dtype=torch.float64, add_bias_kv=True)
    args = leaves(inputs(ours))
    assert torch.autograd.gradgradcheck(
        lambda *args: ours(*args, attn_mask=torch.zeros(L, S).double()), args, fast_mode=True
    )


def test_transforms_of_torch_func(ours_serves: None) -> None:
    theirs, ours = pair(dtype=torch.float64, batch_first=True)
    (x, *_), pads = inputs(ours, "qkv"), boolean(N, L)
    rows = torch.randn(3, *x.shape, dtype=torch.float64)
    for got, want in zip(
        torch.func.vmap(lambda x: ours(x, x, x, key_padding_mask=pads))(rows),
        zip(*(theirs(x, x, x, key_padding_mask=pads) for x in rows), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(got, torch.stack(want))
    for transform in (torch.func.jacrev, torch.func.jacfwd):  # forward mode is what torch lacks
        got = transform(lambda x: ours(x, x, x)[0])(x)
        torch.testing.assert_close(got, torch.func.jacrev(lambda x: theirs(x, x, x)[0])(x))

    def loss(module: nn.Module, parameters: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x, x, x))[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, 1), (None, None, 0))
    got, want = (per_sample(m, dict(m.named_parameters()), x.unsqueeze(1)) for m in (ours, theirs))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


# Inside of torch's transformers


def transformer(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    sizes = dict(d_model=16, nhead=2, dim_feedforward=24, dropout=0.0, **options)
    layer = nn.TransformerDecoderLayer(**sizes) if name == "decoder" else nn.TransformerEncoderLayer(**sizes)
    theirs = nn.TransformerDecoder(layer, 2) if name == "decoder" else nn.TransformerEncoder(layer, 2)
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return theirs, fastseq.accelerate(
        copy.deepcopy(theirs), lambda module, _: isinstance(module, nn.MultiheadAttention)
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoders_and_decoders(batch_first: bool, norm_first: bool, mode: str) -> None:
    options = dict(batch_first=batch_first, norm_first=norm_first)
    x, memory = (torch.randn(3, n, 16) if batch_first else torch.randn(n, 3, 16) for n in (7, 9))
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    pads, memory_pads = (torch.arange(n) >= torch.tensor([[n], [4], [2]]) for n in (7, 9))
    # A layer turns masks into floats, and a float one beside a boolean one is what torch warns of.
    bias = torch.zeros(3, 7).masked_fill(pads, -float("inf"))
    calls: list[tuple[str, tuple, dict]] = [
        ("encoder", (x,), dict()),
        ("encoder", (x,), dict(mask=mask)),
        ("encoder", (x,), dict(mask=mask.isinf(), is_causal=True)),
        ("encoder", (x,), dict(src_key_padding_mask=pads)),
        ("encoder", (x,), dict(mask=mask, src_key_padding_mask=bias)),
        ("decoder", (x, memory), dict()),
        ("decoder", (x, memory), dict(tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=memory_pads)),
        ("decoder", (x, memory), dict(tgt_mask=mask.isinf(), tgt_key_padding_mask=pads)),
    ]
    for name, args, kwargs in calls:
        theirs, ours = transformer(name, **options)
        theirs.train(mode == "train"), ours.train(mode == "train")
        if mode == "no_grad":
            with torch.no_grad():
                torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs))
        else:
            got, want = (run(m, list(m.parameters()), list(args), kwargs) for m in (ours, theirs))
            assert_same(got, want)


def test_encoder_layers_pass_it_by_in_evaluation_and_explain_says_so(seen: list[Arguments]) -> None:
    _, ours = transformer("encoder", batch_first=True)
    x = torch.randn(3, 7, 16)
    for mode, grad, count in ((True, True, 2), (True, False, 2), (False, True, 2), (False, False, 0)):
        seen.clear()
        with torch.set_grad_enabled(grad):
            ours.train(mode)(x)
        assert len(seen) == count
    rows = [row for row in fastseq.explain(ours).rows if row.type.endswith("MultiheadAttention")]
    assert len(rows) == 2 and all("evaluation without gradients" in row.note for row in rows)
    for change in (
        lambda layer: setattr(layer.self_attn, "batch_first", False),
        lambda layer: setattr(layer, "activation_relu_or_gelu", 0),
        lambda layer: setattr(layer.norm1, "eps", 1e-3),
    ):
        layer = copy.deepcopy(ours.layers[0]).eval()
        change(layer)
        assert "evaluation without gradients" not in fastseq.explain(layer).rows[1].note
        seen.clear()
        with torch.no_grad():
            layer(x)
        assert len(seen) == 1
