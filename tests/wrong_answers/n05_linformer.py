"""To notebook 5, Linformer."""

import numpy as np

rng = np.random.default_rng(0)
E = np.kron(np.eye(32), np.full(16, 1 / 16)).astype(np.float32)  # means of 32 segments of 16


def segments(r, m):
    """Means of r segments of m tokens, m a multiple of r."""
    return np.kron(np.eye(r), np.full(m // r, r / m))


def softmax(s):
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def projected_weights(q, k, v):
    scores = q @ k.T / q.dtype.type(q.shape[1] ** 0.5)
    return softmax(scores) @ E.T @ (E @ v)


def scaled_by_rows(q, k, v):
    return softmax(q @ (E @ k).T / np.float32(32**0.5)) @ (E @ v)


def sums(q, k, v):
    return softmax(q @ (E @ k).T / q.dtype.type(q.shape[1] ** 0.5)) @ (16 * E @ v)


def projected_scores(q, k, v):
    """Right, and N x N."""
    return softmax(q @ k.T @ E.T / q.dtype.type(q.shape[1] ** 0.5)) @ (E @ v)


def softmax_over_queries(q, k, v):
    s = q @ (E @ k).T / q.dtype.type(q.shape[1] ** 0.5)
    p = np.exp(s - s.max(axis=0))
    return p / p.sum(axis=0) @ (E @ v)


def pool_by_segment(r, m, length, visible=False, total=False):
    E = np.zeros((r, m))
    end = m if visible or total else length
    cuts = [t * end // r for t in range(r + 1)]
    for t in range(r):
        E[t, cuts[t] : cuts[t + 1]] = 1 / (cuts[t + 1] - cuts[t])
    if visible:
        E[:, length:] = 0
    return E


def pool_split(r, m, length):
    E = np.zeros((r, m))
    for t, part in enumerate(np.array_split(np.arange(length), r)):
        E[t, part] = 1 / len(part)
    return E


def pool_by_token(r, m, length):
    E = np.zeros((r, m))
    for j in range(length):
        E[j * r // length, j] = 1
    return E / E.sum(axis=1, keepdims=True)


def pool_and_divide(r, m, length):
    E = pool_by_segment(r, m, length, visible=True)
    return E / np.maximum(E.sum(axis=1, keepdims=True), 1e-30)


def legal_if(future):
    """Query i may read row t if future(the row's weights after i)."""

    def legal(E):
        m = E.shape[1]
        return np.array([[future(row[i + 1 :]) for row in E] for i in range(m)])

    return legal


def legal_by(last, strict=False):
    def legal(E):
        m = E.shape[1]
        out = np.zeros((m, len(E)), bool)
        for i in range(m):
            for t, row in enumerate(E):
                j = np.flatnonzero(row)[-1 if last else 0]
                out[i, t] = j < i if strict else j <= i
        return out

    return legal


def own_row_for_the_first():
    E = np.zeros((16, 512))
    E[0, 0] = 1
    E[1:, 1:] = pool_by_segment(15, 511, 511)
    return E


WRONG = {
    1: [
        (lambda r, d: r + 1, "E K and F V cost"),
        (lambda r, d: 2 * r, "6 FLOPs a pair"),
        (lambda r, d: int(np.ceil(r * (8 * d + 6) / (4 * d + 6))), "not yet the cheaper"),
        (lambda r, d: r * (8 * d + 6) / (4 * d + 6), "Hint"),
    ],
    2: [
        (projected_weights, "projected the weights after a softmax"),
        (scaled_by_rows, "square root of d"),
        (sums, "means and not sums"),
        (projected_scores, "N x N scores"),
        (softmax_over_queries, "Hint"),
    ],
    3: [
        (lambda r, m, length: pool_by_segment(r, m, length, visible=True), "still takes weight"),
        (lambda r, m, length: pool_by_segment(r, m, length, total=True), "Padding is averaged"),
        (
            lambda r, m, length: (pool_by_segment(r, m, length) > 0) * 1.0,
            "Rows must sum to 1",
        ),
        (lambda r, m, length: pool_by_segment(r, m, length)[:, :length], "shape"),
        (pool_split, "makes the first segments the longer"),
        (pool_by_token, "not cut as mean_pool cuts"),
        (pool_and_divide, "Rows of padding alone are empty"),
    ],
    4: [
        (legal_by(last=False), "What counts is the last"),
        (legal_by(last=True, strict=True), "A query may read its own key"),
        (lambda E: legal_by(last=True)(E).T, "shape"),
        (legal_if(lambda later: not (later > 0).any()), "A negative weight"),
        (legal_if(lambda later: abs(later.sum()) < 1e-9), "cancel in a sum"),
    ],
    5: [
        (segments(16, 512), "down the gradient"),
        (segments(32, 512), "Over budget"),
        (segments(8, 512), "rows left"),
        (own_row_for_the_first(), "row of its own"),
        (rng.standard_normal((16, 512)) / 4, "Rows far from sum 1"),
        (segments(16, 256), "mixtures of 512 tokens"),
        ((segments(16, 512), segments(16, 512)), "Give an array"),
        (np.full((16, 512), 1e200), "Rows far from sum 1"),
    ],
}
