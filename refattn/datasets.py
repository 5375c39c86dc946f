"""Shipped with the package: queries, keys and values of a trained model, and what the CUDA compiler
said of each kernel."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent / "data"
HEADS, KERNELS = DATA / "heads.npz", DATA / "kernels.json"
STATISTICS = ("mass_within_16", "entropy", "rank_99", "largest_column", "largest_logit")


@dataclass(frozen=True, eq=False)
class Heads:
    """Twelve heads of a trained encoder on 512 tokens of text; every array is read-only.

    With P = softmax(q kᵀ / sqrt(32)), (512, 512), a head's statistics are

        mass_within_16  the share of P's mass with |i - j| <= 16
        entropy         of a row of P in nats, the mean over rows; log 512 = 6.24 at most
        rank_99         singular values of P that hold 99% of the sum of all squares
        largest_column  the largest share of P's mass that one key takes
        largest_logit   the largest entry of q kᵀ / sqrt(32)

    Attributes
    ----------
    q, k, v : ndarray (12, 512, 32), float32
    layer, head : ndarray (12,) of int
        Where each stands among the encoder's 6 layers of 12 heads, from 0.
    kind : tuple of 12 str
        What each was chosen for: "local", "diffuse", "sink", "low rank" and so on.
    statistics : dict of str to ndarray (12,)
    tokens : tuple of 512 str
        The text's tokens, from [CLS] to [SEP]; "##" marks the continuation of a word.
    """

    q: np.ndarray = field(repr=False)
    k: np.ndarray = field(repr=False)
    v: np.ndarray = field(repr=False)
    layer: np.ndarray
    head: np.ndarray
    kind: tuple[str, ...]
    statistics: dict[str, np.ndarray]
    tokens: tuple[str, ...] = field(repr=False)

    def pick(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k and v, each (512, 32), of the head chosen as `kind`; see the attribute `kind`."""
        if kind not in self.kind:
            raise ValueError(f"no head of kind {kind!r}, the kinds are {', '.join(self.kind)}")
        row = self.kind.index(kind)
        return self.q[row], self.k[row], self.v[row]


def load_heads() -> Heads:
    """Load the heads of refattn/data/heads.npz; its README says where they come from.

    Returns
    -------
    Heads

    Examples
    --------
    >>> heads = load_heads()
    >>> heads.q.shape, heads.tokens[:3]
    ((12, 512, 32), ('[CLS]', 'alice', 'was'))
    >>> q, k, v = heads.pick("local")
    >>> q.shape
    (512, 32)
    """
    with np.load(HEADS) as file:
        arrays = {name: file[name] for name in file.files}
    for a in arrays.values():
        a.setflags(write=False)
    return Heads(
        **{name: arrays[name] for name in ("q", "k", "v", "layer", "head")},
        kind=tuple(arrays["kind"].tolist()),
        statistics={name: arrays[name] for name in STATISTICS},
        tokens=tuple(arrays["tokens"].tolist()),
    )


def load_kernels() -> list[dict]:
    """What `make gpu-check` wrote of each CUDA kernel and card: label, card, registers, bytes of
    shared memory, stack and spills, threads of a block, and whether the kernel is a tuned one.

    Examples
    --------
    >>> kernels = load_kernels()
    >>> {kernel["card"] for kernel in kernels} == {"sm_80", "sm_90"}
    True
    """
    return json.loads(KERNELS.read_text(encoding="utf-8"))
