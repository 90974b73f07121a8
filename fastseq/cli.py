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


@app.callback()
def _commands() -> None:
    """Keeps `info` a command of its own while it is the only one."""


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
            for device in sorted(impl.devices) or ["any"]:
                for dtype in sorted(map(str, impl.dtypes)) or ["any"]:
                    status = _status(op, impl, device, dtype)
                    table.add_row(op.name, impl.name, device, dtype.removeprefix("torch."), status)
    console.print(table)


def _status(op: Op, impl: Impl, device: str, dtype: str) -> str:
    if "any" in (device, dtype):
        return "available"
    if device == "cuda" and not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    reason = op.reason_against(impl, device, getattr(torch, dtype.removeprefix("torch.")))
    if reason is not None:
        return reason
    arch = selfcheck.architecture(device)
    how = "verified" if arch in impl.verified else "passed its self-check"
    return f"available, {how} on {arch}"
