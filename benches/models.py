"""What the benches of the models share: the cases, as data.

Peers are the models as torch alone has them, `tests/twins.py`: torch's own layers, packed sequences, loops over cells.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention import FLOAT_BYTES
from peers import Task
from roofline import Traffic
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq import models

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import twins

PADDING = -100  # what cross entropy leaves out
# Where a sum in front of a ReLU is nearly zero, float32 and float64 may disagree on whether it is open: an element of a
# gradient then lacks one of its terms, which may be many or few.
WITH_RELU = ("TransformerSeq2Seq", "ImageClassifier")


class Loss(nn.Module):
    """A model's loss on the batch that it holds."""

    def __init__(self, model: nn.Module, loss: nn.Module, target: Tensor, *batch: Tensor | None) -> None:
        super().__init__()
        self.model, self.loss, self.target, self.batch = model, loss, target, batch

    def forward(self) -> tuple[Tensor]:
        dtype = next(self.model.parameters()).dtype
        logits = self.model(*(x.to(dtype) if x is not None and x.is_floating_point() else x for x in self.batch))
        logits = logits[0] if isinstance(logits, tuple) else logits  # a language model's state is not needed
        return (self.loss(logits.flatten(0, -2), self.target.flatten()),)


class Generated(nn.Module):
    """The tokens that a model generates."""

    def __init__(self, model: nn.Module, search: Any, **options: Any) -> None:
        super().__init__()
        self.model, self.search, self.options = model, search, options

    def forward(self) -> tuple[Tensor]:
        return (self.search(self.model, **self.options),)


