"""fastseq.decoding beside searches in plain Python: of all sequences, and of a beam, one sentence at a time."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastseq
from fastseq.decoding import Hypothesis, beam_search, greedy, pad_hypotheses, reorder_tensors, sample

BOS, EOS, PAD = 0, 1, 2
INF = float("inf")


class TableState(NamedTuple):
    rows: list[tuple[int, tuple[int, ...]]]  # of each row its sentence and its tokens
    used: list[bool]


class Table:
    """Logits and attention weights that are random numbers for each sentence and history.

    It refuses what a model may not meet: a state for the second time, tokens behind eos or that cannot follow.

    Args:
        branch: how many tokens other than eos and pad may follow each history, by default all.
    """

    def __init__(self, V: int, seed: int = 0, branch: int | None = None, S: int = 3, dtype: Any = torch.float64):
        self.V, self.seed, self.branch, self.S, self.dtype = V, seed, branch, S, dtype
        self.calls: list[int] = []
        self.eos: int | None = EOS

    def start(self, sentences: int | list[int]) -> TableState:
        sentences = list(range(sentences)) if isinstance(sentences, int) else sentences
        return TableState([(sentence, ()) for sentence in sentences], [False])

    def logits(self, sentence: int, history: tuple[int, ...]) -> Tensor:
        source = random.Random(f"{self.seed} {sentence} {history}")
        logits = torch.tensor([source.gauss(0, 1.5) for _ in range(self.V)], dtype=torch.float64)
        if self.branch is not None:
            others = [v for v in range(self.V) if v not in (EOS, PAD)]
            kept = [EOS, *source.sample(others, min(self.branch, len(others)))]
            logits[[v for v in range(self.V) if v not in kept]] = -INF
        return logits

    def attends(self, sentence: int, history: tuple[int, ...]) -> Tensor:
        source = random.Random(f"weights {self.seed} {sentence} {history}")
        return torch.tensor([source.gauss(0, 2) for _ in range(self.S)], dtype=torch.float64).softmax(0)

    def _use(self, state: TableState) -> list[tuple[int, tuple[int, ...]]]:
        assert not state.used[0], "a state that has been given away"
        state.used[0] = True
        return state.rows

    def step(self, tokens: Tensor, state: TableState) -> tuple[Tensor, TableState]:
        assert tokens.dtype == torch.int64 and tokens.shape == (len(state.rows),)
        self.calls.append(len(tokens))
        rows = []
        for token, (sentence, history) in zip(tokens.tolist(), self._use(state), strict=True):
            assert token != self.eos and (not history or self.logits(sentence, history[1:])[token] > -INF)
            rows.append((sentence, (*history, token)))
        logits = torch.stack([self.logits(sentence, history[1:]) for sentence, history in rows])
        return logits.to(self.dtype), TableState(rows, [False])

    def reorder(self, state: TableState, rows: Tensor) -> TableState:
        assert rows.dtype == torch.int64 and rows.dim() == 1
        before = self._use(state)
        return TableState([before[row] for row in rows.tolist()], [False])

    def weights(self, state: TableState) -> Tensor:
        assert not state.used[0]
        weights = torch.stack([self.attends(sentence, history[1:]) for sentence, history in state.rows])
        return weights.to(self.dtype)


class ToyRNN(nn.Module):
    """A recurrent model whose state, of tensors, also tells a sentence's own bias."""

    def __init__(self, V: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(V, 6)
        self.cell = nn.GRUCell(6, 6)
        self.head = nn.Linear(6, V)
        self.first = nn.Parameter(torch.randn(10, 6))
        self.double()
        for p in self.parameters():
            p.data.mul_(2)

    def start(self, sentences: int | list[int]) -> dict[str, Any]:
        sentences = list(range(sentences)) if isinstance(sentences, int) else sentences
        return {"h": (self.first[sentences], None)}

    def step(self, tokens: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        h = self.cell(self.embedding(tokens), state["h"][0])
        return self.head(h), {"h": (h, None)}

    def reorder(self, state: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        return reorder_tensors(state, rows)

    @torch.no_grad()
    def logits(self, sentence: int, history: tuple[int, ...]) -> Tensor:
        state = self.start([sentence])
        for token in (BOS, *history):
            logits, state = self.step(torch.tensor([token]), state)
        return logits[0]


@dataclass
class Options:
    """The options of beam_search, and the reference of what they mean."""

    max_length: int = 5
    eos: int | None = EOS
    beam: int = 4
    n_best: int = 1
    length_penalty: float = 0.0
    length_norm: str = "gnmt"
    coverage_penalty: float = 0.0
    source_lengths: list[int] | None = None
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    prefix: list[list[int]] | None = None
    pad: int | None = None

    def search(self, model: Any, B: int, **others: Any) -> list[list[Hypothesis]]:
        options = dict(vars(self), **others)
        model.eos = self.eos
        if self.source_lengths is not None:
            options["source_lengths"] = torch.tensor(self.source_lengths)
        return beam_search(model, model.start(B), bos(B), return_log_probs=True, **options)

    def alone(self, sentence: int) -> "Options":
        prefix = None if self.prefix is None else [self.prefix[sentence]]
        lengths = None if self.source_lengths is None else [self.source_lengths[sentence]]
        return replace(self, prefix=prefix, source_lengths=lengths)

    def forbids(self, sentence: int, history: tuple[int, ...], token: int) -> bool:
        given = self.prefix[sentence] if self.prefix else []
        if len(history) < len(given):
            return token != given[len(history)]
        n = self.no_repeat_ngram_size
        grown = (*history, token)
        ngrams = [grown[i : i + n] for i in range(len(grown) - n + 1)]
        return (
            token == self.pad
            or (token == self.eos and len(history) < self.min_length)
            or (n > 0 and ngrams[-1:] != [] and ngrams[-1] in ngrams[:-1])
        )

    def score(self, model: Any, sentence: int, history: tuple[int, ...], log_probs: tuple[float, ...]) -> float:
        n = max(len(history), 1)
        base = (5 + len(history)) / 6 if self.length_norm == "gnmt" else n
        score = sum(log_probs) / base**self.length_penalty
        if self.coverage_penalty:
            covered = sum(model.attends(sentence, history[:i]) for i in range(len(history)))
            places = None if self.source_lengths is None else self.source_lengths[sentence]
            score += self.coverage_penalty * covered[:places].clamp(max=1).log().sum().item()
        return score

    def expected(self, model: Any, sentence: int, beam: int | None) -> list[tuple[tuple[int, ...], float]]:
        """The n_best hypotheses, of all that there are or of a beam, always searched up to max_length."""
        running: list[tuple[tuple[int, ...], tuple[float, ...]]] = [((), ())]
        ended = []
        for t in range(1, self.max_length + 1):
            candidates = []
            for history, log_probs in running:
                new = model.logits(sentence, history).log_softmax(0).tolist()
                candidates += [
                    ((*history, token), (*log_probs, new[token]))
                    for token in range(len(new))
                    if new[token] > -INF and not self.forbids(sentence, history, token)
                ]
            if not candidates:
                ended += running
                break
            candidates.sort(key=lambda c: -sum(c[1]))
            over = [c for c in candidates[:beam] if c[0][-1] == self.eos or t == self.max_length]
            ended += over
            running = [c for c in candidates[: 2 * beam if beam else None] if c[0][-1] != self.eos][:beam]
            if t == self.max_length or not running:
                break
        scored = [(history, self.score(model, sentence, history, log_probs)) for history, log_probs in ended]
        return sorted(scored, key=lambda found: -found[1])[: self.n_best]


def bos(B: int) -> Tensor:
    return torch.full((B,), BOS)


def check(found: list[Hypothesis], expected: list[tuple[tuple[int, ...], float]]) -> None:
    assert [tuple(h.tokens.tolist()) for h in found] == [history for history, _ in expected]
    torch.testing.assert_close([h.score for h in found], [score for _, score in expected], rtol=1e-9, atol=1e-9)


def same(found: list[list[Hypothesis]], other: list[list[Hypothesis]]) -> None:
    for ours, theirs in zip(found, other, strict=True):
        assert [h.tokens.tolist() for h in ours] == [h.tokens.tolist() for h in theirs]
        torch.testing.assert_close([h.score for h in ours], [h.score for h in theirs], rtol=1e-5, atol=1e-5)


PREFIXES = [[3, 4], [], [5]]
EACH_OPTION = [
    {},
    {"length_penalty": 0.7},
    {"length_penalty": -0.5},
    {"length_penalty": 1.0, "length_norm": "power"},
    {"length_penalty": 2.0, "length_norm": "power", "n_best": 4},
    {"coverage_penalty": 0.4, "length_penalty": 0.2},
    {"coverage_penalty": 3.0, "source_lengths": [3, 1, 2], "n_best": 3},
    {"min_length": 3},
    {"min_length": 4, "length_penalty": -1.0},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "length_penalty": 1.5},
    {"no_repeat_ngram_size": 1, "min_length": 5},
    {"n_best": 4},
    {"pad": PAD},
    {"eos": None},
    {"max_length": 1},
    {"max_length": 2, "n_best": 2},
]
each_option = pytest.mark.parametrize("options", EACH_OPTION, ids=str)


@each_option
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all_sequences(options: dict[str, Any], seed: int):
    # Two tokens and eos may follow: the 2^4 beginnings of 4 tokens have at most 3 · 2^4 continuations.
    model = Table(V=50, seed=seed, branch=1 if options.get("eos", EOS) is None else 2)
    chosen = Options(**dict(options, beam=50))
    found = chosen.search(model, 3)
    for sentence in range(3):
        check(found[sentence], chosen.expected(model, sentence, beam=None))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_length", [1, 2])
@pytest.mark.parametrize("kind", [Table, ToyRNN])
def test_a_beam_of_the_whole_vocabulary_finds_the_best_of_all_sequences(kind: Any, max_length: int, seed: int):
    model = kind(4, seed)
    for n_best in (1, 4):
        chosen = Options(max_length=max_length, beam=4, n_best=n_best)
        found = chosen.search(model, 3)
        for sentence in range(3):
            check(found[sentence], chosen.expected(model, sentence, beam=None))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prefix", [PREFIXES, [[3, EOS], [4, 3], [5, 5]], [[3], [4, 5, 3, 4, EOS], [4, 4]]], ids=str)
@pytest.mark.parametrize("rules", [{}, {"no_repeat_ngram_size": 1, "min_length": 3}], ids=str)
def test_prefixes_are_searched_from(prefix: list[list[int]], rules: dict[str, Any], seed: int):
    model = Table(V=6, seed=seed)
    for chosen in (Options(prefix=prefix, n_best=3, **rules), Options(prefix=prefix, length_penalty=1.0, **rules)):
        found = chosen.search(model, 3)
        for sentence in range(3):
            check(found[sentence], chosen.expected(model, sentence, beam=4))
            for h in found[sentence]:
                assert h.tokens.tolist()[: len(prefix[sentence])] == prefix[sentence]


def test_prefixes_may_be_tensors_with_padding():
    model = Table(V=6)
    padded = torch.tensor([[3, 4], [PAD, PAD], [5, PAD]])
    wanted = Options(prefix=PREFIXES, pad=PAD).search(model, 3)
    same(Options(pad=PAD).search(model, 3, prefix=padded), wanted)
    same(Options(pad=PAD).search(model, 3, prefix=[torch.tensor(row, dtype=torch.int64) for row in PREFIXES]), wanted)
    for search in (greedy, sample):
        for found, row in zip(run(search, model, 3, prefix=padded, pad=PAD), PREFIXES, strict=True):
            assert found[0].tokens.tolist()[: len(row)] == row


def test_a_common_prefix_takes_one_row_a_sentence():
    model = Table(V=6)
    Options(prefix=[[3, 4, 5], [4, 3]], beam=3, min_length=5, eos=None).search(model, 2)
    assert model.calls == [2, 2, 2, 6, 6]


options_of_beams = st.builds(
    Options,
    max_length=st.integers(1, 6),
    eos=st.sampled_from([EOS, EOS, EOS, None]),
    beam=st.integers(2, 5),
    n_best=st.integers(1, 2),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, -0.4]),
    length_norm=st.sampled_from(["gnmt", "power"]),
    coverage_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    source_lengths=st.sampled_from([None, [2, 3, 1]]),
    min_length=st.integers(0, 1),
    no_repeat_ngram_size=st.integers(0, 3),
    prefix=st.sampled_from([None, None, [[3], [], []], [[4], [3], [4]]]),
    pad=st.sampled_from([None, PAD]),
)


