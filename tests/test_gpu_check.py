"""`make gpu-check` where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastseq import jit

SCRIPT = Path(__file__).parent.parent / "benches" / "gpu_check.py"

if torch.cuda.is_available():
    pytest.skip("there is a GPU: make gpu-check shows the rest", allow_module_level=True)
if jit.TRITON.unavailable != "there is no NVIDIA GPU that torch can use":
    pytest.skip(f"triton: {jit.TRITON.unavailable}", allow_module_level=True)


def gpu_check(*options: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "FASTSEQ_NO_EXT": "1", "FASTSEQ_REQUIRE": ""}
    return subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stdout == "no NVIDIA GPU that torch can use: nothing is measured\n"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_that_everything_could_run(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path), "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no NVIDIA GPU that torch can use: nothing is measured\n")
    assert "test_attention_ops.py" in (tmp_path / "tests.log").read_text()
