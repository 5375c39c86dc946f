"""Probes pass what is right and name the promise that a wrong kernel breaks; no reference."""

import numpy as np
import pytest

import promises_broken as broken
import refattn
from promises_broken import (
    HIDDEN,
    OMEGA,
    N,
    cached,
    causal_windowed,
    kernel_of,
    linear_resume,
    windowed,
)
from refattn.verify import probe
from refusals import refused

FORMATS = ["float64", "float32", "float16", "bfloat16"]
E = np.random.default_rng(0).standard_normal((5, N)) / N**0.5
HIERARCHY = refattn.masks.hierarchical(N, 3, causal=True)
ONE_ORDER = ("keys shuffled", "queries shuffled")
RIGHT = {
    "softmax": (refattn.softmax_attention, {}, {"windowed": windowed}),
    "softmax causal": (
        refattn.softmax_attention,
        {"causal": True},
        {"causal": True, "resume": cached, "windowed": causal_windowed},
    ),
    "softmax hidden": (refattn.softmax_attention, {"mask": ~HIDDEN[None]}, {"hidden": HIDDEN}),
    "local": (refattn.local_attention, {"window": (2, 1)}, {"window": (2, 1)}),
    "local causal": (causal_windowed(3), {}, {"window": 3, "causal": True}),
    "sparse causal": (
        refattn.sparse_attention,
        {"mask": HIERARCHY},
        {"causal": True, "skip": ["prefix alone"]},
    ),
    "linear": (refattn.linear_attention, {"feature_map": "softmax"}, {}),
    "linear hidden": (
        refattn.linear_attention,
        {"causal": True, "key_mask": ~HIDDEN},
        {"causal": True, "hidden": HIDDEN},
    ),
    "linear causal": (
        refattn.linear_attention,
        {"causal": True},
        {"causal": True, "resume": linear_resume},
    ),
    "linear bare": (
        refattn.linear_attention,
        {"causal": True, "normalize": False, "feature_map": "taylor"},
        {"causal": True},
    ),
    "chunked": (
        refattn.linear_attention_chunked,
        {"chunk": 7},
        {"causal": True, "resume": linear_resume},
    ),
    "linformer": (
        refattn.linformer_attention,
        {"E": E, "key_mask": ~HIDDEN},
        {"hidden": HIDDEN},
    ),
    "performer": (refattn.performer_attention, {"omega": OMEGA, "kind": "hyperbolic"}, {}),
    "performer causal": (
        refattn.performer_attention,
        {"omega": OMEGA, "causal": True},
        {"causal": True},
    ),
    "blocks": (refattn.block_attention, {"block": 5}, {"skip": ONE_ORDER}),
    "blocks exact": (refattn.block_attention, {"block": 5, "fuse": "exact"}, {}),
    "two level": (
        refattn.two_level_attention,
        {"block": 5, "pool": "max"},
        {"linear": False, "skip": ONE_ORDER},
    ),
    "gated": (
        refattn.gated_attention,
        {"gate": lambda q, k, v: refattn.gates.threshold(q[..., 0], 0.0)},
        {},
    ),
}


def failed(report):
    return {line.case for line in report.lines if line.trouble}


@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(name, dtype, lead):
    attention, options, told = RIGHT[name]
    report = probe(kernel_of(attention, **options), dtype=dtype, lead=lead, **told)
    assert report.passed, report


