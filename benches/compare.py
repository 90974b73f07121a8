"""This version of fastseq against an older one, on the benches' cases: `make bench-compare BASE=main`.

The base is built in a git worktree under out/. Each version lives in a process of its own, which makes the calls of a
case when it is told to: the two take turns, round by round, in random order, so that whatever else happens on the
machine hits both. Their results are compared first. What counts is the median over the rounds of this version's time
over the base's.

Each runs the cases of its own benches, which fit it; those of the same name are compared. One that the base does not
have, or cannot run, is shown as "not in base". Where results differ, so may the case.
"""

import json
import os
import random
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Annotated, Any

import torch
import typer
from race import FULL, SMOKE, Contestant, assert_right
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "compare"
THIS, BASE = "this", "base"

# What is compared unless cases are named.
HANDFUL = [
    "benches/bench_lstm.py::test_lstm[inference-T1_B1_H128]",
    "benches/bench_lstm.py::test_lstm[inference-T100_B1_H512]",
    "benches/bench_lstm.py::test_lstm[training-T100_B32_H256]",
    "benches/bench_gru.py::test_gru[inference-T100_B1_H256]",
    "benches/bench_gru.py::test_gru[training-T100_B8_H256]",
    "benches/bench_rnn.py::test_rnn[training-T100_B32_H256]",
    "benches/bench_attention.py::test_attention[inference-B8_H8_S256_D64-causal]",
    "benches/bench_attention.py::test_attention[training-B8_H8_S256_D64-causal]",
    "benches/bench_attention.py::test_decode[B8_H8_L1_S1024_D64]",
    "benches/bench_mha.py::test_mha[training-E256_H4_B32_S64]",
    "benches/bench_transformer.py::test_inference[E256_H4_B32_S64]",
    "benches/bench_fused.py::test_fused[training-gelu-1024x2048]",
    "benches/bench_fused.py::test_fused[training-add_layer-1024x512]",
    "benches/bench_models.py::test_training[GRULM_H256_V100-B8_T64]",
]

# Each version's results may be off by the benches' tolerance.
TOLERANCE = 2.0


class FailedError(Exception):
    """A version cannot do what it was asked for; the message says why."""


