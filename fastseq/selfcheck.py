"""The first use of an implementation on a machine that nobody has tested it on.

A table row lists the architectures on which its tests have passed. On any other, the op's small cases are run
against the reference once; the verdict is kept in the user's cache folder per implementation, dtype, architecture,
driver and version, and an implementation that failed is not used.
"""

import hashlib
import json
import os
import platform
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastseq import native
from fastseq.version import __version__

if TYPE_CHECKING:
    from fastseq.registry import Impl, Op


def architecture(device: str) -> str:
    """What `verified` names: "sm_90" on a GPU; on a CPU the instruction set, x86's unless it says so."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    machine = platform.machine().lower()
    isa = native.instruction_set()
    return isa if machine in ("x86_64", "amd64") else f"{isa} {machine}"


def cache_folder() -> Path:
    """Where verdicts are kept: FASTSEQ_CACHE, else the platform's folder for caches."""
    if "FASTSEQ_CACHE" in os.environ:
        return Path(os.environ["FASTSEQ_CACHE"])
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME", default)) / "fastseq"


@cache
def failure(op: "Op", impl: "Impl", device: str, dtype: torch.dtype) -> str | None:
    """None if `impl` is verified here or passes its self-check; otherwise what went wrong."""
    arch = architecture(device)
    if arch in impl.verified:
        return None
    driver = torch.version.cuda if device == "cuda" else None
    build = native.build() if impl.is_native else ""
    key = f"{op.name}/{impl.name}/{dtype}/{arch}/{driver}/{__version__}/{build}/{torch.__version__}"
    path = cache_folder() / f"selfcheck-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        return json.loads(path.read_text())["failure"]
    except (OSError, ValueError, KeyError):
        pass  # not checked yet, or the record is unreadable: check
    error = _error_of(lambda: op.self_check(impl.kernel, device, dtype))
    verdict = None
    if error is not None:
        verdict = f"failed its self-check on {arch}, see {path}: {str(error).strip().splitlines()[0]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"key": key, "failure": verdict}))
        scratch.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs a second check, nothing else
    return verdict


def _error_of(check: Callable[[], None]) -> Exception | None:
    """Runs a check where none of the caller's modes, transforms and traces reach: in a thread of its own."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            check()
        except Exception as error:  # any error at all means that this kernel must not serve here
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors[0] if errors else None
