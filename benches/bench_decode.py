"""Greedy decoding with a cache against decoding without one, and against Hugging Face's.

`python -m pytest benches/bench_decode.py`; conftest.py has the options.
"""

import pytest
from race import MODES
from transformer import DecodeCase


@pytest.mark.parametrize(
    "case", [DecodeCase(1), DecodeCase(16), DecodeCase(2, 128, 4, 8, 8, 2, 100, smoke=True)], ids=str
)
def test_greedy(race, case):
    race("greedy decoding", MODES[0], case)