@settings(max_examples=60, deadline=None)
@given(options_of_beams, st.integers(5, 8), st.integers(0, 1000))
def test_any_beam_is_that_of_a_sentence_alone(options: Options, V: int, seed: int):
    model = Table(V, seed)
    together = options.search(model, 3)
    for sentence in range(3):
        check(together[sentence], options.expected(model, sentence, options.beam))
        mine = options.alone(sentence)
        lengths = None if mine.source_lengths is None else torch.tensor(mine.source_lengths)
        arguments = dict(vars(mine), source_lengths=lengths)
        same([together[sentence]], beam_search(model, model.start([sentence]), bos(1), **arguments))


@settings(max_examples=25, deadline=None)
@given(options_of_beams, st.integers(5, 6), st.integers(0, 1000))
def test_beam_1_and_top_1_are_greedy(options: Options, V: int, seed: int):
    model = Table(V, seed)
    model.eos = options.eos
    names = ("max_length", "eos", "min_length", "no_repeat_ngram_size", "prefix", "pad")
    shared = {name: getattr(options, name) for name in names}
    wanted = greedy(model, model.start(3), bos(3), return_log_probs=True, **shared)
    same(beam_search(model, model.start(3), bos(3), beam=1, **shared), wanted)
    same(sample(model, model.start(3), bos(3), top_k=1, **shared), wanted)
    same(sample(model, model.start(3), bos(3), temperature=1e-320, **shared), wanted)
    same(sample(model, model.start(3), bos(3), top_p=1e-60, **shared), wanted)
    for sentence in range(3):
        mine = dict(shared, prefix=None if options.prefix is None else [options.prefix[sentence]])
        same([wanted[sentence]], greedy(model, model.start([sentence]), bos(1), **mine))


