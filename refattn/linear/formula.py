"""Linear attention (12.3.2), the kernel factorisation Q f(K) V: formula, gradient, cost."""

import functools

import numpy as np

from refattn import checks
from refattn.cost import Cost, qkvy_bytes, working_size
from refattn.dispatch import backends, rows_of
from refattn.linear import core
from refattn.linear.feature_maps import feature_map_of
from refattn.linear.inputs import (
    cost_up_to_last,
    cotangents,
    features_of,
    of_every_head,
    prepare,
    pull_back,
    up_to_last,
)


@backends
@np.errstate(invalid="ignore", over="ignore")
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
    return_state=False,
):
    r"""Attention whose weights factor, so that keys and values are summed once for all queries.

    .. math:: y_i = \frac{\phi(q_i)^T S}{\phi(q_i)^T z}, \qquad
              S = \sum_j \phi(k_j) v_j^T, \qquad z = \sum_j \phi(k_j)

    Causal: the sums run over j <= i, and S and z are the state of a recurrence.

    Parameters
    ----------
    q : array (..., n, d)
    k : array (..., m, d)
    v : array (..., m, e)
        One dtype for the three; leading axes broadcast. No scale is applied.
    feature_map : {"elu", "relu", "softmax", "taylor"} or FeatureMap
        phi. "elu" is elu + 1; "softmax" is over features for queries and over positions for keys
        (not causal); "taylor" gives the weights 1 + t + t^2/2 with t = q_i . k_j.
    causal : bool
        Needs n = m; the past comes in as ``initial_state``.
    normalize : bool
        Divide by phi(q)^T z. Where that is exactly 0 the output is 0; no epsilon is added.
    key_mask : bool array broadcasting to (..., m), optional
        True where a key may be attended.
    initial_state : (S (..., r, e), z (..., r)), optional
        Sums over keys that came before.
    return_state : bool
        Also return (S, z) after all keys, in the dtype of the arithmetic.
    backend : {"numpy", "numba", "cuda"}

    Returns
    -------
    y : array (..., n, e)
    state : (S (..., r, e), z (..., r))
        Only with ``return_state``.

    Raises
    ------
    TypeError
        A dtype that is not real floating point, mixed dtypes, a mask that is not boolean.
    ValueError
        Shapes that do not fit; causal with n != m or with "softmax"; an unknown feature map.
    BackendUnavailable
        The backend's code, library or driver is missing.

    Notes
    -----
    Cost: about 2 (n + m) r e FLOPs: linear in n and m. The state is r (e + 1) numbers, whatever
    the length of the past.

    Error: within eps * (m + r + 16) * c (1 + c) * max|v|, where c is the largest
    sum |phi(q_i)| |phi(k_j)| / |sum phi(q_i) phi(k_j)| of a row: 1 for features that are not
    negative, more where they cancel; a state adds its own terms. Tested against 40 digits in
    tests/test_formulas.py.
    Measured worst, on refattn.verify.certain.hard: 2.1e-11 max|v|
    (a state that takes 0.999 of the denominator).

    Where it fails: it is another attention than softmax, not an approximation with a bound; and
    with no epsilon, a denominator near the smallest number has a gradient that overflows.

    References
    ----------
    Katharopoulos et al. 2020, arXiv:2006.16236, equations 5 to 12; Shen et al. 2018,
    arXiv:1812.01243 ("softmax").

    Examples
    --------
    Equal features give the mean of the values that may be seen:

    >>> import numpy as np
    >>> v = np.array([[2.0], [4.0], [9.0]])
    >>> linear_attention(np.zeros((3, 1)), np.zeros((3, 1)), v, causal=True)
    array([[2.],
           [3.],
           [5.]])
    """
    checks.flag("return_state", return_state)
    y, state, dtype = _forward(
        q,
        k,
        v,
        feature_map=feature_map,
        causal=causal,
        normalize=normalize,
        key_mask=key_mask,
        initial_state=initial_state,
    )
    y = y.astype(dtype, copy=False)
    return (y, state) if return_state else y


