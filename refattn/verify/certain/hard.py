"""The inputs that are hardest on arithmetic, for every attention: what its error is measured on."""

from dataclasses import dataclass, field

import numpy as np

import refattn

FAR = 6.0  # of Performer's inputs from the origin


@dataclass(frozen=True)
class Hard:
    """An attention, its inputs and options, all exact float64."""

    mechanism: str
    name: str
    inputs: tuple
    options: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.mechanism}, {self.name}"


def hard_cases(longest=4096):
    """Ordinary numbers, logits of 1e4, values that cancel, one key to ``longest``, and what each
    mechanism has of its own; the same on every machine.

    >>> {case.mechanism for case in hard_cases()} >= {"softmax_attention", "performer_attention"}
    True
    """
    found = []

    def case(mechanism, name, inputs, **options):
        found.append(Hard(mechanism, name, inputs, options))

    for mechanism, sizes, options in _attentions():
        case(mechanism, "ordinary numbers", _normal(sizes), **options)
        case(mechanism, "cancelling values", _pairs(sizes, opposite=True), **options)
        if not mechanism.startswith(("linear_", "performer")):
            case(mechanism, "logits of 1e4", _pairs(sizes, _for_logits(sizes)), **options)
            both = _pairs(sizes, _for_logits(sizes), opposite=True)
            case(mechanism, "logits of 1e4, cancelling values", both, **options)
    for mechanism in ("softmax_attention", "linear_attention"):
        case(mechanism, "one key", _normal((1, 1, 4, 3)))
    long = (5, longest, 16, 4)
    for name, inputs in (
        ("keys", _normal(long)),
        ("keys, cancelling values", _pairs(long, opposite=True)),
        ("keys, logits of 1e4", _pairs(long, _for_logits(long))),
    ):
        case("softmax_attention", f"{longest} {name}", inputs)
    case("local_attention", f"{longest} keys", _normal(long), window=longest // 2)
    case("linear_attention", f"{longest} keys", _normal(long))
    omega = _omega(32, 16)
    case("performer_attention", f"{longest} keys", _normal(long), omega=omega)
    E = np.random.default_rng(7).standard_normal((8, longest)) / 64
    case("linformer_attention", f"{longest} keys", _normal(long), E=E)
    _of_linear(case)
    _of_performer(case)
    q, k, v = _normal((24, 24, 4, 3))
    E = np.random.default_rng(8).standard_normal((4, 24))
    k = k - E.T @ np.linalg.solve(E @ E.T, E @ k)  # E k is 0 but for rounding
    case("linformer_attention", "projections that cancel", (1e6 * q, k, v), E=E)
    bias = np.where(np.random.default_rng(9).random((24, 24)) < 0.3, -1e9, 1e4)
    case("softmax_attention", "biases of 1e4 and -1e9", (q, k, v), bias=bias, causal=True)
    case("softmax_attention", "softcap of 50 on logits of 1e4", (1e4 * q, k, v), softcap=50.0)
    return found


def _attentions():
    """Each attention with plain options, small enough for definitions in many digits."""
    square, free = (24, 24, 4, 3), (9, 24, 4, 3)
    rng = np.random.default_rng(5)
    return [
        ("softmax_attention", free, {}),
        ("local_attention", free, {"window": (5, 2)}),
        ("sparse_attention", square, {"mask": refattn.masks.hierarchical(24, 3)}),
        ("linear_attention", free, {}),
        ("linear_attention_chunked", square, {"chunk": 7, "causal": True}),
        ("linformer_attention", free, {"E": rng.standard_normal((5, 24)) / 5}),
        ("performer_attention", free, {"omega": _omega(16, 4)}),
        ("block_attention", square, {"block": 8, "fuse": "exact"}),
        ("two_level_attention", square, {"block": 5}),
        ("gated_attention", square, {"gate": rng.random((24, 1)) - 0.5, "causal": True}),
    ]


def _normal(sizes, q=1.0):
    n, m, d, e = sizes
    rng = np.random.default_rng([n, m, d, e])
    return q * rng.standard_normal((n, d)), *(rng.standard_normal((m, c)) for c in (d, e))


def _for_logits(sizes):
    """The factor on normal queries that makes the largest of their logits about 1e4."""
    return 1e4 / (2 * np.sqrt(np.log(sizes[0] * sizes[1] + 1)))


def _pairs(sizes, q=1.0, opposite=False):
    """Neighbouring keys agree but for 1e-9, so that large logits tie; with ``opposite`` values,
    what is left is small."""
    x, k, v = _normal(sizes, q)
    k[1::2] = k[::2] + 1e-9 * k[1::2]
    if opposite:
        v[1::2] = -v[::2]
    return x, k, v


def _omega(rows, d):
    return np.random.default_rng([rows, d]).standard_normal((rows, d))


def _of_linear(case):
    q, k, v = _normal((24, 24, 4, 3))
    for name in ("relu", "taylor", "softmax"):
        case("linear_attention", f"{name} features", (q, k, v), feature_map=name)
    case("linear_attention", "faint keys", (q, k - 30, v), causal=True)
    rng = np.random.default_rng(6)
    S, whole = rng.standard_normal((4, 3)), np.maximum(k, 0).sum(axis=0)
    against = {"initial_state": (S, -0.999 * whole), "feature_map": "relu"}
    words = "a state that takes 0.999 of the denominator"
    case("linear_attention", words, (q, k, v), **against)
    case("linear_attention_chunked", words, (q, k, v), causal=True, chunk=5, **against)


def _of_performer(case):
    q, k, v = _normal((24, 24, 4, 3))
    omega = _omega(16, 4)
    for kind in ("positive", "hyperbolic", "trig"):
        near = {"omega": omega, "kind": kind}
        case("performer_attention", f"{kind} features", (q, k, v), causal=True, **near)
        for causal in (False, True):
            words = ", causal" if causal else ""
            far = {**near, "causal": causal}
            case("performer_attention", f"{kind}, far{words}", (FAR * q, FAR * k, v), **far)
            if kind != "trig":
                x, y, _ = _pairs((24, 24, 4, 3))
                away = (30 * x + 50, 30 * y - 80, v)
                case("performer_attention", f"{kind}, very far{words}", away, **far)
