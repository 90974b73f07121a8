"""LSTM against what else runs it: `python -m pytest benches/bench_lstm.py`; conftest.py has the options."""

import pytest
from race import MODES
from recurrent import Case

CASES = [
    Case(1, 1, 128, smoke=True),
    Case(1, 1, 512, smoke=True),
    Case(50, 1, 128, smoke=True),
    Case(100, 1, 256),
    Case(100, 1, 512),
    Case(100, 1, 1024),
    Case(100, 8, 256),
    Case(100, 32, 256, smoke=True),
    Case(100, 32, 512, layers=2),
    Case(100, 128, 512),
    Case(1000, 1, 64),
    Case(200, 4, 256, bidirectional=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_lstm(race, mode, case):
    race("lstm", mode, case)
