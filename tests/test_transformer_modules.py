"""fastseq.nn's transformers beside torch.nn's: the same results, gradients, errors and life cycle; cached decoding."""

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import require_kernel
from torch import Tensor, nn

import fastseq
from fastseq.nn import KVCache
from fastseq.ops.attention import TABLE

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Support for mismatched",
        "ignore:enable_nested_tensor is True",
        "ignore:The PyTorch API of nested tensors",
        "ignore::DeprecationWarning",
        "ignore::torch.jit.TracerWarning",
    ),
    pytest.mark.usefixtures("no_fast_path"),
]

N, L, S, E, H, FF = 3, 7, 5, 12, 2, 20
NAMES = (
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
PADS, MEMORY_PADS = (torch.arange(n) >= torch.tensor([[n], [4], [2]]) for n in (L, S))

ACTIVATIONS = ("relu", "gelu", F.silu, nn.ELU())

each_name = pytest.mark.parametrize("name", NAMES)
each_order = pytest.mark.parametrize("batch_first", [True, False])
each_norm = pytest.mark.parametrize("norm_first", [False, True])


def build(library: Any, name: str, **options: Any) -> nn.Module:
    options = dict(d_model=E, nhead=H, dim_feedforward=FF, dropout=0.0, **options)
    if name == "Transformer":
        return library.Transformer(num_encoder_layers=1, num_decoder_layers=2, **options)
    if name.endswith("Layer"):
        return getattr(library, name)(**options)
    norm = nn.LayerNorm(E, dtype=options.get("dtype"))
    return getattr(library, name)(getattr(library, f"{name}Layer")(**options), 2, norm)


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs, ours = build(nn, name, **options), build(fastseq.nn, name, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def rows(places: int, batch_first: bool = True, batch: int | None = N, dtype: Any = None) -> Tensor:
    x = torch.randn(*(() if batch is None else (batch,)), places, E, dtype=dtype)
    return x if batch_first or batch is None else x.transpose(0, 1).contiguous()


def mask_kinds(places: int, memory_places: int, dtype: Any) -> list[Tensor | None]:
    left_out = torch.rand(places, memory_places) < 0.4
    left_out[:, 0] = False
    heads = torch.randn(N * H, places, memory_places, dtype=dtype)
    return [None, left_out, torch.randn(places, memory_places, dtype=dtype), heads]


def calls(name: str, dtype: Any = None) -> list[dict[str, Any]]:
    """Masks by the names of forward's arguments."""
    causal = CAUSAL.to(dtype)
    if name.startswith("TransformerEncoder"):
        mask_name = "src_mask" if name.endswith("Layer") else "mask"
        kinds = [*mask_kinds(L, L, dtype), causal, CAUSAL.isinf()]
        found = [
            {mask_name: mask, "src_key_padding_mask": pads}
            for mask, pads in itertools.product(kinds, (None, PADS, torch.randn(N, L, dtype=dtype)))
        ]
        return [*found, {mask_name: causal, "is_causal": True}]
    found = [
        dict(tgt_mask=mask, memory_mask=memory_mask, tgt_key_padding_mask=pads, memory_key_padding_mask=memory_pads)
        for (mask, memory_mask), pads, memory_pads in itertools.product(
            zip([*mask_kinds(L, L, dtype), causal], [*mask_kinds(L, S, dtype), None], strict=True),
            (None, PADS),
            (None, MEMORY_PADS, torch.randn(N, S, dtype=dtype)),
        )
    ]
    if name == "Transformer":
        for i, given in enumerate(found):
            given.update(src_mask=mask_kinds(S, S, dtype)[i % 4], src_key_padding_mask=(None, MEMORY_PADS)[i % 2])
    return [*found, dict(tgt_mask=causal, tgt_is_causal=True, memory_mask=None, memory_is_causal=False)]


def inputs(name: str, batch_first: bool = True, batch: int | None = N, dtype: Any = None) -> list[Tensor]:
    if name.startswith("TransformerEncoder"):
        return [rows(L, batch_first, batch, dtype)]
    pair = [rows(L, batch_first, batch, dtype), rows(S, batch_first, batch, dtype)]
    return pair[::-1] if name == "Transformer" else pair


def present(out: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The output without what is at places that are left out: zeros where they are not computed."""
    of_source = not any(name.startswith(("tgt", "memory")) for name in kwargs)
    pads = kwargs.get("src_key_padding_mask" if of_source else "tgt_key_padding_mask")
    if pads is None or pads.dtype != torch.bool:
        return out
    pads = pads if pads.shape == out.shape[:-1] else pads.t()
    return out.masked_fill(pads.unsqueeze(-1), 0)


def run(module: nn.Module, args: list[Tensor], kwargs: dict[str, Any]) -> list[Tensor]:
    """The output, and gradients of inputs and parameters."""
    args = [x.detach().clone().requires_grad_() for x in args]
    out = present(module(*args, **kwargs), kwargs)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, [*args, *module.parameters()], grad)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    torch.testing.assert_close(got[0], want[0])
    # Sums over rows and places in another order than torch's.
    torch.testing.assert_close(got[1:], want[1:], rtol=1e-4, atol=5e-5)


@each_name
@each_order
@each_norm
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients(name: str, batch_first: bool, norm_first: bool, bias: bool) -> None:
    """Each way of building takes every eighth kind of masks, with one activation and dtype after the other."""
    first = 4 * batch_first + 2 * norm_first + bias
    for i in range(first, len(calls(name)), 8):
        activation, dtype = ACTIVATIONS[(i // 8 + first) % 4], (torch.float32, torch.float64)[i // 8 % 2]
        options = dict(batch_first=batch_first, norm_first=norm_first, bias=bias, activation=activation, dtype=dtype)
        theirs, ours = pair(name, **options)
        args, given = inputs(name, batch_first, dtype=dtype), calls(name, dtype)[i]
        want = run(theirs, args, given)
        assert_same(run(ours, args, given), want)
        for mode in (True, False):
            ours.train(mode)
            with torch.no_grad():
                torch.testing.assert_close(present(ours(*args, **given), given), want[0])
        assert_same(run(ours, args, given), want)


@each_name
@each_norm
def test_without_a_batch(name: str, norm_first: bool) -> None:
    theirs, ours = pair(name, norm_first=norm_first)
    args = inputs(name, batch=None)
    pads = {key: None if t is None else t[1] for key, t in calls(name)[-2].items() if "padding" in key}
    for given in ({}, pads):
        assert_same(run(ours, args, given), run(theirs, args, given))


@each_name
def test_signatures_are_torchs(name: str) -> None:
    theirs, ours = getattr(nn, name), getattr(fastseq.nn, name)
    for function in ("__init__", "forward"):
        of_torch, of_ours = (inspect.signature(getattr(cls, function)).parameters for cls in (theirs, ours))
        more = set(of_ours) - set(of_torch)
        assert more <= {"cache"}
        found = [(p.name, p.kind, p.default) for p in of_ours.values() if p.name not in more]
        assert found == [(p.name, p.kind, p.default) for p in of_torch.values()]


@each_name
def test_constructors_build_ours_and_draw_what_torchs_draw(name: str) -> None:
    modules = []
    for library in (nn, fastseq.nn):
        torch.manual_seed(1)
        modules.append(build(library, name, activation="gelu", bias=name != "Transformer"))
    theirs, ours = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for mine, its in zip(ours.modules(), theirs.modules(), strict=True):
        expected = nn.Linear if type(its) is nn.Linear else getattr(fastseq.nn, type(its).__name__, type(its))
        assert type(mine) is expected
        shared = {key: value for key, value in vars(its).items() if isinstance(value, (bool, int, float, str))}
        assert shared.items() <= vars(mine).items()
    meta = build(fastseq.nn, name, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in meta.parameters() if p.dim() > 1} == {("meta", torch.float16)}


def test_custom_encoders_and_decoders_stay() -> None:
    encoder, decoder = nn.Identity(), nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H), 1)
    ours = fastseq.nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder)
    assert ours.encoder is encoder and ours.decoder is decoder and type(decoder) is nn.TransformerDecoder


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_dropout(name: str) -> None:
    theirs, ours = pair(name, batch_first=True)
    args = inputs(name)

    def drawn(module: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(*args)

    parts = [m for m in ours.modules() if isinstance(m, nn.Dropout)]
    for part, attribute in [(part, "p") for part in parts] + [(ours.self_attn, "dropout")]:
        setattr(part, attribute, 0.5)
        assert torch.equal(drawn(ours, 1), drawn(ours, 1)) and not torch.equal(drawn(ours, 1), drawn(ours, 2))
        torch.testing.assert_close(ours.eval()(*args), theirs.eval()(*args))
        ours.train()
        setattr(part, attribute, 0.0)
    assert torch.equal(drawn(ours, 1), drawn(ours, 2))


# What torch's path for evaluation without gradients leaves out


@pytest.fixture
def fast_path(no_fast_path: None) -> None:
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("fast_path")
def test_padding_stays_where_it_is() -> None:
    theirs, ours = pair("TransformerEncoder", batch_first=True)
    ours.eval(), theirs.eval()
    (x,), pads = inputs("TransformerEncoder"), PADS.clone()
    pads[:, -2:] = True  # no sequence is as long as the rows
    want = ours(x, src_key_padding_mask=pads)
    with torch.no_grad():
        got = ours(x, src_key_padding_mask=pads)
    torch.testing.assert_close(got, want)
    assert got.shape == x.shape and not got[pads].any()
    torch.testing.assert_close(theirs(x, src_key_padding_mask=pads)[~pads], want[~pads])
    added = torch.zeros(pads.shape).masked_fill(pads, -torch.inf)
    torch.testing.assert_close(ours(x, src_key_padding_mask=added), theirs(x, src_key_padding_mask=pads))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, src_key_padding_mask=pads)[~pads], got[~pads])


@pytest.mark.usefixtures("fast_path")
@each_name
def test_hooks_run_in_evaluation_without_gradients(name: str) -> None:
    ours = pair(name, batch_first=True)[1].eval()
    called = []
    kinds = (nn.Linear, nn.LayerNorm, fastseq.nn.MultiheadAttention, fastseq.nn.TransformerEncoderLayer)
    watched = [m for m in ours.modules() if type(m) in kinds]
    for module in watched:
        module.register_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        ours(*inputs(name))
    assert set(called) == set(watched) and len(watched) > 4


@pytest.mark.usefixtures("fast_path")
@each_norm
def test_overridden_blocks_are_used(norm_first: bool) -> None:
    seen = []

    class Encoder(fastseq.nn.TransformerEncoderLayer):
        def _sa_block(self, x: Tensor, mask: Tensor, pads: Tensor, is_causal: bool = False) -> Tensor:
            seen.append((mask, pads, is_causal))
            return super()._sa_block(x, mask, pads, is_causal)

        def _ff_block(self, x: Tensor) -> Tensor:
            return 2 * super()._ff_block(x)

    class Decoder(fastseq.nn.TransformerDecoderLayer):
        def _mha_block(self, x: Tensor, y: Tensor, mask: Tensor, pads: Tensor, is_causal: bool = False) -> Tensor:
            seen.append((mask, pads, is_causal))
            return 0 * x

    options: Any = dict(dim_feedforward=FF, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer = Encoder(E, H, **options).eval()
    (x,) = inputs("TransformerEncoderLayer")
    with torch.no_grad():
        got = layer(x, src_mask=CAUSAL.isinf(), src_key_padding_mask=PADS, is_causal=True)
        mask, pads, is_causal = seen.pop()
        assert torch.equal(mask, CAUSAL) and torch.equal(pads.isinf(), PADS) and is_causal
        theirs = nn.TransformerEncoderLayer(E, H, **options).eval()
        theirs.load_state_dict(layer.state_dict())
        theirs.linear2.weight.mul_(2), theirs.linear2.bias.mul_(2)
        torch.backends.mha.set_fastpath_enabled(False)
        want = theirs(x, src_mask=CAUSAL, src_key_padding_mask=PADS)
        torch.testing.assert_close(got, want.masked_fill(PADS.unsqueeze(-1), 0))
        decoder = Decoder(E, H, **options).eval()
        other = decoder(x, rows(S), memory_mask=torch.zeros(L, S), memory_key_padding_mask=MEMORY_PADS)
        assert seen.pop()[1] is MEMORY_PADS and torch.equal(other, decoder(x, rows(9)))


@pytest.fixture
def ours_serves() -> None:
    """Skips where torch's path serves attention."""
    require_kernel(TABLE, "cpu", torch.float32)


@pytest.mark.usefixtures("fast_path", "ours_serves")
def test_places_that_see_nothing_get_zeros_from_attention() -> None:
    ours = pair("TransformerEncoderLayer", batch_first=True, norm_first=True)[1].eval()
    (x,) = inputs("TransformerEncoderLayer")
    mask, pads = torch.zeros(L, L, dtype=torch.bool), torch.zeros(N, L, dtype=torch.bool)
    mask[2], pads[1] = True, True
    added = torch.zeros(N, L).masked_fill(pads, -torch.inf)
    y = x + ours.self_attn.out_proj.bias
    want = y + ours._ff_block(ours.norm2(y))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x, src_mask=mask)[:, 2], want[:, 2])
            torch.testing.assert_close(ours(x, src_key_padding_mask=added)[1], want[1])
            assert not ours(x, src_key_padding_mask=pads)[1].any()


@pytest.mark.usefixtures("fast_path")
def test_nested_tensors() -> None:
    """Which torch's encoder makes, whose subclasses stay torch's, and users give."""

    class Mine(nn.TransformerEncoder):
        pass

    theirs, _ = pair("TransformerEncoder", batch_first=True)
    mixed = copy.deepcopy(theirs.eval())
    mixed.__class__ = Mine
    fastseq.accelerate(mixed)
    assert type(mixed) is Mine and type(mixed.layers[0]) is fastseq.nn.TransformerEncoderLayer
    (x,) = inputs("TransformerEncoder")
    rows = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    ours = fastseq.accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        torch.testing.assert_close(mixed(x, src_key_padding_mask=PADS), theirs(x, src_key_padding_mask=PADS))
        got, want = (module(rows).to_padded_tensor(0.0) for module in (ours, theirs))
        torch.testing.assert_close(got, want)


# Masks


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_whether_a_mask_is_causal_is_found_as_torch_does(kind: str) -> None:
    seen = []

    class Encoder(nn.Module):
        self_attn = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor, *_: Any, **options: Any) -> Tensor:
            seen.append(options["is_causal" if kind == "encoder" else "tgt_is_causal"])
            return x

    stacks: Any = [
        getattr(library, "TransformerEncoder" if kind == "encoder" else "TransformerDecoder")(Encoder(), 1)
        for library in (nn, fastseq.nn)
    ]
    x = rows(L)
    first_row = CAUSAL.clone()
    first_row[-1, 2] = 1.0
    masks = [None, CAUSAL, CAUSAL.double(), CAUSAL.isinf(), ~CAUSAL.isinf(), CAUSAL.T, first_row, CAUSAL[:3, :3]]
    masks += [torch.zeros(L, L), CAUSAL.expand(N * H, L, L), CAUSAL[None], torch.full((L, L), float("nan"))]
    for mask, hint in itertools.product(masks, (None, True, False)):
        for stack in stacks:
            if kind == "encoder":
                stack(x, mask, is_causal=hint)
            else:
                stack(x, x, mask, tgt_is_causal=hint)
        theirs, ours = seen[-2:]
        assert theirs is ours
    assert True in seen[::3] and False in seen


