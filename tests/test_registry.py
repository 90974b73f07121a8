"""The choice of an implementation, with its reasons."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fastseq
from fastseq import cli, jit, selfcheck
from fastseq.ops.lstm import LSTM as LSTM_OP
from fastseq.ops.lstm import lstm
from fastseq.ops.recurrent import Case
from fastseq.reference import lstm as reference
from fastseq.registry import FLOATS, OPS, Impl, Kernel, Op, known_backends

LSTM = LSTM_OP.table


def op_of(*impls: Impl, self_check=lambda kernel, device, dtype: None) -> Op:
    return Op("lstm", [*impls, LSTM.impls[-1]], self_check)


def test_first_without_a_reason_serves(fresh_cache) -> None:
    gpu = Impl("gpu", "fastseq.reference.lstm", devices=frozenset({"cuda"}))
    narrow = Impl("narrow", "fastseq.reference.lstm", dtypes=frozenset({torch.float64}))
    picky = Impl("picky", "fastseq.reference.lstm", needs=lambda x, *_: "x is too long" if len(x) > 3 else None)
    op = op_of(gpu, narrow, picky)
    assert [i.name for i in op.candidates("cpu", torch.float32)] == ["picky", "reference"]
    assert [i.name for i in op.candidates("cpu", torch.float64)] == ["narrow", "picky", "reference"]
    assert op.reason_against(gpu, "cpu", torch.float32) == "runs on cuda, not on cpu"
    assert op.reason_against(narrow, "cpu", torch.float32) == "takes float64, not float32"
    assert op.select("cpu", torch.float32, torch.zeros(5)) is reference


def test_half_precision_stays_as_it_is_where_a_kernel_takes_it(fresh_cache) -> None:
    wide = Impl("wide", "fastseq.reference.lstm", dtypes=FLOATS)
    half = Impl("half", "fastseq.reference.lstm", dtypes=frozenset({torch.float16}))
    op = op_of(wide, half)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert op.computes_in("cpu", dtype) == dtype
    assert op.computes_in("cpu", torch.bfloat16) == torch.float32
    assert op_of(wide).computes_in("cpu", torch.float16) == torch.float32


def test_asked_for_by_name_never_falls_back() -> None:
    x, h0, c0, weights, *_ = Case(3, 2, 4, 5).arguments(LSTM_OP, "cpu", torch.float16)
    with fastseq.use_backend("cpp"), pytest.raises(fastseq.BackendError, match="cpp was asked for but"):
        lstm(x, h0, c0, weights)
    with fastseq.use_backend("reference"):
        assert lstm(x, h0, c0, weights)[0].dtype == torch.float16


def test_unknown_names_list_the_known_ones() -> None:
    assert known_backends() == ["cpp", "triton", "numba", "cuda", "reference"]
    with pytest.raises(
        ValueError, match="unknown backend 'fast'; the known ones are cpp, triton, numba, cuda, reference"
    ):
        fastseq.use_backend("fast").__enter__()


def test_a_name_binds_the_ops_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Impl("new", "fastseq.reference.lstm", verified=frozenset({selfcheck.architecture("cpu")}))
    with_it, without = op_of(new), op_of()
    monkeypatch.setitem(OPS, "of a test", with_it)
    with fastseq.use_backend("new"):
        assert with_it.candidates("cpu", torch.float32) == [new]
        assert without.candidates("cpu", torch.float32) == [without.reference]
        logits, target = torch.randn(2, 3), torch.tensor([0, 2])
        expected = torch.nn.functional.cross_entropy(logits, target)
        torch.testing.assert_close(fastseq.functional.cross_entropy(logits, target), expected)


def test_backends_nest_and_end() -> None:
    outside = LSTM.candidates("cpu", torch.float32)
    with fastseq.use_backend("reference"):
        assert LSTM.candidates("cpu", torch.float32) == [LSTM.reference]
        with pytest.raises(RuntimeError), fastseq.use_backend("reference"):
            raise RuntimeError
        assert LSTM.candidates("cpu", torch.float32) == [LSTM.reference]
    assert LSTM.candidates("cpu", torch.float32) == outside


def test_environment_names_a_backend() -> None:
    script = "import torch; from fastseq.ops.lstm import LSTM; print(LSTM.table.select('cpu', torch.float32).__name__)"
    environment = {"FASTSEQ_BACKEND": "reference", "PATH": ""}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fastseq.reference.lstm"
    environment["FASTSEQ_BACKEND"] = "fast"
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert "unknown backend 'fast'; the known ones are cpp, triton, numba, cuda, reference" in done.stderr


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTSEQ_CACHE", str(tmp_path))
    selfcheck.failure.cache_clear()
    yield tmp_path
    selfcheck.failure.cache_clear()


def unverified(target: str = "fastseq.reference.lstm") -> Impl:
    return Impl("new", target, frozenset({"cpu"}), FLOATS, verified=frozenset({"some other machine"}))


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


def test_a_kernel_that_does_not_return_does_not_serve(fresh_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selfcheck.LIMIT_S, "cpu", 0.05)
    op = op_of(unverified(), self_check=lambda *_: time.sleep(1))
    assert op.candidates("cpu", torch.float32)[0].name == "reference"
    assert "did not return" in str(op.reason_against(op.impls[0], "cpu", torch.float32))


def test_running_out_of_memory_says_nothing_about_a_kernel(fresh_cache) -> None:
    def check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
        raise torch.OutOfMemoryError("no room")

    op = op_of(unverified(), self_check=check)
    assert "no room" in str(op.reason_against(op.impls[0], "cpu", torch.float32))
    assert not list(fresh_cache.iterdir())  # the next process tries again


def test_a_gpu_is_checked_by_another_process() -> None:
    """Here with a CPU's kernel: what the process prints, and what is made of processes that end otherwise."""
    command = [sys.executable, "-m", "fastseq.selfcheck", "lstm", "reference", "cpu", "torch.float64", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert selfcheck._reported(done) == (None, True)
    done.stdout += json.dumps(["off by one", True])
    assert selfcheck._reported(done) == ("off by one", True)
    crashed = subprocess.CompletedProcess([], -11, "", "")
    assert selfcheck._reported(crashed) == ("the process that checked it ended with -11: it said nothing", True)
    crowded = subprocess.CompletedProcess([], 1, "", "Traceback\ntorch.OutOfMemoryError: no room\n")
    failure, final = selfcheck._reported(crowded)
    assert "no room" in failure and not final


def test_a_gpus_process_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selfcheck.LIMIT_S, "cuda", 0.01)
    monkeypatch.setattr(selfcheck, "architecture", lambda device: "sm_99")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    op = op_of(unverified())
    failure, final = selfcheck._in_process(op, op.impls[0], "cuda", torch.float32)
    assert failure == "it did not return within 0 s" and final


