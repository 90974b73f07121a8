"""The CUDA kernels of the recurrent ops for a CPU: `python tests/emulator/build.py` compiles and names the library.

The kernels' own text is compiled as C++, with the headers beside this file in place of csrc/cuda/device.h and launch.h:
a machine with fibres for threads. The ops have the namespace `fastseq_emulated` there.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
JOBS = 2
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # kernels read words of shared memory as one type that were written as another
    "-pthread",
    "-DFASTSEQ_CUDA_NAMESPACE=fastseq_emulated",
    "-DFASTSEQ_CUDA_KEY=CPU",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # setup.py's
]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def unavailable() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if sys.platform != "linux":
        return "the emulator is for Linux"
    if not shutil.which(compiler()[0]):
        return f"there is no C++ compiler to build the emulator with ({compiler()[0]})"
    return None


def sources() -> list[Path]:
    return sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp"), *HERE.glob("*.cpp")])


def library() -> Path:
    """The library, compiled unless it already has been from the same files.

    Raises:
        RuntimeError: it cannot be built; the message says why.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(reason)
    built = CACHE / fingerprint() / "emulated.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for the one that compiles
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                done = compiled(Path(folder))
                built.parent.mkdir(exist_ok=True)
                done.replace(built)
    return built


def fingerprint() -> str:
    """What tells one build from another."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\n".join([version, torch.__version__, *compiler(), *FLAGS]).encode())
    headers = [*CSRC.rglob("*.h"), *HERE.rglob("*.h")]
    for path in sorted([*headers, *sources()]):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compiled(folder: Path) -> Path:
    """The library, in a folder for everything that is made on the way."""
    # The emulator's headers come first, and so before those that they stand for.
    places = [f"-I{place}" for place in (HERE, CSRC, *include_paths())]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.name}.o")
        run([*compiler(), *FLAGS, *places, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, sources()))
    target = folder / "emulated.so"
    libraries = [f"-L{TORCH_LIB_PATH}", f"-Wl,-rpath,{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"]
    run([*compiler(), "-shared", "-pthread", *objects, *libraries, "-o", str(target)])
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")


if __name__ == "__main__":
    try:
        print(library())
    except RuntimeError as error:
        sys.exit(str(error))