@each_name
def test_errors_are_torchs(name: str) -> None:
    args, zeros = inputs(name), torch.zeros
    of = "src" if name.startswith("TransformerEncoder") else "tgt"
    mask = "mask" if name == "TransformerEncoder" else f"{of}_mask"
    padding = f"{of}_key_padding_mask"
    bad: list[tuple[list[Any], dict[str, Any]]] = [
        (args, {mask: zeros(L, L).int()}),
        (args, {mask: zeros(L, L + 1)}),
        (args, {mask: zeros(2, L, L)}),
        (args, {padding: zeros(N, L).int()}),
        (args, {padding: zeros(L, N).bool()}),
        ([x[..., :-1] for x in args], {}),
        ([x.double() for x in args], {}),
        ([x[0, 0] for x in args], {}),
        ([args[0][:2], *args[1:]] if len(args) > 1 else [args[0][None]], {}),
        ([None for _ in args], {}),
        ([args[0], *(None for _ in args[1:])] if len(args) > 1 else [None], {}),
        (args, {padding: [True]}),
        ([], {}),
    ]
    for given, options in bad:
        errors = []
        for module in pair(name, batch_first=True):
            with pytest.raises(Exception) as raised:
                module(*given, **options)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]


# Life cycle


@each_name
@each_order
def test_accelerate_and_restore(name: str, batch_first: bool) -> None:
    model, _ = pair(name, batch_first=batch_first)
    model.eval()
    args = inputs(name, batch_first)
    classes, attributes = [type(m) for m in model.modules()], copy.deepcopy([set(vars(m)) for m in model.modules()])
    parameters, state = list(model.parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    want = model(*args)
    assert fastseq.accelerate(model) is model
    assert all(type(m).__module__.startswith("fastseq") for m in model.modules() if type(m).__name__ in NAMES)
    assert (
        all(a is b for a, b in zip(model.parameters(), parameters, strict=True)) and list(model.state_dict()) == state
    )
    out = model(*args)
    torch.testing.assert_close(out, want)
    assert len(called) == 2
    out.sum().backward()
    optimizer.step()
    changed = model(*args)
    assert not torch.equal(changed, want)
    assert torch.equal(copy.deepcopy(model)(*args), changed)
    fastseq.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    torch.testing.assert_close(model(*args), changed)


@each_name
def test_pickle(name: str) -> None:
    ours = pair(name)[1].eval()
    args = inputs(name, False)
    other = pickle.loads(pickle.dumps(ours))
    assert type(other) is type(ours) and torch.equal(other(*args), ours(*args))


class MyAttention(nn.MultiheadAttention):
    pass


class MyLayer(nn.TransformerEncoderLayer):
    pass


def test_explain() -> None:
    model = nn.ModuleDict(
        {
            "stack": nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, batch_first=True), 2),
            "mine": MyLayer(E, H, batch_first=True),
            "attention": nn.TransformerDecoderLayer(E, H),
            "whole": nn.Transformer(E, H, 1, 1, FF),
            "left": nn.TransformerEncoderLayer(E, H, batch_first=True),
        }
    )
    model["attention"].multihead_attn = MyAttention(E, H)
    fastseq.accelerate(model, lambda module, name: name != "left")
    found = {row.layer: row for row in fastseq.explain(model).rows}
    served = TABLE.candidates("cpu", torch.float32)[0].name
    served = "torch" if served == "reference" else served
    for name in ("stack", "whole", "whole.encoder", "whole.decoder"):
        assert found[name].served_by == "its layers" and found[name].type.startswith("fastseq.nn.Transformer")
    for name in ("stack.layers.0", "stack.layers.1", "whole.decoder.layers.0"):
        assert found[name].served_by == found[f"{name}.self_attn"].served_by == served
        assert "evaluation" not in found[name].note + found[f"{name}.self_attn"].note
    assert type(model["attention"]) is fastseq.nn.TransformerDecoderLayer
    assert found["attention"].served_by == "torch" and "MyAttention" in found["attention"].note
    assert found["mine"].served_by == "torch" and "subclass" in found["mine"].note
    assert found["left"].served_by == "torch" and "not accelerated" in found["left"].note
    torch.backends.mha.set_fastpath_enabled(True)
    found = {row.layer: row for row in fastseq.explain(model).rows}
    for name, passed_by in (("mine", True), ("left", True), ("stack.layers.0", False)):
        assert ("evaluation without gradients" in found[f"{name}.self_attn"].note) == (passed_by and served != "torch")


