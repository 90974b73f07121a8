"""The README's lines on transformers and models do what they say, and those of the pages on models."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastseq

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SECTION = README.partition("### Transformers\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def test_torchs_models_and_the_cache() -> None:
    E, V = 16, 30
    model, src, tgt = nn.Transformer(E, 2, 2, 2, 32, 0.0, batch_first=True), torch.randn(3, 5, E), torch.randn(3, 4, E)
    pad = torch.arange(5) >= torch.tensor([[5], [3], [1]])
    want = model(src, tgt, src_key_padding_mask=pad, memory_key_padding_mask=pad)
    names: dict[str, Any] = dict(
        fastseq=fastseq, torch=torch, model=model, src=src, tgt=tgt, pad=pad, embedding=torch.randn(V, E),
        labels=torch.randint(V, (12,)), prefix=tgt[:, :2], next_place=tgt[:, 2:3], beams=torch.tensor([0, 0, 2]),
    )  # fmt: skip
    exec(BLOCKS[0], names)
    assert names["model"] is model and type(model) is fastseq.nn.Transformer
    torch.testing.assert_close(names["out"], want)
    names["loss"].backward()
    exec(BLOCKS[1], names)
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    with torch.no_grad():
        whole = model.decoder(tgt[:, :3], model.encoder(src), causal)
    torch.testing.assert_close(names["out"].clone(), whole[:, 2:])
    assert len(names["cache"]) == 3


def test_models_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from fastseq.integrations.transformers import register

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    names: dict[str, Any] = dict(fastseq=fastseq, register=register, name=tmp_path)
    names["AutoModelForCausalLM"] = transformers.AutoModelForCausalLM
    for lines in BLOCKS[2].strip().split("\n\n"):
        exec(lines, names)
        assert names["model"].config._attn_implementation == "fastseq"
        assert fastseq.explain(names["model"]).rows[0].served_by != "transformers"


class Names(dict):
    """What the lines on models speak of."""

    def __init__(self) -> None:
        V, B, S, T = 40, 3, 7, 5
        tokens = torch.randint(V, (B, T))
        super().__init__(
            fastseq=fastseq, torch=torch, V=V, BOS=0, EOS=1, src_vocabulary=V, tgt_vocabulary=V, classes=5,
            src=torch.randint(V, (B, S)), tgt_in=tokens, tgt_out=tokens, tokens=tokens,
            src_lengths=torch.tensor([7, 1, 4]), tgt_lengths=torch.tensor([2, 5, 1]), lengths=torch.tensor([2, 5, 1]),
            windows=[(tokens, tokens), (tokens, tokens)], loss=nn.CrossEntropyLoss(), images=torch.randn(B, 1, 28, 28),
            x=torch.randn(B, 512, T), x_next=torch.randn(B, 512, 1), y=torch.randn(B, T, 256),
            memory=torch.randn(B, S, 512), padding=torch.zeros(B, S, dtype=torch.bool),
        )  # fmt: skip


def test_models_and_what_they_generate() -> None:
    names = Names()
    exec(BLOCKS[3], names)
    assert len(names["found"]) == 3 and isinstance(names["found"][0][0].score, float)


@pytest.mark.parametrize("page", sorted((ROOT / "docs/models").glob("*.md")), ids=lambda page: page.stem)
def test_pages_of_models(page: Path) -> None:
    names = Names()
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)


def test_page_of_decoding() -> None:
    from fastseq.models import Seq2Seq

    names, blocks = Names(), re.findall(r"```python\n(.*?)```", (ROOT / "docs/decoding.md").read_text(), re.DOTALL)
    names["lengths"] = names["src_lengths"]
    names["model"] = model = Seq2Seq(40, 40, 16, 16, attention="luong").eval()
    names |= dict(tokens=names["tokens"][:, 0], state=model.start(names["src"]), rows=torch.tensor([2, 0]))
    exec(blocks[0], names)
    assert names["logits"].shape == (3, 40)
    exec(blocks[1], names)
    assert len(names["found"][0]) == 3
