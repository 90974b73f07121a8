"""The compiled extension: loading it, and why it is not there."""

import importlib
import os
from functools import cache
from typing import Any

import torch  # noqa: F401  (its libraries must be loaded before the extension)


@cache
def unavailable() -> str | None:
    """Loads the extension at the first call. Returns None, or why there is none."""
    if os.environ.get("FASTSEQ_NO_EXT", "0") not in ("", "0"):
        return "FASTSEQ_NO_EXT is set"
    try:
        _module()
    except ModuleNotFoundError:
        return "the C++ extension was not built (no compiler when fastseq was installed?)"
    except (ImportError, OSError) as error:
        return f"the C++ extension cannot be loaded: {error}"
    return None


@cache
def instruction_set() -> str:
    """The instruction set that the CPU kernels were chosen for ("avx512", "avx2", "portable"), or "none".

    Raises:
        RuntimeError: FASTSEQ_CPU_ISA names one that is unknown or that this machine does not have.
    """
    return "none" if unavailable() else _module().cpu_isa()


@cache
def build() -> str:
    """Tells one build of the extension from another, or is empty without one."""
    if unavailable():
        return ""
    file = os.stat(_module().__file__)
    return f"{file.st_size}-{file.st_mtime_ns}"


def _module() -> Any:
    return importlib.import_module("fastseq._native")
