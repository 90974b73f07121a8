"""RNN against what else runs it: `python -m pytest benches/bench_rnn.py`; conftest.py has the options."""

import pytest
from race import MODES
from recurrent import cases_of
from torch import nn


@pytest.mark.parametrize("case", cases_of(nn.RNN), ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rnn(race, mode, case):
    race("rnn", mode, case)
