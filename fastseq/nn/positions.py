"""What tells a transformer where its places are."""

from typing import Any

import torch
from torch import Tensor, nn


def _rows(table: Tensor, name: str, places: int, offset: int) -> Tensor:
    """Those of a table for places from offset on."""
    if offset < 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
    if offset + places > len(table):
        raise ValueError(
            f"{name} has {places} places from offset {offset} on, but there are positions for {len(table)} (max_length)"
        )
    return table[offset : offset + places]


def _angles(max_length: int, width: int, base: float) -> Tensor:
    """[max_length, ceil(width / 2)], place / base^(2i / width), in float64: float32 has few decimals left far out."""
    places, pairs = (
        torch.arange(0, end, step, dtype=torch.float64, device="cpu") for end, step in ((max_length, 1), (width, 2))
    )
    return places[:, None] * base ** -(pairs / width)


class _Added(nn.Module):
    """A row for each place, added to what stands there."""

    weight: Tensor
    batch_first: bool

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x with its positions.

        Args:
            x: [L, N, E], [N, L, E] if batch_first, or [L, E].
            offset: the position of its first place, len(cache) in cached decoding.

        Returns:
            Like x.

        Raises:
            ValueError: x has other dimensions, or places where there is no position.
        """
        E = self.weight.shape[1]
        if x.dim() not in (2, 3) or x.shape[-1] != E:
            raise ValueError(f"x must have two or three dimensions, the last of {E} features, got {list(x.shape)}")
        apart = x.dim() == 3 and not self.batch_first
        rows = _rows(self.weight, "x", x.shape[0 if apart else -2], offset)
        return x + (rows.unsqueeze(1) if apart else rows).to(x.dtype)

    def extra_repr(self) -> str:
        max_length, E = self.weight.shape
        return f"{E}, max_length={max_length}, batch_first={self.batch_first}"


class SinusoidalPositions(_Added):
    """Adds sin(place / base^(2i/E)) and the cosine of the same to features 2i and 2i+1 (Vaswani et al.,
    arXiv:1706.03762).

    Args:
        d_model: E
        max_length: how many positions the table has. It is not in the state_dict.
        batch_first: whether x is [N, L, E] or [L, N, E].
        base: of the wavelengths.
        device: of the table.
        dtype: of the table.
    """

    def __init__(
        self,
        d_model: int,
        max_length: int = 5000,
        batch_first: bool = False,
        base: float = 10000.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.base = base
        self.register_buffer("weight", torch.empty(max_length, d_model, device=device, dtype=dtype), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the table, as must be done after to_empty."""
        max_length, E = self.weight.shape
        angles = _angles(max_length, E, self.base)
        self.weight.copy_(torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :E])


class LearnedPositions(_Added):
    """Adds a learned row to each place (Gehring et al., arXiv:1705.03122).

    Args:
        d_model: E
        max_length: how many positions there are.
        batch_first: whether x is [N, L, E] or [L, N, E].
        device: of the parameter, `weight`, [max_length, E].
        dtype: of the parameter.
    """

    def __init__(
        self, d_model: int, max_length: int, batch_first: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.weight = nn.Parameter(torch.empty(max_length, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small numbers, as of BERT."""
        nn.init.normal_(self.weight, std=0.02)


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features of queries and keys by angles that grow with the place, so that their products depend
    on the distance only (Su et al., RoFormer, arXiv:2104.09864).

    Args:
        dim: D, the number of features of a head, even.
        max_length: how many positions the tables have. They are not in the state_dict.
        base: the angle of pair i is place / base^(2i/D).
        interleaved: whether pairs are features 2i and 2i+1, as in the paper and in GPT-J, or i and i + D/2, as in
            GPT-NeoX and Llama: weights are trained for one of the two.
        device: of the tables.
        dtype: of the tables.

    Raises:
        ValueError: dim is odd.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_length: int = 2048,
        base: float = 10000.0,
        interleaved: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        self.base = base
        self.interleaved = interleaved
        for name in ("cos", "sin"):
            table = torch.empty(max_length, dim // 2, device=device, dtype=dtype)
            self.register_buffer(name, table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the tables, as must be done after to_empty."""
        max_length, pairs = self.cos.shape
        angles = _angles(max_length, 2 * pairs, self.base)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, query: Tensor, key: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Query and key, rotated.

        Args:
            query: [..., L, D]
            key: [..., S, D], with other heads or another length if need be.
            offset: the position of the first place of both, len(cache) in cached decoding.

        Returns:
            Two tensors like them.

        Raises:
            ValueError: one of them has other features, or places where there is no position.
        """
        return self._rotated("query", query, offset), self._rotated("key", key, offset)

    def _rotated(self, name: str, x: Tensor, offset: int) -> Tensor:
        D = 2 * self.cos.shape[1]
        if x.dim() < 2 or x.shape[-1] != D:
            raise ValueError(f"{name} must be [..., places, {D}], got {list(x.shape)}")
        cos, sin = (_rows(table, name, x.shape[-2], offset).to(x.dtype) for table in (self.cos, self.sin))
        if self.interleaved:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def extra_repr(self) -> str:
        max_length, pairs = self.cos.shape
        return f"{2 * pairs}, max_length={max_length}, base={self.base}, interleaved={self.interleaved}"
