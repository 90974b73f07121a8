"""What the benches of Transformers share: the cases, as data."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from attention import FLOAT_BYTES, WithOptions, additive, normal, onnx_model
from peers import Task
from roofline import Traffic
from torch import Tensor, nn

import fastseq

LAYER_NORM_EPS = 1e-5


class First(WithOptions):
    """A module called with one tensor, whose result becomes a tuple."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.module(x, **self.arguments),)


@dataclass(frozen=True)
class EncoderCase:
    """nn.TransformerEncoderLayer, or nn.TransformerEncoder of some of them, on float32 input [B, S, E].

    With `padded`, sequences are 1/4 to 3/4 of S long, half of it in the mean, and nothing comes back from padding.
    FLOPs and traffic are the least that one call needs, as in `attention.Case`: padding counts for nothing.
    """

    E: int
    H: int
    B: int
    S: int
    layers: int = 0  # of a stack, or the layer alone
    dropout: float = 0.0
    padded: bool = False
    norm_first: bool = False
    activation: str = "relu"
    smoke: bool = False

    peers = None

    def __str__(self) -> str:
        flags = [f"layers{self.layers}"] * (self.layers > 0) + [f"dropout{self.dropout}"] * (self.dropout > 0)
        flags += ["prenorm"] * self.norm_first + [self.activation] * (self.activation != "relu")
        return "-".join([f"E{self.E}_H{self.H}_B{self.B}_S{self.S}", *flags, *["padded"] * self.padded])

    @property
    def width(self) -> int:
        return 4 * self.E

    @property
    def random(self) -> bool:
        return self.dropout > 0

    @property
    def lengths(self) -> Tensor:
        """[B]"""
        if not self.padded:
            return torch.full((self.B,), self.S)
        return torch.linspace(self.S / 4, self.S * 3 / 4, self.B).round().long()

    def present(self) -> Tensor:
        """[B, S]"""
        return torch.arange(self.S) < self.lengths.unsqueeze(-1)

    def flops(self, training: bool) -> int:
        rows, pairs = int(self.lengths.sum()), int(self.lengths.square().sum())
        once = rows * (8 * self.E**2 + 4 * self.E * self.width) + 4 * self.E * pairs
        return max(1, self.layers) * once * (3 if training else 1)

    def traffic(self, training: bool) -> list[Traffic]:
        weights = max(1, self.layers) * (4 * self.E**2 + 2 * self.E * self.width)
        once = FLOAT_BYTES * (weights + 2 * int(self.lengths.sum()) * self.E)
        return [Traffic(once * (3 if training else 1), once)]

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            self.E,
            self.H,
            self.width,
            self.dropout,
            self.activation,
            LAYER_NORM_EPS,
            batch_first=True,
            norm_first=self.norm_first,
        )
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("bias"):  # torch's own are zeros in part
                    parameter.normal_(std=0.1)
        return nn.TransformerEncoder(layer, self.layers) if self.layers else layer

    def cleared(self, result: Tensor) -> Tensor:
        """A result, without what is at padding's places: nothing in particular."""
        if self.padded and result.shape == (self.B, self.S, self.E):
            return result * self.present().unsqueeze(-1)
        return result

    def task(self, training: bool) -> Task:
        options = {"src_key_padding_mask": ~self.present()} if self.padded else {}
        x, dy = (normal(self.B, self.S, self.E, seed=seed) for seed in (1, 2))
        layer = First(self.module(), **options).train(training)
        return Task(layer, {"x": x}, self.cleared(dy) if training else None, aligned=self.cleared)

    def onnx_model(self) -> bytes:
        if self.layers or self.norm_first or self.activation != "relu":
            from peers import AbsentError

            raise AbsentError("-")
        from onnx import helper

        node = helper.make_node
        layer: Any = self.module()
        attention, x = layer.self_attn, [self.B, self.S, self.E]
        dense = {"in": attention.in_proj_weight, "out": attention.out_proj.weight}
        dense |= {"1": layer.linear1.weight, "2": layer.linear2.weight}
        biases = {"in": attention.in_proj_bias, "out": attention.out_proj.bias}
        biases |= {"1": layer.linear1.bias, "2": layer.linear2.bias}
        constants = {f"W_{name}": weight.T.numpy(force=True) for name, weight in dense.items()}
        constants |= {f"b_{name}": bias.numpy(force=True) for name, bias in biases.items()}
        for name, norm in (("n1", layer.norm1), ("n2", layer.norm2)):
            constants |= {f"W_{name}": norm.weight.numpy(force=True), f"b_{name}": norm.bias.numpy(force=True)}
        if self.padded:
            constants["mask"] = additive(self.present()[:, None, None].expand(-1, 1, self.S, -1)).numpy()

        def linear(name: str, given: str, result: str) -> list[Any]:
            product = f"{given}_{name}"
            return [node("MatMul", [given, f"W_{name}"], [product]), node("Add", [product, f"b_{name}"], [result])]

        def norm(name: str, given: str, result: str) -> Any:
            inputs = [given, f"W_{name}", f"b_{name}"]
            return node("LayerNormalization", inputs, [result], epsilon=LAYER_NORM_EPS)

        nodes = [
            *linear("in", "x", "qkv"),
            node("Split", ["qkv"], ["query", "key", "value"], axis=2, num_outputs=3),
            node(
                "Attention",
                ["query", "key", "value", *["mask"] * self.padded],
                ["heads"],
                q_num_heads=self.H,
                kv_num_heads=self.H,
            ),
            *linear("out", "heads", "attended"),
            node("Add", ["x", "attended"], ["sum1"]),
            norm("n1", "sum1", "middle"),
            *linear("1", "middle", "hidden"),
            node("Relu", ["hidden"], ["active"]),
            *linear("2", "active", "fed"),
            node("Add", ["middle", "fed"], ["sum2"]),
            norm("n2", "sum2", "y"),
        ]
        return onnx_model(nodes, {"x": x}, {"y": x}, constants)


