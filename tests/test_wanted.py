"""The budget of the grader: what a kernel may be off by, and what it may not."""

import numpy as np
import pytest

import refattn
from refattn.verify import check
from refattn.verify.cases import Trial, cast, number_type, trials
from refattn.verify.like import Reference
from refattn.verify.rounding import Rounded, every_operation_rounded
from refattn.verify.wanted import wanted_of

HALVES = ["float16", "bfloat16"]


def softmax_in(dtype):
    """Softmax attention with each step rounded by hand."""

    def rounded(x):
        return np.asarray(x).astype(dtype).astype(np.float32)

    def run(q, k, v):
        q, k, v = (x.astype(np.float32) for x in (q, k, v))
        s = rounded(rounded(q @ k.T) * np.float32(q.shape[1] ** -0.5))
        a = rounded(np.exp(rounded(s - s.max(axis=1, keepdims=True))))
        a = rounded(a / rounded(a.sum(axis=1, keepdims=True)))
        return rounded(a @ v).astype(dtype)

    return run


@pytest.mark.parametrize("dtype", HALVES)
def test_a_kernel_that_rounds_every_step_is_right(dtype):
    kernel = softmax_in(number_type(dtype))
    report = check(kernel, "softmax_attention", dtype=dtype)
    assert report.passed, report


@pytest.mark.parametrize("name", HALVES)
def test_every_operation_is_rounded(name):
    dtype = number_type(name)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((9, 4)).astype(dtype) for _ in range(3))
    with every_operation_rounded(dtype):
        y = refattn.softmax_attention(q, k, v)
    wanted = softmax_in(dtype)(q, k, v)
    once = refattn.softmax_attention(q, k, v)
    assert y.dtype == dtype
    gap = abs(np.asarray(y).astype(float) - wanted.astype(float)).max()
    assert gap <= 2 * float(np.finfo(np.float16).eps if name == "float16" else 2**-7)
    assert (np.asarray(y) != np.asarray(once)).any()
    assert not isinstance(once, Rounded)  # outside, nothing is changed


def test_rounding_follows_reductions_outputs_and_functions():
    x = np.array([4096.0, 1.0, 1.0], np.float32).view(Rounded)
    x.rounds_to = np.dtype(np.float16)
    assert float(x.sum()) == 4096.0  # 4098 is no float16
    assert float(np.concatenate([x, x]).sum()) == 8192.0
    assert isinstance(np.where(x > 2, x, 0), Rounded)
    y = x.copy()
    y += np.float32(1.0)
    assert y.tolist() == [4096.0, 2.0, 2.0]
    assert (x > 2).tolist() == [True, False, False]


def budgets(dtype, **options):
    dtype = number_type(dtype)
    low = {name: cast(x, dtype) for name, x in options.items()}
    wide = {name: cast(x, np.float64) for name, x in low.items()}
    reference = Reference("softmax_attention")
    for trial in trials("softmax_attention", "default", dtype, options):
        yield trial, wanted_of(reference, trial, low, wide, gradients=True)


@pytest.mark.parametrize("dtype", ["float64", "float32", *HALVES])
def test_the_rule(dtype):
    """At most 2 E + 4 eps (1 + max|s|) max|v| of the output, E counted by hand."""
    eps = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    for trial, wanted in budgets(dtype):
        q, k, v = (x.astype(float) for x in trial.inputs)
        own = abs(refattn.softmax_attention(*trial.inputs).astype(float) - wanted["y"].value).max()
        rest = (
            wanted["y"].budget
            - 4 * eps * (1 + abs(q @ k.T).max() / q.shape[1] ** 0.5) * abs(v).max()
        )
        assert rest >= 2 * own * (1 - 1e-6) - 1e-18
        if dtype in ("float64", "float32"):
            assert rest <= 2 * own * (1 + 1e-6) + 1e-12


def test_a_bias_counts_as_a_logit():
    plain = {t.name: w["y"].budget for t, w in budgets("float32", bias=np.zeros((13, 13)))}
    large = {t.name: w["y"].budget for t, w in budgets("float32", bias=np.full((13, 13), 500.0))}
    hidden = {
        t.name: w["y"].budget for t, w in budgets("float32", bias=np.where(np.eye(13), -np.inf, 0))
    }
    assert all(large[name] > 3 * plain[name] for name in plain if "large" not in name)
    assert all(np.isfinite(budget) for budget in hidden.values())


def test_conditioning_is_the_growth_of_a_relative_error():
    """One token gives back its value, large scores hang on the last digit of a logit."""
    found = {trial.name: wanted["y"].conditioning for trial, wanted in budgets("float64")}
    assert 0.5 < found["one token"] < 1.5
    assert found["large scores"] > 10 * found["two tiles"]


def test_a_case_that_kernels_may_not_fit_is_left_out():
    report = check(
        lambda q, k, v: refattn.linear_attention(q, k, v, causal=True),
        "linear_attention",
        causal=True,
    )
    assert report.passed and "more keys" not in {line.case for line in report.lines}


def test_sizes_of_ones_own():
    kernel = refattn.softmax_attention
    report = check(kernel, "softmax_attention", cases=[(3, 5, 2, 2), (64, 64, 8, 8)])
    assert {line.case for line in report.lines} == {
        "n 3, m 5, d 2, e 2",
        "n 64, m 64, d 8, e 8",
        "one key each",
        "large scores",
    }
    shapes = []

    def whole_tiles(q, k, v):
        shapes.append((q.shape, k.shape))
        return kernel(q, k, v)

    assert check(whole_tiles, "softmax_attention", cases="tiles", lead=(2,)).passed
    assert all(q[0] == 2 and q[1] % 64 == 0 and k[1] % 64 == 0 for q, k in shapes)
    for wrong in ("few", [], 3, [(1, 2)], [(0.5, 1, 1, 1)]):
        with pytest.raises((ValueError, TypeError)):
            check(kernel, "softmax_attention", cases=wrong)


def test_each_case_has_every_size_of_trouble():
    made = list(trials("linear_attention", "default", np.dtype("float32"), {}))
    assert all(isinstance(trial, Trial) and trial.q.dtype == np.float32 for trial in made)
    sizes = {(len(t.q), len(t.k)) for t in made}
    assert any(n > m for n, m in sizes) and any(n < m for n, m in sizes) and (1, 1) in sizes
    assert "faint keys" in {t.name for t in made}
    made = list(trials("softmax_attention", "default", np.dtype("float32"), {}))
    assert "faint keys" not in {t.name for t in made}
