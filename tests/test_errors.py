"""Bad input is refused: the message names the argument, what came and what was wanted."""

import inspect

import numpy as np
import pytest
import scipy

import refattn
from cases import MECHANISMS
from refattn import masks
from refusals import refused

NEEDED = {
    "local_attention": {"window": 1},
    "sparse_attention": {"mask": masks.causal(4)},
    "performer_attention": {"omega": np.ones((2, 3))},
    "gated_attention": {"gate": np.ones((4, 1))},
    "linformer_attention": {"E": np.ones((2, 4))},
    "block_attention": {"block": 2},
    "two_level_attention": {"block": 2},
}
SCALED = [
    name
    for name, mechanism in MECHANISMS.items()
    if "scale" in inspect.signature(mechanism.attention).parameters
]
x = np.ones((4, 3))
y = np.ones((4, 2))


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize(
    ("q", "k", "v", "error", "words"),
    [
        (np.ones(3), x, y, ValueError, ["q has shape", r"\(3,\)", r"\(\.\.\., n, d\)"]),
        (x, np.float64(1), y, ValueError, ["k has shape", r"\(\)"]),
        (x, x, np.ones(4), ValueError, ["v has shape", r"\(4,\)"]),
        (x, np.ones((4, 2)), y, ValueError, ["q has 3 columns", "k has 2"]),
        (x, x, np.ones((5, 2)), ValueError, ["k has 4 rows", "v has 5"]),
        (x[:, :0], x[:, :0], y, ValueError, ["0 columns"]),
        (np.ones((2, 4, 3)), np.ones((3, 4, 3)), y, ValueError, ["leading", r"\(2,\), \(3,\)"]),
        (x.astype(int), x, y, TypeError, ["q has dtype int64", "float32", "astype"]),
        (x, x.astype(object), y, TypeError, ["k has dtype object"]),
        (x, x, y.astype(complex), TypeError, ["v has dtype complex128"]),
        (x > 0, x, y, TypeError, ["q has dtype bool"]),
        (x.astype(np.longdouble), x, y, TypeError, ["q has dtype"]),
        (x, x.astype(np.float32), y, TypeError, ["one dtype", "float64, float32, float64"]),
        ("abc", x, y, TypeError, ["q has dtype <U3"]),
    ],
)
def test_arrays(name, q, k, v, error, words):
    options = NEEDED.get(name, {})
    with refused(error, *words):
        MECHANISMS[name].attention(q, k, v, **options)
    with refused(error, *words):
        MECHANISMS[name].vjp(y, q, k, v, **options)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scale": "big"}, TypeError, ["scale is 'big'", "real number"]),
        ({"scale": np.nan}, ValueError, ["scale is nan", "finite"]),
        ({"scale": np.inf}, ValueError, ["scale is inf"]),
        ({"scale": True}, TypeError, ["scale is True"]),
        ({"scale": 1j}, TypeError, ["scale is 1j"]),
    ],
)
def test_scale(name, options, error, words):
    for run in (
        lambda **o: MECHANISMS[name].attention(x, x, y, **o),
        lambda **o: MECHANISMS[name].vjp(y, x, x, y, **o),
    ):
        with refused(error, *words):
            run(**{**NEEDED.get(name, {}), **options})


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize(
    ("dy", "error", "words"),
    [
        (np.ones((4, 3)), ValueError, ["dy has shape", r"\(4, 3\)", r"\(4, 2\)"]),
        (np.ones((1, 4, 2)), ValueError, ["dy has shape"]),
        (np.ones((4, 2), int), TypeError, ["dy has dtype int64"]),
    ],
)
def test_cotangents(name, dy, error, words):
    with refused(error, *words):
        MECHANISMS[name].vjp(dy, x, x, y, **NEEDED.get(name, {}))


