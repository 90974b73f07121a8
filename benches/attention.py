"""What the benches of attention share: the cases, as data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peers import Task
from roofline import Traffic
from torch import Tensor, nn

from fastseq.functional import scaled_dot_product_attention

FLOAT_BYTES = 4
# The first with the operator Attention. With four dimensions it is the fastest that ONNX Runtime has for these
# cases, or within noise of it: its own MultiHeadAttention has to transpose, and GroupQueryAttention gains for one long
# causal case only, where torch is ahead of both. OpenVINO takes the same graph for its own operator.
ONNX_OPSET, ONNX_IR = 23, 10
ONNX_AFTER_SOFTMAX = 3  # at which point the operator's fourth output is taken


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def additive(seen: Tensor) -> Tensor:
    """A mask as torch computes with it: a boolean one is made so in each call."""
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def padding(B: int, S: int) -> Tensor:
    """[B, S], true in the last half."""
    return (torch.arange(S) >= S // 2).expand(B, S).contiguous()


def triangle(S: int) -> Tensor:
    """[S, S], true where a causal query sees a key."""
    return torch.ones(S, S, dtype=torch.bool).tril()


def pairs_of(queries: int, keys: int, causal: bool) -> int:
    """How many pairs of a query and a key that it sees there are."""
    return sum(min(q + 1, keys) for q in range(queries)) if causal else queries * keys


class WithOptions(nn.Module):
    """Keeps the arguments that stay the same, so that tensors among them are parameters and buffers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {}
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self.options[name] = value

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self._parameters, **self._buffers, **self.options}


class Function(WithOptions):
    """A function of query, key and value as a layer."""

    op = "attention"

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.function = function

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return (self.function(query, key, value, **self.arguments),)


@dataclass(frozen=True)
class Case:
    """Scaled dot product attention of float32 query [B, H, L, D] with key and value [B, H, S, D]; L is S unless given.

    FLOPs and traffic are the least that one call needs. FLOPs are those of the matrix products, for the keys
    that a query sees: about half of them in causal cases. What takes part passes once.

    Training does three times the FLOPs: computing weights again in the backward is a kernel's own choice. It
    passes everything once in the forward, once in the backward and once as a gradient.
    """

    B: int
    S: int
    D: int = 64
    H: int = 8
    L: int = 0
    causal: bool = False
    dropout: float = 0.0
    smoke: bool = False

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name in ("B", "H", "L", "S", "D") if (size := getattr(self, name))]
        flags = ["causal"] * self.causal + [f"dropout{self.dropout}"] * (self.dropout > 0)
        return "-".join(["_".join(sizes), *flags])

    @property
    def peers(self) -> tuple[str, ...]:
        # torch.compile leaves torch's kernel as it is, except where there is none, as for dropout. On the longest
        # sequence ONNX Runtime and OpenVINO take two and four times torch's time, and much of this run's.
        if self.dropout:
            return ("torch", "torch.compile")
        return ("torch",) if self.S >= 8192 else ("torch", "onnxruntime", "openvino")

    @property
    def random(self) -> bool:
        return self.dropout > 0

    @property
    def queries(self) -> int:
        return self.L or self.S

    @property
    def keys(self) -> int:
        """Those that are not left out for all queries."""
        return self.S

    @property
    def pairs(self) -> int:
        return self.B * pairs_of(self.queries, self.keys, self.causal)

    @property
    def once_bytes(self) -> int:
        """Bytes of query, key, value and the output."""
        return FLOAT_BYTES * 2 * self.B * self.H * self.D * (self.queries + self.keys)

    def flops(self, training: bool) -> int:
        return 4 * self.D * self.H * self.pairs * (3 if training else 1)

    def traffic(self, training: bool) -> list[Traffic]:
        return [Traffic(self.once_bytes * (3 if training else 1), self.once_bytes)]

    def inputs(self) -> dict[str, Tensor]:
        lengths = {"query": self.queries, "key": self.S, "value": self.S}
        return {
            name: normal(self.B, self.H, length, self.D, seed=seed)
            for seed, (name, length) in enumerate(lengths.items())
        }

    def output_grad(self) -> Tensor:
        return normal(self.B, self.H, self.queries, self.D, seed=3)

    def options(self) -> dict[str, Any]:
        """What fastseq's function is called with."""
        return {"is_causal": self.causal, "dropout_p": self.dropout}

    def torch_options(self) -> dict[str, Any]:
        """What torch's is called with to the same effect."""
        return self.options()

    def task(self, training: bool) -> Task:
        # torch's kernel leaves a mask that could ask for a gradient to plain ops, even where none is computed.
        layer = Function(F.scaled_dot_product_attention, **self.torch_options()).requires_grad_(training)
        return Task(layer, self.inputs(), self.output_grad() if training else None)

    def ours(self, training: bool) -> Task:
        layer = Function(scaled_dot_product_attention, **self.options()).requires_grad_(training)
        return replace(self.task(training), layer=layer)

    def onnx_model(self) -> bytes:
        from onnx import helper

        inputs, options = self.inputs(), self.torch_options()
        constants = {}
        if "attn_mask" in options:  # ONNX Runtime wants it for each query
            mask = options["attn_mask"].detach()
            constants["mask"] = mask.expand(*mask.shape[:2], self.queries, self.S).numpy()
        causal = int(options.get("is_causal", False))
        node = helper.make_node("Attention", [*inputs, *constants], ["y"], is_causal=causal)
        shapes = {name: x.shape for name, x in inputs.items()}
        return onnx_model([node], shapes, {"y": self.output_grad().shape}, constants)


