"""How fast a model is as torch's and as fastseq's: `fastseq bench`, and `compare` for scripts.

Machines are shared and drift, so both take turns, round by round, in random order, with the same number of calls in a
round. A result is the median of the rounds' paired ratios, with its quartiles. Nothing is timed before both are found
to compute the same; first calls, which load and compile, are timed apart.
"""

import copy
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.accelerate import Explanation, accelerate, explain, restore
from fastseq.registry import kernels_called, known_backends
from fastseq.version import __version__

MODES = ("inference", "training")
TORCH, OURS = "torch", "fastseq"
SECONDS = 1.0  # for torch and for fastseq each, in a case and mode

# Long enough for the clock, and for the caches to hold the caller's own data.
ROUND_S = 2e-3
WARM_UP_CALLS = 3
WARM_UP_S = 0.05

# Sums of up to T*B terms in another order than the exact ones: relative to the largest element of a tensor.
RTOL, ATOL = 1e-4, 2e-5
# A gradient is compared by its norm. Where a sum in front of a ReLU is nearly zero, two ways of computing it may differ
# in whether it is open, as happens once in a million: of a million, one is 0.1% of a gradient's norm.
GRADIENT_RTOL = 1e-2
# Gradients whose norm is a smaller share of the largest one are rounding errors: that of a key's bias is zero.
LEAST_SHARE = 1e-2
# Where torch's own results are further from float64's than such a share, those say nothing: the model may have drawn.
FAR = 0.05
# What half precision may differ by, in steps of the dtype.
HALF_STEPS = 4
# Quartiles of which one is so many times the other are told of.
WIDE = 1.25
# Tokens that are likeliest by a hair.
TIES = 1e-3

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_PADDING = (
    "(What a boolean src_key_padding_mask leaves out is zeros in fastseq's output, and something else in torch's: a "
    "model must not return it to be compared.)"
)
_UNTRAINED = (
    "the model has nothing to train: nothing in its output depends on a parameter that requires a gradient; it can be "
    "measured in inference alone"
)

Call = Callable[[], Any]
Progress = Callable[[str, float], None]  # gets what is going on, and how much of all is done


class UsageError(ValueError):
    """What was asked for cannot be measured: a path, an input, or a model that does not take it."""


class WrongResultsError(AssertionError):
    """fastseq does not compute what torch computes."""


@dataclass(frozen=True)
class Contestant:
    """A call that was found right and is warm, and about how many seconds it takes."""

    call: Call
    seconds: float


@dataclass(frozen=True)
class Effort:
    """How much time each contestant gets for a case, and the limits to its rounds."""

    seconds: float
    least_rounds: int = 5
    most_rounds: int = 300

    def plan(self, contestants: Sequence[Contestant]) -> tuple[int, int]:
        """How many rounds to run with these contestants, and how many calls each makes in a round."""
        loops = math.ceil(ROUND_S / min(c.seconds for c in contestants))
        fitting = int(self.seconds * len(contestants) / (loops * sum(c.seconds for c in contestants)))
        return min(max(fitting, self.least_rounds), self.most_rounds), loops


def clock(call: Call, loops: int, device: str = "cpu") -> float:
    """Runs a round of so many calls and returns its seconds a call, on a GPU by CUDA's events."""
    if device == "cuda":
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(loops):
            call()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3 / loops
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def warm_up(call: Call, device: str = "cpu") -> Contestant:
    """Calls until the clock's readings have settled."""
    tries = [clock(call, 1, device) for _ in range(WARM_UP_CALLS)]
    warm_until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm_until:
        tries.append(clock(call, 1, device))
    return Contestant(call, min(tries))


