"""torch's own module tests on fastseq's classes, each of which joins as soon as fastseq.nn has it, and its tests of
operators on fastseq's functions.

Inputs, reference functions and errors are those of `torch.testing._internal.common_modules`. The tests are modelled on
those of torch's test/test_modules.py, which no wheel carries, and have their names; test_save_load and test_free are
more. Beside what torch asserts, torch's own class with the same parameters has to give the same results. torch's inputs
for these classes have no batch, and its reference functions are the same module on a batch of one. Of the operators,
inputs are those of `torch.testing._internal.common_methods_invocations`, tests those of torch's test/test_ops.py and
test/test_ops_gradients.py.
"""

import copy
import inspect
import io
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import assert_no_worse, require_kernel
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

import fastseq
from fastseq.registry import FLOATS, OPS, Op

# Importing torch's suites forbids all other tests of the run to set torch.backends' flags.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
    from torch.testing._internal.common_utils import gradcheck, gradgradcheck
    from torch.testing._internal.opinfo.core import OpInfo, SampleInput

# What cannot hold: (class, test) -> reason.
EXEMPT: dict[tuple[str, str], str] = {
    ("TransformerEncoder", "test_factory_kwargs"): "it has no such arguments, as torch's entry says",
    ("CrossEntropyLoss", "test_factory_kwargs"): "it has no parameters, and no device or dtype",
}

NAMES = (
    "RNN",
    "GRU",
    "LSTM",
    "RNNCell",
    "GRUCell",
    "LSTMCell",
    "MultiheadAttention",
    "CrossEntropyLoss",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "Transformer",
)
STACKS = ("TransformerEncoder", "Transformer")
OURS = {name: getattr(fastseq.nn, name) for name in NAMES if hasattr(fastseq.nn, name)}
INFOS: dict[type, ModuleInfo] = {info.module_cls: info for info in module_db}


def added(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as one that is added: ours gives zeros where a boolean one leaves places out, torch's does not."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


@dataclass(frozen=True)
class Subject:
    """A class of ours in one dtype and mode."""

    name: str
    dtype: torch.dtype
    training: bool

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}-{'train' if self.training else 'eval'}"

    @property
    def ours(self) -> type[nn.Module]:
        return OURS[self.name]

    @property
    def theirs(self) -> type[nn.Module]:
        return getattr(nn, self.name)

    @property
    def info(self) -> ModuleInfo:
        return INFOS[self.theirs]

    def inputs(self, requires_grad: bool = False, device: str | None = "cpu", **options: Any) -> list[ModuleInput]:
        create = self.info.module_inputs_func
        inputs = list(create(self.info, device, self.dtype, requires_grad, self.training, **options))
        if "Transformer" not in self.name:
            return inputs
        for given in inputs:
            given.forward_input.kwargs.update({k: added(mask) for k, mask in given.forward_input.kwargs.items()})
        return self._fifth(inputs)  # of up to 67

    def some_inputs(self, **options: Any) -> list[ModuleInput]:
        """A fifth of them, where there are many."""
        return self._fifth(self.inputs(**options))

    def _fifth(self, inputs: list[ModuleInput]) -> list[ModuleInput]:
        """Others for each dtype and mode, each with every value of an option."""
        first = 2 * self.training + (self.dtype == torch.float64)
        return inputs if len(inputs) < 5 else inputs[first::5]

    def build(self, cls: type[nn.Module], given: ModuleInput) -> nn.Module:
        args = given.constructor_input.args
        if cls is self.ours:  # a layer that torch's inputs give to a stack
            args = [fastseq.accelerate(copy.deepcopy(a)) if isinstance(a, nn.Module) else a for a in args]
        module = cls(*args, **given.constructor_input.kwargs)
        return module.to(self.dtype).train(self.training)

    def twins(self, given: ModuleInput) -> tuple[nn.Module, nn.Module]:
        theirs, ours = self.build(self.theirs, given), self.build(self.ours, given)
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours


