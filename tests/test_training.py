"""The examples' training loop: an interrupted run ends as a whole one, and no file is lost or trusted blindly."""

import os
import random

import pytest
import torch
from conftest import example
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import fastseq

pytest.importorskip("safetensors")
training = example("training")

LENGTHS = [3, 9, 4, 7, 5, 9, 2, 8, 6, 3, 5, 4]  # 12 samples: 3 batches of 4 in an epoch
CONFIG = {"hidden": 8, "betas": [0.9, 0.99]}


class Tagger(nn.Module):
    """Dropout draws from torch's generator; the head is tied to the embedding."""

    def __init__(self, hidden=8):
        super().__init__()
        self.embedding = nn.Embedding(11, hidden)
        self.lstm = fastseq.nn.LSTM(hidden, hidden, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(hidden, 11)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.dropout(self.lstm(self.embedding(ids))[0]))


def trainer(path=None, hidden=8, config=CONFIG, **options):
    torch.manual_seed(3)
    random.seed(3)
    model = Tagger(hidden)
    data = [torch.randint(1, 11, (length,)) for length in LENGTHS]
    loss = fastseq.nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=0)

    def mean_loss(ids):
        assert random.random() < 1  # Python's generator moves on, too
        return loss(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    sampler = training.BucketSampler(LENGTHS, batch_size=4, seed=1, pool=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99))
    return training.Trainer(
        model,
        mean_loss,
        training.load(data, sampler, lambda rows: pad_sequence(rows, batch_first=True)),
        optimizer,
        training.warmup_cosine(optimizer, steps=6),
        checkpoint=path,
        config=config,
        **options,
    )


def interrupt(run, after):
    """Lets the run be interrupted, as by Ctrl-C, within the step that follows so many."""
    whole = run.loss

    def loss(batch):
        if len(run.losses) == after:
            raise KeyboardInterrupt
        return whole(batch)

    run.loss = loss
    with pytest.raises(KeyboardInterrupt):
        run.fit(2, save_every=1)


def assert_equal_runs(ours, theirs):
    assert ours.losses == theirs.losses and len(ours.losses) == 6
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    for index, values in theirs.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(ours.optimizer.state_dict()["state"][index][name], value), (index, name)
    assert ours.optimizer.state_dict()["param_groups"] == theirs.optimizer.state_dict()["param_groups"]
    assert ours.scheduler.state_dict() == theirs.scheduler.state_dict()
    assert [epoch.loss for epoch in ours.history] == [epoch.loss for epoch in theirs.history]


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_resumed_run_is_bit_equal(tmp_path, after, bfloat16):
    whole = trainer(bfloat16=bfloat16)
    whole.fit(2)
    draws = torch.rand(3), random.random()

    interrupt(trainer(tmp_path / "run.safetensors", bfloat16=bfloat16), after)
    torch.manual_seed(99)
    random.seed(99)
    resumed = trainer(tmp_path / "run.safetensors", bfloat16=bfloat16)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.fill_(7)
    assert resumed.resume()
    assert len(resumed.losses) == after
    resumed.fit(2)
    assert_equal_runs(resumed, whole)
    assert torch.equal(torch.rand(3), draws[0]) and random.random() == draws[1]


def test_autocast_changes_the_losses():
    plain, half = trainer(), trainer(bfloat16=True)
    plain.fit(1)
    half.fit(1)
    assert plain.losses != half.losses
    assert half.losses[0] == pytest.approx(plain.losses[0], rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())


def test_training_lowers_the_loss_and_clips():
    run = trainer(max_gradient_norm=1e-3)
    norms = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(nn.utils.get_total_norm([p.grad for p in run.model.parameters()]))
    )
    history = run.fit(2, evaluate=lambda: float(not run.model.training and not torch.is_grad_enabled()))
    assert history[1].loss < history[0].loss
    assert [epoch.score for epoch in history] == [1, 1]
    assert max(norms) <= 1.001e-3


def test_a_run_without_a_checkpoint_begins(tmp_path):
    assert not trainer().resume()
    assert not trainer(tmp_path / "none.safetensors").resume()


