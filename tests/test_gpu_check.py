"""`make gpu-check` where there is no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
    races = (tmp_path / "races.log").read_text().splitlines()
    lstm = next(line for line in races if line.startswith("LSTM kind=LSTM"))
    assert "fastseq cuda is absent: " in lstm and "fastseq triton is absent: runs on cuda, not on cpu" in lstm
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sanitizers"] == {"memcheck": "a dry run", "racecheck": "a dry run"}
    assert not results["wrong"] and not results["races"]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_verdicts_of_compute_sanitizer(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows the new name of an option, finds nothing in memory, and something in races."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("""#!/bin/sh
[ "$1" = --help ] && echo "  --kernel-name arg" && exit
echo "$@"
case "$*" in *"--error-exitcode 99 --kernel-name kns=ward_steps --tool racecheck"*) exit 99;; esac
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = script.sanitize(tmp_path)
    assert found == {"memcheck": "clean", "racecheck": "found errors, see racecheck.log"}
    assert "--tool memcheck" in (tmp_path / "memcheck.log").read_text()
    tool.write_text("#!/bin/sh\nexit 3\n")
    assert script.sanitize(tmp_path)["memcheck"] == "no verdict (exit 3), see memcheck.log"


def test_an_implementation_asked_for_by_name_serves_the_whole_race(script: ModuleType) -> None:
    layer = script.Layer("GRU", 2, 4, 8, 16, torch.float32, True)
    inputs = layer.inputs("cpu")
    by_name = layer._by_name("numba" if jit.NUMBA.unavailable is None else "reference", layer._layer("cpu"), inputs)
    for got, want in zip(by_name(), layer.exact(inputs), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)
    with pytest.raises(script.AbsentError, match="runs on cuda, not on cpu"):
        layer._by_name("triton", layer._layer("cpu"), inputs)
    with pytest.raises(script.AbsentError, match="has none"):
        layer._by_name("no such implementation", layer._layer("cpu"), inputs)