def test_attention_of_the_users_goes_through_the_blocks() -> None:
    called = []

    class Loud(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            called.append(1)
            return super().forward(*args, **kwargs)

    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True).eval()
    layer.self_attn.__class__ = Loud
    (x,) = inputs("TransformerEncoderLayer")
    want = layer(x)
    fastseq.accelerate(layer)
    assert type(layer) is fastseq.nn.TransformerEncoderLayer and type(layer.self_attn) is Loud
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
    assert len(called) == 2


# Compilers


GRAPHS: list[tuple[str, dict[str, Any]]] = [
    ("TransformerEncoder", {}),
    ("TransformerEncoder", dict(mask=CAUSAL, src_key_padding_mask=PADS)),
    ("TransformerEncoder", dict(mask=CAUSAL, is_causal=True)),
    ("TransformerDecoder", dict(tgt_mask=CAUSAL, memory_key_padding_mask=MEMORY_PADS)),
    ("TransformerDecoder", dict(tgt_mask=CAUSAL, tgt_is_causal=True)),
]
each_graph = pytest.mark.parametrize(("name", "given"), GRAPHS, ids=[f"{n}-{'-'.join(g)}" for n, g in GRAPHS])


@each_graph
def test_compiles_into_one_graph(name: str, given: dict[str, Any]) -> None:
    torch._dynamo.reset()
    _, ours = pair(name, batch_first=True)
    args = inputs(name)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    want, got = run(ours, args, given), compiled(*args, **given)
    torch.testing.assert_close(got, want[0])
    grads = torch.autograd.grad(got, list(ours.parameters()), torch.linspace(-1, 1, got.numel()).view(got.shape))
    torch.testing.assert_close(list(grads), want[1 + len(args) :], rtol=1e-4, atol=5e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(*args, **given), want[0])


