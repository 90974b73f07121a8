"""Calls of torch.nn.functional.scaled_dot_product_attention, on request, to fastseq's.

While anybody asks for it, a function stands in the place of torch's that looks who is calling; then torch's own is put
back. It is all of torch's that fastseq ever replaces. (A TorchFunctionMode would replace nothing, but it would see, and
slow down, every other call of torch, and there is none for all threads. A kernel for torch's op in the dispatcher could
not be taken away safely while other threads call the op.)
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit._builtins import _register_builtin
from torch.nn import Parameter

from fastseq.ops import attention as op
from fastseq.ops.contract import is_plain

_TORCHS = torch._C._nn.scaled_dot_product_attention

_lock = threading.Lock()  # held to change the next two, and torch.nn.functional
_asking = 0  # how many blocks are entered, and one for the switch
_everywhere = False  # the switch
_here: ContextVar[bool] = ContextVar("fastseq_routed_attention", default=False)


@contextmanager
def routed_attention() -> Iterator[None]:
    """Within the block, what this thread calls as `torch.nn.functional.scaled_dot_product_attention` is fastseq's.

    It is for models that call the function by themselves, on CPUs. Tensors on other devices go to torch's function, and
    so do tensor subclasses, modes, transforms of torch.func, and whatever torch refuses, with its errors. Results are
    torch's within the stated tolerances; dropout draws other numbers. Names that held the function before, as after
    `from torch.nn.functional import scaled_dot_product_attention`, still hold torch's.

    What torch.utils.checkpoint computes anew in backward must be computed within such a block, too. What torch.compile
    makes within it serves all threads while anybody routes, and is made anew afterwards.

    Raises:
        RuntimeError: something else has replaced torch's function.
    """
    with _lock:
        _ask(1)
    token = _here.set(True)
    try:
        yield
    finally:
        with _lock:
            _ask(-1)
        with suppress(ValueError):  # a generator may be closed in another context, whose mark is not this one
            _here.reset(token)


def route_attention(on: bool = True) -> None:
    """Does for all threads, from now on, what `routed_attention` does; with False, does so no longer.

    Raises:
        RuntimeError: something else has replaced torch's function.
    """
    global _everywhere
    if not isinstance(on, bool):
        raise TypeError(f"on must be a bool, got {type(on).__name__}")
    with _lock:
        if on != _everywhere:
            _ask(1 if on else -1)
            _everywhere = on


def _ask(change: int) -> None:
    """One more who asks, or one less."""
    global _asking
    if _asking == 0:
        if F.scaled_dot_product_attention is not _TORCHS:
            raise RuntimeError("torch.nn.functional.scaled_dot_product_attention has been replaced by something else")
        _register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")  # for torch.jit.script
        F.scaled_dot_product_attention = scaled_dot_product_attention
    _asking += change
    # Whoever has replaced it in the meantime may have ours in hand, which leads to torch's when nobody asks.
    if _asking == 0 and F.scaled_dot_product_attention is scaled_dot_product_attention:
        F.scaled_dot_product_attention = _TORCHS


def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
    """What stands in the place of torch's function, and takes its arguments."""
    # A graph cannot ask which thread runs it; but torch.compile sees that this function is here, or no longer.
    if torch.compiler.is_compiling() or _everywhere or _here.get():
        result = _ours(*args, **kwargs)
        if result is not None:
            return result
    return op.torchs_attention(*args, **kwargs)


def _ours(
    query: Any = None,
    key: Any = None,
    value: Any = None,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *others: Any,
    scale: Any = None,
    enable_gqa: Any = False,
    **unknown: Any,
) -> Tensor | None:
    """What fastseq's function gives, or None if torch's has to see the call as it is."""
    tensors = (query, key, value, attn_mask)
    if query is None or key is None or value is None or others or unknown:
        return None
    if not (is_plain(*tensors) or _is_compiled(*tensors)) or query.device.type != "cpu":
        return None
    if (is_causal and attn_mask is not None) or not op.are_options(dropout_p, is_causal, scale, enable_gqa):
        return None
    return op.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _is_compiled(*tensors: Any) -> bool:
    """Whether torch.compile traces a call on these, which are of no subclass."""
    return torch.compiler.is_compiling() and all(type(t) in (Tensor, Parameter, NoneType) for t in tensors)
