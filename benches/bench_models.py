"""The models of fastseq.models against the same models in plain torch: training steps, and generation.

`python -m pytest benches/bench_models.py`; conftest.py has the options.
"""

import pytest
from models import ModelCase, SearchCase
from race import MODES


def seq2seq(name: str, attention: str, V: int, H: int = 256, **more) -> ModelCase:
    arguments = dict(src_vocabulary=V, tgt_vocabulary=V, embedding=H, hidden=H, attention=attention)
    return ModelCase(f"{name}_H{H}_V{V}", "Seq2Seq", arguments, **{"B": 32, "S": 30, "T": 30, "lengths": True, **more})


def lm(cell: str, B: int, T: int = 64, H: int = 256, V: int = 100, **more) -> ModelCase:
    arguments = dict(vocabulary=V, embedding=H, hidden=H, cell=cell)
    return ModelCase(f"{cell.upper()}LM_H{H}_V{V}", "RecurrentLM", arguments, B, T, compiled=False, **more)


TRANSFORMER = dict(
    src_vocabulary=1000, tgt_vocabulary=1000, d_model=256, heads=4, layers=4, feedforward=1024, dropout=0.0
)
TRAINED = [
    seq2seq("bahdanau", "bahdanau", 100),
    seq2seq("bahdanau", "bahdanau", 8000),
    seq2seq("luong", "luong", 100),
    seq2seq("luong", "luong", 8000),
    seq2seq("bahdanau", "bahdanau", 20, 16, B=3, S=5, T=6, smoke=True),
    seq2seq("luong", "luong", 20, 16, B=3, S=5, T=6, smoke=True),
    lm("gru", 8),
    lm("gru", 20, 35),
    lm("gru", 32),
    lm("lstm", 20, 35),
    lm("gru", 2, 5, 16, 20, smoke=True),
    ModelCase("transformer_E256_L4", "TransformerSeq2Seq", TRANSFORMER, 32, 64, 64, compiled=True),
    ModelCase("transformer_E256_L4_padded", "TransformerSeq2Seq", TRANSFORMER, 32, 64, 64, lengths=True),
    ModelCase("cnn", "ImageClassifier", dict(classes=10, dropout=0.0), 64, compiled=True),
    ModelCase("cnn", "ImageClassifier", dict(classes=10, dropout=0.0), 8, compiled=True, smoke=True),
]


def beam5(attention: str, V: int) -> SearchCase:
    arguments = dict(src_vocabulary=V, tgt_vocabulary=V, embedding=256, hidden=256, attention=attention)
    return SearchCase(f"beam5_{attention}_V{V}", "Seq2Seq", arguments, 16, 30, 30, True, beam=5)


GENERATED = [
    *(beam5(attention, V) for attention in ("bahdanau", "luong") for V in (100, 8000)),
    SearchCase("greedy_transformer", "TransformerSeq2Seq", TRANSFORMER, 16, 64, 64),
    SearchCase("streaming_lstm_H256", "RecurrentLM", dict(vocabulary=100, embedding=256, hidden=256), 1, 64),
    SearchCase("streaming_gru_H256", "RecurrentLM", dict(vocabulary=100, embedding=256, hidden=256, cell="gru"), 1, 64),
    SearchCase(
        "beam3_small",
        "Seq2Seq",
        dict(src_vocabulary=20, tgt_vocabulary=20, embedding=16, hidden=16, attention="luong"),
        2,
        5,
        6,
        beam=3,
        smoke=True,
    ),
]


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_training(race, case):
    race("models", MODES[1], case)


@pytest.mark.parametrize("case", GENERATED, ids=str)
def test_generation(race, case):
    race("generation", MODES[0], case)
