"""Dense layers: `torch.nn.functional.linear`, by the faster of the two libraries that torch brings for CPUs.

For float32 torch always calls MKL, which uses no more than AVX2 on AMD's CPUs: on one with AVX-512 oneDNN takes half of
the time. There is no table here, since there is no kernel of ours.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.contract import is_plain, is_transformed, needs_graph

# Multiply-adds from which oneDNN is ahead, which takes 15 us to get going; with one row, where it reads weights faster.
_WORTHWHILE, WORTHWHILE_FOR_A_ROW = 8 << 20, 1 << 20
# Activations that it applies to the product, by the op's names, and its variants of them.
_EPILOGUES = {
    "identity": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
_ACTIVATIONS: dict[str, Any] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@cache
def prefers_onednn() -> bool:
    """Whether this machine's oneDNN beats its MKL: AMD with AVX-512 (Zen 5: 450-490 against 210 GFLOP/s, two cores)."""
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return (
        is_amd
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """act(x W^T + b), with gradients of all three.

    Args:
        x: [..., K]
        weight: [M, K]
        bias: [M] or None.
        activation: "identity", "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        [..., M]

    Raises:
        RuntimeError: what torch's function raises.
    """
    if _is_taken(x, weight, bias):
        rows = x.reshape(-1, x.shape[-1])
        if not needs_graph(x, weight, bias):
            y = _product(rows, weight, bias, activation)
        else:
            y = _ACTIVATIONS[activation](_Function.apply(rows, weight, bias))
        return y.view(*x.shape[:-1], len(weight))
    return _ACTIVATIONS[activation](F.linear(x, weight, bias))


def _is_worthwhile(rows: int, weight: Tensor) -> bool:
    return rows * weight.numel() >= (_WORTHWHILE if rows > 1 else WORTHWHILE_FOR_A_ROW)


def _is_taken(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        is_plain(x, weight, bias)
        and prefers_onednn()
        and not x.is_nested
        and x.dim() > 1
        and _is_worthwhile(math.prod(x.shape[:-1]), weight)
        and x.device.type == "cpu"
        and x.layout == weight.layout == torch.strided
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """Of rows x [rows, K]."""
    if _is_worthwhile(len(x), weight):
        epilogue, variant = _EPILOGUES[activation]
        return torch.ops.mkldnn._linear_pointwise.default(_dense(x), _dense(weight), bias, epilogue, [], variant)
    return _ACTIVATIONS[activation](F.linear(x, weight, bias))


def _dense(matrix: Tensor) -> Tensor:
    """Without gaps between its rows or columns: for others, like slices of columns, oneDNN has only a plain loop."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # Only torch's function has a graph to give, and takes batched gradients.
        multiply = F.linear if torch.is_grad_enabled() or is_transformed(dy) else _product
        dx = multiply(dy, weight.t()) if needs_x else None
        dweight = multiply(dy.t(), x.t()) if needs_weight else None
        return dx, dweight, dy.sum(0) if needs_bias else None
