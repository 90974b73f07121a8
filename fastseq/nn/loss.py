"""Cross entropy on fastseq's op."""

from typing import Any

import torch
from torch import Tensor

from fastseq.nn.serving import Served
from fastseq.ops.cross_entropy import TABLE, cross_entropy
from fastseq.registry import Op


class CrossEntropyLoss(Served, torch.nn.CrossEntropyLoss):
    """Drop-in for `torch.nn.CrossEntropyLoss`: the same arguments, results and errors without a copy of the logits.

    Inputs that the kernel does not cover take torch's own path, as in `fastseq.functional.cross_entropy`.
    """

    @property
    def table(self) -> Op:
        return TABLE

    @property
    def example(self) -> Tensor:
        return torch.empty(0) if self.weight is None else self.weight

    @property
    def note(self) -> str:  # type: ignore[override]
        if self.weight is not None:
            return ""
        example = self.example
        return f"as for {str(example.dtype).removeprefix('torch.')} on {example.device.type}: its input decides"

    def forward(self, input: Any, target: Any) -> Any:
        if not isinstance(input, Tensor) and (node := self._node(input, target)) is not None:
            return node
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
