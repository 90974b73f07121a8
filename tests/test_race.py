"""The races of the benches: that wrong results are refused before the clock runs, and what limits are made of."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "benches"))

import first_call
import peers
import race
from attention import Case as AttentionCase
from bench_models import TRANSFORMER, lm, seq2seq
from models import ModelCase, SearchCase
from peers import FASTSEQ, Job, Peer, exact
from race import Contestant, Outcome, enter, job_of, noting_absence
from roofline import Roofline

pytestmark = pytest.mark.usefixtures("one_thread")

BAHDANAU = seq2seq("bahdanau", "bahdanau", 20, 16, B=3, S=5, T=6)
GREEDY = SearchCase("greedy", "TransformerSeq2Seq", {**TRANSFORMER, "layers": 1, "d_model": 16, "heads": 2}, 2, 4, 3)


@pytest.fixture(autouse=True)
def _untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "warm_up", lambda call: Contestant(call, 1.0))


def altered(name: str, change: Any) -> Peer:
    """fastseq, but for one of its results."""

    def prepare(job: Job) -> Any:
        call, k = peers.fastseq_call(job), job.ours.names.index(name)
        return lambda: [change(result) if i == k else result for i, result in enumerate(call())]

    return Peer("altered", prepare, ours=True)


def entered(case: Any, training: bool, peer: Peer) -> None:
    job = job_of(case, training, 1)
    with torch.set_grad_enabled(training):
        enter(peer, job, exact(job))


def test_a_gradient_is_held_against_itself_however_small() -> None:
    """Those of a mean loss are far below 1; what is far below the others is a rounding error."""
    entered(BAHDANAU, True, FASTSEQ)
    names = job_of(BAHDANAU, True, 1).ours.names
    for name in names:
        with pytest.raises(AssertionError, match=f"altered: {name} is wrong."):
            entered(BAHDANAU, True, altered(name, lambda result: result * 0.99))
    right = {"y": torch.ones(2), "da": torch.tensor([-50.0]), "db": torch.tensor([1e-9])}
    for by_norm in (False, True):
        race.assert_right({**right, "db": torch.tensor([1e-6])}, right, "{}", by_norm=by_norm)
        with pytest.raises(AssertionError, match=r"^db"):
            race.assert_right({**right, "db": torch.tensor([1e-2])}, right, "{}", by_norm=by_norm)


def test_gradients_behind_a_relu_are_compared_by_their_norms() -> None:
    case = ModelCase("cnn", "ImageClassifier", dict(classes=10, dropout=0.0), 2)
    names = [name for name in job_of(case, True, 1).ours.names if name != "y"]
    entered(case, True, FASTSEQ)
    for name in names:
        entered(case, True, altered(name, lambda result: result * 1.005))
        with pytest.raises(AssertionError, match=f"altered: {name} is wrong. It is 0.02 of its norm away"):
            entered(case, True, altered(name, lambda result: result * 1.02))


def test_outputs_are_held_against_themselves() -> None:
    with pytest.raises(AssertionError, match="altered: y is wrong"):
        entered(AttentionCase(1, 8), False, altered("y", lambda y: y + 1e-4))


def test_one_wrong_token_is_refused() -> None:
    entered(GREEDY, False, FASTSEQ)
    largest = 10**6  # relative to which 1 is nothing

    def next_to(tokens: Tensor) -> Tensor:
        return torch.full_like(tokens, largest + 1)

    job = job_of(GREEDY, False, 1)
    with torch.no_grad(), pytest.raises(AssertionError, match="altered: y is wrong"):
        enter(altered("y", next_to), job, [torch.full_like(result, largest) for result in exact(job)])


def test_a_model_of_lstms_has_their_flops() -> None:
    """Four products where a GRU has three, and the same output layer."""
    lstm, gru = (lm(cell, 2, 5, 16, 20).flops(True) for cell in ("lstm", "gru"))
    rows, output = 3 * 2 * 2 * 5, 16 * 20  # of forward and two backward products, FLOPs a weight, rows and steps
    assert (lstm, gru) == (rows * (4 * 2 * 16 * 16 + output), rows * (3 * 2 * 16 * 16 + output))


def test_ratios_are_medians_of_those_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that gets slower; that of the medians would be 2, which is outside of the quartiles."""
    ours, theirs, alone = [1.0, 2.0, 3.0, 4.0, 9.0], [3.0, 6.0, 1.0, 12.0, 27.0], [12.0, 3.0, 6.0]
    stats = SimpleNamespace(stats=SimpleNamespace(median=3.0, data=ours))

    def pedantic(call: Any, rounds: int, iterations: int, teardown: Any) -> None:
        for _ in range(rounds):
            teardown()

    others = [Peer("beside", peers.torch_call), Peer("alone", peers.torch_call, alone=True)]
    monkeypatch.setattr(race, "clock", lambda call, loops: theirs.pop(0))
    monkeypatch.setattr(race, "time_alone", lambda *_: alone)
    effort = SimpleNamespace(plan=lambda contestants: (5, 1))
    timed = SimpleNamespace(pedantic=pedantic, stats=stats)
    outcome = race.race(timed, "op", "inference", AttentionCase(1, 8), others, 1, effort)
    assert outcome and outcome.seconds == {"fastseq": 3.0, "beside": 6.0, "alone": 6.0}
    assert outcome.ratios == {"beside": 3.0, "alone": 2.0}
    assert outcome.quartiles == {"beside": (3.0, 3.0), "alone": (1.5, 3.0)}


