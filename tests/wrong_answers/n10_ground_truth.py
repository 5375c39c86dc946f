"""To notebook 10, holding a kernel against the truth."""

import numpy as np

import refattn


def no_logits(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * np.abs(v).max()


def signed(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * (1 + np.max(s)) * np.max(v)


def no_values(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * (1 + np.abs(s).max())


def own_error_once(own_error, eps, s, v):
    return own_error + 4 * eps * (1 + np.abs(s).max()) * np.abs(v).max()


def smallest(own_error, eps, s, v):
    return 2 * own_error + 4 * eps * (1 + abs(s.min())) * abs(v.min())


def by_hand(scale=True, aligned=True, stable=True, empty=True):
    """Causal attention, with what was mended so far."""

    def mended(q, k, v):
        n, m = len(q), len(k)
        s = q @ k.T
        s = s / q.dtype.type(q.shape[1] ** 0.5) if scale else s
        see = np.tri(n, m, m - n if aligned else 0, dtype=bool)
        with np.errstate(all="ignore"):
            s = np.where(see, s, -np.inf).astype(q.dtype)
            top = s.max(axis=1, keepdims=True, initial=-np.inf) if stable else 0
            a = np.exp(s - np.where(top > -np.inf, top, 0).astype(q.dtype))
            total = a.sum(axis=1, keepdims=True)
            y = a @ v / total
        return np.where(total > 0, y, 0).astype(q.dtype) if empty else y

    return mended


def exact(q, k, v):
    return refattn.softmax_attention(q, k, v, causal=True)


def sees_the_future(q, k, v):
    return refattn.softmax_attention(q, k, v)


def squared(q, k, v):
    return refattn.softmax_attention(q, k, v, causal=True) ** 2


WRONG = {
    1: [
        (no_logits, "logits are missing"),
        (signed, "absolute values first"),
        (no_values, "max|v| is missing"),
        (own_error_once, "counts twice"),
        (lambda e, eps, s, v: 2 * e + 4 * eps * abs(s).max() * abs(v).max(), "1 before max|s|"),
        (smallest, "expected"),
        (lambda own_error, eps, s, v: 1e-3, "expected"),
    ],
    2: [
        (by_hand(scale=False), "scale missing"),
        (by_hand(aligned=False), "top-left alignment"),
        (by_hand(stable=False), "maximum not subtracted"),
        (by_hand(empty=False), "empty row gives NaN"),
        (by_hand(aligned=False, stable=False), "Mend one thing"),
    ],
    3: [
        (exact, "This one is right"),
        (sees_the_future, "A probe notices it"),
        (squared, "A probe notices it"),
        (3, "a function of q, k and v"),
    ],
    4: [
        ([(64, 64, 16, 16), (128, 128, 8, 8)], "All sizes have n = m"),
        ([(64, 64, 16, 16), (7, 129, 5, 7)], "no row is empty"),
        ([(200, 131, 5, 7), (64, 64, 5, 7)], "d = e"),
        ([(20, 13, 5, 7), (64, 64, 16, 16)], "A tail tile"),
        ([(1000, 3, 4, 4)], "At most 256 tokens"),
        ([(4, 4, 4)], "is no size"),
        ([(8, 8, 2, 2)] * 3, "one to 2 sizes"),
    ],
}
