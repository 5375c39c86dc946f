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


def near_miss(q, k, v):
    """Ten times what rounding explains in float32."""
    logits = 1 + abs(q @ k.T).max() / q.shape[1] ** 0.5
    return 10 * (4 * np.finfo(np.float32).eps * logits * abs(v).max())


def first_maximum_for_ever(q, k, v):
    """Online softmax that never moves its maximum: right until a later key is much larger."""
    with np.errstate(all="ignore"):
        s = q @ k.T / q.shape[1] ** 0.5
        a = np.exp(s - s[:, :16].max(axis=1, keepdims=True))
        return (a @ v) / a.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_right_kernels_pass(dtype):
    report = check(refattn.softmax_attention, "softmax_attention", dtype=dtype)
    assert report.passed, report
    if dtype in ("float32", "float64"):
        assert check(softmax, refattn.softmax_attention, dtype=dtype).passed


def writes_to_its_input(q, k, v):
    y = softmax(q, k, v)
    k[0] = 0
    return y


def gives_back_its_input(q, k, v):
    v[:] = softmax(q, k, v) if len(q) == len(k) else v
    return v


def a_view_of_its_input(q, k, v):
    return v[: len(q)]


def never_returns(q, k, v):
    while True:
        pass


def in_double(q, k, v):
    return softmax(*(x.astype(np.float64) for x in (q, k, v)))


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (writes_to_its_input, "wrote to its input k"),
        (gives_back_its_input, "wrote to its input v"),
        (in_double, "gave float64, expected float32"),
        (never_returns, "took longer than 0.05 s"),
    ],
)
def test_bad_manners_are_a_line_of_the_report(kernel, words):
    limit = 0.05 if kernel is never_returns else 60.0  # a busy machine is slow, not wrong
    report = check(kernel, "softmax_attention", time_limit=limit)
    assert not report.passed and words in str(report)
    assert len(report.lines) == len(check(softmax, "softmax_attention").lines)  # the rest still ran


def test_a_view_of_an_input_is_refused_even_where_its_numbers_are_right():
    def own_value(q, k, v):
        return v

    report = check(own_value, "local_attention", window=0, cases="square")
    assert "gave a view of its input v" in str(report) and not report.passed
    assert check(lambda q, k, v: v.copy(), "local_attention", window=0, cases="square").passed


def test_the_time_limit_leaves_no_alarm_behind():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    check(never_returns, "softmax_attention", time_limit=0.02)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_unknown_library_is_refused():
    with pytest.raises(ValueError, match="like is 'abacus'"):
        check(softmax, "softmax_attention", like="abacus")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        check(softmax, "softmax_attention", dtype="int8")


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
        (lambda q, k, v: "done", "gave str, expected numpy.ndarray"),
        (lambda q, k, v: softmax(q, k, v).tolist(), "gave list, expected numpy.ndarray"),
        (lambda q, k, v: softmax(q, k, v) + 1j, "expected real numbers"),
        (lambda q, k, v: softmax(q, k, v) + near_miss(q, k, v), "first at"),
        (first_maximum_for_ever, "are NaN"),
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
        report = check(
            lambda q, k, v, e=empty: e,
            "softmax_attention",
            title="my_hole",
            hint="Start from q @ k.T.",
        )
        assert not report.passed and not report.filled
        assert str(report) == "my_hole: nothing here yet. Start from q @ k.T."


def test_faults_that_are_not_the_kernels():
    with pytest.raises(ValueError, match="mechanism is 'soft_attention'"):
        check(softmax, "soft_attention")
    with pytest.raises(ValueError, match="cases is 'few'"):
        check(softmax, "softmax_attention", cases="few")
    with pytest.raises(ValueError, match="return_lse"):
        check(softmax, "softmax_attention", return_lse=True)
    with pytest.raises(ValueError, match="no case fits"):
        check(softmax, "softmax_attention", cases="square", mask=np.ones((3, 4), bool))


