"""The first use of an implementation on a machine that nobody has tested it on.

A table row lists the architectures on which its tests have passed. On any other, the op's small cases are run
against the reference once; the verdict is kept in the user's cache folder per implementation, dtype, architecture,
driver and version, and an implementation that failed is not used.
"""

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastseq import native
from fastseq.version import __version__

if TYPE_CHECKING:
    from fastseq.registry import Impl, Op

# How long a check may take before its kernel counts as one that does not return. On a GPU most of it is compiling.
LIMIT_S = {"cpu": 120.0, "cuda": 600.0}


ISAS = ("portable", "avx2", "avx512")  # each with all that those before it have
_KNOWN_TO_TORCH = {"AVX2": "avx2", "AVX512": "avx512"}


class Verdict(NamedTuple):
    """What a check has found: None or what is wrong, and whether that is worth keeping for the next process."""

    failure: str | None
    final: bool = True


def architecture(device: str) -> str:
    """What `verified` names: "sm_90" on a GPU; on a CPU the instruction set, x86's unless it says so."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    machine = platform.machine().lower()
    isa = instruction_set()
    return isa if machine in ("x86_64", "amd64") else f"{isa} {machine}"


def instruction_set() -> str:
    """The CPU's best one of those that kernels know, or the one that FASTSEQ_CPU_ISA names. The extension knows; where
    there is none, torch does.

    Raises:
        RuntimeError: FASTSEQ_CPU_ISA names one that is unknown or that this machine does not have.
    """
    if native.unavailable() is None:
        return native.instruction_set()
    found = _KNOWN_TO_TORCH.get(torch.backends.cpu.get_cpu_capability(), "portable")
    forced = os.environ.get("FASTSEQ_CPU_ISA") or found
    if forced not in ISAS:
        raise RuntimeError(f"FASTSEQ_CPU_ISA must be portable, avx2 or avx512, got {forced}")
    if ISAS.index(forced) > ISAS.index(found):
        raise RuntimeError(f"FASTSEQ_CPU_ISA={forced}, which this machine does not have")
    return forced


def driver(device: str) -> str:
    """The GPU driver's CUDA version beside that of torch's build; empty on a CPU."""
    if device != "cuda":
        return ""
    return f"{torch._C._cuda_getDriverVersion()} {torch.version.cuda}"  # type: ignore[attr-defined]


def cache_folder() -> Path:
    """Where verdicts are kept: FASTSEQ_CACHE, else the platform's folder for caches."""
    if "FASTSEQ_CACHE" in os.environ:
        return Path(os.environ["FASTSEQ_CACHE"])
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME", default)) / "fastseq"


@cache
def failure(op: "Op", impl: "Impl", device: str, dtype: torch.dtype) -> str | None:
    """None if `impl` is verified here or passes its self-check; otherwise what went wrong."""
    if architecture(device) in impl.verified:
        return None
    path, _ = _record(op, impl, device, dtype)
    try:
        return json.loads(path.read_text())["failure"]
    except (OSError, ValueError, KeyError):
        pass  # not checked yet, or the record is unreadable: check
    return run(op, impl, device, dtype)


def run(op: "Op", impl: "Impl", device: str, dtype: torch.dtype) -> str | None:
    """Checks an implementation, whatever is on record, and keeps the verdict. Returns what went wrong, or None."""
    path, key = _record(op, impl, device, dtype)
    verdict = _in_process(op, impl, device, dtype) if device == "cuda" else _in_thread(op, impl, device, dtype)
    result = None
    if verdict.failure is not None:
        see = f", see {path}" if verdict.final else ""
        result = f"failed its self-check on {architecture(device)}{see}: {verdict.failure}"
        if device == "cuda":
            logging.getLogger("fastseq").warning("fastseq::%s: %s %s", op.name, impl.name, result)
    if verdict.final:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps({"key": key, "failure": result}))
            scratch.replace(path)
        except OSError:
            pass  # a cache that cannot be written costs a second check, nothing else
    return result


def _record(op: "Op", impl: "Impl", device: str, dtype: torch.dtype) -> tuple[Path, str]:
    """The file that keeps the verdict, and all that the verdict depends on."""
    on = f"{architecture(device)}/{driver(device)}"
    key = f"{op.name}/{impl.name}/{dtype}/{on}/{__version__}/{impl.build()}/{torch.__version__}"
    return cache_folder() / f"selfcheck-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json", key


def _verdict_of(check: Callable[[], None]) -> Verdict:
    try:
        check()
    except torch.OutOfMemoryError as error:  # says nothing about the kernel
        return Verdict(_first_line(error), final=False)
    except Exception as error:  # any error at all means that this kernel must not serve here
        return Verdict(_first_line(error))
    return Verdict(None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _in_thread(op: "Op", impl: "Impl", device: str, dtype: torch.dtype) -> Verdict:
    """Checks where none of the caller's modes, transforms and traces reach: in a thread of its own."""
    verdicts: list[Verdict] = []
    check = lambda: verdicts.append(_verdict_of(lambda: op.self_check(impl.kernel, device, dtype)))  # noqa: E731
    # As a daemon, it does not keep the process from ending if it never returns.
    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(LIMIT_S[device])
    return verdicts[0] if verdicts else _did_not_return(device)


def _in_process(op: "Op", impl: "Impl", device: str, dtype: torch.dtype) -> Verdict:
    """Checks in a process of its own: a GPU kernel that hangs or writes where it must not takes its process along."""
    more = "; its kernels are compiled meanwhile, which may take minutes" if impl.runtime else ""
    logging.getLogger("fastseq").warning(
        "fastseq::%s: checking %s for %s on %s, once%s", op.name, impl.name, dtype, architecture(device), more
    )
    what = (op.name, impl.name, device, str(dtype), str(torch.cuda.current_device()))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, *what],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S[device],
        )
    except subprocess.TimeoutExpired:
        return _did_not_return(device)
    except OSError as error:
        return Verdict(f"no process could be started to check it: {error}", final=False)
    return _reported(done)


def _did_not_return(device: str) -> Verdict:
    return Verdict(f"it did not return within {LIMIT_S[device]:.0f} s")


def _reported(done: "subprocess.CompletedProcess[str]") -> Verdict:
    """What the process that checked has printed last, or how it ended."""
    last = done.stdout.strip().rpartition("\n")[2]
    try:
        return Verdict(*json.loads(last))
    except (TypeError, ValueError):
        error = (done.stderr.strip().rpartition("\n")[2]) or "it said nothing"
        # By a signal, as after a memory fault; otherwise the process may not have come as far as the kernel.
        return Verdict(f"the process that checked it ended with {done.returncode}: {error}", final=done.returncode < 0)


def _main(op: str, impl: str, device: str, dtype: str, index: str) -> None:
    """The process that checks: prints its verdict as JSON."""
    import fastseq  # noqa: F401  (all tables)
    from fastseq.registry import OPS

    if device == "cuda":
        torch.cuda.set_device(int(index))
        torch.zeros(1, device=device)  # if there is no room for another process, this one ends here
    chosen = next(i for i in OPS[op].impls if i.name == impl)
    kind = getattr(torch, dtype.removeprefix("torch."))
    print(json.dumps(_verdict_of(lambda: OPS[op].self_check(chosen.kernel, device, kind))), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
