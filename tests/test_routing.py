"""torch.nn.functional.scaled_dot_product_attention, routed to fastseq's: who is, what is, and that it is undone."""

import asyncio
import contextvars
import copy
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import require_kernel
from test_attention_ops import LEAD, REFUSED, heads_of, nested
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastseq
from fastseq import routed_attention
from fastseq.ops.attention import TABLE, Arguments

TORCHS = torch._C._nn.scaled_dot_product_attention
OPTIONS: list[dict] = [
    {},
    dict(is_causal=True),
    dict(scale=0.3, attn_mask=torch.randn(5, 7)),
    dict(attn_mask=torch.rand(2, 1, 5, 7) > 0.3),
    dict(enable_gqa=True),
]


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    assert F.scaled_dot_product_attention is TORCHS
    yield
    try:
        assert F.scaled_dot_product_attention is TORCHS
    finally:
        fastseq.route_attention(False)


@pytest.fixture
def computed(computed: list[Arguments]) -> list[Arguments]:
    """Skips where torch's function would serve anyway."""
    require_kernel(TABLE, "cpu", torch.float32)
    return computed


@pytest.fixture
def switched_on() -> Iterator[None]:
    fastseq.route_attention(True)
    yield
    fastseq.route_attention(False)


def is_ours(computed: list[Arguments]) -> bool:
    """Whether a call of this thread goes to fastseq."""
    before = len(computed)
    F.scaled_dot_product_attention(*LEAD)
    return len(computed) > before


# What is routed


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_results_and_gradients_are_torchs(computed: list[Arguments], options: dict) -> None:
    leaves = [t.clone().requires_grad_() for t in LEAD]
    results = []
    for route in (False, True):
        fastseq.route_attention(route)
        out = F.scaled_dot_product_attention(*leaves, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    fastseq.route_attention(False)
    assert len(computed) == 1
    torch.testing.assert_close(*results)


def test_arguments_by_position_and_by_name(computed: list[Arguments]) -> None:
    query, key, value = LEAD
    want = TORCHS(*LEAD, is_causal=True)
    with routed_attention():
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, None, 0.0, True), want)
        named = F.scaled_dot_product_attention(is_causal=True, value=value, key=key, query=query)
    torch.testing.assert_close(named, want)
    assert len(computed) == 2