@backends
@np.errstate(invalid="ignore", over="ignore")
def linear_attention_vjp(
    dy,
    q,
    k,
    v,
    *,
    feature_map="elu",
    causal=False,
    normalize=True,
    key_mask=None,
    initial_state=None,
    return_state=False,
    dstate=None,
):
    r"""Gradient of ``linear_attention``: (dq, dk, dv), and that of ``initial_state`` if given.

    .. math:: dS = \sum_i \phi(q_i)\, dnum_i^T, \quad d\phi(q_i) = S\, dnum_i + z\, dden_i, \quad
              d\phi(k_j) = dS\, v_j + dz, \quad dv_j = dS^T \phi(k_j)

    with num = phi(q)^T S and den = phi(q)^T z. Causal: S is the sum up to i, dS that from j on.

    Parameters
    ----------
    dy : array (..., n, e)
        Gradient of a scalar with respect to y.
    dstate : (dS (..., r, e), dz (..., r)), optional
        Gradient with respect to the state that is returned.
    q, k, v, feature_map, causal, normalize, key_mask, initial_state, backend
        As in the forward. ``return_state`` is accepted, so that one dict of options serves both.

    Returns
    -------
    tuple
        dq, dk, dv in the shapes of q, k, v and in q's dtype; then (dS, dz) in the shapes of
        ``initial_state``, if that came in.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As the forward; ValueError for a dy or dstate that has not the shape of its output, or a
        feature map without gradients.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros((3, 1))
    >>> linear_attention_vjp(np.ones((3, 1)), zero, zero, zero)[2].T
    array([[1., 1., 1.]])
    """
    checks.flag("return_state", return_state)
    return _backward(
        dy,
        q,
        k,
        v,
        feature_map=feature_map,
        causal=causal,
        normalize=normalize,
        key_mask=key_mask,
        initial_state=initial_state,
        dstate=dstate,
    )


def linear_attention_cost(
    n,
    m,
    d,
    e,
    *,
    feature_map="elu",
    r=None,
    causal=False,
    normalize=True,
    key_mask=None,
    initial_state=False,
    return_state=False,
    itemsize=4,
):
    """Counted cost of ``linear_attention`` for one head, by the rule of ``refattn.cost``.

    Parameters
    ----------
    n, m, d, e : int
        Queries, keys, columns of q and k, columns of v.
    feature_map : str or FeatureMap
        Its own FLOPs are counted where it tells them.
    r : int, optional
        Features; needed for a FeatureMap that does not tell its width.
    causal, normalize, initial_state, return_state
        Whether each is in use. Causal costs the same: every key enters the state once.
    key_mask : int, optional
        Visible keys, where a mask is given.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    Cost

    Examples
    --------
    >>> linear_attention_cost(2, 3, 1, 1).flops == 2 * 2 + 3 * 2 + 3 * 3 + 2 * (4 + 1)
    True
    """
    n, m, d, e = checks.sizes(n, m, d, e)
    feature_map = feature_map_of(feature_map)
    r = features_of(feature_map, r, d)
    keys = m if key_mask is None else checks.whole("key_mask", key_mask, least=0, most=m)
    working = working_size(itemsize)
    on_query, on_key = feature_map.flops(d) if feature_map.flops else (0, 0)
    flops = n * on_query + keys * on_key
    flops += keys * (2 * r * e + r)  # S, z
    flops += n * (2 * r * e + (2 * r + e if normalize else 0))  # num, den, division
    moved = qkvy_bytes(n, m, d, e, itemsize) + (0 if key_mask is None else m)
    moved += working * (r * e + r) * ((1 if initial_state else 0) + (1 if return_state else 0))
    return Cost(flops, moved, working * ((n + m) * r + r * e + r))


