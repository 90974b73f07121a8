"""Translates dates as people write them, "vrijdag 17 mei 2024", to ISO 8601, 2024-05-17, along the line of the field.

    python examples/translate_dates.py

An encoder and a decoder without attention, with Bahdanau's, with Luong's, and a Transformer are trained one after the
other on the same dates, character by character, and compared: how many dates of a test set each translates exactly,
and how long an epoch takes. The dates are written by Babel's locale data, so there is nothing to download. A run that
was interrupted goes on where it was.
"""

import importlib.util
from collections.abc import Iterator
from enum import Enum
from itertools import product
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Annotated

import torch
import typer
from datasets import DateBatch, DateDataset, DatePair, Vocabulary, date_pairs, normal, split
from rich.console import Console
from rich.markup import escape
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
from fastseq import models
from fastseq.decoding import beam_search, greedy

TWINS = Path(__file__).parent.parent / "tests" / "twins.py"
LEARNING_RATE = 1e-3
LONGEST = 12  # tokens of a translation: ten characters, the end, and one that would be wrong
SHOWN = 5  # translations that are printed

console = Console(highlight=False)


class Kind(str, Enum):
    """The models, by the names that the command knows."""

    PLAIN = "plain"
    BAHDANAU = "bahdanau"
    LUONG = "luong"
    TRANSFORMER = "transformer"

    def build(self, library: ModuleType, source: int, target: int, hidden: int) -> nn.Module:
        """The library's model for two sizes of vocabularies."""
        if self is Kind.TRANSFORMER:
            return library.TransformerSeq2Seq(
                source, target, d_model=hidden, heads=4, layers=2, feedforward=2 * hidden, dropout=0.1, norm_first=True
            )
        return library.Seq2Seq(
            source,
            target,
            embedding=hidden // 2,
            hidden=hidden,
            cell="gru",
            bidirectional=True,
            attention=None if self is Kind.PLAIN else self.value,
        )


