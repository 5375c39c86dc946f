"""Attention by csr masks: rows of every length, wide arrays, heads, other libraries, hidden NaN."""

import ml_dtypes
import numpy as np
import pytest
from scipy.sparse import csr_array

import refattn
import simulator
from refattn import masks
from refattn.sparse import cuda as kernels


def arrays(n, m, d, e, dtype=np.float64, lead=()):
    rng = np.random.default_rng([n, m, d, e])
    shapes = (n, e), (n, d), (m, d), (m, e)
    return [rng.standard_normal((*lead, *s)).astype(dtype) for s in shapes]


def both(dy, q, k, v, mask, **options):
    """y, dq, dk and dv of the kernels and of the formula."""
    found, wanted = (
        (
            refattn.sparse_attention(q, k, v, mask=mask, backend=backend, **options),
            *refattn.sparse_attention_vjp(dy, q, k, v, mask=mask, backend=backend, **options),
        )
        for backend in ("cuda", "numpy")
    )
    return found, wanted


def close(found, wanted, tolerance=1e-11):
    for x, want in zip(found, wanted, strict=True):
        assert x.dtype == want.dtype and x.shape == want.shape
        np.testing.assert_allclose(x, want, rtol=tolerance, atol=tolerance)


def test_rows_and_columns_of_every_length():
    lengths = [0, 1, 7, 8, 9, 31, 32, 33, 64, 65, 70]
    dense = np.arange(70) < np.array(lengths)[:, None]
    inputs = arrays(len(lengths), 70, 5, 3)
    close(*both(*inputs, csr_array(dense)))
    dy, q, k, v = arrays(70, len(lengths), 3, 4)
    close(*both(dy, q, k, v, csr_array(dense.T.copy()), scale=-0.4))


@pytest.mark.parametrize(("d", "e"), [(1, 1), (31, 33), (64, 130), (300, 2), (3, 300), (520, 257)])
def test_any_number_of_columns(d, e):
    close(*both(*arrays(3, 5, d, e), csr_array(np.tri(3, 5, 2, dtype=bool))))


@pytest.mark.parametrize("make", [masks.causal, lambda n: masks.bigbird(n, 2, rng=0)])
def test_masks_of_the_package(make):
    mask = make(20)
    close(*both(*arrays(20, 20, 4, 4, np.float32), mask), tolerance=2e-5)


def test_stored_false_and_unsorted_indices():
    mask = csr_array((np.array([1, 0, 1, 1], bool), [2, 0, 1, 2], [0, 2, 2, 4]), shape=(3, 3))
    close(*both(*arrays(3, 3, 2, 2), mask))


def test_heads_share_keys():
    """Queries (2, 3, ...) of two groups: keys and values of a group broadcast, gradients add."""
    dy, q, k, v = arrays(4, 6, 3, 2, lead=(2, 3))
    mask = csr_array(np.tri(4, 6, 2, dtype=bool))
    close(*both(dy, q, k[:, :1], v[:1, :1], mask))


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (4, 0, 3, 2), (0, 0, 1, 1), (4, 4, 3, 0)])
@pytest.mark.parametrize("lead", [(), (0,), (2, 0)])
def test_nothing_at_all(shape, lead):
    n, m, *_ = shape
    close(*both(*arrays(*shape, lead=lead), csr_array(np.ones((n, m), bool))))