@dataclass(frozen=True)
class PaddedCase(Case):
    """Causal, and the last half of the keys is padding. torch gets a mask that says both, made beforehand."""

    causal: bool = True

    def __str__(self) -> str:
        return f"{super().__str__()}-padded"

    @property
    def keys(self) -> int:
        return self.S // 2

    def options(self) -> dict[str, Any]:
        return {"is_causal": True, "key_padding_mask": padding(self.B, self.S)}

    def torch_options(self) -> dict[str, Any]:
        return {"attn_mask": additive(triangle(self.S) & ~padding(self.B, self.S)[:, None, None])}


@dataclass(frozen=True)
class BiasCase(Case):
    """A bias [1, H, S, S] is added to the scores; training learns it. torch's kernel insists on the 1."""

    peers = ("torch", "torch.compile", "onnxruntime", "openvino")

    def __str__(self) -> str:
        return f"{super().__str__()}-bias"

    @property
    def once_bytes(self) -> int:
        return super().once_bytes + FLOAT_BYTES * self.H * self.S**2

    def options(self) -> dict[str, Any]:
        return {"attn_mask": nn.Parameter(normal(1, self.H, self.S, self.S, seed=4))}


@dataclass(frozen=True)
class PackedCase(Case):
    """Sequences of lengths uniform in 1..S, one after the other; torch has them padded, with a mask made beforehand."""

    peers = ("torch", "plain", "onnxruntime", "openvino")

    def __str__(self) -> str:
        return f"{super().__str__()}-packed"

    @property
    def lengths(self) -> Tensor:
        return torch.randint(1, self.S + 1, (self.B,), generator=torch.Generator().manual_seed(5))

    @property
    def pairs(self) -> int:
        return int(self.lengths.square().sum())

    @property
    def once_bytes(self) -> int:
        return FLOAT_BYTES * 4 * self.H * self.D * int(self.lengths.sum())

    def present(self) -> Tensor:
        """[B, S]"""
        return torch.arange(self.S) < self.lengths.unsqueeze(-1)

    def packed(self, x: Tensor) -> Tensor:
        """[B, H, S, D] without its padding, as [H, all rows, D]."""
        return x.transpose(1, 2)[self.present()].transpose(0, 1).contiguous()

    def output_grad(self) -> Tensor:
        """Nothing comes back from padding."""
        return super().output_grad() * self.present()[:, None, :, None]

    def options(self) -> dict[str, Any]:
        return {"cu_seqlens_q": F.pad(self.lengths.cumsum(0), (1, 0))}

    def torch_options(self) -> dict[str, Any]:
        return {"attn_mask": additive(self.present()[:, None, None])}

    def task(self, training: bool) -> Task:
        return replace(super().task(training), aligned=self.packed)

    def ours(self, training: bool) -> Task:
        inputs = {name: self.packed(x) for name, x in self.inputs().items()}
        dy = self.packed(self.output_grad()) if training else None
        return Task(Function(scaled_dot_product_attention, **self.options()), inputs, dy)

    def plain(self, training: bool) -> Task:
        """fastseq's function on padded sequences."""
        layer = Function(scaled_dot_product_attention, key_padding_mask=~self.present())
        return replace(self.task(training), layer=layer)


class SelfAttention(WithOptions):
    """A layer called with the same query, key and value."""

    def __init__(self, layer: nn.MultiheadAttention, **options: Any) -> None:
        super().__init__(**options)
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.layer(x, x, x, **self.arguments)


