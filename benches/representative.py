"""What `make bench` runs, about fifteen minutes of two cores: three to five cases of each family, from small to large.

By test as pytest names it, the names of its cases, in both modes if the test has both; EVERY is all of its cases.
torch.compile races in the first case of each line only, which is one of middle size if it compiles that in 15 seconds,
as it does not where it unrolls many steps: compiling takes longer than racing, some ten seconds each.
"""

from typing import Any

from race import MODES

EVERY = ("*",)

RECURRENT = (
    "T1_B1_H128",
    "T100_B1_H512",
    "T100_B32_H256",
    "T100_B128_H512",
    "T200_B4_H256-bidirectional",
)

REPRESENTATIVE: dict[str, tuple[str, ...]] = {
    "bench_lstm.py::test_lstm": RECURRENT,
    "bench_gru.py::test_gru": RECURRENT,
    "bench_rnn.py::test_rnn": RECURRENT,
    "bench_recurrent.py::test_packed": ("LSTM-T100_B32_H256", "GRU-T100_B32_H256", "RNN-T100_B32_H256"),
    "bench_recurrent.py::test_projection": ("LSTM-T100_B1_H512-P128", "LSTM-T100_B32_H512-P128"),
    "bench_recurrent.py::test_cell": ("GRUCell_B32_H256", "LSTMCell_B1_H256", "GRUCell_B1_H256", "RNNCell_B32_H256"),
    "bench_recurrent.py::test_option": (
        "T100_B32_H256-LSTM-lengths",
        "T100_B32_H256-GRU-reset",
        "T100_B1_H256-LSTM-return_cell_sequence",
    ),
    "bench_attention.py::test_attention": (
        "B32_H8_S64_D64",
        "B4_H8_S512_D64",
        "B1_H8_S2048_D64-causal",
        "B4_H8_S1024_D128-causal",
    ),
    "bench_attention.py::test_dropout": ("B4_H8_S512_D64-dropout0.1",),
    "bench_attention.py::test_masked": ("B16_H8_S512_D64-causal-padded",),
    "bench_attention.py::test_packed": ("B32_H8_S512_D64-packed",),
    "bench_attention.py::test_decode": EVERY,
    "bench_mha.py::test_mha": (
        "E512_H8_B8_S128",
        "E256_H4_B32_S64",
        "E256_H4_B32_S64-weights",
        "E512_H8_B16_S512-causal-padded",
    ),
    "bench_transformer.py::test_inference": (
        "E512_H8_B8_S128",
        "E256_H4_B32_S64-padded",
        "E768_H12_B1_S1024",
        "E512_H8_B8_S128-layers6-gelu-padded",
    ),
    "bench_transformer.py::test_training": (
        "E512_H8_B8_S128",
        "E256_H4_B32_S64-padded",
        "E768_H12_B1_S1024",
        "E512_H8_B8_S128-dropout0.1",
    ),
    "bench_decode.py::test_greedy": ("layers6_E512_B1_S64-64tokens",),
    "bench_models.py::test_training": (
        "cnn-B64",
        "bahdanau_H256_V8000-B32_S30_T30",
        "luong_H256_V100-B32_S30_T30",
        "GRULM_H256_V100-B20_T35",
        "LSTMLM_H256_V100-B20_T35",
        "transformer_E256_L4_padded-B32_S64_T64",
    ),
    "bench_models.py::test_generation": (
        "beam5_bahdanau_V8000-B16_S30_T30",
        "greedy_transformer-B16_S64_T64",
        "streaming_lstm_H256-B1_T64",
        "streaming_gru_H256-B1_T64",
    ),
    "bench_huggingface.py::test_inference": ("bert_E768_B8_S128-padded",),
    "bench_huggingface.py::test_training": ("t5_E512_B8_S128",),
    "bench_fused.py::test_fused": (
        "gelu-1024x2048",
        "swiglu-1024x2048",
        "add_layer-1024x512",
        "add_layer-dropout0.1-1024x512",
        "loss-512x32000",
    ),
    "bench_series.py::test_scaling": EVERY,
    "bench_series.py::test_threads": EVERY,
    "bench_series.py::test_overhead": EVERY,
    "bench_series.py::test_first_call": EVERY,
    "bench_series.py::test_memory": EVERY,
}


def named(item: Any) -> str:
    """A test item's case as the table has it."""
    name = item.callspec.id
    for mode in MODES:
        name = name.removeprefix(f"{mode}-")
    return name


def line_of(item: Any) -> tuple[str, ...]:
    """The table's line of a test item."""
    return REPRESENTATIVE.get(f"{item.path.name}::{item.originalname}", ())


def is_representative(item: Any) -> bool:
    line = line_of(item)
    return line is EVERY or named(item) in line


def is_first(item: Any) -> bool:
    """Whether torch.compile races in a run of the representative cases."""
    return named(item) in line_of(item)[:1]
