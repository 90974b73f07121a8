"""What `setup.py` builds and what it says it left out, of sources as small as can be; the build of the emulator."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_native
from emulator import build as emulator

ROOT = Path(__file__).parent.parent
MODULE = "#include <Python.h>\nPyMODINIT_FUNC PyInit__native() { return nullptr; }\n"
KERNEL = "__global__ void add(int* p) { *p += 1; }\nvoid launch(int* p) { add<<<1, 1>>>(p); }\n"
NO_CUDA = "fastseq: built without CUDA kernels: "


def build(folder: Path, kernel: str = KERNEL, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Builds an extension of one C++ file and one CUDA kernel in `folder`."""
    shutil.copy(ROOT / "setup.py", folder)
    (folder / "fastseq").mkdir()
    (folder / "csrc/cuda").mkdir(parents=True)
    (folder / "csrc/module.cpp").write_text(MODULE)
    (folder / "csrc/cuda/add.cu").write_text(kernel)
    environment = {**os.environ, "FASTSEQ_REQUIRE": "", "FASTSEQ_NO_EXT": "", "FASTSEQ_CUDA": "", **environment}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def native(folder: Path) -> bytes:
    """The extension that was built."""
    (found,) = (folder / "fastseq").glob("_native*.so")
    return found.read_bytes()


@pytest.fixture(autouse=True)
def _compiler() -> None:
    require_native()


@pytest.fixture
def nvcc() -> None:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not there")


@pytest.mark.parametrize(("asked", "reason"), [("0", "FASTSEQ_CUDA is 0"), ("", "torch is not a CUDA build")])
def test_cuda_kernels_left_out(tmp_path: Path, asked: str, reason: str) -> None:
    if not asked and torch.version.cuda:
        pytest.skip("torch is a CUDA build")
    done = build(tmp_path, FASTSEQ_CUDA=asked)
    assert done.returncode == 0
    assert done.stderr.splitlines().count(NO_CUDA + reason) == 1
    assert b"nv_fatbin" not in native(tmp_path)


@pytest.mark.parametrize("left_out", [dict(FASTSEQ_CUDA="0"), dict(FASTSEQ_NO_EXT="1")])
def test_required_cuda_kernels(tmp_path: Path, left_out: dict[str, str]) -> None:
    done = build(tmp_path, FASTSEQ_REQUIRE="cuda", **left_out)
    assert done.returncode != 0
    assert "(FASTSEQ_REQUIRE forbids that)" in done.stderr
    assert not list((tmp_path / "fastseq").iterdir())


def test_cuda_kernels_beside_any_torch(tmp_path: Path, nvcc: None) -> None:
    done = build(tmp_path, FASTSEQ_CUDA="1", FASTSEQ_REQUIRE="cuda", TORCH_CUDA_ARCH_LIST="7.0 9.0")
    assert done.returncode == 0, done.stderr
    assert "built without" not in done.stderr
    built = native(tmp_path)
    assert b"nv_fatbin" in built
    assert b"libcudart.so" not in built and b"libtorch_cuda" not in built


def test_no_gpu_that_is_new_enough(tmp_path: Path, nvcc: None) -> None:
    done = build(tmp_path, FASTSEQ_CUDA="1", TORCH_CUDA_ARCH_LIST="7.0 Turing")
    assert done.returncode == 0, done.stderr
    assert f"{NO_CUDA}TORCH_CUDA_ARCH_LIST names no GPU from sm_80 on: 7.0 Turing" in done.stderr.splitlines()


def test_a_kernel_that_does_not_compile_costs_the_cuda_kernels_only(tmp_path: Path, nvcc: None) -> None:
    done = build(tmp_path, KERNEL + "wrong", FASTSEQ_CUDA="1", FASTSEQ_REQUIRE="cpp", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stderr
    assert NO_CUDA in done.stderr
    assert b"nv_fatbin" not in native(tmp_path)


def test_emulator_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler to build the emulator with \(no-such-compiler\)"):
        emulator.library()


def test_emulator_is_built_once_for_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "csrc/cuda/one.cu"
    source.parent.mkdir(parents=True)
    source.write_text('extern "C" int one() { return 1; }')
    places = dict(ROOT=".", CSRC="csrc", CACHE="cache", HERE="emulator")
    for name, place in places.items():
        monkeypatch.setattr(emulator, name, tmp_path / place)
    first = emulator.library()
    made = first.stat().st_mtime_ns
    assert emulator.library() == first and first.stat().st_mtime_ns == made
    source.write_text('extern "C" int one() { return 2; }')
    assert emulator.library() != first
    source.write_text("wrong")
    with pytest.raises(RuntimeError, match=r"failed:\n[^$]*wrong"):
        emulator.library()
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
