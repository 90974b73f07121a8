"""What the benches of the recurrent layers share: the cases, as data."""

from dataclasses import dataclass, replace

import torch
from peers import Task
from roofline import Traffic
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastseq

# ONNX's name of a layer, its order of gates, as positions in torch's, and what sets it to torch's formulas.
ONNX_LAYERS = {
    nn.LSTM: ("LSTM", (0, 3, 1, 2), {}),
    nn.GRU: ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    nn.RNN: ("RNN", (0,), {}),
}
ONNX_OPSET, ONNX_IR = 17, 9

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Case:
    """A layer and the shape of its float32 input [T, B, H]: the input size is the hidden size, the output's P with a
    projection.

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
    P: int = 0

    @property
    def peers(self) -> tuple[str, ...] | None:
        """Who can race on it, or None for everyone."""
        return ("torch",) if self.P else None

    def __str__(self) -> str:
        flags = [f"P{self.P}"] * (self.P > 0) + [f"L{self.layers}"] * (self.layers > 1)
        return "-".join([f"T{self.T}_B{self.B}_H{self.H}", *flags, *["bidirectional"] * self.bidirectional])

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def input_sizes(self) -> list[int]:
        """The input size of each layer."""
        return [self.H] + [self.directions * self.outputs] * (self.layers - 1)

    @property
    def outputs(self) -> int:
        return self.P or self.H

    @property
    def forward_flops(self) -> int:
        rows = GATES[self.kind] * self.H
        a_step = sum(rows * (size + self.outputs) + self.P * self.H for size in self.input_sizes)
        return 2 * self.T * self.B * self.directions * a_step

    @property
    def once_bytes(self) -> int:
        """Bytes of all parameters, the input and the output."""
        rows = GATES[self.kind] * self.H
        a_direction = sum(rows * (size + self.outputs + 2) + self.P * self.H for size in self.input_sizes)
        sequences = self.T * self.B * (self.H + self.directions * self.outputs)
        return FLOAT_BYTES * (self.directions * a_direction + sequences)

    @property
    def step_bytes(self) -> int:
        """Bytes of W_hh, and of W_hr, of one layer, in all its directions."""
        return FLOAT_BYTES * self.directions * (GATES[self.kind] + (self.P > 0)) * self.H * self.outputs

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
        options = {"proj_size": self.P} if self.P else {}
        return self.kind(self.H, self.H, self.layers, bidirectional=self.bidirectional, **options)

    def input(self) -> Tensor:
        return torch.randn(self.T, self.B, self.H, generator=torch.Generator().manual_seed(1))

    def output_grad(self) -> Tensor:
        """A gradient of the output [T, B, D*H]."""
        shape = (self.T, self.B, self.directions * self.outputs)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2))

    def task(self, training: bool) -> Task:
        return Task(self.layer(), {"x": self.input()}, self.output_grad() if training else None)

    def onnx_model(self) -> bytes:
        return onnx_model(self.layer(), self.T, self.B)


# The shapes that every kind of layer races on.
SHAPES = [
    Case(1, 1, 128, smoke=True),
    Case(1, 1, 512, smoke=True),
    Case(50, 1, 128, smoke=True),
    Case(100, 1, 256),
    Case(100, 1, 512),
    Case(100, 1, 1024),
    Case(100, 8, 256),
    Case(100, 32, 256, smoke=True),
    Case(100, 32, 512, layers=2),
    Case(100, 128, 512),
    Case(1000, 1, 64),
    Case(200, 4, 256, bidirectional=True),
]


def cases_of(kind: type[nn.RNNBase]) -> list[Case]:
    return [replace(case, kind=kind) for case in SHAPES]


class Packed(nn.Module):
    """A layer on packed rows [N, I], whose lengths are fixed."""

    def __init__(self, layer: nn.RNNBase, lengths: Tensor) -> None:
        super().__init__()
        self.layer = layer
        falling = lengths.sort(descending=True).values
        self.batch_sizes = (falling > torch.arange(int(falling[0])).unsqueeze(-1)).sum(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(PackedSequence(x, self.batch_sizes))[0].data, None


@dataclass(frozen=True)
class PackedCase(Case):
    """Rows of lengths uniform in 1..T, packed."""

    peers = ("torch", "plain")

    @property
    def lengths(self) -> Tensor:
        return torch.randint(1, self.T + 1, (self.B,), generator=torch.Generator().manual_seed(3))

    @property
    def share(self) -> float:
        """How much of the padded rows there is."""
        return self.lengths.sum().item() / (self.T * self.B)

    @property
    def forward_flops(self) -> int:
        return int(super().forward_flops * self.share)

    def layer(self) -> nn.Module:
        return Packed(super().layer(), self.lengths)

    def input(self) -> Tensor:
        return super().input().flatten(0, 1)[: int(self.lengths.sum())]

    def output_grad(self) -> Tensor:
        return super().output_grad().flatten(0, 1)[: int(self.lengths.sum())]

    def plain(self, training: bool) -> Task:
        """The same layer on padded rows."""
        return Task(super().layer(), {"x": super().input()}, super().output_grad() if training else None)


class OneStep(nn.Module):
    """A cell's step from a state of zeros given by the caller, as in a loop of one's own."""

    def __init__(self, cell: nn.RNNCellBase, batch: int) -> None:
        super().__init__()
        self.cell = cell
        self.register_buffer("h", torch.zeros(batch, cell.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        pair = isinstance(self.cell, nn.LSTMCell)
        after = self.cell(x, (self.h, self.h) if pair else self.h)
        return after[0] if pair else after, None


@dataclass(frozen=True)
class CellCase(Case):
    """One step of a cell."""

    peers = ("torch", "torch.compile")

    def __str__(self) -> str:
        return f"{self.kind.__name__}_B{self.B}_H{self.H}"

    def layer(self) -> nn.Module:
        torch.manual_seed(0)
        return OneStep(self.kind(self.H, self.H), self.B)

    def input(self) -> Tensor:
        return super().input()[0]

    def output_grad(self) -> Tensor:
        return super().output_grad()[0]


class WithOption(nn.Module):
    """A fastseq layer called with one of the arguments that go beyond torch's."""

    def __init__(self, layer: nn.RNNBase, option: str, value: object) -> None:
        super().__init__()
        self.layer = fastseq.accelerate(layer)
        self.options = {option: value}

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x, **self.options)[0], None


