"""Each finding is said of a kernel that has exactly this trouble, and no other with it."""

import numpy as np
import pytest

import refattn
from refattn.verify import check
from refattn.verify.findings.precision import nearest
from refattn.verify.findings.said import MOST

CASES = [(1, 1, 4, 3), (13, 13, 5, 7), (7, 12, 4, 4), (12, 7, 4, 4), (130, 130, 16, 16)]
ONE_KEY = "Only with one key, whose weight is 1 whatever its score, is it right."
LONG = (
    "The cases with n and m >= 130 fail, those with <= 13 are right; d and e are larger there too."
)
softmax = refattn.softmax_attention


def found(kernel, mechanism="softmax_attention", cases=CASES, **options):
    report = check(kernel, mechanism, cases=cases, **options)
    assert not report.passed and not report.diagnosis, report
    return report.findings


def edited(change):
    """Softmax attention whose output is changed by ``change(y, q, k, v)``, in place or not."""

    def kernel(q, k, v):
        y = softmax(q, k, v)
        other = change(y, q, k, v)
        return (y if other is None else other).astype(q.dtype)

    return kernel


def fill(value, *, rows=None, columns=None):
    """Some rows or columns, chosen from their number, hold a value, or what it makes of y."""

    def change(y, q, k, v):
        at = (
            ...,
            rows(y.shape[-2]) if rows else slice(None),
            columns(y.shape[-1]) if columns else slice(None),
        )
        y[at] = value(y[at]) if callable(value) else value

    return edited(change)


def noise(y):
    return np.random.default_rng(0).standard_normal(y.shape)


def other(y):
    """Numbers that have nothing to do with y."""
    return y + 1 + abs(noise(y))


# What y is instead

