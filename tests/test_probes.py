"""Probes pass what is right and catch what leaks, without a reference."""

import numpy as np
import pytest

import refattn
from refattn.verify import probe

OMEGA = refattn.random_features(16, 8, rng=0)
RIGHT = {
    "softmax": (refattn.softmax_attention, {}, {}),
    "causal": (refattn.softmax_attention, {"causal": True}, {"causal": True}),
    "local": (refattn.local_attention, {"window": (2, 1)}, {"window": (2, 1)}),
    "causal-local": (
        refattn.local_attention,
        {"window": 3, "causal": True},
        {"window": 3, "causal": True},
    ),
    "linear": (refattn.linear_attention, {}, {}),
    "causal-linear": (refattn.linear_attention, {"causal": True}, {"causal": True}),
    "chunked": (refattn.linear_attention_chunked, {"chunk": 7}, {"causal": True}),
    "causal-performer": (
        refattn.performer_attention,
        {"omega": OMEGA, "causal": True},
        {"causal": True},
    ),
    "two-level-max": (
        refattn.two_level_attention,
        {"block": 5, "pool": "max"},
        {"linear": False, "window": 24},
    ),
}


def failed(report):
    return [line.case for line in report.lines if line.trouble]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(name, dtype):
    attention, options, told = RIGHT[name]
    report = probe(lambda q, k, v: attention(q, k, v, **options), dtype=dtype, **told)
    assert report.passed, report


def performer_with_a_global_maximum(q, k, v):
    """Stabilised by the largest key of all: later keys change earlier rows."""
    b = k @ OMEGA.T.astype(k.dtype) - (k * k).sum(axis=1, keepdims=True) / 2
    phi_q = np.exp(q @ OMEGA.T.astype(q.dtype))
    phi_k = np.exp(b - b.max())
    a = np.tril(phi_q @ phi_k.T)
    return (a @ v) / a.sum(axis=1, keepdims=True)


def zero_times_nan(q, k, v):
    """Masks by multiplying with 0."""
    a = np.exp(q @ k.T) * np.tri(len(q), dtype=q.dtype)
    return (a @ v) / a.sum(axis=1, keepdims=True)


def different_every_time(q, k, v, state=[0]):  # noqa: B006
    state[0] += 1
    return refattn.softmax_attention(q, k, v) * q.dtype.type(1 + 1e-6 * state[0])


@pytest.mark.parametrize(
    ("kernel", "told", "cases"),
    [
        (refattn.softmax_attention, {"causal": True}, {"later keys x 1e5", "later keys NaN"}),
        (refattn.softmax_attention, {"window": 3}, {"keys out of window NaN"}),
        (performer_with_a_global_maximum, {"causal": True}, {"far keys, later near"}),
        (zero_times_nan, {"causal": True}, {"later keys NaN"}),
        (different_every_time, {}, {"same again"}),
        (lambda q, k, v: np.maximum(v, 0), {"causal": True}, {"linear in v"}),
        (
            lambda q, k, v: refattn.softmax_attention(q, k, v, causal=True),
            {},
            {"keys shuffled", "queries shuffled"},
        ),
        (lambda q, k, v: v * np.nan, {}, {"finite"}),
        (lambda q, k, v: v[:3] * 1, {}, {"finite"}),
        (lambda q, k, v: "y", {}, {"finite"}),
    ],
)
def test_wrong_kernels_are_caught(kernel, told, cases):
    with np.errstate(all="ignore"):
        report = probe(kernel, **told)
    assert not report.passed and cases <= set(failed(report))


def test_nothing_returned_and_unknown_settings():
    assert not probe(lambda q, k, v: None).filled
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        probe(refattn.softmax_attention, dtype="int8")
    with pytest.raises(ValueError, match="like is 'abacus'"):
        probe(refattn.softmax_attention, like="abacus")
