"""How cost grows with sizes and threads, calls of next to nothing, first calls, memory: `python -m pytest
benches/bench_series.py`; conftest.py has the options.

All but first calls are races against torch, of one series each.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attention
import first_call
import memory
import pytest
import recurrent
from attention import LayerCase
from bench_fused import Case as FusedCase
from bench_fused import our_swiglu, torchs_swiglu
from race import MODES
from recurrent import CellCase
from torch import nn
from transformer import EncoderCase

TORCH = ("torch",)


@dataclass(frozen=True)
class Point:
    """A case of a series.

    Attributes:
        layer: what the series is of.
        case: the case.
        axis: the size that grows, by its letter.
        fixed: the sizes that do not, in words.
    """

    layer: str
    case: Any
    axis: str = ""
    fixed: str = ""
    smoke: bool = False

    def __str__(self) -> str:
        return f"{self.layer}-over{self.axis}-{self.case}" if self.axis else f"{self.layer}-{self.case}"

    @property
    def value(self) -> int:
        return getattr(self.case, self.axis)


def growing(layer: str, case: Any, axis: str, values: tuple[int, ...], fixed: str) -> list[Point]:
    return [Point(layer, replace(case, **{axis: value}), axis, fixed, smoke=value == values[0]) for value in values]


SCALING = [
    point
    for kind in (nn.LSTM, nn.GRU)
    for point in (
        *growing(kind.__name__, recurrent.Case(1, 1, 256, kind=kind), "T", (1, 10, 100, 1000), "B 1, H 256"),
        *growing(kind.__name__, recurrent.Case(50, 1, 256, kind=kind), "B", (1, 8, 32, 128), "T 50, H 256"),
        *growing(kind.__name__, recurrent.Case(50, 1, 1, kind=kind), "H", (64, 128, 256, 512, 1024), "T 50, B 1"),
    )
] + growing("attention", attention.Case(1, 64), "S", (64, 256, 1024, 4096), "B 1, 8 heads of 64")

THREADS = [
    Point("LSTM", recurrent.Case(100, 1, 512)),
    Point("LSTM", recurrent.Case(100, 32, 256)),
    Point("GRU", recurrent.Case(100, 1, 512, kind=nn.GRU)),
    Point("GRU", recurrent.Case(100, 32, 256, kind=nn.GRU)),
    Point("attention", attention.Case(32, 64), smoke=True),
    Point("attention", attention.Case(4, 512)),
    Point("MultiheadAttention", LayerCase(512, 8, 8, 128)),
    Point("TransformerEncoderLayer", EncoderCase(512, 8, 8, 128)),
]

OVERHEAD = [
    *(Point(kind.__name__, recurrent.Case(1, 1, 8, kind=kind)) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    *(Point(kind.__name__, CellCase(1, 1, 8, kind=kind)) for kind in (nn.LSTMCell, nn.GRUCell)),
    Point("scaled_dot_product_attention", attention.Case(1, 1, D=8, H=1), smoke=True),
    Point("MultiheadAttention", LayerCase(8, 1, 1, 1)),
    Point("TransformerEncoderLayer", EncoderCase(8, 1, 1, 1)),
    Point("SwiGLU", FusedCase("swiglu", "activation", 1, 8, 2, 0, torchs_swiglu, our_swiglu)),
]


def pytest_generate_tests(metafunc):
    if "count" in metafunc.fixturenames:
        most = metafunc.config.option.threads
        metafunc.parametrize("count", [2**k for k in range(most.bit_length())])


@pytest.mark.parametrize("case", SCALING, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_scaling(race, mode, case):
    series = dict(kind="scaling", layer=case.layer, axis=case.axis, value=case.value, fixed=case.fixed)
    race(f"growth over {case.axis}", mode, case.case, among=TORCH, series=series)


@pytest.mark.parametrize("case", THREADS, ids=str)
def test_threads(race, count, case):
    series = dict(kind="threads", layer=case.layer)
    race(
        f"{count} threads" if count > 1 else "1 thread", MODES[0], case.case, among=TORCH, threads=count, series=series
    )


@pytest.mark.parametrize("case", OVERHEAD, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_overhead(race, mode, case):
    race("overhead", mode, case.case, among=TORCH, series=dict(kind="overhead", layer=case.layer))


@pytest.mark.parametrize("case", first_call.CASES, ids=str)
def test_first_call(benchmark, case):
    found = benchmark.pedantic(first_call.measure, (case,), rounds=1)
    benchmark.group = f"first call, {case.layer}"
    benchmark.extra_info["series"] = dict(kind="first call", layer=case.layer, how=case.how, runs=found)


@pytest.mark.parametrize("case", [memory.CASES[name] for name in memory.REPORTED], ids=str)
def test_memory(race, case):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks of memory are read from Linux's /proc")
    rises = {who: memory.measure(str(case), who) for who in ("torch", "fastseq")}
    series = dict(kind="memory", layer=case.layer, peak_mib=rises)
    race("memory", MODES[1], case.case, among=TORCH, series=series)
