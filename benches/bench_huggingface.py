"""Models of Hugging Face transformers as they are, by their fastest attention on CPUs, against the same accelerated.

`python -m pytest benches/bench_huggingface.py`; conftest.py has the options. Their weights are random.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from attention import FLOAT_BYTES, WithOptions, normal
from peers import Task
from roofline import Traffic
from torch import Tensor

import fastseq

transformers = pytest.importorskip("transformers")


class Embedded(WithOptions):
    """A model called with embeddings."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(**options)
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if self.model.config.is_encoder_decoder:
            return (self.model(inputs_embeds=x, decoder_inputs_embeds=x, **self.arguments).last_hidden_state,)
        return (self.model(inputs_embeds=x, **self.arguments).last_hidden_state,)


@dataclass(frozen=True)
class Case:
    """A model on float32 embeddings [B, S, E], of which in the mean half is padding if `padded`.

    FLOPs are those of the dense layers and of attention, padding included: the models compute it.
    """

    name: str
    B: int
    S: int
    E: int
    H: int
    FF: int
    layers: int
    padded: bool = False
    smoke: bool = False

    peers = ("torch", "torch.compile")
    random = False

    def __str__(self) -> str:
        return f"{self.name}_E{self.E}_B{self.B}_S{self.S}{'-padded' * self.padded}"

    def flops(self, training: bool) -> int:
        rows, stacks = self.B * self.S, 2 if self.name == "t5" else 1
        dense = rows * (8 * self.E**2 + 4 * self.E * self.FF) + (rows * 8 * self.E**2) * (stacks - 1) // 2
        return self.layers * (stacks * (dense + 4 * self.E * rows * self.S)) * (3 if training else 1)

    def traffic(self, training: bool) -> list[Traffic]:
        once = FLOAT_BYTES * self.layers * (4 * self.E**2 + 2 * self.E * self.FF)
        return [Traffic(once, once)]

    def model(self) -> Any:
        torch.manual_seed(0)
        sizes = dict(attn_implementation="sdpa", vocab_size=64)
        if self.name == "t5":
            config = transformers.T5Config(
                d_model=self.E, d_kv=self.E // self.H, d_ff=self.FF, num_layers=self.layers, num_heads=self.H,
                dropout_rate=0.0, feed_forward_proj="gated-gelu", **sizes,
            )  # fmt: skip
            return transformers.T5Model(config)
        config = transformers.BertConfig(
            hidden_size=self.E, num_attention_heads=self.H, intermediate_size=self.FF, num_hidden_layers=self.layers,
            **sizes,
        )  # fmt: skip
        return transformers.BertModel(config, add_pooling_layer=False)

    def task(self, training: bool) -> Task:
        lengths = torch.linspace(1, self.S, self.B).round() if self.padded else torch.full((self.B,), self.S)
        mask = (torch.arange(self.S) < lengths.unsqueeze(-1)).long()
        layer = Embedded(self.model(), **({"attention_mask": mask} if self.padded else {})).train(training)
        if training:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_("embeddings" not in name and "shared" not in name)
        x, dy = (normal(self.B, self.S, self.E, seed=seed) for seed in (1, 2))
        return Task(layer, {"x": x}, dy if training else None)

    def ours(self, training: bool) -> Task:
        task = self.task(training)
        return replace(task, layer=fastseq.accelerate(copy.deepcopy(task.layer)))


BERT = [
    Case("bert", 8, 128, 768, 12, 3072, 12, padded=True),
    Case("bert", 2, 16, 64, 4, 128, 2, padded=True, smoke=True),
]
T5 = [Case("t5", 8, 128, 512, 8, 2048, 6), Case("t5", 2, 16, 64, 4, 128, 2, smoke=True)]


@pytest.mark.parametrize("case", [*BERT, *T5], ids=str)
def test_inference(race, case):
    race("Hugging Face models", "inference", case)


@pytest.mark.parametrize("case", T5, ids=str)
def test_training(race, case):
    race("Hugging Face models", "training", case)
