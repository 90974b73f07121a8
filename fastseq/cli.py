"""The command `fastseq`, also `python -m fastseq`."""

import os
import platform

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fastseq import native, selfcheck
from fastseq.registry import OPS, Impl, Op, check_backend_name, known_backends, requested_backend
from fastseq.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Fused kernels for PyTorch sequence models.")


@app.command()
def info() -> None:
    """Shows this machine, and for each op which implementations can serve here or why not."""
    console = Console()
    try:
        if (requested := requested_backend()) is not None:
            check_backend_name(requested)
        cpu_kernels = f"left out: {native.unavailable()}" if native.unavailable() else native.instruction_set()
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
    return f"available, {how} on {arch}"
