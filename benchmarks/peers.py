"""Other software on the same work. Each peer takes refattn's inputs and gives a function to time.

A peer that is not installed raises ImportError, and is left out with its reason.
"""

import functools
import warnings

import numpy as np

import refattn

WINDOW, BLOCK = 128, 64


def tensors(*arrays):
    """As torch has them: (1, heads, n, d), on the same memory."""
    import torch

    return [(torch.from_numpy(x) if isinstance(x, np.ndarray) else x)[None] for x in arrays]


def numbers(y):
    """A result as a list of NumPy's arrays."""
    parts = y if isinstance(y, (tuple, list)) else [y]
    return [x.detach().cpu().numpy() if hasattr(x, "detach") else x for x in parts]


def plain(run, *arrays):
    """A function of no arguments without gradients."""
    import torch

    def call():
        with torch.inference_mode():
            return run(*arrays)[0]

    return call


def with_autograd(run, q, k, v, dy):
    """Forward and backward: y and the gradients."""
    import torch

    leaves = [x.clone().requires_grad_() for x in tensors(q, k, v)]
    pull = tensors(dy)[0]

    def call():
        y = run(*leaves)
        return [x[0] for x in (y, *torch.autograd.grad(y, leaves, pull))]

    return call


def device_of(x):
    return getattr(x, "device", "cpu")


def sdpa(causal, backward=False):
    def make(q, k, v, dy):
        from torch.nn.functional import scaled_dot_product_attention

        run = functools.partial(scaled_dot_product_attention, is_causal=causal)
        return with_autograd(run, q, k, v, dy) if backward else plain(run, *tensors(q, k, v))

    return make


def compiled(run):
    import torch

    torch._dynamo.reset()
    return torch.compile(run, dynamic=False)


def flex(mask_mod_of):
    def make(q, k, v, dy):
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        n = q.shape[-2]
        mask_mod = mask_mod_of(n, torch, device_of(q))
        block_mask = create_block_mask(mask_mod, None, None, n, n, device=device_of(q))
        run = compiled(flex_attention)
        return plain(lambda *x: run(*x, block_mask=block_mask), *tensors(q, k, v))

    return make


def window_mod(n, torch, device):
    return lambda b, h, i, j: (i - j).abs() <= WINDOW


def pattern_mod(mask_of, block):
    """A mask_mod that looks a pair up in a small table of blocks."""

    def make(n, torch, device):
        table = torch.from_numpy(mask_of(n)).to(device)
        return lambda b, h, i, j: table[i // block, j // block]

    return make


def bigbird_blocks(n):
    return refattn.masks.bigbird(n // BLOCK, 1, rng=0).toarray()


def hierarchy(n):
    return refattn.masks.hierarchical(n, 16).toarray()


def local_package(backward=False):
    def make(q, k, v, dy):
        from local_attention import LocalAttention

        run = LocalAttention(
            window_size=WINDOW,
            causal=False,
            look_backward=1,
            look_forward=1,
            exact_windowsize=True,
            use_rotary_pos_emb=False,
        ).eval()
        return with_autograd(run, q, k, v, dy) if backward else plain(run, *tensors(q, k, v))

    return make


def linear_formula(q, k, v, dy):
    from torch.nn.functional import elu

    def run(q, k, v):
        phi_q, phi_k = elu(q) + 1, elu(k) + 1
        S, z = phi_k.mT @ v, phi_k.sum(-2)
        return (phi_q @ S) / (phi_q @ z[..., None])

    return plain(compiled(run), *tensors(q, k, v))


def causal_product(q, k, v, dy):
    """The numerator alone, of features made ahead: less work than ours."""
    from fast_transformers.causal_product import causal_dot_product

    phi = [np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k)]
    return plain(causal_dot_product, *(x.contiguous() for x in tensors(*phi, v)))


def performer(causal):
    def make(q, k, v, dy):
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from performer_pytorch.performer_pytorch import FastAttention
        run = FastAttention(q.shape[-1], nb_features=256, causal=causal).eval()
        omega = refattn.random_features(256, q.shape[-1], rng=0).astype(np.float32)
        run.projection_matrix.copy_(torch.from_numpy(omega))
        return plain(run, *tensors(q, k, v))

    return make


def linformer_formula(compile_it):
    def make(q, k, v, dy):
        import torch

        E = np.random.default_rng(0).standard_normal((256, q.shape[-2])).astype(np.float32) / 128
        E = torch.from_numpy(E).to(device_of(q))
        scale = q.shape[-1] ** -0.5

        def run(q, k, v):
            weights = torch.softmax(q @ (E @ k).mT * scale, dim=-1)
            return weights @ (E @ v)

        return plain(compiled(run) if compile_it else run, *tensors(q, k, v))

    return make


def ungated(q, k, v, dy):
    return lambda: refattn.softmax_attention(q, k, v, backend="numba")


# For each work: its peers, and how far the answers may lie apart, relative to the largest; None
# where the peer computes something else (no normaliser, all rows).
PEERS = {
    "softmax, full": ({"torch SDPA": sdpa(False)}, 1e-5),
    "softmax, causal": ({"torch SDPA": sdpa(True)}, 1e-5),
    "softmax, full, forward and backward": ({"torch SDPA and autograd": sdpa(False, True)}, 1e-4),
    "softmax, causal, forward and backward": ({"torch SDPA and autograd": sdpa(True, True)}, 1e-4),
    "local, window 128 on each side": (
        {"FlexAttention, compiled": flex(window_mod), "local-attention": local_package()},
        1e-5,
    ),
    "local, forward and backward": ({"local-attention and autograd": local_package(True)}, 1e-4),
    "block-sparse, BigBird on blocks of 64": (
        {"FlexAttention, compiled": flex(pattern_mod(bigbird_blocks, BLOCK))},
        1e-5,
    ),
    "csr, hierarchical b = 16": (
        {"FlexAttention, compiled": flex(pattern_mod(hierarchy, 1))},
        1e-5,
    ),
    "linear, elu + 1, full": ({"the formula, torch.compile": linear_formula}, 1e-4),
    "linear, elu + 1, causal": ({"pytorch-fast-transformers, numerator": causal_product}, None),
    "Performer, 256 features, full": ({"performer-pytorch": performer(False)}, 1e-2),
    "Performer, 256 features, causal": ({"performer-pytorch": performer(True)}, 1e-2),
    "Linformer, r = 256": (
        {
            "the formula, torch": linformer_formula(False),
            "the formula, torch.compile": linformer_formula(True),
        },
        1e-4,
    ),
    "gate, half of the rows off": ({"the same, all rows on": ungated}, None),
}
