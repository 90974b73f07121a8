"""fastseq as an attention implementation of Hugging Face transformers, beside its "eager" and "sdpa".

transformers asks two functions: one makes the mask that a forward shares among its layers, the other attends. Ours make
none: what is known by its bounds and its padding stays so (`Mask`) until the kernel gets it.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastseq.ops.attention import TABLE, Arguments, attention, compute_dtype, wanted_weights
from fastseq.ops.contract import autocast_dtype, is_plain, new_seed, requested, why_torch
from fastseq.reference.attention import visible
from fastseq.registry import HALF, BackendError

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, __version__, masking_utils
    from transformers.utils.output_capturing import _active_collector
except ImportError as error:
    raise ImportError(
        f"fastseq.integrations.transformers needs pip install 'fastseq[transformers]': {error}"
    ) from error

_EXPECTED = {"q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"}
if not inspect.signature(masking_utils.sdpa_mask).parameters.keys() >= _EXPECTED:
    raise ImportError(
        f"fastseq.integrations.transformers needs pip install 'fastseq[transformers]': transformers {__version__} makes"
        " masks in another way"
    )

NAME = "fastseq"

# What models give to attention that changes nothing: the mask says the same, or it is about something else.
_IGNORED = frozenset(
    [
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "cu_seqlens",
        "deterministic",
        "hidden_states",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "max_seqlen",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "sliding_window",
        "token_type_ids",
        "use_cache",
    ]
)
# What eager functions compute, as far as their arguments show, and we do.
_UNDERSTOOD = frozenset(
    [
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "scaling",
        "dropout",
        "softcap",
        "position_bias",
        "sliding_window",
    ]
)


def register() -> None:
    """Makes `attn_implementation="fastseq"` known to transformers, for `from_pretrained`, `from_config` and
    `set_attn_implementation`. `fastseq.accelerate` does so by itself.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


