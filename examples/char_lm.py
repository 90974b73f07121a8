"""Trains a small character-level language model on torch's LSTM and on fastseq's, and writes with both.

    python examples/char_lm.py

The model is plain torch.nn and knows nothing of fastseq; one line, `fastseq.accelerate(model)`, is the whole
change. The text is the source of Python's own standard library, so there is nothing to download.
"""

import copy
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq

VOCABULARY = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
LEARNING_RATE = 3e-3
MAX_GRADIENT_NORM = 1.0
TEMPERATURE = 0.6
CHUNK = 10  # characters that one model writes before the other takes its turn

# Two implementations of a layer round differently in float32, and each update of the weights amplifies that.
# On a small model, a rounding (1.2e-7) in every weight moved no loss of the first 50 steps by over 1e-5, and
# single ones by 1e-2 by step 200; an LSTM output wrong by 1% moved them by over 1e-3 within 5 steps. Hence a
# tight bound early, where an error shows and rounding does not, and a wide one for the whole, smoothed curve.
EARLY_STEPS, EARLY_TOLERANCE = 50, 1e-3  # nats per character
SMOOTHING, TOLERANCE = 10, 0.02  # steps in each mean; nats per character

console = Console(highlight=False)


class CharLM(nn.Module):
    """Predicts the next character: ids [B, T] to logits [B, T, vocabulary] and the state to go on from."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, len(VOCABULARY))

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.lstm(self.embedding(ids), state)
        return self.head(output), state


@dataclass
class Run:
    """One of the two trainings: its model and what was recorded at each step."""

    name: str
    model: CharLM
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        start = perf_counter()
        logits, _ = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(perf_counter() - start)


@dataclass
class Writer:
    """Writes text one character at a time: each call of the model sees one id and the state so far."""

    model: CharLM
    generator: torch.Generator
    state: tuple[Tensor, Tensor] | None = None
    text: str = "\n"
    seconds: list[float] = field(default_factory=list)

    @torch.inference_mode()
    def write(self, count: int) -> None:
        start = perf_counter()
        for _ in range(count):
            last = torch.tensor([[VOCABULARY.index(self.text[-1])]])
            logits, self.state = self.model(last, self.state)
            probabilities = torch.softmax(logits[0, 0] / TEMPERATURE, dim=-1)
            self.text += VOCABULARY[int(torch.multinomial(probabilities, 1, generator=self.generator))]
        self.seconds.append((perf_counter() - start) / count)


def read_text() -> Tensor:
    """The standard library's top-level modules as one row of ids; what the vocabulary lacks becomes "?"."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(path.read_text("utf-8", errors="replace") for path in paths)
    codes = torch.frombuffer(bytearray(re.sub(r"[^\n -~]", "?", text), "ascii"), dtype=torch.uint8)
    return (codes.long() - ord(" ") + 1).clamp(min=0)  # space is 1, "~" the last, newline clamped to 0


