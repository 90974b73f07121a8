"""The programs in examples/ run, and the comparison that they print would notice a wrong layer."""

import importlib.util
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

import fastseq

CHAR_LM = Path(__file__).parent.parent / "examples" / "char_lm.py"
TINY = {"steps": 6, "batch": 2, "length": 8, "hidden": 16, "chars": 20}


@pytest.fixture(scope="module")
def char_lm():
    spec = importlib.util.spec_from_file_location("char_lm", CHAR_LM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_char_lm_runs(tmp_path):
    plot = tmp_path / "plots" / "char_lm.png"
    options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, CHAR_LM, *options, "--out", plot],
        env={**os.environ, "PYTHONUTF8": "1"},  # tables and bars are drawn with characters beyond ASCII
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "the loss curves are equal",
        "time per training step: torch",
        "served by",
        "20 characters by the accelerated model",
        "time per character: torch",
    ):
        assert line in done.stdout
    if find_spec("matplotlib"):
        assert plot.read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib is not installed" in done.stdout


@pytest.mark.parametrize("at, by", [(0, 0.01), (3, float("nan")), (150, 1.0)], ids=["early", "nan", "late"])
def test_compare_notices_a_difference(char_lm, at, by):
    theirs = [4.6 - 0.01 * step for step in range(200)]
    ours = list(theirs)
    assert char_lm.compare(theirs, ours)[0]
    ours[at] += by
    assert not char_lm.compare(theirs, ours)[0]


def test_char_lm_fails_if_the_layer_is_wrong(char_lm, tmp_path, monkeypatch, capsys):
    accelerate = fastseq.accelerate

    def accelerate_wrongly(model):
        model.lstm.register_forward_hook(lambda module, args, result: (1.5 * result[0], result[1]))
        return accelerate(model)

    monkeypatch.setattr(fastseq, "accelerate", accelerate_wrongly)
    with pytest.raises(typer.Exit) as exit_:
        char_lm.main(**TINY, out=tmp_path / "char_lm.png")
    assert exit_.value.exit_code == 1
    printed = capsys.readouterr().out
    assert "NOT equal" in printed and "speed-up" not in printed
