"""What a transformer does at each place by itself."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.nn.linear import Linear
from fastseq.ops.activation import TABLE, bias_activation, kind_of
from fastseq.ops.contract import has_hooks, why_torch

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "swiglu": F.silu}


class FeedForward(nn.Module):
    """linear2(dropout(activation(linear1(x)))), the feed-forward network of Vaswani et al., arXiv:1706.03762.

    With "geglu" or "swiglu" (Shazeer, arXiv:2002.05202) linear1 gives two halves, and what comes to linear2 is
    activation(first) * second. Activation, gate and dropout are one pass over memory where a kernel serves.

    Args:
        d_model: E, the number of features in and out.
        dim_feedforward: the number of those between, of each half.
        dropout: the probability of one of them to be dropped in training.
        activation: "relu", "gelu", "silu", "geglu", "swiglu", or a function of one tensor.
        bias: whether linear1 and linear2 have one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: activation is another name.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.is_gated = isinstance(activation, str) and activation in _GATES
        if isinstance(activation, str):
            known = _ACTIVATIONS | _GATES
            if activation not in known:
                raise ValueError(f"activation must be one of {', '.join(known)} or a function, got {activation!r}")
            activation = known[activation]
        self.activation = activation
        factory = dict(bias=bias, device=device, dtype=dtype)
        self.linear1 = Linear(d_model, dim_feedforward * (2 if self.is_gated else 1), **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., E], and so is what is returned."""
        x = self.linear1(x)
        x, up = x.chunk(2, -1) if self.is_gated else (x, None)
        kind = self._fused_kind(x)
        if kind is not None:
            p = self.dropout.p if self.dropout.training else 0.0
            return self.linear2(bias_activation(x, up=up, activation=kind, dropout_p=p))
        x = self.activation(x)
        return self.linear2(self.dropout(x if up is None else x * up))

    def _fused_kind(self, x: Any) -> str | None:
        """What the op calls the activation, or None where it does not serve, or a user would see that it does."""
        if not isinstance(x, Tensor) or type(self.dropout) is not nn.Dropout or has_hooks(self.dropout):
            return None
        return None if why_torch(TABLE, x.device.type, x.dtype) is not None else kind_of(self.activation)
