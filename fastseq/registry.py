"""Which implementation serves an op: the table's types, and the choice with its reasons.

An op has one table, a list of `Impl` in order of preference. `Op.select` takes the first that has no reason
against it. An implementation asked for by name (`use_backend`, or FASTSEQ_BACKEND in the environment) serves or raises;
it never falls back.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from fastseq import native

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
            `backward`; imported when first used.
        devices: device types it runs on; empty means all.
        dtypes: dtypes it takes; empty means all floating dtypes.
        needs: called with the op's arguments, returns None or the reason against this call in words.
        verified: architectures on which its whole test suite has passed; elsewhere the first use checks itself.
            Empty means that it needs no check (the reference).
    """

    name: str
    target: str
    devices: frozenset[str] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()
    needs: Callable[..., str | None] | None = None
    verified: frozenset[str] = frozenset()

    @cached_property
    def is_native(self) -> bool:
        return self.target.startswith("fastseq_native::")

    @cached_property
    def kernel(self) -> Kernel:
        if self.is_native:
            if (reason := native.unavailable()) is not None:
                raise BackendError(f"{self.target}: {reason}")
            op = self.target.removeprefix("fastseq_native::")
            namespace = torch.ops.fastseq_native
            return _NativeKernel(getattr(namespace, op).default, getattr(namespace, f"{op}_backward").default)
        return importlib.import_module(self.target)

    def unavailable(self) -> str | None:
        """The reason why this machine cannot run it at all, or None."""
        return native.unavailable() if self.is_native else None

    def against(self, device: str, dtype: torch.dtype) -> str | None:
        """The reason why it cannot serve tensors of this kind here, or None."""
        if self.devices and device not in self.devices:
            return f"runs on {' and '.join(sorted(self.devices))}, not on {device}"
        if self.dtypes and dtype not in self.dtypes:
            known = " and ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"takes {known}, not {str(dtype).removeprefix('torch.')}"
        return self.unavailable()


class Op:
    """An op's name, its table of implementations and the check that an unverified one has to pass.

    Args:
        name: the noun, as in `fastseq::name`.
        impls: the table, best first. The last row serves everything.
        self_check: called with a kernel, a device and a dtype; raises if the kernel is wrong.
    """

    def __init__(self, name: str, impls: list[Impl], self_check: Callable[[Kernel, str, torch.dtype], None]) -> None:
        self.name = name
        self.impls = impls
        self.self_check = self_check
        self._choices: dict[tuple[str | None, str, torch.dtype], list[Impl]] = {}

    def reason_against(self, impl: Impl, device: str, dtype: torch.dtype) -> str | None:
        """Why `impl` cannot be used for tensors of this kind on this machine, the self-check included, or None."""
        reason = impl.against(device, dtype)
        if reason is None and impl.verified:
            from fastseq import selfcheck

            reason = selfcheck.failure(self, impl, device, dtype)
        return reason

    def candidates(self, device: str, dtype: torch.dtype) -> list[Impl]:
        """The implementations that can serve tensors of this kind, best first; one only if it was asked for by name.

        Raises:
            BackendError: the implementation asked for cannot serve, or there is none of that name.
        """
        requested = requested_backend()
        key = (requested, device, dtype)
        if key not in self._choices:
            if requested is None:
                self._choices[key] = [i for i in self.impls if self.reason_against(i, device, dtype) is None]
            else:
                self._choices[key] = [self._by_name(requested, device, dtype)]
        return self._choices[key]

    def select(self, device: str, dtype: torch.dtype, *args: Any) -> Kernel:
        """The kernel that serves this call; `args` are the op's arguments, for the implementations' `needs`."""
        candidates = self.candidates(device, dtype)
        reason = None
        for impl in candidates:
            reason = impl.needs(*args) if impl.needs else None
            if reason is None:
                return impl.kernel
        raise BackendError(f"fastseq::{self.name}: {candidates[-1].name} cannot serve this call: {reason}")

    def _by_name(self, name: str, device: str, dtype: torch.dtype) -> Impl:
        check_backend_name(name)
        impl = next((i for i in self.impls if i.name == name), None)
        if impl is None:
            raise BackendError(f"fastseq::{self.name} has no implementation named {name!r}")
        reason = self.reason_against(impl, device, dtype)
        if reason is not None:
            raise BackendError(f"fastseq::{self.name}: {name} was asked for but {reason}")
        return impl


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds an op to the ones that `use_backend`, `fastseq info` and the tests know."""
    OPS[op.name] = op
    return op


def known_backends() -> list[str]:
    return list(dict.fromkeys(impl.name for op in OPS.values() for impl in op.impls))


def check_backend_name(name: str) -> None:
    """Raises ValueError for a name that no op's table has."""
    if name not in known_backends():
        raise ValueError(f"unknown backend {name!r}; the known ones are {', '.join(known_backends())}")


requested_backend = _requested.get  # None where nothing was asked for


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every fastseq op of this thread is served by the implementation of this name, or raises.

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
