"""The README's lines on transformers do what they say."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastseq

README = (Path(__file__).parents[1] / "README.md").read_text()
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
