"""To notebook 6, Performer."""

import numpy as np

import refattn

KINDS = refattn.datasets.load_heads().kind
OMEGA = refattn.random_features(64, 32, rng=0)


def draw(signs=True, norms="rows", fresh=True):
    """Orthogonal features with something left out."""

    def omega(num_features, d, rng):
        blocks = []
        for _ in range(-(-num_features // d)):
            if fresh or not blocks:
                Q, R = np.linalg.qr(rng.standard_normal((d, d)))
            blocks.append((Q * np.sign(np.diag(R))).T if signs else Q.T)
        rows = np.concatenate(blocks)[:num_features]
        if norms == "rows":
            return rows * np.sqrt(rng.chisquare(d, num_features))[:, None]
        return rows * d**0.5 if norms == "fixed" else rows

    return omega


def independent(num_features, d, rng):
    return rng.standard_normal((num_features, d))


def performer(divide=True, root=0.25, shift=True, pairs=False):
    """A Performer, plainly written."""

    def kernel(q, k, v):
        w = OMEGA.astype(q.dtype)
        x, y = (z / q.dtype.type(q.shape[1] ** root) for z in (q, k))
        a, b = (z @ w.T - (z * z).sum(axis=1, keepdims=True) / 2 for z in (x, y))
        if shift:
            top = b.max(axis=0)
            a, b = a + top, b - top
            a = a - a.max(axis=1, keepdims=True)
        phi_x, phi_y = np.exp(a), np.exp(b)
        if pairs:
            weights = phi_x @ phi_y.T
            return weights / weights.sum(axis=1, keepdims=True) @ v
        out = phi_x @ (phi_y.T @ v)
        return out / (phi_x @ phi_y.sum(axis=0))[:, None] if divide else out

    return kernel


WRONG = {
    1: [
        (lambda x, y, e: np.ceil(np.expm1((x + y) @ (x + y)) / e), "epsilon enters squared"),
        (lambda x, y, e: np.ceil(np.expm1((x - y) @ (x - y)) / e**2), "trigonometric kind"),
        (lambda x, y, e: np.ceil(np.exp((x + y) @ (x + y)) / e**2), "Without the - 1"),
        (
            lambda x, y, e: np.ceil(
                np.exp(2 * x @ y) * np.expm1(np.linalg.norm(x + y) ** 2) / e**2
            ),
            "divided by the kernel",
        ),
        (lambda x, y, e: np.ceil(np.expm1((x + y) @ (x + y) / 2) / e**2), "exponent of a mean"),
        (lambda x, y, e: np.expm1((x + y) @ (x + y)) // e**2, "one too few"),
        (lambda x, y, e: 1 / e**2, "Hint"),
    ],
    2: [
        (draw(signs=False), "uncorrected QR"),
        (draw(norms="fixed"), "rows of length sqrt(d)"),
        (draw(norms=None), "rows of unit length"),
        (draw(fresh=False), "one block repeated"),
        (independent, "rows not orthogonal"),
        (lambda num_features, d, rng: np.eye(d), "Hint"),
        (3, "expected a function"),
    ],
    3: [
        (performer(divide=False, shift=False), "sum of its weights"),
        (performer(root=0.0), "divided by d^(1/4)"),
        (performer(root=0.5), "needs it once"),
        (performer(shift=False), "Which maxima"),
        (performer(pairs=True), "sum over the keys before"),
    ],
    4: [
        (dict.fromkeys(KINDS, ("positive", 512)), "Over budget"),
        (dict.fromkeys(KINDS, 256), "a pair such as"),
        ({"local": ("positive", 16)}, "a pair for each of"),
        (dict.fromkeys(KINDS, ("positive", 256)), "gain nothing from hundreds"),
        (dict.fromkeys(KINDS, ("trig", 64)), "near zero"),
    ],
}
