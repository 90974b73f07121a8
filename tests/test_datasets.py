"""The examples' data: idx files with all that can be wrong with them, digits, and dates in several languages."""

import gzip
import struct
from datetime import date, datetime
from itertools import permutations

import pytest
import torch
from conftest import example

pytest.importorskip("babel")
pytest.importorskip("safetensors")
datasets = example("datasets")


def idx(tensor, magic=None):
    header = bytes((0, 0, 8, tensor.dim())) if magic is None else magic
    return header + struct.pack(f">{tensor.dim()}I", *tensor.shape) + tensor.numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    """Fashion-MNIST in small: 6 images to train on, 4 to test."""
    for part, count in (("train", 6), ("t10k", 4)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_images_are_read(folder):
    images = datasets.read_images(folder)
    raw = (folder / "train-images-idx3-ubyte").read_bytes()[16:]
    pixels, labels = images.train.tensors
    assert (pixels.shape, pixels.dtype) == ((6, 1, 28, 28), torch.float32)
    assert labels.tolist() == list(range(6)) and labels.dtype == torch.int64
    assert images.test.tensors[0].shape == (4, 1, 28, 28)
    assert abs(pixels.mean()) < 1e-5 and abs(pixels.std() - 1) < 1e-4
    expected = torch.tensor(list(raw), dtype=torch.float64).view(6, 1, 28, 28)
    torch.testing.assert_close(pixels.double(), (expected - expected.mean()) / expected.std(), rtol=1e-4, atol=1e-4)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    "name, change, message",
    [
        (IMAGES, None, "neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"),
        (IMAGES, lambda data: b"", "begins with 00000803, this one with nothing"),
        (IMAGES, lambda data: b"PNG!" + data[4:], "begins with 00000803, this one with 504e4721"),
        (IMAGES, lambda data: b"\0\0\x0d\x03" + data[4:], "this one with 00000d03"),  # floats
        (IMAGES, lambda data: b"\0\0\x08\x01" + data[4:], "this one with 00000801"),  # labels
        (IMAGES, lambda data: data[:11], "ends within its header"),
        (IMAGES, lambda data: data[:-1], r"\[6, 28, 28\], 4704 bytes, but 4703 bytes follow"),
        (IMAGES, lambda data: data + b"\0", "4704 bytes, but 4705 bytes follow"),
        (IMAGES, lambda data: idx(torch.zeros(6, 28, 27, dtype=torch.uint8)), r"got \[6, 28, 27\]"),
        (IMAGES, lambda data: idx(torch.zeros(0, 28, 28, dtype=torch.uint8)), "N > 0"),
        (IMAGES, lambda data: idx(torch.zeros(5, 28, 28, dtype=torch.uint8)), "6 labels for the 5 images"),
        (IMAGES, lambda data: data[:4] + b"\xff" * 12 + data[16:], "but 4704 bytes follow"),
        (LABELS, lambda data: gzip.decompress(data), "cannot be read"),
        (LABELS, lambda data: data[:-9], "cannot be read"),
        (LABELS, lambda data: data[:12] + bytes([data[12] ^ 0xFF]) + data[13:], "t10k-labels"),
        (LABELS, lambda data: gzip.compress(idx(torch.tensor([0, 1, 2, 10], dtype=torch.uint8))), "a label is 10"),
    ],
)
def test_bad_files_are_refused(folder, name, change, message):
    path = folder / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(datasets.DataError, match=message) as error:
        datasets.read_images(folder)
    assert str(folder) in str(error.value)


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(datasets.DataError, match="none: no such folder"):
        datasets.read_images(tmp_path / "none")
    with pytest.raises(datasets.DataError, match="none: no such file"):
        datasets.read_idx(tmp_path / "none", 1)


def test_digits():
    pytest.importorskip("sklearn")
    images = datasets.digits(seed=1)
    assert len(images.train) + len(images.test) == 1797 and len(images.test) == 360
    assert images.train.tensors[0].shape[1:] == (1, 28, 28)
    counts = torch.bincount(images.test.tensors[1])
    assert len(counts) == 10 and counts.min() >= 34
    assert torch.equal(datasets.digits(seed=1).test.tensors[0], images.test.tensors[0])
    assert not torch.equal(datasets.digits(seed=2).test.tensors[1], images.test.tensors[1])


@pytest.fixture(scope="module")
def pairs():
    return datasets.date_pairs(3000, seed=4)


def test_dates_depend_on_the_seed_alone(pairs):
    assert datasets.date_pairs(300, seed=4) == pairs[:300]
    assert datasets.date_pairs(300, seed=5) != pairs[:300]