class Dates:
    """The pairs to train and to test on, with their vocabularies."""

    def __init__(self, count: int, test: int, seed: int) -> None:
        train, self.test = split(date_pairs(count + test, seed), test, seed)
        self.source = Vocabulary(pair.text for pair in train)
        self.target = Vocabulary(pair.iso for pair in train)
        self.train = DateDataset(train, self.source, self.target)
        self.digest = digest("\n".join(f"{pair.text} {pair.iso}" for pair in train).encode())

    def batches(self, texts: list[str], size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Padded token ids [B, S] and lengths [B] of texts, in order."""
        for start in range(0, len(texts), size):
            ids = [self.source.encode(text) for text in texts[start : start + size]]
            yield nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor(list(map(len, ids)))


@torch.no_grad()
def translate(model: nn.Module, dates: Dates, texts: list[str], beam: int = 1) -> list[str]:
    """What the model writes for each text."""
    model.eval()
    translations = []
    for ids, lengths in dates.batches(texts):
        begin = torch.full_like(lengths, Vocabulary.BEGIN)
        search = dict(eos=Vocabulary.END, max_length=LONGEST)
        state = model.start(ids, lengths)
        found = (
            greedy(model, state, begin, **search)
            if beam == 1
            else beam_search(model, state, begin, **search, beam=beam)
        )
        translations += [dates.target.decode(best[0].tokens.tolist()) for best in found]
    return translations


def exact(translations: list[str], pairs: list[DatePair]) -> float:
    """The share of translations that are right in every character."""
    return sum(pair.iso == said for pair, said in zip(pairs, translations, strict=True)) / len(pairs)


def bleu(translations: list[str], pairs: list[DatePair]) -> str:
    """sacrebleu's score with characters as words, as a text."""
    try:
        from sacrebleu import corpus_bleu
    except ModuleNotFoundError:
        return "needs sacrebleu"
    return f"{corpus_bleu(translations, [[pair.iso for pair in pairs]], tokenize='char').score:.2f}"


def train(
    kind: Kind, dates: Dates, options: Options, out: Path, fresh: bool = False, library: ModuleType = models
) -> Trainer:
    """Trains one model to the end, from its checkpoint if there is one; the library is ours or that of the twins."""
    name = kind.value if library is models else f"{kind.value}-torch"
    sizes = len(dates.source), len(dates.target), options.hidden
    torch.manual_seed(options.seed)
    model = speaker = kind.build(models, *sizes)
    if library is not models:  # twins begin with the same weights, and train; ours speaks for them
        model = kind.build(library, *sizes)
        model.load_state_dict(speaker.state_dict())
    sampler = BucketSampler(dates.train.lengths, options.batch, seed=options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    module = fastseq.nn if library is models else nn
    criterion = module.CrossEntropyLoss(label_smoothing=0.1)

    def loss(batch: DateBatch) -> Tensor:
        logits = model(batch.source, batch.target[:, :-1], batch.lengths)
        return criterion(logits.flatten(0, 1), batch.target[:, 1:].flatten())

    def evaluate() -> float:
        speaker.load_state_dict(model.state_dict())
        return exact(translate(speaker, dates, [pair.text for pair in dates.test]), dates.test)

    run = Trainer(
        model,
        loss,
        load(dates.train, sampler, DateDataset.collate),
        optimizer,
        warmup_cosine(optimizer, options.epochs * len(sampler)),
        bfloat16=options.bfloat16,
        checkpoint=out / f"{name}.safetensors",
        config={
            "model": name,
            "pairs": len(dates.train),
            "characters": "".join(dates.source.characters),
            "data": dates.digest,
            **options._asdict(),
        },
    )
    if not fresh and run.resume():
        console.print(f"{name}: goes on from {run.checkpoint}, after {len(run.losses)} steps", soft_wrap=True)
    run.fit(options.epochs, evaluate, name=name, score="exact match", console=console)
    return run


def twins() -> ModuleType:
    """The same models of torch.nn alone, which the tests compare with.

    Raises:
        FileNotFoundError: this is no checkout.
    """
    if not TWINS.is_file():
        raise FileNotFoundError(f"--torch needs {TWINS}, which is in a checkout of fastseq only")
    spec = importlib.util.spec_from_file_location("twins", TWINS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def attention(model: nn.Module, dates: Dates, text: str) -> tuple[list[str], Tensor]:
    """A translation's characters and "end", and for each the weights [T, S] of the characters that it is read from."""
    model.eval()
    ids, lengths = next(dates.batches([text]))
    state, token = model.start(ids, lengths), torch.tensor([Vocabulary.BEGIN])
    said, weights = [], []
    for _ in range(LONGEST):
        logits, state = model.step(token, state)
        token = logits.argmax(dim=-1)
        said.append(dates.target.decode(token.tolist()) or "end")
        weights.append(model.weights(state)[0])
        if int(token) == Vocabulary.END:
            break
    return said, torch.stack(weights)


def plot_attention(speakers: dict[Kind, nn.Module], dates: Dates, text: str, path: Path) -> None:
    """Draws what each character of a translation is read from, for the models that can be asked."""
    speakers = {kind: model for kind, model in speakers.items() if kind in (Kind.BAHDANAU, Kind.LUONG)}
    pyplot = import_pyplot(console)
    if pyplot is None or not speakers:
        return
    figure, axes = pyplot.subplots(
        1, len(speakers), figsize=(6 * len(speakers), 4), layout="constrained", squeeze=False
    )
    for axis, (kind, model) in zip(axes.flat, speakers.items(), strict=True):
        said, weights = attention(model, dates, text)
        axis.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(text)), list(text))
        axis.set_yticks(range(len(said)), said)
        axis.set_title(kind.value)
    save_figure(figure, path, console)


def main(
    model: Annotated[
        list[Kind] | None, typer.Option(help="Which one to train; may be repeated; all by default.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, max=1_000_000, help="Dates to train on.")] = 20_000,
    test: Annotated[int, typer.Option(min=1, max=100_000, help="Dates to test on.")] = 2_000,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the dates.")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="Dates per step.")] = 64,
    hidden: Annotated[int, typer.Option(min=4, help="Size of the states; a multiple of 4.")] = 128,
    beam: Annotated[int, typer.Option(min=1, max=10, help="Beam of the final translations; 1 is greedy.")] = 1,
    date: Annotated[str, typer.Option(help="A date to draw the attention for.")] = "vrijdag 17 mei 2024",
    torch_too: Annotated[bool, typer.Option("--torch", help="Train each model on torch.nn alone, too.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the dates and the batches.")] = 0,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Train in mixed precision.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever checkpoints there are.")] = False,
    out: Annotated[Path, typer.Option(help="Where checkpoints and plots go.")] = Path("out/translate_dates"),
) -> None:
    """Trains four models to translate dates into ISO 8601, and compares them."""
    require_multiple_of_4(hidden)
    date = normal(date)
    if not date:
        raise typer.BadParameter("is empty", param_hint="--date")
    options = Options(epochs, batch, hidden, seed, bfloat16)
    with exit_with_message(console):
        libraries = {"fastseq": models, "torch": twins()} if torch_too else {"fastseq": models}
        dates = Dates(pairs, test, seed)
        texts = [pair.text for pair in dates.test]
        table = Table("model", "library", "parameters", "exact match", "BLEU", "seconds per epoch")
        runs, speakers = {}, {}
        for kind, (name, library) in product(model or list(Kind), libraries.items()):
            run = runs[f"{kind.value}, {name}"] = train(kind, dates, options, out, fresh, library)
            speaker = kind.build(models, len(dates.source), len(dates.target), hidden)
            speaker.load_state_dict(run.model.state_dict())
            speakers.setdefault(kind, speaker)
            said = translate(speaker, dates, texts, beam)
            parameters = sum(parameter.numel() for parameter in run.model.parameters())
            seconds = median(epoch.seconds for epoch in run.history)
            score = f"{exact(said, dates.test):.2%}"
            table.add_row(kind.value, name, f"{parameters:,}", score, bleu(said, dates.test), f"{seconds:.1f}")
        plot_histories(runs, "exact match", out / "training.png", console)
        plot_attention(speakers, dates, date, out / "attention.png")
        for column in table.columns[2:]:
            column.justify = "right"
        console.print(table)
        examples = [date, *texts[:SHOWN]]
        console.print(f"by {kind.value}:")
        for text, said in zip(examples, translate(speakers[kind], dates, examples, beam), strict=True):
            console.print(f"  {escape(text)} → {said}")


if __name__ == "__main__":
    typer.run(main)