@pytest.mark.parametrize("suffix", ["", "_vjp"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mask": np.ones((4, 3), bool)}, ValueError, ["mask", r"\(4, 3\)", r"\(4, 4\)"]),
        ({"mask": np.ones((2, 4, 4), bool)}, ValueError, ["mask", r"\(2, 4, 4\)", r"\(4, 4\)"]),
        ({"mask": np.ones((4, 4))}, TypeError, ["mask has dtype float64", "bool", "bias"]),
        ({"mask": masks.causal(4)}, TypeError, ["mask", "sparse_attention", "toarray"]),
        ({"bias": np.ones((3, 4))}, ValueError, ["bias", r"\(3, 4\)", r"\(4, 4\)"]),
        ({"bias": np.ones((4, 4), bool)}, TypeError, ["bias has dtype bool"]),
        ({"bias": np.ones((4, 4), int)}, TypeError, ["bias has dtype int64"]),
        ({"scale": 10**400}, ValueError, ["scale is", "finite"]),
        ({"softcap": 0.0}, ValueError, ["softcap is 0.0", "> 0"]),
        ({"softcap": -1}, ValueError, ["softcap is -1"]),
        ({"softcap": "x"}, TypeError, ["softcap is 'x'"]),
        ({"causal": 1}, TypeError, ["causal is 1", "True or False"]),
        ({"return_lse": "yes"}, TypeError, ["return_lse is 'yes'"]),
    ],
)
def test_softmax_options(suffix, options, error, words):
    run = getattr(refattn, f"softmax_attention{suffix}")
    with refused(error, *words):
        run(*([y] if suffix else []), x, x, y, **options)


def test_dlse():
    with refused(ValueError, "dlse has shape", r"\(4, 1\)", r"\(4,\)"):
        refattn.softmax_attention_vjp(y, x, x, y, dlse=np.ones((4, 1)))


@pytest.mark.parametrize("suffix", ["", "_vjp", "_cost"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window": -1}, ValueError, ["window is -1", ">= 0"]),
        ({"window": (1, -2)}, ValueError, ["window is -2"]),
        ({"window": (1, 2, 3)}, ValueError, [r"window is \(1, 2, 3\)", "pair"]),
        ({"window": 1.5}, TypeError, ["window is 1.5", "integer"]),
        ({"window": None}, TypeError, ["window is None"]),
        ({"window": True}, TypeError, ["window is True"]),
        ({"window": 1, "dilation": 0}, ValueError, ["dilation is 0", ">= 1"]),
        ({"window": 1, "dilation": 2.0}, TypeError, ["dilation is 2.0"]),
        ({"window": 1, "causal": "no"}, TypeError, ["causal is 'no'"]),
    ],
)
def test_local_options(suffix, options, error, words):
    run = getattr(refattn, f"local_attention{suffix}")
    args = {"": (x, x, y), "_vjp": (y, x, x, y), "_cost": (4, 4, 3, 2)}[suffix]
    with refused(error, *words):
        run(*args, **options)


