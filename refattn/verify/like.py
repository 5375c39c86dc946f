"""Other libraries' arrays and conventions: a kernel of theirs is judged by its own rules."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Convention:
    """How a library calls attention, where it differs from refattn.

    Attributes
    ----------
    library : str
        Name and release that this was tested with.
    layout : str
        Axes of the arrays that the kernel is called with.
    top_left : bool
        With causal and n != m, query i sees keys j <= i (aligned at the first key), where refattn
        aligns at the last.
    give, take : callable
        From a NumPy array to the library's, and back.
    """

    library: str
    layout: str
    top_left: bool
    give: Callable
    take: Callable


def _to_torch(x):
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _from_torch(y):
    import torch

    if not isinstance(y, torch.Tensor):
        return y
    y = y.detach().cpu()
    if y.dtype == torch.bfloat16:
        import ml_dtypes

        return y.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return y.numpy()


CONVENTIONS = {
    "torch": Convention(
        "torch 2.13, torch.nn.functional.scaled_dot_product_attention",
        "(batch, heads, n, d)",
        top_left=True,
        give=_to_torch,
        take=_from_torch,
    )
}


def called_like(kernel, convention):
    """The kernel as refattn would call it: arrays (n, d) of NumPy in and out."""

    def run(q, k, v):
        y = kernel(*(convention.give(x)[None, None] for x in (q, k, v)))
        y = convention.take(y)
        one_head = isinstance(y, np.ndarray) and y.ndim == 4 and y.shape[:2] == (1, 1)
        return y[0, 0] if one_head else y

    return run


def aligned(attention):
    """softmax_attention with one option more: ``top_left`` aligns causal at the first key."""

    def run(q, k, v, *, top_left=False, **options):
        n, m = q.shape[-2], k.shape[-2]
        if top_left and options.get("causal") and n != m:
            past = np.arange(m) <= np.arange(n)[:, None]
            mask = options.get("mask")
            options |= {"causal": False, "mask": past if mask is None else past & mask}
        return attention(q, k, v, **options)

    return run
