"""What jax ships: dot_product_attention beyond what the grader's tests ask of it, the plain
references beside its TPU kernels, and recurrences by scan."""

import functools

import numpy as np
import pytest
from judge import draw, hold, logits

import refattn

jax = pytest.importorskip("jax", reason="jax is not installed (extra: outside)")
from jax import numpy as jnp  # noqa: E402

N, M = 40, 50


def first(x):
    """(b, h, n, c) as jax has it, (b, n, h, c)."""
    return jnp.asarray(np.ascontiguousarray(x.swapaxes(1, 2)), np.float32)


def back(x):
    return np.asarray(x).swapaxes(1, 2)


def test_bias_grouped_heads_and_the_logsumexp():
    """Heads 3 g to 3 g + 2 share the keys of head g. return_residual gives the log-sum-exp, which
    jax holds constant: what is asked of its gradient is lost in silence."""
    q, k, v, bias, dy = draw(1, (2, 6, N, 8), (2, 2, M, 8), (2, 2, M, 8), (6, N, M), (2, 6, N, 8))

    def run(q, k, v, bias):
        y, lse = jax.nn.dot_product_attention(q, k, v, bias=bias[None], return_residual=True)
        total = (y * first(dy)).sum() + lse.sum()
        return total, (y, lse)

    inputs = first(q), first(k), first(v), jnp.asarray(bias, np.float32)
    grads, (y, lse) = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)
    got = {"y": back(y), "lse": back(lse), "dbias": grads[3]}
    got |= {name: back(g) for name, g in zip(("dq", "dk", "dv"), grads, strict=False)}

    def ours(kind):
        grouped = lambda x: x.reshape(2, 2, 3, *x.shape[2:]).astype(kind)
        args = [grouped(q), k[:, :, None].astype(kind), v[:, :, None].astype(kind)]
        told = {"bias": bias.reshape(2, 3, N, M).astype(kind)}
        y, lse = refattn.softmax_attention(*args, **told, return_lse=True)
        grads = refattn.softmax_attention_vjp(grouped(dy), *args, **told)
        found = dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=True))
        found |= {"y": y, "lse": lse}
        return {name: x.reshape(got[name].shape) for name, x in found.items()}

    hold(got, ours, logits(q[:, ::3], k, bias=abs(bias).max()))


def test_lengths_hide_keys_and_queries():
    """Keys past their length are hidden; queries past theirs give 0."""
    q, k, v = draw(2, (2, 3, N, 8), (2, 3, M, 8), (2, 3, M, 8))
    rows, keys = np.array([N, 25]), np.array([33, 50])
    attend = functools.partial(
        jax.nn.dot_product_attention, query_seq_lengths=rows, key_value_seq_lengths=keys
    )
    y = jax.jit(attend)(first(q), first(k), first(v))

    def ours(kind):
        seen = (np.arange(N)[:, None] < rows[:, None, None]) & (np.arange(M) < keys[:, None, None])
        args = [x.astype(kind) for x in (q, k, v)]
        return {"y": refattn.softmax_attention(*args, mask=seen[:, None])}

    hold({"y": back(y)}, ours, logits(q, k))


def test_a_row_hidden_by_a_bias_is_nan():
    """By a mask it is the mean of v (tests/test_like.py)."""
    q, k, v = draw(3, (1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4))
    bias = np.zeros((1, 1, 3, 5), np.float32)
    bias[..., 1, :] = -np.inf
    y = back(jax.nn.dot_product_attention(first(q), first(k), first(v), bias=jnp.asarray(bias)))
    np.testing.assert_array_equal(np.isnan(y).any(-1)[0, 0], [False, True, False])
    assert not refattn.softmax_attention(q, k, v, bias=bias)[..., 1, :].any()


