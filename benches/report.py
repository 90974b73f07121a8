"""The tables at the end of a run."""

import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from statistics import geometric_mean

from peers import FASTSEQ, PEERS
from race import MODES, Outcome
from rich import box
from rich.console import Console
from rich.table import Table

from fastseq import native

WIDTH = 120
BEST = "the best peer"
OURS = {peer.name for peer in PEERS if peer.ours}
PACKAGES = ("fastseq", "torch", "numba", "onnxruntime", "openvino", "transformers")


def render(outcomes: Sequence[Outcome], threads: int, roofline: str, color: bool) -> str:
    """A table of the cases and one of the means for each op and mode, then what they were measured on.

    Args:
        outcomes: of all races.
        threads: the threads that everyone had.
        roofline: the machine's rates in words, or why there are none.
        color: whether the terminal shows colors.
    """
    out = StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=color, highlight=False)
    for mode in MODES:
        for op in dict.fromkeys(outcome.op for outcome in outcomes):
            of_both = [outcome for outcome in outcomes if (outcome.op, outcome.mode) == (op, mode)]
            if of_both:
                console.print(f"[bold]{op}, {mode}[/]: time of each peer over fastseq's (above 1: fastseq is faster)")
                console.print(_cases(of_both))
                console.print(_means(of_both))
    installed = ", ".join(f"{name} {number}" if number else f"no {name}" for name, number in versions().items())
    console.print(f"{cpu()}, {threads} threads; {installed}; commit {commit()}", soft_wrap=True)
    served_by = ", ".join(sorted({outcome.served_by for outcome in outcomes}))
    console.print(f"fastseq's layers served by {served_by} ({native.instruction_set()}); roofline {roofline}")
    return out.getvalue().rstrip()


def _cases(outcomes: Sequence[Outcome]) -> Table:
    peers = _present(outcomes)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("case", no_wrap=True)
    for column in ("fastseq ms", *peers, "of roofline"):
        table.add_column(column, justify="right", overflow="fold")
    for outcome in outcomes:
        ratios = outcome.ratios
        cells = [_ratio(ratios[p]) if p in ratios else outcome.absent.get(p, "-") for p in peers]
        fraction = outcome.roofline_fraction
        table.add_row(
            outcome.case,
            f"{outcome.seconds[FASTSEQ.name] * 1e3:.3f}",
            *cells,
            "-" if fraction is None else f"{fraction:.0%}",
        )
    return table


def _means(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("against", no_wrap=True)
    for column in ("geometric mean", "cases", "smallest"):
        table.add_column(column, justify="right")
    table.add_column("at", no_wrap=True)
    for name in [*_present(outcomes), BEST]:
        ratios = {o.case: r for o in outcomes if (r := _against(name, o)) is not None}
        if ratios:
            worst = min(ratios, key=lambda case: ratios[case])
            mean = geometric_mean(ratios.values())
            table.add_row(name, _ratio(mean), str(len(ratios)), _ratio(ratios[worst]), worst)
    return table


def _against(name: str, outcome: Outcome) -> float | None:
    if name == BEST:
        return min((ratio for peer, ratio in outcome.ratios.items() if peer not in OURS), default=None)
    return outcome.ratios.get(name)


def _present(outcomes: Sequence[Outcome]) -> list[str]:
    """The peers that raced, or gave a reason for not racing, in the order of the table of peers."""
    named = {name for outcome in outcomes for name in (*outcome.ratios, *outcome.absent)}
    return [peer.name for peer in PEERS if peer.name in named]


def _ratio(ratio: float) -> str:
    return f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}[/]"


def cpu() -> str:
    from cpuinfo import get_cpu_info  # pytest-benchmark's own source for this; takes a second

    return get_cpu_info().get("brand_raw", "an unknown CPU")


def versions() -> dict[str, str | None]:
    """Of all that may race, None if it is not installed."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: found(package) for package in PACKAGES}


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
