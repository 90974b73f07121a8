"""The runtimes that compile kernels just in time, Triton and numba: why one cannot serve here, and what is compiled."""

import hashlib
import importlib
import os
import re
import tempfile
from functools import cache, cached_property
from pathlib import Path

import torch

OLDEST_GPU = (8, 0)


def why_no_gpu() -> str | None:
    """Why kernels for NVIDIA's GPUs cannot run on this machine, or None."""
    if torch.version.hip is not None:
        return "it is written for NVIDIA's GPUs, not AMD's"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_GPU:
        return "it needs a GPU of sm_{}{} or newer, not sm_{}{}".format(*OLDEST_GPU, *capability)
    return None


class CompileError(Exception):
    """A kernel cannot be compiled here. For kernels whose runtime does not say so by an exception of its own."""


class Runtime:
    """What compiles the kernels of one folder; it is imported when one of them is first asked about.

    Attributes:
        title: what users call it.
        packages: what is imported, the runtime itself first; their versions decide what becomes of a kernel.
        oldest: the oldest version of the runtime that its kernels are written for.
        kernels: the package that holds them.
    """

    title: str
    packages: tuple[str, ...]
    oldest: tuple[int, int]
    kernels: str

    @cached_property
    def unavailable(self) -> str | None:
        """Why its kernels cannot run on this machine, or None."""
        wanted = f"{self.title} >= {'.'.join(map(str, self.oldest))}"
        try:
            found = self.versions()[0]
        except (ImportError, OSError) as error:  # OSError: a library of its own cannot be loaded
            return f"{wanted} cannot be imported: {error}"
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < self.oldest:
            return f"it needs {wanted}, not {found}"
        return self._unfit()

    @cached_property
    def build(self) -> str:
        """Tells one state of the kernels' sources, and of what compiles them, from another."""
        state = hashlib.sha256()
        for folder in importlib.import_module(self.kernels).__path__:
            for source in sorted(Path(folder).glob("*.py")):
                state.update(source.read_bytes())
        return " ".join([*map(" ".join, zip(self.packages, self.versions(), strict=True)), state.hexdigest()[:16]])

    def versions(self) -> list[str]:
        return [importlib.import_module(package).__version__ for package in self.packages]

    def is_compile_error(self, error: Exception) -> bool:
        """Whether what a call has raised says that a kernel cannot be compiled here."""
        return isinstance(error, CompileError)

    def _unfit(self) -> str | None:
        """What stands against it on this machine, in a version that will do."""
        raise NotImplementedError


class Triton(Runtime):
    title = "Triton"
    packages = ("triton",)
    oldest = (3, 6)
    kernels = "fastseq.kernels.triton"

    def is_compile_error(self, error: Exception) -> bool:
        """Whether Triton says that a kernel cannot be compiled for this GPU, or needs more than it has."""
        if is_interpreted():
            return False  # nothing is compiled: it is an error of the kernel's text
        if isinstance(error, importlib.import_module("triton.errors").TritonError):
            return True
        # What a pass over the intermediate code cannot do, and what launchers are compiled with.
        return isinstance(error, RuntimeError) and any(
            text in str(error) for text in ("PassManager::run failed", "Failed to find C compiler")
        )

    def _unfit(self) -> str | None:
        return None if is_interpreted() else why_no_gpu()


class Numba(Runtime):
    title = "numba"
    packages = ("numba", "llvmlite")
    oldest = (0, 60)
    kernels = "fastseq.kernels.numba"

    def is_compile_error(self, error: Exception) -> bool:
        errors = importlib.import_module("numba.core.errors")
        return isinstance(error, (CompileError, errors.NumbaError))

    @property
    def folder(self) -> Path:
        """Where compiled kernels are kept."""
        from fastseq.selfcheck import cache_folder  # not above: it may be what Python runs

        return cache_folder() / "numba"

    def _unfit(self) -> str | None:
        if importlib.import_module("numba").config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            return f"compiled kernels cannot be kept in {self.folder} ({error}): FASTSEQ_CACHE names another folder"
        return None


TRITON, NUMBA = Triton(), Numba()
_RUNTIMES = (TRITON, NUMBA)


def runtime_of(module: str) -> Runtime | None:
    """What compiles the kernels in a module; None for one that is not compiled."""
    return next((runtime for runtime in _RUNTIMES if module.startswith(f"{runtime.kernels}.")), None)


@cache
def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU's tensors: TRITON_INTERPRET=1, set before the import.

    It is for tests: thousands of times slower than any other implementation.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