def test_dates_are_of_all_languages_and_differ(pairs):
    assert len({pair.text for pair in pairs}) == len(pairs) == 3000
    assert {pair.locale for pair in pairs} == set(datasets.LOCALES)
    assert {(pair.locale, pair.pattern) for pair in pairs} == {(s.locale, s.pattern) for s in datasets.styles()}


def test_dates_mean_what_babel_writes(pairs):
    """Found by writing, without the reader: no language and pattern writes another date so."""
    from babel.dates import format_date

    def written(day):
        return {" ".join(format_date(day, s.pattern, s.locale).split()) for s in datasets.styles()}

    for pair in pairs[::30]:
        numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in pair.text).split()]
        months = range(1, 13) if len(numbers) == 2 else numbers
        candidates = set()
        for order in permutations(numbers):
            for year in (order[0], order[0] + 1900, order[0] + 2000):
                for month in months if len(numbers) == 2 else order[1:2]:
                    if 1969 <= year <= 2068 and 1 <= month <= 12 and 1 <= order[-1] <= 31:
                        try:
                            candidates.add(date(year, month, order[-1]))
                        except ValueError:
                            continue
        assert [str(day) for day in candidates if pair.text in written(day)] == [pair.iso], pair


@pytest.mark.parametrize(
    "text, days",
    [
        ("05/06/07", {"2007-06-05", "2007-05-06"}),
        ("5/5/07", {"2007-05-05"}),
        ("05/06/2007", {"2007-06-05", "2007-05-06"}),
        ("5/17/07", {"2007-05-17"}),
        ("17/05/1969", {"1969-05-17"}),
        ("17/05/1968", set()),  # of another century
        ("17/05/68", {"2068-05-17"}),
        ("31.02.2024", set()),
        ("29. Februar 2024", {"2024-02-29"}),
        ("2024-05-17", {"2024-05-17"}),
        ("17 mai 2024", {"2024-05-17"}),  # French
        ("17 smarch 2024", set()),
        ("", set()),
    ],
)
def test_readings(text, days):
    assert datasets.readings(text) == set(map(date.fromisoformat, days))


def test_ambiguous_dates_are_left_out(pairs):
    slashed = [pair for pair in pairs if pair.text.count("/") == 2 and not pair.text[:4].isdigit()]
    assert len(slashed) > 50
    for pair in slashed:
        orders = set()
        for pattern in ("%d/%m/%y", "%m/%d/%y", "%d/%m/%Y", "%m/%d/%Y"):
            try:
                orders.add(datetime.strptime(pair.text, pattern).date().isoformat())
            except ValueError:
                continue
        assert orders == {pair.iso}, pair


def test_the_split_shares_no_text(pairs):
    train, test = datasets.split(pairs, test=500, seed=1)
    assert len(test) == 500 and len(train) == 2500
    assert not {pair.text for pair in train} & {pair.text for pair in test}
    assert sorted(train + test) == sorted(pairs)
    assert datasets.split(pairs, test=500, seed=1) == (train, test)
    for count in (0, 3000):
        with pytest.raises(ValueError, match=f"test must be within 1..2999, got {count}"):
            datasets.split(pairs, test=count)
    with pytest.raises(ValueError, match="different texts"):
        datasets.split([*pairs, pairs[0]], test=5)


def test_vocabulary():
    vocabulary = datasets.Vocabulary(["17. März", "mai"])
    ids = vocabulary.encode("März 17", ends=True)
    assert ids.dtype == torch.int64 and ids[0] == vocabulary.BEGIN and ids[-1] == vocabulary.END
    assert vocabulary.decode(ids) == "März 17"
    assert vocabulary.decode([*ids, *ids]) == "März 17"
    assert vocabulary.encode("x").tolist() == [vocabulary.UNKNOWN] and vocabulary.decode([vocabulary.UNKNOWN]) == "?"
    assert len(vocabulary) == 4 + len(set("17. Märzmai"))


def test_batches_of_dates(pairs):
    source = datasets.Vocabulary(pair.text for pair in pairs)
    target = datasets.Vocabulary(pair.iso for pair in pairs)
    data = datasets.DateDataset(pairs[:5], source, target)
    batch = data.collate([data[i] for i in range(5)])
    assert batch.source.shape == (5, max(data.lengths)) and batch.target.shape == (5, 12)
    assert batch.lengths.tolist() == data.lengths == [len(pair.text) for pair in pairs[:5]]
    for pair, row, length in zip(pairs, batch.source, batch.lengths, strict=False):
        assert source.decode(row[:length]) == pair.text
        assert (row[length:] == datasets.Vocabulary.PAD).all()
    assert [target.decode(row) for row in batch.target] == [pair.iso for pair in pairs[:5]]