@each_graph
def test_export(name: str, given: dict[str, Any]) -> None:
    ours = pair(name, batch_first=True)[1].eval()
    args = inputs(name)
    exported = torch.export.export(ours, tuple(args), given)
    torch.testing.assert_close(exported.module()(*args, **given), ours(*args, **given))


@each_name
def test_fx_traces_each_into_one_node(name: str) -> None:
    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, memory: Tensor, pads: Tensor) -> Tensor:
            if name.startswith("TransformerEncoder"):
                return self.inner(x, src_key_padding_mask=pads)
            return self.inner(x, memory, tgt_key_padding_mask=pads)

    theirs, ours = (Block(module.eval()) for module in pair(name, batch_first=True))
    args = rows(L), rows(L), PADS
    graphs = [torch.fx.symbolic_trace(block) for block in (theirs, ours)]
    ops = [[(node.op, node.target) for node in traced.graph.nodes] for traced in graphs]
    assert ops[0] == ops[1]
    torch.testing.assert_close(graphs[1](*args), theirs(*args).masked_fill(PADS.unsqueeze(-1), 0))


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder", "TransformerDecoderLayer"])
def test_scripting_takes_torchs_modules(name: str) -> None:
    theirs, ours = pair(name, batch_first=True)
    args = inputs(name)
    torch.testing.assert_close(torch.jit.script(ours.eval())(*args), theirs.eval()(*args))
    assert type(fastseq.accelerate(ours)) is getattr(fastseq.nn, name)
    torch.testing.assert_close(ours(*args), theirs(*args))


def test_transforms_of_torch_func() -> None:
    theirs, ours = pair("TransformerEncoder", batch_first=True, dtype=torch.float64)
    (x,) = inputs("TransformerEncoder", dtype=torch.float64)

    def loss(module: nn.Module, parameters: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, 1), (None, None, 0))
    got, want = (per_sample(m, dict(m.named_parameters()), x) for m in (ours, theirs))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


# Cached decoding