@pytest.mark.parametrize("kind", [Table, ToyRNN])
def test_log_probs_are_those_of_the_tokens(kind: Any):
    model = kind(6, seed=3)
    for found in (
        Options(n_best=3, length_penalty=1.0).search(model, 2),
        run(greedy, model, 2, return_log_probs=True),
        run(sample, model, 2, return_log_probs=True, samples=3, temperature=3.0, top_k=5, top_p=0.95),
    ):
        for sentence in range(2):
            for h in found[sentence]:
                tokens = h.tokens.tolist()
                steps = [model.logits(sentence, tuple(tokens[:i])).log_softmax(0) for i in range(len(tokens))]
                wanted = torch.stack([step[token] for step, token in zip(steps, tokens, strict=True)])
                torch.testing.assert_close(h.log_probs, wanted)
    assert run(greedy, model, 2)[0][0].log_probs is None


def run(search: Callable[..., list[list[Hypothesis]]], model: Any, B: int, **options: Any) -> list[list[Hypothesis]]:
    options = {"eos": EOS, "max_length": 5, **options}
    model.eos = options["eos"]
    return search(model, model.start(B), bos(B), **options)


class Scripted(Table):
    """Ends sentence i, almost surely, with its tokens number lengths[i]."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(V=6)
        self.lengths = lengths

    def logits(self, sentence: int, history: tuple[int, ...]) -> Tensor:
        logits = super().logits(sentence, history)
        logits[EOS] = 60.0 if len(history) + 1 == self.lengths[sentence] else -60.0
        return logits


def test_finished_sentences_leave():
    lengths = [3, 1, 5, 3]
    for search, options, rows in (
        (greedy, {}, [4, 3, 3, 1, 1]),
        (sample, {}, [4, 3, 3, 1, 1]),
        (sample, {"samples": 2}, [4, 6, 6, 2, 2]),
        (beam_search, {"beam": 1}, [4, 3, 3, 1, 1]),
        (beam_search, {"beam": 3}, [4, 9, 9, 3, 3]),
    ):
        model = Scripted(lengths)
        found = run(search, model, 4, max_length=9, **options)
        assert model.calls == rows
        assert [len(each[0].tokens) for each in found] == lengths
        assert all(h.tokens[-1] == EOS for each in found for h in each)


class EarlyEnds(Table):
    """Ends at once, at a small probability, or never."""

    def logits(self, sentence: int, history: tuple[int, ...]) -> Tensor:
        first = torch.tensor([0.0, 0.4, 0.0, 0.6])
        later = torch.tensor([0.0, 0.001, 0.0, 0.999])
        return (later if history else first).log().double()


def test_a_sentence_goes_on_while_it_can_get_better():
    model = EarlyEnds(4)
    tokens = run(beam_search, model, 1, beam=1, max_length=9, early_stopping=True)[0][0].tokens
    assert len(tokens) == 9  # of a beam of 1, the second is no candidate
    # 0.4 is worse than 0.6 · 0.999^7 · 0.999, whichever way it ends; with early_stopping two that have ended do.
    assert len(run(beam_search, model, 1, beam=2, max_length=9)[0][0].tokens) == 9
    model.calls.clear()
    found = run(beam_search, model, 1, beam=2, max_length=9, early_stopping=True, n_best=2)[0]
    assert [h.tokens.tolist() for h in found] == [[EOS], [3, EOS]] and model.calls == [1, 2]
    # Where length counts against, log 0.6 · (8/6)^3 is the first that is worse than log 0.4: it is known at length 3.
    model.calls.clear()
    assert len(run(beam_search, model, 1, beam=2, max_length=9, length_penalty=-3.0)[0][0].tokens) == 1
    assert model.calls == [1, 2, 2]


def test_where_no_token_may_follow_a_hypothesis_ends():
    model = Table(V=4)
    for search in (greedy, sample, beam_search):
        options = {"beam": 4} if search is beam_search else {}
        found = run(search, model, 2, eos=None, no_repeat_ngram_size=1, max_length=9, **options)
        assert [sorted(each[0].tokens.tolist()) for each in found] == [[0, 1, 2, 3]] * 2
        # A prefix that the model holds to be impossible.
        narrow = Table(V=8, branch=1)
        (token,) = (v for v in range(3, 8) if narrow.logits(0, ())[v] > -INF)
        impossible = next(v for v in range(3, 8) if narrow.logits(0, (token,))[v] == -INF)
        found = run(search, narrow, 1, prefix=[[token, impossible]], **options)
        assert found[0][0].tokens.tolist() == [token]


def test_fewer_hypotheses_where_there_are_no_more():
    found = run(beam_search, Table(V=6), 1, beam=3, n_best=3, prefix=[[3, 4, EOS]], return_log_probs=True)
    assert [h.tokens.tolist() for h in found[0]] == [[3, 4, EOS]]


def test_no_sentences():
    for search in (greedy, sample, beam_search):
        assert run(search, Table(V=6), 0) == []
        assert run(search, Table(V=6), 0, prefix=torch.zeros(0, 2, dtype=torch.int64)) == []


def frequencies_fit(found: list[Hypothesis], expected: dict[tuple[int, ...], float]) -> bool:
    """Pearson's test at about 0.1%; outcomes that are expected less than 5 times are one."""
    observed = Counter(tuple(h.tokens.tolist()) for h in found)
    if any(expected[outcome] == 0 for outcome in observed):
        return False
    frequent = {outcome for outcome, p in expected.items() if p * len(found) >= 5}
    pairs = [(observed[outcome], expected[outcome] * len(found)) for outcome in frequent]
    rest, rate = (len(found) - sum(column) for column in zip(*pairs, strict=True))
    if rate >= 5:
        pairs.append((rest, rate))
    df = len(pairs) - 1
    return sum((count - rate) ** 2 / rate for count, rate in pairs) < df + 3.1 * math.sqrt(2 * df) + 6


