"""The training loop of the examples: torch's optimizers, schedulers and loaders, rich's progress, safetensors' files.

A run that was interrupted goes on from its last checkpoint, and ends with the bits that it would have ended with: the
checkpoint holds the model, the optimizer, the scheduler, the states of the random generators and the place in the data.
"""

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

FORMAT = "fastseq training 1"


class CheckpointError(RuntimeError):
    """A file is no checkpoint from which this run can go on; the message says why. Nothing has been changed."""


class BucketSampler(Sampler[list[int]]):
    """Batches of samples of similar length: little padding, and yet other batches in each epoch.

    An epoch's samples are shuffled, sorted by length within pools of some batches, cut into batches, and the batches
    are shuffled. It depends on the seed and the epoch alone, so that `epoch` and `position` say where a run stands.

    Args:
        lengths: each sample's length; where all are equal, this is a plain shuffle.
        batch_size: samples in a batch; an epoch's last may have fewer.
        seed: of the order.
        pool: batches that are sorted together. More of them pad less, and mix less.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int = 0, pool: int = 50) -> None:
        for name, value in (("batch_size", batch_size), ("pool", pool), ("len(lengths)", len(lengths))):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool = pool
        self.epoch = 0
        self.position = 0  # batches of the epoch that are passed over

    def __len__(self) -> int:
        """The batches in an epoch."""
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # A string of both: their sum would repeat one seed's orders with the next seed.
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        lengths = self.lengths.tolist()
        batches = []
        for start in range(0, len(order), self.pool * self.batch_size):
            pool = sorted(order[start : start + self.pool * self.batch_size], key=lengths.__getitem__)
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        generator.shuffle(batches)
        yield from batches[self.position :]


def load(dataset: Dataset, sampler: BucketSampler, collate: Callable[[list[Any]], Any] | None = None) -> DataLoader:
    """A loader of the sampler's batches.

    It has a generator of its own: each pass over a loader draws a seed for its workers, from torch's global generator
    otherwise, and a resumed run makes one pass more.
    """
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, generator=torch.Generator())


def digest(*parts: bytes) -> str:
    """Tells one run's data from another's, in its config."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: float = 0.1) -> LambdaLR:
    """The learning rate rises over the first `warmup` of the steps and falls as half a cosine over the rest."""
    first = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / first
        return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))

    return LambdaLR(optimizer, factor)


class Options(NamedTuple):
    """What an example's user may choose that changes what is computed."""

    epochs: int
    batch: int
    hidden: int
    seed: int = 0
    bfloat16: bool = False


@dataclass
class Epoch:
    """What is known of an epoch: its mean loss, what `evaluate` gave, and the seconds of its training steps."""

    loss: float
    score: float
    seconds: float


