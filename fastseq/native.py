"""The compiled extension: loading it, and why it is not there."""

import importlib
import os
from functools import cache

import torch


@cache
def unavailable() -> str | None:
    """Loads the extension at the first call. Returns None, or why there is none."""
    if os.environ.get("FASTSEQ_NO_EXT", "0") not in ("", "0"):
        return "FASTSEQ_NO_EXT is set"
    try:
        importlib.import_module("fastseq._native")
    except ModuleNotFoundError:
        return "the C++ extension was not built (no compiler when fastseq was installed?)"
    except (ImportError, OSError) as error:
        return f"the C++ extension cannot be loaded: {error}"
    return None


@cache
def instruction_set() -> str:
    """The instruction set that the CPU kernels were chosen for ("avx512", "avx2", "portable"), or "none"."""
    if unavailable():
        return "none"
    return ["portable", "avx2", "avx512"][torch.ops.fastseq_native.cpu_isa()]