INSTEAD = {
    "a factor": (lambda y, q, k, v: 1.5 * y, ["y is 1.5 times what is wanted."]),
    "a small factor": (
        lambda y, q, k, v: 1.0001 * y,
        ["Where wrong, y is 1.0001 times what is wanted."],
    ),
    "a sign": (lambda y, q, k, v: -y, ["y is minus what is wanted."]),
    "a factor of d": (
        lambda y, q, k, v: y * q.shape[1] ** 0.5,
        ["y is sqrt(d) times what is wanted."],
    ),
    "a factor of m": (
        lambda y, q, k, v: y / len(k),
        ["Where wrong, y is 1/m times what is wanted.", ONE_KEY],
    ),
    "a factor of the case": (
        lambda y, q, k, v: y * (3 + len(y) % 5),
        ["y is a multiple of what is wanted, another one in each case: 3 to 6 times."],
    ),
    "an offset": (
        lambda y, q, k, v: y + 0.25,
        ["y is 0.25 more than what is wanted, in every entry."],
    ),
    "a row added to all": (
        lambda y, q, k, v: y + v[-1],
        ["y is off by the same numbers in every row."],
    ),
    "rows later": (
        lambda y, q, k, v: np.roll(y, 1, axis=0),
        ["Where wrong, y is what is wanted with its rows one place later.", ONE_KEY],
    ),
    "rows earlier, the last lost": (
        lambda y, q, k, v: np.concatenate([y[1:], 0 * y[:1]]),
        ["Where wrong, y is what is wanted with its rows one place earlier."],
    ),
    "columns later": (
        lambda y, q, k, v: np.roll(y, 1, axis=1),
        ["y is what is wanted with its columns one place later."],
    ),
    "rows reversed": (
        lambda y, q, k, v: y[::-1],
        ["Where wrong, y is what is wanted with its rows in reverse order.", ONE_KEY],
    ),
    "rows in another order": (
        lambda y, q, k, v: y[np.random.default_rng(0).permutation(len(y))],
        ["Where wrong, y is what is wanted with its rows in another order.", ONE_KEY],
    ),
    "rows repeated": (
        lambda y, q, k, v: y[np.arange(len(y)) * 2 % 5 % len(y)],
        ["Where wrong, y is made of rows that are wanted, but elsewhere.", ONE_KEY],
    ),
    "columns written as rows": (
        lambda y, q, k, v: np.ascontiguousarray(y.T).reshape(y.shape),
        ["Where wrong, y is what is wanted with its columns written where rows belong.", ONE_KEY],
    ),
    "the mean": (
        lambda y, q, k, v: np.broadcast_to(v.mean(axis=0), y.shape),
        ["Where wrong, y is the mean of all values in every row.", ONE_KEY],
    ),
    "the best key": (
        lambda y, q, k, v: v[(q @ k.T).argmax(axis=1)],
        [
            "Where wrong, y is in each row the value of the key with the largest score: one weight "
            "is 1.",
            ONE_KEY,
        ],
    ),
    "rounded to bfloat16": (
        lambda y, q, k, v: nearest(y.astype(float), 8),
        ["Where wrong, y is what is wanted, rounded to bfloat16."],
    ),
    "one number": (lambda y, q, k, v: 0 * y + 7, ["Every wrong entry of y is 7."]),
    "0 everywhere": (lambda y, q, k, v: 0 * y, ["Every wrong entry of y is 0."]),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_it_is_instead(name):
    change, sentences = INSTEAD[name]
    assert list(found(edited(change))) == sentences


def test_a_multiple_in_each_row():
    def epsilon(q, k, v):
        a = np.exp(q @ k.T / np.float32(q.shape[1] ** 0.5))
        return a @ v / (a.sum(axis=1, keepdims=True) + np.float32(1))

    (words,) = found(epsilon, cases=[(7, 12, 4, 4), (12, 7, 4, 4)])[:1]
    assert "row by row a multiple of what is wanted" in words
    assert words.endswith("as if only the sum of its weights were wrong.")
    options = {"causal": True, "cases": [(13, 13, 5, 7), (9, 9, 4, 4)]}
    summed = edited(
        lambda y, q, k, v: (
            refattn.softmax_attention(q, k, v, causal=True) * np.arange(1, len(y) + 1)[:, None]
        )
    )
    assert found(summed, **options)[0] == (
        "Where wrong, y is what is wanted times the number of keys that the row sees."
    )


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (lambda d: 1.01 / d**0.5, "q . k times 1.01."),
        (lambda d: -1 / d**0.5, "q . k times -1."),
        (lambda d: 1 / d**0.5 / np.log(2), "q . k times log2(e), as if exp were taken for exp2."),
        (lambda d: d**-0.75, "q . k times "),
    ],
)
def test_scores_at_another_scale(scale, words):
    sentences = found(lambda q, k, v: softmax(q, k, v, scale=scale(q.shape[1])))
    if words.endswith(" "):  # d^(-1/4), which is none of the names
        assert sentences == (ONE_KEY,)
    else:
        assert sentences == (f"Where wrong, y is what is wanted with {words}", ONE_KEY)


def test_a_key_left_out():
    first = lambda q, k, v: softmax(q, k[1:], v[1:])
    assert found(first)[0] == "Where wrong, y is what is wanted without the first key."
    last = lambda q, k, v: softmax(q, k[:-1], v[:-1])
    assert found(last)[0] == "Where wrong, y is what is wanted without the last key."


def test_weights_that_are_all_the_same_under_a_mask():
    mask = np.tril(np.ones((13, 13), bool))
    uniform = lambda q, k, v: softmax(0 * q, k, v, mask=mask)
    assert found(uniform, mask=mask)[0] == (
        "Where wrong, y is the mean of the values that each row sees: its weights are all the same."
    )


