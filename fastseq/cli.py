"""The command `fastseq`, also `python -m fastseq`."""

import os
import platform
import time
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fastseq import jit, native, selfcheck
from fastseq.registry import (
    OPS,
    Impl,
    Op,
    check_backend_name,
    known_backends,
    requested_backend,
    why_not_compiled,
)
from fastseq.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Fused kernels for PyTorch sequence models.")


@app.command()
def info() -> None:
    """Shows this machine, and for each op which implementations can serve here or why not."""
    console = Console()
    try:
        if (requested := requested_backend()) is not None:
            check_backend_name(requested)
        cpu_kernels = selfcheck.instruction_set()
        if native.unavailable():
            cpu_kernels += f", without the extension: {native.unavailable()}"
    except (RuntimeError, ValueError) as error:  # the environment asks for what is not there
        console.print(str(error).splitlines()[0])
        raise typer.Exit(1) from None
    facts = Table(box=None, show_header=False, pad_edge=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for name, value in (
        ("fastseq", __version__),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("python", platform.python_version()),
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
        ("CPU kernels", cpu_kernels),
        ("numba", jit.NUMBA.unavailable or f"{jit.NUMBA.versions()[0]}, kernels kept in {jit.NUMBA.folder}"),
        ("GPU", gpu),
        ("backend", requested or f"best available (known: {', '.join(known_backends())})"),
    ):
        facts.add_row(name, value)
    console.print(facts)

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "implementation", "device", "dtype", "status"):
        table.add_column(column, overflow="fold")
    for op in OPS.values():
        for impl in op.impls:
            for device, dtype in _kinds(impl):
                status = _status(op, impl, device, dtype)
                table.add_row(op.name, impl.name, device, dtype.removeprefix("torch."), status)
    console.print(table)


@app.command(name="selfcheck")
def check() -> None:
    """Checks every implementation that this machine can run against the reference, and keeps the verdicts.

    Ends with 1 if one of them is wrong here.
    """
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "implementation", "device", "dtype", "verdict"):
        table.add_column(column, overflow="fold")
    failed = 0
    for op in OPS.values():
        for impl in op.impls[:-1]:
            for device, name in _kinds(impl):
                dtype = getattr(torch, name.removeprefix("torch."))
                if (device == "cuda" and not torch.cuda.is_available()) or impl.against(device, dtype) is not None:
                    continue
                with console.status(f"{op.name}: {impl.name} for {name} on {device}"):
                    failure = selfcheck.run(op, impl, device, dtype)
                failed += failure is not None
                verdict = failure or f"right on {selfcheck.architecture(device)}"
                table.add_row(op.name, impl.name, device, name.removeprefix("torch."), verdict)
    console.print(table)
    if failed:
        raise typer.Exit(1)


@app.command()
def warmup(
    ops: Annotated[list[str] | None, typer.Argument(help="Which ops; by default all that numba has.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Which dtypes; by default all that it takes.")] = None,
) -> None:
    """Compiles numba's kernels ahead, or finds them compiled on disk, so that no call has to wait for it.

    Ends with 1 if there is one that cannot be used here.
    """
    console = Console()
    rows = {op.name: impl for op in OPS.values() for impl in op.impls if impl.runtime is jit.NUMBA}
    names = {str(d).removeprefix("torch."): d for impl in rows.values() for d in sorted(impl.dtypes, key=str)}
    for kind, given, known in (("op", ops, rows), ("dtype", dtype, names)):
        if unknown := [name for name in given or () if name not in known]:
            console.print(f"numba has no kernels for the {kind} {unknown[0]!r}; it has some for {', '.join(known)}")
            raise typer.Exit(1)
    if (reason := jit.NUMBA.unavailable) is not None:
        console.print(f"numba's kernels cannot be used: {reason}")
        raise typer.Exit(1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op")
    table.add_column("dtype")
    table.add_column("seconds", justify="right")
    table.add_column("status", overflow="fold")
    failed = 0
    for op in ops or rows:
        for name in dtype or names:
            start = time.perf_counter()
            with console.status(f"{op}: {name}"):
                failure = _warm(OPS[op], rows[op], names[name])
            failed += failure is not None
            table.add_row(op, name, f"{time.perf_counter() - start:.2f}", failure or "ready")
    console.print(table)
    if failed:
        raise typer.Exit(1)


def _warm(op: Op, impl: Impl, dtype: torch.dtype) -> str | None:
    """Compiles an implementation's kernels for a dtype. Returns None, or why they cannot be used."""
    if (reason := op.reason_against(impl, "cpu", dtype)) is not None:
        return reason
    kernel: Any = impl.kernel
    try:
        kernel.warmup(dtype)
    except Exception as error:
        if not jit.NUMBA.is_compile_error(error):
            raise
        return why_not_compiled(error)
    return None


def _kinds(impl: Impl) -> list[tuple[str, str]]:
    """The devices and dtypes that a row of a table names."""
    return [
        (device, dtype)
        for device in sorted(impl.devices) or ["any"]
        for dtype in sorted(map(str, impl.dtypes)) or ["any"]
    ]


def _status(op: Op, impl: Impl, device: str, dtype: str) -> str:
    if impl is op.reference:
        return "available"
    if device == "cuda" and not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    reason = op.reason_against(impl, device, getattr(torch, dtype.removeprefix("torch.")))
    if reason is not None:
        return reason
    arch = selfcheck.architecture(device)
    how = "verified" if arch in impl.verified else "passed its self-check"
    return f"available, {how} on {arch}{'; where torch is ahead, torch serves' if impl.yields else ''}"
