"""The op `fastseq::gru`: one GRU layer in one or both directions, from its raw input."""

from torch import Tensor

from fastseq.ops.recurrent import Arguments, Recurrent
from fastseq.reference import gru as reference

GRU = Recurrent("gru", gates=3, tape=4, has_cell=False, reference=reference)


def gru(
    x: Tensor,
    h0: Tensor | None,
    weights: list[Tensor],
    bidirectional: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of `torch.nn.GRU`, in one direction (D=1) or both (D=2).

    Args:
        x: [T, B, I], any strides; or packed [N, I].
        h0: [D, B, H] initial state, or None for zeros.
        weights: for each direction w_ih [3H, I], w_hh [3H, H] and, if there are biases, b_ih [3H] and b_hh [3H], with
            gates in torch's order r, z, n. All tensors share x's dtype and device.
        bidirectional: whether there are two directions.
        batch_sizes: [T] int64 on the CPU, the rows of each step of packed input.
        lengths: [B] int64 on the CPU, how many steps each row has; past them y is 0.
        reset: [T, B] bool, where the state starts anew before that step.
        reset_h: [D, B, H] what it starts from, or None for zeros.

    Returns:
        y [T, B, D*H] (packed [N, D*H]) and h_n [D, B, H].

    Raises:
        ValueError: a shape or a dtype is not as above; the message names the argument.
    """
    arguments = Arguments(x, h0, None, weights, bidirectional, batch_sizes, lengths, reset, reset_h)
    GRU.check(arguments)
    return GRU(arguments)[:2]
