"""Builds fastseq: maps the packages and compiles the extension. The metadata is in pyproject.toml.

FASTSEQ_NO_EXT=1 leaves the extension out; FASTSEQ_REQUIRE=cpp makes a failed build of it an error.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

# torch 2.10 is the oldest torch whose stable ABI has all that the sources use.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# GCC contracts a*b+c into one FMA by itself only outside of strict ISO mode.
CPU_FLAGS = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]


def left_out(reason: str) -> None:
    if "cpp" in os.environ.get("FASTSEQ_REQUIRE", "").split(","):
        raise SystemExit(f"fastseq: the C++ extension is required (FASTSEQ_REQUIRE) but {reason}")
    print(f"fastseq: built without the C++ extension: {reason}", file=sys.stderr)


def extension() -> dict:
    """The part of setup()'s arguments that builds fastseq/_native.abi3.so, empty where that cannot be."""
    if os.environ.get("FASTSEQ_NO_EXT", "0") not in ("", "0"):
        left_out("FASTSEQ_NO_EXT is set")
        return {}
    if sys.platform == "win32" or not shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]):
        left_out("no C++ compiler with GCC's vector extensions was found (c++, or the one that CXX names)")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        left_out(f"torch cannot be imported: {error}")
        return {}

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # whatever a compiler does wrong, the Python implementations still serve
                left_out(f"compiling failed: {error}")
                self.extensions = []

    sources = [path.as_posix() for path in sorted(Path("csrc").rglob("*.cpp"))]
    native = CppExtension(
        "fastseq._native",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=CPU_FLAGS + ABI_FLAGS,
        py_limited_api=True,
        depends=[path.as_posix() for path in sorted(Path("csrc").rglob("*.h"))],
    )
    return {
        "ext_modules": [native],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["fastseq*"]), "fastseq.kernels.triton", "fastseq.kernels.numba"],
    # Leaves only: mapping fastseq.kernels itself breaks editable installs.
    package_dir={
        "fastseq.kernels.triton": "kernels/triton",
        "fastseq.kernels.numba": "kernels/numba",
    },
    package_data={"fastseq": ["py.typed"]},
    **extension(),
)
