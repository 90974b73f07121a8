"""Models of Hugging Face transformers with fastseq's attention, against their own eager attention."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_no_worse, require_kernel
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers as hf
from transformers import masking_utils

import fastseq
from fastseq.integrations import transformers as integration
from fastseq.integrations.transformers import Mask, attention_forward, attention_mask, register
from fastseq.ops.attention import TABLE, Arguments

register()

WINDOW = 6
SMALL: dict[str, Any] = dict(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=None)
DECODER: dict[str, Any] = dict(
    **SMALL,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
SEQ2SEQ: dict[str, Any] = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4
)
SEQ2SEQ |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=1, dropout=0.0, **SMALL)


def bert() -> nn.Module:
    options = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, **options, **dropout))


def gpt2(dropout: float = 0.0) -> nn.Module:
    none = dict(resid_pdrop=0.0, embd_pdrop=0.0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, attn_pdrop=dropout, **none))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=WINDOW))


def gemma2() -> nn.Module:
    capped = dict(attn_logit_softcapping=0.5, query_pre_attn_scalar=8, sliding_window=WINDOW)
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, **capped))


def t5() -> nn.Module:
    options = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8)
    config = hf.T5Config(**SMALL, **options, dropout_rate=0.0, decoder_start_token_id=1)
    return hf.T5ForConditionalGeneration(config)


def marian() -> nn.Module:
    return hf.MarianMTModel(hf.MarianConfig(**SEQ2SEQ))


def whisper() -> nn.Module:
    sizes = dict(num_mel_bins=8, max_source_positions=16, max_target_positions=64, suppress_tokens=None)
    config = hf.WhisperConfig(**SEQ2SEQ, **sizes, begin_suppress_tokens=None)
    return hf.WhisperForConditionalGeneration(config)


DECODERS = [gpt2, llama, mistral, gemma2]
SEQ2SEQS = [t5, marian, whisper]
MODELS = [bert, *DECODERS, *SEQ2SEQS]


def inputs_of(make: Callable, side: str = "right", L: int = 9) -> dict[str, Tensor]:
    """Three rows, of which two are padded on a side, with tokens like any: only the mask tells."""
    ids = torch.randint(3, 60, (3, L))
    seen = torch.ones_like(ids)
    for row, count in ((0, 4), (2, 1)):
        seen[row, slice(None, count) if side == "left" else slice(L - count, None)] = 0
    if make is whisper:
        return dict(input_features=torch.randn(3, 8, 32), decoder_input_ids=ids)
    given = dict(input_ids=ids, attention_mask=seen)
    return given | dict(decoder_input_ids=torch.randint(3, 60, (3, 7))) if make in SEQ2SEQS else given


def counted(make: Callable, inputs: dict[str, Tensor]) -> Tensor:
    """[N, places] of the output that are not padding."""
    if "decoder_input_ids" in inputs:
        return torch.ones_like(inputs["decoder_input_ids"], dtype=torch.bool)
    return inputs["attention_mask"].bool()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    """What has reached attention's op from transformers."""
    require_kernel(TABLE, "cpu", torch.float32)
    calls: list[Arguments] = []
    op = integration.attention
    monkeypatch.setattr(integration, "attention", lambda a, *rest: (calls.append(a), op(a, *rest))[1])
    return calls


def build(make: Callable, train: bool = False) -> nn.Module:
    """A model whose attention is anything but flat, which small initial weights would make it."""
    model = make().train(train)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=0.3 if "bias" not in name else 1.0)
    return model


