"""To notebook 4, linear attention."""

import numpy as np

RNG = np.random.default_rng(0)


def products_alone(n, r, e):
    return 2 * n * n * (r + e), 4 * n * r * e, 2 * r * e / (r + e)


def multiplications_alone(n, r, e):
    return n * n * (r + e), 2 * n * r * e, 2 * r * e / (r + e)


def one_flop_each(n, r, e):
    left, right = n * n * (r + 1 + e) + n * e, n * (2 * r * e + 2 * r + e)
    return left, right, (2 * r * e + 2 * r) / (r + e + 1)


def gathers_only(n, r, e):
    left, right = n * n * (2 * r + 1 + 2 * e) + n * e, n * (2 * r * e + 3 * r + e)
    return left, right, (2 * r * e + 3 * r) / (2 * r + 2 * e + 1)


def crosses_at_r(n, r, e):
    return n * n * (2 * r + 1 + 2 * e) + n * e, n * (4 * r * e + 3 * r + e), r


def crosses_as_products(n, r, e):
    return *crosses_at_r(n, r, e)[:2], 2 * r * e / (r + e)


def without_division(n, r, e):
    crossing = (4 * r * e + 3 * r) / (2 * r + 2 * e + 1)
    return n * n * (2 * r + 1 + 2 * e), n * (4 * r * e + 3 * r), crossing


def phi(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def rows(x):
    a = np.exp(x - x.max(axis=1, keepdims=True))
    return a / a.sum(axis=1, keepdims=True)


def columns(x):
    a = np.exp(x - x.max(axis=0))
    return a / a.sum(axis=0)


def over_features(q, k, v):
    a, b = rows(q), rows(k)
    return a @ (b.T @ v) / (a @ b.sum(axis=0))[:, None]


def undivided_over_features(q, k, v):
    return rows(q) @ (rows(k).T @ v)


@np.errstate(invalid="ignore")
def over_positions(q, k, v):
    a, b = columns(q), columns(k)
    return a @ (b.T @ v) / (a @ b.sum(axis=0))[:, None]


@np.errstate(invalid="ignore")
def exchanged(q, k, v):
    a, b = columns(q), rows(k)
    return a @ (b.T @ v) / (a @ b.sum(axis=0))[:, None]


def all_pairs(q, k, v):
    return (rows(q) @ columns(k).T) @ v


def scaled(q, k, v):
    root = q.dtype.type(q.shape[1] ** 0.5)
    return rows(q / root) @ (columns(k / root).T @ v)


def with_elu(q, k, v):
    return phi(q) @ (phi(k).T @ v) / (phi(q) @ phi(k).sum(axis=0))[:, None]


def without_one(S, z, q, k, v):
    f, g = phi(q) - 1, phi(k) - 1
    S, z = S + np.outer(g, v), z + g
    return f @ S / (f @ z), S, z


def chunks_of_512(q, k, v):
    y = np.empty((len(q), v.shape[1]), v.dtype)
    S, z = np.zeros((k.shape[1], v.shape[1]), v.dtype), np.zeros(k.shape[1], v.dtype)
    for c in (slice(i, i + 512) for i in range(0, len(q), 512)):
        f, g = phi(q[c]), phi(k[c])
        a = np.tril(f @ g.T)
        y[c] = (a @ v[c] + f @ S) / (a.sum(axis=1) + f @ z)[:, None]
        S, z = S + g.T @ v[c], z + g.sum(axis=0)
    return y


def reads_first(S, z, q, k, v):
    y = phi(q) @ S / (phi(q) @ z)
    return y, S + np.outer(phi(k), v), z + phi(k)


def undivided(S, z, q, k, v):
    S, z = S + np.outer(phi(k), v), z + phi(k)
    return phi(q) @ S, S, z


def bare_query(S, z, q, k, v):
    S, z = S + np.outer(phi(k), v), z + phi(k)
    return q @ S / (q @ z), S, z


def bare_key(S, z, q, k, v):
    S, z = S + np.outer(k, v), z + k
    return phi(q) @ S / (phi(q) @ z), S, z


def written_in_place(S, z, q, k, v):
    S += np.outer(phi(k), v)
    z += phi(k)
    return phi(q) @ S / (phi(q) @ z), S, z


def masked_pairs(q, k, v):
    a = np.tril(phi(q) @ phi(k).T)
    return a @ v / a.sum(axis=1, keepdims=True)


def every_state(q, k, v):
    f, g = phi(q), phi(k)
    S = np.cumsum(g[:, :, None] * v[:, None, :], axis=0)
    z = np.cumsum(g, axis=0)
    return (f[:, None, :] @ S)[:, 0] / (f * z).sum(axis=1, keepdims=True)


def sees_the_future(q, k, v):
    f, g = phi(q), phi(k)
    return f @ (g.T @ v) / (f @ g.sum(axis=0))[:, None]


def without_itself(q, k, v):
    a = np.tril(phi(q) @ phi(k).T, -1)
    den = a.sum(axis=1, keepdims=True)
    return a @ v / np.where(den == 0, 1, den)


def no_division(q, k, v):
    return np.tril(phi(q) @ phi(k).T) @ v


@np.errstate(over="ignore")
def overflows(x):
    return np.exp(300 * x)


WRONG = {
    1: [
        (products_alone, "These are the products alone"),
        (multiplications_alone, "2 r FLOPs; and the denominator"),
        (one_flop_each, "r multiplications and r additions"),
        (gathers_only, "two products"),
        (crosses_at_r, "solve for N"),
        (crosses_as_products, "The products alone cross there"),
        (without_division, "The division is missing"),
        (lambda n, r, e: 2 * n * n * (r + e), "expected (left, right, crossing)"),
    ],
    2: [
        (over_features, "over positions (axis 0)"),
        (undivided_over_features, "do not sum to one"),
        (over_positions, "does not depend on other queries"),
        (exchanged, "exchanged"),
        (scaled, "there are no scores"),
        (with_elu, "two softmaxes"),
        (all_pairs, "Put the brackets elsewhere"),
    ],
    3: [
        (reads_first, "also sees itself"),
        (undivided, "divide by phi(q) . z"),
        (bare_query, "The query is bare"),
        (bare_key, "sums over phi(k)"),
        (without_one, "without the + 1"),
        (written_in_place, "wrote to its inputs"),
    ],
    4: [
        (masked_pairs, "One state is enough"),
        (every_state, "One state is enough"),
        (chunks_of_512, "very long chunks"),
        (sees_the_future, "causal missing"),
        (without_itself, "Hint"),
        (no_division, "normaliser forgotten"),
    ],
    5: [
        (phi, "nearly equal"),
        (lambda x: x, "Some weights are negative"),
        (lambda x: x[..., :, None] * x[..., None, :], "keep all but the last"),
        (lambda x: np.concatenate([x, x, x], axis=-1) ** 2, "Over budget"),
        (lambda x: np.exp(x - x.max(axis=-2, keepdims=True)), "Let each row stand alone"),
        (3, "or a pair"),
        (overflows, "does exp overflow"),
        (lambda x: RNG.standard_normal(x.shape), "from call to call"),
    ],
}