def filtered(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The distribution that sample draws from, in plain Python."""
    p = (logits / temperature).softmax(0).tolist()
    ranked = sorted(range(len(p)), key=lambda v: -p[v])[:top_k]
    whole = sum(p[v] for v in ranked)
    kept, mass = [], 0.0
    for v in ranked:
        if top_p is not None and mass >= top_p * whole:
            break
        kept.append(v)
        mass += p[v]
    return [p[v] / mass if v in kept else 0.0 for v in range(len(p))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, 3, None), (1.0, None, 0.7), (1.5, 4, 0.8), (1.0, 100, 1.0)],
)
def test_samples_are_distributed_as_asked_for(temperature: float, top_k: int | None, top_p: float | None):
    model = Table(V=5, seed=2)

    def expected(temperature: float) -> dict[tuple[int, ...], float]:
        outcomes = {}
        for v, p in enumerate(filtered(model.logits(0, ()), temperature, top_k, top_p)):
            second = filtered(model.logits(0, (v,)), temperature, top_k, top_p)
            outcomes.update({(v,): p} if v == EOS else {(v, w): p * q for w, q in enumerate(second)})
        return outcomes

    generator = torch.Generator().manual_seed(5)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    (found,) = run(sample, model, 1, max_length=2, samples=3000, **options)
    assert len(found) == 3000 and [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert frequencies_fit(found, expected(temperature))
    assert not frequencies_fit(found, expected(1.5 * temperature))  # so many samples tell one from the other


def test_a_seed_decides_what_is_drawn():
    model = Table(V=20)
    a, b, c = (run(sample, model, 3, samples=4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    same(a, b)
    assert [h.tokens.tolist() for h in a[0]] != [h.tokens.tolist() for h in c[0]]


class CachedLM(nn.Module):
    """A language model on a KVCache, whose reorder changes it in place."""

    def __init__(self, V: int, E: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, E)
        self.positions = fastseq.nn.SinusoidalPositions(E, 20, batch_first=True)
        layer = fastseq.nn.TransformerEncoderLayer(E, 2, 20, batch_first=True, norm_first=True)
        self.stack = fastseq.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(E, V)
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.stack(self.positions(self.embedding(tokens)), mask=mask, is_causal=True))

    def start(self, B: int) -> Any:
        return fastseq.nn.KVCache()

    def step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        x = self.positions(self.embedding(tokens).unsqueeze(1), offset=len(cache))
        return self.head(self.stack(x, cache=cache)).squeeze(1), cache

    def reorder(self, cache: Any, rows: Tensor) -> Any:
        cache.reorder(rows)
        return cache


class UncachedLM:
    """The same model, computed from the first token on in each step."""

    def __init__(self, model: CachedLM) -> None:
        self.model = model

    def start(self, B: int) -> Tensor:
        return torch.empty(B, 0, dtype=torch.int64)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.cat([state, tokens.unsqueeze(1)], 1)
        return self.model(state)[:, -1], state

    def reorder(self, state: Tensor, rows: Tensor) -> Tensor:
        return reorder_tensors(state, rows)


@pytest.mark.parametrize(
    ("search", "options"),
    [
        (greedy, {}),
        (sample, {"samples": 3, "top_p": 0.9}),
        (beam_search, {"beam": 4, "n_best": 3, "length_penalty": 0.6}),
        (beam_search, {"beam": 3, "prefix": [[3], [4, 5], []], "no_repeat_ngram_size": 2}),
    ],
)
def test_a_cache_serves_as_a_state(search: Any, options: dict[str, Any]):
    model = CachedLM(V=9)
    found = []
    for lm in (model, UncachedLM(model)):
        torch.manual_seed(1)
        found.append(run(search, lm, 3, max_length=8, **options))
    same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_logits_are_added_up_in_float32(dtype: torch.dtype):
    model = Table(V=6, dtype=dtype)
    for search in (greedy, beam_search):
        (found,) = run(search, model, 1, eos=None, max_length=12, return_log_probs=True)
        assert found[0].log_probs is not None and found[0].log_probs.dtype == torch.float32
        tokens = found[0].tokens.tolist()
        steps = [model.logits(0, tuple(tokens[:i])).to(dtype).double().log_softmax(0) for i in range(12)]
        wanted = sum(step[token] for step, token in zip(steps, tokens, strict=True))
        torch.testing.assert_close(found[0].score, float(wanted), rtol=1e-6, atol=1e-5)


def test_large_logits_stay_numbers():
    class Large(Table):
        def logits(self, sentence: int, history: tuple[int, ...]) -> Tensor:
            return 3e37 * super().logits(sentence, history)

    for search in (greedy, sample, beam_search):
        (found,) = run(search, Large(V=6, dtype=torch.float32), 1, eos=None)
        assert found[0].score == 0.0


def test_the_models_logits_are_left_as_they_are():
    logits = torch.randn(2, 6)
    before = logits.clone()

    class Constant:
        def step(self, tokens: Tensor, state: None) -> tuple[Tensor, None]:
            return logits[: len(tokens)] if len(tokens) <= 2 else logits[:1].expand(len(tokens), -1), None

        def reorder(self, state: None, rows: Tensor) -> None:
            return None

        def start(self, B: int) -> None:
            return None

    for search in (greedy, sample, beam_search):
        run(search, Constant(), 2, min_length=2, pad=PAD, no_repeat_ngram_size=1, prefix=[[3], []])
        assert torch.equal(logits, before)


def test_gradients_are_not_recorded():
    model = ToyRNN(6, 0)
    for search in (greedy, sample, beam_search):
        (found,) = run(search, model, 1, return_log_probs=True)
        assert not found[0].log_probs.requires_grad and torch.is_grad_enabled()


def test_a_place_without_attention_costs_much_but_not_all():
    class Blind(Table):
        def attends(self, sentence: int, history: tuple[int, ...]) -> Tensor:
            return torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    model = Blind(V=6)
    plain = run(beam_search, model, 2)
    found = run(beam_search, model, 2, coverage_penalty=1.0)
    assert [each[0].tokens.tolist() for each in found] == [each[0].tokens.tolist() for each in plain]
    assert all(-INF < each[0].score < -500 for each in found)
    same(run(beam_search, model, 2, coverage_penalty=1.0, source_lengths=torch.tensor([1, 1])), plain)


class Pair(NamedTuple):
    a: Tensor
    b: list[Tensor]


def test_reorder_tensors():
    rows = torch.tensor([2, 0, 0, 1])
    x, y = torch.randn(3, 2), torch.randn(3)
    got = reorder_tensors({"pair": Pair(x, [y]), "none": None, "tuple": (x,)}, rows)
    assert type(got["pair"]) is Pair and got["none"] is None and type(got["tuple"]) is tuple
    assert torch.equal(got["pair"].a, x[rows]) and torch.equal(got["pair"].b[0], y[rows])
    assert torch.equal(got["tuple"][0], x[rows])
    with pytest.raises(TypeError, match=r"state must be of tensors.* got int"):
        reorder_tensors((x, 3), rows)


def test_pad_hypotheses():
    rows = [Hypothesis(torch.tensor(tokens), 0.0) for tokens in ([3, 4, EOS], [EOS])]
    assert pad_hypotheses(rows, PAD).tolist() == [[3, 4, EOS], [EOS, PAD, PAD]]


@pytest.mark.parametrize(
    ("searches", "options", "error", "message"),
    [
        ("b", {"beam": 7}, ValueError, "beam must be at most the number of tokens in the vocabulary, 6, got 7"),
        ("b", {"beam": 0}, ValueError, "beam must be at least 1, got 0"),
        ("b", {"beam": 2.0}, TypeError, "beam must be an integer, got 2.0"),
        ("b", {"beam": True}, TypeError, "beam must be an integer, got True"),
        ("b", {"beam": 2, "n_best": 3}, ValueError, "n_best must be at most beam, 2, got 3"),
        ("b", {"n_best": 0}, ValueError, "n_best must be at least 1, got 0"),
        ("b", {"length_penalty": "x"}, TypeError, "length_penalty must be a number, got 'x'"),
        ("b", {"length_penalty": math.nan}, ValueError, "length_penalty must be finite, got nan"),
        ("b", {"length_penalty": 1e6}, ValueError, "length_penalty must be nearer to 0"),
        ("b", {"length_norm": "mean"}, ValueError, "length_norm must be 'gnmt' or 'power', got 'mean'"),
        ("b", {"coverage_penalty": -1}, ValueError, "coverage_penalty must be at least 0, got -1"),
        ("b", {"coverage_penalty": 1.0, "model": ToyRNN(6, 0)}, TypeError, "model must have a method weights"),
        ("b", {"source_lengths": [1, 2]}, TypeError, "source_lengths must be a tensor of integers"),
        ("b", {"source_lengths": torch.tensor([1])}, ValueError, r"source_lengths must be \[2\], got \[1\]"),
        ("s", {"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
        ("s", {"top_p": 1.1}, ValueError, "top_p must be above 0 and at most 1, got 1.1"),
        ("s", {"top_p": "1"}, TypeError, "top_p must be a number"),
        ("s", {"temperature": 0}, ValueError, "temperature must be above 0, got 0"),
        ("s", {"temperature": -1.0}, ValueError, "temperature must be above 0, got -1.0"),
        ("s", {"temperature": math.inf}, ValueError, "temperature must be finite, got inf"),
        ("s", {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ("s", {"top_k": 1.5}, TypeError, "top_k must be an integer, got 1.5"),
        ("s", {"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ("s", {"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ("gsb", {"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ("gsb", {"max_length": None}, TypeError, "max_length must be an integer, got None"),
        ("gsb", {"min_length": -1}, ValueError, "min_length must be at least 0, got -1"),
        ("gsb", {"min_length": 6}, ValueError, "min_length must be at most max_length, 5, got 6"),
        ("gsb", {"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size must be at least 0, got -1"),
        ("gsb", {"eos": 6}, ValueError, "eos must be below 6, the size of the vocabulary, got 6"),
        ("gsb", {"eos": -1}, ValueError, "eos must be at least 0, got -1"),
        ("gsb", {"pad": 6}, ValueError, "pad must be below 6, the size of the vocabulary, got 6"),
        ("gsb", {"pad": EOS}, ValueError, "pad must be another token than eos"),
        ("gsb", {"prefix": [[3] * 6, []]}, ValueError, "prefix must have at most max_length tokens, 5, got 6"),
        ("gsb", {"prefix": [[3]]}, ValueError, "prefix must have a row for each of the 2 sentences, got 1"),
        ("gsb", {"prefix": [[3], [6]]}, ValueError, "prefix must be below 6, the size of the vocabulary, got 6"),
        ("gsb", {"prefix": [[3], [-1]]}, ValueError, "prefix must have tokens of at least 0"),
        ("gsb", {"prefix": [[3], [EOS, 3]]}, ValueError, "prefix must have no token behind eos"),
        ("gsb", {"prefix": [[3], [PAD, 3]], "pad": PAD}, ValueError, "prefix must have pad, 2, only at the end"),
        ("gsb", {"prefix": [[3], ["a"]]}, TypeError, "prefix must have rows of integers"),
        ("gsb", {"prefix": torch.tensor([3, 3])}, ValueError, r"prefix must be \[B, P\], got \[2\]"),
        ("gsb", {"prefix": torch.ones(2, 2)}, TypeError, "prefix must have rows of integers"),
        ("gsb", {"prefix": 3}, TypeError, "prefix must be a tensor or a sequence"),
        ("gsb", {"bos": 0}, TypeError, "bos must be a tensor of int64, got 0"),
        ("gsb", {"bos": torch.zeros(2)}, TypeError, "bos must be a tensor of int64, got one of torch.float32"),
        ("gsb", {"bos": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"bos must be \[B\].*got \[2, 1\]"),
        ("gsb", {"model": object()}, TypeError, "model must have a method step, got object"),
    ],
)
def test_bad_arguments(searches: str, options: dict[str, Any], error: type[Exception], message: str):
    for name in searches:
        search: Any = {"g": greedy, "s": sample, "b": beam_search}[name]
        table = Table(V=6)
        arguments = {"eos": EOS, "max_length": 5, "model": table, "bos": bos(2), "state": table.start(2), **options}
        if isinstance(arguments["model"], ToyRNN):
            arguments["state"] = arguments["model"].start(2)
        with pytest.raises(error, match=message):
            search(**arguments)


@dataclass
class Wrong:
    """A model that gives whatever it was told to."""

    results: list[Any]
    weights_of: Any = None
    calls: int = field(default=0)

    def start(self, B: int) -> None:
        return None

    def step(self, tokens: Tensor, state: None) -> Any:
        result = self.results[min(self.calls, len(self.results) - 1)]
        self.calls += 1
        return result(len(tokens)) if callable(result) else result

    def reorder(self, state: None, rows: Tensor) -> None:
        return None

    def weights(self, state: None) -> Any:
        return self.weights_of


def row_of(*numbers: float) -> Callable[[int], Any]:
    return lambda N: (torch.tensor([[0.0] * 6] * (N - 1) + [list(numbers)]), None)


GOOD = row_of(0.3, -9.0, 0.1, 0.2, 0.5, 0.7)


@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ([torch.zeros(2, 6)], TypeError, "step must return logits and a state, got Tensor"),
        ([(None, None)], TypeError, "step must return logits as a floating tensor, got None"),
        ([(torch.zeros(2, 6).long(), None)], TypeError, "logits as a floating tensor, got one of torch.int64"),
        ([(torch.zeros(2, 1, 6), None)], ValueError, r"step must return logits \[2, V\], got \[2, 1, 6\]"),
        ([(torch.zeros(3, 6), None)], ValueError, r"step must return logits \[2, V\], got \[3, 6\]"),
        ([(torch.zeros(2, 0), None)], ValueError, r"step must return logits \[2, V\], got \[2, 0\]"),
        ([(torch.zeros(2, 6, device="meta"), None)], ValueError, "logits on bos's device, cpu, got meta"),
        ([GOOD, lambda N: (torch.zeros(N, 7), None)], ValueError, r"logits \[\d+, 6\], got \[\d+, 7\]"),
        ([row_of(0, 0, math.nan, 0, 0, 0)], ValueError, "in call 1 a row has NaN"),
        ([GOOD, row_of(0, 0, math.nan, 0, 0, 0)], ValueError, "in call 2 a row has NaN"),
        ([row_of(0, 0, math.inf, 0, 0, 0)], ValueError, "in call 1 a row has NaN"),
        ([row_of(*[-math.inf] * 6)], ValueError, "in call 1 a row has NaN"),
    ],
)  # fmt: skip
def test_bad_logits(results: list[Any], error: type[Exception], message: str):
    for search in (greedy, sample, beam_search):
        with pytest.raises(error, match=message):
            run(search, Wrong(results), 2, min_length=3, prefix=[[], [4, 5]], pad=PAD)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (None, TypeError, "weights must return a floating tensor, got None"),
        (torch.zeros(3, 4), ValueError, r"weights must return \[2, S\], got \[3, 4\]"),
        (torch.zeros(2, 4, 1), ValueError, r"weights must return \[2, S\], got \[2, 4, 1\]"),
        (torch.full((2, 4), math.nan), ValueError, "weights must return numbers"),
    ],
)
def test_bad_weights(weights: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        run(beam_search, Wrong([GOOD], weights), 2, coverage_penalty=0.5, max_length=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    model = ToyRNN(9, 0)
    options = dict(eos=EOS, max_length=7, no_repeat_ngram_size=2, prefix=[[3], [], [4, 5]])
    for search, more in (
        (greedy, {}),
        (sample, {"top_k": 1}),
        (beam_search, {"beam": 4, "n_best": 3, "length_penalty": 0.6}),
    ):
        wanted = search(model.cpu(), model.start(3), bos(3), **options, **more)
        found = search(model.cuda(), model.start(3), bos(3).cuda(), **options, **more)
        assert all(h.tokens.is_cuda for each in found for h in each)
        same(found, wanted)
