"""Scaled dot product attention against what else runs it: `python -m pytest benches/bench_attention.py`.

conftest.py has the options. Where torch has no argument for what fastseq is told, it gets a mask that was made
before the clock started, which a model that shares one mask among its layers would do. The peer `plain` of packed
sequences is fastseq itself on padded ones.
"""

import pytest
from attention import SHAPES, BiasCase, Case, PackedCase, PaddedCase
from race import MODES

DROPOUT = [Case(16, 128, dropout=0.1, smoke=True), Case(4, 512, dropout=0.1)]
MASKED = [PaddedCase(16, 512), BiasCase(4, 512)]
PACKED = [PackedCase(32, 64, smoke=True), PackedCase(32, 512)]
DECODE = [Case(8, 1024, L=1, smoke=True), Case(1, 4096, D=128, H=32, L=1)]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_attention(race, mode, case):
    race("attention", mode, case)


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout(race, case):
    race("attention with dropout", "training", case)


@pytest.mark.parametrize("case", MASKED, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_masked(race, mode, case):
    race("attention with masks", mode, case)


@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_packed(race, mode, case):
    race("attention on packed sequences", mode, case)


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(race, case):
    race("attention of one query", "inference", case)
