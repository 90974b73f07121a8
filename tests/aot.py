"""Compiles Triton kernels for GPUs that are not there and shows what came of them: `python tests/aot.py --help`.

A module of `fastseq.kernels.triton` that has `AOT`, functions of a dtype and a compute capability by the names of
configurations, takes part. The functions call the module's own host code; launches are caught and compiled instead of
run.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import triton
import triton.language as tl
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, mangle_type

import fastseq.kernels.triton

# Bytes of shared memory that one program may have (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Tensor cores: sm_80's, sm_90's and sm_100's instructions.
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
WIDE_LOAD = re.compile(r"\b(ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg\.\S+|cp\.async\.bulk\S*)")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel as it was asked for."""

    kernel: JITFunction
    args: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Artefact:
    """What a kernel was compiled to."""

    module: str
    configuration: str
    dtype: str
    kernel: str
    capability: int
    registers: int
    stack: int
    shared: int
    warps: int
    matrix: str
    has_dot: bool
    has_wide_loads: bool


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block, kernels are not run: their launches are noted."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        launches.append(Launch(kernel, named, options))

    def note_all(tuner: Autotuner, *args: Any, **options: Any) -> None:
        for config in tuner.configs:
            tuner.fn.run(*args, **{**options, **config.all_kwargs()})

    with mock.patch.object(JITFunction, "run", note), mock.patch.object(Autotuner, "run", note_all):
        yield launches


def source_of(launch: Launch) -> ASTSource:
    """What Triton would specialise the kernel to for these arguments."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, path: tuple[int, ...], specialised: bool) -> Any:
        if isinstance(value, tuple):
            kinds = [kind(v, (*path, i), specialised) for i, v in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, tl.constexpr):
            value = value.value
            constants[path] = value
            return "constexpr"
        if value is None or (specialised and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (specialised and type(value) is int and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return mangle_type(value)

    signature = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args.get(parameter.name, parameter.default if parameter.has_default else None)
        if parameter.is_constexpr:
            value = value if isinstance(value, tl.constexpr) else tl.constexpr(value)
        signature[parameter.name] = kind(value, (i,), not parameter.do_not_specialize)
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch: Launch, capability: int, module: str, configuration: str, dtype: str) -> Artefact:
    """Compiles a launch; Triton keeps the result in its own cache folder."""
    kernel = triton.compile(source_of(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))  # type: ignore[union-attr]
    ptx = kernel.asm["ptx"]
    found = sorted(set(MATRIX.findall(ptx)))
    return Artefact(
        module, configuration, dtype, launch.kernel.__name__.lstrip("_"), capability, registers, stack,
        kernel.metadata.shared, kernel.metadata.num_warps, ", ".join(found), "tt.dot" in kernel.asm["ttir"],
        WIDE_LOAD.search(ptx) is not None,
    )  # fmt: skip


def modules() -> list[str]:
    """The names of the modules that say what to compile."""
    names = [info.name for info in pkgutil.iter_modules(fastseq.kernels.triton.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"fastseq.kernels.triton.{name}"), "AOT")]


def configurations(module: str) -> dict[str, Any]:
    return importlib.import_module(f"fastseq.kernels.triton.{module}").AOT


def build(module: str, configuration: str, dtype: str, capability: int) -> list[Artefact]:
    """Compiles each kernel that a configuration launches, once."""
    with recorded() as launches:
        configurations(module)[configuration](DTYPES[dtype], capability)
    return [compiled(launch, capability, module, configuration, dtype) for launch in launches]


def build_all(
    dtypes: Sequence[str], capabilities: Sequence[int], only: str = "", jobs: int = 1
) -> Iterator[list[Artefact]]:
    """What all configurations whose "module: name" has `only` in it are compiled to."""
    todo = [
        (module, configuration, dtype, capability)
        for module in modules()
        for configuration in configurations(module)
        if only in f"{module}: {configuration}"
        for dtype in dtypes
        for capability in capabilities
    ]
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(build, *zip(*todo, strict=True))


def main(
    dtype: Annotated[list[str], typer.Option(help="which dtypes")] = list(DTYPES),  # noqa: B006
    capability: Annotated[list[int], typer.Option(help="for which GPUs")] = list(SHARED_LIMIT),  # noqa: B006
    only: Annotated[str, typer.Option(help="configurations with this in 'module: name'")] = "",
    jobs: Annotated[int, typer.Option(help="how many to compile at once")] = 1,
) -> None:
    """Compiles every configuration and prints registers, stack, shared memory and tensor-core instructions."""
    console = Console(width=150)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("configuration", "dtype", "kernel", "sm", "regs", "stack", "shared KB", "warps", "tensor cores"):
        table.add_column(column, overflow="fold")
    wrong = 0
    for artefacts in build_all(dtype, capability, only, jobs):
        for a in artefacts:
            fits = a.shared <= SHARED_LIMIT[a.capability]
            wrong += not fits
            table.add_row(
                f"{a.module}: {a.configuration}",
                a.dtype,
                a.kernel,
                str(a.capability),
                str(a.registers),
                f"[red]{a.stack}[/]" if a.stack else "0",
                f"{a.shared / 1024:.0f}" + ("" if fits else " [red]too much[/]"),
                str(a.warps),
                a.matrix or ("none" if a.has_dot else "-"),
            )
    console.print(table)
    if wrong:
        sys.exit(f"{wrong} kernels need more shared memory than their GPU has")


if __name__ == "__main__":
    typer.run(main)
