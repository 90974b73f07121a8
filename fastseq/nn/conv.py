"""Convolution, ReLU and max-pooling as one layer."""

from typing import Any

from torch import Tensor, nn

from fastseq.ops.conv_pool import conv_relu_pool


class ConvReLUPool2d(nn.Conv2d):
    """`nn.Conv2d`, `nn.ReLU` and `nn.MaxPool2d` in one, forward and backward: `fastseq.functional.conv_relu_pool`.

    Its parameters are those of the Conv2d, by the same names, begun with in the same way.

    Args:
        in_channels: C, of the input.
        out_channels: O, of the output.
        kernel_size: a number, or height and width.
        stride: of the convolution, a number, or one down and one across.
        padding: zeros around the input, likewise, or "same" or "valid".
        pool_size: of the windows of the pooling, which lie side by side, a number, or height and width; 1 for none.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: pool_size is no positive number, nor two of them; or what nn.Conv2d raises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        pool_size: Any = 2,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias, device=device, dtype=dtype)
        sides = pool_size if isinstance(pool_size, (tuple, list)) and len(pool_size) == 2 else (pool_size,)
        if not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"pool_size must be a positive integer or two of them, got {pool_size!r}")
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] or [C, H, W]; gives [B, O, H', W'] or [O, H', W']."""
        return conv_relu_pool(x, self.weight, self.bias, stride=self.stride, padding=self.padding, pool=self.pool_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool_size={self.pool_size}"