def test_bias_and_scale_are_the_kernels_too():
    bias = np.random.default_rng(0).standard_normal((13, 13))
    for dtype in ("float32", "float16"):
        low = bias.astype(dtype)

        def right(q, k, v, low=low):
            return refattn.softmax_attention(q, k, v, bias=low, scale=0.5)

        def unscaled(q, k, v, low=low):
            return refattn.softmax_attention(q, k, v, bias=low)

        options = {"bias": bias, "scale": 0.5, "dtype": dtype}
        assert check(right, "softmax_attention", **options).passed
        report = check(unscaled, "softmax_attention", **options)
        assert not report.passed and "n 13, m 13, d 5, e 7" in str(report)


@pytest.mark.parametrize("shape", [(), (13,), (1, 13), (13, 1), (13, 13)])
def test_masks_and_biases_of_any_shape(shape):
    mask = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 != 1
    for options in (
        {"mask": mask},
        {"bias": np.where(mask, 0.0, -1.0)},
        {"mask": mask, "bias": np.zeros(shape)},
    ):
        right = lambda q, k, v, o=options: refattn.softmax_attention(q, k, v, **o)
        report = check(right, "softmax_attention", **options)
        assert report.passed, report


def test_every_mechanism_can_be_checked():
    omega = refattn.random_features(8, 5, rng=0)
    for name, options in {
        "linear_attention": {"causal": True},
        "performer_attention": {"omega": omega},
        "local_attention": {"window": 3},
    }.items():
        kernel = lambda q, k, v, n=name, o=options: getattr(refattn, n)(q, k, v, **o)
        assert check(kernel, name, **options).passed
        assert not check(lambda q, k, v: v[:1] + 0 * q[:, :1], name, **options).passed


def test_answers():
    assert check_answer([-np.inf, np.inf, 1.0], [-np.inf, np.inf, 1.0]).passed
    assert not check_answer("3", 3).passed
    assert check_answer(lambda: 3, 3).passed
    assert "raised ZeroDivisionError" in str(check_answer(lambda: 1 / 0, 3))
    assert not check_answer(lambda: None, 3).filled
    assert check_answer(3, 3).passed
    assert check_answer(np.eye(2), np.eye(2) + 1e-9, tolerance=1e-8).passed
    assert "gave 4, expected 3" in str(check_answer(4, 3, title="pairs"))
    assert "has shape" in str(check_answer([1.0], [1.0, 2.0]))
    assert not check_answer(np.nan, 1.0, tolerance=1e9).passed
    assert (
        str(check_answer(None, 3, title="pairs", hint="Count."))
        == "pairs: nothing here yet. Count."
    )


def test_a_finite_bias_that_hides_is_no_logit():
    """-1e9 in place of -inf: the budget must stay that of the pairs that are seen."""
    for low in (-1e4, -1e9, float(np.finfo(np.float32).min)):
        bias = np.where(np.tril(np.ones((13, 13), bool)), 0, low)
        options = {"bias": bias}
        right = lambda q, k, v, b=bias: refattn.softmax_attention(q, k, v, bias=b.astype(q.dtype))
        assert check(right, "softmax_attention", **options).passed
        assert not check(refattn.softmax_attention, "softmax_attention", **options).passed
        half = check(refattn.softmax_attention, "softmax_attention", dtype="float64", **options)
        assert not half.passed and half.diagnosis