def test_a_finished_run_has_its_history(tmp_path):
    run = trainer(tmp_path / "run.safetensors")
    run.fit(2, evaluate=lambda: 0.5)
    again = trainer(tmp_path / "run.safetensors")
    assert again.resume()
    assert again.fit(2) == run.history
    assert len(again.losses) == 6


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    path = tmp_path / "run.safetensors"
    run = trainer(path)
    run.fit(1)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="no space left"):
            run.fit(2)
    assert path.read_bytes() == before
    resumed = trainer(path)
    assert resumed.resume()
    resumed.fit(2)
    whole = trainer()
    whole.fit(2)
    assert_equal_runs(resumed, whole)


def damaged(kind, path):
    data = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "a bit flipped":
        at = len(data) - 100  # in the tensors' bytes
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif kind == "another state":
        assert b'\\"epoch\\": 1,' in data
        path.write_bytes(data.replace(b'\\"epoch\\": 1,', b'\\"epoch\\": 0,'))
    elif kind == "text":
        path.write_text("this is no checkpoint\n" * 100)
    elif kind == "torch's":
        torch.save({"a": torch.zeros(2)}, path)
    elif kind == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "a folder":
        path.unlink()
        path.mkdir()


MESSAGES = {
    "empty": "no whole safetensors file",
    "truncated": "no whole safetensors file",
    "a bit flipped": "damaged",
    "another state": "damaged",
    "text": "no whole safetensors file",
    "torch's": "no whole safetensors file",
    "foreign": "no checkpoint of this loop",
    "a folder": "no whole safetensors file",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_bad_checkpoint_is_refused_and_stays(tmp_path, kind):
    path = tmp_path / "run.safetensors"
    trainer(path).fit(1)
    damaged(kind, path)
    before = path.read_bytes() if path.is_file() else None
    run = trainer(path)
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(training.CheckpointError, match=MESSAGES[kind]) as error:
        run.resume()
    assert str(path) in str(error.value)
    assert before is None or path.read_bytes() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())
    assert run.losses == [] and run.epoch == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": {**CONFIG, "hidden": 16}}, "hidden=8 where this run has hidden=16"),
        ({"config": {**CONFIG, "seed": 1}}, "seed=None where this run has seed=1"),
        ({"hidden": 16}, r"embedding.weight is \[11, 8\] torch.float32 there, \[11, 16\] torch.float32 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, options, message):
    path = tmp_path / "run.safetensors"
    trainer(path).fit(1)
    before = path.read_bytes()
    run = trainer(path, **options)
    with pytest.raises(training.CheckpointError, match=message):
        run.resume()
    assert path.read_bytes() == before and run.losses == []


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    path = tmp_path / "run.safetensors"
    run = trainer(path)
    run.fit(1)
    before = path.read_bytes()
    whole = run.loss
    run.loss = lambda batch: whole(batch) * float("nan")
    with pytest.raises(FloatingPointError, match="loss of step 4 is nan"):
        run.fit(2)
    assert path.read_bytes() == before


def test_buckets_cover_every_sample_once_and_pad_less():
    generator = random.Random(0)
    lengths = [generator.randint(1, 60) for _ in range(1003)]
    sampler = training.BucketSampler(lengths, batch_size=16, seed=5, pool=20)

    def padding(batches):
        return sum(max(lengths[i] for i in batch) - lengths[i] for batch in batches for i in batch)

    epochs = []
    for sampler.epoch in range(3):
        batches = list(sampler)
        assert len(batches) == len(sampler) == 63
        assert sorted(i for batch in batches for i in batch) == list(range(1003))
        assert sorted(map(len, batches))[1:] == [16] * 62
        shuffled = random.Random(0).sample(range(1003), 1003)
        plain = [shuffled[i : i + 16] for i in range(0, 1003, 16)]
        assert padding(batches) < 0.2 * padding(plain)
        assert [max(lengths[i] for i in batch) for batch in batches] != sorted(
            max(lengths[i] for i in batch) for batch in batches
        )
        epochs.append(batches)
    assert epochs[0] != epochs[1] != epochs[2]
    sampler.epoch, sampler.position = 1, 7
    assert list(sampler) == epochs[1][7:]
    sampler.seed = 6
    assert list(sampler) != epochs[1][7:]


@pytest.mark.parametrize("options, name", [({"batch_size": 0}, "batch_size"), ({"batch_size": 2, "pool": 0}, "pool")])
def test_bucket_sizes_must_be_positive(options, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        training.BucketSampler([1, 2], **options)
    with pytest.raises(ValueError, match="lengths"):
        training.BucketSampler([], 2)


def test_the_learning_rate_rises_and_falls():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = training.warmup_cosine(optimizer, steps=20, warmup=0.2)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.05
