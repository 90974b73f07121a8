"""Compiles CUDA kernels for GPUs that are not there and shows what came of them: `python tests/cuda_check.py --help`.

It fails where a compiler warns, and where a kernel has memory in place of registers beyond what `SPILLS` allows it.
"""

import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parent.parent / "csrc"
CAPABILITIES = (80, 90, 100)
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v")
MOST_REGISTERS = 255
MATHS = ("bfloat16", "float16", "tf32", "exact")  # Math in csrc/cuda/recurrent.h
# Bytes of a thread's memory that kernels may use, by what matches their names: those with the most weights in registers
# put addresses of what they read ahead there, a dozen loads among the thousands of instructions of a step.
SPILLS = {"steps<.*, (tf32|exact), ": 96, "backward_steps<.*, b?float16, 2>": 64}


class CompileError(Exception):
    """The compiler fails or warns; the message is its own."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel was compiled to. Memory is in bytes, of a thread but for `shared`, which is a block's."""

    name: str
    capability: int
    registers: int
    stack: int
    spilled: int  # stores and loads
    shared: int  # static

    @property
    def allowed(self) -> int:
        return max([0, *(bytes for pattern, bytes in SPILLS.items() if re.search(pattern, self.name))])

    @property
    def cells(self) -> tuple[str, str, str]:
        spilled = str(max(self.stack, self.spilled))
        return str(self.registers), f"[red]{spilled}[/]" if self.wrong else spilled, str(self.shared)

    @property
    def wrong(self) -> str:
        """What is wrong with it, or nothing."""
        if max(self.stack, self.spilled) > self.allowed:
            return f"{self.stack} bytes on the stack, {self.spilled} spilled, of {self.allowed} allowed"
        return f"{self.registers} registers" if self.registers > MOST_REGISTERS else ""


def demangled(names: list[str]) -> list[str]:
    """C++ names as they are written, without arguments, namespaces and return types."""
    tool = next((tool for tool in ("cu++filt", "c++filt") if shutil.which(tool)), None)
    if tool is None or not names:
        return names
    plain = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"\(fastseq::gpu::Math\)(\d)", lambda math: MATHS[int(math[1])], plain)
    return [re.sub(r"^void |fastseq::gpu::|\([^()]*\)$|\((?:int|bool)\)", "", name) for name in plain.splitlines()]


def kernels_in(report: str, capability: int) -> list[Kernel]:
    """The kernels that ptxas reports about."""
    parts = re.split(r"Compiling entry function '(\w+)'.*", report)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))

    def number(pattern: str, text: str) -> int:
        return sum(int(n) for n in re.findall(pattern, text))

    return [
        Kernel(
            name,
            capability,
            registers=number(r"Used (\d+) registers", text),
            stack=number(r"(\d+) bytes stack frame", text),
            spilled=number(r"(\d+) bytes spill", text),
            shared=number(r"(\d+) bytes smem", text),
        )
        for name, text in zip(demangled(list(found)), found.values(), strict=True)
    ]


def compiled(source: Path, capability: int) -> list[Kernel]:
    """The kernels of a file.

    Raises:
        CompileError: the compiler fails, or warns of anything.
    """
    target = ["-gencode", f"arch=compute_{capability},code=sm_{capability}", "-cubin", "-o", "/dev/null"]
    command = ["nvcc", *FLAGS, *target, f"-I{CSRC}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    warnings = [line for line in report.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)]
    if done.returncode or warnings:
        raise CompileError(report if done.returncode else "\n".join(warnings))
    return kernels_in(report, capability)


def check_host(source: Path) -> None:
    """Sees that host code fits CUDA's own headers: elsewhere the emulator's stand for them.

    Raises:
        CompileError: the compiler fails, or warns of anything.
    """
    asked = subprocess.run(["nvcc", "--dryrun", "-E", str(source)], capture_output=True, text=True).stderr
    toolkits = re.findall(r'"-I([^"]+)"', next(line for line in asked.splitlines() if "INCLUDES=" in line))
    places = [f"-I{CSRC}", *(f"-isystem{path}" for path in (*include_paths(), *toolkits))]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    done = subprocess.run(["c++", *flags, *places, str(source)], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)


def attempt(source: Path, capability: int) -> list[Kernel] | CompileError:
    try:
        return compiled(source, capability)
    except CompileError as error:
        return error


def main(
    capability: Annotated[list[int], typer.Option(help="for which GPUs")] = list(CAPABILITIES),  # noqa: B006
    only: Annotated[str, typer.Option(help="files with this in their names")] = "",
    jobs: Annotated[int, typer.Option(help="how many to compile at once")] = 2,
) -> None:
    """Compiles every CUDA file for every GPU and prints registers, spills and static shared memory."""
    if not shutil.which("nvcc"):
        sys.exit("nvcc was not found")
    began = time.monotonic()
    todo = [(path, sm) for path in sorted(CSRC.glob("cuda/*.cu")) if only in path.name for sm in capability]
    rows: dict[str, dict[int, Kernel]] = {}
    wrong = []
    with ThreadPoolExecutor(jobs) as pool:
        for (source, sm), outcome in zip(todo, pool.map(lambda one: attempt(*one), todo), strict=True):
            if isinstance(outcome, CompileError):
                wrong.append(f"{source.name} for sm_{sm}:\n{outcome}")
                continue
            for kernel in outcome:
                rows.setdefault(kernel.name, {})[sm] = kernel
                if kernel.wrong:
                    wrong.append(f"{kernel.name} for sm_{sm}: {kernel.wrong}")
    for source in sorted(CSRC.glob("cuda/*.cpp")):
        try:
            check_host(source)
        except CompileError as error:
            wrong.append(f"{source.name}:\n{error}")
    table = Table("kernel", box=box.SIMPLE_HEAD, pad_edge=False)
    for sm in capability:
        for title in (f"sm_{sm}\nregisters", "\nspilled", "\nshared"):
            table.add_column(title, justify="right")
    for name, kernels in sorted(rows.items()):
        cells = [kernels[sm].cells if sm in kernels else ("-", "-", "-") for sm in capability]
        table.add_row(name, *(cell for three in cells for cell in three))
    console = Console(width=150)
    console.print(table)
    console.print(f"{len(todo)} compilations in {time.monotonic() - began:.0f} s")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    typer.run(main)
