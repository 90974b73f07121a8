"""Which implementation serves an op: the table's types, and the choice with its reasons.

An op has one table, a list of `Impl` in order of preference. `Op.select` takes the first that has no reason
against it. An implementation asked for by name (`use_backend`, or FASTSEQ_BACKEND in the environment) serves or raises;
it never falls back. Ops that have none of that name are served as if nothing had been asked for.
"""

import importlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from fastseq import jit, native

FLOATS = frozenset({torch.float32, torch.float64})
HALF = frozenset({torch.float16, torch.bfloat16})

# The implementation asked for by name: FASTSEQ_BACKEND as it was at import, or that of the enclosing use_backend.
_requested: ContextVar[str | None] = ContextVar("fastseq_backend", default=os.environ.get("FASTSEQ_BACKEND") or None)


class Kernel(Protocol):
    """What an implementation's target holds: both directions of the op, with the op's own signature."""

    @property
    def forward(self) -> Callable[..., Any]: ...

    @property
    def backward(self) -> Callable[..., Any]: ...


class BackendError(RuntimeError):
    """An implementation that was asked for by name cannot serve; the message says why."""


@dataclass(frozen=True)
class _NativeKernel:
    forward: Callable[..., Any]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Impl:
    """One row of an op's table.

    Attributes:
        name: what users call it ("cpp", "triton", ...).
        target: "fastseq_native::op" for the extension's op and its `op_backward`, else a module with `forward` and
            `backward`, or "module:name" for what has them in a module; imported when first used.
        devices: device types it runs on; empty means all.
        dtypes: dtypes it takes; empty means all floating dtypes.
        needs: called with the op's arguments, returns None or the reason against this call in words.
        yields: likewise, returns None or why torch's own layer is ahead in this call. It is asked where there is such a
            layer to go to, and nobody asks for this implementation by name; arguments may not have been checked.
        verified: architectures on which its whole test suite has passed; elsewhere the first use checks itself.
        calls: for a module whose kernels are the extension's, in CUDA, one of the ops that it calls.
        only_by_name: why it serves only where it is asked for by name, or None.
    """

    name: str
    target: str
    devices: frozenset[str] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()
    needs: Callable[..., str | None] | None = None
    yields: Callable[..., str | None] | None = None
    verified: frozenset[str] = frozenset()
    calls: str | None = None
    only_by_name: str | None = None

    @cached_property
    def is_native(self) -> bool:
        return self.target.startswith("fastseq_native::")

    @cached_property
    def runtime(self) -> jit.Runtime | None:
        """What compiles it when it is called, or None."""
        return jit.runtime_of(self.target)

    @cached_property
    def kernel(self) -> Kernel:
        if self.is_native:
            if (reason := native.unavailable()) is not None:
                raise BackendError(f"{self.target}: {reason}")
            op = self.target.removeprefix("fastseq_native::")
            namespace = torch.ops.fastseq_native
            return _NativeKernel(getattr(namespace, op).default, getattr(namespace, f"{op}_backward").default)
        module, _, name = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            return getattr(found, name) if name else found
        except Exception as error:
            if self.runtime is None:
                raise
            raise jit.CompileError(f"{type(error).__name__}: {error}") from error

    def unavailable(self) -> str | None:
        """The reason why this machine cannot run it at all, or None."""
        if self.is_native:
            return native.unavailable() or self._left_out()
        if self.calls:
            return None if native.emulator() else native.without_cuda(self.calls) or jit.why_no_gpu()
        return self.runtime.unavailable if self.runtime else None

    def _left_out(self) -> str | None:
        """The reason why the extension does not hold it: in a source tree it may be older than this table."""
        if hasattr(torch.ops.fastseq_native, self.target.removeprefix("fastseq_native::")):
            return None
        return f"the C++ extension has no {self.target.removeprefix('fastseq_native::')}: it has to be built anew"

    def build(self) -> str:
        """Tells one state of what is compiled from another."""
        return native.build() if self.is_native or self.calls else self.runtime.build if self.runtime else ""

    def is_interpreted(self, device: str) -> bool:
        """Whether it runs on the CPU in place of the device that it is for."""
        if device != "cpu":
            return False
        return native.emulator() is not None if self.calls else self.runtime is jit.TRITON and jit.is_interpreted()

    def against(self, device: str, dtype: torch.dtype) -> str | None:
        """The reason why it cannot serve tensors of this kind here, or None."""
        if self.devices and device not in self.devices and not self.is_interpreted(device):
            return f"runs on {' and '.join(sorted(self.devices))}, not on {device}"
        if self.dtypes and dtype not in self.dtypes:
            known = " and ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"takes {known}, not {str(dtype).removeprefix('torch.')}"
        return self.unavailable()


