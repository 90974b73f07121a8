"""GRU against what else runs it: `python -m pytest benches/bench_gru.py`; conftest.py has the options."""

import pytest
from race import MODES
from recurrent import cases_of
from torch import nn


@pytest.mark.parametrize("case", cases_of(nn.GRU), ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gru(race, mode, case):
    race("gru", mode, case)