@backends
@np.errstate(invalid="ignore", over="ignore")
def linear_attention_step(state, q, k, v, *, feature_map="elu", normalize=True):
    r"""One step of causal linear attention: a new token meets the state of all before it.

    .. math:: S' = S + \phi(k) v^T, \quad z' = z + \phi(k), \quad
              y = \frac{\phi(q)^T S'}{\phi(q)^T z'}

    Parameters
    ----------
    state : (S (..., r, e), z (..., r)) or None
        None at the start.
    q, k : array (..., d)
    v : array (..., e)
    feature_map, normalize, backend
        As in ``linear_attention``.

    Returns
    -------
    y : array (..., e)
    state : (S', z')
        New arrays; the state that came in is not written to.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As ``linear_attention`` with causal.

    Notes
    -----
    Cost: about 4 r e FLOPs a token and r (e + 1) numbers of memory, whatever the length.

    References
    ----------
    Katharopoulos et al. 2020, arXiv:2006.16236, equations 16 to 20.

    Examples
    --------
    >>> import numpy as np
    >>> y, state = linear_attention_step(None, np.zeros(1), np.zeros(1), np.array([2.0]))
    >>> y, state = linear_attention_step(state, np.zeros(1), np.zeros(1), np.array([4.0]))
    >>> y
    array([3.])
    """
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        named[name] = checks.floating(name, x)
        if named[name].ndim < 1:
            raise ValueError(f"{name} has shape (); expected (..., {'e' if name == 'v' else 'd'})")
    rows = (x[..., None, :] for x in named.values())
    options = {"feature_map": feature_map, "normalize": normalize}
    y, state, dtype = _forward(*rows, causal=True, key_mask=None, initial_state=state, **options)
    return y[..., 0, :].astype(dtype, copy=False), state


@rows_of(
    linear_attention,
    cost=cost_up_to_last(linear_attention_cost),
    by_position=lambda sizes: sizes.get("causal", False),
)
def some_rows(rows, n, m, *, causal=False, **options):
    if not checks.flag("causal", causal):  # queries do not depend on each other
        return linear_attention, linear_attention_vjp, options
    checks.square("causal linear attention", n, m)

    def forward(q, k, v, **options):
        y, _, dtype = _forward(q, k, v, causal=True, rows=rows, **options)
        return y.astype(dtype, copy=False)

    options.setdefault("feature_map", "elu")
    for name, default in (("normalize", True), ("key_mask", None), ("initial_state", None)):
        options.setdefault(name, default)
    vjp = functools.partial(_backward, causal=True, rows=rows, dstate=None)
    return *up_to_last(rows, m, forward, vjp), options


def _forward(q, k, v, *, feature_map, causal, normalize, key_mask, initial_state, rows=None):
    """y before rounding, the state, and the dtype to round to."""
    *_, v, dtype, _, _, phi_q, phi_k, state = prepare(
        q, k, v, feature_map, causal, key_mask, initial_state, rows
    )
    checks.flag("normalize", normalize)
    if causal:
        y, state = core.causal(phi_q, phi_k, v, state, normalize, rows=rows)
    else:
        y, state = core.full(phi_q, phi_k, v, state, normalize)
    return y, of_every_head(state, y.shape[:-2]), dtype


def _backward(
    dy,
    q,
    k,
    v,
    *,
    feature_map,
    causal,
    normalize,
    key_mask,
    initial_state,
    dstate,
    rows=None,
):
    inputs = prepare(q, k, v, feature_map, causal, key_mask, initial_state, rows)
    phi_q, phi_k, state = inputs[-3:]
    v_seen = inputs[2]
    dy, dstate = cotangents(dy, dstate, inputs)
    checks.flag("normalize", normalize)
    if causal:
        grads = core.causal_vjp(dy, phi_q, phi_k, v_seen, state, normalize, dstate, rows=rows)
    else:
        grads = core.full_vjp(dy, phi_q, phi_k, v_seen, state, normalize, dstate)
    return pull_back(grads, inputs, (np.shape(q), np.shape(k), np.shape(v)), initial_state)