def decode(
    stack: nn.Module, x: Tensor, counts: list[int], cache: KVCache, memory: Tensor | None = None, **pads: Tensor | None
) -> Tensor:
    """Places of x in steps of so many, along the dimension of the places."""
    along = 0 if x.dim() == 2 or not stack.layers[0].self_attn.batch_first else 1
    outs, end = [], 0
    own = "src_key_padding_mask" if isinstance(stack, nn.TransformerEncoder) else "tgt_key_padding_mask"
    for new in x.split(counts, along):
        end += new.shape[along]
        given = {name: p[..., :end] if name == own else p for name, p in pads.items()}
        args = (new,) if isinstance(stack, nn.TransformerEncoder) else (new, memory)
        outs.append(stack(*args, **given, cache=cache))
        assert len(cache) == end
    return torch.cat(outs, along)


def causal(stack: nn.Module, x: Tensor, memory: Tensor | None = None, **pads: Tensor | None) -> Tensor:
    places = x.shape[0 if x.dim() == 2 or not stack.layers[0].self_attn.batch_first else 1]
    mask = nn.Transformer.generate_square_subsequent_mask(places, dtype=x.dtype)
    args: Any = (x, mask) if isinstance(stack, nn.TransformerEncoder) else (x, memory, mask)
    return stack(*args, **pads)


def stack(kind: str, **options: Any) -> tuple[Any, Any]:
    """torch's and ours in evaluation."""
    theirs, ours = pair("TransformerEncoder" if kind == "encoder" else "TransformerDecoder", **options)
    return theirs.eval(), ours.eval()


each_kind = pytest.mark.parametrize("kind", ["encoder", "decoder"])


@each_kind
@each_order
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_are_the_whole(kind: str, batch_first: bool, norm_first: bool, dtype: torch.dtype) -> None:
    for bias, batch in ((True, N), (False, N), (True, None)):
        theirs, ours = stack(kind, batch_first=batch_first, norm_first=norm_first, bias=bias, dtype=dtype)
        x = rows(L, batch_first, batch, dtype)
        memory = None if kind == "encoder" else rows(S, batch_first, batch, dtype)
        own, bias_pads = PADS[:1] if batch is None else PADS, torch.randn(N, L, dtype=dtype)
        of_memory = MEMORY_PADS
        name = "src_key_padding_mask" if kind == "encoder" else "tgt_key_padding_mask"
        ways: list[dict[str, Any]] = [{}, {name: own}, {name: bias_pads}]
        if kind == "decoder":
            ways += [dict(memory_key_padding_mask=of_memory), {name: own, "memory_key_padding_mask": of_memory}]
            ways += [dict(memory_key_padding_mask=torch.randn(N, S, dtype=dtype))]
        for pads, counts, length in zip(
            ways, itertools.cycle(([1] * L, [4, 1, 1, 1], [3, 2, 2], [L])), itertools.cycle((None, L)), strict=False
        ):
            if batch is None:
                pads = {key: t[0] for key, t in pads.items()}
            with torch.no_grad():
                want = causal(theirs, x, memory, **pads)
                got = decode(ours, x, counts, KVCache(length), memory, **pads)
            torch.testing.assert_close(got, present(want, pads))


@each_kind
def test_half_precision_and_autocast(kind: str) -> None:
    for low in (torch.bfloat16, torch.float16):
        theirs, ours = stack(kind, batch_first=True)
        x, memory = rows(L), None if kind == "encoder" else rows(S)
        exact = causal(theirs, x, memory)
        with torch.no_grad(), torch.autocast("cpu", dtype=low):
            got = decode(ours, x, [3, 1, 1, 2], KVCache(), memory)
            its = causal(ours, x, memory)
        assert got.dtype == its.dtype
        assert (got - exact).norm() <= 2 * (its - exact).norm()
        ours.to(low), theirs.to(low)
        low_memory = None if memory is None else memory.to(low)
        with torch.no_grad():
            got, its = (
                decode(ours, x.to(low), [3, 1, 1, 2], KVCache(), low_memory),
                causal(theirs, x.to(low), low_memory),
            )
        assert got.dtype == low and (got - exact).norm() <= 2 * (its - exact).norm()


def test_memory_is_projected_once_and_may_be_none_then() -> None:
    _, ours = stack("decoder", batch_first=True)
    x, memory, cache = rows(L), rows(S), KVCache()
    with torch.no_grad():
        want = causal(ours, x, memory)
        first = ours(x[:, :2], memory, cache=cache)
        memory.fill_(float("nan"))
        rest = [ours(x[:, 2:4], memory, cache=cache), ours(x[:, 4:], None, cache=cache)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), want)


@each_kind
@pytest.mark.parametrize("length", [None, L])
def test_reorder(kind: str, length: int | None) -> None:
    _, ours = stack(kind, batch_first=True)
    x, memory, cache = rows(3), rows(S), KVCache(length)
    with torch.no_grad():
        ours(x, *(() if kind == "encoder" else (memory,)), cache=cache)
        for order in ([2, 0, 0], [1, 2, 0], [0, 1], [1, 1, 0, 1]):  # each of what the one before has left
            cache.reorder(torch.tensor(order))
            new = torch.randn(len(order), 1, E)
            x, memory = torch.cat([x[order], new], 1), memory[order]
            args = () if kind == "encoder" else (memory,)
            torch.testing.assert_close(ours(new, *args, cache=cache), causal(ours, x, *args)[:, -1:])


def test_reorder_may_leave_memory_where_it_is() -> None:
    _, ours = stack("decoder", batch_first=True)
    x, memory, cache = rows(L), rows(S)[[0, 0, 1]], KVCache()
    order = torch.tensor([1, 1, 2], dtype=torch.int32)
    with torch.no_grad():
        ours(x[:, :4], memory, cache=cache)
        kept = [layer.memory for layer in cache.layers]
        cache.reorder(order, memory=False)
        assert all(a is layer.memory for a, layer in zip(kept, cache.layers, strict=True))
        want = causal(ours, torch.cat([x[order, :4], x[:, 4:]], 1), memory)
        torch.testing.assert_close(ours(x[:, 4:], memory, cache=cache), want[:, 4:])


