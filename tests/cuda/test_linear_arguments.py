"""Linear attention and Performer on CUDA: maps of one's own, arrays of torch, arguments, steps."""

import numpy as np
import pytest

import refattn
from refattn.linear import FeatureMap, cuda_first, identity, identity_vjp
from test_linear_kernels import (
    OMEGA,
    N,
    as_exact_as_the_formula,
    attention,
    inputs,
    run,
    small,  # noqa: F401  tiles of 4 by 4 here too
)

BARE = FeatureMap(identity, np.exp, identity_vjp, lambda dphi, k: dphi * np.exp(k))


def test_a_map_of_ones_own_and_softmax():
    mask = np.arange(N) % 3 > 0
    for options in (
        {"feature_map": BARE, "normalize": False, "causal": True, "key_mask": mask},
        {"feature_map": "softmax"},
        {"feature_map": "softmax", "key_mask": mask},
    ):
        as_exact_as_the_formula("linear_attention", *inputs(), **options)


TORCH = [
    ("linear_attention", {"causal": True, "key_mask": np.arange(N) != 4}),
    ("linear_attention", {"feature_map": "taylor", "causal": True}),
    ("linear_attention", {"feature_map": "softmax", "key_mask": np.arange(N) != 4}),
    ("linear_attention", {"normalize": False, "initial_state": (np.ones((3, 5)), np.ones(3))}),
    ("performer_attention", {"omega": OMEGA, "causal": True, "key_mask": np.arange(N) != 4}),
    ("performer_attention", {"omega": OMEGA, "kind": "trig"}),
]


@pytest.mark.parametrize(("name", "options"), TORCH)
def test_arrays_of_torch(name, options, torch):
    """As device arrays: in and out, options too; close to NumPy's, whose sums run otherwise."""
    plain = inputs(dtype=np.float64, lead=(2,))

    def tensors(x):
        if isinstance(x, tuple):
            return tuple(tensors(part) for part in x)
        return torch.tensor(x) if isinstance(x, np.ndarray) else x

    there = {key: tensors(x) for key, x in options.items()}
    found = run(name, *map(tensors, plain), **there)
    for x, w in zip(found, run(name, *plain, **options), strict=True):
        assert isinstance(x, torch.Tensor) and x.dtype == torch.float64
        np.testing.assert_allclose(x.numpy(), w, rtol=1e-11, atol=1e-11 * abs(w).max())


def test_arrays_of_torch_at_the_edges(torch):
    q, k, v, dy = (torch.tensor(x) for x in inputs(3))
    for x in run("linear_attention", q[:0], k, v, dy[:0]):
        assert isinstance(x, torch.Tensor) and x.dtype == torch.float32
    half = [x.bfloat16() for x in (q, k, v, dy)]
    for x in run("performer_attention", *half, omega=torch.tensor(OMEGA).bfloat16()):
        assert x.dtype == torch.bfloat16 and x.any()
    y, state = refattn.linear_attention_step(None, q[0], k[0], v[0], backend="cuda")
    np.testing.assert_allclose(y, v[0], rtol=1e-6)
    assert isinstance(state[0], torch.Tensor)
    with pytest.raises(TypeError, match="callables take NumPy arrays, and q came from torch"):
        refattn.linear_attention(q, k, v, feature_map=BARE, backend="cuda")
    with pytest.raises(ValueError, match="v has 5"):
        refattn.linear_attention(q, k, torch.ones(5, 2), backend="cuda")


def test_the_chunk_is_checked_and_changes_nothing():
    q, k, v, dy = inputs(9)
    want = run("linear_attention", q, k, v, dy, causal=True)
    for x, w in zip(run("linear_attention_chunked", q, k, v, dy, chunk=2), want, strict=True):
        np.testing.assert_array_equal(x, w)
    with pytest.raises(ValueError, match="chunk is 0"):
        refattn.linear_attention_chunked(q, k, v, chunk=0, backend="cuda")


S, z = np.ones((3, 5)), np.ones(3)


@pytest.mark.parametrize(
    "options",
    [
        {"initial_state": S},
        {"initial_state": (S[:2], z)},
        {"initial_state": (S, z[:2])},
        {"initial_state": (S.astype(int), z)},
        {"key_mask": np.ones(4)},
        {"key_mask": np.ones(3, bool)},
        {"key_mask": np.ones((2, 4), bool)},
        {"feature_map": "softmax", "causal": True},
        {"normalize": None},
        {"return_state": 0},
        {"dstate": S},
        {"dstate": (S[:2], z)},
        {"feature_map": FeatureMap(identity, identity)},
        {"feature_map": FeatureMap(identity, lambda k: k[..., :1])},
    ],
)
def test_refused_in_the_same_words(options):
    q, k, v, dy = inputs(4, dtype=np.float64)
    for name in ("linear_attention", "linear_attention_chunked"):
        words = []
        for backend in ("numpy", "cuda"):
            with pytest.raises((TypeError, ValueError)) as caught:
                attention(name)[1](dy, q, k, v, backend=backend, **options)
            words.append((caught.type, str(caught.value)))
        assert words[0] == words[1]


@pytest.mark.parametrize("step", [1, 2])
def test_the_steps_for_reading(step):
    q, k, v, _ = inputs(11, 5, 3, lead=(2,), dtype=np.float64)
    y = cuda_first.causal_linear_attention(q, k, v, step=step, chunk=4)
    want = refattn.linear_attention(q, k, v, causal=True)
    np.testing.assert_allclose(y, want, rtol=1e-12)
