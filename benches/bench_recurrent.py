"""Packed input, projections, cells and fastseq's own options: `python -m pytest benches/bench_recurrent.py`.

The peer `plain` is fastseq itself: the padded run of a packed case, the run without the option of the others.
"""

import pytest
from race import MODES
from recurrent import Case, CellCase, OptionCase, PackedCase
from torch import nn

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
PACKED = [PackedCase(T, 32, 256, kind=kind, smoke=T == 100) for kind in LAYERS for T in (100, 1000)]
PROJECTED = [Case(100, B, 512, P=128, smoke=B == 1) for B in (1, 8, 32)]
CELLS = [CellCase(1, B, 256, kind=kind, smoke=True) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell) for B in (1, 32)]
OPTIONS = [
    OptionCase(100, B, 256, kind=kind, option=option, smoke=B == 1 and kind is nn.LSTM)
    for kind in LAYERS
    for option in ("lengths", "reset", *(["return_cell_sequence"] if kind is nn.LSTM else []))
    for B in (1, 32)
]


def name(case):
    return f"{case.kind.__name__}-{case}"


# Training at T=1000 is left out: a step of torch's takes many seconds.
@pytest.mark.parametrize(
    ("mode", "case"),
    [(mode, case) for mode in MODES for case in PACKED if mode == "inference" or case.T == 100],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_packed(race, mode, case):
    race(f"packed {case.kind.__name__}", mode, case)


@pytest.mark.parametrize("case", PROJECTED, ids=name)
@pytest.mark.parametrize("mode", MODES)
def test_projection(race, mode, case):
    race("projection", mode, case)


@pytest.mark.parametrize("case", CELLS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_cell(race, mode, case):
    race("cell", mode, case)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_option(race, mode, case):
    race("option", mode, case)
