"""The programs in examples/ run, and the comparison that they print would notice a wrong layer."""

import gzip
import os
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import typer
from conftest import EXAMPLES, example

import fastseq

CHAR_LM = EXAMPLES / "char_lm.py"
TINY = {"steps": 6, "batch": 2, "length": 8, "hidden": 16, "chars": 20}


@pytest.fixture(scope="module")
def char_lm():
    return example("char_lm")


def run(path, **options):
    """What a program prints; it must end well."""
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, path, *words],
        env={**os.environ, "PYTHONUTF8": "1"},  # tables and bars are drawn with characters beyond ASCII
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_plot(path, printed):
    if find_spec("matplotlib"):
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib is not installed" in printed


def test_char_lm_runs(tmp_path):
    plot = tmp_path / "plots" / "char_lm.png"
    printed = run(CHAR_LM, **TINY, out=plot)
    for line in (
        "the loss curves are equal",
        "time per training step: torch",
        "served by",
        "20 characters by the accelerated model",
        "time per character: torch",
    ):
        assert line in printed
    assert_plot(plot, printed)


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


DATES = {"pairs": 60, "test": 12, "epochs": 2, "batch": 8, "hidden": 16}
IMAGES = {"epochs": 2, "batch": 16, "hidden": 16}


@pytest.fixture
def needs_demo():
    for extra in ("babel", "safetensors", "sklearn"):
        pytest.importorskip(extra)