class _CompiledWhenCalled:
    """A kernel of which a call may show that it cannot be compiled here: then the next implementation serves."""

    __slots__ = ("args", "device", "dtype", "impl", "op")  # it is made for every call

    def __init__(self, op: "Op", impl: Impl, device: str, dtype: torch.dtype, args: tuple[Any, ...]) -> None:
        self.op, self.impl, self.device, self.dtype, self.args = op, impl, device, dtype, args

    def forward(self, *args: Any) -> Any:
        return self._call("forward", args)

    def backward(self, *args: Any) -> Any:
        return self._call("backward", args)

    def _call(self, direction: str, args: tuple[Any, ...]) -> Any:
        try:
            if self.device != "cuda":
                return getattr(self.impl.kernel, direction)(*args)
            with torch.cuda.device_of(self.args[0]):  # Triton launches on the current one
                return getattr(self.impl.kernel, direction)(*args)
        except Exception as error:
            if self.impl.runtime is None or not self.impl.runtime.is_compile_error(error):
                raise  # out of memory, above all
            self.op.give_up(self.impl, error)
        return getattr(self.op.select(self.device, self.dtype, *self.args), direction)(*args)


class _Watched:
    """A row's kernel, which notes the row's name when it has been called."""

    def __init__(self, impl: Impl, names: set[str]) -> None:
        self._impl, self._names = impl, names
        self._kernel: Kernel | None = impl.__dict__.get("kernel")

    def __getattr__(self, direction: str) -> Any:
        if self._kernel is None:
            self._kernel = vars(Impl)["kernel"].func(self._impl)  # imported when first used, as ever
        function = getattr(self._kernel, direction)

        def noted(*args: Any) -> Any:
            outputs = function(*args)
            self._names.add(self._impl.name)
            return outputs

        return noted

    def leave(self) -> None:
        self._impl.__dict__.pop("kernel")
        if self._kernel is not None:
            self._impl.__dict__["kernel"] = self._kernel


@contextmanager
def kernels_called() -> Iterator[set[str]]:
    """The names of the implementations whose kernels are called within the block, by any thread; not to be nested."""
    names: set[str] = set()
    watched = [_Watched(impl, names) for op in OPS.values() for impl in op.impls]
    for row in watched:
        row._impl.__dict__["kernel"] = row
    try:
        yield names
    finally:
        for row in watched:
            row.leave()