def both(model: nn.Module, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call gives with eager attention, and with ours."""
    results = []
    for name in ("eager", "fastseq"):
        model.set_attn_implementation(name)
        results.append(call())
    return results[0], results[1]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", MODELS)
def test_forward(make: Callable, side: str, computed: list[Arguments]) -> None:
    model, inputs = build(make).eval(), inputs_of(make, side)
    with torch.no_grad():
        want, got = both(model, lambda: model(**inputs).logits)
    where = counted(make, inputs)
    torch.testing.assert_close(got[where], want[where], rtol=1e-5, atol=1e-5)  # two layers of other sums
    assert len(computed) == (6 if make in SEQ2SEQS else 2)
    for arguments in computed:  # T5's bias is all that has L x S elements
        assert arguments.mask is None or (make is t5 and arguments.mask.shape[:2] == (1, 4))


@pytest.mark.parametrize("make", MODELS)
def test_gradients(make: Callable, computed: list[Arguments]) -> None:
    model, inputs = build(make, train=True), inputs_of(make)
    where = counted(make, inputs)

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(**inputs).logits[where]
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want, got = both(model, grads)
    assert computed and want.keys() == got.keys()
    if make is t5:
        assert any("relative_attention_bias" in name for name in got)
    for name, grad in want.items():
        # Sums over all places, in another order; for a key's bias, whose gradient is 0, of terms that cancel.
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=5e-5 * max(1.0, grad.abs().max().item()))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [*DECODERS, *SEQ2SEQS])
def test_generate(make: Callable, beams: int, computed: list[Arguments]) -> None:
    model, inputs = build(make).eval(), inputs_of(make, "right" if make in SEQ2SEQS else "left")
    inputs.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=10, do_sample=False, num_beams=beams)
    want, got = both(model, lambda: model.generate(**inputs, **options))
    assert computed and torch.equal(want, got)


@pytest.mark.parametrize("make", [gpt2, llama, mistral, t5])
def test_generate_in_a_static_cache(make: Callable, computed: list[Arguments]) -> None:
    model, inputs = build(make).eval(), inputs_of(make, "right" if make is t5 else "left")
    inputs.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=10, do_sample=False, cache_implementation="static", disable_compile=True)
    want, got = both(model, lambda: model.generate(**inputs, **options))
    assert torch.equal(want, got)
    own = [a for a in computed if a.query.shape[2] == 1 and a.key.shape[2] != 9]
    assert {a.key.shape[2] for a in own} >= {2, 5} if make is t5 else own  # not the whole cache


@pytest.mark.parametrize("prompt", [3, WINDOW, 2 * WINDOW + 1])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_windows_slide(prompt: int, cache: str, computed: list[Arguments]) -> None:
    model, ids = build(mistral).eval(), torch.randint(3, 60, (2, prompt))
    options = dict(max_new_tokens=2 * WINDOW, do_sample=False, cache_implementation=cache, disable_compile=True)
    want, got = both(model, lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
    assert computed and torch.equal(want, got)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("make", [gpt2, llama, mistral])
def test_prefill_onto_a_cache_that_holds_something(make: Callable, kind: str, computed: list[Arguments]) -> None:
    model, inputs = build(make).eval(), inputs_of(make, "left", L=17)
    ids, seen = inputs["input_ids"], inputs["attention_mask"]

    def in_parts() -> Tensor:
        cache = hf.DynamicCache() if kind == "dynamic" else hf.StaticCache(config=model.config, max_cache_len=24)
        if kind == "dynamic":
            cache = hf.DynamicCache(config=model.config)
        places = (seen.cumsum(-1) - 1).clamp(min=0)
        parts = []
        for start, end in ((0, 5), (5, 13), (13, 14), (14, 17)):
            part = dict(input_ids=ids[:, start:end], attention_mask=seen[:, :end], position_ids=places[:, start:end])
            parts.append(model(**part, past_key_values=cache).logits)
        return torch.cat(parts, 1)

    with torch.no_grad():
        want, got = both(model, in_parts)
    where = seen.bool()
    torch.testing.assert_close(got[where], want[where], rtol=1e-5, atol=1e-5)
    assert len(computed) == 8


@pytest.mark.parametrize("make", [bert, gpt2, llama, t5, marian, whisper])
def test_output_attentions(make: Callable, computed: list[Arguments]) -> None:
    model, inputs = build(make).eval(), inputs_of(make)
    with torch.no_grad():
        want, got = both(model, lambda: model(**inputs, output_attentions=True))
    fields = ("encoder_attentions", "decoder_attentions", "cross_attentions") if make in SEQ2SEQS else ("attentions",)
    for field in fields:
        assert len(got[field]) == len(want[field]) == 2
        for ours, theirs in zip(got[field], want[field], strict=True):
            torch.testing.assert_close(ours, theirs)
    assert computed


def test_output_attentions_in_generate() -> None:
    model, inputs = build(llama).eval(), inputs_of(llama, "left")
    options = dict(max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    want, got = both(model, lambda: model.generate(**inputs, **options).attentions)
    for theirs, ours in zip(want[-1], got[-1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout() -> None:
    model, inputs = gpt2(dropout=0.5).train(), inputs_of(gpt2)
    model.set_attn_implementation("fastseq")

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**inputs).logits

    assert torch.equal(run(0), run(0))
    assert not torch.allclose(run(0), run(1))
    run(0).sum().backward()
    model.eval()
    assert torch.equal(run(0), run(1))


def test_half_precision_is_no_worse() -> None:
    model, inputs = build(llama).eval(), inputs_of(llama)
    where = inputs["attention_mask"].bool()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs).logits[where]
        theirs, ours = both(model.bfloat16(), lambda: model(**inputs).logits[where])
    assert_no_worse([ours], [theirs], [exact])


def test_autocast() -> None:
    model, inputs = build(t5).eval(), inputs_of(t5)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return model(**inputs).logits

    theirs, ours = both(model, run)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs).logits
    assert_no_worse([ours], [theirs], [exact])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_users(dtype: torch.dtype, computed: list[Arguments]) -> None:
    model, ids = build(llama).eval(), torch.randint(3, 60, (2, 8))
    seen = (torch.rand(2, 1, 8, 8) < 0.6) | torch.eye(8, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    want = model(ids, attention_mask=added).logits
    model.set_attn_implementation("fastseq")
    got = model(ids, attention_mask=seen if dtype == torch.bool else added).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert computed


def test_packed_sequences() -> None:
    model, ids = build(mistral).eval(), torch.randint(3, 60, (1, 17))
    places = torch.cat([torch.arange(9), torch.arange(8)])[None]
    want, got = both(model, lambda: model(ids, position_ids=places, use_cache=False).logits)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    alone = model(ids[:, 9:]).logits
    torch.testing.assert_close(got[:, 9:], alone, rtol=1e-5, atol=1e-5)


PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "narrowest": masking_utils.sliding_window_causal_mask_function(1),
    "both sides": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
    "either": masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.sliding_window_bidirectional_overlay(1)
    ),
    "a user's": masking_utils.and_masks(masking_utils.causal_mask_function, lambda n, h, q, k: k != 2),
}
KNOWN = {"causal", "bidirectional", "window", "narrowest", "both sides"}


@pytest.mark.parametrize("in_tensor", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_those_of_transformers(pattern: str, in_tensor: bool) -> None:
    """Whatever the places and lengths of queries and keys, and so is what attention makes of a mask not written out."""
    bare = nn.Module().eval()
    kept = 0
    for L, S, q_offset, kv_offset in (
        *((4, 4, 0, 0), (7, 7, 0, 0), (1, 6, 5, 0), (3, 8, 5, 0), (1, 1, 0, 0)),  # a cache that grows
        *((4, 9, 0, 0), (1, 9, 3, 0), (3, 9, 2, 0)),  # one with room for more
        *((1, 3, 7, 5), (4, 6, 7, 5), (2, 9, 4, 2), (3, 4, 0, 0), (5, 3, 0, 0)),  # one that has lost its beginning
        *((4, 2, 3, 0), (2, 4, 1, 3)),
    ):
        T = kv_offset + S
        masks = [None, torch.ones(2, T, dtype=torch.bool), torch.ones(2, max(1, T - 2), dtype=torch.bool)]
        masks += [torch.rand(2, T) < 0.5, torch.arange(T) >= torch.tensor([[2], [0]])]
        for padding in masks:
            options: dict[str, Any] = dict(batch_size=2, q_length=L, kv_length=S, kv_offset=kv_offset)
            options |= dict(q_offset=torch.tensor(q_offset) if in_tensor else q_offset, attention_mask=padding)
            options |= dict(mask_function=PATTERNS[pattern], allow_is_bidirectional_skip=False)
            want = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
            mask = attention_mask(**options, allow_is_causal_skip=True)
            kept += isinstance(mask, Mask)
            query, key, value = (torch.randn(2, 2, size, 4) for size in (L, S, S))
            got = attention_forward(bare, query, key, value, mask)[0]
            expected = attention_forward(bare, query, key, value, want.contiguous())[0]
            torch.testing.assert_close(got, expected)
            assert torch.equal(mask | torch.zeros((), dtype=torch.bool), want)
    assert kept > 40 if pattern in KNOWN else kept == 0


def test_a_mask_is_what_was_written_into_it() -> None:
    bare, (query, key, value) = nn.Module().eval(), torch.randn(3, 2, 2, 5, 4).unbind()
    mask = attention_mask(2, 5, 5, attention_mask=torch.arange(5) >= torch.tensor([[2], [0]]))
    assert isinstance(mask, Mask) and mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bool
    mask[:, :, 0, 4] = True
    got = attention_forward(bare, query, key, value, mask)[0]
    torch.testing.assert_close(got[0, 0], value[0, :, 4])  # which saw nothing but padding
    assert not mask[..., :4].any(-1)[0, 0, 0]


def test_a_mask_is_not_added_to_scores() -> None:
    """As layers do that do not go through the interface, in models that ask for masks through it."""
    mask = attention_mask(2, 5, 5)
    with pytest.raises(RuntimeError, match="adds its mask to scores"):
        torch.randn(2, 3, 5, 5) + mask
    assert (mask + mask).dtype == torch.bool


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    model, inputs = build(llama, train=True), inputs_of(llama)
    where = inputs["attention_mask"].bool()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def grads() -> list[Tensor]:
        model.zero_grad()
        model(**inputs, use_cache=False).logits[where].square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want, got = both(model, grads)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("whole", [True, False])
def test_compile(whole: bool) -> None:
    """The whole forward, or each layer, which then gets the mask from outside."""
    model, inputs = build(mistral).eval(), inputs_of(mistral, "left")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        several = [inputs, inputs_of(mistral, "right"), dict(inputs, attention_mask=torch.ones(3, 9, dtype=torch.long))]
        want = [model(**given).logits for given in several]
        model.set_attn_implementation("fastseq")
        torch.compiler.reset()
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if whole else model
        if not whole:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        for given, theirs in zip(several, want, strict=True):
            where = given["attention_mask"].bool()
            ours = compiled(**given, use_cache=False).logits
            torch.testing.assert_close(ours[where], theirs[where], rtol=1e-5, atol=1e-5)


def gpt_oss() -> nn.Module:
    experts = dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW)
    return hf.GptOssForCausalLM(hf.GptOssConfig(**DECODER, **experts))


@pytest.mark.usefixtures("nothing_asked_for")
def test_sinks_go_to_the_models_own_attention(computed: list[Arguments]) -> None:
    model, inputs = build(gpt_oss).eval(), inputs_of(gpt_oss, "left")
    with torch.no_grad():
        want, got = both(model, lambda: model(**inputs).logits)
    where = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[where], want[where])
    assert not computed
    model.set_attn_implementation("eager")
    row = fastseq.explain(fastseq.accelerate(model)).rows[0]
    assert row.served_by == "transformers' eager" and "allows it no sdpa" in row.note
    model.set_attn_implementation("fastseq")
    assert "calls with s_aux or sinks go to the model's eager attention" in fastseq.explain(model).rows[0].note
    with fastseq.use_backend("reference"), pytest.raises(fastseq.BackendError, match="reference was asked for"):
        model(**inputs)


@pytest.mark.usefixtures("nothing_asked_for")
def test_what_nobody_knows_is_refused() -> None:
    layer = llama().model.layers[0].self_attn
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    attention_forward(layer, query, key, key, None, sliding_window=3, indices=None)
    with pytest.raises(NotImplementedError, match=r"LlamaAttention gives indices .*set_attn_implementation\('sdpa'\)"):
        attention_forward(layer, query, key, key, None, indices=torch.zeros(1))
    with pytest.raises(NotImplementedError, match="Identity gives sinks"):
        attention_forward(nn.Identity(), query, key, key, None, sinks=torch.zeros(1))


@pytest.mark.parametrize("make", [llama, t5])
@pytest.mark.usefixtures("nothing_asked_for")
def test_without_a_kernel(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """sdpa serves, or eager where weights are asked for."""
    monkeypatch.setattr(integration, "why_torch", lambda *_: "no kernel for this test")
    monkeypatch.setattr(integration, "attention", None)
    model, inputs = build(make).eval(), inputs_of(make)
    where = counted(make, inputs)
    with torch.no_grad():
        want, got = both(model, lambda: model(**inputs, output_attentions=True))
        torch.testing.assert_close(got.logits[where], want.logits[where], rtol=1e-5, atol=1e-5)
        name = "decoder_attentions" if make is t5 else "attentions"
        torch.testing.assert_close(got[name], want[name])
        want, got = both(model, lambda: model(**inputs).logits[where])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    row = fastseq.explain(model).rows[0]
    assert (row.served_by, row.note) == ("transformers' sdpa", "no kernel for this test")


def test_none_is_taken_as_in_sdpa() -> None:
    """Without a mask, the layer says whether it is causal, and a call may say otherwise."""
    sdpa = hf.AttentionInterface()["sdpa"]
    for L, S in ((4, 4), (3, 6), (1, 5)):
        query, key, value = torch.randn(2, 4, L, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 5)
        for says in (None, True, False):
            for hint in (None, True, False):
                layer = nn.Module().eval()
                layer.num_key_value_groups = 2
                if says is not None:
                    layer.is_causal = says
                got, want = (f(layer, query, key, value, None, is_causal=hint)[0] for f in (attention_forward, sdpa))
                torch.testing.assert_close(got, want)
                assert got.is_contiguous() and got.shape == (2, L, 4, 5)


@pytest.mark.usefixtures("nothing_asked_for")
def test_accelerate_explain_restore() -> None:
    require_kernel(TABLE, "cpu", torch.float32)
    model = t5()
    model.encoder.set_attn_implementation("eager")
    holder = nn.ModuleDict({"translator": model, "lstm": nn.LSTM(4, 4), "falcon": falcon()})
    told = {row.layer: row for row in fastseq.explain(holder).rows}
    assert told["translator.encoder"].served_by == "transformers' eager"
    assert told["translator.decoder"].note == "not accelerated; fastseq.accelerate(model) changes that"
    assert fastseq.accelerate(holder) is holder
    told = {row.layer: row for row in fastseq.explain(holder).rows}
    served = TABLE.candidates("cpu", torch.float32)[0].name
    assert [told[f"translator.{part}"].served_by for part in ("encoder", "decoder")] == [served, served]
    assert told["translator.encoder"].type == "T5Stack"
    assert "does not go through" in told["falcon"].note and told["falcon"].served_by.startswith("transformers'")
    assert holder["falcon"].config._attn_implementation != "fastseq"
    fastseq.restore(copy.deepcopy(holder))
    assert model.encoder.config._attn_implementation == model.decoder.config._attn_implementation == "fastseq"
    fastseq.restore(holder)
    assert model.encoder.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == model.config._attn_implementation == "sdpa"
    assert model.state_dict().keys() == t5().state_dict().keys()


def test_accelerate_but_not_all() -> None:
    model = fastseq.accelerate(t5(), filter_fn=lambda module, name: name != "encoder")
    assert model.encoder.config._attn_implementation == "sdpa"
    assert model.decoder.config._attn_implementation == "fastseq"


def test_restore_of_what_was_never_something_else() -> None:
    model = hf.AutoModelForCausalLM.from_config(llama().config, attn_implementation="fastseq")
    assert model.config._attn_implementation == "fastseq"
    assert fastseq.restore(model).config._attn_implementation == "sdpa"


def falcon() -> nn.Module:
    options = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    return hf.FalconForCausalLM(hf.FalconConfig(**SMALL, **options))


def test_models_that_know_implementations_by_name_are_left_alone() -> None:
    """Such as DeepSeek V3.2, which puts what it has chosen into the mask for "eager" and "sdpa" only."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek

    reason = integration.reason_against(object.__new__(deepseek.DeepseekV32ForCausalLM))
    assert reason == "its attention knows implementations by name and takes no others"


def test_a_transformers_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastseq.integrations.transformers", None)  # importing it fails
    holder = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "bert": bert()})
    rows = fastseq.explain(fastseq.accelerate(holder)).rows
    assert [(row.layer, row.type) for row in rows if row.type != "fastseq.nn.Linear"] == [
        ("lstm", "fastseq.nn.LSTM"),
        ("(models of transformers)", "PreTrainedModel"),
    ]
    assert "fastseq.integrations.transformers" in rows[1].note
    assert type(fastseq.restore(holder)["lstm"]) is nn.LSTM


def test_transformers_is_not_imported() -> None:
    code = """
import sys, torch, fastseq
model = fastseq.accelerate(torch.nn.LSTM(2, 2))
print(fastseq.explain(model), fastseq.restore(model))
assert not [name for name in sys.modules if name.partition(".")[0] == "transformers"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
