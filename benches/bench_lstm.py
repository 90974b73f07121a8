"""LSTM against what else runs it: `python -m pytest benches/bench_lstm.py`; conftest.py has the options."""

import pytest
from race import MODES
from recurrent import cases_of
from torch import nn


@pytest.mark.parametrize("case", cases_of(nn.LSTM), ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_lstm(race, mode, case):
    race("lstm", mode, case)
