"""What the examples train on: images in idx files, scikit-learn's digits, and dates as people write them."""

import gzip
import random
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache, cached_property
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, TensorDataset

FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class DataError(ValueError):
    """A file of data is missing, or is not what its name says; the message names it."""


# Images


@dataclass(frozen=True)
class Images:
    """Grey images of classes, as float32 [N, 1, 28, 28] of mean about 0 and deviation about 1, and int64 [N]."""

    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]


def read_images(folder: Path, classes: tuple[str, ...] = FASHION) -> Images:
    """MNIST or Fashion-MNIST from a folder with their four files, as they are downloaded (.gz) or unpacked.

    Raises:
        DataError: a file is missing, or has another format, other dimensions or another length than it must have.
    """
    parts = []
    for part in ("train", "t10k"):
        images_path = _find(folder, f"{part}-images-idx3-ubyte")
        labels_path = _find(folder, f"{part}-labels-idx1-ubyte")
        images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
        if images.shape[1:] != (28, 28) or len(images) == 0:
            raise DataError(f"{images_path}: expected images [N, 28, 28] with N > 0, got {list(images.shape)}")
        if len(labels) != len(images):
            raise DataError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path}")
        if (largest := int(labels.max())) >= len(classes):
            raise DataError(f"{labels_path}: a label is {largest}, but there are {len(classes)} classes")
        parts.append((images, labels))
    (train_images, _), _ = parts
    pixels = train_images.float() / 255
    mean, deviation = pixels.mean(), pixels.std().clamp(min=1e-6)
    train, test = (
        TensorDataset(((images.float() / 255 - mean) / deviation).unsqueeze(1), labels.long())
        for images, labels in parts
    )
    return Images(train, test, classes)


def _find(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: there is neither {name} nor {name}.gz in it")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An idx file of bytes, as MNIST's are, packed by gzip or not.

    The format: two zero bytes, the type (8: unsigned bytes), the number of dimensions, each dimension as a big-endian
    32-bit integer, then the bytes. http://yann.lecun.com/exdb/mnist describes it.

    Args:
        path: the file; one that ends in .gz is unpacked.
        dimensions: how many there must be.

    Returns:
        uint8, of the file's shape.

    Raises:
        DataError: it is missing, has another format, or is longer or shorter than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(
                    f"{path}: an idx file of {dimensions}-dimensional bytes begins with "
                    f"{bytes((0, 0, 8, dimensions)).hex()}, this one with {header[:4].hex() or 'nothing'}"
                )
            if len(header) < 4 + 4 * dimensions:
                raise DataError(f"{path}: ends within its header")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            data = bytearray(file.read())  # all there is: a wrong header may ask for more than the memory
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, zlib.error, OSError) as error:  # truncated, damaged, or no gzip file at all
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(data) != prod(shape):
        raise DataError(f"{path}: its header says {list(shape)}, {prod(shape)} bytes, but {len(data)} bytes follow")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape) if data else torch.empty(shape, dtype=torch.uint8)