class Op:
    """An op's name, its table of implementations and the check that an unverified one has to pass.

    Args:
        name: the noun, as in `fastseq::name`.
        impls: the table, best first. The last row is the reference: it serves everything, and is what the others are
            checked against.
        self_check: called with a kernel, a device and a dtype; raises if the kernel is wrong.
    """

    def __init__(self, name: str, impls: list[Impl], self_check: Callable[[Kernel, str, torch.dtype], None]) -> None:
        self.name = name
        self.impls = impls
        self.self_check = self_check
        self._choices: dict[tuple[str | None, str, torch.dtype], list[Impl]] = {}
        self._preferred: dict[tuple[str | None, str, torch.dtype], Impl] = {}
        self._rules: dict[tuple[str | None, str, torch.dtype], Callable[..., str | None] | None] = {}
        self._given_up: dict[str, str] = {}

    @property
    def reference(self) -> Impl:
        return self.impls[-1]

    def reason_against(self, impl: Impl, device: str, dtype: torch.dtype) -> str | None:
        """Why `impl` cannot be used for tensors of this kind on this machine, the self-check included, or None."""
        reason = impl.against(device, dtype)
        if reason is None:
            reason = self._given_up.get(impl.name)
        if reason is None and impl is not self.reference and not impl.is_interpreted(device):
            from fastseq import selfcheck

            reason = selfcheck.failure(self, impl, device, dtype)
        return reason

    def reason_to_pass_over(self, impl: Impl, device: str, dtype: torch.dtype) -> str | None:
        """Why `impl` is not among the candidates for tensors of this kind, or None."""
        by_name = None if self.requested() == impl.name else impl.only_by_name
        return impl.against(device, dtype) or by_name or self.reason_against(impl, device, dtype)

    def computes_in(self, device: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype that tensors of this one shall have: half precision goes to the op as float32, unless an
        implementation other than the reference takes it as it is.
        """
        if dtype not in HALF:
            return dtype
        requested = self.requested()
        takers = [i for i in self.impls if dtype in i.dtypes and requested in (None, i.name)]
        return dtype if any(self.reason_to_pass_over(i, device, dtype) is None for i in takers) else torch.float32

    def give_up(self, impl: Impl, error: Exception) -> None:
        """Uses an implementation no more in this process, and says so once."""
        reason = why_not_compiled(error)
        self._choices.clear()
        self._preferred.clear()
        self._rules.clear()
        if self._given_up.setdefault(impl.name, reason) is reason:
            warnings.warn(f"fastseq::{self.name}: {impl.name} {reason}", RuntimeWarning, stacklevel=2)

    def candidates(self, device: str, dtype: torch.dtype) -> list[Impl]:
        """The implementations that can serve tensors of this kind, best first; one only if it was asked for by name.

        Raises:
            BackendError: the implementation asked for cannot serve.
            ValueError: no op has one of that name.
        """
        requested = self.requested()
        key = (requested, device, dtype)
        if key not in self._choices:
            if requested is None:
                self._choices[key] = [i for i in self.impls if self.reason_to_pass_over(i, device, dtype) is None]
            else:
                self._choices[key] = [self._by_name(requested, device, dtype)]
        return self._choices[key]

    def preferred(self, device: str, dtype: torch.dtype) -> Impl:
        """The first of the candidates. Those behind it are not asked: that may mean to import what compiles them.

        Raises:
            BackendError, ValueError: as for `candidates`.
        """
        requested = self.requested()
        key = (requested, device, dtype)
        if (known := self._choices.get(key)) is not None:
            return known[0]
        if requested is not None:
            return self.candidates(device, dtype)[0]
        if key not in self._preferred:
            self._preferred[key] = next(i for i in self.impls if self.reason_to_pass_over(i, device, dtype) is None)
        return self._preferred[key]

    def rule_for_torch(self, device: str, dtype: torch.dtype) -> Callable[..., str | None] | None:
        """What tells, from a call's arguments, why torch's own layer shall have it, or None: that nothing but the
        reference takes it, or that what takes it yields. None where there is nothing to tell.
        """
        requested = self.requested()
        key = (requested, device, dtype)
        if key not in self._rules:
            self._rules[key] = self._rule(device, dtype) if requested is None else None
        return self._rules[key]

    def _rule(self, device: str, dtype: torch.dtype) -> Callable[..., str | None] | None:
        first = self.preferred(device, dtype)
        if first is self.reference or not (first.yields or first.needs):  # mostly the first one takes all
            return None
        takers = [impl for impl in self.candidates(device, dtype) if impl is not self.reference]

        def rule(*args: Any) -> str | None:
            reason = None
            for impl in takers:
                reason = impl.needs(*args) if impl.needs else None
                if reason is None:
                    return impl.yields(*args) if impl.yields else None
            return reason

        return rule

    def select(self, device: str, dtype: torch.dtype, *args: Any) -> Kernel:
        """The kernel that serves this call; `args` are the op's arguments, for the implementations' `needs`."""
        chosen = self.preferred(device, dtype)
        if chosen.needs and chosen.needs(*args) is not None:
            chosen = self._next_best(device, dtype, *args)
        return _CompiledWhenCalled(self, chosen, device, dtype, args) if chosen.runtime else chosen.kernel

    def _next_best(self, device: str, dtype: torch.dtype, *args: Any) -> Impl:
        """The first of the candidates that takes this call."""
        candidates = self.candidates(device, dtype)
        reason = None
        for impl in candidates:
            reason = impl.needs(*args) if impl.needs else None
            if reason is None:
                return impl
        raise BackendError(f"fastseq::{self.name}: {candidates[-1].name} cannot serve this call: {reason}")

    def requested(self) -> str | None:
        """The implementation asked for by name, or None; one that only other ops have is not asked for here.

        Raises:
            ValueError: no op has one of that name.
        """
        name = requested_backend()
        if name is None or any(impl.name == name for impl in self.impls):
            return name
        check_backend_name(name)
        return None

    def _by_name(self, name: str, device: str, dtype: torch.dtype) -> Impl:
        impl = next(i for i in self.impls if i.name == name)
        reason = self.reason_against(impl, device, dtype)
        if reason is not None:
            raise BackendError(f"fastseq::{self.name}: {name} was asked for but {reason}")
        return impl


def why_not_compiled(error: Exception) -> str:
    kind = "" if isinstance(error, jit.CompileError) else f"{type(error).__name__}: "
    told = re.sub(r"\x1b\[\d*m", "", str(error)).strip() or repr(error)  # numba's are in colours
    return f"cannot be compiled here: {kind}{told.splitlines()[0]}"


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds an op to the ones that `use_backend`, `fastseq info` and the tests know."""
    OPS[op.name] = op
    return op


def known_backends() -> list[str]:
    kernels = dict.fromkeys(impl.name for op in OPS.values() for impl in op.impls[:-1])
    return [*kernels, "reference"]


def check_backend_name(name: str) -> None:
    """Raises ValueError for a name that no op's table has."""
    if name not in known_backends():
        raise ValueError(f"unknown backend {name!r}; the known ones are {', '.join(known_backends())}")


requested_backend = _requested.get  # None where nothing was asked for


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every fastseq op of this thread is served by the implementation of this name, or raises.

    Ops that have none of this name are served as if nothing had been asked for: a model can be run with all that there
    is of numba's kernels, say.

    Args:
        name: a name from the tables, such as "cpp" or "reference" (`fastseq info` lists them).

    Raises:
        ValueError: there is no such implementation.
    """
    check_backend_name(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)
