"""The decoder of recurrent sequence-to-sequence models, on one op for all of its steps."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq.nn.attention_mechanism import AdditiveAttention, LuongAttention, check_padding, check_sizes
from fastseq.nn.places import Places, as_lengths, padding_mask
from fastseq.nn.serving import Served, are_sound, cast
from fastseq.ops.attention_decoder import CELLS, TABLE, Arguments, check_lengths, decode
from fastseq.ops.contract import autocast_dtype, computes_in, has_hooks, why_torch
from fastseq.ops.linear import linear
from fastseq.reference.attention_decoder import CELLS as FORMULAS
from fastseq.registry import Op


class AttentionDecoderState(NamedTuple):
    """Where a decoder stands: what it goes on from. Its tensors have a row for each of the batch, which
    `index_select(0, rows)` puts in another order.

    Attributes:
        h: [B, H]
        c: [B, H] of an LSTM, or None for zeros.
        feed: [B, F] what is fed at the next step, of a decoder that looks after its step; or None for zeros.
        step: [B] int64 which step is the next one, where the attention is monotonic; or None for 0.
    """

    h: Tensor
    c: Tensor | None = None
    feed: Tensor | None = None
    step: Tensor | None = None


class AttentionDecoderOutput(NamedTuple):
    """What a decoder gives. With lengths, sequences are 0 past them.

    Attributes:
        hidden: [T, B, H], or [B, T, H] if batch_first: all h_t.
        feed: [T, B, F] or [B, T, F]: the contexts, or what a decoder that looks after its step has seen,
            tanh(weight_out [context; h_t]), from which it predicts.
        weights: [T, B, S] or [B, T, S] of the places of the memory.
        state: after each row's last step.
    """

    hidden: Tensor
    feed: Tensor
    weights: Tensor
    state: AttentionDecoderState


class AttentionDecoder(Served, nn.Module):
    """A recurrent cell that looks at a memory at every step, over a whole target sequence: teacher forcing, or, with
    the state of the call before, one step of a search.

    "before" (Bahdanau et al. 2015, arXiv:1409.0473): the state looks, and what it sees is fed to the cell.

        context_t, weights_t = attention(h_{t-1}, memory)        h_t = cell([x_t; context_t], h_{t-1})

    "after" (Luong et al. 2015, arXiv:1508.04025, with input feeding): the cell is fed what was seen at the step before.

        h_t = cell([x_t; feed_{t-1}], h_{t-1})        context_t, weights_t = attention(h_t, memory)
        feed_t = tanh(weight_out [context_t; h_t])

    All steps are one call of a fused op where `attention` is `AdditiveAttention`, or `LuongAttention` without a window,
    the very class, without hooks, and a kernel serves. For any other there is a loop over the steps, and the attention
    may be any module which has `project(memory)` and, called with a query [B, H], the memory [B, S, K] and by keyword
    key_padding_mask and keys, returns the context [B, K] and the weights [B, S].

    The op computes half precision in float32 unless a kernel takes it as it is. Under autocast, products of the whole
    input and memory are lowered, and no others; results are float32.

    Args:
        input_size: I, the features of a step's input.
        hidden_size: H
        attention: what the state looks with; its query_size is H.
        cell: "gru", "lstm" or "rnn" (with tanh).
        attend: "before" or "after".
        feed_size: F, of what is fed "after"; by default H. Contexts are K.
        bias: whether the cell has bias_ih and bias_hh.
        batch_first: whether sequences and the memory are [B, T, I] and [B, S, K], or [T, B, I] and [S, B, K].
        memory_size: K, by default attention.key_size.
        device: of the parameters, those of a torch cell: weight_ih [G*H, I + F] and weight_hh [G*H, H], with as many
            bias_ih and bias_hh [G*H], and weight_out [F, K + H] for "after".
        dtype: of the parameters.

    Raises:
        ValueError, TypeError: an option is unknown, or a size does not fit.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_out: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        attention: nn.Module,
        cell: str = "gru",
        attend: str = "before",
        feed_size: int | None = None,
        bias: bool = True,
        batch_first: bool = False,
        memory_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(attention, nn.Module):
            raise TypeError(f"attention must be a torch.nn.Module, got {type(attention).__name__}")
        for name, given, known in (("cell", cell, tuple(CELLS)), ("attend", attend, ("before", "after"))):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        query_size: Any = getattr(attention, "query_size", hidden_size)
        if query_size != hidden_size:
            raise ValueError(f"attention must have query_size={hidden_size}, the hidden_size, got {query_size}")
        memory_size = getattr(attention, "key_size", None) if memory_size is None else memory_size
        if memory_size is None:
            raise ValueError(f"memory_size must be given: {type(attention).__name__} has no key_size")
        if feed_size is None:
            feed_size = memory_size if attend == "before" else hidden_size
        check_sizes(input_size=input_size, hidden_size=hidden_size, memory_size=memory_size, feed_size=feed_size)
        if attend == "before" and feed_size != memory_size:
            raise ValueError(f"feed_size must be the memory's, {memory_size}, for attend='before', got {feed_size}")
        self.input_size, self.hidden_size, self.memory_size, self.feed_size = (
            input_size, hidden_size, memory_size, feed_size,
        )  # fmt: skip
        self.cell, self.attend, self.bias, self.batch_first = cell, attend, bias, batch_first
        self.attention = attention
        G = FORMULAS[CELLS[cell]].gates * hidden_size
        shapes = dict(
            weight_ih=(G, input_size + feed_size),
            weight_hh=(G, hidden_size),
            bias_ih=(G,) if bias else None,
            bias_hh=(G,) if bias else None,
            weight_out=(feed_size, memory_size + hidden_size) if attend == "after" else None,
        )
        for name, shape in shapes.items():
            made = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H), as in torch's cells; those of the attention are its own business."""
        for weight in self._parameters.values():
            if weight is not None:
                nn.init.uniform_(weight, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    @property
    def table(self) -> Op:
        return TABLE

    def why_torch(self) -> str | None:
        return self._why_a_loop() or super().why_torch()

    def _why_a_loop(self) -> str | None:
        """Why the op does not know the attention, or None."""
        attention = self.attention
        kind = type(attention).__name__
        if type(attention) not in (AdditiveAttention, LuongAttention):
            return f"a loop over the steps, since its attention is of a class that the op does not know, {kind}"
        if has_hooks(attention):
            return f"a loop over the steps, since its {kind} has hooks"
        if isinstance(attention, LuongAttention) and attention.window is not None:
            return "a loop over the steps, since its attention is local"
        return None

    def forward(
        self,
        input: Tensor,
        memory: Tensor,
        state: Any = None,
        *,
        lengths: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> AttentionDecoderOutput:
        """Runs all steps of input.

        Args:
            input: [T, B, I], or [B, T, I] if batch_first.
            memory: [S, B, K], or [B, S, K] if batch_first: an encoder's output.
            state: that of the call before, an `AttentionDecoderState`; or h [B, H], for an LSTM also a pair (h, c); or
                None for zeros.
            lengths: [B] integers, how many steps each row has. Past them the sequences are 0, and the state is that
                after each row's last step.
            memory_key_padding_mask: [B, S] bool, true where the memory is padding: it gets no weight, whatever stands
                there. Where all is, context and weights are zeros.
            keys: attention.project(memory), like memory, for those who call step by step.

        Returns:
            hidden, feed, weights and the state to go on from.

        Raises:
            ValueError, TypeError: with the argument's name.
            RuntimeError: there is no step, or as torch's functions raise.
        """
        I, K, time = self.input_size, self.memory_size, 1 if self.batch_first else 0
        _check_shape("input", input, ("B", "T", I) if self.batch_first else ("T", "B", I))
        B, T = input.shape[1 - time], input.shape[time]
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in AttentionDecoder")
        _check_shape("memory", memory, (B, "S", K) if self.batch_first else ("S", B, K), input)
        S = memory.shape[time]
        if S == 0:
            raise ValueError("memory must have at least one place, got S=0")
        if keys is not None:
            _check_shape("keys", keys, (*memory.shape[:2], getattr(self.attention, "attention_size", "A")), input)
        absent = memory_key_padding_mask
        if absent is not None:
            check_padding("memory_key_padding_mask", absent, (B, S))
        state = self._checked_state(state, B, input)

        if lengths is not None:
            if not isinstance(lengths, Tensor):
                raise TypeError(f"lengths must be a torch.Tensor, got {type(lengths).__name__}")
            lengths = as_lengths(lengths, (B,))
            check_lengths(lengths, T)
        # What stands in padding must not reach the gradients of the products with all of it, not even times zero.
        if keys is None:
            padding = None if absent is None else (absent if self.batch_first else absent.t()).unsqueeze(-1)
            project: Any = self.attention.project
            keys = project(memory if padding is None else memory.masked_fill(padding, 0))
        if not self.batch_first:
            memory, keys = memory.transpose(0, 1), keys.transpose(0, 1)
        reason = self._why_a_loop() or why_torch(TABLE, input.device.type, input.dtype)
        if reason is None and self._is_sound(input):
            output = self._at_once(input, memory, state, lengths, absent, keys)
        else:
            input = self._cleared(input, lengths)
            input = input.transpose(0, 1) if self.batch_first else input
            steps = (input, memory, state, lengths, absent, keys)
            output = self._as_torch(self._step_by_step, reason, *steps)
        if not self.batch_first:
            return output
        return output._replace(
            hidden=output.hidden.transpose(0, 1),
            feed=output.feed.transpose(0, 1),
            weights=output.weights.transpose(0, 1),
        )

    def _is_sound(self, input: Tensor) -> bool:
        """Whether the weights are as the op wants them; if not, torch's own functions say what is wrong."""
        attention: Any = self.attention
        held = (*self._parameters.values(), attention.weight_query, attention.v)
        weights = [weight for weight in held if weight is not None]
        return are_sound(weights, input.dtype, input.device, autocast_dtype(input) is not None)

    def _cleared(self, input: Tensor, lengths: Tensor | None) -> Tensor:
        """input with zeros past the lengths."""
        if lengths is None:
            return input
        past = padding_mask(lengths, input.shape[1 if self.batch_first else 0], input.device)
        return input.masked_fill((past if self.batch_first else past.t()).unsqueeze(-1), 0)

    def _gates(self, input: Tensor, lengths: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the cell's gates get from input, [T, B, G*H]; what of it is padding is not computed, or from zeros."""
        places = Places.up_to(lengths, input, self.batch_first)
        if places is not None:
            rows = linear(places.rows_of(input), weight, bias)
            return (places.transposed() if self.batch_first else places).batch_of(rows)
        gates = linear(self._cleared(input, lengths), weight, bias)
        return gates.transpose(0, 1) if self.batch_first else gates

    def _at_once(
        self,
        input: Tensor,
        memory: Tensor,
        state: AttentionDecoderState,
        lengths: Tensor | None,
        absent: Tensor | None,
        keys: Tensor,
    ) -> AttentionDecoderOutput:
        """All steps by the op, of memory and keys [B, S, ...]; input is as it came."""
        low, I = autocast_dtype(input), self.input_size
        wanted = input.dtype if low is None else torch.float32
        compute = computes_in(TABLE.name, input.device.type, wanted)
        attention: Any = self.attention
        weight_ih, weight_hh, bias_ih, bias_hh = cast(
            (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh), compute
        )
        weight_query, v, weight_out = cast((attention.weight_query, attention.v, self.weight_out), compute)
        h, c, feed, keys, memory = cast((*state[:3], keys, memory), compute)
        gates = self._gates(input.to(compute), lengths, weight_ih[:, :I], bias_ih).to(compute)
        arguments = Arguments(
            gates, h, c, feed, keys, memory, absent, lengths,
            weight_ih[:, I:], weight_hh, bias_hh, weight_query, v, weight_out, CELLS[self.cell],
        )  # fmt: skip
        hidden, feeds, weights, h_n, c_n = cast(decode(arguments)[:5], wanted)
        if feed is not None:  # it is carried on
            feed = _last(feeds, feed.to(wanted), lengths)
        after = AttentionDecoderState(h_n, None if c is None else c_n, feed, state.step)
        return AttentionDecoderOutput(hidden, feeds, weights, after)

    def _step_by_step(
        self,
        input: Tensor,
        memory: Tensor,
        state: AttentionDecoderState,
        lengths: Tensor | None,
        absent: Tensor | None,
        keys: Tensor,
    ) -> AttentionDecoderOutput:
        """The same, one step after the other, of input [T, B, I]: for any attention."""
        lengths = None if lengths is None else lengths.to(input.device)
        steps = []
        new: tuple[Any, ...]
        outputs: tuple[Any, ...]
        for t, x in enumerate(input):
            h, c, feed, step = state
            if self.attend == "before":
                feed, weights = self._look(h, memory, absent, keys, step)
            assert feed is not None  # from the state
            h, c = self._cell(torch.cat([x.to(h.dtype), feed], -1), h, c)
            if self.attend == "after":
                context, weights = self._look(h, memory, absent, keys, step)
                assert self.weight_out is not None
                feed = linear(torch.cat([context, h], -1), self.weight_out).tanh().to(h.dtype)
            # Only a decoder that looks after its step carries on what it was fed.
            new = (h, c, feed if self.attend == "after" else None, step if step is None else step + 1)
            outputs = (h, feed, weights)
            if lengths is not None:
                runs = lengths > t
                new = tuple(a if a is None else _where(runs, a, b) for a, b in zip(new, state, strict=True))
                outputs = tuple(_where(runs, a, torch.zeros_like(a)) for a in outputs)
            state = AttentionDecoderState._make(new)
            steps.append(outputs)
        hidden, feeds, all_weights = (torch.stack(of_steps) for of_steps in zip(*steps, strict=True))
        return AttentionDecoderOutput(hidden, feeds, all_weights, state)

    def _look(
        self, query: Tensor, memory: Tensor, absent: Tensor | None, keys: Tensor, step: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        place = {} if step is None else dict(positions=step)
        context, weights = self.attention(query, memory, key_padding_mask=absent, keys=keys, **place)
        return context.to(query.dtype), weights.to(query.dtype)

    def _cell(self, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One step of torch's cell."""
        weights: Any = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if c is not None:
            new_h, new_c = torch.lstm_cell(x, (h, c), *weights)
            return new_h.to(h.dtype), new_c.to(h.dtype)
        step = torch.gru_cell if self.cell == "gru" else torch.rnn_tanh_cell
        return step(x, h, *weights).to(h.dtype), None

    def _checked_state(self, state: Any, B: int, input: Tensor) -> AttentionDecoderState:
        """A state as the user gives it, with zeros for what there shall be and is not."""
        if not isinstance(state, AttentionDecoderState):
            if isinstance(state, (tuple, list)):
                if self.cell != "lstm" or len(state) != 2:
                    expected = "h, (h, c)" if self.cell == "lstm" else "h"
                    raise TypeError(
                        f"state must be {expected} or an AttentionDecoderState, got {len(state)} in a tuple"
                    )
                state = AttentionDecoderState(*state)
            else:
                state = AttentionDecoderState(state)
        wanted = input.dtype if autocast_dtype(input) is None else torch.float32
        there = (True, self.cell == "lstm", self.attend == "after")
        widths = (self.hidden_size, self.hidden_size, self.feed_size)
        tensors: list[Tensor | None] = []
        for name, t, is_there, width in zip(state._fields, state, there, widths, strict=False):
            if t is None:
                t = input.new_zeros(B, width, dtype=wanted) if is_there else None
            elif not is_there:
                raise ValueError(f"state.{name} must be None for cell={self.cell!r}, attend={self.attend!r}")
            else:
                _check_shape(f"state.{name}", t, (B, width), input)
                t = t.to(wanted)
            tensors.append(t)
        step = state.step
        if not getattr(self.attention, "is_monotonic", False):
            step = None
        elif step is None:
            step = torch.zeros(B, dtype=torch.int64, device=input.device)
        elif step.shape != (B,) or step.dtype != torch.int64:
            raise ValueError(f"state.step must be int64 [{B}], got {step.dtype} {list(step.shape)}")
        h, c, feed = tensors
        assert h is not None
        return AttentionDecoderState(h, c, feed, step)

    def extra_repr(self) -> str:
        options: dict[str, Any] = dict(cell=self.cell, attend=self.attend)
        if self.attend == "after":
            options["feed_size"] = self.feed_size
        if not self.bias:
            options["bias"] = False
        if self.batch_first:
            options["batch_first"] = True
        told = ", ".join(f"{name}={option!r}" for name, option in options.items())
        return f"{self.input_size}, {self.hidden_size}, {told}"


def _where(runs: Tensor, a: Tensor, b: Any) -> Tensor:
    """a in the rows that run, b in the others."""
    return torch.where(runs if a.dim() == 1 else runs.unsqueeze(-1), a, b)


def _last(feeds: Tensor, feed0: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, F] what is fed after each row's last step."""
    if lengths is None:
        return feeds[-1]
    lengths = lengths.to(feeds.device)
    rows = torch.arange(len(lengths), device=feeds.device)
    return _where(lengths > 0, feeds[(lengths - 1).clamp(min=0), rows], feed0)


def _check_shape(name: str, t: Any, shape: tuple[int | str, ...], input: Tensor | None = None) -> None:
    """Raises unless t is a tensor of this shape, where a letter stands for any size, on input's device and of its dtype
    but under autocast.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    sizes = zip(t.shape, shape, strict=False)
    if t.dim() != len(shape) or any(isinstance(want, int) and got != want for got, want in sizes):
        raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], got {list(t.shape)}")
    if input is None:
        return
    if t.device != input.device:
        raise ValueError(f"{name} must be on input's device, {input.device}, got {t.device}")
    if t.dtype != input.dtype and autocast_dtype(input) is None:
        raise ValueError(f"{name} must be {input.dtype}, as input is, got {t.dtype}")
