"""Linear attention: all weights one by one, and the recurrence that costs are counted on."""

import mpmath

from definitions.numbers import dot, exp, number_like


def one_like(x):
    return type(x)(1)


def softmax_list(xs):
    top = None
    for x in xs:
        if x.real > (float("-inf") if top is None else top.real):
            top = x
    weights = [exp(x - top) for x in xs]
    total = number_like(xs[0])
    for w in weights:
        total = total + w
    return [w / total for w in weights]


def elu_row(x):
    return [a + 1 if a.real > 0 else exp(a) for a in x]


def relu_row(x):
    return [a if a.real > 0 else number_like(a) for a in x]


def root_of_half(like):
    """A constant in the digits of ``like``."""
    many = isinstance(like, (mpmath.mpf, mpmath.mpc))
    return mpmath.sqrt(0.5) if many else 0.5**0.5


def taylor_row(x):
    row = [one_like(x[0]), *x]
    for b in range(len(x)):
        for c in range(b, len(x)):
            product = x[b] * x[c]
            row.append(product * root_of_half(product) if b == c else product)
    return row


def columns_softmax(rows):
    columns = [softmax_list(column) for column in zip(*rows)]
    return [list(row) for row in zip(*columns)]


QUERY = {"elu": elu_row, "relu": relu_row, "taylor": taylor_row, "softmax": softmax_list}
QUERY["bare"] = list
KEY = {**QUERY, "bare": lambda x: [exp(a) for a in x]}


def key_features(rows, name):
    if name == "softmax":
        return columns_softmax(rows)
    return [KEY[name](row) for row in rows]


def divided(row, den):
    """row / den; zeros where den is exactly 0."""
    return [number_like(x) if den == 0 else x / den for x in row]


def linear_attention(
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=False,
    normalize=True,
    key_mask=None,
    initial_state=None,
    chunk=None,
):
    """y_i = sum_j w_ij v_j / sum_j w_ij with w_ij = phi(q_i) . phi(k_j), on top of a state."""
    visible = [j for j in range(len(k)) if key_mask is None or key_mask[j]]
    phi_k = dict(zip(visible, key_features([k[j] for j in visible], feature_map)))
    y = []
    for i, q_i in enumerate(q):
        zero = number_like(q_i[0])
        phi = QUERY[feature_map](q_i)
        num, den = [zero] * len(v[0]) if v else [], zero
        if initial_state is not None:
            S, z = initial_state
            num = [dot(phi, column, zero) for column in zip(*S)]
            den = dot(phi, z, zero)
        for j in visible:
            if j <= i or not causal:
                w = dot(phi, phi_k[j], zero)
                num = [a + w * x for a, x in zip(num, v[j])]
                den = den + w
        y.append(divided(num, den) if normalize else num)
    return y


def linear_attention_recurrence(
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=False,
    normalize=True,
    key_mask=None,
    initial_state=None,
    chunk=None,
):
    """The same through S and z: every key enters once, every query reads once."""
    if not q or not k:
        return []
    zero = number_like(q[0][0])
    visible = [j for j in range(len(k)) if key_mask is None or key_mask[j]]
    phi_k = dict(zip(visible, key_features([k[j] for j in visible], feature_map)))
    phi_q = [QUERY[feature_map](q_i) for q_i in q]
    r, e = len(phi_q[0]), len(v[0])
    S, z = initial_state or ([[zero] * e for _ in range(r)], [zero] * r)

    def take(j):
        for a in range(r):
            S[a] = [s + phi_k[j][a] * x for s, x in zip(S[a], v[j])]
            z[a] = z[a] + phi_k[j][a]

    def read(i):
        num = [dot(phi_q[i], column, zero) for column in zip(*S)]
        return divided(num, dot(phi_q[i], z, zero)) if normalize else num

    y = []
    if not causal:
        for j in visible:
            take(j)
    for i in range(len(q)):
        if causal and i in phi_k:
            take(i)
        y.append(read(i))
    return y


def linear_attention_by_chunks(
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=True,
    normalize=True,
    key_mask=None,
    initial_state=None,
    chunk=64,
):
    """Weights one by one inside a chunk, the state for what came before."""
    if not causal:
        return linear_attention_recurrence(
            q,
            k,
            v,
            feature_map=feature_map,
            normalize=normalize,
            key_mask=key_mask,
            initial_state=initial_state,
        )
    if not q:
        return []
    zero = number_like(q[0][0])
    phi_q = [QUERY[feature_map](q_i) for q_i in q]
    visible = [j for j in range(len(k)) if key_mask is None or key_mask[j]]
    phi_k = [[zero] * len(phi_q[0]) for _ in k]
    for j in visible:
        phi_k[j] = KEY[feature_map](k[j])
    r, e = len(phi_q[0]), len(v[0])
    S, z = initial_state or ([[zero] * e for _ in range(r)], [zero] * r)
    y = []
    for start in range(0, len(q), chunk):
        members = range(start, min(start + chunk, len(q)))
        for i in members:
            num, den = [zero] * e, zero
            for j in range(start, i + 1):
                w = dot(phi_q[i], phi_k[j], zero)
                num = [a + w * x for a, x in zip(num, v[j])]
                den = den + w if normalize else den
            num = [a + dot(phi_q[i], column, zero) for a, column in zip(num, zip(*S))]
            if normalize:
                den = den + dot(phi_q[i], z, zero)
            y.append(divided(num, den) if normalize else num)
        for j in members:
            if j in visible:
                for a in range(r):
                    S[a] = [s + phi_k[j][a] * x for s, x in zip(S[a], v[j])]
                    z[a] = z[a] + phi_k[j][a]
    return y
