"""The one line that users write: `accelerate`, and its counterparts `explain` and `restore`."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import StringIO
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

import fastseq.nn
from fastseq.dynamo import allow_rnn
from fastseq.nn.serving import Served
from fastseq.ops.contract import computes_in
from fastseq.ops.linear import prefers_onednn
from fastseq.registry import BackendError

Model = TypeVar("Model", bound=nn.Module)

# torch's module and ours.
_DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: fastseq.nn.LSTM,
    nn.GRU: fastseq.nn.GRU,
    nn.RNN: fastseq.nn.RNN,
    nn.LSTMCell: fastseq.nn.LSTMCell,
    nn.GRUCell: fastseq.nn.GRUCell,
    nn.RNNCell: fastseq.nn.RNNCell,
    nn.MultiheadAttention: fastseq.nn.MultiheadAttention,
    nn.TransformerEncoderLayer: fastseq.nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fastseq.nn.TransformerDecoderLayer,
    nn.TransformerEncoder: fastseq.nn.TransformerEncoder,
    nn.TransformerDecoder: fastseq.nn.TransformerDecoder,
    nn.Transformer: fastseq.nn.Transformer,
    nn.CrossEntropyLoss: fastseq.nn.CrossEntropyLoss,
}
# Those that are swapped only where there is anything to gain.
_DENSE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: fastseq.nn.Linear}
# What is served by the layers in it.
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)
_WHOLE = "(the model)"
_PASSED_BY = "but in evaluation without gradients torch's TransformerEncoderLayer does all by itself"
_ORIGINALS = {ours: theirs for theirs, ours in (*_DROP_INS.items(), *_DENSE.items())}


def accelerate(model: Model, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Model:
    """Makes the sequence layers of a model fast, in place.

    Layers whose exact type has a drop-in get the drop-in's class. Parameters, buffers, hooks, optimizers and the
    `state_dict` stay the same objects with the same names; results are equal within the stated tolerances. Where
    torch's dense layers are slow (on AMD's CPUs with AVX-512), nn.Linear has a drop-in, too.

    Models of Hugging Face transformers in it get their attention from fastseq, as `set_attn_implementation("fastseq")`
    would do, if their classes take it.

    torch.compile refuses every nn.RNN, nn.LSTM and nn.GRU unless `torch._dynamo.config.allow_rnn` is set: this call
    sets it, for good, if it changes any such layer, since the drop-ins compile into one node.

    Args:
        model: any module; it may itself be a layer.
        filter_fn: called with (module, name) for each layer that could be changed, and for each model of transformers;
            where it is false, it stays.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _require_module(model, "accelerate")
    drop_ins = {**_DROP_INS, **_DENSE} if prefers_onednn() else _DROP_INS
    for name, module in model.named_modules():
        drop_in = drop_ins.get(type(module))
        if drop_in is not None and (filter_fn is None or filter_fn(module, name)):
            module.__class__ = drop_in
            if isinstance(module, nn.RNNBase):
                allow_rnn()
    transformers, _ = _transformers(model)
    if transformers is not None:
        for name, module in transformers.owners(model):
            if filter_fn is None or filter_fn(module, name):
                transformers.accelerate(module)
    return model


def restore(model: Model) -> Model:
    """Gives every fastseq layer of a model its torch class back, and models of transformers the attention that they
    had, in place, and returns the model.

    Do this before tools that look for torch's exact classes. A layer that was parametrized
    after `accelerate` has a class of its own and stays.
    """
    _require_module(model, "restore")
    for module in model.modules():
        original = _ORIGINALS.get(type(module))
        if original is not None:
            module.__class__ = original
    transformers, _ = _transformers(model)
    if transformers is not None:
        for _, module in transformers.owners(model):
            transformers.restore(module)
    return model