def test_large_logits():
    dy, q, k, v = arrays(6, 40, 3, 2)
    mask = csr_array(np.ones((6, 40), bool))
    close(*both(dy, 1e4 * q, k, v, mask), tolerance=1e-8)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_hidden_key_never_leaks(poison):
    """Keys 33 and 38 are seen by row 1 alone, and lie in a batch that is not full."""
    dy, q, k, v = arrays(3, 40, 4, 3)
    dense = np.ones((3, 40), bool)
    dense[[0, 2]] = np.isin(np.arange(40), [33, 38], invert=True)
    clean, _ = both(dy, q, k, v, csr_array(dense))
    k[[33, 38]], v[[33, 38]] = poison, poison
    found, wanted = both(dy, q, k, v, csr_array(dense))
    for x, c in zip(found[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(x[[0, 2]], c[[0, 2]])
    for x, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(want))
    assert not np.isfinite(found[0][1]).all()


def test_keys_at_minus_infinity_are_seen_with_weight_zero():
    """A score of -inf is a weight of 0; a row of them is an empty row."""
    dy, q, k, v = arrays(2, 36, 1, 2)
    q[:], k[:] = 1, np.arange(36)[:, None] / 36
    k[33:] = -np.inf
    dense = np.ones((2, 36), bool)
    dense[1, :33] = False
    y = refattn.sparse_attention(q, k, v, mask=csr_array(dense), backend="cuda")
    wanted = refattn.sparse_attention(q, k[:33], v[:33], mask=csr_array(dense[:, :33]))
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-14)
    assert (y[1] == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_rounded_once(dtype):
    inputs = [x.astype(dtype) for x in arrays(5, 40, 4, 3)]
    mask = csr_array(np.ones((5, 40), bool))
    found, wanted = both(*inputs, mask)
    for x, want in zip(found, wanted, strict=True):
        assert x.dtype == dtype
        x, want = x.astype(float), want.astype(float)
        step = 2 * float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(x, want, rtol=step, atol=step * abs(want).max())


def test_the_same_bits_in_every_order():
    inputs, mask = arrays(6, 40, 5, 4, np.float32), csr_array(np.ones((6, 40), bool))
    runs = []
    for number in range(3):
        with simulator.seed(number):
            runs.append(both(*inputs, mask)[0])
    for run in runs[1:]:
        for x, first in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(x, first)


def test_arrays_of_torch(torch):
    """Torch in, torch out, half types too; gradients of broadcast axes are summed."""
    dy, q, k, v = arrays(4, 6, 3, 2, np.float32, lead=(2,))
    mask = csr_array(np.tri(4, 6, 2, dtype=bool))
    _, wanted = both(dy, q, k[:1], v, mask)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        there = [torch.from_numpy(x).to(dtype) for x in (dy, q, k[:1], v)]
        options = {"mask": mask, "backend": "cuda"}
        found = (
            refattn.sparse_attention(*there[1:], **options),
            *refattn.sparse_attention_vjp(*there, **options),
        )
        for x, want in zip(found, wanted, strict=True):
            assert isinstance(x, torch.Tensor) and x.dtype == dtype
            np.testing.assert_allclose(x.float().numpy(), want, rtol=tolerance, atol=tolerance)


def test_errors_are_the_formulas(torch):
    dy, q, k, v = arrays(4, 6, 3, 2, np.float32)
    mask, wrong = csr_array(np.ones((4, 6), bool)), csr_array(np.ones((4, 5), bool))
    bad = [
        ((dy, q, k[:5], v), {"mask": mask}),
        ((dy, q, k.astype(float), v), {"mask": mask}),
        ((dy, q, k, v), {"mask": wrong}),
        ((dy, q, k, v), {"mask": mask.toarray()}),
        ((dy, q, k, v), {"mask": mask, "scale": np.inf}),
        ((dy[:3], q, k, v), {"mask": mask}),
    ]
    for inputs, options in bad:
        said = set()
        for backend, turned in (("numpy", np.asarray), ("cuda", torch.from_numpy)):
            with pytest.raises((TypeError, ValueError)) as caught:
                refattn.sparse_attention_vjp(*map(turned, inputs), backend=backend, **options)
            said.add(str(caught.value))
        assert len(said) == 1


@pytest.mark.parametrize(
    ("width", "cut"),
    [(1, (1, 1)), (32, (1, 1)), (33, (2, 1)), (65, (4, 1)), (256, (8, 1)), (257, (8, 2))],
)
def test_columns_and_slices(width, cut):
    assert kernels._cut(width) == cut