def test_heads_in_other_places():
    with_heads = {"lead": (2, 3)}
    swapped = edited(lambda y, q, k, v: y[:, ::-1])
    assert found(swapped, **with_heads) == (
        "Where wrong, y is what is wanted with its heads in the order [2, 1, 0, 5, 4, 3].",
        "Only heads 0 and 2 are wrong in y.",
    )
    torn = edited(lambda y, q, k, v: y.swapaxes(1, 2).reshape(y.shape))
    assert found(torn, **with_heads)[0] == (
        "Where wrong, y is what is wanted, its memory in the order (tokens, heads)."
    )


def test_transposed_where_n_is_e():
    turned = edited(lambda y, q, k, v: y.T.copy() if y.shape[0] == y.shape[1] else y)
    words = found(turned, cases=[(16, 16, 4, 16), (12, 7, 4, 12)])
    assert words[0] == "y is what is wanted, transposed."


# Where it is wrong

PLACES = {
    "the first row": (
        fill(other, rows=lambda n: slice(0, 1)),
        ["Only the first row is wrong in y."],
    ),
    "the last row, NaN": (
        fill(np.nan, rows=lambda n: slice(n - 1, n)),
        ["Every wrong entry of y is NaN, in whole rows.", "Only the last row is wrong in y."],
    ),
    "the tail, 0": (
        fill(0, rows=lambda n: slice(n // 16 * 16, n)),
        [
            "Every wrong entry of y is 0, in whole rows.",
            "Only the last n mod 16 (or 32, 64 or 128) rows are wrong in y.",
        ],
    ),
    "a small tail": (
        fill(other, rows=lambda n: slice(n // 4 * 4, n)),
        [
            "Only the cases whose n is no multiple of 4 fail.",
            "Only the last n mod 4 rows are wrong in y.",
        ],
    ),
    "rows from one on": (
        fill(lambda y: 2 * y, rows=lambda n: slice(64, n)),
        [
            "Where wrong, y is 2 times what is wanted.",
            LONG,
            "Only rows 64 to 129 of 130 are wrong in y.",
        ],
    ),
    "the same rows from one on in several cases": (
        fill(other, rows=lambda n: slice(10, n)),
        [
            "The cases with n >= 12 fail, those with <= 7 are right.",
            "Only rows from 10 on are wrong in y.",
        ],
    ),
    "every 16th row": (
        fill(other, rows=lambda n: slice(0, n, 16)),
        ["Only every 16th row, from row 0 on, is wrong in y."],
    ),
    "the first column": (
        fill(other, columns=lambda e: slice(0, 1)),
        ["Only the first column is wrong in y."],
    ),
    "last columns": (
        fill(0, columns=lambda e: slice(e // 4 * 4, e)),
        [
            "Every wrong entry of y is 0.",
            "Only the cases whose e is no multiple of 4 fail.",
            "Only the last e mod 4 columns are wrong in y.",
        ],
    ),
    "two columns": (
        fill(other, columns=lambda e: slice(1, 3)),
        ["Only columns 1 and 2 are wrong in y."],
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_it_sits(name):
    kernel, sentences = PLACES[name]
    assert list(found(kernel)) == sentences


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (lambda n: slice(0, 2), "the first 2 rows"),
        (lambda n: slice(n - 2, n), "the last 2 rows"),
        (lambda n: slice(3, 4), "row 3"),
        (lambda n: [1, 4], "rows 1 and 4"),
    ],
)
def test_the_same_rows_in_cases_of_other_lengths(rows, words):
    verb = "is" if words == "row 3" else "are"
    sentences = found(fill(other, rows=rows), cases=[(13, 13, 5, 7), (40, 40, 5, 7)])
    assert sentences == (f"Only {words} {verb} wrong in y.",)


def test_rows_that_should_be_0():
    def mean_of_nothing(q, k, v):
        y = softmax(q, k, v, causal=True)
        empty = slice(0, max(0, len(q) - len(k)))
        y[empty] = other(y[empty])
        return y

    assert found(mean_of_nothing, causal=True) == (
        "Only the cases with n > m, more queries than keys, fail.",
        "Only rows that should be 0 are wrong in y.",
    )


def test_a_maximum_that_comes_late():
    def never_corrected(q, k, v, tile=16):
        s = q @ k.T / np.float32(q.shape[1] ** 0.5)
        top = np.full((len(q), 1), -np.inf, np.float32)
        y, total = 0, 0
        for j in range(0, len(k), tile):
            top = np.maximum(top, s[:, j : j + tile].max(axis=1, keepdims=True))
            a = np.exp(s[:, j : j + tile] - top)
            y, total = y + a @ v[j : j + tile], total + a.sum(axis=1, keepdims=True)
        return y / total

    assert found(never_corrected) == (
        LONG,
        "Only rows whose largest score comes after the first 16 keys are wrong in y.",
    )


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ((slice(None), 1), "Only head 1 is wrong in y."),
        ((slice(None), slice(1, 3)), "Only heads 1 and 2 are wrong in y."),
        ((1,), "Only batch 1 is wrong in y."),
        ((0, 2), "Only heads (0, 2) are wrong in y."),
    ],
)
def test_some_heads(at, words):
    def change(y, q, k, v):
        y[at] = noise(y)[at]

    assert found(edited(change), lead=(2, 3)) == (words,)


# Which cases fail

CASES_THAT_FAIL = {
    "n != m": (lambda q, k, v: len(q) != len(k), "Only the cases with n != m fail."),
    "n > m": (
        lambda q, k, v: len(q) > len(k),
        "Only the cases with n > m, more queries than keys, fail.",
    ),
    "n < m": (
        lambda q, k, v: len(q) < len(k),
        "Only the cases with n < m, fewer queries than keys, fail.",
    ),
    "one token": (lambda q, k, v: len(q) == 1, "Only the cases with one token fail."),
    "long": (lambda q, k, v: len(q) > 64, LONG),
    "short": (
        lambda q, k, v: len(q) < 64,
        "The cases with n and m <= 13 fail, those with >= 130 are right; d and e are smaller there "
        "too.",
    ),
    "more than one key": (lambda q, k, v: len(k) > 1, ONE_KEY),
}


@pytest.mark.parametrize("name", CASES_THAT_FAIL)
@pytest.mark.parametrize("raises", [False, True])
def test_which_cases_fail(name, raises):
    fails, sentence = CASES_THAT_FAIL[name]

    def kernel(q, k, v):
        y = softmax(q, k, v)
        if not fails(q, k, v):
            return y
        if raises:
            raise RuntimeError("not here")
        return (y + noise(y) / 10).astype(q.dtype)

    assert found(kernel)[0] == sentence


def test_large_scores():
    def doubled(q, k, v):
        return softmax(q, k, v) * np.float32(2 if abs(q @ k.T).max() > 200 else 1)

    first, second = found(doubled)
    assert first == "Where wrong, y is 2 times what is wanted."
    assert second.startswith("The cases with scores of ") and "and more fail" in second


def test_faint_keys():
    def epsilon(q, k, v):
        num = refattn.linear_attention(q, k, v, normalize=False)
        den = refattn.linear_attention(q, k, v[:, :1] ** 0, normalize=False)
        return num / (den + np.float32(3e-9))

    first, second = found(epsilon, "linear_attention")
    assert "row by row a multiple" in first
    assert second.startswith("Only the case 'faint keys' fails: keys near -30")


def test_special_cases_tell_nothing_of_sizes():
    """They alone have e = 64, and another kind of numbers."""

    def wrong(q, k, v):
        y = softmax(q, k, v)
        return y + noise(y) / 10 if v.shape[1] == 64 else y

    words = found(edited(lambda y, q, k, v: wrong(q, k, v)), cases="default")
    assert words[0] == "Only the case 'one key each' fails: one key takes most of a query's weight."

    def for_large(q, k, v):
        y = softmax(q, k, v)
        return (y + noise(y) / 10 * (abs(q).max() > 50)).astype(q.dtype)

    words = found(for_large, cases="default")
    assert words[0].startswith("The cases with scores of ")


def test_a_pattern_is_not_contradicted_by_a_special_case():
    """Wrong from 12 tokens on, but right where scores are large, with 130."""
    kernel = edited(lambda y, q, k, v: y + noise(y) / 10 * (len(y) > 11 and abs(q).max() < 50))
    assert not any(">= 12" in x for x in found(kernel))


def test_a_budget_alone_tells_nothing_of_the_cases():
    """The same relative error everywhere, in some cases within the budget."""
    kernel = lambda q, k, v: (softmax(q, k, v).astype(float) * 1.25 + 0.05).astype(q.dtype)
    report = check(kernel, "softmax_attention", dtype="bfloat16")
    verdicts = {bool(line.trouble) for line in report.lines}
    assert verdicts == {True, False}
    assert not any("fail" in x for x in report.findings), report


def test_linear_attention_has_no_scores():
    def kernel(q, k, v):
        y = refattn.linear_attention(q, k, v)
        return (y + noise(y) / 10 * (abs(q @ k.T).max() > 200)).astype(q.dtype)

    assert not any("score" in x for x in found(kernel, "linear_attention"))
    one = lambda q, k, v: (v if len(k) == 1 else noise(v[: len(q)])).astype(q.dtype)
    words = found(one, "linear_attention", cases=[(1, 1, 4, 3), (13, 13, 5, 7)])
    assert words[0] == "Only with one key, whose weight is 1, is it right."


def test_minus_zero_is_zero():
    minus = gradients(lambda dq, dk, dv: (dq, -0.0 * abs(dk), dv))
    words = found(softmax, gradients=minus)
    assert any("Every wrong entry of dk is 0." in x for x in words), words


def test_nan_is_not_told_as_beyond_the_values():
    def kernel(y, q, k, v):
        y[...] = np.nan
        y[0, 0] = 9.0

    words = found(edited(kernel), cases=CASES[1:])
    assert any("entries of y are NaN." in x for x in words)
    assert not any("beyond the values" in x for x in words)


def test_multiples_of_a_tile():
    kernel = edited(lambda y, q, k, v: y + noise(y) / 10 if len(k) % 16 else y)
    words = found(kernel, cases=[(64, 64, 8, 8), (30, 48, 8, 8), (40, 40, 8, 8), (40, 70, 8, 8)])
    assert words[0] == "Only the cases whose m is no multiple of 16 fail."


# How large it is


@pytest.mark.parametrize(
    ("bits", "dtype", "name"),
    [(8, "float32", "bfloat16"), (11, "float32", "float16 or TF32"), (24, "float64", "float32")],
)
def test_a_lower_precision(bits, dtype, name):
    low = lambda x: nearest(x.astype(float), bits)
    inputs = lambda q, k, v: softmax(low(q), low(k), low(v)).astype(dtype)
    words = f"y is what is wanted with q, k and v rounded to {name}."
    assert found(inputs, dtype=dtype)[0].endswith(words)

    def every_step(q, k, v):
        s = low(low(low(q) @ low(k).T) / q.shape[1] ** 0.5)
        a = low(np.exp(s - s.max(axis=1, keepdims=True)))
        p = low(a / low(a.sum(axis=1, keepdims=True)))
        return (low(p) @ low(v) + 2.0**-40).astype(dtype)

    for lead in ((), (2, 3)):
        kernel = every_step if not lead else by_head(every_step)
        sentence = found(kernel, dtype=dtype, lead=lead)[-1]
        assert sentence.startswith("The error of y is about 2^-"), sentence
        assert sentence.endswith(f"as much as {name} would leave.")


def by_head(kernel):
    def run(q, k, v):
        heads = [kernel(*(x[at] for x in (q, k, v))) for at in np.ndindex(q.shape[:2])]
        return np.reshape(heads, (*q.shape[:2], *heads[0].shape))

    return run


def test_a_lower_precision_is_not_seen_in_a_wrong_formula():
    """Scores a little off leave an error of the same size, but none with one key."""
    slightly = lambda q, k, v: softmax(q, k, v, scale=(q.shape[1] + 0.01) ** -0.5)
    assert not any("would leave" in x for x in found(slightly))


def test_errors_that_grow():
    with_the_row = lambda y, q, k, v: y + 1e-4 * noise(y) * np.arange(1, len(y) + 1)[:, None] ** 2
    words = found(edited(with_the_row))
    assert len(words) == 1 and words[0].startswith("The error of y grows with the row, from about")

    def with_the_keys(y, q, k, v):
        return y + 1e-5 * len(k) ** 2 * noise(y) / np.arange(1, len(y) + 1)[:, None] ** 0.5

    (words,) = found(edited(with_the_keys), cases=[(9, m, 4, 4) for m in (5, 10, 20, 40)])
    assert words.startswith("The error of y grows with the keys: ") and words.endswith("with 40.")


def test_beyond_the_values():
    (words,) = found(edited(lambda y, q, k, v: y + noise(y) / 4))
    assert "entries of y lie beyond the values: no weights >= 0 that sum to 1 give them." in words


def test_nothing_is_said_of_what_has_no_pattern():
    within = lambda y, q, k, v: y + noise(y) / 10 * (len(y) > 1)
    words = found(edited(within), cases=CASES[1:])
    assert not words or all("beyond the values" in x for x in words)


# Gradients


def gradients(change):
    """The right gradients, (dq, dk, dv), changed."""

    def run(dy, q, k, v):
        grads = refattn.softmax_attention_vjp(dy, q, k, v)
        return tuple(np.asarray(x, q.dtype) for x in change(*grads))

    return run


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (
            lambda dq, dk, dv: (dq, 3 * dk, dv),
            [
                "y, dq and dv are right, dk is not.",
                "Where wrong, dk is 3 times what is wanted.",
                ONE_KEY,
            ],
        ),
        (
            lambda dq, dk, dv: (2 * dq, 2 * dk, 2 * dv),
            [
                "y is right, dq, dk and dv are not.",
                "Where wrong, dq, dk and dv are 2 times what is wanted.",
            ],
        ),
        (
            lambda dq, dk, dv: (dq, dk, np.where(np.arange(len(dv))[:, None] == 0, other(dv), dv)),
            ["y, dq and dk are right, dv is not.", "Only the first row is wrong in dv."],
        ),
        (
            lambda dq, dk, dv: (dq, dk, np.roll(dv, 1, axis=1)),
            [
                "y, dq and dk are right, dv is not.",
                "Where wrong, dv is what is wanted with its columns one place later.",
            ],
        ),
    ],
)
def test_gradients(change, sentences):
    assert list(found(softmax, gradients=gradients(change))) == sentences


def test_gradients_are_not_spoken_of_where_y_is_wrong():
    half = edited(lambda y, q, k, v: y / 2)
    words = found(half, gradients=gradients(lambda *grads: [x / 2 for x in grads]))
    assert words == ("y is 0.5 times what is wanted.",)
    words = found(half, gradients=gradients(lambda *grads: grads))
    assert words == ("dq, dk and dv are right, y is not.", "y is 0.5 times what is wanted.")


# What a check shows


def test_nothing_is_found_where_the_numbers_are_right():
    def writes(q, k, v):
        y = softmax(q, k, v)
        k[:] = 0
        return y

    assert found(writes) == ()
    assert check(softmax, "softmax_attention", cases=CASES).findings == ()


def test_a_shape_that_is_wrong_everywhere_has_no_findings():
    assert found(lambda q, k, v: softmax(q, k, v)[:, :1]) == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_infinities_are_no_trouble(value):
    words = found(edited(lambda y, q, k, v: np.where(noise(y) > 0, value, y)))
    assert len(words) <= MOST
