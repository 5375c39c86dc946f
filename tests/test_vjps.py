"""Gradients: against complex-step derivatives of the definitions, and against differences.

A complex step x + ih has no cancellation: Im f(x + ih) / h is f'(x) to full precision when h is
tiny. It runs on the definitions, so it shares nothing with the gradients it judges.
"""

import inspect

import mpmath
import numpy as np
import pytest

import refattn
from cases import LONG, MECHANISMS, Case, Shape, cases, flat, options_in
from gradients_of import assemble, definition_gradients, pieces_of

SMALL = [(1, 1, 1, 1), (4, 4, 3, 2), (3, 5, 2, 1), (5, 3, 1, 2)]
WITH_LSE = [
    case
    for case in cases([(4, 4, 3, 2), (5, 3, 1, 2)])
    if "return_lse" in inspect.signature(case.mechanism.attention).parameters
]


@pytest.mark.parametrize("case", cases(SMALL), ids=str)
def test_against_complex_step(case):
    q, k, v, options = case.build()
    y = case.mechanism.attention(q, k, v, **options)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    grads = flat(case.mechanism.vjp(dy, q, k, v, **options))
    truth = definition_gradients(case, dy)
    assert len(grads) == len(truth)
    for g, t in zip(grads, truth, strict=True):
        assert g.shape == t.shape and g.dtype == np.float64
        assert abs(g - t).max(initial=0) <= case.gradient_tolerance(q, k, v, dy, options)


@pytest.mark.parametrize("case", WITH_LSE, ids=str)
def test_log_sum_exp_against_complex_step(case):
    q, k, v, options = case.build()
    rng = np.random.default_rng(2)
    dy, dlse = rng.standard_normal((len(q), v.shape[1])), rng.standard_normal(len(q))
    grads = case.mechanism.vjp(dy, q, k, v, **options, dlse=dlse)
    for g, t in zip(grads, definition_gradients(case, dy, dlse), strict=True):
        assert abs(g - t).max(initial=0) <= case.gradient_tolerance(q, k, v, dy, options)


@pytest.mark.parametrize("case", cases([(4, 6, 3, 2), (6, 6, 2, 2), *LONG]), ids=str)
def test_against_central_differences(case):
    """Along random directions. What is left of h^2 shows in how two steps differ."""
    q, k, v, options = case.build()
    rng = np.random.default_rng(3)
    dy = rng.standard_normal(case.mechanism.attention(q, k, v, **options).shape)
    grads = flat(case.mechanism.vjp(dy, q, k, v, **options))
    pieces, options = pieces_of(case)
    directions = [
        np.where(np.isfinite(x), rng.standard_normal(x.shape), 0) for x in pieces.values()
    ]
    for (name, _), x, u in zip(pieces, pieces.values(), directions):
        if name == "gate":
            u *= (x != 0).any(axis=-1, keepdims=True)  # a closed row is a constant

    def loss(step):
        moved = [x + step * u for x, u in zip(pieces.values(), directions)]
        inputs = assemble(dict(zip(pieces, moved)))
        return (dy * case.mechanism.attention(**inputs, **options)).sum()

    coarse, fine = ((loss(h) - loss(-h)) / (2 * h) for h in (2e-5, 1e-5))
    slope = (4 * fine - coarse) / 3  # the h^2 terms cancel
    claimed = sum((g * u).sum() for g, u in zip(grads, directions, strict=True))
    size = sum(abs(g * u).sum() for g, u in zip(grads, directions)) + 1
    assert abs(slope - claimed) <= 1e-7 * size + abs(fine - coarse) / 10


