"""fastseq.models beside their twins of torch alone (twins.py): the same losses and gradients; generation; errors."""

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import Tensor, nn
from torch.testing import assert_close

import fastseq
from fastseq import decoding, models, schedules
from fastseq.models.inputs import check_lengths, check_tokens

pytestmark = pytest.mark.usefixtures("one_thread")  # Models this small would but wait for threads.

B, S, T, V, W, I, C = 4, 7, 6, 11, 13, 5, 3
SRC_LENGTHS, TGT_LENGTHS = torch.tensor([5, 7, 1, 4]), torch.tensor([6, 3, 4, 1])
SIZES: dict[str, dict[str, Any]] = dict(
    SequenceClassifier=dict(input_size=I, hidden=6, classes=C),
    SequenceTagger=dict(input_size=I, hidden=6, classes=C),
    RecurrentLM=dict(vocabulary=W, embedding=5, hidden=6),
    Seq2Seq=dict(src_vocabulary=V, tgt_vocabulary=W, embedding=5, hidden=6),
    TransformerSeq2Seq=dict(src_vocabulary=V, tgt_vocabulary=W, d_model=8, heads=2, layers=2, feedforward=12),
    TransformerClassifier=dict(vocabulary=V, classes=C, d_model=8, heads=2, layers=2, feedforward=12),
    TransformerLM=dict(vocabulary=W, d_model=8, heads=2, layers=2, feedforward=12),
    ImageClassifier=dict(classes=C),
    TextCNN=dict(vocabulary=V, classes=C, embedding=5, filters=4),
)


