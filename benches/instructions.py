"""The guard of CI: how many instructions key kernels take, held against the counts on record. `make bench-guard`.

Unlike time, the count is the same on a busy machine. callgrind counts the instructions of one call, with one thread,
of the kernels for AVX2, since it does not know AVX-512: instructions.cpp has the cases. Other compilers come to other
counts, by a few percent.

Where nothing can be counted, torch's times over fastseq's are shown, and nothing fails: ratios are the machine's as
much as the kernels'. `FASTSEQ_REQUIRE=valgrind` makes that a failure.
"""

import ast
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_suffix(".cpp")
RECORD = Path(__file__).with_suffix(".json")
KERNELS = Path("csrc/cpu/isa/avx2.cpp")
OUT = ROOT / "out" / "instructions"

# What setup.py's own build adds to its flags and makes a difference to the code.
FLAGS = ["-std=c++20", "-fPIC", "-fwrapv", "-DNDEBUG"]
# How far a count may rise. Counts of one compiler are the same to a millionth.
MARGIN = 0.20


class UncountableError(Exception):
    """This machine cannot count instructions; the message says why."""


class BrokenError(Exception):
    """The program cannot be built or run; the message says why."""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def compiler_version() -> str:
    return run([*compiler(), "--version"]).stdout.splitlines()[0]


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """
    Raises:
        BrokenError: it failed.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BrokenError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return done


def check_machine() -> None:
    """
    Raises:
        UncountableError: something is missing.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise UncountableError(f"the counts are of x86's AVX2, not of {platform.machine()}")
    if not shutil.which("valgrind"):
        raise UncountableError("valgrind is not installed")
    if not shutil.which(compiler()[0]):
        raise UncountableError("there is no C++ compiler (c++, or the one that CXX names)")


def flags_of_setup() -> list[str]:
    """setup.py's CPU_FLAGS. It cannot be imported: it would set up."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "CPU_FLAGS":
            return ast.literal_eval(statement.value)
    raise BrokenError("setup.py has no CPU_FLAGS")


def built() -> Path | None:
    """The kernels' object file, of the extension's build or an earlier run here, if it is newer than all sources."""
    objects = [*ROOT.glob(f"build/temp.*/{KERNELS.with_suffix('.o')}"), OUT / "avx2.o"]
    folders = (ROOT / "csrc" / "cpu", ROOT / "csrc" / "cells")
    sources = [ROOT / "setup.py", *(path for folder in folders for path in folder.rglob("*.*"))]
    changed = max(path.stat().st_mtime for path in sources)
    there = [path for path in objects if path.exists() and path.stat().st_mtime > changed]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)


def build() -> Path:
    """The program. Where the extension was not built here, its kernels take a minute to compile."""
    OUT.mkdir(parents=True, exist_ok=True)
    include = f"-I{ROOT / 'csrc'}"
    kernels = built()
    if kernels is None:
        kernels = OUT / "avx2.o"
        run([*compiler(), *FLAGS, *flags_of_setup(), include, "-c", str(KERNELS), "-o", str(kernels)])
    program = OUT / "instructions"
    run([*compiler(), *FLAGS, "-O2", include, str(SOURCE), str(kernels), "-o", str(program)])
    return program


def count(program: Path, case: str) -> int:
    """
    Raises:
        UncountableError: the machine lacks AVX2.
        BrokenError: the case went wrong.
    """
    options = ["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=measured"]
    command = ["valgrind", *options, str(program), case]
    alone = {"PATH": os.environ["PATH"]}  # neither valgrind's options nor FASTSEQ_POISON have a say
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    if done.returncode == 2:
        raise UncountableError("this machine, or its valgrind, does not have AVX2")
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found or found[1] == "0":
        raise BrokenError(f"{shlex.join(command)} counted nothing:\n{done.stderr.strip()[-2000:]}")
    return int(found[1])


def faults(record: dict[str, int], counts: dict[str, int]) -> list[str]:
    """What is wrong with these counts, a sentence for each case."""
    wrong = []
    for case in [*counts, *(case for case in record if case not in counts)]:
        if case not in record or case not in counts:
            where = "on record" if case not in record else "counted"
            wrong.append(f"{case} is not {where}: --update writes the record anew.")
        elif counts[case] > record[case] * (1 + MARGIN):
            wrong.append(
                f"{case} takes {counts[case]:,} instructions, {counts[case] / record[case] - 1:.0%} more than the "
                f"{record[case]:,} on record; {MARGIN:.0%} are allowed."
            )
    return wrong


def table(record: dict[str, int], counts: dict[str, int]) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("case", no_wrap=True)
    for column in ("on record", "now", "change"):
        rows.add_column(column, justify="right")
    for case, now in counts.items():
        before = record.get(case)
        if before is None:
            rows.add_row(case, "-", f"{now:,}", "-")
        else:
            color = "red" if now > before * (1 + MARGIN) else "default"
            rows.add_row(case, f"{before:,}", f"{now:,}", f"[{color}]{now / before - 1:+.1%}[/]")
    return rows


def cases_of_torch() -> dict[str, Any]:
    """The benches' cases that are those of instructions.cpp."""
    import attention
    import recurrent
    from torch import nn

    return {
        "lstm-training": recurrent.Case(32, 8, 128, kind=nn.LSTM),
        "gru-inference": recurrent.Case(100, 1, 128, kind=nn.GRU),
        "attention-training": attention.Case(1, 256, H=4, causal=True),
    }


