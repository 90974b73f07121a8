"""Classifies images of 28x28 by a CNN, by an LSTM and by a Transformer, of which the last two read them row by row.

    python examples/classify_digits.py
    python examples/classify_digits.py --data path/to/fashion-mnist

Without a folder of Fashion-MNIST's (or MNIST's) files the images are the handwritten digits that scikit-learn brings,
so there is nothing to download. A run that was interrupted goes on where it was.
"""

from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from datasets import DataError, Images, digits, read_images
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import (
    BucketSampler,
    Options,
    Trainer,
    digest,
    exit_with_message,
    import_pyplot,
    load,
    plot_histories,
    require_multiple_of_4,
    save_figure,
    warmup_cosine,
)

import fastseq
from fastseq.models import ImageClassifier, SequenceClassifier

SIDE = 28
LEARNING_RATE = 2e-3
SHOWN = 16  # images that a model got wrong, in its plot

console = Console(highlight=False)


class RowTransformer(nn.Module):
    """A Transformer encoder with rows as tokens: images [B, 1, 28, 28] to logits [B, classes]."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(SIDE, hidden)
        self.positions = fastseq.nn.LearnedPositions(hidden, SIDE, batch_first=True)
        layer = fastseq.nn.TransformerEncoderLayer(
            hidden, nhead=4, dim_feedforward=2 * hidden, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = fastseq.nn.TransformerEncoder(
            layer, num_layers=3, norm=nn.LayerNorm(hidden), enable_nested_tensor=False
        )
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.positions(self.embedding(images.squeeze(1)))
        return self.head(self.encoder(rows).mean(dim=1))


class Kind(str, Enum):
    """The models, by the names that the command knows."""

    CNN = "cnn"
    RNN = "rnn"
    TRANSFORMER = "transformer"

    def build(self, classes: int, hidden: int) -> nn.Module:
        if self is Kind.CNN:
            return ImageClassifier(classes)
        if self is Kind.TRANSFORMER:
            return RowTransformer(classes, hidden)
        # From the first row to the last and back; which rows tell most of the class, it learns, too.
        options = dict(layers=2, bidirectional=True, pooling="attention", dropout=0.2)
        return nn.Sequential(nn.Flatten(1, 2), SequenceClassifier(SIDE, hidden, classes, **options))


def shifted(images: Tensor) -> Tensor:
    """A batch moved by up to two pixels either way, the width of the rim: a class does not depend on the place."""
    return torch.roll(images, torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class of each image, [N]."""
    model.eval()
    return torch.cat([model(part).argmax(dim=-1) for part in images.split(512)])


def train(kind: Kind, images: Images, options: Options, out: Path, fresh: bool = False) -> Trainer:
    """Trains one model to the end, from its checkpoint if there is one."""
    torch.manual_seed(options.seed)
    model = kind.build(len(images.classes), options.hidden)
    sampler = BucketSampler([SIDE] * len(images.train), options.batch, seed=options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    criterion = fastseq.nn.CrossEntropyLoss(label_smoothing=0.1)
    test_images, test_labels = images.test.tensors
    run = Trainer(
        model,
        lambda pair: criterion(model(shifted(pair[0])), pair[1]),
        load(images.train, sampler),
        optimizer,
        warmup_cosine(optimizer, options.epochs * len(sampler)),
        bfloat16=options.bfloat16,
        checkpoint=out / f"{kind.value}.safetensors",
        config={
            "model": kind.value,
            "images": [len(images.train), *images.classes],
            "data": digest(*(tensor.numpy().tobytes() for tensor in images.train.tensors)),
            **options._asdict(),
        },
    )
    if not fresh and run.resume():
        console.print(f"{kind.value}: goes on from {run.checkpoint}, after {len(run.losses)} steps", soft_wrap=True)
    run.fit(
        options.epochs,
        lambda: (predict(model, test_images) == test_labels).double().mean().item(),
        name=kind.value,
        console=console,
    )
    return run


def plot_wrong(kind: Kind, model: nn.Module, images: Images, path: Path) -> None:
    """Draws some of the test images that the model takes for something else, with both names."""
    pixels, labels = images.test.tensors
    predicted = predict(model, pixels)
    wrong = (predicted != labels).nonzero().flatten()
    pyplot = import_pyplot(console)
    if pyplot is None or len(wrong) == 0:
        return
    figure, axes = pyplot.subplots(2, SHOWN // 2, figsize=(12, 4), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong.tolist(), strict=False):
        axis.imshow(pixels[index, 0].numpy(), cmap="gray_r")
        taken, meant = (images.classes[classes[index]] for classes in (predicted, labels))
        axis.set_title(f"{taken}, not {meant}", fontsize=8)
    figure.suptitle(f"{kind.value}: {len(wrong)} of {len(labels)} test images are classified wrongly")
    save_figure(figure, path, console)


def main(
    model: Annotated[
        list[Kind] | None, typer.Option(help="Which one to train; may be repeated; all by default.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of Fashion-MNIST's four files, .gz or not.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    hidden: Annotated[int, typer.Option(min=4, help="Size of the LSTM and of the Transformer; a multiple of 4.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the split and the batches.")] = 0,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Train in mixed precision.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever checkpoints there are.")] = False,
    out: Annotated[Path, typer.Option(help="Where checkpoints and plots go.")] = Path("out/classify_digits"),
) -> None:
    """Trains a CNN, an LSTM over rows and a Transformer over rows on images, and compares them."""
    require_multiple_of_4(hidden)
    options = Options(epochs, batch, hidden, seed, bfloat16)
    with exit_with_message(console, DataError):
        images = read_images(data) if data is not None else digits(seed)
        table = Table("model", "parameters", "test accuracy", "seconds per epoch")
        runs = {}
        for kind in model or list(Kind):
            run = runs[kind.value] = train(kind, images, options, out, fresh)
            seconds = median(epoch.seconds for epoch in run.history)
            parameters = sum(parameter.numel() for parameter in run.model.parameters())
            table.add_row(kind.value, f"{parameters:,}", f"{run.history[-1].score:.2%}", f"{seconds:.2f}")
            plot_wrong(kind, run.model, images, out / f"{kind.value}-wrong.png")
        plot_histories(runs, "test accuracy", out / "training.png", console)
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