def test_growth() -> None:
    """Capacity doubles, what is there is copied only then, and results stay what they were."""
    _, ours = stack("encoder", batch_first=True)
    x, cache = rows(300), KVCache()
    pointers, outs = [], []
    with torch.inference_mode():
        want = causal(ours, x)
        for i in range(300):
            outs.append(ours(x[:, i : i + 1], cache=cache))
            pointers.append(cache.layers[0].own.data_ptr())
        torch.testing.assert_close(torch.cat(outs, 1), want)
        assert cache.layers[0].own.shape[3] == 512
        assert [i for i in range(1, 300) if pointers[i] != pointers[i - 1]] == [64, 128, 256]
    with torch.no_grad():  # what inference mode has made may be written to outside of it
        ours(x[:, :3], cache=cache)
        cache.reorder(torch.tensor([2, 1, 0]))
        ours(x[:, :3], cache=cache)
        assert len(cache) == 306


def test_reset() -> None:
    _, ours = stack("decoder", batch_first=True)
    cache = KVCache(L)
    with torch.no_grad():
        for n, dtype in ((N, torch.float32), (N, torch.float32), (2, torch.float32), (2, torch.float64)):
            ours.to(dtype)
            x, memory = rows(L, batch=n, dtype=dtype), rows(S, batch=n, dtype=dtype)
            torch.testing.assert_close(decode(ours, x, [3, 4], cache, memory), causal(ours, x, memory))
            cache.reset()
            assert len(cache) == 0
        before = cache.layers[0].own
        ours(x[:, :2], memory, cache=cache)
        assert cache.layers[0].own is before


def test_layers_hooks_run_and_a_failing_step_changes_nothing() -> None:
    _, ours = stack("decoder", batch_first=True)
    x, memory, cache = rows(L), rows(S), KVCache()

    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    with torch.no_grad():
        want = causal(ours, x, memory)
        for at in (slice(0, 2), slice(2, 5)):
            handle = ours.layers[1].register_forward_hook(stop)
            with pytest.raises(StopError):
                ours(torch.zeros_like(x[:, at]), torch.ones_like(memory), cache=cache)
            assert len(cache) == at.start
            handle.remove()
            torch.testing.assert_close(ours(x[:, at], memory, cache=cache), want[:, at])


def test_caches_are_copied_and_pickled() -> None:
    _, ours = stack("encoder", batch_first=True)
    x, cache = rows(L), KVCache()
    with torch.no_grad():
        want = causal(ours, x)
        ours(x[:, :4], cache=cache)
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
            torch.testing.assert_close(ours(x[:, 4:], cache=other), want[:, 4:])
    assert "length=7" in repr(cache)


def test_parametrized_attention_and_dropout() -> None:
    """The weights are those of the moment; a module in training drops as in a whole run."""
    _, ours = stack("encoder", batch_first=True)
    x = rows(L)
    torch.nn.utils.parametrizations.weight_norm(ours.layers[0].self_attn, "in_proj_weight")
    with torch.no_grad():
        want = causal(ours, x)
        torch.testing.assert_close(decode(ours, x, [4, 3], KVCache()), want)
        for layer in ours.layers:
            layer.self_attn.dropout = 0.5
        torch.testing.assert_close(decode(ours, x, [4, 3], KVCache()), want)
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(decode(ours.train(), x, [4, 3], KVCache()))
    assert torch.equal(*results[:2]) and not torch.equal(*results[1:])


class MyBlock(fastseq.nn.TransformerDecoderLayer):
    def _sa_block(self, *args: Any, **kwargs: Any) -> Tensor:
        return super()._sa_block(*args, **kwargs)


class MyMemoryBlock(fastseq.nn.TransformerDecoderLayer):
    def _mha_block(self, *args: Any, **kwargs: Any) -> Tensor:
        return super()._mha_block(*args, **kwargs)


class MyForward(fastseq.nn.TransformerDecoderLayer):
    def forward(self, tgt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tgt


def _set(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda layer: setattr(layer, name, value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda layer: fastseq.restore(layer), r"layers\[1\] is a torch.*TransformerDecoderLayer, not a fastseq"),
        (_set("__class__", MyBlock), r"layers\[1\] overrides _sa_block, through which the cache does not go"),
        (_set("__class__", MyMemoryBlock), r"layers\[1\] overrides _mha_block"),
        (_set("__class__", MyForward), r"layers\[1\] is a MyForward with a forward of its own"),
        (_set("_sa_block", lambda *args: args[0]), r"layers\[1\] overrides _sa_block"),
        (_set("self_attn", fastseq.nn.MultiheadAttention(E, H, add_bias_kv=True)), "self_attn with kdim"),
        (_set("multihead_attn", nn.Identity()), "multihead_attn that is a Identity"),
        (lambda layer: layer.self_attn.register_forward_hook(print), "hooks on its self_attn"),
        (lambda layer: setattr(layer.self_attn, "forward", print), "self_attn, or a forward of its own"),
    ],
)
def test_layers_that_a_cache_does_not_go_through(change: Callable, match: str) -> None:
    _, ours = stack("decoder", batch_first=True)
    change(ours.layers[1])
    with torch.no_grad(), pytest.raises(RuntimeError, match=match):
        ours(rows(2), rows(S), cache=KVCache())