SUBJECTS = [
    Subject(name, dtype, training)
    for name in OURS
    for dtype in INFOS[getattr(nn, name)].supported_dtypes("cpu")
    if dtype in FLOATS  # in half precision ours is not torch's, but more exact
    for training in ((True, False) if INFOS[getattr(nn, name)].train_and_eval_differ else (True,))
]
each = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
each_double = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.dtype == torch.float64], ids=str)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def _exempt(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["subject"].name
    if (name, request.node.originalname) in EXEMPT:
        request.applymarker(pytest.mark.xfail(reason=EXEMPT[name, request.node.originalname]))


either_swap = pytest.mark.parametrize("swap", [False, True], ids=["no_swap", "swap"])


@contextmanager
def swapping(swap: bool) -> Iterator[None]:
    """Whether conversions of a module go by `torch.utils.swap_tensors`, for conversions alone.

    Under it `load_state_dict` fails for torch's recurrent layers, which hold weak references to their parameters.
    """
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def call(module: nn.Module, given: ModuleInput) -> Any:
    return module(*given.forward_input.args, **given.forward_input.kwargs)


def given_tensors(given: ModuleInput) -> list[Tensor]:
    leaves = tree_leaves((given.forward_input.args, given.forward_input.kwargs))
    return [t for t in leaves if isinstance(t, Tensor)]


def assert_same(got: Any, want: Any, given: ModuleInput, **options: Any) -> None:
    made = given.constructor_input
    options.setdefault("equal_nan", True)  # the mean of losses that are all ignored
    torch.testing.assert_close(
        got, want, msg=lambda text: f"constructed with {made.args} {made.kwargs}: {text}", **options
    )


def gradients(outputs: Any, leaves: list[Tensor], change: Callable[[Tensor], Tensor] = lambda g: g) -> list[Tensor]:
    outputs, leaves = tree_leaves(outputs), [t for t in leaves if t.requires_grad]  # not masks
    grads = [change(torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape)) for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, grads))


def spread(x: Tensor) -> Tensor:
    """The same values with gaps between them."""
    if x.dim() == 0:
        return x
    out = torch.repeat_interleave(x.detach(), 2, dim=-1)[..., ::2].requires_grad_(x.requires_grad)
    assert not out.is_contiguous()
    return out


@each
def test_forward(subject: Subject) -> None:
    for given in subject.inputs(with_packed_sequence=True):
        theirs, ours = subject.twins(given)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                got = call(ours, given)
                # Rows of transformers are contiguous, whatever the input's are.
                assert_same(got, call(theirs, given), given, check_stride="Transformer" not in subject.name)
                if given.reference_fn is not None and not isinstance(given.forward_input.args[0], PackedSequence):
                    want = given.reference_fn(ours, *given.forward_input.args, **given.forward_input.kwargs)
                    assert_same(got, want, given)


@each
def test_factory_kwargs(subject: Subject) -> None:
    for given, device in itertools.product(subject.inputs(), ("cpu", "meta")):
        kwargs = {**given.constructor_input.kwargs, "device": device, "dtype": subject.dtype}
        states = [cls(*given.constructor_input.args, **kwargs).state_dict() for cls in (subject.theirs, subject.ours)]
        theirs, ours = ([(k, t.shape, t.device.type, t.dtype) for k, t in state.items()] for state in states)
        assert ours == theirs
        assert {(where, dtype) for _, _, where, dtype in ours} == {(device, subject.dtype)}


@needs_cuda
@each
def test_multiple_device_transfer(subject: Subject) -> None:
    for given in subject.inputs():
        _, ours = subject.twins(given)
        want = call(ours, given)
        for device in ("cuda", "cpu", "cuda", "cpu"):
            ours.to(device)
            args = tree_map_only(Tensor, methodcaller("to", device), given.forward_input.args)
            got = ours(*args, **given.forward_input.kwargs)
            assert all(t.device.type == device for t in [*tree_leaves(got), *ours.parameters()])
        assert_same(got, want, given)


@each
def test_repr(subject: Subject) -> None:
    for given in subject.inputs():
        theirs, ours = subject.twins(given)
        assert (repr(ours), str(ours)) == (repr(theirs), str(theirs))


@each
def test_pickle(subject: Subject) -> None:
    for given in subject.inputs():
        _, ours = subject.twins(given)
        want = call(ours, given)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert type(other) is subject.ours
            assert_same(call(other, given), want, given, rtol=0, atol=0)


@each
def test_save_load(subject: Subject) -> None:
    for given in subject.some_inputs():
        theirs, ours = subject.twins(given)
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert list(state) == list(theirs.state_dict())
        for before, assign in itertools.product((theirs, ours), (False, True)):
            other = subject.build(type(before), given)
            other.load_state_dict(state, assign=assign)
            assert_same(call(other, given), call(before, given), given, rtol=0, atol=0)