def torch_ratios() -> dict[str, float]:
    """By case, torch's median time over fastseq's, which take turns, with one thread."""
    import torch
    from peers import FASTSEQ, PEERS, exact
    from race import Effort, clock, enter, job_of

    effort = Effort(seconds=0.5, least_rounds=5, most_rounds=100)
    torch.set_num_threads(1)
    ratios = {}
    for name, case in cases_of_torch().items():
        training = name.endswith("training")
        job = job_of(case, training, threads=1)
        with torch.set_grad_enabled(training):
            expected = exact(job)
            contestants = [enter(peer, job, expected) for peer in (FASTSEQ, PEERS[0])]
            rounds, loops = effort.plan(contestants)
            times = [[clock(each.call, loops) for each in contestants] for _ in range(rounds)]
        ours, theirs = map(median, zip(*times, strict=True))
        ratios[name] = theirs / ours
    return ratios


def main(
    update: Annotated[bool, typer.Option("--update", help="write the counts on record anew")] = False,
    record: Annotated[Path, typer.Option(help="the file that holds them")] = RECORD,
) -> None:
    """Counts the instructions of key kernels; fails where a count has risen by more than 20%."""
    console = Console(highlight=False)
    try:
        check_machine()
        program, version = build(), compiler_version()
        counts = {case: count(program, case) for case in run([str(program)]).stdout.split()}
    except UncountableError as reason:
        console.print(f"No instructions were counted: {reason}.", soft_wrap=True)
        if update or "valgrind" in os.environ.get("FASTSEQ_REQUIRE", "").split(","):
            sys.exit(1)
        ratios = ", ".join(f"{case} {ratio:.2f}" for case, ratio in torch_ratios().items())
        console.print(f"torch's time over fastseq's instead, which fails nothing: {ratios}", soft_wrap=True)
        return
    except BrokenError as reason:
        sys.exit(str(reason))
    if update:
        record.write_text(json.dumps({"compiler": version, "instructions": counts}, indent=2) + "\n")
        console.print(f"{len(counts)} counts are on record in {record}", soft_wrap=True)
        return
    before = json.loads(record.read_text())
    console.print(table(before["instructions"], counts))
    if version != before["compiler"]:
        console.print(f"The counts on record are of {before['compiler']}, these of {version}.", soft_wrap=True)
    if wrong := faults(before["instructions"], counts):
        sys.exit("\n".join(wrong))
    console.print(f"No count is more than {MARGIN:.0%} above the one on record.")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
