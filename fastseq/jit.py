"""Triton, whose kernels are compiled just in time: why it cannot serve here, and whether it runs in its interpreter."""

import importlib
import os
from functools import cache
from pathlib import Path

import torch

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)


@cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU: TRITON_INTERPRET=1, set before the import.

    It is for tests: thousands of times slower than any other implementation.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def unavailable() -> str | None:
    """Imports Triton at the first call. Returns None, or why its kernels cannot run on this machine's GPU."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    try:
        found = version()
    except ImportError as error:
        return f"Triton >= {oldest} cannot be imported: {error}"
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < OLDEST_TRITON:
        return f"it needs Triton >= {oldest}, not {found}"
    if is_interpreted():
        return None
    if torch.version.hip is not None:
        return "it is written for NVIDIA's GPUs, not AMD's"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_GPU:
        return "it needs a GPU of sm_{}{} or newer, not sm_{}{}".format(*OLDEST_GPU, *capability)
    return None


def is_compile_error(error: Exception) -> bool:
    """Whether Triton says that a kernel cannot be compiled for this GPU, or needs more than it has."""
    if is_interpreted():
        return False  # nothing is compiled: it is an error of the kernel's text
    if isinstance(error, importlib.import_module("triton.errors").TritonError):
        return True
    # What a pass over the intermediate code cannot do, and what launchers are compiled with.
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("PassManager::run failed", "Failed to find C compiler")
    )


def version() -> str:
    return importlib.import_module("triton").__version__


def build(module: str) -> str:
    """Tells one state of a kernel's source, and the Triton that compiles it, from another."""
    file = os.stat(Path(str(importlib.import_module(module).__file__)))
    return f"triton {version()} {file.st_size}-{file.st_mtime_ns}"