def test_other_ways_to_sum_are_right_in_float64():
    def phi(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    def all_pairs(q, k, v):
        a = phi(q) @ phi(k).T
        return (a @ v) / a.sum(axis=1, keepdims=True)

    def row_by_row(q, k, v):
        rows = [(w := phi(k) @ phi(x)) @ v / w.sum() for x in q]
        return np.array(rows).reshape(len(q), v.shape[1])

    for kernel in (all_pairs, row_by_row):
        for dtype in ("float64", "float32"):
            report = check(kernel, "linear_attention", dtype=dtype)
            assert report.passed, report


def test_a_kernel_that_exits_is_a_line():
    def leaves(q, k, v):
        raise SystemExit(0)

    report = check(leaves, "softmax_attention")
    assert not report.passed and "raised SystemExit" in str(report)
    assert "raised SystemExit" in str(check_answer(lambda: exit(0), 3))


def test_a_branch_that_gives_nothing_is_a_line_not_a_hole():
    report = check(
        lambda q, k, v: softmax(q, k, v) if len(q) == len(k) else None, "softmax_attention"
    )
    assert report.filled and not report.passed and "gave nothing" in str(report)


def test_options_longer_than_the_usual_cases():
    wide = {"window": 200}
    assert not check(softmax, "local_attention", **wide).passed
    right = check(
        lambda q, k, v: refattn.local_attention(q, k, v, **wide), "local_attention", **wide
    )
    assert right.passed and "longer than its reach" in {line.case for line in right.lines}
    endless = check(softmax, "local_attention", window=5000)
    assert endless.passed and "No case is long enough" in str(endless)
    assert "give cases=[(n, m, d, e)] with 10003 tokens or more" in str(endless)


def test_values_kept_from_another_case_show():
    kept = {}

    def stale(q, k, v):
        return softmax(q, k, kept.setdefault((v.shape, v.dtype.name), v.copy()))

    assert not check(stale, "softmax_attention").passed


def test_gradients_have_manners_too():
    def vjp(dy, q, k, v):
        return refattn.softmax_attention_vjp(dy, q, k, v)

    def wide(dy, q, k, v):
        return tuple(g.astype(np.float64) for g in vjp(dy, q, k, v))

    def fails(dy, q, k, v):
        raise KeyError("dy")

    def ask(gradients):
        return check(softmax, "softmax_attention", gradients=gradients)

    assert ask(vjp).passed
    report = ask(wide)
    wrong = {line.case for line in report.lines if line.trouble}
    assert "odd sizes: dk" in wrong and "odd sizes" not in wrong
    assert "gave float64, expected float32" in str(report)
    report = ask(fails)
    assert {line.case for line in report.lines if not line.trouble} >= {"odd sizes", "two tiles"}
    assert "raised KeyError" in str(report)
    assert "gave nothing, expected (dq, dk, dv)" in str(ask(lambda dy, q, k, v: None))
    assert check(lambda q, k, v: v[:, :1], "softmax_attention", gradients=vjp).passed is False


def test_what_the_caller_asks_wrongly_is_not_the_kernels_fault():
    for wrong, words in (
        ({"gradients": "yes"}, "gradients is 'yes'"),
        ({"time_limit": -1}, "time_limit is -1"),
        ({"time_limit": 0}, "time_limit is 0"),
        ({"lead": 3}, "lead is 3"),
        ({"lead": (0,)}, "lead is 0"),
        ({"device": "cuda"}, "device is 'cuda'"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            check(softmax, "softmax_attention", **wrong)
    with pytest.raises(TypeError, match="kernel is int"):
        check(3, "softmax_attention")
    with pytest.raises(TypeError, match="wanted is None"):
        check_answer(3, None)
    with pytest.raises(ValueError, match="no case fits"):
        check(softmax, "softmax_attention", cases="tiles", mask=np.ones((13, 13), bool))


def test_options_may_be_of_another_library():
    torch = pytest.importorskip("torch")
    mask = torch.tril(torch.ones(13, 13, dtype=torch.bool))
    report = check(softmax, "softmax_attention", mask=mask)
    assert not report.passed and report.diagnosis[0].startswith("mask ignored")


@pytest.mark.parametrize("fuse", ["sum", "mean", "max", "weighted"])
def test_blocks_fused_into_one(fuse):
    """The output has one block's rows; a wrong one is refused, without a map of its rows."""
    options = {"block": 4, "fuse": fuse}
    if fuse == "weighted":
        options["weights"] = np.array([0.5, -1.0, 2.0], np.float32)

    def kernel(q, k, v):
        return refattn.block_attention(q, k, v, **options)

    def backward(dy, q, k, v):
        return refattn.block_attention_vjp(dy, q, k, v, **options)[:3]

    asked = {"cases": [(12, 12, 3, 5)], **options}
    assert check(kernel, "block_attention", gradients=backward, **asked).passed
    wrong = check(lambda *x: 1.1 * kernel(*x), "block_attention", **asked)
    assert not wrong.passed and not wrong.findings