CAUSAL, FUTURE = {"causal": True}, {"later keys x 1e5", "later keys NaN", "later values NaN"}
OUTSIDE = {"keys out of window x 1e5", "keys out of window NaN", "values out of window NaN"}
RESUMED = kernel_of(refattn.linear_attention, causal=True)
BROKEN = [
    (lambda q, k, v: v * np.nan, {}, {"finite"}),
    (lambda q, k, v: refattn.softmax_attention(q, k, v).astype(float), {}, {"finite"}),
    (lambda q, k, v: v[:3] * 1, {}, {"finite"}),
    (lambda q, k, v: "y", {}, {"finite"}),
    (lambda q, k, v: q @ v, {}, {"finite"}),
    (lambda q, k, v: v, CAUSAL, {"inputs unchanged"}),
    (broken.writes_at_odd_lengths, CAUSAL, {"inputs unchanged"}),
    (broken.now_and_then, {}, {"same again"}),
    (broken.workspace_never_cleared(), {}, {"same again"}),
    (broken.fourth_keys_for_the_fifth_head, {"lead": (2, 3)}, {"batch independence"}),
    (broken.maximum_over_the_batch, {"lead": (3,)}, {"batch independence"}),
    (broken.positive_values, CAUSAL, {"linear in v"}),
    (broken.later_first, {}, {"keys shuffled"}),
    (broken.later_larger, {}, {"queries shuffled"}),
    (refattn.softmax_attention, CAUSAL, FUTURE | {"far keys, later near", "prefix alone"}),
    (broken.maximum_over_all_keys, CAUSAL, {"later keys x 1e5", "far keys, later near"}),
    (broken.added_mask, CAUSAL, {"later keys NaN"}),
    (broken.dense_mask, CAUSAL, {"later values NaN"}),
    (broken.refuses_nan, CAUSAL, {"later values NaN"}),
    (broken.global_maximum_of_features, CAUSAL, {"far keys, later near"}),
    (broken.scaled_by_length, CAUSAL, {"prefix alone"}),
    (RESUMED, {"resume": broken.forgets, **CAUSAL}, {"split and resume"}),
    (RESUMED, {"resume": broken.loses_the_last_token, **CAUSAL}, {"split and resume"}),
    (RESUMED, {"resume": lambda q, k, v, state: v * 1, **CAUSAL}, {"split and resume"}),
    (windowed(4), {"window": 3}, OUTSIDE),
    (broken.dense_window, {"window": 3}, {"values out of window NaN"}),
    (broken.large_negative, {"hidden": HIDDEN}, {"hidden keys NaN"}),
    (
        refattn.softmax_attention,
        {"windowed": broken.window_that_counts_both_sides},
        {"window of n equals full"},
    ),
    (refattn.softmax_attention, {"windowed": lambda window: None}, {"window of n equals full"}),
]


@pytest.mark.parametrize(("kernel", "told", "cases"), BROKEN)
def test_a_broken_promise_is_named_and_no_other(kernel, told, cases):
    assert failed(probe(kernel, **told)) == cases


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("kernel", "told", "case"),
    [
        (kernel_of(refattn.softmax_attention, causal=True), {}, "keys shuffled"),
        (broken.later_larger, {}, "queries shuffled"),
        (refattn.softmax_attention, CAUSAL, "prefix alone"),
        (RESUMED, {"resume": broken.forgets, **CAUSAL}, "split and resume"),
        (broken.positive_values, CAUSAL, "linear in v"),
        (windowed(4), {"window": 3}, "keys out of window x 1e5"),
        (broken.fourth_keys_for_the_fifth_head, {"lead": (2, 3)}, "batch independence"),
    ],
)
def test_half_types_leave_no_room_for_a_broken_promise(kernel, told, case, dtype):
    assert case in failed(probe(kernel, dtype=dtype, **told))


def test_trouble_says_where_and_the_rest_still_runs():
    report = probe(broken.refuses_nan, causal=True)
    (line,) = [line for line in report.lines if line.trouble]
    assert line.trouble == "23 of 24 keys changed: raised FloatingPointError: no NaN, please"
    assert len(report.lines) == 9
    text = str(probe(RESUMED, causal=True, resume=lambda q, k, v, state: v * 1))
    assert "cut at 12, from token 0: gave ndarray, expected a pair (y, state)" in text
    text = str(probe(RESUMED, causal=True, resume=broken.forgets))
    assert "cut at 12, from token 12: first at (0, 0)" in text
    assert "12 of 192 are NaN or infinite, first at (3, 0)" in str(probe(broken.infinite))


def test_lines_can_be_left_out():
    report = probe(broken.dense_mask, causal=True, skip=["later values NaN", "inputs unchanged"])
    assert report.passed and {"later values NaN", "inputs unchanged"}.isdisjoint(
        line.case for line in report.lines
    )


def test_other_shapes():
    sizes = set()

    def kernel(q, k, v):
        sizes.add(q.shape)
        return refattn.softmax_attention(q, k, v, causal=True)

    assert probe(kernel, causal=True, shape=(4, 1)).passed
    assert sizes == {(4, 1), (3, 1), (2, 1), (1, 1)}


def test_nothing_returned():
    assert not probe(lambda q, k, v: None).filled
    assert probe(lambda q, k, v: ..., title="hole").title == "hole"