def test_long_rounds_are_fewer() -> None:
    """Of brief races; of short ones there are as many as fit."""
    for seconds, rounds in ((0.01, 40), (0.1, 9), (0.5, 9), (1.0, 5)):
        assert race.BRIEF.plan([Contestant(tuple, seconds)] * 2)[0] == rounds


def test_generation_has_no_limit() -> None:
    pedantic = SimpleNamespace(stats=SimpleNamespace(stats=SimpleNamespace(median=1.0, data=[1.0])))
    pedantic.pedantic = lambda call, rounds, iterations, teardown: teardown()
    effort = SimpleNamespace(plan=lambda contestants: (1, 1))
    for case, limited in ((GREEDY, False), (AttentionCase(1, 8), True)):
        roofline = SimpleNamespace(floor=lambda flops, traffic: 0.5)
        outcome = race.race(pedantic, "op", "inference", case, [], 1, effort)
        assert outcome and outcome.roofline_fraction is None
        outcome.limit(roofline)
        assert outcome.roofline_fraction == (0.5 if limited else None)


def test_the_larger_of_two_rates_counts() -> None:
    once = Roofline(100.0, {"L1": 9.0, "DRAM": 2.0}, {"L1": 1})
    again = Roofline(90.0, {"L1": 8.0, "DRAM": 3.0}, {"L1": 1})
    assert once.best_of(again) == again.best_of(once) == Roofline(100.0, {"L1": 9.0, "DRAM": 3.0}, {"L1": 1})


class SilentError(Exception):
    """Says nothing."""


def test_reasons_without_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(job: Job) -> Any:
        with peers.absent_if_unloaded():
            raise SilentError

    outcome = Outcome("op", "inference", "case", "cpp", 0, [])
    with noting_absence(outcome, peer := Peer("strange", fails)):
        peer.call(job_of(AttentionCase(1, 8), False, 1))
    assert outcome.absent == {"strange": "SilentError"}
    killed = SimpleNamespace(returncode=-9, stdout="", stderr="\n")
    monkeypatch.setattr(first_call.subprocess, "run", lambda *_, **__: killed)
    assert first_call.measure(first_call.CASES[0]) == [{"absent": "ended with -9"}]


def test_a_missing_peer_is_not_installed() -> None:
    outcome = Outcome("op", "inference", "case", "cpp", 0, [])
    missing = Peer("missing", peers.torch_call, requires=("no_such_module",))
    with noting_absence(outcome, missing):
        enter(missing, job_of(AttentionCase(1, 8), False, 1), [])
    assert outcome.absent == {"missing": "not installed"} and not outcome.seconds
