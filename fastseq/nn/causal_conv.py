"""Depthwise causal convolution in time."""

from typing import Any

import torch
from torch import Tensor, nn

from fastseq.ops.causal_conv1d import ACTIVATIONS, causal_conv1d


class CausalConv1d(nn.Module):
    """A depthwise convolution that sees nothing of later times, as in Mamba (Gu and Dao, arXiv:2312.00752) and Hyena
    (Poli et al., arXiv:2302.10866): `nn.Conv1d(channels, channels, kernel_size, groups=channels)` of an input padded
    with kernel_size - 1 zeros on the left, and an activation.

    Parameters are those of that `nn.Conv1d`, whose state_dict loads: `weight` [channels, 1, kernel_size] and `bias`
    [channels]. Padding, bias and activation are part of one pass over memory, where a kernel serves.

    Args:
        channels: C
        kernel_size: K, how many times an output sees.
        bias: whether there is one.
        activation: None or "silu".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: channels or kernel_size are less than 1, or activation is anything else.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, size in (("channels", channels), ("kernel_size", kernel_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or 'silu', got {activation!r}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        own_bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws parameters as `nn.Conv1d` does."""
        bound = self.kernel_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False) -> Any:
        """The convolution of x, in one call or in several, one after the other, that hand the state on.

        Args:
            x: [B, C, T], or [C, T], as for `nn.Conv1d`. Of a tensor [B, T, C], pass x.transpose(1, 2): it is read where
                it is, and the result lies in memory likewise.
            state: [B, C, K - 1], or [C, K - 1], the inputs before; zeros if None.
            return_state: whether to return the state of the next call, too.

        Returns:
            y like x, or y and the new state, the last K - 1 inputs.

        Raises:
            TypeError, ValueError: as `fastseq.functional.causal_conv1d`.
        """
        if isinstance(x, Tensor) and x.dim() not in (2, 3):
            raise ValueError(f"x must be [B, {self.channels}, T] or [{self.channels}, T], got {list(x.shape)}")
        if isinstance(x, Tensor) and x.shape[-2] != self.channels:
            raise ValueError(f"x must have {self.channels} channels, [..., {self.channels}, T], got {list(x.shape)}")
        if state is not None and not isinstance(state, Tensor):
            raise TypeError(f"state must be a torch.Tensor, got {type(state).__name__}")
        alone = isinstance(x, Tensor) and x.dim() == 2
        if alone:
            x, state = x.unsqueeze(0), None if state is None else state.unsqueeze(0)
        y, final = causal_conv1d(x, self.weight.squeeze(1), self.bias, state, activation=self.activation)
        if alone:
            y, final = y.squeeze(0), final.squeeze(0)
        return (y, final) if return_state else y

    def extra_repr(self) -> str:
        options = f", bias={self.bias is not None}, activation={self.activation!r}"
        return f"{self.channels}, kernel_size={self.kernel_size}{options}"