@each
def test_check_inplace(subject: Subject) -> None:
    """No class here has torch's `inplace` argument: none may change what it is given."""
    assert "inplace" not in inspect.signature(subject.ours).parameters
    for given in subject.inputs(requires_grad=True):
        _, ours = subject.twins(given)
        tensors = [*given_tensors(given), *ours.parameters()]
        before = [(t._version, t.detach().clone()) for t in tensors]
        gradients(call(ours, given), tensors)
        assert [t._version for t in tensors] == [version for version, _ in before]
        assert_same([t.detach() for t in tensors], [value for _, value in before], given, rtol=0, atol=0)


@each
def test_non_contiguous_tensors(subject: Subject) -> None:
    for given in subject.inputs(requires_grad=True):
        theirs, ours = subject.twins(given)
        want = call(theirs, given)
        want_grads = gradients(want, [*given_tensors(given), *theirs.parameters()])
        originals = given.forward_input.args, given.forward_input.kwargs
        for inputs, grads, parameters in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            args, kwargs = tree_map_only(Tensor, spread, originals) if inputs else originals
            given.forward_input.args, given.forward_input.kwargs = args, kwargs
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                mine.data = spread(other) if parameters else other.detach()
            got = call(ours, given)
            assert_same(got, want, given)
            leaves = [*given_tensors(given), *ours.parameters()]
            got_grads = gradients(got, leaves, spread if grads else torch.clone)
            # Norms of four features divide by what is left of them: other orders of summation are seen in float32.
            normed = "Transformer" in subject.name and subject.dtype == torch.float32
            assert_same(got_grads, want_grads, given, **(dict(rtol=1e-4, atol=5e-5) if normed else {}))


def check_gradients(check: Callable[..., bool], subject: Subject, inputs: list[ModuleInput]) -> None:
    for given in inputs:
        _, ours = subject.twins(given)
        tensors = [*given_tensors(given), *ours.parameters()]  # the check changes them in place

        def outputs(*_: Tensor, ours: nn.Module = ours, given: ModuleInput = given) -> tuple[Tensor, ...]:
            return tuple(tree_leaves(call(ours, given)))

        if any(output.isnan().any() for output in outputs()):  # which numbers cannot be compared with
            continue
        options = dict(nondet_tol=subject.info.gradcheck_nondet_tol, fast_mode=subject.info.gradcheck_fast_mode)
        assert check(outputs, tensors, **options)


@each_double
def test_grad(subject: Subject) -> None:
    check_gradients(gradcheck, subject, subject.inputs(requires_grad=True))


@each_double
def test_gradgrad(subject: Subject) -> None:
    if "Transformer" in subject.name:
        require_kernel(OPS["attention"], "cpu", torch.float64)  # torch's attention has no second derivative
    check_gradients(gradgradcheck, subject, subject.some_inputs(requires_grad=True))


@needs_cuda
@each
def test_cpu_gpu_parity(subject: Subject) -> None:
    for given in subject.inputs(requires_grad=True):
        theirs, ours = subject.twins(given)
        want = call(theirs, given)
        want_grads = gradients(want, [*given_tensors(given), *theirs.parameters()])
        given.forward_input.args = tree_map_only(
            Tensor, lambda t: t.detach().cuda().requires_grad_(), given.forward_input.args
        )
        ours.cuda()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            got = call(ours, given)
            assert_same(tree_map_only(Tensor, Tensor.cpu, got), want, given)
            if subject.training:  # cuDNN has no backward of what ran in eval mode
                grads = gradients(got, [*given_tensors(given), *ours.parameters()])
                assert_same([g.cpu() for g in grads], want_grads, given)


@each
def test_memory_format(subject: Subject) -> None:
    """Formats are for 4 and 5 dimensions, and no class here has such a tensor: nothing may change."""
    for given in subject.some_inputs():
        theirs, ours = subject.twins(given)
        for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
            ours.to(memory_format=memory_format)
            assert all(p.is_contiguous() for p in ours.parameters())
            assert_same(call(ours, given), call(theirs, given), given, check_stride=True)


@each
def test_if_train_and_eval_modes_differ(subject: Subject) -> None:
    """Only a class whose entry says so looks at its mode."""
    for given in subject.inputs():
        _, ours = subject.twins(given)
        del ours.training
        try:
            call(ours, given)
        except AttributeError as error:
            assert "'training'" in str(error) and subject.info.train_and_eval_differ


