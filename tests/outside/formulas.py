"""Every mechanism in a few dense lines for a library that differentiates by itself.

Written from the docstrings' equations, with all pairs at once and no shift, tile or state: where a
sum is exact in several orders these take the other one. ``nn`` has the library's own elu, relu and
softmax. They import nothing of refattn; each gives its outputs by name.
"""

import numpy as np


def namespace(x):
    """The array API of x's library."""
    from array_api_compat import array_namespace  # not there in every environment

    return array_namespace(x)


def positions(n, m):
    """Query's place in the keys' count, and key's: (n, 1) and (m,)."""
    return np.arange(n)[:, None] + (m - n), np.arange(m)


def past(n, m):
    i, j = positions(n, m)
    return j <= i


def average(weights, v):
    """Weighted means of v's rows, 0 where there is no weight, and the logarithm of the weight."""
    xp = namespace(v)
    total = xp.sum(weights, axis=-1, keepdims=True)
    some = xp.where(total == 0, xp.ones_like(total), total)
    return weights @ v / some, xp.log(some[..., 0]), total[..., 0]


def shown(x, seen, hidden=0.0):
    """x where something may be seen, ``hidden`` elsewhere."""
    xp = namespace(x)
    return xp.where(xp.asarray(np.array(seen)), x, xp.full_like(x, hidden))


def scores(q, k, scale):
    return (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)


def softmax_attention(nn, q, k, v, *, mask=None, bias=None, causal=False, scale=None, softcap=None):
    xp = namespace(q)
    s = scores(q, k, scale)
    s = s if softcap is None else softcap * xp.tanh(s / softcap)
    weights = xp.exp(s if bias is None else s + bias)
    n, m = q.shape[-2], k.shape[-2]
    seen = np.ones((n, m), bool) if mask is None else mask
    y, lse, total = average(shown(weights, seen & past(n, m) if causal else seen), v)
    return {"y": y, "lse": xp.where(total > 0, lse, xp.full_like(lse, -xp.inf))}


def local_attention(nn, q, k, v, *, window, causal=False, dilation=1, scale=None):
    i, j = positions(q.shape[-2], k.shape[-2])
    left, right = (window, window) if isinstance(window, int) else window
    steps, rest = np.divmod(j - i, dilation)
    seen = (rest == 0) & (steps >= -left) & (steps <= (0 if causal else right))
    return {"y": softmax_attention(nn, q, k, v, mask=seen, scale=scale)["y"]}


def sparse_attention(nn, q, k, v, *, mask, scale=None):
    return {"y": softmax_attention(nn, q, k, v, mask=mask.toarray(), scale=scale)["y"]}


def linear_attention(
    nn, q, k, v, *, feature_map="elu", causal=False, normalize=True, key_mask=None,
    initial_state=None, **cut,
):  # fmt: skip
    """``cut`` are sizes of chunks, which change nothing."""
    xp = namespace(q)
    n, m = q.shape[-2], k.shape[-2]
    seen = np.ones((n, m), bool) if key_mask is None else key_mask[..., None, :]
    seen = seen & past(n, m) if causal else seen
    state = {}
    if feature_map == "taylor":
        t = q @ k.mT
        weights = 1 + t + t * t / 2
    else:
        phi_q, phi_k = maps(nn, feature_map, q, k, key_mask)
        weights = phi_q @ phi_k.mT
        kept = phi_k if key_mask is None else shown(phi_k, key_mask[..., None])
        S = kept.mT @ v
        state = {"S": S, "z": xp.broadcast_to(xp.sum(kept, axis=-2), S.shape[:-1])}
    weights = shown(weights, seen)
    num, den = weights @ v, xp.sum(weights, axis=-1, keepdims=True)
    if initial_state is not None:
        S, z = initial_state
        num, den = num + phi_q @ S, den + phi_q @ z[..., None]
        state = {"S": state["S"] + S, "z": state["z"] + z}
    if not normalize:
        return {"y": num, **state}
    return {"y": xp.where(den == 0, 0 * num, num / xp.where(den == 0, 1 + den, den)), **state}


def linear_attention_chunked(nn, q, k, v, *, causal=True, **options):
    return linear_attention(nn, q, k, v, causal=causal, **options)


