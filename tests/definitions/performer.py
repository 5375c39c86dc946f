"""Performer: the kernel estimate pair by pair, and the shifted recurrence for the costs."""

from definitions.linear import divided
from definitions.numbers import cos, dot, exp, number_like, sin


def exponents(x, omega, kind):
    """The exponent of each feature; for trig, of all of them."""
    zero = number_like(x[0])
    h = dot(x, x, zero) * 0.5
    if kind == "trig":
        return [h]
    t = [dot(w, x, zero) for w in omega]
    if kind == "hyperbolic":
        t = t + [a * -1 for a in t]
    return [a - h for a in t]


def factors(x, omega):
    """cos and sin of each direction."""
    t = [dot(w, x, number_like(x[0])) for w in omega]
    return [cos(a) for a in t] + [sin(a) for a in t]


def features(x, omega, kind):
    """phi(x) as in the paper, without the constant that cancels."""
    size = [exp(a) for a in exponents(x, omega, kind)]
    return [f * size[0] for f in factors(x, omega)] if kind == "trig" else size


def scaled(x, scale, d):
    root = (d**-0.5 if scale is None else scale) ** 0.5
    return [a * root for a in x]


def performer_attention(
    q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    visible = [j for j in range(len(k)) if key_mask is None or key_mask[j]]
    phi_k = {j: features(scaled(k[j], scale, len(k[j])), omega, kind) for j in visible}
    y = []
    for i, q_i in enumerate(q):
        zero = number_like(q_i[0])
        phi = features(scaled(q_i, scale, len(q_i)), omega, kind)
        num, den = [zero] * len(v[0]) if v else [], zero
        for j in visible:
            if j <= i or not causal:
                w = dot(phi, phi_k[j], zero)
                num = [a + w * x for a, x in zip(num, v[j])]
                den = den + w
        y.append(divided(num, den))
    return y


def larger(a, b):
    """The maximum of two numbers; one comparison."""
    return a if a.real > b.real else b


def performer_attention_shifted(
    q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    """Exponents less their maximum over the keys so far; the state moves with the maximum."""
    if not q or not k:
        return []
    zero, d, e = number_like(q[0][0]), len(q[0]), len(v[0])
    low = type(zero)(float("-inf"))
    trig = kind == "trig"
    r = len(omega) * (1 if kind == "positive" else 2)
    visible = [j for j in range(len(k)) if key_mask is None or key_mask[j]]
    keys = {j: scaled(k[j], scale, d) for j in visible}
    b = {j: exponents(keys[j], omega, kind) for j in visible}
    S, z = [[zero] * e for _ in range(r)], [zero] * r
    top = [low] * (1 if trig else r)

    def raise_top(j):
        return [larger(new, old) for new, old in zip(b[j], top)]

    def take(j):
        size = [exp(x - t) for x, t in zip(b[j], top)]
        phi = [f * size[0] for f in factors(keys[j], omega)] if trig else size
        for a in range(r):
            S[a] = [s + phi[a] * x for s, x in zip(S[a], v[j])]
            z[a] = z[a] + phi[a]

    def read(i):
        x = scaled(q[i], scale, d)
        if trig:
            phi = factors(x, omega)
        else:
            total = [a + t for a, t in zip(exponents(x, omega, kind), top)]
            largest = low
            for t in total:
                largest = larger(t, largest)
            phi = [exp(t - largest) for t in total]
        return divided([dot(phi, column, zero) for column in zip(*S)], dot(phi, z, zero))

    y = []
    if not causal:
        for j in visible:
            top = raise_top(j)
        for j in visible:
            take(j)
        return [read(i) for i in range(len(q))]
    for i in range(len(q)):
        if i in b:
            old, top = top, raise_top(i)
            decay = [exp(o - t) for o, t in zip(old, top)] * (r if trig else 1)
            for a in range(r):
                S[a] = [s * decay[a] for s in S[a]]
                z[a] = z[a] * decay[a]
            take(i)
        y.append(read(i))
    return y