def train(runs: list[Run], text: Tensor, steps: int, batch: int, length: int, seed: int) -> None:
    """Trains all runs on the same batches, in turns.

    On a shared machine speed drifts within seconds, so two trainings one after the other would not be fairly
    timed. Here each batch goes through one model and then through the other, and who is first alternates.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f}  {task.fields[ms]:.0f} ms per step"),
    )
    # No refreshing thread: the bars are drawn between the timed steps, never within one.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bars = {run.name: progress.add_task(run.name, total=steps, loss=0, ms=0) for run in runs}
        for step in range(steps):
            starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
            windows = text[starts + torch.arange(length + 1)]
            for run in runs if step % 2 == 0 else reversed(runs):
                run.step(windows[:, :-1], windows[:, 1:])
                ms = 1e3 * run.seconds[-1]
                progress.update(bars[run.name], advance=1, loss=run.losses[-1], ms=ms, refresh=True)


def compare(theirs: list[float], ours: list[float]) -> tuple[bool, str]:
    """Whether two loss curves are equal within the tolerances, and by how much they differ in words."""
    differences = torch.tensor(ours) - torch.tensor(theirs)
    early = differences[:EARLY_STEPS]
    smoothed = differences.unfold(0, min(SMOOTHING, len(differences)), 1).mean(dim=-1)
    worst_early, worst = early.abs().max().item(), smoothed.abs().max().item()
    return (
        worst_early <= EARLY_TOLERANCE and worst <= TOLERANCE,  # false for NaN too
        f"up to {worst_early:.1e} nats apart in the first {len(early)} steps (allowed: {EARLY_TOLERANCE:g}), "
        f"{worst:.1e} over all {len(ours)}, smoothed (allowed: {TOLERANCE:g})",
    )


def curves_table(theirs: Run, ours: Run, rows: int = 10) -> Table:
    """Both loss curves side by side, at about `rows` steps and always at the last one."""
    table = Table("step", f"loss {theirs.name}", f"loss {ours.name}", "difference")
    last = len(theirs.losses) - 1
    for step in sorted({*range(0, last, max(1, last // (rows - 1))), last}):
        a, b = theirs.losses[step], ours.losses[step]
        table.add_row(str(step + 1), f"{a:.4f}", f"{b:.4f}", f"{b - a:+.1e}")
    for column in table.columns:
        column.justify = "right"
    return table


def save_plot(theirs: Run, ours: Run, path: Path) -> None:
    """Draws both loss curves, one dashed on top of the other so that both are seen."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        console.print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = range(1, len(theirs.losses) + 1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, theirs.losses, color="tab:blue", linewidth=3, alpha=0.5, label="torch.nn.LSTM")
    axes.plot(steps, ours.losses, color="black", linewidth=1, linestyle="--", label="accelerated by fastseq")
    axes.set(xlabel="step", ylabel="cross-entropy in nats per character")
    axes.set_title("A character-level LSTM, trained twice")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    console.print(f"plot: {path}", soft_wrap=True)


def timing(what: str, theirs: list[float], ours: list[float]) -> str:
    """A line with both medians in milliseconds and their ratio."""
    a, b = 1e3 * median(theirs), 1e3 * median(ours)
    return f"time per {what}: torch {a:.3g} ms, fastseq {b:.3g} ms, speed-up {a / b:.2f}"


def main(
    steps: Annotated[int, typer.Option(min=2, help="Training steps.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text per step.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Characters per window.")] = 64,
    hidden: Annotated[int, typer.Option(min=1, help="Size of the embedding and of both LSTM layers.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the generated text.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("out/char_lm.png"),
    chars: Annotated[int, typer.Option(min=2 * CHUNK, help="Characters to generate.")] = 400,
) -> None:
    """Trains a character-level LSTM on torch's layers and on fastseq's, compares them and writes."""
    text = read_text()
    torch.manual_seed(seed)
    model = CharLM(hidden)
    theirs = Run("torch", copy.deepcopy(model))  # the copy starts from equal weights
    ours = Run("fastseq", fastseq.accelerate(model))

    train([theirs, ours], text, steps, batch, length, seed)
    console.print(curves_table(theirs, ours))
    save_plot(theirs, ours, out)
    equal, how_far = compare(theirs.losses, ours.losses)
    console.print(f"the loss curves are {'equal' if equal else 'NOT equal'}: {how_far}", soft_wrap=True)
    if not equal:
        raise typer.Exit(1)  # the speed of a wrong training is of no interest

    console.print()
    warm_up = min(10, steps // 2)  # first calls allocate and choose kernels: trained on, but not timed
    console.print(timing("training step", theirs.seconds[warm_up:], ours.seconds[warm_up:]), soft_wrap=True)
    print(fastseq.explain(model))

    # The same trained weights on torch's own layers, so that both writers have the same to say.
    restored = fastseq.restore(copy.deepcopy(model))
    writers = [Writer(m.eval(), torch.Generator().manual_seed(seed)) for m in (restored, model)]
    for done in range(0, chars, CHUNK):
        for writer in writers if done // CHUNK % 2 == 0 else reversed(writers):
            writer.write(min(CHUNK, chars - done))
    print(f"\n\n--- {chars} characters by the accelerated model ---{writers[1].text}\n---")
    console.print(timing("character", writers[0].seconds[1:], writers[1].seconds[1:]), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