def maps(nn, name, q, k, key_mask):
    if name == "softmax":
        if key_mask is not None:
            k = shown(k, key_mask[..., None], hidden=-np.inf)
        return nn.softmax(q, -1), nn.softmax(k, -2)
    if name == "elu":
        return nn.elu(q) + 1, nn.elu(k) + 1
    if name == "relu":
        return nn.relu(q), nn.relu(k)
    xp = namespace(q)
    return q, xp.exp(k)  # the chapter's Q f(K)


def performer_attention(
    nn, q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    """As a kernel of pairs, which the features' products must be equal to."""
    xp = namespace(q)
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    x, y = root * q[..., :, None, :], root * k[..., None, :, :]  # (..., n, 1, d), (..., 1, m, d)
    half = (xp.sum(x * x, axis=-1) + xp.sum(y * y, axis=-1)) / 2  # (..., n, m)
    if kind == "trig":
        weights = xp.exp(half) * xp.mean(xp.cos((x - y) @ omega.mT), axis=-1)
    else:
        exponent = (x + y) @ omega.mT - half[..., None]  # (..., n, m, M)
        weights = xp.exp(exponent)
        if kind == "hyperbolic":
            weights = (weights + xp.exp(-((x + y) @ omega.mT) - half[..., None])) / 2
        weights = xp.mean(weights, axis=-1)
    n, m = q.shape[-2], k.shape[-2]
    seen = np.ones((n, m), bool) if key_mask is None else key_mask[..., None, :]
    return {"y": average(shown(weights, seen & past(n, m) if causal else seen), v)[0]}


def linformer_attention(nn, q, k, v, *, E, F=None, key_mask=None, scale=None):
    F = E if F is None else F
    if key_mask is not None:
        E, F = (shown(x, key_mask[..., None, :]) for x in (E, F))
    return {"y": nn.softmax(scores(q, E @ k, scale), -1) @ (F @ v)}


def block_attention(nn, q, k, v, *, block, fuse="concat", weights=None, scale=None):
    xp = namespace(q)
    if fuse == "exact":
        return {"y": nn.softmax(scores(q, k, scale), -1) @ v}
    cuts = [slice(at, at + block) for at in range(0, q.shape[-2], block)]
    parts = [
        nn.softmax(scores(q[..., rows, :], k[..., rows, :], scale), -1) @ v[..., rows, :]
        for rows in cuts
    ]
    if fuse == "concat":
        return {"y": xp.concat(parts, axis=-2)}
    parts = xp.stack(parts, axis=-3)  # (..., M, block, e)
    if fuse == "max":
        return {"y": xp.max(parts, axis=-3)}
    if fuse == "weighted":
        return {"y": xp.sum(weights[..., None, None] * parts, axis=-3)}
    return {"y": (xp.sum if fuse == "sum" else xp.mean)(parts, axis=-3)}


def two_level_attention(nn, q, k, v, *, block, pool="mean", scale=None):
    """One softmax over all n keys, of which those in other blocks are replaced by their pool."""
    xp = namespace(q)
    n = q.shape[-2]
    cuts = [slice(at, min(n, at + block)) for at in range(0, n, block)]
    reduce = xp.mean if pool == "mean" else xp.max
    k_pool, v_pool = (
        xp.concat(
            [0 * x[..., own, :] + reduce(x[..., own, :], axis=-2, keepdims=True) for own in cuts],
            axis=-2,
        )
        for x in (k, v)
    )
    home = np.arange(n) // block
    same = home[:, None] == home
    near, far = xp.exp(scores(q, k, scale)), xp.exp(scores(q, k_pool, scale))
    near, far = shown(near, same), shown(far, ~same)
    total = xp.sum(near, axis=-1, keepdims=True) + xp.sum(far, axis=-1, keepdims=True)
    return {"y": (near @ v + far @ v_pool) / total}


def gated_attention(nn, q, k, v, *, gate, attention="softmax_attention", **options):
    """Closed rows are constants, so their gate has no gradient."""
    xp = namespace(q)
    opened = xp.any(gate != 0, axis=-1, keepdims=True)
    gate = xp.where(opened, gate, xp.zeros_like(gate))
    return {"y": gate * globals()[attention](nn, q, k, v, **options)["y"]}
