import numpy as np
import scipy

import refattn
from cases import Mechanism, softmax_gradient_tolerance, softmax_tolerance
from definitions import gates as definitions
from definitions import linear, performer, softmax, sparse
from mechanisms import linear as linear_mechanism
from mechanisms import performer as performer_mechanism
from mechanisms import softmax as softmax_mechanism
from mechanisms import sparse as sparse_mechanism

LINEAR = refattn.linear_attention
OF_LINEAR = ("linear_attention", "performer_attention")


def inner_definition(attention):
    """The definition of the attention that is gated."""
    return {
        "softmax_attention": softmax.softmax_attention,
        "local_attention": sparse.local_attention,
        "sparse_attention": sparse_mechanism.mask_definition,
        "linear_attention": linear.linear_attention,
        "performer_attention": performer.performer_attention,
    }[attention.__name__]


def definition(q, k, v, *, attention=refattn.softmax_attention, gate, **options):
    return definitions.gated_attention(
        q, k, v, gate=gate, attention=inner_definition(attention), **options
    )


def rows_definition(attention, n, m):
    """The attention's definition for queries at some positions."""

    def run(q, k, v, *, positions, causal=False, mask=None, **options):
        name = attention.__name__
        if name == "linear_attention":
            stop = positions[-1] + 1 if causal else m  # keys after the last row are not taken
            return linear.linear_attention_recurrence(q, k[:stop], v[:stop], **options)
        if name == "local_attention":
            window = {key: options.pop(key) for key in ("window", "dilation") if key in options}
            seen = [
                [sparse.window_sees(i, j, n, m, causal=causal, **window) for j in range(m)]
                for i in positions
            ]
            return sparse.sparse_attention(q, k, v, mask=seen, **options)
        if hasattr(mask, "toarray"):
            mask = mask.toarray()
        seen = [
            [
                (mask is None or bool(mask[i][j]))
                and (not causal or softmax.causal_sees(i, j, n, m))
                for j in range(m)
            ]
            for i in positions
        ]
        return softmax.softmax_attention(q, k, v, mask=seen, **options)

    return run


def counted(q, k, v, *, attention=refattn.softmax_attention, gate, **options):
    opened = [any(g.value != 0 for g in row) for row in gate]
    return definitions.gated_attention_of_open_rows(
        q,
        k,
        v,
        gate=gate,
        attention=rows_definition(attention, len(q), len(k)),
        positions=opened,
        **options,
    )


def inner_sees(i, j, shape, options):
    attention = options.get("attention", refattn.softmax_attention).__name__
    if attention in OF_LINEAR:
        return linear_mechanism.sees(i, j, shape, options)
    if attention == "local_attention":
        return sparse_mechanism.window_sees(i, j, shape, options)
    if attention == "sparse_attention":
        return bool(options["mask"].toarray()[i, j])
    return softmax_mechanism.sees(i, j, shape, options)


def sees(i, j, shape, options):
    return bool(options["gate"][i].any()) and inner_sees(i, j, shape, options)


def sizes(options, shape):
    """Open rows by position; pairs are those of open rows."""
    opened = options["gate"].any(axis=-1)
    sizes = {key: x for key, x in options.items() if key not in ("gate", "mask", "bias")}
    sizes |= {"open_rows": np.flatnonzero(opened), "gate_width": options["gate"].shape[-1]}
    if "mask" in options:
        pairs = [(i, j) for i in np.flatnonzero(opened) for j in range(shape.m)]
        sizes["nnz"] = sum(inner_sees(i, j, shape, options) for i, j in pairs)
    return sizes


def unread(options, shape, itemsize):
    """Rows of q, and of a mask, that no open row reads."""
    closed = int((~options["gate"].any(axis=-1)).sum())
    left = closed * shape.d * itemsize
    mask = options.get("mask")
    if hasattr(mask, "indptr"):
        kept = mask.toarray()[options["gate"].any(axis=-1)].sum()
        left += int(mask.nnz - kept) * 5 + closed * 4
    elif mask is not None:
        left += closed * shape.m
    if options.get("attention") is LINEAR and options.get("causal"):
        last = max(np.flatnonzero(options["gate"].any(axis=-1)), default=-1)
        left += (shape.m - 1 - last) * (shape.d + shape.e) * itemsize
    return left


def gate(s, rng, kind):
    if kind == "soft":
        return rng.random((s.n, 1)) + 0.1
    if kind == "columns":
        return rng.standard_normal((s.n, s.e)) * (rng.random((s.n, s.e)) < 0.6)
    return (np.arange(s.n)[:, None] % 3 != 1) * 1.0


def gated(kind, **fixed):
    """Options with a gate of this kind; a callable among them is made for the shape."""

    def make(s, rng):
        inner = {
            key: x(s, rng) if callable(x) and key != "attention" else x for key, x in fixed.items()
        }
        return {"gate": gate(s, rng, kind), **inner}

    return make


def some_pairs(s, rng):
    return scipy.sparse.csr_array(softmax_mechanism.mask_with_gaps(s.n, s.m, rng))


def dead(shape, rng):
    mask = np.ones((shape.n, shape.m), bool)
    mask[:, [0, 3]] = False
    gate = np.ones((shape.n, 1))
    gate[[1, 4]] = 0
    return {"gate": gate, "mask": mask}, [1, 4], [0, 3]


def tolerance(q, k, v, options, eps):
    name = options.get("attention", refattn.softmax_attention).__name__
    module = {"linear_attention": linear_mechanism, "performer_attention": performer_mechanism}
    one = module[name].tolerance if name in module else softmax_tolerance
    return (one(q, k, v, options, eps) + eps * abs(v).max(initial=0)) * abs(options["gate"]).max(
        initial=1
    )


def gradient_tolerance(q, k, v, dy, options, eps):
    name = options.get("attention", refattn.softmax_attention).__name__
    module = {"linear_attention": linear_mechanism, "performer_attention": performer_mechanism}
    one = module[name].gradient_tolerance if name in module else softmax_gradient_tolerance
    size = 1 + abs(options["gate"]).max(initial=1)
    return one(q, k, v, size * dy, options, eps) * size


OPTIONS = {
    "soft": gated("soft"),
    "columns": gated("columns"),
    "hard": gated("hard"),
    "hard-causal": gated("hard", causal=True),
    "hard-mask": gated("hard", mask=lambda s, rng: softmax_mechanism.mask_with_gaps(s.n, s.m, rng)),
    "hard-local": gated("hard", attention=refattn.local_attention, window=2, causal=True),
    "hard-dilated": gated("hard", attention=refattn.local_attention, window=(2, 1), dilation=2),
    "hard-sparse": gated("hard", attention=refattn.sparse_attention, mask=some_pairs),
    "hard-linear": gated("hard", attention=LINEAR),
    "square-linear": gated("hard", attention=LINEAR, causal=True),
}

MECHANISMS = [
    Mechanism(
        "gated_attention",
        definition,
        sees,
        OPTIONS,
        takes=lambda label, s: s.n == s.m or not label.startswith("square"),
        signed=("columns",),
        arrays=("bias", "gate"),
        cost_sizes=sizes,
        counted=counted,
        unread=unread,
        dead=dead,
        tolerance=tolerance,
        gradient_tolerance=gradient_tolerance,
    )
]
