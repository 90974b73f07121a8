"""The choice of an implementation, with its reasons."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import fastseq
from fastseq import selfcheck
from fastseq.cli import app
from fastseq.ops.lstm import LSTM as LSTM_OP
from fastseq.ops.lstm import lstm
from fastseq.ops.recurrent import Case
from fastseq.reference import lstm as reference
from fastseq.registry import FLOATS, OPS, Impl, Kernel, Op, known_backends

LSTM = LSTM_OP.table


def op_of(*impls: Impl, self_check=lambda kernel, device, dtype: None) -> Op:
    return Op("lstm", [*impls, LSTM.impls[-1]], self_check)


def test_first_without_a_reason_serves() -> None:
    gpu = Impl("gpu", "fastseq.reference.lstm", devices=frozenset({"cuda"}))
    narrow = Impl("narrow", "fastseq.reference.lstm", dtypes=frozenset({torch.float64}))
    picky = Impl("picky", "fastseq.reference.lstm", needs=lambda x, *_: "x is too long" if len(x) > 3 else None)
    op = op_of(gpu, narrow, picky)
    assert [i.name for i in op.candidates("cpu", torch.float32)] == ["picky", "reference"]
    assert [i.name for i in op.candidates("cpu", torch.float64)] == ["narrow", "picky", "reference"]
    assert op.reason_against(gpu, "cpu", torch.float32) == "runs on cuda, not on cpu"
    assert op.reason_against(narrow, "cpu", torch.float32) == "takes float64, not float32"
    assert op.select("cpu", torch.float32, torch.zeros(5)) is reference


def test_asked_for_by_name_never_falls_back() -> None:
    x, h0, c0, weights, *_ = Case(3, 2, 4, 5).arguments(LSTM_OP, "cpu", torch.float16)
    with fastseq.use_backend("cpp"), pytest.raises(fastseq.BackendError, match="cpp was asked for but"):
        lstm(x, h0, c0, weights)
    with fastseq.use_backend("reference"):
        assert lstm(x, h0, c0, weights)[0].dtype == torch.float16


def test_unknown_names_list_the_known_ones() -> None:
    assert known_backends() == ["cpp", "triton", "reference"]
    with pytest.raises(ValueError, match="unknown backend 'fast'; the known ones are cpp, triton, reference"):
        fastseq.use_backend("fast").__enter__()


def test_backends_nest_and_end() -> None:
    x = torch.zeros(3, 2, 4)
    outside = LSTM.select("cpu", torch.float32)
    with fastseq.use_backend("reference"):
        assert LSTM.select("cpu", torch.float32, x) is reference
        with pytest.raises(RuntimeError), fastseq.use_backend("reference"):
            raise RuntimeError
        assert LSTM.select("cpu", torch.float32, x) is reference
    assert LSTM.select("cpu", torch.float32) is outside


def test_environment_names_a_backend() -> None:
    script = "import torch; from fastseq.ops.lstm import LSTM; print(LSTM.table.select('cpu', torch.float32).__name__)"
    environment = {"FASTSEQ_BACKEND": "reference", "PATH": ""}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fastseq.reference.lstm"
    environment["FASTSEQ_BACKEND"] = "fast"
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert "unknown backend 'fast'; the known ones are cpp, triton, reference" in done.stderr


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTSEQ_CACHE", str(tmp_path))
    selfcheck.failure.cache_clear()
    yield tmp_path
    selfcheck.failure.cache_clear()


def unverified(target: str = "fastseq.reference.lstm") -> Impl:
    return Impl("new", target, dtypes=FLOATS, verified=frozenset({"some other machine"}))


def test_an_unverified_implementation_checks_itself_once(fresh_cache) -> None:
    runs = []
    op = op_of(unverified(), self_check=lambda *args: runs.append(args))
    assert op.candidates("cpu", torch.float32)[0].name == "new"
    selfcheck.failure.cache_clear()  # as in a new process
    assert op_of(unverified(), self_check=op.self_check).candidates("cpu", torch.float32)[0].name == "new"
    assert len(runs) == 1
    assert len(list(fresh_cache.iterdir())) == 1


def test_an_implementation_that_fails_its_check_does_not_serve(fresh_cache) -> None:
    def check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
        raise AssertionError("off by one\nin line 3")

    op = op_of(unverified(), self_check=check)
    assert [i.name for i in op.candidates("cpu", torch.float32)] == ["reference"]
    reason = op.reason_against(op.impls[0], "cpu", torch.float32)
    assert reason is not None and "failed its self-check" in reason and "off by one" in reason
    assert json.loads(next(fresh_cache.iterdir()).read_text())["failure"] == reason


def test_a_self_check_knows_nothing_of_the_callers_modes(fresh_cache) -> None:
    op = op_of(unverified(), self_check=LSTM.self_check)
    with torch.device("meta"), torch.inference_mode():
        assert op.candidates("cpu", torch.float32)[0].name == "new"


def test_tracing_may_be_the_first_use() -> None:
    script = """
import torch, fastseq
model = fastseq.accelerate(torch.nn.Sequential(torch.nn.LSTM(5, 6)))
x = torch.randn(4, 2, 5)
traced = torch.jit.trace(model, (x,))
torch.testing.assert_close(traced(x)[0], model(x)[0])
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", OPS)
def test_the_self_check_catches_a_wrong_kernel(name: str) -> None:
    op = OPS[name]
    right = op.impls[-1].kernel
    op.self_check(right, "cpu", torch.float32)
    op.self_check(right, "cpu", torch.float64)

    class WrongForward:
        backward = staticmethod(right.backward)

        @staticmethod
        def forward(*args):
            y, *rest = right.forward(*args)
            return y * 1.001, *rest

    class WrongBackward:
        forward = staticmethod(right.forward)

        @staticmethod
        def backward(*args):
            *grads, last = right.backward(*args)
            return *grads, [last[0] * 1.01, *last[1:]] if isinstance(last, list) else last * 1.01

    for wrong in (WrongForward, WrongBackward):
        with pytest.raises(AssertionError):
            op.self_check(wrong, "cpu", torch.float32)


def test_info_lists_every_implementation() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    for word in ("fastseq", "torch", "CPU kernels", *OPS, "cpp", "reference", "float64"):
        assert word in result.output


@pytest.mark.parametrize("variable", ["FASTSEQ_BACKEND", "FASTSEQ_CPU_ISA"])
def test_info_says_what_the_environment_gets_wrong(variable: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastseq", "info"],
        env={**os.environ, variable: "nope"},
        capture_output=True,
        text=True,
    )
    if variable == "FASTSEQ_CPU_ISA" and fastseq.native.unavailable():
        pytest.skip("no extension whose instruction set could be chosen")
    assert done.returncode == 1
    assert "nope" in done.stdout and "Traceback" not in done.stdout + done.stderr
