"""What lies between a transformer's dense layers, fused, against torch's functions one after the other.

`python -m pytest benches/bench_fused.py`; conftest.py has the options.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention import FLOAT_BYTES, WithOptions, normal
from peers import Task
from race import MODES
from roofline import Traffic
from torch import Tensor, nn

from fastseq.functional import add_norm, bias_activation, cross_entropy


def torchs_activation(x: Tensor, bias: Tensor, *, kind: str, dropout: float) -> Tensor:
    return F.dropout({"gelu": F.gelu, "relu": F.relu}[kind](x + bias), dropout)


def our_activation(x: Tensor, bias: Tensor, *, kind: str, dropout: float) -> Tensor:
    return bias_activation(x, bias, activation=kind, dropout_p=dropout)


def torchs_swiglu(x: Tensor, up: Tensor) -> Tensor:
    return F.silu(x) * up


def our_swiglu(x: Tensor, up: Tensor) -> Tensor:
    return bias_activation(x, up=up, activation="silu")


def torchs_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *, kind: str, dropout: float
) -> Tensor:
    total = residual + F.dropout(x, dropout)
    if kind == "rms":
        return F.rms_norm(total, weight.shape, weight, 1e-5)
    return F.layer_norm(total, weight.shape, weight, bias)


def our_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *, kind: str, dropout: float) -> Tensor:
    return add_norm(x, residual, weight, bias, kind=kind, dropout_p=dropout)


class Called(WithOptions):
    """A function of its inputs and parameters as a layer."""

    def __init__(self, op: str, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.op, self.function = op, function

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.function(*inputs, **self.arguments),)


@dataclass(frozen=True)
class Case:
    """A function of float32 tensors [rows, columns] and parameters [columns].

    The floor is the traffic of inputs and output, once, and for the gradients once more.
    """

    name: str
    op: str
    rows: int
    columns: int
    inputs: int
    parameters: int
    torchs: Callable[..., Tensor]
    ours_: Callable[..., Tensor]
    random: bool = False
    smoke: bool = False

    peers = ("torch", "torch.compile")

    def __str__(self) -> str:
        return f"{self.name}-{self.rows}x{self.columns}"

    def flops(self, training: bool) -> int:
        return 0

    def traffic(self, training: bool) -> list[Traffic]:
        once = FLOAT_BYTES * self.rows * self.columns * (self.inputs + 1)
        return [Traffic(once * (2 if training else 1), once)]

    def layer(self, function: Callable[..., Tensor]) -> nn.Module:
        names = ("bias",) if self.op == "activation" else ("weight", "bias")
        parameters = {name: nn.Parameter(1 + 0.1 * normal(self.columns, seed=9)) for name in names[: self.parameters]}
        return Called(self.op, function, **parameters)

    def task(self, training: bool) -> Task:
        inputs = {name: normal(self.rows, self.columns, seed=i) for i, name in enumerate(("x", "other")[: self.inputs])}
        return Task(self.layer(self.torchs), inputs, normal(self.rows, self.columns, seed=5) if training else None)

    def ours(self, training: bool) -> Task:
        return replace(self.task(training), layer=self.layer(self.ours_))


@dataclass(frozen=True)
class LossCase(Case):
    """Cross entropy of logits [rows, classes] with their mean: a number."""

    def layer(self, function: Callable[..., Tensor]) -> nn.Module:
        target = torch.randint(self.columns, (self.rows,), generator=torch.Generator().manual_seed(3))
        return Called(self.op, function, target=target)

    def task(self, training: bool) -> Task:
        return replace(super().task(training), dy=torch.tensor(1.0) if training else None)

    def traffic(self, training: bool) -> list[Traffic]:
        once = FLOAT_BYTES * self.rows * self.columns
        return [Traffic(once * (3 if training else 1), once)]


def activation(kind: str, dropout: float = 0.0, **options: Any) -> Case:
    name = f"{kind}-dropout{dropout}" if dropout else kind
    functions = (partial(f, kind=kind, dropout=dropout) for f in (torchs_activation, our_activation))
    return Case(name, "activation", 1024, 2048, 1, 1, *functions, random=dropout > 0, **options)


def norm(kind: str, dropout: float = 0.0, **options: Any) -> Case:
    name = f"add_{kind}-dropout{dropout}" if dropout else f"add_{kind}"
    functions = (
        partial(f, kind=kind, dropout=dropout, **({"bias": None} if kind == "rms" else {}))
        for f in (torchs_norm, our_norm)
    )
    return Case(name, "norm", 1024, 512, 2, 1 if kind == "rms" else 2, *functions, random=dropout > 0, **options)


def loss(rows: int, classes: int, smoothing: float = 0.0, **options: Any) -> Case:
    functions = (partial(f, label_smoothing=smoothing) for f in (F.cross_entropy, cross_entropy))
    return LossCase(
        "loss-smoothed" if smoothing else "loss", "cross_entropy", rows, classes, 1, 0, *functions, **options
    )


CASES = [
    activation("relu"),
    activation("gelu", smoke=True),
    activation("gelu", 0.1),
    Case("swiglu", "activation", 1024, 2048, 2, 0, torchs_swiglu, our_swiglu),
    norm("layer", smoke=True),
    norm("rms"),
    norm("layer", 0.1),
    loss(512, 32000),
    loss(512, 32000, 0.1),
    loss(32, 10, smoke=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_fused(race, mode, case):
    race("fused pieces", mode, case)