@dataclass(frozen=True)
class LayerCase:
    """Self-attention of nn.MultiheadAttention on float32 input [B, S, E], with weights averaged over heads or without,
    and perhaps causal with the last half of the keys padding, from the masks that users give.

    FLOPs and traffic are counted as in `Case`, with the projections, their parameters, and weights as an output.
    """

    E: int
    H: int
    B: int
    S: int
    weights: bool = False
    padded: bool = False
    smoke: bool = False

    peers = None

    def __str__(self) -> str:
        flags = ["weights"] * self.weights + ["causal", "padded"] * self.padded
        return "-".join([f"E{self.E}_H{self.H}_B{self.B}_S{self.S}", *flags])

    @property
    def pairs(self) -> int:
        return self.B * pairs_of(self.S, self.S // 2 if self.padded else self.S, self.padded)

    def flops(self, training: bool) -> int:
        projections = 8 * self.B * self.S * self.E**2
        return (projections + 4 * self.E * self.pairs) * (3 if training else 1)

    def traffic(self, training: bool) -> list[Traffic]:
        once = FLOAT_BYTES * (4 * self.E * (self.E + 1) + 2 * self.B * self.S * self.E)
        weights = FLOAT_BYTES * self.B * self.S**2 * self.weights
        return [Traffic(once * (3 if training else 1), once), Traffic(weights, weights)]

    def layer(self) -> nn.MultiheadAttention:
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(self.E, self.H, batch_first=True)
        with torch.no_grad():
            for bias in (layer.in_proj_bias, layer.out_proj.bias):  # torch's own are zeros
                bias.normal_()
        return layer

    def masks(self) -> dict[str, Any]:
        if not self.padded:
            return {}
        return {
            "key_padding_mask": padding(self.B, self.S),
            "attn_mask": ~triangle(self.S),
            "is_causal": True,
        }

    def task(self, training: bool) -> Task:
        layer = SelfAttention(self.layer(), need_weights=self.weights, **self.masks())
        x, dy = (normal(self.B, self.S, self.E, seed=seed) for seed in (1, 2))
        # Not training is what lets torch take its fast path.
        return Task(layer.train(training), {"x": x}, dy if training else None, 2 if self.weights else 1)

    def plain(self, training: bool) -> Task | None:
        """The same layer without weights."""
        return replace(self, weights=False).task(training) if self.weights else None

    def onnx_model(self) -> bytes:
        from onnx import helper

        node = helper.make_node
        layer, x = self.layer(), [self.B, self.S, self.E]
        constants = {
            "W_in": layer.in_proj_weight.T.numpy(force=True),
            "b_in": layer.in_proj_bias.numpy(force=True),
            "W_out": layer.out_proj.weight.T.numpy(force=True),
            "b_out": layer.out_proj.bias.numpy(force=True),
        }
        if self.padded:
            constants["mask"] = additive(triangle(self.S) & ~padding(self.B, self.S)[:, None, None]).numpy()
        nodes = [
            node("MatMul", ["x", "W_in"], ["xW"]),
            node("Add", ["xW", "b_in"], ["qkv"]),
            node("Split", ["qkv"], ["query", "key", "value"], axis=2, num_outputs=3),
            node(
                "Attention",
                ["query", "key", "value", *["mask"] * self.padded],
                ["heads", *["", "", "weights_of_heads"] * self.weights],
                q_num_heads=self.H,
                kv_num_heads=self.H,
                qk_matmul_output_mode=ONNX_AFTER_SOFTMAX,
            ),
            node("MatMul", ["heads", "W_out"], ["yW"]),
            node("Add", ["yW", "b_out"], ["y"]),
        ]
        outputs = {"y": x}
        if self.weights:
            constants["axis"] = torch.tensor([1]).numpy()
            nodes.append(node("ReduceMean", ["weights_of_heads", "axis"], ["weights"], keepdims=0))
            outputs["weights"] = [self.B, self.S, self.S]
        return onnx_model(nodes, {"x": x}, outputs, constants)


def onnx_model(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: dict[str, Any]) -> bytes:
    """A serialised float32 ONNX model; inputs and outputs are shapes by name."""
    from onnx import TensorProto, helper, numpy_helper

    def values(shapes: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "attention", values(inputs), values(outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR)
    return model.SerializeToString()


# The shapes of plain attention.
SHAPES = [
    Case(32, 64, smoke=True),
    Case(16, 128),
    Case(4, 512),
    Case(1, 2048),
    Case(8, 256, causal=True, smoke=True),
    Case(4, 512, causal=True),
    Case(1, 2048, causal=True),
    Case(1, 8192, causal=True),
    Case(4, 1024, D=128, causal=True),
]
