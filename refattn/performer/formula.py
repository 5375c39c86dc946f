"""Performer (12.3.2): random features turn softmax attention into linear attention."""

import numpy as np

from refattn import checks
from refattn.arrays import gradients
from refattn.cost import Cost, qkvy_bytes, working_size
from refattn.dispatch import backends, rows_of
from refattn.linear import core
from refattn.linear.inputs import cost_up_to_last, up_to_last
from refattn.performer.features import PARTS, PARTS_VJP, directions


@backends
@np.errstate(invalid="ignore", over="ignore")
def performer_attention(
    q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    r"""An unbiased estimate of softmax attention's numerator and denominator, in linear time.

    .. math:: y_i = \frac{\phi(\sqrt{c}\, q_i)^T \sum_j \phi(\sqrt{c}\, k_j) v_j^T}
                         {\phi(\sqrt{c}\, q_i)^T \sum_j \phi(\sqrt{c}\, k_j)}, \qquad
              E[\phi(x) \cdot \phi(y)] = e^{x \cdot y}, \quad c = \mathrm{scale}

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        One dtype for the three; leading axes broadcast.
    omega : array (num_features, d)
        Directions, as ``random_features`` draws them.
    kind : {"positive", "trig", "hyperbolic"}
        trig and hyperbolic have 2 num_features columns. trig's weights may be negative.
    causal : bool
        Query i sees keys j <= i; needs n = m.
    key_mask : bool array broadcasting to (..., m), optional
        True where a key may be attended.
    scale : float > 0, optional
        1/sqrt(d) if None.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e)
        A query that sees no key has y = 0.

    Raises
    ------
    TypeError
        A dtype that is not real floating point, mixed dtypes, a mask that is not boolean.
    ValueError
        Shapes that do not fit; fewer than one feature; an unknown kind; scale <= 0; causal with
        n != m.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: about 2 (n + m) M (d + e) FLOPs for M features: linear in n and m.

    Exponents are shifted before exp is taken: for each feature by its maximum over the keys, for
    each query by its maximum over the features. Shifts cancel between numerator and denominator;
    with them one term of each denominator is exactly 1 (positive and hyperbolic), so while |x|^2
    itself is finite nothing overflows and no maximum underflows. Causal: the maximum runs along
    with the positions, so a later key, however large, changes nothing before it.

    Error: of the arithmetic, within eps * (2 (d + 4) A + m + 4 M + 16) * c (1 + c) * max|v|, where
    A = 1 + the largest exponents, |omega_r| . |x| + |x|^2 / 2, of a query and of a key together,
    and c is 1, or for trig the condition of the denominator, as in ``linear_attention``
    (tests/test_formulas.py, against 40 digits). Of the estimate: variance by ``kernel_variance``,
    which grows as exp(scale |q + k|^2): large norms need very many features.
    Measured worst, on refattn.verify.certain.hard: 1.7e-13 max|v| (positive, very far, causal).

    References
    ----------
    Choromanski et al. 2020, arXiv:2009.14794, sections 2.2 to 2.4.

    Examples
    --------
    Equal features give the mean of the values, whatever omega is:

    >>> import numpy as np
    >>> performer_attention(np.zeros((1, 2)), np.zeros((2, 2)), np.array([[1.0], [3.0]]),
    ...                     omega=np.array([[0.3, -1.2]]))
    array([[2.]])
    """
    inputs = _prepare(q, k, v, omega, kind, causal, key_mask, scale)
    y = _attend(inputs, causal)
    return y.astype(inputs["dtype"], copy=False)


@backends
@np.errstate(invalid="ignore", over="ignore")
def performer_attention_vjp(
    dy, q, k, v, *, omega, kind="positive", causal=False, key_mask=None, scale=None
):
    r"""Gradient of ``performer_attention``: from dy (..., n, e) to (dq, dk, dv).

    That of linear attention over the shifted features, then through the features:
    for the positive kind

    .. math:: dx = \sum_r d\phi_r \phi_r (\omega_r - x), \qquad x = \sqrt{c}\, q

    The shifts cancel in y, so they are constants here; so is omega.

    Parameters
    ----------
    dy : array (..., n, e)
        Gradient of a scalar with respect to y.
    q, k, v, omega, kind, causal, key_mask, scale, backend
        As in the forward.

    Returns
    -------
    (dq, dk, dv) : arrays in the shapes of q, k and v, in q's dtype.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As the forward; ValueError for a dy that has not the shape of y.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.ones((1, 1))
    >>> dq, dk, dv = performer_attention_vjp(one, one, one, one, omega=one)
    >>> float(dq[0, 0]), float(dk[0, 0]), float(dv[0, 0])
    (0.0, 0.0, 1.0)
    """
    inputs = _prepare(q, k, v, omega, kind, causal, key_mask, scale)
    return _backward(dy, inputs, causal, (np.shape(q), np.shape(k), np.shape(v)))


def performer_attention_cost(
    n,
    m,
    d,
    e,
    *,
    num_features,
    kind="positive",
    causal=False,
    key_mask=None,
    scale=None,
    itemsize=4,
):
    """Counted cost of ``performer_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    num_features : int
        Rows of omega.
    kind : {"positive", "trig", "hyperbolic"}
    causal : bool
        The running maximum costs a comparison, a subtraction, an exp and e + 1 multiplications
        for each visible key and shift.
    key_mask : int, optional
        Visible keys, where a mask is given.
    scale
        Costs the same whatever it is.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    Cost

    Examples
    --------
    >>> one, two = (performer_attention_cost(n, n, 64, 64, num_features=256) for n in (1, 2))
    >>> two.flops == 2 * one.flops
    True
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    checks.choice("kind", kind, PARTS)
    M = checks.whole("num_features", num_features, least=1)
    keys = m if key_mask is None else checks.whole("key_mask", key_mask, least=0, most=m)
    r = M if kind == "positive" else 2 * M
    # sqrt(scale) x, omega . x, |x|^2 / 2, and what the kind makes of them
    row = d + 2 * d * M + 2 * d + 1
    shifts = 1 if kind == "trig" else r
    if kind == "trig":
        on_query = row - 2 * d - 1 + 2 * M  # cos and sin; a query's exponent is its own shift
        on_key = row + 2 * M + 1 + 2 + 2 * M  # cos and sin; comparison; shift, exp; products
    else:
        turned = M if kind == "hyperbolic" else 0  # -omega . x
        on_query = row + turned + r + 4 * r  # exponent; key's shift, comparison, shift, exp
        on_key = row + turned + r + 3 * r  # exponent; comparison, shift, exp
    flops = n * on_query + keys * on_key
    flops += keys * (2 * r * e + r) + n * (2 * r * e + 2 * r + e)  # as linear attention
    flops += keys * (shifts * 2 + r * (e + 1)) if causal else 0  # decay of the state
    moved = qkvy_bytes(n, m, d, e, itemsize) + itemsize * M * d
    moved += 0 if key_mask is None else m
    return Cost(flops, moved, working_size(itemsize) * ((n + m) * r + r * e + r))


@rows_of(
    performer_attention,
    cost=cost_up_to_last(performer_attention_cost),
    by_position=lambda sizes: sizes.get("causal", False),
)
def _some_rows(rows, n, m, *, causal=False, **options):
    if not checks.flag("causal", causal):  # queries do not depend on each other
        return performer_attention, performer_attention_vjp, options
    checks.square("causal Performer", n, m)

    def forward(q, k, v, **options):
        inputs = _prepare(q, k, v, causal=True, rows=rows, **{**_DEFAULTS, **options})
        return _attend(inputs, True).astype(inputs["dtype"], copy=False)

    def vjp(dy, q, k, v, **options):
        inputs = _prepare(q, k, v, causal=True, rows=rows, **{**_DEFAULTS, **options})
        return _backward(dy, inputs, True, (np.shape(q), np.shape(k), np.shape(v)))

    return *up_to_last(rows, m, forward, vjp), options


_DEFAULTS = {"kind": "positive", "key_mask": None, "scale": None}


def _prepare(q, k, v, omega, kind, causal, key_mask, scale, rows=None):
    """Checked inputs, and the shifted features of queries and keys."""
    q, k, v, dtype = checks.qkv(q, k, v)
    n, m, lead = q.shape[-2], k.shape[-2], checks.lead(q, k, v)
    checks.choice("kind", kind, PARTS)
    omega = directions(omega, q.shape[-1], dtype)
    scale = checks.scale(scale, q.shape[-1])
    if scale <= 0:
        raise ValueError(f"scale is {scale}; Performer needs scale > 0, it takes its square root")
    if checks.flag("causal", causal) and rows is None:
        checks.square("causal Performer", n, m)
    seen = None
    if key_mask is not None:
        seen = checks.key_mask(key_mask, (*lead, m))[..., None]  # (..., m, 1)
        k, v = np.where(seen, k, 0), np.where(seen, v, 0)
    x, y = scale**0.5 * q, scale**0.5 * k
    on_queries = PARTS[kind](x, omega)  # factors (..., n, r), exponents (..., n, r or 1)
    k_factor, b = PARTS[kind](y, omega)
    if seen is not None:
        k_factor, b = np.where(seen, k_factor, 0), np.where(seen, b, -np.inf)
    positions = (np.arange(m) if rows is None else rows) if causal else None
    phi_q, phi_k, decay = _shift(*on_queries, k_factor, b, positions)
    found = {"x": x, "y": y, "v": v, "dtype": dtype, "omega": omega, "kind": kind, "scale": scale}
    found |= {"seen": seen, "phi_q": phi_q, "phi_k": phi_k, "decay": decay, "rows": rows}
    return found | {"lead": lead}


def _shift(q_factor, a, k_factor, b, positions):
    """Features of queries and keys with their exponents a and b shifted; the state's decay.

    A key's exponents are lessened by ``top``, the largest of each feature: over all keys, or, where
    ``positions`` of causal queries are given, over the keys so far; then the state must shrink
    whenever the maximum grows. A query's exponents regain ``top`` and lose their own largest.
    """
    decay = None
    if positions is None:
        top = b.max(axis=-2, keepdims=True, initial=-np.inf)  # (..., 1, r or 1)
        phi_k = k_factor * _shifted(b, top)
    else:
        running = np.maximum.accumulate(b, axis=-2)  # (..., m, r or 1)
        start = np.full_like(running[..., :1, :], -np.inf)
        before = np.concatenate([start, running], axis=-2)[..., :-1, :]
        phi_k = k_factor * _shifted(b, running)
        decay = np.broadcast_to(_shifted(before, running), phi_k.shape)
        top = running[..., positions, :]
    total = a + top
    largest = total.max(axis=-1, keepdims=True, initial=-np.inf)
    return q_factor * _shifted(total, largest), phi_k, decay


def _shifted(exponent, shift):
    """exp(exponent - shift); 0 where the shift is -inf, since nothing was seen there."""
    return np.where(shift == -np.inf, 0, np.exp(exponent - np.where(shift == -np.inf, 0, shift)))


def _no_state(inputs):
    r, e = inputs["phi_k"].shape[-1], inputs["v"].shape[-1]
    return np.zeros((r, e), inputs["v"].dtype), np.zeros(r, inputs["v"].dtype)


def _attend(inputs, causal):
    features = inputs["phi_q"], inputs["phi_k"], inputs["v"], _no_state(inputs), True
    if causal:
        return core.causal(*features, decay=inputs["decay"], rows=inputs["rows"])[0]
    return core.full(*features)[0]


def _backward(dy, inputs, causal, shapes):
    x, y, v, omega, seen = (inputs[name] for name in ("x", "y", "v", "omega", "seen"))
    shape = (*inputs["lead"], x.shape[-2], v.shape[-1])
    dy = checks.cotangent("dy", dy, shape, inputs["dtype"])
    state = _no_state(inputs)
    features = inputs["phi_q"], inputs["phi_k"], v, state, True, state
    if causal:
        grads = core.causal_vjp(dy, *features, decay=inputs["decay"], rows=inputs["rows"])
    else:
        grads = core.full_vjp(dy, *features)
    dphi_q, dphi_k, dv, _ = grads
    root, vjp = inputs["scale"] ** 0.5, PARTS_VJP[inputs["kind"]]
    dq = root * vjp(dphi_q, inputs["phi_q"], x, omega)
    dk = root * vjp(dphi_k, inputs["phi_k"], y, omega)
    if seen is not None:
        dk, dv = np.where(seen, dk, 0), np.where(seen, dv, 0)
    return gradients((dq, dk, dv), shapes, inputs["dtype"])
