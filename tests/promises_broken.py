"""Kernels for the probes: right parts and windows, and one or two for each way to be wrong."""

import numpy as np

import refattn

N = 24
OMEGA = refattn.random_features(16, 8, rng=0)
HIDDEN = np.arange(N) % 5 == 1


def kernel_of(attention, **options):
    return lambda q, k, v: attention(q, k, v, **options)


def windowed(window):
    return kernel_of(refattn.local_attention, window=window)


def causal_windowed(window):
    return kernel_of(refattn.local_attention, window=window, causal=True)


def linear_resume(q, k, v, state):
    return refattn.linear_attention(
        q, k, v, causal=True, initial_state=state, return_state=True, feature_map="elu"
    )


def cached(q, k, v, state):
    """Softmax attention with a cache of keys and values."""
    if state is not None:
        k, v = (np.concatenate(pair, axis=-2) for pair in zip(state, (k, v)))
    return refattn.softmax_attention(q, k, v, causal=True), (k, v)


def scores(q, k, scale=None):
    return q @ k.mT * q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)


def weighted(s, v, top=None, seen=None):
    """Causal softmax of scores, with no product of a masked weight and a value."""
    n = len(s)
    s = np.where(np.tri(n, dtype=bool) if seen is None else seen, s, -np.inf)
    a = np.exp(s - (s.max(axis=1, keepdims=True) if top is None else top))
    a = a / a.sum(axis=1, keepdims=True)
    return np.stack([a[i, : i + 1] @ v[: i + 1] for i in range(n)])


def global_maximum_of_features(q, k, v):
    """Performer stabilised by the nearest key of all, NaN aside."""
    omega = OMEGA.T.astype(k.dtype)
    b = k @ omega - (k * k).sum(axis=1, keepdims=True) / 2
    a = np.tril(np.exp(q @ omega) @ np.exp(b - np.fmax.reduce(b, axis=None)).T)
    a = a / a.sum(axis=1, keepdims=True)
    return np.stack([a[i, : i + 1] @ v[: i + 1] for i in range(len(a))])


def maximum_over_all_keys(q, k, v):
    s = scores(q, k)
    return weighted(s, v, np.fmax.reduce(s, axis=1, keepdims=True))


def added_mask(q, k, v):
    s = scores(q, k) + np.triu(np.full((len(q), len(q)), -np.inf, q.dtype), 1)
    return weighted(s, v, seen=True)


def dense_mask(q, k, v):
    a = np.where(np.tri(len(q), dtype=bool), np.exp(scores(q, k)), 0)
    return (a / a.sum(axis=1, keepdims=True)) @ v


def scaled_by_length(q, k, v):
    return weighted(scores(q, k, len(q) ** -0.5), v)


def positive_values(q, k, v):
    return weighted(scores(q, k), np.maximum(v, 0))


def now_and_then(q, k, v, calls=[0]):  # noqa: B006
    calls[0] += 1
    return refattn.softmax_attention(q, k, v) * q.dtype.type(1 + 2.5e-7 * (calls[0] % 2))


def workspace_never_cleared():
    kept = np.zeros((N, 8), np.float32)

    def kernel(q, k, v):
        kept[:] = 0 * kept + refattn.softmax_attention(q, k, v)
        return kept.copy()

    return kernel


def writes_at_odd_lengths(q, k, v):
    y = refattn.softmax_attention(q, k, v, causal=True)
    k[0] *= len(q) % 2 == 0
    return y


def fourth_keys_for_the_fifth_head(q, k, v):
    k = k.copy()
    k.reshape(-1, *k.shape[-2:])[5] = k.reshape(-1, *k.shape[-2:])[4]
    return refattn.softmax_attention(q, k, v)


def maximum_over_the_batch(q, k, v):
    a = np.exp(scores(q, k) - np.fmax.reduce(scores(q, k), axis=None))
    return (a / a.sum(axis=-1, keepdims=True)) @ v


def refuses_nan(q, k, v):
    if np.isnan(v).any():
        raise FloatingPointError("no NaN, please")
    return refattn.softmax_attention(q, k, v, causal=True)


def later_first(q, k, v):
    return refattn.softmax_attention(q, k, v, bias=np.arange(len(k), dtype=q.dtype)[None])


def later_larger(q, k, v):
    return refattn.softmax_attention(q, k, v) * (1 + np.arange(len(q), dtype=q.dtype)[:, None])


def large_negative(q, k, v):
    s = scores(q, k) + np.where(HIDDEN, -1e9, 0).astype(q.dtype)
    a = np.exp(s - s.max(axis=1, keepdims=True))
    return (a / a.sum(axis=1, keepdims=True))[:, ~HIDDEN] @ v[~HIDDEN]


def dense_window(q, k, v):
    seen = refattn.masks.local(len(q), 3).toarray()
    a = np.where(seen, np.exp(scores(q, k)), 0)
    return (a / a.sum(axis=1, keepdims=True)) @ v


def forgets(q, k, v, state):
    return linear_resume(q, k, v, None)


def loses_the_last_token(q, k, v, state):
    y, _ = linear_resume(q, k, v, state)
    return y, linear_resume(q[:-1], k[:-1], v[:-1], state)[1]


def window_that_counts_both_sides(window):
    return windowed((window - 1) // 2)


def infinite(q, k, v):
    y = refattn.softmax_attention(q, k, v)
    y[3], y[5, 4:] = np.inf, np.nan
    return y