def _transformers(model: nn.Module) -> tuple[ModuleType | None, str]:
    """What fastseq does with models of Hugging Face transformers, where there is one, and else why it cannot."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None or not any(isinstance(module, base) for module in model.modules()):
        return None, ""
    try:
        return importlib.import_module("fastseq.integrations.transformers"), ""
    except ImportError as error:
        return None, str(error)


@dataclass(frozen=True)
class Row:
    """One layer in an explanation: its name in the model, its class, what serves it, and what there is to say.

    Attributes:
        milliseconds: of a call as torch's layer and as it is, where it was measured.
    """

    layer: str
    type: str
    served_by: str
    note: str
    milliseconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Explanation:
    """What serves each sequence layer of a model. `print` it for a table."""

    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        if not self.rows:
            return "no sequence layers that fastseq knows"
        table = Table(box=box.MARKDOWN)  # in ASCII: it may be printed into anything
        is_timed = any(row.milliseconds for row in self.rows)
        for column in ("layer", "type", "served by", *["torch ms", "now ms"] * is_timed, "note"):
            table.add_column(column, overflow="fold", no_wrap=column == "type")
        for row in self.rows:
            times = [f"{ms:.3g}" for ms in row.milliseconds] if row.milliseconds else ["", ""]
            table.add_row(row.layer, row.type, row.served_by, *times * is_timed, row.note)
        out = StringIO()
        Console(file=out, width=120).print(table)
        return out.getvalue().strip()


def explain(model: nn.Module, profile: Any = None) -> Explanation:
    """For each sequence layer of a model: which implementation serves it on its device and dtype, or why none does.

    The attention of a model of transformers is one row, whatever the number of its layers.

    Args:
        model: any module; it may itself be a layer.
        profile: an example input, or a tuple of the model's arguments. The model is then called with it once without
            gradients, and each layer that is accelerated is timed on what reaches it, as torch's layer and as it is:
            a second for each.
    """
    _require_module(model, "explain")
    rows = []
    layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    passed_by = {layer.self_attn for layer in layers if _has_fast_path(layer)}
    for name, module in model.named_modules():
        base = next((theirs for theirs in _DROP_INS if isinstance(module, theirs)), None)
        if base is not None:
            served_by, note = _serving(module, base, _PASSED_BY if module in passed_by else "")
            kind = f"{type(module).__module__.split('.')[0]}.nn.{type(module).__name__}"
            if type(module) not in (base, _DROP_INS[base]):
                kind = type(module).__qualname__
            rows.append(Row(name or _WHOLE, kind, served_by, note))
        elif isinstance(module, fastseq.nn.AttentionDecoder):
            is_ours = type(module) is fastseq.nn.AttentionDecoder
            kind = "fastseq.nn.AttentionDecoder" if is_ours else type(module).__qualname__
            rows.append(Row(name or _WHOLE, kind, *_served_by(module)))
    transformers, reason = _transformers(model)
    if transformers is not None:
        rows += [Row(*told) for told in transformers.explained(model)]
    elif reason:
        rows.append(Row("(models of transformers)", "PreTrainedModel", "transformers", reason))
    dense = sum(type(module) is fastseq.nn.Linear for module in model.modules())
    if dense:
        note = "where they are float32 and not small" if prefers_onednn() else "oneDNN is no faster here"
        served_by = "torch's oneDNN" if prefers_onednn() else "torch"
        rows.append(Row(f"({dense} dense layers)", "fastseq.nn.Linear", served_by, note))
    return Explanation(rows if profile is None else _timed(rows, model, profile))


def _timed(rows: list[Row], model: nn.Module, example: Any) -> list[Row]:
    from fastseq.profiling import timed

    modules = {name or _WHOLE: module for name, module in model.named_modules()}
    layers = {row.layer: modules[row.layer] for row in rows if type(modules.get(row.layer)) in _ORIGINALS}
    with torch.random.fork_rng(devices=[]):  # a model in training draws
        found = timed(model, example, layers, restore)
    return [replace(row, milliseconds=found.get(row.layer)) for row in rows]


def _serving(module: nn.Module, base: type[nn.Module], more: str) -> tuple[str, str]:
    """What serves the module, and what there is to say beside `more`, which counts for ours only."""
    if type(module) is base:
        return "torch", "not accelerated; fastseq.accelerate(model) changes that"
    if not isinstance(module, _DROP_INS[base]):
        return "torch", f"a subclass of torch.nn.{base.__name__}: only the exact class is swapped"
    if base in _STACKS:
        return "its layers", ""
    assert isinstance(module, Served)
    return _served_by(module, more)


def _served_by(module: Served, more: str = "") -> tuple[str, str]:
    example = module.example
    op, device = module.table, example.device.type
    dtype = computes_in(op.name, device, example.dtype)
    try:
        chosen = op.preferred(device, dtype)
    except BackendError as error:  # an implementation is asked for by name and cannot serve
        return "nothing", str(error)
    passed_over = [
        f"{impl.name}: {reason}"
        for impl in op.impls[: op.impls.index(chosen)]
        if (reason := op.reason_to_pass_over(impl, device, dtype)) is not None
    ]
    reason = module.why_torch()
    if reason is not None:
        return "torch", "; ".join([reason, *passed_over])
    computed = [] if dtype == example.dtype else [f"computed in {str(dtype).removeprefix('torch.')}"]
    yields = "calls in which torch is ahead go to torch" if chosen.yields and not op.requested() else ""
    return chosen.name, "; ".join([*passed_over, *computed, *(note for note in (module.note, yields, more) if note)])


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether the layer computes its attention itself in evaluation without gradients, as far as it can be told."""
    attention = layer.self_attn
    return (
        isinstance(attention, nn.MultiheadAttention)
        and type(layer).forward is nn.TransformerEncoderLayer.forward
        and torch.backends.mha.get_fastpath_enabled()
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention.num_heads % 2 == 0
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
    )


def _require_module(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseq.{function}: model must be a torch.nn.Module, got {type(model).__name__}")
