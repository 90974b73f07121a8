"""What the models check of their options and their input, and padding."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastseq.nn.places import INTEGERS, Places, padding_mask


def check_option(name: str, given: Any, known: Iterable[Any]) -> None:
    """Raises ValueError for an option that is unknown."""
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {given!r}")


def check_tokens(name: str, tokens: Any, vocabulary: int) -> None:
    """Raises unless tokens are [B, T] int64, at least one, each in the vocabulary.

    What the tokens are is looked at on CPUs only, where that is one pass over them: a GPU would have to be waited for.

    Raises:
        TypeError, ValueError: tokens are of another kind or shape, or there are none.
        IndexError: one is not in the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be a tensor of int64, got {got}")
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"{name} must be [B, T] with at least one token, got {list(tokens.shape)}")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in tokens.aminmax())
        if least < 0 or most >= vocabulary:
            raise IndexError(f"{name} must be between 0 and {vocabulary - 1}, got {least} to {most}")


def check_lengths(name: str, lengths: Any, B: int, T: int) -> Tensor | None:
    """Lengths as the layers want them, [B] int64 on the CPU; None stays None.

    Raises:
        TypeError, ValueError: they are no integers, one for each row, between 1 and T.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if lengths.shape != (B,):
        raise ValueError(f"{name} must be [{B}], one for each row, got {list(lengths.shape)}")
    lengths = lengths.to("cpu", torch.int64)
    if not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in lengths.aminmax())
        if least < 1 or most > T:
            raise ValueError(f"{name} must be between 1 and {T}, got {least} to {most}")
    return lengths


def where_present(function: Callable[..., Tensor], lengths: Tensor | None, *sequences: Tensor) -> Tensor:
    """What a function of each place gives for sequences [B, T, ...]: [B, T, F], zeros past the lengths.

    Where much is padding, it is called with the rows that are there alone.
    """
    places = Places.up_to(lengths, sequences[0], batch_first=True)
    if places is not None:
        return places.batch_of(function(*(places.rows_of(x) for x in sequences)))
    y = function(*sequences)
    return y if lengths is None else y.masked_fill(padding_mask(lengths, y.shape[1], y.device).unsqueeze(2), 0)