@pytest.mark.parametrize("what", [*REFUSED, "mask and causal", "scale by position", "twice", "dropout below 0"])
def test_what_torch_refuses(what: str) -> None:
    more: dict[str, tuple[tuple, dict]] = {
        "mask and causal": (LEAD, dict(attn_mask=torch.ones(5, 7) > 0, is_causal=True)),
        "scale by position": ((*LEAD, None, 0.0, False, 0.3), {}),
        "twice": (LEAD, dict(query=LEAD[0])),
        "dropout below 0": (LEAD, dict(dropout_p=-0.1)),  # which torch lets pass
    }
    args, options = (REFUSED | more)[what]
    outcomes: list[Any] = []
    for route in (False, True):
        fastseq.route_attention(route)
        try:
            outcomes.append(F.scaled_dot_product_attention(*args, **options).shape)
        except Exception as error:
            outcomes.append((type(error), str(error).splitlines()[0].removeprefix("_ours")))
    fastseq.route_attention(False)
    if what == "twice":  # of which Python speaks
        assert outcomes[0][0] is outcomes[1][0] is TypeError
    else:
        assert outcomes[0] == outcomes[1]
    assert (what == "dropout below 0") == isinstance(outcomes[0], torch.Size)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_torch_does_by_itself_goes_to_it(computed: list[Arguments], switched_on: None) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    called = []

    class Mine(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            called.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    def attend(*args: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args)

    assert isinstance(attend(*(t.as_subclass(Mine) for t in LEAD)), Mine)
    with Mode():
        attend(*LEAD)
    assert called.count(TORCHS) == 2
    with FlopCounterMode(display=False) as counter:
        attend(*LEAD)
    assert counter.get_total_flops() > 0
    assert attend(*(t.to("meta") for t in LEAD)).is_meta
    want = torch.stack([TORCHS(*(t[n] for t in LEAD)) for n in range(2)])
    torch.testing.assert_close(torch.func.vmap(attend)(*LEAD), want)
    _, x = nested([3, 5], 2, 8)
    q = heads_of(x, 2)
    assert torch.equal(attend(q, q, q).values(), TORCHS(q, q, q).values())
    assert any(node.target is TORCHS for node in torch.fx.symbolic_trace(_attend).graph.nodes)
    traced = torch.jit.trace(_attend, LEAD, check_trace=False)
    assert "scaled_dot_product_attention" in str(traced.graph)
    assert not computed


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_scripting(switched_on: None) -> None:
    scripted = torch.jit.script(_attend)
    torch.testing.assert_close(scripted(*LEAD), TORCHS(*LEAD))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def test_causal_biases(computed: list[Arguments]) -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    for make in (causal_lower_right, causal_upper_left):
        bias = make(5, 7)
        want = F.scaled_dot_product_attention(*LEAD, bias)
        with routed_attention():
            torch.testing.assert_close(F.scaled_dot_product_attention(*LEAD, bias), want)
            torch.testing.assert_close(F.scaled_dot_product_attention(*LEAD, attn_mask=bias), want)
            with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
                F.scaled_dot_product_attention(*LEAD, bias, is_causal=True)
    assert len(computed) == 4


# Who is routed, and for how long


def test_nothing_is_routed_unless_asked_for(computed: list[Arguments]) -> None:
    assert not is_ours(computed)


def test_blocks(computed: list[Arguments]) -> None:
    with routed_attention():
        assert is_ours(computed)
        with pytest.raises(KeyError), routed_attention():
            assert is_ours(computed)
            raise KeyError
        assert is_ours(computed)
    assert F.scaled_dot_product_attention is TORCHS and not is_ours(computed)
    for _ in range(2):
        with pytest.raises(KeyError), routed_attention():
            raise KeyError
        assert F.scaled_dot_product_attention is TORCHS


def test_the_switch(computed: list[Arguments]) -> None:
    fastseq.route_attention()
    fastseq.route_attention(True)
    assert is_ours(computed)
    with routed_attention():
        fastseq.route_attention(False)
        assert is_ours(computed)
    assert F.scaled_dot_product_attention is TORCHS
    with routed_attention():
        fastseq.route_attention(True)
    assert is_ours(computed)
    fastseq.route_attention(False)
    assert F.scaled_dot_product_attention is TORCHS
    fastseq.route_attention(False)
    assert F.scaled_dot_product_attention is TORCHS and not is_ours(computed)
    with pytest.raises(TypeError, match="on must be a bool, got str"):
        fastseq.route_attention("yes")


def in_a_thread(call: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def test_a_block_is_its_threads_own(computed: list[Arguments]) -> None:
    with routed_attention():
        assert not in_a_thread(lambda: is_ours(computed))
        fastseq.route_attention(True)
        assert in_a_thread(lambda: is_ours(computed))
        fastseq.route_attention(False)
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def work() -> None:
        with routed_attention():
            inside.set()
            leave.wait(10)
            seen.append(is_ours(computed))
        seen.append(is_ours(computed))

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    assert F.scaled_dot_product_attention is not TORCHS and not is_ours(computed)
    with routed_attention():  # entered and left while the other's goes on
        assert is_ours(computed)
    assert F.scaled_dot_product_attention is not TORCHS and not is_ours(computed)
    leave.set()
    thread.join()
    assert seen == [True, False]


def test_a_block_is_its_tasks_own(computed: list[Arguments]) -> None:
    async def inside() -> bool:
        with routed_attention():
            await asyncio.sleep(0)
            return is_ours(computed)

    async def outside() -> bool:
        await asyncio.sleep(0)
        return is_ours(computed)

    async def both() -> list[bool]:
        return list(await asyncio.gather(inside(), outside()))

    assert asyncio.run(both()) == [True, False]


def test_many_threads_at_once(computed: list[Arguments]) -> None:
    want = TORCHS(*LEAD, is_causal=True)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(200):
                if chance.random() < 0.2:
                    fastseq.route_attention(chance.random() < 0.5)
                if chance.random() < 0.5:
                    with routed_attention():
                        assert F.scaled_dot_product_attention is not TORCHS
                        torch.testing.assert_close(F.scaled_dot_product_attention(*LEAD, is_causal=True), want)
                else:
                    torch.testing.assert_close(F.scaled_dot_product_attention(*LEAD, is_causal=True), want)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    fastseq.route_attention(False)
    assert not failures and computed
    assert not is_ours(computed)


def test_what_others_put_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        return TORCHS(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", theirs)
        for ask in (lambda: routed_attention().__enter__(), fastseq.route_attention):
            with pytest.raises(RuntimeError, match="has been replaced by something else"):
                ask()
        assert F.scaled_dot_product_attention is theirs
    with routed_attention():
        ours = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = theirs
    assert F.scaled_dot_product_attention is theirs
    F.scaled_dot_product_attention = TORCHS
    torch.testing.assert_close(ours(*LEAD), TORCHS(*LEAD))  # for whoever still has it


# Models


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_torchs_layers(computed: list[Arguments], mode: str, accelerated: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).train(mode == "train")
    x, mask = torch.randn(2, 7, 16), nn.Transformer.generate_square_subsequent_mask(7)
    routed = copy.deepcopy(layer)
    if accelerated:
        fastseq.accelerate(routed)
    for options in ({}, dict(src_mask=mask, is_causal=True), dict(src_mask=mask)):
        results = []
        for module, on in ((layer, False), (routed, True)):
            fastseq.route_attention(on)
            with torch.set_grad_enabled(mode != "no_grad"):
                out = module(x, **options)
            grads = torch.autograd.grad(out.square().sum(), module.parameters()) if mode != "no_grad" else ()
            results.append([out, *grads])
        fastseq.route_attention(False)
        torch.testing.assert_close(*results, rtol=1e-4, atol=2e-5)
    if not accelerated and mode != "no_grad":  # where torch computes it without the function
        assert len(computed) == 3


def test_torchs_multi_head_attention(computed: list[Arguments]) -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 7, 16)
    pads = torch.arange(7) >= torch.tensor([[7], [4]])
    for options in (dict(need_weights=False), dict(need_weights=False, key_padding_mask=pads), dict()):
        want = module(x, x, x, **options)
        with routed_attention():
            torch.testing.assert_close(module(x, x, x, **options), want)
    assert len(computed) == 2  # weights are not the function's to give


def test_checkpoints(computed: list[Arguments]) -> None:
    x = torch.randn(2, 2, 5, 4, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    (want,) = torch.autograd.grad(attend(x).sum(), x)
    with routed_attention():
        out = checkpoint(attend, x, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], want)
        assert len(computed) == 2
        out = checkpoint(attend, x, use_reentrant=False)
    with pytest.raises(CheckpointError):
        out.sum().backward()


class Block(nn.Module):
    """A model that calls the function by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(2, 3)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("first", [False, True])
def test_compiled_models(first: bool) -> None:
    """A graph is made anew when routing begins and when it ends."""
    require_kernel(TABLE, "cpu", torch.float32)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    block, x = Block(), torch.randn(2, 5, 8)
    want = block(x)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for route in (first, not first, first, not first):
        fastseq.route_attention(route)
        out = compiled(x)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(
            *(torch.autograd.grad(o.sum(), block.project.weight, retain_graph=True) for o in (out, want))
        )
    fastseq.route_attention(False)
    targets = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    assert ["fastseq.attention" in names for names in targets] == [first, not first]  # each made once
    torch._dynamo.reset()


def test_compiled_with_inductor(switched_on: None) -> None:
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 5, 8)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(switched_on: None, strict: bool) -> None:
    block, x = Block(), torch.randn(2, 5, 8)
    exported = torch.export.export(block, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), block(x))


def test_a_generator_may_be_closed_in_another_context() -> None:
    def routed() -> Iterator[None]:
        with fastseq.routed_attention():
            yield

    generator = routed()
    contextvars.copy_context().run(next, generator)
    generator.close()
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