@dataclass(frozen=True)
class ModelCase:
    """A model, the batch that it is trained on or generates from, and its twin with the same parameters.

    FLOPs are those of the twin's matrix products, counted in one call; traffic is that of the parameters, once.

    Attributes:
        name: of the case.
        kind: the class in fastseq.models and in tests/twins.py.
        arguments: what both are made with.
        B: rows.
        S: the longest source, or 0.
        T: the longest sequence, or target.
        lengths: whether rows are of lengths spread evenly up to the longest.
    """

    name: str
    kind: str
    arguments: dict[str, Any] = field(hash=False)
    B: int
    T: int = 0
    S: int = 0
    lengths: bool = False
    smoke: bool = False
    compiled: bool = False  # whether torch.compile takes the twin

    random = False

    @property
    def peers(self) -> tuple[str, ...]:
        return ("torch", "torch.compile") if self.compiled else ("torch",)

    def __str__(self) -> str:
        sizes = "_".join(f"{name}{size}" for name, size in (("B", self.B), ("S", self.S), ("T", self.T)) if size)
        return f"{self.name}-{sizes}"

    def flops(self, training: bool) -> int:
        layer = self.task(False).layer.double()  # oneDNN's LSTM, of float32 only, is one operator that is not counted
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer()
        return counter.get_total_flops() * (3 if training else 1)

    def traffic(self, training: bool) -> list[Traffic]:
        bytes_ = FLOAT_BYTES * sum(parameter.numel() for parameter in self.twin().parameters())
        return [Traffic(bytes_ * (3 if training else 1), bytes_)]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return getattr(models, self.kind)(**self.arguments)

    def twin(self) -> nn.Module:
        twin = getattr(twins, self.kind)(**self.arguments)
        twin.load_state_dict(self.model().state_dict())
        return twin

    def lengths_of(self, longest: int, seed: int) -> Tensor | None:
        """[B] from 1 to the longest, in some order."""
        if not self.lengths:
            return None
        order = torch.randperm(self.B, generator=torch.Generator().manual_seed(seed))
        return torch.linspace(1, longest, self.B).round().long()[order]

    def tokens(self, vocabulary: int, *shape: int, seed: int = 1) -> Tensor:
        return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))

    def batch(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The target [B, T], or [B] of classes, and what the model is called with."""
        options = self.arguments
        if self.kind == "ImageClassifier":
            images = torch.rand(self.B, *options.get("image", (1, 28, 28)), generator=torch.Generator().manual_seed(1))
            return self.tokens(options["classes"], self.B, seed=2), (images,)
        V = options.get("tgt_vocabulary", options.get("vocabulary"))
        target = self.tokens(V, self.B, self.T, seed=2)
        if not self.S:
            return target, (self.tokens(V, self.B, self.T),)
        source_lengths, lengths = self.lengths_of(self.S, 3), self.lengths_of(self.T, 4)
        if lengths is not None:
            target = target.masked_fill(torch.arange(self.T) >= lengths.unsqueeze(1), PADDING)
        source = self.tokens(options["src_vocabulary"], self.B, self.S)
        return target, (source, self.tokens(V, self.B, self.T, seed=5), source_lengths, lengths)

    def task(self, training: bool) -> Task:
        return self._task(training, self.twin(), nn.CrossEntropyLoss(ignore_index=PADDING))

    def ours(self, training: bool) -> Task:
        return self._task(training, self.model(), fastseq.nn.CrossEntropyLoss(ignore_index=PADDING))

    def _task(self, training: bool, model: nn.Module, loss: nn.Module) -> Task:
        target, batch = self.batch()
        layer = Loss(model, loss, target, *batch).train(training)
        return Task(layer, {}, torch.ones(()) if training else None, by_norm=self.kind in WITH_RELU)


@dataclass(frozen=True)
class SearchCase(ModelCase):
    """T tokens generated by a model, always as many, against torch's usual way: a sentence at a time for beam search,
    everything anew in each step for a Transformer.

    There is no limit: peers do not do the same.

    Attributes:
        beam: of the search; 1 is greedy.
    """

    beam: int = 1

    def flops(self, training: bool) -> int:
        return 0

    def traffic(self, training: bool) -> list[Traffic]:
        return []

    def task(self, training: bool) -> Task:
        return Task(Generated(self.twin(), _generate_in_torch, **self._options()).eval(), {})

    def ours(self, training: bool) -> Task:
        return Task(Generated(self.model(), _generate, **self._options()).eval(), {})

    def _options(self) -> dict[str, Any]:
        source = self.tokens(self.arguments["src_vocabulary"], self.B, self.S) if self.S else None
        return dict(source=source, lengths=self.lengths_of(self.S, 3), B=self.B, T=self.T, beam=self.beam)


def _start(model: Any, source: Tensor | None, lengths: Tensor | None, B: int) -> Any:
    return model.start(B) if source is None else model.start(source, lengths)


@torch.inference_mode()
def _generate(model: Any, source: Tensor | None, lengths: Tensor | None, B: int, T: int, beam: int) -> Tensor:
    """[B, T] by fastseq.decoding."""
    state, bos = _start(model, source, lengths, B), torch.zeros(B, dtype=torch.int64)
    options: dict[str, Any] = dict(eos=None, max_length=T)
    if beam == 1:
        found = fastseq.decoding.greedy(model, state, bos, **options)
    else:
        found = fastseq.decoding.beam_search(model, state, bos, beam=beam, **options)
    return torch.stack([hypotheses[0].tokens for hypotheses in found])


@torch.inference_mode()
def _generate_in_torch(model: Any, source: Tensor | None, lengths: Tensor | None, B: int, T: int, beam: int) -> Tensor:
    """[B, T] by the loops that one writes."""
    if beam == 1:
        state, tokens, steps = _start(model, source, lengths, B), torch.zeros(B, dtype=torch.int64), []
        for _ in range(T):
            logits, state = model.step(tokens, state)
            tokens = logits.argmax(1)
            steps.append(tokens)
        return torch.stack(steps, 1)
    assert source is not None
    found = []
    for i in range(B):
        n = None if lengths is None else lengths[i : i + 1]
        state = model.start(source[i : i + 1, : None if n is None else int(n)], n)
        tokens, scores, histories = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1), torch.empty(1, 0).long()
        for _ in range(T):
            logits, state = model.step(tokens, state)
            scores, best = (scores + F.log_softmax(logits, 1)).flatten().topk(beam)
            rows, tokens = best // logits.shape[1], best % logits.shape[1]
            histories = torch.cat([histories[rows], tokens.unsqueeze(1)], 1)
            state, scores = model.reorder(state, rows), scores.unsqueeze(1)
        found.append(histories[0])
    return torch.stack(found)