class Version:
    """A version of fastseq in a process of its own.

    Attributes:
        cases: the node ids of those that it has.
        failed: why there are none of a module, by its node id.
    """

    def __init__(self, name: str, root: Path, threads: int, selection: list[str]) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, OUT / f"{name}.log"
        command = [sys.executable, str(Path(__file__).with_name("one_version.py")), str(root), str(threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *selection],
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        said = self._answer()
        self.cases, self.failed = said["cases"], said["failed"]
        if Path(said["file"]) != root / "fastseq" / "__init__.py":
            sys.exit(f"{name} is to be the fastseq in {root}, but {said['file']} was imported")

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """
        Raises:
            FailedError: it cannot.
        """
        assert self.process.stdin
        with suppress(BrokenPipeError):  # its last words are in the log
            print(json.dumps(dict(do=do, **request)), file=self.process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            sys.exit(f"{self.name}'s process ended ({code}), see {self.log}:\n{tail(self.log.read_text())}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Comparison:
    """Of one case: seconds of the rounds by version, and what there is to say."""

    title: tuple[str, str, str]  # op, mode, case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    is_wrong: bool = False

    @property
    def ratios(self) -> list[float]:
        """This version's time over the base's, by round: above 1, something was lost."""
        if not self.seconds:
            return []
        return [this / base for this, base in zip(self.seconds[THIS], self.seconds[BASE], strict=True)]

    @property
    def quartiles(self) -> list[float]:
        return quantiles(self.ratios, n=4) if len(self.ratios) > 1 else self.ratios * 3

    @property
    def ratio(self) -> float:
        return self.quartiles[1]

    def has_lost(self, threshold: float) -> bool:
        """More than this share of its time, in the median, and something in three of four rounds: on a machine with
        much else to do, a median alone may be anywhere.
        """
        return self.ratio > 1 + threshold and self.quartiles[0] > 1


def compare(case: str, this: Version, base: Version, smoke: bool) -> Comparison:
    """Lets both versions run a case."""
    kept = {version.name: OUT / f"{version.name}.pt" for version in (this, base)}
    try:
        ours = this.ask("prepare", nodeid=case, results=str(kept[THIS]))
    except FailedError as error:
        return Comparison(("", "", case), note=f"fails: {error}", is_wrong=True)
    found = Comparison((ours["op"], ours["mode"], ours["case"]))
    if case not in base.cases:
        why = base.failed.get(case.partition("::")[0])
        found.note = f"not in base{f': {why}' if why else ''}"
        return found
    try:
        theirs = base.ask("prepare", nodeid=case, results=str(kept[BASE]))
    except FailedError as error:
        found.note = f"not in base: {error}"
        return found
    if theirs["served_by"] not in (ours["served_by"], ""):
        found.note = f"served by {ours['served_by']}, in base by {theirs['served_by']}"
    got, want = (torch.load(path) for path in kept.values())
    try:
        assert got.keys() == want.keys(), f"there are {', '.join(got)}, in base {', '.join(want)}."
        assert_right(got, want, "{} is not as in base.", ours["random"], ours["by_norm"], TOLERANCE)
    except AssertionError as error:
        found.note, found.is_wrong = f"results differ: {error}", True
        return found
    effort = SMOKE if smoke else FULL
    rounds, loops = effort.plan([Contestant(tuple, version["seconds"]) for version in (ours, theirs)])
    found.seconds = {THIS: [], BASE: []}
    shuffle = random.Random(0)
    for _ in range(rounds):
        for version in shuffle.sample([this, base], 2):
            found.seconds[version.name].append(version.ask("round", loops=loops)["seconds"])
    for version in (this, base):
        version.ask("drop")
    return found


def table(comparisons: list[Comparison], threshold: float) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "mode", "case"):
        rows.add_column(column, overflow="fold")
    for column in ("this ms", "base ms", "this / base", "quartiles"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.add_column("", no_wrap=True)
    for found in comparisons:
        if found.seconds:
            low, _, high = found.quartiles
            color = "red" if found.has_lost(threshold) else "default"
            milliseconds = [f"{median(found.seconds[name]) * 1e3:.3f}" for name in (THIS, BASE)]
            cells = [*milliseconds, f"[{color}]{found.ratio:.2f}[/]", f"{low:.2f} to {high:.2f}"]
        else:
            cells = ["-"] * 4
        rows.add_row(*map(escape, found.title), *cells, escape(found.note.partition(":")[0]))
    return rows


def verdict(comparisons: list[Comparison], threshold: float, base: str) -> tuple[str, bool]:
    """In words, and whether something was compared, nothing was lost and nothing is wrong."""
    timed = [found for found in comparisons if found.seconds]
    lost = [found for found in timed if found.has_lost(threshold)]
    wrong = [found for found in comparisons if found.is_wrong]
    words = f"{len(timed)} of {len(comparisons)} cases compared with {base}"
    if threshold == inf:
        words += ", one round each, which says nothing about speed"
    elif timed:
        mean = geometric_mean(found.ratio for found in timed)
        words += f": {mean:.2f} of its time in the mean, {len(lost) or 'none'} lost over {threshold:.0%}"
    if wrong:
        words += f"; {len(wrong)} went wrong"
    return words, bool(timed) and not lost and not wrong


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git: {done.stderr.strip()}")
    return done.stdout.strip()


def tail(log: str) -> str:
    return log.strip()[-2000:]


def checked_out(ref: str) -> tuple[str, Path]:
    """The commit, shortened, and a worktree with it."""
    commit = git("log", "-1", "--format=%H", "--end-of-options", ref, "--")[:12]
    folder = OUT / commit
    if not (folder / ".git").exists():
        git("worktree", "add", "--quiet", "--force", "--detach", str(folder), commit)
    return commit, folder


def build(folder: Path) -> None:
    """The extension in place, unless it is there or not wanted."""
    if any(folder.glob("fastseq/_native*.so")) or os.environ.get("FASTSEQ_NO_EXT", "0") not in ("", "0"):
        return
    log = folder.with_suffix(".build.log")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with log.open("w") as file:
        environment = {**os.environ, "FASTSEQ_REQUIRE": "cpp"}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(
            f"the base cannot be built: {shlex.join(command)} in {folder} failed, see {log}:\n{tail(log.read_text())}"
        )


def main(
    base: Annotated[str, typer.Argument(help="what to compare with: a branch, a tag or a commit")],
    cases: Annotated[str | None, typer.Option(help="those whose name has this in it, instead of a handful")] = None,
    threshold: Annotated[float, typer.Option(help="the share of time that a case may lose", min=0.0)] = 0.2,
    threads: Annotated[int, typer.Option(help="for both versions", min=1)] = torch.get_num_threads(),
    smoke: Annotated[bool, typer.Option("--smoke", help="one round: see that all works")] = False,
) -> None:
    """Compares this version's speed with that of an older one; fails where a case lost more than the threshold."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    commit, folder = checked_out(base)
    build(folder)
    ours = Version(THIS, ROOT, threads, [] if cases is None else ["--cases", cases])
    theirs = Version(BASE, folder, threads, [])
    if ours.failed:
        sys.exit("\n".join(f"{module} cannot be imported: {why}" for module, why in ours.failed.items()))
    wanted = [case for case in ours.cases if cases is not None or case in HANDFUL]
    if not wanted:
        sys.exit(f"there is no case whose name has {cases!r} in it")
    progress = track(wanted, "comparing", console=Console(stderr=True), transient=True)
    comparisons = [compare(case, ours, theirs, smoke) for case in progress]
    for version in (ours, theirs):
        version.close()
    console.print(table(comparisons, threshold))
    for note in dict.fromkeys(found.note for found in comparisons if ": " in found.note):
        first, *others = (found for found in comparisons if found.note == note)
        concerned = " ".join(filter(None, first.title)) + (f" and {len(others)} more" if others else "")
        console.print(f"{concerned}: {note}", markup=False, soft_wrap=True)
    name = base if commit.startswith(base) else f"{base} ({commit})"
    words, is_fine = verdict(comparisons, inf if smoke else threshold, name)
    console.print(f"{words}, with {threads} threads", soft_wrap=True)
    sys.exit(not is_fine)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