class Case(NamedTuple):
    """A model with its options."""

    name: str
    options: dict[str, Any]

    def build(self, library: Any, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
        options = {"dropout": 0.0, **SIZES[self.name], **self.options, **more}
        return getattr(library, self.name)(**options).to(dtype)

    def pair(self, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
        """The model and its twin, of the same weights."""
        ours, theirs = self.build(models, dtype), self.build(twins, dtype)
        with torch.no_grad():
            for p in ours.parameters():
                p.add_(0.1 * torch.randn_like(p))
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    @property
    def has_target(self) -> bool:
        return self.name in ("Seq2Seq", "TransformerSeq2Seq")

    def inputs(self, padded: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The arguments of forward."""
        if self.name == "ImageClassifier":
            return [torch.randn(B, *self.options.get("image", (1, 28, 28)), dtype=dtype)]
        src, tgt = torch.randint(V, (B, S)), torch.randint(W, (B, T))
        if self.has_target:
            return [src, tgt, SRC_LENGTHS, TGT_LENGTHS] if padded else [src, tgt]
        if self.name.startswith("Sequence") and "vocabulary" not in self.options:
            src = torch.randn(B, S, I, dtype=dtype)
        return [src, SRC_LENGTHS] if padded and self.name != "RecurrentLM" else [src]

    def rows(self, inputs: list[Tensor]) -> Iterator[list[Tensor]]:
        """Padded inputs, each row alone."""
        for i in range(B):
            if self.has_target:
                yield [inputs[0][i : i + 1, : SRC_LENGTHS[i]], inputs[1][i : i + 1, : TGT_LENGTHS[i]]]
            else:
                yield [inputs[0][i : i + 1, : SRC_LENGTHS[i]]]

    def logits(self, model: nn.Module, inputs: list[Tensor]) -> Tensor:
        """[rows, classes], without those of padding."""
        out = model(*inputs)
        out = out[0] if self.name == "RecurrentLM" else out
        if out.dim() == 2:
            return out
        lengths = inputs[1 + 2 * self.has_target :]
        return out[torch.arange(out.shape[1]) < lengths[0].unsqueeze(1)] if lengths else out.flatten(0, 1)

    def loss(self, model: nn.Module, inputs: list[Tensor]) -> Tensor:
        logits = self.logits(model, inputs)
        labels = (7 * torch.arange(len(logits))) % logits.shape[1]
        return F.cross_entropy(logits, labels)

    def __repr__(self) -> str:
        return "-".join([self.name, *(f"{name}={option}" for name, option in self.options.items())])


CELLS = ("rnn", "lstm", "gru")
ATTENTIONS = (None, "bahdanau", "luong")
OF_SEQUENCES = [
    *(Case("SequenceClassifier", dict(cell=cell, bidirectional=True, layers=2)) for cell in CELLS),
    *(Case("SequenceClassifier", dict(vocabulary=V, pooling=pooling)) for pooling in ("last", "mean", "attention")),
    *(Case("SequenceClassifier", dict(bidirectional=True, pooling=pooling)) for pooling in ("mean", "attention")),
    Case("SequenceTagger", dict(vocabulary=V, cell="gru")),
    Case("SequenceTagger", dict(cell="lstm", bidirectional=False, layers=2)),
    Case("TransformerClassifier", {}),
    Case("TransformerClassifier", dict(norm_first=True)),
    Case("TextCNN", {}),
    Case("TextCNN", dict(widths=(1, 9))),
]
OF_LANGUAGE = [
    *(Case("RecurrentLM", dict(cell=cell, layers=layers)) for cell, layers in zip(CELLS, (1, 2, 1), strict=True)),
    Case("RecurrentLM", dict(tied=True)),
    Case("RecurrentLM", dict(tied=True, embedding=6)),
    Case("TransformerLM", {}),
    Case("TransformerLM", dict(norm_first=False, tied=False)),
]
OF_TWO = [
    *(Case("Seq2Seq", dict(attention=attention, cell=cell)) for attention in ATTENTIONS for cell in CELLS),
    *(Case("Seq2Seq", dict(attention=attention, cell="lstm", layers=3)) for attention in ATTENTIONS),
    *(Case("Seq2Seq", dict(attention=attention, layers=2, bidirectional=False)) for attention in ATTENTIONS),
    Case("TransformerSeq2Seq", {}),
    Case("TransformerSeq2Seq", dict(norm_first=True, tied=False)),
    Case("TransformerSeq2Seq", dict(src_vocabulary=W, shared=True)),
]
OF_IMAGES = [
    Case("ImageClassifier", {}),
    Case("ImageClassifier", dict(image=(3, 17, 22), channels=(4, 6, 8), hidden=7)),
]
ALL = [*OF_SEQUENCES, *OF_LANGUAGE, *OF_TWO, *OF_IMAGES]
PADDED = [case for case in ALL if case.name not in ("RecurrentLM", "ImageClassifier")]
RECURRENT = [case for case in OF_TWO if case.name == "Seq2Seq"]
GENERATORS = [*OF_LANGUAGE, *OF_TWO]

each = pytest.mark.parametrize("case", ALL, ids=repr)
each_generator = pytest.mark.parametrize("case", GENERATORS, ids=repr)
each_seq2seq = pytest.mark.parametrize("case", RECURRENT, ids=repr)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    got, want = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert got.keys() == want.keys()
    for name, parameter in want.items():
        assert got[name].grad is not None, name
        assert_close(got[name].grad, parameter.grad, msg=lambda m, name=name: f"{name}: {m}")


def _named(argument: Any) -> str:
    """Short names of tests, since those of tensors are long."""
    if isinstance(argument, list):
        return "-".join(map(_named, argument))
    return str(list(argument.shape)) if isinstance(argument, Tensor) else repr(argument)


def start(case: Case, model: Any, inputs: list[Tensor]) -> Any:
    return model.start(*inputs[::2]) if case.has_target else model.start(B)


@each
@pytest.mark.parametrize("padded", [True, False])
def test_models_are_what_torch_makes_of_the_same_weights(case: Case, padded: bool) -> None:
    ours, theirs = case.pair()
    inputs = case.inputs(padded)
    got, want = case.loss(ours, inputs), case.loss(theirs, inputs)
    assert_close(got, want)
    got.backward()
    want.backward()
    assert_same_gradients(ours, theirs)


@each
def test_in_float32_and_evaluation_too(case: Case) -> None:
    ours, theirs = (model.eval() for model in case.pair(torch.float32))
    inputs = case.inputs(dtype=torch.float32)
    with torch.no_grad():
        assert_close(case.logits(ours, inputs), case.logits(theirs, inputs))


@pytest.mark.parametrize("case", PADDED, ids=repr)
def test_a_padded_batch_is_each_sequence_alone(case: Case) -> None:
    model, _ = case.pair()
    inputs = case.inputs()
    alone = torch.cat([case.logits(model, row) for row in case.rows(inputs)])
    assert_close(case.logits(model, inputs), alone)
    changed = [t.clone() for t in inputs]  # whatever stands in padding
    for x, lengths in zip(
        *((changed[:2], changed[2:]) if case.has_target else (changed[:1], changed[1:])), strict=True
    ):
        past = torch.arange(x.shape[1]) >= lengths.unsqueeze(1)
        x[past] = math.nan if x.is_floating_point() else 3
    loss = case.loss(model, changed)
    assert_close(loss, case.loss(model, inputs))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each_generator
def test_step_by_step_is_all_at_once(case: Case) -> None:
    model, _ = case.pair()
    model.eval()
    inputs = case.inputs()
    inputs = [*inputs[:3], torch.full((B,), T)] if case.has_target else [torch.randint(W, (B, T))]
    state = start(case, model, inputs)
    target = inputs[1] if case.has_target else inputs[0]
    rows = torch.tensor([2, 0, 0, 3, 1])
    steps = []
    with torch.no_grad():
        expected = case.logits(model, inputs).unflatten(0, (B, T))
        for t in range(T):
            if t == 3:  # rows move, and one comes twice
                state, target, expected = model.reorder(state, rows), target[rows], expected[rows]
                steps = [step[rows] for step in steps]
            logits, state = model.step(target[:, t], state)
            steps.append(logits)
    assert_close(torch.stack(steps, 1), expected)


@each_generator
def test_states_can_be_reordered_before_the_first_step(case: Case) -> None:
    model, _ = case.pair()
    model.eval()
    inputs, rows, tokens = case.inputs(), torch.tensor([3, 1, 1]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        state = model.reorder(start(case, model, inputs), rows)
        got = model.step(tokens, state)[0]
        state = model.start(*(t[rows] for t in inputs[::2])) if case.has_target else model.start(3)
        assert_close(got, model.step(tokens, state)[0])


@each_generator
@pytest.mark.parametrize("beam", [None, 1, 3])
def test_decoding_finds_what_it_finds_with_the_twin(case: Case, beam: int | None) -> None:
    inputs = case.inputs()
    found = []
    for model in case.pair():
        model.eval()
        state, bos = start(case, model, inputs), torch.ones(B, dtype=torch.int64)
        options = dict(eos=2, max_length=5)
        if beam is None:
            found.append(decoding.greedy(model, state, bos, **options))
        else:
            found.append(decoding.beam_search(model, state, bos, beam=beam, n_best=beam, **options))
    for ours, theirs in zip(*found, strict=True):
        assert [h.tokens.tolist() for h in ours] == [h.tokens.tolist() for h in theirs]
        assert_close([h.score for h in ours], [h.score for h in theirs])


@pytest.mark.parametrize("attention", ["bahdanau", "luong"])
def test_attention_weights_can_be_seen_and_count_in_beam_search(attention: str) -> None:
    case = Case("Seq2Seq", dict(attention=attention, layers=2))
    ours, theirs = case.pair()
    src, tgt, lengths, _ = case.inputs()
    states = [model.step(tgt[:, 0], model.start(src, lengths))[1] for model in (ours, theirs)]
    weights = ours.weights(states[0])
    assert_close(weights, states[1]["weights"])
    assert_close(weights.sum(1), torch.ones(B, dtype=weights.dtype))
    assert not weights[torch.arange(S) >= lengths.unsqueeze(1)].any()
    with pytest.raises(ValueError, match="weights: there has been no step"):
        ours.weights(ours.start(src))
    bos = torch.ones(B, dtype=torch.int64)
    scores = [
        [
            found[0].score
            for found in decoding.beam_search(
                ours, ours.start(src, lengths), bos, eos=None, max_length=4, beam=2, coverage_penalty=penalty,
                source_lengths=lengths,
            )
        ]
        for penalty in (0.0, 1.0)
    ]  # fmt: skip
    assert all(penalized < free for free, penalized in zip(*scores, strict=True) if free != penalized)
    assert scores[0] != scores[1]


def test_beams_of_a_source_share_its_memory() -> None:
    model, _ = Case("Seq2Seq", dict(attention="luong")).pair()
    state = model.start(torch.randint(V, (2, S)))
    state = model.reorder(state, torch.tensor([0, 0, 1, 1]))
    assert model.reorder(state, torch.tensor([1, 1, 3, 2])).memory is state.memory
    moved = model.reorder(state, torch.tensor([0, 2, 3, 3]))
    assert_close(moved.memory, state.memory[[0, 2, 2, 2]])
    assert moved.source.tolist() == [0, 1, 1, 1]


@each_seq2seq
def test_scheduled_sampling_has_teacher_forcing_and_its_own_words_as_limits(case: Case) -> None:
    model, _ = case.pair()
    src, tgt, src_lengths, _ = case.inputs()
    forced = model(src, tgt, src_lengths)
    almost = 1 - 1e-12  # every draw is below
    assert_close(model(src, tgt, src_lengths, teacher_forcing=almost), forced)

    free = model(src, tgt, src_lengths, teacher_forcing=0.0)
    fed = torch.cat([tgt[:, :1], free.argmax(2)[:, :-1]], 1)
    assert_close(model(src, fed, src_lengths), free)
    assert_close(free[:, 0], forced[:, 0])

    torch.manual_seed(1)
    mixed = model(src, tgt, src_lengths, teacher_forcing=0.5)
    torch.manual_seed(1)
    fed = tgt.clone()
    for t in range(1, T):
        fed[:, t] = torch.where(torch.rand(B, 1).squeeze(1) < 0.5, tgt[:, t], mixed[:, t - 1].argmax(1))
    assert not torch.equal(fed, tgt)
    assert_close(model(src, fed, src_lengths), mixed)
    mixed.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_windows_of_a_text_with_the_state_carried_over_are_the_whole(cell: str) -> None:
    model, whole = (copy.deepcopy(Case("RecurrentLM", dict(cell=cell, layers=2)).build(models)) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    tokens = torch.randint(W, (B, 12))
    expected, last = whole(tokens)
    expected.square().mean().backward()
    state, parts = None, []
    for window in tokens.split(4, 1):
        logits, state = model(window, state)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), expected)
    assert_close(state, last)
    torch.cat(parts, 1).square().mean().backward()
    assert_same_gradients(model, whole)
    detached = model.detach(state)
    assert_close(detached, last)
    assert not any(t.requires_grad for t in (detached if cell == "lstm" else [detached]))


@pytest.mark.parametrize(
    ("case", "tied"),
    [
        (Case("RecurrentLM", dict(tied=True)), ["embedding"]),
        (Case("TransformerLM", {}), ["embedding"]),
        (Case("TransformerSeq2Seq", {}), ["tgt_embedding"]),
        (Case("TransformerSeq2Seq", dict(src_vocabulary=W, shared=True)), ["src_embedding", "tgt_embedding"]),
    ],
    ids=repr,
)
def test_tied_weights_are_one_tensor(case: Case, tied: list[str]) -> None:
    model, _ = case.pair()
    for same in (model, copy.deepcopy(model), fastseq.restore(fastseq.accelerate(copy.deepcopy(model)))):
        assert all(same.get_submodule(name).weight is same.output.weight for name in tied)
    untied = case.build(models, tied=False)
    assert model.output.weight.shape == (W, model.get_submodule(tied[0]).embedding_dim)
    assert untied.output.weight is not untied.get_submodule(tied[-1]).weight


@each
def test_a_state_dict_makes_a_model_the_same(case: Case) -> None:
    model, _ = case.pair()
    other = case.build(models)
    inputs = case.inputs()
    assert not torch.equal(case.logits(model, inputs), case.logits(other, inputs))
    other.load_state_dict(model.state_dict())
    assert torch.equal(case.logits(model, inputs), case.logits(other, inputs))


@each
def test_an_accelerated_twin_stays_the_same(case: Case) -> None:
    _, twin = case.pair()
    inputs = case.inputs()
    before = case.loss(twin, inputs)
    fastseq.accelerate(twin)
    assert_close(case.loss(twin, inputs), before)


@pytest.mark.parametrize("case", [OF_SEQUENCES[0], RECURRENT[4], Case("TransformerLM", {})], ids=repr)
def test_models_are_explained_and_can_be_accelerated(case: Case) -> None:
    model, twin = case.pair()
    told = str(fastseq.explain(model))
    assert "fastseq.nn." in told
    if case.name == "Seq2Seq":
        assert "attention_layer" in told
    assert "torch.nn." in str(fastseq.explain(twin))
    inputs = case.inputs()
    before = case.loss(model, inputs)
    assert_close(case.loss(fastseq.accelerate(model), inputs), before)


@each
def test_dropout_is_for_training_only(case: Case) -> None:
    model = case.build(models, torch.float32, dropout=0.5)
    inputs = case.inputs(dtype=torch.float32)
    assert not torch.equal(case.logits(model, inputs), case.logits(model, inputs))
    case.loss(model, inputs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert torch.equal(case.logits(model, inputs), case.logits(model, inputs))


@each
def test_mixed_precision_trains(case: Case) -> None:
    model, _ = case.pair(torch.float32)
    inputs = case.inputs(dtype=torch.float32)
    expected = case.loss(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(model, inputs)
    # Products of a few numbers around 1, rounded to 8 bits.
    assert_close(loss.float(), expected, rtol=0.02, atol=0.02)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[1, 2]], TypeError, "tokens must be a tensor of int64, got list"),
        (torch.ones(2, 2), TypeError, "tokens must be a tensor of int64, got torch.float32"),
        (torch.ones(2, 2, dtype=torch.int32), TypeError, "tokens must be a tensor of int64, got torch.int32"),
        (torch.ones(2, dtype=torch.int64), ValueError, r"tokens must be \[B, T\] with at least one token, got \[2\]"),
        (torch.ones(2, 0, dtype=torch.int64), ValueError, r"with at least one token, got \[2, 0\]"),
        (torch.ones(0, 2, dtype=torch.int64), ValueError, r"with at least one token, got \[0, 2\]"),
        (torch.tensor([[1, 5]]), IndexError, "tokens must be between 0 and 4, got 1 to 5"),
        (torch.tensor([[-1, 4]]), IndexError, "tokens must be between 0 and 4, got -1 to 4"),
    ],
    ids=_named,
)
def test_tokens_that_cannot_be_are_refused(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_tokens("tokens", tokens, 5)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1, 2], TypeError, "lengths must be a tensor of integers, got list"),
        (torch.ones(2), TypeError, "lengths must be a tensor of integers, got torch.float32"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"lengths must be \[2\], one for each row, got \[3\]"),
        (torch.ones(2, 1, dtype=torch.int64), ValueError, r"lengths must be \[2\], one for each row, got \[2, 1\]"),
        (torch.tensor([0, 3]), ValueError, "lengths must be between 1 and 4, got 0 to 3"),
        (torch.tensor([1, 5]), ValueError, "lengths must be between 1 and 4, got 1 to 5"),
    ],
    ids=_named,
)
def test_lengths_that_cannot_be_are_refused(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_lengths("lengths", lengths, 2, 4)
    assert check_lengths("lengths", torch.tensor([1, 4], dtype=torch.int32), 2, 4).tolist() == [1, 4]


SRC, TGT = torch.randint(V, (B, S)), torch.randint(W, (B, T))


@pytest.mark.parametrize(
    ("case", "inputs", "message"),
    [
        (RECURRENT[0], [SRC + V, TGT], "src must be between"),
        (RECURRENT[3], [SRC, TGT - 1000], "tgt_in must be between"),
        (RECURRENT[3], [SRC, TGT, SRC_LENGTHS + S], "src_lengths must be between"),
        (RECURRENT[3], [SRC, TGT, SRC_LENGTHS, TGT_LENGTHS - 1], "tgt_lengths must be between"),
        (RECURRENT[3], [SRC, TGT[1:]], "tgt_in must be of as many rows as src, 4, got 3"),
        (RECURRENT[3], [SRC, TGT, None, None, 1.5], "teacher_forcing must be between 0 and 1, got 1.5"),
        (Case("TransformerSeq2Seq", {}), [SRC + V, TGT], "src must be between"),
        (Case("TransformerSeq2Seq", {}), [SRC, TGT + W], "tgt_in must be between"),
        (Case("TransformerSeq2Seq", {}), [SRC, TGT[1:]], "tgt_in must be of as many rows as src, 4, got 3"),
        (Case("TransformerSeq2Seq", {}), [SRC, TGT, SRC_LENGTHS[1:]], "src_lengths must be"),
        (Case("TransformerSeq2Seq", {}), [SRC, TGT, None, TGT_LENGTHS[1:]], "tgt_lengths must be"),
        (Case("TransformerSeq2Seq", dict(max_length=5)), [SRC, TGT], "positions for 5"),
        (Case("TransformerClassifier", {}), [SRC + V], "tokens must be between"),
        (Case("TransformerLM", {}), [TGT + W], "tokens must be between"),
        (Case("RecurrentLM", {}), [TGT + W], "tokens must be between"),
        (Case("SequenceTagger", dict(vocabulary=V)), [SRC + V], "input must be between"),
        (Case("SequenceTagger", dict(vocabulary=V)), [SRC, SRC_LENGTHS + S], "lengths must be between"),
        (Case("SequenceClassifier", {}), [torch.ones(B, S, I + 1)], r"input must be \[B, T, 5\]"),
        (Case("SequenceClassifier", {}), [torch.ones(B, 0, I)], r"input must be \[B, T, 5\]"),
        (Case("TextCNN", {}), [SRC + V], "tokens must be between"),
        (Case("TextCNN", {}), [SRC, SRC_LENGTHS - 1], "lengths must be between"),
        (Case("ImageClassifier", {}), [torch.ones(B, 28, 28)], r"images must be \[B, 1, 28, 28\], got \[4, 28, 28\]"),
        (Case("ImageClassifier", {}), [torch.ones(B, 1, 27, 28)], r"images must be \[B, 1, 28, 28\]"),
    ],
    ids=_named,
)  # fmt: skip
def test_input_that_a_model_cannot_take_is_refused_by_name(case: Case, inputs: list[Any], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        case.build(models, torch.float32)(*inputs)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("SequenceClassifier", dict(cell="gpu")), "cell must be one of 'rnn', 'lstm', 'gru', got 'gpu'"),
        (Case("SequenceClassifier", dict(pooling="max")), "pooling must be one of 'last', 'mean', 'attention'"),
        (Case("Seq2Seq", dict(cell="gpu")), "cell must be one of"),
        (Case("Seq2Seq", dict(attention="dot")), "attention must be one of None, 'bahdanau', 'luong', got 'dot'"),
        (Case("Seq2Seq", dict(layers=0)), "layers must be at least 1, got 0"),
        (Case("TransformerSeq2Seq", dict(shared=True)), "tgt_vocabulary must be src_vocabulary, 11, for shared=True"),
        (Case("ImageClassifier", dict(image=(1, 7, 9), channels=(1, 1, 1))), "image must not be smaller than 8"),
    ],
    ids=_named,
)
def test_options_that_cannot_be_are_refused(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.build(models)


def test_steps_refuse_tokens_that_are_none() -> None:
    for case in (Case("RecurrentLM", {}), Case("TransformerLM", {}), RECURRENT[3], Case("TransformerSeq2Seq", {})):
        model = case.build(models)
        with pytest.raises(IndexError, match="tokens must be between 0 and 12, got 13 to 13"):
            model.step(torch.full((B,), W), start(case, model, [SRC]))


def test_a_model_without_attention_has_no_weights() -> None:
    model = RECURRENT[0].build(models)
    with pytest.raises(ValueError, match="weights: a model without attention has none"):
        model.weights(model.start(SRC))


@pytest.mark.parametrize(
    "case",
    [
        Case("RecurrentLM", {}),
        Case("Seq2Seq", dict(attention="luong", layers=2)),
        Case("TransformerSeq2Seq", {}),
        Case("TextCNN", {}),
        Case("ImageClassifier", {}),
    ],
    ids=repr,
)
def test_models_are_one_graph_to_a_compiler(case: Case) -> None:
    model, _ = case.pair()
    inputs = case.inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_close(case.logits(compiled, inputs), case.logits(model, inputs))


@pytest.mark.parametrize("steps", [1, 99, 100, 400])
def test_learning_rates_follow_their_formulas(steps: int) -> None:
    def rate(schedule: Any, lr: float, **options: Any) -> float:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler = schedule(optimizer, **options)
        for _ in range(steps - 1):
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]["lr"]  # that of the next step, number `steps`

    assert_close(rate(schedules.noam, 1.0, d_model=64, warmup=100), min(steps**-0.5, steps * 100**-1.5) / 8)
    expected = 3.0 * (steps / 100 if steps <= 100 else 10 / steps**0.5)
    assert_close(rate(schedules.inverse_square_root, 3.0, warmup=100), expected)


@pytest.mark.parametrize("warmup", [0, -1, 2.5, True])
def test_schedules_refuse_a_warmup_that_is_none(warmup: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="warmup must be a positive integer"):
        schedules.noam(optimizer, 64, warmup)
    with pytest.raises(ValueError, match="warmup must be a positive integer"):
        schedules.inverse_square_root(optimizer, warmup)


def test_importing_fastseq_does_not_import_the_models() -> None:
    code = "import sys, fastseq; sys.exit('fastseq.models' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_transformers_state_serves_one_search() -> None:
    model = models.TransformerSeq2Seq(11, 11, 16, 2, 1, 32).eval()
    state = model.start(torch.tensor([[1, 2, 3]]))
    _, after = model.step(torch.tensor([4]), state)
    with pytest.raises(ValueError, match="state must be new"):
        model.step(torch.tensor([4]), state)
    model.step(torch.tensor([4]), after)