class Mask(Tensor):
    """[N, 1, L, S] bool, which keys a query sees, known by bounds and padding.

    It has no elements until something wants to see them. What torch does, it does to the mask written out, which from
    then on is what counts, since it may have been changed.
    """

    padding: Tensor | None
    bounds: tuple[int, int, bool]
    keys: int | None
    written: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int],
        device: Any,
        padding: Tensor | None,
        bounds: tuple[int, int, bool],
        keys: int | None = None,
    ) -> "Mask":
        """A mask of N rows, L queries and S keys.

        Args:
            shape: (N, L, S)
            device: of the mask.
            padding: [N, keys] bool, true where a key is left out, or None.
            bounds: left, right and bottom_right of the op, for the first `keys` keys.
            keys: how many keys any query sees, if not S; those after them are left out.
        """
        N, L, S = shape
        mask = Tensor._make_wrapper_subclass(cls, (N, 1, L, S), dtype=torch.bool, device=device)
        mask.padding, mask.bounds, mask.keys, mask.written = padding, bounds, keys, None
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.add.Tensor and any(t.is_floating_point() for t in args if isinstance(t, Tensor)):
            raise RuntimeError(  # a TypeError would become one about operands
                "a layer adds its mask to scores, but fastseq's masks are boolean: the layer does not go through"
                " transformers' AttentionInterface; model.set_attn_implementation('eager') goes without fastseq"
            )
        args, kwargs = tree_map_only(Mask, Mask.write, (args, kwargs or {}))
        return func(*args, **kwargs)

    def write(self) -> Tensor:
        """The mask written out."""
        if self.written is None:
            N, _, L, S = self.shape
            keys = S if self.keys is None else self.keys
            seen = visible(L, keys, *self.bounds, self.device)
            if seen is None:
                seen = torch.ones(L, keys, dtype=torch.bool, device=self.device)
            seen = seen[None] if self.padding is None else seen & ~self.padding[:, None]
            self.written = F.pad(seen, (0, S - keys))[:, None].repeat(N // len(seen), 1, 1, 1)
        return self.written

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Mask({list(self.shape)}, bounds={self.bounds}, keys={self.keys}, padding={self.padding is not None})"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """The mask of a forward, as transformers asks for it: see `transformers.masking_utils.sdpa_mask`.

    Returns:
        A `Mask` where the pattern is a known one: causal or not, with a window or not, with padding or not. Else, and
        where a graph is traced, the boolean mask [N, 1, L, S] of "sdpa", which is never left to `is_causal`.
    """
    offset = q_offset if isinstance(q_offset, Tensor) else None  # static caches count in a tensor
    bounds = None
    if is_plain(attention_mask, offset) and not masking_utils.is_tracing(attention_mask):
        bounds = bounds_of(mask_function)
    if bounds is not None:
        left, right = bounds
        place = int(q_offset) - kv_offset  # the first query's own, among the keys
        keys = kv_length if right < 0 else min(kv_length, place + q_length + right)
        if place + right >= keys - 1:
            right = -1
        if left >= place + q_length - 1:
            left = -1
        bounded = left >= 0 or right >= 0
        padded = attention_mask is None or (attention_mask.dim() == 2 and len(attention_mask) == batch_size)
        if keys > 0 and padded and (not bounded or place in (0, keys - q_length)):
            return Mask(
                (batch_size, q_length, kv_length),
                device,
                _padding(attention_mask, kv_offset, keys),
                (left, right, bounded and place != 0),
                None if keys == kv_length else keys,  # a graph for one length serves others
            )
    # Without a mask, a layer that says it is causal would be.
    config_is_causal = getattr(options.get("config"), "is_causal", None) is not False
    options["allow_is_causal_skip"] = False
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and config_is_causal,
        **options,
    )


def _padding(attention_mask: Tensor | None, start: int, keys: int) -> Tensor | None:
    """[N, keys] bool, which of the keys from `start` on are left out; None if none is."""
    if attention_mask is None:
        return None
    seen = attention_mask[:, start : start + keys].bool()
    seen = F.pad(seen, (0, keys - seen.shape[1]))  # nothing is said about the others: they are left out
    return None if seen.all() else ~seen


# Their inner functions are known by their code, which is one object for all of them.
_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_WINDOW_OF_BOTH_SIDES = masking_utils.sliding_window_bidirectional_overlay(1).__code__


def bounds_of(mask_function: Callable) -> tuple[int, int] | None:
    """How many keys before and after its own place a query sees by one of transformers' mask functions, -1 for all.

    None if the function is not one that says so.
    """
    if mask_function is masking_utils.causal_mask_function:
        return -1, 0
    if mask_function is masking_utils.bidirectional_mask_function:
        return -1, -1
    if not isinstance(mask_function, FunctionType) or mask_function.__closure__ is None:
        return None
    held, *others = [cell.cell_contents for cell in mask_function.__closure__]
    if others:
        return None
    if mask_function.__code__ is _AND:
        parts = [bounds_of(part) for part in held]
        if any(part is None for part in parts):
            return None
        sides: Any = zip(*parts, strict=True)
        left, right = (min((bound for bound in side if bound >= 0), default=-1) for side in sides)
        return left, right
    if type(held) is not int or held < 1:
        return None
    if mask_function.__code__ is _WINDOW:
        return held - 1, -1
    return (held, held) if mask_function.__code__ is _WINDOW_OF_BOTH_SIDES else None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention, as the layers of transformers ask for it.

    Calls that no kernel serves go to "sdpa", or to the model's own eager function where they ask for more than that.

    Args:
        module: the layer.
        query: [N, H, L, E]
        key: [N, Hk, S, E], where H is a multiple of Hk.
        value: [N, Hk, S, Ev]
        attention_mask: of [N, 1, L, S] or what it can be broadcast from; a boolean one is true where a key takes part,
            one of numbers is added to the scores.
        dropout: the probability of a weight to be dropped, in training.
        scaling: of the scores; 1/sqrt(E) by default.
        is_causal: whether a query sees only keys up to its own place if there is no mask; by default, what the module
            says. A single query sees all.
        position_bias: broadcastable to [N, H, L, S], added to the scores.
        softcap: the bound of the scores, None for none.
        output_attentions: whether to return the weights.
        kwargs: what else the model gives; what is not known to be without effect goes to the model's eager function.

    Returns:
        [N, L, H, Ev], and the weights [N, H, L, S] or None.

    Raises:
        NotImplementedError: the model gives something that neither we nor its eager function know.
    """
    unknown = [name for name, given in kwargs.items() if name not in _IGNORED and given is not None]
    p = dropout if module.training else 0.0
    output_attentions = output_attentions or _are_collected()
    if not unknown:
        arguments = _arguments(module, query, key, value, attention_mask, p, scaling, is_causal, position_bias, softcap)
        if arguments is not None:
            out, _, weights = attention(arguments, wanted_weights(output_attentions, False))
            wanted = autocast_dtype(query) or query.dtype
            out = out.to(wanted).transpose(1, 2).contiguous()
            if not output_attentions:
                return out, None
            return out, F.pad(weights.to(wanted), (0, key.shape[2] - arguments.key.shape[2]))
    if (asked_for := requested(TABLE.name)) is not None:
        raise BackendError(
            f"{type(module).__name__}: {asked_for} was asked for but transformers' own path has to serve"
        )
    if isinstance(attention_mask, Mask):
        attention_mask = attention_mask.write()
    options = dict(kwargs, dropout=p, scaling=scaling)
    if not (unknown or softcap or output_attentions):
        sdpa = AttentionInterface()["sdpa"]
        options.update(is_causal=is_causal, position_bias=position_bias)
        return sdpa(module, query, key, value, attention_mask, **options)
    return _eager(module, query, key, value, attention_mask, unknown, is_causal, position_bias, softcap, options)


def _are_collected() -> bool:
    """Whether a model collects what its layers return as weights, which it does not always tell them."""
    # A layer compiled by itself cannot ask; a compiled model keeps it in the other place.
    collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    if collected:
        for name in collected:
            if name.endswith("attentions"):
                return True
    return False


def _arguments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    bias: Tensor | None,
    softcap: float | None,
) -> Arguments | None:
    """The op's, or None if it cannot take the call."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or not query.dtype.is_floating_point:
        return None
    if why_torch(TABLE, query.device.type, query.dtype) is not None:
        return None
    N, H, L, E = query.shape
    heads, S = key.shape[1:3]
    low = autocast_dtype(query)
    alike = query.dtype == key.dtype == value.dtype
    if key.shape[0] != N or key.shape[3] != E or heads == 0 or H % heads or not (alike or low is not None):
        return None
    if value.shape[:3] != key.shape[:3] or not query.device == key.device == value.device:
        return None
    keys: int | None = None
    left, right, bottom_right = -1, -1, False
    padding = None
    if mask is None:
        if L > 1 and (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
            right = 0  # as in "sdpa", both begin at the same place, and what follows is not used yet
            keys = L if S > L else None
    elif isinstance(mask, Mask) and mask.written is None:
        if (mask.shape[0], mask.shape[2], mask.shape[3]) != (N, L, S) or mask.device != query.device:
            return None
        keys, padding, (left, right, bottom_right) = mask.keys, mask.padding, mask.bounds
        mask = None
    else:
        mask = mask.write() if isinstance(mask, Mask) else mask
        if not _fits(mask, query, S):
            return None
        if (
            mask.dtype == torch.bool
            and mask.shape[1] == mask.shape[2] == 1
            and mask.shape[0] == N
            and mask.shape[3] == S
        ):
            padding, mask = ~mask[:, 0, 0], None
    if bias is not None:
        if not _fits(bias, query, S) or bias.dtype == torch.bool:
            return None
        if mask is not None:
            mask = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
        else:
            mask = bias
    if keys is not None:
        key, value = key[:, :, :keys], value[:, :, :keys]
        if mask is not None:
            mask = mask[..., :keys]
    # To round what autocast would lower gains nothing on CPUs, whose kernels compute in float32.
    given = query.dtype if low is None or (alike and query.device.type == "cpu") else low
    compute = compute_dtype(given, query, key, value, mask)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(torch.float32 if compute in HALF else compute)
    return Arguments(
        query if query.dtype == compute else query.to(compute),
        key if key.dtype == compute else key.to(compute),
        value if value.dtype == compute else value.to(compute),
        mask,
        padding,
        seed=new_seed(dropout),
        scale=E**-0.5 if scaling is None else float(scaling),
        softcap=float(softcap or 0.0),
        dropout_p=float(dropout),
        left=left,
        right=right,
        bottom_right=bottom_right,
    )


def _fits(mask: Tensor, query: Tensor, S: int) -> bool:
    """Whether it broadcasts to [N, H, L, S]."""
    if mask.dim() != 4 or not (mask.dtype == torch.bool or mask.dtype.is_floating_point) or mask.device != query.device:
        return False
    return all(own in (1, size) for own, size in zip(mask.shape, (*query.shape[:3], S), strict=True))


@cache
def _eager_of(kind: Any) -> tuple[Callable | None, frozenset[str]]:
    """The eager function of a layer's class and the names of its parameters; a model's are beside each other."""
    for base in kind.__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            names = set(inspect.signature(function).parameters)
            if "sinks" in inspect.unwrap(function).__code__.co_names:  # it finds them in the module
                names |= {"s_aux", "sinks"}
            return function, frozenset(names - {"kwargs"})
    return None, frozenset()


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    unknown: list[str],
    is_causal: bool | None,
    position_bias: Tensor | None,
    softcap: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager function, with what it needs to see in the mask."""
    function, names = _eager_of(type(module))  # type: ignore[arg-type]
    for name, given in (("position_bias", position_bias), ("softcap", softcap)):
        if given is not None:
            options[name] = given
            unknown = [*unknown, name]
    for name in unknown:
        if function is None or name not in names:
            raise NotImplementedError(
                f"{type(module).__name__} gives {name} to its attention, which fastseq and the model's eager attention"
                " do not know; model.set_attn_implementation('sdpa') or 'eager' goes without fastseq"
            )
    if function is None:
        raise NotImplementedError(
            f"{type(module).__name__}: nothing here can compute its attention, and its model has no eager one"
        )
    L, S = query.shape[2], key.shape[2]
    if mask is None and L > 1 and (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        mask = visible(L, S, -1, 0, False, query.device)[None, None]  # type: ignore[index]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    return function(module, query, key, value, mask, **options)


def owners(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models of transformers in a module, by name: one for each config, the outermost of those that share it."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield name, module


def accelerate(model: PreTrainedModel) -> None:
    """Sets "fastseq" as a model's attention, not that of models in it with other configs, unless there is a reason."""
    if reason_against(model) is None and model.config._attn_implementation != NAME:
        register()
        model._fastseq_replaced = model.config._attn_implementation
        _set(model, NAME)


def restore(model: PreTrainedModel) -> None:
    """Puts back what `accelerate` has replaced; what transformers would choose where "fastseq" was there before."""
    replaced = model.__dict__.pop("_fastseq_replaced", None)
    if model.config._attn_implementation == NAME:
        _set(model, replaced or model.get_correct_attn_implementation(None))


def _set(model: PreTrainedModel, name: str) -> None:
    """`model.set_attn_implementation`, which would also set it in models within that have configs of their own."""
    model.config._attn_implementation_internal = name


def reason_against(model: PreTrainedModel) -> str | None:
    """Why a model's attention is left to transformers, or None."""
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    classes = type(model).__mro__
    if any(_knows_names(base) for base in classes[: classes.index(PreTrainedModel)]):
        return "its attention knows implementations by name and takes no others"
    _, names = _eager_of(type(model))  # type: ignore[arg-type]
    if not model._supports_sdpa and not ("softcap" in names and names <= _UNDERSTOOD):
        return "transformers allows it no sdpa, so its attention may be more than scaled dot product attention"
    return None


@cache
def _knows_names(kind: Any) -> bool:
    """Whether the code beside a model's class does something for implementations that it names, and not for others."""
    try:
        code = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return False
    return re.search(r"_attn_implementation (not )?in \(", code) is not None


def explained(model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """For each model of transformers in a module: its name and class, what serves its attention, what there is to say.

    Models without layers of attention of their own, beside those of models within, are passed over.
    """
    by_config = {id(owner.config): (name, owner) for name, owner in owners(model)}
    attending: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        attends = hasattr(config, "_attn_implementation") and "Attention" in type(module).__name__
        if attends and not isinstance(module, PreTrainedModel):
            attending.setdefault(id(config), by_config.get(id(config), (name, module)))
    for name, owner in by_config.values():  # a model whose layers have no config does not look for implementations
        if not any(id(inner.config) in attending for _, inner in owners(owner)):
            attending.setdefault(id(owner.config), (name, owner))
    for name, module in attending.values():
        yield (name or "(the model)", type(module).__name__, *_serving(module))


def _serving(module: nn.Module) -> tuple[str, str]:
    """What serves attention under a module's config, and what there is to say."""
    config: Any = module.config
    name = config._attn_implementation
    if name != NAME:
        if not isinstance(module, PreTrainedModel):
            return f"transformers' {name}", "no model has its config: only those of models are set"
        note = reason_against(module) or "not accelerated; fastseq.accelerate(model) changes that"
        return f"transformers' {name}", note
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    device, dtype = (weight.device.type, weight.dtype) if weight is not None else ("cpu", torch.float32)
    if (reason := why_torch(TABLE, device, dtype)) is not None:
        return "transformers' sdpa", reason
    try:
        served_by = TABLE.preferred(device, TABLE.computes_in(device, dtype)).name
    except BackendError as error:
        return "nothing", str(error)
    _, names = _eager_of(type(module))  # type: ignore[arg-type]
    beyond = sorted(names - _UNDERSTOOD)
    return served_by, f"but calls with {' or '.join(beyond)} go to the model's eager attention" if beyond else ""