def test_overridden_feed_forward_goes_with_a_cache() -> None:
    class Twice(fastseq.nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return 2 * super()._ff_block(x)

    ours = fastseq.nn.TransformerEncoder(Twice(E, H, FF, batch_first=True), 2).eval()
    x = rows(L)
    with torch.no_grad():
        torch.testing.assert_close(decode(ours, x, [4, 3], KVCache()), causal(ours, x))


def test_no_gradients_with_a_cache() -> None:
    _, ours = stack("encoder", batch_first=True)
    x, match = rows(2), "no gradient can be had.*no_grad"
    with pytest.raises(RuntimeError, match=match):
        ours(x, cache=KVCache())
    with torch.no_grad():
        want = ours(x, cache=KVCache())
    ours.requires_grad_(False)
    assert torch.equal(ours(x, cache=KVCache()), want)
    with pytest.raises(RuntimeError, match=match):
        ours(x.requires_grad_(), cache=KVCache())


X, M = torch.zeros(N, 2, E), torch.zeros(N, S, E)
Call = Callable[[Any, KVCache], Any]
BAD_STEPS: list[tuple[type[Exception], str, Call]] = [
    (TypeError, "cache must be a fastseq.nn.KVCache, got dict", lambda d, c: d(X, M, cache={})),
    (ValueError, "tgt_mask cannot be given with cache", lambda d, c: d(X, M, torch.zeros(2, 2), cache=c)),
    (ValueError, "tgt_is_causal=False cannot", lambda d, c: d(X, M, tgt_is_causal=False, cache=c)),
    (ValueError, "memory_mask cannot", lambda d, c: d(X, M, memory_mask=torch.zeros(2, S), cache=c)),
    (ValueError, "memory_is_causal cannot", lambda d, c: d(X, M, memory_is_causal=True, cache=c)),
    (ValueError, "tgt must have two or three", lambda d, c: d(X[0, 0], M, cache=c)),
    (ValueError, "tgt must have at least one place", lambda d, c: d(X[:, :0], M, cache=c)),
    (ValueError, "tgt must be as the cache is, 3 sequences of .*, got 2 seq", lambda d, c: d(X[:2], M[:2], cache=c)),
    (ValueError, "tgt must be as the .*float32 on cpu, got .*float64", lambda d, c: d(X.double(), M, cache=c)),
    (ValueError, "tgt must be as the .* on cpu, got .* on meta", lambda d, c: d(X.to("meta"), M, cache=c)),
    (ValueError, "tgt has 9 places, but 4 of the 12", lambda d, c: d(torch.zeros(N, 9, E), M, cache=c)),
    (ValueError, "memory must be 3 sequences of 5 places, as it was, got 2 of 5", lambda d, c: d(X, M[:2], cache=c)),
    (ValueError, "memory must be 3 .* got 3 of 4", lambda d, c: d(X, M[:, :4], cache=c)),
    (ValueError, "memory must have .*float32 on cpu, got .*float64", lambda d, c: d(X, M.double(), cache=c)),
    (ValueError, "memory must have tgt's dimensions", lambda d, c: d(X, M[0], cache=c)),
    (
        ValueError,
        r"tgt_key_padding_mask must be \[3, 6\], of all places, on cpu, got \[3, 2\]",
        lambda d, c: d(X, M, tgt_key_padding_mask=torch.zeros(N, 2).bool(), cache=c),
    ),
    (
        TypeError,
        "tgt_key_padding_mask must be boolean or floating, got torch.int64",
        lambda d, c: d(X, M, tgt_key_padding_mask=torch.zeros(N, 6).long(), cache=c),
    ),
    (
        ValueError,
        r"memory_key_padding_mask must be \[3, 5\], .*, got \[3, 6\]",
        lambda d, c: d(X, M, memory_key_padding_mask=torch.zeros(N, 6).bool(), cache=c),
    ),
    (TypeError, "memory_key_padding_mask must be a tensor", lambda d, c: d(X, M, memory_key_padding_mask=[], cache=c)),
    (RuntimeError, "shapes cannot be multiplied", lambda d, c: d(X[..., :-1], M, cache=c)),
    (TypeError, "indices must be a tensor of int32 or int64, got list", lambda d, c: c.reorder([0])),
    (TypeError, "indices must be .*, got torch.bool", lambda d, c: c.reorder(torch.ones(3).bool())),
    (ValueError, r"indices must be \[new N\], .*, got \[1, 3\]", lambda d, c: c.reorder(torch.zeros(1, 3).long())),
    (IndexError, r"indices must be between 0 and 2, got \[0, 3\]", lambda d, c: c.reorder(torch.tensor([0, 3]))),
    (IndexError, r"between 0 and 2, got \[-1\]", lambda d, c: c.reorder(torch.tensor([-1]))),
    (ValueError, "indices must be on cpu", lambda d, c: c.reorder(torch.zeros(3).long().to("meta"))),
    (ValueError, "indices must be 3 where", lambda d, c: c.reorder(torch.tensor([0]), memory=False)),
    (ValueError, "holds no sequences yet", lambda d, c: KVCache().reorder(torch.tensor([0]))),
    (ValueError, "it is of 2 layers, the stack has 1", lambda d, c: _shorter(d)(X, M, cache=c)),
    (ValueError, "which is not of this stack", lambda d, c: _of_more_heads(d)(X, M, cache=c)),
    (ValueError, "memory must be given in the first call", lambda d, c: d(X, None, cache=KVCache())),
]


def _shorter(decoder: Any) -> Any:
    other = copy.deepcopy(decoder)
    del other.layers[1]
    return other


def _of_more_heads(decoder: Any) -> Any:
    other = copy.deepcopy(decoder)
    other.layers[0].self_attn.num_heads, other.layers[0].self_attn.head_dim = 3, 4
    return other


@pytest.mark.parametrize(("kind", "match", "call"), BAD_STEPS, ids=[match for _, match, _ in BAD_STEPS])
def test_bad_steps(kind: type[Exception], match: str, call: Call) -> None:
    _, ours = stack("decoder", batch_first=True)
    x, memory, cache = rows(6), rows(S), KVCache(12)
    with torch.no_grad():
        want = causal(ours, x, memory)
        ours(x[:, :4], memory, cache=cache)
        with pytest.raises(kind, match=match):
            call(ours, cache)
        torch.testing.assert_close(ours(x[:, 4:], memory, cache=cache), want[:, 4:])  # as if nothing had been


@pytest.mark.parametrize(("length", "kind"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_max_length(length: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="max_length must be"):
        KVCache(length)


def test_explain_says_what_is_fused_and_how_long_it_takes(ours_serves: None) -> None:
    model = nn.Sequential(nn.Linear(E, E), nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, batch_first=True), 2))
    fastseq.accelerate(model)
    model[1].layers[1].norm2.register_forward_hook(lambda *_: None)
    x = rows(L)
    told = {row.layer: row for row in fastseq.explain(model, profile=x).rows}
    assert "all that is in it" in told["1.layers.0"].note
    assert "its norm2 has a hook" in told["1.layers.1"].note
    for name in ("1", "1.layers.0", "1.layers.1", "1.layers.1.self_attn"):
        assert told[name].milliseconds is not None and min(told[name].milliseconds) > 0
    timed = str(fastseq.explain(model, profile=(x,)))
    assert "torch ms" in timed and "fastseq.nn.TransformerEncoderLayer" in timed
    assert "torch ms" not in str(fastseq.explain(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_on_the_only_layer_of_a_stack_run() -> None:
    ours = fastseq.nn.TransformerEncoder(fastseq.nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True), 1)
    calls = []
    ours.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        ours(rows(L)), ours(rows(L), cache=KVCache())
    assert len(calls) == 2


@pytest.mark.parametrize("part", ["self_attn", "norm1", "dropout1", "linear1", "activation", "linear2", "", "norm"])
def test_forwards_that_were_set_on_a_module_run(part: str) -> None:
    """As libraries set them that move weights about, or watch what goes through."""
    ours = build(fastseq.nn, "TransformerEncoder", batch_first=True, activation=nn.GELU())
    module = ours.norm if part == "norm" else ours.layers[1].get_submodule(part)
    calls, forward = [], module.forward
    module.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    for options in ({}, dict(src_key_padding_mask=PADS)):
        ours(rows(L), **options)
    assert len(calls) == 2
    told = {row.layer: row for row in fastseq.explain(ours).rows}["layers.1"]
    reasons = ("a forward of its own", "its activation has no kernel")
    if told.served_by != "torch":  # which has a reason of its own
        assert any(reason in told.note for reason in reasons) == (part not in ("", "norm"))


def test_attentions_of_two_orders_go_through_the_modules() -> None:
    theirs, ours = pair("TransformerEncoder", batch_first=True)
    theirs.layers[1].self_attn.batch_first = ours.layers[1].self_attn.batch_first = False
    x, given = rows(L), dict(src_key_padding_mask=PADS[:, :N].expand(N, N))
    x = x[:, :N]
    torch.testing.assert_close(present(ours(x, **given), given), present(theirs(x, **given), given))


def test_a_module_that_was_taken_out_may_be_any_function() -> None:
    theirs, ours = pair("TransformerEncoderLayer", batch_first=True)
    for layer in (theirs, ours):
        del layer.dropout1
        layer.dropout1 = torch.tanh
    (x,) = inputs("TransformerEncoderLayer")
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.usefixtures("nothing_asked_for")
def test_decoders_see_what_is_left_out_of_the_source_only() -> None:
    theirs, ours = pair("Transformer", batch_first=True)
    (src, tgt), given = inputs("Transformer"), dict(src_key_padding_mask=MEMORY_PADS)
    want = theirs(src, tgt, **given)
    torch.testing.assert_close(ours(src, tgt, **given), want)
    with torch.device("cpu"):
        torch.testing.assert_close(ours(src, tgt, **given), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(src, tgt, **given), want)
    called = torch.func.vmap(lambda src, tgt: ours(src, tgt, **given))
    torch.testing.assert_close(called(src[None], tgt[None])[0], want)
    meta = copy.deepcopy(ours).to("meta")
    pads = dict(src_key_padding_mask=MEMORY_PADS.to("meta"), memory_key_padding_mask=MEMORY_PADS.to("meta"))
    assert meta(src.to("meta"), tgt.to("meta"), **pads).shape == want.shape


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_batches_that_are_all_padding(name: str) -> None:
    _, ours = pair(name, batch_first=True)
    args = [x.requires_grad_() for x in inputs(name)]
    everything = torch.ones(N, L, dtype=torch.bool)
    own = "src_key_padding_mask" if len(args) == 1 else "tgt_key_padding_mask"
    y = ours(*args, **{own: everything})
    y.sum().backward()
    assert not y.any() and args[0].grad is not None and not args[0].grad.any()
    if len(args) > 1:
        y = ours(*args, memory_key_padding_mask=everything[:, :S])
        y.sum().backward()
        assert y.isfinite().all() and args[1].grad is not None and not args[1].grad.any()


def test_norms_over_more_than_features_take_the_modules_path() -> None:
    theirs, ours = pair("TransformerEncoderLayer", batch_first=True)
    theirs.norm1, ours.norm1 = nn.LayerNorm((L, E)), nn.LayerNorm((L, E))
    (x,) = inputs("TransformerEncoderLayer")
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.usefixtures("fast_path")
def test_small_layers_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair("TransformerEncoder", batch_first=True)
    theirs.eval(), ours.eval()
    (x,) = inputs("TransformerEncoder")
    monkeypatch.setattr("fastseq.nn.block.LEAST_WORK", 1 << 40)
    calls = []
    layer_fwd = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: (calls.append(1), layer_fwd(*args))[1])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        assert len(calls) == 4  # two layers each
        ours(x, mask=CAUSAL), ours(x, src_key_padding_mask=PADS)
        ours.layers[0].linear1.register_forward_hook(lambda *_: None)
        ours.layers[1].train()(x)
        torch.testing.assert_close(ours.eval()(x), theirs(x))
    assert len(calls) == 4 + 1 + 2


@pytest.mark.parametrize("least", [0, 1 << 40])
@pytest.mark.parametrize("name", ["dropout", "dropout1", "linear1"])
def test_parts_of_other_classes_are_called(name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.nn.block.LEAST_WORK", least)
    ours = pair("TransformerEncoderLayer", batch_first=True)[1].eval()
    (x,) = inputs("TransformerEncoderLayer")
    want, calls = ours(x), []
    part = nn.Sequential(getattr(ours, name), nn.Identity())
    part[1].register_forward_hook(lambda *_: calls.append(1))
    setattr(ours, name, part)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x), want)
    assert len(calls) == 2


def test_small_layers_compile_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.nn.block.LEAST_WORK", 1 << 40)
    ours = pair("TransformerEncoder", batch_first=True)[1].eval()
    (x,) = inputs("TransformerEncoder")
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), ours(x))
