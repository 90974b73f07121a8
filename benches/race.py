"""One race: fastseq and its peers on one case, first compared, then timed.

Machines are shared and drift, so fastseq and the peers that run in torch take turns, round by round, with
the same number of calls in a round. Their order within a round is random: with a fixed one, the time slices
of other programs can fall into step with the turns and always hit the same one. Peers whose threads go on
spinning after a call are timed on their own in the middle, between two halves of those turns. A peer's time
is the median over its rounds. Its ratio is the median of its times over fastseq's of the same round, or, where it was
timed alone, over fastseq's median.
"""

import copy
import gc
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Any

import torch
from peers import FASTSEQ, OUTPUTS, SEED, AbsentError, Job, Peer, exact, served_by
from roofline import Roofline, Traffic

import fastseq
from fastseq.bench import GRADIENT_RTOL, LEAST_SHARE, Contestant, Effort, assert_close, clock, largest, warm_up
from fastseq.bench import MODES as MODES  # for the benches

# What the threads of a peer that was dropped need to end.
SETTLE_S = 0.05

# Between root mean squares of two draws of so many elements; of fewer, they are further apart.
RANDOM_RTOL, RANDOM_COUNT = 0.02, 100_000


@dataclass(frozen=True)
class Brief(Effort):
    """For the representative cases, so that all of them take some fifteen minutes: quartiles of five rounds say little,
    but where a round is long there are no more.
    """

    seconds: float = 0.4
    least_rounds: int = 9
    least_long_rounds: int = 5
    long_round_s: float = 1.2

    def plan(self, contestants: Sequence[Contestant]) -> tuple[int, int]:
        long = sum(contestant.seconds for contestant in contestants) > self.long_round_s
        least = self.least_long_rounds if long else self.least_rounds
        return Effort(self.seconds, least, self.most_rounds).plan(contestants)


FULL = Effort(seconds=1.5, least_rounds=5, most_rounds=300)
BRIEF = Brief()
SMOKE = Effort(seconds=0, least_rounds=1, most_rounds=1)


@dataclass
class Outcome:
    """What a race found: median seconds a call by name, why others were absent, and the floor in seconds, once the
    machine's rates are known.

    Each peer's time over fastseq's is above 1 where fastseq is faster: `ratios` are medians, `quartiles` the first and
    the third, of the ratios of a round's two times, or, of a peer that was timed alone, of its times over fastseq's
    median.
    """

    op: str
    mode: str
    case: str
    served_by: str
    flops: int
    traffic: Sequence[Traffic]
    floor: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(traffic.bytes for traffic in self.traffic)

    def limit(self, roofline: Roofline) -> None:
        """Sets the floor; without FLOPs and traffic there is none."""
        if self.flops or self.traffic:
            self.floor = roofline.floor(self.flops, self.traffic)

    @property
    def roofline_fraction(self) -> float | None:
        return None if self.floor is None else self.floor / self.seconds[FASTSEQ.name]