@each
def test_device_ctx_init(subject: Subject) -> None:
    with torch.device("meta"):
        for given in subject.some_inputs(device=None):
            theirs, ours = subject.build(subject.theirs, given), subject.build(subject.ours, given)
            assert all(t.is_meta for t in [*given_tensors(given), *ours.state_dict().values()])
            for name in ("mask", "src_mask", "tgt_mask") if subject.name in STACKS else ():
                given.forward_input.kwargs.pop(name, None)  # torch asks whether it is causal
            assert_same(call(ours, given), call(theirs, given), given, check_stride=True)


@each
def test_errors(subject: Subject) -> None:
    create = subject.info.module_error_inputs_func
    if create is None:
        pytest.skip("torch lists no errors of this class")
    for error in create(subject.info, "cpu", subject.dtype, False, subject.training):
        given = error.module_error_input
        texts = []
        for cls in (subject.theirs, subject.ours):
            if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
                attempt = partial(cls, *given.constructor_input.args, **given.constructor_input.kwargs)
            else:
                attempt = partial(call, subject.build(cls, given), given)
            with pytest.raises(error.error_type, match=error.error_regex) as raised:
                attempt()
            assert type(raised.value) is error.error_type
            texts.append(str(raised.value))
        assert texts[0] == texts[1]


@each
@either_swap
def test_to(subject: Subject, swap: bool) -> None:
    other = torch.float32 if subject.dtype == torch.float64 else torch.float64
    for given in subject.some_inputs():
        theirs, ours = subject.twins(given)
        before = list(ours.parameters())
        for dtype in (other, subject.dtype):
            for p in ours.parameters():
                p.grad = torch.ones_like(p)
            with swapping(swap):
                ours.to(dtype), theirs.to(dtype)
            given.forward_input.args = tree_map_only(
                Tensor, lambda t, dtype=dtype: t.to(dtype) if t.is_floating_point() else t, given.forward_input.args
            )
            assert all(mine is p for mine, p in zip(ours.parameters(), before, strict=True))
            assert all(p.dtype == dtype and p.grad.dtype == dtype for p in before)
            assert_same(call(ours, given), call(theirs, given), given)


@each
@either_swap
def test_to_empty(subject: Subject, swap: bool) -> None:
    for given in subject.some_inputs():
        theirs = subject.build(subject.theirs, given)
        with torch.device("meta"):
            ours = subject.build(subject.ours, given).to("meta")  # layers that are given to a stack too
        before = list(ours.parameters())
        with swapping(swap):
            ours.to_empty(device="cpu")
        for mine, p in zip(ours.parameters(), before, strict=True):
            assert (mine.device.type, mine.shape, mine is p) == ("cpu", p.shape, swap)
        ours.load_state_dict(theirs.state_dict())
        assert_same(call(ours, given), call(theirs, given), given)


@each
def test_free(subject: Subject) -> None:
    """Without a call of the garbage collector a used module goes with its last reference, as torch's does."""
    for given in subject.inputs(requires_grad=True):
        _, ours = subject.twins(given)
        gradients(call(ours, given), [*given_tensors(given), *ours.parameters()])
        references = {name: weakref.ref(p) for name, p in [("the module", ours), *ours.named_parameters()]}
        del ours
        assert [name for name, reference in references.items() if reference() is not None] == []


FUNCTIONS = ("scaled_dot_product_attention", "cross_entropy")
OPERATORS: dict[str, OpInfo] = {info.name: info for info in op_db}


@dataclass(frozen=True)
class Operator:
    """A function of ours in one dtype."""

    name: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def info(self) -> OpInfo:
        return OPERATORS[f"nn.functional.{self.name}"]

    @property
    def table(self) -> Op:
        return OPS["attention" if self.name == "scaled_dot_product_attention" else self.name]

    def samples(self, requires_grad: bool = False, **options: Any) -> list[SampleInput]:
        """Half of them: torch makes each twice."""
        return list(self.info.sample_inputs("cpu", self.dtype, requires_grad, **options))[::2]

    def ours(self, sample: SampleInput) -> Tensor:
        if self.table.candidates("cpu", torch.float32)[0] is self.table.reference:  # else torch's beside itself
            with suppress(fastseq.BackendError), fastseq.use_backend("reference"):
                return self._call(fastseq.functional, sample)
        return self._call(fastseq.functional, sample)

    def theirs(self, sample: SampleInput) -> Tensor:
        return self._call(nn.functional, sample)

    def _call(self, module: Any, sample: SampleInput) -> Tensor:
        torch.manual_seed(0)
        return getattr(module, self.name)(sample.input, *sample.args, **sample.kwargs)


