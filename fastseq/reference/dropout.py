"""Dropout whose draws depend on an element's place alone, so that every implementation drops the same ones.

Philox4x32 (Salmon et al. 2011) with seven rounds, the fewest that pass BigCrush. Column c of row r of a matrix gets 16
bits of one of the words of counter (16 * (c // 128) + c % 16, r, matrix, 0): the half c // 16 % 8, low halves first.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def dropped_of(p: float) -> int:
    """How many of the 65536 values of an element's 16 bits drop it: those below this number."""
    return min(65536, round(p * 65536))


def kept_factor(p: float) -> float:
    """What elements that are kept are multiplied by."""
    dropped = dropped_of(p)
    return 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def keep(seed: Tensor, sizes: Sequence[int], p: float, device: torch.device) -> Tensor:
    """What elements are multiplied by, in float64: 0, or one over the probability of being kept.

    Args:
        seed: int64 of one element.
        sizes: [..., rows, columns] of the result.
        p: the probability of being dropped.
        device: of the result.
    """
    *lead, rows, columns = sizes
    matrices, blocks = math.prod(lead), (columns + 127) // 128
    words: list[Tensor] = [
        torch.arange(16 * blocks, device=device).expand(matrices, rows, -1),
        torch.arange(rows, device=device).view(1, rows, 1),
        torch.arange(matrices, device=device).view(-1, 1, 1),
        torch.zeros((), dtype=torch.int64, device=device),
    ]
    seed = seed.to(device)
    keys = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(PHILOX_ROUNDS):
        # A product of 32 x 32 bits may wrap around in int64, whose bits are the same.
        even, odd = (words[2 * i] * _MULTIPLIERS[i] for i in range(2))
        words = [
            ((odd >> 32) & _LOW) ^ words[1] ^ keys[0],
            odd & _LOW,
            ((even >> 32) & _LOW) ^ words[3] ^ keys[1],
            even & _LOW,
        ]
        keys = [(k + w) & _LOW for k, w in zip(keys, _WEYL, strict=True)]
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    drawn = halves.view(*lead, rows, blocks, 16, 8).transpose(-1, -2).flatten(-3)[..., :columns]
    return (drawn >= dropped_of(p)).double() * kept_factor(p)
