"""nn.MultiheadAttention against what else runs it: `python -m pytest benches/bench_mha.py`.

conftest.py has the options. The peer `plain` of the cases with weights is fastseq itself without them.
"""

import pytest
from attention import LayerCase
from race import MODES

CASES = [
    LayerCase(E, H, B, S, weights=weights, smoke=E == 256)
    for E, H, B, S in ((512, 8, 8, 128), (256, 4, 32, 64))
    for weights in (False, True)
] + [LayerCase(512, 8, 16, 512, padded=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_mha(race, mode, case):
    race("MultiheadAttention", mode, case)