OPERATORS_IN_DTYPES = [
    Operator(name, dtype)
    for name in FUNCTIONS
    for dtype in sorted(OPERATORS[f"nn.functional.{name}"].supported_dtypes("cpu"), key=str)
]
each_operator = pytest.mark.parametrize("subject", OPERATORS_IN_DTYPES, ids=str)
each_double_operator = pytest.mark.parametrize(
    "subject", [s for s in OPERATORS_IN_DTYPES if s.dtype == torch.float64], ids=str
)


def sample_tensors(sample: SampleInput) -> list[Tensor]:
    return [t for t in tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(t, Tensor)]


def transformed(sample: SampleInput, change: Callable[[Tensor], Tensor]) -> SampleInput:
    return sample.transform(lambda t: change(t) if isinstance(t, Tensor) else t)


@each_operator
def test_operator_forward_and_backward(subject: Operator) -> None:
    """What torch's gives, but for dropout, which draws other numbers: they are the same for the same seed.

    torch's samples have scores of hundreds, in whose float32 there are four decimals.
    """
    for sample in subject.samples(requires_grad=True):
        got = subject.ours(sample)
        if sample.kwargs.get("dropout_p"):
            assert torch.equal(got, subject.ours(sample))
            continue
        exact = transformed(
            sample, lambda t: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        )
        results = [
            [out, *gradients(out, sample_tensors(given))]
            for out, given in ((got, sample), (subject.theirs(sample), sample), (subject.theirs(exact), exact))
        ]
        if subject.dtype == torch.float64:
            torch.testing.assert_close(*results[:2])
        elif subject.dtype == torch.float32:
            torch.testing.assert_close(*results[:2], rtol=1e-4, atol=1e-4)
        else:
            assert_no_worse(*results)


@each_operator
def test_operator_noncontiguous_samples(subject: Operator) -> None:
    for sample in subject.samples(requires_grad=True):
        other = sample.noncontiguous()
        got, want = subject.ours(other), subject.ours(sample)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            gradients(got, sample_tensors(other)), gradients(want, sample_tensors(sample), spread)
        )


@each_operator
def test_operator_neg_view(subject: Operator) -> None:
    for sample in subject.samples():
        negative = transformed(sample, lambda t: torch._neg_view(-t))
        assert negative.input.is_neg()
        torch.testing.assert_close(subject.ours(negative), subject.ours(sample))


@each_operator
def test_operator_cow_input(subject: Operator) -> None:
    """Inputs that are copied when somebody writes to them are not copied."""
    if subject.table.candidates("cpu", torch.float32)[0].runtime is not None:
        pytest.skip("a kernel in Python asks for the address of a tensor's memory, as if to write there")
    for sample in subject.samples(requires_grad=True):
        lazy = transformed(sample, lambda t: torch._lazy_clone(t.detach()).requires_grad_(t.requires_grad))
        leaves = sample_tensors(lazy)
        gradients(subject.ours(lazy), leaves)
        assert all(torch._C._is_cow_tensor(t) for t in leaves)


@each_operator
def test_operator_fake(subject: Operator) -> None:
    for sample in subject.samples():
        with FakeTensorMode() as mode:
            got = subject.ours(transformed(sample, mode.from_tensor))
        want = subject.ours(sample)
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@each_double_operator
def test_operator_fn_grad(subject: Operator) -> None:
    check_operator(gradcheck, subject, check_batched_grad=True)


@each_double_operator
def test_operator_fn_gradgrad(subject: Operator) -> None:
    check_operator(gradgradcheck, subject, every=3)


@each_double_operator
def test_operator_forward_mode_AD(subject: Operator) -> None:  # noqa: N802
    """Which torch's function does not have."""
    check_operator(gradcheck, subject, check_forward_ad=True, check_backward_ad=False, check_batched_grad=False)


def check_operator(check: Callable[..., bool], subject: Operator, every: int = 1, **options: Any) -> None:
    for sample in subject.samples(requires_grad=True)[::every]:

        def call(*tensors: Tensor, sample: SampleInput = sample) -> Tensor:
            rest = iter(tensors)
            return subject.ours(transformed(sample, lambda _: next(rest)))

        assert check(call, sample_tensors(sample), fast_mode=True, **options)
