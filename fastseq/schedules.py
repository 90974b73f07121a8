"""Learning rates that warm up and then fall with the square root of the step, for `torch.optim`."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def noam(optimizer: Optimizer, d_model: int, warmup: int = 4000) -> LambdaLR:
    """That of the Transformer (Vaswani et al. 2017, arXiv:1706.03762, section 5.3): at step t = 1, 2, ...

        lr d_model^-0.5 min(t^-0.5, t warmup^-1.5)

    Args:
        optimizer: its lr is a factor, 1 in the paper.
        d_model: the features of a place.
        warmup: the step at which the rate is the highest.

    Raises:
        ValueError: d_model or warmup is not positive.
    """
    _check_positive(d_model=d_model, warmup=warmup)
    return LambdaLR(optimizer, lambda done: d_model**-0.5 * min((done + 1) ** -0.5, (done + 1) * warmup**-1.5))


def inverse_square_root(optimizer: Optimizer, warmup: int = 4000) -> LambdaLR:
    """The same with the optimizer's own lr as the highest: at step t = 1, 2, ...

        lr min(t / warmup, sqrt(warmup / t))

    Args:
        optimizer: its lr is reached at step warmup.
        warmup: how many steps the rate rises.

    Raises:
        ValueError: warmup is not positive.
    """
    _check_positive(warmup=warmup)
    return LambdaLR(optimizer, lambda done: min((done + 1) / warmup, (warmup / (done + 1)) ** 0.5))


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
