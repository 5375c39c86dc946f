"""The check accepts what is right, refuses what is wrong, and says where."""

import numpy as np
import pytest

import refattn
from refattn.verify import check, check_answer


def softmax(q, k, v, scale=None):
    s = q @ k.T * (q.shape[-1] ** -0.5 if scale is None else scale)
    a = np.exp(s - s.max(axis=1, keepdims=True))
    return (a / a.sum(axis=1, keepdims=True)) @ v


def shifted(q, k, v):
    return np.roll(softmax(q, k, v), 1, axis=0)


def one_row_wrong(q, k, v):
    y = softmax(q, k, v)
    y[-1] += 1
    return y


def unstable(q, k, v):
    with np.errstate(all="ignore"):
        a = np.exp(q @ k.T / np.sqrt(np.float32(q.shape[-1])))
        return (a / a.sum(axis=1, keepdims=True)) @ v


def writes_to_its_input(q, k, v):
    y = softmax(q, k, v)
    q[:] = 0
    return y


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_right_kernels_pass(dtype):
    for kernel in (refattn.softmax_attention, writes_to_its_input):
        report = check(kernel, "softmax_attention", dtype=dtype, cases="square")
        if dtype != "float16" or kernel is refattn.softmax_attention:
            assert report.passed, report
    assert check(softmax, refattn.softmax_attention).passed


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (lambda q, k, v: softmax(q, k, v, 1.0), "first at"),
        (lambda q, k, v: softmax(q, k, v, 1 / q.shape[-1]), "first at"),
        (shifted, "first at"),
        (one_row_wrong, "1 of 13 rows wrong, row 12"),
        (unstable, "are NaN"),
        (lambda q, k, v: softmax(q, k, v).T, "has shape"),
        (lambda q, k, v: softmax(q, k, v) * 1.0001, "first at"),
        (lambda q, k, v: 1 / 0, "raised ZeroDivisionError"),
        (lambda q, k, v: "done", "gave str"),
        (lambda q, k, v: softmax(q, k, v[:, :1]), "has shape"),
    ],
)
def test_wrong_kernels_are_refused_with_a_reason(kernel, words):
    report = check(kernel, "softmax_attention")
    assert not report.passed
    assert words in str(report)


def test_options_choose_the_truth():
    window = {"window": 2, "causal": True}
    assert check(
        lambda q, k, v: refattn.local_attention(q, k, v, **window), "local_attention", **window
    ).passed
    assert not check(softmax, "local_attention", **window).passed
    mask = refattn.masks.hierarchical(20, 3)
    right = lambda q, k, v: refattn.softmax_attention(q, k, v, mask=mask.toarray())
    report = check(right, "sparse_attention", mask=mask)
    assert report.passed and len(report.lines) > 2


def test_a_hole_gives_a_hint_and_never_raises():
    for empty in (None, ...):
        report = check(lambda q, k, v, e=empty: e, "softmax_attention", hint="Start from q @ k.T.")
        assert not report.passed and not report.filled
        assert str(report) == "softmax_attention: nothing here yet. Start from q @ k.T."


def test_faults_that_are_not_the_kernels():
    with pytest.raises(ValueError, match="mechanism is 'soft_attention'"):
        check(softmax, "soft_attention")
    with pytest.raises(ValueError, match="cases is 'few'"):
        check(softmax, "softmax_attention", cases="few")
    with pytest.raises(ValueError, match="no case fits"):
        check(softmax, "softmax_attention", cases="square", mask=np.ones((3, 4), bool))


def test_answers():
    assert check_answer(3, 3).passed
    assert check_answer(np.eye(2), np.eye(2) + 1e-9, tolerance=1e-8).passed
    assert "gave 4, expected 3" in str(check_answer(4, 3, title="pairs"))
    assert "has shape" in str(check_answer([1.0], [1.0, 2.0]))
    assert not check_answer(np.nan, 1.0, tolerance=1e9).passed
    assert (
        str(check_answer(None, 3, title="pairs", hint="Count."))
        == "pairs: nothing here yet. Count."
    )
