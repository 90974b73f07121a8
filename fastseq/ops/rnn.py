"""The ops `fastseq::rnn_tanh` and `fastseq::rnn_relu`: one layer of Elman's RNN in one or both directions."""

from torch import Tensor

from fastseq.ops.recurrent import Arguments, Recurrent
from fastseq.reference import rnn_relu, rnn_tanh

RNN_TANH = Recurrent("rnn_tanh", gates=1, tape=0, has_cell=False, reference=rnn_tanh)
RNN_RELU = Recurrent("rnn_relu", gates=1, tape=0, has_cell=False, reference=rnn_relu)


def rnn(
    x: Tensor,
    h0: Tensor | None,
    weights: list[Tensor],
    bidirectional: bool = False,
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of `torch.nn.RNN`, in one direction (D=1) or both (D=2).

    Args:
        x: [T, B, I], any strides; or packed [N, I].
        h0: [D, B, H] initial state, or None for zeros.
        weights: for each direction w_ih [H, I], w_hh [H, H] and, if there are biases, b_ih [H] and b_hh [H]. All
            tensors share x's dtype and device.
        bidirectional: whether there are two directions.
        nonlinearity: "tanh" or "relu".
        batch_sizes: [T] int64 on the CPU, the rows of each step of packed input.
        lengths: [B] int64 on the CPU, how many steps each row has; past them y is 0.
        reset: [T, B] bool, where the state starts anew before that step.
        reset_h: [D, B, H] what it starts from, or None for zeros.

    Returns:
        y [T, B, D*H] (packed [N, D*H]) and h_n [D, B, H].

    Raises:
        ValueError: a shape, a dtype or the nonlinearity is not as above; the message names the argument.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    op = RNN_TANH if nonlinearity == "tanh" else RNN_RELU
    arguments = Arguments(x, h0, None, weights, bidirectional, batch_sizes, lengths, reset, reset_h)
    op.check(arguments)
    return op(arguments)[:2]
