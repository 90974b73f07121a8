"""Sequences out of a model, token by token: greedy decoding, sampling, beam search.

    state = model.start(source, lengths)
    bos = torch.full((len(source),), BOS)
    for hypotheses in fastseq.decoding.beam_search(model, state, bos, eos=EOS, max_length=100, beam=5):
        print(hypotheses[0].tokens, hypotheses[0].score)

It works on whatever has `step` and `reorder` (`Generator`): all sentences and their beams are rows of one call of step.
A sentence that is decided leaves, so that later steps have fewer rows. Everything stays on the device of the logits,
scores in float32 at least; a step brings one small tensor to the host. No gradients are recorded; whether there is
dropout is the model's mode.

Toolkits differ in many small ways. Here:

- A hypothesis is what follows bos. It ends with eos, or without at max_length, which counts eos (as Hugging Face's
  max_new_tokens does; fairseq forces an eos behind its own). Those without compete with the others (Hugging Face,
  OpenNMT-py). min_length does not count eos (fairseq, Hugging Face).
- What forbids tokens sets log-probabilities to -inf behind the softmax: the others keep theirs (fairseq, and beam
  search of Hugging Face).
- no_repeat_ngram_size looks at the hypothesis with its prefix, without bos.
- A prefix is taken whatever else forbids it; its log-probabilities and its length count (fairseq).
- If no token may follow any hypothesis of a sentence, they end there as at max_length.
- Of the 2 beam best candidates of a step, an eos ends its hypothesis if it is among the first beam ones, and others
  fill the beam (fairseq, Hugging Face; in OpenNMT-py what has ended takes a place of the beam).
- Length norm and coverage penalty rank what has ended; while hypotheses run, and are of one length, sums of
  log-probabilities do (all three, OpenNMT-py without its stepwise_penalty). Length counts eos.
- Beam search stops when that is exact (Hugging Face's early_stopping="never"), or by fairseq's rule (True).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

State = TypeVar("State")

_INF = float("inf")


class Generator(Protocol[State]):
    """What a model needs to generate. A state is whatever the model likes; it gets back what it gave."""

    def step(self, tokens: Tensor, state: State, /) -> tuple[Tensor, State]:
        """Logits [N, V] of what follows tokens [N] int64, each the last of its row, and the state thereafter.

        The state that it is given may be changed, as a cache is: it is used no more, and each search begins with a new
        one.
        """

    def reorder(self, state: State, rows: Tensor, /) -> State:
        """The state of which row i is row rows[i] of this one; this one is used no more.

        rows is [new N] int64; a row may occur more than once, or not at all.
        """


class AttentiveGenerator(Generator[State], Protocol[State]):
    """A generator that tells what it attended to, as the coverage penalty wants to know."""

    def weights(self, state: State, /) -> Tensor:
        """Attention weights [N, S] over the source, of the step that gave this state; 0 where a source is padded."""


class Hypothesis(NamedTuple):
    """One generated sequence.

    Attributes:
        tokens: [T] int64, without bos, with the eos if it ends with one.
        score: what it is ranked by.
        log_probs: [T], those of its tokens, if they were asked for.
    """

    tokens: Tensor
    score: float
    log_probs: Tensor | None = None


def greedy(
    model: Generator[State],
    state: State,
    bos: Tensor,
    *,
    eos: int | None,
    max_length: int,
    min_length: int = 0,
    no_repeat_ngram_size: int = 0,
    prefix: Tensor | Sequence[Any] | None = None,
    pad: int | None = None,
    return_log_probs: bool = False,
) -> list[list[Hypothesis]]:
    """Takes the most probable token each time.

    Args:
        model: has `step` and `reorder`.
        state: what it begins with, of the rows of bos.
        bos: [B] int64, what each of the B sentences begins with, on the model's device.
        eos: the token that ends a sentence; with None, each has max_length tokens.
        max_length: how many tokens a hypothesis has at most, with eos and without bos.
        min_length: how many it has at least before eos.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice in a hypothesis; 0 for no such rule.
        prefix: the first tokens of each sentence: [B, P], or B lists or tensors of any lengths.
        pad: a token that is never generated; at the end of a row of prefix it stands for no token.
        return_log_probs: whether hypotheses have their log_probs.

    Returns:
        For each sentence a list of one hypothesis, whose score is its log-probability.

    Raises:
        TypeError, ValueError: an argument is none of these; or step gives something else than logits [N, V] and a
            state, or logits of which a row holds NaN or +inf, or is -inf throughout.
    """
    rules = _Rules(bos, eos, pad, prefix, min_length, max_length, no_repeat_ngram_size)
    return _walk(model, state, bos, rules, lambda log_probs: log_probs.argmax(1), 1, return_log_probs)


def sample(
    model: Generator[State],
    state: State,
    bos: Tensor,
    *,
    eos: int | None,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
    min_length: int = 0,
    no_repeat_ngram_size: int = 0,
    prefix: Tensor | Sequence[Any] | None = None,
    pad: int | None = None,
    return_log_probs: bool = False,
) -> list[list[Hypothesis]]:
    """Draws tokens from the model's distribution.

    That is softmax(logits / temperature); of it the top_k most probable tokens (Fan et al., arXiv:1805.04833); and of
    these, with probabilities that add up to 1 again, the fewest that together have top_p (nucleus sampling, Holtzman
    et al., arXiv:1904.09751). It is Hugging Face's order.

    Args:
        temperature: above 0; below 1 it favours what is probable.
        top_k: how many tokens may be drawn, by default all.
        top_p: what part of the probability may be drawn, above 0 and at most 1, by default all.
        samples: how many hypotheses are drawn for each sentence.
        generator: where random numbers come from, on the device of the logits; by default torch's own.
        model, state, bos, eos, max_length, min_length, no_repeat_ngram_size, prefix, pad, return_log_probs: those of
            `greedy`.

    Returns:
        For each sentence its samples, best first. Scores and log_probs are the model's own, without temperature, top_k
        and top_p.

    Raises:
        TypeError, ValueError: as `greedy` does.
    """
    rules = _Rules(bos, eos, pad, prefix, min_length, max_length, no_repeat_ngram_size)
    _check_number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if top_k is not None:
        _check_integer("top_k", top_k, 1)
    if top_p is not None:
        _check_number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    _check_integer("samples", samples, 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    # float32 knows no smaller and no larger ones.
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    heat, nucleus = min(max(temperature, least), most), max(1.0 if top_p is None else top_p, least)

    def draw(log_probs: Tensor) -> Tensor:
        values, tokens = log_probs, None
        if top_k is not None:
            values, tokens = log_probs.topk(min(top_k, log_probs.shape[1]))
        elif nucleus < 1:
            values, tokens = log_probs.sort(descending=True)
        best, first = values.max(1, keepdim=True)
        # Rows of NaN, or without a token that may follow: multinomial would fail at them, on GPUs for good.
        unusable = ~(best > -_INF)
        shifted = (values - best).masked_fill(unusable, 0)
        probabilities = (shifted / heat).softmax(1)
        if nucleus < 1:
            before = probabilities.cumsum(1) - probabilities
            probabilities = probabilities.masked_fill(before >= nucleus, 0)
        drawn = torch.where(unusable, first, probabilities.multinomial(1, generator=generator))
        return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)

    return _walk(model, state, bos, rules, draw, samples, return_log_probs)


@torch.no_grad()
def beam_search(
    model: Generator[State],
    state: State,
    bos: Tensor,
    *,
    eos: int | None,
    max_length: int,
    beam: int = 5,
    n_best: int = 1,
    length_penalty: float = 0.0,
    length_norm: Literal["gnmt", "power"] = "gnmt",
    coverage_penalty: float = 0.0,
    source_lengths: Tensor | None = None,
    early_stopping: bool = False,
    min_length: int = 0,
    no_repeat_ngram_size: int = 0,
    prefix: Tensor | Sequence[Any] | None = None,
    pad: int | None = None,
    return_log_probs: bool = False,
) -> list[list[Hypothesis]]:
    """Goes on with the `beam` most probable beginnings each time, and keeps the best of what they end in.

    The score of a hypothesis Y of a source X is (Wu et al., arXiv:1609.08144, section 7)

        log P(Y | X) / lp(|Y|) + coverage_penalty Σ_i log min(Σ_j p_ij, 1)

    where p_ij is what token j attends to place i, and with alpha = length_penalty

        lp(n) = ((5 + n) / 6)^alpha     length_norm="gnmt"
        lp(n) = n^alpha                 length_norm="power": the mean for alpha = 1. It is what fairseq calls lenpen,
                                        and Hugging Face length_penalty

    A sentence is decided when n_best hypotheses have ended and the worst of them has at least the score that anything
    which still runs can reach: its log-probability c can only fall, and the coverage penalty is 0 at best, so that is
    c / lp(n), with n its length or max_length, whichever is better. To search on would change nothing. The larger
    alpha, the later this is known.

    Args:
        beam: how many beginnings there are, at most V. Before there is a choice, in the first step and while all
            sentences follow their prefixes, steps have one row a sentence, later beam rows.
        n_best: how many hypotheses are kept, at most beam.
        length_penalty: alpha; 0 for none.
        length_norm: which lp.
        coverage_penalty: Wu et al.'s beta, at least 0; with any but 0, model has `weights` (`AttentiveGenerator`).
        source_lengths: [B] integers, how many places of its source a sentence has to cover, by default all S.
        early_stopping: decides a sentence as soon as beam hypotheses have ended, even if better ones could follow.
        model, state, bos, eos, max_length, min_length, no_repeat_ngram_size, prefix, pad, return_log_probs: those of
            `greedy`.

    Returns:
        For each sentence n_best hypotheses, best first, or fewer if it has no more.

    Raises:
        TypeError, ValueError: as `greedy` does.
    """
    rules = _Rules(bos, eos, pad, prefix, min_length, max_length, no_repeat_ngram_size)
    _check_model(model, "step", "reorder")
    _check_integer("beam", beam, 1)
    _check_integer("n_best", n_best, 1)
    if type(early_stopping) is not bool:
        raise TypeError(f"early_stopping must be a bool, got {early_stopping!r}")
    if n_best > beam:
        raise ValueError(f"n_best must be at most beam, {beam}, got {n_best}")
    ranking = _Ranking(model, bos, max_length, length_penalty, length_norm, coverage_penalty, source_lengths)

    results: list[list[Hypothesis]] = [[] for _ in range(len(bos))]
    sentences = torch.arange(len(bos), device=bos.device)  # [b], those that are not decided
    last = bos
    # Of what runs: [b, width] log-probabilities; [b, width, t] tokens and, if asked for, what each adds to these;
    # [b, width, S] sums of attention weights, for the coverage penalty.
    scores = torch.zeros(len(bos), 1, device=bos.device)
    histories = [last.new_empty(len(bos), 1, 0), *([scores.new_empty(len(bos), 1, 0)] if return_log_probs else [])]
    covered: Tensor | None = None
    finished = _Finished(n_best, histories)

    for t in range(1, max_length + 1 if len(bos) else 1):
        b, width = scores.shape
        each = torch.arange(b, device=bos.device).unsqueeze(1)
        log_probs, state = rules.step(model, last, state, t - 1, histories[0].flatten(0, 1), sentences)
        V = log_probs.shape[1]
        if beam > V:
            raise ValueError(f"beam must be at most the number of tokens in the vocabulary, {V}, got {beam}")
        # The best of all are among the best of each row: to find these first spares a pass over all to add scores.
        added, tokens = (found.view(b, -1) for found in log_probs.topk(min(2 * beam, V)))
        per_row = tokens.shape[1] // width
        sums = added.view(b, width, per_row) + scores.unsqueeze(2)
        top, places = sums.flatten(1).topk(min(2 * beam, width * per_row))
        parents, tokens = places // per_row, tokens.gather(1, places)
        news = [tokens, *([added.gather(1, places)] if return_log_probs else [])]
        grown = [torch.cat([old[each, parents], new.unsqueeze(2)], 2) for old, new in zip(histories, news, strict=True)]

        ends = torch.full_like(tokens, t == max_length, dtype=torch.bool)
        if eos is not None:
            ends |= tokens == eos
        seen = ranking.attended(state, covered, b, width)
        values = ranking.values(top, t, None if seen is None else seen[each, parents], sentences)
        finished.add(values.masked_fill(~ends, -_INF)[:, :beam], [history[:, :beam] for history in grown])

        wanted = 1 if t <= rules.shortest_prefix else beam
        order = ends.byte().argsort(dim=1, stable=True)[:, :wanted]  # best first; what has ended comes last
        running = top.masked_fill(ends, -_INF).gather(1, order)
        # If they are too few, copies of the first run along: the model meets no token that cannot be.
        order = torch.where(running > -_INF, order, order[:, :1])

        decided = finished.scores[:, -1] >= ranking.bound(running[:, 0], t)
        if early_stopping:
            decided |= finished.count >= beam
        broken = (top[:, 0] + finished.scores[:, 0]).isnan()
        verdicts = torch.where(broken, 2, decided.long()).tolist()
        if 2 in verdicts:
            raise _no_logits(t) if top.isnan().any() else ValueError(f"weights must return numbers: call {t} gave NaN")
        if 1 in verdicts:
            stuck = top[:, :1] == -_INF  # no token may follow
            values = ranking.values(scores, t - 1, covered, sentences)
            finished.add(values.masked_fill(~stuck, -_INF), histories)
            for i, sentence in enumerate(sentences.tolist()):
                if verdicts[i]:
                    results[sentence] = finished.hypotheses(i)
            if 0 not in verdicts:
                break
            left = torch.tensor([i for i, verdict in enumerate(verdicts) if not verdict], device=bos.device)
            finished.keep(left)
            sentences, running, order, each = sentences[left], running[left], order[left], left.unsqueeze(1)

        scores, last, parents = running, tokens[each, order].flatten(), parents[each, order]
        histories = [history[each, order] for history in grown]
        covered = None if seen is None else seen[each, parents]
        if width > 1 or wanted > 1 or 1 in verdicts:
            state = model.reorder(state, (parents + width * each).flatten())
    return results


def reorder_tensors(state: Any, rows: Tensor) -> Any:
    """What a model may have as `reorder`, if its state is tensors with the rows in dimension 0.

    Args:
        state: a tensor, None, or tuples, named tuples, lists and dicts of such.
        rows: [new N] integers.

    Returns:
        Like state, of new tensors.

    Raises:
        TypeError: there is something else in it.
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.index_select(0, rows)
    if isinstance(state, dict):
        return type(state)((key, reorder_tensors(value, rows)) for key, value in state.items())
    if isinstance(state, (tuple, list)):
        parts = [reorder_tensors(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    raise TypeError(f"state must be of tensors, None, tuples, lists and dicts, got {type(state).__name__}")


def pad_hypotheses(hypotheses: Sequence[Hypothesis], pad: int) -> Tensor:
    """The tokens of hypotheses as rows of one tensor, as those of `[found[0] for found in greedy(...)]`.

    Args:
        hypotheses: N of them, at least one.
        pad: what stands behind the shorter ones.

    Returns:
        [N, length of the longest] int64.
    """
    return torch.nn.utils.rnn.pad_sequence([h.tokens for h in hypotheses], batch_first=True, padding_value=pad)


@torch.no_grad()
def _walk(
    model: Generator[State],
    state: State,
    bos: Tensor,
    rules: "_Rules",
    choose: Callable[[Tensor], Tensor],
    samples: int,
    return_log_probs: bool,
) -> list[list[Hypothesis]]:
    """Greedy decoding and sampling: choose gives tokens [N] for log-probabilities [N, V]."""
    _check_model(model, "step", "reorder")
    results: list[list[Hypothesis]] = [[] for _ in range(len(bos))]
    sentences = torch.arange(len(bos), device=bos.device)  # [N], the one that a row is of
    last = bos
    # Of each step [N] tokens and their log-probabilities.
    tokens: list[Tensor] = []
    added: list[Tensor] = []
    for t in range(1, rules.max_length + 1 if len(bos) else 1):
        so_far = torch.stack(tokens, 1) if rules.ngram and tokens else None
        log_probs, state = rules.step(model, last, state, t - 1, so_far, sentences)
        if t == 1 and samples > 1:
            rows = sentences.repeat_interleave(samples)
            state = model.reorder(state, rows)
            log_probs, sentences = log_probs[rows], rows
        last = choose(log_probs)
        new = log_probs.gather(1, last.unsqueeze(1)).squeeze(1)
        tokens.append(last)
        added.append(new)
        # NaN is not above -inf either.
        if t < rules.max_length and new.min().item() > -_INF and (rules.eos is None or rules.eos not in last.tolist()):
            continue
        ends = torch.full_like(last, t == rules.max_length, dtype=torch.bool)
        if rules.eos is not None:
            ends |= last == rules.eos
        # 2 is for rows that no token may follow: they end before the one that was chosen nevertheless.
        verdicts = torch.where(new.isnan(), 3, torch.where(new == -_INF, 2, ends.long())).tolist()
        if 3 in verdicts:
            raise _no_logits(t)
        owners, of_rows, parts = sentences.tolist(), torch.stack(tokens, 1), torch.stack(added, 1)
        for i, verdict in enumerate(verdicts):
            if verdict:
                length = t - (verdict == 2)
                log_probs = parts[i, :length].clone()
                found = Hypothesis(of_rows[i, :length].clone(), log_probs.sum().item())
                results[owners[i]].append(found._replace(log_probs=log_probs) if return_log_probs else found)
        if all(verdicts):
            break
        left = torch.tensor([i for i, verdict in enumerate(verdicts) if not verdict], device=bos.device)
        last, sentences = last[left], sentences[left]
        tokens, added = list(of_rows[left].unbind(1)), list(parts[left].unbind(1))
        state = model.reorder(state, left)
    return [sorted(found, key=lambda h: -h.score) for found in results]


class _Rules:
    """Which tokens may follow: the options that all searches share, checked.

    Attributes:
        shortest_prefix: how many tokens all sentences have given.
    """

    def __init__(
        self,
        bos: Tensor,
        eos: int | None,
        pad: int | None,
        prefix: Any,
        min_length: int,
        max_length: int,
        no_repeat_ngram_size: int,
    ) -> None:
        if not isinstance(bos, Tensor) or bos.dtype != torch.int64:
            raise TypeError(f"bos must be a tensor of int64, got {_kind(bos)}")
        if bos.dim() != 1:
            raise ValueError(f"bos must be [B], a token for each sentence, got {list(bos.shape)}")
        for name, token in (("eos", eos), ("pad", pad)):
            if token is not None:
                _check_integer(name, token, 0)
        if pad is not None and pad == eos:
            raise ValueError(f"pad must be another token than eos, or None: it is never generated, got {pad}")
        _check_integer("max_length", max_length, 1)
        _check_integer("min_length", min_length, 0)
        if min_length > max_length:
            raise ValueError(f"min_length must be at most max_length, {max_length}, got {min_length}")
        _check_integer("no_repeat_ngram_size", no_repeat_ngram_size, 0)
        self.eos, self.pad = eos, pad
        self.min_length, self.max_length = min_length, max_length
        self.ngram = no_repeat_ngram_size
        self.device = bos.device
        self.V: int | None = None

        given = self._rows_of(prefix, len(bos))
        lengths = [len(row) for row in given]
        if max(lengths, default=0) > max_length:
            raise ValueError(f"prefix must have at most max_length tokens, {max_length}, got {max(lengths)}")
        self.shortest_prefix = min(lengths, default=0)
        width = max(lengths, default=0)
        # [B, P], -1 where there is none.
        self.prefix = torch.tensor(
            [row + [-1] * (width - len(row)) for row in given], dtype=torch.int64, device=bos.device
        ).view(len(given), width)
        self.largest_given = max((token for row in given for token in row), default=-1)

    def _rows_of(self, prefix: Any, B: int) -> list[list[int]]:
        """prefix as lists without padding."""
        if prefix is None:
            return [[] for _ in range(B)]
        if not isinstance(prefix, (Tensor, list, tuple)):
            raise TypeError(f"prefix must be a tensor or a sequence of lists or tensors, got {type(prefix).__name__}")
        if isinstance(prefix, Tensor) and prefix.dim() != 2:
            raise ValueError(f"prefix must be [B, P], got {list(prefix.shape)}")
        if len(prefix) != B:
            raise ValueError(f"prefix must have a row for each of the {B} sentences, got {len(prefix)}")
        rows = []
        for given in prefix.tolist() if isinstance(prefix, Tensor) else prefix:
            row = given.tolist() if isinstance(given, Tensor) else given
            if not isinstance(row, (list, tuple)) or not all(type(token) is int for token in row):
                raise TypeError(f"prefix must have rows of integers, got {_kind(given)}")
            row = list(row)
            while row and row[-1] == self.pad:
                row.pop()
            if self.pad in row:
                raise ValueError(f"prefix must have pad, {self.pad}, only at the end of a row, got {row}")
            if self.eos in row[:-1]:
                raise ValueError(f"prefix must have no token behind eos, {self.eos}, got {row}")
            if min(row, default=0) < 0:
                raise ValueError(f"prefix must have tokens of at least 0, got {row}")
            rows.append(row)
        return rows

    def step(
        self,
        model: Generator[State],
        last: Tensor,
        state: State,
        t: int,
        tokens: Tensor | None,
        sentences: Tensor,
    ) -> tuple[Tensor, State]:
        """Log-probabilities [N, V] of what may follow, -inf for what may not, and the state thereafter.

        tokens is [N, t], what the rows have so far, if n-grams are blocked; sentences is [b], each of N / b rows.
        """
        result: Any = model.step(last, state)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"step must return logits and a state, got {type(result).__name__}")
        logits, state = result
        self._check_logits(logits, len(last))
        log_probs = F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
        is_given = None
        if t < self.prefix.shape[1]:
            given = self.prefix[sentences, t].repeat_interleave(len(last) // len(sentences)).unsqueeze(1)
            is_given, given = given >= 0, given.clamp(min=0)
            its_own = log_probs.gather(1, given)
        if self.pad is not None:
            log_probs[:, self.pad] = -_INF
        if self.eos is not None and t < self.min_length:
            log_probs[:, self.eos] = -_INF
        if 0 < self.ngram <= t:
            assert tokens is not None
            ngrams = tokens.unfold(1, self.ngram, 1)
            begun = (ngrams[:, :, :-1] == tokens[:, None, t - self.ngram + 1 :]).all(2)
            # Behind what the row ends with; to add leaves alone what follows elsewhere.
            forbidden = torch.zeros_like(begun, dtype=log_probs.dtype).masked_fill(begun, -_INF)
            log_probs.scatter_add_(1, ngrams[:, :, -1], forbidden)
        if is_given is not None:
            kept = torch.where(is_given, its_own, log_probs.gather(1, given))
            log_probs = log_probs.masked_fill_(is_given, -_INF).scatter_(1, given, kept)
        return log_probs, state

    def _check_logits(self, logits: Any, N: int) -> None:
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"step must return logits as a floating tensor, got {_kind(logits)}")
        V = self.V if self.V is not None else logits.shape[-1] if logits.dim() == 2 else 0
        if logits.shape != (N, V) or V == 0:
            wanted = f"[{N}, {'V' if self.V is None else V}]"
            raise ValueError(f"step must return logits {wanted}, got {list(logits.shape)}")
        if logits.device != self.device:
            raise ValueError(f"step must return logits on bos's device, {self.device}, got {logits.device}")
        if self.V is None:
            self.V = V
            for name, token in (("eos", self.eos), ("pad", self.pad), ("prefix", self.largest_given)):
                if token is not None and token >= V:
                    raise ValueError(f"{name} must be below {V}, the size of the vocabulary, got {token}")


class _Ranking:
    """The scores of what has ended, and what can still be reached."""

    def __init__(
        self,
        model: Any,
        bos: Tensor,
        max_length: int,
        length_penalty: float,
        length_norm: str,
        coverage_penalty: float,
        source_lengths: Tensor | None,
    ) -> None:
        _check_number("length_penalty", length_penalty)
        if length_norm not in ("gnmt", "power"):
            raise ValueError(f"length_norm must be 'gnmt' or 'power', got {length_norm!r}")
        _check_number("coverage_penalty", coverage_penalty)
        if coverage_penalty < 0:
            raise ValueError(f"coverage_penalty must be at least 0, got {coverage_penalty}")
        if coverage_penalty:
            _check_model(model, "weights")
        if source_lengths is not None:
            if not isinstance(source_lengths, Tensor) or source_lengths.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"source_lengths must be a tensor of integers, got {_kind(source_lengths)}")
            if source_lengths.shape != bos.shape:
                raise ValueError(f"source_lengths must be {list(bos.shape)}, got {list(source_lengths.shape)}")
            source_lengths = source_lengths.to(bos.device)
        self.model, self.beta, self.source_lengths = model, coverage_penalty, source_lengths
        self.max_length, self.alpha, self.is_gnmt = max_length, length_penalty, length_norm == "gnmt"
        for length in (1, max_length):
            if not 1e-30 < self._divisor(length) < 1e30:
                raise ValueError(f"length_penalty must be nearer to 0 at lengths up to {max_length}, got {self.alpha}")

    def _divisor(self, length: int) -> float:
        base = (5 + length) / 6 if self.is_gnmt else max(length, 1)
        return math.exp(max(-700.0, min(700.0, self.alpha * math.log(base))))

    def bound(self, sums: Tensor, length: int) -> Tensor:
        """The score that nothing surpasses which has these log-probabilities at this length."""
        return sums / max(self._divisor(length), self._divisor(self.max_length))

    def attended(self, state: Any, covered: Tensor | None, b: int, width: int) -> Tensor | None:
        """[b, width, S], the sums of all weights with those of the last step, if there is a coverage penalty."""
        if not self.beta:
            return None
        weights = self.model.weights(state)
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError(f"weights must return a floating tensor, got {_kind(weights)}")
        S = weights.shape[-1] if covered is None and weights.dim() == 2 else 0 if covered is None else covered.shape[2]
        if weights.shape != (b * width, S):
            raise ValueError(
                f"weights must return [{b * width}, {'S' if covered is None else S}], got {list(weights.shape)}"
            )
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).view(b, width, S)
        return weights if covered is None else covered + weights

    def values(self, sums: Tensor, length: int, covered: Tensor | None, sentences: Tensor) -> Tensor:
        """Scores [b, m] of hypotheses of so many tokens: sums [b, m] of log-probabilities, covered [b, m, S]."""
        scores = sums / self._divisor(length)
        if covered is None:
            return scores
        # A place that nothing attends to costs much, but less than all.
        penalties = covered.clamp(torch.finfo(covered.dtype).tiny, 1).log()
        if self.source_lengths is not None:
            places = torch.arange(covered.shape[2], device=covered.device)
            penalties = penalties.masked_fill(places >= self.source_lengths[sentences, None, None], 0)
        return scores + self.beta * penalties.sum(2)


