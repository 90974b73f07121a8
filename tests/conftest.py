"""What every test shares: seeded randomness, poisoned buffers, and skips that FASTSEQ_REQUIRE turns into failures."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType

# Before the extension is loaded: it fills every buffer that it allocates with NaN, so that an element that a kernel
# forgot cannot pass for a zero.
os.environ["FASTSEQ_POISON"] = "1"

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import registry
from fastseq.ops.attention import Arguments
from fastseq.registry import Impl, Op

EXAMPLES = Path(__file__).parent.parent / "examples"
REQUIRED = {name for name in os.environ.get("FASTSEQ_REQUIRE", "").split(",") if name}


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("fastseq.ops.cross_entropy.LEAST_LOGITS", 0)  # so that small tests reach the op
    monkeypatch.setattr("fastseq.ops.norm.LEAST_ELEMENTS", 0)
    monkeypatch.setattr("fastseq.ops.norm.LEAST_WITH_A_GRAPH", 0)
    monkeypatch.setattr("fastseq.ops.activation.LEAST_ELEMENTS", 0)
    monkeypatch.setattr("fastseq.ops.attention.LEAST_WORK", 0)
    monkeypatch.setattr("fastseq.ops.attention.LEAST_OF_ONE_QUERY", (0, 0))
    monkeypatch.setattr("fastseq.nn.block.LEAST_WORK", 0)


def name_of(value: object) -> str | None:
    """What an implementation, a dtype or a case is called in the name of a test."""
    if isinstance(value, Impl):
        return value.name
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) or is_dataclass(value) else None


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with threads_set(request.param):
        yield request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that are not about threads: at their sizes torch's are slower than one."""
    with threads_set(1):
        yield


@pytest.fixture
def nothing_asked_for() -> Iterator[None]:
    """For tests of what is chosen by itself, in a process whose environment asks for an implementation."""
    token = registry._requested.set(None)
    yield
    registry._requested.reset(token)


@pytest.fixture
def no_fast_path():
    """torch's own paths for evaluation without gradients are closed: it computes what it is documented to."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    """What has reached attention's op from the function."""
    calls: list[Arguments] = []
    op = fastseq.ops.attention.attention
    monkeypatch.setattr("fastseq.ops.attention.attention", lambda a, *rest: (calls.append(a), op(a, *rest))[1])
    return calls


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an implementation that runs on GPUs only are marked `gpu`."""
    for item in items:
        impl = item.callspec.params.get("impl") if hasattr(item, "callspec") else None
        if isinstance(impl, Impl) and device_of(impl) == "cuda":
            item.add_marker("gpu")


def device_of(impl: Impl) -> str:
    return "cuda" if impl.devices == {"cuda"} and not impl.is_interpreted("cpu") else "cpu"


def widest(impl: Impl) -> torch.dtype:
    """float64, unless the implementation takes only narrower ones."""
    return torch.float64 if not impl.dtypes or torch.float64 in impl.dtypes else torch.float32


def assert_no_worse(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """Our errors are at most twice theirs in the same precision, or what rounding the result makes."""
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        error, other_error = ((t - want).norm().item() for t in (got, other))
        assert error <= max(2 * other_error, torch.finfo(got.dtype).eps * want.norm().item())


def require(op: Op, impl: Impl, device: str, dtype: torch.dtype) -> None:
    """Skips the test, with the reason, if the implementation cannot serve here; fails if FASTSEQ_REQUIRE names it."""
    reason = op.reason_against(impl, device, dtype)
    if reason is not None:
        if impl.name in REQUIRED and (not impl.dtypes or dtype in impl.dtypes) and device == device_of(impl):
            pytest.fail(f"{impl.name} is required (FASTSEQ_REQUIRE) but {reason}")
        pytest.skip(f"{impl.name}: {reason}")


def require_kernel(op: Op, device: str, dtype: torch.dtype) -> None:
    """Skips the test, with the reasons, unless something better than the reference serves; fails if FASTSEQ_REQUIRE
    names what could.
    """
    if op.candidates(device, dtype)[0] is not op.reference:
        return
    for impl in sorted(op.impls[:-1], key=lambda impl: impl.name not in REQUIRED):
        require(op, impl, device, dtype)
    pytest.skip("the reference was asked for")


def require_native() -> None:
    """The same for a test of the extension itself."""
    from fastseq import native

    if native.unavailable() is not None:
        (pytest.fail if "cpp" in REQUIRED else pytest.skip)(f"cpp: {native.unavailable()}")


_imported: dict[str, ModuleType] = {}


def example(name: str) -> ModuleType:
    """A module of examples/, imported as when one is run: from their own folder.

    Other imports never see them: datasets is a name of Hugging Face's, too.
    """
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    others = {other: sys.modules.pop(other) for other in names if other in sys.modules}
    sys.modules.update(_imported)
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))
        _imported.update({other: sys.modules.pop(other) for other in names if other in sys.modules})
        sys.modules.update(others)
