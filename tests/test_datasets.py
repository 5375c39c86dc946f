"""The shipped heads: their form, their statistics, and that they really differ."""

import math

import numpy as np
import pytest

from refattn.datasets import HEADS, load_heads

COUNT, N, D = 12, 512, 32


@pytest.fixture(scope="module")
def heads():
    return load_heads()


def loop_statistics(q, k):
    """Row by row, from the definitions in the docstring of Heads."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    rows, mass, entropy, largest = [], 0.0, 0.0, -math.inf
    for i in range(N):
        logits = k @ q[i] / math.sqrt(D)
        top = logits.max()
        log_total = top + math.log(np.exp(logits - top).sum())
        p = np.exp(logits - log_total)
        mass += p[max(0, i - 16) : i + 17].sum()
        entropy += log_total - p @ logits  # -sum of p log p, as log p = logit - log_total
        largest = max(largest, top)
        rows.append(p)
    p = np.array(rows)
    # The squares of the singular values of P are the eigenvalues of P Pᵀ.
    energy = np.linalg.eigvalsh(p @ p.T)[::-1]
    held, rank, whole = 0.0, 0, (p * p).sum()
    while held < 0.99 * whole:
        held += energy[rank]
        rank += 1
    return {
        "mass_within_16": mass / N,
        "entropy": entropy / N,
        "rank_99": rank,
        "largest_column": max(math.fsum(column) for column in p.T) / N,
        "largest_logit": largest,
    }


def test_shapes_and_dtypes(heads):
    for a in (heads.q, heads.k, heads.v):
        assert a.shape == (COUNT, N, D)
        assert a.dtype == np.float32
        assert np.isfinite(a).all()
    assert heads.layer.shape == heads.head.shape == (COUNT,)
    assert len(heads.kind) == len(set(heads.kind)) == COUNT
    assert len(set(zip(heads.layer.tolist(), heads.head.tolist(), strict=True))) == COUNT
    assert all(values.shape == (COUNT,) for values in heads.statistics.values())
    assert len(heads.tokens) == N
    assert (heads.tokens[0], heads.tokens[-1]) == ("[CLS]", "[SEP]")


def test_the_file_is_small():
    assert HEADS.stat().st_size < 3_000_000


def test_arrays_are_read_only(heads):
    named = [heads.q, heads.k, heads.v, heads.layer, heads.head, *heads.statistics.values()]
    for a in [*named, *heads.pick("local")]:
        with pytest.raises(ValueError, match="read-only"):
            a[0] = 0


def test_pick(heads):
    for row, kind in enumerate(heads.kind):
        for picked, a in zip(heads.pick(kind), (heads.q, heads.k, heads.v), strict=True):
            np.testing.assert_array_equal(picked, a[row])
    with pytest.raises(ValueError, match=r"no head of kind 'loud', the kinds are .*local, diffuse"):
        heads.pick("loud")


def test_statistics_are_those_of_the_arrays(heads):
    for row in range(COUNT):
        for name, expected in loop_statistics(heads.q[row], heads.k[row]).items():
            # Logits reach 80, so exp turns their rounding into a relative error near 100 eps;
            # sums of N terms with roundings at random add the root of N.
            rtol = 100 * math.sqrt(N) * np.finfo(np.float64).eps
            assert heads.statistics[name][row] == pytest.approx(expected, rel=rtol), name


@pytest.mark.parametrize(
    ("kind", "name", "extreme"),
    [
        ("large logits", "largest_logit", max),
        ("small logits", "largest_logit", min),
        ("high rank", "rank_99", max),
        ("low rank", "rank_99", min),
        ("sink", "largest_column", max),
        ("diffuse", "entropy", max),
    ],
)
def test_kinds_hold_among_the_twelve(heads, kind, name, extreme):
    values = heads.statistics[name]
    assert values[heads.kind.index(kind)] == extreme(values)


def test_the_heads_differ(heads):
    s = heads.statistics
    local, global_ = heads.kind.index("local"), heads.kind.index("global")
    assert s["mass_within_16"][local] > 0.7
    assert s["mass_within_16"][global_] < 0.1
    assert s["entropy"].min() < 0.5
    assert s["entropy"].max() > 6.0  # of log 512 = 6.24
    assert s["rank_99"].min() < 5
    assert s["rank_99"].max() > 400  # of 512
    assert s["largest_column"].max() > 0.3
    assert s["largest_column"].min() < 0.01
    assert s["largest_logit"].max() > 50
    assert s["largest_logit"].min() < 4
