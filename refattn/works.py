"""The works that are timed: each attention at the sizes that its peers are measured at."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import refattn

HEADS, D = 8, 64
# Of q and k for Performer: performer-pytorch adds 1e-4 to each feature, which among larger inputs
# is most of it, so that nothing could be compared.
SMALL = 0.1


@dataclass(frozen=True)
class Work:
    """A piece of work: its name, (heads, n, d), and how refattn does it.

    ``ours(q, k, v, dy)`` makes the function that is timed; ``flops`` are those of one head, of
    useful work; ``goals`` maps a peer's name to the ratio of its time to ours that is aimed at;
    ``size`` is the standard deviation of q and k.
    """

    name: str
    shape: tuple
    ours: Callable
    flops: int = 0
    goals: dict = field(default_factory=dict)
    size: float = 1.0


def inputs(shape, dtype=np.float32, size=1.0):
    """q and k of normal numbers of this size, v and dy of size 1: the same on every call."""
    rng = np.random.default_rng(list(shape))
    return [(s * rng.standard_normal(shape)).astype(dtype) for s in (size, size, 1, 1)]


def forward(attention, backend="numba", **options):
    """``Work.ours`` of a forward pass."""
    return lambda q, k, v, dy: lambda: attention(q, k, v, backend=backend, **options)


def both(attention, vjp, keeps_lse=False, backend="numba", **options):
    """``Work.ours`` of a forward and a backward pass, which gives y and the gradients."""
    options["backend"] = backend

    def make(q, k, v, dy):
        def run():
            if not keeps_lse:
                y = attention(q, k, v, **options)
                return y, *vjp(dy, q, k, v, **options)
            saved = attention(q, k, v, return_lse=True, **options)
            return saved[0], *vjp(dy, q, k, v, saved=saved, **options)

        return run

    return make


def works():
    """The table: every kernel at the sizes that its peers are measured at."""
    local, long = {"window": 128}, (HEADS, 16384, D)
    bigbird = refattn.masks.bigbird(16384, 64, rng=0)
    tree = refattn.masks.hierarchical(4096, 16)
    omega = refattn.random_features(256, D, rng=0).astype(np.float32)
    E = np.random.default_rng(0).standard_normal((256, 16384)).astype(np.float32) / 128
    gate = (np.arange(4096) % 2).astype(np.float32)[:, None]
    a, found = refattn, []
    for n in (1024, 2048, 4096):
        for causal, goal in ((False, 1.05), (True, 1.1)):
            kind = "causal" if causal else "full"
            flops = a.softmax_attention_cost(n, n, D, D, causal=causal).flops
            ours = forward(a.softmax_attention, causal=causal)
            goals = {"torch SDPA": goal}
            found.append(Work(f"softmax, {kind}", (HEADS, n, D), ours, flops, goals))
    for causal in (False, True):
        kind = "causal" if causal else "full"
        ours = both(a.softmax_attention, a.softmax_attention_vjp, True, causal=causal)
        name = f"softmax, {kind}, forward and backward"
        found.append(Work(name, (HEADS, 4096, D), ours, 0, {"torch SDPA and autograd": 1.1}))
    flops = a.local_attention_cost(16384, 16384, D, D, **local).flops
    found += [
        Work(
            "local, window 128 on each side",
            long,
            forward(a.local_attention, **local),
            flops,
            {"FlexAttention, compiled": 3.5, "local-attention": 6.0},
        ),
        Work(
            "local, forward and backward",
            long,
            both(a.local_attention, a.local_attention_vjp, **local),
            0,
            {"local-attention and autograd": 6.0},
        ),
        Work(
            "block-sparse, BigBird on blocks of 64",
            long,
            forward(a.sparse_attention, mask=bigbird),
            a.sparse_attention_cost(16384, 16384, D, D, nnz=bigbird.nnz).flops,
            {"FlexAttention, compiled": 2.0},
        ),
        Work(
            "csr, hierarchical b = 16",
            (HEADS, 4096, D),
            forward(a.sparse_attention, mask=tree),
            a.sparse_attention_cost(4096, 4096, D, D, nnz=tree.nnz).flops,
            {"FlexAttention, compiled": 2.0},
        ),
        Work(
            "linear, elu + 1, full",
            long,
            forward(a.linear_attention),
            a.linear_attention_cost(16384, 16384, D, D).flops,
            {"the formula, torch.compile": 2.0},
        ),
        Work(
            "linear, elu + 1, causal",
            long,
            forward(a.linear_attention_chunked),
            a.linear_attention_cost(16384, 16384, D, D, causal=True).flops,
            {"pytorch-fast-transformers, numerator": 3.0},
        ),
        Work(
            "Performer, 256 features, full",
            long,
            forward(a.performer_attention, omega=omega),
            a.performer_attention_cost(16384, 16384, D, D, num_features=256).flops,
            {"performer-pytorch": 6.0},
            SMALL,
        ),
        Work(
            "Performer, 256 features, causal",
            long,
            forward(a.performer_attention, omega=omega, causal=True),
            a.performer_attention_cost(16384, 16384, D, D, num_features=256, causal=True).flops,
            {"performer-pytorch": 50.0},
            SMALL,
        ),
        Work(
            "Linformer, r = 256",
            long,
            forward(a.linformer_attention, E=E),
            a.linformer_attention_cost(16384, 16384, D, D, r=256).flops,
            {"the formula, torch": 2.0, "the formula, torch.compile": 2.0},
        ),
        Work(
            "gate, half of the rows off",
            (HEADS, 4096, D),
            forward(a.gated_attention, gate=gate),
            a.gated_attention_cost(4096, 4096, D, D, open_rows=2048).flops,
            {"the same, all rows on": 1.85},
        ),
    ]
    return found
