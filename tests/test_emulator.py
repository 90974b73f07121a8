"""The emulator of a GPU that tests of CUDA kernels run in: what it computes, and what it does not let pass."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REQUIRED

TESTS = Path(__file__).parent
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or not shutil.which(compiler[0]):
        if "cpp" in REQUIRED:
            pytest.fail("FASTSEQ_REQUIRE asks for a C++ compiler on Linux")
        pytest.skip("the emulator needs a C++ compiler on Linux")
    path = tmp_path_factory.mktemp("emulator") / "device_cases"
    include = [f"-I{TESTS / 'emulator'}", f"-I{TESTS.parent / 'csrc'}"]
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", *include]
    source = TESTS / "device_cases.cu"
    done = subprocess.run([*compiler, *flags, "-x", "c++", source, "-o", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def run(program: Path, *cases: str, stdin: bytes = b"", **environment: object) -> subprocess.CompletedProcess:
    told = {f"FASTSEQ_EMULATOR_{name}": str(value) for name, value in environment.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEQ_EMULATOR_")}
    return subprocess.run([program, *cases], input=stdin, capture_output=True, env={**kept, **told}, timeout=60)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "case",
    [
        "multiply float32",
        "multiply bfloat16",
        "multiply float16",
        "reduction",
        "lanes",
        "sync_warp",
        "ring",
        "patience",
        "shared within",
        "stack within",
    ],
)
def test_what_kernels_rely_on(program: Path, case: str, seed: int) -> None:
    done = run(program, case, SEED=seed)
    assert (done.returncode, done.stderr) == (0, b"")


def test_as_many_threads_as_a_gpu_has(program: Path) -> None:
    done = run(program, "lanes", "reduction in 132 blocks", "reduction")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", ["forgotten barrier", "late stores"])
def test_missing_synchronisation_shows(program: Path, case: str, seed: int) -> None:
    done = run(program, case, SEED=seed)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("stray 0", "block 1, thread 64 waits in sync_block, where thread 77 waits in sync_warp"),
        ("stray 1", "block 1, thread 64 waits in sync_block, where thread 77 has returned"),
        ("stray 2", "block 1, thread 0 waits in sync_block, where thread 64 has returned"),
        ("stray 3", "block 1, thread 64 waits in multiply, where thread 77 has returned"),
        ("stray 4", "block 1, thread 64 waits in any_in_warp, where thread 77 waits in from_lane_above"),
        ("stray 5", "block 1, thread 77 polls in load_relaxed, and nothing has been stored for a minute"),
    ],
)
def test_threads_that_wait_for_ever_are_an_error_and_the_next_launch_runs(program: Path, case: str, told: str) -> None:
    done = run(program, case, "reduction", "ring", case, "lanes")
    assert (done.returncode, done.stderr.decode()) == (1, f"{case}: {told}\n" * 2)


@pytest.mark.parametrize("memory", ["shared", "stack"])
def test_what_is_beyond_a_block_s_memory_cannot_be_touched(program: Path, memory: str) -> None:
    assert run(program, f"{memory} beyond").returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("133 blocks", "133 blocks, expected 1 to 132"),
        ("40 threads", "8 threads beyond whole warps, expected 0 to 0"),
        ("228 KB", "233472 bytes of shared memory, expected 0 to 232448"),
    ],
)
def test_what_a_gpu_would_not_launch_is_refused(program: Path, case: str, told: str) -> None:
    done = run(program, case, "reduction")
    assert (done.returncode, done.stderr.decode()) == (1, f"{case}: launching a recurrent kernel: {told}\n")


def test_the_environment_names_another_chip(program: Path) -> None:
    done = run(program, "reduction", "lanes", CHIP="7,1024")
    assert done.stderr == b"reduction: launching a recurrent kernel: 8 blocks, expected 1 to 7\n"
    assert run(program, "lanes", CHIP="132").stderr.startswith(b"lanes: FASTSEQ_EMULATOR_CHIP: expected ")


def test_conversions_round_as_torch_does(program: Path) -> None:
    # All upper halves, and such lower ones as decide about rounding; the lower halves are numbers of half precision.
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    lower = torch.tensor(
        [0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF], dtype=torch.int32
    )
    words = torch.cat([(upper[:, None] | lower).flatten(), torch.arange(1 << 16, dtype=torch.int32)])
    done = run(program, "convert", stdin=words.numpy().tobytes())
    assert (done.returncode, done.stderr) == (0, b"")

    n, x = len(words), words.view(torch.float32)
    halves = torch.frombuffer(bytearray(done.stdout[: 4 * n]), dtype=torch.int16).view(2, n)
    others = torch.frombuffer(bytearray(done.stdout[4 * n :]), dtype=torch.int32).view(3, n)
    for got, dtype, back in zip(halves, (torch.bfloat16, torch.float16), others[1:], strict=True):
        assert torch.equal(got, torch.where(x.isnan(), 0x7FFF, x.to(dtype).view(torch.int16)))
        torch.testing.assert_close(
            back.view(torch.float32), words.to(torch.int16).view(dtype).float(), rtol=0, atol=0, equal_nan=True
        )

    finite = x.isfinite()
    tf32 = others[0].view(torch.float32)
    assert torch.equal(tf32.isnan(), x.isnan()) and torch.equal(tf32[x.isinf()], x[x.isinf()])
    step = torch.where(x.abs() < 2.0**-126, 2.0**-149, torch.exp2(torch.frexp(x.double().abs())[1] - 24.0)) * 2.0**13
    exact = x.double() / step
    nearest = torch.sign(exact) * torch.floor(exact.abs() + 0.5) * step
    assert torch.equal(tf32.double()[finite], nearest.float().double()[finite])
