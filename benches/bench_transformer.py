"""nn.TransformerEncoderLayer and its stack against what else runs them.

`python -m pytest benches/bench_transformer.py`; conftest.py has the options.
"""

import pytest
from race import MODES
from transformer import EncoderCase

SHAPES = [(512, 8, 8, 128), (256, 4, 32, 64), (768, 12, 1, 1024)]
DENSE = [EncoderCase(*shape, smoke=shape[0] == 256) for shape in SHAPES]
DROPPED = [EncoderCase(*shape, dropout=0.1) for shape in SHAPES]
PADDED = [EncoderCase(*shape, padded=True, smoke=shape[0] == 256) for shape in SHAPES[:2]]
STACKS = [
    EncoderCase(512, 8, 8, 128, layers=6, padded=True, norm_first=norm_first, activation="gelu")
    for norm_first in (False, True)
]


@pytest.mark.parametrize("case", [*DENSE, *PADDED, *STACKS], ids=str)
def test_inference(race, case):
    race("Transformer encoder", MODES[0], case)


@pytest.mark.parametrize("case", [*DENSE, *DROPPED, *PADDED, *STACKS], ids=str)
def test_training(race, case):
    race("Transformer encoder", MODES[1], case)
