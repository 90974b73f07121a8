"""Which block of the CUDA recurrent kernels has which units and rows, for GPUs that need not be here."""

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import REQUIRED
from hypothesis import given
from hypothesis import strategies as st

CSRC = Path(__file__).parent.parent / "csrc"
# Multiprocessors, and bytes of shared memory that one block may have: A100, H100 and B200.
GPUS = {"sm_80": (108, 163 * 1024), "sm_90": (132, 227 * 1024), "sm_100": (148, 227 * 1024)}
TILE = 16  # rows of the batch
WARPS, LANES, CHUNK = 8, 32, 64

LIBRARY = """
#include "cuda/recurrent_plan.h"
using namespace fastseq::gpu;

extern "C" bool plan_of(const StepProduct* of, int multiprocessors, int shared, Plan* to) {
  const std::optional<Plan> found = plan(*of, multiprocessors, shared);
  if (found) *to = *found;
  return found.has_value();
}
extern "C" double time_of(const StepProduct* of, const Plan* p) { return step_time(*of, *p); }
extern "C" int registers_of(int columns) { return register_chunks(columns); }
"""


class Product(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64 if name == "K" else ctypes.c_int) for name in ("stack", "units", "K", "B", "D")]


class PlanOf(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("choice", "unit_tiles", "row_groups", "row_tiles", "shared")]


class Call(NamedTuple):
    """One launch: of a cell with G gates, H units and elements of `size` bytes."""

    G: int
    H: int
    B: int
    D: int
    size: int
    backward: bool

    @property
    def product(self) -> Product:
        E = -(-self.H * self.size // 16) * 16  # a row of h in bytes
        stack, K = (1, self.G * E) if self.backward else (self.G, E)
        return Product(stack, self.H, K, self.B, self.D)


calls = st.builds(
    Call,
    G=st.sampled_from([1, 3, 4]),
    H=st.one_of(st.integers(1, 80), st.integers(1, 5000), st.sampled_from([256, 512, 1024, 2048])),
    B=st.one_of(st.integers(1, 80), st.integers(1, 100_000)),
    D=st.integers(1, 2),
    size=st.sampled_from([2, 4]),
    backward=st.booleans(),
)
gpus = st.sampled_from(sorted(GPUS))


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The planner as a library: it is a header for C++."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        (pytest.fail if "cpp" in REQUIRED else pytest.skip)("there is no C++ compiler")
    source = tmp_path_factory.mktemp("plan") / "plan.cpp"
    source.write_text(LIBRARY)
    library = source.with_suffix(".so")
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([*compiler, *options, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.plan_of.restype, loaded.time_of.restype = ctypes.c_bool, ctypes.c_double
    return loaded


def plan(planner: ctypes.CDLL, call: Call, gpu: str) -> PlanOf | None:
    found = PlanOf()
    return found if planner.plan_of(ctypes.byref(call.product), *GPUS[gpu], ctypes.byref(found)) else None


def shared_bytes(planner: ctypes.CDLL, of: Product, choice: int, row_tiles: int) -> int:
    """What a block takes, counted as the kernels lay it out."""
    units = 8 << choice
    columns = of.stack * units // 8
    stride = 8 * (columns if columns % 2 else columns + 1)
    sums = 2 * WARPS * TILE * stride * 4
    carried = row_tiles * TILE * units * 2 * 4
    chunks = -(-of.K // (WARPS * CHUNK))
    rest = max(0, chunks - planner.registers_of(columns)) * WARPS * columns * LANES * 16
    return sums + carried + rest


def candidates(planner: ctypes.CDLL, call: Call, gpu: str) -> Iterator[PlanOf]:
    """All plans that fit."""
    multiprocessors, shared = GPUS[gpu]
    of, batch_tiles = call.product, -(-call.B // TILE)
    for choice in range(3):
        unit_tiles = -(-call.H // (8 << choice))
        for groups in range(1, min(batch_tiles, multiprocessors // (unit_tiles * call.D)) + 1):
            row_tiles = -(-batch_tiles // groups)
            taken = shared_bytes(planner, of, choice, row_tiles)
            if taken <= shared:
                yield PlanOf(choice, unit_tiles, groups, row_tiles, taken)


@given(call=calls, gpu=gpus)
def test_what_fits_is_planned_within_the_limits(planner: ctypes.CDLL, call: Call, gpu: str) -> None:
    found = plan(planner, call, gpu)
    fitting = list(candidates(planner, call, gpu))
    assert (found is None) == (not fitting)
    if found is None:
        return
    multiprocessors, shared = GPUS[gpu]
    assert 1 <= found.unit_tiles * found.row_groups * call.D <= multiprocessors
    assert found.shared == shared_bytes(planner, call.product, found.choice, found.row_tiles) <= shared
    assert found.shared % 16 == 0
    times = [planner.time_of(ctypes.byref(call.product), ctypes.byref(p)) for p in fitting]
    assert planner.time_of(ctypes.byref(call.product), ctypes.byref(found)) == min(times)


@given(call=calls, gpu=gpus)
def test_each_unit_and_row_has_one_block(planner: ctypes.CDLL, call: Call, gpu: str) -> None:
    found = plan(planner, call, gpu)
    if found is None:
        return
    units = 8 << found.choice
    rows = found.row_tiles * TILE
    parts: dict[tuple[int, int, int], int] = {}
    for block in range(found.unit_tiles * found.row_groups * call.D):
        tile, group = block % found.unit_tiles, block // found.unit_tiles
        d, first_unit, first_row = group // found.row_groups, tile * units, group % found.row_groups * rows
        parts[d, first_unit, first_row] = min(units, call.H - first_unit) * min(rows, call.B - first_row)
    assert all(size > 0 for size in parts.values())  # a block without work would still be waited for
    assert {d for d, _, _ in parts} == set(range(call.D))
    # Parts that start at different multiples of their size do not overlap: together they are all there is.
    assert sum(parts.values()) == call.D * call.H * call.B


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 6, 8, 12, 16])
def test_weights_leave_registers_for_the_rest(planner: ctypes.CDLL, columns: int) -> None:
    held = planner.registers_of(columns)
    assert held >= 1
    assert held * columns * 4 <= 128


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("B", [1, 16, 64])
@pytest.mark.parametrize(
    ("G", "H", "D", "size", "gpu_names"),
    [
        (4, 2048, 1, 2, ["sm_90", "sm_100"]),
        (3, 2048, 1, 2, ["sm_90", "sm_100"]),
        (4, 1024, 2, 2, ["sm_90", "sm_100"]),
        (3, 1024, 2, 2, ["sm_90", "sm_100"]),
        (4, 1024, 1, 4, ["sm_90", "sm_100"]),
        (3, 1024, 1, 4, ["sm_90", "sm_100"]),
        (4, 768, 1, 2, list(GPUS)),
        (3, 1024, 1, 2, list(GPUS)),
        (4, 512, 1, 4, list(GPUS)),
    ],
)
def test_sizes_that_fit(
    planner: ctypes.CDLL, G: int, H: int, D: int, size: int, gpu_names: list[str], B: int, backward: bool
) -> None:
    for gpu in gpu_names:
        assert plan(planner, Call(G, H, B, D, size, backward), gpu) is not None, gpu


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("backward", [False, True])
def test_weights_that_no_chip_holds(planner: ctypes.CDLL, gpu: str, backward: bool) -> None:
    assert plan(planner, Call(4, 4096, 1, 1, 2, backward), gpu) is None
    assert plan(planner, Call(4, 2048, 1, 1, 4, backward), gpu) is None