@pytest.mark.parametrize("suffix", ["", "_vjp"])
@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (np.ones((4, 4), bool), TypeError, ["mask is ndarray", "csr_array", "scipy"]),
        (scipy.sparse.csr_array(np.ones((4, 4))), TypeError, ["csr_array of float64"]),
        (masks.causal(4).tocoo(), TypeError, ["coo_array of bool"]),
        (masks.causal(5), ValueError, [r"\(5, 5\)", r"\(4, 4\)"]),
        (scipy.sparse.csr_matrix(np.ones((4, 4), bool)), TypeError, ["csr_matrix of bool"]),
        (None, TypeError, ["mask is NoneType"]),
    ],
)
def test_sparse_options(suffix, mask, error, words):
    run = getattr(refattn, f"sparse_attention{suffix}")
    with refused(error, *words):
        run(*([y] if suffix else []), x, x, y, mask=mask)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: masks.local(-1, 2), ValueError, ["n is -1"]),
        (lambda: masks.local(4.0, 2), TypeError, ["n is 4.0"]),
        (lambda: masks.local(4, 2, m=-3), ValueError, ["m is -3"]),
        (lambda: masks.local(4, -2), ValueError, ["window is -2"]),
        (lambda: masks.dilated(4, 1, 0), ValueError, ["dilation is 0"]),
        (lambda: masks.strided(4, 0), ValueError, ["stride is 0"]),
        (lambda: masks.fixed(4, 0), ValueError, ["block is 0"]),
        (lambda: masks.fixed(4, 2, summary=3), ValueError, ["summary is 3", "from 1 to 2"]),
        (lambda: masks.global_tokens(4, [4]), ValueError, ["position", "from 0 to 3"]),
        (lambda: masks.global_tokens(4, [-1]), ValueError, ["position", "-1"]),
        (lambda: masks.global_tokens(4, 2), TypeError, ["tokens is 2", "list"]),
        (lambda: masks.random(4, 5, rng=0), ValueError, ["keys is 5", "from 0 to 4"]),
        (lambda: masks.random(4, 2, rng=None), TypeError, ["rng is None"]),
        (lambda: masks.block_diagonal(4, 0), ValueError, ["block is 0"]),
        (lambda: masks.block_causal(4, -1), ValueError, ["block is -1"]),
        (lambda: masks.hierarchical(4, 1), ValueError, ["b is 1", ">= 2"]),
        (lambda: masks.bigbird(8, 2, random_blocks=5, rng=0), ValueError, ["random_blocks is 5"]),
        (lambda: masks.bigbird(8, 2, global_blocks=5, rng=0), ValueError, ["global_blocks is 5"]),
        (lambda: masks.expand_blocks(masks.causal(3), 2, 8), ValueError, [r"\(3, 3\)", "4, 4"]),
        (lambda: masks.union(), ValueError, ["union", "at least one"]),
        (lambda: masks.intersection(masks.causal(3), masks.causal(4)), ValueError, ["mask has"]),
        (lambda: masks.union(np.ones((2, 2), bool)), TypeError, ["mask is ndarray"]),
        (lambda: masks.union([masks.causal(2)]), TypeError, ["mask is list"]),
        (lambda: masks.union(None), TypeError, ["mask is NoneType"]),
    ],
)
def test_masks(call, error, words):
    with refused(error, *words):
        call()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: refattn.merge_attention([], []), ValueError, ["ys has shape"]),
        (
            lambda: refattn.merge_attention(np.ones((2, 3, 4)), np.ones((2, 4))),
            ValueError,
            ["lses"],
        ),
        (
            lambda: refattn.merge_attention(np.ones((2, 3, 4), int), 0.0),
            TypeError,
            ["ys has dtype"],
        ),
        (
            lambda: refattn.attention_matrix(refattn.softmax_attention, x, np.ones(3)),
            ValueError,
            ["k has shape"],
        ),
        (
            lambda: refattn.attention_matrix(refattn.softmax_attention, x, x, return_lse=True),
            ValueError,
            ["return_lse=True"],
        ),
    ],
)
def test_compositions(call, error, words):
    with refused(error, *words):
        call()


def test_a_finite_bias_that_overflows_is_not_taken_for_a_mask():
    low = np.ones((4, 3), np.float16)
    with refused(ValueError, "bias has finite entries beyond float16"):
        refattn.softmax_attention(low, low, low, bias=np.full((4, 4), -1e9))


@pytest.mark.parametrize("backend", [["numpy"], None, 3])
def test_a_backend_that_is_no_name(backend):
    with refused(ValueError, "backend is"):
        refattn.softmax_attention(x, x, y, backend=backend)


@pytest.mark.parametrize("name", MECHANISMS)
def test_an_unknown_backend(name):
    with refused(ValueError, "backend is 'tpu'", "'numpy', 'numba', 'cuda'"):
        MECHANISMS[name].attention(x, x, y, **NEEDED.get(name, {}), backend="tpu")


def test_a_missing_library_is_named(monkeypatch):
    from refattn import dispatch

    def missing(module):
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    with refused(refattn.BackendUnavailable, "needs the package 'numba'", "pip install numba"):
        refattn.softmax_attention(x, x, y, backend="numba")


def test_a_kernel_that_is_there_is_called(monkeypatch):
    from types import SimpleNamespace

    from refattn import dispatch

    seen = []
    kernels = SimpleNamespace(softmax_attention=lambda *a, **o: seen.append((a, o)) or "done")
    monkeypatch.setattr(
        dispatch.importlib, "import_module", lambda name: seen.append(name) or kernels
    )
    assert refattn.softmax_attention(x, x, y, causal=True, backend="cuda") == "done"
    assert seen[0] == "refattn.softmax.cuda" and seen[1][1] == {"causal": True}
    with refused(refattn.BackendUnavailable, "softmax_attention_vjp", "cuda"):
        refattn.softmax_attention_vjp(y, x, x, y, backend="cuda")
