"""`fastseq bench`: what it shows, what it refuses. No speed is looked at."""

import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fastseq
from fastseq import bench, cli
from fastseq.bench import Effort, Report, Result, UsageError, WrongResultsError, compare, quick
from fastseq.bench import model as asked
from fastseq.bench.quick import Case
from fastseq.registry import OPS, kernels_called

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = 0.001
MODELS = """
import collections, torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.lstm, self.own = nn.LSTM(8, 8, batch_first=True), type("Own", (nn.GRU,), {})(8, 8, batch_first=True)

    def forward(self, tokens):
        return self.output(self.own(self.lstm(self.embedding(tokens))[0])[0])

made = nn.GRU(4, 5)
number = 3

def frozen():
    return nn.GRU(4, 5).requires_grad_(False)

def strange():
    return [made]

def broken():
    raise KeyError("weights")
"""


class Many(nn.Module):
    """A model with outputs of all kinds."""

    @dataclass
    class Output:
        logits: Tensor
        rest: Any

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm, self.dropout = nn.LSTM(4, 5), nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: float = 1.0) -> Output:
        y, state = self.lstm(x)
        y = self.dropout(y) * scale
        return self.Output(y, {"state": state, "best": y.argmax(-1), "none": None, "list": [y.sum(), y.detach()]})