@dataclass
class Trainer:
    """Trains a model, and remembers how.

    Attributes:
        model: the module that is trained.
        loss: called with a batch of the loader, gives the mean loss.
        loader: made by `load`.
        optimizer: of the model's parameters.
        scheduler: stepped after each batch.
        max_gradient_norm: gradients are scaled down to this norm.
        bfloat16: whether the loss is computed under torch.autocast in bfloat16; parameters stay as they are.
        checkpoint: the file to write, and to go on from; None for a run that keeps nothing.
        config: what makes this run what it is, of JSON's types: a checkpoint of another config is refused.
    """

    model: nn.Module
    loss: Callable[[Any], Tensor]
    loader: DataLoader
    optimizer: Optimizer
    scheduler: LRScheduler | None = None
    max_gradient_norm: float = 1.0
    bfloat16: bool = False
    checkpoint: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)

    epoch: int = field(default=0, init=False)  # epochs done
    position: int = field(default=0, init=False)  # batches done of the next one
    seconds: float = field(default=0.0, init=False)  # spent on those
    losses: list[float] = field(default_factory=list, init=False)  # of each step so far
    history: list[Epoch] = field(default_factory=list, init=False)  # of each epoch so far

    def fit(
        self,
        epochs: int,
        evaluate: Callable[[], float] | None = None,
        *,
        name: str = "",
        score: str = "accuracy",
        save_every: int = 200,
        console: Console | None = None,
    ) -> list[Epoch]:
        """Trains until so many epochs are done, those before a resumption included.

        Args:
            epochs: how many there shall be in all.
            evaluate: called after each epoch, with the model in evaluation and without gradients, for a score in 0..1.
            name: of the run, for the progress bar.
            score: what the score is called.
            save_every: steps between two checkpoints; there is also one after each epoch.
            console: where progress is shown; None for nowhere.

        Returns:
            The history.

        Raises:
            FloatingPointError: a loss is not finite. The checkpoint is older than that.
        """
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
        )
        sampler = self.loader.batch_sampler
        total = epochs * len(self.loader)
        # The bar's thread may only draw now and then: it competes with the steps for the cores.
        with Progress(*columns, console=console or Console(quiet=True), refresh_per_second=2) as progress:
            bar = progress.add_task(name, total=total, completed=len(self.losses), loss=(self.losses or [0])[-1])
            while self.epoch < epochs:
                sampler.epoch, sampler.position = self.epoch, self.position
                for batch in self.loader:
                    self.step(batch)
                    progress.update(bar, advance=1, loss=self.losses[-1])
                    if self.checkpoint is not None and self.position % save_every == 0:
                        self.save()
                done = self._end_epoch(evaluate)
                told = f"{score} {done.score:.2%}, " if evaluate else ""
                progress.console.print(
                    f"{name} epoch {self.epoch}: loss {done.loss:.4f}, {told}{done.seconds:.1f} s of training"
                )
        return self.history

    def step(self, batch: Any) -> None:
        """One update of the parameters."""
        start = perf_counter()
        self.model.train()
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss(batch)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {len(self.losses) + 1} is {value}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.losses.append(value)
        self.position += 1
        self.seconds += perf_counter() - start

    def _end_epoch(self, evaluate: Callable[[], float] | None) -> Epoch:
        self.model.eval()
        with torch.no_grad():
            score = evaluate() if evaluate is not None else math.nan
        losses = self.losses[-self.position :]
        self.history.append(Epoch(sum(losses) / len(losses), score, self.seconds))
        self.epoch, self.position, self.seconds = self.epoch + 1, 0, 0.0
        if self.checkpoint is not None:
            self.save()
        return self.history[-1]

    def save(self) -> None:
        """Writes the checkpoint: the file of before stays whole until the new one is."""
        optimizer = self.optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items() if value is not None}
        tensors["random.torch"] = torch.get_rng_state()
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        state = {
            "config": self.config,
            "optimizer": optimizer["param_groups"],
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "random": random.getstate(),
            "epoch": self.epoch,
            "position": self.position,
            "seconds": self.seconds,
            "history": [vars(epoch) for epoch in self.history],
        }
        write_checkpoint(self.checkpoint, tensors, state)

    def resume(self) -> bool:
        """Goes on from the checkpoint; False if there is none yet.

        Raises:
            CheckpointError: the file is none of ours, is damaged, or is of another model or config.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        tensors, state = read_checkpoint(self.checkpoint)
        self._require_own(tensors, state)
        values: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            values.setdefault(int(index), {})[key] = tensor
        # JSON has no tuples (betas).
        groups = [
            {
                key: tuple(value) if key != "params" and isinstance(value, list) else value
                for key, value in group.items()
            }
            for group in state["optimizer"]
        ]
        self.optimizer.load_state_dict({"state": values, "param_groups": groups})
        self.model.load_state_dict(_under("model.", tensors))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(tensors["random.torch"])
        torch.cuda.set_rng_state_all(list(_under("random.cuda.", tensors).values())[: torch.cuda.device_count()])
        version, internal, gauss = state["random"]
        random.setstate((version, tuple(internal), gauss))
        self.epoch, self.position, self.seconds = state["epoch"], state["position"], state["seconds"]
        self.losses = tensors["losses"].tolist()
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        return True

    def _require_own(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        theirs = state["config"]
        ours = json.loads(json.dumps(self.config))
        differing = [
            f"{key}={theirs.get(key)!r} where this run has {key}={ours.get(key)!r}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        if differing:
            raise CheckpointError(f"{self.checkpoint} is of another run: it has {', '.join(differing)}")
        saved = {name: (tuple(t.shape), t.dtype) for name, t in _under("model.", tensors).items()}
        own = {name: (tuple(t.shape), t.dtype) for name, t in self.model.state_dict().items()}
        for name in sorted(saved.keys() | own.keys()):
            if saved.get(name) != own.get(name):
                raise CheckpointError(
                    f"{self.checkpoint} is of another model: {name} is {_kind(saved.get(name))} there, "
                    f"{_kind(own.get(name))} here"
                )
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise CheckpointError(f"{self.checkpoint} is of another run: only one of both has a scheduler")


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes tensors, and a state of JSON's types, as one safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    # Clones, since safetensors refuses tensors that share memory: tied weights have two names.
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    text = json.dumps(state)
    data = save(tensors, metadata={"format": FORMAT, "state": text, "digest": _digest(tensors, text)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut could leave the new name on contents that were never written
    os.replace(partial, path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_checkpoint` wrote.

    Raises:
        CheckpointError: the file cannot be read, is no checkpoint of ours, or is not as it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of this loop (format {metadata.get('format')!r}, not {FORMAT!r})"
        )
    text = metadata.get("state", "")
    if metadata.get("digest") != _digest(tensors, text):
        raise CheckpointError(f"{path} is damaged: its contents are not those that were written")
    return tensors, json.loads(text)


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    """A safetensors file has no checksum, and a flipped bit in a weight would train on silently."""
    parts: list[Any] = [text.encode()]
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), tensor.flatten().view(torch.uint8).numpy()]
    return digest(*parts)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _kind(shape_and_dtype: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if shape_and_dtype is None else f"{list(shape_and_dtype[0])} {shape_and_dtype[1]}"


@contextmanager
def exit_with_message(console: Console, *errors: type[Exception]) -> Iterator[None]:
    """Ends a command with a sentence, instead of a traceback, for what its user can do something about.

    Args:
        console: where the sentence goes.
        errors: further exceptions whose message is one.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message, code = f"{error}: pip install 'fastseq[demo]'", 1
    except CheckpointError as error:
        message, code = f"{error}. Nothing was changed; --fresh begins anew, --out names another folder", 1
    except (FloatingPointError, OSError, *errors) as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted: the same command goes on from the last checkpoint", 130
    else:
        return
    console.print(message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(code)


def require_multiple_of_4(hidden: int) -> None:
    """For Transformers with four heads."""
    if hidden % 4:
        raise typer.BadParameter(f"must be a multiple of 4, got {hidden}", param_hint="--hidden")


def plot_histories(runs: dict[str, Trainer], score: str, path: Path, console: Console) -> None:
    """Draws each run's loss by step and its score by epoch, side by side."""
    pyplot = import_pyplot(console)
    if pyplot is None:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, run in runs.items():
        losses = torch.tensor(run.losses)
        width = max(1, len(losses) // 100)
        means = losses.unfold(0, width, width).mean(dim=-1)
        left.plot([width * (i + 1) for i in range(len(means))], means.tolist(), label=name)
        right.plot(range(1, len(run.history) + 1), [epoch.score for epoch in run.history], marker=".", label=name)
    left.set(xlabel="step", ylabel="loss in nats", yscale="log")
    right.set(xlabel="epoch", ylabel=score)
    right.legend()
    save_figure(figure, path, console)


def import_pyplot(console: Console) -> Any:
    """matplotlib's pyplot, which draws into files; None, and a word about it, where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        console.print("no plot: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path, console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    import_pyplot(console).close(figure)
    console.print(f"plot: {path}", soft_wrap=True)