@pytest.fixture
def fashion(tmp_path):
    """A folder like Fashion-MNIST's: images that are bright in a corner or dark, and which of it."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for part, count in (("train", 48), ("t10k", 16)):
        labels = torch.arange(count, dtype=torch.uint8) % 2
        images = torch.randint(40, (count, 28, 28), dtype=torch.uint8)
        images[:, :14, :14] += 200 * labels.view(-1, 1, 1)
        for name, tensor in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, tensor.dim())) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
            packed = gzip.compress(header + tensor.numpy().tobytes())
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(packed)
    return folder


def test_translate_dates_runs_and_goes_on(needs_demo, tmp_path, capsys):
    printed = run(EXAMPLES / "translate_dates.py", **DATES, date="vrijdag 17 mei 2024", out=tmp_path)
    names = ("plain", "bahdanau", "luong", "transformer")
    for name in names:
        assert f"{name} epoch 2: loss " in printed
        assert (tmp_path / f"{name}.safetensors").is_file()
    assert "exact match" in printed and "vrijdag 17 mei 2024 → " in printed
    for plot in ("training", "attention"):
        assert_plot(tmp_path / f"{plot}.png", printed)

    table = [line for line in printed.splitlines() if line.startswith("│")]
    example("translate_dates").main(**DATES, out=tmp_path)
    again = capsys.readouterr().out
    for name in names:
        assert f"{name}: goes on from {tmp_path / name}.safetensors, after 16 steps" in again
    assert " epoch " not in again.replace("seconds per epoch", "")
    assert [line for line in again.splitlines() if line.startswith("│")] == table  # the same figures


def test_classify_digits_runs(needs_demo, fashion, tmp_path):
    out = tmp_path / "out"
    printed = run(EXAMPLES / "classify_digits.py", **IMAGES, data=fashion, out=out)
    for name in ("cnn", "rnn", "transformer"):
        assert f"{name} epoch 2: loss " in printed
        assert (out / f"{name}.safetensors").is_file()
    assert "test accuracy" in printed
    assert_plot(out / "training.png", printed)


@pytest.mark.parametrize("kind", ["cnn", "rnn", "transformer"])
def test_classifiers_learn(needs_demo, fashion, tmp_path, kind):
    digits = example("classify_digits")
    images = example("datasets").read_images(fashion)
    options = example("training").Options(epochs=10, batch=8, hidden=16)
    trained = digits.train(digits.Kind(kind), images, options, tmp_path)
    assert trained.history[-1].score == 1
    assert trained.history[-1].loss < 1 < trained.history[0].loss


@pytest.mark.parametrize("kind", ["plain", "bahdanau", "luong", "transformer"])
def test_translators_learn(needs_demo, tmp_path, monkeypatch, kind):
    """A few dates by heart."""
    translating = example("translate_dates")
    monkeypatch.setattr(translating, "LEARNING_RATE", 0.01)
    dates = translating.Dates(8, 4, seed=0)
    options = example("training").Options(epochs=100, batch=8, hidden=64)
    trained = translating.train(translating.Kind(kind), dates, options, tmp_path)
    said = translating.translate(trained.model, dates, [pair.text for pair in dates.train.pairs])
    assert translating.exact(said, dates.train.pairs) == 1
    assert translating.translate(trained.model, dates, [pair.text for pair in dates.train.pairs], beam=3) == said
    if kind in ("bahdanau", "luong"):
        said, weights = translating.attention(trained.model, dates, dates.train.pairs[0].text)
        assert said == [*dates.train.pairs[0].iso, "end"]
        assert weights.shape == (11, len(dates.train.pairs[0].text))
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(11))


@pytest.mark.parametrize("kind", ["plain", "bahdanau", "luong"])  # a Transformer's dropout draws otherwise in torch
def test_twins_train_alike(needs_demo, tmp_path, kind):
    translating = example("translate_dates")
    dates = translating.Dates(32, 4, seed=0)
    options = example("training").Options(epochs=2, batch=8, hidden=16)
    ours, theirs = (
        translating.train(translating.Kind(kind), dates, options, tmp_path, library=library)
        for library in (translating.models, translating.twins())
    )
    assert type(ours.model) is not type(theirs.model)
    assert (tmp_path / f"{kind}-torch.safetensors").is_file()
    assert len(ours.losses) == 8
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-4)


def test_exact_counts_whole_dates(needs_demo):
    pair = example("datasets").DatePair("17 mei 2024", "2024-05-17", "nl", "d MMM y")
    assert example("translate_dates").exact(["2024-05-17", "2024-05-1", "2024-05-18", ""], [pair] * 4) == 0.25


def assert_fails(call, capsys, message, code=1):
    with pytest.raises(typer.Exit) as exit_:
        call()
    printed = capsys.readouterr().out
    assert exit_.value.exit_code == code
    assert message in printed and "Traceback" not in printed


def test_programs_fail_with_a_sentence(needs_demo, fashion, tmp_path, capsys, monkeypatch):
    classify, translate = example("classify_digits"), example("translate_dates")
    out = tmp_path / "out"

    def images(**options):
        return lambda: classify.main(**{**IMAGES, "model": [classify.Kind.RNN], "data": fashion, "out": out, **options})

    assert_fails(images(data=tmp_path / "none"), capsys, "none: no such folder")
    monkeypatch.setattr(translate, "TWINS", tmp_path / "twins.py")
    assert_fails(lambda: translate.main(**DATES, torch_too=True, out=out), capsys, "--torch needs")
    assert not out.exists()

    hidden = {**DATES, "hidden": 18}
    for options, name in ((hidden, "hidden"), ({**DATES, "date": " "}, "date")):
        with pytest.raises(typer.BadParameter) as error:
            translate.main(**options, out=out)
        assert error.value.param_hint == f"--{name}"

    images()()
    path = out / "rnn.safetensors"
    whole = path.read_bytes()
    assert_fails(images(epochs=3), capsys, "it has epochs=2 where this run has epochs=3. Nothing was changed; --fresh")
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    assert_fails(images(), capsys, f"{path} is no whole safetensors file")
    assert path.read_bytes() == whole[:-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(classify.Trainer, "step", interrupt)
        assert_fails(images(fresh=True), capsys, "interrupted: the same command goes on", code=130)
    assert path.read_bytes() == whole[:-1]
    images(epochs=3, fresh=True)()
    assert "rnn epoch 3: loss" in capsys.readouterr().out and path.read_bytes()[:-1] != whole[:-1]