@dataclass(frozen=True)
class OptionCase(Case):
    """A layer with an option: `lengths` that end in the last steps, a `reset` every 50 steps, the cell sequence."""

    peers = ("plain",)
    option: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.kind.__name__}-{self.option}"

    def layer(self) -> nn.Module:
        values = {
            "lengths": torch.full((self.B,), self.T).sub_(torch.arange(self.B) % 2),
            "reset": torch.rand(self.T, self.B, generator=torch.Generator().manual_seed(4)) < 1 / 50,
            "return_cell_sequence": True,
        }
        return WithOption(super().layer(), self.option, values[self.option])

    def plain(self, training: bool) -> Task:
        """The same layer without the option."""
        return replace(self.task(training), layer=super().layer())


def onnx_model(layer: nn.RNNBase, T: int, B: int) -> bytes:
    """A layer as a serialised ONNX model from x [T, B, I] to y [T, B, D*H]."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    op, order, attributes = ONNX_LAYERS[type(layer)]
    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    shape = [T, B, len(suffixes) * layer.hidden_size]

    def reordered(name: str) -> np.ndarray:
        gates = np.split(getattr(layer, name).detach().numpy(), len(order))
        return np.concatenate([gates[k] for k in order])

    constants = {"shape": np.array(shape)}
    nodes, x = [], "x"
    for n in range(layer.num_layers):
        directions = [f"l{n}{suffix}" for suffix in suffixes]
        constants[f"W{n}"] = np.stack([reordered(f"weight_ih_{d}") for d in directions])
        constants[f"R{n}"] = np.stack([reordered(f"weight_hh_{d}") for d in directions])
        constants[f"B{n}"] = np.stack(
            [np.concatenate([reordered(f"bias_ih_{d}"), reordered(f"bias_hh_{d}")]) for d in directions]
        )
        # ONNX's output is [T, D, B, H].
        nodes += [
            helper.make_node(
                op,
                [x, f"W{n}", f"R{n}", f"B{n}"],
                [f"TDBH{n}"],
                hidden_size=layer.hidden_size,
                direction="bidirectional" if layer.bidirectional else "forward",
                **attributes,
            ),
            helper.make_node("Transpose", [f"TDBH{n}"], [f"TBDH{n}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"TBDH{n}", "shape"], [f"y{n}"]),
        ]
        x = f"y{n}"
    graph = helper.make_graph(
        nodes,
        op,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, B, layer.input_size])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR)
    return model.SerializeToString()