class TestReferencesOfKernels:
    """Functions of jax.experimental.pallas that its TPU kernels are tested with."""

    def flash(self):
        from jax.experimental.pallas.ops.tpu import flash_attention

        return flash_attention

    def splash(self):
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel,
            splash_attention_mask,
        )

        return splash_attention_kernel, splash_attention_mask

    def test_segments_are_a_block_diagonal(self):
        """Equal segments: block_attention's concat, and the mask block_diagonal."""
        q, k, v = draw(4, (2, 3, N, 8), (2, 3, N, 8), (2, 3, N, 8))
        flash = self.flash()
        segments = jnp.asarray(np.tile(np.arange(N) // 16, (2, 1)))
        ids = flash.SegmentIds(segments, segments)
        inputs = (jnp.asarray(x, np.float32) for x in (q, k, v))
        y = flash.mha_reference(*inputs, None, ids, sm_scale=8**-0.5)

        def ours(kind):
            args = [x.astype(kind) for x in (q, k, v)]
            mask = refattn.masks.block_diagonal(N, 16)
            return {
                "concat": refattn.block_attention(*args, block=16),
                "mask": refattn.sparse_attention(*args, mask=mask),
            }

        hold({"concat": y, "mask": y}, ours, logits(q, k))

    def test_its_bias_is_scaled_too(self):
        """mha_reference adds ab before it multiplies with sm_scale: the bias is scaled, as the
        scores are. refattn scales first."""
        q, k, v, ab = draw(5, (1, 2, N, 8), (1, 2, M, 8), (1, 2, M, 8), (1, 2, N, M))
        inputs = (jnp.asarray(x, np.float32) for x in (q, k, v, ab))
        y = self.flash().mha_reference(*inputs, sm_scale=0.5)

        def ours(kind):
            args = [x.astype(kind) for x in (q, k, v)]
            return {"y": refattn.softmax_attention(*args, bias=(0.5 * ab).astype(kind), scale=0.5)}

        hold({"y": y}, ours, logits(q, k, 0.5, abs(ab).max()))

    @pytest.mark.parametrize("window", [(5, 0), (3, 7), (None, 2)])
    def test_a_window_with_a_softcap(self, window):
        """LocalMask with the offset m - n of the last query, and a softcap ahead of it."""
        kernel, masks = self.splash()
        q, k, v = draw(6, (N, 8), (M, 8), (M, 8))
        seen = masks.LocalMask((N, M), window, offset=M - N)[:, :]
        inputs = (jnp.asarray(x, np.float32) for x in (q, k, v))
        y, (lse,) = kernel.attention_reference(
            jnp.asarray(seen), *inputs, None, save_residuals=True, attn_logits_soft_cap=1.5
        )

        def ours(kind):
            args = [x.astype(kind) for x in (q, k, v)]
            left, right = (M if side is None else side for side in window)
            own = refattn.masks.local(N, (left, right), m=M).toarray()
            told = {"scale": 1.0, "mask": own, "return_lse": True}
            y, lse = refattn.softmax_attention(*args, softcap=1.5, **told)
            return {"y": y, "lse": lse}

        hold({"y": y, "lse": lse}, ours, logits(q, k, 1.0))

    def test_a_chunked_causal_mask(self):
        """Causal inside blocks: the intersection of two of refattn's masks."""
        _, masks = self.splash()
        theirs = masks.ChunkedCausalMask((N, N), 16)[:, :]
        ours = refattn.masks.intersection(
            refattn.masks.block_diagonal(N, 16), refattn.masks.causal(N)
        )
        np.testing.assert_array_equal(theirs, ours.toarray())

    def test_causal_masks_by_their_offset(self):
        _, masks = self.splash()
        lower_right = masks.CausalMask((N, M), offset=M - N)[:, :]
        np.testing.assert_array_equal(lower_right, refattn.masks.causal(N, M).toarray())
        assert (masks.CausalMask((N, M))[:, :] != lower_right).any()


def softmax_scan(q, k, v):
    """Causal attention of one head by jax.lax.scan over keys, with a running maximum."""

    def step(state, key):
        top, num, den, j = state
        k_j, v_j = key
        s = jnp.where(jnp.arange(len(q)) >= j, q @ k_j * q.shape[-1] ** -0.5, -jnp.inf)
        new = jnp.maximum(top, s)
        base = jnp.where(jnp.isinf(new), 0, new)
        keep, weight = jnp.exp(top - base), jnp.exp(s - base)
        num = keep[:, None] * num + weight[:, None] * v_j
        return (new, num, keep * den + weight, j + 1), None

    start = jnp.full(len(q), -jnp.inf), 0 * q @ k.T @ v, jnp.zeros(len(q)), 0
    (top, num, den, _), _ = jax.lax.scan(step, start, (k, v))
    return num / den[:, None], top + jnp.log(den)


def test_the_online_softmax_by_scan():
    q, k, v = draw(7, (N, 8), (N, 8), (N, 6))
    y, lse = jax.jit(softmax_scan)(*(jnp.asarray(x, np.float32) for x in (q, k, v)))

    def ours(kind):
        args = [x.astype(kind) for x in (q, k, v)]
        return dict(
            zip(("y", "lse"), refattn.softmax_attention(*args, causal=True, return_lse=True))
        )

    hold({"y": y, "lse": lse}, ours, logits(q, k))


def by_steps(start, q, k, v):
    """The recurrence of causal linear attention."""

    def step(state, row):
        S, z = state
        q_i, k_i, v_i = row
        phi_q, phi_k = jax.nn.elu(q_i) + 1, jax.nn.elu(k_i) + 1
        S, z = S + phi_k[:, None] * v_i, z + phi_k
        return (S, z), phi_q @ S / (phi_q @ z)

    state, y = jax.lax.scan(step, start, (q, k, v))
    return y, state


def by_sums(start, q, k, v):
    """The same by jax.lax.associative_scan over outer products: a tree of sums."""
    phi_q, phi_k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
    S = start[0] + jax.lax.associative_scan(jnp.add, phi_k[:, :, None] * v[:, None, :])
    z = start[1] + jax.lax.associative_scan(jnp.add, phi_k)
    y = jnp.einsum("ir,ire->ie", phi_q, S) / (phi_q * z).sum(-1, keepdims=True)
    return y, (S[-1], z[-1])


@pytest.mark.parametrize(
    ("form", "dtype"), [(by_steps, np.float32), (by_steps, np.float64), (by_sums, np.float64)]
)
def test_linear_attention_by_scans(form, dtype):
    """Outputs, the state and all gradients, from a state and with a pull on the last one."""
    n = 16  # the tree of sums takes seconds to compile
    q, k, v, S, z, dy, dS, dz = draw(8, (n, 8), (n, 8), (n, 6), (8, 6), (8,), (n, 6), (8, 6), (8,))
    z = 1 + abs(z)

    def total(start, *args):
        y, (S_end, z_end) = form(start, *args)
        return (y * dy).sum() + (S_end * dS).sum() + (z_end * dz).sum(), (y, S_end, z_end)

    with jax.enable_x64(dtype == np.float64):
        give = functools.partial(jnp.asarray, dtype=dtype)
        run = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
        grads, outputs = run((give(S), give(z)), give(q), give(k), give(v))
        parts = "y", "S", "z", "dS", "dz", "dq", "dk", "dv"
        values = *outputs, *grads[0], *grads[1:]
        got = {name: np.asarray(x) for name, x in zip(parts, values, strict=True)}
        got["by steps"] = got["y"]

    def ours(kind):
        args, state = [x.astype(kind) for x in (q, k, v)], (S.astype(kind), z.astype(kind))
        told = {"causal": True, "initial_state": state}
        y, (S_end, z_end) = refattn.linear_attention(*args, **told, return_state=True)
        dq, dk, dv, (dS_0, dz_0) = refattn.linear_attention_vjp(
            dy.astype(kind), *args, **told, dstate=(dS.astype(kind), dz.astype(kind))
        )
        found = dict(zip(parts, (y, S_end, z_end, dS_0, dz_0, dq, dk, dv), strict=True))
        rows = []
        for row in zip(*args, strict=True):
            y_i, state = refattn.linear_attention_step(state, *row)
            rows.append(y_i)
        return found | {"by steps": np.stack(rows)}

    hold(got, ours, 16.0)
