"""What the benches of the recurrent layers share: the cases, as data."""

from dataclasses import dataclass

import torch
from roofline import Traffic
from torch import Tensor, nn

GATES = {nn.LSTM: 4}
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Case:
    """A layer and the shape of its float32 input [T, B, H]: the input size is the hidden size.

    FLOPs and traffic are the least that one call needs. FLOPs are those of the matrix products. What passes

    - once a call: all parameters, the input and the output;
    - again in each later step: W_hh, since a step needs the whole of the one before. It comes from the level
      that holds W_hh of one layer in all its directions, which run side by side.

    Training does three times the FLOPs (forward, gradient of the input, gradients of the weights). It passes
    everything once in the forward, once in the backward and once as a gradient, and W_hh again in each step
    of the forward and of the backward.
    """

    T: int
    B: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    smoke: bool = False
    kind: type[nn.RNNBase] = nn.LSTM

    def __str__(self) -> str:
        flags = [f"L{self.layers}"] * (self.layers > 1) + ["bidirectional"] * self.bidirectional
        return "-".join([f"T{self.T}_B{self.B}_H{self.H}", *flags])

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def input_sizes(self) -> list[int]:
        """The input size of each layer."""
        return [self.H] + [self.directions * self.H] * (self.layers - 1)

    @property
    def forward_flops(self) -> int:
        rows = GATES[self.kind] * self.H
        return sum(2 * self.T * self.B * self.directions * rows * (size + self.H) for size in self.input_sizes)

    @property
    def once_bytes(self) -> int:
        """Bytes of all parameters, the input and the output."""
        rows = GATES[self.kind] * self.H
        parameters = sum(self.directions * rows * (size + self.H + 2) for size in self.input_sizes)
        return FLOAT_BYTES * (parameters + self.T * self.B * (1 + self.directions) * self.H)

    @property
    def step_bytes(self) -> int:
        """Bytes of W_hh of one layer, in all its directions."""
        return FLOAT_BYTES * self.directions * GATES[self.kind] * self.H * self.H

    @property
    def forward_bytes(self) -> int:
        return sum(traffic.bytes for traffic in self.traffic(training=False))

    def flops(self, training: bool) -> int:
        return self.forward_flops * (3 if training else 1)

    def traffic(self, training: bool) -> list[Traffic]:
        again = (self.T - 1) * self.layers * self.step_bytes
        return [
            Traffic(self.once_bytes * (3 if training else 1), self.once_bytes),
            Traffic(again * (2 if training else 1), self.step_bytes),
        ]

    def layer(self) -> nn.RNNBase:
        """The torch layer, with torch's own initialisation."""
        torch.manual_seed(0)
        return self.kind(self.H, self.H, self.layers, bidirectional=self.bidirectional)

    def input(self) -> Tensor:
        return torch.randn(self.T, self.B, self.H, generator=torch.Generator().manual_seed(1))

    def output_grad(self) -> Tensor:
        """A gradient of the output [T, B, D*H]."""
        shape = (self.T, self.B, self.directions * self.H)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2))
