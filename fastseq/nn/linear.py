"""Dense layers on the faster of torch's libraries."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.nn.serving import Served
from fastseq.ops.linear import WORTHWHILE_FOR_A_ROW, linear


class Linear(Served, torch.nn.Linear):
    """Drop-in for `torch.nn.Linear`: the same arguments, parameters, results and errors.

    `accelerate` makes a model's dense layers such where torch's default library is the slower one: on AMD's CPUs with
    AVX-512 (see `fastseq.ops.linear`). Elsewhere it does what torch's does.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., out_features] of input [..., in_features]."""
        if type(input) is not Tensor:
            node = self._node(input)
            if node is not None:
                return node
        elif input.numel() * self.out_features < WORTHWHILE_FOR_A_ROW:  # sparing small layers all other questions
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)