def test_selfcheck_checks_everything_and_says_what_is_wrong(fresh_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.cli.OPS", {"lstm": op_of(unverified(), self_check=lambda *_: None)})
    result = CliRunner().invoke(cli.app, ["selfcheck"])
    assert result.exit_code == 0 and "right on" in result.output and "float64" in result.output

    def check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
        raise AssertionError("off by one")

    monkeypatch.setattr("fastseq.cli.OPS", {"lstm": op_of(unverified(), self_check=check)})
    result = CliRunner().invoke(cli.app, ["selfcheck"])
    assert result.exit_code == 1 and "off by one" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("runtime", "where", "kind"),
    [("triton", "triton.errors", "TritonError"), ("numba", "numba.core.errors", "LoweringError")],
)
def test_a_kernel_that_cannot_be_compiled_is_named_once(
    runtime: str, where: str, kind: str, fresh_cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runtime == "triton" and jit.is_interpreted():
        pytest.skip("nothing is compiled in the interpreter")
    errors = pytest.importorskip(where)
    calls = []

    def forward(*args):
        calls.append(args)
        raise error

    error: Exception = getattr(errors, kind)("no such instruction\nat line 3")
    new = Impl("new", f"fastseq.kernels.{runtime}.new", dtypes=FLOATS)
    monkeypatch.setattr(Impl, "unavailable", lambda self: None)
    monkeypatch.setattr(Impl, "build", lambda self: "")
    monkeypatch.setitem(new.__dict__, "kernel", SimpleNamespace(forward=forward, backward=forward))
    op = op_of(new)
    arguments = Case(3, 2, 4, 5).arguments(LSTM_OP, "cpu", torch.float64)
    forward_args = arguments.saving(False)
    expected = reference.forward(*forward_args)
    with pytest.warns(RuntimeWarning, match=rf"fastseq::lstm: new cannot be compiled here: {kind}: no such"):
        got = op.select("cpu", torch.float64, *forward_args).forward(*forward_args)
    torch.testing.assert_close(got, expected)
    assert op.select("cpu", torch.float64, *forward_args) is reference and len(calls) == 1
    assert "cannot be compiled here" in str(op.reason_against(new, "cpu", torch.float64))

    op, error = op_of(new), torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        op.select("cpu", torch.float64, *forward_args).forward(*forward_args)
    assert op.reason_against(new, "cpu", torch.float64) is None


def test_a_kernel_that_cannot_be_imported_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    here = frozenset({selfcheck.architecture("cpu")})
    new = Impl("new", "fastseq.kernels.numba.new", dtypes=FLOATS, verified=here)
    monkeypatch.setattr(Impl, "unavailable", lambda self: None)
    op, args = op_of(new), Case(3, 2, 4, 5).arguments(LSTM_OP, "cpu", torch.float64).saving(False)
    with pytest.warns(RuntimeWarning, match=r"new cannot be compiled here: ModuleNotFoundError: No module named"):
        torch.testing.assert_close(op.select("cpu", torch.float64, *args).forward(*args), reference.forward(*args))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(version="3.5.1"), "it needs Triton >= 3.6, not 3.5.1"),
        (dict(version="3.10.0+git1"), None),
        (dict(gpu=False), "there is no NVIDIA GPU that torch can use"),
        (dict(capability=(7, 5)), "it needs a GPU of sm_80 or newer, not sm_75"),
        (dict(hip="6.2"), "it is written for NVIDIA's GPUs, not AMD's"),
    ],
    ids=str,
)
def test_why_triton_cannot_serve(changes: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    has = dict(version="3.6.0", gpu=True, capability=(8, 0), hip=None) | changes
    monkeypatch.setattr(jit.Triton, "versions", lambda self: [has["version"]])
    monkeypatch.setattr(jit, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", has["hip"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has["gpu"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: has["capability"])
    assert jit.Triton().unavailable == reason


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it could not be found
    assert "Triton >= 3.6 cannot be imported" in str(jit.Triton().unavailable)


@pytest.mark.parametrize(
    ("versions", "reason"),
    [(["0.59.1", "0.42"], "it needs numba >= 0.60, not 0.59.1"), (["0.60.0rc1", "0.43"], None), (["1.0", "1.0"], None)],
    ids=str,
)
def test_numba_has_to_be_new_enough(
    versions: list[str], reason: str | None, fresh_cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(config=SimpleNamespace(DISABLE_JIT=0)))
    monkeypatch.setattr(jit.Numba, "versions", lambda self: versions)
    assert jit.Numba().unavailable == reason


def test_without_numba_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert "numba >= 0.60 cannot be imported" in str(jit.Numba().unavailable)


def test_numba_must_be_allowed_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("numba").config, "DISABLE_JIT", 1)
    assert jit.Numba().unavailable == "NUMBA_DISABLE_JIT is set"


@pytest.mark.usefixtures("nothing_asked_for")
def test_numba_needs_a_folder_for_what_it_compiles(fresh_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    (fresh_cache / "file").touch()
    monkeypatch.setenv("FASTSEQ_CACHE", str(fresh_cache / "file"))  # which even root cannot make a folder in
    reason = str(jit.Numba().unavailable)
    assert str(fresh_cache / "file" / "numba") in reason and "FASTSEQ_CACHE" in reason
    monkeypatch.setattr(jit.NUMBA, "unavailable", reason)
    numba = next(impl for impl in LSTM.impls if impl.name == "numba")
    assert LSTM.reason_against(numba, "cpu", torch.float32) == reason
    monkeypatch.setattr(LSTM, "_choices", {})
    monkeypatch.setattr(LSTM, "_preferred", {})
    assert LSTM.candidates("cpu", torch.float32)[0].name != "numba"
    with fastseq.use_backend("numba"), pytest.raises(fastseq.BackendError, match="numba was asked for but compiled"):
        LSTM.select("cpu", torch.float32)


def test_a_build_is_of_all_sources_of_a_runtime(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels_of_a_test", SimpleNamespace(__path__=[str(tmp_path)]))

    class Compiler(jit.Numba):
        kernels = "kernels_of_a_test"

        def versions(self) -> list[str]:
            return found

    found, builds = ["0.60.0", "0.43.0"], set()
    for name, text in (("gru.py", "1"), ("gru.py", "2"), ("simd.py", "1"), ("simd.py", "2")):
        (tmp_path / name).write_text(text)
        builds.add(Compiler().build)
    found = ["0.60.0", "0.43.1"]
    builds |= {Compiler().build, Compiler().build}
    assert len(builds) == 5 and all(build.startswith("numba 0.60.0 llvmlite 0.43") for build in builds)


def test_what_stands_behind_the_one_that_serves_is_not_asked(monkeypatch: pytest.MonkeyPatch, fresh_cache) -> None:
    first = Impl("first", "fastseq.reference.lstm", needs=lambda x, *_: "x is too long" if len(x) > 3 else None)
    second = Impl("second", "fastseq.reference.lstm")
    op, asked = op_of(first, second), []
    reason_against = Op.reason_against
    monkeypatch.setattr(
        Op, "reason_against", lambda self, impl, *kind: (asked.append(impl), reason_against(self, impl, *kind))[1]
    )
    assert op.preferred("cpu", torch.float32) is first
    op.select("cpu", torch.float32, torch.zeros(2))
    assert asked == [first]
    op.select("cpu", torch.float32, torch.zeros(5))
    assert asked[1:] == [first, second, op.reference]
    assert op.preferred("cpu", torch.float32) is first


def test_what_compiles_kernels_is_not_imported_before_it_serves() -> None:
    script = """
import sys, torch, fastseq
x = torch.randn(2, 3, 8)
assert "numba" not in sys.modules
fastseq.functional.scaled_dot_product_attention(x.half(), x.half(), x.half())
assert "triton" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


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


def test_inference_mode_may_be_the_first_use() -> None:
    """And training the next one."""
    script = """
import torch, fastseq
from torch import nn
layers = [nn.LSTM(8, 6), nn.GRU(8, 6), nn.RNN(8, 6), nn.LSTMCell(8, 6), nn.GRUCell(8, 6), nn.RNNCell(8, 6)]
layers += [nn.TransformerEncoderLayer(8, 2, 16), nn.CrossEntropyLoss()]
calls = []
for layer in layers:
    layer = fastseq.accelerate(nn.Sequential(layer))[0]
    inputs = [torch.randn(3, 2, 8) if "Cell" not in type(layer).__name__ else torch.randn(2, 8)]
    if isinstance(layer, nn.CrossEntropyLoss):
        inputs = [torch.randn(9, 8), torch.randint(8, (9,))]
    calls.append((layer, inputs))
with torch.inference_mode():
    for layer, inputs in calls:
        layer(*inputs)
for layer, inputs in calls:
    x = inputs[0].requires_grad_()
    y = layer(*inputs)
    (y if isinstance(y, torch.Tensor) else y[0]).sum().backward()
    assert x.grad is not None
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
            outputs = right.forward(*args)
            if isinstance(outputs, torch.Tensor):
                return outputs * 1.001
            y, *rest = outputs
            return y * 1.001, *rest

    class WrongBackward:
        forward = staticmethod(right.forward)

        @staticmethod
        def backward(*args):
            grads = right.backward(*args)
            if isinstance(grads, torch.Tensor):
                return grads * 1.01
            *grads, last = grads
            return *grads, [last[0] * 1.01, *last[1:]] if isinstance(last, list) else last * 1.01

    for wrong in (WrongForward, WrongBackward):
        with pytest.raises(AssertionError):
            op.self_check(wrong, "cpu", torch.float32)


def test_info_lists_every_implementation() -> None:
    result = CliRunner().invoke(cli.app, ["info"])
    assert result.exit_code == 0
    for word in ("fastseq", "torch", "CPU kernels", *OPS, "cpp", "numba", "reference", "float64"):
        assert word in result.output


def test_info_says_why_numba_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.NUMBA, "unavailable", "NUMBA_DISABLE_JIT is set")
    output = " ".join(CliRunner().invoke(cli.app, ["info"]).output.split())
    assert "numba NUMBA_DISABLE_JIT is set" in output
    assert output.count("NUMBA_DISABLE_JIT") == 1 + sum(
        len(impl.dtypes) for op in OPS.values() for impl in op.impls if impl.runtime is jit.NUMBA
    )


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """What has been compiled, in a table of one op that is served by numba."""
    calls: list[tuple[str, torch.dtype]] = []
    new = Impl("numba", "fastseq.kernels.numba.new", frozenset({"cpu"}), FLOATS)
    monkeypatch.setitem(new.__dict__, "kernel", SimpleNamespace(warmup=lambda dtype: calls.append(("lstm", dtype))))
    op = op_of(new)
    monkeypatch.setattr(op, "reason_against", lambda *_: None)
    monkeypatch.setattr("fastseq.cli.OPS", {"lstm": op, "norm": op_of()})
    monkeypatch.setattr(jit.NUMBA, "unavailable", None)
    return calls


def test_warmup_compiles_everything(warmed: list[tuple[str, torch.dtype]]) -> None:
    result = CliRunner().invoke(cli.app, ["warmup"])
    assert result.exit_code == 0 and warmed == [("lstm", torch.float32), ("lstm", torch.float64)]
    assert result.output.count("ready") == 2


def test_warmup_compiles_what_it_is_asked_for(warmed: list[tuple[str, torch.dtype]]) -> None:
    assert CliRunner().invoke(cli.app, ["warmup", "--dtype", "float64", "lstm"]).exit_code == 0
    assert warmed == [("lstm", torch.float64)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gruu"], "numba has no kernels for the op 'gruu'; it has some for lstm"),
        (["lstm", "norm"], "numba has no kernels for the op 'norm'; it has some for lstm"),
        (["--dtype", "float16"], "numba has no kernels for the dtype 'float16'; it has some for float32, float64"),
    ],
    ids=str,
)
def test_warmup_knows_what_there_is(arguments: list[str], message: str, warmed: list) -> None:
    result = CliRunner().invoke(cli.app, ["warmup", *arguments])
    assert result.exit_code == 1 and message in " ".join(result.output.split())
    assert not warmed


def test_warmup_says_why_it_cannot(warmed: list, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(jit.NUMBA, "unavailable", "NUMBA_DISABLE_JIT is set")
        result = CliRunner().invoke(cli.app, ["warmup"])
    assert result.exit_code == 1 and "NUMBA_DISABLE_JIT is set" in result.output and not warmed

    def warmup(dtype: torch.dtype) -> None:
        raise jit.CompileError("no such instruction")

    monkeypatch.setitem(cli.OPS["lstm"].impls[0].__dict__, "kernel", SimpleNamespace(warmup=warmup))
    result = CliRunner().invoke(cli.app, ["warmup"])
    assert result.exit_code == 1 and "cannot be compiled here: no such" in " ".join(result.output.split())


@pytest.mark.parametrize("variable", ["FASTSEQ_BACKEND", "FASTSEQ_CPU_ISA"])
def test_info_says_what_the_environment_gets_wrong(variable: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastseq", "info"],
        env={**os.environ, variable: "nope"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "nope" in done.stdout and "Traceback" not in done.stdout + done.stderr