class _Says(nn.Module):
    """Returns words."""

    def forward(self, x: Tensor) -> str:
        return "positive" if x.sum() > 0 else "negative"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WARM_UP_S", 0.0)
    monkeypatch.setattr(bench, "ROUND_S", 1e-9)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current one, where there is the module `mine`."""
    (tmp_path / "mine.py").write_text(MODELS)
    (tmp_path / "unfinished.py").write_text("import nowhere_at_all")
    (tmp_path / "raises.py").write_text("x = 1\n1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mine", "unfinished", "raises"):
        sys.modules.pop(name, None)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["bench", "--seconds", str(SECONDS), *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def result_of(case: str, mode: str, torchs: list[float], ours: list[float]) -> Result:
    rounds = {"torch": torchs, "fastseq": ours}
    return Result(case, mode, rounds, {"torch": 0.5, "fastseq": 0.25}, "cpp", 1e-6, mode)


def wrong_if(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """What bench accelerates is changed."""

    def accelerate(model: nn.Module) -> nn.Module:
        model = fastseq.accelerate(model)
        change(model)
        return model

    monkeypatch.setattr(bench, "accelerate", accelerate)


def test_compare_finds_both_modes_and_leaves_all_as_it_was() -> None:
    model, x = Many().train(), torch.randn(6, 2, 4, requires_grad=True)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    told: list[tuple[str, float]] = []
    report = compare(model, x, name="many", seconds=SECONDS, threads=2, progress=lambda *say: told.append(say))
    assert [(r.case, r.mode, r.compared_in) for r in report.results] == [
        ("many", "inference", "evaluation"),
        ("many", "training", "training"),
    ]
    for result in report.results:
        assert len(result.rounds["torch"]) == len(result.rounds["fastseq"]) >= 5
        assert all(s > 0 for times in result.rounds.values() for s in times) and set(result.first) == {*result.rounds}
        assert result.difference < 1e-4 and not result.peak_bytes
    assert report.threads == 2 and torch.get_num_threads() == 1
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < 1
    assert type(model.lstm) is nn.LSTM and model.training and x.grad is None
    assert all(p.grad is None for p in model.parameters()) and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_an_accelerated_model_races_torchs_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type] = []
    real = bench._race
    monkeypatch.setattr(bench, "_race", lambda case, sides, *rest: (
        seen.extend(type(side.model) for side in sides), real(case, sides, *rest)
    )[1])  # fmt: skip
    compare(fastseq.nn.GRU(3, 4), torch.randn(5, 2, 3), modes=["inference"], seconds=SECONDS)
    assert seen == [nn.GRU, fastseq.nn.GRU]


def test_a_model_that_draws_is_compared_in_evaluation() -> None:
    report = compare(Many(dropout=0.5), torch.randn(6, 2, 4), modes=["training"], seconds=SECONDS)
    assert report.results[0].compared_in == "evaluation"
    assert any(note.startswith("gradients compared in evaluation") for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.TransformerEncoderLayer(8, 2, 16, 0.1)).to(dtype)
    x = torch.randn(9, 3, 8, dtype=dtype)
    assert len(compare(model, x, seconds=SECONDS).results) == 2


def test_the_kernels_that_are_called_are_named(nothing_asked_for: None) -> None:
    table = OPS["lstm"]
    kernels = {impl.name: impl.__dict__.get("kernel") for impl in table.impls}
    layer, x = fastseq.nn.LSTM(3, 4), torch.randn(5, 2, 3)
    best = table.candidates("cpu", torch.float32)[0].name
    with kernels_called() as names, fastseq.use_backend(best):
        assert not names
        layer(x)[0].sum().backward()
    assert names == {best}
    for impl in table.impls:
        assert kernels[impl.name] in (None, impl.__dict__.get("kernel"))
    with kernels_called() as names, fastseq.use_backend("reference"):
        layer(x)
    layer(x)
    assert names == {"reference"}


def test_where_no_kernel_is_called_torch_serves() -> None:
    report = compare(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(2, 3), seconds=SECONDS)
    assert [result.served_by for result in report.results] == ["torch", "torch"]
    assert bench.summary(report.explanation) == "the model has no sequence layers that fastseq knows"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.lstm.bias_ih_l0.data.add_(0.01), "fastseq: output.logits is wrong."),
        (lambda m: m.lstm.weight_ih_l0.data.mul_(1.001), "fastseq: output.logits is wrong."),
        (
            lambda m: m.register_forward_hook(lambda _, x, y: replace(y, logits=y.logits.double())),
            "It is float64 [6, 2, 5], torch's float32 [6, 2, 5].",
        ),
        (lambda m: m.lstm.register_forward_hook(lambda _, x, y: (y[0] / 0, y[1])), "output.logits is wrong."),
        (lambda m: m.lstm.register_forward_hook(lambda *_: 1 / 0), "the accelerated model raised where torch's did"),
    ],
)
@pytest.mark.parametrize("mode", bench.MODES)
def test_wrong_outputs_are_refused(mode: str, change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_if(monkeypatch, change)
    monkeypatch.setattr(bench, "take_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongResultsError) as caught:
        compare(Many(), torch.randn(6, 2, 4), modes=[mode])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_wrong_gradients_are_refused(name: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_if(monkeypatch, lambda m: getattr(m.lstm, name).register_hook(lambda grad: grad * 1.05))
    with pytest.raises(WrongResultsError, match=f"the gradient of lstm.{name} is wrong. It is 0.05 of its norm away"):
        compare(Many(dropout), torch.randn(6, 2, 4), seconds=SECONDS)


def test_what_is_as_right_as_torch_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ill-conditioned results may differ by more than usual, as long as torch's own are as far from the exact ones."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return ((1e4 + self.linear(x)) - 1e4) * 5

    rounds_otherwise = lambda m: m.register_forward_hook(lambda _, x, y: y + 1e-4 * y.sign())  # noqa: E731
    wrong_if(monkeypatch, rounds_otherwise)
    compare(Cancels(), torch.randn(50, 4), modes=["inference"], seconds=SECONDS)
    with pytest.raises(WrongResultsError):
        compare(nn.Linear(4, 4), torch.randn(50, 4), modes=["inference"], seconds=SECONDS)


def test_small_outputs_are_held_against_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    likely = nn.Sequential(nn.Linear(4, 60000), nn.Softmax(-1))
    compare(likely, torch.randn(2, 4), modes=["inference"], seconds=SECONDS)
    wrong_if(monkeypatch, lambda m: m.register_forward_hook(lambda _, x, y: y * 0.9))
    with pytest.raises(WrongResultsError):
        compare(likely, torch.randn(2, 4), modes=["inference"], seconds=SECONDS)


def test_padding_that_a_model_returns_is_explained() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=torch.arange(5).expand(2, -1) > 2)

    with pytest.raises(WrongResultsError, match=r"src_key_padding_mask leaves out is zeros in fastseq's output"):
        compare(Returns(), torch.randn(2, 5, 8), modes=["training"], seconds=SECONDS)


@pytest.mark.parametrize(
    ("error", "message", "model", "inputs", "options"),
    [
        (TypeError, "model must be a torch.nn.Module, got dict", {}, torch.ones(1), {}),
        (
            ValueError,
            "modes must be of inference and training, got ['both']",
            Many(),
            torch.ones(1),
            dict(modes=["both"]),
        ),
        (ValueError, "seconds must be positive, got 0", Many(), torch.ones(1), dict(seconds=0)),
        (ValueError, "threads must be positive, got 0", Many(), torch.ones(1), dict(threads=0)),
        (UsageError, "the model, called with float32 [6, 2, 3], raised RuntimeError", Many(), torch.ones(6, 2, 3), {}),
        (UsageError, "the model, called with no tensors, raised TypeError", Many(), (), {}),
        (UsageError, "the model has nothing to train", Many().requires_grad_(False), torch.ones(6, 2, 4), {}),
        (UsageError, "output.logits is NaN throughout", Many(), torch.full((6, 2, 4), torch.nan), {}),
        (
            UsageError,
            "there is no tensor in the model's output",
            _Says(),
            torch.ones(2),
            dict(modes=["inference"]),
        ),
        (UsageError, "the inputs cannot be copied", Many(), torch.ones(6, 2, 4, requires_grad=True) * 2, {}),
    ],
    ids=str,
)
def test_what_cannot_be_compared(error: Any, message: str, model: Any, inputs: Any, options: dict) -> None:
    with pytest.raises(error) as caught:
        compare(model, inputs, **options)
    assert message in str(caught.value)


def test_a_models_own_error_keeps_its_words() -> None:
    with pytest.raises(UsageError, match=r"input.size\(-1\) must be equal to input_size"):
        compare(nn.LSTM(4, 5), torch.ones(6, 2, 3))


def test_rounds_are_pairs_in_random_order_by_the_seed() -> None:
    orders: dict[int, list[str]] = {}
    for seed in (1, 1 + 10, 1):
        calls: list[str] = []
        names = ("torch", "fastseq")
        times = bench.take_turns({n: partial(calls.append, n) for n in names}, Effort(0, 20, 20), seed=seed)
        assert {name: len(rounds) for name, rounds in times.items()} == dict.fromkeys(names, 20)
        turns = calls[-40:]
        assert all(set(turns[k : k + 2]) == set(names) for k in range(0, 40, 2))
        assert orders.setdefault(seed, turns) == turns
    assert orders[1] != orders[11] and len({tuple(orders[1][k : k + 2]) for k in range(0, 40, 2)}) == 2


def test_a_ratio_is_the_median_of_pairs() -> None:
    result = result_of("LSTM", "training", [2.0, 9.0, 4.0, 4.0, 8.0], [1.0, 3.0, 4.0, 2.0, 2.0])
    assert result.seconds == {"torch": 4.0, "fastseq": 2.0} and result.quartiles == (2.0, 2.0, 3.0)
    assert result_of("LSTM", "training", [3.0], [2.0]).quartiles == (1.5, 1.5, 1.5)


def test_the_verdict() -> None:
    fast, slow = (
        result_of("LSTM", "inference", [4.0] * 5, [1.0] * 5),
        result_of("GRU", "training", [1.0] * 5, [1.0] * 5),
    )
    where = f"torch {torch.__version__}"
    assert Report([fast, slow], 2, "cpu").verdict == (
        f"fastseq is 2.00x as fast as {where} in the geometric mean over 2 cases on {bench.machine()}, 2 threads; "
        "slowest case: GRU, training, 1.00x"
    )
    assert Report([fast], 1, "cpu").verdict == (
        f"fastseq is 4.00x as fast in inference (quartiles 4.00 to 4.00) as {where} on {bench.machine()}, 1 thread"
    )


def test_the_verdict_where_torch_does_it_all() -> None:
    """Whatever the clock says."""
    served = result_of("model", "inference", [4.0] * 5, [1.0] * 5)
    left = replace(result_of("model", "training", [1.01] * 5, [1.0] * 5), served_by="torch")
    none = "none of fastseq's kernels is called in training"
    place = f"torch {torch.__version__} on {bench.machine()}, 1 thread"
    assert Report([left], 1, "cpu").verdict == f"{none}: all is left to {place}"
    assert Report([served, left], 1, "cpu").verdict == (
        f"fastseq is 4.00x as fast in inference (quartiles 4.00 to 4.00) as {place}; {none}"
    )


def test_a_busy_machine_shows() -> None:
    uneven = result_of("LSTM", "inference", [1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    assert any("quartiles are far apart" in note for note in Report([uneven], 1, "cpu").notes)
    even = result_of("LSTM", "inference", [4.0] * 4, [1.0] * 4)
    assert not any("quartiles are far apart" in note for note in Report([even], 1, "cpu").notes)


def test_the_command_on_a_model(folder: Path) -> None:
    output = run("mine:Tagger", "--input", "2x6:int64<9", "--threads", "2", "--json", "found.json")
    assert output.startswith("fastseq serves 1 of 2 sequence layers")
    assert "torch has own: a subclass of torch.nn.GRU: only the exact class is swapped" in output
    for word in ("ratio", "quartiles", "mine:Tagger inference", "mine:Tagger training", "first calls", "x as fast in"):
        assert word in output
    found = json.loads((folder / "found.json").read_text())
    assert found["verdict"] in output and found["threads"] == 2 and found["device"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__ and found["machine"] == bench.machine()
    assert [result["mode"] for result in found["results"]] == ["inference", "training"]
    for result in found["results"]:
        ratios = [a / b for a, b in zip(result["rounds"]["torch"], result["rounds"]["fastseq"], strict=True)]
        assert result["ratio"] == pytest.approx(statistics.median(ratios)) == pytest.approx(result["quartiles"][1])
    assert {row["layer"] for row in found["layers"]} >= {"lstm", "own"}


@pytest.mark.parametrize(("option", "mode"), [("--training", "training"), ("--inference", "inference")])
def test_one_mode_alone(option: str, mode: str, folder: Path) -> None:
    output = run("mine:made", "--input", "5x2x4", option)
    assert [f"mine:made {m}" in output for m in bench.MODES] == [m == mode for m in bench.MODES]


def test_two_arguments(folder: Path) -> None:
    (folder / "mine.py").write_text(MODELS + "\nattention = nn.MultiheadAttention(8, 2)")
    output = run("mine:attention", *["--input", "5x2x8"] * 3, "--inference")
    assert "fastseq serves 1 of 1 sequence layers" in output


def test_the_quick_set(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cases = {case.name: case for case in quick.CASES}
    assert len({str(case) for case in cases.values()}) == len(cases) >= 12
    for name in ("LSTM streaming", "RNN", "Encoder"):
        monkeypatch.setattr(quick, "CASES", [cases[name]])
        output = run("--inference", "--json", "found.json")
        assert f"{cases[name]} inference" in output
        assert "x as fast in inference" in output and "fastseq serves" not in output
        assert json.loads(Path("found.json").read_text())["layers"] is None


def test_the_quick_sets_padding_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        Case("packed", lambda: quick._Packed(quick._recurrent(nn.LSTM, 8)), (4, 8, 8)),
        Case("padded", lambda: quick._Padded(quick._encoder(8, 2, 1)), (4, 8, 8)),
        Case("dropout", lambda: quick._SelfAttention(quick._attention(8, 2, 0.1), causal=8), (4, 8, 8), ("training",)),
    ]
    monkeypatch.setattr(quick, "CASES", cases)
    output = run("--threads", "1")
    assert "in the geometric mean over 5 cases" in output and "slowest case: " in output
    assert "since the model draws in training: padded 4x8x8, dropout 4x8x8" in output


def test_wrong_results_end_with_1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_if(monkeypatch, lambda m: m.weight_hh_l0.data.mul_(1.1))
    output = run("mine:made", "--input", "5x2x4", "--json", "found.json", code=1)
    assert output.startswith("fastseq bench: fastseq: output.0 is wrong. Tensor-likes are not close!")
    assert not Path("found.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine", "--input", "1"], "'mine' is no model: it must be module:attribute, like my_module:make_model"),
        (["mine:", "--input", "1"], "'mine:' is no model"),
        (["absent:model", "--input", "1"], "there is no module 'absent' in "),
        (["mine.sub:model", "--input", "1"], "mine.sub"),
        (
            ["unfinished:x", "--input", "1"],
            "unfinished cannot be imported: ModuleNotFoundError: No module named 'nowhere",
        ),
        (["raises:x", "--input", "1"], "raised ZeroDivisionError: division by zero (raises.py, line 2)"),
        (["mine:absent", "--input", "1"], "module mine has no attribute 'absent'; it has Tagger"),
        (
            ["mine:number", "--input", "1"],
            "mine:number must be a torch.nn.Module or a callable that makes one, it is int",
        ),
        (["mine:strange", "--input", "1"], "mine:strange must return a torch.nn.Module, it returned list"),
        (["mine:broken", "--input", "1"], "mine:broken, called without arguments, raised KeyError: 'weights' (mine.py"),
        (["mine:made"], "mine:made needs an --input for each of its arguments; an input is SHAPE[:DTYPE[<HIGH]]"),
        (["mine:made", "--input", "5x2x"], "'5x2x' is no input: an input is SHAPE"),
        (["mine:made", "--input", "5,2,4"], "'5,2,4' is no input"),
        (["mine:made", "--input", "5x2x4:float23"], "there is no dtype 'float23'; there are float32, float64"),
        (["mine:made", "--input", "5:float32<9"], "only integers have a bound, not float32"),
        (["mine:made", "--input", "5:int8<999"], "the bound must be from 1 to 127 for int8"),
        (["mine:made", "--input", "9999999x9999999"], "inputs of 9999999x9999999 cannot be made: RuntimeError"),
        (
            ["mine:made", "--input", "5x2x3"],
            "called with float32 [5, 2, 3], raised RuntimeError: input.size(-1)",
        ),
        (["mine:made", "--input", "5x2x4:int64<3"], "the model, called with int64 [5, 2, 4], raised"),
        (["mine:frozen", "--input", "5x2x4"], "it can be measured in inference alone"),
        (["--input", "5x2x4"], "--input is for a model of yours"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--threads", "0"], "--threads must be positive, got 0"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--json", "nowhere/found.json"], "there is no such folder"),
        (["--json", "."], "it is a folder"),
    ],
    ids=str,
)
def test_bad_input_ends_with_2(arguments: list[str], message: str, folder: Path) -> None:
    assert message in run(*arguments, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert "--device cuda: there is no NVIDIA GPU that torch can use" in run("--device", "cuda", code=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(folder: Path) -> None:
    output = run("mine:Tagger", "--input", "2x6:int64<9", "--device", "cuda", "--json", "found.json")
    assert "MiB" in output
    results = json.loads(Path("found.json").read_text())["results"]
    assert all(peak > 0 for result in results for peak in result["peak_bytes"].values())


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "values"),
    [
        ("32x128", (32, 128), torch.float32, None),
        ("7", (7,), torch.float32, None),
        ("3x4:bfloat16", (3, 4), torch.bfloat16, None),
        ("50x20:int64<1000", (50, 20), torch.int64, range(1000)),
        ("50:int32", (50,), torch.int32, range(2)),
        ("50:bool", (50,), torch.bool, range(2)),
    ],
)
def test_inputs(text: str, shape: tuple, dtype: torch.dtype, values: range | None) -> None:
    spec = asked.Input.parse(text)
    (x,) = asked.make_inputs([spec], "cpu", seed=3)
    assert x.shape == shape and x.dtype == dtype
    assert torch.equal(x, asked.make_inputs([spec], "cpu", seed=3)[0])
    if values is not None:
        assert set(x.flatten().tolist()) <= set(values)
        assert x.max() > 0.9 * max(values)
    if values is None or len(values) > 2:
        assert not torch.equal(x, asked.make_inputs([spec], "cpu", seed=4)[0])


def test_weights_are_the_seeds(folder: Path) -> None:
    first, same, other = (asked.load("mine:Tagger", seed).output.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_from_a_shell(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "fastseq", "bench", "mine:made", "--input", "5x2x4", "--seconds", "0.01"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "x as fast in inference" in done.stdout
    command[4] = "mine:gone"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "fastseq bench: module mine has no attribute 'gone'; it has Tagger, frozen, strange, broken\n"
