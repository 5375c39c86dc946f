"""Softmax attention's CUDA kernels and what is made of them, in Numba's simulator, by the formulas.

In the simulator tiles are 8 queries by 4 keys, and 8 columns at a time.
"""

import numpy as np
import pytest

from refattn import gpu

if not gpu.SIMULATED:
    pytest.skip("needs NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

import refattn
from cases import MECHANISMS, Case, Shape
from refattn.softmax import cuda, cuda_first, cuda_tiles, cuda_tiles_backward
from test_backends import agrees

DTYPES = [np.float32, np.float64]
FORWARD, BACKWARD = refattn.softmax_attention, refattn.softmax_attention_vjp
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN, met on purpose


def draw(n, m, d, e, dtype=np.float32, lead=(), of_keys=None, seed=0):
    rng = np.random.default_rng(seed)
    keys = lead if of_keys is None else of_keys
    shapes = (*lead, n, d), (*keys, m, d), (*keys, m, e)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def wide(options):
    return {
        name: x.astype(float) if getattr(x, "dtype", None) == np.float32 else x
        for name, x in options.items()
    }


def near(found, plain, exact, logits):
    """At most twice the error of the formula in the same dtype, and that of the logits."""
    assert found.dtype == plain.dtype and found.shape == exact.shape
    hidden = exact == -np.inf
    np.testing.assert_array_equal(found[hidden], exact[hidden])
    exact = np.where(hidden, 0, exact)
    eps = np.finfo(found.dtype).eps
    found, plain = (np.where(hidden, 0, x).astype(float) for x in (found, plain))
    limit = 2 * abs(plain - exact).max(initial=0)
    limit += 4 * eps * (1 + logits) * (1 + abs(exact).max(initial=0))
    gap = abs(found - exact).max(initial=0)
    assert gap <= limit, (gap, limit)


def compare(q, k, v, **options):
    """y, lse and all gradients of softmax attention, by what the forward has saved."""
    dtype = q.dtype
    exact = [x.astype(float) for x in (q, k, v)]
    y, lse = FORWARD(q, k, v, return_lse=True, backend="cuda", **options)
    plain = FORWARD(q, k, v, return_lse=True, **options)
    truth = FORWARD(*exact, return_lse=True, **wide(options))
    s = options.get("scale", q.shape[-1] ** -0.5) * (exact[0] @ exact[1].mT)
    logits = abs(s).max(initial=0)
    for found, own, want in zip((y, lse), plain, truth, strict=True):
        near(found, own, want, logits)
    rng = np.random.default_rng(1)
    dy, dlse = (rng.standard_normal(x.shape).astype(dtype) for x in (y, lse))
    found = BACKWARD(dy, q, k, v, dlse=dlse, saved=(y, lse), backend="cuda", **options)
    plain = BACKWARD(dy, q, k, v, dlse=dlse, **options)
    truth = BACKWARD(dy.astype(float), *exact, dlse=dlse.astype(float), **wide(options))
    assert len(found) == len(truth)
    for g, own, want in zip(found, plain, truth, strict=True):
        near(g, own, want, 4 * logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_tiles_and_one_more(dtype):
    compare(*draw(17, 9, 5, 4, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_at_once(dtype):
    q, k, v = draw(11, 9, 3, 2, dtype)
    rng = np.random.default_rng(2)
    bias = rng.standard_normal((11, 9)).astype(dtype)
    bias[rng.random((11, 9)) < 0.3] = -np.inf
    mask = rng.random((11, 9)) < 0.7
    mask[5] = False
    compare(q, k, v, mask=mask, bias=bias, causal=True, scale=0.8, softcap=1.5)


@pytest.mark.parametrize(("n", "m"), [(5, 10), (10, 5)])
def test_causal_with_other_numbers_of_keys_than_of_queries(n, m):
    compare(*draw(n, m, 3, 2), causal=True)


@pytest.mark.parametrize("window", [(1, 20), (20, 1), (0, 1)])
def test_spans_that_begin_or_end_inside_a_tile(window):
    """Of 9 queries with 12 keys, in one direction at most: some tiles are seen in part."""
    q, k, v = draw(9, 12, 3, 2)
    options = {"window": window}
    y = refattn.local_attention(q, k, v, backend="cuda", **options)
    np.testing.assert_allclose(y, refattn.local_attention(q, k, v, **options), rtol=1e-5, atol=1e-6)
    found = refattn.local_attention_vjp(y, q, k, v, backend="cuda", **options)
    for g, want in zip(found, refattn.local_attention_vjp(y, q, k, v, **options), strict=True):
        np.testing.assert_allclose(g, want, rtol=1e-4, atol=1e-5)


def test_heads_that_share_keys_masks_and_biases():
    q, k, v = draw(3, 5, 3, 2, lead=(2, 2), of_keys=(2, 1))
    bias = np.random.default_rng(0).standard_normal((2, 1, 5)).astype(np.float32)
    compare(q, k, v, mask=np.arange(5) != 2, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "e"), [(17, 3), (2, 17), (9, 17)])
def test_columns_beyond_a_slice(d, e, dtype):
    compare(*draw(9, 5, d, e, dtype), causal=True, softcap=2.0)


@pytest.mark.real_tiles
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiles_of_a_device(dtype):
    """The instances for a GPU: in float32 all 64 columns at once, in float64 slices of 32."""
    compare(*draw(3, 34, 40, 5, dtype), causal=True)


@pytest.mark.real_tiles
def test_the_largest_tile_of_values():
    q, k, v = draw(2, 3, 4, 70)
    exact = FORWARD(*(x.astype(float) for x in (q, k, v)))
    near(FORWARD(q, k, v, backend="cuda"), FORWARD(q, k, v), exact, abs(q @ k.T).max())


@pytest.mark.parametrize("e", [3, 40, 100])
@pytest.mark.parametrize("d", [3, 40, 100])
@pytest.mark.parametrize("kind", DTYPES)
def test_tiles_fit_into_shared_memory(kind, d, e):
    size = np.dtype(kind).itemsize
    t = cuda_tiles.tile_of(d, e, kind, small=False)
    both = (t.rows + t.keys) * (t.d + 4) + t.keys * t.e
    numbers = both + t.rows * (t.keys + 4) + t.rows * t.across
    assert size * numbers + t.rows * t.keys + 8 * t.rows <= gpu.SHARED
    t = cuda_tiles_backward.tile_of(kind, small=False)
    numbers = (t.rows + t.keys) * (t.d + t.e + 8) + 2 * t.rows * (t.keys + 4)
    assert size * numbers + t.rows * t.keys + 8 * (t.rows + t.threads) <= gpu.SHARED


def test_logits_of_ten_thousand():
    q, k, v = draw(5, 6, 3, 2)
    q *= 1e4
    compare(q, k, v)
    largest = abs(q @ k.T).max()
    assert largest > 1e4


def test_a_row_that_sees_nothing():
    q, k, v = draw(9, 6, 3, 2)
    mask = np.ones((9, 6), bool)
    mask[[0, 8]], mask[:, 4] = False, False
    y, lse = FORWARD(q, k, v, mask=mask, return_lse=True, backend="cuda")
    assert (y[[0, 8]] == 0).all() and (lse[[0, 8]] == -np.inf).all() and np.isfinite(lse[1:8]).all()
    dy = np.ones_like(y)
    dq, dk, dv = BACKWARD(dy, q, k, v, mask=mask, dlse=np.ones_like(lse), backend="cuda")
    assert (dq[[0, 8]] == 0).all() and (dk[4] == 0).all() and (dv[4] == 0).all()
    assert (abs(dq[1:8]).max(axis=-1) > 0).all()


def test_the_lowest_bias_is_a_number():
    """Where all scores of a row are that low, they are equal."""
    q, k, v = draw(3, 5, 3, 2)
    bias = np.zeros((3, 5), np.float32)
    bias[0] = bias[1, 2:] = np.finfo(np.float32).min
    y = FORWARD(q, k, v, bias=bias, backend="cuda")
    np.testing.assert_allclose(y, FORWARD(q, k, v, bias=bias), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(y[0], v.mean(axis=0), rtol=1e-6, atol=1e-6)


@quiet
def test_scores_of_minus_infinity_that_are_seen():
    """They have no weight; a row of them is as one that sees nothing."""
    q, v = -np.ones((2, 1), np.float32), np.ones((3, 2), np.float32)
    k = np.array([[np.inf], [np.inf], [1]], np.float32)
    mask = np.array([[True, True, False], [True, True, True]])
    options = {"mask": mask, "return_lse": True}
    found = FORWARD(q, k, v, backend="cuda", **options)
    for x, want in zip(found, FORWARD(q, k, v, **options), strict=True):
        np.testing.assert_array_equal(x, want)
    dv = BACKWARD(found[0] + 1, q, k, v, mask=mask, backend="cuda")[2]
    np.testing.assert_array_equal(dv, BACKWARD(found[0] + 1, q, k, v, mask=mask)[2])


HIDES = {
    "causal": {"causal": True},
    "mask": {"mask": np.tri(9, 9, dtype=bool)},
    "bias": {"bias": np.where(np.tri(9, 9, dtype=bool), 0, -np.inf).astype(np.float32)},
}


@quiet
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("how", HIDES)
def test_a_poisoned_key_reaches_only_the_queries_that_see_it(how, poison):
    q, k, v = draw(9, 9, 3, 2)
    dy, options = np.ones((9, 2), np.float32), HIDES[how]
    clean = FORWARD(q, k, v, **options), *BACKWARD(dy, q, k, v, **options)
    k[6], v[6] = poison, poison
    y = FORWARD(q, k, v, backend="cuda", **options)
    dq, dk, dv, *dbias = BACKWARD(dy, q, k, v, backend="cuda", **options)
    for g, c in zip((y, dq), clean, strict=False):
        np.testing.assert_allclose(g[:6], c[:6], rtol=1e-5, atol=1e-6)
    if np.isnan(poison):
        assert all(np.isnan(x[6:]).all() for x in (y, dq, dk, dv))
    for g in dbias:
        np.testing.assert_allclose(g[:6], clean[4][:6], rtol=1e-5, atol=1e-6)


@quiet
@pytest.mark.parametrize("where", ["q", "dy"])
def test_a_poisoned_query_reaches_only_the_keys_that_it_sees(where):
    q, k, v = draw(9, 9, 3, 2)
    dy = np.ones((9, 2), np.float32)
    clean = BACKWARD(dy, q, k, v, causal=True)
    (q if where == "q" else dy)[3] = np.nan
    dq, dk, dv = BACKWARD(dy, q, k, v, causal=True, backend="cuda")
    others = np.arange(9) != 3
    np.testing.assert_allclose(dq[others], clean[0][others], rtol=1e-5, atol=1e-6)
    for g, c in zip((dk, dv), clean[1:], strict=True):
        np.testing.assert_allclose(g[4:], c[4:], rtol=1e-5, atol=1e-6)
        assert np.isnan(g[:4]).all()


@quiet
@pytest.mark.parametrize("where", ["q", "k", "v", "dy", "score"])
def test_a_poisoned_half_leaves_the_other_alone(where):
    """Halves that see nothing of each other, in the same tiles; every gradient of one is clean."""
    q, k, v = draw(8, 8, 3, 2)
    dy = np.ones((8, 2), np.float32)
    half = np.arange(8) < 3
    options = {"mask": half[:, None] == half, "softcap": 2.0}
    q[:3, :2] = [20, 10]
    clean = FORWARD(q, k, v, **options), *BACKWARD(dy, q, k, v, **options)
    if where == "score":  # inf - inf, from numbers that are finite
        k[5] = 3e38, -3e38, 0
    else:
        {"q": q, "k": k, "v": v, "dy": dy}[where][5] = np.nan
    found = FORWARD(q, k, v, backend="cuda", **options)
    found = found, *BACKWARD(dy, q, k, v, backend="cuda", **options)
    for g, want in zip(found, clean, strict=True):
        np.testing.assert_allclose(g[:3], want[:3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (4, 0, 3, 2), (4, 5, 3, 0)])
def test_nothing_to_do(shape):
    q, k, v = draw(*shape)
    y, lse = FORWARD(q, k, v, return_lse=True, backend="cuda")
    plain = FORWARD(q, k, v, return_lse=True)
    for found, want in zip((y, lse), plain, strict=True):
        assert found.shape == want.shape
        np.testing.assert_allclose(found, want, rtol=1e-6)
    bias = np.zeros((shape[0], shape[1]), np.float32)
    dy, dlse = np.ones_like(y), np.ones_like(lse)
    found = BACKWARD(dy, q, k, v, bias=bias, dlse=dlse, backend="cuda")
    for g, want in zip(found, BACKWARD(dy, q, k, v, bias=bias, dlse=dlse), strict=True):
        assert g.shape == want.shape
        np.testing.assert_allclose(g, want, rtol=1e-5, atol=1e-6)
    assert FORWARD(*draw(3, 3, 2, 2, lead=(0,)), backend="cuda").shape == (0, 3, 2)


def test_read_only_and_strided_inputs():
    q, k, v = draw(5, 6, 3, 2)
    want = FORWARD(q, k, v)
    q2, k2, v2 = np.asfortranarray(q), np.repeat(k, 2, axis=0)[::2], v[::-1].copy()[::-1]
    mask = np.broadcast_to(np.ones((1, 1), bool), (5, 6))
    for x in (q2, k2, v2):
        x.setflags(write=False)
    y = FORWARD(q2, k2, v2, mask=mask, backend="cuda")
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, FORWARD(q2, k2, v2, mask=mask, backend="cuda"))


def test_half_precision_is_computed_in_single():
    q, k, v = draw(5, 6, 3, 2, np.float16)
    y, lse = FORWARD(q, k, v, return_lse=True, backend="cuda")
    assert y.dtype == np.float16 and lse.dtype == np.float32
    np.testing.assert_array_equal(y, FORWARD(q, k, v, backend="cuda").astype(np.float16))
    np.testing.assert_allclose(y.astype(float), FORWARD(q, k, v).astype(float), rtol=1e-3)
    dq, *_ = BACKWARD(y, q, k, v, backend="cuda")
    assert dq.dtype == np.float16


def test_errors_are_those_of_the_formula():
    q, k, v = draw(4, 5, 3, 2)
    bad = [
        {"mask": np.ones((3, 5), bool)},
        {"mask": np.ones((4, 5))},
        {"bias": np.ones((4, 4))},
        {"bias": np.ones((4, 5), int)},
        {"causal": 1},
        {"scale": np.inf},
        {"softcap": 0},
        {"return_lse": 1},
    ]
    for options in bad:
        words = []
        for backend in ("numpy", "cuda"):
            for run in (lambda **o: FORWARD(q, k, v, **o), lambda **o: BACKWARD(v, q, k, v, **o)):
                with pytest.raises((TypeError, ValueError)) as caught:
                    run(backend=backend, **options)
                words.append(str(caught.value))
        assert words[0] == words[2] and (words[1] == words[3] or "dy" in words[1])
    saved = np.ones((4, 2), np.float32), np.ones(3, np.float32)
    for backend in ("numpy", "cuda"):
        with pytest.raises(ValueError, match="saved lse has shape"):
            BACKWARD(saved[0], q, k, v, saved=saved, backend=backend)


PIECES = {
    "local_attention": ("2", "left-right", "causal-dilated", "dilated"),
    "block_attention": ("concat", "mean", "max", "weighted", "exact"),
    "two_level_attention": ("3-scale", "max"),
    "linformer_attention": ("two", "masked"),
    "gated_attention": ("soft", "hard-causal", "hard-mask", "hard-local", "hard-dilated"),
}


@pytest.mark.parametrize(("name", "label"), [(x, y) for x in PIECES for y in PIECES[x]])
def test_what_is_made_of_it(name, label):
    shape = (9, 9, 3, 2) if name in ("block_attention", "two_level_attention") else (9, 7, 3, 2)
    agrees(Case(MECHANISMS[name], label, Shape(*shape)), np.float32, "cuda")


def test_the_bias_of_all_queries_under_a_gate():
    q, k, v = draw(6, 6, 3, 2)
    options = {"gate": (np.arange(6) % 2)[:, None].astype(np.float32)}
    options["bias"] = np.random.default_rng(0).standard_normal((1, 6)).astype(np.float32)
    dy = np.ones((6, 2), np.float32)
    found = refattn.gated_attention_vjp(dy, q, k, v, backend="cuda", **options)
    for g, want in zip(found, refattn.gated_attention_vjp(dy, q, k, v, **options), strict=True):
        np.testing.assert_allclose(g, want, rtol=1e-5, atol=1e-6)


def test_closed_rows_are_not_launched(monkeypatch):
    """Closed rows are not launched: the blocks of threads are counted."""
    tiles = []
    launch = gpu.launch
    monkeypatch.setattr(
        gpu, "launch", lambda kernel, grid, *rest: (tiles.append(grid), launch(kernel, grid, *rest))
    )
    q, k, v = draw(17, 5, 3, 2, lead=(3,))
    gate = np.zeros((3, 17, 1), np.float32)
    gate[1, [3, 9, 16]], gate[2] = 0.5, 1
    y = refattn.gated_attention(q, k, v, gate=gate, backend="cuda")
    want = refattn.gated_attention(q, k, v, gate=gate)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    assert (y[0] == 0).all() and sum(tiles) == 1 + 3


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_steps(step, dtype):
    for n, m, causal in ((35, 33, False), (35, 18, True)):
        q, k, v = draw(n, m, 3, 2, dtype)
        y = cuda_first.softmax_attention(q, k, v, step=step, causal=causal)
        exact = FORWARD(*(x.astype(float) for x in (q, k, v)), causal=causal)
        near(y, FORWARD(q, k, v, causal=causal), exact, abs(q @ k.T).max())


TORCH = {
    "softmax_attention": ("all",),
    "local_attention": ("dilated",),
    "block_attention": ("weighted", "max"),
    "two_level_attention": ("2", "max"),
    "linformer_attention": ("masked-two",),
    "gated_attention": ("hard-causal", "columns"),
}


@pytest.mark.parametrize(("name", "label"), [(x, y) for x in TORCH for y in TORCH[x]])
def test_arrays_of_torch(name, label, torch):
    case = Case(MECHANISMS[name], label, Shape(6, 6, 3, 2))
    q, k, v, options = case.build(2)
    dy = np.ones_like(case.mechanism.attention(q, k, v, **options))
    want = case.mechanism.attention(q, k, v, **options), *case.mechanism.vjp(dy, q, k, v, **options)

    def there(x):
        return torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x

    options = {name: there(x) for name, x in options.items()}
    arrays = [there(x) for x in (q, k, v)]
    y = case.mechanism.attention(*arrays, backend="cuda", **options)
    grads = case.mechanism.vjp(there(dy), *arrays, backend="cuda", **options)
    assert len(grads) == len(want) - 1
    for found, x in zip((y, *grads), want, strict=True):
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float64
        assert tuple(found.shape) == x.shape
        np.testing.assert_allclose(found.numpy(), x, rtol=1e-12, atol=1e-13)


def test_bfloat16_and_gates_by_head_of_torch(torch):
    q, k, v = (torch.from_numpy(x).to(torch.bfloat16) for x in draw(5, 6, 3, 2, lead=(2,)))
    y, lse = cuda.softmax_attention(q, k, v, return_lse=True)
    assert y.dtype == torch.bfloat16 and lse.dtype == torch.float32
    single = [x.to(torch.float32).numpy() for x in (q, k, v)]
    want = torch.from_numpy(FORWARD(*single)).to(torch.bfloat16)
    assert torch.isclose(y, want, rtol=2.0**-7, atol=1e-6).all()
    gate = np.zeros((2, 5, 1), np.float32)
    gate[0, 2], gate[1, [0, 4]] = 0.5, 2
    mixed = [torch.from_numpy(x) for x in single]
    options = {"gate": gate, "bias": np.arange(6, dtype=np.float32) / 4}
    dy = np.ones((2, 5, 2), np.float32)
    found = refattn.gated_attention_vjp(dy, *mixed, backend="cuda", **options)
    plain = refattn.gated_attention_vjp(dy, *single, **options)
    for g, x in zip(found, plain, strict=True):
        np.testing.assert_allclose(g.numpy(), x, rtol=1e-5, atol=1e-6)
