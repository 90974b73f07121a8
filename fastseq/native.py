"""The compiled extension: loading it, and why it is not there."""

import importlib
import os
from functools import cache
from typing import Any

import torch  # its libraries must be loaded before the extension


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


def emulator() -> str | None:
    """The library with the CUDA kernels for tensors of the CPU that FASTSEQ_EMULATOR names, or None.

    It is for tests: it runs each thread of the GPU after the other.
    """
    return os.environ.get("FASTSEQ_EMULATOR") or None


def cuda_ops() -> Any:
    """The ops of the CUDA kernels: the extension's, or the emulator's."""
    return torch.ops.fastseq_native if (library := emulator()) is None else _emulated(library)


@cache
def without_cuda(op: str) -> str | None:
    """Why the extension has no CUDA kernel for this op of its, or None."""
    if (reason := unavailable()) is not None:
        return reason
    try:
        if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
            return None
    except RuntimeError:  # there is no such op at all
        pass
    why = "no nvcc, a torch without CUDA, or kernels that did not compile, when fastseq was installed"
    return f"the extension was built without CUDA ({why})"


@cache
def build() -> str:
    """Tells one build of the extension from another, or is empty without one."""
    if unavailable():
        return ""
    file = os.stat(_module().__file__)
    return f"{file.st_size}-{file.st_mtime_ns}"


@cache
def _emulated(library: str) -> Any:
    torch.ops.load_library(library)
    return torch.ops.fastseq_emulated


def _module() -> Any:
    with torch.inference_mode(False):  # for the tensors that it makes at once, and keeps
        return importlib.import_module("fastseq._native")