def take_turns(
    calls: Mapping[str, Call],
    effort: Effort,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Seconds a call of each, by name, in each of their rounds, which are as many for all.

    The order within a round is random: with a fixed one, the time slices of other programs can fall into step with the
    turns and always hit the same one.
    """
    contestants = {name: warm_up(call, device) for name, call in calls.items()}
    rounds, loops = effort.plan(list(contestants.values()))
    shuffle = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        progress(turn / rounds)
        for name in shuffle.sample(list(calls), len(calls)):
            times[name].append(clock(contestants[name].call, loops, device))
    return times


def assert_close(got: Tensor, want: Tensor, message: str, tolerance: float = 1.0, floor: float = 0.0) -> None:
    """Raises AssertionError, with the message in front, unless all elements are close beside the largest one, or beside
    the floor where that is more; integers have to be equal.
    """
    if not want.is_floating_point():
        tolerance = 0.0
    atol = tolerance * ATOL * max(floor, largest(want))
    torch.testing.assert_close(got, want, rtol=tolerance * RTOL, atol=atol, msg=lambda text: f"{message} {text}")


def largest(t: Tensor) -> float:
    """The magnitude of its largest finite element, or 0."""
    finite = t[t.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


@dataclass(frozen=True)
class Result:
    """What was found of one case in one mode.

    Attributes:
        case: its name.
        mode: "inference", without gradients in evaluation, or "training", forward and backward.
        rounds: seconds a call in each round, by "torch" and "fastseq"; the rounds of both are pairs.
        first: seconds of the first call.
        served_by: the implementations whose kernels were called; "torch" where none was.
        difference: of results, the largest, relative to the largest element of a result or to a gradient's norm.
        compared_in: "evaluation" or "training": a model that draws in training is compared in evaluation.
        peak_bytes: what a call adds at its peak to the memory in use, on a GPU; else empty.
    """

    case: str
    mode: str
    rounds: dict[str, list[float]]
    first: dict[str, float]
    served_by: str
    difference: float
    compared_in: str
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """The median of the rounds."""
        return {name: median(times) for name, times in self.rounds.items()}

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of torch's time over fastseq's in each round: above 1, fastseq is faster."""
        ratios = [theirs / ours for theirs, ours in zip(self.rounds[TORCH], self.rounds[OURS], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return low, middle, high

    @property
    def ratio(self) -> float:
        return self.quartiles[1]


@dataclass(frozen=True)
class Report:
    """All that a run found, and on what.

    Attributes:
        explanation: of the accelerated model, where there is one model.
    """

    results: list[Result]
    threads: int
    device: str
    explanation: Explanation | None = None

    @property
    def verdict(self) -> str:
        """The results in one line."""
        place = f"on {machine(self.device)}"
        if self.device == "cpu":
            place += f", {self.threads} thread{'s' * (self.threads > 1)}"
        ratios = [result.ratio for result in self.results]
        without = [result for result in self.results if result.served_by == TORCH]
        none = f"none of fastseq's kernels is called in {' and '.join(dict.fromkeys(r.mode for r in without))}"
        if len(without) == len(self.results):
            return f"{none}: all is left to torch {torch.__version__} {place}"
        if len({result.case for result in self.results}) == 1:
            parts = []
            for result in self.results:
                if result in without:
                    continue
                low, middle, high = result.quartiles
                parts.append(f"{middle:.2f}x as fast in {result.mode} (quartiles {low:.2f} to {high:.2f})")
            return f"fastseq is {' and '.join(parts)} as torch {torch.__version__} {place}{f'; {none}' * bool(without)}"
        worst = min(self.results, key=lambda result: result.ratio)
        return (
            f"fastseq is {geometric_mean(ratios):.2f}x as fast as torch {torch.__version__} in the geometric mean over "
            f"{len(ratios)} cases {place}; slowest case: {worst.case}, {worst.mode}, {worst.ratio:.2f}x"
        )

    @property
    def notes(self) -> list[str]:
        """What there is to say beside the table."""
        first = {who: sum(result.first[who] for result in self.results) for who in (TORCH, OURS)}
        apart = max(result.difference for result in self.results)
        said = [
            "first calls, not in the table: " + ", ".join(f"{who} {total:.2f} s" for who, total in first.items()),
            f"results differ by at most {apart:.1g} of a result's largest element or a gradient's norm",
        ]
        if drawn := [r for r in self.results if r.mode == "training" and r.compared_in == "evaluation"]:
            cases = ", ".join(dict.fromkeys(r.case for r in drawn))
            said.append(f"gradients compared in evaluation, since the model draws in training: {cases}")
        if wide := [r for r in self.results if r.quartiles[2] > WIDE * r.quartiles[0]]:
            cases = ", ".join(f"{r.case}, {r.mode}" for r in wide)
            said.append(f"quartiles are far apart, as on a machine that is busy otherwise: {cases}")
        return said

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything, each round included."""
        return {
            "verdict": self.verdict,
            "machine": machine(self.device),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": self.threads,
            "device": self.device,
            "versions": {"fastseq": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "results": [
                {**asdict(result), "median": result.seconds, "ratio": result.ratio, "quartiles": result.quartiles}
                for result in self.results
            ],
            "layers": [asdict(row) for row in self.explanation.rows] if self.explanation else None,
        }


@cache
def machine(device: str = "cpu") -> str:
    """The name of the CPU or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return platform.processor() or f"an unknown {platform.machine()}"


def compare(
    model: nn.Module,
    inputs: Any,
    *,
    name: str = "model",
    modes: Sequence[str] = MODES,
    seconds: float = SECONDS,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = lambda what, share: None,
) -> Report:
    """Runs a model as torch's and accelerated, on copies: first compares their results, then times them in turns.

    In training, all floating tensors in the output get a gradient, drawn once; those of parameters are computed and
    compared, and those of inputs that require one. A step is forward and backward, without a loss or an optimizer.

    Args:
        model: any module, on one device, in torch's layers or already accelerated; it stays as it is.
        inputs: its input, or a tuple of its positional arguments, on the same device.
        name: what the model is called in the report.
        modes: of "inference" and "training".
        seconds: how long each of the two is timed in each mode.
        threads: for both; torch's number by default.
        seed: of the order of turns, and of what the model draws while it is compared.
        progress: called now and then, never while the clock runs.

    Raises:
        UsageError: the model cannot be copied, raises on these inputs, or has nothing to train.
        WrongResultsError: the accelerated model's results are others, or it raises.
        ValueError: a mode is unknown, or seconds or threads are not positive.
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not modes or any(mode not in MODES for mode in modes):
        raise ValueError(f"modes must be of {' and '.join(MODES)}, got {modes!r}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be positive, got {threads}")
    inputs = inputs if type(inputs) is tuple else (inputs,)
    leaves = (*model.parameters(), *tensors_of(inputs).values())
    if "training" in modes and leaves and not any(t.requires_grad for t in leaves):
        raise UsageError(_UNTRAINED)
    device = device_of(model, inputs)
    generators = [torch.cuda.current_device()] if device == "cuda" else []
    results, explanation = [], Explanation()
    with _threads(threads), torch.random.fork_rng(devices=generators):
        for k, mode in enumerate(modes):
            told = lambda what, share, k=k, mode=mode: progress(f"{mode}: {what}", (k + share) / len(modes))  # noqa: E731
            with torch.set_grad_enabled(mode == "training"):
                sides = _sides(model, inputs, mode == "training")
                try:
                    results.append(_race(name, sides, device, Effort(seconds), seed, told))
                except WrongResultsError as error:
                    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
                        raise WrongResultsError(f"{error} {_PADDING}") from error
                    raise
            explanation = explain(sides[1].model)
        return Report(results, torch.get_num_threads(), device, explanation)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def device_of(model: nn.Module, inputs: Any = ()) -> str:
    """The type of device on which a model computes: that of its first tensor, or of its inputs' first."""
    held = (*model.parameters(), *model.buffers(), *tensors_of(inputs).values())
    return held[0].device.type if held else "cpu"


def tensors_of(value: Any, name: str = "output") -> dict[str, Tensor]:
    """The tensors in tuples, lists, mappings and dataclasses within each other, by their paths."""
    if isinstance(value, Tensor):
        return {name: value}
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, getattr(value, f.name)) for f in fields(value))
    return {path: t for key, inner in items for path, t in tensors_of(inner, f"{name}.{key}").items()}


class _Side:
    """A model as it is called: by itself, or with a loss and backward."""

    def __init__(self, name: str, model: nn.Module, inputs: tuple[Any, ...], training: bool) -> None:
        self.name, self.model, self.training = name, model.train(training), training
        self.inputs = inputs
        self.sent: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.leaves |= {n: t for n, t in tensors_of(self.inputs, "input").items() if t.requires_grad}

    def step(self) -> Any:
        """Of what is timed, the output."""
        if not self.training:
            return self.model(*self.inputs)
        self.clear()
        output = self.model(*self.inputs)
        trained = {n: t for n, t in tensors_of(output).items() if t.is_floating_point() and t.requires_grad}
        if not trained:
            raise UsageError(_UNTRAINED)
        torch.autograd.backward(list(trained.values()), [self._sent_to(name, t) for name, t in trained.items()])
        return output

    def _sent_to(self, name: str, output: Tensor) -> Tensor:
        """An output's gradient: drawn, the same for both, and kept."""
        kept = self.sent.get(name)
        if kept is None or kept.shape != output.shape:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            kept = torch.randn(output.shape, generator=generator).to(output)
            self.sent[name] = kept
        return kept

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def results(self, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs, and gradients by the names of what they are of, of a call with this seed."""
        torch.manual_seed(seed)
        outputs = {name: t.detach().clone() for name, t in tensors_of(self.step()).items()}
        if not self.training:
            return outputs, {}
        grads = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in self.leaves.items()}
        return outputs, {f"the gradient of {name}": grad for name, grad in grads.items()}

    def widened(self) -> "_Side":
        """The same in float64."""
        wide = lambda t: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t  # noqa: E731
        inputs = tuple(wide(x) if isinstance(x, Tensor) else x for x in self.inputs)
        mode = self.model.training
        side = _Side(self.name, copy.deepcopy(self.model).double(), inputs, self.training)
        side.model.train(mode)
        return side


def _sides(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> tuple[_Side, _Side]:
    """Both, with inputs of their own: a model may write into them."""
    models = {TORCH: _copied(model, restore), OURS: _copied(model, accelerate)}
    try:
        torchs, ours = (_Side(name, made, copy.deepcopy(inputs), training) for name, made in models.items())
    except Exception as error:
        raise UsageError(f"the inputs cannot be copied: {in_short(error)}") from error
    return torchs, ours


def _copied(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    try:
        changed = change(copy.deepcopy(model))
    except Exception as error:
        raise UsageError(f"the model cannot be copied: {in_short(error)}") from error
    for module in changed.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # for cuDNN, which copies have to be made fit for
    changed.zero_grad(set_to_none=True)
    return changed


def _race(case: str, sides: tuple[_Side, _Side], device: str, effort: Effort, seed: int, progress: Progress) -> Result:
    torchs, ours = sides
    progress("comparing results", 0.0)
    first = {}
    for side in sides:
        with _told(side):
            torch.manual_seed(seed)
            first[side.name] = clock(side.step, 1, device)
    compared_in = "evaluation"
    if torchs.training:
        wants = [_results(torchs, s) for s in (seed, seed + 1)]
        gots = [_results(ours, s) for s in (seed, seed + 1)]
        if not _differ(*(outputs for outputs, _ in wants)):
            compared_in = "training"
            difference = _compared(gots[0], wants[0], torchs, seed)
    if compared_in == "evaluation":
        for side in sides:
            side.model.eval()
        # cuDNN has no backward in evaluation.
        with torch.backends.cudnn.flags(enabled=False) if torchs.training else nullcontext():
            difference = _compared(_results(ours, seed), _results(torchs, seed), torchs, seed)
        for side in sides:
            side.model.train(side.training)
    with kernels_called() as names:
        ours.step()
    peak_bytes = {side.name: _peak_bytes(side) for side in sides} if device == "cuda" else {}
    calls = {side.name: side.step for side in sides}
    rounds = take_turns(calls, effort, device, seed, partial(progress, "timing"))
    for side in sides:
        side.clear()
    return Result(
        case,
        MODES[torchs.training],
        rounds,
        first,
        ", ".join(sorted(names)) or TORCH,
        difference,
        compared_in,
        peak_bytes,
    )


@contextmanager
def _told(side: _Side) -> Iterator[None]:
    """Says whose error it is."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if side.name == TORCH:
            given = ", ".join(map(_kind, tensors_of(side.inputs).values()))
            raise UsageError(f"the model, called with {given or 'no tensors'}, raised {in_short(error)}") from error
        raise WrongResultsError(f"the accelerated model raised where torch's did not: {in_short(error)}") from error


def _results(side: _Side, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with _told(side):
        return side.results(seed)


def in_short(error: BaseException) -> str:
    """An error's type and message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _differ(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two calls of one model gave results that are further apart than rounding explains."""
    for name, a in some.items():
        b = others.get(name)
        if b is None or a.shape != b.shape:
            return True
        a, b = a.double(), b.double()
        atol = GRADIENT_RTOL * a.nan_to_num(0, 0, 0).abs().max().item() if a.numel() else 0
        if not torch.allclose(a, b, rtol=GRADIENT_RTOL, atol=atol, equal_nan=True):
            return True
    return some.keys() != others.keys()


def _compared(
    got: tuple[dict[str, Tensor], dict[str, Tensor]],
    want: tuple[dict[str, Tensor], dict[str, Tensor]],
    torchs: _Side,
    seed: int,
) -> float:
    """The largest difference of results that are close; or, where that is more than rounding usually makes, no further
    from float64's than twice torch's own.

    Raises:
        WrongResultsError: they are not.
    """
    if got[0].keys() != want[0].keys():
        names = [" and ".join(side[0]) or "no tensors" for side in (got, want)]
        raise WrongResultsError(f"{OURS}'s output has {names[0]}, torch's {names[1]}")
    if not got[0]:
        raise UsageError("there is no tensor in the model's output, so that there is nothing to compare")
    # Outputs go by their elements, gradients by their norms.
    floors = (
        LEAST_SHARE * max((largest(t) for t in want[0].values() if t.is_floating_point()), default=0.0),
        LEAST_SHARE * max((g.double().norm().item() for g in want[1].values() if g.isfinite().all()), default=0.0),
    )
    exact: dict[str, Tensor] | None = None
    found = [0.0]
    for name, expected, result, is_gradient in (
        *((n, t, got[0][n], False) for n, t in want[0].items()),
        *((n, t, got[1][n], True) for n, t in want[1].items()),
    ):
        try:
            found.append(_difference(name, result, expected, floors[is_gradient], is_gradient))
        except WrongResultsError:
            comparable = (result.shape, result.dtype) == (expected.shape, expected.dtype)
            if not comparable or expected.dtype not in _NARROW:
                raise
            if exact is None:
                exact = _exact(torchs, seed)
            if (best := exact.get(name)) is None or best.shape != expected.shape:
                raise
            errors = [(t.double() - best).norm().item() for t in (result, expected)]
            if not errors[0] <= 2 * errors[1] or not errors[1] <= FAR * best.norm().item():
                raise
            found.append((result - expected).abs().max().item() / max(floors[0], largest(best), sys.float_info.min))
    return max(found)


def _difference(name: str, got: Tensor, want: Tensor, floor: float, is_gradient: bool) -> float:
    """How far a result is from torch's, if that is within rounding: by its norm for a gradient, else by its elements.

    Args:
        floor: what the norm, or the largest element, counts as at least.
    """
    wrong = f"{OURS}: {name} is wrong."
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        raise WrongResultsError(f"{wrong} It is {_kind(got)}, torch's {_kind(want)}.")
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        share = (got != want).double().mean().item()
        if share > TIES:
            raise WrongResultsError(f"{wrong} {share:.1%} of its elements are not torch's.")
        return 0.0
    known = ~want.isnan()  # of a row that attends to nothing torch makes NaN, fastseq zeros
    if not known.any():
        raise UsageError(f"torch's {name} is NaN throughout, so that there is nothing to compare")
    steps = torch.finfo(want.dtype).eps
    got, want = got[known].double(), want[known].double()
    is_half = steps > torch.finfo(torch.float32).eps
    if is_gradient:
        limit = max(GRADIENT_RTOL, HALF_STEPS * steps)
        apart = (got - want).norm().item() / max(want.norm().item(), floor, sys.float_info.min)
        if not apart <= limit:
            raise WrongResultsError(f"{wrong} It is {apart:.2g} of its norm away from torch's (allowed: {limit:.2g}).")
        return apart
    tolerance = HALF_STEPS * steps / RTOL if is_half else steps / torch.finfo(torch.float32).eps
    try:
        assert_close(got, want, wrong, tolerance, floor)
    except AssertionError as error:
        raise WrongResultsError(str(error)) from None
    return largest(got - want) / max(floor, largest(want), sys.float_info.min)


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _exact(torchs: _Side, seed: int) -> dict[str, Tensor]:
    """torch's results in float64, or nothing where the model does not take it."""
    try:
        outputs, grads = torchs.widened().results(seed)
    except Exception:  # whatever it is, the model was not made for it
        return {}
    return {**outputs, **grads}


def _peak_bytes(side: _Side) -> int:
    side.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def summary(explanation: Explanation) -> str:
    """How many of a model's sequence layers fastseq serves, and why not the others, a line for each reason."""
    rows = [
        row for row in explanation.rows if row.served_by != "its layers" and not row.layer.endswith("dense layers)")
    ]
    if not rows:
        return "the model has no sequence layers that fastseq knows"
    ours = [row for row in rows if row.served_by in known_backends()]
    by = ", ".join(dict.fromkeys(row.served_by for row in ours))
    lines = [f"fastseq serves {len(ours)} of {len(rows)} sequence layers{f', by {by}' if by else ''}"]
    others: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row not in ours:
            others.setdefault((row.served_by, row.note), []).append(row.layer)
    for (served_by, note), layers in others.items():
        named = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
        lines.append(f"- {served_by} has {named}: {note}")
    return "\n".join(lines)