def race(
    benchmark: Any,
    op: str,
    mode: str,
    case: Any,
    peers: Sequence[Peer],
    threads: int,
    effort: Effort,
) -> Outcome | None:
    """Races fastseq against its peers on a case.

    Args:
        benchmark: pytest-benchmark's fixture. It times fastseq's rounds, so its statistics are of the very
            turns that the ratios come from.
        op: what the case is filed under.
        mode: one of MODES.
        case: has `task(training)`, `flops(training)`, `traffic(training)` and a name; it may have `ours(training)`,
            `plain(training)`, `onnx_model()` and `random` for a job's parts of these names.
        peers: those to race against.
        threads: the threads that everyone gets.
        effort: how much to run.

    Returns:
        The outcome, or None if pytest-benchmark is told not to time anything.

    Raises:
        AssertionError: someone's results are wrong.
    """
    training = mode == "training"
    job = job_of(case, training, threads)
    served = ", ".join(sorted(served_by(job.ours.layer)))
    outcome = Outcome(op, mode, str(case), served, case.flops(training), case.traffic(training))
    with torch.set_grad_enabled(training):
        expected = exact(job)
        ours = enter(FASTSEQ, job, expected)
        others: dict[str, Contestant] = {}
        for peer in peers:
            if not peer.alone:
                with noting_absence(outcome, peer):
                    others[peer.name] = enter(peer, job, expected)
        times: dict[str, list[float]] = {name: [] for name in others}
        rounds, loops = effort.plan([ours, *others.values()])
        shuffle = random.Random(0)

        def turns_of_others() -> Iterator[None]:
            """Yields where it is fastseq's turn."""
            for turn in range(rounds):
                for name in shuffle.sample([FASTSEQ.name, *others], 1 + len(others)):
                    if name == FASTSEQ.name:
                        yield
                    else:
                        times[name].append(clock(others[name].call, loops))
                if turn == (rounds - 1) // 2:
                    for peer in peers:
                        if peer.alone:
                            with noting_absence(outcome, peer):
                                times[peer.name] = time_alone(peer, job, expected, effort)

        turns = turns_of_others()
        next(turns)
        benchmark.pedantic(ours.call, rounds=rounds, iterations=loops, teardown=lambda: next(turns, None))
    if benchmark.stats is None:
        return None
    outcome.seconds[FASTSEQ.name] = benchmark.stats.stats.median
    outcome.seconds.update({name: median(rounds_of) for name, rounds_of in times.items()})
    own = benchmark.stats.stats.data
    for name, rounds_of in times.items():
        beside = own if name in others else [outcome.seconds[FASTSEQ.name]] * len(rounds_of)
        ratios = [theirs / ours for theirs, ours in zip(rounds_of, beside, strict=True)]
        low, outcome.ratios[name], high = quartiles(ratios)
        outcome.quartiles[name] = (low, high)
    return outcome


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first, the median and the third; of a single value, that value."""
    low, middle, high = quantiles(values, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, middle, high


def job_of(case: Any, training: bool, threads: int) -> Job:
    task = case.task(training)
    if hasattr(case, "ours"):
        ours = case.ours(training)
    else:
        ours = replace(task, layer=fastseq.accelerate(copy.deepcopy(task.layer)))
    return Job(
        task,
        ours,
        threads,
        plain=case.plain(training) if hasattr(case, "plain") else None,
        transformers=getattr(case, "transformers", None),
        onnx_model=getattr(case, "onnx_model", None),
        random=getattr(case, "random", False),
    )


def enter(peer: Peer, job: Job, expected: Sequence[torch.Tensor]) -> Contestant:
    """Prepares a peer's call, compares its results with the expected ones and warms it up.

    Raises:
        AbsentError: the peer cannot do it.
        AssertionError: its results are wrong.
    """
    call = peer.call(job)
    if peer.same:
        torch.manual_seed(SEED)
        task = job.ours if peer.ours else job.task
        by_size = job.random and not peer.ours
        wanted = dict(zip(task.names, expected, strict=True))
        results = zip(wanted.items(), call(), strict=True)
        got = {name: task.aligned(torch.as_tensor(result)).to(want.dtype) for (name, want), result in results}
        assert_right(got, wanted, f"{peer.name}: {{}} is wrong.", by_size, task.by_norm)
    return warm_up(call)


def assert_right(
    results: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    message: str,
    by_size: bool = False,
    by_norm: bool = False,
    tolerance: float = 1.0,
) -> None:
    """Compares all results of a call. A gradient that is tiny beside the largest one is a rounding error; an output is
    held against itself.

    Args:
        results: by name.
        wanted: the right ones, or others' of the same case.
        message: what is said in front of an error, with {} for the name.
        by_size: results are drawn.
        by_norm: gradients are compared by their norms.
        tolerance: how many times the usual one is allowed.
    """
    gradients = {name for name in wanted if name not in OUTPUTS}
    floor = LEAST_SHARE * max((largest(wanted[name]) for name in gradients), default=0.0)
    for name, want in wanted.items():
        got, wrong = results[name], message.format(name)
        if by_size:
            assert_same_size(got, want, wrong)
        elif by_norm and name in gradients:
            apart = (got - want).norm().item() / max(want.norm().item(), floor, sys.float_info.min)
            assert apart <= GRADIENT_RTOL, f"{wrong} It is {apart:.2g} of its norm away."
        else:
            assert_close(got, want, wrong, tolerance, floor if name in gradients else 0.0)


def assert_same_size(got: torch.Tensor, want: torch.Tensor, message: str) -> None:
    """For two draws of the same distribution: shapes and root mean squares."""
    assert got.shape == want.shape, f"{message} Its shape is {list(got.shape)}, not {list(want.shape)}."
    sizes = [x.square().mean().sqrt().item() for x in (got, want)]
    rtol = RANDOM_RTOL * max(1.0, math.sqrt(RANDOM_COUNT / max(1, got.numel())))
    assert math.isclose(*sizes, rel_tol=rtol), f"{message} Its root mean square is {sizes[0]}, not {sizes[1]}."


def time_alone(peer: Peer, job: Job, expected: Sequence[torch.Tensor], effort: Effort) -> list[float]:
    """Seconds a call of each of its rounds; the peer and its threads are gone afterwards."""
    contestant = enter(peer, job, expected)
    rounds, loops = effort.plan([contestant])
    times = [clock(contestant.call, loops) for _ in range(rounds)]
    del contestant
    gc.collect()
    time.sleep(SETTLE_S)
    return times


@contextmanager
def noting_absence(outcome: Outcome, peer: Peer) -> Iterator[None]:
    try:
        yield
    except AbsentError as absent:
        outcome.absent[peer.name] = str(absent)