@pytest.mark.parametrize("case", cases([(6, 6, 3, 2)]), ids=str)
def test_broadcast_axes_are_summed(case):
    """A gradient has its input's shape: what broadcasting copied, the gradient adds up."""
    q, k, v, options = case.build(2, 3)
    q, k, v = q[:, :1], k[0], v[:1, :1]
    dy = case.mechanism.attention(q, k, v, **options)
    grads = case.mechanism.vjp(dy, q, k, v, **options)
    full = [np.broadcast_to(x, (2, 3, *x.shape[-2:])) for x in (q, k, v)]
    dq, dk, dv, *rest = case.mechanism.vjp(dy, *full, **options)
    summed = dq.sum(1, keepdims=True), dk.sum(0), dv.sum((0, 1), keepdims=True), *rest
    for g, s in zip(flat(grads), flat(summed), strict=True):
        assert g.shape == s.shape
        np.testing.assert_allclose(g, s, rtol=1e-11, atol=1e-12 * (1 + abs(s).max()))


def test_bias_gradient_has_the_shape_of_the_bias():
    rng = np.random.default_rng(5)
    q, k, v, dy = (rng.standard_normal((2, 3, 5, 4)) for _ in range(4))
    full = rng.standard_normal((2, 3, 5, 5))
    whole = refattn.softmax_attention_vjp(dy, q, k, v, bias=full * 0)[3]
    for shape in [(5, 5), (1, 5), (5,), (), (3, 1, 5), (2, 1, 1, 1)]:
        grad = refattn.softmax_attention_vjp(dy, q, k, v, bias=np.zeros(shape))[3]
        assert grad.shape == shape
        aligned = (1,) * (4 - len(shape)) + shape
        axes = tuple(axis for axis in range(4) if aligned[axis] == 1)
        np.testing.assert_allclose(grad.ravel(), whole.sum(axes).ravel(), atol=1e-12)


def test_forward_options_serve_the_gradient():
    rng = np.random.default_rng(6)
    q, k, v, dy = (rng.standard_normal((4, 3)) for _ in range(4))
    options = {"causal": True, "return_lse": True}
    with_flag = refattn.softmax_attention_vjp(dy, q, k, v, **options)
    without = refattn.softmax_attention_vjp(dy, q, k, v, causal=True)
    for a, b in zip(with_flag, without, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", cases([(4, 4, 3, 2)], scale=1e3), ids=str)
def test_extreme_logits_against_complex_step(case):
    q, k, v, options = case.build()
    dy = np.ones_like(case.mechanism.attention(q, k, v, **options))
    grads = flat(case.mechanism.vjp(dy, q, k, v, **options))
    with mpmath.workdps(50):  # where exp would overflow a float
        truth = definition_gradients(case, dy, kind=mpmath.mpc)
    for g, t in zip(grads, truth, strict=True):
        assert np.isfinite(g).all()
        assert abs(g - t).max(initial=0) <= case.gradient_tolerance(q, k, v, dy, options)


@pytest.mark.parametrize("case", cases([(7, 7, 4, 5)]), ids=str)
def test_float32_gradients_are_those_of_float64(case):
    q, k, v, options = case.build()
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    options = options_in(options, np.float32)
    dy = np.ones_like(case.mechanism.attention(q, k, v, **options))
    wide = [x.astype(float) for x in (dy, q, k, v)]
    truth = flat(case.mechanism.vjp(*wide, **options_in(options, np.float64)))
    eps = float(np.finfo(np.float32).eps)
    bound = case.mechanism.gradient_tolerance(*wide[1:], wide[0], options, eps)
    for g, t in zip(flat(case.mechanism.vjp(dy, q, k, v, **options)), truth, strict=True):
        assert g.dtype == np.float32 and abs(g - t).max(initial=0) <= bound


def test_complex_step_finds_a_wrong_gradient():
    """The judge is not blind: a gradient off by one part in a million is refused."""
    case = Case(MECHANISMS["softmax_attention"], "plain", Shape(4, 4, 3, 2))
    q, k, v, options = case.build()
    dy = np.ones((4, 2))
    truth = definition_gradients(case, dy)[2]
    assert abs(truth).max() * 1e-6 > case.gradient_tolerance(q, k, v, dy, options)