class _Finished:
    """The best that have ended of each sentence that is not decided.

    Attributes:
        scores: [b, n_best], best first, -inf where there is none.
        count: [b], how many have ended.
    """

    def __init__(self, n_best: int, histories: list[Tensor]) -> None:
        B, device = len(histories[0]), histories[0].device
        self.scores = torch.full((B, n_best), -_INF, device=device)
        self.count = torch.zeros(B, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(B, n_best, dtype=torch.int64, device=device)
        self.histories = [history.expand(-1, n_best, -1) for history in histories]  # [b, n_best, t]

    def add(self, scores: Tensor, histories: list[Tensor]) -> None:
        """More that have ended: scores [b, m], -inf for those that have not, and their histories [b, m, t]."""
        self.count = self.count + (scores > -_INF).sum(1)
        lengths = torch.full_like(scores, histories[0].shape[2], dtype=torch.int64)
        self.scores, best = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        self.lengths = torch.cat([self.lengths, lengths], 1).gather(1, best)
        longest = max(self.histories[0].shape[2], histories[0].shape[2])
        self.histories = [
            torch.cat([F.pad(h, (0, longest - h.shape[2])) for h in pair], 1).gather(
                1, best.unsqueeze(2).expand(-1, -1, longest)
            )
            for pair in zip(self.histories, histories, strict=True)
        ]

    def keep(self, left: Tensor) -> None:
        """Forgets all sentences but these."""
        self.scores, self.count, self.lengths = self.scores[left], self.count[left], self.lengths[left]
        self.histories = [history[left] for history in self.histories]

    def hypotheses(self, i: int) -> list[Hypothesis]:
        found = []
        for j, (score, length) in enumerate(zip(self.scores[i].tolist(), self.lengths[i].tolist(), strict=True)):
            if score > -_INF:
                tokens, *log_probs = (history[i, j, :length].clone() for history in self.histories)
                found.append(Hypothesis(tokens, score, *log_probs))
        return found


def _no_logits(t: int) -> ValueError:
    return ValueError(f"step must return numbers as logits: in call {t} a row has NaN or +inf, or is -inf throughout")


def _check_model(model: Any, *methods: str) -> None:
    for name in methods:
        if not callable(getattr(model, name, None)):
            raise TypeError(f"model must have a method {name}, got {type(model).__name__}")


def _check_integer(name: str, value: Any, least: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _kind(given: Any) -> str:
    return f"one of {given.dtype}" if isinstance(given, Tensor) else repr(given)
