"""The op `fastseq::lstm`: one LSTM layer in one or both directions, from its raw input."""

from torch import Tensor

from fastseq.ops.recurrent import Arguments, Recurrent
from fastseq.reference import lstm as reference

LSTM = Recurrent("lstm", gates=4, tape=4, has_cell=True, reference=reference)


def lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bidirectional: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of `torch.nn.LSTM`, in one direction (D=1) or both (D=2); `fastseq.ops.recurrent.Arguments` has the
    details.

    Args:
        x: [T, B, I], any strides; or packed [N, I].
        h0: [D, B, P] initial hidden state, or None for zeros. P is H unless there is a projection.
        c0: [D, B, H] initial cell state, or None for zeros.
        weights: for each direction w_ih [4H, I], w_hh [4H, P], if there are biases b_ih [4H] and b_hh [4H], and w_hr
            [P, H] if there is
            a projection, with gates in torch's order i, f, g, o. All tensors share x's dtype and device.
        bidirectional: whether there are two directions.
        batch_sizes: [T] int64 on the CPU, the rows of each step of packed input.
        lengths: [B] int64 on the CPU, how many steps each row has; past them y is 0.
        reset: [T, B] bool, where the state starts anew before that step.
        reset_h: [D, B, P] what it starts from, or None for zeros.
        reset_c: [D, B, H], likewise.

    Returns:
        y [T, B, D*P] (packed [N, D*P]), h_n [D, B, P] and c_n [D, B, H].

    Raises:
        ValueError: a shape or a dtype is not as above; the message names the argument.
    """
    arguments = Arguments(x, h0, c0, weights, bidirectional, batch_sizes, lengths, reset, reset_h, reset_c)
    LSTM.check(arguments)
    return LSTM(arguments)[:3]
