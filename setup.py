"""Builds fastseq: maps the packages and compiles the extension. The metadata is in pyproject.toml.

Where nvcc and a CUDA build of torch are, CUDA kernels are in it. FASTSEQ_NO_EXT=1 leaves out all of it, FASTSEQ_CUDA=0
those; FASTSEQ_CUDA=1 builds them beside any torch. FASTSEQ_REQUIRE=cpp,cuda makes a failed build an error.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

# torch 2.10 is the oldest torch whose stable ABI has all that the sources use.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# GCC contracts a*b+c into one FMA by itself only outside of strict ISO mode.
CPU_FLAGS = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# No instruction that one architecture alone has (sm_90a) is used, and so PTX serves all that come later.
CUDA_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wall", "-Xfatbin=-compress-all"]
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0")
PARTS = {"CUDA kernels": {"cuda"}, "the C++ extension": {"cuda", "cpp"}}  # and which names in FASTSEQ_REQUIRE need them


def left_out(part: str, reason: object) -> dict:
    message = f"fastseq: built without {part}: {reason}"
    if PARTS[part] & set(os.environ.get("FASTSEQ_REQUIRE", "").split(",")):
        raise SystemExit(f"{message} (FASTSEQ_REQUIRE forbids that)")
    print(message, file=sys.stderr)
    return {}


def files(*patterns: str) -> list[str]:
    return sorted(path.as_posix() for pattern in patterns for path in Path("csrc").glob(pattern))


def with_cuda() -> dict:
    """What to add to the extension for its CUDA kernels, which use none of torch's CUDA; LookupError says why not."""
    from torch.utils import cpp_extension
    from torch.version import cuda

    if (asked := os.environ.get("FASTSEQ_CUDA")) == "0" or not (asked or cuda):
        raise LookupError("FASTSEQ_CUDA is 0" if asked else "torch is not a CUDA build")
    nvcc = Path(shutil.which("nvcc") or "/").resolve()
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), nvcc.parent.parent, "/usr/local/cuda") if home]
    if not (home := next((home for home in homes if (home / "include/cuda.h").exists()), None)):
        raise LookupError("CUDA's toolkit was not found beside an nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    cpp_extension.CUDA_HOME = str(home)  # only CUDA builds of torch look for it
    known = subprocess.check_output([home / "bin/nvcc", "--list-gpu-code"], text=True).split()
    ours = ";".join(a for a in CUDA_ARCHITECTURES if f"sm_{a.replace('.', '')}" in known) + "+PTX"
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ours
    served = [a for a in re.split("[ ;]+", wanted) if a and not re.match(r"[1-7]\.|Volta|Turing", a)]
    if not served:
        raise LookupError(f"TORCH_CUDA_ARCH_LIST names no GPU from sm_80 on: {wanted}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(served)
    libraries = dict(library_dirs=[f"{home}/lib64", f"{home}/lib"], libraries=["cudart_static", "rt", "dl", "pthread"])
    return dict(sources=files("cuda/*.cpp", "cuda/*.cu"), include_dirs=[f"{home}/include"], **libraries)


def extension() -> dict:
    """The part of setup()'s arguments that builds fastseq/_native.abi3.so, empty where that cannot be."""
    if os.environ.get("FASTSEQ_NO_EXT", "0") not in ("", "0"):
        return left_out("the C++ extension", "FASTSEQ_NO_EXT is set")
    if sys.platform == "win32" or not shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]):
        return left_out("the C++ extension", "no compiler with GCC's vector extensions was found (c++, or CXX)")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return left_out("the C++ extension", f"torch cannot be imported: {error}")

    flags = dict(extra_compile_args={"cxx": CPU_FLAGS + ABI_FLAGS, "nvcc": CUDA_FLAGS}, py_limited_api=True)
    places = dict(include_dirs=[str(Path("csrc").resolve())], depends=files("**/*.h", "cuda/*.c*"))
    native = CppExtension("fastseq._native", files("*.cpp", "ops/*.cpp", "cpu/**/*.cpp"), **places, **flags)

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            cpu_only = dict(vars(native))
            for part in PARTS:
                try:
                    more = with_cuda() if part == "CUDA kernels" else {}
                    vars(native).update(cpu_only | {name: cpu_only[name] + values for name, values in more.items()})
                    return super().build_extensions()
                except Exception as error:  # whatever a compiler does wrong, what comes next in the tables serves
                    left_out(part, error)
            self.extensions = []

    wheel = {"py_limited_api": "cp310"}
    return dict(ext_modules=[native], cmdclass={"build_ext": OptionalBuild}, options={"bdist_wheel": wheel})


setup(
    packages=[*find_packages(include=["fastseq*"]), "fastseq.kernels.triton", "fastseq.kernels.numba"],
    # Leaves only: mapping fastseq.kernels itself breaks editable installs.
    package_dir={f"fastseq.kernels.{name}": f"kernels/{name}" for name in ("triton", "numba")},
    package_data={"fastseq": ["py.typed"]},
    **extension(),
)
