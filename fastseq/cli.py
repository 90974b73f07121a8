"""The command `fastseq`, also `python -m fastseq`."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastseq.bench
import fastseq.bench.model
import fastseq.bench.quick
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

_REDRAWN_S = 0.1  # how often, at most

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
def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODULE:ATTRIBUTE", help="A callable that makes your model, or the model itself."),
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="SHAPE[:DTYPE[<HIGH]]", help="Each of your model's arguments, see above."),
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="Only forward and backward.")] = False,
    inference: Annotated[bool, typer.Option("--inference", help="Only evaluation without gradients.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="For both; torch's number by default.")] = None,
    seconds: Annotated[
        float, typer.Option(help="For torch and for fastseq each, in a case and mode.")
    ] = fastseq.bench.SECONDS,
    seed: Annotated[int, typer.Option(help="Of weights, inputs and the order of turns.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Where everything goes, too.")
    ] = None,
) -> None:
    """Measures how much faster fastseq is here than torch: on a quick set of layers (a minute), or on your own model.

    fastseq bench my_module:make_model --input 32x128 --input "32x20:int64<1000"

    An input is SHAPE[:DTYPE[<HIGH]]: 32x128 is float32, 32x128:bfloat16 another dtype, "32x20:int64<1000" integers
    from 0 to 999 (in quotes, for the shell). The model runs as torch's and accelerated: results and gradients are
    compared first, then both are timed in turns. Ends with 1 if they differ, with 2 if the model cannot be run.
    """
    console = Console()
    modes = [mode for mode, only in zip(fastseq.bench.MODES, (inference, training), strict=True) if only]
    options: dict[str, Any] = dict(modes=modes or fastseq.bench.MODES, seconds=seconds, threads=threads, seed=seed)
    try:
        _check_bench(model, input, device, threads, seconds, json_file)
        with _progress(console) as progress:
            if model is None:
                report = fastseq.bench.quick.run(device=device, progress=progress, **options)
            else:
                specs = [fastseq.bench.model.Input.parse(text) for text in input or ()]
                made = fastseq.bench.model.load(model, seed)
                inputs = fastseq.bench.model.make_inputs(specs, device, seed)
                report = fastseq.bench.compare(made.to(device), inputs, name=model, progress=progress, **options)
    except (fastseq.bench.UsageError, fastseq.bench.WrongResultsError) as error:
        Console(stderr=True).print(f"fastseq bench: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, fastseq.bench.UsageError) else 1) from None
    if report.explanation is not None:
        console.print(fastseq.bench.summary(report.explanation), markup=False, highlight=False, soft_wrap=True)
    console.print(_results(report))
    console.print()
    for note in report.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"[bold]{report.verdict}[/]", highlight=False, soft_wrap=True)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n")


def _check_bench(
    model: str | None, input: list[str] | None, device: str, threads: int | None, seconds: float, json_file: Path | None
) -> None:
    """Raises UsageError for options that nothing can be measured with, before anything is."""
    usage, grammar = fastseq.bench.UsageError, fastseq.bench.model.INPUT_GRAMMAR
    if model is None and input:
        raise usage("--input is for a model of yours: fastseq bench my_module:make_model --input 32x128")
    if model is not None and not input:
        raise usage(f"{model} needs an --input for each of its arguments; {grammar}")
    if device not in ("cpu", "cuda"):
        raise usage(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise usage("--device cuda: there is no NVIDIA GPU that torch can use")
    if threads is not None and threads < 1:
        raise usage(f"--threads must be positive, got {threads}")
    if not 0 < seconds < float("inf"):
        raise usage(f"--seconds must be positive, got {seconds}")
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise usage(f"--json {json_file}: {'it is a folder' if json_file.is_dir() else 'there is no such folder'}")


@contextmanager
def _progress(console: Console) -> Iterator[fastseq.bench.Progress]:
    """A bar that is drawn when it is told something, and never by a thread of its own, which would be timed."""
    columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=hidden) as bar:
        task, drawn = bar.add_task("", total=1.0), -1.0

        def tell(what: str, share: float) -> None:
            nonlocal drawn
            if time.monotonic() - drawn > _REDRAWN_S:
                bar.update(task, description=what, completed=share, refresh=True)
                drawn = time.monotonic()

        yield tell


def _results(report: fastseq.bench.Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)  # the quick set's fits 80 columns
    table.add_column("case", overflow="fold")
    table.add_column("mode", no_wrap=True)
    names = (fastseq.bench.TORCH, fastseq.bench.OURS)
    on_gpu = any(result.peak_bytes for result in report.results)
    times, peaks = ([f"{name}\n{unit}" for name in names] for unit in ("ms", "MiB"))
    for column in (*times, "ratio", "quartiles", *(peaks if on_gpu else ())):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("served\nby")
    for result in report.results:
        low, ratio, high = result.quartiles
        table.add_row(
            result.case,
            result.mode,
            *(f"{1e3 * result.seconds[name]:.3g}" for name in names),
            f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}[/]",
            f"{low:.2f}-{high:.2f}",
            *(f"{result.peak_bytes[name] / 2**20:.1f}" for name in names if on_gpu),
            result.served_by,
        )
    return table


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
    reason = op.reason_to_pass_over(impl, device, getattr(torch, dtype.removeprefix("torch.")))
    if reason is not None:
        return reason
    arch = selfcheck.architecture(device)
    how = "verified" if arch in impl.verified else "passed its self-check"
    return f"available, {how} on {arch}{'; where torch is ahead, torch serves' if impl.yields else ''}"