@pytest.mark.parametrize(
    ("error", "words", "told"),
    [
        (ValueError, "dtype is 'int8'", {"dtype": "int8"}),
        (ValueError, "like is 'abacus'", {"like": "abacus"}),
        (ValueError, "xp is 'abacus'", {"xp": "abacus"}),
        (TypeError, "causal is 1", {"causal": 1}),
        (ValueError, "window", {"window": -1}),
        (ValueError, "window is 30; expected sides below 23", {"window": 30}),
        (ValueError, r"window is \(23, 0\); .*: choose a larger shape", {"window": (23, 0)}),
        (
            ValueError,
            "expected sides below 3 with 4",
            {"window": 3, "causal": True, "shape": (4, 2)},
        ),
        (TypeError, "hidden has dtype int64; expected bool", {"hidden": [1, 0]}),
        (ValueError, r"hidden has shape \(2,\); expected \(24,\)", {"hidden": [True, False]}),
        (ValueError, "hidden has no True", {"hidden": np.zeros(N, bool)}),
        (TypeError, "resume is int; expected a function", {"resume": 3, "causal": True}),
        (ValueError, "resume came without causal=True", {"resume": cached}),
        (TypeError, "windowed is str; expected a function", {"windowed": "w"}),
        (ValueError, "windowed came with window", {"windowed": windowed, "window": 3}),
        (ValueError, r"shape is 24; expected \(n, d\)", {"shape": 24}),
        (ValueError, "n is 3; expected", {"shape": (3, 8)}),
        (ValueError, "each entry of lead", {"lead": (0,)}),
        (TypeError, "lead is 3; expected a tuple", {"lead": 3}),
        (TypeError, "skip is 3; expected a collection", {"skip": 3}),
        (TypeError, r"skip is 'same again'; .* \['same again'\]", {"skip": "same again"}),
        (ValueError, "an entry of skip is 'same'; expected one of", {"skip": ["same"]}),
    ],
)
def test_bad_arguments(error, words, told):
    with refused(error, words):
        probe(refattn.softmax_attention, **told)


def sdpa(**options):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: model)")
    attention = torch.nn.functional.scaled_dot_product_attention
    return torch, lambda q, k, v: attention(q, k, v, **options)


@pytest.mark.parametrize("dtype", FORMATS)
def test_torch_keeps_its_promises(dtype):
    torch, kernel = sdpa()

    def window(width):
        at = torch.arange(N)
        return sdpa(attn_mask=(at[:, None] - at).abs() <= width)[1]

    report = probe(kernel, like="torch", dtype=dtype, device="cpu", windowed=window)
    assert report.passed and "batch independence" in {line.case for line in report.lines}, report
    assert failed(probe(window(3), like="torch", dtype=dtype, window=3)) == OUTSIDE - {
        "keys out of window x 1e5"
    }


@pytest.mark.parametrize("dtype", FORMATS)
def test_causal_torch_multiplies_hidden_values_with_zero(dtype):
    torch, kernel = sdpa(is_causal=True)

    def resume(q, k, v, state):
        k, v = (k, v) if state is None else map(lambda a, b: torch.cat([a, b], 2), state, (k, v))
        m = k.shape[-2]
        seen = torch.ones(q.shape[-2], m, dtype=torch.bool).tril(m - q.shape[-2])
        return sdpa(attn_mask=seen)[1](q, k, v), (k, v)

    told = {"like": "torch", "dtype": dtype, "causal": True, "resume": resume}
    assert failed(probe(kernel, **told)) == {"later values NaN"}
    assert probe(kernel, skip=["later values NaN"], **told).passed


def test_jax_has_its_own_layout():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    kernel = kernel_of(jax.nn.dot_product_attention, is_causal=True)
    assert failed(probe(kernel, like="jax", causal=True)) == {"later values NaN"}
    one_head = lambda q, k, v: jax.nn.softmax(q @ k.T, axis=1) @ v
    assert probe(one_head, xp="jax", shape=(5, 3)).passed


def test_windows_are_counted_as_the_library_counts():
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: model)")

    def kernel(q, k, v):
        q, k, v = (x.numpy().swapaxes(1, 2) for x in (q, k, v))
        y = refattn.local_attention(q, k, v, window=3, causal=True)
        return torch.from_numpy(y.swapaxes(1, 2).copy())

    assert probe(kernel, like="fla", causal=True, window=4).passed
    assert failed(probe(kernel, like="fla", causal=True, window=3)) == OUTSIDE