class Greedy(nn.Module):
    """Translates embedded sources [B, S, E] by the likeliest tokens, always as many."""

    def __init__(self, model: nn.Transformer, vocabulary: int, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length
        self.embedding = nn.Embedding(vocabulary, model.d_model)
        self.generator = nn.Linear(model.d_model, vocabulary)
        self.register_buffer(
            "positions", fastseq.nn.SinusoidalPositions(model.d_model, length)(torch.zeros(1, length, model.d_model))[0]
        )

    def embedded(self, tokens: Tensor, first: int) -> Tensor:
        return self.embedding(tokens) + self.positions[first : first + tokens.shape[1]]

    def forward(self, src: Tensor) -> tuple[Tensor]:
        memory = self.model.encoder(src)
        tokens = torch.zeros(len(src), 1, dtype=torch.int64)
        for _ in range(self.length):
            out = self.decoded(tokens, memory)
            tokens = torch.cat([tokens, self.generator(out[:, -1:]).argmax(-1)], 1)
        return (tokens,)

    def decoded(self, tokens: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=memory.dtype)
        return self.model.decoder(self.embedded(tokens, 0), memory, tgt_mask=mask, tgt_is_causal=True)


class CachedGreedy(Greedy):
    """The same with fastseq's cache."""

    def forward(self, src: Tensor) -> tuple[Tensor]:
        self.cache = fastseq.nn.KVCache(max_length=self.length)
        return super().forward(src)

    def decoded(self, tokens: Tensor, memory: Tensor) -> Tensor:
        return self.model.decoder(self.embedded(tokens[:, -1:], tokens.shape[1] - 1), memory, cache=self.cache)


@dataclass(frozen=True)
class DecodeCase:
    """Greedy decoding with an encoder-decoder of float32 embedded sources [B, S, E], a fixed number of tokens.

    fastseq has its cache, torch none. Hugging Face's Marian of the same size, whose weights are its own, has its cache.
    """

    B: int
    E: int = 512
    H: int = 8
    S: int = 64
    tokens: int = 64
    layers: int = 6
    vocabulary: int = 32000
    smoke: bool = False

    peers = ("torch", "transformers")
    random = False

    def __str__(self) -> str:
        return f"layers{self.layers}_E{self.E}_B{self.B}_S{self.S}-{self.tokens}tokens"

    def flops(self, training: bool) -> int:
        E, rows = self.E, self.B * self.S
        weights = 12 * E**2  # of an encoder layer; a decoder's has two more for each query, and two for the memory
        per_token = self.layers * (14 * E**2 + 2 * E * (self.S + self.tokens // 2)) + E * self.vocabulary
        encoder = rows * self.layers * (weights + 2 * E * self.S + 2 * E**2)
        return 2 * (encoder + self.B * self.tokens * per_token)

    def traffic(self, training: bool) -> list[Traffic]:
        decoder = FLOAT_BYTES * (self.layers * 14 * self.E**2 + self.E * self.vocabulary)
        return [Traffic(decoder * self.tokens, decoder)]

    def task(self, training: bool, kind: type[Greedy] = Greedy) -> Task:
        torch.manual_seed(0)
        model = nn.Transformer(self.E, self.H, self.layers, self.layers, 4 * self.E, batch_first=True)
        layer = kind(model, self.vocabulary, self.tokens).eval()
        return Task(layer, {"src": normal(self.B, self.S, self.E, seed=1)})

    def ours(self, training: bool) -> Task:
        task = self.task(training, CachedGreedy)
        return replace(task, layer=fastseq.accelerate(task.layer))

    def transformers(self) -> Any:
        """Marian's call."""
        from transformers import MarianConfig, MarianMTModel

        config = MarianConfig(
            vocab_size=self.vocabulary,
            d_model=self.E,
            encoder_layers=self.layers,
            decoder_layers=self.layers,
            encoder_attention_heads=self.H,
            decoder_attention_heads=self.H,
            encoder_ffn_dim=4 * self.E,
            decoder_ffn_dim=4 * self.E,
            pad_token_id=self.vocabulary - 1,
            decoder_start_token_id=self.vocabulary - 1,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        model = MarianMTModel(config).eval()
        ids = torch.randint(1, self.vocabulary - 1, (self.B, self.S))
        options = dict(max_new_tokens=self.tokens, min_new_tokens=self.tokens, do_sample=False, num_beams=1)
        return lambda: (model.generate(ids, attention_mask=torch.ones_like(ids), **options),)