def digits(seed: int = 0, test_share: float = 0.2) -> Images:
    """scikit-learn's 1797 handwritten digits, which come with it: 8x8, scaled to 24x24 with a rim of 2 as in MNIST."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    pixels = F.pad(F.interpolate(pixels, size=(24, 24), mode="bilinear"), (2, 2, 2, 2))
    rows = train_test_split(range(len(labels)), test_size=test_share, random_state=seed, stratify=labels)
    mean, deviation = pixels[rows[0]].mean(), pixels[rows[0]].std()
    train, test = (TensorDataset((pixels[r] - mean) / deviation, torch.as_tensor(labels[r]).long()) for r in rows)
    return Images(train, test, tuple(map(str, range(10))))


# Dates

LOCALES = ("en_US", "en_GB", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "fi", "pl")
LENGTHS = ("full", "long", "medium", "short")
# What people write beside that; with slashes, days come first in some countries and months in others.
EVERYWHERE = ("EEE d MMM y", "d MMMM y", "MMM d, y", "d MMM yy", "dd.MM.y", "y/MM/dd")
SOMEWHERE = {"en_US": ("M/d/y", "MM/dd/y", "MM/dd/yy"), "en_GB": ("d/M/y", "d/M/yy", "dd/MM/yy")}
# A century, so that two digits name one year: the one that POSIX's strptime takes for them, too.
FIRST, LAST = date(1969, 1, 1), date(2068, 12, 31)


class DatePair(NamedTuple):
    """A date as somebody writes it, and as ISO 8601 does."""

    text: str
    iso: str
    locale: str
    pattern: str


def date_pairs(count: int, seed: int = 0) -> list[DatePair]:
    """So many different texts with the dates that they mean, in several languages, by the locale data of Babel.

    Texts that mean two dates are left out, such as 05/06/07: each that is here is read in one way only by all
    languages and patterns together.
    """
    generator = random.Random(seed)
    days = (LAST - FIRST).days + 1
    pairs: dict[str, DatePair] = {}
    while len(pairs) < count:
        style = generator.choice(styles())
        day = FIRST + timedelta(days=generator.randrange(days))
        text = style.write(day)
        if text not in pairs and readings(text) == {day}:
            pairs[text] = DatePair(text, day.isoformat(), style.locale, style.pattern)
    return list(pairs.values())


def split(pairs: list[DatePair], test: int, seed: int = 0) -> tuple[list[DatePair], list[DatePair]]:
    """Pairs to train on and so many to test on; no text is in both."""
    texts = [pair.text for pair in pairs]
    if len(set(texts)) < len(texts):
        raise ValueError("pairs must have different texts: one could be in both parts")
    if not 0 < test < len(pairs):
        raise ValueError(f"test must be within 1..{len(pairs) - 1}, got {test}")
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    return shuffled[test:], shuffled[:test]


@dataclass(frozen=True)
class DateStyle:
    """How dates are written in a language by a pattern of Unicode's CLDR, such as "d MMMM y"."""

    locale: str
    pattern: str

    def write(self, day: date) -> str:
        from babel.dates import format_date

        return normal(format_date(day, self.pattern, self.locale))

    def read(self, text: str) -> date | None:
        """The date that is written so, or None."""
        found = self._regex.fullmatch(text)
        if found is None:
            return None
        year, month, day = (found[name] for name in ("year", "month", "day"))
        if len(year) == 2:
            year = FIRST.year + (int(year) - FIRST.year) % 100
        try:
            return date(int(year), self._months.get(month) or int(month), int(day))
        except ValueError:  # 31 April
            return None

    @cached_property
    def _months(self) -> dict[str, int]:
        """The months' numbers, where the pattern writes their names."""
        from babel.dates import get_month_names

        width = {"MMMM": "wide", "MMM": "abbreviated"}.get(next(iter(re.findall("M+", self.pattern))))
        names = get_month_names(width, locale=self.locale) if width else {}
        return {normal(name): number for number, name in names.items()}

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        fields = {
            "y": r"(?P<year>\d{4})",
            "yy": r"(?P<year>\d\d)",
            "M": r"(?P<month>\d\d?)",
            "MM": r"(?P<month>\d\d)",
            "d": r"(?P<day>\d\d?)",
            "dd": r"(?P<day>\d\d)",
        }
        names = f"(?P<month>{'|'.join(map(re.escape, self._months))})"
        parts = re.findall(r"'([^']*)'|(y+|M+|d+|E+|c+)|([^'])", normal(self.pattern))
        return re.compile(
            "".join(
                re.escape(quoted or other) if not name else r"\D+" if name[0] in "Ec" else fields.get(name, names)
                for quoted, name, other in parts
            )
        )


@cache
def styles() -> list[DateStyle]:
    """Each language with its own patterns and with the others."""
    from babel import Locale

    found = []
    for name in LOCALES:
        own = [Locale.parse(name).date_formats[length].pattern for length in LENGTHS]
        found += [DateStyle(name, pattern) for pattern in dict.fromkeys((*own, *EVERYWHERE, *SOMEWHERE.get(name, ())))]
    return found


def readings(text: str) -> set[date]:
    """All dates of the century that some language and pattern writes so."""
    found = {style.read(text) for style in styles()}
    return {day for day in found if day is not None and FIRST <= day <= LAST}


def normal(text: str) -> str:
    """Composed characters, and plain spaces for the several that languages have."""
    return " ".join(unicodedata.normalize("NFC", text).split())


# Characters as tokens


class Vocabulary:
    """Characters as token ids, after four special ones: padding, an unknown character, and a text's begin and end."""

    PAD, UNKNOWN, BEGIN, END = range(4)

    def __init__(self, texts: Iterable[str]) -> None:
        self.characters = sorted(set(chain.from_iterable(texts)))
        self._ids = {character: index for index, character in enumerate(self.characters, start=4)}

    def __len__(self) -> int:
        return 4 + len(self.characters)

    def encode(self, text: str, ends: bool = False) -> Tensor:
        """The ids, int64 [T], with a text's begin and end around them where asked for."""
        ids = [self._ids.get(character, self.UNKNOWN) for character in text]
        return torch.tensor([self.BEGIN, *ids, self.END] if ends else ids, dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids up to the end; what is no character is shown as "?"."""
        characters = []
        for index in map(int, ids):
            if index == self.END:
                break
            if index != self.BEGIN:
                characters.append(self.characters[index - 4] if index >= 4 else "?")
        return "".join(characters)


class DateBatch(NamedTuple):
    """Dates of a batch: source [B, S], padded, with its lengths [B], and target [B, 12], with begin and end.

    All targets are of one length, as ISO 8601 has it.
    """

    source: Tensor
    lengths: Tensor
    target: Tensor


class DateDataset(Dataset):
    """Pairs as token ids."""

    def __init__(self, pairs: list[DatePair], source: Vocabulary, target: Vocabulary) -> None:
        self.pairs = pairs
        self.samples = [(source.encode(pair.text), target.encode(pair.iso, ends=True)) for pair in pairs]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]

    @property
    def lengths(self) -> list[int]:
        return [len(source) for source, _ in self.samples]

    @staticmethod
    def collate(samples: list[tuple[Tensor, Tensor]]) -> DateBatch:
        sources, targets = zip(*samples, strict=True)
        padded = pad_sequence(sources, batch_first=True, padding_value=Vocabulary.PAD)
        return DateBatch(padded, torch.tensor([len(source) for source in sources]), torch.stack(targets))
